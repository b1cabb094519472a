// Launches that begin while the kernel before them ends (programmatic dependent launch, compute capability 9.0 on).
//
// What a launch costs before its first instruction, a microsecond or so, then passes while the kernel before still
// runs. A kernel launched so must call wait_for_previous() before it touches memory that another kernel reads or
// writes.
#pragma once

#include <utility>

#include "launch.cuh"

namespace lightseq {

__device__ __forceinline__ void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
  cudaGridDependencySynchronize();
#endif
}

inline bool launches_early() {
  int device = 0, major = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  return major >= 9;
}

// With `shared_bytes` of dynamic shared memory, of which more than 48 KiB must be asked for.
template <typename... Parameters, typename... Arguments>
void launch_early(const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 block, int shared_bytes,
                  cudaStream_t stream, Arguments&&... arguments) {
  if (shared_bytes > 48 * 1024) {
    check_launch(name, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes));
  }
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = launches_early() ? 1 : 0;
  check_launch(name, cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...));
}

template <typename... Parameters, typename... Arguments>
void launch_early(const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 block, cudaStream_t stream,
                  Arguments&&... arguments) {
  launch_early(name, kernel, grid, block, 0, stream, std::forward<Arguments>(arguments)...);
}

}  // namespace lightseq
