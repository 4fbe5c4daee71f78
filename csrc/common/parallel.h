// The CPU loop: torch's own thread pool. Exceptions must not leave the body (they would lose their type): note a fault and
// throw after the loop.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <vector>

namespace maskops {

// body(begin, end) over [0, count); work is the cost of one item in bytes moved or flops, so that tiny jobs stay on one thread.
template <class Body>
void parallel_for(int64_t count, int64_t work, const Body& body) {
  constexpr int64_t kWorkPerThread = 32 * 1024;
  if (count <= 0) return;
  const int64_t grain = std::max<int64_t>(1, kWorkPerThread / std::max<int64_t>(1, work));
  if (count <= grain) return body(static_cast<int64_t>(0), count);
  torch::stable::parallel_for(0, count, grain, body);
}

// The next of `count` items that no thread has taken.
class NextItem {
 public:
  NextItem(std::atomic<int64_t>& left, int64_t count) : left_(left), count_(count) {}
  bool operator()(int64_t* item) const { return (*item = left_.fetch_add(1)) < count_; }

 private:
  std::atomic<int64_t>& left_;
  int64_t count_;
};

// body(next) on each thread, for items of unequal cost: what an item computes must not depend on who takes it.
template <class Body>
void share_out(int64_t count, int64_t work, const Body& body) {
  std::atomic<int64_t> left{0};
  const NextItem next(left, count);
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), count);
  parallel_for(threads, count * work / std::max<int64_t>(1, threads), [&](int64_t begin, int64_t end) {
    if (begin < end) body(next);
  });
}

// body(i) for each item, on each thread first those of a part of its own, which is the same in every call: what they read and write
// may then lie in its cache.
template <class Body>
void share_out_parts(int64_t count, int64_t work, const Body& body) {
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), count);
  if (threads == 0) return;
  auto first = [&](int64_t part) { return part * count / threads; };
  std::vector<std::atomic<int64_t>> next(threads);
  for (int64_t part = 0; part < threads; ++part) next[part] = first(part);
  parallel_for(threads, count * work / threads, [&](int64_t begin, int64_t end) {
    for (int64_t own = begin; own < end; ++own) {
      for (int64_t i = 0; i < threads; ++i) {
        const int64_t part = (own + i) % threads;
        for (int64_t item; (item = next[part].fetch_add(1)) < first(part + 1);) body(item);
      }
    }
  });
}

// Keeps the smallest position at which something was wrong, from any thread.
class FirstFault {
 public:
  void note(int64_t position) {
    int64_t seen = first_.load(std::memory_order_relaxed);
    while (position < seen && !first_.compare_exchange_weak(seen, position)) {
    }
  }
  bool any() const { return first_.load() != kNone; }
  int64_t position() const { return first_.load(); }

 private:
  static constexpr int64_t kNone = INT64_MAX;
  std::atomic<int64_t> first_{kNone};
};

}  // namespace maskops
