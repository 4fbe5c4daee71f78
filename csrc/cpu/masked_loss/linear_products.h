// The three products of linear_cross_entropy, as floats or of bfloat16 in AMX tiles. A tile is 96 classes by all rows that count, kept
// transposed: classes down, rows across, so that a vector holds one class of 16 rows and the softmax needs no sums across lanes:
//     logits [96, M] = weight [96, D] hidden^T;   grad_weight [96, D] = slope [96, M] hidden;   grad_hidden [M, D] += slope^T weight
// grad_hidden is summed over the classes in their order, so neither threads nor tiles change a bit.
#pragma once

#include "common/amx.h"
#include "common/gemm_strided.h"
#include "common/pieces.h"
#include "cpu/masked_loss/linear.h"

namespace maskops {
inline namespace MASKOPS_ISA_NS {

constexpr int64_t kPanel = LinearLoss::kPanel, kTile = LinearLoss::kTile, kRowUnit = LinearLoss::kRowUnit;
constexpr int64_t kSteps = 128;     // rows of a panel that stay in the L1 cache
constexpr int64_t kRowBlock = 192;  // rows of grad_hidden at a time

template <class S>
static inline S* at(void* base, int64_t offset) {
  return static_cast<S*>(base) + offset;
}

// Both operands as panels of 64 columns, so that no product needs another transposition.
template <class T>
struct FloatLoss {
  using V = typename VecFor<T>::type;
  using S = typename V::scalar;
  using Type = T;
  struct Scope {};
  const LinearLoss& a;

  static LinearBytes bytes(const LinearLoss& a, bool backward) {
    const int64_t element = sizeof(S), panels = round_up(a.D, backward ? kPanel : kSteps) * kTile, rows = a.d_panels() * a.stride * kPanel;
    LinearBytes bytes{};
    bytes.across = backward && a.kept == a.M ? 0 : a.row_panels() * a.D * kPanel * element;
    bytes.along = bytes.grad_hidden = backward ? rows * element : 0;
    bytes.panels = backward ? panels * element : 0, bytes.logits = backward ? kTile * a.stride * element : 0;
    bytes.thread = (backward ? kTile * round_up(a.D, kPanel) : panels + kTile * a.stride) * element;
    return bytes;
  }

  int64_t classes(int64_t tile) const { return min_of(kTile, a.V - tile * kTile); }
  int64_t width(int64_t q) const { return min_of(kPanel, round_up(a.D - q * kPanel, V::width)); }
  int64_t tile_panels() const { return a.d_panels() * kTile * kPanel; }

  void pack_rows(int64_t p) const {
    const int64_t first = p * kPanel, count = min_of(kPanel, a.stride - first);
    S* across = a.across == nullptr ? nullptr : at<S>(a.across, p * a.D * kPanel);
    for (int64_t r = 0; r < count; ++r) {
      const bool real = first + r < a.M;
      const T* from = real ? static_cast<const T*>(a.hidden) + a.rows[first + r] * a.hidden_stride : nullptr;
      for (int64_t q = 0; q < a.d_panels(); ++q) {
        S* along = a.along == nullptr ? nullptr : at<S>(a.along, (q * a.stride + first + r) * kPanel);
        for (int64_t d = 0; d < kPanel; ++d) {
          const int64_t at = q * kPanel + d;
          const S value = real && at < a.D ? S(to_float(from[at])) : S(0);
          if (along != nullptr) along[d] = value;
          if (across != nullptr && at < a.D) across[at * kPanel + r] = value;
        }
      }
    }
  }

  // The classes of a tile: [panels of D][kTile][depth], zeros past D.
  void pack_weight(int64_t tile, int64_t depth, S* to) const {
    const int64_t count = classes(tile);
    for (int64_t v = 0; v < count; ++v) {
      const T* from = static_cast<const T*>(a.weight) + (tile * kTile + v) * a.weight_stride;
      for (int64_t q = 0; q < parts_of(a.D, depth); ++q) {
        S* row = to + (q * kTile + v) * depth;
        const int64_t real = min_of(depth, a.D - q * depth);
        int64_t d = 0;
        for (; d + V::width <= real; d += V::width) V::load(from + q * depth + d).store(row + d);
        for (; d < depth; d += V::width) {
          (d < real ? V::load_n(from + q * depth + d, real - d) : V::zero()).store(row + d);
        }
      }
    }
  }

  // Logits of a tile without bias and scale, in a buffer of panels and logits.
  S* logits(int64_t tile, void* buffer) const {
    S *panels = static_cast<S*>(buffer), *to = panels + round_up(a.D, kSteps) * kTile;
    fill(tile, 0, kSteps, panels, to);
    return to;
  }
  // The same of the i-th of a super tile, where the other products find it; rows from `first` on, 64 of them or all before it.
  S* shared_logits(int64_t i, int64_t tile, int64_t first, void*) const {
    S* to = at<S>(a.logits, i * kTile * a.stride);
    fill(tile, first, kPanel, at<S>(a.panels, i * tile_panels()), to);
    return to;
  }

  // The gradient of the weight of a tile; buffer: [kTile, whole panels of D].
  void weight_gradient(int64_t, int64_t tile, S* slopes, void* buffer) const {
    const int64_t count = classes(tile), wide = round_up(a.D, kPanel);
    T* out = static_cast<T*>(a.grad_weight) + tile * kTile * a.D;
    constexpr bool kSame = sizeof(S) == sizeof(T);
    S* sums = kSame && wide == a.D ? reinterpret_cast<S*>(out) : static_cast<S*>(buffer);
    const int64_t steps = round_up(parts_of(a.stride, parts_of(a.stride, kSteps)), kRowUnit);  // parts of one size
    for (int64_t q = 0; q < a.d_panels(); ++q) {
      const S* along = at<S>(a.along, q * a.stride * kPanel);
      for (int64_t m = 0; m < a.stride; m += steps) {
        multiply_strided<S>(count, width(q), min_of(steps, a.stride - m), {slopes + m, a.stride, 1}, along + m * kPanel, kPanel,
                            StridedC<S>{sums + q * kPanel, wide, m > 0});
      }
    }
    if (kSame && wide == a.D) return;
    for (int64_t v = 0; v < count; ++v) {
      const S* from = sums + v * wide;
      int64_t d = 0;
      for (; d + V::width <= a.D; d += V::width) V::load(from + d).store(out + v * a.D + d);
      if (d < a.D) V::load_n(from + d, a.D - d).store_n(out + v * a.D + d, a.D - d);
    }
  }

  // Items: block of rows, panel of D.
  static int64_t hidden_items(const LinearLoss& a) { return a.d_panels() * parts_of(a.stride, kRowBlock); }
  void add_hidden(int64_t first, int64_t tiles, int64_t item) const {
    const int64_t q = item % a.d_panels(), m = item / a.d_panels() * kRowBlock;
    const int64_t rows = min_of(kRowBlock, a.stride - m);
    S* to = at<S>(a.grad_hidden, (q * a.stride + m) * kPanel);
    for (int64_t i = 0; i < tiles; ++i) {
      const S* panel = at<S>(a.panels, i * tile_panels() + q * kTile * kPanel);
      const S* slope = at<S>(a.logits, i * kTile * a.stride + m);
      multiply_strided<S>(rows, width(q), classes(first + i), {slope, 1, a.stride}, panel, kPanel, StridedC<S>{to, kPanel, true});
    }
  }

  void unpack(T* to, int64_t m) const {
    for (const int64_t end = min_of(m + kRowUnit, a.M); m < end; ++m) {
      T* row = to + a.rows[m] * a.D;
      for (int64_t d = 0; d < a.D; d += V::width) {
        const int64_t q = d / kPanel;
        V::load(at<S>(a.grad_hidden, (q * a.stride + m) * kPanel + d % kPanel)).store_n(row + d, min_of<int64_t>(V::width, a.D - d));
      }
    }
  }

 private:
  void fill(int64_t tile, int64_t first, int64_t depth, S* panels, S* logits) const {
    pack_weight(tile, depth, panels);
    const int64_t count = classes(tile);
    if (a.D == 0) memset(logits, 0, size_t(count * a.stride) * sizeof(S));  // no product writes them
    for (int64_t p = parts_of(first, kPanel); p < a.row_panels(); ++p) {
      const int64_t rows = min_of(kPanel, a.stride - p * kPanel);
      const S* across = at<S>(a.across, p * a.D * kPanel);
      for (int64_t d = 0; d < a.D; d += depth) {
        multiply_strided<S>(count, rows, min_of(depth, a.D - d), {panels + d * kTile, depth, 1}, across + d * kPanel, kPanel,
                            StridedC<S>{logits + p * kPanel, a.stride, d > 0});
      }
    }
  }
};

#if MASKOPS_ISA_LEVEL == 2

// Right operands lie in panels of 32 columns, words of two steps. What is summed over is padded to 32: D for the logits, rows for
// grad_weight. grad_hidden is kept transposed, [D, stride]; a super tile is one sum over its classes, its last tile padded with zeros.
struct AmxLoss {
  using V = VecF;
  using S = float;
  using Type = bf16;
  using Scope = AmxScope;
  static constexpr int64_t kColumns = 32;
  const LinearLoss& a;
  const int64_t depth, width, steps;  // D of whole sums and of whole rows; rows that count of whole sums

  explicit AmxLoss(const LinearLoss& args)
      : a(args), depth(round_up(a.D, kAmxDepth)), width(round_up(a.D, kAmxRows)), steps(round_up(a.stride, kAmxDepth)) {}

  static LinearBytes bytes(const LinearLoss& args, bool backward) {
    const AmxLoss of(args);
    const int64_t weight = kTile * of.depth * 2, logits = kTile * args.stride * 4, slopes = kTile * of.steps * 2;
    LinearBytes bytes{};
    bytes.across = backward && args.kept == args.M ? 0 : of.depth * of.steps * 2;
    if (backward) {
      bytes.along = of.depth * of.steps * 2, bytes.grad_hidden = of.width * args.stride * 4;
      bytes.panels = of.width * kTile * 2, bytes.logits = slopes;
    }
    bytes.thread = weight + logits + (backward ? slopes : 0);
    return bytes;
  }

  int64_t classes(int64_t tile) const { return min_of(kTile, a.V - tile * kTile); }

  // Rows [64 p, 64 p + 64) of hidden: pairs of channels, and of rows.
  void pack_rows(int64_t p) const {
    alignas(64) bf16 rows[kPanel * kColumns];
    for (int64_t d = 0; d < depth; d += kColumns) {
      const __mmask32 some = first_lanes(a.D - d);
      for (int64_t r = 0; r < kPanel; ++r) {
        const int64_t m = p * kPanel + r;
        const bf16* from = m < a.M ? static_cast<const bf16*>(a.hidden) + a.rows[m] * a.hidden_stride + d : nullptr;
        _mm512_storeu_si512(rows + r * kColumns, _mm512_maskz_loadu_epi16(from == nullptr ? 0 : some, from));
      }
      for (int64_t m = p * kPanel; m < min_of((p + 1) * kPanel, steps); m += kColumns) {
        const bf16* part = rows + (m - p * kPanel) * kColumns;
        if (a.across != nullptr) {
          uint32_t* across = at<uint32_t>(a.across, (m * depth + d * kColumns) / 2);
          amx_transpose_words(part, kColumns, kColumns, kColumns, kColumns, kColumns, across, kColumns);
        }
        if (a.along == nullptr) continue;
        amx_pair_rows(part, kColumns, kColumns, kColumns, kColumns, kColumns, at<uint32_t>(a.along, (d * steps + m * kColumns) / 2));
      }
    }
  }

  S* logits(int64_t tile, void* buffer) const { return fill(tile, 0, buffer); }

  S* shared_logits(int64_t i, int64_t tile, int64_t first, void* buffer) const {
    const bf16* weight = static_cast<const bf16*>(a.weight) + tile * kTile * a.weight_stride;
    amx_transpose_rows(weight, a.weight_stride, classes(tile), a.D, kTile, width, at<bf16>(a.panels, i * kTile), a.together * kTile);
    return fill(tile, first, buffer);
  }

  S* fill(int64_t tile, int64_t first, void* buffer) const {
    const int64_t count = classes(tile), rows = round_up(count, kAmxRows);
    S* to = reinterpret_cast<S*>(static_cast<bf16*>(buffer) + kTile * depth);
    if (first >= a.stride) return to;
    const bf16* weight = static_cast<const bf16*>(a.weight) + tile * kTile * a.weight_stride;
    AmxA left{weight, a.weight_stride};
    bf16* copy = static_cast<bf16*>(buffer);
    if (count < rows || a.D < depth) {
      amx_copy_rows(weight, a.weight_stride, count, a.D, rows, depth, copy);
      left = {copy, depth};
    }
    for (int64_t m = first; m < a.stride; m += kColumns) {
      amx_multiply(rows, min_of(kColumns, a.stride - m), depth, left, {at<uint32_t>(a.across, m * depth / 2), kColumns},
                   {to + m, a.stride, false});
    }
    return to;
  }
  void weight_gradient(int64_t i, int64_t tile, S* slopes, void* buffer) const {
    const int64_t count = classes(tile), rows = round_up(count, kAmxRows);
    bf16* left = reinterpret_cast<bf16*>(static_cast<char*>(buffer) + kTile * depth * 2 + kTile * a.stride * 4);
    for (int64_t v = 0; v < kTile; v += 2) pack_slopes(v < count ? slopes + v * a.stride : nullptr, v + 1 < count, i, v, left);
    bf16* out = static_cast<bf16*>(a.grad_weight) + tile * kTile * a.D;
    alignas(64) float sums[kTile * kColumns];
    for (int64_t d = 0; d < a.D; d += kColumns) {
      amx_multiply(rows, kColumns, steps, {left, steps}, {at<uint32_t>(a.along, d * steps / 2), kColumns}, {sums, kColumns, false});
      const AmxResult result(nullptr, a.D - d);
      for (int64_t v = 0; v < count; ++v) result.write(sums + v * kColumns, out + v * a.D + d);
    }
  }

  // Items: 32 channels, block of rows.
  static int64_t hidden_items(const LinearLoss& a) { return parts_of(a.D, kColumns) * parts_of(a.stride, kRowBlock); }

  void add_hidden(int64_t, int64_t tiles, int64_t item) const {
    const int64_t across = parts_of(a.D, kColumns), d = item % across * kColumns, begin = item / across * kRowBlock;
    const AmxA left{at<bf16>(a.panels, d * a.together * kTile), a.together * kTile};
    for (int64_t m = begin; m < min_of(begin + kRowBlock, a.stride); m += kColumns) {
      const AmxB right{at<uint32_t>(a.logits, m * a.together * kTile / 2), kColumns};
      amx_multiply(min_of(kColumns, width - d), min_of(kColumns, a.stride - m), tiles * kTile, left, right,
                   {at<float>(a.grad_hidden, d * a.stride + m), a.stride, true});
    }
  }

  void unpack(bf16* to, int64_t m) const {
    const int64_t count = min_of(kRowUnit, a.M - m);
    for (int64_t d = 0; d < a.D; d += VecF::width) {
      VecF block[VecF::width];
#pragma GCC unroll 16
      for (int c = 0; c < VecF::width; ++c) block[c] = VecF::load(at<float>(a.grad_hidden, (d + c) * a.stride + m));
      transpose(block);
      for (int64_t r = 0; r < count; ++r) block[r].store_n(to + a.rows[m + r] * a.D + d, min_of<int64_t>(VecF::width, a.D - d));
    }
  }

 private:
  // Classes v and v + 1 of the i-th tile: rows of bfloat16 for grad_weight, and words of two classes for grad_hidden.
  void pack_slopes(const float* even, bool both, int64_t i, int64_t v, bf16* left) const {
    for (int64_t m = 0; m < steps; m += VecF::width) {
      const bool real = even != nullptr && m < a.stride;
      const VecF x = real ? VecF::load(even + m) : VecF::zero(), y = real && both ? VecF::load(even + a.stride + m) : VecF::zero();
      const __m256i low = __m256i(_mm512_cvtneps_pbh(x.v)), high = __m256i(_mm512_cvtneps_pbh(y.v));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(left + v * steps + m), low);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(left + (v + 1) * steps + m), high);
      const __m512i words = _mm512_or_si512(_mm512_cvtepu16_epi32(low), _mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16));
      const int64_t panel = m / kColumns * kColumns;
      _mm512_storeu_si512(at<uint32_t>(a.logits, (panel * a.together * kTile + (i * kTile + v) * kColumns) / 2 + m % kColumns), words);
    }
  }
};

#endif

// run.template operator()<products>()
template <class Run>
static inline auto with_products(const LinearLoss& a, const Run& run) {
#if MASKOPS_ISA_LEVEL == 2
  if (a.amx) return run.template operator()<AmxLoss>();
#endif
  switch (a.dtype) {  // codes of common/dispatch.h
    case 0: return run.template operator()<FloatLoss<float>>();
    case 1: return run.template operator()<FloatLoss<double>>();
    case 2: return run.template operator()<FloatLoss<bf16>>();
    default: return run.template operator()<FloatLoss<f16>>();
  }
}

}  // namespace MASKOPS_ISA_NS
}  // namespace maskops
