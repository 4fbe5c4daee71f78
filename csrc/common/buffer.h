// A buffer that begins at a cache line: one allocation for each thread, cut into pieces by the kernels that know their sizes.
#pragma once

#include <cstdlib>
#include <memory>
#include <new>

#include "common/pages.h"

namespace maskops {

class Buffer {
 public:
  explicit Buffer(int64_t bytes)
      : data_(std::aligned_alloc(kAlignment, static_cast<size_t>((bytes + kAlignment) / kAlignment * kAlignment)), &std::free) {
    if (!data_) throw std::bad_alloc();
    prefer_huge_pages(data_.get(), bytes);
  }
  void* get() const { return data_.get(); }

 private:
  static constexpr int64_t kAlignment = 64;
  std::unique_ptr<void, decltype(&std::free)> data_;
};

}  // namespace maskops
