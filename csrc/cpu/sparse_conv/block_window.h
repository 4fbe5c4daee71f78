// What an active cell reads of a depthwise convolution.
#pragma once

#include "common/pieces.h"
#include "cpu/sparse_conv/block.h"
#include "cpu/sparse_conv/types.h"

namespace maskops {
inline namespace MASKOPS_ISA_NS {

template <class T>
struct Window {
  using V = typename VecFor<T>::type;
  using A = typename V::scalar;
  int64_t padded, height, width;
  int64_t places;   // of the weight, and one for the bias
  const T** at;     // [height, width]: x, or zeros
  T* zeros;

  Window(const DepthwiseArgs& args, void* buffer, int64_t* bytes = nullptr) {
    padded = round_up(args.C, V::width);
    height = args.window_h(), width = args.window_w(), places = args.taps() + 1;
    Pieces pieces(buffer);
    at = pieces.take<const T*>(height * width);
    zeros = pieces.take<T>(padded);
    if (bytes != nullptr) *bytes = pieces.bytes;
  }

  // Where the weight as it is packed, or its gradient, has channel c of a place: all places of a vector of channels lie side by side, or
  // with many channels they would meet in few sets of the cache.
  int64_t weight_at(int64_t place, int64_t c) const { return (c / V::width * places + place) * V::width + c % V::width; }

  // The addresses for an active cell.
  void find(const DepthwiseArgs& args, int64_t cell) const {
    const int64_t own_h = args.H / args.h, own_w = args.W / args.w, image = cell / (args.h * args.w);
    const int64_t top = cell / args.w % args.h * own_h - args.py, left = cell % args.w * own_w - args.px;
    const bool* cells = args.cells + image * args.h * args.w;
    for (int64_t i = 0; i < height; ++i) {
      const int64_t y = top + i;
      const T** to = at + i * width;
      if (y < 0 || y >= args.H || y % args.uy != 0) {
        for (int64_t j = 0; j < width; ++j) to[j] = zeros;
        continue;
      }
      const bool* row = cells + y / own_h * args.w;
      const T* from = static_cast<const T*>(args.x) + (image * (args.H / args.uy) + y / args.uy) * (args.W / args.ux) * args.C;
      // A cell at a time: their borders on this line.
      for (int64_t j = 0; j < width;) {
        const int64_t x = left + j, in = x < 0 ? -1 : x / own_w;
        const int64_t end = min_of(width, x < 0 ? -left : (in + 1) * own_w - left);
        const bool seen = x >= 0 && x < args.W && row[in];
        for (; j < end; ++j) to[j] = seen && (left + j) % args.ux == 0 ? from + (left + j) / args.ux * args.C : zeros;
      }
    }
  }
  // Of the next channels, a share of the lines: positions are as far apart as they have channels, too far for the CPU to foresee. To be
  // called `parts` times while the channels up to c are worked on.
  void fetch(const DepthwiseArgs& args, int64_t c, int64_t part, int64_t parts) const {
    if (c >= args.C || c * int64_t(sizeof(T)) % 64 != 0) return;
    for (int64_t i = part * height / parts * width, end = (part + 1) * height / parts * width; i < end; ++i) __builtin_prefetch(at[i] + c);
  }
  void clear(const DepthwiseArgs& args) const { memset(zeros, 0, size_t(padded) * sizeof(T)); }
};

// Where the result of an active cell begins, as a position.
inline int64_t first_position(const DepthwiseArgs& args, int64_t cell) {
  const int64_t image = cell / (args.h * args.w), top = cell / args.w % args.h * args.cell_h(), left = cell % args.w * args.cell_w();
  return (image * (args.H / args.sy) + top) * (args.W / args.sx) + left;
}

// run.template operator()<kernel size, stride>() of a line that has_line().
template <class Run>
void by_line(const DepthwiseArgs& args, const Run& run) {
  switch (args.kw * 2 + args.sx - 1) {
    case 6: return run.template operator()<3, 1>();
    case 7: return run.template operator()<3, 2>();
    case 10: return run.template operator()<5, 1>();
    default: return run.template operator()<7, 1>();
  }
}

// The gradients of the weight and the bias of `channels` channels from c on: sums of all chunks, `each` apart, in which channel i of place t
// is at t * width + at(i).
template <class T, class V, int64_t width, class At>
void sum_channels(const DepthwiseArgs& args, const typename V::scalar* from, int64_t each, int64_t c, int64_t channels, const At& at) {
  const int64_t taps = args.taps();
  alignas(64) typename V::scalar block[width * (kMostTaps + 1)];
  for (int64_t i = 0; i < width * (taps + 1); i += V::width) {
    V sum = V::load(from + i);
    for (int64_t chunk = 1; chunk < args.chunks(); ++chunk) sum = sum + V::load(from + chunk * each + i);
    sum.store(block + i);
  }
  for (int64_t i = 0; i < channels; ++i) {
    T* to = static_cast<T*>(args.grad_weight) + (c + i) * taps;
    for (int64_t t = 0; t < taps; ++t) from_float(block[t * width + at(i)], to + t);
    from_float(block[taps * width + at(i)], static_cast<T*>(args.grad_bias) + c + i);
  }
}

}  // namespace MASKOPS_ISA_NS
}  // namespace maskops
