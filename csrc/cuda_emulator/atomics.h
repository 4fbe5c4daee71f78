// Integer atomics on global and shared memory. Float atomics do not compile: their result depends on the order of the threads.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <type_traits>

#include "shared.h"

namespace maskops_emulator {

template <typename T>
T* atomic_address(T* pointer) {
  return pointer;
}
template <typename T>
T* atomic_address(const SharedPointer<T>& pointer) {
  return pointer.begin_atomic();
}

// Fibers do not run at the same time, so a plain read-modify-write is atomic.
template <typename P, typename F>
auto atomic(P pointer, F change) {
  auto* address = atomic_address(pointer);
  using T = std::remove_pointer_t<decltype(address)>;
  static_assert(std::is_integral_v<T> && sizeof(T) >= 4,
                "float atomics are not deterministic: reduce in a fixed order instead (csrc/common/reduce.cuh)");
  const T old = *address;
  *address = static_cast<T>(change(old));
  return old;
}

}  // namespace maskops_emulator

template <typename P, typename V>
auto atomicAdd(P p, V value) {
  return maskops_emulator::atomic(p, [=](auto old) { return old + value; });
}
template <typename P, typename V>
auto atomicExch(P p, V value) {
  return maskops_emulator::atomic(p, [=](auto) { return value; });
}
template <typename P, typename V>
auto atomicMin(P p, V value) {
  return maskops_emulator::atomic(p, [=](auto old) { return std::min<decltype(old)>(old, value); });
}
template <typename P, typename V>
auto atomicMax(P p, V value) {
  return maskops_emulator::atomic(p, [=](auto old) { return std::max<decltype(old)>(old, value); });
}
template <typename P, typename V>
auto atomicOr(P p, V value) {
  return maskops_emulator::atomic(p, [=](auto old) { return old | value; });
}
template <typename P, typename V>
auto atomicAnd(P p, V value) {
  return maskops_emulator::atomic(p, [=](auto old) { return old & value; });
}
template <typename P, typename C, typename V>
auto atomicCAS(P p, C compare, V value) {
  return maskops_emulator::atomic(p, [=](auto old) { return old == static_cast<decltype(old)>(compare) ? value : old; });
}
