// The kernels of nm_linear's gradients, compiled once per instruction set. See linear_grad.h for the layout; all sums run in one
// fixed order, which depends on the sizes only, never on the number of threads.
#include "cpu/nm_matmul/linear_grad.h"

#include "common/gemm.h"

namespace maskops {
inline namespace MASKOPS_ISA_NS {
namespace {

constexpr int kVectors = 8;        // accumulators per list: covers the latency of two multiply-add pipes
constexpr int64_t kBlock = 64;     // columns per block: 64 x 8 vectors x 64 bytes = 32 KB of x in the L1 cache

template <class T>
struct Of {
  using Sum = typename Arithmetic<T>::type;
  using V = typename VecFor<T>::type;
  static constexpr int64_t kPanel = kVectors * V::width;
};

template <class Run>
void with_type(int dtype, const Run& run) {
  switch (dtype) {
    case 0: return run.template operator()<float>();
    case 1: return run.template operator()<double>();
    case 2: return run.template operator()<bf16>();
    default: return run.template operator()<f16>();
  }
}

// run.template operator()<vectors of a panel>().
template <int N = kVectors, class Run>
void with_vectors(int64_t vectors, const Run& run) {
  if constexpr (N > 1) {
    if (vectors < N) return with_vectors<N - 1>(vectors, run);
  }
  run.template operator()<N>();
}

template <class T>
int64_t vectors_of(int64_t rows, int64_t panel) {
  const int64_t left = min_of(rows - panel * Of<T>::kPanel, Of<T>::kPanel);
  return (left + Of<T>::V::width - 1) / Of<T>::V::width;
}

// ---- panels: [columns][vectors of the panel], rows past the end are zeros

template <class T>
void pack_panels(const T* from, int64_t stride, int64_t rows, int64_t columns, Range panels, typename Of<T>::Sum* to) {
  using Sum = typename Of<T>::Sum;
  constexpr int64_t kPanel = Of<T>::kPanel;
  auto row = [&](int64_t i, int64_t k0, int64_t, T*) { return from + i * stride + k0; };
  for (int64_t p = panels.begin; p < panels.end; ++p) {
    const int64_t width = vectors_of<T>(rows, p) * Of<T>::V::width, count = min_of(rows - p * kPanel, kPanel);
    Sum* panel = to + p * kPanel * columns;
    constexpr int64_t kChunk = 64, kAtOnce = 16;
    alignas(64) Sum converted[kAtOnce][kChunk];
    alignas(64) static const Sum zeros[kChunk] = {};
    T unused[1];
    for (int64_t k0 = 0; k0 < columns; k0 += kChunk) {
      const int64_t k1 = min_of(columns, k0 + kChunk);
      for (int64_t r0 = 0; r0 < width; r0 += kAtOnce) {
        const int64_t some = min_of(kAtOnce, width - r0);
        const Sum* lines[kAtOnce];
        for (int64_t r = 0; r < some; ++r) {
          lines[r] = r0 + r < count ? as_packed(row(p * kPanel + r0 + r, k0, k1, unused), k1 - k0, converted[r]) : zeros;
        }
        Sum block[kAtOnce * kChunk];
        transpose_panel(lines, k1 - k0, int(some), block);
        for (int64_t k = k0; k < k1; ++k) copy_values(block + (k - k0) * some, some, panel + k * width + r0);
      }
    }
  }
}

// ---- lists: for every row of a block a count, values and places inside the block

template <class Sum>
struct Lists {
  Sum* values;      // [rows][pitch]
  uint16_t* at;     // [rows][pitch]
  int32_t* counts;  // [rows]
  int64_t rows, pitch;
};

// sums[row] = (add ? sums[row] : 0) + sum over the list of value * x[at]. A list is summed in kChains chains, added up at its end,
// so that a multiply-add seldom waits for the one before.
template <class V, int N>
void run_lists(const Lists<typename V::scalar>& lists, const typename V::scalar* x, typename V::scalar* sums, bool add) {
  constexpr int64_t kWidth = int64_t(N) * V::width;
  constexpr int kChains = N <= 2 ? 4 : 2;
  for (int64_t r = 0; r < lists.rows; ++r, sums += kWidth) {
    const auto* value = lists.values + r * lists.pitch;
    const uint16_t* at = lists.at + r * lists.pitch;
    V sum[kChains][N];
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) {
      sum[0][i] = add ? V::load(sums + i * V::width) : V::zero();
#pragma GCC unroll 4
      for (int c = 1; c < kChains; ++c) sum[c][i] = V::zero();
    }
    const int64_t count = lists.counts[r];
    int64_t q = 0;
    for (; q + 4 <= count; q += 4) {
      uint64_t four;  // one load for the places of four values
      memcpy(&four, at + q, sizeof four);
#pragma GCC unroll 4
      for (int t = 0; t < 4; ++t) {
        const auto* row = x + int64_t(uint16_t(four >> (16 * t))) * kWidth;
        const V w = V::all(value[q + t]);
#pragma GCC unroll 8
        for (int i = 0; i < N; ++i) sum[t % kChains][i] = fma(w, V::load(row + i * V::width), sum[t % kChains][i]);
      }
    }
    for (; q < count; ++q) {
      const auto* row = x + int64_t(at[q]) * kWidth;
      const V w = V::all(value[q]);
#pragma GCC unroll 8
      for (int i = 0; i < N; ++i) sum[0][i] = fma(w, V::load(row + i * V::width), sum[0][i]);
    }
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) {
      V all = sum[0][i];
#pragma GCC unroll 4
      for (int c = 1; c < kChains; ++c) all = all + sum[c][i];
      all.store(sums + i * V::width);
    }
  }
}

// Groups per block of columns, and columns per block.
int64_t groups_per_block(const NmLayout& layout) { return max_of<int64_t>(1, kBlock / layout.m); }
int64_t block_columns(const NmLayout& layout) { return groups_per_block(layout) * layout.m; }
int64_t block_count(const NmLayout& layout) { return (layout.groups + groups_per_block(layout) - 1) / groups_per_block(layout); }

// The places of slots [first, first + count) of a row as columns after the first group's.
void read_columns(const uint8_t* row, const NmLayout& layout, int64_t first, int64_t count, uint16_t* to) {
  for (int64_t j = 0, group = 0, in_group = 0; j < count; ++j) {
    to[j] = uint16_t(group * layout.m + read_place(row, first + j, layout.bits));
    if (++in_group == layout.n) in_group = 0, ++group;
  }
}

// 2:4, the pattern of hardware: four slots in two groups come from one byte.
struct TwoOfFour {
  uint64_t columns[256];
  constexpr TwoOfFour() : columns() {
    for (int byte = 0; byte < 256; ++byte) {
      for (int s = 0; s < 4; ++s) columns[byte] |= uint64_t(((byte >> (2 * s)) & 3) + s / 2 * 4) << (16 * s);
    }
  }
};
constexpr TwoOfFour kTwoOfFour;

void read_columns_two_of_four(const uint8_t* row, int64_t first, int64_t count, uint16_t* to) {
  constexpr uint64_t kNext = 0x0008000800080008u;  // two groups further
  uint64_t base = 0;
  for (int64_t j = 0; j < count; j += 4, base += kNext) {  // first is a multiple of 4, and lists have room for whole fours
    const uint64_t four = kTwoOfFour.columns[row[(first + j) / 4]] + base;
    memcpy(to + j, &four, sizeof four);
  }
}

// Slots of a block that stand for real columns: padding comes last in the last group.
int64_t real_slots(const NmLayout& layout, int64_t block, int64_t count, const uint16_t* at) {
  const int64_t columns = layout.K - block * block_columns(layout);
  while (count > 0 && at[count - 1] >= columns) --count;
  return count;
}

template <class T>
void list_outputs(const NmLinearGrad& a, Range outputs, int64_t block, const Lists<typename Of<T>::Sum>& to) {
  const NmLayout& layout = a.layout;
  const int64_t per_block = groups_per_block(layout) * layout.n, first = block * per_block;
  const int64_t count = min_of(per_block, layout.slots - first);
  const bool fast = layout.n == 2 && layout.m == 4;
  for (int64_t o = outputs.begin; o < outputs.end; ++o) {
    const int64_t r = o - outputs.begin;
    const uint8_t* places = a.indices + o * a.indices_stride;
    uint16_t* at = to.at + r * to.pitch;
    if (fast) read_columns_two_of_four(places, first, count, at);
    else read_columns(places, layout, first, count, at);
    auto* values = to.values + r * to.pitch;
    const auto* read = as_packed(static_cast<const T*>(a.values) + o * a.values_stride + first, count, values);
    if (static_cast<const void*>(read) != values) copy_values(read, count, values);
    to.counts[r] = int32_t(block == block_count(layout) - 1 ? real_slots(layout, block, count, at) : count);
  }
}

// ---- scratch memory of a chunk

struct Cut {
  char* at;
  template <class S>
  S* take(int64_t count) {
    S* piece = reinterpret_cast<S*>(at);
    at += round_up(count * int64_t(sizeof(S)), 64);
    return piece;
  }
};

int64_t pitch_of(const NmLayout& layout) { return round_up(groups_per_block(layout) * layout.n, 8); }

template <class T>
int64_t scratch_of(const NmLinearGrad& a, int64_t chunk) {
  using Sum = typename Of<T>::Sum;
  const int64_t pitch = max_of(pitch_of(a.layout), kBlock), line = 64;
  const int64_t blocks = max_of(block_count(a.layout), (a.outputs + kBlock - 1) / kBlock);
  const int64_t lists = blocks * chunk * (pitch * (int64_t(sizeof(Sum)) + 2) + 4) + 5 * line * blocks;
  const int64_t sums = chunk * max_of(Of<T>::kPanel, pitch * Of<T>::V::width) * int64_t(sizeof(Sum));
  return lists + sums + 8 * a.layout.K + 16 * a.layout.slots + (1 << 16);
}

int64_t scratch(const NmLinearGrad& a, int64_t chunk) {
  int64_t bytes = 0;
  with_type(a.dtype, [&]<class T>() { bytes = scratch_of<T>(a, chunk); });
  return bytes;
}

template <class Sum>
Lists<Sum> take_lists(Cut& cut, int64_t rows, int64_t pitch) {
  Sum* values = cut.take<Sum>(rows * pitch);
  uint16_t* at = cut.take<uint16_t>(rows * pitch);
  return {values, at, cut.take<int32_t>(rows), rows, pitch};
}

// out[row0 + i, c] = sums[c][i]: `columns` lists of a panel back to rows of the result.
template <class T>
void write_panel(const typename Of<T>::Sum* sums, int64_t vectors, int64_t row0, int64_t rows, int64_t columns, T* out, int64_t stride) {
  using V = typename Of<T>::V;
  using Sum = typename Of<T>::Sum;
  const int64_t pitch = vectors * V::width;
  alignas(64) Sum block[Of<T>::kPanel * V::width];
  alignas(64) static const Sum zeros[Of<T>::kPanel] = {};
  for (int64_t c0 = 0; c0 < columns; c0 += V::width) {
    const int64_t some = min_of<int64_t>(V::width, columns - c0);
    const Sum* lines[V::width];
    for (int64_t c = 0; c < V::width; ++c) lines[c] = c < some ? sums + (c0 + c) * pitch : zeros;
    transpose_panel(lines, pitch, V::width, block);
    for (int64_t i = 0; i < rows; ++i) V::load(block + i * V::width).store_n(out + (row0 + i) * stride + c0, some);
  }
}

// Runs the lists of all blocks over every panel; x_columns: the columns of the packed operand, `step` of them per block.
template <class T>
void run_chunk(const Lists<typename Of<T>::Sum>* lists, int64_t blocks, const void* panels, int64_t rows, int64_t x_columns, int64_t step,
               typename Of<T>::Sum* sums, T* out, int64_t stride) {
  using V = typename Of<T>::V;
  constexpr int64_t kPanel = Of<T>::kPanel;
  for (int64_t p = 0; p * kPanel < rows; ++p) {
    const int64_t vectors = vectors_of<T>(rows, p), width = vectors * V::width;
    const auto* panel = static_cast<const typename Of<T>::Sum*>(panels) + p * kPanel * x_columns;
    with_vectors(vectors, [&]<int N>() {
      for (int64_t b = 0; b < blocks; ++b) run_lists<V, N>(lists[b], panel + b * step * width, sums, b > 0);
    });
    write_panel<T>(sums, vectors, p * kPanel, min_of(rows - p * kPanel, kPanel), lists[0].rows, out, stride);
  }
}

// ---- the gradient for x: lists per column, of the outputs that keep a weight there

template <class T>
void grad_x_typed(const NmLinearGrad& a, Range columns, void* scratch) {
  using Sum = typename Of<T>::Sum;
  const NmLayout& layout = a.layout;
  const int64_t count = columns.end - columns.begin, blocks = (a.outputs + kBlock - 1) / kBlock;
  const int64_t group0 = columns.begin / layout.m, slot0 = group0 * layout.n;
  const int64_t slots = (min_of(layout.groups, (columns.end + layout.m - 1) / layout.m) - group0) * layout.n;
  Cut cut{static_cast<char*>(scratch)};
  auto* lists = cut.take<Lists<Sum>>(blocks);
  uint16_t* at = cut.take<uint16_t>(round_up(slots, 4));
  Sum* row = cut.take<Sum>(slots);
  for (int64_t b = 0; b < blocks; ++b) {
    lists[b] = take_lists<Sum>(cut, count, kBlock);
    memset(lists[b].counts, 0, size_t(count) * sizeof(int32_t));
    for (int64_t o = b * kBlock, last = min_of(a.outputs, o + kBlock); o < last; ++o) {
      if (layout.n == 2 && layout.m == 4 && slot0 % 4 == 0) read_columns_two_of_four(a.indices + o * a.indices_stride, slot0, slots, at);
      else read_columns(a.indices + o * a.indices_stride, layout, slot0, slots, at);
      const Sum* values = as_packed(static_cast<const T*>(a.values) + o * a.values_stride + slot0, slots, row);
      for (int64_t j = 0; j < slots; ++j) {
        const int64_t c = at[j];  // columns.begin is a multiple of m
        if (c >= count) continue;  // padding
        const int64_t to = c * kBlock + lists[b].counts[c]++;
        lists[b].values[to] = values[j];
        lists[b].at[to] = uint16_t(o - b * kBlock);
      }
    }
  }
  Sum* sums = cut.take<Sum>(count * Of<T>::kPanel);
  run_chunk<T>(lists, blocks, a.grad_panels, a.rows, a.outputs, kBlock, sums, static_cast<T*>(a.out) + columns.begin, layout.K);
}

// ---- the gradient for the values: per slot a dot product over the rows

// dots[slot] += grad row of the output times panel row of the slot's column, lane by lane.
template <class V, int N>
void run_dots(const Lists<typename V::scalar>& lists, const typename V::scalar* x, const typename V::scalar* grad, V* dots, bool add) {
  constexpr int64_t kWidth = int64_t(N) * V::width;
  for (int64_t r = 0; r < lists.rows; ++r, grad += kWidth) {
    V g[N];
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) g[i] = V::load(grad + i * V::width);
    const uint16_t* at = lists.at + r * lists.pitch;
    V* to = dots + r * lists.pitch;
    for (int64_t q = 0; q < lists.counts[r]; ++q) {
      const auto* row = x + int64_t(at[q]) * kWidth;
      V even = add ? to[q] : V::zero(), odd = V::zero();
#pragma GCC unroll 8
      for (int i = 0; i < N; i += 2) {
        even = fma(g[i], V::load(row + i * V::width), even);
        if (i + 1 < N) odd = fma(g[i + 1], V::load(row + (i + 1) * V::width), odd);
      }
      to[q] = even + odd;
    }
  }
}

template <class T>
void grad_values_typed(const NmLinearGrad& a, Range outputs, void* scratch) {
  using Sum = typename Of<T>::Sum;
  using V = typename Of<T>::V;
  constexpr int64_t kPanel = Of<T>::kPanel;
  const NmLayout& layout = a.layout;
  const int64_t count = outputs.end - outputs.begin, pitch = pitch_of(layout), step = block_columns(layout);
  const int64_t per_block = groups_per_block(layout) * layout.n;
  Cut cut{static_cast<char*>(scratch)};
  const Lists<Sum> lists = take_lists<Sum>(cut, count, pitch);
  V* dots = cut.take<V>(count * pitch);
  T* out = static_cast<T*>(a.out);
  for (int64_t b = 0; b < block_count(layout); ++b) {
    list_outputs<T>(a, outputs, b, lists);
    for (int64_t p = 0; p * kPanel < a.rows; ++p) {
      const int64_t vectors = vectors_of<T>(a.rows, p), width = vectors * V::width;
      const Sum* x = static_cast<const Sum*>(a.x_panels) + p * kPanel * layout.K + b * step * width;
      const Sum* grad = static_cast<const Sum*>(a.grad_panels) + p * kPanel * a.outputs + outputs.begin * width;
      with_vectors(vectors, [&]<int N>() { run_dots<V, N>(lists, x, grad, dots, p > 0); });
    }
    const int64_t first = b * per_block, some = min_of(per_block, layout.slots - first);
    for (int64_t r = 0; r < count; ++r) {
      for (int64_t q = 0; q < some; ++q) {
        const bool real = q < lists.counts[r] && a.rows > 0;
        from_float(real ? dots[r * pitch + q].sum() : Sum(0), out + (outputs.begin + r) * layout.slots + first + q);
      }
    }
  }
}

// ---- the table

int64_t panels(int dtype, int64_t rows) {
  int64_t found = 0;
  with_type(dtype, [&]<class T>() { found = (rows + Of<T>::kPanel - 1) / Of<T>::kPanel; });
  return found;
}

int64_t panels_bytes(int dtype, int64_t rows, int64_t columns) {
  int64_t found = 0;
  with_type(dtype, [&]<class T>() { found = round_up(rows, Of<T>::V::width) * columns * int64_t(sizeof(typename Of<T>::Sum)); });
  return found;
}

void pack_x(const NmLinearGrad& a, Range span) {
  with_type(a.dtype, [&]<class T>() {
    pack_panels(static_cast<const T*>(a.x), a.x_stride, a.rows, a.layout.K, span, static_cast<typename Of<T>::Sum*>(a.x_panels));
  });
}
void pack_grad(const NmLinearGrad& a, Range span) {
  with_type(a.dtype, [&]<class T>() {
    pack_panels(static_cast<const T*>(a.grad), a.grad_stride, a.rows, a.outputs, span, static_cast<typename Of<T>::Sum*>(a.grad_panels));
  });
}
void grad_x(const NmLinearGrad& a, Range span, void* scratch) {
  with_type(a.dtype, [&]<class T>() { grad_x_typed<T>(a, span, scratch); });
}
void grad_values(const NmLinearGrad& a, Range span, void* scratch) {
  with_type(a.dtype, [&]<class T>() { grad_values_typed<T>(a, span, scratch); });
}

}  // namespace

extern const NmLinearGradKernels NmLinearGradKernels_table{&panels,    &panels_bytes, &pack_x,     &pack_grad,
                                                           &scratch,   &grad_x,       &grad_values};

}  // namespace MASKOPS_ISA_NS
}  // namespace maskops
