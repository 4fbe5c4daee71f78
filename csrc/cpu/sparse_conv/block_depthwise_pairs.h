// Depthwise block-masked convolution in bfloat16 by vdpbf16ps, 32 channels at a time: positions side by side are put together in words,
// channel by channel, so that two kernel places (or, for the gradient of the weight, two positions) are multiplied at once.
//
// Words come of unpacking, half a vector of channels each: word m of half h has channel 8 (m / 4) + 4 h + m % 4. The weight is packed, and
// its gradient summed, in that order.
#pragma once

#include "common/amx.h"
#include "cpu/sparse_conv/block_window.h"

#if MASKOPS_ISA_LEVEL == 2
namespace maskops {
inline namespace MASKOPS_ISA_NS {

struct WordOrder {
  alignas(64) uint16_t at[32] = {};  // which of 16 words of half 0, then of half 1, has a channel
  constexpr WordOrder() {
    for (int i = 0; i < 32; ++i) at[i] = uint16_t(i % 8 / 4 * 16 + i / 8 * 4 + i % 4);
  }
};

struct DepthwisePairs {
  static constexpr int64_t kChannels = 32;
  static constexpr WordOrder kOrder{};
  const DepthwiseArgs& args;
  const int64_t blocks, line_words, taps;  // line_words: pairs of places on a line of the kernel, the last one filled up with zero

  explicit DepthwisePairs(const DepthwiseArgs& a)
      : args(a), blocks((a.C + kChannels - 1) / kChannels), line_words((a.kw + 1) / 2), taps(a.taps()) {}

  int64_t packed_size() const { return (args.kh * line_words + 1) * kChannels; }  // of a block of channels, and its bias
  int64_t packed_bytes() const { return blocks * packed_size() * 4; }
  int64_t sums_size() const { return (taps + 1) * kChannels; }
  int64_t sums_bytes() const { return blocks * sums_size() * 4; }

  // Channels [begin, end), begin a multiple of kChannels.
  void pack(int64_t begin, int64_t end) const {
    float* const packed = static_cast<float*>(args.packed) + begin / kChannels * packed_size();
    memset(packed, 0, size_t((end - begin + kChannels - 1) / kChannels * packed_size()) * sizeof(float));
    for (int64_t c = begin; c < end; ++c) {
      float* block = packed + (c - begin) / kChannels * packed_size();
      const int64_t word = kOrder.at[c % kChannels], step = args.flipped ? -1 : 1;
      const bf16* from = static_cast<const bf16*>(args.weight) + c * taps + (args.flipped ? taps - 1 : 0);
      bf16* to = reinterpret_cast<bf16*>(block) + 2 * word;
      for (int64_t ky = 0; ky < args.kh; ++ky) {
        for (int64_t kx = 0; kx < args.kw; ++kx, from += step) to[(ky * line_words + kx / 2) * 2 * kChannels + kx % 2] = *from;
      }
      if (args.bias != nullptr) block[args.kh * line_words * kChannels + word] = to_float(static_cast<const bf16*>(args.bias)[c]);
    }
  }

  void forward(int64_t number, void* buffer) const {
    const Window<bf16> window(args, buffer);
    const int64_t cell = args.active[number], ch = args.cell_h(), width = args.W / args.sx;
    window.clear(args);
    window.find(args, cell);
    bf16* out = static_cast<bf16*>(args.out) + first_position(args, cell) * args.C;
    for (int64_t c = 0; c < args.C; c += kChannels) {
      for (int64_t y = 0; y < ch; ++y) {
        window.fetch(args, c + kChannels, y, ch);
        by_line(args, [&]<int KW, int S>() { forward_line<KW, S>(window, y, c, out + y * width * args.C + c); });
      }
    }
  }

  void weight_chunk(int64_t chunk, void* buffer) const {
    const Window<bf16> window(args, buffer);
    const int64_t ch = args.cell_h(), width = args.W / args.sx, chunks = args.chunks();
    float* partial = static_cast<float*>(args.partial) + chunk * blocks * sums_size();
    memset(partial, 0, size_t(sums_bytes()));
    window.clear(args);
    for (int64_t number = chunk * args.count / chunks; number < (chunk + 1) * args.count / chunks; ++number) {
      const int64_t cell = args.active[number];
      window.find(args, cell);
      const bf16* grad = static_cast<const bf16*>(args.grad) + first_position(args, cell) * args.C;
      for (int64_t c = 0; c < args.C; c += kChannels) {
        float* sums = partial + c / kChannels * sums_size();
        for (int64_t y = 0; y < ch; ++y) {
          window.fetch(args, c + kChannels, y, ch);
          by_line(args, [&]<int KW, int S>() { weight_line<KW, S>(window, y, c, grad + y * width * args.C + c, sums); });
        }
      }
    }
  }

  void sum_chunks(int64_t begin, int64_t end) const {
    for (int64_t c = begin; c < end; c += kChannels) {
      const float* from = static_cast<const float*>(args.partial) + c / kChannels * sums_size();
      sum_channels<bf16, VecF, kChannels>(args, from, blocks * sums_size(), c, min_of(kChannels, end - c),
                                          [](int64_t i) { return kOrder.at[i]; });
    }
  }

 private:
  // run.template operator()<X>(x) over the positions of a line, X at a time.
  template <class Run>
  void by_run(const Run& run) const {
    const int64_t count = args.cell_w();
    int64_t x = 0;
    for (; x + 8 <= count; x += 8) run.template operator()<8>(x);
    for (; x + 4 <= count; x += 4) run.template operator()<4>(x);
    for (; x < count; ++x) run.template operator()<1>(x);
  }

  static inline __m512i word(__m512i even, __m512i odd, int half) {
    return half == 0 ? _mm512_unpacklo_epi16(even, odd) : _mm512_unpackhi_epi16(even, odd);
  }
  static inline __m512 add(__m512 sum, __m512i a, __m512i b) { return _mm512_dpbf16_ps(sum, __m512bh(a), __m512bh(b)); }

  template <int KW, int S>
  void forward_line(const Window<bf16>& window, int64_t y, int64_t c, bf16* out) const {
    const bf16* const* at = window.at + y * args.sy * window.width;
    by_run([&]<int X>(int64_t x) { forward_run<KW, S, X>(window, at + x * S, c, out + x * args.C); });
  }

  // X positions; at: the first address of the run.
  template <int KW, int S, int X>
  void forward_run(const Window<bf16>& window, const bf16* const* at, int64_t c, bf16* out) const {
    constexpr int kWords = (KW + 1) / 2;
    const __mmask32 some = first_lanes(args.C - c);
    const float* packed = static_cast<const float*>(args.packed) + c / kChannels * packed_size();
    __m512 sum[X][2];
#pragma GCC unroll 8
    for (int x = 0; x < X; ++x) {
#pragma GCC unroll 2
      for (int h = 0; h < 2; ++h) sum[x][h] = _mm512_loadu_ps(packed + args.kh * kWords * kChannels + h * 16);
    }
    for (int64_t ky = 0; ky < args.kh; ++ky, at += window.width) {
      __m512i w[kWords][2];
#pragma GCC unroll 4
      for (int i = 0; i < kWords; ++i, packed += kChannels) {
#pragma GCC unroll 2
        for (int h = 0; h < 2; ++h) w[i][h] = _mm512_loadu_si512(packed + h * 16);
      }
      __m512i before = _mm512_setzero_si512();
#pragma GCC unroll 32
      for (int j = 0; j < (X - 1) * S + KW; ++j) {
        const __m512i now = _mm512_maskz_loadu_epi16(some, at[j] + c);
#pragma GCC unroll 2
        for (int h = 0; h < 2; ++h) {
          const __m512i two = word(before, now, h), last = word(now, _mm512_setzero_si512(), h);
#pragma GCC unroll 8
          for (int x = 0; x < X; ++x) {
            const int k = j - x * S;  // place of `now`; the last one of a line is alone
            if (k > 0 && k < KW && k % 2 == 1) sum[x][h] = add(sum[x][h], two, w[k / 2][h]);
            if (k == KW - 1) sum[x][h] = add(sum[x][h], last, w[kWords - 1][h]);
          }
        }
        before = now;
      }
    }
    const __m512i order = _mm512_load_si512(kOrder.at);
#pragma GCC unroll 8
    for (int x = 0; x < X; ++x) {
      const __m512i both = __m512i(_mm512_cvtne2ps_pbh(sum[x][1], sum[x][0]));
      _mm512_mask_storeu_epi16(out + x * args.C, some, _mm512_permutexvar_epi16(order, both));
    }
  }

  template <int KW, int S>
  void weight_line(const Window<bf16>& window, int64_t y, int64_t c, const bf16* grad, float* sums) const {
    const bf16* const* at = window.at + y * args.sy * window.width;
    by_run([&]<int X>(int64_t x) { weight_run<KW, S, X>(window, at + x * S, c, grad + x * args.C, sums); });
  }

  // X positions, two at a time; one alone has a zero beside it.
  template <int KW, int S, int X>
  void weight_run(const Window<bf16>& window, const bf16* const* at, int64_t c, const bf16* grad, float* sums) const {
    constexpr int kTwos = (X + 1) / 2;
    const __mmask32 some = first_lanes(args.C - c);
    const __m512i zero = _mm512_setzero_si512(), ones = _mm512_set1_epi16(0x3f80);
    float* bias = sums + taps * kChannels;
    __m512i g[kTwos][2];
#pragma GCC unroll 4
    for (int i = 0; i < kTwos; ++i) {
      const __m512i even = _mm512_maskz_loadu_epi16(some, grad + 2 * i * args.C);
      const __m512i odd = 2 * i + 1 < X ? _mm512_maskz_loadu_epi16(some, grad + (2 * i + 1) * args.C) : zero;
#pragma GCC unroll 2
      for (int h = 0; h < 2; ++h) {
        g[i][h] = word(even, odd, h);
        _mm512_storeu_ps(bias + h * 16, add(_mm512_loadu_ps(bias + h * 16), g[i][h], ones));
      }
    }
    for (int64_t ky = 0; ky < args.kh; ++ky, at += window.width, sums += KW * kChannels) {
      __m512 sum[KW][2];
#pragma GCC unroll 7
      for (int k = 0; k < KW; ++k) {
#pragma GCC unroll 2
        for (int h = 0; h < 2; ++h) sum[k][h] = _mm512_loadu_ps(sums + k * kChannels + h * 16);
      }
      __m512i row[(X - 1) * S + KW];
#pragma GCC unroll 32
      for (int j = 0; j < (X - 1) * S + KW; ++j) {
        row[j] = _mm512_maskz_loadu_epi16(some, at[j] + c);
        const int first = X > 1 ? j - S : j;  // of the two positions that this one completes
        if (first < 0) continue;
#pragma GCC unroll 2
        for (int h = 0; h < 2; ++h) {
          const __m512i two = word(row[first], X > 1 ? row[j] : zero, h);
#pragma GCC unroll 4
          for (int i = 0; i < kTwos; ++i) {
            const int k = first - 2 * i * S;
            if (k >= 0 && k < KW) sum[k][h] = add(sum[k][h], two, g[i][h]);
          }
        }
      }
#pragma GCC unroll 7
      for (int k = 0; k < KW; ++k) {
#pragma GCC unroll 2
        for (int h = 0; h < 2; ++h) _mm512_storeu_ps(sums + k * kChannels + h * 16, sum[k][h]);
      }
    }
  }
};

}  // namespace MASKOPS_ISA_NS
}  // namespace maskops
#endif
