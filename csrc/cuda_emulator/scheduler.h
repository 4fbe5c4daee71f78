// The machine: one block at a time, its threads as fibers in a seeded random order, barriers, and the reports of divergence.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <exception>
#include <functional>
#include <memory>
#include <source_location>
#include <sstream>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "fiber.h"

namespace maskops_emulator {

// A fault of a kernel that a real device would not report: divergence, a race, an access outside shared memory.
struct KernelFault : std::runtime_error {
  explicit KernelFault(const std::string& what) : std::runtime_error("CUDA emulator: " + what) {}
};

// Unwinds the fibers that are still waiting when another thread of their block has failed.
struct BlockAborted {};

class Random {  // splitmix64
 public:
  explicit Random(std::uint64_t seed) : state_(seed) {}
  std::uint64_t next() {
    std::uint64_t z = (state_ += 0x9e3779b97f4a7c15ull);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return z ^ (z >> 31);
  }
  std::size_t below(std::size_t bound) { return static_cast<std::size_t>(next() % bound); }

 private:
  std::uint64_t state_;
};

enum class State { ready, at_barrier, at_warp, done };

inline std::string place(const std::source_location& at) {
  std::ostringstream text;
  text << at.file_name() << ":" << at.line() << " (" << at.function_name() << ")";
  return text.str();
}

struct Thread {
  Fiber fiber;
  uint3 thread_index{};
  unsigned rank = 0;  // within the block; lane = rank % 32
  State state = State::done;
  bool inside = false;         // has begun the kernel and not left it: its stack must be unwound if the block fails
  std::source_location where;  // the synchronisation it waits at
  // What it brought to the warp operation that it waits in, and what it takes away.
  unsigned warp_mask = 0;
  int warp_kind = 0;
  int warp_source = 0;
  std::uint64_t warp_value = 0, warp_result = 0;
};

struct Counters {
  std::uint64_t launches = 0, blocks = 0, bytes_read = 0, bytes_written = 0;
};

struct Machine {
  std::vector<std::unique_ptr<Thread>> threads;
  Thread* current = nullptr;
  const std::function<void()>* body = nullptr;
  uint3 block_index{};
  dim3 block_dim{1, 1, 1}, grid_dim{1, 1, 1};
  unsigned thread_count = 0;
  std::uint32_t barrier_epoch = 0;            // counts __syncthreads of this block: accesses in different epochs are ordered
  std::vector<std::uint32_t> warp_epochs;     // counts synchronisations of whole warps
  std::exception_ptr error;
  std::uint64_t seed = 0;
  Counters counters;

  Machine() {
    const char* text = std::getenv("MASKOPS_EMULATOR_SEED");
    seed = text ? std::strtoull(text, nullptr, 10) : 0;
  }

  void run_block(Random& random);
  void wait(State state, const std::source_location& at);
  void fail(std::exception_ptr what) {
    if (!error) error = std::move(what);
  }
  std::string divergence() const;

 private:
  static void thread_main(Fiber& fiber);
  bool release_barrier();
  void abort_waiting();
};

// Never destroyed: a fiber parked in its entry must not lose its stack while other static objects still run.
inline Machine& machine() {
  static Machine* the_machine = new Machine;
  return *the_machine;
}

inline void Machine::thread_main(Fiber& fiber) {
  Machine& m = machine();
  for (;;) {
    Thread& self = *m.current;
    self.inside = true;
    try {
      (*m.body)();
    } catch (const BlockAborted&) {
    } catch (...) {
      m.fail(std::current_exception());
    }
    self.inside = false;
    self.state = State::done;
    fiber.leave();
  }
}

// Called on a fiber: give the processor away until somebody sets this thread ready again.
inline void Machine::wait(State state, const std::source_location& at) {
  Thread& self = *current;
  self.state = state;
  self.where = at;
  self.fiber.leave();
  if (error) throw BlockAborted{};
}

inline void Machine::run_block(Random& random) {
  ++counters.blocks;
  barrier_epoch = 0;
  warp_epochs.assign((thread_count + 31) / 32, 0);
  for (unsigned i = 0; i < thread_count; ++i) {
    threads[i]->state = State::ready;
    threads[i]->fiber.start(&Machine::thread_main);
  }
  std::vector<Thread*> ready;
  for (;;) {
    ready.clear();
    for (unsigned i = 0; i < thread_count; ++i)
      if (threads[i]->state == State::ready) ready.push_back(threads[i].get());
    if (ready.empty() && !release_barrier()) break;
    for (std::size_t left = ready.size(); left > 0; --left) {
      std::swap(ready[left - 1], ready[random.below(left)]);
      current = ready[left - 1];
      current->fiber.resume();
      if (error) {
        abort_waiting();
        std::rethrow_exception(std::exchange(error, nullptr));
      }
    }
  }
}

// No thread can run. True if all of them wait at one and the same barrier; false if the block has ended.
inline bool Machine::release_barrier() {
  unsigned waiting = 0, done = 0;
  for (unsigned i = 0; i < thread_count; ++i) {
    done += threads[i]->state == State::done;
    waiting += threads[i]->state == State::at_barrier && threads[i]->where.line() == threads[0]->where.line() &&
               std::string_view(threads[i]->where.file_name()) == threads[0]->where.file_name();
  }
  if (done == thread_count) return false;
  if (waiting != thread_count) {
    fail(std::make_exception_ptr(KernelFault(divergence())));
    abort_waiting();
    std::rethrow_exception(std::exchange(error, nullptr));
  }
  ++barrier_epoch;
  for (unsigned i = 0; i < thread_count; ++i) threads[i]->state = State::ready;
  return true;
}

inline void Machine::abort_waiting() {
  for (unsigned i = 0; i < thread_count; ++i) {
    // A thread that has not begun has nothing to unwind, and entering it would run the kernel.
    if (threads[i]->inside) {
      current = threads[i].get();
      current->fiber.resume();
    }
    threads[i]->state = State::done;
  }
}

inline std::string Machine::divergence() const {
  std::vector<std::pair<std::string, unsigned>> groups;
  for (unsigned i = 0; i < thread_count; ++i) {
    const Thread& thread = *threads[i];
    std::string group = "have exited";
    if (thread.state == State::at_barrier) group = "wait at __syncthreads in " + place(thread.where);
    if (thread.state == State::at_warp) group = "wait at a warp operation in " + place(thread.where);
    auto found = std::find_if(groups.begin(), groups.end(), [&](const auto& g) { return g.first == group; });
    if (found == groups.end())
      groups.emplace_back(group, 1);
    else
      ++found->second;
  }
  std::ostringstream text;
  text << "divergent barrier in block (" << block_index.x << ", " << block_index.y << ", " << block_index.z << "):";
  for (const auto& [group, count] : groups) text << " " << count << " of " << thread_count << " threads " << group << ";";
  return text.str();
}

}  // namespace maskops_emulator

inline void __syncthreads(std::source_location at = std::source_location::current()) {
  maskops_emulator::machine().wait(maskops_emulator::State::at_barrier, at);
}
inline void __threadfence() {}
inline void __threadfence_block() {}

extern "C" {
__attribute__((used, visibility("default"))) inline void maskops_emulator_set_seed(unsigned long long seed) {
  maskops_emulator::machine().seed = seed;
}
// which: 0 kernel launches, 1 blocks, 2 global bytes read, 3 global bytes written (through load/store of launch.cuh), since the start.
__attribute__((used, visibility("default"))) inline unsigned long long maskops_emulator_counter(int which) {
  const auto& c = maskops_emulator::machine().counters;
  return which == 0 ? c.launches : which == 1 ? c.blocks : which == 2 ? c.bytes_read : c.bytes_written;
}
}
