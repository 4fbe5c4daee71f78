// Facts of the family nm_matmul that every device shares; includes no torch header, so that any kernel may include it.
// R rows of a weight or of scores, N outputs, K inputs, G groups of m columns, J = G * n kept slots, P = C(m, n) patterns.
// All functions are static: a source compiled for AVX-512 must not lend its copy to the portable path.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "common/host_device.h"
#include "common/philox.h"

namespace maskops {

constexpr int kMaxGroup = 32;      // the largest m
constexpr int kMaxPatterns = 128;  // of the exact soft mask

// Sizes of a compressed weight. Slot j = g * n + i is the i-th kept column of group g, in ascending order of columns.
struct NmLayout {
  int n, m;
  int bits;           // of one place inside a group
  int64_t K, groups;  // the last group may be narrow: columns >= K read as zeros
  int64_t slots;      // J, per row
  int64_t row_bytes;  // of the places of one row
};

MASKOPS_HOST_DEVICE static inline NmLayout nm_layout(int64_t n, int64_t m, int64_t K) {
  int bits = 1;
  while ((int64_t{1} << bits) < m) ++bits;
  const int64_t groups = (K + m - 1) / m, slots = groups * n;
  return {int(n), int(m), bits, K, groups, slots, (slots * bits + 7) / 8};
}

// ---- places, packed little endian: slot j has bits [j * bits, (j + 1) * bits) of its row --------------------------------

// Reads the second byte only where the place reaches into it, so never past the end of the row.
MASKOPS_HOST_DEVICE static inline int read_place(const uint8_t* row, int64_t slot, int bits) {
  const int64_t at = slot * bits;
  const int shift = int(at & 7);
  unsigned word = row[at >> 3];
  if (shift + bits > 8) word |= unsigned(row[(at >> 3) + 1]) << 8;
  return int((word >> shift) & ((1u << bits) - 1u));
}

// The column of a slot; at least K where the slot is padding.
MASKOPS_HOST_DEVICE static inline int64_t slot_column(const uint8_t* row, int64_t slot, int n, int m, int bits) {
  return slot / n * m + read_place(row, slot, bits);
}

// Byte b of a row of places, put together from place(slot) of the slots that reach into it: bytes can be written in any order.
template <class Place>
MASKOPS_HOST_DEVICE static inline uint8_t places_byte(int64_t b, int64_t slots, int bits, const Place& place) {
  const int64_t first = b * 8 / bits, stop = (b * 8 + 7) / bits + 1;
  unsigned byte = 0;
  for (int64_t slot = first; slot < stop && slot < slots; ++slot) {
    const int shift = int(slot * bits - b * 8);
    const unsigned value = unsigned(place(slot));
    byte |= shift >= 0 ? value << shift : value >> -shift;
  }
  return uint8_t(byte & 255u);
}

// Writes the places of a row from its first slot to its last.
struct PlaceWriter {
  uint8_t* to;
  int bits, filled;
  unsigned word;
};
MASKOPS_HOST_DEVICE static inline PlaceWriter place_writer(uint8_t* row, int bits) { return {row, bits, 0, 0u}; }
MASKOPS_HOST_DEVICE static inline void write_place(PlaceWriter& writer, int place) {
  writer.word |= unsigned(place) << writer.filled;
  writer.filled += writer.bits;
  if (writer.filled >= 8) {
    *writer.to++ = uint8_t(writer.word & 255u);
    writer.word >>= 8;
    writer.filled -= 8;
  }
}
MASKOPS_HOST_DEVICE static inline void finish_places(PlaceWriter& writer) {
  if (writer.filled > 0) *writer.to++ = uint8_t(writer.word & 255u);
}

// ---- the kept columns of a group ----------------------------------------------------------------------------------------

// Bits of a score whose unsigned order is the order of the numbers: -0 equal to 0, NaN (0) below everything else.
MASKOPS_HOST_DEVICE static inline uint32_t score_key(float x) {
  if (x != x) return 0u;
  if (x == 0.0f) x = 0.0f;
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
MASKOPS_HOST_DEVICE static inline uint64_t score_key(double x) {
  if (x != x) return 0u;
  if (x == 0.0) x = 0.0;
  uint64_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits >> 63 ? ~bits : bits | (uint64_t{1} << 63);
}

// Bit k of the result: key[k] is among the n largest of the `width` keys; equal keys: the lower place first.
template <class Key>
MASKOPS_HOST_DEVICE static inline uint32_t largest_keys(const Key* key, int width, int n) {
  uint32_t kept = 0;
  for (int k = 0; k < width; ++k) {
    int better = 0;
    for (int i = 0; i < width; ++i) better += int(i < k ? key[i] >= key[k] : key[i] > key[k]);
    kept |= uint32_t(better < n) << k;
  }
  return kept;
}

// The kept places of a group of m of a weight: its nonzeros, and the lowest zeros until there are n. More nonzeros than n
// come back as they are: the caller has an error to report.
MASKOPS_HOST_DEVICE static inline uint32_t fill_places(uint32_t nonzero, int n, int m) {
  int count = 0;
  for (uint32_t rest = nonzero; rest != 0; rest &= rest - 1) ++count;
  uint32_t kept = nonzero;
  for (int place = 0; place < m && count < n; ++place) {
    const uint32_t bit = uint32_t{1} << place;
    if ((nonzero & bit) == 0) {
      kept |= bit;
      ++count;
    }
  }
  return kept;
}

// ---- patterns: all n-subsets of m places, bit k = place k, in lexicographic order of the places ----------------------------

MASKOPS_HOST_DEVICE static inline int64_t pattern_count(int64_t n, int64_t m) {
  int64_t count = 1;
  for (int64_t i = 1; i <= n; ++i) count = count * (m - n + i) / i;
  return count;
}

MASKOPS_HOST_DEVICE static inline uint32_t first_pattern(int n) { return n >= 32 ? ~0u : (1u << n) - 1u; }

// 1100, 1010, 1001, 0110, 0101, 0011 for 2:4, written from place 0 on. 0 after the last one.
MASKOPS_HOST_DEVICE static inline uint32_t next_pattern(uint32_t pattern, int m) {
  int run = 0;  // kept places at the end, which cannot move on
  while (run < m && (pattern >> (m - 1 - run)) & 1u) ++run;
  int place = m - 1 - run;
  while (place >= 0 && !((pattern >> place) & 1u)) --place;
  if (place < 0) return 0u;
  const uint32_t below = pattern & ((uint32_t{1} << place) - 1u);
  return below | (((uint32_t{1} << (run + 1)) - 1u) << (place + 1));
}

// ---- noise and soft masks -------------------------------------------------------------------------------------------------

MASKOPS_HOST_DEVICE static inline float log_of(float x) { return logf(x); }
MASKOPS_HOST_DEVICE static inline double log_of(double x) { return log(x); }
MASKOPS_HOST_DEVICE static inline float exp_of(float x) { return expf(x); }
MASKOPS_HOST_DEVICE static inline double exp_of(double x) { return exp(x); }

// Number i of the stream of words.
MASKOPS_HOST_DEVICE static inline uint32_t philox_word(const PhiloxKey& key, int64_t i) {
  return philox(key, uint64_t(i) >> 2).word[i & 3];
}

// A word as a number inside (0, 1): 23 bits and a half, which float32 holds exactly.
template <class T>
MASKOPS_HOST_DEVICE static inline T uniform_of(uint32_t word) {
  return (T(int32_t(word >> 9)) + T(0.5)) * T(0x1p-23);
}

template <class T>
MASKOPS_HOST_DEVICE static inline T gumbel_of(uint32_t word) {
  return -log_of(-log_of(uniform_of<T>(word)));
}

// The relaxed top-n stays away from log(0) by this much.
template <class T>
MASKOPS_HOST_DEVICE static inline T relaxed_eps() {
  return sizeof(T) == 8 ? T(1e-12) : T(1e-6f);
}

// p = softmax(a / tau) over `count` values; p may be a.
template <class T>
MASKOPS_HOST_DEVICE static inline void softmax_of(const T* a, int count, T inverse_tau, T* p) {
  T most = a[0], sum = T(0);
  for (int i = 1; i < count; ++i) most = a[i] > most ? a[i] : most;
  for (int i = 0; i < count; ++i) {
    p[i] = exp_of((a[i] - most) * inverse_tau);
    sum += p[i];
  }
  for (int i = 0; i < count; ++i) p[i] /= sum;
}

// The gradient that a softmax passes on: p * (grad - sum(p * grad)) / tau, in place of grad.
template <class T>
MASKOPS_HOST_DEVICE static inline void softmax_grad(const T* p, int count, T inverse_tau, T* grad) {
  T mean = T(0);
  for (int i = 0; i < count; ++i) mean += p[i] * grad[i];
  for (int i = 0; i < count; ++i) grad[i] = p[i] * (grad[i] - mean) * inverse_tau;
}

// mask[m] = p @ patterns.
template <class T>
MASKOPS_HOST_DEVICE static inline void mask_of_patterns(const T* p, int n, int m, T* mask) {
  for (int k = 0; k < m; ++k) mask[k] = T(0);
  int i = 0;
  for (uint32_t pattern = first_pattern(n); pattern != 0; pattern = next_pattern(pattern, m), ++i) {
    for (int k = 0; k < m; ++k) mask[k] += (pattern >> k) & 1u ? p[i] : T(0);
  }
}

// grad_p[i] = sum of grad_mask over the places of pattern i.
template <class T>
MASKOPS_HOST_DEVICE static inline void grad_of_patterns(const T* grad_mask, int n, int m, T* grad_p) {
  int i = 0;
  for (uint32_t pattern = first_pattern(n); pattern != 0; pattern = next_pattern(pattern, m), ++i) {
    T sum = T(0);
    for (int k = 0; k < m; ++k) sum += (pattern >> k) & 1u ? grad_mask[k] : T(0);
    grad_p[i] = sum;
  }
}

// Relaxed top-n of a group (Xie and Ermon, "Reparameterizable subset sampling via continuous relaxations", 2019):
// n softmaxes in a row, each with what the ones before took removed. r holds a and is used up; p: [n, m], kept for the gradient.
template <class T>
MASKOPS_HOST_DEVICE static inline void relaxed_mask(T* r, int n, int m, T inverse_tau, T* p, T* mask) {
  for (int k = 0; k < m; ++k) mask[k] = T(0);
  for (int i = 0; i < n; ++i) {
    T* now = p + i * m;
    softmax_of(r, m, inverse_tau, now);
    for (int k = 0; k < m; ++k) {
      mask[k] += now[k];
      const T left = T(1) - now[k];
      r[k] += log_of(left > relaxed_eps<T>() ? left : relaxed_eps<T>());
    }
  }
}

// grad_a[m] from grad_mask[m] and the p of relaxed_mask; work: [m].
template <class T>
MASKOPS_HOST_DEVICE static inline void relaxed_mask_grad(const T* p, const T* grad_mask, int n, int m, T inverse_tau, T* work,
                                                         T* grad_a) {
  for (int k = 0; k < m; ++k) grad_a[k] = T(0);
  for (int i = n - 1; i >= 0; --i) {  // grad_a holds the gradient of r_{i+1}
    const T* now = p + i * m;
    for (int k = 0; k < m; ++k) {
      const T left = T(1) - now[k];
      work[k] = grad_mask[k] - (left > relaxed_eps<T>() ? grad_a[k] / left : T(0));
    }
    softmax_grad(now, m, inverse_tau, work);
    for (int k = 0; k < m; ++k) grad_a[k] += work[k];
  }
}

}  // namespace maskops
