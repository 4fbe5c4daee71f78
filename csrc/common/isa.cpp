// The one copy of the ISA state of this process: detected by CPUID at load, capped by MASKOPS_ISA, changed by set_isa.
#include "isa.h"

#include <atomic>
#include <cstdlib>
#include <string>

#if !defined(MASKOPS_PORTABLE_ONLY) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

enum { kAsFloats, kDot, kAmx };  // the codes of maskops::Bf16Products

// Whether this CPU multiplies tiles of bfloat16, and Linux lets this process: the state of 8 KB is given on request only.
bool has_amx() {
#if !defined(MASKOPS_PORTABLE_ONLY) && defined(__linux__)
  constexpr unsigned kBf16 = 1u << 22, kTiles = 1u << 24, kVbmi2 = 1u << 6;  // the last for vpexpandw
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  unsigned a, b, c, d;
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d) == 0 || (d & kBf16) == 0 || (d & kTiles) == 0 || (c & kVbmi2) == 0) return false;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

bool has_avx512_bf16() {
#ifdef MASKOPS_PORTABLE_ONLY
  return false;
#else
  return __builtin_cpu_supports("avx512bf16");
#endif
}

// __builtin_cpu_supports also asks the operating system (XCR0) whether it saves the wide registers.
int detect() {
#ifdef MASKOPS_PORTABLE_ONLY
  return 0;
#else
  __builtin_cpu_init();  // static initialisers may run before libgcc's own
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("bmi2");
  return !avx2 ? 0 : !avx512 ? 1 : 2;
#endif
}

// One vdpbf16ps does twice the work of a float multiply-add. AMD starts as many of them per cycle; Intel's cores start one every
// second cycle (measured on Sapphire Rapids and newer: 82 against 163 GFLOP/s), so there bfloat16 is widened and multiplied as float.
bool bf16_dot_is_fast() {
#ifdef MASKOPS_PORTABLE_ONLY
  return false;
#else
  return !__builtin_cpu_is("intel");
#endif
}

struct State {
  int best = detect();
  bool has_bf16_dot = best == 2 && has_avx512_bf16();
  bool has_amx = best == 2 && has_bf16_dot && ::has_amx();
  std::atomic<int> bf16_products{has_amx ? kAmx : has_bf16_dot && bf16_dot_is_fast() ? kDot : kAsFloats};
  std::string error;
  std::string features;
  std::atomic<int> in_use{best};

  State() {
    if (const char* word = std::getenv("MASKOPS_ISA"); word != nullptr && *word != '\0') {
      const std::string name = word;
      const int cap = name == "portable" ? 0 : name == "avx2" ? 1 : name == "avx512" ? 2 : -1;
      if (cap < 0) {
        error = "MASKOPS_ISA must be portable, avx2 or avx512, got '" + name + "'";
      } else if (cap < best) {
        in_use = cap;
      }
    }
    list_features();
  }

  void list_features() {
#ifndef MASKOPS_PORTABLE_ONLY
#define MASKOPS_FEATURE(name) \
  if (__builtin_cpu_supports(name)) features += features.empty() ? name : "," name
    MASKOPS_FEATURE("sse4.2");
    MASKOPS_FEATURE("avx");
    MASKOPS_FEATURE("avx2");
    MASKOPS_FEATURE("fma");
    MASKOPS_FEATURE("f16c");
    MASKOPS_FEATURE("bmi2");
    MASKOPS_FEATURE("avx512f");
    MASKOPS_FEATURE("avx512bw");
    MASKOPS_FEATURE("avx512dq");
    MASKOPS_FEATURE("avx512vl");
    MASKOPS_FEATURE("avx512bf16");
#undef MASKOPS_FEATURE
    if (has_amx) features += ",amx_bf16";
#endif
  }
};

// A function-local static: valid whenever the first caller comes, even from another static initialiser.
State& state() {
  static State instance;
  return instance;
}

[[maybe_unused]] const State& read_the_environment_at_load = state();

}  // namespace

MASKOPS_EXPORT int maskops_isa_in_use() { return state().in_use.load(std::memory_order_relaxed); }

MASKOPS_EXPORT int maskops_isa_best() { return state().best; }

MASKOPS_EXPORT int maskops_set_isa(int level) {
  if (level < 0 || level > state().best) return -1;
  state().in_use.store(level, std::memory_order_relaxed);
  return 0;
}

MASKOPS_EXPORT int maskops_bf16_products() { return state().bf16_products.load(std::memory_order_relaxed); }

MASKOPS_EXPORT int maskops_set_bf16_products(int kind) {
  const bool exists = kind == kAsFloats || (kind == kDot && state().has_bf16_dot) || (kind == kAmx && state().has_amx);
  if (!exists) return -1;
  state().bf16_products.store(kind, std::memory_order_relaxed);
  return 0;
}

MASKOPS_EXPORT const char* maskops_cpu_features() { return state().features.c_str(); }

MASKOPS_EXPORT const char* maskops_isa_error() { return state().error.c_str(); }
