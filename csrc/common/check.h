// Checks of arguments, with one wording per error: maskops/_checks.py says the same sentences.
// std::invalid_argument reaches Python as ValueError, std::out_of_range as IndexError.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

#include "common/pages.h"

namespace maskops {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kAny = INT64_MIN;  // a size that may be anything
inline constexpr std::initializer_list<ScalarType> kFloats = {
    ScalarType::Float, ScalarType::Double, ScalarType::BFloat16, ScalarType::Half};
inline constexpr std::initializer_list<ScalarType> kInt64 = {ScalarType::Long};
inline constexpr std::initializer_list<ScalarType> kInt32 = {ScalarType::Int};
inline constexpr std::initializer_list<ScalarType> kBool = {ScalarType::Bool};

inline std::string dtype_name(ScalarType type) {
  switch (type) {
    case ScalarType::Float: return "float32";
    case ScalarType::Double: return "float64";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Half: return "float16";
    case ScalarType::Long: return "int64";
    case ScalarType::Int: return "int32";
    case ScalarType::Short: return "int16";
    case ScalarType::Char: return "int8";
    case ScalarType::Byte: return "uint8";
    case ScalarType::Bool: return "bool";
    case ScalarType::UInt16: return "uint16";
    case ScalarType::UInt32: return "uint32";
    case ScalarType::UInt64: return "uint64";
    case ScalarType::ComplexHalf: return "complex32";
    case ScalarType::ComplexFloat: return "complex64";
    case ScalarType::ComplexDouble: return "complex128";
    case ScalarType::Float8_e5m2: return "float8_e5m2";
    case ScalarType::Float8_e4m3fn: return "float8_e4m3fn";
    case ScalarType::Float8_e5m2fnuz: return "float8_e5m2fnuz";
    case ScalarType::Float8_e4m3fnuz: return "float8_e4m3fnuz";
    default: return "another dtype";
  }
}

template <class Sizes>
std::string join_sizes(const Sizes& sizes) {
  std::ostringstream text;
  text << "[";
  bool first = true;
  for (int64_t size : sizes) {
    if (!first) text << ", ";
    first = false;
    if (size == kAny) text << "*";
    else text << size;
  }
  text << "]";
  return text.str();
}

inline std::string describe(const Tensor& x) { return dtype_name(x.scalar_type()) + " " + join_sizes(x.sizes()); }

inline std::string plain_number(double x) {
  std::ostringstream text;
  text << x;  // as Python's :g
  return text.str();
}

template <class Got>
[[noreturn]] void fail(const char* op, const std::string& arg, const std::string& expected, const Got& got) {
  std::ostringstream text;
  text << op << ": " << arg << " must " << expected << ", got " << got;
  throw std::invalid_argument(text.str());
}

[[noreturn]] inline void fail_index(const char* op, const std::string& at, const std::string& expected, const std::string& got) {
  throw std::out_of_range(std::string(op) + ": " + at + " must " + expected + ", got " + got);
}

inline std::string device_name(const Tensor& x) {
  if (x.is_cpu()) return "cpu";
  return "cuda:" + std::to_string(static_cast<int>(x.get_device_index()));
}

// One sentence for a wrong dtype, rank, size or device. shape: the sizes in words, "[B, N, D]".
inline void check_tensor(const char* op, const char* arg, const Tensor& x, const char* shape,
                         std::initializer_list<ScalarType> dtypes, std::initializer_list<int64_t> sizes, const Tensor& like) {
  // Sentences are put together only for an argument that is wrong: a good one costs a few comparisons.
  const ScalarType type = x.scalar_type();
  bool known = false;
  for (ScalarType candidate : dtypes) known = known || type == candidate;
  if (!known) {
    std::string names;
    for (ScalarType candidate : dtypes) names += (names.empty() ? "" : " or ") + dtype_name(candidate);
    fail(op, arg, "be " + names + " " + shape, describe(x));
  }
  bool fits = x.dim() == static_cast<int64_t>(sizes.size());
  int64_t axis = 0;
  for (int64_t size : sizes) {
    if (fits && size != kAny && x.size(axis) != size) fits = false;
    ++axis;
  }
  if (!fits) fail(op, arg, std::string("have shape ") + shape + " = " + join_sizes(sizes), describe(x));
  if (x.is_cpu() && like.is_cpu()) return;
  if (device_name(x) != device_name(like)) fail(op, arg, "be on " + device_name(like), "a tensor on " + device_name(x));
}

// torch's own contiguous() goes through the dispatcher even where there is nothing to do.
inline Tensor contiguous_or_copy(const Tensor& x) { return x.is_contiguous() ? x : torch::stable::contiguous(x); }

// A tensor whose last axis is contiguous: itself, or a copy. Kernels then read rows in place through their strides.
inline Tensor with_contiguous_rows(const Tensor& x) {
  const int64_t last = x.dim() - 1;
  return x.dim() == 0 || x.size(last) <= 1 || x.stride(last) == 1 ? x : torch::stable::contiguous(x);
}

// A result that is about to be written in full.
inline Tensor with_huge_pages(Tensor x) {
  if (x.is_cpu()) prefer_huge_pages(x.mutable_data_ptr(), x.numel() * static_cast<int64_t>(x.element_size()));
  return x;
}

// torch::stable::new_empty looks its operator up by name, which takes longer than to allocate.
inline Tensor empty_like_device(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType type) {
  constexpr int64_t kMostAxes = 8;
  const int64_t axes = static_cast<int64_t>(sizes.size());
  if (axes > kMostAxes) throw std::logic_error("empty_like_device: more than 8 axes");
  int64_t strides[kMostAxes], stride = 1;
  for (int64_t axis = axes - 1; axis >= 0; --axis) {
    strides[axis] = stride;
    stride *= std::max<int64_t>(sizes.begin()[axis], 1);
  }
  int32_t device = 0, index = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &index));
  AtenTensorHandle made = nullptr;
  const int32_t dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(axes, sizes.begin(), strides, dtype, device, index, &made));
  return with_huge_pages(Tensor(made));
}

inline Tensor empty_like_device(const Tensor& like, std::initializer_list<int64_t> sizes) {
  return empty_like_device(like, sizes, like.scalar_type());
}

}  // namespace maskops
