// nm_matmul_compress, _decompress and _select on the CPU. Values are moved as bits, so one copy of the code, not one for each
// instruction set, serves every dtype of the same size; the time is that of the memory.
#include "common/isa.h"

#if MASKOPS_ISA_LEVEL == 0
#include <torch/csrc/stable/library.h>

#include <atomic>
#include <tuple>
#include <vector>

#include "common/parallel.h"
#include "math/nm_matmul_check.h"

namespace maskops {
namespace {

// run.template operator()<unsigned integer of the size of one value>()
template <class Run>
void with_bits(const Tensor& x, const Run& run) {
  switch (x.element_size()) {
    case 2: return run.template operator()<uint16_t>();
    case 4: return run.template operator()<uint32_t>();
    default: return run.template operator()<uint64_t>();
  }
}

template <class Bits>
const Bits* data(const Tensor& x) {
  return static_cast<const Bits*>(x.const_data_ptr());
}

// ---- compress

template <class Bits>
uint32_t nonzeros(const Bits* group, int width) {
  uint32_t found = 0;
  for (int k = 0; k < width; ++k) found |= static_cast<uint32_t>(static_cast<Bits>(group[k] << 1) != 0) << k;  // without the sign
  return found;
}

// One row; returns the first group with more than n nonzeros, or -1, and adds the number of them to `crowded`.
template <class Bits>
int64_t compress_row(const Bits* weight, const NmLayout& layout, Bits* values, uint8_t* indices, int64_t& crowded) {
  int64_t first = -1;
  PlaceWriter writer = place_writer(indices, layout.bits);
  for (int64_t g = 0; g < layout.groups; ++g) {
    const Bits* group = weight + g * layout.m;
    const int width = static_cast<int>(std::min<int64_t>(layout.m, layout.K - g * layout.m));
    uint32_t kept = fill_places(nonzeros(group, width), layout.n, layout.m);
    for (int i = 0; i < layout.n; ++i, kept &= kept - 1) {
      const int place = __builtin_ctz(kept);
      *values++ = place < width ? group[place] : Bits{0};
      write_place(writer, place);
    }
    if (kept == 0) continue;
    if (first < 0) first = g;
    ++crowded;
  }
  finish_places(writer);
  return first;
}

std::vector<double> group_contents(const Tensor& weight, int64_t row, int64_t group, const NmLayout& layout) {
  std::vector<double> contents;
  for (int64_t at = group * layout.m; at < std::min(layout.K, (group + 1) * layout.m); ++at) {
    const int64_t i = row * weight.stride(0) + at;
    switch (dtype_of(weight)) {
      case Dtype::kFloat: contents.push_back(data<float>(weight)[i]); break;
      case Dtype::kDouble: contents.push_back(data<double>(weight)[i]); break;
      case Dtype::kBFloat16: contents.push_back(static_cast<float>(data<torch::headeronly::BFloat16>(weight)[i])); break;
      case Dtype::kHalf: contents.push_back(static_cast<float>(data<torch::headeronly::Half>(weight)[i])); break;
    }
  }
  return contents;
}

std::tuple<Tensor, Tensor> nm_matmul_compress(const Tensor& weight_any, int64_t n, int64_t m) {
  const NmLayout layout = check_nm_compress(weight_any, n, m);
  const Tensor weight = with_contiguous_rows(weight_any);
  const int64_t rows = weight.size(0);
  Tensor values = empty_like_device(weight, {rows, layout.slots});
  Tensor indices = empty_like_device(weight, {rows, layout.row_bytes}, ScalarType::Byte);
  uint8_t* places = static_cast<uint8_t*>(indices.mutable_data_ptr());
  FirstFault fault;
  std::atomic<int64_t> crowded{0};
  with_bits(weight, [&]<class Bits>() {
    Bits* kept = static_cast<Bits*>(values.mutable_data_ptr());
    parallel_for(rows, layout.K * 8, [&](int64_t begin, int64_t end) {
      int64_t found = 0;
      for (int64_t r = begin; r < end; ++r) {
        const int64_t group = compress_row(data<Bits>(weight) + r * weight.stride(0), layout, kept + r * layout.slots,
                                           places + r * layout.row_bytes, found);
        if (group >= 0) fault.note(r * layout.groups + group);
      }
      crowded += found;
    });
  });
  if (fault.any()) {
    const int64_t row = fault.position() / layout.groups, group = fault.position() % layout.groups;
    fail_crowded_group(row, group, layout, group_contents(weight, row, group, layout), crowded, rows * layout.groups);
  }
  return {values, indices};
}

// ---- decompress and select

// visit(slot, column) for every slot of a row; a column of K or more is padding. Eight places are kBits bytes.
template <int kBits, class Visit>
void visit_places(const uint8_t* row, const NmLayout& layout, const Visit& visit) {
  const int n = layout.n;
  int64_t slot = 0, start = 0;  // start of the slot's group
  int in_group = 0;
  auto next = [&](int place) {
    visit(slot++, start + place);
    if (++in_group == n) {
      in_group = 0;
      start += layout.m;
    }
  };
  for (; slot + 8 <= layout.slots; row += kBits) {
    uint64_t word = 0;
    std::memcpy(&word, row, kBits);
    if constexpr (__BYTE_ORDER__ == __ORDER_BIG_ENDIAN__) word = __builtin_bswap64(word);
    for (int i = 0; i < 8; ++i, word >>= kBits) next(static_cast<int>(word & ((1u << kBits) - 1u)));
  }
  for (int64_t first = slot; slot < layout.slots;) next(read_place(row, slot - first, kBits));
}

template <class Visit>
void for_places(const uint8_t* row, const NmLayout& layout, const Visit& visit) {
  switch (layout.bits) {
    case 1: return visit_places<1>(row, layout, visit);
    case 2: return visit_places<2>(row, layout, visit);
    case 3: return visit_places<3>(row, layout, visit);
    case 4: return visit_places<4>(row, layout, visit);
    default: return visit_places<5>(row, layout, visit);
  }
}

Tensor nm_matmul_decompress(const Tensor& values_any, const Tensor& indices_any, int64_t n, int64_t m, int64_t K) {
  const NmLayout layout = check_nm_decompress(values_any, indices_any, n, m, K);
  const Tensor values = with_contiguous_rows(values_any), indices = with_contiguous_rows(indices_any);
  Tensor dense = empty_like_device(values, {values.size(0), K});
  with_bits(values, [&]<class Bits>() {
    Bits* out = static_cast<Bits*>(dense.mutable_data_ptr());
    parallel_for(values.size(0), K * 8, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        const Bits* from = data<Bits>(values) + r * values.stride(0);
        Bits* to = out + r * K;
        std::fill_n(to, K, Bits{0});
        for_places(data<uint8_t>(indices) + r * indices.stride(0), layout, [&](int64_t slot, int64_t column) {
          if (column < layout.K) to[column] = from[slot];
        });
      }
    });
  });
  return dense;
}

Tensor nm_matmul_select(const Tensor& dense_any, const Tensor& indices_any, int64_t n, int64_t m) {
  const NmLayout layout = check_nm_select(dense_any, indices_any, n, m);
  const Tensor dense = with_contiguous_rows(dense_any), indices = with_contiguous_rows(indices_any);
  Tensor values = empty_like_device(dense, {dense.size(0), layout.slots});
  with_bits(dense, [&]<class Bits>() {
    Bits* out = static_cast<Bits*>(values.mutable_data_ptr());
    parallel_for(dense.size(0), layout.K * 8, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        const Bits* from = data<Bits>(dense) + r * dense.stride(0);
        Bits* to = out + r * layout.slots;
        for_places(data<uint8_t>(indices) + r * indices.stride(0), layout, [&](int64_t slot, int64_t column) {
          to[slot] = column < layout.K ? from[column] : Bits{0};
        });
      }
    });
  });
  return values;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(maskops, CPU, m) {
  m.impl("nm_matmul_compress", TORCH_BOX(&nm_matmul_compress));
  m.impl("nm_matmul_decompress", TORCH_BOX(&nm_matmul_decompress));
  m.impl("nm_matmul_select", TORCH_BOX(&nm_matmul_select));
}

}  // namespace maskops
#endif
