// nm_matmul_mask on the CPU: how many scores of its group are better than a score says whether it is kept.
//
// Groups of 2, 4, 8 or 16 stand side by side in a vector, and each score meets the others of its group by rotation: no branches,
// one pass over memory. Other groups are compared one by one.
#include "common/isa.h"
#include "math/nm_matmul.h"

namespace maskops {

struct MaskRows {
  const void* scores;
  int64_t stride;  // of the rows, in elements
  int64_t columns;
  bool* kept;      // [rows, columns]
  int n, m;
};

struct MaskKernels {
  void (*rows)(int dtype, const MaskRows&, int64_t begin, int64_t end);
};
MASKOPS_DECLARE_KERNELS(MaskKernels)

}  // namespace maskops

#include "common/simd.h"

namespace maskops {
inline namespace MASKOPS_ISA_NS {
namespace {

template <class T>
struct SignedKey {
  using type = int32_t;
};
template <>
struct SignedKey<double> {
  using type = int64_t;
};

template <class Key>
struct Lanes {
  static constexpr int count = int(sizeof(VecF) / sizeof(Key));
  typedef Key Vector __attribute__((vector_size(sizeof(VecF))));
  typedef uint8_t Bytes __attribute__((vector_size(sizeof(VecF) / sizeof(Key))));
};

template <class Key>
constexpr Key kBelowAll = Key(Key(1) << (sizeof(Key) * 8 - 1));  // columns past the end of the row

// Numbers whose signed order is the order of the scores, as that of score_key is unsigned; NaN is the lowest but kBelowAll.
template <class Key, class Values>
inline typename Lanes<Key>::Vector keys_of(Values x) {
  using Vector = typename Lanes<Key>::Vector;
  const Vector bits = Vector(x), zero = Vector{};
  const Vector ordered = bits ^ ((bits >> int(sizeof(Key) * 8 - 1)) & ~kBelowAll<Key>);
  const Vector nan = zero + (kBelowAll<Key> + 1);
  return (x == Values{}) ? zero : (x == x) ? ordered : nan;
}

template <int... I>
struct Indices {};
template <int N, int... I>
struct CountTo : CountTo<N - 1, N - 1, I...> {};
template <int... I>
struct CountTo<0, I...> {
  using type = Indices<I...>;
};

// better += 1 where the one that stands R places on in its group (of kGroup, cyclic) is better. Past the end of the group it has
// the lower index, and wins a tie.
template <int kGroup, int R, class Vector, int... I>
inline void count_better(Vector key, Vector& better, Indices<I...> lanes) {
  if constexpr (R < kGroup) {
    const Vector other = __builtin_shufflevector(key, key, (I / kGroup * kGroup + (I + R) % kGroup)...);
    const Vector wins_tie = {-(I % kGroup + R >= kGroup)...};
    better -= (other > key) | ((other == key) & wins_tie);
    count_better<kGroup, R + 1>(key, better, lanes);
  }
}

// The kept ones of a vector of whole groups, as 0 and 1.
template <class Key, int kGroup>
inline typename Lanes<Key>::Bytes keep_largest(typename Lanes<Key>::Vector key, int n) {
  using L = Lanes<Key>;
  typename L::Vector better = {};
  count_better<kGroup, 1>(key, better, typename CountTo<L::count>::type{});
  return __builtin_convertvector((better < Key(n)) & Key(1), typename L::Bytes);
}

template <class T, int kGroup>
void mask_row(const T* scores, int64_t columns, int n, bool* kept) {
  using V = typename VecFor<T>::type;
  using Key = typename SignedKey<T>::type;
  using L = Lanes<Key>;
  typedef typename V::scalar Values __attribute__((vector_size(sizeof(V))));
  for (int64_t k = 0; k < columns; k += L::count) {
    const int64_t valid = min_of<int64_t>(columns - k, L::count);
    typename L::Vector key = keys_of<Key>(Values(V::load_n(scores + k, valid).v));
    for (int64_t i = valid; i < L::count; ++i) key[i] = kBelowAll<Key>;
    const typename L::Bytes found = keep_largest<Key, kGroup>(key, n);
    memcpy(kept + k, &found, size_t(valid));
  }
}

template <class T>
void mask_row_of_any_group(const T* scores, int64_t columns, int n, int m, bool* kept) {
  for (int64_t start = 0; start < columns; start += m) {
    const int width = int(min_of<int64_t>(m, columns - start));
    decltype(score_key(to_float(T{}))) key[kMaxGroup];
    for (int k = 0; k < width; ++k) key[k] = score_key(to_float(scores[start + k]));
    const uint32_t found = largest_keys(key, width, n);
    for (int k = 0; k < width; ++k) kept[start + k] = (found >> k) & 1u;
  }
}

// Whether a row of groups of kGroup goes through vectors here.
template <class T, int kGroup>
bool masked_by_vectors(const T* scores, const MaskRows& args, bool* kept) {
  if constexpr (kGroup <= VecFor<T>::type::width) {
    if (args.m == kGroup) mask_row<T, kGroup>(scores, args.columns, args.n, kept);
    return args.m == kGroup;
  }
  return false;
}

template <class T>
void mask_rows(const MaskRows& args, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; ++r) {
    const T* scores = static_cast<const T*>(args.scores) + r * args.stride;
    bool* kept = args.kept + r * args.columns;
    if (masked_by_vectors<T, 4>(scores, args, kept) || masked_by_vectors<T, 2>(scores, args, kept) ||
        masked_by_vectors<T, 8>(scores, args, kept) || masked_by_vectors<T, 16>(scores, args, kept)) {
      continue;
    }
    mask_row_of_any_group(scores, args.columns, args.n, args.m, kept);
  }
}

void rows(int dtype, const MaskRows& args, int64_t begin, int64_t end) {
  switch (dtype) {
    case 0: return mask_rows<float>(args, begin, end);
    case 1: return mask_rows<double>(args, begin, end);
    case 2: return mask_rows<bf16>(args, begin, end);
    default: return mask_rows<f16>(args, begin, end);
  }
}

}  // namespace

extern const MaskKernels MaskKernels_table{&rows};

}  // namespace MASKOPS_ISA_NS
}  // namespace maskops

#if MASKOPS_ISA_LEVEL == 0
#include <torch/csrc/stable/library.h>

#include "common/parallel.h"
#include "math/nm_matmul_check.h"

namespace maskops {
namespace {

Tensor nm_matmul_mask(const Tensor& scores_any, int64_t n, int64_t m) {
  check_nm_mask(scores_any, n, m);
  Tensor kept = empty_like_device(scores_any, {scores_any.size(0), scores_any.size(1)}, ScalarType::Bool);
  if (kept.numel() == 0) return kept;
  const Tensor scores = with_contiguous_rows(scores_any);
  int64_t count = scores.size(0);
  MaskRows args{scores.const_data_ptr(), scores.stride(0), scores.size(1), static_cast<bool*>(kept.mutable_data_ptr()),
                static_cast<int>(n), static_cast<int>(m)};
  // Rows of whole groups that follow each other are one row, which is then cut into pieces of a better size.
  constexpr int64_t kPiece = 4096;
  const int64_t total = kept.numel(), piece = kPiece / m * m;
  const MaskKernels& kernels = pick_MaskKernels();
  const int dtype = static_cast<int>(dtype_of(scores));
  if (args.columns % m == 0 && (scores.is_contiguous() || count == 1)) {
    const int64_t whole = total / piece;
    MaskRows pieces = args;
    pieces.columns = pieces.stride = piece;
    parallel_for(whole, piece * 8, [&](int64_t begin, int64_t end) { kernels.rows(dtype, pieces, begin, end); });
    const int64_t done = whole * piece;
    if (done == total) return kept;
    args.scores = static_cast<const char*>(args.scores) + done * static_cast<int64_t>(scores.element_size());
    args.kept += done;
    args.columns = args.stride = total - done;
    count = 1;
  }
  parallel_for(count, args.columns * 8, [&](int64_t begin, int64_t end) { kernels.rows(dtype, args, begin, end); });
  return kept;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(maskops, CPU, m) { m.impl("nm_matmul_mask", TORCH_BOX(&nm_matmul_mask)); }

}  // namespace maskops
#endif
