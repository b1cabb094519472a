// sum = residual + dropout(x + bias), y = layer_norm(sum) (lightseq_fairseq/ops/bias_dropout_residual_layer_norm.py).
//
// Bytes for N rows of C 16-bit elements: 8NC forward (x, residual, sum, y). Backward 6NC (dy, sum, dresidual), 2NC more
// where the gradient of sum itself comes in, 2NC more where dropout makes dx another array than dresidual.
#pragma once

#include "layer_norm.cuh"

namespace lightseq {
namespace bias_dropout_residual_layer_norm {

// A Step of layer_norm.cuh. x, residual, sum, dsum, dresidual, dx (N, C); bias (C,). dsum is null where sum is not used
// but by the norm, dx where nothing is dropped.
template <typename T>
struct Residual {
  static constexpr int kSums = 3;  // dweight, dnorm_bias, dbias
  template <int VEC>
  struct Input {
    Packed<T, VEC> x, residual, bias;
  };
  template <int VEC>
  using GradientInput = Packed<T, VEC>;
  using Thread = DropoutMask;

  Dropout dropout;
  T* sum = nullptr;
  const T* x = nullptr;
  Parameter bias = {};
  const T* residual = nullptr;

  T* dresidual = nullptr;
  T* dx = nullptr;
  const T* dsum = nullptr;

  __device__ __forceinline__ Thread begin() const { return DropoutMask(dropout); }

  template <int VEC>
  __device__ __forceinline__ Input<VEC> read(long offset, int column) const {
    return {request<VEC>(x + offset), request<VEC>(residual + offset), bias.request<T, VEC>(column)};
  }

  template <int VEC>
  __device__ __forceinline__ void value(const Input<VEC>& input, const Thread& mask, long offset, int column,
                                        float (&to)[VEC]) const {
    float residual_lane[VEC], bias_lane[VEC];
    input.x.widen(to);
    input.residual.widen(residual_lane);
    bias.value<T, VEC>(input.bias, column, bias_lane);
#pragma unroll
    for (int i = 0; i < VEC; ++i) to[i] += bias_lane[i];
    mask.template apply<VEC>(offset, to);
#pragma unroll
    for (int i = 0; i < VEC; ++i) to[i] += residual_lane[i];
    Packed<T, VEC> rounded;  // what backward will read is what is normalised
    rounded.narrow(to);
    *reinterpret_cast<Packed<T, VEC>*>(sum + offset) = rounded;
    rounded.widen(to);
  }

  __device__ __forceinline__ const T* values() const { return sum; }

  template <int VEC>
  __device__ __forceinline__ GradientInput<VEC> read_gradient(long offset) const {
    if (dsum) return request<VEC>(dsum + offset);
    return {};
  }

  template <int VEC>
  __device__ __forceinline__ void gradient(const GradientInput<VEC>& input, const Thread& mask, long offset,
                                           float (&dvalue)[VEC], float (&dbias)[VEC]) const {
    if (dsum) {
      float dsum_lane[VEC];
      input.widen(dsum_lane);
#pragma unroll
      for (int i = 0; i < VEC; ++i) dvalue[i] += dsum_lane[i];
    }
    store<VEC>(dresidual + offset, dvalue);
    mask.template apply<VEC>(offset, dvalue);
    if (dx) store<VEC>(dx + offset, dvalue);
#pragma unroll
    for (int i = 0; i < VEC; ++i) dbias[i] += dvalue[i];
  }

  const T* summed() const { return dx ? dx : dresidual; }
};

// ----------------------------------------------------------------------------------------------------------------
// kernel launchers

template <typename T>
void forward(T* sum, T* y, float* mean, float* rstd, const T* x, Parameter bias, const T* residual, Parameter weight,
             Parameter norm_bias, Dropout dropout, long rows, int columns, float eps, cudaStream_t stream) {
  Residual<T> step{dropout, sum, x, bias, residual};
  const bool octets = in_octets(columns, {sum, x, bias.values, residual});
  layer_norm::forward<T>(y, mean, rstd, step, octets, weight, norm_bias, rows, columns, eps, stream);
}

// partial (chunks, 3, C) fp32: the parts of dweight, dnorm_bias and dbias
template <typename T>
void backward(T* dresidual, T* dx, float* partial, const T* dsum, const T* dy, const T* sum, const float* mean,
              const float* rstd, Parameter weight, Dropout dropout, int chunks, long rows, int columns,
              cudaStream_t stream) {
  Residual<T> step{dropout};
  step.dresidual = dresidual;
  step.dx = dx;
  step.dsum = dsum;
  const bool octets = in_octets(columns, {dresidual, dx, dsum});
  layer_norm::backward<T>(partial, step, octets, dy, sum, mean, rstd, weight, chunks, rows, columns, stream);
}

}  // namespace bias_dropout_residual_layer_norm
}  // namespace lightseq
