// How the laws of mask_sampling draw, in whole numbers only, so that every backend draws the same masks bit for bit.
//
// A law that draws per element reads word b N + n of the stream. A law that draws per row reads the row's own stream, whose word i is
// word i % 4 of counter b 2^32 + i / 4. Probabilities are thresholds of 32 bits, logarithms fixed-point polynomials.
// All functions are static: a source compiled for AVX-512 must not lend its copy to the portable path.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/host_device.h"
#include "common/philox.h"

namespace maskops {

MASKOPS_HOST_DEVICE static inline uint64_t row_counter(int64_t b) { return static_cast<uint64_t>(b) << 32; }

MASKOPS_HOST_DEVICE static inline uint32_t pick_word(const PhiloxWords& words, int i) {
  return i == 0 ? words.word[0] : i == 1 ? words.word[1] : i == 2 ? words.word[2] : words.word[3];
}

// Word i of the stream of row b.
MASKOPS_HOST_DEVICE static inline uint32_t row_word(const PhiloxKey& key, int64_t b, int64_t i) {
  return pick_word(philox(key, row_counter(b) + static_cast<uint64_t>(i >> 2)), static_cast<int>(i & 3));
}

// A whole number in [0, n), n < 2^31.
MASKOPS_HOST_DEVICE static inline int64_t below(uint32_t word, int64_t n) {
  return static_cast<int64_t>((static_cast<uint64_t>(word) * static_cast<uint64_t>(n)) >> 32);
}

// ---------------------------------------------------------------- logarithms, 26 bits after the point, right to 1e-7

constexpr int kLogBits = 26;

// log2 of m / 2^31 for m in [2^31, 2^32).
MASKOPS_HOST_DEVICE static inline int64_t log2_fraction(int64_t m) {
  const int64_t f = m - (int64_t{1} << 31);
  int64_t r = 8138037;
  r = ((r * f) >> 31) - 45835024;
  r = ((r * f) >> 31) + 121388650;
  r = ((r * f) >> 31) - 211833397;
  r = ((r * f) >> 31) + 296051740;
  r = ((r * f) >> 31) - 384859663;
  r = ((r * f) >> 31) + 516142836;
  r = ((r * f) >> 31) - 774533280;
  r = ((r * f) >> 31) + 1549081959;
  return (r * f) >> (31 + 4);
}

// Moves x up by `shift` bits if its highest ones are free, and the exponent down.
MASKOPS_HOST_DEVICE static inline void shift_up(int64_t& x, int64_t& exponent, int shift) {
  const bool small = x < (int64_t{1} << (63 - shift));
  x = small ? x << shift : x;
  exponent -= small ? shift : 0;
}

// log2 x for x in [1, 2^63). Without a branch, a loop or an instruction that counts zeros, so that it becomes vectors on the CPU.
MASKOPS_HOST_DEVICE static inline int64_t fixed_log2(int64_t x) {
  int64_t exponent = 62;
  shift_up(x, exponent, 32);
  shift_up(x, exponent, 16);
  shift_up(x, exponent, 8);
  shift_up(x, exponent, 4);
  shift_up(x, exponent, 2);
  shift_up(x, exponent, 1);
  return exponent * (int64_t{1} << kLogBits) + log2_fraction(x >> 31);
}

// a * b where it fits, else what wraps around, of which nothing comes out.
MASKOPS_HOST_DEVICE static inline int64_t wrapping_product(int64_t a, int64_t b) {
  return static_cast<int64_t>(static_cast<uint64_t>(a) * static_cast<uint64_t>(b));
}

// -log2 u of u = (word | 1) / 2^32, 56 bits after the point. Near 1 from 1 - u, as small values decide a race.
MASKOPS_HOST_DEVICE static inline int64_t exponential56(uint32_t word) {
  const int64_t x = word | 1u, v = (int64_t{1} << 32) - x;
  int64_t r = 2234586229;
  r = (wrapping_product(r, v) >> 32) - 2631372645;
  r = (wrapping_product(r, v) >> 32) + 1951859503;
  r = (wrapping_product(r, v) >> 32) - 316848838;
  r = (wrapping_product(r, v) >> 32) + 418019985;
  r = (wrapping_product(r, v) >> 32) + 376077536;
  r = (wrapping_product(r, v) >> 32) + 516932629;
  r = (wrapping_product(r, v) >> 32) + 774529857;
  r = (wrapping_product(r, v) >> 32) + 1549082040;
  const int64_t near_one = wrapping_product(r, v) >> 6;
  const int64_t far = ((int64_t{32} << kLogBits) - fixed_log2(x)) << 30;
  return v < (int64_t{1} << 31) ? near_one : far;
}

// Gumbel noise in units of log 2: -log2(-log2 u).
MASKOPS_HOST_DEVICE static inline int64_t gumbel2(uint32_t word) {
  return 56 * (int64_t{1} << kLogBits) - fixed_log2(exponential56(word));
}

// ---------------------------------------------------------------- what is drawn per element

// The key of a race with this weight: the smallest key wins, with probability weight / sum of weights. Weight 0, or below 2^-126, comes
// after all others, in any order.
MASKOPS_HOST_DEVICE static inline float race_key(uint32_t word, float weight) {
  uint32_t bits;
  memcpy(&bits, &weight, sizeof bits);
  bits &= 0x7FFFFFFFu;  // -0 is 0
  const int64_t exponent = static_cast<int64_t>(bits >> 23);
  const int64_t mantissa = static_cast<int64_t>(((bits & 0x7FFFFFu) | 0x800000u)) << 8;
  const int64_t log_weight = (exponent - 127) * (int64_t{1} << kLogBits) + log2_fraction(mantissa);
  const int64_t none = (int64_t{1} << 40) + (static_cast<int64_t>(word) << 8);
  return static_cast<float>(exponent == 0 ? none : -(log_weight + gumbel2(word)));
}

constexpr int64_t kLog2OfLog2E = 35484911;  // -log2(ln 2) with 26 bits after the point

// Whether a gate is open: with probability sigmoid(logit), or 1 - exp(-exp(logit)) for a single Gumbel. A NaN is shut.
MASKOPS_HOST_DEVICE static inline bool gate_open(uint32_t word, float logit, bool gumbel) {
  float bounded = logit == logit ? logit : -64.0f;
  bounded = bounded < -64.0f ? -64.0f : bounded > 64.0f ? 64.0f : bounded;
  const int64_t level = static_cast<int64_t>(bounded * 96817624.0f);  // log2 e with 26 bits after the point, to 24 bits
  const int64_t x = word | 1u;
  const int64_t least = gumbel ? -(gumbel2(word) + kLog2OfLog2E) : fixed_log2((int64_t{1} << 32) - x) - fixed_log2(x);
  return level > least;
}

// 80/10/10: the id that a masked token gets. action, other: two words; hide and swap: thresholds of 32 bits, swap above hide.
MASKOPS_HOST_DEVICE static inline int64_t corrupted(uint32_t action, uint32_t other, int64_t id, int64_t mask_id, int64_t low, int64_t high,
                                             int64_t hide, int64_t swap) {
  return static_cast<int64_t>(action) < hide ? mask_id : static_cast<int64_t>(action) < swap ? low + below(other, high - low) : id;
}

// Noise of a pixel in [-2^15, 2^15): half i % 2 of word i / 2 of the row.
MASKOPS_HOST_DEVICE static inline int32_t noise_of(uint32_t word, int64_t i) {
  return static_cast<int32_t>((word >> (i & 1 ? 16 : 0)) & 0xFFFFu) - 32768;
}

// ---------------------------------------------------------------- rectangles

constexpr int64_t kMaxSide = 64;           // of a grid: a row of it is a word
constexpr int64_t kFillWords = int64_t{1} << 31;  // where in a row's stream the words of single cells begin

struct Rectangle {
  int64_t top, left, height, width;
};

MASKOPS_HOST_DEVICE static inline uint64_t row_bits(int64_t from, int64_t count) {
  return count <= 0 ? 0 : (count >= 64 ? ~uint64_t{0} : ((uint64_t{1} << count) - 1)) << from;
}

// A rectangle of BEiT's law: area ~ U(smallest, room) and a shape from the table, sides rounded. shape: sqrt of height over width and
// its inverse, 14 bits after the point. Sides that are not inside the grid come back as 0 x 0.
MASKOPS_HOST_DEVICE static inline Rectangle block_rectangle(const PhiloxWords& words, const int32_t* shapes, int64_t count, int64_t h,
                                                     int64_t w, int64_t smallest, int64_t room) {
  const int64_t least = smallest < room ? smallest : room, range = smallest < room ? room - smallest : smallest - room;
  const int64_t area = (least << 32) + static_cast<int64_t>(static_cast<uint64_t>(words.word[0]) * static_cast<uint64_t>(range));
#if defined(__CUDA_ARCH__)
  const int64_t root = static_cast<int64_t>(__dsqrt_rn(static_cast<double>(area)));
#else
  const int64_t root = static_cast<int64_t>(__builtin_sqrt(static_cast<double>(area)));
#endif
  const int64_t shape = below(words.word[1], count);
  const int64_t height = (root * shapes[2 * shape] + (int64_t{1} << 29)) >> 30;
  const int64_t width = (root * shapes[2 * shape + 1] + (int64_t{1} << 29)) >> 30;
  if (height >= h || width >= w) return {0, 0, 0, 0};
  return {below(words.word[2], h - height + 1), below(words.word[3], w - width + 1), height, width};
}

// The place of a rectangle of this size with its corner in [0, h - height) x [0, w - width), as I-JEPA draws it.
MASKOPS_HOST_DEVICE static inline Rectangle placed(const PhiloxWords& words, int64_t h, int64_t w, int64_t height, int64_t width) {
  return {below(words.word[0], h - height), below(words.word[1], w - width), height, width};
}

constexpr int64_t kTriesPerTarget = 20;       // contexts that are drawn before one target less is kept away from them
constexpr uint64_t kSharedCounter = ~uint64_t{0};  // where the sizes come from that all rows share

// ---------------------------------------------------------------- spans

struct Interval {
  int64_t begin, end;
};

// One candidate of CM3: two uniform ends, the lower rounded down, the upper to the nearest.
MASKOPS_HOST_DEVICE static inline Interval candidate(const PhiloxWords& words, int64_t length) {
  const uint32_t a = words.word[0], b = words.word[1];
  const uint64_t low = a < b ? a : b, high = a < b ? b : a, size = static_cast<uint64_t>(length);
  return {static_cast<int64_t>((low * size) >> 32), static_cast<int64_t>((high * size + (uint64_t{1} << 31)) >> 32)};
}

}  // namespace maskops
