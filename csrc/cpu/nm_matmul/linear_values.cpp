// The gradient of the kept weights: for output n and a kept column k the product of two packed columns, grad[:, n] and x[:, k].
// Up to eight kept columns of an output share the loads of grad; their sums stay in registers over a group of panels and are then
// added across the vectors, eight at once. A work item is a range of outputs (their packed gradient fits the L2 cache) by a range
// of spans of columns (those of x that are in use fit the L1 cache). Every sum runs over the groups of panels in order.
#include "common/simd_shuffle.h"
#include "cpu/nm_matmul/linear_panels.h"
#include "cpu/nm_matmul/linear_places.h"

namespace maskops {
inline namespace MASKOPS_ISA_NS {
namespace {

constexpr int64_t kValueRows = 256;
constexpr int kChain = 8;                        // sums at once, with their addresses in registers
constexpr int64_t kHotBytes = int64_t{24} << 10;  // of x in the L1 cache, beside grad

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
struct Columns {
  int64_t panels, vectors, last, grad_stride, x_stride;
};

// A range of outputs against the kept columns of a span. offsets and to: those of the first output, `slots` to an output.
struct Outputs {
  int64_t count, slots, grad_bytes;
  const char *grad, *x;
  int64_t next_bytes;  // from a span of x to the next one, a part of which each output prefetches
  const uint16_t* offsets;
};

template <class V>
static inline V load_at(const char* p, int i) {
  return V::load(reinterpret_cast<const typename V::scalar*>(p) + i * V::width);
}

// N vectors of a panel. The addresses of the columns are computed first and kept: one of two registers, base and offset, would split
// each multiply-add with an operand in memory into two operations on Intel.
template <class V, int C, int N>
inline void dot_vectors(const char* grad, const char* x, const int64_t (&at)[C], V (&even)[C], V (&odd)[C]) {
  const char* columns[C];
#pragma GCC unroll 8
  for (int c = 0; c < C; ++c) columns[c] = in_register(x + at[c]);
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) {
    const V g = loaded_once(load_at<V>(grad, i));
    V(&sums)[C] = i % 2 == 0 ? even : odd;  // two chains of additions per sum: one would wait for itself
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) sums[c] = fma(g, load_at<V>(columns[c], i), sums[c]);
  }
}

template <class V, int C>
inline void dot_panel(int64_t vectors, const char* grad, const char* x, const int64_t (&at)[C], V (&even)[C], V (&odd)[C]) {
  if (vectors == kPanelVectors) return dot_vectors<V, C, kPanelVectors>(grad, x, at, even, odd);
  int64_t i = 0;
#pragma GCC unroll 1
  for (; i + 2 <= vectors; i += 2, grad += 2 * sizeof(V), x += 2 * sizeof(V)) dot_vectors<V, C, 2>(grad, x, at, even, odd);
  if (i < vectors) dot_vectors<V, C, 1>(grad, x, at, even, odd);
}

// to[c] (+)= v[c] summed over its elements.
template <class V, int C>
inline void add_sums(V (&even)[C], V (&odd)[C], bool add, typename V::scalar* to) {
  constexpr int kMerged = V::width < kChain ? V::width : kChain, kEnd = C;
#pragma GCC unroll 4
  for (int first = 0; first < C; first += kMerged) {
    V sums[kMerged];
#pragma GCC unroll 8
    for (int c = 0; c < kMerged; ++c) sums[c] = first + c < C ? even[first + c] + odd[first + c] : V::zero();
    V sum = sum_each(sums);
    const int some = min_of(kMerged, kEnd - first);
    if (add) sum = sum + V::load_n(to + first, some);
    sum.store_n(to + first, some);
  }
}

// to[output][c] (+)= sum over rows of grad * x at offsets[output][c], for C columns.
template <class V, int C>
__attribute__((noinline)) void dot_columns(const Columns& columns, const Outputs& outputs, int64_t first, bool add,
                                           typename V::scalar* to) {
  const char* grad_row = outputs.grad;
  const uint16_t* offsets = outputs.offsets + first;
  const int64_t ahead = round_up(parts_of(outputs.next_bytes, max_of<int64_t>(1, outputs.count)), 64);
  to += first;
  for (int64_t r = 0; r < outputs.count; ++r, grad_row += outputs.grad_bytes, offsets += outputs.slots, to += outputs.slots) {
    for (int64_t at = r * ahead; at < min_of(outputs.next_bytes, (r + 1) * ahead); at += 64) {
      const char* next = outputs.x + outputs.next_bytes + at;
      for (int64_t p = 0; p < columns.panels; ++p, next += columns.x_stride) __builtin_prefetch(next, 0, 2);
    }
    int64_t at[C];
    V even[C], odd[C];
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) {
      at[c] = offsets[c];
      even[c] = odd[c] = V::zero();
    }
    const char *grad = grad_row, *x = outputs.x;
    for (int64_t p = 0; p < columns.panels; ++p, grad += columns.grad_stride, x += columns.x_stride) {
      dot_panel(p + 1 == columns.panels ? columns.last : columns.vectors, grad, x, at, even, odd);
    }
    add_sums(even, odd, add, to);
  }
}

template <class V>
using DotKernel = void (*)(const Columns&, const Outputs&, int64_t, bool, typename V::scalar*);

template <class V, int C = kChain>
inline DotKernel<V> dot_kernel(int64_t columns) {
  if constexpr (C > 1) {
    if (columns < C) return dot_kernel<V, C - 1>(columns);
  }
  return &dot_columns<V, C>;
}

// ---- a work item

// offsets [row][slot]: of the kept columns in their packed span. A padding slot points to the first column.
struct OffsetReader {
  const NmGradValues& p;
  const ValueShape& shape;
  uint16_t* starts;  // [J] first column of a slot's group in its span
#if MASKOPS_ISA_LEVEL == 2
  PlaceReader places;
#endif

  OffsetReader(const NmGradValues& values, const ValueShape& shape_of, uint16_t* buffer)
      : p(values), shape(shape_of), starts(buffer)
#if MASKOPS_ISA_LEVEL == 2
        ,
        places(values.weight.layout)
#endif
  {
    const NmLayout& l = p.weight.layout;
    for (int64_t slot = 0; slot < l.slots; ++slot) starts[slot] = uint16_t(slot % shape.slots / l.n * l.m);
  }

  void read(int64_t row, uint16_t* to) const {
    const NmLayout& l = p.weight.layout;
    const uint8_t* from = p.weight.indices + row * p.weight.indices_stride;
    const int64_t bytes = p.panels.row_bytes;
    int64_t slot = 0;
#if MASKOPS_ISA_LEVEL == 2
    for (; slot + 16 <= l.slots; slot += 16) {
      const __m256i start = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(starts + slot));
      const __m256i column = _mm256_add_epi16(_mm512_cvtepi32_epi16(places.read(from, l.row_bytes, slot)), start);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + slot), _mm256_mullo_epi16(column, _mm256_set1_epi16(int16_t(bytes))));
    }
#endif
    for (; slot < l.slots; ++slot) to[slot] = uint16_t((starts[slot] + place_in_group(from, slot, l)) * bytes);
    for (slot = max_of<int64_t>(0, l.slots - l.n); slot < l.slots; ++slot) {
      if (slot_column(from, slot, l.n, l.m, l.bits) >= l.K) to[slot] = 0;
    }
  }
};

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
void grad_item(const NmGradValues& p, const ValueShape& shape, Range rows, Range spans, uint16_t* buffer) {
  using S = typename V::scalar;
  const NmLayout& l = p.weight.layout;
  const NmPanels& panels = p.panels;
  const int64_t count = rows.end - rows.begin, span_bytes = shape.span * panels.row_bytes;
  const int64_t grad_stride = p.weight.outputs * panels.row_bytes, x_stride = l.K * panels.row_bytes;
  const OffsetReader reader(p, shape, buffer);
  uint16_t* offsets = buffer + l.slots;
  for (int64_t r = 0; r < count; ++r) reader.read(rows.begin + r, offsets + r * l.slots);
  for (int64_t first = 0; first < panels.count; first += shape.group) {
    const int64_t together = min_of(shape.group, panels.count - first);
    const bool ends = first + together == panels.count, add = p.add || first > 0;
    const Columns columns{together, panels.vectors, ends ? panels.last : panels.vectors, grad_stride, x_stride};
    Outputs outputs{count, l.slots, panels.row_bytes, static_cast<const char*>(p.grad) + first * grad_stride + rows.begin * panels.row_bytes,
                    nullptr, 0, nullptr};
    for (int64_t b = spans.begin; b < spans.end; ++b) {
      const int64_t slot = b * shape.slots, slots = min_of(shape.slots, l.slots - slot);
      outputs.x = static_cast<const char*>(p.x) + first * x_stride + b * span_bytes;
      outputs.next_bytes = b + 1 < spans.end ? min_of(shape.span, l.K - (b + 1) * shape.span) * panels.row_bytes : 0;
      outputs.offsets = offsets + slot;
      S* to = static_cast<S*>(p.sums) + rows.begin * l.slots + slot;
      for (int64_t s = 0; s < slots; s += kChain) dot_kernel<V>(slots - s)(columns, outputs, s, add, to);
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
  return {items.rows.number() * items.spans.number(), (items.rows.size + 1) * p.weight.layout.slots * int64_t(sizeof(uint16_t)),
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
