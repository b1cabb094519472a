// Sums and maxima over a warp and over a block. Every thread gets the result; the order is fixed, so results repeat.
#pragma once

namespace lightseq {

constexpr int kWarp = 32;

struct Sum {
  __device__ __forceinline__ float operator()(float a, float b) const { return a + b; }
  static constexpr float identity = 0.f;
};

struct Max {
  __device__ __forceinline__ float operator()(float a, float b) const { return fmaxf(a, b); }
  static constexpr float identity = -INFINITY;
};

template <typename Op>
__device__ __forceinline__ float warp_reduce(float x, Op op) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) x = op(x, __shfl_xor_sync(0xffffffffu, x, offset));
  return x;
}

// All threads of a block of up to 1024 must call it. A barrier stands at both ends, so it may be called in a row.
template <typename Op>
__device__ __forceinline__ float block_reduce(float x, Op op) {
  __shared__ float partial[kWarp];
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, warps = (blockDim.x + kWarp - 1) / kWarp;
  x = warp_reduce(x, op);
  if (warps == 1) return x;
  __syncthreads();
  if (lane == 0) partial[warp] = x;
  __syncthreads();
  return warp_reduce(lane < warps ? partial[lane] : Op::identity, op);
}

}  // namespace lightseq
