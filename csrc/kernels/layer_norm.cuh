// Layer norm over the rows of an (N, C) array, alone or joined to what stands before it (lightseq_fairseq/ops/
// layer_norm.py and bias_dropout_residual_layer_norm.py have the formulas).
//
// Forward: a warp has a row in registers, hence one read, and mean and variance in two exact passes. Backward: 1 to 16
// warps have a row, 16 elements a thread, and go from row to row with their columns' sums of dweight and dbias in
// registers; a block adds its own up in shared memory, column_sum::finish those of all blocks. Wider rows than these
// hold, odd ones and misaligned ones take a path with a block a row.
// Bytes for N rows of C 16-bit elements: 4NC forward (x, y), 6NC backward (dy, x, dx), and what a Step adds.
#pragma once

#include "../common/philox.cuh"
#include "../common/reduce.cuh"
#include "column_sum.cuh"

namespace lightseq {
namespace layer_norm {

constexpr int kForwardWarps = 4, kForwardOctets = 8;     // rows a block; octets a thread at most: C up to 2048
constexpr int kBackwardWarps = 16, kBackwardOctets = 2;  // warps a block at most; octets a thread: C up to 8192
constexpr int kTile = kBackwardWarps * kWarp * kBackwardOctets * kOctet;  // columns of all threads of a block: 8192
constexpr int kRowThreads = 256;                                          // where a block has a row

// A Step says what is normalised and where its gradient goes. This one: x as it is, and dx. What it reads comes apart
// from what it does with it, so that all of a row is requested before any is needed.
template <typename T>
struct Plain {
  static constexpr int kSums = 2;  // dweight, dbias
  template <int VEC>
  using Input = Packed<T, VEC>;
  template <int VEC>
  struct GradientInput {};
  struct Thread {};

  const T* x;
  T* dx;

  __device__ __forceinline__ Thread begin() const { return {}; }

  template <int VEC>
  __device__ __forceinline__ Input<VEC> read(long offset) const {
    return *reinterpret_cast<const Input<VEC>*>(x + offset);
  }

  template <int VEC>
  __device__ __forceinline__ void value(const Input<VEC>& input, const Thread&, long, int, float (&to)[VEC]) const {
    input.widen(to);
  }

  // The array of values; those of a thread's own elements stand there once it has called value().
  __device__ __forceinline__ const T* values() const { return x; }

  template <int VEC>
  __device__ __forceinline__ GradientInput<VEC> read_gradient(long) const {
    return {};
  }

  // dvalue: the gradient that came through the norm. `sum`: the thread's column sums past the norm's two, if any.
  template <int VEC>
  __device__ __forceinline__ void gradient(const GradientInput<VEC>&, const Thread&, long offset, float (&dvalue)[VEC],
                                           float (&)[VEC]) const {
    store<VEC>(dx + offset, dvalue);
  }

  // What the third sum over rows is over, where the sums take a pass of their own.
  const T* summed() const { return nullptr; }
};

// ----------------------------------------------------------------------------------------------------------------
// CUDA kernels

// A warp a row, kForwardWarps rows a block; C <= 256 * OCTETS. y (N, C); mean, rstd (N,); weight, bias (C,)
template <typename T, int OCTETS, class Step>
__global__ void __launch_bounds__(kForwardWarps* kWarp)
    forward_warp(T* y, float* mean, float* rstd, const Step step, const Parameter weight, const Parameter bias,
                 const long rows, const int columns, const float eps) {
  const long row = static_cast<long>(blockIdx.x) * kForwardWarps + threadIdx.x / kWarp;
  if (row >= rows) return;
  const int first = threadIdx.x % kWarp * kOctet;
  constexpr int kStride = kWarp * kOctet;
  const long base = row * columns;

  const typename Step::Thread thread = step.begin();
  typename Step::template Input<kOctet> input[OCTETS];
#pragma unroll
  for (int o = 0; o < OCTETS; ++o) {
    const int column = first + o * kStride;
    if (column < columns) input[o] = step.template read<kOctet>(base + column);
  }
  float x[OCTETS][kOctet], sum = 0.f, squares = 0.f;
#pragma unroll
  for (int o = 0; o < OCTETS; ++o) {
    const int column = first + o * kStride;
    if (column >= columns) continue;
    step.template value<kOctet>(input[o], thread, base + column, column, x[o]);
#pragma unroll
    for (int i = 0; i < kOctet; ++i) sum += x[o][i];
  }
  const float row_mean = warp_reduce(sum, Sum{}) / columns;
#pragma unroll
  for (int o = 0; o < OCTETS; ++o) {
    if (first + o * kStride >= columns) continue;
#pragma unroll
    for (int i = 0; i < kOctet; ++i) squares += (x[o][i] - row_mean) * (x[o][i] - row_mean);
  }
  const float row_rstd = rsqrtf(warp_reduce(squares, Sum{}) / columns + eps);
#pragma unroll
  for (int o = 0; o < OCTETS; ++o) {
    const int column = first + o * kStride;
    if (column >= columns) continue;
    float gain[kOctet], shift[kOctet];
    weight.load<T, kOctet>(column, gain);
    bias.load<T, kOctet>(column, shift);
#pragma unroll
    for (int i = 0; i < kOctet; ++i) x[o][i] = (x[o][i] - row_mean) * row_rstd * gain[i] + shift[i];
    store<kOctet>(y + base + column, x[o]);
  }
  if (threadIdx.x % kWarp == 0) {
    mean[row] = row_mean;
    rstd[row] = row_rstd;
  }
}

// The same with a block a row, for any C: what a thread needs of the row again it reads again, from cache.
template <typename T, int VEC, class Step>
__global__ void __launch_bounds__(kRowThreads)
    forward_block(T* y, float* mean, float* rstd, const Step step, const Parameter weight, const Parameter bias,
                  const int columns, const float eps) {
  const long row = blockIdx.x, base = row * columns;
  const int first = threadIdx.x * VEC;
  constexpr int kStride = kRowThreads * VEC;

  const typename Step::Thread thread = step.begin();
  float x[VEC], sum = 0.f, squares = 0.f;
  for (int column = first; column < columns; column += kStride) {
    step.template value<VEC>(step.template read<VEC>(base + column), thread, base + column, column, x);
#pragma unroll
    for (int i = 0; i < VEC; ++i) sum += x[i];
  }
  const T* values = step.values() + base;
  const float row_mean = block_reduce(sum, Sum{}) / columns;
  for (int column = first; column < columns; column += kStride) {
    load<VEC>(values + column, x);
#pragma unroll
    for (int i = 0; i < VEC; ++i) squares += (x[i] - row_mean) * (x[i] - row_mean);
  }
  const float row_rstd = rsqrtf(block_reduce(squares, Sum{}) / columns + eps);
  for (int column = first; column < columns; column += kStride) {
    float gain[VEC], shift[VEC];
    load<VEC>(values + column, x);
    weight.load<T, VEC>(column, gain);
    bias.load<T, VEC>(column, shift);
#pragma unroll
    for (int i = 0; i < VEC; ++i) x[i] = (x[i] - row_mean) * row_rstd * gain[i] + shift[i];
    store<VEC>(y + base + column, x);
  }
  if (threadIdx.x == 0) {
    mean[row] = row_mean;
    rstd[row] = row_rstd;
  }
}

// Two sums over the ROW_WARPS warps of a row. `exchange` [2][kBackwardWarps] alternates from row to row, so that one
// barrier a row is enough; the barriers are one for each group of warps.
template <int ROW_WARPS>
__device__ __forceinline__ float2 row_sum(float2 x, float2* exchange, bool odd) {
  x = {warp_reduce(x.x, Sum{}), warp_reduce(x.y, Sum{})};
  if constexpr (ROW_WARPS > 1) {
    const int warp = threadIdx.x / kWarp, group = warp / ROW_WARPS;
    float2* mine = exchange + (odd ? kBackwardWarps : 0);
    if (threadIdx.x % kWarp == 0) mine[warp] = x;
    asm volatile("bar.sync %0, %1;" ::"r"(group + 1), "r"(ROW_WARPS * kWarp) : "memory");
    x = {0.f, 0.f};
#pragma unroll
    for (int i = 0; i < ROW_WARPS; ++i) {
      x.x += mine[group * ROW_WARPS + i].x;
      x.y += mine[group * ROW_WARPS + i].y;
    }
  }
  return x;
}

// ROW_WARPS warps a row, C <= 512 * ROW_WARPS, as many rows at a time as the block has such groups. dy, x (N, C);
// partial (gridDim.x, Step::kSums, C). With g = dy * weight and xhat = (x - mean) * rstd:
// dx = rstd * (g - mean over the row of g - xhat * mean over the row of g * xhat).
template <typename T, int ROW_WARPS, class Step>
__global__ void __launch_bounds__(kBackwardWarps* kWarp, 1)
    backward_warps(float* partial, const Step step, const T* dy, const T* x, const float* mean, const float* rstd,
                   const Parameter weight, const long rows, const int columns) {
  constexpr int K = Step::kSums, kStride = ROW_WARPS * kWarp * kOctet, kWidth = kStride * kBackwardOctets;
  __shared__ float tile[kTile];
  __shared__ float2 exchange[2 * kBackwardWarps];
  const int group = threadIdx.x / (ROW_WARPS * kWarp), groups = blockDim.x / (ROW_WARPS * kWarp);
  const int first = threadIdx.x % (ROW_WARPS * kWarp) * kOctet;

  const typename Step::Thread thread = step.begin();
  float gain[kBackwardOctets][kOctet], sums[K][kBackwardOctets][kOctet] = {};
#pragma unroll
  for (int o = 0; o < kBackwardOctets; ++o) {
    if (first + o * kStride < columns) weight.load<T, kOctet>(first + o * kStride, gain[o]);
  }
  bool odd = false;
  for (long row = static_cast<long>(blockIdx.x) * groups + group; row < rows;
       row += static_cast<long>(gridDim.x) * groups, odd = !odd) {
    const long base = row * columns;
    Packed<T, kOctet> dy_in[kBackwardOctets], x_in[kBackwardOctets];
    typename Step::template GradientInput<kOctet> step_in[kBackwardOctets];
#pragma unroll
    for (int o = 0; o < kBackwardOctets; ++o) {
      const int column = first + o * kStride;
      if (column >= columns) continue;
      dy_in[o] = *reinterpret_cast<const Packed<T, kOctet>*>(dy + base + column);
      x_in[o] = *reinterpret_cast<const Packed<T, kOctet>*>(x + base + column);
      step_in[o] = step.template read_gradient<kOctet>(base + column);
    }
    const float row_mean = mean[row], row_rstd = rstd[row];
    float2 means = {0.f, 0.f};
#pragma unroll
    for (int o = 0; o < kBackwardOctets; ++o) {
      if (first + o * kStride >= columns) continue;
      float dy_lane[kOctet], x_lane[kOctet];
      dy_in[o].widen(dy_lane);
      x_in[o].widen(x_lane);
#pragma unroll
      for (int i = 0; i < kOctet; ++i) {
        const float xhat = (x_lane[i] - row_mean) * row_rstd, g = dy_lane[i] * gain[o][i];
        means.x += g;
        means.y += g * xhat;
        sums[0][o][i] += dy_lane[i] * xhat;
        sums[1][o][i] += dy_lane[i];
      }
    }
    means = row_sum<ROW_WARPS>(means, exchange, odd);
    means = {means.x / columns, means.y / columns};
#pragma unroll
    for (int o = 0; o < kBackwardOctets; ++o) {
      const int column = first + o * kStride;
      if (column >= columns) continue;
      float dy_lane[kOctet], x_lane[kOctet];
      dy_in[o].widen(dy_lane);
      x_in[o].widen(x_lane);
#pragma unroll
      for (int i = 0; i < kOctet; ++i) {
        const float xhat = (x_lane[i] - row_mean) * row_rstd;
        dy_lane[i] = row_rstd * (dy_lane[i] * gain[o][i] - means.x - xhat * means.y);
      }
      step.template gradient<kOctet>(step_in[o], thread, base + column, dy_lane, sums[K - 1][o]);
    }
  }

#pragma unroll
  for (int k = 0; k < K; ++k) {  // the groups' sums, one after the other through the tile: [groups][kWidth]
    __syncthreads();
#pragma unroll
    for (int o = 0; o < kBackwardOctets; ++o) store<kOctet>(tile + group * kWidth + first + o * kStride, sums[k][o]);
    __syncthreads();
    for (int column = threadIdx.x; column < columns; column += blockDim.x) {
      float sum = 0.f;
      for (int other = 0; other < groups; ++other) sum += tile[other * kWidth + column];
      partial[(static_cast<long>(blockIdx.x) * K + k) * columns + column] = sum;
    }
  }
}

// dx alone, a block a row, for any C.
template <typename T, int VEC, class Step>
__global__ void __launch_bounds__(kRowThreads)
    backward_block(const Step step, const T* dy, const T* x, const float* mean, const float* rstd,
                   const Parameter weight, const int columns) {
  const long row = blockIdx.x, base = row * columns;
  const float row_mean = mean[row], row_rstd = rstd[row];
  const typename Step::Thread thread = step.begin();
  float2 means = {0.f, 0.f};
  float dy_lane[VEC], x_lane[VEC], gain[VEC], unused[VEC];
  for (int column = threadIdx.x * VEC; column < columns; column += kRowThreads * VEC) {
    load<VEC>(dy + base + column, dy_lane);
    load<VEC>(x + base + column, x_lane);
    weight.load<T, VEC>(column, gain);
#pragma unroll
    for (int i = 0; i < VEC; ++i) {
      means.x += dy_lane[i] * gain[i];
      means.y += dy_lane[i] * gain[i] * (x_lane[i] - row_mean) * row_rstd;
    }
  }
  means.x = block_reduce(means.x, Sum{}) / columns;
  means.y = block_reduce(means.y, Sum{}) / columns;
  for (int column = threadIdx.x * VEC; column < columns; column += kRowThreads * VEC) {
    load<VEC>(dy + base + column, dy_lane);
    load<VEC>(x + base + column, x_lane);
    weight.load<T, VEC>(column, gain);
    const auto step_in = step.template read_gradient<VEC>(base + column);
#pragma unroll
    for (int i = 0; i < VEC; ++i) {
      const float xhat = (x_lane[i] - row_mean) * row_rstd;
      dy_lane[i] = row_rstd * (dy_lane[i] * gain[i] - means.x - xhat * means.y);
    }
    step.template gradient<VEC>(step_in, thread, base + column, dy_lane, unused);
  }
}

// Its other half, a pass of column_sum::walk: the sums over rows of dy * xhat, dy and, for three, of `summed`.
template <typename T, int VEC, int K>
struct Sums {
  static constexpr int kSums = K;
  struct Column {};
  struct Input {
    Packed<T, VEC> dy, x, summed;
    float mean, rstd;
  };

  const T* dy;
  const T* x;
  const T* summed;
  const float* mean;
  const float* rstd;

  __device__ __forceinline__ Column prepare(int) const { return {}; }

  __device__ __forceinline__ Input read(long row, long offset) const {
    Input input;
    input.dy = *reinterpret_cast<const Packed<T, VEC>*>(dy + offset);
    input.x = *reinterpret_cast<const Packed<T, VEC>*>(x + offset);
    if constexpr (K == 3) input.summed = *reinterpret_cast<const Packed<T, VEC>*>(summed + offset);
    input.mean = mean[row];
    input.rstd = rstd[row];
    return input;
  }

  __device__ __forceinline__ void write(const Input& input, const Column&, long, float (&sums)[K][VEC]) const {
    float dy_lane[VEC], x_lane[VEC];
    input.dy.widen(dy_lane);
    input.x.widen(x_lane);
#pragma unroll
    for (int i = 0; i < VEC; ++i) {
      sums[0][i] += dy_lane[i] * (x_lane[i] - input.mean) * input.rstd;
      sums[1][i] += dy_lane[i];
    }
    if constexpr (K == 3) {
      float lane[VEC];
      input.summed.widen(lane);
#pragma unroll
      for (int i = 0; i < VEC; ++i) sums[2][i] += lane[i];
    }
  }
};

// ----------------------------------------------------------------------------------------------------------------
// kernel launchers

template <typename T, class Step>
void forward(T* y, float* mean, float* rstd, const Step& step, bool octets, Parameter weight, Parameter bias, long rows,
             int columns, float eps, cudaStream_t stream) {
  if (rows == 0) return;
  octets = octets && in_octets(columns, {y, weight.values, bias.values});
  const auto warps = [&](auto kernel) {
    kernel<<<ceil_div(rows, kForwardWarps), kForwardWarps * kWarp, 0, stream>>>(y, mean, rstd, step, weight, bias, rows,
                                                                                columns, eps);
  };
  const auto block = [&](auto kernel) {
    kernel<<<rows, kRowThreads, 0, stream>>>(y, mean, rstd, step, weight, bias, columns, eps);
  };
  if (!octets) {
    block(forward_block<T, 1, Step>);
  } else if (columns <= 2 * kWarp * kOctet) {
    warps(forward_warp<T, 2, Step>);
  } else if (columns <= 4 * kWarp * kOctet) {
    warps(forward_warp<T, 4, Step>);
  } else if (columns <= kForwardOctets * kWarp * kOctet) {
    warps(forward_warp<T, kForwardOctets, Step>);
  } else {
    block(forward_block<T, kOctet, Step>);
  }
  LIGHTSEQ_CHECK_LAUNCH("layer_norm::forward");
}

// Warps that a row of the fast backward path takes: the least power of two that holds it.
inline int row_warps(int columns) {
  int warps = 1;
  while (warps * kWarp * kBackwardOctets * kOctet < columns) warps *= 2;
  return warps;
}

// Rows of `partial` that backward fills.
inline int chunks(long rows, int columns) {
  if (columns % kOctet != 0 || columns > kTile) return column_sum::chunks(rows, columns);
  const int most = kBackwardWarps / row_warps(columns), blocks = column_sum::multiprocessors();
  return std::min(blocks, ceil_div(rows, std::clamp(ceil_div(rows, blocks), 1, most)));
}

// partial (chunks, Step::kSums, C) fp32: the parts of dweight, dbias and what the step adds up
template <typename T, class Step>
void backward(float* partial, const Step& step, bool octets, const T* dy, const T* x, const float* mean,
              const float* rstd, Parameter weight, int chunks, long rows, int columns, cudaStream_t stream) {
  if (rows == 0) return;
  octets = octets && in_octets(columns, {dy, x, weight.values});
  const auto warps = [&](auto kernel, int row_warps) {
    const int groups = std::clamp(ceil_div(rows, chunks), 1, kBackwardWarps / row_warps);
    kernel<<<chunks, groups * row_warps * kWarp, 0, stream>>>(partial, step, dy, x, mean, rstd, weight, rows, columns);
  };
  if (octets && columns <= kTile) {
    switch (row_warps(columns)) {
      case 1:
        warps(backward_warps<T, 1, Step>, 1);
        break;
      case 2:
        warps(backward_warps<T, 2, Step>, 2);
        break;
      case 4:
        warps(backward_warps<T, 4, Step>, 4);
        break;
      case 8:
        warps(backward_warps<T, 8, Step>, 8);
        break;
      default:
        warps(backward_warps<T, 16, Step>, 16);
    }
    LIGHTSEQ_CHECK_LAUNCH("layer_norm::backward");
    return;
  }
  if (octets) {
    backward_block<T, kOctet, Step><<<rows, kRowThreads, 0, stream>>>(step, dy, x, mean, rstd, weight, columns);
  } else {
    backward_block<T, 1, Step><<<rows, kRowThreads, 0, stream>>>(step, dy, x, mean, rstd, weight, columns);
  }
  LIGHTSEQ_CHECK_LAUNCH("layer_norm::backward_block");
  column_sum::run(
      "layer_norm::Sums", octets,
      [&](auto vec) { return Sums<T, decltype(vec)::value, Step::kSums>{dy, x, step.summed(), mean, rstd}; }, partial,
      chunks, rows, columns, stream);
}

}  // namespace layer_norm
}  // namespace lightseq
