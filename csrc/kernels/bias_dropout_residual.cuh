// y = residual + dropout(x + bias) (lightseq_fairseq/ops/bias_dropout_residual.py).
//
// Bytes for N rows of C 16-bit elements: 6NC forward; 4NC backward (dout, dx), 2NC where nothing is dropped, as dx is
// dout then; dresidual always is. dbias costs no pass of its own (column_sum.cuh).
#pragma once

#include "../common/philox.cuh"
#include "column_sum.cuh"

namespace lightseq {
namespace bias_dropout_residual {

// ----------------------------------------------------------------------------------------------------------------
// passes of column_sum::walk

// x, residual, y (N, C); bias (C,)
template <typename T, int VEC>
struct Forward {
  static constexpr int kSums = 0;
  struct Column {
    float bias[VEC];
    DropoutMask mask;
  };
  struct Input {
    Packed<T, VEC> x, residual;
  };

  T* y;
  const T* x;
  Parameter bias;
  const T* residual;
  Dropout dropout;

  __device__ __forceinline__ Column prepare(int column) const {
    Column constants{{}, DropoutMask(dropout)};
    bias.load<T, VEC>(column, constants.bias);
    return constants;
  }

  __device__ __forceinline__ Input read(long, long offset) const {
    return {request<VEC>(x + offset), request<VEC>(residual + offset)};
  }

  __device__ __forceinline__ void write(const Input& input, const Column& constants, long offset,
                                        float (&)[1][VEC]) const {
    float lane[VEC], residual_lane[VEC];
    input.x.widen(lane);
    input.residual.widen(residual_lane);
#pragma unroll
    for (int i = 0; i < VEC; ++i) lane[i] += constants.bias[i];
    constants.mask.template apply<VEC>(offset, lane);
#pragma unroll
    for (int i = 0; i < VEC; ++i) lane[i] += residual_lane[i];
    store<VEC>(y + offset, lane);
  }
};

// dout, dx (N, C); dx is null where nothing is dropped; the sum is dbias
template <typename T, int VEC>
struct Backward {
  static constexpr int kSums = 1;
  struct Column {
    DropoutMask mask;
  };
  using Input = Packed<T, VEC>;

  T* dx;
  const T* dout;
  Dropout dropout;

  __device__ __forceinline__ Column prepare(int) const { return {DropoutMask(dropout)}; }

  __device__ __forceinline__ Input read(long, long offset) const { return request<VEC>(dout + offset); }

  __device__ __forceinline__ void write(const Input& input, const Column& constants, long offset,
                                        float (&sums)[1][VEC]) const {
    float lane[VEC];
    input.widen(lane);
    constants.mask.template apply<VEC>(offset, lane);
#pragma unroll
    for (int i = 0; i < VEC; ++i) sums[0][i] += lane[i];
    if (dx) store<VEC>(dx + offset, lane);
  }
};

// ----------------------------------------------------------------------------------------------------------------
// kernel launchers

template <typename T>
void forward(T* y, const T* x, Parameter bias, const T* residual, Dropout dropout, long rows, int columns,
             cudaStream_t stream) {
  column_sum::run(
      "bias_dropout_residual::forward", in_octets(columns, {y, x, bias.values, residual}),
      [&](auto vec) { return Forward<T, decltype(vec)::value>{y, x, bias, residual, dropout}; }, nullptr,
      column_sum::chunks(rows, columns), rows, columns, stream);
}

// partial (chunks, 1, C) fp32: the parts of dbias
template <typename T>
void backward(T* dx, float* partial, const T* dout, Dropout dropout, int chunks, long rows, int columns,
              cudaStream_t stream) {
  column_sum::run(
      "bias_dropout_residual::backward", in_octets(columns, {dx, dout}),
      [&](auto vec) { return Backward<T, decltype(vec)::value>{dx, dout, dropout}; }, partial, chunks, rows, columns,
      stream);
}

}  // namespace bias_dropout_residual
}  // namespace lightseq
