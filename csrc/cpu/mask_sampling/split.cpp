// mask_sampling on the CPU: draw or read one key per token, sort each row, write the split.
//
// Short rows are sorted in registers where the instruction set allows (order_kernels.cpp). Long ones: Philox noise is uniform, so it
// is distributed over as many buckets as there are tokens, and one insertion pass ends it: linear time. Given noise may be anything
// and is sorted by radix, stable. Where the result is in index order, only the last kept token is searched, and nothing is sorted.
#include "common/isa.h"

#if MASKOPS_ISA_LEVEL == 0
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <array>
#include <tuple>
#include <vector>

#include "common/parallel.h"
#include "cpu/mask_sampling/draw.h"
#include "cpu/mask_sampling/order.h"
#include "math/mask_sampling_check.h"

namespace maskops {
namespace {

using Split = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

struct Entry {
  uint32_t noise, index;

  bool operator<(const Entry& other) const {
    return noise != other.noise ? noise < other.noise : index < other.index;
  }
};

struct Scratch {
  std::vector<Entry> from, to;
  std::vector<uint32_t> starts;
  std::vector<uint32_t> noise, other;
  std::vector<uint32_t> order;  // the row's tokens in key order
  std::vector<uint8_t> hidden;  // or, where the result is in index order, which of them are not kept
  std::vector<uint8_t> patches;  // and which patches, where the tokens are cells of several
  std::vector<int64_t> line;     // ids_restore, ids_keep and ids_mask of one line

  explicit Scratch(int64_t tokens)
      : from(tokens), to(tokens), noise(tokens + kWordsSlack + 4), other(std::max(tokens, kMaxOrdered)), order(other.size()), hidden(tokens) {}
};

// Sort entries of equally distributed noise into scratch.to; entries are in index order, so equal noise stays in that order.
void sort_uniform(Scratch& scratch, int64_t count) {
  int shift = 31;
  while (shift > 0 && (int64_t{1} << (32 - shift)) < count) --shift;
  const size_t buckets = size_t{1} << (32 - shift);
  scratch.starts.assign(buckets + 1, 0);
  uint32_t* starts = scratch.starts.data();
  for (int64_t i = 0; i < count; ++i) ++starts[(scratch.from[i].noise >> shift) + 1];
  for (size_t bucket = 0; bucket < buckets; ++bucket) starts[bucket + 1] += starts[bucket];
  for (int64_t i = 0; i < count; ++i) scratch.to[starts[scratch.from[i].noise >> shift]++] = scratch.from[i];
  Entry* sorted = scratch.to.data();
  int64_t moves = 0;
  for (int64_t i = 1; i < count; ++i) {
    const Entry entry = sorted[i];
    int64_t j = i;
    for (; j > 0 && entry < sorted[j - 1]; --j) sorted[j] = sorted[j - 1];
    sorted[j] = entry;
    moves += i - j;
    // Uniform noise needs less than one move per token; if it is not uniform after all, do not go quadratic.
    if (moves > 16 * count) return std::sort(sorted, sorted + count);
  }
}

void order_drawn_row(const uint32_t* noise, const bool* mask, int64_t length, Scratch& scratch) {
  int64_t written = 0;
  for (int token_class = 0; token_class < (mask ? 2 : 1); ++token_class) {
    int64_t count = 0;
    for (int64_t n = 0; n < length; ++n) {
      if (!mask || mask[n] == (token_class == 1)) scratch.from[count++] = {noise[n], static_cast<uint32_t>(n)};
    }
    sort_uniform(scratch, count);
    for (int64_t i = 0; i < count; ++i) scratch.order[written++] = scratch.to[i].index;
  }
}

// Stable radix sort of keys by byte, least significant first; bytes in which all keys agree are skipped.
template <class Key>
void order_given_row(const Key* keys, int64_t length, std::vector<uint32_t>& order, std::vector<uint32_t>& other) {
  for (int64_t n = 0; n < length; ++n) order[n] = static_cast<uint32_t>(n);
  for (size_t byte = 0; byte < sizeof(Key); ++byte) {
    const int shift = static_cast<int>(8 * byte);
    std::array<uint32_t, 257> starts{};
    for (int64_t n = 0; n < length; ++n) ++starts[((keys[n] >> shift) & 255) + 1];
    if (std::find(starts.begin() + 1, starts.end(), static_cast<uint32_t>(length)) != starts.end()) continue;
    for (int bucket = 0; bucket < 256; ++bucket) starts[bucket + 1] += starts[bucket];
    for (int64_t i = 0; i < length; ++i) other[starts[(keys[order[i]] >> shift) & 255]++] = order[i];
    order.swap(other);
  }
}

// Marks all tokens but the `keep` that have the smallest (mask, noise, index). One pass finds the bucket of the last of them.
void mark_hidden(const uint32_t* noise, const bool* mask, int64_t length, int64_t keep, Scratch& scratch) {
  constexpr int kBuckets = 1024;
  int64_t first_class = length, count = 0;
  for (int64_t n = 0; mask && n < length; ++n) first_class -= mask[n];
  const bool second = keep > first_class;  // the first class is kept whole, and the rest is from the second
  uint32_t low = UINT32_MAX, high = 0;
  for (int64_t n = 0; n < length; ++n) {
    const bool candidate = !mask || mask[n] == second;
    scratch.hidden[n] = candidate || !second;
    scratch.from[count] = {noise[n], static_cast<uint32_t>(n)};
    count += candidate;
  }
  const int64_t need = second ? keep - first_class : keep;
  if (need == 0) return;
  for (int64_t i = 0; i < count; ++i) low = std::min(low, scratch.from[i].noise), high = std::max(high, scratch.from[i].noise);
  int shift = 0;
  while ((high - low) >> shift >= kBuckets) ++shift;
  std::array<uint32_t, kBuckets> sizes{};
  for (int64_t i = 0; i < count; ++i) ++sizes[(scratch.from[i].noise - low) >> shift];
  int64_t bucket = 0, below = 0;
  while (below + sizes[bucket] < need) below += sizes[bucket++];
  int64_t rest = 0;
  for (int64_t i = 0; i < count; ++i) {
    const Entry entry = scratch.from[i];
    const int64_t own = (entry.noise - low) >> shift;
    if (own < bucket) scratch.hidden[entry.index] = 0;
    scratch.to[rest] = entry;
    rest += own == bucket;
  }
  Entry* last = scratch.to.data();
  std::nth_element(last, last + (need - below - 1), last + rest);
  for (int64_t i = 0; i < need - below; ++i) scratch.hidden[last[i].index] = 0;
}

int64_t* data(const Tensor& x) { return static_cast<int64_t*>(x.data_ptr()); }

struct Rows {
  int64_t batch, tokens, max_keep, max_mask;  // of cells, as num_keep; the ids are those of patches
  Cells cells;
  bool ascending;
  const int64_t *num_keep, *lengths;  // [B], lengths may be null
  int64_t *ids_keep, *ids_mask, *ids_restore;

  int64_t length(int64_t b) const { return lengths ? lengths[b] : tokens; }
};

// Writes a row in key order, from scratch.order.
void write_ordered(const Rows& rows, int64_t b, const std::vector<uint32_t>& order) {
  pick_OrderKernels().ordered_row(order.data(), rows.length(b), rows.num_keep[b], rows.ids_restore + b * rows.tokens,
                                  rows.ids_keep + b * rows.max_keep, rows.ids_mask + b * rows.max_mask);
}

// What is behind the tokens of a row: padding has its own slots, and unused slots hold -1.
void fill_row(const Rows& rows, int64_t b) {
  const int64_t length = rows.length(b), keep = rows.num_keep[b], area = rows.cells.area();
  int64_t *kept = rows.ids_keep + b * area * rows.max_keep, *masked = rows.ids_mask + b * area * rows.max_mask;
  for (int64_t n = length; n < rows.tokens; ++n) rows.ids_restore[b * rows.tokens + n] = n;  // where a cell is one patch
  std::fill(kept + area * keep, kept + area * rows.max_keep, int64_t{-1});
  std::fill(masked + area * (length - keep), masked + area * rows.max_mask, int64_t{-1});
}

// From the cells of a row that are hidden to its patches.
const uint8_t* hidden_patches(const Cells& cells, int64_t tokens, Scratch& scratch) {
  if (cells.single()) return scratch.hidden.data();
  scratch.patches.resize(cells.area() * tokens);
  const int64_t width = cells.across * cells.wide;
  uint8_t* line = scratch.patches.data();
  for (int64_t first = 0; first < tokens && cells.area() > 0; first += cells.across, line += cells.high * width) {
    for (int64_t x = 0; x < cells.across; ++x) std::fill_n(line + x * cells.wide, cells.wide, scratch.hidden[first + x]);
    for (int64_t y = 1; y < cells.high; ++y) std::copy_n(line, width, line + y * width);
  }
  return scratch.patches.data();
}

// hidden [length]: 0 for the first `keep` tokens of an order, or as they were marked.
const uint8_t* hidden_of(Scratch& scratch, int64_t length, int64_t keep, bool marked) {
  uint8_t* hidden = scratch.hidden.data();
  if (!marked) {
    std::fill(hidden, hidden + length, uint8_t{1});
    for (int64_t slot = 0; slot < keep; ++slot) hidden[scratch.order[slot]] = 0;
  }
  return hidden;
}

// Writes a row in index order.
void write_ascending(const Rows& rows, int64_t b, Scratch& scratch, bool marked) {
  const int64_t length = rows.length(b), keep = rows.num_keep[b], area = rows.cells.area();
  const uint8_t* hidden = hidden_of(scratch, length, keep, marked);
  const OrderKernels& kernels = pick_OrderKernels();
  int64_t *restore = rows.ids_restore + b * area * rows.tokens, *kept = rows.ids_keep + b * area * rows.max_keep;
  int64_t* masked = rows.ids_mask + b * area * rows.max_mask;
  if (rows.cells.single() || rows.cells.across != rows.tokens || rows.cells.wide != 1) {
    kernels.split_row(hidden_patches(rows.cells, rows.tokens, scratch), area * length, area * keep, restore, kept, masked);
    return;
  }
  // A single line of cells, such as the tubes of a video: one of its lines of patches is split, the others are like it.
  scratch.line.resize(3 * length);
  int64_t* line = scratch.line.data();
  kernels.split_row(hidden, length, keep, line, line + length, line + 2 * length);
  kernels.repeat({line + length, line + 2 * length, line}, keep, length - keep, area, {kept, masked, restore});
}

void check_counts_data(const Rows& rows) {
  const char* op = "random_masking";
  auto at = [](const char* arg, int64_t b) { return std::string(arg) + "[" + std::to_string(b) + "]"; };
  for (int64_t b = 0; rows.lengths && b < rows.batch; ++b) {
    const int64_t length = rows.lengths[b];
    if (length < 0 || length > rows.tokens) fail(op, at("lengths", b), "be in [0, " + std::to_string(rows.tokens) + "]", length);
  }
  for (int64_t b = 0; b < rows.batch; ++b) {
    const int64_t keep = rows.num_keep[b];
    if (keep < 0 || keep > rows.length(b) || keep > rows.max_keep) {
      fail(op, at("num_keep", b), "be in [0, length] and at most " + std::to_string(rows.max_keep), keep);
    }
  }
  for (int64_t b = 0; b < rows.batch; ++b) {
    const int64_t masked = rows.length(b) - rows.num_keep[b];
    if (masked > rows.max_mask) fail(op, at("masked tokens", b), "be at most " + std::to_string(rows.max_mask), masked);
  }
}

// Allocate, check the counts and let `order_row(b, length, scratch)` put each row's real tokens in key order into scratch.order, or
// return true and mark them in scratch.hidden.
template <class OrderRow>
Split split_rows(const Tensor& num_keep_any, const std::optional<Tensor>& lengths_any, int64_t tokens, int64_t max_keep,
                 int64_t max_mask, bool ascending, const Cells& cells, const OrderRow& order_row) {
  const Tensor num_keep = contiguous_or_copy(num_keep_any);
  std::optional<Tensor> lengths;
  if (lengths_any) lengths = contiguous_or_copy(*lengths_any);
  const int64_t batch = num_keep.size(0), area = cells.area();
  Rows rows{batch, tokens, max_keep, max_mask, cells, ascending, data(num_keep), lengths ? data(*lengths) : nullptr, nullptr, nullptr, nullptr};
  check_counts_data(rows);
  auto ids = [&](int64_t width) { return empty_like_device(num_keep, {batch, area * width}); };
  Tensor ids_keep = ids(max_keep), ids_mask = ids(max_mask), ids_restore = ids(tokens), num_mask = empty_like_device(num_keep, {batch});
  Tensor cu_seqlens = empty_like_device(num_keep, {batch + 1}, ScalarType::Int);
  rows.ids_keep = data(ids_keep), rows.ids_mask = data(ids_mask), rows.ids_restore = data(ids_restore);
  int32_t* starts = static_cast<int32_t*>(cu_seqlens.mutable_data_ptr());
  starts[0] = 0;
  for (int64_t b = 0; b < batch; ++b) {
    data(num_mask)[b] = area * (rows.length(b) - rows.num_keep[b]);
    starts[b + 1] = starts[b] + static_cast<int32_t>(area * rows.num_keep[b]);
  }
  parallel_for(batch, tokens * (16 + 16 * area), [&](int64_t begin, int64_t end) {
    Scratch scratch(tokens);
    for (int64_t b = begin; b < end; ++b) {
      const bool marked = order_row(b, rows.length(b), scratch);
      if (ascending) write_ascending(rows, b, scratch, marked);
      else write_ordered(rows, b, scratch.order);
      fill_row(rows, b);
    }
  });
  return {ids_keep, ids_mask, ids_restore, num_mask, cu_seqlens};
}

Split mask_sampling_uniform(const Tensor& seed_any, const Tensor& num_keep_any, std::optional<Tensor> lengths,
                            std::optional<Tensor> mask_any, int64_t tokens, int64_t max_keep, int64_t max_mask, bool ascending,
                            int64_t across, int64_t high, int64_t wide) {
  const Cells cells{across, high, wide};
  check_sampling_uniform(seed_any, num_keep_any, lengths, mask_any, tokens, max_keep, max_mask, ascending, cells);
  const Tensor seed = contiguous_or_copy(seed_any), num_keep = contiguous_or_copy(num_keep_any);
  const int64_t* num_keep_of = static_cast<const int64_t*>(num_keep.const_data_ptr());
  std::optional<Tensor> mask;
  if (mask_any) mask = contiguous_or_copy(*mask_any);
  const bool* masked = mask ? static_cast<const bool*>(mask->const_data_ptr()) : nullptr;
  const int64_t* words = static_cast<const int64_t*>(seed.const_data_ptr());
  const PhiloxKey key = PhiloxKey::of(words[0], words[1]);
  const DrawKernels& kernels = pick_DrawKernels();
  const OrderKernels& orders = pick_OrderKernels();
  auto order_row = [&](int64_t b, int64_t length, Scratch& scratch) {
    const int64_t first = b * tokens, skipped = first % 4;
    kernels.words(key, static_cast<uint64_t>(first / 4), skipped + tokens, scratch.noise.data());
    const uint32_t* noise = scratch.noise.data() + skipped;
    const bool* mask_row = masked ? masked + b * tokens : nullptr;
    const uint8_t* mask_bytes = reinterpret_cast<const uint8_t*>(mask_row);
    if (ascending && orders.mark(noise, mask_bytes, length, num_keep_of[b], scratch.hidden.data())) return true;
    if (orders.order(noise, mask_bytes, length, scratch.order.data())) return false;
    if (ascending) mark_hidden(noise, mask_row, length, num_keep_of[b], scratch);
    else order_drawn_row(noise, mask_row, length, scratch);
    return ascending;
  };
  return split_rows(num_keep, lengths, tokens, max_keep, max_mask, ascending, cells, order_row);
}

// Orders the tokens of a row by their keys, or only marks those after the first `keep`: then true.
bool order_keys(const uint32_t* keys, int64_t length, int64_t keep, bool ascending, Scratch& scratch) {
  const OrderKernels& orders = pick_OrderKernels();
  if (ascending && orders.mark(keys, nullptr, length, keep, scratch.hidden.data())) return true;
  if (orders.order(keys, nullptr, length, scratch.order.data())) return false;
  if (ascending) mark_hidden(keys, nullptr, length, keep, scratch);
  else order_given_row(keys, length, scratch.order, scratch.other);
  return ascending;
}

Split rank_floats(const Tensor& noise_any, const Tensor& num_keep_any, const std::optional<Tensor>& lengths, int64_t max_keep,
                  int64_t max_mask, bool ascending) {
  const Tensor noise = contiguous_or_copy(noise_any), num_keep = contiguous_or_copy(num_keep_any);
  const int64_t tokens = noise.size(1);
  const int64_t* num_keep_of = static_cast<const int64_t*>(num_keep.const_data_ptr());
  const float* values = static_cast<const float*>(noise.const_data_ptr());
  auto order_row = [&](int64_t b, int64_t length, Scratch& scratch) {
    uint32_t* keys = scratch.noise.data();
    pick_OrderKernels().keys(values + b * tokens, length, keys);
    return order_keys(keys, length, num_keep_of[b], ascending, scratch);
  };
  return split_rows(num_keep, lengths, tokens, max_keep, max_mask, ascending, Cells{}, order_row);
}

// Orders the tokens of a row by sign times their numbers.
bool order_doubles(const double* values, int64_t length, int sign, Scratch& scratch) {
  thread_local std::vector<uint64_t> keys;
  keys.resize(length);
  for (int64_t n = 0; n < length; ++n) keys[n] = ordered_bits(sign * values[n]);
  order_given_row(keys.data(), length, scratch.order, scratch.other);
  return false;
}

Split rank_doubles(const Tensor& noise_any, const Tensor& num_keep, const std::optional<Tensor>& lengths, int64_t max_keep,
                   int64_t max_mask, bool ascending) {
  const Tensor noise = contiguous_or_copy(noise_any);
  const int64_t tokens = noise.size(1);
  const double* values = static_cast<const double*>(noise.const_data_ptr());
  auto order_row = [&](int64_t b, int64_t length, Scratch& scratch) { return order_doubles(values + b * tokens, length, 1, scratch); };
  return split_rows(num_keep, lengths, tokens, max_keep, max_mask, ascending, Cells{}, order_row);
}

Split mask_sampling_rank(const Tensor& noise, const Tensor& num_keep, std::optional<Tensor> lengths, int64_t max_keep,
                         int64_t max_mask, bool ascending) {
  check_sampling_rank(noise, num_keep, lengths, max_keep, max_mask);
  return noise.scalar_type() == ScalarType::Float ? rank_floats(noise, num_keep, lengths, max_keep, max_mask, ascending)
                                                  : rank_doubles(noise, num_keep, lengths, max_keep, max_mask, ascending);
}

// Keys of a row whose highest number comes first, NaN last.
bool order_highest(const float* values, int64_t length, int64_t count, Scratch& scratch) {
  uint32_t* keys = scratch.noise.data();
  pick_OrderKernels().keys(values, length, keys);
  for (int64_t n = 0; n < length; ++n) keys[n] = keys[n] == UINT32_MAX ? keys[n] : ~keys[n];
  return order_keys(keys, length, count, true, scratch);
}

bool order_highest(const double* values, int64_t length, int64_t, Scratch& scratch) { return order_doubles(values, length, -1, scratch); }

template <class T>
void mark_highest(const Tensor& score, int64_t count, uint8_t* to) {
  const int64_t tokens = score.size(1);
  const T* values = static_cast<const T*>(score.const_data_ptr());
  parallel_for(score.size(0), tokens * 16, [&](int64_t begin, int64_t end) {
    Scratch scratch(tokens);
    for (int64_t b = begin; b < end; ++b) {
      const bool marked = order_highest(values + b * tokens, tokens, count, scratch);
      const uint8_t* lower = hidden_of(scratch, tokens, count, marked);
      for (int64_t n = 0; n < tokens; ++n) to[b * tokens + n] = lower[n] ^ 1;
    }
  });
}

Tensor mask_sampling_top(const Tensor& score_any, int64_t count) {
  check_sampling_top(score_any, count);
  const Tensor score = contiguous_or_copy(score_any);
  Tensor out = empty_like_device(score, {score.size(0), score.size(1)}, ScalarType::Bool);
  uint8_t* to = static_cast<uint8_t*>(out.mutable_data_ptr());
  score.scalar_type() == ScalarType::Float ? mark_highest<float>(score, count, to) : mark_highest<double>(score, count, to);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(maskops, CPU, m) {
  m.impl("mask_sampling_uniform", TORCH_BOX(&mask_sampling_uniform));
  m.impl("mask_sampling_rank", TORCH_BOX(&mask_sampling_rank));
  m.impl("mask_sampling_top", TORCH_BOX(&mask_sampling_top));
}

}  // namespace maskops
#endif
