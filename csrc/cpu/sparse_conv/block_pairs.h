// The gradient of the weight of block-masked convolution in bfloat16, by vdpbf16ps: rows of x and of grad are put together in twos, place
// by place, which costs a vector of either for every 16 channels, against 4 products for every channel of x.
#pragma once

#include "common/gemm_strided.h"
#include "common/pieces.h"
#include "cpu/sparse_conv/block.h"
#include "cpu/sparse_conv/gather.h"

#if MASKOPS_ISA_LEVEL == 2
namespace maskops {
inline namespace MASKOPS_ISA_NS {

struct PairBlock {
  static constexpr int64_t kRows = 192, kDepth = 64, kPartial = 64;  // rows and channels at a time; columns of a panel of partial
  const BlockConvArgs& args;
  const int64_t panels;
  Bf16Pair *x, *grad;  // [kRows / 2, kDepth] and [kRows / 2, kPartial]
  int32_t *row, *at;   // of x and of grad
  int64_t bytes;

  PairBlock(const BlockConvArgs& a, void* buffer) : args(a), panels((a.columns + kPartial - 1) / kPartial) {
    Pieces pieces(buffer);
    x = pieces.take<Bf16Pair>(kRows / 2 * kDepth);
    grad = pieces.take<Bf16Pair>(kRows / 2 * kPartial);
    row = pieces.take<int32_t>(kRows);
    at = pieces.take<int32_t>(kRows);
    bytes = pieces.bytes;
  }

  // A panel of columns of a chunk of rows; bias: as many sums of grad.
  void weight_chunk(int64_t item, float* partial, float* bias) const {
    const int64_t panel = item % panels, group = item / panels % args.groups, chunk = item / panels / args.groups;
    const int64_t columns = min_of(kPartial, args.columns - panel * kPartial), chunks = args.chunks();
    const int64_t column = group * args.columns + panel * kPartial, end = (chunk + 1) * args.M / chunks;
    const bf16 *rows = static_cast<const bf16*>(args.rows) + group * args.depth, *grads = static_cast<const bf16*>(args.grad) + column;
    partial += item * args.taps * args.depth * kPartial;
    bias += chunk * args.groups * args.columns + column;
    memset(partial, 0, size_t(args.taps * args.depth * kPartial) * sizeof(float));
    memset(bias, 0, size_t(columns) * sizeof(float));
    for (int64_t first = chunk * args.M / chunks; first < end; first += kRows) {
      const int64_t count = min_of(kRows, end - first);
      add_bias(grads, first, count, columns, bias);
      for (int64_t t = 0; t < args.taps; ++t) {
        const int64_t found = find(args.source + t * args.M + first, args.target + first, count);
        if (found == 0) continue;
        gather_steps(grads, args.out_stride, at, found, columns, grad, kPartial);
        for (int64_t d = 0; d < args.depth; d += kDepth) {
          const int64_t channels = min_of(kDepth, args.depth - d);
          gather_steps(rows + d, args.row_stride, row, found, channels, x, kDepth);
          multiply_strided<Bf16Pair>(channels, round_up(columns, VecF::width), (found + 1) / 2, {x, 1, kDepth}, grad, kPartial,
                                     {partial + (t * args.depth + d) * kPartial, kPartial, true});
        }
      }
    }
  }

 private:
  int64_t find(const int32_t* source, const int32_t* target, int64_t count) const {
    int64_t found = 0;
    for (int64_t r = 0; r < count; ++r) {
      row[found] = source[r], at[found] = target[r];
      found += source[r] >= 0;
    }
    return found;
  }

  void add_bias(const bf16* grads, int64_t first, int64_t count, int64_t columns, float* bias) const {
    for (int64_t j = 0; j < columns; j += VecF::width) {
      const int64_t some = min_of<int64_t>(VecF::width, columns - j);
      VecF sum = VecF::load_n(bias + j, some);
      for (int64_t r = 0; r < count; ++r) sum = sum + VecF::load_n(grads + args.target[first + r] * args.out_stride + j, some);
      sum.store_n(bias + j, some);
    }
  }
};

static inline int64_t pair_block_bytes(const BlockConvArgs& args) { return args.pairs ? PairBlock(args, nullptr).bytes : 0; }

}  // namespace MASKOPS_ISA_NS
}  // namespace maskops

#else

namespace maskops {
inline namespace MASKOPS_ISA_NS {
static inline int64_t pair_block_bytes(const BlockConvArgs&) { return 0; }
}  // namespace MASKOPS_ISA_NS
}  // namespace maskops

#endif
