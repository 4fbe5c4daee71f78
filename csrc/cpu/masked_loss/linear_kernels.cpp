// Kernels of linear_cross_entropy, linear_sample and linear_max_pool around the products of linear_products.h.
#include "cpu/masked_loss/linear_products.h"

#include "common/simd_math.h"
#include "common/simd_philox.h"

namespace maskops {
inline namespace MASKOPS_ISA_NS {
namespace {

constexpr int64_t kCounted = int64_t{1} << 23;  // rows that float32 can count, lanes included

template <class Products>
struct Loss {
  using V = typename Products::V;
  using S = typename Products::S;
  using T = typename Products::Type;
  const LinearLoss& a;
  Products products{a};

  int64_t classes(int64_t tile) const { return products.classes(tile); }

  // ---- logits

  // Of the rows from `first` on.
  void add_bias(int64_t tile, int64_t first, S* logits) const {
    const int64_t count = classes(tile);
    if (a.bias == nullptr && a.scale == 1) return;
    const V scale = V::all(S(a.scale));
    for (int64_t v = 0; v < count; ++v) {
      const V bias = V::all(a.bias == nullptr ? S(0) : S(to_float(static_cast<const T*>(a.bias)[tile * kTile + v])));
      S* row = logits + v * a.stride;
      for (int64_t m = first; m < a.stride; m += V::width) ((V::load(row + m) + bias) * scale).store(row + m);
    }
  }

  // ---- forward

  // Folds a tile into the running values of a range; leaves exp(logit - highest of the tile) in its place where that is kept.
  template <bool kKept>
  void reduce(int64_t tile, S* logits, S* highest, S* total, S* sums) const {
    const int64_t count = classes(tile);
    const V lowest = V::all(S(-3e38f));
    for (int64_t m = 0; m < a.stride; m += V::width) {
      V top = V::all(S(-__builtin_inff())), all = V::zero(), sum = V::load(sums + m);
      for (int64_t v = 0; v < count; ++v) top = max(V::load(logits + v * a.stride + m), top);
      const V base = max(top, lowest);  // no infinity minus infinity
      for (int64_t v = 0; v < count; ++v) {
        const V x = V::load(logits + v * a.stride + m), power = exp_below_zero(x - base);
        if constexpr (kKept) power.store(logits + v * a.stride + m);
        all = all + power;
        sum = sum + x;
      }
      if (kKept && m < a.kept) base.store_n(at<S>(a.tops, tile * a.D + m), min_of<int64_t>(V::width, a.kept - m));
      const V before = V::load(highest + m), joint = max(top, before), joined = max(joint, lowest);
      const V decay = exp_below_zero(max(before, lowest) - joined), share = exp_below_zero(base - joined);
      fma(V::load(total + m), decay, all * share).store(total + m);
      joint.store(highest + m);
      sum.store(sums + m);
    }
  }

  void keep(int64_t tile, const S* powers) const {
    T* to = static_cast<T*>(a.powers) + tile * kTile * a.D;
    for (int64_t v = 0; v < classes(tile); ++v, to += a.D, powers += a.stride) {
      int64_t m = 0;
      if (can_stream<V>(to)) {
        for (; m + V::width <= a.kept; m += V::width) V::load(powers + m).stream(to + m);
      }
      for (; m + V::width <= a.kept; m += V::width) V::load(powers + m).store(to + m);
      if (m < a.kept) V::load(powers + m).store_n(to + m, a.kept - m);
    }
    stream_fence();
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
      philox_words(a.key, uint64_t((first - skip) / 4), count + skip, words);
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

  void forward(bool sampled, int64_t range, void* buffer) const {
    const int64_t tiles = a.tiles(), ranges = a.ranges();
    S *highest = at<S>(a.highest, range * a.stride), *total = at<S>(a.total, range * a.stride), *sums = at<S>(a.sums, range * a.stride);
    for (int64_t m = 0; m < a.stride; ++m) highest[m] = S(-__builtin_inff()), total[m] = 0, sums[m] = 0;
    if (sampled) {
      for (int64_t m = 0; m < a.stride; ++m) at<S>(a.best, range * a.stride)[m] = S(-__builtin_inff()), a.sample[range * a.stride + m] = -1;
    }
    for (int64_t tile = range * tiles / ranges; tile < (range + 1) * tiles / ranges; ++tile) {
      S* logits = products.logits(tile, buffer);
      add_bias(tile, 0, logits);
      pick(tile, logits);
      if (sampled) draw(tile, logits, at<S>(a.best, range * a.stride), a.sample + range * a.stride);
      if (a.powers == nullptr) {
        reduce<false>(tile, logits, highest, total, sums);
      } else {
        reduce<true>(tile, logits, highest, total, sums);
        keep(tile, logits);
      }
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
  void pool(const MaxPool& samples, int64_t tile, void* buffer) const {
    S* logits = products.logits(tile, buffer);
    add_bias(tile, 0, logits);
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

  // x slope, and 0 where that is 0, whatever x is: rows that do not count.
  static V sloped(V x, V slope) {
    const V zero = V::zero(), size = abs(slope);
    return where_less(zero, size, x * slope, where_less(size, V::all(1), zero, size));
  }

  V factor_of(V lse) const { return fma(V::all(S(2 * a.z_loss)), lse, V::all(1)); }
  S even() const { return S(a.smoothing / double(a.V)); }

  // Logits of the rows from `first` on to slope (factor exp(logit - lse) - smoothing / V).
  void slopes(int64_t tile, int64_t first, S* logits) const {
    const int64_t count = classes(tile);
    const V even = V::all(this->even()), zero = V::zero();
    for (int64_t m = first; m < a.stride; m += V::width) {
      const V lse = V::load(at<S>(a.lse, m)), slope = V::load(at<S>(a.slope, m)), factor = factor_of(lse);
      for (int64_t v = 0; v < count; ++v) {
        S* x = logits + v * a.stride + m;
        const V weight = exp_below_zero(min(zero, V::load(x) - lse));
        sloped(factor * weight - even, slope).store(x);
      }
    }
  }

  // The same of the rows that were kept, from their powers. The highest is 1 in every dtype, so that 1 - p loses nothing where p is near 1.
  void kept_slopes(int64_t tile, S* out, S* factors) const {
    const int64_t count = classes(tile), whole = a.kept / V::width * V::width, rest = a.kept - whole;
    const V even = V::all(this->even()), zero = V::zero();
    for (int64_t m = 0; m < a.kept; m += V::width) {
      const V lse = V::load(at<S>(a.lse, m)), top = V::load_n(at<S>(a.tops, tile * a.D + m), min_of<int64_t>(V::width, a.kept - m));
      (factor_of(lse) * exp_below_zero(min(zero, top - lse))).store(factors + m);
    }
    const T* powers = static_cast<const T*>(a.powers) + tile * kTile * a.D;
    for (int64_t v = 0; v < count; ++v, powers += a.D) {
      S* row = out + v * a.stride;
      const auto put = [&](V power, int64_t m) {
        sloped(fma(power, V::load(factors + m), zero - even), V::load(at<S>(a.slope, m))).store(row + m);
      };
      for (int64_t m = 0; m < whole; m += V::width) put(V::load(powers + m), m);
      if (rest > 0) put(V::load_n(powers + whole, rest), whole);
      if (a.kept < a.M) continue;
      for (int64_t m = whole + (rest > 0 ? V::width : 0); m < a.stride; m += V::width) zero.store(row + m);
    }
  }

  void tile_gradient(int64_t i, int64_t tile, void* buffer) const {
    alignas(64) S bias[kTile];
    const int64_t first = a.kept < a.M ? a.kept : a.stride;  // row whose logits are made again
    S* logits = products.shared_logits(i, tile, first, buffer);
    if (a.kept > 0) kept_slopes(tile, logits, static_cast<S*>(buffer));
    add_bias(tile, first, logits);
    slopes(tile, first, logits);
    for (int64_t m = 0; m < a.M; ++m) {
      const int64_t v = a.target[m] - tile * kTile;
      if (v >= 0 && v < classes(tile)) logits[v * a.stride + m] -= S(1 - a.smoothing) * at<S>(a.slope, m)[0];
    }
    for (int64_t v = 0; v < classes(tile); ++v) {
      V sum = V::zero();
      for (int64_t m = 0; m < a.stride; m += V::width) sum = sum + V::load(logits + v * a.stride + m);
      bias[v] = sum.sum();
    }
    products.weight_gradient(i, tile, logits, buffer);
    for (int64_t v = 0; v < classes(tile); ++v) from_float(bias[v], static_cast<T*>(a.grad_bias) + tile * kTile + v);
  }
};

// ---- the table

LinearBytes bytes(const LinearLoss& a, bool backward) {
  return with_products(a, [&]<class Products>() { return Products::bytes(a, backward); });
}

int64_t hidden_items(const LinearLoss& a) {
  return with_products(a, [&]<class Products>() { return Products::hidden_items(a); });
}

// run(loss, i) for each i
template <class Run>
void each(const LinearLoss& a, int64_t begin, int64_t end, const Run& run) {
  with_products(a, [&]<class Products>() {
    [[maybe_unused]] const typename Products::Scope scope;
    const Loss<Products> loss{a};
    for (int64_t i = begin; i < end; ++i) run(loss, i);
  });
}

void pack(const LinearLoss& a, int64_t begin, int64_t end) {
  each(a, begin, end, [](const auto& loss, int64_t p) { loss.products.pack_rows(p); });
}

void forward(const LinearLoss& a, bool sampled, int64_t begin, int64_t end, void* buffer) {
  each(a, begin, end, [&](const auto& loss, int64_t range) { loss.forward(sampled, range, buffer); });
}

void finish(const LinearLoss& a, bool sampled, void* out) {
  with_products(a, [&]<class Products>() { Loss<Products>{a}.finish(sampled, static_cast<typename Products::S*>(out)); });
}

void tile_gradient(const LinearLoss& a, int64_t i, int64_t tile, void* buffer) {
  each(a, i, i + 1, [&](const auto& loss, int64_t) { loss.tile_gradient(i, tile, buffer); });
}

void add_hidden(const LinearLoss& a, int64_t first, int64_t count, int64_t begin, int64_t end) {
  each(a, begin, end, [&](const auto& loss, int64_t i) { loss.products.add_hidden(first, count, i); });
}

void pool(const LinearLoss& a, const MaxPool& samples, int64_t begin, int64_t end, void* buffer) {
  each(a, begin, end, [&](const auto& loss, int64_t tile) { loss.pool(samples, tile, buffer); });
}

void unpack(const LinearLoss& a, void* grad_hidden, int64_t begin, int64_t end) {
  with_products(a, [&]<class Products>() {
    const Products products{a};
    for (int64_t i = begin; i < end; ++i) products.unpack(static_cast<typename Products::Type*>(grad_hidden), i * kRowUnit);
  });
}

}  // namespace

extern const LinearLossKernels LinearLossKernels_table{&bytes, &pack, &forward, &finish, &tile_gradient, &hidden_items, &add_hidden,
                                                        &pool, &unpack};

}  // namespace MASKOPS_ISA_NS
}  // namespace maskops
