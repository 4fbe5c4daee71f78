// nm_matmul_pack on CUDA: a boolean mask [R, K] -> bytes of eight columns [R, ceil(K / 8)].
#include "common/library.cuh"
#include "cuda/nm_matmul/groups.cuh"
#include "math/nm_matmul_check.h"

namespace maskops {
namespace {

// Eight bools, one to a byte, to the bits of a byte: the product moves the lowest bit of byte i to bit 56 + i.
__device__ __forceinline__ unsigned packed(std::uint64_t bools) {
  return static_cast<unsigned>((bools & 0x0101010101010101ull) * 0x0102040810204080ull >> 56);
}

// One thread owns 16 columns, which fill two bytes: rows of a multiple of 16 columns follow each other without a gap.
__global__ void __launch_bounds__(kGroupThreads, 4)
    pack_wide_kernel(const std::uint8_t* __restrict__ mask, std::uint16_t* __restrict__ bits, std::int64_t chunks) {
  const std::int64_t chunk = static_cast<std::int64_t>(blockIdx.x) * kGroupThreads + threadIdx.x;
  if (chunk >= chunks) return;
  const Vec<std::uint64_t, 2> bools = load_vec<2>(reinterpret_cast<const std::uint64_t*>(mask) + 2 * chunk);
  store(bits + chunk, static_cast<std::uint16_t>(packed(bools.v[0]) | packed(bools.v[1]) << 8));
}

// One thread owns one byte of any row.
__global__ void __launch_bounds__(kGroupThreads, 4)
    pack_kernel(const std::uint8_t* __restrict__ mask, std::uint8_t* __restrict__ bits, std::int64_t bytes, const RowSplit rows,
                std::int64_t columns) {
  const std::int64_t flat = static_cast<std::int64_t>(blockIdx.x) * kGroupThreads + threadIdx.x;
  if (flat >= bytes) return;
  std::int64_t byte = flat;
  const std::int64_t row = rows.split(byte);
  unsigned word = 0;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const std::int64_t k = byte * 8 + i;
    if (k < columns) word |= static_cast<unsigned>(load(mask + row * columns + k) != 0) << i;
  }
  store(bits + flat, static_cast<std::uint8_t>(word));
}

Tensor nm_matmul_pack(const Tensor& mask_any) {
  check_nm_pack(mask_any);
  const DeviceScope scope(mask_any);
  const Tensor mask = torch::stable::contiguous(mask_any);
  const std::int64_t rows = mask.size(0), columns = mask.size(1), row_bytes = ceil_div(columns, 8), bytes = rows * row_bytes;
  Tensor bits = empty_like_device(mask, {rows, row_bytes}, ScalarType::Byte);
  const std::uint8_t* from = static_cast<const std::uint8_t*>(mask.const_data_ptr());
  if (vector_width<std::uint8_t>({columns}, {from, data<std::uint8_t>(bits)}) > 1) {
    launch(pack_wide_kernel, grid_for(bytes / 2, kGroupThreads), dim3(kGroupThreads), 0, scope.stream(), from,
           data<std::uint16_t>(bits), bytes / 2);
  } else {
    launch(pack_kernel, grid_for(bytes, kGroupThreads), dim3(kGroupThreads), 0, scope.stream(), from, data<std::uint8_t>(bits), bytes,
           RowSplit(rows, row_bytes), columns);
  }
  return bits;
}

}  // namespace

MASKOPS_CUDA_LIBRARY(m) { m.impl("nm_matmul_pack", TORCH_BOX(&nm_matmul_pack)); }

}  // namespace maskops
