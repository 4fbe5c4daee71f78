// Rectangles on a grid: BEiT's and CAE's blocks, I-JEPA's targets and contexts. A row of the grid is a 64-bit word.
#include "common/isa.h"

#if MASKOPS_ISA_LEVEL == 0
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <array>
#include <tuple>

#include "common/parallel.h"
#include "math/mask_sampling_law_check.h"

namespace maskops {
namespace {

using Grid = std::array<uint64_t, kMaxSide>;

PhiloxKey key_of(const Tensor& seed_any) {
  const Tensor seed = contiguous_or_copy(seed_any);
  const int64_t* words = static_cast<const int64_t*>(seed.const_data_ptr());
  return PhiloxKey::of(words[0], words[1]);
}

int64_t count_bits(const Grid& grid, int64_t h) {
  int64_t count = 0;
  for (int64_t y = 0; y < h; ++y) count += __builtin_popcountll(grid[y]);
  return count;
}

int64_t count_inside(const Grid& grid, const Rectangle& r) {
  const uint64_t columns = row_bits(r.left, r.width);
  int64_t count = 0;
  for (int64_t y = r.top; y < r.top + r.height; ++y) count += __builtin_popcountll(grid[y] & columns);
  return count;
}

void set_inside(Grid& grid, const Rectangle& r) {
  for (int64_t y = r.top; y < r.top + r.height; ++y) grid[y] |= row_bits(r.left, r.width);
}

void write_grid(const Grid& grid, int64_t h, int64_t w, uint8_t* to) {
  for (int64_t y = 0; y < h; ++y) {
    for (int64_t x = 0; x < w; ++x) to[y * w + x] = grid[y] >> x & 1;
  }
}

// Sets the j-th cell, in reading order, that is not set yet.
void set_free(Grid& grid, int64_t j, int64_t w) {
  for (int64_t y = 0;; ++y) {
    uint64_t rest = ~grid[y] & row_bits(0, w);
    const int64_t count = __builtin_popcountll(rest);
    if (j >= count) {
      j -= count;
      continue;
    }
    for (; j > 0; --j) rest &= rest - 1;
    grid[y] |= rest & (~rest + 1);
    return;
  }
}

struct Blocks {
  PhiloxKey key;
  const int32_t* shapes;
  int64_t count, h, w, smallest, largest, tries;
  bool fill;

  void draw(int64_t b, int64_t num_mask, Grid& grid) const {
    int64_t left = num_mask, drawn = 0;
    for (bool found = true; found && left > 0;) {
      found = false;
      const int64_t room = std::min(left, largest);
      for (int64_t t = 0; t < tries && !found; ++t) {
        const PhiloxWords words = philox(key, row_counter(b) + static_cast<uint64_t>(drawn + t));
        const Rectangle r = block_rectangle(words, shapes, count, h, w, smallest, room);
        const int64_t more = r.height * r.width - count_inside(grid, r);
        if (more <= 0 || more > room) continue;
        set_inside(grid, r);
        left -= more;
        found = true;
      }
      drawn += tries;
    }
    for (int64_t i = 0; fill && left > 0; ++i, --left) {
      set_free(grid, below(row_word(key, b, kFillWords + i), h * w - num_mask + left), w);
    }
  }
};

Tensor mask_sampling_blocks(const Tensor& seed, const Tensor& num_mask_any, const Tensor& shapes_any, int64_t h, int64_t w,
                            int64_t smallest, int64_t largest, int64_t tries, bool fill) {
  check_blocks(seed, num_mask_any, shapes_any, h, w, smallest, largest, tries);
  const Tensor num_mask = contiguous_or_copy(num_mask_any), shapes = contiguous_or_copy(shapes_any);
  const int64_t batch = num_mask.size(0);
  const int64_t* counts = static_cast<const int64_t*>(num_mask.const_data_ptr());
  for (int64_t b = 0; b < batch; ++b) {
    if (counts[b] < 0 || counts[b] > h * w)
      fail("block_masking", "num_mask[" + std::to_string(b) + "]", "be in [0, " + std::to_string(h * w) + "]", counts[b]);
  }
  Tensor out = empty_like_device(seed, {batch, h * w}, ScalarType::Bool);
  uint8_t* to = static_cast<uint8_t*>(out.mutable_data_ptr());
  const Blocks law{key_of(seed), static_cast<const int32_t*>(shapes.const_data_ptr()), shapes.size(0), h, w, smallest, largest, tries, fill};
  parallel_for(batch, h * w * 64, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      Grid grid{};
      law.draw(b, counts[b], grid);
      write_grid(grid, h, w, to + b * h * w);
    }
  });
  return out;
}

void check_sizes(const Tensor& sizes, const char* name, int64_t h, int64_t w) {
  const int32_t* data = static_cast<const int32_t*>(sizes.const_data_ptr());
  for (int64_t i = 0; i < 2 * sizes.size(0); ++i) {
    const int64_t bound = (i % 2 ? w : h) - 1;
    if (data[i] < 1 || data[i] > bound)
      fail("multiblock_masking", std::string(name) + "[" + std::to_string(i / 2) + ", " + std::to_string(i % 2) + "]",
           "be at least 1 and less than the grid's side", data[i]);
  }
}

std::tuple<Tensor, Tensor> mask_sampling_multiblock(const Tensor& seed, const Tensor& target_any, const Tensor& context_any,
                                                    int64_t batch, int64_t h, int64_t w, int64_t targets, int64_t min_keep,
                                                    bool shared) {
  check_multiblock(seed, target_any, context_any, batch, h, w, targets, min_keep);
  const Tensor target_sizes = contiguous_or_copy(target_any), context_sizes = contiguous_or_copy(context_any);
  check_sizes(target_sizes, "target_sizes", h, w);
  check_sizes(context_sizes, "context_sizes", h, w);
  const PhiloxKey key = key_of(seed);
  const int32_t *target = static_cast<const int32_t*>(target_sizes.const_data_ptr()),
                *context = static_cast<const int32_t*>(context_sizes.const_data_ptr());
  Tensor found = empty_like_device(seed, {batch, targets, h * w}, ScalarType::Bool);
  Tensor kept = empty_like_device(seed, {batch, h * w}, ScalarType::Bool);
  uint8_t *to = static_cast<uint8_t*>(found.mutable_data_ptr()), *to_kept = static_cast<uint8_t*>(kept.mutable_data_ptr());
  parallel_for(batch, h * w * (targets + 1) * 4, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const PhiloxWords size = philox(key, shared ? kSharedCounter : row_counter(b));
      const int32_t* t_size = target + 2 * below(size.word[0], target_sizes.size(0));
      const int32_t* c_size = context + 2 * below(size.word[1], context_sizes.size(0));
      std::array<Rectangle, 64> places;
      for (int64_t t = 0; t < targets; ++t) {
        places[t] = placed(philox(key, row_counter(b) + 1 + t), h, w, t_size[0], t_size[1]);
        Grid one{};
        set_inside(one, places[t]);
        write_grid(one, h, w, to + (b * targets + t) * h * w);
      }
      Grid rest{};
      for (int64_t a = 0; a <= kTriesPerTarget * targets; ++a) {
        rest = Grid{};
        set_inside(rest, placed(philox(key, row_counter(b) + 1 + targets + a), h, w, c_size[0], c_size[1]));
        for (int64_t t = 0; t < targets - a / kTriesPerTarget; ++t) {
          for (int64_t y = places[t].top; y < places[t].top + places[t].height; ++y) rest[y] &= ~row_bits(places[t].left, places[t].width);
        }
        if (count_bits(rest, h) > min_keep) break;
      }
      write_grid(rest, h, w, to_kept + b * h * w);
    }
  });
  return {found, kept};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(maskops, CPU, m) {
  m.impl("mask_sampling_blocks", TORCH_BOX(&mask_sampling_blocks));
  m.impl("mask_sampling_multiblock", TORCH_BOX(&mask_sampling_multiblock));
}

}  // namespace maskops
#endif
