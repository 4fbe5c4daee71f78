// Spans, groups and intervals of sequences, a row at a time.
#include "common/isa.h"

#if MASKOPS_ISA_LEVEL == 0
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <array>
#include <vector>

#include "common/parallel.h"
#include "cpu/mask_sampling/draw.h"
#include "math/mask_sampling_law_check.h"

namespace maskops {
namespace {

PhiloxKey key_of(const Tensor& seed_any) {
  const Tensor seed = contiguous_or_copy(seed_any);
  const int64_t* words = static_cast<const int64_t*>(seed.const_data_ptr());
  return PhiloxKey::of(words[0], words[1]);
}

const int64_t* read(const Tensor& x) { return static_cast<const int64_t*>(x.const_data_ptr()); }

std::string at(const char* name, int64_t b) { return std::string(name) + "[" + std::to_string(b) + "]"; }

// Marks a row's starts. Without replacement by Floyd's algorithm: the i-th draw is from one start more than the one before, and a
// start that is taken stands for the new one.
void mark_starts(const uint32_t* words, int64_t spans, int64_t starts, bool replacement, uint8_t* taken) {
  for (int64_t i = 0; i < spans; ++i) {
    const int64_t newest = starts - spans + i;
    int64_t start = below(words[i], replacement ? starts : newest + 1);
    if (!replacement && taken[start]) start = newest;
    taken[start] = 1;
  }
}

Tensor mask_sampling_spans(const Tensor& seed, const Tensor& spans_any, const Tensor& starts_any, const Tensor& lengths_any,
                           int64_t tokens, int64_t span, bool replacement) {
  check_spans(seed, spans_any, starts_any, lengths_any, tokens, span);
  const Tensor num_spans = contiguous_or_copy(spans_any), num_starts = contiguous_or_copy(starts_any);
  const Tensor lengths = contiguous_or_copy(lengths_any);
  const int64_t batch = num_spans.size(0);
  const int64_t *spans = read(num_spans), *starts = read(num_starts), *length = read(lengths);
  for (int64_t b = 0; b < batch; ++b) {
    if (length[b] < 0 || length[b] > tokens)
      fail("span_masking", at("lengths", b), "be in [0, " + std::to_string(tokens) + "]", length[b]);
  }
  for (int64_t b = 0; b < batch; ++b) {
    if (starts[b] < 0 || starts[b] > length[b]) fail("span_masking", at("num_starts", b), "be in [0, length]", starts[b]);
  }
  for (int64_t b = 0; b < batch; ++b) {
    if (spans[b] < 0 || spans[b] > (int64_t{1} << 20)) fail("span_masking", at("num_spans", b), "be in [0, 2^20]", spans[b]);
  }
  Tensor out = empty_like_device(seed, {batch, tokens}, ScalarType::Bool);
  uint8_t* to = static_cast<uint8_t*>(out.mutable_data_ptr());
  const PhiloxKey key = key_of(seed);
  const DrawKernels& kernels = pick_DrawKernels();
  parallel_for(batch, tokens * 8, [&](int64_t begin, int64_t end) {
    std::vector<uint32_t> words;
    for (int64_t b = begin; b < end; ++b) {
      uint8_t* row = to + b * tokens;
      std::fill(row, row + tokens, uint8_t{0});
      const int64_t count = starts[b] == 0 ? 0 : replacement ? spans[b] : std::min(spans[b], starts[b]);
      if (static_cast<int64_t>(words.size()) < count + kWordsSlack) words.resize(count + kWordsSlack);
      kernels.words(key, row_counter(b), count, words.data());
      mark_starts(words.data(), count, starts[b], replacement, row);
      int64_t last = -1;  // the end of the spans so far
      for (int64_t n = 0; n < length[b]; ++n) {
        if (row[n]) last = n + span;
        row[n] = n < last;
      }
    }
  });
  return out;
}

// Walks over a row's groups in order, once for each budget, and takes those that still fit. level[g]: which walk took it.
void take_groups(const int64_t* order, int64_t groups, const int64_t* budgets, int64_t levels, bool by_tokens, const int32_t* sizes,
                 uint8_t* level) {
  std::fill(level, level + groups, static_cast<uint8_t>(levels));
  int64_t used = 0;
  for (int64_t l = 0; l < levels; ++l) {
    for (int64_t i = 0; i < groups && used < budgets[l]; ++i) {
      const int64_t g = order[i];
      if (g < 0 || sizes[g] == 0 || level[g] < levels) continue;
      const int64_t cost = by_tokens ? sizes[g] : 1;
      if (used + cost > budgets[l]) continue;
      used += cost;
      level[g] = static_cast<uint8_t>(l);
    }
  }
}

Tensor mask_sampling_groups(const Tensor& order_any, const Tensor& groups_any, const Tensor& budgets_any, bool by_tokens) {
  check_groups(order_any, groups_any, budgets_any);
  const Tensor order = contiguous_or_copy(order_any), groups = contiguous_or_copy(groups_any), budgets = contiguous_or_copy(budgets_any);
  const int64_t batch = order.size(0), count = order.size(1), tokens = groups.size(1), levels = budgets.size(1);
  Tensor out = empty_like_device(order, {batch, tokens}, ScalarType::Byte);
  uint8_t* to = static_cast<uint8_t*>(out.mutable_data_ptr());
  const int64_t stride = groups.size(0) == 1 ? 0 : tokens;
  FirstFault in_order, in_groups;
  auto inside = [&](const int64_t* values, int64_t first, int64_t n, FirstFault& fault) {
    bool outside = false;  // without branches, which would take longer than all the rest
    for (int64_t i = first; i < first + n; ++i) outside |= static_cast<uint64_t>(values[i]) + 1 > static_cast<uint64_t>(count);
    for (int64_t i = first; outside && i < first + n; ++i) {
      if (values[i] < -1 || values[i] >= count) fault.note(i);
    }
    return !outside;
  };
  if (batch == 0) inside(read(groups), 0, groups.numel(), in_groups);  // of rows that are never read
  parallel_for(batch, (tokens + count) * 16, [&](int64_t begin, int64_t end) {
    std::vector<int32_t> sizes(count);
    std::vector<uint8_t> level(count);
    for (int64_t b = begin; b < end; ++b) {
      const int64_t* group = read(groups) + b * stride;
      const bool ordered = inside(read(order), b * count, count, in_order);
      if (!inside(read(groups), b * stride, tokens, in_groups) || !ordered) continue;
      std::fill(sizes.begin(), sizes.end(), 0);
      for (int64_t n = 0; n < tokens; ++n) {
        if (group[n] >= 0) ++sizes[group[n]];
      }
      take_groups(read(order) + b * count, count, read(budgets) + b * levels, levels, by_tokens, sizes.data(), level.data());
      for (int64_t n = 0; n < tokens; ++n) to[b * tokens + n] = group[n] < 0 ? static_cast<uint8_t>(levels) : level[group[n]];
    }
  });
  auto report = [&](const FirstFault& fault, const char* name, const Tensor& x) {
    if (!fault.any()) return;
    const int64_t i = fault.position(), columns = x.size(1);
    fail("group_masking", std::string(name) + "[" + std::to_string(i / columns) + ", " + std::to_string(i % columns) + "]",
         "be in [-1, " + std::to_string(count) + ")", read(x)[i]);
  };
  report(in_order, "order", order);
  report(in_groups, "groups", groups);
  return out;
}

Tensor mask_sampling_intervals(const Tensor& seed, const Tensor& spans_any, const Tensor& lengths_any, int64_t max_spans) {
  check_intervals(seed, spans_any, lengths_any, max_spans);
  const Tensor num_spans = contiguous_or_copy(spans_any), lengths = contiguous_or_copy(lengths_any);
  const int64_t batch = num_spans.size(0);
  const int64_t *spans = read(num_spans), *length = read(lengths);
  for (int64_t b = 0; b < batch; ++b) {
    if (length[b] < 0 || length[b] >= (int64_t{1} << 31)) fail("draw_spans", at("lengths", b), "be in [0, 2^31)", length[b]);
  }
  for (int64_t b = 0; b < batch; ++b) {
    if (spans[b] < 0 || spans[b] > max_spans)
      fail("draw_spans", at("num_spans", b), "be in [0, " + std::to_string(max_spans) + "]", spans[b]);
  }
  Tensor out = empty_like_device(seed, {batch, max_spans, 2});
  int64_t* to = static_cast<int64_t*>(out.mutable_data_ptr());
  const PhiloxKey key = key_of(seed);
  parallel_for(batch, 256 + 16 * max_spans, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      std::array<Interval, 64> found;
      int64_t count = 0;
      for (int64_t c = 0; c < spans[b] * spans[b] && count < spans[b]; ++c) {
        const Interval x = candidate(philox(key, row_counter(b) + static_cast<uint64_t>(c)), length[b]);
        bool apart = x.begin < x.end;
        for (int64_t i = 0; i < count; ++i) apart = apart && (x.end <= found[i].begin || found[i].end <= x.begin);
        if (apart) found[count++] = x;
      }
      std::sort(found.begin(), found.begin() + count, [](const Interval& p, const Interval& q) { return p.begin < q.begin; });
      for (int64_t i = 0; i < max_spans; ++i) {
        to[(b * max_spans + i) * 2] = i < count ? found[i].begin : -1;
        to[(b * max_spans + i) * 2 + 1] = i < count ? found[i].end : -1;
      }
    }
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(maskops, CPU, m) {
  m.impl("mask_sampling_spans", TORCH_BOX(&mask_sampling_spans));
  m.impl("mask_sampling_groups", TORCH_BOX(&mask_sampling_groups));
  m.impl("mask_sampling_intervals", TORCH_BOX(&mask_sampling_intervals));
}

}  // namespace maskops
#endif
