// Depthwise block-masked convolution, compiled once per instruction set. The addresses of all positions that a cell reads are found
// once; then a run of positions on a line is summed in registers, one vector of channels at a time: each value that is loaded is
// multiplied into all positions of the run that read it, so that a line of a 7 x 7 kernel costs 14 loads for 56 multiply-adds.
#include "cpu/sparse_conv/block_depthwise_pairs.h"
#include "cpu/sparse_conv/block_window.h"

namespace maskops {
inline namespace MASKOPS_ISA_NS {
namespace {

// Positions of a run by vectors of channels: eight sums, so that none waits for its own last multiply-add.
#if MASKOPS_ISA_LEVEL == 2
constexpr int kLong = 8, kShort = 4, kShortVectors = 2;
#else
constexpr int kLong = 4, kShort = 2, kShortVectors = 1;
#endif

// N vectors of channels of which the last may be partial.
template <class V, class T>
inline V load_part(const T* from, int64_t left) {
  return left >= V::width ? V::load(from) : V::load_n(from, left);
}
template <class V, class T>
inline void store_part(V value, T* to, int64_t left) {
  if (left >= V::width) value.store(to);
  else value.store_n(to, left);
}

// X positions by N vectors from channel c on; at: the first address of the run. `left` channels follow.
template <class T, int KW, int S, int X, int N, bool Whole>
void forward_run(const DepthwiseArgs& args, const Window<T>& window, const T* const* at, int64_t c, int64_t left,
                 const typename Window<T>::A* weight, T* out) {
  using V = typename Window<T>::V;
  const int64_t next = window.places * V::width;
  V sum[X][N];
#pragma GCC unroll 8
  for (int x = 0; x < X; ++x) {
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) sum[x][n] = V::load(weight + args.taps() * V::width + n * next);
  }
  for (int64_t ky = 0; ky < args.kh; ++ky, at += window.width) {
    V w[KW][N];
#pragma GCC unroll 7
    for (int k = 0; k < KW; ++k, weight += V::width) {
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) w[k][n] = V::load(weight + n * next);
    }
#pragma GCC unroll 32
    for (int j = 0; j < (X - 1) * S + KW; ++j) {
      const T* from = at[j] + c;
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) {
        const V value = Whole ? V::load(from + n * V::width) : load_part<V>(from + n * V::width, left - n * V::width);
#pragma GCC unroll 8
        for (int x = 0; x < X; ++x) {
          const int k = j - x * S;
          if (k >= 0 && k < KW) sum[x][n] = fma(value, w[k][n], sum[x][n]);
        }
      }
    }
  }
#pragma GCC unroll 8
  for (int x = 0; x < X; ++x) {
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) {
      T* to = out + x * args.C + c + n * V::width;
      if constexpr (Whole) sum[x][n].store(to);
      else store_part(sum[x][n], to, left - n * V::width);
    }
  }
}

// Kernel sizes and strides without a version of their own.
template <class T>
void forward_any(const DepthwiseArgs& args, const Window<T>& window, const T* const* at, int64_t c, int64_t left,
                 const typename Window<T>::A* weight, T* out) {
  using V = typename Window<T>::V;
  V sum = V::load(weight + args.taps() * V::width);
  for (int64_t ky = 0; ky < args.kh; ++ky, at += window.width) {
    for (int64_t kx = 0; kx < args.kw; ++kx, weight += V::width) {
      sum = fma(load_part<V>(at[kx] + c, left), V::load(weight), sum);
    }
  }
  store_part(sum, out + c, left);
}

template <class T, int KW, int S>
void forward_line(const DepthwiseArgs& args, const Window<T>& window, const T* const* at, int64_t c, const typename Window<T>::A* weight,
                  T* out, int64_t count, int64_t* done_channels) {
  using V = typename Window<T>::V;
  const int64_t left = args.C - c;
  const bool pair = kShortVectors == 2 && left >= 2 * V::width && count % kLong != 0;
  *done_channels = pair ? 2 * V::width : V::width;
  const bool whole = left >= V::width;
  int64_t x = 0;
  if (pair) {
    for (; x + kShort <= count; x += kShort) {
      forward_run<T, KW, S, kShort, kShortVectors, true>(args, window, at + x * S, c, left, weight, out + x * args.C);
    }
    for (; x < count; ++x) forward_run<T, KW, S, 1, kShortVectors, true>(args, window, at + x * S, c, left, weight, out + x * args.C);
    return;
  }
  for (; whole && x + kLong <= count; x += kLong) {
    forward_run<T, KW, S, kLong, 1, true>(args, window, at + x * S, c, left, weight, out + x * args.C);
  }
  for (; x + 2 <= count; x += 2) forward_run<T, KW, S, 2, 1, false>(args, window, at + x * S, c, left, weight, out + x * args.C);
  for (; x < count; ++x) forward_run<T, KW, S, 1, 1, false>(args, window, at + x * S, c, left, weight, out + x * args.C);
}

template <class T>
void forward_typed(const DepthwiseArgs& args, int64_t number, void* buffer) {
  using V = typename Window<T>::V;
  const Window<T> window(args, buffer);
  const int64_t cell = args.active[number], ch = args.cell_h(), cw = args.cell_w(), width = args.W / args.sx;
  window.clear(args);
  window.find(args, cell);
  T* out = static_cast<T*>(args.out) + first_position(args, cell) * args.C;
  int64_t step = V::width;
  for (int64_t c = 0; c < args.C; c += step) {
    const auto* weight = static_cast<const typename Window<T>::A*>(args.packed) + window.weight_at(0, c);
    for (int64_t y = 0; y < ch; ++y) {
      const T* const* at = window.at + y * args.sy * window.width;
      T* line = out + y * width * args.C;
      window.fetch(args, c + V::width, y, ch);
      if (args.has_line()) {
        by_line(args, [&]<int KW, int S>() { forward_line<T, KW, S>(args, window, at, c, weight, line, cw, &step); });
      } else {
        step = V::width;
        for (int64_t x = 0; x < cw; ++x) forward_any(args, window, at + x * args.sx, c, args.C - c, weight, line + x * args.C);
      }
    }
  }
}

// ---- gradient of the weight

// One line of the kernel over X positions: sums of KW places, each value of x multiplied with all gradients that it met.
template <class T, int KW, int S, int X>
void weight_run(const T* const* at, int64_t c, int64_t left, const typename Window<T>::V* grad,
                typename Window<T>::A* sums) {
  using V = typename Window<T>::V;
  V sum[KW];
#pragma GCC unroll 7
  for (int k = 0; k < KW; ++k) sum[k] = V::load(sums + k * V::width);
#pragma GCC unroll 32
  for (int j = 0; j < (X - 1) * S + KW; ++j) {
    const V value = load_part<V>(at[j] + c, left);
#pragma GCC unroll 8
    for (int x = 0; x < X; ++x) {
      const int k = j - x * S;
      if (k >= 0 && k < KW) sum[k] = fma(value, grad[x], sum[k]);
    }
  }
#pragma GCC unroll 7
  for (int k = 0; k < KW; ++k) sum[k].store(sums + k * V::width);
}

template <class T, int KW, int S, int X>
void weight_lines(const DepthwiseArgs& args, const Window<T>& window, const T* const* at, int64_t c, const T* grad_at,
                  typename Window<T>::A* sums) {
  using V = typename Window<T>::V;
  const int64_t left = args.C - c;
  V grad[X];
#pragma GCC unroll 8
  for (int x = 0; x < X; ++x) grad[x] = load_part<V>(grad_at + x * args.C + c, left);
  for (int64_t ky = 0; ky < args.kh; ++ky) {
    weight_run<T, KW, S, X>(at + ky * window.width, c, left, grad, sums + ky * KW * V::width);
  }
  V total = grad[0];
#pragma GCC unroll 8
  for (int x = 1; x < X; ++x) total = total + grad[x];
  auto* bias = sums + args.taps() * V::width;
  (V::load(bias) + total).store(bias);
}

template <class T>
void weight_any(const DepthwiseArgs& args, const Window<T>& window, const T* const* at, int64_t c, const T* grad_at,
                typename Window<T>::A* sums) {
  using V = typename Window<T>::V;
  const int64_t left = args.C - c;
  const V grad = load_part<V>(grad_at + c, left);
  for (int64_t ky = 0; ky < args.kh; ++ky) {
    for (int64_t kx = 0; kx < args.kw; ++kx) {
      auto* to = sums + (ky * args.kw + kx) * V::width;
      fma(load_part<V>(at[ky * window.width + kx] + c, left), grad, V::load(to)).store(to);
    }
  }
  auto* bias = sums + args.taps() * V::width;
  (V::load(bias) + grad).store(bias);
}

template <class T, int KW, int S>
void weight_line(const DepthwiseArgs& args, const Window<T>& window, const T* const* at, int64_t c, const T* grad, int64_t count,
                 typename Window<T>::A* sums) {
  int64_t x = 0;
  for (; x + kLong <= count; x += kLong) weight_lines<T, KW, S, kLong>(args, window, at + x * S, c, grad + x * args.C, sums);
  if constexpr (kShort < kLong) {
    for (; x + kShort <= count; x += kShort) weight_lines<T, KW, S, kShort>(args, window, at + x * S, c, grad + x * args.C, sums);
  }
  for (; x < count; ++x) weight_lines<T, KW, S, 1>(args, window, at + x * S, c, grad + x * args.C, sums);
}

template <class T>
void weight_chunk_typed(const DepthwiseArgs& args, int64_t chunk, void* buffer) {
  using V = typename Window<T>::V;
  const Window<T> window(args, buffer);
  const int64_t size = window.places * window.padded, ch = args.cell_h(), cw = args.cell_w(), width = args.W / args.sx;
  auto* partial = static_cast<typename Window<T>::A*>(args.partial) + chunk * size;
  memset(partial, 0, size_t(size) * sizeof(*partial));
  window.clear(args);
  for (int64_t number = chunk * args.count / args.chunks(); number < (chunk + 1) * args.count / args.chunks(); ++number) {
    const int64_t cell = args.active[number];
    window.find(args, cell);
    const T* grad = static_cast<const T*>(args.grad) + first_position(args, cell) * args.C;
    for (int64_t c = 0; c < args.C; c += V::width) {
      auto* sums = partial + window.weight_at(0, c);
      for (int64_t y = 0; y < ch; ++y) {
        const T* const* at = window.at + y * args.sy * window.width;
        const T* line = grad + y * width * args.C;
        window.fetch(args, c + V::width, y, ch);
        if (args.has_line()) {
          by_line(args, [&]<int KW, int S>() { weight_line<T, KW, S>(args, window, at, c, line, cw, sums); });
        } else {
          for (int64_t x = 0; x < cw; ++x) weight_any(args, window, at + x * args.sx, c, line + x * args.C, sums);
        }
      }
    }
  }
}

// Channels [begin, end), begin a multiple of every vector.
template <class T>
void sum_chunks_typed(const DepthwiseArgs& args, int64_t begin, int64_t end) {
  using V = typename Window<T>::V;
  const Window<T> window(args, nullptr);
  const auto* sums = static_cast<const typename Window<T>::A*>(args.partial);
  for (int64_t c = begin; c < end; c += V::width) {
    sum_channels<T, V, V::width>(args, sums + window.weight_at(0, c), window.places * window.padded, c, min_of<int64_t>(V::width, end - c),
                                 [](int64_t i) { return i; });
  }
}

template <class T>
void pack_typed(const DepthwiseArgs& args, int64_t begin, int64_t end) {
  using V = typename Window<T>::V;
  const Window<T> window(args, nullptr);
  const int64_t taps = args.taps();
  auto* to = static_cast<typename Window<T>::A*>(args.packed);
  memset(to + window.weight_at(0, begin), 0, size_t(window.places * round_up(end - begin, V::width)) * sizeof(*to));
  for (int64_t c = begin; c < end; ++c) {
    const T* from = static_cast<const T*>(args.weight) + c * taps;
    auto* channel = to + window.weight_at(0, c);
    for (int64_t t = 0; t < taps; ++t) channel[t * V::width] = to_float(from[args.flipped ? taps - 1 - t : t]);
    if (args.bias != nullptr) channel[taps * V::width] = to_float(static_cast<const T*>(args.bias)[c]);
  }
}

// pairs(kernels) where bfloat16 is multiplied in twos, else other(type).
template <class Pairs, class Other>
auto choose(const DepthwiseArgs& args, [[maybe_unused]] const Pairs& pairs, const Other& other) {
#if MASKOPS_ISA_LEVEL == 2
  if (args.pairs) return pairs(DepthwisePairs(args));
#endif
  return by_dtype(args.dtype, other);
}

int64_t sums_bytes(const DepthwiseArgs& args) {
  return choose(args, [](auto pairs) { return pairs.sums_bytes(); }, [&](auto of) {
    using A = typename Window<decltype(of)>::A;
    return (args.taps() + 1) * round_up(args.C, VecFor<decltype(of)>::type::width) * int64_t(sizeof(A));
  });
}
int64_t packed_bytes(const DepthwiseArgs& args) {
  return choose(args, [](auto pairs) { return pairs.packed_bytes(); }, [&](auto) { return sums_bytes(args); });
}
void pack(const DepthwiseArgs& args, int64_t begin, int64_t end) {
  choose(args, [&](auto pairs) { pairs.pack(begin, end); }, [&](auto of) { pack_typed<decltype(of)>(args, begin, end); });
}
int64_t bytes(const DepthwiseArgs& args) {
  return by_dtype(args.dtype, [&](auto of) {
    int64_t result = 0;
    Window<decltype(of)>(args, nullptr, &result);
    return result;
  });
}
void forward(const DepthwiseArgs& args, int64_t cell, void* buffer) {
  choose(args, [&](auto pairs) { pairs.forward(cell, buffer); }, [&](auto of) { forward_typed<decltype(of)>(args, cell, buffer); });
}
int64_t partial_bytes(const DepthwiseArgs& args) { return args.chunks() * sums_bytes(args); }
void weight_chunk(const DepthwiseArgs& args, int64_t chunk, void* buffer) {
  choose(args, [&](auto pairs) { pairs.weight_chunk(chunk, buffer); },
         [&](auto of) { weight_chunk_typed<decltype(of)>(args, chunk, buffer); });
}
void sum_chunks(const DepthwiseArgs& args, int64_t begin, int64_t end) {
  choose(args, [&](auto pairs) { pairs.sum_chunks(begin, end); }, [&](auto of) { sum_chunks_typed<decltype(of)>(args, begin, end); });
}

}  // namespace

extern const DepthwiseKernels DepthwiseKernels_table{&packed_bytes, &pack,         &bytes,     &forward,
                                                     &partial_bytes, &weight_chunk, &sum_chunks};

}  // namespace MASKOPS_ISA_NS
}  // namespace maskops
