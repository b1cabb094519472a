// Thread blocks that share their shared memory (a cluster, compute capability 9.0 on). Before, a block is on its own.
#pragma once

#include <cooperative_groups.h>

namespace lightseq {

// All threads of the cluster are here, and see what all have written.
__device__ __forceinline__ void cluster_sync() {
#if __CUDA_ARCH__ >= 900
  cooperative_groups::this_cluster().sync();
#else
  __syncthreads();
#endif
}

// The two halves of cluster_sync; on its own, a block needs its own barriers in their place.
__device__ __forceinline__ void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
  cooperative_groups::cluster_group::barrier_arrive();
#endif
}

__device__ __forceinline__ void cluster_wait() {
#if __CUDA_ARCH__ >= 900
  cooperative_groups::cluster_group::barrier_wait();
#endif
}

// What `pointer` to shared memory is in the block of that rank.
template <typename P>
__device__ __forceinline__ P* of_rank(P* pointer, int rank) {
#if __CUDA_ARCH__ >= 900
  return cooperative_groups::this_cluster().map_shared_rank(pointer, rank);
#else
  return pointer;
#endif
}

}  // namespace lightseq
