// Fibers on ucontext, with the annotations that AddressSanitizer needs to follow a change of stack.
#pragma once

#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <cstddef>
#include <new>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

namespace maskops_emulator {

constexpr std::size_t kStackBytes = 256 * 1024;

// One stack with an inaccessible page below it. A fiber is entered by resume() and comes back by leave().
class Fiber {
 public:
  using Entry = void (*)(Fiber&);

  Fiber() {
    const std::size_t page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
    memory_ = mmap(nullptr, kStackBytes + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory_ == MAP_FAILED) throw std::bad_alloc();
    mprotect(memory_, page, PROT_NONE);
    stack_ = static_cast<char*>(memory_) + page;
    size_ = kStackBytes + page;
  }
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;
  ~Fiber() { munmap(memory_, size_); }

  // A fiber that has been started is parked inside its entry between blocks, so that a stack is set up once, not per block.
  void start(Entry entry) {
    if (started_) return;
    started_ = true;
    entry_ = entry;
    getcontext(&own_);
    own_.uc_stack.ss_sp = stack_;
    own_.uc_stack.ss_size = kStackBytes;
    own_.uc_link = nullptr;
    const auto bits = reinterpret_cast<std::size_t>(this);
    makecontext(&own_, reinterpret_cast<void (*)()>(&Fiber::trampoline), 2, static_cast<unsigned>(bits & 0xffffffffu),
                static_cast<unsigned>(bits >> 32));
  }

  void resume() {
#if defined(__SANITIZE_ADDRESS__)
    void* saved = nullptr;
    __sanitizer_start_switch_fiber(&saved, stack_, kStackBytes);
    swapcontext(&caller_, &own_);
    __sanitizer_finish_switch_fiber(saved, nullptr, nullptr);
#else
    swapcontext(&caller_, &own_);
#endif
  }

  void leave() {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(&fake_stack_, caller_stack_, caller_size_);
    swapcontext(&own_, &caller_);
    __sanitizer_finish_switch_fiber(fake_stack_, &caller_stack_, &caller_size_);
#else
    swapcontext(&own_, &caller_);
#endif
  }

 private:
  static void trampoline(unsigned low, unsigned high) {
    auto* fiber = reinterpret_cast<Fiber*>(static_cast<std::size_t>(low) | (static_cast<std::size_t>(high) << 32));
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(nullptr, &fiber->caller_stack_, &fiber->caller_size_);
#endif
    fiber->entry_(*fiber);
  }

  ucontext_t own_{}, caller_{};
  void* memory_ = nullptr;
  char* stack_ = nullptr;
  std::size_t size_ = 0;
  Entry entry_ = nullptr;
  bool started_ = false;
#if defined(__SANITIZE_ADDRESS__)
  void* fake_stack_ = nullptr;
  const void* caller_stack_ = nullptr;
  std::size_t caller_size_ = 0;
#endif
};

}  // namespace maskops_emulator
