// masked_attention_map on the CPU: the rules of a mask for 64 queries at a time, a word of 64 keys each, on a stack of words.
// A row of tiles is evaluated twice: once to tell empty and full tiles and to count the others, once to write those.
#include "common/isa.h"
#include "math/masked_attention.h"

namespace maskops {

struct MaskMap {
  const int64_t* program;
  int64_t rules;  // instructions
  MaskData data;
  int64_t heads, queries, keys;
};

// A tile: 64 queries from q0 on, 64 keys from k0 on, of batch entry b and head h.
struct MaskTile {
  int64_t b, h, q0, k0;
};

struct MapKernels {
  int (*state)(const MaskMap&, const MaskTile&);                  // kMaskEmpty, kMaskFull, or 0 where it is neither
  void (*write)(const MaskMap&, const MaskTile&, uint64_t* words);  // [64]
};
MASKOPS_DECLARE_KERNELS(MapKernels)

}  // namespace maskops

#include "common/simd.h"

namespace maskops {
inline namespace MASKOPS_ISA_NS {
namespace {

#if MASKOPS_ISA_LEVEL == 2

// 64 numbers of the keys of a tile; those past the last key are 0.
struct KeyNumbers {
  __m512i v[4];

  KeyNumbers(const int32_t* from, uint64_t some) {
    for (int c = 0; c < 4; ++c) v[c] = _mm512_maskz_loadu_epi32(__mmask16(some >> (16 * c)), from + 16 * c);
  }
  // The keys that compare.
  template <class Compare>
  inline uint64_t where(const Compare& compare) const {
    const __mmask32 low = _mm512_kunpackw(compare(v[1]), compare(v[0])), high = _mm512_kunpackw(compare(v[3]), compare(v[2]));
    return _mm512_kunpackd(high, low);
  }
};

void same_words(const int64_t* rule, const MaskData& data, const MaskTile& tile, int64_t rows, uint64_t some, uint64_t* to) {
  const int32_t* ids = data.ints + rule[1] + tile.b * rule[3] + tile.q0;
  const KeyNumbers keys(data.ints + rule[2] + tile.b * rule[4] + tile.k0, some);
  for (int64_t i = 0; i < rows; ++i) {
    const __m512i own = _mm512_set1_epi32(ids[i]);
    to[i] = keys.where([&](__m512i id) { return _mm512_cmpeq_epi32_mask(id, own); }) & some;
  }
}

void range_words(const int64_t* rule, const MaskData& data, const MaskTile& tile, int64_t rows, uint64_t some, uint64_t* to) {
  const int32_t* at = data.ints + tile.b * rule[3] + tile.h * rule[4] + tile.k0;
  const KeyNumbers starts(at + rule[1], some), ends(at + rule[2], some);
  for (int64_t i = 0; i < rows; ++i) {
    const __m512i own = _mm512_set1_epi32(int(tile.q0 + i));
    to[i] = starts.where([&](__m512i start) { return _mm512_cmple_epi32_mask(start, own); }) &
            ends.where([&](__m512i end) { return _mm512_cmpgt_epi32_mask(end, own); }) & some;
  }
}

#endif

// Bits that lie as a word of the tile does, one row of them for each query.
void stored_words(const int64_t* rule, const MaskData& data, const MaskTile& tile, int64_t rows, uint64_t* to) {
  const uint8_t* bits = data.bytes + rule[1] + tile.b * rule[2] + tile.h * rule[3] + tile.k0 / 8;
  const int64_t stride = rule[4];
  bits += tile.q0 * stride;
  for (int64_t i = 0; i < rows; ++i, bits += stride) memcpy(&to[i], bits, sizeof(to[i]));
}

// to[i] = the keys that query i of the tile sees by one rule.
void words_of_rule(const int64_t* rule, const MaskData& data, const MaskTile& tile, int64_t rows, int64_t keys, uint64_t* to) {
#if MASKOPS_ISA_LEVEL == 2
  if (rule[0] == kRuleSame) return same_words(rule, data, tile, rows, bits_between(0, keys), to);
  if (rule[0] == kRuleKeyRange) return range_words(rule, data, tile, rows, bits_between(0, keys), to);
#endif
  if (rule[0] == kRuleBits && rule[5] == 1 && rule[6] == 1 && keys == kMaskTile) return stored_words(rule, data, tile, rows, to);
  for (int64_t i = 0; i < rows; ++i) to[i] = word_of_rule(rule, data, tile.b, tile.h, tile.q0 + i, tile.k0, keys);
}

// words[i] for the queries of a tile; the bits past the last key are 0.
void evaluate(const MaskMap& map, const MaskTile& tile, int64_t rows, int64_t keys, uint64_t* words) {
  alignas(64) uint64_t stack[kRuleDepth][kMaskTile];
  int top = 0;
  for (int64_t r = 0; r < map.rules; ++r) {
    const int64_t* rule = map.program + r * kRuleWidth;
    if (rule[0] == kRuleNot) {
      for (int64_t i = 0; i < kMaskTile; ++i) stack[top - 1][i] = ~stack[top - 1][i];
    } else if (rule[0] == kRuleAnd) {
      --top;
      for (int64_t i = 0; i < kMaskTile; ++i) stack[top - 1][i] &= stack[top][i];
    } else if (rule[0] == kRuleOr) {
      --top;
      for (int64_t i = 0; i < kMaskTile; ++i) stack[top - 1][i] |= stack[top][i];
    } else {
      uint64_t* to = stack[top++];
      words_of_rule(rule, map.data, tile, rows, keys, to);
      for (int64_t i = rows; i < kMaskTile; ++i) to[i] = 0;
    }
  }
  const uint64_t inside = bits_between(0, keys);
  for (int64_t i = 0; i < kMaskTile; ++i) words[i] = i < rows ? stack[0][i] & inside : 0;
}

int state(const MaskMap& map, const MaskTile& tile) {
  const int64_t rows = min_of<int64_t>(kMaskTile, map.queries - tile.q0), keys = min_of<int64_t>(kMaskTile, map.keys - tile.k0);
  alignas(64) uint64_t words[kMaskTile];
  evaluate(map, tile, rows, keys, words);
  uint64_t any = 0, all = ~uint64_t{0};
  for (int64_t i = 0; i < rows; ++i) any |= words[i], all &= words[i];
  return any == 0 ? kMaskEmpty : all == bits_between(0, keys) ? kMaskFull : 0;
}

void write(const MaskMap& map, const MaskTile& tile, uint64_t* words) {
  evaluate(map, tile, min_of<int64_t>(kMaskTile, map.queries - tile.q0), min_of<int64_t>(kMaskTile, map.keys - tile.k0), words);
}

}  // namespace

extern const MapKernels MapKernels_table{&state, &write};

}  // namespace MASKOPS_ISA_NS
}  // namespace maskops

#if MASKOPS_ISA_LEVEL == 0
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "common/parallel.h"
#include "math/masked_attention_check.h"

namespace maskops {
namespace {

std::tuple<Tensor, Tensor> masked_attention_map(const Tensor& ints_any, const Tensor& bytes_any, std::vector<int64_t> program, int64_t B,
                                                int64_t H, int64_t L, int64_t S) {
  check_mask_map(ints_any, bytes_any, program, B, H, L, S);
  const Tensor ints = contiguous_or_copy(ints_any), bytes = contiguous_or_copy(bytes_any);
  const MaskMap map{program.data(), static_cast<int64_t>(program.size()) / kRuleWidth,
                    {static_cast<const int32_t*>(ints.const_data_ptr()), static_cast<const uint8_t*>(bytes.const_data_ptr())}, H, L, S};
  const int64_t rows = mask_tiles(L), columns = mask_tiles(S), lines = B * H * rows;
  Tensor tiles = empty_like_device(ints, {B, H, rows, columns}, ScalarType::Int);
  int32_t* states = static_cast<int32_t*>(tiles.mutable_data_ptr());
  const MapKernels& kernels = pick_MapKernels();
  auto tile = [&](int64_t line, int64_t column) {
    const int64_t head = line / rows;
    return MaskTile{head / H, head % H, line % rows * kMaskTile, column * kMaskTile};
  };
  std::vector<int64_t> first(static_cast<size_t>(lines) + 1, 0);
  const int64_t work = columns * kMaskTile * 8 * map.rules;
  parallel_for(lines, work, [&](int64_t begin, int64_t end) {
    for (int64_t line = begin; line < end; ++line) {
      int64_t partial = 0;
      for (int64_t column = 0; column < columns; ++column) {
        states[line * columns + column] = kernels.state(map, tile(line, column));
        partial += states[line * columns + column] == 0;
      }
      first[line + 1] = partial;
    }
  });
  for (int64_t line = 0; line < lines; ++line) first[line + 1] += first[line];
  Tensor words = empty_like_device(ints, {first[lines], kMaskTile}, ScalarType::Long);
  uint64_t* bits = static_cast<uint64_t*>(words.mutable_data_ptr());
  parallel_for(lines, work, [&](int64_t begin, int64_t end) {
    for (int64_t line = begin; line < end; ++line) {
      int64_t next = first[line];
      for (int64_t column = 0; column < columns; ++column) {
        int32_t& of = states[line * columns + column];
        if (of != 0) continue;
        kernels.write(map, tile(line, column), bits + next * kMaskTile);
        of = static_cast<int32_t>(next++);
      }
    }
  });
  return {tiles, words};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(maskops, CPU, m) { m.impl("masked_attention_map", TORCH_BOX(&masked_attention_map)); }

}  // namespace maskops
#endif
