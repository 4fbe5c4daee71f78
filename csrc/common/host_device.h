// A function of both the CPU and the CUDA compiler.
#pragma once

#if defined(__CUDACC__)
#define MASKOPS_HOST_DEVICE __host__ __device__
#else
#define MASKOPS_HOST_DEVICE
#endif
