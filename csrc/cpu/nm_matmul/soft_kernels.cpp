// The products of nm_matmul_soft, compiled once per instruction set: float64 in doubles, all else in floats.
#include "cpu/nm_matmul/soft_mask.h"

namespace maskops {
inline namespace MASKOPS_ISA_NS {
namespace {

constexpr int64_t kChunk = 96;  // outputs whose gradient of the mask is held at a time

// run.template operator()<packed type, storage type>().
template <class Run>
void with_floats(const Soft& s, const Run& run) {
  with_types(s.dtype, false, [&]<class P, class T>() {
    if constexpr (Gemm<P>::kStep == 1) run.template operator()<P, T>();
  });
}

// Row o of the weight under its mask; returns the sum of its squares.
template <class P, class T>
P masked_row(SoftMasks<typename VecFor<P>::type>& masks, int64_t o, P* to) {
  using V = typename VecFor<P>::type;
  const Soft& s = masks.soft;
  masks.forward(o);
  const T* weight = static_cast<const T*>(s.weight) + o * s.inputs;
  V squares = V::zero();
  for (int64_t k = 0; k < s.inputs; k += V::width) {
    const int64_t n = min_of<int64_t>(V::width, s.inputs - k);
    const V value = V::load_n(weight + k, n) * V::load_n(masks.mask + k, n);
    squares = fma(value, value, squares);
    value.store_n(to + k, n);
  }
  return squares.sum();
}

template <class P, class T>
SoftPlan plan_of(const Soft& s, bool backward) {
  using V = typename VecFor<P>::type;
  using G = Gemm<P>;
  const int64_t cols = backward ? s.inputs : s.outputs, depth = backward ? s.outputs : s.inputs;
  SoftPlan plan{};
  const Blocks blocks = row_blocks<P>(s.rows, depth);
  plan.panels = backward ? s.outputs : parts_of(cols, G::kCols);
  plan.row_blocks = blocks.number();
  plan.packed_bytes = packed_b_size<P>(cols, depth) * int64_t(sizeof(P));
  Pieces pack(nullptr), block(nullptr), chunk(nullptr);
  SoftMasks<V>(s, pack);
  pack.take<P>(max_of<int64_t>(G::kCols, kRowsAtOnce) * s.inputs);
  block.take<P>(packed_a_size<P>(blocks.size, depth));
  block.take<P>(partial_size<P>(blocks.size, cols, depth));
  SoftMasks<V>(s, chunk);
  OuterBuffers<P, T>(kChunk, s.inputs, chunk);
  chunk.take<P>(kChunk * s.inputs);
  plan.pack_bytes = pack.bytes, plan.block_bytes = block.bytes, plan.chunk_bytes = chunk.bytes;
  plan.chunks = parts_of(s.outputs, kChunk);
  return plan;
}

SoftPlan plan(const Soft& s, bool backward) {
  SoftPlan found{};
  with_floats(s, [&]<class P, class T>() { found = plan_of<P, T>(s, backward); });
  return found;
}

void pack(const Soft& s, Range panels, void* packed, void* buffer) {
  with_floats(s, [&]<class P, class T>() {
    using G = Gemm<P>;
    Pieces pieces(buffer);
    SoftMasks<typename VecFor<P>::type> masks(s, pieces);
    P* lines = pieces.take<P>(G::kCols * s.inputs);
    for (int64_t panel = panels.begin; panel < panels.end; ++panel) {
      const int64_t first = panel * G::kCols, last = min_of(s.outputs, first + G::kCols);
      for (int64_t o = first; o < last; ++o) static_cast<P*>(s.kept)[o] = masked_row<P, T>(masks, o, lines + (o - first) * s.inputs);
      const MatrixRows<P> rows{lines - first * s.inputs, s.inputs};
      pack_b<P, P>(rows, s.outputs, s.inputs, panel, panel + 1, static_cast<P*>(packed));
    }
  });
}

void pack_rows_of_b(const Soft& s, Range outputs, void* packed, void* buffer) {
  with_floats(s, [&]<class P, class T>() {
    Pieces pieces(buffer);
    SoftMasks<typename VecFor<P>::type> masks(s, pieces);
    P* lines = pieces.take<P>(kRowsAtOnce * s.inputs);
    auto row = [&](int64_t o, int64_t, int64_t, P* to) {
      masked_row<P, T>(masks, o, to);
      return static_cast<const P*>(to);
    };
    pack_b_rows<P, P>(row, s.inputs, s.outputs, outputs.begin, outputs.end, lines, static_cast<P*>(packed));
  });
}

// out [M, cols] = a [M, depth] times the packed masked weight, for blocks of rows.
template <class P, class T>
void multiply_blocks(const Soft& s, const void* a, int64_t depth, int64_t cols, Range some, const void* packed, void* buffer) {
  using V = typename Gemm<P>::Vec;
  using Sum = typename Gemm<P>::Sum;
  const Blocks blocks = row_blocks<P>(s.rows, depth);
  Pieces pieces(buffer);
  P* packed_a = pieces.take<P>(packed_a_size<P>(blocks.size, depth));
  Sum* partial = pieces.take<Sum>(partial_size<P>(blocks.size, cols, depth));
  for (int64_t b = some.begin; b < some.end; ++b) {
    const Range at = blocks.at(b);
    pack_a<P, T>(MatrixRows<T>{static_cast<const T*>(a), depth}, at.begin, at.end - at.begin, depth, packed_a);
    multiply_packed<P>(at.end - at.begin, cols, depth, packed_a, static_cast<const P*>(packed), partial,
                       [&](const Sum* tile, int64_t stride, int64_t i, int64_t j, int64_t r, int64_t c) {
                         T* to = static_cast<T*>(s.out) + (at.begin + i) * cols + j;
                         write_tile<V>(tile, stride, r, c, static_cast<const T*>(nullptr), to, cols);
                       });
  }
}

void forward(const Soft& s, Range blocks, const void* packed, void* buffer) {
  with_floats(s, [&]<class P, class T>() { multiply_blocks<P, T>(s, s.x, s.inputs, s.outputs, blocks, packed, buffer); });
}

void grad_x(const Soft& s, Range blocks, const void* packed, void* buffer) {
  with_floats(s, [&]<class P, class T>() { multiply_blocks<P, T>(s, s.grad, s.outputs, s.inputs, blocks, packed, buffer); });
}

// d mask = (grad^T x) * weight + 2 * grad_kept * weight^2 * mask, in place of grad^T x.
template <class V, class T, class S>
void grad_of_mask(const Soft& s, const T* weight, const S* mask, S* grad) {
  const V twice = V::all(S(2 * s.grad_kept));
  for (int64_t k = 0; k < s.inputs; k += V::width) {
    const int64_t n = min_of<int64_t>(V::width, s.inputs - k);
    const V w = V::load_n(weight + k, n);
    (w * fma(twice, w * V::load_n(mask + k, n), V::load_n(grad + k, n))).store_n(grad + k, n);
  }
}

void grad_logits(const Soft& s, Range chunks, void* buffer) {
  with_floats(s, [&]<class P, class T>() {
    using V = typename VecFor<P>::type;
    Pieces pieces(buffer);
    SoftMasks<V> masks(s, pieces);
    const OuterBuffers<P, T> use(kChunk, s.inputs, pieces);
    P* sums = pieces.take<P>(kChunk * s.inputs);
    for (int64_t chunk = chunks.begin; chunk < chunks.end; ++chunk) {
      const int64_t first = chunk * kChunk, count = min_of(kChunk, s.outputs - first);
      const MatrixRows<T> grad{static_cast<const T*>(s.grad) + first, s.outputs}, x{static_cast<const T*>(s.x), s.inputs};
      multiply_outer<P, T>(grad, x, s.rows, count, s.inputs, use, sums, s.inputs);
      for (int64_t o = first; o < first + count; ++o) {
        P* row = sums + (o - first) * s.inputs;
        masks.forward(o);
        grad_of_mask<V>(s, static_cast<const T*>(s.weight) + o * s.inputs, masks.mask, row);
        masks.backward(row, static_cast<P*>(s.grad_logits) + o * masks.groups * s.patterns);
      }
    }
  });
}

}  // namespace

extern const SoftKernels SoftKernels_table{&plan, &pack, &pack_rows_of_b, &forward, &grad_x, &grad_logits};

}  // namespace MASKOPS_ISA_NS
}  // namespace maskops
