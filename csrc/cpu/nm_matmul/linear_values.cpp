// The gradient of the kept weights: for output n and a kept column k the product of two packed columns, grad[:, n] and x[:, k].
// Up to eight kept columns of an output share the loads of grad; their sums stay in registers over a group of panels and are then
// added across the vectors, eight at once. A work item is a range of outputs (their packed gradient fits the L2 cache) by a range
// of spans of columns (those of x that are in use fit the L1 cache). Every sum runs over the groups of panels in order.
#include "cpu/nm_matmul/linear_panels.h"

namespace maskops {
inline namespace MASKOPS_ISA_NS {
namespace {

constexpr int64_t kValueRows = 256;
constexpr int kChain = 8;                        // sums at once, with their addresses in registers
constexpr int64_t kHotBytes = int64_t{32} << 10;  // of x in the L1 cache

// Columns in turn: `span` of them, whole groups, with `slots` kept ones in each row, and `group` panels at a time.
struct ValueShape {
  int64_t span = 0, slots = 0, spans = 0, group = 1;

  ValueShape(const NmLayout& l, const NmPanels& panels) {
    double least = 0;
    for (int64_t groups = 1; groups * l.m <= 64; ++groups) {
      const int64_t columns = groups * l.m, kept = groups * l.n, chains = parts_of(kept, kChain);
      const int64_t together = max_of<int64_t>(1, min_of(panels.count, kHotBytes / (columns * panels.row_bytes)));
      const double vectors = double(together * panels.vectors);
      // Per kept weight: its multiply-adds, its share of the loads of grad and of the final additions.
      const double cost = (double(kept) * vectors + double(chains) * (0.5 * vectors + 24)) / (double(kept) * vectors);
      if (span != 0 && cost >= least) continue;
      least = cost;
      span = columns, slots = kept, group = together;
    }
    spans = parts_of(l.K, span);
  }
};

// ---- sums of products

// Packed columns of grad and x: `panels` panels, `stride` bytes apart, each with `vectors` vectors, the last one with `last`.
struct Column {
  int64_t panels, vectors, last, grad_stride, x_stride;
};

// to[c] (+)= sum over rows of grad * x at offsets[c], for C columns.
template <class V, int C>
void dot_columns(const Column& column, const char* grad, const char* x, const uint16_t* offsets, bool add, typename V::scalar* to) {
  using S = typename V::scalar;
  constexpr int W = V::width;
  int64_t at[C];
#pragma GCC unroll 8
  for (int c = 0; c < C; ++c) at[c] = offsets[c];
  V even[C], odd[C];  // two chains each: one would wait for its own additions
#pragma GCC unroll 8
  for (int c = 0; c < C; ++c) even[c] = odd[c] = V::zero();
  for (int64_t p = 0; p < column.panels; ++p, grad += column.grad_stride, x += column.x_stride) {
    const int64_t vectors = p + 1 == column.panels ? column.last : column.vectors;
    const char *g = grad, *row = x;
    for (int64_t i = 0; i + 2 <= vectors; i += 2, g += 2 * sizeof(V), row += 2 * sizeof(V)) {
      const V g0 = V::load(reinterpret_cast<const S*>(g)), g1 = V::load(reinterpret_cast<const S*>(g) + W);
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c) {
        even[c] = fma(g0, V::load(reinterpret_cast<const S*>(row + at[c])), even[c]);
        odd[c] = fma(g1, V::load(reinterpret_cast<const S*>(row + at[c]) + W), odd[c]);
      }
    }
    if (vectors % 2 == 0) continue;
    const V g0 = V::load(reinterpret_cast<const S*>(g));
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) even[c] = fma(g0, V::load(reinterpret_cast<const S*>(row + at[c])), even[c]);
  }
  constexpr int kMerged = W < kChain ? W : kChain;
#pragma GCC unroll 4
  for (int first = 0; first < C; first += kMerged) {
    V sums[kMerged];
#pragma GCC unroll 8
    for (int c = 0; c < kMerged; ++c) sums[c] = first + c < C ? even[first + c] + odd[first + c] : V::zero();
    V sum = sum_each(sums);
    constexpr int kEnd = C;
    const int some = min_of(kMerged, kEnd - first);
    if (add) sum = sum + V::load_n(to + first, some);
    sum.store_n(to + first, some);
  }
}

template <class V>
using DotKernel = void (*)(const Column&, const char*, const char*, const uint16_t*, bool, typename V::scalar*);

template <class V, int C = kChain>
inline DotKernel<V> dot_kernel(int64_t columns) {
  if constexpr (C > 1) {
    if (columns < C) return dot_kernel<V, C - 1>(columns);
  }
  return &dot_columns<V, C>;
}

// ---- a work item

// offsets [span][row][slot of the span]: of the kept columns in the packed span; a padding slot points to the first column.
void read_offsets(const NmGradValues& p, const ValueShape& shape, Range rows, Range spans, uint16_t* offsets) {
  const NmLayout& l = p.weight.layout;
  const int64_t count = rows.end - rows.begin;
  for (int64_t r = 0; r < count; ++r) {
    const uint8_t* places = p.weight.indices + (rows.begin + r) * p.weight.indices_stride;
    for (int64_t b = spans.begin; b < spans.end; ++b) {
      uint16_t* to = offsets + ((b - spans.begin) * count + r) * shape.slots;
      const int64_t width = min_of(shape.span, l.K - b * shape.span), first = b * shape.slots;
      const int64_t slots = min_of(shape.slots, l.slots - first);
      int64_t start = 0;
      for (int64_t s = 0, in_group = 0; s < slots; ++s) {
        const int64_t column = start + read_place(places, first + s, l.bits);
        to[s] = column < width ? uint16_t(column * p.panels.row_bytes) : uint16_t(0);
        if (++in_group == l.n) {
          in_group = 0;
          start += l.m;
        }
      }
    }
  }
}

// Padding slots have no gradient. Only the last group can have any.
template <class S>
void clear_padding(const NmGradValues& p, Range rows) {
  const NmLayout& l = p.weight.layout;
  for (int64_t r = rows.begin; r < rows.end; ++r) {
    const uint8_t* places = p.weight.indices + r * p.weight.indices_stride;
    for (int64_t slot = l.slots - l.n; slot < l.slots; ++slot) {
      if (slot_column(places, slot, l.n, l.m, l.bits) >= l.K) static_cast<S*>(p.sums)[r * l.slots + slot] = S(0);
    }
  }
}

template <class V>
void grad_item(const NmGradValues& p, const ValueShape& shape, Range rows, Range spans, uint16_t* offsets) {
  using S = typename V::scalar;
  const NmLayout& l = p.weight.layout;
  const NmPanels& panels = p.panels;
  const int64_t count = rows.end - rows.begin, grad_stride = p.weight.outputs * panels.row_bytes, x_stride = l.K * panels.row_bytes;
  read_offsets(p, shape, rows, spans, offsets);
  for (int64_t first = 0; first < panels.count; first += shape.group) {
    const int64_t together = min_of(shape.group, panels.count - first);
    const bool ends = first + together == panels.count, add = p.add || first > 0;
    const Column column{together, panels.vectors, ends ? panels.last : panels.vectors, grad_stride, x_stride};
    const char* grad = static_cast<const char*>(p.grad) + first * grad_stride + rows.begin * panels.row_bytes;
    for (int64_t b = spans.begin; b < spans.end; ++b) {
      const char* x = static_cast<const char*>(p.x) + first * x_stride + b * shape.span * panels.row_bytes;
      const int64_t slots = min_of(shape.slots, l.slots - b * shape.slots);
      const uint16_t* at = offsets + (b - spans.begin) * count * shape.slots;
      for (int64_t r = 0; r < count; ++r, at += shape.slots) {
        S* to = static_cast<S*>(p.sums) + (rows.begin + r) * l.slots + b * shape.slots;
        for (int64_t s = 0; s < slots; s += kChain) {
          dot_kernel<V>(slots - s)(column, grad + r * panels.row_bytes, x, at + s, add, to + s);
        }
      }
    }
  }
  if (spans.end == shape.spans) clear_padding<S>(p, rows);
}

// ---- what the op calls

struct ValueItems {
  Blocks rows, spans;

  ValueItems(const NmGradValues& p, const ValueShape& shape, int64_t threads)
      : rows(Blocks::of(p.weight.outputs, kValueRows, 16)), spans{shape.spans, max_of<int64_t>(1, shape.spans)} {
    const int64_t wanted = threads == 1 ? 1 : parts_of(4 * threads, max_of<int64_t>(1, rows.number()));
    spans = Blocks::of(shape.spans, max_of<int64_t>(1, shape.spans / wanted), 1);
  }
};

NmPlan plan(const NmGradValues& p, int64_t threads) {
  const ValueShape shape(p.weight.layout, p.panels);
  const ValueItems items(p, shape, threads);
  return {items.rows.number() * items.spans.number(), items.rows.size * items.spans.size * shape.slots * int64_t(sizeof(uint16_t)),
          0, 0, items.spans.number(), 0};
}

void grad_values(const NmGradValues& p, const NmPlan& plan, int64_t threads, Range items, void* buffer) {
  const ValueShape shape(p.weight.layout, p.panels);
  const ValueItems all(p, shape, threads);
  with_storage(p.dtype, [&]<class T>() {
    for (int64_t item = items.begin; item < items.end; ++item) {
      grad_item<typename VecFor<T>::type>(p, shape, all.rows.at(item / plan.splits), all.spans.at(item % plan.splits),
                                          static_cast<uint16_t*>(buffer));
    }
  });
}

void narrow(int dtype, const void* sums, Range values, void* out) {
  with_storage(dtype, [&]<class T>() {
    using V = typename VecFor<T>::type;
    for (int64_t i = values.begin; i < values.end; i += V::width) {
      const int64_t n = min_of<int64_t>(values.end - i, V::width);
      V::load_n(static_cast<const typename V::scalar*>(sums) + i, n).store_n(static_cast<T*>(out) + i, n);
    }
  });
}

}  // namespace

extern const NmValuesKernels NmValuesKernels_table{&plan, &grad_values, &narrow};

}  // namespace MASKOPS_ISA_NS
}  // namespace maskops
