// Input checks of the family masked_attention, shared by the CPU and the CUDA op functions.
#pragma once

#include <vector>

#include "common/check.h"
#include "math/masked_attention.h"

namespace maskops {

inline constexpr std::initializer_list<ScalarType> kUint8Only = {ScalarType::Byte};
constexpr int64_t kMostChannels = 256;

inline int64_t mask_tiles(int64_t length) { return (length + kMaskTile - 1) / kMaskTile; }

// Values on the stack at most; 0 where the numbers are no program.
inline int64_t rule_depth(const std::vector<int64_t>& program) {
  int64_t most = 0, now = 0;
  if (program.size() % kRuleWidth != 0) return 0;
  for (size_t at = 0; at < program.size(); at += kRuleWidth) {
    const int64_t code = program[at];
    if (code < 0 || code >= kRuleCount) return 0;
    const int64_t needed = code == kRuleNot ? 1 : code < kRuleNot ? 2 : 0;
    if (now < needed) return 0;
    now += 1 - needed;
    most = std::max(most, now);
  }
  return now == 1 ? most : 0;
}

inline void check_reach(const char* name, int64_t first, int64_t step, int64_t size, const char* kind) {
  const int64_t low = std::min(first, first + step), high = std::max(first, first + step);
  if (low >= 0 && high < size) return;
  fail("AttentionMask", "program", std::string("read ") + name + " inside its " + std::to_string(size) + " " + kind,
       "places " + std::to_string(low) + " to " + std::to_string(high));
}

// That a rule reads inside its tensors, at the last position as at the first.
inline void check_rule(const int64_t* rule, int64_t ints, int64_t bytes, int64_t b, int64_t h, int64_t q, int64_t k) {
  switch (rule[0]) {
    case kRuleRowRange:
    case kRuleKeyRange: {
      const int64_t step = b * rule[3] + h * rule[4] + (rule[0] == kRuleRowRange ? q : k);
      check_reach("start", rule[1], step, ints, "ints");
      return check_reach("end", rule[2], step, ints, "ints");
    }
    case kRuleLength: return check_reach("at", rule[1], b * rule[2] + h * rule[3], ints, "ints");
    case kRuleSame:
    case kRuleGroups:
      check_reach("q_at", rule[1], b * rule[3] + q, ints, "ints");
      check_reach("k_at", rule[2], b * rule[4] + k, ints, "ints");
      if (rule[0] == kRuleGroups) check_reach("matrix", rule[5], rule[6] * rule[6] - 1, bytes, "bytes");
      return;
    case kRuleBits:
      return check_reach("at", rule[1], b * rule[2] + h * rule[3] + q / rule[5] * rule[4] + k / rule[6] / 8, bytes, "bytes");
    default: return;
  }
}

inline void check_mask_map(const Tensor& ints, const Tensor& bytes, const std::vector<int64_t>& program, int64_t B, int64_t H, int64_t L,
                           int64_t S) {
  const char* op = "AttentionMask";
  check_tensor(op, "ints", ints, "[n]", kInt32, {kAny}, ints);
  check_tensor(op, "bytes", bytes, "[n]", kUint8Only, {kAny}, ints);
  const int64_t depth = rule_depth(program);
  if (depth < 1 || depth > kRuleDepth) {
    fail(op, "program", "be a postfix program that needs 1 to " + std::to_string(kRuleDepth) + " values", join_sizes(program));
  }
  const char* names[] = {"B", "H", "Lq", "Lk"};
  const int64_t sizes[] = {B, H, L, S};
  for (int i = 0; i < 4; ++i) {
    if (sizes[i] < 0 || sizes[i] >= kMaskFar) fail(op, names[i], "be in [0, " + std::to_string(kMaskFar) + ")", sizes[i]);
  }
  for (size_t at = 0; at < program.size(); at += kRuleWidth) {
    const int64_t* rule = &program[at];
    const bool divides = rule[0] == kRuleBlockCausal || rule[0] == kRuleBits;
    if (divides && (rule[0] == kRuleBits ? rule[5] < 1 || rule[6] < 1 : rule[1] < 1)) {
      fail(op, "program", "have positive blocks", join_sizes(program));
    }
    if (B * H > 0 && L > 0 && S > 0) check_rule(rule, ints.size(0), bytes.size(0), B - 1, H - 1, L - 1, S - 1);
  }
}

// What every pass over attention is given; a gradient reads more.
struct AttentionArgs {
  const Tensor &q, &k, &v;
  const std::optional<Tensor>&tiles, &words, &bias, &seed;
  double dropout_p;
};

struct GradientArgs : AttentionArgs {
  const Tensor &grad, &grad_lse, &grad_entropy, &out, &lse, &entropy;
  double scale;
};

inline void check_shared(const char* name, const Tensor& x, std::initializer_list<int64_t> sizes) {
  int64_t axis = 0;
  for (const int64_t size : sizes) {
    if (x.size(axis) != 1 && x.size(axis) != size) {
      fail("masked_attention", name, "have 1 or " + std::to_string(size) + " entries along axis " + std::to_string(axis), describe(x));
    }
    ++axis;
  }
}

inline void check_dropout(const std::optional<Tensor>& seed, double dropout_p, const Tensor& q) {
  const char* op = "masked_attention";
  if (!(dropout_p >= 0 && dropout_p < 1)) fail(op, "dropout_p", "be in [0, 1)", dropout_p);
  if ((dropout_p > 0) != seed.has_value()) {
    fail(op, "seed", "be given with dropout_p > 0, and only then", seed ? describe(*seed) : "None");
  }
  if (seed) check_tensor(op, "seed", *seed, "[2]", kInt64, {2}, q);
}

inline void check_masked_attention(const AttentionArgs& a) {
  const char* op = "masked_attention";
  const Tensor& q = a.q;
  check_tensor(op, "q", q, "[B, H, Lq, D]", kFloats, {kAny, kAny, kAny, kAny}, q);
  const int64_t B = q.size(0), H = q.size(1), L = q.size(2), D = q.size(3);
  if (D < 1 || D > kMostChannels) fail(op, "q", "have 1 to " + std::to_string(kMostChannels) + " channels", describe(q));
  const ScalarType type = q.scalar_type();
  check_tensor(op, "k", a.k, "[B, G, Lk, D]", {type}, {B, kAny, kAny, D}, q);
  check_tensor(op, "v", a.v, "[B, G, Lk, D]", {type}, {B, a.k.size(1), a.k.size(2), D}, q);
  const int64_t G = a.k.size(1), S = a.k.size(2);
  if ((G == 0) != (H == 0) || (G > 0 && H % G != 0)) {
    fail(op, "k", "have a number of heads that divides " + std::to_string(H), describe(a.k));
  }
  if (a.tiles.has_value() != a.words.has_value()) fail(op, "tiles and words", "be given together", "one of them");
  if (a.tiles) {
    check_tensor(op, "tiles", *a.tiles, "[B, H, Lq / 64, Lk / 64]", kInt32, {kAny, kAny, mask_tiles(L), mask_tiles(S)}, q);
    check_shared("tiles", *a.tiles, {B, H});
    check_tensor(op, "words", *a.words, "[P, 64]", kInt64, {kAny, kMaskTile}, q);
  }
  if (a.bias) {
    check_tensor(op, "bias", *a.bias, "[B, H, Lq, Lk]", {type}, {kAny, kAny, kAny, S}, q);
    check_shared("bias", *a.bias, {B, H, L});
  }
  check_dropout(a.seed, a.dropout_p, q);
}

inline void check_masked_attention_backward(const GradientArgs& a) {
  const char* op = "masked_attention";
  check_masked_attention(a);
  const Tensor& q = a.q;
  const int64_t B = q.size(0), H = q.size(1), L = q.size(2), D = q.size(3);
  const ScalarType type = q.scalar_type(), sums = type == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  check_tensor(op, "grad", a.grad, "[B, H, Lq, D]", {type}, {B, H, L, D}, q);
  check_tensor(op, "out", a.out, "[B, H, Lq, D]", {type}, {B, H, L, D}, q);
  check_tensor(op, "grad_lse", a.grad_lse, "[B, H, Lq]", {sums}, {B, H, L}, q);
  check_tensor(op, "lse", a.lse, "[B, H, Lq]", {sums}, {B, H, L}, q);
  const int64_t rows = a.entropy.dim() == 3 && a.entropy.size(2) == 0 ? 0 : L;
  check_tensor(op, "entropy", a.entropy, "[B, H, Lq or 0]", {sums}, {B, H, rows}, q);
  check_tensor(op, "grad_entropy", a.grad_entropy, "[B, H, Lq or 0]", {sums}, {B, H, rows}, q);
}

}  // namespace maskops
