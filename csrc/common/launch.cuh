// The check after each launch: a refused launch becomes an exception with the place and CUDA's own words.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace lightseq {

inline void check_launch(const char* kernel, cudaError_t error) {
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string(kernel) + ": launch failed: " + cudaGetErrorString(error));
  }
}

// Shared memory that a block of the current device can have.
inline int most_shared_bytes() {
  int device = 0, bytes = 0;
  check_launch("most_shared_bytes", cudaGetDevice(&device));
  check_launch("most_shared_bytes", cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  return bytes;
}

inline int ceil_div(long a, long b) { return static_cast<int>((a + b - 1) / b); }

}  // namespace lightseq

#define LIGHTSEQ_CHECK_LAUNCH(kernel) ::lightseq::check_launch(kernel, cudaGetLastError())
