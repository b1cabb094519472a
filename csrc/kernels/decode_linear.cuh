// out = act(norm(x) weight^T + bias) + residual for few rows (lightseq_fairseq/ops/decode_linear.py has the shapes).
//
// Such a product is bound by the weights' way from memory and by the launch. So a block has all of its operands in
// shared memory at once, BM rows and BN outputs by up to 512 columns; it asks for its weights before the kernel ahead
// has ended (launch_chain.cuh), and lets the kernel behind it do the same. Wider inner sizes are shared by a cluster of
// blocks, which add their parts through one another's shared memory (sm_90). The norm is made anew by every block, on
// the rows in shared memory: that costs less than a launch.
#pragma once

#include <cooperative_groups.h>

#include "../common/launch_chain.cuh"
#include "../common/octet.cuh"
#include "../common/reduce.cuh"
#include "../common/tensor_core.cuh"
#include "bias_activation_dropout.cuh"

namespace lightseq {
namespace decode_linear {

constexpr int kMaxChunk = 512;   // columns of a block
constexpr int kMaxSplits = 8;    // blocks that share a row
constexpr int kTilePadding = 8;  // floats behind each row of a tile of results, against bank conflicts
constexpr int kChunkOctets = kMaxChunk / kOctet / kWarp;

enum class Activation { kLinear, kRelu, kReluSquared, kGelu, kGeluTanh, kSwish, kTanh };

__device__ __forceinline__ float activate(Activation activation, float x) {
  namespace functions = bias_activation_dropout;
  switch (activation) {
    case Activation::kRelu:
      return functions::Relu::value(x);
    case Activation::kReluSquared:
      return functions::ReluSquared::value(x);
    case Activation::kGelu:
      return functions::Gelu::value(x);
    case Activation::kGeluTanh:
      return functions::GeluTanh::value(x);
    case Activation::kSwish:
      return functions::Swish::value(x);
    case Activation::kTanh:
      return functions::Tanh::value(x);
    default:
      return x;
  }
}

// x (R, I), weight (O, I), bias (O,), residual, out (R, O), norm_weight, norm_bias (I,), normed (R, I); null where
// absent. A block has I / splits columns.
template <typename T>
struct Operands {
  T *out, *normed;
  const T *x, *weight, *bias, *residual, *norm_weight, *norm_bias;
  int rows, outer, inner, splits;
  float eps;
  Activation activation;
};

// BM x BN results by WM x WN warps, each of which WK share along the columns.
template <int BM_, int BN_, int WM_, int WN_, int WK_>
struct Tile {
  static constexpr int BM = BM_, BN = BN_, WM = WM_, WN = WN_, WK = WK_;
  static constexpr int kWarps = WM * WN * WK, kThreads = kWarps * kWarp;
  static constexpr int kRowTiles = BM / WM / 16, kColumnTiles = BN / WN / 16;  // of a warp, 16 wide each
  static constexpr int kStride = BN + kTilePadding;

  static __host__ __device__ constexpr int operand_bytes(int chunk) {
    const int operands = (BM + BN) * (chunk + kOctet) * 2, results = WK * BM * kStride * 4;
    return operands > results ? operands : results;
  }
  static __host__ __device__ constexpr int bytes(int chunk) {
    return operand_bytes(chunk) + (2 * chunk + BN + BM * BN) * 2 + BM * 2 * 4;
  }
};

// ----------------------------------------------------------------------------------------------------------------
// CUDA kernels

__device__ __forceinline__ void cluster_sync() {
#if __CUDA_ARCH__ >= 900
  cooperative_groups::this_cluster().sync();
#endif
}

template <typename P>
__device__ __forceinline__ P* of_rank(P* pointer, int rank) {
#if __CUDA_ARCH__ >= 900
  return cooperative_groups::this_cluster().map_shared_rank(pointer, rank);
#else
  return pointer;
#endif
}

__device__ __forceinline__ void load_octet(const float* from, float (&to)[kOctet]) {
#pragma unroll
  for (int i = 0; i < kOctet; i += 4) {
    const float4 four = *reinterpret_cast<const float4*>(from + i);
    to[i] = four.x;
    to[i + 1] = four.y;
    to[i + 2] = four.z;
    to[i + 3] = four.w;
  }
}

// Starts copying ROWS rows of `columns` elements, a warp a row; zeros for rows from `inside` on.
template <int ROWS, int WARPS, typename T>
__device__ __forceinline__ void copy_rows(T* to, int to_stride, const T* from, long from_stride, int columns,
                                          int inside) {
  for (int row = threadIdx.x / kWarp; row < ROWS; row += WARPS) {
    const bool real = row < inside;
    const T* const source = from + (real ? row : 0) * from_stride;
    for (int c = threadIdx.x % kWarp * kOctet; c < columns; c += kWarp * kOctet) {
      copy_async(to + row * to_stride + c, source + c, real);
    }
  }
}

// Mean, and sum of squared deviations from it.
struct Moments {
  float mean, squares;
};

// Normalises the rows in shared memory, of which this block has `chunk` of a.inner columns. A warp has kRowsAtOnce rows
// under way. Sums are of differences from the row's first element here, so that one pass is enough.
template <typename T, class Shape>
__device__ __forceinline__ void normalise(const Operands<T>& a, T* x, int stride, const T* weight, const T* bias,
                                          Moments* moments, int chunk, int rank, int first_row, bool first_columns) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, rows = min(Shape::BM, a.rows - first_row);
  constexpr int kRowsAtOnce = Shape::BM / Shape::kWarps < 4 ? Shape::BM / Shape::kWarps : 4;
  const auto row_of = [&](int first, int j) { return first + warp + j * Shape::kWarps; };
  const auto column_of = [&](int o) { return (lane + o * kWarp) * kOctet; };

  for (int first = 0; first < rows; first += kRowsAtOnce * Shape::kWarps) {
    float sum[kRowsAtOnce] = {}, squares[kRowsAtOnce] = {};
#pragma unroll
    for (int j = 0; j < kRowsAtOnce; ++j) {
      const T* const row = x + row_of(first, j) * stride;
      if (row_of(first, j) >= rows) continue;
      const float origin = to_float(row[0]);
#pragma unroll
      for (int o = 0; o < kChunkOctets; ++o) {
        if (column_of(o) >= chunk) continue;
        float v[kOctet], part[kOctet / 2];
        load<kOctet>(row + column_of(o), v);
#pragma unroll
        for (int i = 0; i < kOctet; ++i) v[i] -= origin;
#pragma unroll
        for (int i = 0; i < kOctet / 2; ++i) part[i] = v[2 * i] + v[2 * i + 1];
        sum[j] += (part[0] + part[1]) + (part[2] + part[3]);
#pragma unroll
        for (int i = 0; i < kOctet / 2; ++i) part[i] = v[2 * i] * v[2 * i] + v[2 * i + 1] * v[2 * i + 1];
        squares[j] += (part[0] + part[1]) + (part[2] + part[3]);
      }
    }
#pragma unroll
    for (int apart = kWarp / 2; apart > 0; apart /= 2) {
#pragma unroll
      for (int j = 0; j < kRowsAtOnce; ++j) {
        sum[j] += __shfl_xor_sync(0xffffffffu, sum[j], apart);
        squares[j] += __shfl_xor_sync(0xffffffffu, squares[j], apart);
      }
    }
#pragma unroll
    for (int j = 0; j < kRowsAtOnce; ++j) {
      const int row = row_of(first, j);
      const float apart = __fdividef(sum[j], chunk);
      if (lane == 0 && row < rows) moments[row] = {to_float(x[row * stride]) + apart, squares[j] - sum[j] * apart};
    }
  }
  if (a.splits > 1) {
    cluster_sync();
  } else {
    __syncwarp();
  }
  for (int first = 0; first < rows; first += kRowsAtOnce * Shape::kWarps) {
    float mean[kRowsAtOnce], rstd[kRowsAtOnce];
#pragma unroll
    for (int j = 0; j < kRowsAtOnce; ++j) {
      const int row = min(row_of(first, j), rows - 1);
      Moments all = moments[row];
      if (a.splits > 1) {
        Moments part[kMaxSplits];
        all = {0.f, 0.f};
#pragma unroll
        for (int r = 0; r < kMaxSplits; ++r) {
          if (r < a.splits) part[r] = of_rank(moments, r)[row];
        }
#pragma unroll
        for (int r = 0; r < kMaxSplits; ++r) {
          if (r < a.splits) all.mean += __fdividef(part[r].mean, a.splits);
        }
#pragma unroll
        for (int r = 0; r < kMaxSplits; ++r) {
          const float apart = part[r].mean - all.mean;
          if (r < a.splits) all.squares += part[r].squares + chunk * apart * apart;
        }
      }
      mean[j] = all.mean;
      rstd[j] = rsqrtf(__fdividef(all.squares, a.inner) + a.eps);
    }
#pragma unroll
    for (int o = 0; o < kChunkOctets; ++o) {
      const int c = column_of(o);
      if (c >= chunk) continue;
      float gain[kOctet], shift[kOctet];
      load<kOctet>(weight + c, gain);
      load<kOctet>(bias + c, shift);
#pragma unroll
      for (int j = 0; j < kRowsAtOnce; ++j) {
        const int row = row_of(first, j);
        if (row >= rows) continue;
        float v[kOctet];
        load<kOctet>(x + row * stride + c, v);
#pragma unroll
        for (int i = 0; i < kOctet; ++i) v[i] = (v[i] - mean[j]) * (rstd[j] * gain[i]) + shift[i];
        store<kOctet>(x + row * stride + c, v);
        if (first_columns && a.normed) {
          store<kOctet>(a.normed + static_cast<long>(first_row + row) * a.inner + rank * chunk + c, v);
        }
      }
    }
  }
  __syncthreads();
}

// Grid: (outputs / BN) * splits, rows / BM; the `splits` blocks of a cluster have the same results and other columns.
template <typename T, class Shape>
__global__ void __launch_bounds__(Shape::kThreads) forward(const Operands<T> a) {
  extern __shared__ __align__(16) unsigned char shared[];
  constexpr int BM = Shape::BM, BN = Shape::BN;
  const int chunk = a.inner / a.splits, stride = chunk + kOctet;
  const int rank = blockIdx.x % a.splits, first_output = blockIdx.x / a.splits * BN, first_row = blockIdx.y * BM;
  T* const weight = reinterpret_cast<T*>(shared);                                     // (BN, stride)
  T* const x = weight + BN * stride;                                                  // (BM, stride)
  T* const norm_weight = reinterpret_cast<T*>(shared + Shape::operand_bytes(chunk));  // (chunk,)
  T* const norm_bias = norm_weight + chunk;                                           // (chunk,)
  T* const bias = norm_bias + chunk;                                                  // (BN,)
  T* const residual = bias + BN;                                                      // (BM, BN)
  Moments* const moments = reinterpret_cast<Moments*>(residual + BM * BN);            // (BM,)

  launch_next();
  const int outputs = min(BN, a.outer - first_output), rows = min(BM, a.rows - first_row);
  copy_rows<BN, Shape::kWarps>(weight, stride, a.weight + static_cast<long>(first_output) * a.inner + rank * chunk,
                               a.inner, chunk, outputs);
  if (a.norm_weight) {
    copy_rows<1, Shape::kWarps>(norm_weight, 0, a.norm_weight + rank * chunk, 0, chunk, 1);
    copy_rows<1, Shape::kWarps>(norm_bias, 0, a.norm_bias + rank * chunk, 0, chunk, 1);
  }
  if (a.bias) copy_rows<1, Shape::kWarps>(bias, 0, a.bias + first_output, 0, outputs, 1);
  wait_for_previous();
  copy_rows<BM, Shape::kWarps>(x, stride, a.x + static_cast<long>(first_row) * a.inner + rank * chunk, a.inner, chunk,
                               rows);
  if (a.residual) {
    copy_rows<BM, Shape::kWarps>(residual, BN, a.residual + static_cast<long>(first_row) * a.outer + first_output,
                                 a.outer, outputs, rows);
  }
  commit_copies();
  await_copies<0>();
  __syncthreads();
  if (a.norm_weight) {
    normalise<T, Shape>(a, x, stride, norm_weight, norm_bias, moments, chunk, rank, first_row, first_output == 0);
  }

  constexpr int kRowTiles = Shape::kRowTiles, kColumnTiles = Shape::kColumnTiles;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int part = warp % Shape::WK, column = warp / Shape::WK % Shape::WN * kColumnTiles * 16;
  const int row = warp / (Shape::WK * Shape::WN) * kRowTiles * 16;
  float sums[kRowTiles][kColumnTiles * 2][4] = {};
#pragma unroll 4
  for (int k = part * 16; k < chunk; k += Shape::WK * 16) {
    uint32_t left[kRowTiles][4], right[4];
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) load_left(left[m], x + (row + m * 16) * stride + k, stride);
#pragma unroll
    for (int n = 0; n < kColumnTiles; ++n) {
      load_right(right, weight + (column + n * 16) * stride + k, stride);
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
        multiply_add<T>(sums[m][2 * n], left[m], right[0], right[1]);
        multiply_add<T>(sums[m][2 * n + 1], left[m], right[2], right[3]);
      }
    }
  }
  __syncthreads();

  float* const results = reinterpret_cast<float*>(shared);  // (WK, BM, kStride), where the operands were
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
    for (int n = 0; n < kColumnTiles * 2; ++n) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int r = row + m * 16 + half * 8 + lane / 4, c = column + n * 8 + lane % 4 * 2;
        float2* const to = reinterpret_cast<float2*>(results + (part * BM + r) * Shape::kStride + c);
        *to = make_float2(sums[m][n][2 * half], sums[m][n][2 * half + 1]);
      }
    }
  }
  __syncthreads();

  constexpr int kRowOctets = BN / kOctet, kOctets = BM * kRowOctets;
  const auto result = [&](int i) { return results + i / kRowOctets * Shape::kStride + i % kRowOctets * kOctet; };
  const auto finish = [&](int i, float (&y)[kOctet]) {
    const int r = i / kRowOctets, c = i % kRowOctets * kOctet;
    if (r >= rows || c >= outputs) return;
    float more[kOctet];
    if (a.bias) {
      load<kOctet>(bias + c, more);
#pragma unroll
      for (int e = 0; e < kOctet; ++e) y[e] += more[e];
    }
#pragma unroll
    for (int e = 0; e < kOctet; ++e) y[e] = activate(a.activation, y[e]);
    if (a.residual) {
      load<kOctet>(residual + r * BN + c, more);
#pragma unroll
      for (int e = 0; e < kOctet; ++e) y[e] += more[e];
    }
    store<kOctet>(a.out + static_cast<long>(first_row + r) * a.outer + first_output + c, y);
  };
  for (int i = threadIdx.x; i < kOctets; i += Shape::kThreads) {
    float y[kOctet], add[Shape::WK][kOctet];
#pragma unroll
    for (int p = 0; p < Shape::WK; ++p) load_octet(result(i) + p * BM * Shape::kStride, add[p]);
#pragma unroll
    for (int e = 0; e < kOctet; ++e) {
      y[e] = add[0][e];
#pragma unroll
      for (int p = 1; p < Shape::WK; ++p) y[e] += add[p][e];
    }
    if (a.splits == 1) {
      finish(i, y);
    } else {
      store<kOctet>(result(i), y);
    }
  }
  if (a.splits == 1) return;
  cluster_sync();
  const int share = kOctets / a.splits;  // which this block finishes
  for (int i = rank * share + threadIdx.x; i < (rank + 1) * share; i += Shape::kThreads) {
    float y[kOctet] = {}, add[kMaxSplits][kOctet];
#pragma unroll
    for (int other = 0; other < kMaxSplits; ++other) {
      if (other < a.splits) load_octet(of_rank(result(i), other), add[other]);
    }
#pragma unroll
    for (int other = 0; other < kMaxSplits; ++other) {
#pragma unroll
      for (int e = 0; e < kOctet; ++e) y[e] += other < a.splits ? add[other][e] : 0.f;
    }
    finish(i, y);
  }
  cluster_sync();  // until all have read it, this block's shared memory must stay
}

// ----------------------------------------------------------------------------------------------------------------
// kernel launchers

template <typename T, class Shape>
void launch(const Operands<T>& a, cudaStream_t stream) {
  const dim3 grid(ceil_div(a.outer, Shape::BN) * a.splits, ceil_div(a.rows, Shape::BM));
  launch_early_in_clusters("decode_linear::forward", forward<T, Shape>, grid, Shape::kThreads,
                           Shape::bytes(a.inner / a.splits), a.splits, stream, a);
}

// Tiles grow with the rows.
template <typename T>
void forward(const Operands<T>& a, cudaStream_t stream) {
  if (a.rows <= 16) return launch<T, Tile<16, 16, 1, 1, 4>>(a, stream);
  if (a.rows <= 32) return launch<T, Tile<32, 16, 2, 1, 4>>(a, stream);
  launch<T, Tile<64, 32, 2, 2, 2>>(a, stream);
}

}  // namespace decode_linear
}  // namespace lightseq
