// The rules of attention masks, evaluated for one query and up to 64 keys: bit j of a word is key k0 + j. For every device.
#pragma once

#include <cstdint>

#include "common/host_device.h"

namespace maskops {

constexpr int kMaskTile = 64;  // queries and keys of a tile
constexpr int kMaskEmpty = -1, kMaskFull = -2;
constexpr int kRuleWidth = 8, kRuleDepth = 4;
constexpr int64_t kMaskFar = int64_t{1} << 30;

// As in maskops/reference/masked_attention.py; the operands follow the code.
enum MaskRule : int64_t {
  kRuleAnd = 0,
  kRuleOr,
  kRuleNot,
  kRuleRowRange,     // start, end, stride_b, stride_h
  kRuleKeyRange,     // start, end, stride_b, stride_h
  kRuleLength,       // at, stride_b, stride_h
  kRuleBand,         // low, high
  kRuleBlockCausal,  // block
  kRuleSame,         // q_at, k_at, q_stride_b, k_stride_b
  kRuleGroups,       // q_at, k_at, q_stride_b, k_stride_b, matrix, groups
  kRuleBits,         // at, stride_b, stride_h, stride_q, q_block, k_block
  kRuleCount
};

struct MaskData {
  const int32_t* ints;
  const uint8_t* bytes;
};

// Bits [low, high) of a word, as far as they exist.
MASKOPS_HOST_DEVICE inline uint64_t bits_between(int64_t low, int64_t high) {
  low = low < 0 ? 0 : low;
  high = high > 64 ? 64 : high;
  return high <= low ? 0 : (~uint64_t{0} >> (64 - (high - low))) << low;
}

// Rules that are a range of keys for each query.
MASKOPS_HOST_DEVICE inline bool is_range_rule(int64_t code) {
  return code == kRuleRowRange || code == kRuleLength || code == kRuleBand || code == kRuleBlockCausal;
}
MASKOPS_HOST_DEVICE inline uint64_t word_of_range(const int64_t* rule, const MaskData& data, int64_t b, int64_t h, int64_t q, int64_t k0) {
  switch (rule[0]) {
    case kRuleRowRange: {
      const int64_t at = b * rule[3] + h * rule[4] + q;
      return bits_between(data.ints[rule[1] + at] - k0, data.ints[rule[2] + at] - k0);
    }
    case kRuleLength: return bits_between(0, data.ints[rule[1] + b * rule[2] + h * rule[3]] - k0);
    case kRuleBand: return bits_between(q + rule[1] - k0, q + rule[2] + 1 - k0);
    default: return bits_between(0, (q / rule[1] + 1) * rule[1] - k0);
  }
}

// Whether a query sees a key, for the rules that have to look at every pair.
MASKOPS_HOST_DEVICE inline bool sees(const int64_t* rule, const MaskData& data, int64_t b, int64_t h, int64_t q, int64_t k) {
  switch (rule[0]) {
    case kRuleKeyRange: {
      const int64_t at = b * rule[3] + h * rule[4] + k;
      return q >= data.ints[rule[1] + at] && q < data.ints[rule[2] + at];
    }
    case kRuleSame: return data.ints[rule[1] + b * rule[3] + q] == data.ints[rule[2] + b * rule[4] + k];
    case kRuleGroups: {
      // Groups outside the matrix, which the front end refuses, see nothing.
      const int64_t of_q = data.ints[rule[1] + b * rule[3] + q], of_k = data.ints[rule[2] + b * rule[4] + k], groups = rule[6];
      if (of_q < 0 || of_q >= groups || of_k < 0 || of_k >= groups) return false;
      return data.bytes[rule[5] + of_q * groups + of_k] != 0;
    }
    default: {
      const int64_t bit = k / rule[6];
      return (data.bytes[rule[1] + b * rule[2] + h * rule[3] + q / rule[5] * rule[4] + bit / 8] >> (bit % 8) & 1) != 0;
    }
  }
}

MASKOPS_HOST_DEVICE inline uint64_t word_of_rule(const int64_t* rule, const MaskData& data, int64_t b, int64_t h, int64_t q, int64_t k0,
                                                 int64_t keys) {
  if (is_range_rule(rule[0])) return word_of_range(rule, data, b, h, q, k0);
  uint64_t word = 0;
  if (rule[0] == kRuleBits && rule[6] == 1) {  // k0 begins a byte
    const uint8_t* at = data.bytes + rule[1] + b * rule[2] + h * rule[3] + q / rule[5] * rule[4] + k0 / 8;
    for (int64_t i = 0; 8 * i < keys; ++i) word |= static_cast<uint64_t>(at[i]) << (8 * i);
    return word;
  }
  for (int64_t j = 0; j < keys; ++j) word |= static_cast<uint64_t>(sees(rule, data, b, h, q, k0 + j)) << j;
  return word;
}

}  // namespace maskops
