// Between PyTorch (stable ABI) and the kernels: registration, device and stream, dtype dispatch.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <tuple>

#include "common/check.h"
#include "common/dispatch.h"
#include "common/launch.cuh"

// MASKOPS_CUDA_LIBRARY(m) { m.impl("op", TORCH_BOX(&function)); }   at the bottom of a .cu file
#ifdef MASKOPS_EMULATE
#ifndef MASKOPS_EMULATED_NAMESPACE  // tests register deliberately broken kernels elsewhere
#define MASKOPS_EMULATED_NAMESPACE maskops_emulated
#endif
#define MASKOPS_CUDA_LIBRARY(m) STABLE_TORCH_LIBRARY_IMPL(MASKOPS_EMULATED_NAMESPACE, CPU, m)
#else
#define MASKOPS_CUDA_LIBRARY(m) STABLE_TORCH_LIBRARY_IMPL(maskops, CUDA, m)
#endif

#ifdef MASKOPS_CUDA_ARCHS
// The architectures that the build was made for, for `maskops info`; weak, as every .cu file has it.
extern "C" __attribute__((weak, visibility("default"))) const char* maskops_cuda_archs() { return MASKOPS_CUDA_ARCHS; }
#endif

namespace maskops {

// Makes a tensor's device the current one and finds PyTorch's current stream there.
class DeviceScope {
 public:
#ifdef MASKOPS_EMULATE
  explicit DeviceScope(const Tensor&) {}
#else
  explicit DeviceScope(const Tensor& x) : guard_(x.get_device_index()) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }
#endif
  cudaStream_t stream() const { return stream_; }

 private:
#ifndef MASKOPS_EMULATE
  torch::stable::accelerator::DeviceGuard guard_;
#endif
  cudaStream_t stream_ = nullptr;
};

template <typename T>
T* data(const Tensor& x) {
  return static_cast<T*>(x.mutable_data_ptr());
}

template <typename T>
const T* const_data(const Tensor& x) {
  return static_cast<const T*>(x.const_data_ptr());
}

// One element on the host, for a size that depends on data: waits for the stream.
template <typename T>
T read_back(const T* from, cudaStream_t stream) {
#ifdef MASKOPS_EMULATE
  (void)stream;
  return *from;
#else
  T value;
  cudaError_t error = cudaMemcpyAsync(&value, from, sizeof(T), cudaMemcpyDeviceToHost, stream);
  if (error == cudaSuccess) error = cudaStreamSynchronize(stream);
  if (error != cudaSuccess) throw std::runtime_error(sentence("CUDA copy to the host failed: ", cudaGetErrorString(error)));
  return value;
#endif
}

inline std::optional<Tensor> contiguous(const std::optional<Tensor>& x) {
  return x ? std::optional<Tensor>(torch::stable::contiguous(*x)) : std::nullopt;
}

template <typename T>
const T* const_data_or_null(const std::optional<Tensor>& x) {
  return x ? const_data<T>(*x) : nullptr;
}

template <typename T>
struct Type {
  using type = T;
};

// body(Type<T>{}) for the element type of a dtype that has been checked before.
template <typename Body>
void dispatch_floats(ScalarType type, const Body& body) {
  switch (type) {
    case ScalarType::Float: return body(Type<float>{});
    case ScalarType::Double: return body(Type<double>{});
    case ScalarType::BFloat16: return body(Type<__nv_bfloat16>{});
    case ScalarType::Half: return body(Type<__half>{});
    default: throw std::logic_error("maskops: dtype " + dtype_name(type) + " has no CUDA kernel");
  }
}

// body(std::integral_constant<int, W>) with W elements per access: 16 bytes or one element.
template <typename T, typename Body>
void dispatch_width(int width, const Body& body) {
  if (width == 1) return body(std::integral_constant<int, 1>{});
  body(std::integral_constant<int, static_cast<int>(16 / sizeof(T))>{});
}

}  // namespace maskops
