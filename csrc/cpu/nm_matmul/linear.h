// The kernels of nm_matmul_linear, one table per instruction set.
//
// Many rows of x: x is packed transposed, so that the vectors run along its rows ("panels"), and the weight becomes lists of
// its kept values with the places of their columns in the packed block ("lists"): one broadcast and a few multiply-adds per
// kept weight, nothing for the others. Few rows of x: the weight is read once, as it lies, and x is picked by shuffles. Rows of
// bfloat16, all but a few, where the CPU has AMX: the weight is made dense for its tiles.
#pragma once

#include <cstdint>

#include "common/isa.h"
#include "cpu/nm_matmul/product.h"
#include "math/nm_matmul.h"

namespace maskops {

// A matrix [rows, columns] whose rows are contiguous.
struct NmMatrix {
  const void* data;
  int64_t stride, rows, columns;
};

// A compressed weight [N, K].
struct NmCompressed {
  NmLayout layout;
  int64_t outputs;  // N
  const void* values;
  int64_t values_stride;
  const uint8_t* indices;
  int64_t indices_stride;
};

// out [M, R] = a [M, C] * weight^T + bias, or with `transposed` a [M, C] * weight. R, C = N, K or K, N.
struct NmProduct {
  int dtype;
  bool transposed;
  NmMatrix a;
  NmCompressed weight;
  const void* bias;  // [R] or null
  void* out;
};

// How rows of a matrix are packed: `count` panels of `vectors` vectors of rows, the last one with `last` vectors in use. A
// panel holds `vectors` vectors for each column in turn.
struct NmPanels {
  int64_t count, vectors, last, row_bytes;
};

// Work items that threads share, and the bytes of buffer that each thread needs.
struct NmPlan {
  int64_t items, buffer_bytes;
  int64_t chunk, chunks, splits;  // tiles per item, number of chunks, and into how many ranges the panels are split
  int64_t section;                // spans whose lists are made at a time
};

// grad_values [N, J] += (grad^T x) at the kept places, for a block of rows; sums in float32 or float64.
struct NmGradValues {
  int dtype;
  NmCompressed weight;
  NmPanels panels;
  const void *grad, *x;  // packed
  bool add;
  void* sums;  // [N, J]
};

struct NmProductKernels {
  NmPanels (*panels)(int dtype, int64_t rows);
  void (*pack)(int dtype, const NmMatrix& a, const NmPanels& panels, Range some, Range columns, void* to);
  NmPlan (*plan)(const NmProduct&, const NmPanels&, int64_t threads);
  void (*multiply)(const NmProduct&, const NmPanels&, const NmPlan&, Range items, const void* packed, void* buffer);
};
MASKOPS_DECLARE_KERNELS(NmProductKernels)

struct NmValuesKernels {
  NmPlan (*plan)(const NmGradValues&, int64_t threads);
  void (*grad_values)(const NmGradValues&, const NmPlan&, int64_t threads, Range items, void* buffer);
  void (*narrow)(int dtype, const void* sums, Range values, void* out);
};
MASKOPS_DECLARE_KERNELS(NmValuesKernels)

// x prepared for the kernels of few rows: in float32 or float64, each row padded with zeros.
struct NmFewKernels {
  int64_t (*most_rows)(const NmProduct&);  // up to so many rows of x these kernels are faster
  int64_t (*x_bytes)(const NmProduct&);
  void (*prepare)(const NmProduct&, void* x);
  int64_t (*buffer_bytes)(const NmProduct&);
  void (*multiply)(const NmProduct&, Range items, const void* x, void* buffer);  // items of kNmFewOutputs outputs
};
MASKOPS_DECLARE_KERNELS(NmFewKernels)

// The product of bfloat16 in AMX tiles, for rows of a that are finite.
struct NmAmxKernels {
  int64_t (*strips)(const NmProduct&);  // of 32 outputs, for pack
  int64_t (*packed_bytes)(const NmProduct&);
  int64_t (*pack_bytes)(const NmProduct&);  // of buffer
  void (*pack)(const NmProduct&, Range strips, void* packed, void* buffer);
  int64_t (*items)(const NmProduct&);
  int64_t (*bytes)(const NmProduct&);  // of buffer
  void (*multiply)(const NmProduct&, Range items, const void* packed, void* buffer);
  // The other way, which most forward products take: a becomes words, and rows of the weight are made dense as they are used.
  bool (*by_rows)(const NmProduct&);
  int64_t (*words_bytes)(const NmProduct&);
  int64_t (*word_items)(const NmProduct&);
  void (*make_words)(const NmProduct&, Range items, void* words);
  int64_t (*row_items)(const NmProduct&);
  int64_t (*row_bytes)(const NmProduct&);  // of buffer
  void (*multiply_rows)(const NmProduct&, Range items, const void* words, void* buffer);
  bool (*all_finite)(const NmMatrix&, Range rows);
};
MASKOPS_DECLARE_KERNELS(NmAmxKernels)

// Steps of the work in which threads share it.
constexpr int64_t kNmPackColumns = 256;   // of a panel, per item of packing
constexpr int64_t kNmMostRows = 2048;     // rows of x packed at a time: bounds the buffers, and fixes the order of additions
constexpr int64_t kNmFewOutputs = 16;     // outputs per item where x has few rows
constexpr int64_t kNmAmxLeastRows = 6;    // of x, that AMX multiplies: fewer are read faster as shuffles

inline namespace MASKOPS_ISA_NS {

// run.template operator()<storage type>()
template <class Run>
static inline void with_storage(int dtype, const Run& run) {
  switch (dtype) {
    case 0: return run.template operator()<float>();
    case 1: return run.template operator()<double>();
    case 2: return run.template operator()<bf16>();
    default: return run.template operator()<f16>();
  }
}

}  // namespace MASKOPS_ISA_NS
}  // namespace maskops
