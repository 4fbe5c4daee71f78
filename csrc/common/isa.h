// Run-time choice of the instruction set of the CPU kernels.
//
// Every source under csrc/cpu is compiled once per level with -DMASKOPS_ISA_LEVEL=0|1|2. Kernels live in the namespace
// of their level, so that no inline function compiled for AVX-512 can be linked into the portable path. Levels 1 and 2
// exist on x86-64 only; define MASKOPS_PORTABLE_ONLY where the build leaves them out.
#pragma once

#ifndef MASKOPS_ISA_LEVEL
#define MASKOPS_ISA_LEVEL 0
#endif

#if MASKOPS_ISA_LEVEL == 0
#define MASKOPS_ISA_NS isa_portable
#elif MASKOPS_ISA_LEVEL == 1
#define MASKOPS_ISA_NS isa_avx2
#elif MASKOPS_ISA_LEVEL == 2
#define MASKOPS_ISA_NS isa_avx512
#else
#error "MASKOPS_ISA_LEVEL must be 0, 1 or 2"
#endif

#if !defined(__x86_64__) && !defined(MASKOPS_PORTABLE_ONLY)
#define MASKOPS_PORTABLE_ONLY
#endif

#define MASKOPS_EXPORT extern "C" __attribute__((visibility("default")))

// The C interface of the library _C, also reached from maskops._host and from ctypes.
MASKOPS_EXPORT int maskops_isa_in_use();            // 0 portable, 1 AVX2 + FMA + F16C, 2 AVX-512 (F, BW, DQ, VL) + BMI2
MASKOPS_EXPORT int maskops_isa_best();              // the highest level that this CPU and this build have
MASKOPS_EXPORT int maskops_set_isa(int level);      // 0 on success, -1 when the level is not available
MASKOPS_EXPORT int maskops_bf16_products();          // how level 2 multiplies bfloat16: 0 as floats, 1 vdpbf16ps, 2 AMX
MASKOPS_EXPORT int maskops_set_bf16_products(int kind);  // 0 on success, -1 when this CPU has not got it
MASKOPS_EXPORT const char* maskops_cpu_features();  // comma separated
MASKOPS_EXPORT const char* maskops_isa_error();     // "" or what is wrong with the environment variable MASKOPS_ISA

namespace maskops {

inline namespace MASKOPS_ISA_NS {}  // made inline by its first mention; the macros below may then reopen it

inline int isa_in_use() { return maskops_isa_in_use(); }

// How bfloat16 is multiplied, where a kernel has that path: as floats, by vdpbf16ps, in AMX tiles. Below level 2 as floats. Dot only
// where it is the fast way on this CPU, or set_bf16_products asked for it.
enum class Bf16Products : int { kFloats = 0, kDot = 1, kAmx = 2 };
inline Bf16Products bf16_products() {
  return maskops_isa_in_use() == 2 ? static_cast<Bf16Products>(maskops_bf16_products()) : Bf16Products::kFloats;
}
inline bool use_bf16_dot() { return bf16_products() == Bf16Products::kDot; }
inline bool use_amx() { return bf16_products() == Bf16Products::kAmx; }

}  // namespace maskops

// A family's kernels are a struct of function pointers, say GatherKernels. In a header:
//     struct GatherKernels { void (*forward)(...); };
//     MASKOPS_DECLARE_KERNELS(GatherKernels)          // inside namespace maskops
// in the source, once per level:
//     namespace MASKOPS_ISA_NS { extern const GatherKernels GatherKernels_table{&forward}; }
// and in the part compiled at level 0 only: `pick_GatherKernels().forward(...)`.
#ifdef MASKOPS_PORTABLE_ONLY
#define MASKOPS_DECLARE_KERNELS(TABLE)                            \
  namespace isa_portable {                                        \
  extern const TABLE TABLE##_table;                               \
  }                                                               \
  static inline const TABLE& pick_##TABLE() { return isa_portable::TABLE##_table; }
#else
#define MASKOPS_DECLARE_KERNELS(TABLE)                            \
  namespace isa_portable {                                        \
  extern const TABLE TABLE##_table;                               \
  }                                                               \
  namespace isa_avx2 {                                            \
  extern const TABLE TABLE##_table;                               \
  }                                                               \
  namespace isa_avx512 {                                          \
  extern const TABLE TABLE##_table;                               \
  }                                                               \
  static inline const TABLE& pick_##TABLE() {                     \
    const int level = ::maskops::isa_in_use();                    \
    return level == 2   ? isa_avx512::TABLE##_table               \
           : level == 1 ? isa_avx2::TABLE##_table                 \
                        : isa_portable::TABLE##_table;            \
  }
#endif
