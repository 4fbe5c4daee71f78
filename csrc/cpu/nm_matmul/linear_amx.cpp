// nm_matmul_linear of bfloat16 in AMX tiles: pieces of the weight are made dense, as rows that a tile register reads beside words of x,
// or, for the gradient of x and for odd layouts, as words of the whole weight, 32 outputs at a time. Tiles multiply seven times as fast
// as vectors of floats, so that the zeros cost less than stepping over them. A zero would carry what is not finite in x to results that
// do not depend on it, so the caller looks for that first.
#include "cpu/nm_matmul/linear_expand.h"

namespace maskops {
inline namespace MASKOPS_ISA_NS {
namespace {

#if MASKOPS_ISA_LEVEL == 2

constexpr int64_t kColumns = 32, kGroup = 8;           // of a panel; panels of an item
constexpr int64_t kRowBytes = int64_t{1} << 19;         // of the rows of an item, about: they stay in the L2 cache
constexpr int64_t kMostRows = 256, kLeastRows = 32;

struct Shape {
  int64_t columns, depth, summed, panels, rows;  // of the result; what is summed over, and in whole registers; rows of an item

  explicit Shape(const NmProduct& p)
      : columns(p.transposed ? p.weight.layout.K : p.weight.outputs), depth(p.transposed ? p.weight.outputs : p.weight.layout.K),
        summed(round_up(depth, kAmxDepth)), panels(parts_of(columns, kColumns)),
        rows(min_of(kMostRows, max_of(kLeastRows, kRowBytes / (2 * max_of<int64_t>(1, summed)) / kLeastRows * kLeastRows))) {}
  int64_t blocks(const NmProduct& p) const { return parts_of(p.a.rows, rows); }
};

int64_t strips(const NmProduct& p) { return parts_of(p.weight.outputs, kColumns); }
int64_t packed_bytes(const NmProduct& p) { return Shape(p).panels * Shape(p).summed * kColumns * 2; }
int64_t pack_bytes(const NmProduct& p) { return kColumns * round_up(p.weight.layout.K + p.weight.layout.m, kAmxDepth) * 2; }
int64_t items(const NmProduct& p) { return Shape(p).blocks(p) * parts_of(Shape(p).panels, kGroup); }
int64_t bytes(const NmProduct& p) { return Shape(p).rows * (Shape(p).summed * 2 + kColumns * 4); }

// Outputs [32 strip, 32 strip + 32): a panel of the weight, or 16 rows of words of every panel where it is read transposed.
void pack(const NmProduct& p, Range some, void* packed, void* buffer) {
  const Shape shape(p);
  const NmExpander expander(p.weight.layout);
  const int64_t K = p.weight.layout.K, stride = pack_bytes(p) / (kColumns * 2);
  bf16* rows = static_cast<bf16*>(buffer);
  uint32_t* to = static_cast<uint32_t*>(packed);
  for (int64_t strip = some.begin; strip < some.end; ++strip) {
    const int64_t count = min_of(kColumns, p.weight.outputs - strip * kColumns);
    for (int64_t r = 0; r < count; ++r) expander.row(p.weight, strip * kColumns + r, rows + r * stride);
    if (!p.transposed) {
      amx_transpose_words(rows, stride, count, K, kColumns, shape.summed, to + strip * shape.summed * kColumns / 2, kColumns);
      continue;
    }
    for (int64_t panel = 0; panel < shape.panels; ++panel) {
      amx_pair_rows(rows + panel * kColumns, stride, count, min_of(kColumns, K - panel * kColumns), kColumns, kColumns,
                    to + (panel * shape.summed + strip * kColumns) * kColumns / 2);
    }
  }
}

void multiply(const NmProduct& p, Range some, const void* packed, void* buffer) {
  const AmxScope scope;
  const Shape shape(p);
  const int64_t blocks = shape.blocks(p);
  bf16* copy = static_cast<bf16*>(buffer);
  float* sums = reinterpret_cast<float*>(copy + shape.rows * shape.summed);
  for (int64_t item = some.begin; item < some.end; ++item) {
    const int64_t first = item % blocks * shape.rows, group = item / blocks * kGroup;
    const int64_t count = min_of(shape.rows, p.a.rows - first), rows = round_up(count, kAmxRows);
    const bf16* from = static_cast<const bf16*>(p.a.data) + first * p.a.stride;
    AmxA left{from, p.a.stride};
    if (rows != count || shape.depth != shape.summed) {
      amx_copy_rows(from, p.a.stride, count, shape.depth, rows, shape.summed, copy);
      left = {copy, shape.summed};
    }
    for (int64_t panel = group; panel < min_of(group + kGroup, shape.panels); ++panel) {
      const int64_t column = panel * kColumns;
      amx_multiply(rows, kColumns, shape.summed, left, {static_cast<const uint32_t*>(packed) + column * shape.summed / 2, kColumns},
                   {sums, kColumns, false});
      const AmxResult result(p.bias == nullptr ? nullptr : static_cast<const bf16*>(p.bias) + column, min_of(kColumns, shape.columns - column));
      bf16* out = static_cast<bf16*>(p.out) + first * shape.columns + column;
      for (int64_t r = 0; r < count; ++r) result.write(sums + r * kColumns, out + r * shape.columns);
    }
  }
}

// ---- out^T [outputs, rows] = weight x^T, of layouts whose groups do not reach from one 32 columns into the next: rows of the weight are
// left operands as they are, so that nothing of it is transposed, and making it dense anew for every block of rows costs little.

constexpr int64_t kOutputs = 32, kBlock = 8;  // rows of the weight, and panels of 32 rows of x that meet them, at a time
constexpr int64_t kDepth = 512;               // columns of the weight at a time, at most: they stay in the L1 cache
constexpr int64_t kDenseStride = kDepth + 32;  // no power of two, or the rows of a register would want the same places of that cache

// x as panels of words of two columns: [panels, summed / 2, 32].
struct Words {
  const int64_t summed, panels, blocks, strips, depth, pieces;  // K in whole registers; of panels; of outputs; columns at a time

  explicit Words(const NmProduct& p)
      : summed(round_up(p.weight.layout.K, kAmxDepth)), panels(parts_of(p.a.rows, kColumns)), blocks(parts_of(panels, kBlock)),
        strips(parts_of(p.weight.outputs, kOutputs)),
        // Where many panels pass by, they need room in the cache as well.
        depth(panels > 2 ? kDepth / 2 : kDepth), pieces(parts_of(summed, depth)) {}
  int64_t at(int64_t panel, int64_t k) const { return (panel * summed + k) / 2 * kColumns; }
  static int64_t rows(const NmProduct& p, int64_t panel) { return min_of(kColumns, p.a.rows - panel * kColumns); }
};

bool by_rows(const NmProduct& p) { return !p.transposed && p.weight.layout.K > 0 && NmExpander::fits(p.weight.layout); }
int64_t words_bytes(const NmProduct& p) { return Words(p).panels * Words(p).summed * kColumns * 2; }
int64_t word_items(const NmProduct& p) { return Words(p).panels * Words(p).pieces; }
int64_t row_items(const NmProduct& p) { return Words(p).blocks * Words(p).strips; }
int64_t row_bytes(const NmProduct&) { return kOutputs * (kDenseStride * 2 + (kBlock + 1) * kColumns * 4); }

void make_words(const NmProduct& p, Range items, void* words) {
  const Words shape(p);
  for (int64_t item = items.begin; item < items.end; ++item) {
    const int64_t panel = item / shape.pieces, k0 = item % shape.pieces * shape.depth;
    const int64_t k1 = min_of(shape.summed, k0 + shape.depth);
    amx_transpose_words(static_cast<const bf16*>(p.a.data) + panel * kColumns * p.a.stride + k0, p.a.stride, Words::rows(p, panel),
                        p.a.columns - k0, kColumns, k1 - k0, static_cast<uint32_t*>(words) + shape.at(panel, k0), kColumns);
  }
}

// The values and places of columns [k0, k1) of a row are on their way to the L2 cache: rows lie too far apart for the processor to see.
void fetch_columns(const NmCompressed& w, int64_t output, int64_t k0, int64_t k1) {
  const NmLayout& l = w.layout;
  const int64_t first = k0 / l.m * l.n, count = (k1 - k0) / l.m * l.n;
  fetch_ahead(static_cast<const bf16*>(w.values), output * w.values_stride + first, count);
  fetch_ahead(w.indices, output * w.indices_stride + first * l.bits / 8, count * l.bits / 8);
}

// sums [panels, kOutputs, 32] = `count` rows of the weight from `first` on times panels of words; dense: [kOutputs, kDenseStride].
void multiply_strip(const NmProduct& p, const NmExpander& expander, int64_t first, int64_t count, Range panels, const uint32_t* words,
                    bf16* dense, float* sums) {
  const Words shape(p);
  for (int64_t k0 = 0; k0 < shape.summed; k0 += shape.depth) {
    const int64_t k1 = min_of(shape.summed, k0 + shape.depth), next = k1 < shape.summed ? k1 : 0;
    for (int64_t r = 0; r < count; ++r) {
      expander.blocks(p.weight, first + r, k0 / kAmxDepth, k1 / kAmxDepth, dense + r * kDenseStride);
      fetch_columns(p.weight, first + r + (next > 0 ? 0 : kOutputs), next, next + shape.depth);
    }
    for (int64_t panel = panels.begin; panel < panels.end; ++panel) {
      amx_multiply(round_up(count, kAmxRows), round_up(Words::rows(p, panel), kAmxRows), k1 - k0, {dense, kDenseStride},
                   {words + shape.at(panel, k0), kColumns}, {sums + (panel - panels.begin) * kOutputs * kColumns, kColumns, k0 > 0});
    }
  }
}

void multiply_rows(const NmProduct& p, Range items, const void* words, void* buffer) {
  const AmxScope scope;
  const Words shape(p);
  const NmExpander expander(p.weight.layout);
  const int64_t N = p.weight.outputs;
  bf16* dense = static_cast<bf16*>(buffer);
  float *by_row = reinterpret_cast<float*>(dense + kOutputs * kDenseStride), *sums = by_row + kOutputs * kColumns;
  for (int64_t item = items.begin; item < items.end; ++item) {
    const int64_t first = item % shape.strips * kOutputs, count = min_of(kOutputs, N - first), block = item / shape.strips * kBlock;
    const Range panels{block, min_of(block + kBlock, shape.panels)};
    const AmxResult result(p.bias == nullptr ? nullptr : static_cast<const bf16*>(p.bias) + first, count);
    multiply_strip(p, expander, first, count, panels, static_cast<const uint32_t*>(words), dense, sums);
    for (int64_t panel = panels.begin; panel < panels.end; ++panel) {
      const int64_t rows = Words::rows(p, panel);
      amx_transpose_sums(sums + (panel - panels.begin) * kOutputs * kColumns, kColumns, rows, kOutputs, by_row);
      bf16* out = static_cast<bf16*>(p.out) + panel * kColumns * N + first;
      for (int64_t m = 0; m < rows; ++m) result.write(by_row + m * kOutputs, out + m * N);
    }
  }
}

bool all_finite(const NmMatrix& a, Range rows) {
  bool finite = true;
  for (int64_t i = rows.begin; i < rows.end; ++i) {
    const bf16* row = static_cast<const bf16*>(a.data) + i * a.stride;
    for (int64_t k = 0; k < a.columns; k += 32) finite &= amx_finite(_mm512_maskz_loadu_epi16(first_lanes(a.columns - k), row + k));
  }
  return finite;
}

}  // namespace

extern const NmAmxKernels NmAmxKernels_table{&strips,  &packed_bytes, &pack_bytes, &pack,      &items,     &bytes,         &multiply,
                                             &by_rows, &words_bytes,  &word_items, &make_words, &row_items, &row_bytes, &multiply_rows,
                                             &all_finite};

#else

}  // namespace

extern const NmAmxKernels NmAmxKernels_table{};

#endif

}  // namespace MASKOPS_ISA_NS
}  // namespace maskops
