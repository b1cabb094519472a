// Label-smoothed cross entropy (lightseq_fairseq/ops/cross_entropy.py has the formula).
//
// Forward reads the logits once and keeps one float a row; backward reads them once more and writes the gradient.
// Bytes for N rows of V 16-bit logits: 2NV forward, 4NV backward.
#pragma once

#include "../common/launch.cuh"
#include "../common/reduce.cuh"
#include "../common/vector.cuh"

namespace lightseq {
namespace cross_entropy {

constexpr int kThreads = 512;

// Running log-sum-exp: the sum of exp(x - max) with the maximum so far.
struct LogSumExp {
  float max = -INFINITY, sum = 0.f;

  __device__ __forceinline__ void merge(float other_max, float other_sum) {
    const float top = fmaxf(max, other_max);
    if (top == -INFINITY) return;
    sum = sum * __expf(max - top) + other_sum * __expf(other_max - top);
    max = top;
  }

  template <int VEC>
  __device__ __forceinline__ void add(const float (&x)[VEC]) {
    float top = max;
#pragma unroll
    for (int i = 0; i < VEC; ++i) top = fmaxf(top, x[i]);
    if (top == -INFINITY) return;
    float fresh = 0.f;
#pragma unroll
    for (int i = 0; i < VEC; ++i) fresh += __expf(x[i] - top);
    sum = sum * __expf(max - top) + fresh;
    max = top;
  }
};

// ----------------------------------------------------------------------------------------------------------------
// CUDA kernels

// One block a row. loss (N,), nll (N,), lse (N,); rows whose target is ignore_index get loss and nll 0.
template <typename T, int VEC>
__global__ void __launch_bounds__(kThreads)
    forward_rows(float* loss, float* nll, float* lse, const T* logits, const long* targets, int vocab, float epsilon,
                 long ignore_index) {
  const long row = blockIdx.x;
  const T* x = logits + row * vocab;
  LogSumExp seen;
  float total = 0.f;
  for (int v = threadIdx.x * VEC; v < vocab; v += kThreads * VEC) {
    float lane[VEC];
    load<VEC>(x + v, lane);
    seen.add(lane);
#pragma unroll
    for (int i = 0; i < VEC; ++i) total += lane[i];
  }
  const float top = block_reduce(seen.max, Max{});
  const float sum = block_reduce(seen.max == -INFINITY ? 0.f : seen.sum * __expf(seen.max - top), Sum{});
  total = block_reduce(total, Sum{});
  if (threadIdx.x == 0) {
    const long target = targets[row];
    const float log_sum = logf(sum);
    lse[row] = top + log_sum;
    float row_nll = 0.f, row_loss = 0.f;
    if (target != ignore_index) {
      const float each = epsilon / (vocab - 1);
      row_nll = log_sum - (to_float(x[target]) - top);  // in this order: small for a confident row, not cancelled
      row_loss = (1.f - epsilon - each) * row_nll + each * (vocab * (log_sum + top) - total);
    }
    nll[row] = row_nll;
    loss[row] = row_loss;
  }
}

// One block: sums of two vectors (N,), in a fixed order.
__global__ void __launch_bounds__(1024) sum_rows(float* loss_sum, float* nll_sum, const float* loss, const float* nll,
                                                 long rows) {
  float a = 0.f, b = 0.f;
  for (long i = threadIdx.x; i < rows; i += blockDim.x) {
    a += loss[i];
    b += nll[i];
  }
  a = block_reduce(a, Sum{});
  b = block_reduce(b, Sum{});
  if (threadIdx.x == 0) {
    *loss_sum = a;
    *nll_sum = b;
  }
}

// One block a row. dlogits (N, V) may be logits itself: each element is read before it is written, by one thread.
template <typename T, int VEC>
__global__ void __launch_bounds__(kThreads)
    backward_rows(T* dlogits, const float* dloss, const T* logits, const long* targets, const float* lse, int vocab,
                  float epsilon, long ignore_index) {
  const long row = blockIdx.x;
  const long target = targets[row];
  const float scale = target == ignore_index ? 0.f : *dloss;
  const float log_sum = lse[row], each = epsilon / (vocab - 1);
  const T* x = logits + row * vocab;
  T* dx = dlogits + row * vocab;
  for (int v = threadIdx.x * VEC; v < vocab; v += kThreads * VEC) {
    float lane[VEC];
    load<VEC>(x + v, lane);
#pragma unroll
    for (int i = 0; i < VEC; ++i) {
      const float one_hot = v + i == target ? 1.f - epsilon - each : 0.f;
      lane[i] = scale == 0.f ? 0.f : scale * (__expf(lane[i] - log_sum) - each - one_hot);
    }
    store<VEC>(dx + v, lane);
  }
}

// ----------------------------------------------------------------------------------------------------------------
// kernel launchers

template <typename T>
void forward(float* loss_sum, float* nll_sum, float* loss, float* nll, float* lse, const T* logits,
             const long* targets, long rows, int vocab, float epsilon, long ignore_index, cudaStream_t stream) {
  if (rows > 0) {
    if (vocab % kVec<T> == 0) {
      forward_rows<T, kVec<T>><<<rows, kThreads, 0, stream>>>(loss, nll, lse, logits, targets, vocab, epsilon,
                                                              ignore_index);
    } else {
      forward_rows<T, 1><<<rows, kThreads, 0, stream>>>(loss, nll, lse, logits, targets, vocab, epsilon, ignore_index);
    }
    LIGHTSEQ_CHECK_LAUNCH("cross_entropy::forward_rows");
  }
  sum_rows<<<1, 1024, 0, stream>>>(loss_sum, nll_sum, loss, nll, rows);
  LIGHTSEQ_CHECK_LAUNCH("cross_entropy::sum_rows");
}

template <typename T>
void backward(T* dlogits, const float* dloss, const T* logits, const long* targets, const float* lse, long rows,
              int vocab, float epsilon, long ignore_index, cudaStream_t stream) {
  if (rows == 0) return;
  if (vocab % kVec<T> == 0) {
    backward_rows<T, kVec<T>><<<rows, kThreads, 0, stream>>>(dlogits, dloss, logits, targets, lse, vocab, epsilon,
                                                             ignore_index);
  } else {
    backward_rows<T, 1><<<rows, kThreads, 0, stream>>>(dlogits, dloss, logits, targets, lse, vocab, epsilon,
                                                       ignore_index);
  }
  LIGHTSEQ_CHECK_LAUNCH("cross_entropy::backward_rows");
}

}  // namespace cross_entropy
}  // namespace lightseq
