// sum = residual + bias + parts, y = layer_norm(sum) (lightseq_fairseq/ops/parts_residual_layer_norm.py).
//
// Bytes for N rows of C 16-bit elements and S parts: (6 + 4S)NC (parts, residual, sum, y).
#pragma once

#include "layer_norm.cuh"

namespace lightseq {
namespace parts_residual_layer_norm {

// A Step of layer_norm.cuh. parts (S, N, C) fp32, residual, sum (N, C), bias (C,).
template <typename T>
struct Parts {
  template <int VEC>
  struct Input {
    float parts[VEC];
    Packed<T, VEC> residual, bias;
  };
  struct Thread {};

  T* sum;
  const float* parts;
  long apart;  // elements of a part
  int count;
  Parameter bias;
  const T* residual;

  __device__ __forceinline__ Thread begin() const { return {}; }

  template <int VEC>
  __device__ __forceinline__ Input<VEC> read(long offset, int column) const {
    Input<VEC> input = {{}, request<VEC>(residual + offset), bias.request<T, VEC>(column)};
#pragma unroll 8
    for (int s = 0; s < count; ++s) {
      float part[VEC];
      request<VEC>(parts + s * apart + offset).widen(part);
#pragma unroll
      for (int i = 0; i < VEC; ++i) input.parts[i] += part[i];
    }
    return input;
  }

  template <int VEC>
  __device__ __forceinline__ void value(const Input<VEC>& input, const Thread&, long offset, int column,
                                        float (&to)[VEC]) const {
    float bias_lane[VEC];
    input.residual.widen(to);
    bias.value<T, VEC>(input.bias, column, bias_lane);
#pragma unroll
    for (int i = 0; i < VEC; ++i) to[i] += input.parts[i] + bias_lane[i];
    Packed<T, VEC> rounded;  // what others will read is what is normalised
    rounded.narrow(to);
    *reinterpret_cast<Packed<T, VEC>*>(sum + offset) = rounded;
    rounded.widen(to);
  }

  __device__ __forceinline__ const T* values() const { return sum; }
};

// ----------------------------------------------------------------------------------------------------------------
// kernel launchers

template <typename T>
void forward(T* y, float* mean, float* rstd, const Parts<T>& step, Parameter weight, Parameter norm_bias, long rows,
             int columns, float eps, cudaStream_t stream) {
  const bool octets = in_octets(columns, {step.sum, step.parts, step.bias.values, step.residual});
  layer_norm::forward<T>(y, mean, rstd, step, octets, weight, norm_bias, rows, columns, eps, stream);
}

}  // namespace parts_residual_layer_norm
}  // namespace lightseq
