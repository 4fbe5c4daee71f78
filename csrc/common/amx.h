// Products of bfloat16 in the tile registers of AMX: C[m, n] = or += sum over k of A[m, k] * B[k, n], sums in float32.
//
// A register holds 16 rows of 64 bytes. A lies as it is, rows of bfloat16 of any stride; B lies as words of two consecutive k,
// a row of words per pair. All sizes are whole registers: 16 rows, 16 columns, 32 values of k; what is beyond the data is zero.
// The packing below brings rows of bfloat16, or pairs of rows of floats, into either form.
//
// Instructions stand as assembly, so that a compiler that knows the names only from its assembler is enough.
#pragma once

#include "common/amx_scope.h"
#include "common/simd_shuffle.h"

#if MASKOPS_ISA_LEVEL == 2
namespace maskops {
inline namespace MASKOPS_ISA_NS {

constexpr int64_t kAmxRows = 16, kAmxDepth = 32;  // rows, or words of a row, and values of k of a register

template <int kTile>
static inline void amx_zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(kTile));
}
template <int kTile>
static inline void amx_load(const void* at, int64_t stride) {  // in bytes
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(at), "r"(stride), "i"(kTile) : "memory");
}
template <int kTile>
static inline void amx_store(void* at, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(at), "r"(stride), "i"(kTile) : "memory");
}
template <int kSum, int kA, int kB>
static inline void amx_multiply_add() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSum), "i"(kA), "i"(kB));
}

struct AmxA {
  const bf16* at;
  int64_t stride;
  int64_t step = kAmxDepth;  // from the first kAmxDepth values of k to the next ones
};
struct AmxB {
  const uint32_t* at;
  int64_t stride;
};
struct AmxC {
  float* at;
  int64_t stride;
  bool add;  // to what is there
};

// R x C registers of sums: 2 x 2 need as many loads as multiplications.
template <int R, int C>
static void amx_block(int64_t depth, const AmxA& a, const AmxB& b, const AmxC& c) {
  const int64_t a_bytes = a.stride * 2, b_bytes = b.stride * 4, c_bytes = c.stride * 4;
  float* const below = c.at + kAmxRows * c.stride;
  if (c.add) {
    amx_load<0>(c.at, c_bytes);
    if constexpr (C > 1) amx_load<1>(c.at + kAmxRows, c_bytes);
    if constexpr (R > 1) amx_load<2>(below, c_bytes);
    if constexpr (R > 1 && C > 1) amx_load<3>(below + kAmxRows, c_bytes);
  } else {
    amx_zero<0>();
    if constexpr (C > 1) amx_zero<1>();
    if constexpr (R > 1) amx_zero<2>();
    if constexpr (R > 1 && C > 1) amx_zero<3>();
  }
  const bf16* row = a.at;
  const uint32_t* words = b.at;
  for (int64_t k = 0; k < depth; k += kAmxDepth, row += a.step, words += kAmxRows * b.stride) {
    amx_load<6>(words, b_bytes);
    amx_load<4>(row, a_bytes);
    amx_multiply_add<0, 4, 6>();
    if constexpr (R > 1) amx_load<5>(row + kAmxRows * a.stride, a_bytes), amx_multiply_add<2, 5, 6>();
    if constexpr (C > 1) amx_load<7>(words + kAmxRows, b_bytes), amx_multiply_add<1, 4, 7>();
    if constexpr (R > 1 && C > 1) amx_multiply_add<3, 5, 7>();
  }
  amx_store<0>(c.at, c_bytes);
  if constexpr (C > 1) amx_store<1>(c.at + kAmxRows, c_bytes);
  if constexpr (R > 1) amx_store<2>(below, c_bytes);
  if constexpr (R > 1 && C > 1) amx_store<3>(below + kAmxRows, c_bytes);
}

// Inside an AmxScope. rows, columns: of kAmxRows; depth: of kAmxDepth.
static inline void amx_multiply(int64_t rows, int64_t columns, int64_t depth, const AmxA& a, const AmxB& b, const AmxC& c) {
  constexpr int64_t kTwo = 2 * kAmxRows;
  for (int64_t j = 0; j < columns; j += kTwo) {
    const bool wide = columns - j >= kTwo;
    for (int64_t i = 0; i < rows; i += kTwo) {
      const AmxA left{a.at + i * a.stride, a.stride, a.step};
      const AmxB right{b.at + j, b.stride};
      const AmxC to{c.at + i * c.stride + j, c.stride, c.add};
      if (rows - i >= kTwo) wide ? amx_block<2, 2>(depth, left, right, to) : amx_block<2, 1>(depth, left, right, to);
      else wide ? amx_block<1, 2>(depth, left, right, to) : amx_block<1, 1>(depth, left, right, to);
    }
  }
}

// ---- packing

static inline __mmask32 first_lanes(int64_t count) {
  return count >= 32 ? ~__mmask32{0} : (__mmask32{1} << (count < 0 ? 0 : count)) - 1;
}

// Whether none of 32 values is infinite or NaN.
static inline bool amx_finite(__m512i values) {
  const __m512i exponent = _mm512_set1_epi16(0x7f80);
  return _mm512_cmpeq_epi16_mask(_mm512_and_si512(values, exponent), exponent) == 0;
}

// Rows of up to 32 sums to bfloat16, with a bias added that may be null.
class AmxResult {
 public:
  AmxResult(const bf16* bias, int64_t columns) : some_(first_lanes(columns)), low_(_mm512_setzero_ps()), high_(low_) {
    if (bias == nullptr) return;
    const __m512i all = _mm512_maskz_loadu_epi16(some_, bias);
    low_ = VecF::widen(_mm512_castsi512_si256(all), bf16()).v, high_ = VecF::widen(_mm512_extracti64x4_epi64(all, 1), bf16()).v;
  }
  inline void write(const float* sums, bf16* to) const {
    const __m512 low = _mm512_add_ps(_mm512_loadu_ps(sums), low_), high = _mm512_add_ps(_mm512_loadu_ps(sums + 16), high_);
    _mm512_mask_storeu_epi16(to, some_, __m512i(_mm512_cvtne2ps_pbh(high, low)));
  }

 private:
  const __mmask32 some_;
  __m512 low_, high_;
};

// Rows of `channels` values of which the first `count` exist, as [rows, width], zeros elsewhere; width: of kAmxDepth.
static inline void amx_copy_rows(const bf16* from, int64_t stride, int64_t count, int64_t channels, int64_t rows, int64_t width, bf16* to) {
  for (int64_t i = 0; i < rows; ++i, to += width) {
    for (int64_t d = 0; d < width; d += 32) {
      const __mmask32 some = i < count ? first_lanes(channels - d) : 0;
      _mm512_storeu_si512(to + d, _mm512_maskz_loadu_epi16(some, from + i * stride + d));
    }
  }
}

// Words of two consecutive channels, transposed: to[p * to_stride + i] = channels 2p and 2p + 1 of row i; rows: of 16, width: of 32.
static inline void amx_transpose_words(const bf16* from, int64_t stride, int64_t count, int64_t channels, int64_t rows, int64_t width,
                                       uint32_t* to, int64_t to_stride) {
  for (int64_t i = 0; i < rows; i += 16) {
    for (int64_t d = 0; d < width; d += 32) {
      VecF block[16];
      const __mmask32 some = first_lanes(channels - d);
#pragma GCC unroll 16
      for (int r = 0; r < 16; ++r) {
        block[r].v = _mm512_castsi512_ps(_mm512_maskz_loadu_epi16(i + r < count ? some : 0, from + (i + r) * stride + d));
      }
      transpose(block);
#pragma GCC unroll 16
      for (int p = 0; p < 16; ++p) _mm512_storeu_ps(to + (d / 2 + p) * to_stride + i, block[p].v);
    }
  }
}

// 16 words of two rows from channel d on, where `some`; a row that is null reads as zeros.
static inline __m512i amx_pair(const bf16* even, const bf16* odd, int64_t d, __mmask16 some) {
  const __m512i low = _mm512_cvtepu16_epi32(even ? _mm256_maskz_loadu_epi16(some, even + d) : _mm256_setzero_si256());
  const __m512i high = _mm512_cvtepu16_epi32(odd ? _mm256_maskz_loadu_epi16(some, odd + d) : _mm256_setzero_si256());
  return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
}
static inline __mmask16 first_words(int64_t count) { return __mmask16(first_lanes(count) & 0xffff); }

// Words of two consecutive rows: to[p * width + d] = channel d of rows 2p and 2p + 1; rows: even, width: of 16.
static inline void amx_pair_rows(const bf16* from, int64_t stride, int64_t count, int64_t channels, int64_t rows, int64_t width,
                                 uint32_t* to) {
  for (int64_t i = 0; i < rows; i += 2, to += width) {
    const bf16 *even = i < count ? from + i * stride : nullptr, *odd = i + 1 < count ? from + (i + 1) * stride : nullptr;
    for (int64_t d = 0; d < width; d += 16) _mm512_storeu_si512(to + d, amx_pair(even, odd, d, first_words(channels - d)));
  }
}

// 16 channels from d on of 32 rows, of which any may be null, each with the values of all rows: to[c * to_stride + i].
static inline void amx_transpose_lines(const bf16* const* rows, int64_t d, int64_t channels, bf16* to, int64_t to_stride) {
  VecF block[16];
  const __mmask16 some = first_words(channels - d);
#pragma GCC unroll 16
  for (int p = 0; p < 16; ++p) block[p].v = _mm512_castsi512_ps(amx_pair(rows[2 * p], rows[2 * p + 1], d, some));
  transpose(block);
#pragma GCC unroll 16
  for (int c = 0; c < 16; ++c) _mm512_storeu_ps(to + c * to_stride, block[c].v);
}

// Rows of channels, each with the values of all rows: to[d * to_stride + i]; rows: of 32, width: of 16.
static inline void amx_transpose_rows(const bf16* from, int64_t stride, int64_t count, int64_t channels, int64_t rows, int64_t width,
                                      bf16* to, int64_t to_stride) {
  for (int64_t i = 0; i < rows; i += 32) {
    const bf16* lines[32];
    for (int64_t r = 0; r < 32; ++r) lines[r] = i + r < count ? from + (i + r) * stride : nullptr;
    for (int64_t d = 0; d < width; d += 16) amx_transpose_lines(lines, d, channels, to + d * to_stride + i, to_stride);
  }
}

// Sums [width, stride] to rows [rows, width]; rows are filled up to whole vectors, as width is.
static inline void amx_transpose_sums(const float* from, int64_t stride, int64_t rows, int64_t width, float* to) {
  for (int64_t i = 0; i < rows; i += VecF::width) {
    for (int64_t d = 0; d < width; d += VecF::width) {
      VecF block[VecF::width];
#pragma GCC unroll 16
      for (int c = 0; c < VecF::width; ++c) block[c] = VecF::load(from + (d + c) * stride + i);
      transpose(block);
#pragma GCC unroll 16
      for (int c = 0; c < VecF::width; ++c) block[c].store(to + (i + c) * width + d);
    }
  }
}

// The words of two rows of floats.
struct AmxPairOrder {
  alignas(64) uint16_t at[32] = {};
  constexpr AmxPairOrder() {
    for (int i = 0; i < 32; ++i) at[i] = uint16_t(i / 2 + i % 2 * 16);
  }
};
static inline __m512i amx_pair(VecF even, VecF odd) {
  static constexpr AmxPairOrder kOrder;
  return _mm512_permutexvar_epi16(_mm512_load_si512(kOrder.at), __m512i(_mm512_cvtne2ps_pbh(odd.v, even.v)));
}

}  // namespace MASKOPS_ISA_NS
}  // namespace maskops
#endif
