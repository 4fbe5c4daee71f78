// The kernels of pooling over a kernel map and over segments, compiled once per instruction set. A row of the result is summed in
// registers, a few vectors of channels at a time, over the rows that it reads, in their order.
#include "cpu/sparse_conv/pool.h"

#include "common/pieces.h"
#include "common/simd.h"

namespace maskops {
inline namespace MASKOPS_ISA_NS {
namespace {

template <class T>
using AccumulatorOf = typename VecFor<T>::type::scalar;

template <class T>
struct PoolBuffers {
  using A = AccumulatorOf<T>;
  int32_t *rows, *arg;
  A *best, *row;

  PoolBuffers(const PoolArgs& args, void* buffer, int64_t* bytes = nullptr) {
    Pieces pieces(buffer);
    const int64_t wide = round_up(args.C, VecFor<T>::type::width);
    rows = pieces.take<int32_t>(args.K + 1);
    arg = pieces.take<int32_t>(wide);
    best = pieces.take<A>(wide);
    row = pieces.take<A>(wide);
    if (bytes != nullptr) *bytes = pieces.bytes;
  }
};

// The rows that m reads, in kernel order: how many, or -1 for one that x lacks.
inline int64_t rows_read(const int32_t* map, int64_t K, int64_t M, int64_t m, int64_t N, int32_t* rows) {
  int64_t found = 0;
  bool good = true;
  for (int64_t k = 0; k < K; ++k) {
    const int32_t n = map[k * M + m];
    rows[found] = n;
    found += n >= 0;
    good &= n >= -1 && n < N;
  }
  return good ? found : -1;
}

// ---- sums

// to(c, vector, how many of its elements) for the sums over rows of x.
template <int kVectors, class T, class A, class To>
void sum_block(const PoolArgs& args, const int32_t* rows, int64_t count, int64_t c, int64_t left, const To& to) {
  using V = typename VecFor<T>::type;
  constexpr int64_t kAhead = 8;
  const A* read_scale = static_cast<const A*>(args.read_scale);
  const T* x = static_cast<const T*>(args.x) + c;
  V sum[kVectors];
  for (int j = 0; j < kVectors; ++j) sum[j] = V::zero();
  for (int64_t r = 0; r < count; ++r) {
    const T* row = x + int64_t(rows[r]) * args.x_stride;
    if (r + kAhead < count) __builtin_prefetch(x + int64_t(rows[r + kAhead]) * args.x_stride);
    const V scale = read_scale == nullptr ? V::all(1) : V::all(read_scale[rows[r]]);
    for (int j = 0; j < kVectors; ++j) {
      const V read = left < (j + 1) * V::width ? V::load_n(row + j * V::width, left - j * V::width) : V::load(row + j * V::width);
      sum[j] = read_scale == nullptr ? sum[j] + read : fma(read, scale, sum[j]);
    }
  }
  for (int j = 0; j < kVectors; ++j) to(c + j * V::width, sum[j], min_of<int64_t>(V::width, left - j * V::width));
}

template <class T, class To>
void sum_rows(const PoolArgs& args, const int32_t* rows, int64_t count, const To& to) {
  using V = typename VecFor<T>::type;
  using A = AccumulatorOf<T>;
  int64_t c = 0;
  for (; c + 4 * V::width <= args.C; c += 4 * V::width) sum_block<4, T, A>(args, rows, count, c, 4 * V::width, to);
  for (; c < args.C; c += V::width) sum_block<1, T, A>(args, rows, count, c, min_of<int64_t>(V::width, args.C - c), to);
}

// Sums, times the scale of the row of the result, into it.
template <class T>
struct ToRow {
  using V = typename VecFor<T>::type;
  T* out;
  AccumulatorOf<T> scale;
  bool scaled;

  ToRow(const PoolArgs& args, int64_t m)
      : out(static_cast<T*>(args.out) + m * args.C), scale(1), scaled(args.scale != nullptr) {
    if (scaled) scale = static_cast<const AccumulatorOf<T>*>(args.scale)[m];
  }
  void operator()(int64_t c, V sum, int64_t count) const { (scaled ? sum * V::all(scale) : sum).store_n(out + c, count); }
};

template <class T>
bool sum_typed(const PoolArgs& args, int64_t begin, int64_t end, void* buffer) {
  const PoolBuffers<T> own(args, buffer);
  bool good = true;
  for (int64_t m = begin; m < end; ++m) {
    const int64_t count = rows_read(args.map, args.K, args.M, m, args.N, own.rows);
    good &= count >= 0;
    if (count >= 0) sum_rows<T>(args, own.rows, count, ToRow<T>(args, m));
  }
  return good;
}

template <class T>
void segment_sum_typed(const PoolArgs& args, int64_t begin, int64_t end, void*) {
  for (int64_t s = begin; s < end; ++s) sum_rows<T>(args, args.order + args.begin[s], args.count[s], ToRow<T>(args, s));
}

template <class T>
void part_sum_typed(const PoolArgs& args, int64_t segment, int64_t first, int64_t last, void* sums) {
  using V = typename VecFor<T>::type;
  auto* to = static_cast<AccumulatorOf<T>*>(sums);
  sum_rows<T>(args, args.order + args.begin[segment] + first, last - first,
              [to](int64_t c, V sum, int64_t count) { sum.store_n(to + c, count); });
}

template <class T>
void join_sums_typed(const PoolArgs& args, int64_t segment, int64_t parts, void* sums) {
  using V = typename VecFor<T>::type;
  const auto* from = static_cast<const AccumulatorOf<T>*>(sums);
  const ToRow<T> to(args, segment);
  for (int64_t c = 0; c < args.C; c += V::width) {
    const int64_t count = min_of<int64_t>(V::width, args.C - c);
    V sum = V::zero();
    for (int64_t part = 0; part < parts; ++part) sum = sum + V::load_n(from + part * args.C + c, count);
    to(c, sum, count);
  }
}

// ---- maxima

// row takes the place of best where it is larger, where nothing is there yet, or for the first NaN.
template <class A>
void take_larger(const A* row, int32_t n, int64_t channels, A* best, int32_t* arg) {
  for (int64_t c = 0; c < channels; ++c) {
    const A value = row[c], old = best[c];
    const bool takes = (arg[c] < 0) | ((old == old) & !(value <= old));
    best[c] = takes ? value : old;
    arg[c] = takes ? n : arg[c];
  }
}

template <class T, class A>
void max_rows(const PoolArgs& args, const int32_t* rows, int64_t count, A* best, int32_t* arg, A* wide) {
  using V = typename VecFor<T>::type;
  memset(best, 0, size_t(args.C) * sizeof(A));
  memset(arg, -1, size_t(args.C) * sizeof(int32_t));
  for (int64_t r = 0; r < count; ++r) {
    const T* row = static_cast<const T*>(args.x) + int64_t(rows[r]) * args.x_stride;
    if constexpr (sizeof(T) == sizeof(A)) {
      take_larger<A>(row, rows[r], args.C, best, arg);
    } else {
      for (int64_t c = 0; c < args.C; c += V::width) V::load_n(row + c, min_of<int64_t>(V::width, args.C - c)).store(wide + c);
      take_larger<A>(wide, rows[r], args.C, best, arg);
    }
  }
}

template <class T, class A>
void store_row(const PoolArgs& args, int64_t m, const A* from) {
  using V = typename VecFor<T>::type;
  T* to = static_cast<T*>(args.out) + m * args.C;
  for (int64_t c = 0; c < args.C; c += V::width) {
    const int64_t count = min_of<int64_t>(V::width, args.C - c);
    V::load_n(from + c, count).store_n(to + c, count);
  }
}

template <class T>
bool max_typed(const PoolArgs& args, int64_t begin, int64_t end, void* buffer) {
  const PoolBuffers<T> own(args, buffer);
  bool good = true;
  for (int64_t m = begin; m < end; ++m) {
    const int64_t count = rows_read(args.map, args.K, args.M, m, args.N, own.rows);
    good &= count >= 0;
    if (count < 0) continue;
    max_rows<T>(args, own.rows, count, own.best, args.arg + m * args.C, own.row);
    store_row<T>(args, m, own.best);
  }
  return good;
}

template <class T>
void segment_max_typed(const PoolArgs& args, int64_t begin, int64_t end, void* buffer) {
  const PoolBuffers<T> own(args, buffer);
  for (int64_t s = begin; s < end; ++s) {
    max_rows<T>(args, args.order + args.begin[s], args.count[s], own.best, args.arg + s * args.C, own.row);
    store_row<T>(args, s, own.best);
  }
}

template <class T>
void part_max_typed(const PoolArgs& args, int64_t segment, int64_t first, int64_t last, void* best, int32_t* arg, void* buffer) {
  const PoolBuffers<T> own(args, buffer);
  max_rows<T>(args, args.order + args.begin[segment] + first, last - first, static_cast<AccumulatorOf<T>*>(best), arg, own.row);
}

template <class T>
void join_maxima_typed(const PoolArgs& args, int64_t segment, int64_t parts, void* best, int32_t* parts_arg) {
  auto* from = static_cast<AccumulatorOf<T>*>(best);
  int32_t* arg = args.arg + segment * args.C;
  for (int64_t c = 0; c < args.C; ++c) {
    auto top = from[c];
    arg[c] = parts_arg[c];
    for (int64_t part = 1; part < parts; ++part) take_larger(from + part * args.C + c, parts_arg[part * args.C + c], 1, &top, arg + c);
    from[c] = top;
  }
  store_row<T>(args, segment, from);
}

// Row n of the gradient: what the results that read it, by the reversed map, took from it.
template <class T>
bool max_backward_typed(const PoolArgs& args, int64_t begin, int64_t end, void* buffer) {
  using V = typename VecFor<T>::type;
  const PoolBuffers<T> own(args, buffer);
  bool good = true;
  for (int64_t n = begin; n < end; ++n) {
    const int64_t count = rows_read(args.map, args.K, args.M, n, args.N, own.rows);
    good &= count >= 0;
    memset(own.best, 0, size_t(args.C) * sizeof(*own.best));
    for (int64_t r = 0; r < count; ++r) {
      const T* grad = static_cast<const T*>(args.x) + int64_t(own.rows[r]) * args.x_stride;
      const int32_t* from = args.from + int64_t(own.rows[r]) * args.C;
      for (int64_t c = 0; c < args.C; c += V::width) V::load_n(grad + c, min_of<int64_t>(V::width, args.C - c)).store(own.row + c);
      for (int64_t c = 0; c < args.C; ++c) own.best[c] += from[c] == n ? own.row[c] : 0;
    }
    store_row<T>(args, n, own.best);
  }
  return good;
}

// ---- by dtype, the codes of common/dispatch.h, which includes torch

template <class F>
auto by_dtype(int dtype, const F& f) {
  switch (dtype) {
    case 0: return f(float());
    case 1: return f(double());
    case 2: return f(bf16());
    default: return f(f16());
  }
}

int64_t bytes(const PoolArgs& args) {
  return by_dtype(args.dtype, [&](auto of) {
    int64_t needed = 0;
    PoolBuffers<decltype(of)>(args, nullptr, &needed);
    return needed;
  });
}
bool sum(const PoolArgs& args, int64_t begin, int64_t end, void* buffer) {
  return by_dtype(args.dtype, [&](auto of) { return sum_typed<decltype(of)>(args, begin, end, buffer); });
}
bool max(const PoolArgs& args, int64_t begin, int64_t end, void* buffer) {
  return by_dtype(args.dtype, [&](auto of) { return max_typed<decltype(of)>(args, begin, end, buffer); });
}
bool max_backward(const PoolArgs& args, int64_t begin, int64_t end, void* buffer) {
  return by_dtype(args.dtype, [&](auto of) { return max_backward_typed<decltype(of)>(args, begin, end, buffer); });
}
void segment_sum(const PoolArgs& args, int64_t begin, int64_t end, void* buffer) {
  by_dtype(args.dtype, [&](auto of) { segment_sum_typed<decltype(of)>(args, begin, end, buffer); });
}
void segment_max(const PoolArgs& args, int64_t begin, int64_t end, void* buffer) {
  by_dtype(args.dtype, [&](auto of) { segment_max_typed<decltype(of)>(args, begin, end, buffer); });
}
void part_sum(const PoolArgs& args, int64_t segment, int64_t first, int64_t last, void* sums) {
  by_dtype(args.dtype, [&](auto of) { part_sum_typed<decltype(of)>(args, segment, first, last, sums); });
}
void join_sums(const PoolArgs& args, int64_t segment, int64_t parts, void* sums) {
  by_dtype(args.dtype, [&](auto of) { join_sums_typed<decltype(of)>(args, segment, parts, sums); });
}
void part_max(const PoolArgs& args, int64_t segment, int64_t first, int64_t last, void* best, int32_t* arg, void* buffer) {
  by_dtype(args.dtype, [&](auto of) { part_max_typed<decltype(of)>(args, segment, first, last, best, arg, buffer); });
}
void join_maxima(const PoolArgs& args, int64_t segment, int64_t parts, void* best, int32_t* parts_arg) {
  by_dtype(args.dtype, [&](auto of) { join_maxima_typed<decltype(of)>(args, segment, parts, best, parts_arg); });
}

}  // namespace

extern const PoolKernels PoolKernels_table{&bytes,       &sum,      &max,       &max_backward, &segment_sum,
                                           &segment_max, &part_sum, &join_sums, &part_max,     &join_maxima};

}  // namespace MASKOPS_ISA_NS
}  // namespace maskops
