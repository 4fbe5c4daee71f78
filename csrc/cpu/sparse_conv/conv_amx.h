// sparse_conv of bfloat16 in AMX tiles. A tile register wants rows at even distances, so the rows of a kernel place are gathered, as they
// are; that costs a load and a store of 64 bytes for 32 channels. For the gradient of the weight they are transposed instead.
#pragma once

#include "common/amx.h"
#include "common/pieces.h"
#include "cpu/sparse_conv/conv.h"

#if MASKOPS_ISA_LEVEL == 2
namespace maskops {
inline namespace MASKOPS_ISA_NS {

// Channels of a group, and those as whole registers: of what is summed over, of results.
struct AmxConvShape {
  const ConvArgs& args;
  const int64_t in, out, depth, width;

  explicit AmxConvShape(const ConvArgs& a)
      : args(a), in(a.C / a.groups), out(a.D / a.groups), depth(round_up(in, kAmxDepth)), width(round_up(out, kAmxRows)) {}

  // The weight, words of two channels: [K, groups, depth / 2, width].
  int64_t packed_bytes() const { return args.K * args.groups * depth / 2 * width * 4; }
  uint32_t* packed(int64_t k, int64_t g) const { return static_cast<uint32_t*>(args.packed) + (k * args.groups + g) * depth / 2 * width; }
  void pack(int64_t k) const {
    const bf16* from = static_cast<const bf16*>(args.weight) + k * in * args.D;
    for (int64_t g = 0; g < args.groups; ++g) amx_pair_rows(from + g * out, args.D, in, out, depth, width, packed(k, g));
  }
};

// The rows of one place, and what it gives to each.
struct AmxPlace {
  using Scope = AmxScope;
  const AmxConvShape of;
  bf16* rows;       // [rows, groups, depth]
  float* products;  // [rows, width]

  AmxPlace(const ConvArgs& args, int64_t most_rows, Pieces& pieces) : of(args) {
    const int64_t used = args.amx ? round_up(most_rows, kAmxRows) : 0;
    rows = pieces.take<bf16>(used * args.groups * of.depth);
    products = pieces.take<float>(used * of.width);
  }

  void gather(const int32_t* row, int64_t count) const {
    constexpr int64_t kAhead = 4;
    const bf16* x = static_cast<const bf16*>(of.args.x);
    bf16* to = rows;
    for (int64_t r = 0; r < count; ++r) {
      if (r + kAhead < count) {
        const bf16* next = x + row[r + kAhead] * of.args.x_stride;
        for (int64_t c = 0; c < of.args.C; c += 32) __builtin_prefetch(next + c);
      }
      const bf16* from = x + row[r] * of.args.x_stride;
      for (int64_t g = 0; g < of.args.groups; ++g, from += of.in) {
        for (int64_t c = 0; c < of.depth; c += 32, to += 32) {
          _mm512_storeu_si512(to, _mm512_maskz_loadu_epi16(first_lanes(of.in - c), from + c));
        }
      }
    }
  }

  // sums + at[r] [groups, width] += row r of x times the weight of place k. Rows past the last one hold what they held.
  void add(int64_t k, const int32_t* at, const int32_t* row, int64_t count, float* sums) const {
    gather(row, count);
    for (int64_t g = 0; g < of.args.groups; ++g, sums += of.width) {
      amx_multiply(round_up(count, kAmxRows), of.width, of.depth, {rows + g * of.depth, of.args.groups * of.depth},
                   {of.packed(k, g), of.width}, {products, of.width, false});
      const float* from = products;
      for (int64_t r = 0; r < count; ++r, from += of.width) {
        for (int64_t d = 0; d < of.width; d += VecF::width) {
          (VecF::load(sums + at[r] + d) + VecF::load(from + d)).store(sums + at[r] + d);
        }
      }
    }
  }
};

// Pairs of a row of x and one of grad, for the gradient of the weight.
struct AmxPairs {
  const AmxConvShape of;
  const int64_t pairs;
  bf16* x;         // transposed: [in as whole registers, pairs]
  uint32_t* grad;  // words of two pairs: [pairs / 2, width]

  AmxPairs(const ConvArgs& args, int64_t most_pairs, Pieces& pieces) : of(args), pairs(most_pairs) {
    x = pieces.take<bf16>(args.amx ? round_up(of.in, kAmxRows) * pairs : 0);
    grad = pieces.take<uint32_t>(args.amx ? pairs / 2 * of.width : 0);
  }

  const bf16* row(const void* of_rows, int64_t stride, const int32_t* number, int64_t p, int64_t count) const {
    return p < count ? static_cast<const bf16*>(of_rows) + number[p] * stride : nullptr;
  }

  // sums [in as whole registers, groups, width] += x^T grad.
  void add(const int32_t* at, const int32_t* rows, int64_t count, float* sums) const {
    const ConvArgs& args = of.args;
    const int64_t depth = round_up(count, kAmxDepth);
    for (int64_t g = 0; g < args.groups; ++g) {
      for (int64_t p = 0; p < depth; p += 32) {
        const bf16* lines[32];
        for (int64_t i = 0; i < 32; ++i) {
          lines[i] = row(args.x, args.x_stride, rows, p + i, count);
          if (lines[i] != nullptr) lines[i] += g * of.in;
        }
        for (int64_t c = 0; c < of.in; c += 16) amx_transpose_lines(lines, c, of.in, x + c * pairs + p, pairs);
        for (int64_t i = p; i < p + 32; i += 2) {
          const bf16 *even = row(args.grad, args.grad_stride, at, i, count), *odd = row(args.grad, args.grad_stride, at, i + 1, count);
          for (int64_t d = 0; d < of.width; d += 16) {
            const int64_t from = g * of.out + d;
            const __m512i words = amx_pair(even == nullptr ? even : even + from, odd == nullptr ? odd : odd + from, 0, first_words(of.out - d));
            _mm512_storeu_si512(grad + i / 2 * of.width + d, words);
          }
        }
      }
      amx_multiply(round_up(of.in, kAmxRows), of.width, depth, {x, pairs}, {grad, of.width},
                   {sums + g * of.width, args.groups * of.width, true});
    }
  }
};

}  // namespace MASKOPS_ISA_NS
}  // namespace maskops

#else

namespace maskops {
inline namespace MASKOPS_ISA_NS {

// Never used: args.amx is false.
struct AmxConvShape {
  explicit AmxConvShape(const ConvArgs&) {}
  int64_t packed_bytes() const { return 0; }
  void pack(int64_t) const {}
};
struct AmxPlace {
  struct Scope {};
  AmxPlace(const ConvArgs&, int64_t, Pieces&) {}
  void add(int64_t, const int32_t*, const int32_t*, int64_t, float*) const {}
};
struct AmxPairs {
  AmxPairs(const ConvArgs&, int64_t, Pieces&) {}
  void add(const int32_t*, const int32_t*, int64_t, float*) const {}
};

}  // namespace MASKOPS_ISA_NS
}  // namespace maskops

#endif
