// How the kernels of sparse_conv lay out a tile, and the rows of x that a kernel place reads.
#pragma once

#include "common/gemm_strided.h"
#include "cpu/sparse_conv/conv.h"
#include "cpu/sparse_conv/gather.h"

#include <type_traits>

namespace maskops {
inline namespace MASKOPS_ISA_NS {

// Storage type T; P: what is multiplied, see gemm.h.
template <class T, class P_ = typename VecFor<T>::type::scalar>
struct ConvShape {
  using Stored = T;
  using P = P_;
  using V = typename Gemm<P>::Vec;
  using A = typename Gemm<P>::Sum;
  static constexpr int64_t kStep = Gemm<P>::kStep;
  static constexpr bool kWhereTheyLie = std::is_same_v<T, typename Gemm<P>::Value>;  // rows need no gathering
  static constexpr bool kPairs = kStep == 2;
  int64_t group_in, group_out, padded;  // channels of a group; `padded`: group_out in whole vectors
  int64_t tile, width;                  // rows of a tile; sums of a row
  int64_t pairs, sum_rows;              // at a time, and rows of sums, for the gradient of the weight
  bool depthwise, in_place;             // in_place: the weight needs no packing

  explicit ConvShape(const ConvArgs& args) {
    group_in = args.C / args.groups, group_out = args.D / args.groups;
    depthwise = group_in == 1 && group_out == 1;
    padded = depthwise ? 1 : round_up(group_out, V::width);
    width = depthwise ? round_up(args.D, V::width) : padded * args.groups;
    in_place = kWhereTheyLie && !kPairs && (depthwise || padded == group_out);
    const int64_t most = args.amx ? 2 * kTileMost : kTileMost;
    tile = max_of<int64_t>(32, min_of<int64_t>(most, kTileBytes / (width * int64_t(sizeof(A)) + 1) / 32 * 32));
    pairs = kPairs ? 384 : 256;
    sum_rows = args.amx ? round_up(group_in, 16) : group_in;
  }
  int64_t steps() const { return group_in / kStep; }  // kStep divides group_in, where there is a forward pass
  int64_t weight_stride(const ConvArgs& args) const { return in_place ? args.D : width; }
  int64_t weight_size(const ConvArgs& args) const { return steps() * weight_stride(args); }  // of a kernel place
  const P* weight(const ConvArgs& args, int64_t k) const {
    const void* from = in_place ? args.weight : args.packed;
    return static_cast<const P*>(from) + k * weight_size(args);
  }
  // For the gradient of the weight: rows of x and of grad, and places whose sums lie beside them, in the second cache.
  int64_t block(const ConvArgs& args) const {
    const int64_t rows = kBlockBytes / ((args.C + args.D) * int64_t(sizeof(T)) + 1);
    return max_of<int64_t>(1, rows / pairs) * pairs;
  }
  int64_t places() const { return max_of<int64_t>(1, kSumBytes / (sum_rows * width * int64_t(sizeof(A)) + 1)); }

  // Groups as they are packed: of a depthwise convolution all are one.
  int64_t parts(const ConvArgs& args) const { return depthwise ? 1 : args.groups; }

  // Of 64, 96, 128 and 192 rows, 96 were fastest for 32 and 64 channels, on two threads of an Intel Xeon. A register of AMX is filled by
  // 16 rows of a place, so more of them at a time leave less of it empty.
  static constexpr int64_t kTileMost = 96, kTileBytes = 48 << 10, kBlockBytes = 256 << 10, kSumBytes = 192 << 10;
};

// Those of map[0, count) that read something: at[] = first + i * unit for the i-th, and row[] which row of x. Returns how many, or -1
// for a row that x lacks. Both lists need room for kRowSlack more.
constexpr int64_t kRowSlack = 16;
static inline int64_t rows_of(const int32_t* map, int64_t count, int64_t N, int64_t first, int64_t unit, int32_t* at, int32_t* row) {
  int64_t found = 0;
#if MASKOPS_ISA_LEVEL == 2
  const __m512i none = _mm512_set1_epi32(-1), last = _mm512_set1_epi32(int32_t(min_of<int64_t>(N - 1, INT32_MAX)));
  const __m512i numbers = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15), step = _mm512_set1_epi32(int32_t(16 * unit));
  __m512i places = _mm512_add_epi32(_mm512_mullo_epi32(numbers, _mm512_set1_epi32(int32_t(unit))), _mm512_set1_epi32(int32_t(first)));
  __mmask16 bad = 0;
  for (int64_t i = 0; i < count; i += 16, places = _mm512_add_epi32(places, step)) {
    const __m512i n = _mm512_mask_loadu_epi32(none, VecF::first(min_of<int64_t>(16, count - i)), map + i);
    const __mmask16 some = _mm512_cmpgt_epi32_mask(n, none);
    bad |= _mm512_cmplt_epi32_mask(n, none) | _mm512_cmpgt_epi32_mask(n, last);
    _mm512_storeu_si512(at + found, _mm512_maskz_compress_epi32(some, places));
    _mm512_storeu_si512(row + found, _mm512_maskz_compress_epi32(some, n));
    found += __builtin_popcount(some);
  }
  return bad == 0 ? found : -1;
#else
  bool good = true;
  for (int64_t i = 0; i < count; ++i) {
    const int32_t n = map[i];
    at[found] = int32_t(first + i * unit);
    row[found] = n;
    found += n >= 0;
    good &= n >= -1 && n < N;
  }
  return good ? found : -1;
#endif
}

// A piece of the map on its way to the first cache: the lines of a place are far from those of the last one.
static inline void fetch_map(const int32_t* map, int64_t count) {
  for (int64_t i = 0; i < count; i += 16) __builtin_prefetch(map + i);
}

}  // namespace MASKOPS_ISA_NS
}  // namespace maskops
