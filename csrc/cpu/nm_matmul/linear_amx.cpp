// nm_matmul_linear of bfloat16 in AMX tiles. Many rows of x: the weight is decompressed 32 outputs at a time, straight into the words that
// a tile register reads. Few rows: x becomes those words, and the weight is read once, a piece of its rows at a time. Tiles multiply seven times as fast as vectors of floats, so that the zeros cost less than stepping over them. A zero would
// carry what is not finite in x to results that do not depend on it, so the caller looks for that first.
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

// ---- few rows of x: out^T [outputs, rows] = weight x^T

constexpr int64_t kFewDepth = 512;  // columns of the weight at a time: 32 rows of them stay in the L1 cache

bool fits_few(const NmProduct& p) { return NmExpander::fits(p.weight.layout); }
int64_t few_words_bytes(const NmProduct& p) { return Shape(p).summed / 2 * round_up(p.a.rows, kAmxRows) * 4; }
int64_t few_bytes(const NmProduct& p) { return kColumns * (kFewDepth * 2 + 2 * round_up(p.a.rows, kAmxRows) * 4); }

void few_words(const NmProduct& p, void* words) {
  const int64_t rows = round_up(p.a.rows, kAmxRows);
  amx_transpose_words(static_cast<const bf16*>(p.a.data), p.a.stride, p.a.rows, p.a.columns, rows, Shape(p).summed,
                      static_cast<uint32_t*>(words), rows);
}

// The values and places of columns [k0, k1) of a row are on their way to the L2 cache: rows lie too far apart for the processor to see.
void fetch_columns(const NmCompressed& w, int64_t output, int64_t k0, int64_t k1) {
  const NmLayout& l = w.layout;
  const int64_t first = k0 / l.m * l.n, count = (k1 - k0) / l.m * l.n;
  fetch_ahead(static_cast<const bf16*>(w.values), output * w.values_stride + first, count);
  fetch_ahead(w.indices, output * w.indices_stride + first * l.bits / 8, count * l.bits / 8);
}

void few_multiply(const NmProduct& p, Range strips, const void* words, void* buffer) {
  const AmxScope scope;
  const Shape shape(p);
  const NmExpander expander(p.weight.layout);
  const int64_t N = p.weight.outputs, M = p.a.rows, rows = round_up(M, kAmxRows);
  bf16* dense = static_cast<bf16*>(buffer);
  float *sums = reinterpret_cast<float*>(dense + kColumns * kFewDepth), *by_row = sums + kColumns * rows;
  for (int64_t strip = strips.begin; strip < strips.end; ++strip) {
    const int64_t first = strip * kColumns, count = min_of(kColumns, N - first);
    for (int64_t k0 = 0; k0 < shape.summed; k0 += kFewDepth) {
      const int64_t k1 = min_of(shape.summed, k0 + kFewDepth), next = k1 < shape.summed ? k1 : 0;
      for (int64_t r = 0; r < count; ++r) {
        expander.blocks(p.weight, first + r, k0 / kAmxDepth, k1 / kAmxDepth, dense + r * kFewDepth);
        fetch_columns(p.weight, first + r + (next > 0 ? 0 : kColumns), next, next + kFewDepth);
      }
      amx_multiply(round_up(count, kAmxRows), rows, k1 - k0, {dense, kFewDepth}, {static_cast<const uint32_t*>(words) + k0 / 2 * rows, rows},
                   {sums, rows, k0 > 0});
    }
    for (int64_t i = 0; i < kColumns; i += VecF::width) {
      for (int64_t m = 0; m < rows; m += VecF::width) {
        VecF block[VecF::width];
        for (int r = 0; r < VecF::width; ++r) block[r] = VecF::load(sums + (i + r) * rows + m);
        transpose(block);
        for (int r = 0; r < VecF::width; ++r) block[r].store(by_row + (m + r) * kColumns + i);
      }
    }
    const AmxResult result(p.bias == nullptr ? nullptr : static_cast<const bf16*>(p.bias) + first, count);
    for (int64_t m = 0; m < M; ++m) result.write(by_row + m * kColumns, static_cast<bf16*>(p.out) + m * N + first);
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

extern const NmAmxKernels NmAmxKernels_table{&strips,   &packed_bytes, &pack_bytes,      &pack,      &items,     &bytes,        &multiply,
                                             &fits_few, &few_words,    &few_words_bytes, &few_bytes, &few_multiply, &all_finite};

#else

}  // namespace

extern const NmAmxKernels NmAmxKernels_table{};

#endif

}  // namespace MASKOPS_ISA_NS
}  // namespace maskops
