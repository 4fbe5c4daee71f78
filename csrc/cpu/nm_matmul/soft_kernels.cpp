// Kernels of nm_matmul_soft, compiled once per instruction set: masked weights packed for the products, and the gradient of the logits.
#include "cpu/nm_matmul/soft.h"
#include "cpu/nm_matmul/soft_masks.h"

namespace maskops {
inline namespace MASKOPS_ISA_NS {
namespace {

// ---- a chunk of groups of a panel of rows

constexpr int64_t kChunkLogits = 128;   // of one row: a chunk of logits and weights of a panel stays in the L1 cache
constexpr int64_t kMostLogits = 2 * kMaxPatterns;

// Groups in a chunk; an even number, so that pairs of columns do not span two chunks.
inline int64_t chunk_groups(const Soft& soft) { return max_of<int64_t>(2, kChunkLogits / soft.group_logits() / 2 * 2); }

// Lanes are rows n0 + r of W, r < rows; lanes past the last row hold zeros. `width` lanes.
struct Chunk {
  int64_t n0, rows;
  int width;
  int64_t g0, groups;
};

template <class S>
struct ChunkBuffers {
  S *rows, *zeros;    // rows [width, logits] before they are transposed, zeros for missing rows
  S *a, *w, *masked;  // [logits, width], [columns, width] twice
  S* p;               // distributions of the relaxed top-n
  uint32_t* words;

  explicit ChunkBuffers(const Soft& soft, Pieces& pieces) {
    constexpr int64_t kLanes = Gemm<S>::kCols, kPad = 64;
    const int64_t logits = chunk_groups(soft) * soft.group_logits(), columns = chunk_groups(soft) * soft.m;
    rows = pieces.take<S>(kLanes * (max_of(logits, columns) + kPad));
    zeros = pieces.take<S>(max_of(logits, columns));
    a = pieces.take<S>(logits * kLanes);
    w = pieces.take<S>(columns * kLanes);
    masked = pieces.take<S>(columns * kLanes);
    p = pieces.take<S>(soft.patterns > 0 ? 0 : int64_t(soft.n) * soft.m * VecF::width);
    words = pieces.take<uint32_t>(logits + 2 * kPad);
    if (pieces.base) memset(zeros, 0, size_t(max_of(logits, columns)) * sizeof(S));
  }
};

// Noisy logits and weights of a chunk, transposed into lanes.
template <class T, class S>
void load_chunk(const Soft& soft, const Chunk& c, const ChunkBuffers<S>& use) {
  using V = typename VecFor<S>::type;
  constexpr int kMostLanes = 32;
  const int64_t per_group = soft.group_logits(), count = c.groups * per_group, columns = c.groups * soft.m;
  const int64_t pitch = round_up(max_of(count, columns), 16);
  const S* lanes[kMostLanes];
  for (int r = 0; r < c.width; ++r) {
    const int64_t first = ((c.n0 + r) * soft.groups + c.g0) * per_group;
    lanes[r] = r < c.rows ? use.rows + r * pitch : use.zeros;
    if (r >= c.rows) continue;
    const S* logits = static_cast<const S*>(soft.logits) + first;
    fetch_ahead(logits, count, count);  // the next chunk of the row
    noisy_logits<V>(soft.key, logits, first, count, S(soft.scale), use.words, use.rows + r * pitch);
  }
  transpose_panel(lanes, count, c.width, use.a);
  for (int r = 0; r < c.width; ++r) {
    const T* weight = static_cast<const T*>(soft.weight) + (c.n0 + r) * soft.inputs + c.g0 * soft.m;
    lanes[r] = r < c.rows ? as_packed(weight, columns, use.rows + r * pitch) : use.zeros;
    if (r < c.rows) fetch_ahead(weight, columns, columns);
  }
  transpose_panel(lanes, columns, c.width, use.w);
}

// visit(group, first lane, mask) for every group of a chunk and every vector of lanes, with the mask of the forward pass.
template <class V, class Visit>
inline void for_masks(const Soft& soft, const Chunk& c, const ChunkBuffers<typename V::scalar>& use, const Visit& visit) {
  using S = typename V::scalar;
  const auto inverse_tau = InverseTau<V>::of(soft.inverse_tau);
  V mask[kMaxGroup];
  for (int64_t g = 0; g < c.groups; ++g) {
    for (int lane = 0; lane < c.width; lane += V::width) {
      S* a = use.a + g * soft.group_logits() * c.width + lane;
      if (soft.patterns > 0) mask_of_group(soft, a, c.width, inverse_tau, mask);
      else relaxed_mask_of_group(soft, a, c.width, inverse_tau, use.p, mask);
      visit(g, lane, mask);
    }
  }
}

// masked = w * mask of a chunk; kept[lane] += the sum of its squares, where kept is not null.
template <class T, class S>
void mask_chunk(const Soft& soft, const Chunk& c, const ChunkBuffers<S>& use, S* masked, S* kept) {
  using V = typename VecFor<S>::type;
  constexpr int kMostVectors = 2;
  load_chunk<T>(soft, c, use);
  V squares[kMostVectors] = {V::zero(), V::zero()};
  for_masks<V>(soft, c, use, [&](int64_t g, int lane, const V* mask) {
    for (int k = 0; k < soft.m; ++k) {
      const int64_t at = (g * soft.m + k) * c.width + lane;
      const V value = V::load(use.w + at) * mask[k];
      value.store(masked + at);
      squares[lane / V::width] = fma(value, value, squares[lane / V::width]);
    }
  });
  if (kept == nullptr) return;
  for (int lane = 0; lane < c.width; lane += V::width) (V::load(kept + lane) + squares[lane / V::width]).store(kept + lane);
}

// from [count, width], as lanes are, to [width, count].
template <class S>
inline void from_lanes(const S* from, int64_t count, int width, S* to) {
  const S* rows[kMostLogits];
  for (int64_t i = 0; i < count; ++i) rows[i] = from + i * width;
  if (count >= 4) return transpose_panel(rows, width, int(count), to);
  for (int r = 0; r < width; ++r) {
    for (int64_t i = 0; i < count; ++i) to[r * count + i] = rows[i][r];
  }
}

// body(chunk) for the groups [g0, g1) of the panel of rows that starts at n0.
template <class Body>
inline void for_chunks(const Soft& soft, int64_t n0, int64_t rows, int width, int64_t g0, int64_t g1, const Body& body) {
  const int64_t most = chunk_groups(soft);
  for (int64_t g = g0; g < g1; g += most) body(Chunk{n0, rows, width, g, min_of(most, g1 - g)});
}

// ---- the masked weight as B, with columns n (forward) or k (gradient for x)

inline void pack_chunk(const float* masked, int64_t columns, int width, float* to) { copy_values(masked, columns * width, to); }
inline void pack_chunk(const double* masked, int64_t columns, int width, double* to) { copy_values(masked, columns * width, to); }
#if MASKOPS_ISA_LEVEL == 2
template <Bf16Unit kUnit>
inline void pack_chunk(const float* masked, int64_t columns, int width, Bf16Words<kUnit>* to) {
  for (int64_t k = 0; k < columns; k += 2, to += width) {
    for (int lane = 0; lane < width; lane += VecF::width) {
      const float* from = masked + k * width + lane;
      const VecF first = VecF::load(from), second = k + 1 < columns ? VecF::load(from + width) : VecF::zero();
      const __m512i low = _mm512_cvtepu16_epi32(first.narrow(bf16{})), high = _mm512_cvtepu16_epi32(second.narrow(bf16{}));
      _mm512_storeu_si512(to + lane, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
    }
  }
}
#endif

template <class P, class T>
void pack_by_outputs(const Soft& soft, Range panels, P* packed, void* buffer) {
  using G = Gemm<P>;
  using S = typename G::Sum;
  Pieces pieces(buffer);
  const ChunkBuffers<S> use(soft, pieces);
  for (int64_t panel = panels.begin; panel < panels.end; ++panel) {
    const int64_t n0 = panel * G::kCols, rows = min_of<int64_t>(soft.outputs - n0, G::kCols);
    const int width = rows <= G::kWidth ? G::kWidth : G::kCols;
    alignas(64) S kept[G::kCols] = {};
    for_chunks(soft, n0, rows, width, 0, soft.groups, [&](const Chunk& c) {
      mask_chunk<T, S>(soft, c, use, use.masked, kept);
      const int64_t step = c.g0 * soft.m / G::kStep;
      pack_chunk(use.masked, c.groups * soft.m, width, packed + n0 * gemm_steps<P>(soft.inputs) + step * width);
    });
    zero_steps(soft.inputs, width, packed + n0 * gemm_steps<P>(soft.inputs));
    for (int64_t r = 0; r < rows; ++r) static_cast<S*>(soft.kept)[n0 + r] = kept[r];
  }
}

// One row, or for pairs two, of the packed weight with columns k: values k0 .. k0 + count of row n, which is `even`; the row after
// it is `odd`; either may be null, which reads as zeros. Past the last column the panel is filled with zeros.
template <class P>
inline void place_row(const Soft& soft, int64_t n, int64_t k0, int64_t count, const P* even, const P*, P* packed) {
  using G = Gemm<P>;
  for (int64_t k = k0; k < k0 + count;) {
    const int64_t j = k / G::kCols * G::kCols, width = soft.inputs - j <= G::kWidth ? G::kWidth : G::kCols;
    const int64_t some = min_of(j + width, k0 + count) - k;
    P* to = packed + j * soft.outputs + n * width + k - j;
    copy_values(even + k - k0, some, to);
    k += some;
    if (k == soft.inputs) memset(to + some, 0, size_t(j + width - k) * sizeof(P));
  }
}
#if MASKOPS_ISA_LEVEL == 2
template <Bf16Unit kUnit>
inline void place_row(const Soft& soft, int64_t n, int64_t k0, int64_t count, const float* even, const float* odd,
                      Bf16Words<kUnit>* packed) {
  using P = Bf16Words<kUnit>;
  using G = Gemm<P>;
  for (int64_t k = k0; k < k0 + count;) {
    const int64_t j = k / G::kCols * G::kCols, width = soft.inputs - j <= G::kWidth ? G::kWidth : G::kCols;
    const int64_t some = min_of(min_of(j + width, k0 + count) - k, k / G::kWidth * G::kWidth + G::kWidth - k);
    const VecF first = even ? VecF::load_n(even + k - k0, some) : VecF::zero();
    const VecF second = odd ? VecF::load_n(odd + k - k0, some) : VecF::zero();
    const __m512i low = _mm512_cvtepu16_epi32(first.narrow(bf16{})), high = _mm512_cvtepu16_epi32(second.narrow(bf16{}));
    P* to = packed + j * gemm_steps<P>(soft.outputs) + n / 2 * width + k - j;
    _mm512_mask_storeu_epi32(to, VecF::first(some), _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
    k += some;
    if (k == soft.inputs) memset(to + some, 0, size_t(j + width - k) * sizeof(P));
  }
}
#endif

// The masked values of a chunk, use.masked, into the packed weight with columns k.
template <class P, class S>
void place_chunk(const Soft& soft, const Chunk& c, const ChunkBuffers<S>& use, P* packed) {
  constexpr int kStep = Gemm<P>::kStep, kUnit = kStep * Gemm<P>::kSteps;
  const int64_t columns = c.groups * soft.m;
  from_lanes(use.masked, columns, c.width, use.rows);
  auto row = [&](int64_t r) { return r < c.rows ? use.rows + r * columns : nullptr; };
  for (int64_t r = 0; r < round_up(c.rows, kUnit); r += kStep) {
    place_row(soft, c.n0 + r, c.g0 * soft.m, columns, row(r), row(r + 1), packed);
  }
}

template <class P, class T>
void pack_by_inputs(const Soft& soft, Range panels, P* packed, void* buffer) {
  using G = Gemm<P>;
  using S = typename G::Sum;
  Pieces pieces(buffer);
  const ChunkBuffers<S> use(soft, pieces);
  for (int64_t panel = panels.begin; panel < panels.end; ++panel) {
    const int64_t n0 = panel * G::kCols, rows = min_of<int64_t>(soft.outputs - n0, G::kCols);
    const int width = rows <= G::kWidth ? G::kWidth : G::kCols;
    for_chunks(soft, n0, rows, width, 0, soft.groups, [&](const Chunk& c) {
      mask_chunk<T, S>(soft, c, use, use.masked, nullptr);
      place_chunk(soft, c, use, packed);
    });
  }
}

SoftPlan plan_weight(const Soft& soft, bool by_outputs) {
  SoftPlan plan{};
  with_packed_types(soft.dtype, soft.products, [&]<class P, class T>() {
    Pieces pieces(nullptr);
    ChunkBuffers<typename Gemm<P>::Sum>(soft, pieces);
    const int64_t size = by_outputs ? packed_b_size<P>(soft.outputs, soft.inputs) : packed_b_size<P>(soft.inputs, soft.outputs);
    plan = {parts_of(soft.outputs, Gemm<P>::kCols), size * int64_t(sizeof(P)), pieces.bytes};
  });
  return plan;
}

void pack_weight(const Soft& soft, bool by_outputs, Range panels, void* packed, void* buffer) {
  with_packed_types(soft.dtype, soft.products, [&]<class P, class T>() {
    if (by_outputs) pack_by_outputs<P, T>(soft, panels, static_cast<P*>(packed), buffer);
    else pack_by_inputs<P, T>(soft, panels, static_cast<P*>(packed), buffer);
  });
}

// ---- products

template <class P>
struct ProductBuffers {
  using Sum = typename Gemm<P>::Sum;
  P* a;
  Sum* sums;  // of a block of rows with one panel

  ProductBuffers(int64_t rows, int64_t k, Pieces& pieces)
      : a(pieces.take<P>(packed_a_size<P>(rows, k))), sums(pieces.take<Sum>(round_up(rows, Gemm<P>::kRows) * Gemm<P>::kCols)) {}
};

SoftPlan plan_product(const Soft& soft, bool by_outputs) {
  const int64_t k = by_outputs ? soft.inputs : soft.outputs;
  SoftPlan plan{};
  with_packed_types(soft.dtype, soft.products, [&]<class P, class T>() {
    Pieces pieces(nullptr);
    ProductBuffers<P>(row_blocks<P>(soft.rows, k).size, k, pieces);
    plan = {parts_of(soft.rows, Gemm<P>::kRows), 0, pieces.bytes};
  });
  return plan;
}

void product(const Soft& soft, bool by_outputs, Range panels, const void* packed, void* buffer) {
  const int64_t n = by_outputs ? soft.outputs : soft.inputs, k = by_outputs ? soft.inputs : soft.outputs;
  with_packed_types(soft.dtype, soft.products, [&]<class P, class T>() {
    using G = Gemm<P>;
    using Sum = typename G::Sum;
    const int64_t most = row_blocks<P>(soft.rows, k).size;
    Pieces pieces(buffer);
    const ProductBuffers<P> use(most, k, pieces);
    const MatrixRows<T> rows{static_cast<const T*>(by_outputs ? soft.x : soft.grad), k};
    const int64_t end = min_of(soft.rows, panels.end * G::kRows);
    for (int64_t first = panels.begin * G::kRows; first < end; first += most) {
      const int64_t count = min_of(most, end - first);
      T* out = static_cast<T*>(soft.out) + first * n;
      pack_a<P, T>(rows, first, count, k, use.a);
      multiply_all_panels<P>(count, n, k, use.a, static_cast<const P*>(packed), use.sums,
                             [&](const Sum* sums, int64_t stride, int64_t i, int64_t j, int64_t r, int64_t c) {
                               write_tile<typename G::Vec, T>(sums, stride, r, c, nullptr, out + i * n + j, n);
                             });
    }
  });
}

// ---- gradient for the logits

// Blocks of the transposed gradient of the mask: columns of W, in whole groups, by panels of its rows.
template <class P>
OuterBlocks logit_blocks(const Soft& soft) {
  return OuterBlocks::of(soft.inputs, soft.m, soft.outputs, Gemm<P>::kCols, soft.threads);
}

template <class P, class T>
struct LogitBuffers {
  using S = typename Gemm<P>::Sum;
  OuterBuffers<P, T> product;
  ChunkBuffers<S> chunk;

  LogitBuffers(const Soft& soft, const OuterBlocks& blocks, Pieces& pieces)
      : product(blocks.rows.size, blocks.cols.size, pieces), chunk(soft, pieces) {}
};

SoftPlan plan_grad_logits(const Soft& soft) {
  SoftPlan plan{};
  with_packed_types(soft.dtype, soft.products, [&]<class P, class T>() {
    const OuterBlocks blocks = logit_blocks<P>(soft);
    Pieces pieces(nullptr);
    LogitBuffers<P, T>(soft, blocks, pieces);
    plan = {blocks.number(), 0, pieces.bytes};
  });
  return plan;
}

// outer: (grad^T x)^T at the columns and lanes of the chunk, rows `stride` apart.
// The masked weight goes into packed on the way, unless that is null.
template <class T, class P, class S>
void grad_chunk(const Soft& soft, const Chunk& c, const S* outer, int64_t stride, const ChunkBuffers<S>& use, P* packed) {
  using V = typename VecFor<S>::type;
  const auto inverse_tau = InverseTau<V>::of(soft.inverse_tau);
  const V scale = V::all(S(soft.scale)), factor = V::all(S(soft.inverse_tau * soft.scale)), twice = V::all(S(2 * soft.grad_kept));
  const int64_t per_group = soft.group_logits(), count = c.groups * per_group;
  load_chunk<T>(soft, c, use);
  for_masks<V>(soft, c, use, [&](int64_t g, int lane, const V* mask) {
    V grad_mask[kMaxGroup];
    for (int k = 0; k < soft.m; ++k) {
      const int64_t column = g * soft.m + k;
      const V w = V::load(use.w + column * c.width + lane), masked = w * mask[k];
      grad_mask[k] = w * fma(twice, masked, V::load(outer + column * stride + lane));
      masked.store(use.masked + column * c.width + lane);
    }
    S* a = use.a + g * per_group * c.width + lane;
    if (soft.patterns > 0) grad_of_group(soft, a, c.width, factor, grad_mask);
    else relaxed_grad_of_group(soft, a, c.width, inverse_tau, scale, use.p, grad_mask);
  });
  from_lanes(use.a, count, c.width, use.rows);
  for (int64_t r = 0; r < c.rows; ++r) {
    S* to = static_cast<S*>(soft.grad_logits) + ((c.n0 + r) * soft.groups + c.g0) * per_group;
    copy_values(use.rows + r * count, count, to);
  }
  if (packed) place_chunk(soft, c, use, packed);
}

void grad_logits(const Soft& soft, Range items, void* packed, void* buffer) {
  with_packed_types(soft.dtype, soft.products, [&]<class P, class T>() {
    using G = Gemm<P>;
    using S = typename G::Sum;
    const OuterBlocks blocks = logit_blocks<P>(soft);
    Pieces pieces(buffer);
    const LogitBuffers<P, T> use(soft, blocks, pieces);
    for (int64_t item = items.begin; item < items.end; ++item) {
      const Range columns = blocks.rows_at(item), rows = blocks.cols_at(item);
      const int64_t g0 = columns.begin / soft.m, g1 = columns.end / soft.m;
      const MatrixRows<T> x{static_cast<const T*>(soft.x) + columns.begin, soft.inputs};
      const MatrixRows<T> grad{static_cast<const T*>(soft.grad) + rows.begin, soft.outputs};
      multiply_outer<P, T>(x, grad, soft.rows, columns.end - columns.begin, rows.end - rows.begin, use.product,
                           [&](const S* sums, int64_t stride, int64_t, int64_t j, int64_t, int64_t lanes) {
                             const int width = lanes <= G::kWidth ? G::kWidth : G::kCols;
                             for_chunks(soft, rows.begin + j, lanes, width, g0, g1, [&](const Chunk& c) {
                               grad_chunk<T>(soft, c, sums + (c.g0 - g0) * soft.m * stride, stride, use.chunk, static_cast<P*>(packed));
                             });
                           });
    }
  });
}

}  // namespace

extern const SoftKernels SoftKernels_table{&plan_weight, &pack_weight, &plan_product, &product, &plan_grad_logits, &grad_logits};

}  // namespace MASKOPS_ISA_NS
}  // namespace maskops
