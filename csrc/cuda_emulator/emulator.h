// The CUDA emulator: lets a C++20 host compiler build the unchanged .cu sources and run their kernels on the CPU, for tests.
//
// Blocks run one after another in a random order; the threads of a block are fibers that run in a random order between
// synchronisation points (seed: MASKOPS_EMULATOR_SEED or maskops_emulator_set_seed). What it catches: missing barriers and races on
// shared memory (shared.h), divergent barriers and warp operations (scheduler.h), out-of-bounds accesses (shared memory always,
// global memory under AddressSanitizer), float atomics (atomics.h), launches beyond the limits of every supported chip (launch.h).
#pragma once

// The CUDA headers come first: they define empty or GNU-attribute versions of the qualifiers that are redefined below.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "atomics.h"
#include "launch.h"
#include "scheduler.h"
#include "shared.h"
#include "warp.h"

#undef __launch_bounds__
#define __launch_bounds__(...)
#undef __shared__
#define __shared__ static_assert(false, "declare shared memory with MASKOPS_SHARED or MASKOPS_DYNAMIC_SHARED (launch.cuh)");

#define threadIdx (::maskops_emulator::machine().current->thread_index)
#define blockIdx (::maskops_emulator::machine().block_index)
#define blockDim (::maskops_emulator::machine().block_dim)
#define gridDim (::maskops_emulator::machine().grid_dim)
#define warpSize 32
