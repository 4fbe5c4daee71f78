// What the op functions of block-masked layers share: dense images as rows [B, H, W, C], the list of active cells, the zeros of others.
#pragma once

#if MASKOPS_ISA_LEVEL == 0
#include <algorithm>
#include <cstring>
#include <vector>

#ifdef __SSE2__
#include <emmintrin.h>
#endif

#include "common/check.h"
#include "common/parallel.h"

namespace maskops {

// [B, C, H, W] as [B, H, W, C]: a view of channels_last memory, else a copy.
inline Tensor as_rows(const Tensor& x) {
  return contiguous_or_copy(torch::stable::transpose(torch::stable::transpose(x, 1, 3), 1, 2));
}
// A new [B, C, H, W] in channels_last memory: no view, as what follows may write in place.
inline Tensor empty_images(const Tensor& like, int64_t B, int64_t C, int64_t H, int64_t W, ScalarType type) {
  return with_huge_pages(torch::stable::empty({B, C, H, W}, type, std::nullopt, like.device(), std::nullopt,
                                              torch::headeronly::MemoryFormat::ChannelsLast));
}
inline Tensor empty_images(const Tensor& like, int64_t B, int64_t C, int64_t H, int64_t W) {
  return empty_images(like, B, C, H, W, like.scalar_type());
}

// Past the caches where `far`: nobody is to read it soon.
inline void fill_bytes(char* to, int byte, int64_t count, [[maybe_unused]] bool far) {
#ifdef __SSE2__
  if (far) {
    const int64_t begin = std::min<int64_t>(count, -reinterpret_cast<intptr_t>(to) & 63), lines = (count - begin) / 64;
    std::memset(to, byte, static_cast<size_t>(begin));
    const __m128i value = _mm_set1_epi8(static_cast<char>(byte));
    auto* at = reinterpret_cast<__m128i*>(to + begin);
    for (int64_t i = 0; i < 4 * lines; ++i) _mm_stream_si128(at + i, value);
    to += begin + lines * 64, count -= begin + lines * 64;
  }
#endif
  std::memset(to, byte, static_cast<size_t>(count));
}

struct Cells {
  Tensor mask;                  // [B, h, w], contiguous
  const bool* data;
  int64_t B, h, w;
  std::vector<int32_t> active;  // numbers of the active ones, ascending

  explicit Cells(const Tensor& any)
      : mask(contiguous_or_copy(any)), data(static_cast<const bool*>(mask.const_data_ptr())), B(any.size(0)), h(any.size(1)), w(any.size(2)) {
    for (int64_t i = 0; i < B * h * w; ++i) {
      if (data[i]) active.push_back(static_cast<int32_t>(i));
    }
  }
  static constexpr int64_t kFarBytes = 4 << 20;
  int64_t count() const { return static_cast<int64_t>(active.size()); }

  // Zeros (or bytes) into the hidden cells of images in channels_last memory.
  void clear_hidden(Tensor& x, int byte = 0) const {
    const int64_t H = x.size(2), ch = H / h, run = x.size(3) / w * x.size(1) * static_cast<int64_t>(x.element_size());
    char* to = static_cast<char*>(x.mutable_data_ptr());
    if (run == 0) return;
    const bool far = B * H * w * run >= kFarBytes;
    parallel_for(B * H, w * run, [&](int64_t begin, int64_t end) {
      for (int64_t line = begin; line < end; ++line) {
        const bool* seen = data + (line / H * h + line % H / ch) * w;
        char* at = to + line * w * run;
        for (int64_t i = 0; i < w;) {
          int64_t j = i;
          while (j < w && !seen[j]) ++j;
          fill_bytes(at + i * run, byte, (j - i) * run, far);
          i = j + 1;
        }
      }
#ifdef __SSE2__
      if (far) _mm_sfence();
#endif
    });
  }
};

}  // namespace maskops
#endif
