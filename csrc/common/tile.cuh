// Moving tiles: between global and shared memory, and from shared memory into the registers of a warp. The inline PTX of this file
// has its emulated twins next to it.
#pragma once

#include "common/launch.cuh"

#ifdef MASKOPS_EMULATE
#include <functional>
#include <source_location>
#include <vector>
#endif

namespace maskops {

// ---------------------------------------------------------------- neighbours in shared memory

// W neighbours in shared memory as one access; the index is a multiple of W.
template <int W, typename T, typename Shared>
__device__ __forceinline__ Vec<T, W> shared_vec(const Shared& shared, int index) {
  Vec<T, W> value;
#ifdef MASKOPS_EMULATE
  if (index % W) throw maskops_emulator::KernelFault("a shared access of several elements is not aligned");
  for (int i = 0; i < W; ++i) value.v[i] = shared[index + i];
#else
  using Word = typename detail::Word<sizeof(Vec<T, W>)>::type;
  const Word word = *reinterpret_cast<const Word*>(&shared[index]);
  memcpy(&value, &word, sizeof(Word));
#endif
  return value;
}

template <int W, typename T, typename Shared>
__device__ __forceinline__ void set_shared_vec(Shared& shared, int index, const Vec<T, W>& value) {
#ifdef MASKOPS_EMULATE
  if (index % W) throw maskops_emulator::KernelFault("a shared access of several elements is not aligned");
  for (int i = 0; i < W; ++i) shared[index + i] = value.v[i];
#else
  using Word = typename detail::Word<sizeof(Vec<T, W>)>::type;
  Word word;
  memcpy(&word, &value, sizeof(Word));
  *reinterpret_cast<Word*>(&shared[index]) = word;
#endif
}

#ifndef MASKOPS_EMULATE
template <typename T>
__device__ __forceinline__ unsigned shared_address(const T* pointer) {
  return static_cast<unsigned>(__cvta_generic_to_shared(pointer));
}
#endif

// ---------------------------------------------------------------- copies in the background (cp.async)

// One per thread. copy() 16 bytes, commit() a group of copies, wait<P>() until at most the P newest groups are under way; then a
// barrier, as every thread waits for its own copies only. Chips before sm_80 copy at once. The emulated twin writes at wait(), so
// that a missing wait shows as poisoned memory.
class AsyncCopies {
 public:
  // 16 / sizeof(T) elements, zeros where `valid` is false; then `from` is not read. Both sides are aligned to 16 bytes.
  template <typename T, typename Shared>
  __device__ __forceinline__ void copy(Shared& to, int index, const T* from, bool valid) {
    [[maybe_unused]] constexpr int W = 16 / sizeof(T);
#ifdef MASKOPS_EMULATE
    const Vec<T, W> value = valid ? load_vec<W>(from) : zero_vec<T, W>();
    open_.push_back([to, index, value] { set_shared_vec<W>(to, index, value); });
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(&to[index])), "l"(__cvta_generic_to_global(from)),
                 "r"(valid ? 16 : 0)
                 : "memory");
#else
    set_shared_vec<W>(to, index, valid ? load_vec<W>(from) : zero_vec<T, W>());
#endif
  }

  __device__ __forceinline__ void commit() {
#ifdef MASKOPS_EMULATE
    groups_.push_back(std::move(open_));
    open_.clear();
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
  }

  template <int PENDING>
  __device__ __forceinline__ void wait() {
#ifdef MASKOPS_EMULATE
    while (groups_.size() > PENDING) {
      for (const auto& write : groups_.front()) write();
      groups_.erase(groups_.begin());
    }
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
#endif
  }

#ifdef MASKOPS_EMULATE
 private:
  std::vector<std::function<void()>> open_;
  std::vector<std::vector<std::function<void()>>> groups_;
#endif
};

// ---------------------------------------------------------------- fragments of matrix instructions (ldmatrix)

// Four 8 x 8 matrices of 16-bit elements for a whole warp. Lane l says where row l % 8 of matrix l / 8 begins, a multiple of 8;
// register i of lane l receives the elements 2 (l % 4) and 2 (l % 4) + 1 of row l / 4 of matrix i. sm_75 and newer.
#ifdef MASKOPS_EMULATE
template <typename T, typename Shared>
void load_matrices(unsigned (&registers)[4], const Shared& shared, int index,
                   const std::source_location& at = std::source_location::current()) {
  static_assert(sizeof(T) == 2);
  if (index % 8) throw maskops_emulator::KernelFault("a row of a matrix in shared memory is not aligned");
  maskops_emulator::exchange(index, at, [&](const int* const (&rows)[32]) {
    const int lane = maskops_emulator::lane_of_current();
    for (int i = 0; i < 4; ++i) {
      const Vec<T, 2> pair = shared_vec<2, T>(shared, *rows[8 * i + lane / 4] + 2 * (lane % 4));
      std::memcpy(&registers[i], &pair, 4);
    }
  });
}
#else
template <typename T, typename Shared>
__device__ __forceinline__ void load_matrices(unsigned (&registers)[4], const Shared& shared, int index) {
  static_assert(sizeof(T) == 2);
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
               : "r"(shared_address(&shared[index]))
               : "memory");
}
#endif

}  // namespace maskops
