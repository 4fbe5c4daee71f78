// Kernels of linear_cross_entropy. A tile is 96 classes by all rows that count, kept transposed: classes down, rows across, so that
// a vector holds one class of 16 rows, the softmax needs no sums across lanes, and all three products take their operands from
// panels of 64 columns without another transposition:
//     logits [96, M] = weight [96, D] hidden^T;   grad_weight [96, D] = slope [96, M] hidden;   grad_hidden [M, D] += slope^T weight
// grad_hidden is summed over the classes in their order, so neither threads nor tiles change a bit.
#include "common/gemm_strided.h"
#include "common/pieces.h"
#include "common/simd_math.h"
#include "common/simd_philox.h"
#include "cpu/masked_loss/linear.h"

namespace maskops {
inline namespace MASKOPS_ISA_NS {
namespace {

constexpr int64_t kPanel = LinearLoss::kPanel, kTile = LinearLoss::kTile;
constexpr int64_t kSteps = 128;     // rows of a panel that stay in the L1 cache
constexpr int64_t kRowBlock = 192;  // rows of grad_hidden at a time
constexpr int64_t kCounted = int64_t{1} << 23;  // rows that float32 can count, lanes included

template <class S>
S* at(void* base, int64_t offset) {
  return static_cast<S*>(base) + offset;
}

template <class T>
struct Loss {
  using V = typename VecFor<T>::type;
  using S = typename V::scalar;
  const LinearLoss& a;

  int64_t classes(int64_t tile) const { return min_of(kTile, a.V - tile * kTile); }
  int64_t width(int64_t q) const { return min_of(kPanel, round_up(a.D - q * kPanel, V::width)); }

  // ---- hidden and weight as panels

  void pack_rows(int64_t p) const {
    const int64_t first = p * kPanel, count = min_of(kPanel, a.stride - first);
    S* across = at<S>(a.across, p * a.D * kPanel);
    for (int64_t r = 0; r < count; ++r) {
      const bool real = first + r < a.M;
      const T* from = real ? static_cast<const T*>(a.hidden) + a.rows[first + r] * a.hidden_stride : nullptr;
      for (int64_t q = 0; q < a.d_panels(); ++q) {
        S* along = a.along == nullptr ? nullptr : at<S>(a.along, (q * a.stride + first + r) * kPanel);
        for (int64_t d = 0; d < kPanel; ++d) {
          const int64_t at = q * kPanel + d;
          const S value = real && at < a.D ? S(to_float(from[at])) : S(0);
          if (along != nullptr) along[d] = value;
          if (at < a.D) across[at * kPanel + r] = value;
        }
      }
    }
  }

  // The classes of a tile: [panels of D][kTile][64], zeros past D.
  void pack_weight(int64_t tile, S* to) const {
    const int64_t count = classes(tile);
    for (int64_t v = 0; v < count; ++v) {
      const T* from = static_cast<const T*>(a.weight) + (tile * kTile + v) * a.weight_stride;
      for (int64_t q = 0; q < a.d_panels(); ++q) {
        S* row = to + (q * kTile + v) * kPanel;
        const int64_t real = min_of(kPanel, a.D - q * kPanel);
        int64_t d = 0;
        for (; d + V::width <= real; d += V::width) V::load(from + q * kPanel + d).store(row + d);
        for (; d < kPanel; d += V::width) {
          (d < real ? V::load_n(from + q * kPanel + d, real - d) : V::zero()).store(row + d);
        }
      }
    }
  }

  // ---- logits

  void fill_logits(int64_t tile, const S* panels, S* logits) const {
    const int64_t count = classes(tile);
    if (a.D == 0) memset(logits, 0, size_t(count * a.stride) * sizeof(S));  // no product writes them
    for (int64_t p = 0; p < a.row_panels(); ++p) {
      const int64_t rows = min_of(kPanel, a.stride - p * kPanel);
      const S* across = at<S>(a.across, p * a.D * kPanel);
      for (int64_t q = 0; q < a.d_panels(); ++q) {
        const int64_t steps = min_of(kPanel, a.D - q * kPanel);
        multiply_strided<V>(count, rows, steps, {panels + q * kTile * kPanel, kPanel, 1}, across + q * kPanel * kPanel, kPanel,
                            StridedC<S>{logits + p * kPanel, a.stride, q > 0});
      }
    }
    if (a.bias == nullptr && a.scale == 1) return;
    const V scale = V::all(S(a.scale));
    for (int64_t v = 0; v < count; ++v) {
      const V bias = V::all(a.bias == nullptr ? S(0) : S(to_float(static_cast<const T*>(a.bias)[tile * kTile + v])));
      S* row = logits + v * a.stride;
      for (int64_t m = 0; m < a.stride; m += V::width) ((V::load(row + m) + bias) * scale).store(row + m);
    }
  }

  // ---- forward

  // Folds a tile into the running values of a range.
  void reduce(int64_t tile, const S* logits, S* highest, S* total, S* sums) const {
    const int64_t count = classes(tile);
    const V lowest = V::all(S(-3e38f));
    for (int64_t m = 0; m < a.stride; m += V::width) {
      V top = V::load(highest + m), all = V::zero(), sum = V::load(sums + m);
      const V before = top;
      for (int64_t v = 0; v < count; ++v) top = max(V::load(logits + v * a.stride + m), top);
      const V base = max(top, lowest);  // no infinity minus infinity
      for (int64_t v = 0; v < count; ++v) {
        const V x = V::load(logits + v * a.stride + m);
        all = all + exp_below_zero(x - base);
        sum = sum + x;
      }
      const V decay = exp_below_zero(max(before, lowest) - base);
      fma(V::load(total + m), decay, all).store(total + m);
      top.store(highest + m);
      sum.store(sums + m);
    }
  }

  void pick(int64_t tile, const S* logits) const {
    for (int64_t m = 0; m < a.M; ++m) {
      const int64_t v = a.target[m] - tile * kTile;
      if (v >= 0 && v < kTile) at<S>(a.picked, m)[0] = logits[v * a.stride + m];
    }
  }

  // Raises best and sample of a range by a tile. Noise of row n, codebook g, class v is word (n books + g) V + v of the generator.
  void draw(int64_t tile, const S* logits, S* best, int64_t* sample) const {
    constexpr int64_t kWords = 4 * kPhiloxCounters;
    constexpr int64_t kMost = (kTile + 2 * kWords) / kWords * kWords;
    alignas(64) uint32_t words[kMost];
    alignas(64) S noise[kMost + V::width];
    const int64_t count = classes(tile);
    for (int64_t m = 0; m < a.M; ++m) {
      if (a.target[m] < 0) continue;
      const int64_t first = (a.rows[m] * a.books + a.book) * a.V + tile * kTile, skip = first % 4;
      for (int64_t w = 0; w < count + skip; w += kWords) philox_words(a.key, uint64_t((first - skip + w) / 4), words + w);
      for (int64_t v = 0; v < count; ++v) noise[v] = (S(words[skip + v] >> 9) + S(0.5)) * S(0x1p-23);
      for (int64_t v = count; v < round_up(count, V::width); ++v) noise[v] = S(0.5);
      for (int64_t v = 0; v < count; v += V::width) {
        const V once = V::zero() - log_of_positive(V::load(noise + v));
        (V::zero() - log_of_positive(once)).store(noise + v);
      }
      S top = best[m];
      int64_t found = sample[m];
      for (int64_t v = 0; v < count; ++v) {
        const S x = logits[v * a.stride + m] * S(a.inverse_temperature) + noise[v];
        if (x > top || (found < 0 && v == 0)) top = x, found = tile * kTile + v;
      }
      best[m] = top, sample[m] = found;
    }
  }

  void forward(bool sampled, int64_t range, S* buffer) const {
    const int64_t tiles = a.tiles(), ranges = a.ranges();
    S *panels = buffer, *logits = buffer + a.tile_panels();
    S *highest = at<S>(a.highest, range * a.stride), *total = at<S>(a.total, range * a.stride), *sums = at<S>(a.sums, range * a.stride);
    for (int64_t m = 0; m < a.stride; ++m) highest[m] = S(-__builtin_inff()), total[m] = 0, sums[m] = 0;
    if (sampled) {
      for (int64_t m = 0; m < a.stride; ++m) at<S>(a.best, range * a.stride)[m] = S(-__builtin_inff()), a.sample[range * a.stride + m] = -1;
    }
    for (int64_t tile = range * tiles / ranges; tile < (range + 1) * tiles / ranges; ++tile) {
      pack_weight(tile, panels);
      fill_logits(tile, panels, logits);
      reduce(tile, logits, highest, total, sums);
      pick(tile, logits);
      if (sampled) draw(tile, logits, at<S>(a.best, range * a.stride), a.sample + range * a.stride);
    }
  }

  void finish(bool sampled, S* loss) const {
    for (int64_t m = 0; m < a.M; ++m) {
      const bool counted = a.target[m] >= 0;
      double top = -__builtin_inf(), sum = 0, all = 0;
      for (int64_t r = 0; r < a.ranges(); ++r) {
        const double other = at<S>(a.highest, r * a.stride)[m];
        if (other > top) top = other;
      }
      const double base = top < -3e38 ? -3e38 : top;
      S noisy = S(-__builtin_inff());
      int64_t found = -1;
      for (int64_t r = 0; r < a.ranges(); ++r) {
        const double other = at<S>(a.highest, r * a.stride)[m];
        sum += double(at<S>(a.total, r * a.stride)[m]) * __builtin_exp((other < -3e38 ? -3e38 : other) - base);
        all += double(at<S>(a.sums, r * a.stride)[m]);
        if (!sampled) continue;
        const S x = at<S>(a.best, r * a.stride)[m];
        if (found < 0 || x > noisy) noisy = x, found = a.sample[r * a.stride + m];
      }
      const double lse = base + __builtin_log(sum);
      double value = lse - (1 - a.smoothing) * double(at<S>(a.picked, m)[0]);
      if (a.smoothing != 0) value -= a.smoothing * all / double(a.V);
      if (a.z_loss != 0) value += a.z_loss * lse * lse;
      at<S>(a.lse, m)[0] = counted ? S(lse) : S(0);
      loss[m] = counted ? S(value) : S(0);
      if (sampled) a.sample[m] = counted ? found : -1;
    }
  }

  // The highest logit of each sample and the first token that has it.
  void pool(const MaxPool& samples, int64_t tile, S* buffer) const {
    S *panels = buffer, *logits = buffer + a.tile_panels();
    pack_weight(tile, panels);
    fill_logits(tile, panels, logits);
    alignas(64) S first[V::width], values[V::width], rows[V::width];
    for (int64_t i = 0; i < V::width; ++i) first[i] = S(i);
    for (int64_t v = 0; v < classes(tile); ++v) {
      for (int64_t b = 0; b < samples.B; ++b) {
        const int64_t begin = samples.starts[b], end = samples.starts[b + 1], to = b * a.V + tile * kTile + v;
        S top = S(-__builtin_inff());
        int64_t found = -1;
        for (int64_t part = begin; part < end; part += kCounted) {
          const int64_t stop = min_of(part + kCounted, end);
          V best = V::load(logits + v * a.stride + part), row = V::load(first), best_row = row;
          const V zero = V::zero();
          V strange = best * zero;  // NaN where a logit is not finite, which a maximum does not show
          for (int64_t m = part + V::width; m < stop; m += V::width) {
            const V x = V::load(logits + v * a.stride + m);
            row = row + V::all(S(V::width));
            best_row = where_less(best, x, row, best_row);
            best = max(x, best);
            strange = fma(x, zero, strange);
          }
          best.store(values);
          best_row.store(rows);
          for (int64_t i = 0; i < V::width; ++i) {
            const int64_t place = part - begin + int64_t(rows[i]);
            if (found < 0 || values[i] > top || (values[i] == top && place < found)) top = values[i], found = place;
          }
          if (const S sum = strange.sum(); sum != sum) {
            for (int64_t m = part; m < stop; ++m) {
              const S x = logits[v * a.stride + m];
              if (x != x) top = x, found = m - begin;
            }
          }
        }
        if (found >= 0) found = samples.positions[begin + found];
        at<S>(samples.out, to)[0] = top, samples.at[to] = found;
      }
    }
  }

  // ---- backward

  // slope (weight_of_lse exp(logit - lse) - smoothing / V), less (1 - smoothing) slope at the target; 0 in rows that do not count.
  void slopes(int64_t tile, S* logits, S* grad_bias) const {
    const int64_t count = classes(tile);
    const V even = V::all(S(a.smoothing / double(a.V))), zero = V::zero(), twice = V::all(S(2 * a.z_loss)), one = V::all(1);
    for (int64_t m = 0; m < a.stride; m += V::width) {
      const V lse = V::load(at<S>(a.lse, m)), slope = V::load(at<S>(a.slope, m));
      const V factor = fma(twice, lse, one), size = abs(slope);
      for (int64_t v = 0; v < count; ++v) {
        S* x = logits + v * a.stride + m;
        const V weight = exp_below_zero(min(zero, V::load(x) - lse));
        where_less(zero, size, (factor * weight - even) * slope, where_less(size, one, zero, size)).store(x);
      }
    }
    for (int64_t m = 0; m < a.M; ++m) {
      const int64_t v = a.target[m] - tile * kTile;
      if (v >= 0 && v < count) logits[v * a.stride + m] -= S(1 - a.smoothing) * at<S>(a.slope, m)[0];
    }
    for (int64_t v = 0; v < count; ++v) {
      V sum = V::zero();
      for (int64_t m = 0; m < a.stride; m += V::width) sum = sum + V::load(logits + v * a.stride + m);
      grad_bias[v] = sum.sum();
    }
  }

  void tile_gradient(int64_t i, int64_t tile, S* buffer) const {
    const int64_t count = classes(tile), wide = round_up(a.D, kPanel);
    S *panels = at<S>(a.panels, i * a.tile_panels()), *logits = at<S>(a.logits, i * kTile * a.stride);
    alignas(64) S bias[kTile];
    pack_weight(tile, panels);
    fill_logits(tile, panels, logits);
    slopes(tile, logits, bias);
    for (int64_t q = 0; q < a.d_panels(); ++q) {
      const S* along = at<S>(a.along, q * a.stride * kPanel);
      for (int64_t m = 0; m < a.stride; m += kSteps) {
        multiply_strided<V>(count, width(q), min_of(kSteps, a.stride - m), {logits + m, a.stride, 1}, along + m * kPanel, kPanel,
                            StridedC<S>{buffer + q * kPanel, wide, m > 0});
      }
    }
    T* out = static_cast<T*>(a.grad_weight) + tile * kTile * a.D;
    for (int64_t v = 0; v < count; ++v) {
      const S* from = buffer + v * wide;
      int64_t d = 0;
      for (; d + V::width <= a.D; d += V::width) V::load(from + d).store(out + v * a.D + d);
      if (d < a.D) V::load_n(from + d, a.D - d).store_n(out + v * a.D + d, a.D - d);
      from_float(bias[v], static_cast<T*>(a.grad_bias) + tile * kTile + v);
    }
  }

  void add_hidden(int64_t first, int64_t tiles, int64_t item) const {
    const int64_t blocks = parts_of(a.stride, kRowBlock), q = item / blocks, m = item % blocks * kRowBlock;
    const int64_t rows = min_of(kRowBlock, a.stride - m);
    S* to = at<S>(a.grad_hidden, (q * a.stride + m) * kPanel);
    for (int64_t i = 0; i < tiles; ++i) {
      const S* panel = at<S>(a.panels, i * a.tile_panels() + q * kTile * kPanel);
      const S* slope = at<S>(a.logits, i * kTile * a.stride + m);
      multiply_strided<V>(rows, width(q), classes(first + i), {slope, 1, a.stride}, panel, kPanel, StridedC<S>{to, kPanel, true});
    }
  }

  void unpack(T* to, int64_t m) const {
    T* row = to + a.rows[m] * a.D;
    for (int64_t d = 0; d < a.D; d += V::width) {
      const int64_t q = d / kPanel;
      V::load(at<S>(a.grad_hidden, (q * a.stride + m) * kPanel + d % kPanel)).store_n(row + d, min_of<int64_t>(V::width, a.D - d));
    }
  }
};

// ---- the table

template <class Body>
void with_type(int dtype, const Body& body) {  // codes of common/dispatch.h
  switch (dtype) {
    case 0: return body.template operator()<float>();
    case 1: return body.template operator()<double>();
    case 2: return body.template operator()<bf16>();
    default: return body.template operator()<f16>();
  }
}

int64_t sum_bytes(int dtype) { return dtype == 1 ? int64_t(sizeof(double)) : int64_t(sizeof(float)); }

int64_t bytes(const LinearLoss& a, bool backward) {
  const int64_t elements = backward ? kTile * round_up(a.D, kPanel) : a.tile_panels() + kTile * a.stride;
  return (elements + 64) * sum_bytes(a.dtype);
}

void pack(const LinearLoss& a, int64_t begin, int64_t end) {
  with_type(a.dtype, [&]<class T>() {
    for (int64_t p = begin; p < end; ++p) Loss<T>{a}.pack_rows(p);
  });
}

void forward(const LinearLoss& a, bool sampled, int64_t begin, int64_t end, void* buffer) {
  with_type(a.dtype, [&]<class T>() {
    for (int64_t r = begin; r < end; ++r) Loss<T>{a}.forward(sampled, r, static_cast<typename Loss<T>::S*>(buffer));
  });
}

void finish(const LinearLoss& a, bool sampled, void* loss) {
  with_type(a.dtype, [&]<class T>() { Loss<T>{a}.finish(sampled, static_cast<typename Loss<T>::S*>(loss)); });
}

void tile_gradient(const LinearLoss& a, int64_t i, int64_t tile, void* buffer) {
  with_type(a.dtype, [&]<class T>() { Loss<T>{a}.tile_gradient(i, tile, static_cast<typename Loss<T>::S*>(buffer)); });
}

int64_t hidden_items(const LinearLoss& a) { return a.d_panels() * parts_of(a.stride, kRowBlock); }

void add_hidden(const LinearLoss& a, int64_t first, int64_t count, int64_t begin, int64_t end) {
  with_type(a.dtype, [&]<class T>() {
    for (int64_t i = begin; i < end; ++i) Loss<T>{a}.add_hidden(first, count, i);
  });
}

void pool(const LinearLoss& a, const MaxPool& samples, int64_t begin, int64_t end, void* buffer) {
  with_type(a.dtype, [&]<class T>() {
    for (int64_t tile = begin; tile < end; ++tile) Loss<T>{a}.pool(samples, tile, static_cast<typename Loss<T>::S*>(buffer));
  });
}

void unpack(const LinearLoss& a, void* grad_hidden, int64_t begin, int64_t end) {
  with_type(a.dtype, [&]<class T>() {
    for (int64_t m = begin; m < end; ++m) Loss<T>{a}.unpack(static_cast<T*>(grad_hidden), m);
  });
}

}  // namespace

extern const LinearLossKernels LinearLossKernels_table{&sum_bytes, &bytes, &pack, &forward, &finish, &tile_gradient, &hidden_items, &add_hidden,
                                                        &pool, &unpack};

}  // namespace MASKOPS_ISA_NS
}  // namespace maskops
