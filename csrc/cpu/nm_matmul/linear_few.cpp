// The product with few rows of x, where the time is that of reading the weight. Values and places are read once, in order. Sixteen
// slots at a time, x is picked by shuffles from the few vectors that their groups span (AVX-512, where the pattern allows it:
// 16 slots are whole groups of at most 64 columns); otherwise it is gathered. Places are decoded once for all rows of x.
//
// Every sum runs over the blocks of columns in order, in sixteen parts that are added at the end of a block.
#include "common/simd_shuffle.h"
#include "cpu/nm_matmul/linear_places.h"

namespace maskops {
inline namespace MASKOPS_ISA_NS {
namespace {

constexpr int64_t kFewOutputs = 128;              // outputs at a time: their sums and a block of the weight stay in the L2 cache
constexpr int64_t kHotBytes = int64_t{32} << 10;  // of x in the L1 cache
constexpr int64_t kSlotsAtOnce = 256;             // of the gathers
constexpr int64_t kMostRows = 4;                  // of x where it is gathered

// Values in a row of x as prepared: shuffles load whole vectors, so zeros follow, up to a span of 64 past the last group.
int64_t padded_columns(const NmLayout& l) { return round_up(l.groups * l.m, 64) + 64; }

bool shuffles([[maybe_unused]] const NmProduct& p) {
#if MASKOPS_ISA_LEVEL == 2
  const NmLayout& l = p.weight.layout;
  return p.dtype != 1 && 16 % l.n == 0 && 16 / l.n * l.m <= 64;
#else
  return false;
#endif
}

// ---- gathers

template <class V, class T>
void gather_outputs(const NmProduct& p, Range outputs, const typename V::scalar* x, typename V::scalar* sums) {
  using S = typename V::scalar;
  const NmLayout& l = p.weight.layout;
  const int64_t rows = p.a.rows, padded = padded_columns(l);
  alignas(64) int32_t columns[kSlotsAtOnce];
  for (int64_t n = outputs.begin; n < outputs.end; ++n, sums += rows) {
    const T* values = static_cast<const T*>(p.weight.values) + n * p.weight.values_stride;
    const uint8_t* places = p.weight.indices + n * p.weight.indices_stride;
    for (int64_t m = 0; m < rows; ++m) sums[m] = S(0);
    int64_t start = 0;
    int in_group = 0;
    for (int64_t first = 0; first < l.slots; first += kSlotsAtOnce) {
      const int64_t count = min_of(kSlotsAtOnce, l.slots - first);
      for (int64_t i = 0; i < count; ++i) {
        columns[i] = int32_t(start + place_in_group(places, first + i, l));
        if (++in_group == l.n) {
          in_group = 0;
          start += l.m;
        }
      }
      for (int64_t i = count; i < round_up(count, V::width); ++i) columns[i] = 0;
      for (int64_t m = 0; m < rows; ++m) {
        V even = V::zero(), odd = V::zero();
        int64_t i = 0;
        for (; i + 2 * V::width <= count; i += 2 * V::width) {
          even = fma(V::load(values + first + i), gather(x + m * padded, columns + i), even);
          odd = fma(V::load(values + first + i + V::width), gather(x + m * padded, columns + i + V::width), odd);
        }
        for (; i < count; i += V::width) {
          const int64_t some = min_of<int64_t>(V::width, count - i);
          // Lanes past the end: 0 times a value that may be NaN.
          alignas(64) S picked[V::width] = {};
          for (int64_t k = 0; k < some; ++k) picked[k] = x[m * padded + columns[i + k]];
          even = fma(V::load_n(values + first + i, some), V::load(picked), even);
        }
        sums[m] += (even + odd).sum();
      }
    }
  }
}

// ---- shuffles

#if MASKOPS_ISA_LEVEL == 2

// A block of `steps` times sixteen slots of R outputs against M rows of x. kQuad: groups of four, sixteen places in 32 bits.
// kWide: the slots span more than 32 columns.
struct FewBlock {
  const NmProduct* p;
  const PlaceReader* places;
  __m512i starts;  // first column of each slot's group
  int64_t span, first, steps, padded;
};

template <bool kQuad>
inline __m512i columns_of(const FewBlock& block, const uint8_t* row, int64_t slot, bool full) {
  if (kQuad && full) {
    int32_t packed;
    memcpy(&packed, row + slot / 4, 4);
    const __m512i shifts = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const __m512i lanes = _mm512_srlv_epi32(_mm512_set1_epi32(packed), shifts);
    return _mm512_ternarylogic_epi32(lanes, _mm512_set1_epi32(3), block.starts, 0xea);  // (lanes & 3) | starts
  }
  return _mm512_add_epi32(block.places->read(row, block.p->weight.layout.row_bytes, slot), block.starts);
}

// x at sixteen columns from `from` on.
template <bool kWide>
inline VecF pick(const VecF (&x)[kWide ? 4 : 2], __m512i columns) {
  const __m512 low = _mm512_permutex2var_ps(x[0].v, columns, x[1].v);
  if constexpr (!kWide) {
    return {low};
  } else {
    const __m512 high = _mm512_permutex2var_ps(x[2].v, columns, x[3].v);
    return {_mm512_mask_blend_ps(_mm512_test_epi32_mask(columns, _mm512_set1_epi32(32)), low, high)};
  }
}

template <class T, int R, int M, bool kQuad, bool kWide>
inline void few_step(const FewBlock& block, const T* const (&values)[R], const uint8_t* const (&rows)[R], int64_t slot, int64_t count,
                     const float* x, VecF (&sum)[R][M]) {
  constexpr int kVectors = kWide ? 4 : 2;
  __m512i columns[R];
  VecF value[R];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
    columns[r] = columns_of<kQuad>(block, rows[r], slot, count == 16);
    value[r] = count == 16 ? VecF::load(values[r] + slot) : VecF::load_n(values[r] + slot, count);
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) {
    VecF from[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) from[v] = loaded_once(VecF::load(x + m * block.padded + v * 16));
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) sum[r][m] = fma(value[r], pick<kWide>(from, columns[r]), sum[r][m]);
  }
}

// A function of its own: in line, the loops around it would take its registers.
template <class T, int R, int M, bool kQuad, bool kWide>
__attribute__((noinline)) void few_block(const FewBlock& block, int64_t output, const float* x, bool add, float* to, int64_t to_stride) {
  const NmCompressed& w = block.p->weight;
  const T* values[R];
  const uint8_t* rows[R];
  VecF sum[R][M];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
    values[r] = static_cast<const T*>(w.values) + (output + r) * w.values_stride;
    rows[r] = w.indices + (output + r) * w.indices_stride;
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) sum[r][m] = VecF::zero();
  }
  const int64_t stop = min_of(block.first + block.steps * 16, w.layout.slots), full = stop - stop % 16;
  x += block.first / 16 * block.span;
  for (int64_t slot = block.first; slot < full; slot += 16, x += block.span) {
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) __builtin_prefetch(values[r] + slot + R * w.values_stride);
    few_step<T, R, M, kQuad, kWide>(block, values, rows, slot, 16, x, sum);
  }
  if (full < stop) few_step<T, R, M, kQuad, kWide>(block, values, rows, full, stop - full, x, sum);
  constexpr int kMerged = R * M <= 8 ? 8 : 16;
  VecF all[kMerged];
#pragma GCC unroll 16
  for (int i = 0; i < kMerged; ++i) all[i] = i < R * M ? sum[i / M % R][i % M] : VecF::zero();
  alignas(64) float each[16];
  sum_each(all).store(each);
  for (int r = 0; r < R; ++r) {
    for (int m = 0; m < M; ++m) to[r * to_stride + m] = (add ? to[r * to_stride + m] : 0.0f) + each[r * M + m];
  }
}

template <class T, int M, bool kQuad, bool kWide>
void few_rows(const FewBlock& block, Range outputs, const float* x, bool add, float* sums, int64_t stride) {
  constexpr int R = M <= 2 ? 4 : 2;
  int64_t n = outputs.begin;
  for (; n + R <= outputs.end; n += R, sums += R * stride) few_block<T, R, M, kQuad, kWide>(block, n, x, add, sums, stride);
  for (; n < outputs.end; ++n, sums += stride) few_block<T, 1, M, kQuad, kWide>(block, n, x, add, sums, stride);
}

// sums [outputs][rows of x]
template <class T, bool kQuad, bool kWide>
void shuffle_outputs(const NmProduct& p, Range outputs, const float* x, float* sums) {
  const NmLayout& l = p.weight.layout;
  const PlaceReader places(l);
  alignas(64) int32_t starts[16];
  for (int i = 0; i < 16; ++i) starts[i] = i / l.n * l.m;
  FewBlock block{&p, &places, _mm512_load_si512(starts), 16 / l.n * l.m, 0, 0, padded_columns(l)};
  const int64_t rows = p.a.rows;
  block.steps = max_of<int64_t>(1, kHotBytes / (4 * min_of<int64_t>(rows, 8) * block.span));
  for (; block.first == 0 || block.first < l.slots; block.first += block.steps * 16) {
    for (int64_t m = 0; m < rows;) {
      const int64_t left = rows - m;
      const float* from = x + m * block.padded;
      const bool add = block.first > 0;
      if (left >= 8) few_rows<T, 8, kQuad, kWide>(block, outputs, from, add, sums + m, rows), m += 8;
      else if (left >= 4) few_rows<T, 4, kQuad, kWide>(block, outputs, from, add, sums + m, rows), m += 4;
      else if (left >= 2) few_rows<T, 2, kQuad, kWide>(block, outputs, from, add, sums + m, rows), m += 2;
      else few_rows<T, 1, kQuad, kWide>(block, outputs, from, add, sums + m, rows), m += 1;
    }
  }
}

template <class T>
void shuffle_outputs(const NmProduct& p, Range outputs, const float* x, float* sums) {
  const NmLayout& l = p.weight.layout;
  const bool quad = l.m == 4, wide = 16 / l.n * l.m > 32;
  if (quad) return wide ? shuffle_outputs<T, true, true>(p, outputs, x, sums) : shuffle_outputs<T, true, false>(p, outputs, x, sums);
  return wide ? shuffle_outputs<T, false, true>(p, outputs, x, sums) : shuffle_outputs<T, false, false>(p, outputs, x, sums);
}

#endif

// ---- what the op calls

template <class V, class T>
void multiply_outputs(const NmProduct& p, Range outputs, const typename V::scalar* x, typename V::scalar* sums) {
#if MASKOPS_ISA_LEVEL == 2
  if constexpr (sizeof(typename V::scalar) == 4) {
    if (shuffles(p)) return shuffle_outputs<T>(p, outputs, x, sums);
  }
#endif
  gather_outputs<V, T>(p, outputs, x, sums);
}

void multiply(const NmProduct& p, Range items, const void* x, void* buffer) {
  with_storage(p.dtype, [&]<class T>() {
    using V = typename VecFor<T>::type;
    using S = typename V::scalar;
    const int64_t rows = p.a.rows, width = p.weight.outputs;
    const Range all{items.begin * kNmFewOutputs, min_of(width, items.end * kNmFewOutputs)};
    S* sums = static_cast<S*>(buffer);
    const T* bias = static_cast<const T*>(p.bias);
    T* out = static_cast<T*>(p.out);
    for (int64_t n = all.begin; n < all.end; n += kFewOutputs) {
      const Range outputs{n, min_of(all.end, n + kFewOutputs)};
      multiply_outputs<V, T>(p, outputs, static_cast<const S*>(x), sums);
      for (int64_t m = 0; m < rows; ++m) {
        for (int64_t i = outputs.begin; i < outputs.end; ++i) {
          const S sum = sums[(i - outputs.begin) * rows + m];
          from_float(bias ? sum + to_float(bias[i]) : sum, out + m * width + i);
        }
      }
    }
  });
}

// Measured against packed rows: those cost the more, the more weights are kept; shuffles cost the same, and most where places are
// not four to a byte.
int64_t most_rows(const NmProduct& p) {
  const NmLayout& l = p.weight.layout;
  if (!shuffles(p)) return kMostRows;
  return 4 * l.n <= l.m ? 28 : l.m == 4 ? 48 : 36;
}

int64_t x_bytes(const NmProduct& p) { return p.a.rows * padded_columns(p.weight.layout) * (p.dtype == 1 ? 8 : 4); }

int64_t buffer_bytes(const NmProduct& p) { return p.a.rows * kFewOutputs * (p.dtype == 1 ? 8 : 4); }

void prepare(const NmProduct& p, void* x) {
  with_storage(p.dtype, [&]<class T>() {
    using V = typename VecFor<T>::type;
    using S = typename V::scalar;
    const int64_t padded = padded_columns(p.weight.layout);
    for (int64_t m = 0; m < p.a.rows; ++m) {
      const T* from = static_cast<const T*>(p.a.data) + m * p.a.stride;
      S* to = static_cast<S*>(x) + m * padded;
      for (int64_t k = 0; k < padded; k += V::width) {
        const int64_t left = p.a.columns - k;
        (left > 0 ? V::load_n(from + k, min_of<int64_t>(left, V::width)) : V::zero()).store(to + k);
      }
    }
  });
}

}  // namespace

extern const NmFewKernels NmFewKernels_table{&most_rows, &x_bytes, &prepare, &buffer_bytes, &multiply};

}  // namespace MASKOPS_ISA_NS
}  // namespace maskops
