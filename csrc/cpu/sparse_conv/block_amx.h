// Block-masked convolution of bfloat16 in AMX tiles. Rows that kernel places read are gathered first, 64 results at a time, since a tile
// register wants rows at even distances; that costs a load and a store of 64 bytes for 32 channels of a row, against 16 registers of
// products for every 256 columns. The weight lies in panels of 32 columns, words of two channels.
#pragma once

#include "common/amx.h"
#include "common/pieces.h"
#include "cpu/sparse_conv/block.h"

#if MASKOPS_ISA_LEVEL == 2
namespace maskops {
inline namespace MASKOPS_ISA_NS {

struct AmxBlock {
  using Scope = AmxScope;
  static constexpr int64_t kColumns = 32, kBlock = 256;  // of a panel; of an item
  static constexpr int64_t kRows = 64, kChunkRows = 192;  // at a time, of the product and of the gradient of the weight
  static constexpr int64_t kPartial = 64;                 // columns of a panel of BlockConvArgs::partial
  const BlockConvArgs& args;
  const int64_t depth, summed, panels, blocks, tiles;

  explicit AmxBlock(const BlockConvArgs& a)
      : args(a), depth(round_up(a.depth, kAmxDepth)), summed(a.taps * depth), panels(parts_of(a.columns, kColumns)),
        blocks(parts_of(a.columns, kBlock)), tiles(parts_of(a.M, kRows)) {}

  int64_t packed_bytes() const { return args.groups * panels * summed * kColumns * 2; }
  int64_t items() const { return tiles * args.groups * blocks; }
  int64_t weight_items() const { return args.chunks() * args.groups * args.taps * blocks; }
  int64_t bytes() const {
    const int64_t product = summed * kRows * 2 + kRows * kColumns * 4;
    return max_of(product, (args.depth + kBlock + kColumns) * kChunkRows * 2);
  }

  void pack(int64_t item) const {
    constexpr int64_t kDepth = 8;
    const int64_t group = item / panels, first = item % panels * kColumns, columns = min_of(kColumns, args.columns - first);
    const bf16* from = static_cast<const bf16*>(args.weight) + group * args.of_group + first * args.of_column;
    bf16* to = static_cast<bf16*>(args.packed) + item * summed * kColumns;
    memset(to, 0, size_t(summed * kColumns) * sizeof(bf16));
    for (int64_t d0 = 0; d0 < args.depth; d0 += kDepth) {
      for (int64_t j = 0; j < columns; ++j) {
        for (int64_t d = d0; d < min_of(args.depth, d0 + kDepth); ++d) {
          const bf16* place = from + j * args.of_column + d * args.of_depth;
          bf16* word = to + (d / 2 * kColumns + j) * 2 + d % 2;
          for (int64_t t = 0; t < args.taps; ++t) word[t * depth * kColumns] = place[t];
        }
      }
    }
  }

  void forward(int64_t item, void* buffer) const {
    const int64_t block = item % blocks, group = item / blocks % args.groups, first = item / blocks / args.groups * kRows;
    const int64_t count = min_of(kRows, args.M - first), rows = round_up(count, kAmxRows);
    bf16* left = static_cast<bf16*>(buffer);
    float* sums = reinterpret_cast<float*>(left + summed * kRows);
    for (int64_t t = 0; t < args.taps; ++t) {
      for (int64_t r = 0; r < rows; ++r) {
        const int32_t source = r < count ? args.source[t * args.M + first + r] : -1;
        const bf16* from = row_of(group, source);
        bf16* to = left + t * depth * kRows + r * kAmxDepth;
        for (int64_t d = 0; d < depth; d += kAmxDepth, to += kRows * kAmxDepth) {
          _mm512_storeu_si512(to, _mm512_maskz_loadu_epi16(source < 0 ? 0 : first_lanes(args.depth - d), from + d));
        }
      }
    }
    for (int64_t j = block * kBlock; j < min_of((block + 1) * kBlock, args.columns); j += kColumns) {
      const uint32_t* weight = static_cast<const uint32_t*>(args.packed) + (group * panels + j / kColumns) * summed * kColumns / 2;
      amx_multiply(rows, kColumns, summed, {left, kAmxDepth, kRows * kAmxDepth}, {weight, kColumns}, {sums, kColumns, false});
      const int64_t column = group * args.columns + j;
      const bf16* bias = args.bias == nullptr ? nullptr : static_cast<const bf16*>(args.bias) + column;
      const AmxResult result(bias, min_of(kColumns, args.columns - j));
      bf16* out = static_cast<bf16*>(args.out) + column;
      for (int64_t r = 0; r < count; ++r) result.write(sums + r * kColumns, out + args.target[first + r] * args.out_stride);
    }
  }

  // One kernel place of a chunk of rows and a block of columns.
  void weight_chunk(int64_t item, float* partial, float* bias, void* buffer) const {
    const int64_t block = item % blocks, t = item / blocks % args.taps, group = item / blocks / args.taps % args.groups;
    const int64_t chunk = item / blocks / args.taps / args.groups, chunks = args.chunks();
    const int64_t begin = block * kBlock, end = min_of(begin + kBlock, args.columns), of_panels = parts_of(args.columns, kPartial);
    const int64_t each = args.taps * args.depth * kPartial;  // of a panel
    float* to = partial + (chunk * args.groups + group) * of_panels * each + t * args.depth * kPartial;
    bias += (chunk * args.groups + group) * args.columns;
    for (int64_t j = begin; j < end; j += kPartial) memset(to + j / kPartial * each, 0, size_t(args.depth * kPartial) * sizeof(float));
    for (int64_t j = begin; t == 0 && j < end; ++j) bias[j] = 0;
    bf16* rows = static_cast<bf16*>(buffer);
    bf16* left = rows + kChunkRows * kColumns;
    uint32_t* right = reinterpret_cast<uint32_t*>(left + args.depth * kChunkRows);
    for (int64_t first = chunk * args.M / chunks; first < (chunk + 1) * args.M / chunks; first += kChunkRows) {
      const int64_t count = min_of(kChunkRows, (chunk + 1) * args.M / chunks - first), steps = round_up(count, kAmxDepth);
      for (int64_t j = begin; j < end; j += kColumns) {
        const int64_t columns = min_of(kColumns, end - j);
        take_grads(group * args.columns + j, columns, first, count, steps, rows);
        if (t == 0) add_bias(rows, count, columns, bias + j);
        amx_pair_rows(rows, kColumns, steps, kColumns, steps, kColumns, right + (j - begin) * kChunkRows / 2);
      }
      const int32_t* source = args.source + t * args.M + first;
      bool any = false;
      for (int64_t r = 0; r < count; ++r) any |= source[r] >= 0;
      if (!any) continue;
      for (int64_t d = 0; d < args.depth; d += kColumns) {
        const int64_t channels = min_of(kColumns, args.depth - d);
        for (int64_t r = 0; r < steps; ++r) {
          const int32_t row = r < count ? source[r] : -1;
          _mm512_storeu_si512(rows + r * kColumns, _mm512_maskz_loadu_epi16(row < 0 ? 0 : first_lanes(channels), row_of(group, row) + d));
        }
        amx_transpose_rows(rows, kColumns, steps, channels, steps, channels, left + d * kChunkRows, kChunkRows);
      }
      for (int64_t j = begin; j < end; j += kColumns) {
        amx_multiply(args.depth, kColumns, steps, {left, kChunkRows}, {right + (j - begin) * kChunkRows / 2, kColumns},
                     {to + j / kPartial * each + j % kPartial, kPartial, true});
      }
    }
  }

 private:
  const bf16* row_of(int64_t group, int32_t row) const {
    return static_cast<const bf16*>(args.rows) + group * args.depth + (row < 0 ? 0 : row * args.row_stride);
  }

  void take_grads(int64_t column, int64_t columns, int64_t first, int64_t count, int64_t steps, bf16* to) const {
    for (int64_t r = 0; r < steps; ++r) {
      const bf16* from = static_cast<const bf16*>(args.grad) + (r < count ? args.target[first + r] * args.out_stride : 0) + column;
      _mm512_storeu_si512(to + r * kColumns, _mm512_maskz_loadu_epi16(r < count ? first_lanes(columns) : 0, from));
    }
  }

  static void add_bias(const bf16* rows, int64_t count, int64_t columns, float* bias) {
    for (int64_t j = 0; j < columns; j += VecF::width) {
      VecF sum = VecF::load_n(bias + j, min_of<int64_t>(VecF::width, columns - j));
      for (int64_t r = 0; r < count; ++r) sum = sum + VecF::load(rows + r * kColumns + j);
      sum.store_n(bias + j, min_of<int64_t>(VecF::width, columns - j));
    }
  }
};

}  // namespace MASKOPS_ISA_NS
}  // namespace maskops
#endif
