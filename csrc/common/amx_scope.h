// The use of the tile registers of AMX by a thread. Only where the library found AMX (use_amx() in isa.h) and Linux gave it to us.
#pragma once

#include <cstdint>

#include "common/isa.h"

#ifndef MASKOPS_PORTABLE_ONLY
namespace maskops {
inline namespace MASKOPS_ISA_NS {

// The registers belong to this thread while one lives; afterwards they cost a switch of threads nothing.
class AmxScope {
 public:
  AmxScope() {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, zeros[14] = {};
      uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } shapes;
    asm volatile("ldtilecfg %0" ::"m"(shapes));
  }
  ~AmxScope() { asm volatile("tilerelease"); }
  AmxScope(const AmxScope&) = delete;
  AmxScope& operator=(const AmxScope&) = delete;
};

}  // namespace MASKOPS_ISA_NS
}  // namespace maskops
#endif
