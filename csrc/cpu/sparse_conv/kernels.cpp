// The kernels of sparse_conv, compiled once per instruction set. A tile of the result stays in the cache while the places of the
// kernel are gone through: the rows that a place reads are multiplied into the rows of the tile they belong to, so that a place costs
// what it has rows, and no sum is shared between threads. Rows are read where they lie; those of half precision are gathered as floats,
// but for bfloat16 where the CPU multiplies its pairs, or for AMX, which gathers them as they are.
#include "cpu/sparse_conv/conv_amx.h"

#include "common/pieces.h"
#include "cpu/sparse_conv/conv_shape.h"

namespace maskops {
inline namespace MASKOPS_ISA_NS {
namespace {

// ---- forward

template <class Shape>
struct TileBuffers {
  using A = typename Shape::A;
  A *sums, *rows;
  int32_t *at, *row;
  int64_t stride;  // of rows
  AmxPlace amx;

  TileBuffers(const ConvArgs& args, const Shape& shape, Pieces& pieces) : amx(args, shape.tile, pieces) {
    stride = round_up(args.C, Shape::V::width);
    sums = pieces.take<A>(shape.tile * shape.width);
    rows = pieces.take<A>(Shape::kWhereTheyLie || args.amx ? 0 : shape.tile * stride);
    at = pieces.take<int32_t>(shape.tile + kRowSlack);
    row = pieces.take<int32_t>(shape.tile + kRowSlack);
  }
};

template <class Shape>
void begin_tile(const ConvArgs& args, const Shape& shape, int64_t count, typename Shape::A* sums) {
  memset(sums, 0, size_t(count * shape.width) * sizeof(*sums));
  if (args.bias == nullptr || count == 0) return;
  const auto* bias = static_cast<const typename Shape::Stored*>(args.bias);
  const int64_t parts = shape.parts(args), each = args.D / parts;
  for (int64_t g = 0; g < parts; ++g) {
    for (int64_t d = 0; d < each; ++d) sums[g * shape.padded + d] = to_float(bias[g * each + d]);
  }
  for (int64_t r = 1; r < count; ++r) memcpy(sums + r * shape.width, sums, size_t(shape.width) * sizeof(*sums));
}

template <class Shape>
void end_tile(const ConvArgs& args, const Shape& shape, int64_t first, int64_t count, const typename Shape::A* sums) {
  auto* out = static_cast<typename Shape::Stored*>(args.out) + first * args.D;
  const int64_t parts = shape.parts(args), each = args.D / parts;
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
template <class Shape>
void add_place(const ConvArgs& args, const Shape& shape, const TileBuffers<Shape>& own, int64_t k, int64_t found) {
  using T = typename Shape::Stored;
  using P = typename Shape::P;
  using A = typename Shape::A;
  if constexpr (std::is_same_v<T, bf16>) {
    if (args.amx) return own.amx.add(k, own.at, own.row, found, own.sums);
  }
  const P* weight = shape.weight(args, k);
  const T* x = static_cast<const T*>(args.x);
  if constexpr (!Shape::kPairs) {
    if (shape.depthwise) return add_products<T>(args, weight, own.at, own.row, found, own.sums);
  }
  if constexpr (!Shape::kWhereTheyLie) gather(x, args.x_stride, own.row, found, args.C, own.rows, own.stride);
  for (int64_t g = 0; g < args.groups; ++g) {
    const StridedB<P> by{weight + g * shape.padded, shape.weight_stride(args)};
    const ScatteredC<A> to{own.sums + g * shape.padded, own.at};
    if constexpr (Shape::kWhereTheyLie) {
      const PickedRowsA<T, Shape::kStep> rows{{x + g * shape.group_in, args.x_stride, own.row}};
      multiply_picked<P>(found, shape.padded, shape.steps(), rows, by, to);
    } else {
      multiply_picked<P>(found, shape.padded, shape.steps(), StridedA<A>{own.rows + g * shape.group_in, own.stride, 1}, by, to);
    }
  }
}

template <class Shape>
bool forward_typed(const ConvArgs& args, const Shape& shape, int64_t begin, int64_t end, void* buffer) {
  Pieces pieces(buffer);
  const TileBuffers<Shape> own(args, shape, pieces);
  bool good = true;
  for (int64_t tile = begin; tile < end; ++tile) {
    const int64_t first = tile * shape.tile, count = min_of(shape.tile, args.M - first);
    begin_tile(args, shape, count, own.sums);
    for (int64_t k = 0; k < args.K; ++k) {
      if (k + 1 < args.K) fetch_map(args.map + (k + 1) * args.M + first, count);
      const int64_t found = rows_of(args.map + k * args.M + first, count, args.N, 0, shape.width, own.at, own.row);
      good &= found >= 0;
      if (found > 0) add_place(args, shape, own, k, found);
    }
    end_tile(args, shape, first, count, own.sums);
  }
  return good;
}

template <class Shape>
void pack_typed(const ConvArgs& args, const Shape& shape, int64_t k_begin, int64_t k_end) {
  using Value = typename Gemm<typename Shape::P>::Value;
  constexpr int64_t kStep = Shape::kStep;
  const int64_t parts = shape.parts(args), each = args.D / parts;
  for (int64_t row = k_begin * shape.group_in; row < k_end * shape.group_in; ++row) {
    const auto* from = static_cast<const typename Shape::Stored*>(args.weight) + row * args.D;
    Value* to = static_cast<Value*>(args.packed) + row / kStep * kStep * shape.width + row % kStep;
    if (row % kStep == 0) memset(to, 0, size_t(kStep * shape.width) * sizeof(Value));
    for (int64_t i = 0; i < args.D; ++i) from_float(to_float(from[i]), to + (i / each * shape.padded * (parts > 1) + i % each) * kStep);
  }
}

// ---- gradient of the weight

template <class Shape>
struct PairBuffers {
  using P = typename Shape::P;
  P *x, *grad;
  int32_t *at, *row;
  int64_t x_stride;
  AmxPairs amx;

  PairBuffers(const ConvArgs& args, const Shape& shape, Pieces& pieces) : amx(args, shape.pairs, pieces) {
    const int64_t gathered = shape.depthwise || shape.in_place || args.amx ? 0 : shape.pairs / Shape::kStep;
    x_stride = round_up(args.C, Shape::V::width);
    x = pieces.take<P>(gathered * x_stride);
    grad = pieces.take<P>(gathered * shape.width);
    at = pieces.take<int32_t>(shape.pairs + kRowSlack);
    row = pieces.take<int32_t>(shape.pairs + kRowSlack);
  }
};

// sums += x * grad, channel by channel, over the pairs.
template <class Shape>
void add_pairs_depthwise(const ConvArgs& args, const PairBuffers<Shape>& own, int64_t found, typename Shape::A* sums) {
  using T = typename Shape::Stored;
  using V = typename Shape::V;
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
template <class Shape>
void add_pairs_in_place(const ConvArgs& args, const Shape& shape, const PairBuffers<Shape>& own, int64_t found, typename Shape::A* sums) {
  using A = typename Shape::A;
  for (int64_t g = 0; g < args.groups; ++g) {
    const PickedStepsA<A> x{{static_cast<const A*>(args.x) + g * shape.group_in, args.x_stride, own.row}};
    const PickedB<A> grad{static_cast<const A*>(args.grad) + g * shape.group_out, args.grad_stride, own.at};
    multiply_picked<A>(shape.group_in, shape.padded, found, x, grad, StridedC<A>{sums + g * shape.padded, shape.width, true});
  }
}

// Rows that are widened, filled up to whole vectors or put together in twos first.
template <class Shape>
void add_pairs_gathered(const ConvArgs& args, const Shape& shape, const PairBuffers<Shape>& own, int64_t found, typename Shape::A* sums) {
  using T = typename Shape::Stored;
  using P = typename Shape::P;
  const T* x = static_cast<const T*>(args.x);
  gather_steps(x, args.x_stride, own.row, found, args.C, own.x, own.x_stride);
  for (int64_t g = 0; g < args.groups; ++g) {
    const T* grad = static_cast<const T*>(args.grad) + g * shape.group_out;
    gather_steps(grad, args.grad_stride, own.at, found, shape.group_out, own.grad + g * shape.padded, shape.width);
    multiply_strided<P>(shape.group_in, shape.padded, (found + Shape::kStep - 1) / Shape::kStep,
                        {own.x + g * shape.group_in, 1, own.x_stride}, own.grad + g * shape.padded, shape.width,
                        {sums + g * shape.padded, shape.width, true});
  }
}

template <class Shape>
void add_pairs(const ConvArgs& args, const Shape& shape, const PairBuffers<Shape>& own, int64_t found, typename Shape::A* sums) {
  if constexpr (!Shape::kPairs) {
    if (shape.depthwise) return add_pairs_depthwise(args, own, found, sums);
    if constexpr (std::is_same_v<typename Shape::Stored, bf16>) {
      if (args.amx) return own.amx.add(own.at, own.row, found, sums);
    }
    if constexpr (Shape::kWhereTheyLie) {
      if (shape.in_place) return add_pairs_in_place(args, shape, own, found, sums);
    }
  }
  add_pairs_gathered(args, shape, own, found, sums);
}

// Sums over the pairs of one kernel place in rows [first, last) of the result.
template <class Shape>
bool sum_pairs(const ConvArgs& args, const Shape& shape, int64_t k, int64_t first, int64_t last, const PairBuffers<Shape>& own,
               typename Shape::A* sums) {
  bool good = true;
  for (int64_t m = first; m < last; m += shape.pairs) {
    const int64_t found = rows_of(args.map + k * args.M + m, min_of(shape.pairs, last - m), args.N, m, 1, own.at, own.row);
    if (found <= 0) {
      good &= found == 0;
      continue;
    }
    add_pairs(args, shape, own, found, sums);
  }
  return good;
}

// Rows are gone through in blocks that stay in the second cache, as do the sums of so many places, while each place reads them.
template <class Shape>
bool weight_chunk_typed(const ConvArgs& args, const Shape& shape, int64_t chunk, int64_t k_begin, int64_t k_end, void* buffer) {
  using A = typename Shape::A;
  Pieces pieces(buffer);
  const PairBuffers<Shape> own(args, shape, pieces);
  const int64_t chunks = args.chunks(), size = shape.sum_rows * shape.width;
  const int64_t begin = chunk * args.M / chunks, end = (chunk + 1) * args.M / chunks, block = shape.block(args);
  A* sums = static_cast<A*>(args.partial) + (chunk * args.K + k_begin) * size;
  memset(sums, 0, size_t((k_end - k_begin) * size) * sizeof(A));
  bool good = true;
  for (int64_t first = begin; first < end; first += block) {
    for (int64_t k = k_begin; k < k_end; ++k) {
      good &= sum_pairs(args, shape, k, first, min_of(end, first + block), own, sums + (k - k_begin) * size);
    }
  }
  return good;
}

template <class Shape>
void sum_chunks_typed(const ConvArgs& args, const Shape& shape, int64_t k_begin, int64_t k_end) {
  using V = typename Shape::V;
  const int64_t size = shape.sum_rows * shape.width, parts = shape.parts(args), each = args.D / parts;
  auto* partial = static_cast<typename Shape::A*>(args.partial);
  for (int64_t k = k_begin; k < k_end; ++k) {
    auto* sums = partial + k * size;
    for (int64_t chunk = 1; chunk < args.chunks(); ++chunk) {
      const auto* more = sums + chunk * args.K * size;
      for (int64_t i = 0; i < size; i += V::width) (V::load(sums + i) + V::load(more + i)).store(sums + i);
    }
    for (int64_t c = 0; c < shape.group_in; ++c) {
      auto* to = static_cast<typename Shape::Stored*>(args.out) + (k * shape.group_in + c) * args.D;
      for (int64_t g = 0; g < parts; ++g) narrow(sums + c * shape.width + g * shape.padded, each, to + g * each);
    }
  }
}

// ---- by what is stored and what is multiplied

template <class Run>
auto with_shape(const ConvArgs& args, const Run& run) {
#if MASKOPS_ISA_LEVEL == 2
  if (args.pairs) return run(ConvShape<bf16, Bf16Pair>(args));
#endif
  return by_dtype(args.dtype, [&](auto of) { return run(ConvShape<decltype(of)>(args)); });
}

int64_t packed_bytes(const ConvArgs& args) {
  if (args.amx) return AmxConvShape(args).packed_bytes();
  return with_shape(args, [&](auto shape) {
    return shape.in_place ? 0 : args.K * shape.weight_size(args) * int64_t(sizeof(typename decltype(shape)::P));
  });
}
void pack(const ConvArgs& args, int64_t k_begin, int64_t k_end) {
  if (args.amx) {
    for (int64_t k = k_begin; k < k_end; ++k) AmxConvShape(args).pack(k);
    return;
  }
  with_shape(args, [&](const auto& shape) { pack_typed(args, shape, k_begin, k_end); });
}
int64_t tile_rows(const ConvArgs& args) {
  return with_shape(args, [](const auto& shape) { return shape.tile; });
}
int64_t bytes(const ConvArgs& args) {
  return with_shape(args, [&]<class Shape>(const Shape& shape) {
    Pieces tile(nullptr), pairs(nullptr);
    TileBuffers<Shape>(args, shape, tile);
    PairBuffers<Shape>(args, shape, pairs);
    return max_of(tile.bytes, pairs.bytes);
  });
}
template <class Run>
bool in_scope(const ConvArgs& args, const Run& run) {
  if (!args.amx) return with_shape(args, run);
  [[maybe_unused]] const typename AmxPlace::Scope scope;
  return with_shape(args, run);
}
bool forward(const ConvArgs& args, int64_t begin, int64_t end, void* buffer) {
  return in_scope(args, [&](const auto& shape) { return forward_typed(args, shape, begin, end, buffer); });
}
int64_t partial_bytes(const ConvArgs& args) {
  return with_shape(args, [&](auto shape) {
    return args.chunks() * args.K * shape.sum_rows * shape.width * int64_t(sizeof(typename decltype(shape)::A));
  });
}
int64_t weight_places(const ConvArgs& args) {
  return with_shape(args, [](const auto& shape) { return shape.places(); });
}
bool weight_chunk(const ConvArgs& args, int64_t chunk, int64_t k_begin, int64_t k_end, void* buffer) {
  return in_scope(args, [&](const auto& shape) { return weight_chunk_typed(args, shape, chunk, k_begin, k_end, buffer); });
}
void sum_chunks(const ConvArgs& args, int64_t k_begin, int64_t k_end) {
  with_shape(args, [&](const auto& shape) { sum_chunks_typed(args, shape, k_begin, k_end); });
}

}  // namespace

extern const ConvKernels ConvKernels_table{&packed_bytes,  &pack,          &tile_rows,    &bytes,     &forward,
                                           &partial_bytes, &weight_places, &weight_chunk, &sum_chunks};

}  // namespace MASKOPS_ISA_NS
}  // namespace maskops
