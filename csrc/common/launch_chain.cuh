// Kernels that follow one another at once: each lets the next one begin before it has waited for its own predecessor.
//
// What a kernel reads that no kernel writes (weights) it can so fetch while those ahead of it still run. Blocks of
// several kernels then share the multiprocessors; a kernel's blocks are all there before the next one's begin.
#pragma once

#include "early_launch.cuh"

namespace lightseq {

// To be followed by wait_for_previous() in every kernel of the chain, so that to wait for one is to wait for all.
__device__ __forceinline__ void launch_next() {
#if __CUDA_ARCH__ >= 900
  cudaTriggerProgrammaticLaunchCompletion();
#endif
}

// As launch_early, each `cluster_blocks` blocks in a row of the grid a cluster: 1 where launches_early() is false.
template <typename... Parameters, typename... Arguments>
void launch_early_in_clusters(const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 block, int shared_bytes,
                              int cluster_blocks, cudaStream_t stream, Arguments&&... arguments) {
  check_launch(name, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes));
  cudaLaunchAttribute attributes[2];
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim.x = cluster_blocks;
  attributes[1].val.clusterDim.y = attributes[1].val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = launches_early() ? (cluster_blocks > 1 ? 2 : 1) : 0;
  check_launch(name, cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...));
}

}  // namespace lightseq
