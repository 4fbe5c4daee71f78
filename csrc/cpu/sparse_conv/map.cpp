// Kernel maps on the CPU: which row each kernel place reads for each row of the result, and which rows the result has.
#include "common/isa.h"

#if MASKOPS_ISA_LEVEL == 0
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>

#include "common/parallel.h"
#include "cpu/sparse_conv/columns.h"
#include "cpu/sparse_conv/map.h"
#include "math/sparse_conv_check.h"

namespace maskops {
namespace {

const int32_t* int32_data(const Tensor& x) { return static_cast<const int32_t*>(x.const_data_ptr()); }

// Rows of coords as places of three axes.
struct Places {
  const int32_t* rows;
  int64_t columns;

  Place operator[](int64_t n) const {
    Place place{};
    const int32_t* row = rows + n * columns;
    place.batch = row[0];
    const int64_t lead = kConvAxes + 1 - columns;
    for (int64_t axis = 1; axis < columns; ++axis) place.at[lead + axis - 1] = row[axis];
    return place;
  }
};

bool same_line(const Place& a, const Place& b) { return a.batch == b.batch && a.at[0] == b.at[0] && a.at[1] == b.at[1]; }

// Whether most rows follow the last one in its column, as in ascending order: then columns are few and long. Tells from a sample.
bool in_columns(const Places& places, int64_t rows) {
  const int64_t sample = std::min<int64_t>(rows - 1, 1024);
  int64_t following = 0;
  for (int64_t i = 0; i < sample; ++i) {
    const int64_t n = i * (rows - 1) / sample;
    const Place a = places[n], b = places[n + 1];
    following += same_line(a, b) && b.at[2] > a.at[2] && Columns::word_of(a.at[2]) == Columns::word_of(b.at[2]);
  }
  return 4 * following > 3 * sample;
}

std::string text_of(const int32_t* row, int64_t columns) {
  return join_sizes(std::vector<int64_t>(row, row + columns));
}

// The places of coords, each of which may be there once, and the row of each by its number.
class PlacesByNumber {
 public:
  PlacesByNumber(const char* op, const Tensor& coords, bool in_columns)
      : columns_(coords.size(0) / (in_columns ? 16 : 4)), row_of_(static_cast<size_t>(coords.size(0) + kColumnSlack)) {
    const Places places{int32_data(coords), coords.size(1)};
    const int64_t rows = coords.size(0);
    for (int64_t n = 0; n < rows; ++n) {
      if (!columns_.insert(places[n])) fail_repeated(op, coords, n);
    }
    columns_.number();
    parallel_for(rows, 64, [&](int64_t begin, int64_t end) {
      const Column* column = nullptr;
      for (int64_t n = begin; n < end; ++n) {
        const Place place = places[n];
        if (column == nullptr || !Columns::holds(*column, place)) {
          column = columns_.at(place.batch, place.at[0], place.at[1], Columns::word_of(place.at[2]));
        }
        row_of_[static_cast<size_t>(Columns::number_of(*column, Columns::bit_of(place.at[2])))] = static_cast<int32_t>(n);
      }
    });
  }

  // The column of `place` moved to a line (k0, k1) of the kernel, and of those beside it what the places `own` of it may read.
  NearColumns near(const ConvGeometry& g, const Place& place, int64_t line, uint64_t own) const {
    NearColumns found{};
    int32_t high = 0, middle = 0;
    const auto k0 = static_cast<int32_t>(line / g.size[1]), k1 = static_cast<int32_t>(line % g.size[1]);
    if (!g.source(0, place.at[0], k0, &high) || !g.source(1, place.at[1], k1, &middle)) return found;
    const int32_t before = g.padding[2], after = g.size[2] - 1 - before, word = Columns::word_of(place.at[2]);
    const bool wanted[3] = {before > 0 && std::countr_zero(own) < before, true, after > 0 && std::countl_zero(own) < after};
    for (int32_t side = 0; side < 3; ++side) {
      if (!wanted[side]) continue;
      const Column& column = *columns_.at(place.batch, high, middle, word + side - 1);
      found.bits[side] = column.bits;
      found.rows[side] = row_of_.data() + column.first;
    }
    return found;
  }

  // What the places (k0, k1, every k2) of the kernel read for `place`, as rows of the map, which are `stride` apart. cursor: for
  // each (k0, k1) the column that was found last, forgotten by forget() where batch or the first two axes change.
  struct Cursor {
    const Column* column = nullptr;
    int32_t word = 0, high = 0, middle = 0;
    bool some = false;
  };
  static void forget(const ConvGeometry& g, const Place& place, std::vector<Cursor>& cursors) {
    for (int64_t line = 0; line < static_cast<int64_t>(cursors.size()); ++line) {
      Cursor& cursor = cursors[static_cast<size_t>(line)];
      cursor = Cursor{};
      cursor.some = g.source(0, place.at[0], static_cast<int32_t>(line / g.size[1]), &cursor.high) &&
                    g.source(1, place.at[1], static_cast<int32_t>(line % g.size[1]), &cursor.middle);
    }
  }
  void find(const ConvGeometry& g, const Place& place, Cursor& cursor, int32_t k2_end, int32_t* to, int64_t stride) const {
    int32_t last = 0;
    if (g.is_run(2) && cursor.some && g.source(2, place.at[2], 0, &last) && (last & 63) + k2_end <= 64) {
      return find_run(place, cursor, last, k2_end, to, stride);
    }
    for (int32_t k2 = 0; k2 < k2_end; ++k2, to += stride) {
      *to = -1;
      if (!cursor.some || !g.source(2, place.at[2], k2, &last)) continue;
      const int32_t word = Columns::word_of(last);
      if (cursor.column == nullptr || word != cursor.word) {
        cursor.column = columns_.at(place.batch, cursor.high, cursor.middle, word);
        cursor.word = word;
      }
      const uint64_t bit = Columns::bit_of(last);
      if (cursor.column->bits & bit) *to = row_of_[static_cast<size_t>(Columns::number_of(*cursor.column, bit))];
    }
  }

 private:
  // count neighbours from `last` on, all of one column: their rows stand one after the other, so that one look-up finds them all.
  void find_run(const Place& place, Cursor& cursor, int32_t last, int32_t count, int32_t* to, int64_t stride) const {
    const int32_t word = Columns::word_of(last);
    if (cursor.column == nullptr || word != cursor.word) {
      cursor.column = columns_.at(place.batch, cursor.high, cursor.middle, word);
      cursor.word = word;
    }
    uint64_t window = cursor.column->bits >> (last & 63);
    const int32_t* row = row_of_.data();
    if (window != 0) row += Columns::number_of(*cursor.column, Columns::bit_of(last));
    for (int32_t k2 = 0; k2 < count; ++k2, to += stride, window >>= 1) {
      *to = -1;
      if (window & 1) *to = *row++;
    }
  }

  [[noreturn]] static void fail_repeated(const char* op, const Tensor& coords, int64_t again) {
    const int64_t columns = coords.size(1);
    const int32_t *data = int32_data(coords), *row = data + again * columns;
    int64_t first = 0;
    while (!std::equal(row, row + columns, data + first * columns)) ++first;
    fail_index(op, "coords[" + std::to_string(again) + "]", "be unique", text_of(row, columns) + " as in row " + std::to_string(first));
  }

  Columns columns_;
  std::vector<int32_t> row_of_;
};

// Every kernel place of rows [begin, end) of the result.
void find_all(const PlacesByNumber& known, const ConvGeometry& g, const Places& places, int64_t rows, int64_t begin, int64_t end,
              int32_t* out) {
  std::vector<PlacesByNumber::Cursor> cursors(static_cast<size_t>(g.size[0]) * static_cast<size_t>(g.size[1]));
  Place before{};
  for (int64_t m = begin; m < end; ++m) {
    const Place place = places[m];
    if (m == begin || !same_line(place, before)) PlacesByNumber::forget(g, place, cursors);
    before = place;
    int32_t* to = out + m;
    for (PlacesByNumber::Cursor& cursor : cursors) {
      known.find(g, place, cursor, g.size[2], to, rows);
      to += g.size[2] * rows;
    }
  }
}

// Of a kernel that lies alike around its place, over places that read one another: what a reads at k, reads a at the opposite place.
// The first half of the kernel is looked up, the other half, which holds -1, is written from it.
void find_half(const PlacesByNumber& known, const ConvGeometry& g, const Places& places, int64_t rows, int64_t begin, int64_t end,
               int32_t* out) {
  const int64_t K = g.places(), middle = K / 2;
  std::vector<PlacesByNumber::Cursor> cursors(static_cast<size_t>(middle / g.size[2] + 1));  // up to the line of the middle
  Place before{};
  for (int64_t m = begin; m < end; ++m) {
    const Place place = places[m];
    if (m == begin || !same_line(place, before)) PlacesByNumber::forget(g, place, cursors);
    before = place;
    out[middle * rows + m] = static_cast<int32_t>(m);
    int64_t k = 0;
    for (PlacesByNumber::Cursor& cursor : cursors) {
      const int32_t count = static_cast<int32_t>(std::min<int64_t>(g.size[2], middle - k));
      known.find(g, place, cursor, count, out + k * rows + m, rows);
      for (int64_t last = k + count; k < last; ++k) {
        const int32_t n = out[k * rows + m];
        if (n >= 0) out[(K - 1 - k) * rows + n] = static_cast<int32_t>(m);
      }
    }
  }
}

bool is_symmetric(const ConvGeometry& g) {
  bool same = !g.divides;
  for (int axis = 0; axis < kConvAxes; ++axis) {
    same = same && g.stride[axis] == 1 && g.size[axis] % 2 == 1 &&
           g.padding[axis] == static_cast<int64_t>(g.dilation[axis]) * (g.size[axis] / 2);
  }
  return same;
}

// Whether find_columns serves: places of x among themselves, whose columns lie alike, and no further apart than a column is long.
bool by_columns(const ConvGeometry& g) {
  bool same = !g.divides && g.dilation[2] == 1;
  for (int axis = 0; axis < kConvAxes; ++axis) same = same && g.stride[axis] == 1;
  return same && g.padding[2] < 64 && g.size[2] - g.padding[2] <= 64;
}

// The same of places among themselves: rows that follow each other in a column are looked up together.
void find_columns(const PlacesByNumber& known, const ConvGeometry& g, const Places& places, int64_t rows, int64_t begin, int64_t end,
                  int32_t* out) {
  const ConvMapKernels& kernels = pick_ConvMapKernels();
  for (int64_t m = begin; m < end;) {
    const Place place = places[m];
    const int32_t word = Columns::word_of(place.at[2]);
    uint64_t own = Columns::bit_of(place.at[2]);
    int64_t next = m + 1;
    for (; next < end; ++next) {
      const Place more = places[next];
      const uint64_t bit = Columns::bit_of(more.at[2]);
      if (!same_line(place, more) || Columns::word_of(more.at[2]) != word || bit <= own) break;
      own |= bit;
    }
    int32_t* to = out + m;
    for (int64_t line = 0; line < static_cast<int64_t>(g.size[0]) * g.size[1]; ++line, to += g.size[2] * rows) {
      kernels.find_line(known.near(g, place, line, own), own, -g.padding[2], g.size[2], to, rows);
    }
    m = next;
  }
}

Tensor sparse_conv_map(const Tensor& coords_any, const Tensor& out_coords_any, const Sizes& kernel_size, const Sizes& stride,
                       const Sizes& padding, const Sizes& dilation, bool transposed) {
  check_conv_map(coords_any, out_coords_any, kernel_size, stride, padding, dilation);
  const bool same = coords_any.const_data_ptr() == out_coords_any.const_data_ptr() && coords_any.size(0) == out_coords_any.size(0) &&
                    coords_any.stride(0) == out_coords_any.stride(0) && coords_any.stride(1) == out_coords_any.stride(1);
  const Tensor coords = contiguous_or_copy(coords_any), out_coords = same ? coords : contiguous_or_copy(out_coords_any);
  const ConvGeometry g = geometry_of(kernel_size, stride, padding, dilation, transposed);
  const bool columns = in_columns({int32_data(coords), coords.size(1)}, coords.size(0));
  const PlacesByNumber known(kKernelMap, coords, columns);
  const Places places{int32_data(out_coords), out_coords.size(1)};
  const int64_t rows = out_coords.size(0), K = g.places();
  Tensor map = empty_like_device(coords, {K, rows}, ScalarType::Int);
  int32_t* out = static_cast<int32_t*>(map.mutable_data_ptr());
  // Long columns are looked up as such; single places that read one another are looked up for half of the kernel.
  const auto each_row = [&](auto find) {
    parallel_for(rows, K * 16, [&](int64_t begin, int64_t end) { find(known, g, places, rows, begin, end, out); });
  };
  if (same && columns && by_columns(g)) {
    each_row(find_columns);
  } else if (same && is_symmetric(g)) {
    int32_t* half = out + (K / 2 + 1) * rows;
    parallel_for(K / 2 * rows, 4, [&](int64_t begin, int64_t end) { std::fill(half + begin, half + end, -1); });
    each_row(find_half);
  } else {
    each_row(find_all);
  }
  return map;
}

// ---------------------------------------------------------------- places of the result

void reach(const ConvGeometry& g, const Place& place, const int64_t* end, Columns& found) {
  Place to{};
  to.batch = place.batch;
  auto inside = [&](int axis, int32_t k) {
    return g.source(axis, place.at[axis], k, &to.at[axis]) && to.at[axis] >= 0 && to.at[axis] < end[axis];
  };
  for (int32_t k0 = 0; k0 < g.size[0]; ++k0) {
    if (!inside(0, k0)) continue;
    for (int32_t k1 = 0; k1 < g.size[1]; ++k1) {
      if (!inside(1, k1)) continue;
      for (int32_t k2 = 0; k2 < g.size[2]; ++k2) {
        if (inside(2, k2)) found.insert(to);
      }
    }
  }
}

Tensor sparse_conv_outputs(const Tensor& coords_any, const Sizes& out_shape, const Sizes& kernel_size, const Sizes& stride,
                           const Sizes& padding, const Sizes& dilation, bool transposed) {
  check_conv_outputs(coords_any, out_shape, kernel_size, stride, padding, dilation);
  const Tensor coords = contiguous_or_copy(coords_any);
  const ConvGeometry g = geometry_of(kernel_size, stride, padding, dilation, !transposed);
  const int64_t rows = coords.size(0), columns = coords.size(1), lead = kConvAxes + 1 - columns;
  int64_t end[kConvAxes] = {1, 1, 1};
  for (int64_t axis = lead; axis < kConvAxes; ++axis) end[axis] = out_shape[static_cast<size_t>(axis - lead)];
  const Places places{int32_data(coords), columns};
  Columns found(rows / 2);
  for (int64_t n = 0; n < rows; ++n) reach(g, places[n], end, found);

  std::vector<Column> sorted;
  found.each([&](const Column& column) { sorted.push_back(column); });
  std::sort(sorted.begin(), sorted.end(), [](const Column& a, const Column& b) {
    return std::tie(a.batch, a.high, a.middle, a.word) < std::tie(b.batch, b.high, b.middle, b.word);
  });
  Tensor out = empty_like_device(coords, {found.number(), columns}, ScalarType::Int);
  int32_t* to = static_cast<int32_t*>(out.mutable_data_ptr());
  for (const Column& column : sorted) {
    for (uint64_t bits = column.bits; bits != 0; bits &= bits - 1) {
      const int32_t place[] = {column.high, column.middle, column.word * 64 + std::countr_zero(bits)};
      *to++ = column.batch;
      for (int64_t axis = lead; axis < kConvAxes; ++axis) *to++ = place[axis];
    }
  }
  return out;
}

// ---------------------------------------------------------------- reverse

Tensor sparse_conv_reverse(const Tensor& map_any, int64_t rows) {
  check_conv_reverse(map_any, rows);
  const Tensor map = contiguous_or_copy(map_any);
  const int64_t places = map.size(0), count = map.size(1);
  Tensor out = empty_like_device(map, {places, rows}, ScalarType::Int);
  const int32_t* from = int32_data(map);
  int32_t* to = static_cast<int32_t*>(out.mutable_data_ptr());
  FirstFault outside, repeated;
  parallel_for(places, (count + rows) * 4, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      std::fill_n(to + k * rows, rows, -1);
      for (int64_t m = 0; m < count; ++m) {
        const int64_t n = from[k * count + m];
        if (n == -1) continue;
        if (n < 0 || n >= rows) {
          outside.note(k * count + m);
          continue;
        }
        if (to[k * rows + n] >= 0) repeated.note(k * count + m);
        to[k * rows + n] = static_cast<int32_t>(m);
      }
    }
  });
  const FirstFault& fault = outside.any() ? outside : repeated;
  if (fault.any()) {
    const std::string at = "map[" + std::to_string(fault.position() / count) + ", " + std::to_string(fault.position() % count) + "]";
    const std::string rule = outside.any() ? "be in [-1, " + std::to_string(rows) + ")" : "be unique in its row";
    fail_index(kKernelMap, at, rule, std::to_string(from[fault.position()]) + (outside.any() ? "" : " again"));
  }
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(maskops, CPU, m) {
  m.impl("sparse_conv_map", TORCH_BOX(&sparse_conv_map));
  m.impl("sparse_conv_outputs", TORCH_BOX(&sparse_conv_outputs));
  m.impl("sparse_conv_reverse", TORCH_BOX(&sparse_conv_reverse));
}

}  // namespace maskops
#endif
