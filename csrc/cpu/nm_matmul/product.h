// What the products of nm_matmul share, compiled once per instruction set: types, rows of matrices, blocks, buffers, results.
#pragma once

#include "common/gemm.h"
#include "common/simd_math.h"

namespace maskops {

struct Range {
  int64_t begin, end;
};

inline namespace MASKOPS_ISA_NS {

// Cuts a buffer into aligned pieces; without a buffer it only counts the bytes.
struct Pieces {
  char* base;
  int64_t bytes = 0;

  explicit Pieces(void* buffer) : base(static_cast<char*>(buffer)) {}
  template <class T>
  inline T* take(int64_t count) {
    const int64_t at = bytes;
    bytes += round_up(count * int64_t(sizeof(T)), 64);
    return base == nullptr ? nullptr : reinterpret_cast<T*>(base + at);
  }
};

// run.template operator()<packed type, storage type>(); pairs: bfloat16 is multiplied as such.
template <class Run>
static inline void with_types(int dtype, [[maybe_unused]] bool pairs, const Run& run) {
  switch (dtype) {
    case 0: return run.template operator()<float, float>();
    case 1: return run.template operator()<double, double>();
    case 2:
#if MASKOPS_ISA_LEVEL == 2
      if (pairs) return run.template operator()<Bf16Pair, bf16>();
#endif
      return run.template operator()<float, bf16>();
    default: return run.template operator()<float, f16>();
  }
}

template <class T>
struct MatrixRows {
  const T* data;
  int64_t stride;

  inline const T* operator()(int64_t i, int64_t j0, int64_t, T*) const { return data + i * stride + j0; }
};

static inline int64_t parts_of(int64_t count, int64_t unit) { return (count + unit - 1) / unit; }

// `count` cut into about equal blocks of at most `most`, which are multiples of `unit`.
struct Blocks {
  int64_t count, size;

  static inline Blocks of(int64_t count, int64_t most, int64_t unit) {
    const int64_t blocks = parts_of(count, most < unit ? unit : most);
    return {count, blocks == 0 ? unit : round_up(parts_of(count, blocks), unit)};
  }
  inline int64_t number() const { return parts_of(count, size); }
  inline Range at(int64_t i) const { return {i * size, min_of(count, (i + 1) * size)}; }
};

// Rows of A in a block: many, as each block reads all of B; few enough that the block stays in the L2 cache beside a panel of B.
template <class P>
static inline Blocks row_blocks(int64_t rows, int64_t k) {
  constexpr int64_t kBytes = int64_t{1} << 20, kLeast = 48;
  const int64_t fit = kBytes / (int64_t(sizeof(P)) * max_of<int64_t>(1, gemm_steps<P>(k)));
  const int64_t most = min_of(kGemmRows, max_of(kLeast, fit)) / Gemm<P>::kRows * Gemm<P>::kRows;
  return Blocks::of(rows, most, Gemm<P>::kRows);
}

// out[r, c] = tile[r, c] + bias[c]; bias may be null.
template <class V, class T>
static inline void write_tile(const typename V::scalar* tile, int64_t stride, int64_t rows, int64_t cols, const T* bias, T* out,
                              int64_t out_stride) {
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < cols; c += V::width) {
      const int64_t n = min_of<int64_t>(cols - c, V::width);
      V value = V::load(tile + r * stride + c);
      if (bias) value = value + V::load_n(bias + c, n);
      value.store_n(out + r * out_stride + c, n);
    }
  }
}

// to[r, c] = (add ? to[r, c] : 0) + tile[r, c]
template <class V>
static inline void add_tile(const typename V::scalar* tile, int64_t stride, int64_t rows, int64_t cols, bool add,
                            typename V::scalar* to, int64_t to_stride) {
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < cols; c += V::width) {
      const int64_t n = min_of<int64_t>(cols - c, V::width);
      V value = V::load(tile + r * stride + c);
      if (add) value = V::load_n(to + r * to_stride + c, n) + value;
      value.store_n(to + r * to_stride + c, n);
    }
  }
}

// ---- A^T B: sums over the rows of A [depth, m] and B [depth, n], as gradients of weights are ---------------------------------

constexpr int64_t kOuterDepth = 512;  // rows per product: packed pieces of A and B and the sums share the L2 cache

template <class P, class T>
struct OuterBuffers {
  P *a, *b;
  T* lines;

  OuterBuffers(int64_t rows, int64_t cols, Pieces& pieces)
      : a(pieces.take<P>(packed_a_size<P>(rows, kOuterDepth))),
        b(pieces.take<P>(packed_b_size<P>(cols, kOuterDepth))),
        lines(pieces.take<T>(kRowsAtOnce * max_of(rows, cols))) {}
};

// sums[i, j] = sum over d < depth of a[d, i] * b[d, j] for `rows` columns of a and `cols` columns of b, in pieces of fixed size.
template <class P, class T>
static void multiply_outer(MatrixRows<T> a, MatrixRows<T> b, int64_t depth, int64_t rows, int64_t cols, const OuterBuffers<P, T>& use,
                           typename Gemm<P>::Sum* sums, int64_t stride) {
  using V = typename Gemm<P>::Vec;
  using Sum = typename Gemm<P>::Sum;
  const Blocks pieces = Blocks::of(depth, kOuterDepth, Gemm<P>::kStep);
  for (int64_t piece = 0; piece == 0 || piece < pieces.number(); ++piece) {  // no rows at all: the sums are zeros
    const Range at = pieces.at(piece);
    const int64_t count = at.end - at.begin;
    pack_a_rows<P, T>(MatrixRows<T>{a.data + at.begin * a.stride, a.stride}, 0, rows, count, use.lines, use.a);
    pack_b_rows<P, T>(MatrixRows<T>{b.data + at.begin * b.stride, b.stride}, cols, count, 0, gemm_steps<P>(count), use.lines, use.b);
    multiply_packed<P>(rows, cols, count, use.a, use.b, nullptr,
                       [&](const Sum* tile, int64_t tile_stride, int64_t i, int64_t j, int64_t r, int64_t c) {
                         add_tile<V>(tile, tile_stride, r, c, piece > 0, sums + i * stride + j, stride);
                       });
  }
}

}  // namespace MASKOPS_ISA_NS
}  // namespace maskops
