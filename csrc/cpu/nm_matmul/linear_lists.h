// A compressed weight as lists for the products: where the sums over its columns (or rows) find their factors.
//
// A tile is 64 rows of the weight by one span of at most 64 columns, whole groups. Rows of lists go in pairs: first the columns
// that both rows keep, whose packed values are loaded once for both, then those of the first row, then those of the second. A
// pair of 2:4 rows thus needs 3/4 of the loads, and loads, not multiply-adds, are what the products run out of first. The lists
// of a pair: values of the first row at columns of both, values of the second there, values of the first row alone, of the second.
#pragma once

#include "common/simd_shuffle.h"
#include "cpu/nm_matmul/linear_places.h"

namespace maskops {
inline namespace MASKOPS_ISA_NS {

constexpr int kTileSide = 64;  // one bit of a word per column

// Columns of a span: as many whole groups as fit.
static inline int64_t span_of(const NmLayout& layout) { return kTileSide / layout.m * layout.m; }

struct PairCounts {
  uint8_t both, first, second, unused;
};

// A little fewer than two rows of a span keep in common by chance. With so many most pairs have lists of one length, and the
// processor guesses where they end; each wrong guess would cost as much as two to three kept weights.
static inline int most_shared(const NmLayout& layout) {
  const int64_t mean = span_of(layout) * layout.n * layout.n / (int64_t{layout.m} * layout.m);
  return int(max_of<int64_t>(0, mean - 2));
}

// The columns that both rows of a pair keep, at most `most` of them: the others stand in the lists of either row.
static inline uint64_t shared_columns(uint64_t a, uint64_t b, int most) {
  uint64_t shared = a & b;
#if MASKOPS_ISA_LEVEL == 2
  const uint64_t some = (uint64_t{1} << most) - 1;  // the lowest of them; every CPU with AVX-512 has BMI2
  asm("pdep %1, %2, %0" : "=r"(shared) : "r"(shared), "r"(some));
#else
  for (int excess = __builtin_popcountll(shared) - most; excess > 0; --excess) shared &= shared - 1;
#endif
  return shared;
}

template <class S>
struct ListTile {
  alignas(64) S dense[kTileSide][kTileSide];  // valid where kept
  uint64_t kept[kTileSide];
};

// ---- from the compressed rows to a tile

template <class S, class T>
struct TileReader {
  NmCompressed weight;
  int64_t span, slots;  // of a span
#if MASKOPS_ISA_LEVEL == 2
  PlaceReader places;
  alignas(64) int32_t starts[kTileSide];  // first column of a slot's group in its span
#endif

  explicit TileReader(const NmCompressed& w)
      : weight(w), span(span_of(w.layout)), slots(span_of(w.layout) / w.layout.m * w.layout.n)
#if MASKOPS_ISA_LEVEL == 2
        ,
        places(w.layout)
#endif
  {
#if MASKOPS_ISA_LEVEL == 2
    for (int i = 0; i < kTileSide; ++i) starts[i] = i / w.layout.n * w.layout.m;
#endif
  }

  inline int64_t spans() const { return max_of<int64_t>(1, parts_of(weight.layout.K, span)); }

  // Any order of places inside a group, one slot at a time.
  inline uint64_t read_slots(int64_t row, int64_t b, S* dense) const {
    const NmLayout& l = weight.layout;
    const T* values = static_cast<const T*>(weight.values) + row * weight.values_stride;
    const uint8_t* places_of_row = weight.indices + row * weight.indices_stride;
    const int64_t width = min_of(span, l.K - b * span), first = b * slots, stop = min_of(l.slots, first + slots);
    uint64_t kept = 0;
    int64_t start = 0;
    int in_group = 0;
    for (int64_t slot = first; slot < stop; ++slot) {
      const int64_t column = start + place_in_group(places_of_row, slot, l);
      if (column < width) {
        dense[column] = to_float(values[slot]);
        kept |= uint64_t{1} << column;
      }
      if (++in_group == l.n) {
        in_group = 0;
        start += l.m;
      }
    }
    return kept;
  }

#if MASKOPS_ISA_LEVEL == 2
  // Columns of ascending slots: their values spread to their columns without looking at single ones.
  inline uint64_t read_vectors(int64_t row, int64_t b, float* dense) const {
    const NmLayout& l = weight.layout;
    const T* values = static_cast<const T*>(weight.values) + row * weight.values_stride + b * slots;
    const uint8_t* places_of_row = weight.indices + row * weight.indices_stride;
    const int64_t width = min_of(span, l.K - b * span), count = min_of(slots, l.slots - b * slots);
    const __m512i one = _mm512_set1_epi64(1);
    __m512i bits = _mm512_setzero_si512();
    for (int64_t i = 0; i < count; i += 16) {
      const __m512i column =
          _mm512_add_epi32(places.read(places_of_row, l.row_bytes, b * slots + i), _mm512_load_si512(starts + i));
      const __mmask16 some = VecF::first(min_of<int64_t>(16, count - i));
      const __m512i low = _mm512_cvtepu32_epi64(_mm512_castsi512_si256(column));
      const __m512i high = _mm512_cvtepu32_epi64(_mm512_extracti64x4_epi64(column, 1));
      bits = _mm512_or_si512(bits, _mm512_maskz_sllv_epi64(__mmask8(some), one, low));
      bits = _mm512_or_si512(bits, _mm512_maskz_sllv_epi64(__mmask8(some >> 8), one, high));
    }
    const uint64_t kept = uint64_t(_mm512_reduce_or_epi64(bits)) & (width >= 64 ? ~uint64_t{0} : (uint64_t{1} << width) - 1);
#pragma GCC unroll 4
    for (int q = 0; q < 4; ++q) {
      const uint32_t here = uint32_t(kept >> (16 * q)) & 0xffffu;
      const int some = __builtin_popcount(here);
      const VecF packed = VecF::load_n(values, some);
      _mm512_store_ps(dense + 16 * q, _mm512_maskz_expand_ps(__mmask16(here), packed.v));
      values += some;
    }
    return kept;
  }
#endif

  inline uint64_t read_row(int64_t row, int64_t b, double* dense) const { return read_slots(row, b, dense); }
  inline uint64_t read_row(int64_t row, int64_t b, float* dense) const {
#if MASKOPS_ISA_LEVEL == 2
    return read_vectors(row, b, dense);
#else
    return read_slots(row, b, dense);
#endif
  }

  // `count` rows of the weight from `row` on, span b. The tile below is asked for meanwhile: the rows are too many, and too little
  // of each is read, for the hardware to notice.
  inline void read(int64_t row, int64_t count, int64_t b, ListTile<S>& tile) const {
    const int64_t bytes = slots * int64_t(sizeof(T));
    const char* below = static_cast<const char*>(weight.values) + ((row + count) * weight.values_stride + b * slots) * int64_t(sizeof(T));
    for (int64_t r = 0; r < count; ++r, below += weight.values_stride * int64_t(sizeof(T))) {
      for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(below + at, 0, 2);
      tile.kept[r] = read_row(row + r, b, tile.dense[r]);
    }
    for (int64_t r = count; r < kTileSide; ++r) tile.kept[r] = 0;
  }
};

// ---- rows and columns of a tile exchanged

static inline void transpose_bits_of(const uint64_t* from, uint64_t* to) {
  uint64_t low = 0x00000000ffffffffull;
  for (int i = 0; i < 64; ++i) to[i] = from[i];
  for (int width = 32; width > 0; width >>= 1, low ^= low << width) {
    for (int i = 0; i < 64; i = ((i | width) + 1) & ~width) {
      const uint64_t swap = ((to[i] >> width) ^ to[i | width]) & low;
      to[i | width] ^= swap;
      to[i] ^= swap << width;
    }
  }
}

template <class V, class S>
static inline void transpose_tile(const ListTile<S>& from, ListTile<S>& to) {
  constexpr int W = V::width;
  for (int i = 0; i < kTileSide; i += W) {
    for (int j = 0; j < kTileSide; j += W) {
      V block[W];
#pragma GCC unroll 16
      for (int r = 0; r < W; ++r) block[r] = V::load(&from.dense[i + r][j]);
      transpose(block);
#pragma GCC unroll 16
      for (int r = 0; r < W; ++r) block[r].store(&to.dense[j + r][i]);
    }
  }
  transpose_bits_of(from.kept, to.kept);
}

// ---- lists

// The cache lines of some bytes: to be read, into the L2 cache, or to be written, into the L1 cache.
template <int kWrite>
static inline void touch(const void* p, int64_t bytes) {
  for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(static_cast<const char*>(p) + at, kWrite, kWrite ? 3 : 2);
}

// Where the lists of one span go, one pair after the other. Offsets are bytes from the first packed column of the span. Whole
// vectors are stored: kListSlack elements past the end of the lists get lost.
constexpr int64_t kListSlack = 32;

template <class S>
struct ListWriter {
  S* values;
  uint16_t* offsets;
  PairCounts* counts;
  int column_bytes;  // of the packed matrix: a column of a panel
  int most_shared;

  // The lines after the next one, where the lists of the next pair, of `slots` kept weights, will end.
  inline void touch_next(int64_t slots) const {
    touch<1>(reinterpret_cast<const char*>(values) + 64, slots * int64_t(sizeof(S)));
    touch<1>(reinterpret_cast<const char*>(offsets) + 64, slots * int64_t(sizeof(uint16_t)));
  }
};

#if MASKOPS_ISA_LEVEL == 2
static inline void write_offsets(__mmask16 here, __m512i offsets, int some, ListWriter<float>& to) {
  const __m512i packed = _mm512_maskz_compress_epi32(here, offsets);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to.offsets), _mm512_cvtepi32_epi16(packed));
  to.offsets += some;
}
static inline void write_some(__mmask16 here, VecF values, int some, ListWriter<float>& to) {
  _mm512_storeu_ps(to.values, _mm512_maskz_compress_ps(here, values.v));
  to.values += some;
}
#endif

// The values of a row at the columns of `bits`, and with kOffsets their offsets.
template <bool kOffsets, class S>
static inline void write_kept(uint64_t bits, const S* dense, ListWriter<S>& to) {
#if MASKOPS_ISA_LEVEL == 2
  if constexpr (sizeof(S) == 4) {
    const __m512i numbers = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    __m512i offsets = _mm512_mullo_epi32(numbers, _mm512_set1_epi32(to.column_bytes));
#pragma GCC unroll 4
    for (int q = 0; q < 4; ++q) {
      const __mmask16 here = __mmask16(bits >> (16 * q));
      const int some = __builtin_popcount(here);
      write_some(here, VecF::load(dense + 16 * q), some, to);
      if (kOffsets) write_offsets(here, offsets, some, to);
      offsets = _mm512_add_epi32(offsets, _mm512_set1_epi32(16 * to.column_bytes));
    }
    return;
  }
#endif
  for (; bits != 0; bits &= bits - 1) {
    const int k = __builtin_ctzll(bits);
    *to.values++ = dense[k];
    if (kOffsets) *to.offsets++ = uint16_t(k * to.column_bytes);
  }
}

static inline PairCounts count_pair(uint64_t a, uint64_t b, uint64_t shared) {
  const int both = __builtin_popcountll(shared);
  return {uint8_t(both), uint8_t(__builtin_popcountll(a) - both), uint8_t(__builtin_popcountll(b) - both), 0};
}

// A pair of rows from the columns that each keeps and its values there.
template <class S>
static inline void write_lists(uint64_t a, uint64_t b, const S* first, const S* second, ListWriter<S>& to) {
  const uint64_t shared = shared_columns(a, b, to.most_shared);
  *to.counts++ = count_pair(a, b, shared);
  write_kept<true>(shared, first, to);
  write_kept<false>(shared, second, to);
  write_kept<true>(a & ~shared, first, to);
  write_kept<true>(b & ~shared, second, to);
}

#if MASKOPS_ISA_LEVEL == 2

// A row of a span by its slots: sixteen of them per vector, in the order in which they lie.
template <class T>
struct RowSlots {
  const T* values;
  int64_t count;
  uint64_t kept;
  __m512i offsets[4], low[4], high[4];  // of the columns in the packed block, and their bits in words of 64
  __mmask16 real[4], shared[4];         // slots with a column, and those of them that the other row of the pair has too

  // The values of vector i; without the mask where it is not needed, as masks compete with the shuffles.
  inline VecF vector(int64_t i) const {
    const int64_t left = count - i * 16;
    return left >= 16 ? VecF::load(values + i * 16) : VecF::load_n(values + i * 16, left);
  }

  inline void read(const TileReader<float, T>& reader, int64_t row, int64_t b, int column_bytes) {
    const NmCompressed& w = reader.weight;
    const NmLayout& l = w.layout;
    const uint8_t* places = w.indices + row * w.indices_stride;
    const int64_t first = b * reader.slots, width = min_of(reader.span, l.K - b * reader.span);
    values = static_cast<const T*>(w.values) + row * w.values_stride + first;
    count = min_of(reader.slots, l.slots - first);
    const bool whole = count % 16 == 0 && width == reader.span;
    const __m512i one = _mm512_set1_epi64(1), bytes = _mm512_set1_epi32(column_bytes);
    __m512i bits = _mm512_setzero_si512();
    for (int64_t i = 0; i * 16 < count; ++i) {
      const __m512i place = reader.places.read(places, l.row_bytes, first + i * 16);
      __m512i columns = _mm512_add_epi32(place, _mm512_load_si512(reader.starts + i * 16));
      offsets[i] = _mm512_mullo_epi16(columns, bytes);  // below 2^16
      real[i] = 0xffff;
      if (!whole) {  // a bit that is shifted out is no column
        const __mmask16 some = VecF::first(min_of<int64_t>(16, count - i * 16));
        real[i] = _mm512_mask_cmplt_epu32_mask(some, columns, _mm512_set1_epi32(int(width)));
        columns = _mm512_mask_mov_epi32(_mm512_set1_epi32(64), real[i], columns);
      }
      low[i] = _mm512_sllv_epi64(one, _mm512_cvtepu32_epi64(_mm512_castsi512_si256(columns)));
      high[i] = _mm512_sllv_epi64(one, _mm512_cvtepu32_epi64(_mm512_extracti64x4_epi64(columns, 1)));
      bits = _mm512_or_si512(bits, _mm512_or_si512(low[i], high[i]));
    }
    kept = uint64_t(_mm512_reduce_or_epi64(bits));
  }

  template <bool kOffsets>
  inline void write(int64_t i, __mmask16 here, ListWriter<float>& to) const {
    const int some = __builtin_popcount(here);
    write_some(here, vector(i), some, to);
    if (kOffsets) write_offsets(here, offsets[i], some, to);
  }

  // The slots whose columns are in `both`, then the others.
  template <bool kOffsets>
  inline void write_shared(uint64_t both, ListWriter<float>& to) {
    const __m512i words = _mm512_set1_epi64(int64_t(both));
    for (int64_t i = 0; i * 16 < count; ++i) {
      shared[i] = _mm512_kunpackb(_mm512_test_epi64_mask(high[i], words), _mm512_test_epi64_mask(low[i], words));
      write<kOffsets>(i, shared[i], to);
    }
  }
  inline void write_others(ListWriter<float>& to) const {
    for (int64_t i = 0; i * 16 < count; ++i) write<true>(i, __mmask16(real[i] & ~shared[i]), to);
  }
};

template <class T>
static inline void write_lists(RowSlots<T>& a, RowSlots<T>& b, ListWriter<float>& to) {
  const uint64_t shared = shared_columns(a.kept, b.kept, to.most_shared);
  *to.counts++ = count_pair(a.kept, b.kept, shared);
  a.template write_shared<true>(shared, to);
  b.template write_shared<false>(shared, to);
  a.write_others(to);
  b.write_others(to);
}

#endif

}  // namespace MASKOPS_ISA_NS
}  // namespace maskops
