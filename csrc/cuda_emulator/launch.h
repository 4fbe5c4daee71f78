// Emulated launch: checks the limits that every supported chip has, then runs the blocks in a random order.
#pragma once

#include <mutex>
#include <numeric>
#include <tuple>
#include <utility>

#include "scheduler.h"
#include "shared.h"

namespace maskops_emulator {

inline void check_limits(dim3 grid, dim3 block, std::size_t shared) {
  const auto threads = static_cast<std::uint64_t>(block.x) * block.y * block.z;
  if (threads == 0 || threads > 1024 || block.z > 64)
    throw KernelFault("a block of " + std::to_string(threads) + " threads cannot be launched, 1 to 1024 can");
  if (grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535)
    throw KernelFault("a grid must be at most 2^31 - 1 by 65535 by 65535 blocks");
  if (shared > kSharedBytes)
    throw KernelFault("dynamic shared memory: " + std::to_string(shared) + " bytes are more than " + std::to_string(kSharedBytes));
}

// A vector access that is not aligned is a fault on a device, and silently works on a CPU.
inline void check_aligned(const void* pointer, std::size_t bytes) {
  if (reinterpret_cast<std::uintptr_t>(pointer) % bytes)
    throw KernelFault("a global access of " + std::to_string(bytes) + " bytes is not aligned");
}

inline void set_block(Machine& m, dim3 grid, dim3 block) {
  m.grid_dim = grid;
  m.block_dim = block;
  m.thread_count = block.x * block.y * block.z;
  while (m.threads.size() < m.thread_count) m.threads.push_back(std::make_unique<Thread>());
  for (unsigned i = 0; i < m.thread_count; ++i) {
    m.threads[i]->rank = i;
    m.threads[i]->thread_index = {i % block.x, i / block.x % block.y, i / (block.x * block.y)};
  }
}

inline void run(dim3 grid, dim3 block, std::size_t shared, const std::function<void()>& body) {
  check_limits(grid, block, shared);
  // One kernel at a time: the fibers and the shared memory belong to one machine.
  static std::mutex lock;
  std::lock_guard<std::mutex> guard(lock);
  Machine& m = machine();
  Random random(m.seed ^ (m.counters.launches++ * 0x2545f4914f6cdd1dull));
  set_block(m, grid, block);
  m.body = &body;
  std::vector<std::uint64_t> order(static_cast<std::uint64_t>(grid.x) * grid.y * grid.z);
  std::iota(order.begin(), order.end(), 0);
  for (std::size_t left = order.size(); left > 0; --left) {
    std::swap(order[left - 1], order[random.below(left)]);
    const std::uint64_t index = order[left - 1];
    m.block_index = {static_cast<unsigned>(index % grid.x), static_cast<unsigned>(index / grid.x % grid.y),
                     static_cast<unsigned>(index / (static_cast<std::uint64_t>(grid.x) * grid.y))};
    shared_memory().begin_block(shared);
    m.run_block(random);
  }
}

template <typename... Params, typename... Args>
void launch(void (*kernel)(Params...), dim3 grid, dim3 block, std::size_t shared, Args&&... args) {
  const std::tuple<Params...> values(std::forward<Args>(args)...);
  run(grid, block, shared, [&] { std::apply(kernel, values); });
}

}  // namespace maskops_emulator
