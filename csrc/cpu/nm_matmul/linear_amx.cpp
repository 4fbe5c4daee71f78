// nm_matmul_linear of bfloat16 in AMX tiles: the weight is decompressed 32 outputs at a time, straight into the words that a tile register
// reads. Tiles multiply seven times as fast as vectors of floats, so that the zeros cost less than stepping over them. A zero would
// carry what is not finite in x to results that do not depend on it, so the caller looks for that first.
#include "common/amx.h"
#include "cpu/nm_matmul/linear_places.h"

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

// Row `output` of the weight, dense; `to` has room for whole groups.
void decompress(const NmCompressed& w, const PlaceReader& reader, int64_t output, bf16* to) {
  const NmLayout& l = w.layout;
  const uint8_t* places = w.indices + output * w.indices_stride;
  const bf16* values = static_cast<const bf16*>(w.values) + output * w.values_stride;
  memset(to, 0, size_t(l.groups * l.m) * sizeof(bf16));
  alignas(64) int32_t place[16];
  int in_group = 0;
  for (int64_t slot = 0; slot < l.slots; slot += 16) {
    _mm512_store_si512(place, reader.read(places, l.row_bytes, slot));
    const int64_t count = min_of<int64_t>(16, l.slots - slot);
    for (int64_t i = 0; i < count; ++i) {
      to[place[i]] = values[slot + i];
      if (++in_group == l.n) in_group = 0, to += l.m;
    }
  }
}

// Outputs [32 strip, 32 strip + 32): a panel of the weight, or 16 rows of words of every panel where it is read transposed.
void pack(const NmProduct& p, Range some, void* packed, void* buffer) {
  const Shape shape(p);
  const PlaceReader reader(p.weight.layout);
  const int64_t K = p.weight.layout.K, stride = pack_bytes(p) / (kColumns * 2);
  bf16* rows = static_cast<bf16*>(buffer);
  uint32_t* to = static_cast<uint32_t*>(packed);
  for (int64_t strip = some.begin; strip < some.end; ++strip) {
    const int64_t count = min_of(kColumns, p.weight.outputs - strip * kColumns);
    for (int64_t r = 0; r < count; ++r) decompress(p.weight, reader, strip * kColumns + r, rows + r * stride);
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

bool all_finite(const NmMatrix& a, Range rows) {
  bool finite = true;
  for (int64_t i = rows.begin; i < rows.end; ++i) {
    const bf16* row = static_cast<const bf16*>(a.data) + i * a.stride;
    for (int64_t k = 0; k < a.columns; k += 32) finite &= amx_finite(_mm512_maskz_loadu_epi16(first_lanes(a.columns - k), row + k));
  }
  return finite;
}

}  // namespace

extern const NmAmxKernels NmAmxKernels_table{&strips, &packed_bytes, &pack_bytes, &pack, &items, &bytes, &multiply, &all_finite};

#else

}  // namespace

extern const NmAmxKernels NmAmxKernels_table{};

#endif

}  // namespace MASKOPS_ISA_NS
}  // namespace maskops
