// The Python module maskops._host: build facts, CPU features, the choice of instruction set and the measured roofs of this
// machine. It names no op. The state of the instruction set lives in the library _C beside this module, looked up on first use.
#include <dlfcn.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "common/amx_scope.h"

#if defined(__x86_64__)
#include <immintrin.h>
#define TARGET(features) __attribute__((target(features)))
#endif

namespace py = pybind11;

namespace {

// ---- the library _C

struct Library {
  int (*isa_in_use)() = nullptr;
  int (*isa_best)() = nullptr;
  int (*set_isa)(int) = nullptr;
  const char* (*cpu_features)() = nullptr;
  const char* (*isa_error)() = nullptr;
};

Library library;

template <class Function>
void look_up(void* handle, const char* name, Function& to) {
  to = reinterpret_cast<Function>(dlsym(handle, name));
  if (to == nullptr) throw std::runtime_error(std::string("maskops._host: the library has no function ") + name);
}

void attach(const std::string& path) {
  void* handle = dlopen(path.c_str(), RTLD_NOW | RTLD_NOLOAD);  // the copy that torch loaded, never a second one
  if (handle == nullptr) throw std::runtime_error("maskops._host: " + path + " is not loaded");
  Library found;
  look_up(handle, "maskops_isa_in_use", found.isa_in_use);
  look_up(handle, "maskops_isa_best", found.isa_best);
  look_up(handle, "maskops_set_isa", found.set_isa);
  look_up(handle, "maskops_cpu_features", found.cpu_features);
  look_up(handle, "maskops_isa_error", found.isa_error);
  library = found;
  if (const std::string error = library.isa_error(); !error.empty()) throw py::value_error(error);
}

// _C.so in the folder of this module, unless attach() named another one before.
const Library& attached() {
  if (library.isa_in_use == nullptr) {
    Dl_info self{};
    if (dladdr(reinterpret_cast<void*>(&attach), &self) == 0) throw std::runtime_error("maskops._host: cannot find its own folder");
    const std::string file = self.dli_fname;
    attach(file.substr(0, file.rfind('/') + 1) + "_C.so");
  }
  return library;
}

constexpr const char* kIsaNames[] = {"portable", "avx2", "avx512"};

std::string isa_in_use() { return kIsaNames[attached().isa_in_use()]; }

void set_isa(const std::string& name) {
  for (int level = 0; level < 3; ++level) {
    if (name != kIsaNames[level]) continue;
    if (attached().set_isa(level) == 0) return;
    throw py::value_error("set_isa: name must be at most " + std::string(kIsaNames[attached().isa_best()]) + " on this CPU, got " + name);
  }
  throw py::value_error("set_isa: name must be portable, avx2 or avx512, got " + name);
}

py::dict build_info() {
  py::dict info;
#if defined(__clang__)
  info["compiler"] = "clang " __clang_version__;
#else
  info["compiler"] = "gcc " __VERSION__;
#endif
  info["cplusplus"] = static_cast<long>(__cplusplus);
#if defined(__x86_64__)
  info["architecture"] = "x86_64";
#elif defined(__aarch64__)
  info["architecture"] = "aarch64";
#else
  info["architecture"] = "other";
#endif
#if defined(__OPTIMIZE__)
  info["optimised"] = true;
#else
  info["optimised"] = false;
#endif
  info["pybind11"] = std::to_string(PYBIND11_VERSION_MAJOR) + "." + std::to_string(PYBIND11_VERSION_MINOR);
  return info;
}

// ---- roofs: independent multiply-add chains, and a copy that is out of every cache

double seconds() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

constexpr int kChains = 12;  // covers the latency of two multiply-add pipes
volatile float sink;

// Each returns the flops of `rounds` rounds. Factors keep the sums bounded, so no subnormal slows the loop.
#define FMA_CHAINS(NAME, FEATURES, VECTOR, ALL, STEP, FIRST, FLOPS)      \
  FEATURES double NAME(int64_t rounds) {                                 \
    VECTOR sum[kChains];                                                 \
    for (int i = 0; i < kChains; ++i) sum[i] = ALL(0.1f * float(i));     \
    for (int64_t r = 0; r < rounds; ++r) {                               \
      _Pragma("GCC unroll 12") for (int i = 0; i < kChains; ++i) STEP;   \
    }                                                                    \
    float total = 0;                                                     \
    for (int i = 0; i < kChains; ++i) total += FIRST(sum[i]);            \
    sink = total;                                                        \
    return double(rounds) * kChains * FLOPS;                             \
  }

typedef float Four __attribute__((vector_size(16)));
inline Four all_four(float x) { return Four{x, x, x, x}; }
inline float first_of_four(Four x) { return x[0]; }
FMA_CHAINS(chains_portable, , Four, all_four, sum[i] = sum[i] * all_four(0.999f) + all_four(0.5f), first_of_four, 8)
#if defined(__x86_64__)
FMA_CHAINS(chains_avx2, TARGET("avx2,fma"), __m256, _mm256_set1_ps,
           sum[i] = _mm256_fmadd_ps(sum[i], _mm256_set1_ps(0.999f), _mm256_set1_ps(0.5f)), _mm256_cvtss_f32, 16)
FMA_CHAINS(chains_avx512, TARGET("avx512f"), __m512, _mm512_set1_ps,
           sum[i] = _mm512_fmadd_ps(sum[i], _mm512_set1_ps(0.999f), _mm512_set1_ps(0.5f)), _mm512_cvtss_f32, 32)
FMA_CHAINS(chains_bf16, TARGET("avx512f,avx512bf16"), __m512, _mm512_set1_ps,
           sum[i] = _mm512_dpbf16_ps(sum[i], __m512bh(_mm512_set1_epi32(0x3f803f80)), __m512bh(_mm512_set1_epi32(0x3f80bf80))),
           _mm512_cvtss_f32, 64)

// Four tile registers of sums.
double chains_amx(int64_t rounds) {
  const maskops::AmxScope scope;
  for (int64_t r = 0; r < rounds; ++r) {
    asm volatile(
        "tdpbf16ps %tmm6, %tmm4, %tmm0\n\ttdpbf16ps %tmm7, %tmm4, %tmm1\n\t"
        "tdpbf16ps %tmm6, %tmm5, %tmm2\n\ttdpbf16ps %tmm7, %tmm5, %tmm3");
  }
  return double(rounds) * 4 * 16384;
}
#endif

// Best rate in 1e9 per second over `repeats`: all threads run work(thread), which returns what it did.
template <class Work>
double best_rate(int threads, int repeats, const Work& work) {
  double best = 0;
  for (int repeat = 0; repeat < repeats; ++repeat) {
    std::vector<double> done(threads);
    std::vector<std::thread> pool;
    const double start = seconds();
    for (int t = 1; t < threads; ++t) pool.emplace_back([&, t] { done[t] = work(t); });
    done[0] = work(0);
    for (std::thread& thread : pool) thread.join();
    const double took = seconds() - start;
    double total = 0;
    for (double one : done) total += one;
    best = std::max(best, total / took * 1e-9);
  }
  return best;
}

void copy_plain(const char* from, char* to, size_t bytes) { std::copy(from, from + bytes, to); }
#if defined(__x86_64__)
TARGET("avx2") void copy_avx2(const char* from, char* to, size_t bytes) {
  for (size_t i = 0; i < bytes; i += 32) {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to + i), _mm256_load_si256(reinterpret_cast<const __m256i*>(from + i)));
  }
  _mm_sfence();
}
TARGET("avx512f") void copy_avx512(const char* from, char* to, size_t bytes) {
  for (size_t i = 0; i < bytes; i += 64) _mm512_stream_si512(reinterpret_cast<__m512i*>(to + i), _mm512_load_si512(from + i));
  _mm_sfence();
}
#endif

// Bytes read plus bytes written per second, from one 256 MiB buffer to another.
double copy_rate(int threads, void (*copy)(const char*, char*, size_t)) {
  constexpr size_t kBytes = size_t{256} << 20;
  auto allocate = [] { return std::unique_ptr<char, decltype(&std::free)>(static_cast<char*>(std::aligned_alloc(4096, kBytes)), &std::free); };
  const auto from = allocate(), to = allocate();
  if (!from || !to) throw std::bad_alloc();
  std::fill_n(from.get(), kBytes, char{1});
  std::fill_n(to.get(), kBytes, char{0});  // the first touch of a page is not part of the copy
  const size_t share = kBytes / size_t(threads) / 4096 * 4096;
  return best_rate(threads, 7, [&](int t) {
    copy(from.get() + size_t(t) * share, to.get() + size_t(t) * share, share);
    return 2.0 * double(share);
  });
}

py::dict measure_roofs(int threads) {
  if (threads < 1 || threads > 4096) throw py::value_error("measure_roofs: threads must be in [1, 4096], got " + std::to_string(threads));
  constexpr int64_t kRounds = 8'000'000;  // about 12 ms
  double (*fp32)(int64_t) = chains_portable;
  double (*bf16)(int64_t) = nullptr;
  void (*copy)(const char*, char*, size_t) = copy_plain;
#if defined(__x86_64__)
  // What the machine can do, whatever set_isa or MASKOPS_ISA chose.
  if (__builtin_cpu_supports("avx512f")) {
    fp32 = chains_avx512, copy = copy_avx512;
    if (__builtin_cpu_supports("avx512bf16")) bf16 = chains_bf16;
  } else if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    fp32 = chains_avx2, copy = copy_avx2;
  }
#endif
  int64_t rounds_bf16 = kRounds;
#if defined(__x86_64__)
  try {
    attached();
  } catch (const std::exception&) {  // an installation without _C measures what needs no permission
  }
  if (library.cpu_features != nullptr && std::string(library.cpu_features()).find("amx_bf16") != std::string::npos) {
    bf16 = chains_amx, rounds_bf16 = kRounds / 32;
  }
#endif
  py::dict roofs;
  double fp32_rate, bf16_rate, copy_gbps;
  {
    py::gil_scoped_release release;
    fp32_rate = best_rate(threads, 9, [&](int) { return fp32(kRounds); });
    bf16_rate = bf16 ? best_rate(threads, 9, [&](int) { return bf16(rounds_bf16); }) : fp32_rate;
    copy_gbps = copy_rate(threads, copy);
  }
  roofs["roof_gflops_fp32"] = fp32_rate;
  roofs["roof_gflops_bf16"] = bf16_rate;
  roofs["roof_copy_gbps"] = copy_gbps;
  return roofs;
}

}  // namespace

PYBIND11_MODULE(_host, m) {
  m.doc() = "Build facts, CPU features, instruction-set choice and measured machine roofs.";
  m.def("attach", &attach, py::arg("path"), "Use this loaded copy of _C instead of the one beside the module.");
  m.def("isa_in_use", &isa_in_use, "portable, avx2 or avx512.");
  m.def("isa_best", [] { return std::string(kIsaNames[attached().isa_best()]); }, "The widest that this CPU has.");
  m.def("set_isa", &set_isa, py::arg("name"), "Use this instruction set from now on, in every thread.");
  m.def("cpu_features", [] { return std::string(attached().cpu_features()); }, "Comma separated.");
  m.def("build_info", &build_info, "Compiler and target of this build.");
  m.def("measure_roofs", &measure_roofs, py::arg("threads"), "Fastest multiply-adds and copy of this machine; takes about 2 s.");
}
