// neighbour_fill on the CPU. Which places are filled, in which ring and from which of their neighbours, is found once for an image and
// then followed in each of its channels: a place costs its eight neighbours, once.
#include "common/isa.h"

#if MASKOPS_ISA_LEVEL == 0
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <bit>
#include <tuple>
#include <vector>

#include "common/dispatch.h"
#include "common/parallel.h"
#include "common/simd.h"
#include "math/sparse_conv_pool.h"

namespace maskops {
namespace {

struct Fill {
  int32_t at;
  uint16_t from;  // bit 3 (dy + 1) + dx + 1: whether that neighbour was known
  double share;   // 1 / (their number + eps)
};

struct Image {
  int64_t H, W;

  // visit(bit, place) for the places around `at` that exist, row by row.
  template <class Visit>
  void around(int64_t at, const Visit& visit) const {
    const int64_t y = at / W, x = at % W;
    for (int64_t dy = -1; dy <= 1; ++dy) {
      for (int64_t dx = -1; dx <= 1; ++dx) {
        if (y + dy >= 0 && y + dy < H && x + dx >= 0 && x + dx < W) visit(3 * (dy + 1) + dx + 1, at + dy * W + dx);
      }
    }
  }
};

// Rings of unknown places around known ones, in order; `known` becomes what is known at the end.
std::vector<Fill> rings(const Image& image, bool* known, int64_t iterations, double eps) {
  std::vector<Fill> fills;
  std::vector<int32_t> edge, next;
  const int64_t places = image.H * image.W;
  std::vector<char> seen(static_cast<size_t>(places), 0);
  auto reach = [&](int64_t at) {
    image.around(at, [&](int64_t, int64_t other) {
      if (known[other] || seen[static_cast<size_t>(other)]) return;
      seen[static_cast<size_t>(other)] = 1;
      next.push_back(static_cast<int32_t>(other));
    });
  };
  for (int64_t at = 0; at < places; ++at) {
    if (known[at]) reach(at);
  }
  for (int64_t ring = 0; ring < iterations && !next.empty(); ++ring) {
    edge.swap(next);
    next.clear();
    for (int32_t at : edge) {
      Fill fill{at, 0, 0};
      image.around(at, [&](int64_t bit, int64_t other) { fill.from = static_cast<uint16_t>(fill.from | known[other] << bit); });
      fill.share = 1 / (static_cast<double>(std::popcount(fill.from)) + eps);
      fills.push_back(fill);
    }
    for (int32_t at : edge) known[at] = true;
    for (int32_t at : edge) reach(at);
  }
  return fills;
}

template <class T>
void fill_plane(const Image& image, const T* x, const bool* mask, const std::vector<Fill>& fills, T* out,
                typename Arithmetic<T>::type* sums) {
  using A = typename Arithmetic<T>::type;
  const int64_t places = image.H * image.W;
  for (int64_t at = 0; at < places; ++at) sums[at] = mask[at] ? to_float(x[at]) : A(0);
  for (const Fill& fill : fills) {
    A sum = 0;
    for (uint32_t from = fill.from; from != 0; from &= from - 1) {
      const int64_t bit = std::countr_zero(from);
      sum += sums[fill.at + (bit / 3 - 1) * image.W + bit % 3 - 1];
    }
    sums[fill.at] = sum * static_cast<A>(fill.share);
  }
  for (int64_t at = 0; at < places; ++at) from_float(sums[at], out + at);
}

template <class T>
void fill_images(const Tensor& x, const Tensor& mask, int64_t iterations, double eps, Tensor& out, Tensor& known) {
  const Image image{x.size(2), x.size(3)};
  const int64_t B = x.size(0), C = x.size(1), places = image.H * image.W;
  const T* from = static_cast<const T*>(x.const_data_ptr());
  const bool* masks = static_cast<const bool*>(mask.const_data_ptr());
  T* to = static_cast<T*>(out.mutable_data_ptr());
  bool* after = static_cast<bool*>(known.mutable_data_ptr());
  std::copy_n(masks, B * places, after);
  std::vector<std::vector<Fill>> fills(static_cast<size_t>(B));
  parallel_for(B, places * 32, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) fills[static_cast<size_t>(b)] = rings(image, after + b * places, iterations, eps);
  });
  parallel_for(B * C, places * 16, [&](int64_t begin, int64_t end) {
    std::vector<typename Arithmetic<T>::type> sums(static_cast<size_t>(places));
    for (int64_t plane = begin; plane < end; ++plane) {
      const int64_t b = plane / C;
      fill_plane(image, from + plane * places, masks + b * places, fills[static_cast<size_t>(b)], to + plane * places, sums.data());
    }
  });
}

std::tuple<Tensor, Tensor> sparse_conv_fill(const Tensor& x_any, const Tensor& mask_any, int64_t iterations, double eps) {
  check_fill(x_any, mask_any, iterations, eps);
  const Tensor x = contiguous_or_copy(x_any), mask = contiguous_or_copy(mask_any);
  Tensor out = empty_like_device(x, {x.size(0), x.size(1), x.size(2), x.size(3)});
  Tensor known = empty_like_device(mask, {x.size(0), 1, x.size(2), x.size(3)});
  switch (dtype_of(x)) {
    case Dtype::kFloat: fill_images<float>(x, mask, iterations, eps, out, known); break;
    case Dtype::kDouble: fill_images<double>(x, mask, iterations, eps, out, known); break;
    case Dtype::kBFloat16: fill_images<bf16>(x, mask, iterations, eps, out, known); break;
    default: fill_images<f16>(x, mask, iterations, eps, out, known);
  }
  return {out, known};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(maskops, CPU, m) { m.impl("sparse_conv_fill", TORCH_BOX(&sparse_conv_fill)); }

}  // namespace maskops
#endif
