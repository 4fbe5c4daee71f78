// Kernels of nm_matmul_bitmask, compiled once per instruction set. A work item is one panel of B (a few columns of the result)
// against one block of rows of one sample; the packed block of rows is kept from item to item.
#include "cpu/nm_matmul/bitmask.h"

namespace maskops {
inline namespace MASKOPS_ISA_NS {
namespace {

// ---- bits

typedef uint32_t Words __attribute__((vector_size(sizeof(VecF))));
constexpr int kWords = int(sizeof(Words) / 4);
constexpr int64_t kColumnsAtOnce = 32 * kWords;  // columns of the mask that are transposed in one go

// From up to 32 rows of a mask to one number per column k, whose bit r is row r. Columns k of one go stand at k % 32 * kWords +
// k / 32, so that 32 x 32 bits are transposed in every lane of the vectors, by exchanges between vectors only.
void transpose_bits(const uint8_t* bits, int64_t row_bytes, int64_t rows, uint32_t* to) {
  for (int64_t at = 0; at < row_bytes; at += sizeof(Words), to += kColumnsAtOnce) {
    const int64_t bytes = min_of<int64_t>(row_bytes - at, sizeof(Words));
    Words word[32] = {};
    for (int64_t r = 0; r < rows; ++r) memcpy(&word[r], bits + r * row_bytes + at, size_t(bytes));
    uint32_t low = 0x0000ffffu;
#pragma GCC unroll 5
    for (int width = 16; width > 0; width >>= 1, low ^= low << width) {
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) {
        const int r = i / width * 2 * width + i % width;
        const Words swap = ((word[r] >> width) ^ word[r + width]) & low;
        word[r + width] ^= swap;
        word[r] ^= swap << width;
      }
    }
    memcpy(to, word, sizeof(word));
  }
}

// Bits [j, j + 32) of a row, as far as it goes.
inline uint32_t row_bits(const uint8_t* row, int64_t row_bytes, int64_t j) {
  const int64_t first = j / 8, bytes = min_of<int64_t>(row_bytes - first, 8);
  uint64_t word = 0;
  if (bytes == 8) memcpy(&word, row + first, 8);
  else memcpy(&word, row + first, size_t(bytes));
  return uint32_t(word >> (j % 8));
}

// ---- panels

// One packed step of a panel of `width` columns, where the bits of its first (and for pairs second) k are set.
template <class P>
inline void keep_step(const P* from, int width, uint32_t kept, uint32_t, P* to) {
  using V = typename Gemm<P>::Vec;
  for (int c = 0; c < width; c += V::width) keep_bits(V::load(from + c), kept >> c).store(to + c);
}
#if MASKOPS_ISA_LEVEL == 2
inline __m512i keep_pairs(__m512i pairs, uint32_t first, uint32_t second) {
  const __m512i low = _mm512_maskz_set1_epi32(__mmask16(first), 0xffff);
  return _mm512_and_si512(pairs, _mm512_mask_or_epi32(low, __mmask16(second), low, _mm512_set1_epi32(int(0xffff0000u))));
}
template <Bf16Unit kUnit>
inline void keep_step(const Bf16Words<kUnit>* from, int width, uint32_t first, uint32_t second, Bf16Words<kUnit>* to) {
  for (int c = 0; c < width; c += 16) _mm512_storeu_si512(to + c, keep_pairs(_mm512_loadu_si512(from + c), first >> c, second >> c));
}
#endif

// Packed steps [s0, s1) of a panel of the weight under the transposed mask; s0 is a multiple of kPanelSteps.
template <class P>
void mask_panel(const P* from, const uint32_t* transposed, int64_t s0, int64_t s1, int width, P* to) {
  constexpr int kStep = Gemm<P>::kStep, kSteps = 32 / kStep;
  from += s0 * width;
  for (int64_t s = s0; s < s1; s += kSteps) {
    const int64_t k = s * kStep, count = min_of<int64_t>(s1 - s, kSteps);
    const uint32_t* bits = transposed + k / kColumnsAtOnce * kColumnsAtOnce + k % kColumnsAtOnce / 32;
    for (int64_t i = 0; i < count; ++i, from += width, to += width) {
      keep_step(from, width, bits[i * kStep * kWords], kStep == 2 ? bits[(2 * i + 1) * kWords] : 0u, to);
    }
  }
}

// `cols` values of one row of the weight, or zeros past the last row.
template <class V, class T>
inline void keep_row(const T* from, int64_t cols, int width, uint32_t kept, typename V::scalar* to) {
  for (int c = 0; c < width; c += V::width) {
    const int64_t n = max_of<int64_t>(0, min_of<int64_t>(cols - c, V::width));
    keep_bits(n == V::width ? V::load(from + c) : V::load_n(from + c, n), kept >> c).store(to + c);
  }
}

// Packed steps [s0, s1), which are rows of the masked weight, of `cols` columns starting at j: the weight is read in place.
template <class T, class P>
void pack_masked_rows(const Bitmask& args, const uint8_t* bits, int64_t s0, int64_t s1, int64_t j, int64_t cols, int width, P* to) {
  const T* weight = static_cast<const T*>(args.weight) + j;
  for (int64_t n = s0; n < s1; ++n, to += width) {
    keep_row<typename Gemm<P>::Vec>(weight + n * args.inputs, cols, width, row_bits(bits + n * args.mask_row, args.mask_row, j), to);
  }
}
#if MASKOPS_ISA_LEVEL == 2
inline __m512i load_row(const bf16* from, int64_t cols) {
  const __mmask16 some = cols >= 16 ? __mmask16(0xffff) : __mmask16((1u << max_of<int64_t>(0, cols)) - 1u);
  return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(some, from));
}
template <class T, Bf16Unit kUnit>
void pack_masked_rows(const Bitmask& args, const uint8_t* bits, int64_t s0, int64_t s1, int64_t j, int64_t cols, int width,
                      Bf16Words<kUnit>* to) {
  const bf16* weight = static_cast<const bf16*>(args.weight) + j;
  const int64_t rows = min_of(2 * s1, args.outputs);
  if (2 * s1 > rows) memset(to + (rows + 1) / 2 * width - s0 * width, 0, size_t(s1 - (rows + 1) / 2) * width * sizeof(*to));
  for (int64_t n = 2 * s0; n < rows; n += 2, to += width) {
    const bool both = n + 1 < rows;
    const uint32_t first = row_bits(bits + n * args.mask_row, args.mask_row, j);
    const uint32_t second = both ? row_bits(bits + (n + 1) * args.mask_row, args.mask_row, j) : 0u;
    for (int c = 0; c < width; c += 16) {
      const __m512i low = load_row(weight + n * args.inputs + c, cols - c);
      const __m512i high = both ? load_row(weight + (n + 1) * args.inputs + c, cols - c) : _mm512_setzero_si512();
      _mm512_storeu_si512(to + c, keep_pairs(_mm512_or_si512(low, _mm512_slli_epi32(high, 16)), first >> c, second >> c));
    }
  }
}
#endif

// ---- forward and the gradient for x: C [M, n] of each sample, with sums over k

template <class P>
struct ProductBuffers {
  using Sum = typename Gemm<P>::Sum;
  P *a, *panel;  // the panel: one part, made where it is used
  Sum* sums;  // of a block, tile by tile
  uint32_t* transposed;

  ProductBuffers(const Blocks& blocks, int64_t k, Pieces& pieces)
      : a(pieces.take<P>(packed_a_size<P>(blocks.size, k))),
        panel(pieces.take<P>(kPanelSteps * Gemm<P>::kCols)),
        sums(pieces.take<Sum>(round_up(blocks.size, Gemm<P>::kRows) * Gemm<P>::kCols)),
        transposed(pieces.take<uint32_t>(round_up(k, kColumnsAtOnce))) {}
};

template <class P>
BitmaskPlan plan_product(const Bitmask& args, int64_t n, int64_t k) {
  const Blocks blocks = row_blocks<P>(args.rows, k);
  Pieces pieces(nullptr);
  ProductBuffers<P>(blocks, k, pieces);
  const int64_t panels = parts_of(n, Gemm<P>::kCols);
  return {panels, args.samples * blocks.number() * panels, packed_b_size<P>(n, k) * int64_t(sizeof(P)), pieces.bytes};
}

// What makes the panel of columns [j, j + cols) under a mask has
//     open(bits, j, cols, use)                       called once per panel
//     make(bits, j, cols, width, s0, s1, use)        puts its steps [s0, s1) into use.panel
//     ahead(j, s0, s1)                               touches what make will read; columns past the last are the first ones
// All of the weight does not stay in the L2 cache; to wait for it took a quarter of the time with 64 rows per sample.

// Items [begin, end) of (sample, block of rows, panel). a: [S, M, k], out: [S, M, n].
template <class P, class T, class Make>
void multiply_items(const Bitmask& args, Range items, const T* a, int64_t n, int64_t k, const T* bias, T* out, void* buffer,
                    const Make& make) {
  using G = Gemm<P>;
  const Blocks blocks = row_blocks<P>(args.rows, k);
  Pieces pieces(buffer);
  const ProductBuffers<P> use(blocks, k, pieces);
  const int64_t panels = parts_of(n, G::kCols), steps = gemm_steps<P>(k);
  int64_t packed = -1;
  for (int64_t item = items.begin; item < items.end; ++item) {
    const int64_t block = item / panels, s = block / blocks.number(), j = item % panels * G::kCols;
    const Range at = blocks.at(block % blocks.number());
    const int64_t rows = at.end - at.begin, cols = min_of<int64_t>(n - j, G::kCols);
    if (block != packed) {
      pack_a<P, T>(MatrixRows<T>{a + s * args.rows * k, k}, at.begin, rows, k, use.a);
      packed = block;
    }
    const uint8_t* bits = args.bits + s * args.mask_sample;
    const bool narrow = cols <= G::kWidth;
    make.open(bits, j, cols, use);
    multiply_panel<P>(
        rows, steps, use.a, narrow, use.sums, false,
        [&](int64_t s0, int64_t s1) {
          make.make(bits, j, cols, narrow ? G::kWidth : G::kCols, s0, s1, use);
          return use.panel;
        },
        [&](int64_t s0, int64_t s1) {
          if (s0 < steps) make.ahead(j, s0, min_of(steps, s1));
          else make.ahead(j + G::kCols, s0 - steps, min_of(steps, s1 - steps));
        });
    write_tile<typename G::Vec, T>(use.sums, G::kCols, rows, cols, bias ? bias + j : nullptr, out + (s * args.rows + at.begin) * n + j, n);
  }
}

template <class P>
struct PanelsOfPacked {
  const P* packed;
  int64_t k, mask_row;

  inline void open(const uint8_t* bits, int64_t j, int64_t cols, const ProductBuffers<P>& use) const {
    transpose_bits(bits + j * mask_row, mask_row, cols, use.transposed);
  }
  inline void make(const uint8_t*, int64_t j, int64_t, int width, int64_t s0, int64_t s1, const ProductBuffers<P>& use) const {
    mask_panel(packed + j * gemm_steps<P>(k), use.transposed, s0, s1, width, use.panel);
  }
  inline void ahead(int64_t j, int64_t s0, int64_t s1) const {
    const int64_t at = j * gemm_steps<P>(k);
    for (int64_t s = s0; s < s1; ++s) fetch_ahead(packed, at + s * Gemm<P>::kCols, Gemm<P>::kCols);
  }
};

template <class P, class T>
struct PanelsOfRows {
  const Bitmask& args;

  inline void open(const uint8_t*, int64_t, int64_t, const ProductBuffers<P>&) const {}
  inline void make(const uint8_t* bits, int64_t j, int64_t cols, int width, int64_t s0, int64_t s1, const ProductBuffers<P>& use) const {
    pack_masked_rows<T>(args, bits, s0, s1, j, cols, width, use.panel);
  }
  inline void ahead(int64_t j, int64_t s0, int64_t s1) const {
    for (int64_t n = s0 * Gemm<P>::kStep; n < s1 * Gemm<P>::kStep; ++n) {
      fetch_ahead(static_cast<const T*>(args.weight), n * args.inputs + j, Gemm<P>::kCols);
    }
  }
};

BitmaskPlan plan_forward(const Bitmask& args) {
  BitmaskPlan plan{};
  with_packed_types(args.dtype, args.products, [&]<class P, class T>() { plan = plan_product<P>(args, args.outputs, args.inputs); });
  return plan;
}

void pack_weight(const Bitmask& args, Range panels, void* packed) {
  with_packed_types(args.dtype, args.products, [&]<class P, class T>() {
    const MatrixRows<T> rows{static_cast<const T*>(args.weight), args.inputs};
    pack_b<P, T>(rows, args.outputs, args.inputs, panels.begin, panels.end, static_cast<P*>(packed));
  });
}

void forward(const Bitmask& args, Range items, const void* packed, void* buffer) {
  with_packed_types(args.dtype, args.products, [&]<class P, class T>() {
    const PanelsOfPacked<P> make{static_cast<const P*>(packed), args.inputs, args.mask_row};
    multiply_items<P, T>(args, items, static_cast<const T*>(args.x), args.outputs, args.inputs, static_cast<const T*>(args.bias),
                         static_cast<T*>(args.out), buffer, make);
  });
}

BitmaskPlan plan_grad_x(const Bitmask& args) {
  BitmaskPlan plan{};
  with_packed_types(args.dtype, args.products, [&]<class P, class T>() { plan = plan_product<P>(args, args.inputs, args.outputs); });
  return plan;
}

void grad_x(const Bitmask& args, Range items, void* buffer) {
  with_packed_types(args.dtype, args.products, [&]<class P, class T>() {
    multiply_items<P, T>(args, items, static_cast<const T*>(args.grad), args.inputs, args.outputs, nullptr, static_cast<T*>(args.out),
                         buffer, PanelsOfRows<P, T>{args});
  });
}

// ---- gradients for weight and scores: an item is a block of [N, K], over which the samples are summed in their order

template <class P>
OuterBlocks weight_blocks(const Bitmask& args) {
  return OuterBlocks::of(args.outputs, Gemm<P>::kRows, args.inputs, round_up(Gemm<P>::kCols, 8), args.threads);
}

template <class P, class T>
struct WeightBuffers {
  using Sum = typename Gemm<P>::Sum;
  OuterBuffers<P, T> product;
  Sum *weight, *scores;

  WeightBuffers(const OuterBlocks& blocks, Pieces& pieces)
      : product(blocks.rows.size, blocks.cols.size, pieces),
        weight(pieces.take<Sum>(blocks.rows.size * blocks.cols.size)),
        scores(pieces.take<Sum>(blocks.rows.size * blocks.cols.size)) {}
};

BitmaskPlan plan_grad_weight(const Bitmask& args) {
  BitmaskPlan plan{};
  with_packed_types(args.dtype, args.products, [&]<class P, class T>() {
    const OuterBlocks blocks = weight_blocks<P>(args);
    Pieces pieces(nullptr);
    WeightBuffers<P, T>(blocks, pieces);
    plan = {0, blocks.number(), 0, pieces.bytes};
  });
  return plan;
}

// out [rows, cols] = sums (times the weight), rounded to the storage type; out and weight have `columns` columns, sums `stride`.
template <class V, class T>
void write_sums(int64_t rows, int64_t cols, const typename V::scalar* sums, int64_t stride, const T* times, T* out, int64_t columns) {
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < cols; c += V::width) {
      const int64_t count = min_of<int64_t>(cols - c, V::width);
      V value = V::load_n(sums + r * stride + c, count);
      if (times) value = value * V::load_n(times + r * columns + c, count);
      value.store_n(out + r * columns + c, count);
    }
  }
}

// to += sums, where `kept` (rows of bits from column j on, or null for all) says so.
template <class V>
void add_kept(int64_t rows, int64_t cols, const typename V::scalar* sums, int64_t sums_stride, const uint8_t* kept, int64_t kept_row,
              int64_t j, typename V::scalar* to, int64_t stride) {
  for (int64_t r = 0; r < rows; ++r) {
    const uint32_t bits = kept ? row_bits(kept + r * kept_row, kept_row, j) : ~0u;
    for (int64_t c = 0; c < cols; c += V::width) {
      const int64_t count = min_of<int64_t>(cols - c, V::width);
      const V value = keep_bits(V::load(sums + r * sums_stride + c), bits >> c);
      (V::load_n(to + r * stride + c, count) + value).store_n(to + r * stride + c, count);
    }
  }
}

template <class P, class T>
void grad_weight_block(const Bitmask& args, Range rows, Range cols, const WeightBuffers<P, T>& use, int64_t stride) {
  using V = typename Gemm<P>::Vec;
  using Sum = typename Gemm<P>::Sum;
  const int64_t N = args.outputs, K = args.inputs, count = rows.end - rows.begin, at = rows.begin * K + cols.begin;
  const T* weight = static_cast<const T*>(args.weight) + at;
  T* scores = args.grad_scores ? static_cast<T*>(args.grad_scores) + at : nullptr;
  memset(use.weight, 0, size_t(count * stride) * sizeof(Sum));
  memset(use.scores, 0, size_t(count * stride) * sizeof(Sum));
  for (int64_t s = 0; s < args.samples; ++s) {
    const MatrixRows<T> grad{static_cast<const T*>(args.grad) + s * args.rows * N + rows.begin, N};
    const MatrixRows<T> x{static_cast<const T*>(args.x) + s * args.rows * K + cols.begin, K};
    const uint8_t* bits = args.bits + s * args.mask_sample + rows.begin * args.mask_row;
    multiply_outer<P, T>(grad, x, args.rows, count, cols.end - cols.begin, use.product,
                         [&](const Sum* sums, int64_t sums_stride, int64_t, int64_t j, int64_t r, int64_t c) {
      if (args.grad_weight) add_kept<V>(r, c, sums, sums_stride, bits, args.mask_row, cols.begin + j, use.weight + j, stride);
      if (scores && args.scores_per_sample) write_sums<V, T>(r, c, sums, sums_stride, weight + j, scores + s * N * K + j, K);
      if (scores && !args.scores_per_sample) add_kept<V>(r, c, sums, sums_stride, nullptr, 0, 0, use.scores + j, stride);
    });
  }
  const int64_t width = cols.end - cols.begin;
  if (args.grad_weight) write_sums<V, T>(count, width, use.weight, stride, nullptr, static_cast<T*>(args.grad_weight) + at, K);
  if (scores && !args.scores_per_sample) write_sums<V, T>(count, width, use.scores, stride, weight, scores, K);
}

void grad_weight(const Bitmask& args, Range items, void* buffer) {
  with_packed_types(args.dtype, args.products, [&]<class P, class T>() {
    const OuterBlocks blocks = weight_blocks<P>(args);
    Pieces pieces(buffer);
    const WeightBuffers<P, T> use(blocks, pieces);
    for (int64_t item = items.begin; item < items.end; ++item) {
      grad_weight_block<P, T>(args, blocks.rows_at(item), blocks.cols_at(item), use, blocks.cols.size);
    }
  });
}

// ---------------------------------------------------------------- packing

// Eight bools, any nonzero byte true, as the bits of a byte.
inline uint8_t pack_eight(uint64_t bytes) {
  constexpr uint64_t kLow = 0x7f7f7f7f7f7f7f7full;
  const uint64_t top = (((bytes & kLow) + kLow) | bytes) & ~kLow;  // the top bit of every nonzero byte
  return static_cast<uint8_t>(((top >> 7) * 0x0102040810204080ull) >> 56);
}

void pack_bits(const uint8_t* bools, int64_t count, uint8_t* bits) {
  int64_t i = 0;
#if MASKOPS_ISA_LEVEL == 2
  for (; i + 64 <= count; i += 64) {
    const __m512i some = _mm512_loadu_si512(bools + i);
    const uint64_t word = _mm512_test_epi8_mask(some, some);
    memcpy(bits + i / 8, &word, sizeof(word));
  }
#elif MASKOPS_ISA_LEVEL == 1
  for (; i + 32 <= count; i += 32) {
    const __m256i none = _mm256_cmpeq_epi8(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(bools + i)), _mm256_setzero_si256());
    const uint32_t word = ~uint32_t(_mm256_movemask_epi8(none));
    memcpy(bits + i / 8, &word, sizeof(word));
  }
#endif
  for (; i < count; i += 8) {
    uint64_t bytes = 0;  // of a little endian machine, as all of csrc/cpu assumes
    memcpy(&bytes, bools + i, size_t(min_of<int64_t>(8, count - i)));
    bits[i / 8] = pack_eight(bytes);
  }
}

}  // namespace

extern const BitmaskKernels BitmaskKernels_table{&pack_bits,   &plan_forward, &pack_weight,      &forward,
                                                 &plan_grad_x, &grad_x,       &plan_grad_weight, &grad_weight};

}  // namespace MASKOPS_ISA_NS
}  // namespace maskops
