// Warp operations: every lane named in the mask must come to the same operation with the same mask.
#pragma once

#include <bit>
#include <cstring>
#include <type_traits>

#include "scheduler.h"

namespace maskops_emulator {

enum WarpKind { kSync = 1, kShuffle, kBallot, kReduceAdd, kReduceMin, kReduceMax, kExchange };

inline std::uint64_t combine(int kind, std::uint64_t a, std::uint64_t b) {
  const auto x = static_cast<std::int64_t>(a), y = static_cast<std::int64_t>(b);
  if (kind == kReduceAdd) return a + b;
  return static_cast<std::uint64_t>(kind == kReduceMin ? std::min(x, y) : std::max(x, y));
}

// The last lane of the mask has come: compute what each lane takes away and let all of them go on.
inline void finish_warp(Machine& m, unsigned warp, unsigned mask, int kind) {
  Thread* lanes[32] = {};
  unsigned ballot = 0, live = 0;
  std::uint64_t reduced = 0;
  bool first = true;
  for (unsigned lane = 0; lane < 32 && warp * 32 + lane < m.thread_count; ++lane) {
    Thread* thread = m.threads[warp * 32 + lane].get();
    if (thread->state != State::done) live |= 1u << lane;
    if (!(mask >> lane & 1)) continue;
    lanes[lane] = thread;
    ballot |= thread->warp_value ? 1u << lane : 0u;
    reduced = first ? thread->warp_value : combine(kind, reduced, thread->warp_value);
    first = false;
  }
  for (unsigned lane = 0; lane < 32; ++lane) {
    if (!lanes[lane]) continue;
    if (kind == kShuffle) {
      const int source = lanes[lane]->warp_source;
      if (!lanes[source]) throw KernelFault("a shuffle reads a lane outside its mask in " + place(lanes[lane]->where));
      lanes[lane]->warp_result = lanes[source]->warp_value;
    } else {
      lanes[lane]->warp_result = kind == kBallot ? ballot : reduced;
    }
    lanes[lane]->state = State::ready;
  }
  // Instructions that exchange registers order no accesses of shared memory.
  if (kind != kExchange && (live & ~mask) == 0) ++m.warp_epochs[warp];
}

inline std::uint64_t warp_operation(int kind, unsigned mask, std::uint64_t value, int source, const std::source_location& at) {
  Machine& m = machine();
  Thread& self = *m.current;
  const unsigned warp = self.rank / 32, lane = self.rank % 32;
  const unsigned in_block = std::min(32u, m.thread_count - warp * 32);
  const unsigned exists = in_block == 32 ? 0xffffffffu : (1u << in_block) - 1;
  mask &= exists;  // full masks are allowed in a block whose last warp is not full
  if (!(mask >> lane & 1)) throw KernelFault("a lane is missing in its own mask in " + place(at));
  self.warp_kind = kind;
  self.warp_mask = mask;
  self.warp_value = value;
  self.warp_source = source;
  bool complete = true;
  for (unsigned other = 0; other < 32; ++other) {
    if (!(mask >> other & 1) || other == lane) continue;
    const Thread& thread = *m.threads[warp * 32 + other];
    if (thread.state == State::done)
      throw KernelFault("lane " + std::to_string(other) + " of the mask has exited before the warp operation in " + place(at));
    const bool here = thread.state == State::at_warp;
    const bool same = thread.warp_mask == mask && thread.warp_kind == kind && thread.where.line() == at.line();
    if (here && !same && (thread.warp_mask >> lane & 1))
      throw KernelFault("divergent warp operations: " + place(at) + " and " + place(thread.where));
    complete = complete && here && same;
  }
  self.where = at;
  if (complete) finish_warp(m, warp, mask, kind);
  m.wait(complete ? State::ready : State::at_warp, at);
  return self.warp_result;
}

template <typename T>
T shuffle(unsigned mask, T value, int source, const std::source_location& at) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= 8);
  std::uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = warp_operation(kShuffle, mask, bits, source, at);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

// For instructions of a whole warp: every lane brings an object, and body(peers) runs in every lane with peers[i] = lane i's object.
// The objects live on the stacks of fibers that wait, and nobody leaves before all have read.
template <typename T, typename Body>
void exchange(const T& mine, const std::source_location& at, const Body& body) {
  Machine& m = machine();
  const unsigned first = m.current->rank / 32 * 32;
  if (first + 32 > m.thread_count) throw KernelFault("an instruction of a whole warp in a warp that is not full, in " + place(at));
  const auto bits = reinterpret_cast<std::uint64_t>(&mine);
  warp_operation(kExchange, 0xffffffffu, bits, 0, at);
  const T* peers[32];
  for (unsigned lane = 0; lane < 32; ++lane) peers[lane] = reinterpret_cast<const T*>(m.threads[first + lane]->warp_value);
  body(peers);
  warp_operation(kExchange, 0xffffffffu, bits, 0, at);
}

inline int lane_of_current() { return static_cast<int>(machine().current->rank % 32); }

}  // namespace maskops_emulator

#define MASKOPS_HERE std::source_location at = std::source_location::current()

template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, MASKOPS_HERE) {
  const int base = maskops_emulator::lane_of_current() & ~(width - 1);
  return maskops_emulator::shuffle(mask, value, base + (source & (width - 1)), at);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int flip, int width = 32, MASKOPS_HERE) {
  const int lane = maskops_emulator::lane_of_current(), source = lane ^ flip;
  return maskops_emulator::shuffle(mask, value, source / width > lane / width ? lane : source, at);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, MASKOPS_HERE) {
  const int lane = maskops_emulator::lane_of_current(), source = lane - static_cast<int>(delta);
  return maskops_emulator::shuffle(mask, value, source < (lane & ~(width - 1)) ? lane : source, at);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, MASKOPS_HERE) {
  const int lane = maskops_emulator::lane_of_current(), source = lane + static_cast<int>(delta);
  return maskops_emulator::shuffle(mask, value, source > (lane | (width - 1)) ? lane : source, at);
}
inline void __syncwarp(unsigned mask = 0xffffffffu, MASKOPS_HERE) {
  maskops_emulator::warp_operation(maskops_emulator::kSync, mask, 0, 0, at);
}
inline unsigned __ballot_sync(unsigned mask, int predicate, MASKOPS_HERE) {
  return static_cast<unsigned>(maskops_emulator::warp_operation(maskops_emulator::kBallot, mask, predicate != 0, 0, at));
}
inline int __any_sync(unsigned mask, int predicate, MASKOPS_HERE) { return __ballot_sync(mask, predicate, at) != 0; }
inline int __all_sync(unsigned mask, int predicate, MASKOPS_HERE) { return __ballot_sync(mask, !predicate, at) == 0; }
template <typename T>
T __reduce_add_sync(unsigned mask, T value, MASKOPS_HERE) {
  return static_cast<T>(maskops_emulator::warp_operation(maskops_emulator::kReduceAdd, mask, value, 0, at));
}
template <typename T>
T __reduce_min_sync(unsigned mask, T value, MASKOPS_HERE) {
  return static_cast<T>(maskops_emulator::warp_operation(maskops_emulator::kReduceMin, mask, value, 0, at));
}
template <typename T>
T __reduce_max_sync(unsigned mask, T value, MASKOPS_HERE) {
  return static_cast<T>(maskops_emulator::warp_operation(maskops_emulator::kReduceMax, mask, value, 0, at));
}
#undef MASKOPS_HERE

inline int __popc(unsigned x) { return std::popcount(x); }
inline int __clz(int x) { return std::countl_zero(static_cast<unsigned>(x)); }
inline int __ffs(int x) { return x == 0 ? 0 : std::countr_zero(static_cast<unsigned>(x)) + 1; }
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>((static_cast<std::uint64_t>(a) * b) >> 32); }
