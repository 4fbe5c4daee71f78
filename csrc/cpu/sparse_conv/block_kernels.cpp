// The kernels of block-masked convolution, compiled once per instruction set: products of rows that are found through addresses.
// Nothing is gathered: a tile of sums stays in registers while the kernel places are gone through, each with the addresses of the
// rows that it reads; a place that no row of the tile reads is skipped, one that is missing for some rows reads zeros. The weight is
// packed in panels of columns, of which a part that fits the first cache is used for all rows of a tile before the next one. Only
// few channels (an image) are gathered, as a kernel place would be over before it began.
#include "cpu/sparse_conv/block.h"

#include "common/gemm_pack.h"
#include "cpu/sparse_conv/block_amx.h"
#include "cpu/sparse_conv/block_pairs.h"
#include "cpu/sparse_conv/block_tile.h"

namespace maskops {
inline namespace MASKOPS_ISA_NS {
namespace {

constexpr int64_t kTile = 96;          // rows of a tile, a multiple of every strided_rows()
constexpr int64_t kPartBytes = 32768;  // of a panel that is used at a time
constexpr int64_t kFewChannels = 16;   // fewer are gathered
constexpr int64_t kMostRows = 12;

// Storage type T; P: what is multiplied.
template <class T, class P_ = typename VecFor<T>::type::scalar>
struct Panels {
  using V = typename VecFor<T>::type;
  using A = typename V::scalar;
  using P = P_;
  using Row = typename Gemm<P>::Value;
  static constexpr int64_t kWidth = kStridedVectors * V::width, kStep = Gemm<P>::kStep;
  using Stored = T;
  static constexpr bool kWide = sizeof(T) == sizeof(A);  // no conversion
  int64_t panels, taps, depth;  // as the product sees them: gathered rows have one place of all channels
  bool gathered;

  explicit Panels(const BlockConvArgs& args) {
    panels = (args.columns + kWidth - 1) / kWidth;
    gathered = args.depth < kFewChannels && args.taps > 1;
    taps = gathered ? 1 : args.taps;
    depth = gathered ? args.taps * args.depth : args.depth;
  }
  int64_t steps() const { return depth / kStep; }  // kStep divides depth
  int64_t panel_size() const { return taps * steps() * kWidth; }
  static int64_t columns(const BlockConvArgs& args, int64_t panel) { return min_of(kWidth, args.columns - panel * kWidth); }
  static int64_t vectors(int64_t columns) { return (columns + V::width - 1) / V::width; }
  // Channels at a time, and kernel places at a time.
  int64_t part_depth() const { return max_of<int64_t>(1, min_of(depth, kPartBytes / (kWidth * int64_t(sizeof(P))) * kStep)); }
  int64_t part_taps() const {
    return depth > part_depth() ? 1 : max_of<int64_t>(1, kPartBytes / (max_of<int64_t>(1, steps()) * kWidth * int64_t(sizeof(P))));
  }
};

// ---- the weight in panels

template <class P>
void pack_typed(const P& p, const BlockConvArgs& args, int64_t begin, int64_t end) {
  using T = typename P::Stored;
  using Row = typename P::Row;
  constexpr int64_t kDepth = 8;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t group = item / p.panels, panel = item % p.panels, columns = P::columns(args, panel);
    const T* from = static_cast<const T*>(args.weight) + group * args.of_group + panel * P::kWidth * args.of_column;
    Row* to = static_cast<Row*>(args.packed) + item * p.panel_size() * P::kStep;
    if (columns < P::kWidth) memset(to, 0, size_t(p.panel_size() * P::kStep) * sizeof(*to));
    for (int64_t d0 = 0; d0 < args.depth; d0 += kDepth) {
      const int64_t d1 = min_of(args.depth, d0 + kDepth);
      for (int64_t j = 0; j < columns; ++j) {
        for (int64_t d = d0; d < d1; ++d) {
          const T* place = from + j * args.of_column + d * args.of_depth;
          for (int64_t t = 0; t < args.taps; ++t) {
            const int64_t step = (t * args.depth + d) / P::kStep;
            from_float(to_float(place[t]), to + (step * P::kWidth + j) * P::kStep + d % P::kStep);
          }
        }
      }
    }
  }
}

// ---- the product

template <class P>
struct Buffers {
  using A = typename P::A;
  using Row = typename P::Row;
  Row *zeros, *gathered;
  A *sums, *begin;
  const Row** rows;
  const typename P::P** weights;

  Buffers(const P& p, void* buffer, int64_t* bytes = nullptr) {
    Pieces pieces(buffer);
    zeros = pieces.take<Row>(p.depth);
    sums = pieces.take<A>(kTile * P::kWidth);
    gathered = pieces.take<Row>(p.gathered ? kTile * p.depth + P::V::width : 0);
    begin = pieces.take<A>(P::kWidth);
    rows = pieces.take<const Row*>(max_of<int64_t>(kMostTaps * kMostRows, 2 * kTile));
    weights = pieces.take<const typename P::P*>(kMostTaps);
    if (bytes != nullptr) *bytes = pieces.bytes;
  }
};

// Rows [first, first + count) with all that their kernel places read, side by side; neighbours on a line in one copy.
template <class A>
void gather_rows(const BlockConvArgs& args, int64_t group, int64_t first, int64_t count, A* to) {
  const A* from = static_cast<const A*>(args.rows) + group * args.depth;
  const bool whole = args.groups == 1;
  for (int64_t r = 0; r < count; ++r) {
    for (int64_t t = 0; t < args.taps;) {
      const int32_t row = args.source[t * args.M + first + r];
      int64_t run = 1;
      if (row < 0) {
        while (t + run < args.taps && args.source[(t + run) * args.M + first + r] < 0) ++run;
        for (int64_t i = 0; i < run * args.depth; ++i) to[i] = 0;
      } else {
        while (whole && t + run < args.taps && args.source[(t + run) * args.M + first + r] == row + run) ++run;
        copy_values(from + row * args.row_stride, run * args.depth, to);
      }
      to += run * args.depth, t += run;
    }
  }
}

// Addresses of what R rows read at kernel places [t0, t1), from channel d on; returns at how many places anything is read.
template <class P>
int64_t addresses(const BlockConvArgs& args, const P& p, const Buffers<P>& own, const typename P::Row* base,
                  const typename P::P* panel, int64_t t0, int64_t t1, int64_t d, int64_t first, int64_t i, int64_t R) {
  constexpr int64_t kWidth = P::kWidth;
  if (p.gathered) {
    for (int64_t r = 0; r < R; ++r) own.rows[r] = own.gathered + (i + r) * p.depth + d;
    own.weights[0] = panel + d / P::kStep * kWidth;
    return 1;
  }
  int64_t found = 0;
  for (int64_t t = t0; t < t1; ++t) {
    const int32_t* source = args.source + t * args.M + first + i;
    const typename P::Row** rows = own.rows + found * R;
    bool any = false;
    for (int64_t r = 0; r < R; ++r) {
      any |= source[r] >= 0;
      rows[r] = source[r] < 0 ? own.zeros : base + source[r] * args.row_stride + d;
    }
    own.weights[found] = panel + (t * p.depth + d) / P::kStep * kWidth;
    found += any;
  }
  return found;
}

template <class P>
void forward_typed(const P& p, const BlockConvArgs& args, int64_t item, void* buffer) {
  using T = typename P::Stored;
  using A = typename P::A;
  using V = typename P::V;
  using Row = typename P::Row;
  const Buffers<P> own(p, buffer);
  const int64_t tiles = (args.M + kTile - 1) / kTile;
  const int64_t tile = item % tiles, group = p.gathered ? item / tiles : item / tiles / p.panels;
  const int64_t first = tile * kTile, count = min_of(kTile, args.M - first);
  const int64_t panel_begin = p.gathered ? 0 : item / tiles % p.panels, panel_end = p.gathered ? p.panels : panel_begin + 1;
  memset(own.zeros, 0, size_t(p.depth) * sizeof(Row));
  if constexpr (P::kStep == 1) {
    if (p.gathered) gather_rows(args, group, first, count, own.gathered);
  }
  const Row* base = static_cast<const Row*>(args.rows) + group * args.depth;
  for (int64_t panel = panel_begin; panel < panel_end; ++panel) {
    const auto* weight = static_cast<const typename P::P*>(args.packed) + (group * p.panels + panel) * p.panel_size();
    const int64_t columns = P::columns(args, panel), vectors = P::vectors(columns), R = strided_rows(int(vectors));
    const int64_t column = group * args.columns + panel * P::kWidth;
    T* out = static_cast<T*>(args.out) + column;
    const bool direct = P::kWide && columns % V::width == 0;
    memset(own.begin, 0, size_t(P::kWidth) * sizeof(A));
    if (args.bias != nullptr) widen(static_cast<const T*>(args.bias) + column, columns, own.begin);
    const int64_t part_depth = p.part_depth(), part_taps = p.part_taps();
    for (int64_t t0 = 0; t0 < p.taps; t0 += part_taps) {
      const int64_t t1 = min_of(p.taps, t0 + part_taps);
      // No channels at all still give the bias.
      for (int64_t d = 0; d < p.depth || d == 0; d += part_depth) {
        const bool start = t0 == 0 && d == 0, last = t1 == p.taps && d + part_depth >= p.depth;
        for (int64_t i = 0; i < count; i += R) {
          const int64_t now = min_of(R, count - i);
          const int64_t found = p.depth == 0 ? 0 : addresses(args, p, own, base, weight, t0, t1, d, first, i, now);
          const A* from = start ? nullptr : own.sums + i * P::kWidth;
          A* to[kMostRows];
          bool out_now = false;
          for (int64_t r = 0; r < now; ++r) to[r] = own.sums + (i + r) * P::kWidth;
          if constexpr (P::kWide) {
            out_now = last && direct;
            for (int64_t r = 0; out_now && r < now; ++r) to[r] = out + args.target[first + i + r] * args.out_stride;
          }
          if (found == 0 && !start && !out_now) continue;
          const int64_t steps = min_of(part_depth, p.depth - d) / P::kStep;
          tile_of<Product<typename P::P>>(now, vectors)(found, own.rows, own.weights, steps, own.begin, from, to);
        }
      }
    }
    if (direct) continue;
    for (int64_t r = 0; r < count; ++r) narrow(own.sums + r * P::kWidth, columns, out + args.target[first + r] * args.out_stride);
  }
}

// ---- gradient of the weight

template <class T>
int64_t partial_size(const BlockConvArgs& args) {  // of a chunk, group and panel
  return args.taps * args.depth * Panels<T>::kWidth;
}

template <class T>
typename Panels<T>::A* bias_sums(const BlockConvArgs& args, const Panels<T>& p) {
  return static_cast<typename Panels<T>::A*>(args.partial) + args.chunks() * args.groups * p.panels * partial_size<T>(args);
}

template <class T>
void weight_chunk_typed(const BlockConvArgs& args, int64_t item, void* buffer) {
  using P = Panels<T>;
  using A = typename P::A;
  using V = typename P::V;
  const P p(args);
  const Buffers<P> own(p, buffer);
  const int64_t panel = item % p.panels, group = item / p.panels % args.groups, chunk = item / p.panels / args.groups;
  const int64_t columns = P::columns(args, panel), vectors = P::vectors(columns), R = strided_rows(int(vectors));
  const int64_t column = group * args.columns + panel * P::kWidth, rows = args.M, chunks = args.chunks();
  A* partial = static_cast<A*>(args.partial) + item * partial_size<T>(args);
  A* bias = bias_sums<T>(args, p) + chunk * args.groups * args.columns + column;
  memset(partial, 0, size_t(partial_size<T>(args)) * sizeof(A));
  memset(own.begin, 0, size_t(P::kWidth) * sizeof(A));
  const A* base = static_cast<const A*>(args.rows) + group * args.depth;
  const A **xs = own.rows, **grads = own.rows + kTile;
  for (int64_t first = chunk * rows / chunks; first < (chunk + 1) * rows / chunks; first += kTile) {
    const int64_t count = min_of(kTile, (chunk + 1) * rows / chunks - first);
    for (int64_t r = 0; r < count; ++r) {
      A* to = own.sums + r * P::kWidth;
      widen(static_cast<const T*>(args.grad) + args.target[first + r] * args.out_stride + column, columns, to);
      for (int64_t j = 0; j < vectors * V::width; j += V::width) (V::load(own.begin + j) + V::load(to + j)).store(own.begin + j);
    }
    for (int64_t t = 0; t < args.taps; ++t) {
      const int32_t* source = args.source + t * rows + first;
      int64_t found = 0;
      for (int64_t r = 0; r < count; ++r) {
        xs[found] = base + source[r] * args.row_stride;
        grads[found] = own.sums + r * P::kWidth;
        found += source[r] >= 0;
      }
      if (found == 0) continue;
      for (int64_t d = 0; d < args.depth; d += R) {
        tile_of<Outer<V>>(min_of(R, args.depth - d), vectors)(found, xs, d, grads, partial + (t * args.depth + d) * P::kWidth);
      }
    }
  }
  for (int64_t j = 0; j < columns; ++j) bias[j] = own.begin[j];
}

template <class T>
void sum_chunks_typed(const BlockConvArgs& args, int64_t begin, int64_t end) {
  using P = Panels<T>;
  using A = typename P::A;
  using V = typename P::V;
  const P p(args);
  const int64_t chunks = args.chunks(), each = args.groups * p.panels * partial_size<T>(args), wide = args.groups * args.columns;
  const A* bias = bias_sums<T>(args, p);
  constexpr int64_t kDepth = 8;  // channels at a time, all kernel places of which are put next to each other here
  alignas(64) T block[V::width], staged[V::width * kDepth * kMostTaps];
  for (int64_t o = begin; o < end;) {
    const int64_t group = o / args.columns, j = o % args.columns, panel = j / P::kWidth;
    // Columns side by side, as far as they are in one panel.
    const int64_t count = min_of<int64_t>(min_of<int64_t>(V::width, end - o), min_of(args.columns - j, P::kWidth - j % P::kWidth));
    const A* from = static_cast<const A*>(args.partial) + (group * p.panels + panel) * partial_size<T>(args) + j % P::kWidth;
    T* to = static_cast<T*>(args.grad_weight) + o * args.depth * args.taps;
    for (int64_t d0 = 0; d0 < args.depth; d0 += kDepth) {
      const int64_t some = min_of(kDepth, args.depth - d0), values = some * args.taps;
      for (int64_t t = 0; t < args.taps; ++t) {
        for (int64_t d = 0; d < some; ++d) {
          const A* at = from + (t * args.depth + d0 + d) * P::kWidth;
          V sum = V::load_n(at, count);
          for (int64_t chunk = 1; chunk < chunks; ++chunk) sum = sum + V::load_n(at + chunk * each, count);
          sum.store(block);
          for (int64_t i = 0; i < count; ++i) staged[i * values + d * args.taps + t] = block[i];
        }
      }
      for (int64_t i = 0; i < count; ++i) copy_values(staged + i * values, values, to + (i * args.depth + d0) * args.taps);
    }
    for (int64_t i = o; i < o + count; ++i) {
      A sum = 0;
      for (int64_t chunk = 0; chunk < chunks; ++chunk) sum += bias[chunk * wide + i];
      from_float(sum, static_cast<T*>(args.grad_bias) + i);
    }
    o += count;
  }
}

// ---- by dtype

void widen_rows(int dtype, const void* x, const int32_t* row, int64_t count, int64_t channels, void* to) {
  by_dtype(dtype, [&](auto of) {
    using T = decltype(of);
    using A = typename Panels<T>::A;
    for (int64_t i = 0; i < count; ++i) {
      const T* from = static_cast<const T*>(x) + row[i] * channels;
      A* out = static_cast<A*>(to) + i * channels;
      int64_t c = 0;
      using V = typename Panels<T>::V;
      for (; c + V::width <= channels; c += V::width) V::load(from + c).store(out + c);
      if (c < channels) V::load_n(from + c, channels - c).store_n(out + c, channels - c);
    }
  });
}
template <class F>
auto with_panels(const BlockConvArgs& args, const F& f) {
#if MASKOPS_ISA_LEVEL == 2
  if (args.pairs) return f(Panels<bf16, Bf16Pair>(args));
#endif
  return by_dtype(args.dtype, [&](auto of) { return f(Panels<decltype(of)>(args)); });
}

// amx(block) where products run in AMX tiles, else other().
template <class Amx, class Other>
auto choose(const BlockConvArgs& args, [[maybe_unused]] const Amx& amx, const Other& other) {
#if MASKOPS_ISA_LEVEL == 2
  if (args.amx) return amx(AmxBlock(args));
#endif
  return other();
}

int64_t panels(const BlockConvArgs& args) {
  return choose(args, [](auto block) { return block.panels; }, [&] { return with_panels(args, [](auto p) { return p.panels; }); });
}
int64_t packed_bytes(const BlockConvArgs& args) {
  const auto other = [&] {
    return with_panels(args, [&](auto p) { return args.groups * p.panels * p.panel_size() * int64_t(sizeof(typename decltype(p)::P)); });
  };
  return choose(args, [](auto block) { return block.packed_bytes(); }, other);
}
void pack(const BlockConvArgs& args, int64_t begin, int64_t end) {
  const auto amx = [&](auto block) {
    for (int64_t i = begin; i < end; ++i) block.pack(i);
  };
  choose(args, amx, [&] { with_panels(args, [&](auto p) { pack_typed(p, args, begin, end); }); });
}
int64_t bytes(const BlockConvArgs& args) {
  const auto other = [&] {
    return with_panels(args, [&](auto p) {
      int64_t result = 0;
      Buffers<decltype(p)>(p, nullptr, &result);
      return max_of(result, pair_block_bytes(args));
    });
  };
  return choose(args, [](auto block) { return block.bytes(); }, other);
}
int64_t items(const BlockConvArgs& args) {
  const auto other = [&] {
    return with_panels(args, [&](auto p) { return (args.M + kTile - 1) / kTile * args.groups * (p.gathered ? 1 : p.panels); });
  };
  return choose(args, [](auto block) { return block.items(); }, other);
}
void forward(const BlockConvArgs& args, int64_t item, void* buffer) {
  const auto amx = [&](auto block) {
    [[maybe_unused]] const typename decltype(block)::Scope scope;
    block.forward(item, buffer);
  };
  choose(args, amx, [&] { with_panels(args, [&](auto p) { forward_typed(p, args, item, buffer); }); });
}
int64_t partial_bytes(const BlockConvArgs& args) {
  return by_dtype(args.dtype, [&](auto of) {
    using T = decltype(of);
    const int64_t each = args.groups * (Panels<T>(args).panels * partial_size<T>(args) + args.columns);
    return args.chunks() * each * int64_t(sizeof(typename Panels<T>::A));
  });
}
int64_t weight_items(const BlockConvArgs& args) {
  const auto other = [&] {
    return by_dtype(args.dtype, [&](auto of) { return args.chunks() * args.groups * Panels<decltype(of)>(args).panels; });
  };
  return choose(args, [](auto block) { return block.weight_items(); }, other);
}
void weight_chunk(const BlockConvArgs& args, int64_t item, void* buffer) {
#if MASKOPS_ISA_LEVEL == 2
  if (args.pairs) {
    static_assert(PairBlock::kPartial == Panels<bf16>::kWidth);
    return PairBlock(args, buffer).weight_chunk(item, static_cast<float*>(args.partial), bias_sums<bf16>(args, Panels<bf16>(args)));
  }
#endif
  const auto amx = [&](auto block) {
    [[maybe_unused]] const typename decltype(block)::Scope scope;
    static_assert(decltype(block)::kPartial == Panels<bf16>::kWidth);
    block.weight_chunk(item, static_cast<float*>(args.partial), bias_sums<bf16>(args, Panels<bf16>(args)), buffer);
  };
  choose(args, amx, [&] { by_dtype(args.dtype, [&](auto of) { weight_chunk_typed<decltype(of)>(args, item, buffer); }); });
}
void sum_chunks(const BlockConvArgs& args, int64_t begin, int64_t end) {
  by_dtype(args.dtype, [&](auto of) { sum_chunks_typed<decltype(of)>(args, begin, end); });
}

}  // namespace

extern const BlockConvKernels BlockConvKernels_table{&widen_rows, &panels,  &packed_bytes,  &pack,         &bytes,
                                                     &items,      &forward, &partial_bytes, &weight_items, &weight_chunk, &sum_chunks,
                                                     MASKOPS_ISA_LEVEL == 2, kFewChannels};

}  // namespace MASKOPS_ISA_NS
}  // namespace maskops
