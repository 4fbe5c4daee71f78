// The kernels of sparse_conv, compiled once per instruction set. A tile of the result stays in the cache while the places of the
// kernel are gone through: the rows that a place reads are multiplied into the rows of the tile they belong to, so that a place costs
// what it has rows, and no sum is shared between threads. Rows are read where they lie; those of half precision are
// gathered, as floats or, for AMX, as they are.
#include "cpu/sparse_conv/conv_amx.h"

#include "common/gemm_strided.h"
#include "common/pieces.h"
#include "cpu/sparse_conv/types.h"

#include <type_traits>

namespace maskops {
inline namespace MASKOPS_ISA_NS {
namespace {

template <class T>
struct Shape {
  using V = typename VecFor<T>::type;
  using A = typename V::scalar;
  static constexpr bool kWhereTheyLie = sizeof(T) == sizeof(A);  // rows need no gathering
  int64_t group_in, group_out, padded;  // channels of a group; `padded`: group_out in whole vectors
  int64_t tile, width;                  // rows of a tile; sums of a row
  int64_t pairs, sum_rows;              // at a time, and rows of sums, for the gradient of the weight
  bool depthwise, in_place;             // in_place: the weight needs no packing

  explicit Shape(const ConvArgs& args) {
    group_in = args.C / args.groups, group_out = args.D / args.groups;
    depthwise = group_in == 1 && group_out == 1;
    padded = depthwise ? 1 : round_up(group_out, V::width);
    width = depthwise ? round_up(args.D, V::width) : padded * args.groups;
    in_place = kWhereTheyLie && (depthwise || padded == group_out);
    const int64_t most = args.amx ? 2 * kTileMost : kTileMost;
    tile = max_of<int64_t>(32, min_of<int64_t>(most, kTileBytes / (width * int64_t(sizeof(A)) + 1) / 32 * 32));
    pairs = args.amx ? 256 : 128;
    sum_rows = args.amx ? round_up(group_in, 16) : group_in;
  }
  int64_t weight_stride(const ConvArgs& args) const { return in_place ? args.D : width; }
  const A* weight(const ConvArgs& args, int64_t k) const {
    const void* from = in_place ? args.weight : args.packed;
    return static_cast<const A*>(from) + k * group_in * weight_stride(args);
  }

  // Of 64, 96, 128 and 192 rows, 96 were fastest for 32 and 64 channels, on two threads of an Intel Xeon. A register of AMX is filled by
  // 16 rows of a place, so more of them at a time leave less of it empty.
  static constexpr int64_t kTileMost = 96, kTileBytes = 48 << 10;
};

// ---- rows of a kernel place

// Those of map[0, count) that read something: at[] = first + i * unit for the i-th, and row[] which row of x. Returns how many, or -1
// for a row that x lacks. Both lists need room for kRowSlack more.
constexpr int64_t kRowSlack = 16;
inline int64_t rows_of(const int32_t* map, int64_t count, int64_t N, int64_t first, int64_t unit, int32_t* at, int32_t* row) {
  int64_t found = 0;
#if MASKOPS_ISA_LEVEL == 2
  const __m512i none = _mm512_set1_epi32(-1), last = _mm512_set1_epi32(int32_t(min_of<int64_t>(N - 1, INT32_MAX)));
  const __m512i numbers = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15), step = _mm512_set1_epi32(int32_t(16 * unit));
  __m512i places = _mm512_add_epi32(_mm512_mullo_epi32(numbers, _mm512_set1_epi32(int32_t(unit))), _mm512_set1_epi32(int32_t(first)));
  __mmask16 bad = 0;
  for (int64_t i = 0; i < count; i += 16, places = _mm512_add_epi32(places, step)) {
    const __m512i n = _mm512_mask_loadu_epi32(none, VecF::first(min_of<int64_t>(16, count - i)), map + i);
    const __mmask16 some = _mm512_cmpgt_epi32_mask(n, none);
    bad |= _mm512_cmplt_epi32_mask(n, none) | _mm512_cmpgt_epi32_mask(n, last);
    _mm512_storeu_si512(at + found, _mm512_maskz_compress_epi32(some, places));
    _mm512_storeu_si512(row + found, _mm512_maskz_compress_epi32(some, n));
    found += __builtin_popcount(some);
  }
  return bad == 0 ? found : -1;
#else
  bool good = true;
  for (int64_t i = 0; i < count; ++i) {
    const int32_t n = map[i];
    at[found] = int32_t(first + i * unit);
    row[found] = n;
    found += n >= 0;
    good &= n >= -1 && n < N;
  }
  return good ? found : -1;
#endif
}

// Rows of x, widened, side by side, each as wide as `stride`. The next ones are fetched: they lie anywhere.
template <class T, class A>
void gather(const T* x, int64_t x_stride, const int32_t* row, int64_t count, int64_t channels, A* to, int64_t stride) {
  constexpr int64_t kAhead = 4, kLine = 64 / int64_t(sizeof(T));
  for (int64_t r = 0; r < count; ++r) {
    if (r + kAhead < count) {
      const T* next = x + int64_t(row[r + kAhead]) * x_stride;
      for (int64_t c = 0; c < channels; c += kLine) __builtin_prefetch(next + c);
    }
    widen(x + int64_t(row[r]) * x_stride, channels, to + r * stride);
  }
}

// ---- forward

template <class T>
struct TileBuffers {
  using A = typename Shape<T>::A;
  A *sums, *rows;
  int32_t *at, *row;
  int64_t stride;  // of rows
  AmxPlace amx;

  TileBuffers(const ConvArgs& args, const Shape<T>& shape, Pieces& pieces) : amx(args, shape.tile, pieces) {
    stride = round_up(args.C, Shape<T>::V::width);
    sums = pieces.take<A>(shape.tile * shape.width);
    rows = pieces.take<A>(Shape<T>::kWhereTheyLie || args.amx ? 0 : shape.tile * stride);
    at = pieces.take<int32_t>(shape.tile + kRowSlack);
    row = pieces.take<int32_t>(shape.tile + kRowSlack);
  }
};

template <class T>
void begin_tile(const ConvArgs& args, const Shape<T>& shape, int64_t count, typename Shape<T>::A* sums) {
  memset(sums, 0, size_t(count * shape.width) * sizeof(*sums));
  if (args.bias == nullptr || count == 0) return;
  const T* bias = static_cast<const T*>(args.bias);
  const int64_t parts = shape.depthwise ? 1 : args.groups, each = args.D / parts;
  for (int64_t g = 0; g < parts; ++g) {
    for (int64_t d = 0; d < each; ++d) sums[g * shape.padded + d] = to_float(bias[g * each + d]);
  }
  for (int64_t r = 1; r < count; ++r) memcpy(sums + r * shape.width, sums, size_t(shape.width) * sizeof(*sums));
}

template <class T>
void end_tile(const ConvArgs& args, const Shape<T>& shape, int64_t first, int64_t count, const typename Shape<T>::A* sums) {
  T* out = static_cast<T*>(args.out) + first * args.D;
  const int64_t parts = shape.depthwise ? 1 : args.groups, each = args.D / parts;
  for (int64_t r = 0; r < count; ++r) {
    for (int64_t g = 0; g < parts; ++g) narrow(sums + r * shape.width + g * shape.padded, each, out + r * args.D + g * each);
  }
}

template <class T, class A>
void add_products(const ConvArgs& args, const A* weight, const int32_t* at, const int32_t* row, int64_t count, A* sums) {
  using V = typename VecFor<T>::type;
  for (int64_t r = 0; r < count; ++r) {
    const T* from = static_cast<const T*>(args.x) + row[r] * args.x_stride;
    A* sum = sums + at[r];
    int64_t c = 0;
    for (; c + V::width <= args.D; c += V::width) fma(V::load(from + c), V::load(weight + c), V::load(sum + c)).store(sum + c);
    const int64_t rest = args.D - c;
    if (rest > 0) fma(V::load_n(from + c, rest), V::load_n(weight + c, rest), V::load(sum + c)).store(sum + c);
  }
}

// Adds what the rows of one place give to the sums of a tile.
template <class T>
void add_place(const ConvArgs& args, const Shape<T>& shape, const TileBuffers<T>& own, int64_t k, int64_t found) {
  using V = typename Shape<T>::V;
  using A = typename V::scalar;
  if constexpr (std::is_same_v<T, bf16>) {
    if (args.amx) return own.amx.add(k, own.at, own.row, found, own.sums);
  }
  const A* weight = shape.weight(args, k);
  if (shape.depthwise) return add_products<T>(args, weight, own.at, own.row, found, own.sums);
  if constexpr (!Shape<T>::kWhereTheyLie) {
    gather(static_cast<const T*>(args.x), args.x_stride, own.row, found, args.C, own.rows, own.stride);
  }
  for (int64_t g = 0; g < args.groups; ++g) {
    const StridedB<A> by{weight + g * shape.padded, shape.weight_stride(args)};
    const ScatteredC<A> to{own.sums + g * shape.padded, own.at};
    if constexpr (Shape<T>::kWhereTheyLie) {
      const PickedRowsA<A> rows{{static_cast<const T*>(args.x) + g * shape.group_in, args.x_stride, own.row}};
      multiply_picked<V>(found, shape.padded, shape.group_in, rows, by, to);
    } else {
      const StridedA<A> rows{own.rows + g * shape.group_in, own.stride, 1};
      multiply_picked<V>(found, shape.padded, shape.group_in, rows, by, to);
    }
  }
}

template <class T>
bool forward_typed(const ConvArgs& args, int64_t begin, int64_t end, void* buffer) {
  const Shape<T> shape(args);
  Pieces pieces(buffer);
  const TileBuffers<T> own(args, shape, pieces);
  bool good = true;
  for (int64_t tile = begin; tile < end; ++tile) {
    const int64_t first = tile * shape.tile, count = min_of(shape.tile, args.M - first);
    begin_tile<T>(args, shape, count, own.sums);
    for (int64_t k = 0; k < args.K; ++k) {
      const int64_t found = rows_of(args.map + k * args.M + first, count, args.N, 0, shape.width, own.at, own.row);
      good &= found >= 0;
      if (found > 0) add_place<T>(args, shape, own, k, found);
    }
    end_tile<T>(args, shape, first, count, own.sums);
  }
  return good;
}

template <class T>
void pack_typed(const ConvArgs& args, int64_t k_begin, int64_t k_end) {
  using A = typename Shape<T>::A;
  const Shape<T> shape(args);
  const int64_t parts = shape.depthwise ? 1 : args.groups, each = args.D / parts;
  for (int64_t row = k_begin * shape.group_in; row < k_end * shape.group_in; ++row) {
    const T* from = static_cast<const T*>(args.weight) + row * args.D;
    A* to = static_cast<A*>(args.packed) + row * shape.width;
    memset(to, 0, size_t(shape.width) * sizeof(A));
    for (int64_t i = 0; i < args.D; ++i) to[i / each * shape.padded * (parts > 1) + i % each] = to_float(from[i]);
  }
}

// ---- gradient of the weight

template <class T>
struct PairBuffers {
  using A = typename Shape<T>::A;
  A *x, *grad;
  int32_t *at, *row;
  int64_t x_stride;
  AmxPairs amx;

  PairBuffers(const ConvArgs& args, const Shape<T>& shape, Pieces& pieces) : amx(args, shape.pairs, pieces) {
    const int64_t gathered = shape.depthwise || shape.in_place || args.amx ? 0 : shape.pairs;
    x_stride = round_up(args.C, Shape<T>::V::width);
    x = pieces.take<A>(gathered * x_stride);
    grad = pieces.take<A>(gathered * shape.width);
    at = pieces.take<int32_t>(shape.pairs + kRowSlack);
    row = pieces.take<int32_t>(shape.pairs + kRowSlack);
  }
};

// sums += x * grad, channel by channel, over the pairs.
template <class T>
void add_pairs_depthwise(const ConvArgs& args, const PairBuffers<T>& own, int64_t found, typename Shape<T>::A* sums) {
  using V = typename Shape<T>::V;
  for (int64_t r = 0; r < found; ++r) {
    const T* x = static_cast<const T*>(args.x) + own.row[r] * args.x_stride;
    const T* grad = static_cast<const T*>(args.grad) + own.at[r] * args.grad_stride;
    int64_t c = 0;
    for (; c + V::width <= args.C; c += V::width) fma(V::load(x + c), V::load(grad + c), V::load(sums + c)).store(sums + c);
    const int64_t rest = args.C - c;
    if (rest > 0) fma(V::load_n(x + c, rest), V::load_n(grad + c, rest), V::load(sums + c)).store(sums + c);
  }
}

// Rows where they lie, of whole vectors.
template <class T>
void add_pairs_in_place(const ConvArgs& args, const Shape<T>& shape, const PairBuffers<T>& own, int64_t found, typename Shape<T>::A* sums) {
  using A = typename Shape<T>::A;
  for (int64_t g = 0; g < args.groups; ++g) {
    const PickedStepsA<A> x{{static_cast<const A*>(args.x) + g * shape.group_in, args.x_stride, own.row}};
    const PickedB<A> grad{static_cast<const A*>(args.grad) + g * shape.group_out, args.grad_stride, own.at};
    multiply_picked<typename Shape<T>::V>(shape.group_in, shape.padded, found, x, grad,
                                          StridedC<A>{sums + g * shape.padded, shape.width, true});
  }
}

// Rows that are widened, or filled up to whole vectors, first.
template <class T>
void add_pairs_gathered(const ConvArgs& args, const Shape<T>& shape, const PairBuffers<T>& own, int64_t found, typename Shape<T>::A* sums) {
  using V = typename Shape<T>::V;
  gather(static_cast<const T*>(args.x), args.x_stride, own.row, found, args.C, own.x, own.x_stride);
  for (int64_t g = 0; g < args.groups; ++g) {
    const T* grad = static_cast<const T*>(args.grad) + g * shape.group_out;
    gather(grad, args.grad_stride, own.at, found, shape.group_out, own.grad + g * shape.padded, shape.width);
    multiply_strided<V>(shape.group_in, shape.padded, found, {own.x + g * shape.group_in, 1, own.x_stride},
                        own.grad + g * shape.padded, shape.width, {sums + g * shape.padded, shape.width, true});
  }
}

template <class T>
void add_pairs(const ConvArgs& args, const Shape<T>& shape, const PairBuffers<T>& own, int64_t found, typename Shape<T>::A* sums) {
  if (shape.depthwise) return add_pairs_depthwise<T>(args, own, found, sums);
  if constexpr (std::is_same_v<T, bf16>) {
    if (args.amx) return own.amx.add(own.at, own.row, found, sums);
  }
  if constexpr (Shape<T>::kWhereTheyLie) {
    if (shape.in_place) return add_pairs_in_place<T>(args, shape, own, found, sums);
  }
  add_pairs_gathered<T>(args, shape, own, found, sums);
}

// Sums over the pairs of one kernel place in rows [first, last) of the result.
template <class T>
bool sum_pairs(const ConvArgs& args, const Shape<T>& shape, int64_t k, int64_t first, int64_t last, const PairBuffers<T>& own,
               typename Shape<T>::A* sums) {
  bool good = true;
  for (int64_t m = first; m < last; m += shape.pairs) {
    const int64_t found = rows_of(args.map + k * args.M + m, min_of(shape.pairs, last - m), args.N, m, 1, own.at, own.row);
    if (found <= 0) {
      good &= found == 0;
      continue;
    }
    add_pairs<T>(args, shape, own, found, sums);
  }
  return good;
}

template <class T>
bool weight_chunk_typed(const ConvArgs& args, int64_t begin, int64_t end, void* buffer) {
  using A = typename Shape<T>::A;
  const Shape<T> shape(args);
  Pieces pieces(buffer);
  const PairBuffers<T> own(args, shape, pieces);
  const int64_t chunks = args.chunks(), size = shape.sum_rows * shape.width;
  bool good = true;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t chunk = item / args.K, k = item % args.K;
    A* sums = static_cast<A*>(args.partial) + item * size;
    memset(sums, 0, size_t(size) * sizeof(A));
    good &= sum_pairs<T>(args, shape, k, chunk * args.M / chunks, (chunk + 1) * args.M / chunks, own, sums);
  }
  return good;
}

template <class T>
void sum_chunks_typed(const ConvArgs& args, int64_t k_begin, int64_t k_end) {
  using V = typename Shape<T>::V;
  const Shape<T> shape(args);
  const int64_t size = shape.sum_rows * shape.width, parts = shape.depthwise ? 1 : args.groups, each = args.D / parts;
  auto* partial = static_cast<typename V::scalar*>(args.partial);
  for (int64_t k = k_begin; k < k_end; ++k) {
    auto* sums = partial + k * size;
    for (int64_t chunk = 1; chunk < args.chunks(); ++chunk) {
      const auto* more = sums + chunk * args.K * size;
      for (int64_t i = 0; i < size; i += V::width) (V::load(sums + i) + V::load(more + i)).store(sums + i);
    }
    for (int64_t c = 0; c < shape.group_in; ++c) {
      T* to = static_cast<T*>(args.out) + (k * shape.group_in + c) * args.D;
      for (int64_t g = 0; g < parts; ++g) narrow(sums + c * shape.width + g * shape.padded, each, to + g * each);
    }
  }
}

// ---- by dtype

int64_t packed_bytes(const ConvArgs& args) {
  if (args.amx) return AmxConvShape(args).packed_bytes();
  return by_dtype(args.dtype, [&](auto of) {
    const Shape<decltype(of)> shape(args);
    return shape.in_place ? 0 : args.K * shape.group_in * shape.width * int64_t(sizeof(typename decltype(shape)::A));
  });
}
void pack(const ConvArgs& args, int64_t k_begin, int64_t k_end) {
  if (args.amx) {
    for (int64_t k = k_begin; k < k_end; ++k) AmxConvShape(args).pack(k);
    return;
  }
  by_dtype(args.dtype, [&](auto of) { pack_typed<decltype(of)>(args, k_begin, k_end); });
}
int64_t tile_rows(const ConvArgs& args) {
  return by_dtype(args.dtype, [&](auto of) { return Shape<decltype(of)>(args).tile; });
}
int64_t bytes(const ConvArgs& args) {
  return by_dtype(args.dtype, [&](auto of) {
    using T = decltype(of);
    Pieces tile(nullptr), pairs(nullptr);
    const Shape<T> shape(args);
    TileBuffers<T>(args, shape, tile);
    PairBuffers<T>(args, shape, pairs);
    return max_of(tile.bytes, pairs.bytes);
  });
}
template <class Run>
bool in_scope(const ConvArgs& args, const Run& run) {
  if (!args.amx) return run();
  [[maybe_unused]] const typename AmxPlace::Scope scope;
  return run();
}
bool forward(const ConvArgs& args, int64_t begin, int64_t end, void* buffer) {
  return in_scope(args, [&] { return by_dtype(args.dtype, [&](auto of) { return forward_typed<decltype(of)>(args, begin, end, buffer); }); });
}
int64_t partial_bytes(const ConvArgs& args) {
  return by_dtype(args.dtype, [&](auto of) {
    const Shape<decltype(of)> shape(args);
    return args.chunks() * args.K * shape.sum_rows * shape.width * int64_t(sizeof(typename decltype(shape)::A));
  });
}
bool weight_chunk(const ConvArgs& args, int64_t begin, int64_t end, void* buffer) {
  return in_scope(args, [&] { return by_dtype(args.dtype, [&](auto of) { return weight_chunk_typed<decltype(of)>(args, begin, end, buffer); }); });
}
void sum_chunks(const ConvArgs& args, int64_t k_begin, int64_t k_end) {
  by_dtype(args.dtype, [&](auto of) { sum_chunks_typed<decltype(of)>(args, k_begin, k_end); });
}

}  // namespace

extern const ConvKernels ConvKernels_table{&packed_bytes, &pack,          &tile_rows,    &bytes,
                                           &forward,      &partial_bytes, &weight_chunk, &sum_chunks};

}  // namespace MASKOPS_ISA_NS
}  // namespace maskops
