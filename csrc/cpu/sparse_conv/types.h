// What the kernels of sparse_conv share: storage types by the codes of common/dispatch.h, which includes torch, and conversions.
#pragma once

#include "common/simd.h"

namespace maskops {
inline namespace MASKOPS_ISA_NS {

template <class F>
static auto by_dtype(int dtype, const F& f) {
  switch (dtype) {
    case 0: return f(float());
    case 1: return f(double());
    case 2: return f(bf16());
    default: return f(f16());
  }
}

// count values of T as A, whose vectors may be written past the end.
template <class T, class A>
static void widen(const T* from, int64_t count, A* to) {
  using V = typename VecFor<T>::type;
  int64_t i = 0;
  for (; i + V::width <= count; i += V::width) V::load(from + i).store(to + i);
  if (i < count) V::load_n(from + i, count - i).store(to + i);
}

template <class T, class A>
static void narrow(const A* from, int64_t count, T* to) {
  using V = typename VecFor<T>::type;
  int64_t i = 0;
  for (; i + V::width <= count; i += V::width) V::load(from + i).store(to + i);
  if (i < count) V::load_n(from + i, count - i).store_n(to + i, count - i);
}

}  // namespace MASKOPS_ISA_NS
}  // namespace maskops
