// One training update over flat storage (lightseq_fairseq/ops/flat_adam.py has the formulas): the gradient's norm, the
// decision whether and with which factors to step, and Adam itself. Nothing of it returns to the host.
//
// Bytes for P parameters with 16-bit gradients and parameters: 2P for the norm, then 28P (read gradient, master, m, v;
// write master, m, v and the 16-bit copy): 59M parameters in 0.45 ms at 4 TB/s.
#pragma once

#include <type_traits>

#include "../common/launch.cuh"
#include "../common/octet.cuh"
#include "../common/reduce.cuh"
#include "../common/vector.cuh"

namespace lightseq {
namespace flat_adam {

constexpr int kThreads = 256;
constexpr int kMaxBlocks = 1056;  // eight blocks for each of 132 multiprocessors

// ----------------------------------------------------------------------------------------------------------------
// CUDA kernels

// partial (gridDim.x,): sums of squares of a strided share of grad (P,). VEC divides P.
template <typename T, int VEC>
__global__ void __launch_bounds__(kThreads) sum_squares(float* partial, const T* grad, long size) {
  const long stride = static_cast<long>(gridDim.x) * kThreads * VEC;
  float sum = 0.f;
  for (long i = (static_cast<long>(blockIdx.x) * kThreads + threadIdx.x) * VEC; i < size; i += stride) {
    float lane[VEC];
    load<VEC>(grad + i, lane);
#pragma unroll
    for (int j = 0; j < VEC; ++j) sum += lane[j] * lane[j];
  }
  sum = block_reduce(sum, Sum{});
  if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}

// One block. factors (5,): gradient multiplier, decay factor, step size, eps, whether to step at all.
// norm (1,): the norm of the true gradient; steps (1,) int64 counts the updates made.
__global__ void __launch_bounds__(1024)
    decide(float* factors, float* norm, long* steps, const float* partial, int partials, const float* lr,
           const float* multiplier, float max_norm, float beta1, float beta2, float eps, float weight_decay) {
  double sum = 0.;
  for (int i = threadIdx.x; i < partials; i += blockDim.x) sum += partial[i];
  const float total = block_reduce(static_cast<float>(sum), Sum{});
  if (threadIdx.x != 0) return;
  float factor = *multiplier;
  const float length = sqrtf(total) * fabsf(factor);
  const bool finite = isfinite(length);
  *norm = length;
  if (max_norm > 0.f) factor *= fminf(max_norm / (length + 1e-6f), 1.f);
  if (finite) *steps += 1;
  const double t = static_cast<double>(*steps > 0 ? *steps : 1);
  const double rate = *lr;
  factors[0] = factor;
  factors[1] = static_cast<float>(1. - rate * weight_decay);
  factors[2] = static_cast<float>(rate * sqrt(1. - pow(static_cast<double>(beta2), t)) /
                                  (1. - pow(static_cast<double>(beta1), t)));
  factors[3] = eps;
  factors[4] = finite ? 1.f : 0.f;
}

// Elements of master, exp_avg, exp_avg_sq (P,) and of param, grad (Q,) that belong together.
struct Segment {
  long in_master, in_param, length;
};

// VEC elements of each from `i` on; param is null where master itself is what is trained.
template <typename T, int VEC>
__device__ __forceinline__ void update_at(float* master, float* exp_avg, float* exp_avg_sq, T* param, const T* grad,
                                          const float* factors, float beta1, float beta2) {
  float g[VEC], p[VEC], m[VEC], v[VEC];
  const auto gradient = request<VEC>(grad);
  const auto old_p = request<VEC>(master), old_m = request<VEC>(exp_avg), old_v = request<VEC>(exp_avg_sq);
  gradient.widen(g), old_p.widen(p), old_m.widen(m), old_v.widen(v);
#pragma unroll
  for (int j = 0; j < VEC; ++j) {
    const float scaled = g[j] * factors[0];
    m[j] = beta1 * m[j] + (1.f - beta1) * scaled;
    v[j] = beta2 * v[j] + (1.f - beta2) * scaled * scaled;
    p[j] = p[j] * factors[1] - factors[2] * m[j] / (sqrtf(v[j]) + factors[3]);
  }
  store<VEC>(master, p);
  store<VEC>(exp_avg, m);
  store<VEC>(exp_avg_sq, v);
  if (param != nullptr) store<VEC>(param, p);
}

// One block a segment. master, exp_avg, exp_avg_sq (P,) fp32 and param (Q,) T, unless null, are updated from grad
// (Q,) T.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    update(float* master, float* exp_avg, float* exp_avg_sq, T* param, const T* grad, const Segment* segments,
           const float* factors, float beta1, float beta2) {
  if (factors[4] == 0.f) return;
  const Segment segment = segments[blockIdx.x];
  const float constants[4] = {factors[0], factors[1], factors[2], factors[3]};
  const auto walk = [&](auto vec) {
    constexpr int VEC = decltype(vec)::value;
    for (long i = threadIdx.x * VEC; i < segment.length; i += kThreads * VEC) {
      const long p = segment.in_master + i, q = segment.in_param + i;
      update_at<T, VEC>(master + p, exp_avg + p, exp_avg_sq + p, param == nullptr ? nullptr : param + q, grad + q,
                        constants, beta1, beta2);
    }
  };
  if ((segment.in_master | segment.in_param | segment.length) % kOctet == 0) {
    walk(std::integral_constant<int, kOctet>{});
  } else {
    walk(std::integral_constant<int, 1>{});
  }
}

// ----------------------------------------------------------------------------------------------------------------
// kernel launchers

inline int blocks_for(long vectors) {
  const int wanted = ceil_div(vectors, kThreads);
  return wanted < 1 ? 1 : (wanted < kMaxBlocks ? wanted : kMaxBlocks);
}

// Elements that sum_squares writes for a gradient of this size.
template <typename T>
int partials_for(long size) {
  return blocks_for(size % kOctet == 0 ? size / kOctet : size);
}

template <typename T>
void step(float* master, float* exp_avg, float* exp_avg_sq, T* param, const T* grad, long size,
          const Segment* segments, int segment_count, float* factors, float* norm, long* steps, float* partial,
          const float* lr, const float* multiplier, float max_norm, float beta1, float beta2, float eps,
          float weight_decay, cudaStream_t stream) {
  const int blocks = partials_for<T>(size);
  if (size % kOctet == 0) {
    sum_squares<T, kOctet><<<blocks, kThreads, 0, stream>>>(partial, grad, size);
  } else {
    sum_squares<T, 1><<<blocks, kThreads, 0, stream>>>(partial, grad, size);
  }
  LIGHTSEQ_CHECK_LAUNCH("flat_adam::sum_squares");
  decide<<<1, 1024, 0, stream>>>(factors, norm, steps, partial, blocks, lr, multiplier, max_norm, beta1, beta2, eps,
                                 weight_decay);
  LIGHTSEQ_CHECK_LAUNCH("flat_adam::decide");
  if (segment_count == 0) return;
  update<T><<<segment_count, kThreads, 0, stream>>>(master, exp_avg, exp_avg_sq, param, grad, segments, factors, beta1,
                                                    beta2);
  LIGHTSEQ_CHECK_LAUNCH("flat_adam::update");
}

}  // namespace flat_adam
}  // namespace lightseq
