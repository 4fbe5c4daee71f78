// Kernels of embed_patches, compiled once per instruction set. Rows are packed from the image by PatchRows; the sums of a
// tile go through an epilogue that adds bias and position, or scatters to pixels.
#include "common/gemm_pack.h"
#include "cpu/visible_tokens/embed.h"

namespace maskops {
inline namespace MASKOPS_ISA_NS {
namespace {

// Values v0..v1 of the patch of a slot, gathered line by line; an empty slot reads as zeros.
template <class T>
struct PatchRows {
  const T* images;
  const int64_t *starts, *runs;
  int64_t run, first;

  PatchRows(const Embed& e, int64_t first_slot)
      : images(static_cast<const T*>(e.images)), starts(e.starts), runs(e.runs), run(e.run), first(first_slot) {}

  inline const T* operator()(int64_t slot, int64_t v0, int64_t v1, T* to) const {
    const int64_t start = starts[first + slot];
    if (start < 0) {
      memset(to, 0, size_t(v1 - v0) * sizeof(T));
      return to;
    }
    int64_t line = v0 / run, offset = v0 - line * run;
    for (T* at = to; v0 < v1; ++line, offset = 0) {
      const int64_t count = min_of(run - offset, v1 - v0);
      copy_values(images + start + runs[line] + offset, count, at);
      at += count;
      v0 += count;
    }
    return to;
  }
};

// Rows of the incoming gradient; an empty slot reads as zeros, whatever its row holds.
template <class T>
struct GradRows {
  const T* grad;
  const int64_t* starts;
  int64_t embed, first;

  GradRows(const Embed& e, int64_t first_slot)
      : grad(static_cast<const T*>(e.grad)), starts(e.starts), embed(e.embed), first(first_slot) {}

  inline const T* operator()(int64_t slot, int64_t e0, int64_t e1, T* to) const {
    if (starts[first + slot] >= 0) return grad + (first + slot) * embed + e0;
    memset(to, 0, size_t(e1 - e0) * sizeof(T));
    return to;
  }
};

template <class Run>
inline void with_types(const Embed& e, const Run& run) {
  with_packed_types(e.dtype, e.products, run);
}
static_assert(kEmbedLines >= kMostRowsAtOnce);

// Blocks of about equal size of at most kGemmRows rows, in whole panels: body(first row, rows).
template <class P, class Body>
inline void for_blocks(Span rows, const Body& body) {
  const int64_t count = rows.end - rows.begin, blocks = (count + kGemmRows - 1) / kGemmRows;
  if (blocks == 0) return;
  const int64_t size = round_up((count + blocks - 1) / blocks, Gemm<P>::kRows);
  for (int64_t i = rows.begin; i < rows.end; i += size) body(i, min_of(size, rows.end - i));
}

template <class P>
GemmPlan plan_for(int64_t m, int64_t n, int64_t k) {
  using G = Gemm<P>;
  const int64_t rows = min_of(m, kGemmRows);
  return {G::kRows, G::kCols, gemm_steps<P>(k), packed_a_size<P>(rows, k) * int64_t(sizeof(P)),
          packed_b_size<P>(n, k) * int64_t(sizeof(P)), partial_size<P>(rows, n, k) * int64_t(sizeof(typename G::Sum))};
}

GemmPlan plan(const Embed& e, int64_t m, int64_t n, int64_t k) {
  GemmPlan result{};
  with_types(e, [&]<class P, class T>() { result = plan_for<P>(m, n, k); });
  return result;
}

// ---- forward

void pack_weight(const Embed& e, Span panels, const Buffers& to) {
  with_types(e, [&]<class P, class T>() {
    const MatrixRows<T> rows{static_cast<const T*>(e.weight), e.values};
    pack_b<P, T>(rows, e.embed, e.values, panels.begin, panels.end, static_cast<P*>(to.b));
  });
}

// One row of a tile: + bias + position, or zeros for an empty slot.
template <class V, class T>
inline void write_tokens(const Embed& e, const typename V::scalar* sums, int64_t row, int64_t j, int64_t cols) {
  T* out = static_cast<T*>(e.out) + row * e.embed + j;
  const int64_t token = e.tokens[row];
  const T* bias = e.bias ? static_cast<const T*>(e.bias) + j : nullptr;
  const T* pos = e.pos && token >= 0 ? static_cast<const T*>(e.pos) + token * e.embed + j : nullptr;
  for (int64_t c = 0; c < cols; c += V::width) {
    const int64_t n = min_of<int64_t>(cols - c, V::width);
    V value = V::load(sums + c);
    if (bias) value = value + V::load_n(bias + c, n);
    if (pos) value = value + V::load_n(pos + c, n);
    (token < 0 ? V::zero() : value).store_n(out + c, n);
  }
}

void forward(const Embed& e, Span rows, const Buffers& use) {
  with_types(e, [&]<class P, class T>() {
    using V = typename Gemm<P>::Vec;
    using Sum = typename Gemm<P>::Sum;
    const PatchRows<T> patches(e, 0);
    P* a = static_cast<P*>(use.a);
    for_blocks<P>(rows, [&](int64_t first, int64_t count) {
      pack_a<P, T>(patches, first, count, e.values, a);
      multiply_packed<P>(count, e.embed, e.values, a, static_cast<const P*>(use.b), static_cast<Sum*>(use.partial),
                         [&](const Sum* tile, int64_t stride, int64_t i, int64_t j, int64_t n, int64_t cols) {
                           for (int64_t r = 0; r < n; ++r) write_tokens<V, T>(e, tile + r * stride, first + i + r, j, cols);
                         });
    });
  });
}

// ---- gradient for the weight: the sum runs over slots

void pack_patches(const Embed& e, Span slots, Span steps, const Buffers& use) {
  with_types(e, [&]<class P, class T>() {
    const PatchRows<T> patches(e, slots.begin);
    pack_b_rows<P, T>(patches, e.values, slots.end - slots.begin, steps.begin, steps.end, static_cast<T*>(use.lines),
                      static_cast<P*>(use.b));
  });
}

void grad_weight(const Embed& e, Span slots, Span channels, const Buffers& use, void* sums) {
  with_types(e, [&]<class P, class T>() {
    using V = typename Gemm<P>::Vec;
    using Sum = typename Gemm<P>::Sum;
    const GradRows<T> grad(e, slots.begin);
    const int64_t depth = slots.end - slots.begin;
    const bool add = slots.begin > 0;
    P* a = static_cast<P*>(use.a);
    for_blocks<P>(channels, [&](int64_t first, int64_t count) {
      pack_a_rows<P, T>(grad, first, count, depth, static_cast<T*>(use.lines), a);
      multiply_packed<P>(count, e.values, depth, a, static_cast<const P*>(use.b), static_cast<Sum*>(use.partial),
                         [&](const Sum* tile, int64_t stride, int64_t i, int64_t j, int64_t n, int64_t cols) {
                           for (int64_t r = 0; r < n; ++r) {
                             Sum* to = static_cast<Sum*>(sums) + (first + i + r) * e.values + j;
                             for (int64_t c = 0; c < cols; c += V::width) {
                               const int64_t some = min_of<int64_t>(cols - c, V::width);
                               V value = V::load(tile + r * stride + c);
                               if (add) value = value + V::load_n(to + c, some);
                               value.store_n(to + c, some);
                             }
                           }
                         });
    });
  });
}

// ---- gradient for the images

void pack_weight_rows(const Embed& e, Span steps, const Buffers& use) {
  with_types(e, [&]<class P, class T>() {
    const MatrixRows<T> rows{static_cast<const T*>(e.weight), e.values};
    pack_b_rows<P, T>(rows, e.values, e.embed, steps.begin, steps.end, static_cast<T*>(use.lines), static_cast<P*>(use.b));
  });
}

// Values j..j+cols of the gradient of a patch to its pixels; patches of a row of ids are distinct, so nothing overlaps.
template <class V, class T>
inline void write_pixels(const Embed& e, const typename V::scalar* sums, int64_t row, int64_t j, int64_t cols) {
  if (e.starts[row] < 0) return;
  T* image = static_cast<T*>(e.out) + e.starts[row];
  int64_t line = j / e.run, offset = j - line * e.run;
  for (int64_t c = 0; c < cols; ++line, offset = 0) {
    const int64_t end = min_of(cols, c + e.run - offset);
    for (T* to = image + e.runs[line] + offset; c < end;) {
      const int64_t n = min_of<int64_t>(end - c, V::width);
      V::load_n(sums + c, n).store_n(to, n);
      c += n;
      to += n;
    }
  }
}

void grad_images(const Embed& e, Span rows, const Buffers& use) {
  with_types(e, [&]<class P, class T>() {
    using V = typename Gemm<P>::Vec;
    using Sum = typename Gemm<P>::Sum;
    const GradRows<T> grad(e, 0);
    P* a = static_cast<P*>(use.a);
    for_blocks<P>(rows, [&](int64_t first, int64_t count) {
      pack_a<P, T>(grad, first, count, e.embed, a);
      multiply_packed<P>(count, e.values, e.embed, a, static_cast<const P*>(use.b), static_cast<Sum*>(use.partial),
                         [&](const Sum* tile, int64_t stride, int64_t i, int64_t j, int64_t n, int64_t cols) {
                           for (int64_t r = 0; r < n; ++r) write_pixels<V, T>(e, tile + r * stride, first + i + r, j, cols);
                         });
    });
  });
}

// ---- gradients for position and bias

// One vector of columns summed over rows in chains of kChain additions, whose sums are added up in turn: the rounding error
// grows with the length of a chain, not with the number of rows. load(r) is row r's vector.
template <class V, class Load>
inline V sum_in_chains(int64_t rows, const Load& load) {
  constexpr int64_t kChain = 16;
  V all = V::zero(), many = V::zero();
  for (int64_t r0 = 0, chain = 1; r0 < rows; r0 += kChain, ++chain) {
    V few = V::zero();
    for (int64_t r = r0, end = min_of(rows, r0 + kChain); r < end; ++r) few = few + load(r);
    many = many + few;
    if (chain % kChain == 0) {
      all = all + many;
      many = V::zero();
    }
  }
  return all + many;
}

// sums[token, :] = sum over the batch of the grad rows of that token; row_of [batch, grid], -1: not visible.
void sum_slots(const Embed& e, const int64_t* row_of, int64_t batch, int64_t grid, Span tokens, void* sums) {
  with_types(e, [&]<class P, class T>() {
    using V = typename Gemm<P>::Vec;
    using Sum = typename Gemm<P>::Sum;
    const T* grad = static_cast<const T*>(e.grad);
    for (int64_t token = tokens.begin; token < tokens.end; ++token) {
      Sum* to = static_cast<Sum*>(sums) + token * e.embed;
      for (int64_t j = 0; j < e.embed; j += V::width) {
        const int64_t n = min_of<int64_t>(e.embed - j, V::width);
        const V total = sum_in_chains<V>(batch, [&](int64_t b) {
          const int64_t row = row_of[b * grid + token];
          return row < 0 ? V::zero() : V::load_n(grad + row * e.embed + j, n);
        });
        total.store_n(to + j, n);
      }
    }
  });
}

// out[j] = sum over tokens of sums[token, j], for a span of channels.
void sum_rows(const Embed& e, const void* sums, int64_t grid, Span channels, void* out) {
  with_types(e, [&]<class P, class T>() {
    using V = typename Gemm<P>::Vec;
    const auto* from = static_cast<const typename Gemm<P>::Sum*>(sums);
    for (int64_t j = channels.begin; j < channels.end; j += V::width) {
      const int64_t n = min_of<int64_t>(channels.end - j, V::width);
      const V total = sum_in_chains<V>(grid, [&](int64_t token) { return V::load_n(from + token * e.embed + j, n); });
      total.store_n(static_cast<T*>(out) + j, n);
    }
  });
}

void narrow(const Embed& e, const void* sums, Span values, void* out) {
  with_types(e, [&]<class P, class T>() {
    using V = typename Gemm<P>::Vec;
    const auto* from = static_cast<const typename Gemm<P>::Sum*>(sums);
    for (int64_t i = values.begin; i < values.end; i += V::width) {
      const int64_t n = min_of<int64_t>(values.end - i, V::width);
      V::load_n(from + i, n).store_n(static_cast<T*>(out) + i, n);
    }
  });
}

}  // namespace

extern const EmbedKernels EmbedKernels_table{
    &plan,        &pack_weight, &forward,  &pack_patches, &grad_weight, &pack_weight_rows,
    &grad_images, &sum_slots,   &sum_rows, &narrow};

}  // namespace MASKOPS_ISA_NS
}  // namespace maskops
