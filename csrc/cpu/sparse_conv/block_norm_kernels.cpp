// The kernels of masked normalisation, compiled once per instruction set. Positions of an active cell on a line lie side by side.
#include "cpu/sparse_conv/block_norm.h"

#include "common/pieces.h"
#include "cpu/sparse_conv/types.h"

namespace maskops {
inline namespace MASKOPS_ISA_NS {
namespace {

template <class T>
struct Types {
  using V = typename VecFor<T>::type;
  using A = typename V::scalar;
};

// run(offset of the first position in values, positions, image) for the active parts of lines [begin, end) of all images.
template <class Run>
inline void each_run(const BlockNormArgs& args, int64_t begin, int64_t end, const Run& run) {
  const int64_t ch = args.H / args.h, cw = args.W / args.w;
  for (int64_t line = begin; line < end; ++line) {
    const int64_t image = line / args.H;
    const bool* cells = args.cells + (image * args.h + line % args.H / ch) * args.w;
    for (int64_t i = 0; i < args.w;) {
      int64_t j = i;
      while (j < args.w && cells[j]) ++j;
      if (j > i) run((line * args.W + i * cw) * args.C, (j - i) * cw, image);
      i = j + 1;
    }
  }
}

template <class V, class T>
inline V load_part(const T* from, int64_t left) {
  return left >= V::width ? V::load(from) : V::load_n(from, left);
}
template <class V, class T>
inline void store_part(V value, T* to, int64_t left) {
  if (left >= V::width) value.store(to);
  else value.store_n(to, left);
}

template <class T>
void normalise_typed(const BlockNormArgs& args, int64_t begin, int64_t end) {
  using V = typename Types<T>::V;
  using A = typename Types<T>::A;
  const A *mean = static_cast<const A*>(args.mean), *rstd = static_cast<const A*>(args.of_grad);
  const A *weight = static_cast<const A*>(args.weight), *bias = static_cast<const A*>(args.bias);
  each_run(args, begin, end, [&](int64_t offset, int64_t count, int64_t image) {
    const int64_t row = args.S == 1 ? 0 : image * args.C;
    const T* x = static_cast<const T*>(args.x) + offset;
    T* out = static_cast<T*>(args.out) + offset;
    for (int64_t c = 0; c < args.C; c += V::width) {
      const int64_t left = args.C - c;
      const V m = load_part<V>(mean + row + c, left);
      V scale = load_part<V>(rstd + row + c, left), shift = V::zero();
      if (weight != nullptr) scale = scale * load_part<V>(weight + c, left);
      if (bias != nullptr) shift = load_part<V>(bias + c, left);
      for (int64_t p = 0; p < count; ++p) {
        store_part(fma(load_part<V>(x + p * args.C + c, left) - m, scale, shift), out + p * args.C + c, left);
      }
    }
  });
}

template <class T>
void backward_typed(const BlockNormArgs& args, int64_t begin, int64_t end) {
  using V = typename Types<T>::V;
  using A = typename Types<T>::A;
  each_run(args, begin, end, [&](int64_t offset, int64_t count, int64_t image) {
    const int64_t row = args.S == 1 ? 0 : image * args.C;
    const T *x = static_cast<const T*>(args.x) + offset, *grad = static_cast<const T*>(args.grad) + offset;
    T* out = static_cast<T*>(args.out) + offset;
    for (int64_t c = 0; c < args.C; c += V::width) {
      const int64_t left = args.C - c;
      const V m = load_part<V>(static_cast<const A*>(args.mean) + row + c, left);
      const V a = load_part<V>(static_cast<const A*>(args.of_grad) + row + c, left);
      const V b = load_part<V>(static_cast<const A*>(args.of_x) + row + c, left);
      const V k = load_part<V>(static_cast<const A*>(args.constant) + row + c, left);
      for (int64_t p = 0; p < count; ++p) {
        const V off = load_part<V>(x + p * args.C + c, left) - m;
        store_part(fma(load_part<V>(grad + p * args.C + c, left), a, fma(off, b, k)), out + p * args.C + c, left);
      }
    }
  });
}

struct Lines {
  int64_t begin, end;
};
inline Lines lines_of(const BlockNormArgs& args, int64_t chunk) {
  const int64_t image = chunk / args.chunks(), first = chunk % args.chunks() * args.chunk_lines();
  return {image * args.H + first, image * args.H + min_of(args.H, first + args.chunk_lines())};
}

// Adds step(position, channel vector) to sums [C], run by run.
template <class T, class Step>
inline void add_up(const BlockNormArgs& args, Lines lines, typename Types<T>::A* sums, const Step& step) {
  using V = typename Types<T>::V;
  each_run(args, lines.begin, lines.end, [&](int64_t offset, int64_t count, int64_t image) {
    for (int64_t c = 0; c < args.C; c += V::width) {
      const int64_t left = args.C - c;
      V sum = load_part<V>(sums + c, left);
      for (int64_t p = 0; p < count; ++p) sum = sum + step(offset + p * args.C + c, left, image, c);
      store_part(sum, sums + c, left);
    }
  });
}

template <class T>
void moments_typed(const BlockNormArgs& args, int64_t begin, int64_t end) {
  using V = typename Types<T>::V;
  using A = typename Types<T>::A;
  const T* x = static_cast<const T*>(args.x);
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    A *mean = static_cast<A*>(args.partial) + chunk * 2 * args.C, *square = mean + args.C;
    memset(mean, 0, size_t(2 * args.C) * sizeof(A));
    const Lines lines = lines_of(args, chunk);
    int64_t seen = 0;
    each_run(args, lines.begin, lines.end, [&](int64_t, int64_t count, int64_t) { seen += count; });
    args.seen[chunk] = seen;
    if (seen == 0) continue;
    add_up<T>(args, lines, mean, [&](int64_t at, int64_t left, int64_t, int64_t) { return load_part<V>(x + at, left); });
    for (int64_t c = 0; c < args.C; ++c) mean[c] /= A(seen);
    add_up<T>(args, lines, square, [&](int64_t at, int64_t left, int64_t, int64_t c) {
      const V off = load_part<V>(x + at, left) - load_part<V>(mean + c, left);
      return off * off;
    });
  }
}

template <class T>
void join_moments_typed(const BlockNormArgs& args) {
  using A = typename Types<T>::A;
  const int64_t chunks = args.B * args.chunks(), each = args.S == 0 ? 0 : chunks / args.S;
  for (int64_t s = 0; s < args.S; ++s) {
    A *mean = static_cast<A*>(args.first) + s * args.C, *square = static_cast<A*>(args.second) + s * args.C;
    for (int64_t c = 0; c < args.C; ++c) mean[c] = square[c] = 0;
    int64_t before = 0;
    for (int64_t chunk = s * each; chunk < (s + 1) * each; ++chunk) {
      if (args.seen[chunk] == 0) continue;
      const A* own = static_cast<const A*>(args.partial) + chunk * 2 * args.C;
      const int64_t total = before + args.seen[chunk];
      const A share = A(args.seen[chunk]) / A(total);
      for (int64_t c = 0; c < args.C; ++c) {
        const A off = own[c] - mean[c];
        mean[c] += off * share;
        square[c] += own[args.C + c] + off * off * share * A(before);
      }
      before = total;
    }
  }
}

template <class T>
void sums_typed(const BlockNormArgs& args, int64_t begin, int64_t end) {
  using V = typename Types<T>::V;
  using A = typename Types<T>::A;
  const T *x = static_cast<const T*>(args.x), *grad = static_cast<const T*>(args.grad);
  const A* mean = static_cast<const A*>(args.mean);
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    A *first = static_cast<A*>(args.partial) + chunk * 2 * args.C, *second = first + args.C;
    memset(first, 0, size_t(2 * args.C) * sizeof(A));
    const Lines lines = lines_of(args, chunk);
    each_run(args, lines.begin, lines.end, [&](int64_t offset, int64_t count, int64_t image) {
      const A* m = mean + (args.S == 1 ? 0 : image * args.C);
      for (int64_t c = 0; c < args.C; c += V::width) {
        const int64_t left = args.C - c;
        const V middle = load_part<V>(m + c, left);
        V a = load_part<V>(first + c, left), b = load_part<V>(second + c, left);
        for (int64_t p = 0; p < count; ++p) {
          const V g = load_part<V>(grad + offset + p * args.C + c, left);
          a = a + g;
          b = fma(g, load_part<V>(x + offset + p * args.C + c, left) - middle, b);
        }
        store_part(a, first + c, left);
        store_part(b, second + c, left);
      }
    });
  }
}

template <class T>
void join_sums_typed(const BlockNormArgs& args) {
  using A = typename Types<T>::A;
  const int64_t chunks = args.B * args.chunks(), each = args.S == 0 ? 0 : chunks / args.S;
  for (int64_t s = 0; s < args.S; ++s) {
    A *first = static_cast<A*>(args.first) + s * args.C, *second = static_cast<A*>(args.second) + s * args.C;
    for (int64_t c = 0; c < args.C; ++c) first[c] = second[c] = 0;
    for (int64_t chunk = s * each; chunk < (s + 1) * each; ++chunk) {
      const A* own = static_cast<const A*>(args.partial) + chunk * 2 * args.C;
      for (int64_t c = 0; c < args.C; ++c) first[c] += own[c], second[c] += own[args.C + c];
    }
  }
}

// ---- layer norm

template <class A>
struct RowStats {
  A mean, rstd;
};

template <class T>
RowStats<typename Types<T>::A> row_stats(const T* x, int64_t C, double eps) {
  using V = typename Types<T>::V;
  using A = typename Types<T>::A;
  V sum = V::zero();
  int64_t c = 0;
  for (; c + V::width <= C; c += V::width) sum = sum + V::load(x + c);
  A total = sum.sum();
  for (int64_t i = c; i < C; ++i) total += to_float(x[i]);
  const A mean = total / A(C);
  V square = V::zero();
  for (c = 0; c + V::width <= C; c += V::width) {
    const V off = V::load(x + c) - V::all(mean);
    square = fma(off, off, square);
  }
  total = square.sum();
  for (int64_t i = c; i < C; ++i) total += (to_float(x[i]) - mean) * (to_float(x[i]) - mean);
  const A variance = total / A(C) + A(eps);
  return {mean, A(1) / (sizeof(A) == 4 ? A(__builtin_sqrtf(float(variance))) : A(__builtin_sqrt(double(variance))))};
}

template <class T>
void layer_typed(const BlockNormArgs& args, int64_t begin, int64_t end) {
  using V = typename Types<T>::V;
  using A = typename Types<T>::A;
  const A *weight = static_cast<const A*>(args.weight), *bias = static_cast<const A*>(args.bias);
  each_run(args, begin, end, [&](int64_t offset, int64_t count, int64_t) {
    for (int64_t p = 0; p < count; ++p, offset += args.C) {
      const T* x = static_cast<const T*>(args.x) + offset;
      T* out = static_cast<T*>(args.out) + offset;
      const auto stats = row_stats(x, args.C, args.eps);
      for (int64_t c = 0; c < args.C; c += V::width) {
        const int64_t left = args.C - c;
        V y = (load_part<V>(x + c, left) - V::all(stats.mean)) * V::all(stats.rstd);
        if (weight != nullptr) y = y * load_part<V>(weight + c, left);
        if (bias != nullptr) y = y + load_part<V>(bias + c, left);
        store_part(y, out + c, left);
      }
    }
  });
}

template <class T>
void layer_backward_typed(const BlockNormArgs& args, int64_t begin, int64_t end) {
  using V = typename Types<T>::V;
  using A = typename Types<T>::A;
  const A* weight = static_cast<const A*>(args.weight);
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    A *of_weight = static_cast<A*>(args.partial) + chunk * 2 * args.C, *of_bias = of_weight + args.C;
    memset(of_weight, 0, size_t(2 * args.C) * sizeof(A));
    const Lines lines = lines_of(args, chunk);
    each_run(args, lines.begin, lines.end, [&](int64_t offset, int64_t count, int64_t) {
      for (int64_t p = 0; p < count; ++p, offset += args.C) {
        const T *x = static_cast<const T*>(args.x) + offset, *grad = static_cast<const T*>(args.grad) + offset;
        T* out = static_cast<T*>(args.out) + offset;
        const auto stats = row_stats(x, args.C, args.eps);
        const V mean = V::all(stats.mean), rstd = V::all(stats.rstd);
        V plain = V::zero(), crossed = V::zero();
        for (int64_t c = 0; c < args.C; c += V::width) {
          const int64_t left = args.C - c;
          const V g = load_part<V>(grad + c, left);  // 0 past the end
          const V y = (load_part<V>(x + c, left) - mean) * rstd;
          store_part(fma(g, y, load_part<V>(of_weight + c, left)), of_weight + c, left);
          store_part(g + load_part<V>(of_bias + c, left), of_bias + c, left);
          const V scaled = weight == nullptr ? g : g * load_part<V>(weight + c, left);
          plain = plain + scaled;
          crossed = fma(scaled, y, crossed);
        }
        const V a = V::all(plain.sum() / A(args.C)), b = V::all(crossed.sum() / A(args.C));
        for (int64_t c = 0; c < args.C; c += V::width) {
          const int64_t left = args.C - c;
          const V g = load_part<V>(grad + c, left), y = (load_part<V>(x + c, left) - mean) * rstd;
          const V scaled = weight == nullptr ? g : g * load_part<V>(weight + c, left);
          store_part((scaled - a - y * b) * rstd, out + c, left);
        }
      }
    });
  }
}

#define MASKOPS_BY_DTYPE(NAME)                                                      \
  void NAME(const BlockNormArgs& args, int64_t begin, int64_t end) {                \
    by_dtype(args.dtype, [&](auto of) { NAME##_typed<decltype(of)>(args, begin, end); }); \
  }
MASKOPS_BY_DTYPE(normalise)
MASKOPS_BY_DTYPE(moments)
MASKOPS_BY_DTYPE(sums)
MASKOPS_BY_DTYPE(backward)
MASKOPS_BY_DTYPE(layer)
MASKOPS_BY_DTYPE(layer_backward)
#undef MASKOPS_BY_DTYPE
void join_moments(const BlockNormArgs& args) {
  by_dtype(args.dtype, [&](auto of) { join_moments_typed<decltype(of)>(args); });
}
void join_sums(const BlockNormArgs& args) {
  by_dtype(args.dtype, [&](auto of) { join_sums_typed<decltype(of)>(args); });
}

}  // namespace

extern const BlockNormKernels BlockNormKernels_table{&normalise, &moments, &join_moments, &sums,
                                                     &join_sums, &backward, &layer,       &layer_backward};

}  // namespace MASKOPS_ISA_NS
}  // namespace maskops
