// Shared memory with a memory: bounds checked on every access, poisoned before every block, races found.
//
// Two accesses of one element by different threads conflict if one of them writes and no barrier lies between them: neither a
// __syncthreads nor, within a warp, an operation of all live lanes. Conflicts are found in every order of the threads, because the
// check asks for a barrier and not for a wrong value.
#pragma once

#include <cstring>
#include <memory>
#include <vector>

#include "scheduler.h"

namespace maskops_emulator {

constexpr std::size_t kSharedBytes = 48 * 1024;  // what every chip gives without an opt-in

struct Access {
  std::uint32_t block_epoch = 0, warp_epoch = 0;
  int thread = -1;
  bool atomic = false;
};

struct History {
  Access write;
  std::vector<Access> reads;  // one per thread and warp epoch since the last barrier of the block
};

struct SharedBlock {
  const void* tag = nullptr;
  const char* name = "";
  std::unique_ptr<unsigned char[]> bytes;  // of its own allocation, so that AddressSanitizer guards both ends
  std::size_t count = 0, element = 0;
  std::vector<History> history;
};

struct SharedMemory {
  std::vector<SharedBlock> blocks;
  std::size_t dynamic_bytes = 0, used = 0;

  void begin_block(std::size_t dynamic) {
    blocks.clear();
    dynamic_bytes = used = dynamic;
  }

  SharedBlock& find(const void* tag, const char* name, std::size_t count, std::size_t element) {
    for (auto& block : blocks)
      if (block.tag == tag) return block;
    if (tag) used += count * element;
    if (used > kSharedBytes)
      throw KernelFault("shared memory: " + std::to_string(used) + " bytes are more than " + std::to_string(kSharedBytes));
    // A SharedBlock may move when the vector grows: handles refer to it by index.
    blocks.push_back({tag, name, std::make_unique<unsigned char[]>(count * element), count, element, {}});
    auto& block = blocks.back();
    std::memset(block.bytes.get(), 0xff, count * element);  // NaN as float, -1 as integer
    block.history.resize(count);
    return block;
  }
};

inline SharedMemory& shared_memory() {
  static SharedMemory* memory = new SharedMemory;
  return *memory;
}

// Ordered: same thread, another block epoch, or a synchronisation of their common warp in between.
inline bool conflicts(const Access& before, const Access& now) {
  if (before.thread < 0 || before.thread == now.thread || before.block_epoch != now.block_epoch) return false;
  if (before.atomic && now.atomic) return false;
  return before.thread / 32 != now.thread / 32 || before.warp_epoch == now.warp_epoch;
}

inline void record(SharedBlock& block, std::size_t index, bool writes, bool atomic) {
  Machine& m = machine();
  const int thread = static_cast<int>(m.current->rank);
  const Access now{m.barrier_epoch, m.warp_epochs[m.current->rank / 32], thread, atomic};
  History& history = block.history[index];
  const Access* other = conflicts(history.write, now) ? &history.write : nullptr;
  if (!history.reads.empty() && history.reads.front().block_epoch != now.block_epoch) history.reads.clear();
  if (writes)
    for (const Access& read : history.reads)
      if (conflicts(read, now)) other = &read;
  if (other)
    throw KernelFault("race on shared memory " + std::string(block.name) + "[" + std::to_string(index) + "]: threads " +
                      std::to_string(other->thread) + " and " + std::to_string(thread) + ", no barrier in between");
  if (writes)
    history.write = now;
  else if (history.reads.empty() || history.reads.back().thread != thread || history.reads.back().warp_epoch != now.warp_epoch)
    history.reads.push_back(now);
}

template <typename T>
class SharedElement;

template <typename T>
struct SharedPointer {  // &array[i], for the atomics
  std::size_t block, index;
  T* begin_atomic() const {
    SharedBlock& b = shared_memory().blocks[block];
    record(b, index, true, true);
    return reinterpret_cast<T*>(b.bytes.get()) + index;
  }
};

template <typename T>
class SharedElement {
 public:
  SharedElement(std::size_t block, std::size_t index) : block_(block), index_(index) {}
  operator T() const { return *access(false); }
  T operator=(T value) const { return *access(true) = value; }
  T operator=(const SharedElement& other) const { return *this = static_cast<T>(other); }
  T operator+=(T value) const { return *this = static_cast<T>(static_cast<T>(*this) + value); }
  T operator-=(T value) const { return *this = static_cast<T>(static_cast<T>(*this) - value); }
  SharedPointer<T> operator&() const { return {block_, index_}; }

 private:
  T* access(bool writes) const {
    SharedBlock& block = shared_memory().blocks[block_];
    record(block, index_, writes, false);
    return reinterpret_cast<T*>(block.bytes.get()) + index_;
  }
  std::size_t block_, index_;
};

// What MASKOPS_SHARED declares. Copies refer to the same memory.
template <typename T>
class SharedArray {
 public:
  SharedArray(const void* tag, const char* name, std::size_t count) {
    SharedBlock& block = shared_memory().find(tag, name, count, sizeof(T));
    block_ = static_cast<std::size_t>(&block - shared_memory().blocks.data());
    count_ = block.count;
  }
  template <typename I>
  SharedElement<T> operator[](I index) const {
    if (index < I(0) || static_cast<std::size_t>(index) >= count_)
      throw KernelFault("index " + std::to_string(index) + " is outside shared memory " +
                        std::string(shared_memory().blocks[block_].name) + "[" + std::to_string(count_) + "]");
    return {block_, static_cast<std::size_t>(index)};
  }

 private:
  std::size_t block_ = 0, count_ = 0;
};

template <typename T>
SharedArray<T> dynamic_shared(const char* name) {
  return SharedArray<T>(nullptr, name, shared_memory().dynamic_bytes / sizeof(T));
}

}  // namespace maskops_emulator
