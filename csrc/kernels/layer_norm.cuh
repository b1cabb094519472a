// Layer norm over the rows of an (N, C) array, alone or joined to what stands before it (lightseq_fairseq/ops/
// layer_norm.py and bias_dropout_residual_layer_norm.py have the formulas).
//
// 1 to 16 warps have a row in registers, hence one read. Forward: mean and variance in two exact passes. Backward: they
// go from row to row with their columns' sums of dweight and dbias in registers; a block adds its own up in shared
// memory, column_sum::finish those of all blocks. Wider rows than these hold, odd ones and misaligned ones take a path
// with a block a row.
//
// Bytes for N rows of C 16-bit elements: 4NC forward (x, y), 6NC backward (dy, x, dx), and what a Step adds.
#pragma once

#include "../common/launch_chain.cuh"
#include "../common/philox.cuh"
#include "../common/reduce.cuh"
#include "column_sum.cuh"

namespace lightseq {
namespace layer_norm {

constexpr int kRowWarps = 16;        // that have a row, at most
constexpr int kForwardWarps = 4;     // of a block, or those of one row
constexpr int kForwardWidth = 8192;  // the widest row of the fast path
constexpr long kFewRows = 512;       // that take more warps each in 16 bits; fp32 shall not depend on the batch
constexpr int kBackwardWarps = 24;   // of a block at most
constexpr int kBackwardOctets = 1;   // of a row that a thread has
constexpr int kBackwardWidth = kRowWarps * kWarp * kBackwardOctets * kOctet;
constexpr int kBlockWarps = std::max(kRowWarps, kBackwardWarps);
constexpr int kBlockThreads = 256;  // of a block that has a row of any width

constexpr int forward_threads(int row_warps) { return std::max(kForwardWarps, row_warps) * kWarp; }

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
  __device__ __forceinline__ Input<VEC> read(long offset, int) const {
    return request<VEC>(x + offset);
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

// The octets of a row that a thread has, ROW_WARPS warps to a row.
template <int ROW_WARPS, int OCTETS>
struct Columns {
  int column[OCTETS];
  bool real[OCTETS];

  __device__ __forceinline__ explicit Columns(int columns) {
#pragma unroll
    for (int o = 0; o < OCTETS; ++o) {
      const int at = (threadIdx.x % (ROW_WARPS * kWarp) + o * ROW_WARPS * kWarp) * kOctet;
      real[o] = at < columns;
      column[o] = real[o] ? at : 0;
    }
  }
};

// N sums over the ROW_WARPS warps of a row through `exchange` [N][kBlockWarps], which a block may use again only after
// another exchange: the one barrier, of the row's warps alone, stands in the middle.
template <int ROW_WARPS, int N>
__device__ __forceinline__ void row_sum(float (&x)[N], float* exchange) {
#pragma unroll
  for (int n = 0; n < N; ++n) x[n] = warp_reduce(x[n], Sum{});
  if constexpr (ROW_WARPS > 1) {
    const int warp = threadIdx.x / kWarp, group = warp / ROW_WARPS;
#pragma unroll
    for (int n = 0; n < N; ++n) {
      if (threadIdx.x % kWarp == 0) exchange[n * kBlockWarps + warp] = x[n];
    }
    asm volatile("bar.sync %0, %1;" ::"r"(group + 1), "r"(ROW_WARPS * kWarp) : "memory");
#pragma unroll
    for (int n = 0; n < N; ++n) {
      x[n] = 0.f;
#pragma unroll
      for (int i = 0; i < ROW_WARPS; ++i) x[n] += exchange[n * kBlockWarps + group * ROW_WARPS + i];
    }
  }
}

// ROW_WARPS warps a row, C <= 256 * OCTETS * ROW_WARPS, one row for each such group of a block. y (N, C); mean, rstd
// (N,); weight, bias (C,). A thread past the end of the row repeats the row's first octet: that changes nothing but the
// sums it is kept out of.
template <typename T, int ROW_WARPS, int OCTETS, class Step>
__global__ void __launch_bounds__(forward_threads(ROW_WARPS))
    forward_warps(T* y, float* mean, float* rstd, const Step step, const Parameter weight, const Parameter bias,
                  const long rows, const int columns, const float eps) {
  __shared__ float exchange[2][kBlockWarps];
  constexpr int kRowThreads = ROW_WARPS * kWarp;
  const long row = static_cast<long>(blockIdx.x) * (blockDim.x / kRowThreads) + threadIdx.x / kRowThreads;
  if (row >= rows) return;
  const long base = row * columns;
  const float inverse = __fdividef(1.f, columns);
  const Columns<ROW_WARPS, OCTETS> at(columns);

  wait_for_previous();
  launch_next();  // what follows may fetch its weights meanwhile
  const typename Step::Thread thread = step.begin();
  typename Step::template Input<kOctet> input[OCTETS];
  Packed<T, kOctet> weight_in[OCTETS], bias_in[OCTETS];
#pragma unroll
  for (int o = 0; o < OCTETS; ++o) input[o] = step.template read<kOctet>(base + at.column[o], at.column[o]);
  constexpr bool kEarly = OCTETS <= 2;  // where registers allow it
#pragma unroll
  for (int o = 0; o < OCTETS && kEarly; ++o) {
    weight_in[o] = weight.request<T, kOctet>(at.column[o]);
    bias_in[o] = bias.request<T, kOctet>(at.column[o]);
  }
  float x[OCTETS][kOctet], sum[1] = {}, squares[1] = {};
#pragma unroll
  for (int o = 0; o < OCTETS; ++o) {
    step.template value<kOctet>(input[o], thread, base + at.column[o], at.column[o], x[o]);
    float octet = 0.f;
#pragma unroll
    for (int i = 0; i < kOctet; ++i) octet += x[o][i];
    sum[0] += at.real[o] ? octet : 0.f;
  }
  row_sum<ROW_WARPS>(sum, exchange[0]);
  const float row_mean = sum[0] * inverse;
#pragma unroll
  for (int o = 0; o < OCTETS; ++o) {
    float octet = 0.f;
#pragma unroll
    for (int i = 0; i < kOctet; ++i) {
      x[o][i] -= row_mean;
      octet += x[o][i] * x[o][i];
    }
    squares[0] += at.real[o] ? octet : 0.f;
  }
  row_sum<ROW_WARPS>(squares, exchange[1]);
  const float row_rstd = rsqrtf(squares[0] * inverse + eps);
#pragma unroll
  for (int o = 0; o < OCTETS; ++o) {
    float gain[kOctet], shift[kOctet];
    if constexpr (!kEarly) {
      weight_in[o] = weight.request<T, kOctet>(at.column[o]);
      bias_in[o] = bias.request<T, kOctet>(at.column[o]);
    }
    weight.value<T, kOctet>(weight_in[o], at.column[o], gain);
    bias.value<T, kOctet>(bias_in[o], at.column[o], shift);
#pragma unroll
    for (int i = 0; i < kOctet; ++i) x[o][i] = x[o][i] * (row_rstd * gain[i]) + shift[i];
    store<kOctet>(y + base + at.column[o], x[o]);
  }
  if (threadIdx.x % kRowThreads == 0) {
    mean[row] = row_mean;
    rstd[row] = row_rstd;
  }
}

// The same with a block a row, for any C: what a thread needs of the row again it reads again, from cache.
template <typename T, int VEC, class Step>
__global__ void __launch_bounds__(kBlockThreads)
    forward_block(T* y, float* mean, float* rstd, const Step step, const Parameter weight, const Parameter bias,
                  const int columns, const float eps) {
  const long row = blockIdx.x, base = row * columns;
  const int first = threadIdx.x * VEC;
  constexpr int kStride = kBlockThreads * VEC;

  wait_for_previous();
  const typename Step::Thread thread = step.begin();
  float x[VEC], sum = 0.f, squares = 0.f;
  for (int column = first; column < columns; column += kStride) {
    step.template value<VEC>(step.template read<VEC>(base + column, column), thread, base + column, column, x);
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

// ROW_WARPS warps a row, C <= 256 * kBackwardOctets * ROW_WARPS, as many rows at a time as the block has such groups.
// dy, x (N, C); partial (gridDim.x, Step::kSums, C). With g = dy * weight and xhat = (x - mean) * rstd: dx = rstd * (g
// - mean over the row of g - xhat * mean over the row of g * xhat). A thread past the end of the row does as in
// forward_warp.
template <typename T, int ROW_WARPS, class Step>
__global__ void __launch_bounds__(kBackwardWarps* kWarp, 1)
    backward_warps(float* partial, const Step step, const T* dy, const T* x, const float* mean, const float* rstd,
                   const Parameter weight, const long rows, const int columns) {
  constexpr int kOctets = kBackwardOctets, K = Step::kSums, kRowThreads = ROW_WARPS * kWarp,
                kWidth = kRowThreads * kOctets * kOctet;
  __shared__ float tile[kBackwardWarps * kWarp * kOctets * kOctet];
  __shared__ float exchange[2][2 * kBlockWarps];
  const int group = threadIdx.x / kRowThreads, groups = blockDim.x / kRowThreads;
  const Columns<ROW_WARPS, kOctets> at(columns);
  const float inverse = __fdividef(1.f, columns);

  wait_for_previous();
  const typename Step::Thread thread = step.begin();
  float gain[kOctets][kOctet], sums[K][kOctets][kOctet] = {};
#pragma unroll
  for (int o = 0; o < kOctets; ++o) weight.load<T, kOctet>(at.column[o], gain[o]);
  bool odd = false;
  for (long row = static_cast<long>(blockIdx.x) * groups + group; row < rows;
       row += static_cast<long>(gridDim.x) * groups, odd = !odd) {
    const long base = row * columns;
    Packed<T, kOctet> dy_in[kOctets], x_in[kOctets];
    typename Step::template GradientInput<kOctet> step_in[kOctets];
#pragma unroll
    for (int o = 0; o < kOctets; ++o) {
      dy_in[o] = request<kOctet>(dy + base + at.column[o]);
      x_in[o] = request<kOctet>(x + base + at.column[o]);
      step_in[o] = step.template read_gradient<kOctet>(base + at.column[o]);
    }
    const float row_rstd = rstd[row], offset = -mean[row] * row_rstd;
    float means[2] = {};
#pragma unroll
    for (int o = 0; o < kOctets; ++o) {
      float dy_lane[kOctet], x_lane[kOctet];
      float octet[2] = {};
      dy_in[o].widen(dy_lane);
      x_in[o].widen(x_lane);
#pragma unroll
      for (int i = 0; i < kOctet; ++i) {
        const float xhat = x_lane[i] * row_rstd + offset, g = dy_lane[i] * gain[o][i];
        octet[0] += g;
        octet[1] += g * xhat;
        sums[0][o][i] += dy_lane[i] * xhat;
        sums[1][o][i] += dy_lane[i];
      }
      means[0] += at.real[o] ? octet[0] : 0.f;
      means[1] += at.real[o] ? octet[1] : 0.f;
    }
    row_sum<ROW_WARPS>(means, exchange[odd]);
    const float g_mean = means[0] * inverse * row_rstd, g_xhat_mean = means[1] * inverse * row_rstd;
#pragma unroll
    for (int o = 0; o < kOctets; ++o) {
      float dy_lane[kOctet], x_lane[kOctet];
      dy_in[o].widen(dy_lane);
      x_in[o].widen(x_lane);
#pragma unroll
      for (int i = 0; i < kOctet; ++i) {
        const float xhat = x_lane[i] * row_rstd + offset;
        dy_lane[i] = dy_lane[i] * gain[o][i] * row_rstd - g_mean - xhat * g_xhat_mean;
      }
      step.template gradient<kOctet>(step_in[o], thread, base + at.column[o], dy_lane, sums[K - 1][o]);
    }
  }

#pragma unroll
  for (int k = 0; k < K; ++k) {  // the groups' sums, one after the other through the tile: [groups][kWidth]
    __syncthreads();
#pragma unroll
    for (int o = 0; o < kOctets; ++o) {
      store<kOctet>(tile + group * kWidth + (threadIdx.x % kRowThreads + o * kRowThreads) * kOctet, sums[k][o]);
    }
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
__global__ void __launch_bounds__(kBlockThreads)
    backward_block(const Step step, const T* dy, const T* x, const float* mean, const float* rstd,
                   const Parameter weight, const int columns) {
  wait_for_previous();
  const long row = blockIdx.x, base = row * columns;
  const float row_mean = mean[row], row_rstd = rstd[row];
  const typename Step::Thread thread = step.begin();
  float2 means = {0.f, 0.f};
  float dy_lane[VEC], x_lane[VEC], gain[VEC], unused[VEC];
  for (int column = threadIdx.x * VEC; column < columns; column += kBlockThreads * VEC) {
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
  for (int column = threadIdx.x * VEC; column < columns; column += kBlockThreads * VEC) {
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
    input.dy = request<VEC>(dy + offset);
    input.x = request<VEC>(x + offset);
    if constexpr (K == 3) input.summed = request<VEC>(summed + offset);
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

// Warps that a row takes at `octets` octets a thread: the least power of two that holds it.
inline int row_warps(int columns, int octets) {
  int warps = 1;
  while (warps * kWarp * octets * kOctet < columns) warps *= 2;
  return warps;
}

// Calls f(std::integral_constant<int, row_warps>{}).
template <class F>
void dispatch_row_warps(int row_warps, F&& f) {
  switch (row_warps) {
    case 1:
      return f(std::integral_constant<int, 1>{});
    case 2:
      return f(std::integral_constant<int, 2>{});
    case 4:
      return f(std::integral_constant<int, 4>{});
    case 8:
      return f(std::integral_constant<int, 8>{});
    default:
      return f(std::integral_constant<int, kRowWarps>{});
  }
}

template <typename T, class Step>
void forward(T* y, float* mean, float* rstd, const Step& step, bool octets, Parameter weight, Parameter bias, long rows,
             int columns, float eps, cudaStream_t stream) {
  if (rows == 0) return;
  octets = octets && in_octets(columns, {y, weight.values, bias.values});
  const auto warps = [&](auto of_a_row, auto of_a_thread) {
    constexpr int ROW_WARPS = decltype(of_a_row)::value, kThreads = forward_threads(ROW_WARPS);
    launch_early("layer_norm::forward_warps", forward_warps<T, ROW_WARPS, decltype(of_a_thread)::value, Step>,
                 ceil_div(rows, kThreads / kWarp / ROW_WARPS), kThreads, stream, y, mean, rstd, step, weight, bias,
                 rows, columns, eps);
  };
  if constexpr (sizeof(T) == 2) {
    if (octets && rows <= kFewRows && columns > 2 * kWarp * kOctet && columns <= kRowWarps * kWarp * kOctet) {
      return dispatch_row_warps(row_warps(columns, 1),
                                [&](auto of_a_row) { warps(of_a_row, std::integral_constant<int, 1>{}); });
    }
  }
  if (octets && columns <= 2 * kWarp * kOctet) {
    return warps(std::integral_constant<int, 1>{}, std::integral_constant<int, 2>{});
  }
  if (octets && columns <= kForwardWidth) {
    return dispatch_row_warps(row_warps(columns, 4),
                              [&](auto of_a_row) { warps(of_a_row, std::integral_constant<int, 4>{}); });
  }
  launch_early("layer_norm::forward_block", octets ? forward_block<T, kOctet, Step> : forward_block<T, 1, Step>, rows,
               kBlockThreads, stream, y, mean, rstd, step, weight, bias, columns, eps);
}

// Rows of `partial` that backward fills.
inline int chunks(long rows, int columns) {
  if (columns % kOctet != 0 || columns > kBackwardWidth) return column_sum::chunks(rows, columns);
  const int most = kBackwardWarps / row_warps(columns, kBackwardOctets), blocks = column_sum::multiprocessors();
  return std::min(blocks, ceil_div(rows, std::clamp(ceil_div(rows, blocks), 1, most)));
}

// partial (chunks, Step::kSums, C) fp32: the parts of dweight, dbias and what the step adds up
template <typename T, class Step>
void backward(float* partial, const Step& step, bool octets, const T* dy, const T* x, const float* mean,
              const float* rstd, Parameter weight, int chunks, long rows, int columns, cudaStream_t stream) {
  if (rows == 0) return;
  octets = octets && in_octets(columns, {dy, x, weight.values});
  if (octets && columns <= kBackwardWidth) {
    return dispatch_row_warps(row_warps(columns, kBackwardOctets), [&](auto of_a_row) {
      constexpr int ROW_WARPS = decltype(of_a_row)::value;
      const int groups = std::clamp(ceil_div(rows, chunks), 1, kBackwardWarps / ROW_WARPS);
      launch_early("layer_norm::backward_warps", backward_warps<T, ROW_WARPS, Step>, chunks, groups * ROW_WARPS * kWarp,
                   stream, partial, step, dy, x, mean, rstd, weight, rows, columns);
    });
  }
  launch_early("layer_norm::backward_block", octets ? backward_block<T, kOctet, Step> : backward_block<T, 1, Step>,
               rows, kBlockThreads, stream, step, dy, x, mean, rstd, weight, columns);
  column_sum::run(
      "layer_norm::Sums", octets,
      [&](auto vec) { return Sums<T, decltype(vec)::value, Step::kSums>{dy, x, step.summed(), mean, rstd}; }, partial,
      chunks, rows, columns, stream);
}

}  // namespace layer_norm
}  // namespace lightseq
