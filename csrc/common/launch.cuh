// What every .cu file stands on: launch(), shared memory, loads and stores, device-side checks. One source text for nvcc and for the
// emulator (MASKOPS_EMULATE, csrc/cuda_emulator), no PyTorch in sight.
#pragma once

#include <cassert>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <sstream>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>

#ifdef MASKOPS_EMULATE
#include "emulator.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#endif

// ---------------------------------------------------------------- shared memory

// MASKOPS_SHARED(float, name, 32): T name[32] per block.  MASKOPS_DYNAMIC_SHARED(T, name): the bytes that launch() was given.
// Use elements only (name[i], &name[i] for atomics): under the emulator every access is checked.
#ifdef MASKOPS_EMULATE
#define MASKOPS_SHARED(T, name, count) \
  static const char name##_tag = 0;    \
  const ::maskops_emulator::SharedArray<T> name(&name##_tag, #name, count)
#define MASKOPS_DYNAMIC_SHARED(T, name) const ::maskops_emulator::SharedArray<T> name = ::maskops_emulator::dynamic_shared<T>(#name)
#else
#define MASKOPS_SHARED(T, name, count) __shared__ __align__(16) T name[count]
#define MASKOPS_DYNAMIC_SHARED(T, name)                                         \
  extern __shared__ __align__(16) unsigned char maskops_dynamic_shared_bytes[]; \
  T* const name = reinterpret_cast<T*>(maskops_dynamic_shared_bytes)
#endif

// ---------------------------------------------------------------- checks on the device

// MASKOPS_DEVICE_CHECK(condition, exception, function, "text", parts...)
// On a device: a device-side assertion that prints the function's name and the text; the values are left out, because formatting
// them costs local memory. Under the emulator: throws the exception with "function: parts...", the sentence of the CPU backend.
#ifdef MASKOPS_EMULATE
#define MASKOPS_DEVICE_CHECK(condition, exception, function, text, ...) \
  do {                                                                  \
    if (!(condition)) throw exception(::maskops::sentence(function, ": ", __VA_ARGS__)); \
  } while (0)
#else
#define MASKOPS_DEVICE_CHECK(condition, exception, function, text, ...)          \
  do {                                                                           \
    if (!(condition)) ::maskops::device_fail(text, function, __LINE__);          \
  } while (0)
#endif

namespace maskops {

template <typename... Parts>
std::string sentence(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  return text.str();
}

#ifndef MASKOPS_EMULATE
// Not inlined: the call is off the fast path. Kernels that check say __launch_bounds__(threads, blocks): without the second number
// ptxas, which counts the call, prefers a few registers less and spills.
[[noreturn]] static __device__ __noinline__ void device_fail(const char* text, const char* function, int line) {
  __assert_fail(text, "maskops", static_cast<unsigned>(line), function);
}
#endif

// ---------------------------------------------------------------- launch

constexpr std::size_t kMaxSharedBytes = 48 * 1024;  // what every chip gives a block without an opt-in

// Run a kernel. A grid without blocks is no launch. Arguments convert to the kernel's parameter types.
template <typename... Params, typename... Args>
void launch(void (*kernel)(Params...), dim3 grid, dim3 block, std::size_t shared_bytes, cudaStream_t stream, Args&&... args) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
#ifdef MASKOPS_EMULATE
  (void)stream;
  maskops_emulator::launch(kernel, grid, block, shared_bytes, std::forward<Args>(args)...);
#else
  kernel<<<grid, block, shared_bytes, stream>>>(static_cast<Params>(std::forward<Args>(args))...);
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) throw std::runtime_error(sentence("CUDA kernel launch failed: ", cudaGetErrorString(error)));
#endif
}

constexpr std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

// Blocks for `items`, `per_block` each, on grid.x.
inline dim3 grid_for(std::int64_t items, std::int64_t per_block) {
  const std::int64_t blocks = ceil_div(items, per_block);
  if (blocks > 0x7fffffff) throw std::runtime_error(sentence("CUDA kernel launch: ", blocks, " blocks are more than 2^31 - 1"));
  return dim3(static_cast<unsigned>(blocks));
}

// ---------------------------------------------------------------- loads and stores

// W neighbours of type T that move together.
template <typename T, int W>
struct alignas(sizeof(T) * W) Vec {
  T v[W];
};

namespace detail {
template <int Bytes>
struct Word;
template <>
struct Word<1> {
  using type = unsigned char;
};
template <>
struct Word<2> {
  using type = unsigned short;
};
template <>
struct Word<4> {
  using type = unsigned int;
};
template <>
struct Word<8> {
  using type = uint2;
};
template <>
struct Word<16> {
  using type = uint4;
};
}  // namespace detail

// Read-only global load of one element or one Vec, as a single instruction. Never of memory that this kernel writes.
template <typename T>
__device__ __forceinline__ T load(const T* pointer) {
#ifdef MASKOPS_EMULATE
  maskops_emulator::machine().counters.bytes_read += sizeof(T);
  maskops_emulator::check_aligned(pointer, sizeof(T));
  return *pointer;
#else
  using Word = typename detail::Word<sizeof(T)>::type;
  const Word word = __ldg(reinterpret_cast<const Word*>(pointer));
  T value;
  memcpy(&value, &word, sizeof(T));
  return value;
#endif
}

// By value: a reference to one of two values (c ? a : b) would put both of them into local memory.
template <typename T>
__device__ __forceinline__ void store(T* pointer, std::type_identity_t<T> value) {
#ifdef MASKOPS_EMULATE
  maskops_emulator::machine().counters.bytes_written += sizeof(T);
  maskops_emulator::check_aligned(pointer, sizeof(T));
  *pointer = value;
#else
  using Word = typename detail::Word<sizeof(T)>::type;
  Word word;
  memcpy(&word, &value, sizeof(T));
  *reinterpret_cast<Word*>(pointer) = word;
#endif
}

template <int W, typename T>
__device__ __forceinline__ Vec<T, W> load_vec(const T* pointer) {
  return load(reinterpret_cast<const Vec<T, W>*>(pointer));
}

template <int W, typename T>
__device__ __forceinline__ void store_vec(T* pointer, const Vec<T, W>& value) {
  store(reinterpret_cast<Vec<T, W>*>(pointer), value);
}

template <typename T, int W>
__device__ __forceinline__ Vec<T, W> zero_vec() {
  Vec<T, W> value;
#pragma unroll
  for (int i = 0; i < W; ++i) value.v[i] = T(0.0f);
  return value;
}

// Elements in a 16-byte access if every pointer and every extent (row length, strides; in elements) allow it, else 1.
template <typename T>
int vector_width(std::initializer_list<std::int64_t> extents, std::initializer_list<const void*> pointers) {
  std::uintptr_t bits = 0;
  for (std::int64_t extent : extents) bits |= static_cast<std::uintptr_t>(extent * static_cast<std::int64_t>(sizeof(T)));
  for (const void* pointer : pointers) bits |= reinterpret_cast<std::uintptr_t>(pointer);
  return bits % 16 == 0 ? static_cast<int>(16 / sizeof(T)) : 1;
}

// ---------------------------------------------------------------- number types

// Sums are taken in float, in double for double.
template <typename T>
struct Accumulate {
  using type = float;
};
template <>
struct Accumulate<double> {
  using type = double;
};
template <typename T>
using Acc = typename Accumulate<T>::type;

template <typename T>
__host__ __device__ __forceinline__ Acc<T> widen(T value) {
  return static_cast<Acc<T>>(value);
}
template <>
__host__ __device__ __forceinline__ float widen(__nv_bfloat16 value) {
  return __bfloat162float(value);
}
template <>
__host__ __device__ __forceinline__ float widen(__half value) {
  return __half2float(value);
}

template <typename T>
__host__ __device__ __forceinline__ T narrow(Acc<T> value) {
  return static_cast<T>(value);
}
template <>
__host__ __device__ __forceinline__ __nv_bfloat16 narrow<__nv_bfloat16>(float value) {
  return __float2bfloat16_rn(value);
}
template <>
__host__ __device__ __forceinline__ __half narrow<__half>(float value) {
  return __float2half_rn(value);
}

// Division of n < 2^31 by a divisor that is the same for a whole launch: a multiplication and a shift instead of ~20 instructions.
struct FastDivisor {
  std::uint32_t divisor = 1, multiplier = 0, shift = 0;

  FastDivisor() = default;
  explicit FastDivisor(std::int64_t d) : divisor(static_cast<std::uint32_t>(d)) {
    if (d < 1 || d > 0x7fffffff) throw std::runtime_error(sentence("FastDivisor: divisor must be in [1, 2^31), got ", d));
    while ((1ull << shift) < divisor) ++shift;
    multiplier = static_cast<std::uint32_t>(((1ull << 32) * ((1ull << shift) - divisor)) / divisor + 1);
  }
  __device__ __forceinline__ std::uint32_t quotient(std::uint32_t n) const { return (__umulhi(n, multiplier) + n) >> shift; }
  // n becomes the remainder, the quotient is returned.
  __device__ __forceinline__ std::uint32_t split(std::uint32_t& n) const {
    const std::uint32_t q = quotient(n);
    n -= q * divisor;
    return q;
  }
};

}  // namespace maskops
