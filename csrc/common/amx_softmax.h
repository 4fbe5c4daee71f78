// What attention in AMX tiles needs beside its products. Sums are kept transposed, [channels, 64 queries], so that weights, a row per key,
// are the right operand as they are.
#pragma once

#include <initializer_list>

#include "common/gemm.h"
#include "common/simd_math.h"

#if MASKOPS_ISA_LEVEL == 2
namespace maskops {
inline namespace MASKOPS_ISA_NS {

constexpr int64_t kAmxQueryStride = 64;

// 2^x for x <= 0 with a relative error of 3e-6: the weight is rounded to 8 bits.
static inline VecF amx_exp2_below_zero(VecF x) {
  const __m512 r = _mm512_reduce_ps(x.v, 0);
  VecF sum = VecF::all(0.009582853f);
  for (const float c : {0.055906426f, 0.24024099f, 0.6931242f, 1.0f}) sum = fma(sum, VecF{r}, VecF::all(c));
  return {_mm512_scalef_ps(sum.v, rounded(x).v)};
}

// Zeros for the keys from `count` on that a register of pairs of keys reads.
static inline void amx_zero_pairs(int64_t count, uint32_t* pairs) {
  const int64_t taken = (count + 1) / 2 * kAmxQueryStride, all = round_up(count, kAmxDepth) / 2 * kAmxQueryStride;
  if (taken < all) memset(pairs + taken, 0, size_t(all - taken) * sizeof(uint32_t));
}

// sums [channels, columns] of each query times its decay.
static inline void amx_decay(const float* decay, int64_t channels, int64_t columns, float* sums) {
  for (int64_t i = 0; i < columns; i += VecF::width) {
    const VecF by = VecF::load(decay + i);
    if (_mm512_cmp_ps_mask(by.v, _mm512_set1_ps(1), _CMP_NEQ_UQ) == 0) continue;  // no top has risen
    for (int64_t d = 0; d < channels; ++d) (VecF::load(sums + d * kAmxQueryStride + i) * by).store(sums + d * kAmxQueryStride + i);
  }
}

}  // namespace MASKOPS_ISA_NS
}  // namespace maskops
#endif
