// Pooling over a kernel map and over segments on the CPU.
#include "cpu/sparse_conv/pool.h"

#if MASKOPS_ISA_LEVEL == 0
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <atomic>
#include <tuple>

#include "common/buffer.h"
#include "common/dispatch.h"
#include "common/parallel.h"
#include "math/sparse_conv_pool.h"

namespace maskops {
namespace {

constexpr int64_t kPart = 2048;  // rows of a long segment that are taken at a time: fixed, as sums depend on it

using MaybeTensor = std::optional<Tensor>;

const int32_t* ints(const Tensor& x) { return static_cast<const int32_t*>(x.const_data_ptr()); }

PoolArgs args_of(const Tensor& x, int64_t rows) {
  PoolArgs args{};
  args.x = x.const_data_ptr();
  args.x_stride = x.stride(0);
  args.N = x.size(0), args.C = x.size(1), args.M = rows;
  args.dtype = static_cast<int>(dtype_of(x));
  return args;
}

[[noreturn]] void fail_map(const char* op, const char* name, const int32_t* map, int64_t columns, int64_t rows) {
  for (int64_t i = 0;; ++i) {
    if (map[i] >= -1 && map[i] < rows) continue;
    const std::string at = std::string(name) + "[" + std::to_string(i / columns) + ", " + std::to_string(i % columns) + "]";
    fail_index(op, at, "be in [-1, " + std::to_string(rows) + ")", std::to_string(map[i]));
  }
}

using MapKernel = bool (*)(const PoolArgs&, int64_t, int64_t, void*);

// All rows of the result by a kernel over the map; says which entry of it is wrong.
void run_over_map(const char* op, const char* name, const PoolArgs& args, MapKernel kernel) {
  if (args.M == 0) return;
  std::atomic<bool> good{true};
  const int64_t bytes = pick_PoolKernels().bytes(args);
  parallel_for(args.M, args.K * (4 + args.C), [&](int64_t begin, int64_t end) {
    const Buffer buffer(bytes);
    if (!kernel(args, begin, end, buffer.get())) good = false;
  });
  if (!good) fail_map(op, name, args.map, args.M, args.N);
}

Tensor sparse_conv_sum_pool(const Tensor& x_any, const Tensor& map_any, MaybeTensor reverse, MaybeTensor read_scale_any,
                            MaybeTensor scale_any) {
  const char* op = "sparse_avg_pool";
  check_pool_map(op, x_any, map_any, reverse);
  check_scale(op, "read_scale", read_scale_any, x_any.size(0), "[N]", x_any);
  check_scale(op, "scale", scale_any, map_any.size(1), "[M]", x_any);
  const Tensor x = with_contiguous_rows(x_any), map = contiguous_or_copy(map_any);
  const MaybeTensor read_scale = read_scale_any ? MaybeTensor(contiguous_or_copy(*read_scale_any)) : std::nullopt;
  const MaybeTensor scale = scale_any ? MaybeTensor(contiguous_or_copy(*scale_any)) : std::nullopt;
  PoolArgs args = args_of(x, map.size(1));
  args.map = ints(map);
  args.K = map.size(0);
  args.read_scale = read_scale ? read_scale->const_data_ptr() : nullptr;
  args.scale = scale ? scale->const_data_ptr() : nullptr;
  Tensor out = empty_like_device(x, {args.M, args.C});
  args.out = out.mutable_data_ptr();
  run_over_map(op, "map", args, pick_PoolKernels().sum);
  return out;
}

std::tuple<Tensor, Tensor> sparse_conv_max_pool(const Tensor& x_any, const Tensor& map_any, MaybeTensor reverse) {
  const char* op = "sparse_max_pool";
  check_pool_map(op, x_any, map_any, reverse);
  const Tensor x = with_contiguous_rows(x_any), map = contiguous_or_copy(map_any);
  PoolArgs args = args_of(x, map.size(1));
  args.map = ints(map);
  args.K = map.size(0);
  Tensor out = empty_like_device(x, {args.M, args.C}), arg = empty_like_device(x, {args.M, args.C}, ScalarType::Int);
  args.out = out.mutable_data_ptr();
  args.arg = static_cast<int32_t*>(arg.mutable_data_ptr());
  run_over_map(op, "map", args, pick_PoolKernels().max);
  return {out, arg};
}

Tensor sparse_conv_max_backward(const Tensor& grad_any, const Tensor& arg_any, const Tensor& reverse_any) {
  check_max_backward(grad_any, arg_any, reverse_any);
  const Tensor grad = with_contiguous_rows(grad_any), from = contiguous_or_copy(arg_any), reverse = contiguous_or_copy(reverse_any);
  PoolArgs args = args_of(grad, reverse.size(1));
  args.map = ints(reverse);
  args.K = reverse.size(0);
  args.from = ints(from);
  Tensor out = empty_like_device(grad, {args.M, args.C});
  args.out = out.mutable_data_ptr();
  run_over_map("_sparse_conv_max_backward", "reverse", args, pick_PoolKernels().max_backward);
  return out;
}

// ---------------------------------------------------------------- segments

struct Segments {
  const Tensor order, begin, count;

  Segments(const char* op, const Tensor& order_any, const Tensor& begin_any, const Tensor& count_any, int64_t rows)
      : order(contiguous_or_copy(order_any)), begin(contiguous_or_copy(begin_any)), count(contiguous_or_copy(count_any)) {
    const int64_t listed = order.size(0);
    check_all(op, "order", ints(order), listed, rows - 1, [](int64_t) { return int64_t{0}; });
    check_all(op, "begin", ints(begin), begin.size(0), listed, [](int64_t) { return int64_t{0}; });
    const int32_t* first = ints(begin);
    check_all(op, "count", ints(count), count.size(0), listed, [first](int64_t s) { return int64_t{first[s]}; });
  }

 private:
  // Every value + above(i) is in [above(i), most].
  template <class Above>
  static void check_all(const char* op, const char* name, const int32_t* values, int64_t count, int64_t most, const Above& above) {
    FirstFault fault;
    parallel_for(count, 4, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        if (values[i] < 0 || values[i] + above(i) > most) return fault.note(i);
      }
    });
    if (!fault.any()) return;
    const int64_t i = fault.position();
    fail_index(op, std::string(name) + "[" + std::to_string(i) + "]", "be in [0, " + std::to_string(most - above(i)) + "]",
               std::to_string(values[i]));
  }
};

// Segments of at most kPart rows by `each`, longer ones in parts by `in_parts`.
template <class Each, class InParts>
void run_over_segments(const PoolArgs& args, const Each& each, const InParts& in_parts) {
  if (args.M == 0 || args.C == 0) return;
  const int64_t bytes = pick_PoolKernels().bytes(args);
  auto is_long = [&](int64_t s) { return args.count[s] > kPart; };
  const int64_t work = args.C * std::max<int64_t>(1, args.N / args.M) * 4;
  parallel_for(args.M, work, [&](int64_t begin, int64_t end) {
    const Buffer buffer(bytes);
    for (int64_t s = begin; s < end;) {
      int64_t last = s;
      while (last < end && !is_long(last)) ++last;
      each(s, last, buffer.get());
      s = last + 1;
    }
  });
  for (int64_t s = 0; s < args.M; ++s) {
    if (is_long(s)) in_parts(s, (args.count[s] + kPart - 1) / kPart, bytes);
  }
}

void segments_into(PoolArgs& args, const Segments& segments) {
  args.order = ints(segments.order), args.begin = ints(segments.begin), args.count = ints(segments.count);
}

Tensor sparse_conv_segment_sum(const Tensor& x_any, const Tensor& order, const Tensor& begin, const Tensor& count, const Tensor& inverse,
                               MaybeTensor scale_any) {
  const char* op = "sparse_conv_segment_sum";
  check_segments(op, x_any, order, begin, count, inverse);
  check_scale(op, "scale", scale_any, begin.size(0), "[S]", x_any);
  const Tensor x = with_contiguous_rows(x_any);
  const MaybeTensor scale = scale_any ? MaybeTensor(contiguous_or_copy(*scale_any)) : std::nullopt;
  const Segments segments(op, order, begin, count, x.size(0));
  PoolArgs args = args_of(x, begin.size(0));
  segments_into(args, segments);
  args.scale = scale ? scale->const_data_ptr() : nullptr;
  Tensor out = empty_like_device(x, {args.M, args.C});
  args.out = out.mutable_data_ptr();
  const PoolKernels& kernels = pick_PoolKernels();
  const int64_t row = args.C * (x.scalar_type() == ScalarType::Double ? 8 : 4);
  run_over_segments(
      args, [&](int64_t first, int64_t last, void* buffer) { kernels.segment_sum(args, first, last, buffer); },
      [&](int64_t s, int64_t parts, int64_t) {
        const Buffer sums(parts * row);
        parallel_for(parts, kPart * row, [&](int64_t first, int64_t last) {
          for (int64_t part = first; part < last; ++part) {
            const int64_t end = std::min<int64_t>(args.count[s], (part + 1) * kPart);
            kernels.part_sum(args, s, part * kPart, end, static_cast<char*>(sums.get()) + part * row);
          }
        });
        kernels.join_sums(args, s, parts, sums.get());
      });
  return out;
}

// A map of one place: each row reads its segment.
Tensor sparse_conv_segment_spread(const Tensor& x_any, const Tensor& order, const Tensor& begin, const Tensor& count,
                                  const Tensor& inverse_any, MaybeTensor scale_any) {
  const char* op = "sparse_conv_segment_spread";
  check_spread(x_any, order, begin, count, inverse_any);
  check_scale(op, "scale", scale_any, x_any.size(0), "[S]", x_any);
  const Tensor x = with_contiguous_rows(x_any), inverse = contiguous_or_copy(inverse_any);
  const MaybeTensor scale = scale_any ? MaybeTensor(contiguous_or_copy(*scale_any)) : std::nullopt;
  PoolArgs args = args_of(x, inverse.size(0));
  args.map = ints(inverse);
  args.K = 1;
  args.read_scale = scale ? scale->const_data_ptr() : nullptr;
  Tensor out = empty_like_device(x, {args.M, args.C});
  args.out = out.mutable_data_ptr();
  run_over_map(op, "inverse", args, pick_PoolKernels().sum);
  return out;
}

std::tuple<Tensor, Tensor> sparse_conv_segment_max(const Tensor& x_any, const Tensor& order, const Tensor& begin, const Tensor& count,
                                                   const Tensor& inverse) {
  const char* op = "sparse_conv_segment_max";
  check_segments(op, x_any, order, begin, count, inverse);
  const Tensor x = with_contiguous_rows(x_any);
  const Segments segments(op, order, begin, count, x.size(0));
  PoolArgs args = args_of(x, begin.size(0));
  segments_into(args, segments);
  Tensor out = empty_like_device(x, {args.M, args.C}), arg = empty_like_device(x, {args.M, args.C}, ScalarType::Int);
  args.out = out.mutable_data_ptr();
  args.arg = static_cast<int32_t*>(arg.mutable_data_ptr());
  const PoolKernels& kernels = pick_PoolKernels();
  const int64_t row = args.C * (x.scalar_type() == ScalarType::Double ? 8 : 4);
  run_over_segments(
      args, [&](int64_t first, int64_t last, void* buffer) { kernels.segment_max(args, first, last, buffer); },
      [&](int64_t s, int64_t parts, int64_t bytes) {
        const Buffer best(parts * row), at(parts * args.C * 4);
        int32_t* parts_arg = static_cast<int32_t*>(at.get());
        parallel_for(parts, kPart * row, [&](int64_t first, int64_t last) {
          const Buffer buffer(bytes);
          for (int64_t part = first; part < last; ++part) {
            const int64_t end = std::min<int64_t>(args.count[s], (part + 1) * kPart);
            kernels.part_max(args, s, part * kPart, end, static_cast<char*>(best.get()) + part * row, parts_arg + part * args.C, buffer.get());
          }
        });
        kernels.join_maxima(args, s, parts, best.get(), parts_arg);
      });
  return {out, arg};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(maskops, CPU, m) {
  m.impl("sparse_conv_sum_pool", TORCH_BOX(&sparse_conv_sum_pool));
  m.impl("sparse_conv_max_pool", TORCH_BOX(&sparse_conv_max_pool));
  m.impl("_sparse_conv_max_backward", TORCH_BOX(&sparse_conv_max_backward));
  m.impl("sparse_conv_segment_sum", TORCH_BOX(&sparse_conv_segment_sum));
  m.impl("sparse_conv_segment_spread", TORCH_BOX(&sparse_conv_segment_spread));
  m.impl("sparse_conv_segment_max", TORCH_BOX(&sparse_conv_segment_max));
}

}  // namespace maskops
#endif
