// The product of packed rows with a weight in lists. A work item is a chunk of rows of lists (outputs, or inputs for the gradient
// of x) against a range of panels. The lists of a section of the chunk's columns are made at a time, so that they stay in the L2
// cache for all panels; then, panel by panel and span by span, each pair of rows adds to its sums, which wait in the L2 cache
// between spans. Every sum runs over the spans in order, and within a span in the order of the lists, so threads change nothing.
#include "common/simd_shuffle.h"
#include "cpu/nm_matmul/linear_lists.h"
#include "cpu/nm_matmul/linear_panels.h"

namespace maskops {
inline namespace MASKOPS_ISA_NS {
namespace {

constexpr int64_t kChunkRows = 512;                     // each panel is read once per chunk
constexpr int64_t kLeastRows = 128;                     // of a chunk, where more chunks would share the work among the threads
constexpr int64_t kSectionBytes = int64_t{1200} << 10;  // of lists, about

// ---- the inner loop

// Lines that the next step will touch, brought to the L2 cache meanwhile: `lines` at each of `count` places, `stride` bytes apart.
struct Ahead {
  const char* at;
  int64_t stride, lines, count;
};
inline void prefetch(const Ahead& ahead, int64_t i) {
  if (i >= ahead.count) return;
  for (int64_t line = 0; line < ahead.lines; ++line) __builtin_prefetch(ahead.at + i * ahead.stride + line * 64, 0, 2);
}

// Sums of N vectors += value * the packed column at an offset. An address of two registers would split each multiply-add with an
// operand in memory into two operations on Intel, so the sum of both is computed first.
template <class V, int N>
inline void add_column(V (&sums)[N], typename V::scalar value, const char* x, uint16_t offset) {
  const auto* column = reinterpret_cast<const typename V::scalar*>(in_register(x + offset));
  const V factor = V::all(value);
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) sums[i] = fma(factor, V::load(column + i * V::width), sums[i]);
}

// The same for two rows of sums and a column that both keep, loaded once.
template <class V, int N>
inline void add_shared(V (&first)[N], V (&second)[N], typename V::scalar a, typename V::scalar b, const char* x, uint16_t offset) {
  const auto* column = reinterpret_cast<const typename V::scalar*>(x + offset);
  const V one = V::all(a), other = V::all(b);
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) {
    const V rows = loaded_once(V::load(column + i * V::width));
    first[i] = fma(one, rows, first[i]);
    second[i] = fma(other, rows, second[i]);
  }
}

// The lists of one pair: columns of both, of the first row alone and of the second. A shared column waits for the multipliers
// and a column of one row for the loads, so they take turns; then those that are left.
template <class V, int N>
inline void multiply_pair(V (&first)[N], V (&second)[N], int64_t both, int64_t ones, int64_t others, const typename V::scalar* values,
                          const uint16_t* offsets, const char* x) {
  const auto *b = values + both, *one = b + both, *other = one + ones;
  const uint16_t *at = offsets + both, *at_other = at + ones;
  const int64_t alike = min_of(ones, others), mixed = min_of(both, alike);
  for (int64_t i = 0; i < mixed; ++i) {
    add_shared<V, N>(first, second, values[i], b[i], x, offsets[i]);
    add_column<V, N>(first, one[i], x, at[i]);
    add_column<V, N>(second, other[i], x, at_other[i]);
  }
  for (int64_t i = mixed; i < both; ++i) add_shared<V, N>(first, second, values[i], b[i], x, offsets[i]);
  for (int64_t i = mixed; i < alike; ++i) {
    add_column<V, N>(first, one[i], x, at[i]);
    add_column<V, N>(second, other[i], x, at_other[i]);
  }
  for (int64_t i = alike; i < ones; ++i) add_column<V, N>(first, one[i], x, at[i]);
  for (int64_t i = alike; i < others; ++i) add_column<V, N>(second, other[i], x, at_other[i]);
}

// Pairs of rows by N vectors. sums [2 pairs][N vectors] start as `init` [2 pairs], where that is given.
template <class V, int N>
void multiply_pairs(int64_t pairs, const PairCounts* counts, const typename V::scalar* values, const uint16_t* offsets, const char* x,
                    const typename V::scalar* init, typename V::scalar* sums, const Ahead& ahead) {
  constexpr int W = V::width;
  for (int64_t pair = 0; pair < pairs; ++pair, sums += 2 * N * W) {
    prefetch(ahead, pair);
    V first[N], second[N];
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) {
      first[i] = init ? V::all(init[2 * pair]) : V::load(sums + i * W);
      second[i] = init ? V::all(init[2 * pair + 1]) : V::load(sums + (N + i) * W);
    }
    const int64_t both = counts[pair].both, ones = counts[pair].first, others = counts[pair].second;
    multiply_pair<V, N>(first, second, both, ones, others, values, offsets, x);
    values += 2 * both + ones + others;
    offsets += both + ones + others;
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) {
      first[i].store(sums + i * W);
      second[i].store(sums + (N + i) * W);
    }
  }
}

template <class V>
using PairsKernel = void (*)(int64_t, const PairCounts*, const typename V::scalar*, const uint16_t*, const char*,
                             const typename V::scalar*, typename V::scalar*, const Ahead&);

template <class V, int N = kPanelVectors>
inline PairsKernel<V> pairs_kernel(int64_t vectors) {
  if constexpr (N > 1) {
    if (vectors < N) return pairs_kernel<V, N - 1>(vectors);
  }
  return &multiply_pairs<V, N>;
}

// ---- sizes

// Rows of lists come in tiles of `unit`, sums run over `blocks` of `depth`.
struct ListShape {
  int64_t rows, unit, pairs;  // pairs of a full tile
  int64_t depth, blocks, sums_over;
  int64_t slots;  // the most kept weights of a tile in a block

  explicit ListShape(const NmProduct& p) {
    const NmLayout& l = p.weight.layout;
    const int64_t span = span_of(l), spans = max_of<int64_t>(1, parts_of(l.K, span));
    const int64_t strips = max_of<int64_t>(1, parts_of(p.weight.outputs, kTileSide));
    rows = p.transposed ? l.K : p.weight.outputs;
    sums_over = p.transposed ? p.weight.outputs : l.K;
    unit = p.transposed ? span : kTileSide;
    depth = p.transposed ? kTileSide : span;
    blocks = p.transposed ? strips : spans;
    pairs = parts_of(unit, 2);
    slots = kTileSide * (span / l.m * l.n);
  }
  inline int64_t tiles() const { return parts_of(rows, unit); }
  inline int64_t tile_rows(int64_t tile) const { return min_of(unit, rows - tile * unit); }
};

// What one thread needs for the lists of a chunk of tiles and its sums.
template <class S>
struct ChunkBuffers {
  ListTile<S>* tiles;  // two, one to read into, one transposed
  ListWriter<S>* ends; // of the lists of each block
  S* values;           // of each block in turn
  uint16_t* offsets;
  PairCounts* counts;
  int32_t* places;  // of the sums of each row of lists
  S *init, *sums;
  int64_t block_values, block_pairs, panel_sums;

  ChunkBuffers(const ListShape& shape, const NmPanels& panels, const NmPlan& plan, Pieces& pieces)
      : block_values(shape.slots * plan.chunk + kListSlack), block_pairs(shape.pairs * plan.chunk) {
    tiles = pieces.take<ListTile<S>>(2);
    ends = pieces.take<ListWriter<S>>(plan.section);
    values = pieces.take<S>(plan.section * block_values);
    offsets = pieces.take<uint16_t>(plan.section * block_values);
    counts = pieces.take<PairCounts>(plan.section * block_pairs);
    places = pieces.take<int32_t>(shape.unit * plan.chunk);
    init = pieces.take<S>(2 * block_pairs);
    panel_sums = 2 * block_pairs * panels.row_bytes / int64_t(sizeof(S));
    // One section: a panel is finished before the next one begins.
    sums = pieces.take<S>((plan.section == shape.blocks ? 1 : parts_of(panels.count, plan.splits)) * panel_sums);
  }
};

NmPlan plan(const NmProduct& p, const NmPanels& panels, int64_t threads) {
  NmPlan plan{};
  const ListShape shape(p);
  const int64_t least = max_of<int64_t>(1, kLeastRows / shape.unit), tiles = max_of<int64_t>(1, shape.tiles());
  const int64_t number = round_up(parts_of(tiles, max_of<int64_t>(1, kChunkRows / shape.unit)), threads);
  const Blocks chunks = Blocks::of(shape.tiles(), max_of(least, parts_of(tiles, number)), 1);
  plan.chunk = chunks.size;
  plan.chunks = chunks.number();
  // Lists are made again for each split of the panels, so there are only as many as give the threads about the same share.
  const auto uneven = [&](int64_t items) { return 10 * parts_of(items, threads) * threads > 11 * items; };
  const int64_t most = min_of(panels.count, parts_of(4 * threads, max_of<int64_t>(1, plan.chunks)));
  plan.splits = 1;
  while (plan.splits < most && uneven(plan.chunks * plan.splits)) ++plan.splits;
  plan.items = plan.chunks * plan.splits;
  with_storage(p.dtype, [&]<class T>() {
    using S = typename VecFor<T>::type::scalar;
    const int64_t block_bytes = shape.slots * plan.chunk * int64_t(sizeof(S) + sizeof(uint16_t));
    plan.section = Blocks::of(shape.blocks, max_of<int64_t>(1, kSectionBytes / block_bytes), 1).size;
    Pieces pieces(nullptr);
    ChunkBuffers<S>(shape, panels, plan, pieces);
    plan.buffer_bytes = pieces.bytes;
  });
  return plan;
}

// ---- a chunk

template <class V, class T>
struct Chunk {
  using S = typename V::scalar;
  const NmProduct& p;
  const NmPanels& panels;
  const NmPlan& plan;
  const ListShape shape;
  const TileReader<S, T> reader;
  Pieces pieces;
  const ChunkBuffers<S> use;
  Range tiles{0, 0}, blocks{0, 0};  // those of the lists
  int64_t pairs = 0;

  Chunk(const NmProduct& product, const NmPanels& panels_of_a, const NmPlan& plan_of, void* buffer)
      : p(product), panels(panels_of_a), plan(plan_of), shape(product), reader(product.weight), pieces(buffer),
        use(shape, panels, plan, pieces) {}

  inline ListWriter<S>& end_of(int64_t b) { return use.ends[b - blocks.begin]; }

  // Row by row, so that values and indices are read in the order in which they lie.
  void list_rows(int64_t tile) {
    const int64_t row = tile * kTileSide, count = shape.tile_rows(tile);
#if MASKOPS_ISA_LEVEL == 2
    if constexpr (sizeof(S) == 4) {
      RowSlots<T> first, second;
      const int64_t row_bytes = p.weight.values_stride * int64_t(sizeof(T)), span_bytes = reader.slots * int64_t(sizeof(T));
      for (int64_t r = 0; r < count; r += 2) {
        const char* next = static_cast<const char*>(p.weight.values) + (row + r + 2) * row_bytes + blocks.begin * span_bytes;
        for (int64_t b = blocks.begin; b < blocks.end; ++b, next += span_bytes) {
          touch<0>(next, span_bytes);
          touch<0>(next + row_bytes, span_bytes);
          first.read(reader, row + r, b, int(panels.row_bytes));
          if (r + 1 < count) second.read(reader, row + r + 1, b, int(panels.row_bytes));
          else second.count = 0, second.kept = 0;
          ListWriter<S> end = end_of(b);  // by value: what is written through it cannot change it
          write_lists(first, second, end);
          end_of(b) = end;
          end.touch_next(2 * reader.slots);
        }
      }
      return;
    }
#endif
    ListTile<S>& pair = use.tiles[0];
    for (int64_t r = 0; r < count; r += 2) {
      for (int64_t b = blocks.begin; b < blocks.end; ++b) {
        const uint64_t first = reader.read_row(row + r, b, pair.dense[0]);
        const uint64_t second = r + 1 < count ? reader.read_row(row + r + 1, b, pair.dense[1]) : 0;
        write_lists(first, second, pair.dense[0], pair.dense[1], end_of(b));
      }
    }
  }

  // Tile by tile, each transposed.
  void list_columns(int64_t tile, int64_t b) {
    const int64_t row = b * kTileSide;
    reader.read(row, min_of<int64_t>(kTileSide, p.weight.outputs - row), tile, use.tiles[0]);
    transpose_tile<V>(use.tiles[0], use.tiles[1]);
    const ListTile<S>& columns = use.tiles[1];
    const int64_t count = shape.tile_rows(tile), slots = 2 * reader.slots;
    ListWriter<S> end = end_of(b);
    for (int64_t i = 0; i < count; i += 2) {
      end.touch_next(slots);
      const int64_t first = row_of(i, count), second = i + 1 < count ? row_of(i + 1, count) : first;
      write_lists(columns.kept[first], i + 1 < count ? columns.kept[second] : 0, columns.dense[first], columns.dense[second], end);
    }
    end_of(b) = end;
  }

  // The row of a tile at place i. Columns of one group rarely keep a weight in the same row, so pairs are made across two groups.
  inline int64_t row_of(int64_t i, int64_t count) const {
    const int64_t m = p.weight.layout.m, groups = i / (2 * m), rest = i % (2 * m);
    if (!p.transposed || (groups + 1) * 2 * m > count) return i;
    return groups * 2 * m + rest % 2 * m + rest / 2;
  }

  void make_lists(Range some_tiles, Range some_blocks) {
    tiles = some_tiles, blocks = some_blocks;
    pairs = (tiles.end - tiles.begin - 1) * shape.pairs + parts_of(shape.tile_rows(tiles.end - 1), 2);
    const int most = most_shared(p.weight.layout);
    for (int64_t i = 0; i < blocks.end - blocks.begin; ++i) {
      use.ends[i] = {use.values + i * use.block_values, use.offsets + i * use.block_values, use.counts + i * use.block_pairs,
                     int(panels.row_bytes), most};
    }
    if (!p.transposed) {
      for (int64_t tile = tiles.begin; tile < tiles.end; ++tile) list_rows(tile);
    } else {
      for (int64_t b = blocks.begin; b < blocks.end; ++b) {
        for (int64_t tile = tiles.begin; tile < tiles.end; ++tile) list_columns(tile, b);
      }
    }
    if (blocks.begin == 0) start_sums();
  }

  void start_sums() {
    const T* bias = static_cast<const T*>(p.bias);
    for (int64_t tile = tiles.begin; tile < tiles.end; ++tile) {
      const int64_t start = (tile - tiles.begin) * 2 * shape.pairs, count = shape.tile_rows(tile);
      int32_t* places = use.places + (tile - tiles.begin) * shape.unit;
      for (int64_t r = 0; r < 2 * shape.pairs; ++r) {
        use.init[start + r] = bias && r < count ? to_float(bias[tile * shape.unit + r]) : S(0);
        if (r < count) places[row_of(r, count)] = int32_t(start + r);
      }
    }
  }

  // During a block the packed columns of the next one, and during the last block the rows of the result.
  inline Ahead ahead_of(int64_t b, const char* x, const T* out, int64_t rows) const {
    if (b + 1 < shape.blocks) {
      const int64_t columns = min_of(shape.depth, shape.sums_over - (b + 1) * shape.depth);
      const int64_t all = parts_of(columns * panels.row_bytes, 64), lines = parts_of(all, pairs);
      return {x + (b + 1) * shape.depth * panels.row_bytes, lines * 64, lines, all / lines};
    }
    const int64_t width = min_of(shape.rows, tiles.end * shape.unit) - tiles.begin * shape.unit;
    return {reinterpret_cast<const char*>(out), shape.rows * int64_t(sizeof(T)), parts_of(width * int64_t(sizeof(T)), 64), rows};
  }

  // Adds the section to the sums of a panel, and writes them out after the last section.
  void multiply(int64_t panel, const void* packed, S* sums) {
    const int64_t used = panel + 1 == panels.count ? panels.last : panels.vectors, first = panel * panels.vectors * V::width;
    const char* x = static_cast<const char*>(packed) + panel * shape.sums_over * panels.row_bytes;
    const PairsKernel<V> kernel = pairs_kernel<V>(used);
    T* out = static_cast<T*>(p.out) + first * shape.rows;
    for (int64_t b = blocks.begin, i = 0; b < blocks.end; ++b, ++i) {
      kernel(pairs, use.counts + i * use.block_pairs, use.values + i * use.block_values, use.offsets + i * use.block_values,
             x + b * shape.depth * panels.row_bytes, b == 0 ? use.init : nullptr, sums,
             ahead_of(b, x, out + tiles.begin * shape.unit, min_of(used * V::width, p.a.rows - first)));
    }
    if (blocks.end < shape.blocks) return;
    const int64_t row = tiles.begin * shape.unit, columns = min_of(shape.rows, tiles.end * shape.unit) - row;
    unpack_sums<V, T>(sums, use.places, columns, int(used), min_of(used * V::width, p.a.rows - first), out + row, shape.rows);
  }
};

template <class V, class T>
void multiply_item(Chunk<V, T>& chunk, int64_t number, Range panels, const void* packed) {
  const NmPlan& plan = chunk.plan;
  const int64_t blocks = chunk.shape.blocks;
  const Range tiles{number * plan.chunk, min_of(chunk.shape.tiles(), (number + 1) * plan.chunk)};
  for (int64_t b = 0; b < blocks; b += plan.section) {
    chunk.make_lists(tiles, {b, min_of(blocks, b + plan.section)});
    for (int64_t panel = panels.begin; panel < panels.end; ++panel) {
      const int64_t at = plan.section == blocks ? 0 : panel - panels.begin;
      chunk.multiply(panel, packed, chunk.use.sums + at * chunk.use.panel_sums);
    }
  }
}

void multiply(const NmProduct& p, const NmPanels& panels, const NmPlan& plan, Range items, const void* packed, void* buffer) {
  with_storage(p.dtype, [&]<class T>() {
    Chunk<typename VecFor<T>::type, T> chunk(p, panels, plan, buffer);
    const int64_t each = parts_of(panels.count, plan.splits);
    for (int64_t item = items.begin; item < items.end; ++item) {
      const int64_t split = item % plan.splits;
      multiply_item(chunk, item / plan.splits, {min_of(panels.count, split * each), min_of(panels.count, (split + 1) * each)}, packed);
    }
  });
}

NmPanels panels(int dtype, int64_t rows) {
  NmPanels result{};
  with_storage(dtype, [&]<class T>() { result = panels_of<typename VecFor<T>::type>(rows); });
  return result;
}

void pack(int dtype, const NmMatrix& a, const NmPanels& panels, Range some, Range columns, void* to) {
  with_storage(dtype, [&]<class T>() {
    using V = typename VecFor<T>::type;
    pack_panels<V, T>(a, panels, some, columns, static_cast<typename V::scalar*>(to));
  });
}

}  // namespace

extern const NmProductKernels NmProductKernels_table{&panels, &pack, &plan, &multiply};

}  // namespace MASKOPS_ISA_NS
}  // namespace maskops
