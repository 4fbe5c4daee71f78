// The row kernels of visible_tokens, compiled once per instruction set. All are bound by memory: what counts is to read and
// write every byte once, and to bypass the caches where the result does not fit into them.
#include "cpu/visible_tokens/rows.h"

#include "common/simd.h"

namespace maskops {
inline namespace MASKOPS_ISA_NS {
namespace {

// Rows lie anywhere, so the hardware prefetcher starts anew at each of them: while one row is copied, the next one is fetched, and
// the next row of the output as well, which stores through the caches would wait for (0.98 of index_select's speed without, 1.03 with).
template <bool kStream>
void copy_row(const char* from, const char* next, char* to, int64_t bytes) {
  constexpr int64_t step = VecF::width * sizeof(float), line = 64;
  int64_t i = 0;
  if (kStream) {
    i = min_of<int64_t>(bytes, (step - static_cast<int64_t>(reinterpret_cast<uintptr_t>(to) % step)) % step);
    memcpy(to, from, i);
  }
  for (; i + line <= bytes; i += line) {
    __builtin_prefetch(next + i);
    if (!kStream) __builtin_prefetch(to + bytes + i, 1);
    for (int64_t j = i; j < i + line; j += step) {
      const VecF v = VecF::load(reinterpret_cast<const float*>(from + j));
      if (kStream) v.stream(reinterpret_cast<float*>(to + j));
      else v.store(reinterpret_cast<float*>(to + j));
    }
  }
  if (i < bytes) memcpy(to + i, from + i, bytes - i);
}

template <bool kStream>
void copy_rows_to(const CopyRows& args, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; ++r) {
    char* to = args.out + r * args.row_bytes;
    const int64_t at = args.map[r], ahead = r + 1 < end ? args.map[r + 1] : -1;
    if (at < 0) memset(to, 0, args.row_bytes);
    else copy_row<kStream>(args.source + at, args.source + (ahead < 0 ? at : ahead), to, args.row_bytes);
  }
  if (kStream) stream_fence();
}

void copy_rows(const CopyRows& args, int64_t begin, int64_t end) {
  return args.stream ? copy_rows_to<true>(args, begin, end) : copy_rows_to<false>(args, begin, end);
}

// to = from + pos, while the row at `next` and the next row of the output are fetched, as in copy_row. Rows are short (a few KB),
// so the alignment of `to` is settled per row.
template <class T, bool kStream>
void add_row(const T* from, const T* pos, const T* next, T* to, int64_t channels) {
  using V = typename VecFor<T>::type;
  int64_t d = 0;
  for (; d + V::width <= channels; d += V::width) {
    __builtin_prefetch(next + d);
    if (!kStream) __builtin_prefetch(to + channels + d, 1);
    const V sum = V::load(from + d) + V::load(pos + d);
    if (kStream) sum.stream(to + d);
    else sum.store(to + d);
  }
  if (d < channels) (V::load_n(from + d, channels - d) + V::load_n(pos + d, channels - d)).store_n(to + d, channels - d);
}

template <class T>
void restore_typed(const RestoreRows& args, int64_t begin, int64_t end) {
  using V = typename VecFor<T>::type;
  const int64_t channels = args.channels, bytes = channels * static_cast<int64_t>(sizeof(T));
  const T *source = static_cast<const T*>(args.source), *fill = static_cast<const T*>(args.fill), *pos = static_cast<const T*>(args.pos);
  T* out = static_cast<T*>(args.out);
  const bool stream = args.stream && can_stream<V>(out) && channels % V::width == 0;
  auto row_of = [&](int64_t i) {
    if (args.map[i] >= 0) return source + args.map[i];
    return fill + i / args.rows * args.fill_batch + (i % args.rows - args.prefix) * args.fill_row;
  };
  for (int64_t i = begin; i < end; ++i) {
    const int64_t r = i % args.rows;
    const T *from = row_of(i), *next = row_of(i + 1 < end ? i + 1 : i);
    T* to = out + i * channels;
    auto chars = [](const T* row) { return reinterpret_cast<const char*>(row); };
    if (!pos && args.stream) copy_row<true>(chars(from), chars(next), reinterpret_cast<char*>(to), bytes);
    else if (!pos) copy_row<false>(chars(from), chars(next), reinterpret_cast<char*>(to), bytes);
    else if (stream) add_row<T, true>(from, pos + r * channels, next, to, channels);
    else add_row<T, false>(from, pos + r * channels, next, to, channels);
  }
  if (args.stream) stream_fence();
}

// sum += row, while the row at `next` is fetched
template <class T, class A>
void accumulate(const T* row, const T* next, A* sum, int64_t channels) {
  using V = typename VecFor<T>::type;
  int64_t d = 0;
  for (; d + V::width <= channels; d += V::width) {
    __builtin_prefetch(next + d);
    (V::load(sum + d) + V::load(row + d)).store(sum + d);
  }
  if (d < channels) (V::load_n(sum + d, channels - d) + V::load_n(row + d, channels - d)).store_n(sum + d, channels - d);
}

// Both sums of a filled row, which is read once.
template <class T, class A>
void accumulate_both(const T* row, const T* next, A* first, A* second, int64_t channels) {
  using V = typename VecFor<T>::type;
  int64_t d = 0;
  for (; d + V::width <= channels; d += V::width) {
    const V x = V::load(row + d);
    __builtin_prefetch(next + d);
    (V::load(first + d) + x).store(first + d);
    (V::load(second + d) + x).store(second + d);
  }
  for (; d < channels; d += V::width) {
    const int64_t n = channels - d;
    const V x = V::load_n(row + d, n);
    (V::load_n(first + d, n) + x).store_n(first + d, n);
    (V::load_n(second + d, n) + x).store_n(second + d, n);
  }
}

template <class T, class A>
void write_sum(const A* sum, T* out, int64_t channels) {
  using V = typename VecFor<T>::type;
  int64_t d = 0;
  for (; d + V::width <= channels; d += V::width) V::load(sum + d).store(out + d);
  if (d < channels) V::load_n(sum + d, channels - d).store_n(out + d, channels - d);
}

// One position over the whole batch: pos and fill sums stay in L1 while the rows stream by.
template <class T, class A>
void gradient_of_position(const RestoreGradient& args, int64_t r, A* pos_sum, A* fill_sum) {
  const int64_t channels = args.channels;
  const T* grad = static_cast<const T*>(args.grad);
  T* grad_x = static_cast<T*>(args.grad_x);
  T* filled = static_cast<T*>(args.grad_fill);
  const bool keep_pos = args.grad_pos != nullptr;
  for (int64_t b = 0; b < args.batch; ++b) {
    const int64_t target = args.map[b * args.rows + r];
    const T* row = grad + b * args.grad_batch + r * args.grad_row;
    const T* next = b + 1 < args.batch ? row + args.grad_batch : row;
    if (target >= 0) {
      if (keep_pos) accumulate(row, next, pos_sum, channels);
      if (grad_x) memcpy(grad_x + target, row, channels * sizeof(T));
    } else if (fill_sum && keep_pos) {
      accumulate_both(row, next, pos_sum, fill_sum, channels);
    } else if (fill_sum) {
      accumulate(row, next, fill_sum, channels);
    } else {
      if (keep_pos) accumulate(row, next, pos_sum, channels);
      const int64_t tokens = args.rows - args.prefix;
      if (filled) memcpy(filled + (b * tokens + r - args.prefix) * channels, row, channels * sizeof(T));
    }
  }
}

template <class T>
void restore_gradient_typed(const RestoreGradient& args, void* scratch, int64_t chunk_begin, int64_t chunk_end) {
  using A = typename Arithmetic<T>::type;
  const int64_t channels = args.channels, bytes = channels * static_cast<int64_t>(sizeof(A));
  A *pos_sum = static_cast<A*>(scratch), *row_sum = pos_sum + channels;
  A* partial = static_cast<A*>(args.partial);
  const bool per_position = args.sums_fill_rows;
  for (int64_t chunk = chunk_begin; chunk < chunk_end; ++chunk) {
    A* fill_sum = partial ? partial + chunk * channels : per_position ? row_sum : nullptr;
    if (partial) memset(fill_sum, 0, bytes);
    const int64_t last = min_of(args.rows, (chunk + 1) * RestoreGradient::kChunk);
    for (int64_t r = chunk * RestoreGradient::kChunk; r < last; ++r) {
      if (args.grad_pos) memset(pos_sum, 0, bytes);
      if (per_position) memset(fill_sum, 0, bytes);
      gradient_of_position<T, A>(args, r, pos_sum, fill_sum);
      if (args.grad_pos) write_sum(pos_sum, static_cast<T*>(args.grad_pos) + r * channels, channels);
      if (per_position && r >= args.prefix) write_sum(fill_sum, static_cast<T*>(args.grad_fill) + (r - args.prefix) * channels, channels);
    }
  }
}

template <class T>
void sum_partials_typed(const void* partial_any, int64_t chunks, int64_t channels, void* out) {
  using A = typename Arithmetic<T>::type;
  using V = typename VecFor<T>::type;
  const A* partial = static_cast<const A*>(partial_any);
  for (int64_t d = 0; d < channels; d += V::width) {
    const int64_t n = min_of<int64_t>(V::width, channels - d);
    V sum = V::zero();
    for (int64_t chunk = 0; chunk < chunks; ++chunk) sum = sum + V::load_n(partial + chunk * channels + d, n);
    sum.store_n(static_cast<T*>(out) + d, n);
  }
}

// Codes of common/dispatch.h, which includes torch.
void restore(const RestoreRows& args, int64_t begin, int64_t end) {
  switch (args.dtype) {
    case 0: return restore_typed<float>(args, begin, end);
    case 1: return restore_typed<double>(args, begin, end);
    case 2: return restore_typed<bf16>(args, begin, end);
    default: return restore_typed<f16>(args, begin, end);
  }
}

void restore_gradient(const RestoreGradient& args, void* scratch, int64_t chunk_begin, int64_t chunk_end) {
  switch (args.dtype) {
    case 0: return restore_gradient_typed<float>(args, scratch, chunk_begin, chunk_end);
    case 1: return restore_gradient_typed<double>(args, scratch, chunk_begin, chunk_end);
    case 2: return restore_gradient_typed<bf16>(args, scratch, chunk_begin, chunk_end);
    default: return restore_gradient_typed<f16>(args, scratch, chunk_begin, chunk_end);
  }
}

void sum_partials(int dtype, const void* partial, int64_t chunks, int64_t channels, void* out) {
  switch (dtype) {
    case 0: return sum_partials_typed<float>(partial, chunks, channels, out);
    case 1: return sum_partials_typed<double>(partial, chunks, channels, out);
    case 2: return sum_partials_typed<bf16>(partial, chunks, channels, out);
    default: return sum_partials_typed<f16>(partial, chunks, channels, out);
  }
}

}  // namespace

extern const RowKernels RowKernels_table{&copy_rows, &restore, &restore_gradient, &sum_partials};

}  // namespace MASKOPS_ISA_NS
}  // namespace maskops
