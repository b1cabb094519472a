// out = x weight, a map for each head (lightseq_fairseq/ops/decode_head_map.py has the shapes).
//
// A block has kRows rows and kOutputs outputs of a head. It is small, so that there is room beside it for the kernel
// behind it, which it lets begin at once and fetch what it reads of memory: in front of decode_memory_attention 128
// queries of 16 heads, 64 to 1024 columns, take 6.6 us instead of torch's 4.4, but both together 1.4 less (H200).
#pragma once

#include "../common/launch_chain.cuh"
#include "../common/octet.cuh"
#include "../common/reduce.cuh"
#include "../common/warpgroup.cuh"

namespace lightseq {
namespace decode_head_map {

constexpr int kDim = kSlab, kRows = 128, kOutputs = kSlab, kThreads = 128;
constexpr int kWarpRows = kRows / (kThreads / kWarp), kAtOnce = 32;  // outputs that a warp has sums of

// Starts copying ROWS rows of a slab, of which `inside` exist; zeros for those that do not.
template <int ROWS, typename T>
__device__ __forceinline__ void copy_slab(T* to, const T* from, long from_stride, int inside) {
#pragma unroll
  for (int n = 0; n < ROWS * kSlabUnits / kThreads; ++n) {
    const int i = threadIdx.x + n * kThreads, row = i / kSlabUnits, unit = i % kSlabUnits;
    const bool real = row < inside;
    copy_async(to + slab_place(row, unit), from + (real ? row : 0) * from_stride + unit * kOctet, real);
  }
}

// ----------------------------------------------------------------------------------------------------------------
// CUDA kernels

// Grid: (O / kOutputs, H, R / kRows). x (R, H, kDim), weight (H, kDim, O), out (R, H, O).
template <typename T>
__global__ void __launch_bounds__(kThreads, 8) multiply(T* out, const T* x, const T* weight, int rows, int outer) {
  __shared__ __align__(128) T x_slab[kRows * kSlab], weight_slab[kDim * kSlab];
  const int head = blockIdx.y, heads = gridDim.y, first_output = blockIdx.x * kOutputs, first_row = blockIdx.z * kRows;
  launch_next();
  copy_slab<kDim>(weight_slab, weight + static_cast<long>(head) * kDim * outer + first_output, outer, kDim);
  wait_for_previous();
  copy_slab<kRows>(x_slab, x + (static_cast<long>(first_row) * heads + head) * kDim, static_cast<long>(heads) * kDim,
                   rows - first_row);
  commit_copies();
  await_copies<0>();
  __syncthreads();

  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
#pragma unroll
  for (int column = 0; column < kOutputs; column += kAtOnce) {
    float sum[kWarpRows / 16][kAtOnce / 8][4] = {};
#pragma unroll
    for (int k = 0; k < kDim; k += 16) {
      uint32_t left[kWarpRows / 16][4], right[4];
#pragma unroll
      for (int m = 0; m < kWarpRows / 16; ++m) {
        load_matrices(left[m], x_slab + slab_place(warp * kWarpRows + m * 16 + lane % 16, k / kOctet + lane / 16));
      }
#pragma unroll
      for (int n = 0; n < kAtOnce / 16; ++n) {
        load_matrices_transposed(
            right, weight_slab + slab_place(k + lane % 16, column / kOctet + n * 2 + lane / 16));
#pragma unroll
        for (int m = 0; m < kWarpRows / 16; ++m) {
          multiply_add<T>(sum[m][2 * n], left[m], right[0], right[1]);
          multiply_add<T>(sum[m][2 * n + 1], left[m], right[2], right[3]);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kWarpRows / 8; ++i) {
      uint32_t words[kAtOnce / 8];
#pragma unroll
      for (int n = 0; n < kAtOnce / 8; ++n) words[n] = pack<T>(sum[i / 2][n][i % 2 * 2], sum[i / 2][n][i % 2 * 2 + 1]);
      const uint4 octet = gather_columns(words);
      const int row = first_row + warp * kWarpRows + i * 8 + lane / 4;
      if (row < rows) {
        T* const to = out + (static_cast<long>(row) * heads + head) * outer + first_output + column;
        *reinterpret_cast<uint4*>(to + lane % 4 * kOctet) = octet;
      }
    }
  }
}

// ----------------------------------------------------------------------------------------------------------------
// kernel launchers

template <typename T>
void forward(T* out, const T* x, const T* weight, int rows, int heads, int outer, cudaStream_t stream) {
  launch_early("decode_head_map::multiply", multiply<T>, dim3(outer / kOutputs, heads, ceil_div(rows, kRows)), kThreads,
               stream, out, x, weight, rows, outer);
}

}  // namespace decode_head_map
}  // namespace lightseq
