// Huge pages for large results on the CPU.
//
// malloc takes large results fresh from the system each time, and touching them page by page costs more than computing them: the
// first write of 40 MB took 16.6 ms in 4 KiB pages and 2.3 ms in 2 MiB pages, one thread, on the machine of the benchmarks. Where
// transparent huge pages are on request ("madvise", the usual setting of distributions), this is the request.
#pragma once

#include <cstdint>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace maskops {

// Results beyond this size leave the last-level cache before anybody reads them, so kernels write them past it.
constexpr int64_t kStreamBytes = int64_t{24} << 20;

// The whole huge pages inside [data, data + bytes); data is about to be overwritten. A refusal changes nothing but the speed.
inline void prefer_huge_pages(void* data, int64_t bytes) {
#ifdef __linux__
  constexpr uintptr_t kHuge = uintptr_t{2} << 20;
  constexpr int64_t kWorthwhile = int64_t{4} << 20;
  if (bytes < kWorthwhile) return;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kHuge - 1) / kHuge * kHuge;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(bytes)) / kHuge * kHuge;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)data, (void)bytes;
#endif
}

}  // namespace maskops
