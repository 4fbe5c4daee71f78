// feature_reuse_attention on the CPU.
#include "cpu/feature_reuse/attention.h"

#include "common/amx_softmax.h"
#include "common/gemm_strided.h"
#include "common/pieces.h"
#include "common/simd_math.h"
#include "common/simd_shuffle.h"

namespace maskops {
inline namespace MASKOPS_ISA_NS {
namespace {

constexpr int64_t kTile = 64, kBlock = 64;  // queries, keys
constexpr double kLog2E = 1.4426950408889634, kLn2 = 0.6931471805599453;

template <class Run>
auto with_vectors(int dtype, const Run& run) {
  switch (dtype) {
    case 0: return run.template operator()<VecF, float>();
    case 1: return run.template operator()<VecD, double>();
    case 2: return run.template operator()<VecF, bf16>();
    default: return run.template operator()<VecF, f16>();
  }
}

template <class V>
int64_t padded(int64_t channels) {
  return round_up(channels, V::width);
}

template <class V>
struct Buffers {
  using S = typename V::scalar;
  S *queries, *keys, *values, *scores, *sums;  // [D, 64], [64, padded] twice, [64, 64], [64, padded]
  S *top, *total, *decay;                      // [64] of each query: highest score, sum of weights 2^(score - top), last change of it

  Buffers(const CachedAttention& a, Pieces& pieces)
      : queries(pieces.take<S>(a.D * kTile)), keys(pieces.take<S>(kBlock * padded<V>(a.D))), values(pieces.take<S>(kBlock * padded<V>(a.D))),
        scores(pieces.take<S>(kBlock * kTile)), sums(pieces.take<S>(kTile * padded<V>(a.D))), top(pieces.take<S>(kTile)),
        total(pieces.take<S>(kTile)), decay(pieces.take<S>(kTile)) {}
};

template <class T>
const T* row_of(const TokenRows& rows, int64_t b, int64_t h, int64_t n) {
  return static_cast<const T*>(rows.data) + rows.strides.at(b, h, n);
}

// to[d * kTile + i] = scale * query i, channel d; zeros for queries past the last.
template <class V, class T>
void transpose_queries(const CachedAttention& a, int64_t b, int64_t h, int64_t first, int64_t rows, typename V::scalar scale,
                       typename V::scalar* to) {
  constexpr int W = V::width;
  const V by = V::all(scale);
  for (int64_t i = 0; i < round_up(rows, W); i += W) {
    for (int64_t d = 0; d < a.D; d += W) {
      const int64_t some = min_of<int64_t>(W, a.D - d);
      V block[W];
      for (int r = 0; r < W; ++r) {
        const int64_t row = i + r;
        // An empty slot may hold anything: it counts as zeros.
        const bool real = row < rows && a.ids[b * a.U + first + row] >= 0;
        block[r] = real ? V::load_n(row_of<T>(a.q, b, h, first + row) + d, some) : V::zero();
      }
      transpose(block);
      for (int64_t c = 0; c < some; ++c) (block[c] * by).store(to + (d + c) * kTile + i);
    }
  }
}

// Some rows of the list, from where they lie to `to` [count, padded].
template <class V, class T>
void collect(const CachedAttention& a, const TokenRows& cached, const TokenRows& local, int64_t b, int64_t h, const int32_t* list,
             int64_t count, typename V::scalar* to) {
  const int64_t whole = a.D / V::width * V::width, width = padded<V>(a.D);
  for (int64_t j = 0; j < count; ++j, to += width) {
    const int64_t n = list[j];
    const T* from = n < a.N ? row_of<T>(cached, b, h, n) : row_of<T>(local, b, h, n - a.N);
    for (int64_t d = 0; d < whole; d += V::width) V::load(from + d).store(to + d);
    if (whole < a.D) V::load_n(from + whole, a.D - whole).store(to + whole);
  }
}

// Scores [count, kTile] to weights 2^(score - top), with a new top where one is higher.
template <class V>
void soften(const Buffers<V>& use, int64_t count, int64_t columns) {
  const V lowest = V::all(-__builtin_inff());
  for (int64_t i = 0; i < columns; i += V::width) {
    const V old = V::load(use.top + i);
    V top = old;
    for (int64_t j = 0; j < count; ++j) top = max(V::load(use.scores + j * kTile + i), top);
    const V base = where_less(lowest, top, top, V::zero());  // no infinity minus infinity
    const V decay = exp2_below_zero(old - base);
    V total = V::load(use.total + i) * decay;
    for (int64_t j = 0; j < count; ++j) {
      const V weight = exp2_below_zero(V::load(use.scores + j * kTile + i) - base);
      total = total + weight;
      weight.store(use.scores + j * kTile + i);
    }
    top.store(use.top + i), total.store(use.total + i), decay.store(use.decay + i);
  }
}

template <class V, class T, class Buffers>
void write_rows(const CachedAttention& a, const Buffers& use, int64_t b, int64_t h, int64_t first, int64_t rows) {
  using S = typename V::scalar;
  const int64_t width = padded<V>(a.D), at = (b * a.H + h) * a.U + first;
  T* out = static_cast<T*>(a.out) + at * a.D;
  S* lse = static_cast<S*>(a.lse) + at;
  for (int64_t i = 0; i < rows; ++i, out += a.D) {
    const bool none = a.ids[b * a.U + first + i] < 0 || a.counts[b] == 0;
    lse[i] = none ? S(-__builtin_inff()) : use.top[i] * S(kLn2) + S(__builtin_log(double(use.total[i])));
    const V inverse = V::all(none ? S(0) : S(1) / use.total[i]);
    for (int64_t d = 0; d < a.D; d += V::width) {
      const V value = none ? V::zero() : V::load(use.sums + i * width + d) * inverse;
      value.store_n(out + d, min_of<int64_t>(V::width, a.D - d));
    }
  }
}

template <class V, class T>
void query_tile(const CachedAttention& a, int64_t item, const Buffers<V>& use) {
  using S = typename V::scalar;
  const int64_t tile = item % a.tiles(), h = item / a.tiles() % a.H, b = item / a.tiles() / a.H;
  const int64_t first = tile * kTile, rows = min_of(kTile, a.U - first), columns = round_up(rows, V::width), width = padded<V>(a.D);
  transpose_queries<V, T>(a, b, h, first, rows, S(a.scale * kLog2E), use.queries);
  for (int64_t i = 0; i < columns; ++i) use.top[i] = -__builtin_inff(), use.total[i] = 0;
  const int32_t* list = a.keys + b * (a.N + a.U);
  for (int64_t j = 0; j < a.counts[b]; j += kBlock) {
    const int64_t count = min_of(kBlock, a.counts[b] - j);
    collect<V, T>(a, a.k_cache, a.k, b, h, list + j, count, use.keys);
    multiply_strided<S>(count, columns, a.D, {use.keys, width, 1}, use.queries, kTile, {use.scores, kTile, false});
    soften<V>(use, count, columns);
    collect<V, T>(a, a.v_cache, a.v, b, h, list + j, count, use.values);
    multiply_strided<S>(rows, width, count, {use.scores, 1, kTile}, use.values, width, {use.sums, width, j > 0, use.decay});
  }
  write_rows<V, T>(a, use, b, h, first, rows);
}

#if MASKOPS_ISA_LEVEL == 2

// ---- in AMX tiles: sums are kept transposed, [channels, queries]

struct AmxBuffers {
  const int64_t depth, width;  // channels as whole registers: of what is summed over, and of rows
  bf16 *rows, *values;         // [64, depth]: queries, then keys; [width, 64 keys]
  uint32_t *queries, *pairs;   // words of two channels [depth / 2, 64], weights of two keys [32, 64]
  float *scores, *by_channel, *sums;  // [64, 64], [width, 64], [64, width]
  float *top, *total, *decay;

  AmxBuffers(const CachedAttention& a, Pieces& pieces)
      : depth(round_up(a.D, kAmxDepth)), width(round_up(a.D, kAmxRows)), rows(pieces.take<bf16>(kBlock * depth)),
        values(pieces.take<bf16>(width * kBlock)), queries(pieces.take<uint32_t>(depth / 2 * kTile)),
        pairs(pieces.take<uint32_t>(kBlock / 2 * kTile)), scores(pieces.take<float>(kBlock * kTile)),
        by_channel(pieces.take<float>(width * kTile)), sums(pieces.take<float>(kTile * width)), top(pieces.take<float>(kTile)),
        total(pieces.take<float>(kTile)), decay(pieces.take<float>(kTile)) {}
};

void take_queries(const CachedAttention& a, int64_t b, int64_t h, int64_t first, int64_t rows, int64_t columns, const AmxBuffers& use) {
  for (int64_t i = 0; i < columns; ++i) {
    // An empty slot may hold anything: it counts as zeros.
    const bool real = i < rows && a.ids[b * a.U + first + i] >= 0;
    amx_copy_rows(real ? row_of<bf16>(a.q, b, h, first + i) : nullptr, 0, real, a.D, 1, use.depth, use.rows + i * use.depth);
  }
  amx_transpose_words(use.rows, use.depth, columns, a.D, columns, use.depth, use.queries, kTile);
}

// As soften, of scores that are still to be multiplied by scale; weights become pairs of keys.
void soften_pairs(const AmxBuffers& use, int64_t count, int64_t columns, VecF scale) {
  const VecF lowest = VecF::all(-__builtin_inff());
  for (int64_t i = 0; i < columns; i += VecF::width) {
    // Rounded, and not fused with what follows: of huge scores the rest would be no small power of two.
    const auto score = [&](int64_t j) { return loaded_once(VecF::load(use.scores + j * kTile + i) * scale); };
    const VecF old = VecF::load(use.top + i);
    VecF top = old;
    for (int64_t j = 0; j < count; ++j) top = max(score(j), top);
    const VecF base = where_less(lowest, top, top, VecF::zero());  // no infinity minus infinity
    const VecF decay = exp2_below_zero(old - base);
    VecF total = VecF::load(use.total + i) * decay;
    for (int64_t j = 0; j < count; j += 2) {
      const VecF even = amx_exp2_below_zero(score(j) - base);
      const VecF odd = j + 1 < count ? amx_exp2_below_zero(score(j + 1) - base) : VecF::zero();
      total = total + even + odd;
      _mm512_storeu_si512(use.pairs + j / 2 * kTile + i, amx_pair(even, odd));
    }
    top.store(use.top + i), total.store(use.total + i), decay.store(use.decay + i);
  }
  amx_zero_pairs(count, use.pairs);
}

void amx_query_tile(const CachedAttention& a, int64_t item, const AmxBuffers& use) {
  const AmxScope scope;
  const int64_t tile = item % a.tiles(), h = item / a.tiles() % a.H, b = item / a.tiles() / a.H;
  const int64_t first = tile * kTile, rows = min_of(kTile, a.U - first), columns = round_up(rows, kAmxRows);
  const VecF scale = VecF::all(float(a.scale * kLog2E));
  take_queries(a, b, h, first, rows, columns, use);
  for (int64_t i = 0; i < columns; ++i) use.top[i] = -__builtin_inff(), use.total[i] = 0;
  const int32_t* list = a.keys + b * (a.N + a.U);
  for (int64_t j = 0; j < a.counts[b]; j += kBlock, list += kBlock) {
    const int64_t count = min_of(kBlock, a.counts[b] - j), whole = round_up(count, kAmxDepth);
    const auto at = [&](const TokenRows& cached, const TokenRows& local, int64_t n) {
      return list[n] < a.N ? row_of<bf16>(cached, b, h, list[n]) : row_of<bf16>(local, b, h, list[n] - a.N);
    };
    for (int64_t n = 0; n < count; ++n) amx_copy_rows(at(a.k_cache, a.k, n), 0, 1, a.D, 1, use.depth, use.rows + n * use.depth);
    amx_multiply(round_up(count, kAmxRows), columns, use.depth, {use.rows, use.depth}, {use.queries, kTile}, {use.scores, kTile, false});
    soften_pairs(use, count, columns, scale);
    const bf16* lines[kBlock];
    for (int64_t n = 0; n < whole; ++n) lines[n] = n < count ? at(a.v_cache, a.v, n) : nullptr;
    for (int64_t n = 0; n < whole; n += kAmxDepth) {
      for (int64_t d = 0; d < use.width; d += kAmxRows) amx_transpose_lines(lines + n, d, a.D, use.values + d * kBlock + n, kBlock);
    }
    if (j > 0) amx_decay(use.decay, use.width, columns, use.by_channel);
    amx_multiply(use.width, columns, whole, {use.values, kBlock}, {use.pairs, kTile}, {use.by_channel, kTile, j > 0});
  }
  amx_transpose_sums(use.by_channel, kTile, rows, use.width, use.sums);
  write_rows<VecF, bf16>(a, use, b, h, first, rows);
}

#endif

// run.template operator()<buffers>(tile) with the kernel of a tile.
template <class Run>
auto with_tiles(const CachedAttention& a, const Run& run) {
#if MASKOPS_ISA_LEVEL == 2
  if (a.amx) return run.template operator()<AmxBuffers>(&amx_query_tile);
#endif
  return with_vectors(a.dtype, [&]<class V, class T>() { return run.template operator()<Buffers<V>>(&query_tile<V, T>); });
}

int64_t bytes(const CachedAttention& a) {
  return with_tiles(a, [&]<class Buffers>(auto) {
    Pieces pieces(nullptr);
    Buffers(a, pieces);
    return pieces.bytes;
  });
}

void run(const CachedAttention& a, int64_t item, void* buffer) {
  with_tiles(a, [&]<class Buffers>(auto tile) {
    Pieces pieces(buffer);
    tile(a, item, Buffers(a, pieces));
  });
}

}  // namespace

extern const CachedAttentionKernels CachedAttentionKernels_table{&bytes, &run};

}  // namespace MASKOPS_ISA_NS
}  // namespace maskops

#if MASKOPS_ISA_LEVEL == 0
#include <torch/csrc/stable/library.h>

#include <tuple>
#include <vector>

#include "common/buffer.h"
#include "common/dispatch.h"
#include "common/ids.h"
#include "math/feature_reuse_check.h"

namespace maskops {
namespace {

TokenRows rows_in(const Tensor& x) { return {x.const_data_ptr(), token_strides(x)}; }

// The keys of each row of the batch: what is seen of the cache, then the local slots that hold a token.
struct KeyLists {
  std::vector<int32_t> keys;
  std::vector<int64_t> counts;
  int64_t longest = 0;

  KeyLists(const Tensor& seen, const int64_t* ids, int64_t slots) : keys(seen.size(0) * (seen.size(1) + slots)), counts(seen.size(0)) {
    const int64_t tokens = seen.size(1);
    const bool* flags = static_cast<const bool*>(seen.const_data_ptr());
    for (size_t b = 0; b < counts.size(); ++b) {
      int32_t* list = keys.data() + b * (tokens + slots);
      int64_t count = 0;
      for (int64_t n = 0; n < tokens; ++n) list[count] = int32_t(n), count += flags[b * tokens + n];
      for (int64_t u = 0; u < slots; ++u) list[count] = int32_t(tokens + u), count += ids[b * slots + u] >= 0;
      counts[b] = count;
      longest = std::max(longest, count);
    }
  }
};

std::tuple<Tensor, Tensor> feature_reuse_attention(const Tensor& q_any, const Tensor& k_any, const Tensor& v_any,
                                                   const Tensor& k_cache_any, const Tensor& v_cache_any, const Tensor& seen_any,
                                                   const Tensor& ids_any, double scale) {
  check_cached_attention(q_any, k_any, v_any, k_cache_any, v_cache_any, seen_any, ids_any);
  const Tensor q = with_contiguous_rows(q_any), k = with_contiguous_rows(k_any), v = with_contiguous_rows(v_any);
  const Tensor k_cache = with_contiguous_rows(k_cache_any), v_cache = with_contiguous_rows(v_cache_any);
  const Tensor seen = contiguous_or_copy(seen_any), ids = contiguous_or_copy(ids_any);
  CachedAttention args{};
  args.dtype = static_cast<int>(dtype_of(q));
  // Tiles multiply by the scale last: 0 would meet products that have overflowed.
  args.amx = dtype_of(q) == Dtype::kBFloat16 && scale != 0 && use_amx();
  args.B = q.size(0), args.H = q.size(1), args.U = q.size(2), args.N = k_cache.size(2), args.D = q.size(3);
  args.ids = static_cast<const int64_t*>(ids.const_data_ptr());
  check_ids("cached_attention", "local_ids", args.ids, args.B, args.U, args.N, -1);
  Tensor out = empty_like_device(q, {args.B, args.H, args.U, args.D});
  Tensor lse = empty_like_device(q, {args.B, args.H, args.U}, accumulation_type(q.scalar_type()));
  if (out.numel() == 0) return {out, lse};
  const KeyLists lists(seen, args.ids, args.U);
  args.keys = lists.keys.data(), args.counts = lists.counts.data();
  args.q = rows_in(q), args.k = rows_in(k), args.v = rows_in(v), args.k_cache = rows_in(k_cache), args.v_cache = rows_in(v_cache);
  args.scale = scale, args.out = out.mutable_data_ptr(), args.lse = lse.mutable_data_ptr();
  const CachedAttentionKernels& kernels = pick_CachedAttentionKernels();
  const int64_t size = kernels.bytes(args), work = args.D * lists.longest * std::min<int64_t>(args.U, 64) / 4;
  parallel_for(args.B * args.H * args.tiles(), work, [&](int64_t begin, int64_t end) {
    const Buffer buffer(size);
    for (int64_t item = begin; item < end; ++item) kernels.run(args, item, buffer.get());
  });
  return {out, lse};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(maskops, CPU, m) { m.impl("feature_reuse_attention", TORCH_BOX(&feature_reuse_attention)); }

}  // namespace maskops
#endif
