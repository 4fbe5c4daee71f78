// The kernels of masked max pooling, compiled once per instruction set: channels side by side, a window at a time.
#include "cpu/sparse_conv/block_norm.h"

#include "cpu/sparse_conv/types.h"

namespace maskops {
inline namespace MASKOPS_ISA_NS {
namespace {

constexpr uint8_t kNobody = 255;
constexpr int64_t kBlock = 64;  // channels at a time

inline bool is_active(const BlockPoolArgs& args, int64_t image, int64_t y, int64_t x) {
  return args.cells[(image * args.h + y / (args.H / args.h)) * args.w + x / (args.W / args.w)];
}

// Keeps the largest value and the first place that has it; NaN is the largest.
template <class A>
inline void keep(A value, uint8_t tap, A* best, uint8_t* of) {
  const bool more = !(value <= *best) && *best == *best;
  *best = more ? value : *best;
  *of = more ? tap : *of;
}

template <class T>
void forward_typed(const BlockPoolArgs& args, int64_t begin, int64_t end) {
  using A = typename Arithmetic<T>::type;
  const int64_t h = args.H / args.sy, w = args.W / args.sx;
  for (int64_t line = begin; line < end; ++line) {
    const int64_t image = line / h, y = line % h;
    for (int64_t x = 0; x < w; ++x) {
      if (!is_active(args, image, y * args.sy, x * args.sx)) continue;
      T* out = static_cast<T*>(args.out) + (line * w + x) * args.C;
      uint8_t* taps = args.taps + (line * w + x) * args.C;
      for (int64_t c0 = 0; c0 < args.C; c0 += kBlock) {
        const int64_t count = min_of(kBlock, args.C - c0);
        A best[kBlock];
        uint8_t of[kBlock];
        bool any = false;
        for (int64_t tap = 0; tap < args.kh * args.kw; ++tap) {
          const int64_t sy = y * args.sy - args.py + tap / args.kw, sx = x * args.sx - args.px + tap % args.kw;
          if (sy < 0 || sy >= args.H || sx < 0 || sx >= args.W) continue;
          const bool seen = is_active(args, image, sy, sx);
          const T* from = static_cast<const T*>(args.x) + ((image * args.H + sy) * args.W + sx) * args.C + c0;
          const uint8_t name = seen ? uint8_t(tap) : kNobody;
          if (!any) {
            for (int64_t c = 0; c < count; ++c) best[c] = seen ? to_float(from[c]) : A(0), of[c] = name;
          } else if (seen) {
            for (int64_t c = 0; c < count; ++c) keep(A(to_float(from[c])), name, best + c, of + c);
          } else {
            for (int64_t c = 0; c < count; ++c) keep(A(0), name, best + c, of + c);
          }
          any = true;
        }
        for (int64_t c = 0; c < count; ++c) from_float(best[c], out + c0 + c), taps[c0 + c] = of[c];
      }
    }
  }
}

template <class T>
void backward_typed(const BlockPoolArgs& args, int64_t begin, int64_t end) {
  using A = typename Arithmetic<T>::type;
  const int64_t h = args.H / args.sy, w = args.W / args.sx;
  for (int64_t line = begin; line < end; ++line) {
    const int64_t image = line / args.H, y = line % args.H;
    for (int64_t x = 0; x < args.W; ++x) {
      if (!is_active(args, image, y, x)) continue;
      T* out = static_cast<T*>(args.out) + (line * args.W + x) * args.C;
      for (int64_t c0 = 0; c0 < args.C; c0 += kBlock) {
        const int64_t count = min_of(kBlock, args.C - c0);
        A sum[kBlock] = {};
        for (int64_t tap = 0; tap < args.kh * args.kw; ++tap) {
          const int64_t ty = y + args.py - tap / args.kw, tx = x + args.px - tap % args.kw;
          if (ty < 0 || tx < 0 || ty % args.sy != 0 || tx % args.sx != 0 || ty / args.sy >= h || tx / args.sx >= w) continue;
          if (!is_active(args, image, ty, tx)) continue;
          const int64_t at = ((image * h + ty / args.sy) * w + tx / args.sx) * args.C + c0;
          const T* grad = static_cast<const T*>(args.grad) + at;
          const uint8_t* taps = args.taps + at;
          for (int64_t c = 0; c < count; ++c) sum[c] += taps[c] == tap ? to_float(grad[c]) : A(0);
        }
        for (int64_t c = 0; c < count; ++c) from_float(sum[c], out + c0 + c);
      }
    }
  }
}

void forward(const BlockPoolArgs& args, int64_t begin, int64_t end) {
  by_dtype(args.dtype, [&](auto of) { forward_typed<decltype(of)>(args, begin, end); });
}
void backward(const BlockPoolArgs& args, int64_t begin, int64_t end) {
  by_dtype(args.dtype, [&](auto of) { backward_typed<decltype(of)>(args, begin, end); });
}

}  // namespace

extern const BlockPoolKernels BlockPoolKernels_table{&forward, &backward};

}  // namespace MASKOPS_ISA_NS
}  // namespace maskops
