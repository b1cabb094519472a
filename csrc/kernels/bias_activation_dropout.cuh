// y = dropout(act(x + bias)) (lightseq_fairseq/ops/bias_activation_dropout.py has the formulas).
//
// Bytes for N rows of I 16-bit elements: 4NI forward; 6NI backward (dout, saved, dx), where saved is y for relu and x
// else; 4NI for linear. dbias costs no pass of its own (column_sum.cuh).
#pragma once

#include "../common/philox.cuh"
#include "column_sum.cuh"

namespace lightseq {
namespace bias_activation_dropout {

__device__ __forceinline__ float sigmoid(float x) { return __fdividef(1.f, 1.f + __expf(-x)); }

struct Relu {
  static constexpr bool kSavesOutput = true, kReadsSaved = true;
  static __device__ __forceinline__ float value(float x) { return fmaxf(x, 0.f); }
  static __device__ __forceinline__ float slope(float y) { return y > 0.f ? 1.f : 0.f; }
};

struct ReluSquared {
  static constexpr bool kSavesOutput = false, kReadsSaved = true;
  static __device__ __forceinline__ float value(float x) { return x > 0.f ? x * x : 0.f; }
  static __device__ __forceinline__ float slope(float x) { return 2.f * fmaxf(x, 0.f); }
};

// x times the normal distribution's cdf, from the error function by Abramowitz & Stegun 7.1.26 (off by 1.5e-7 at most):
// half the instructions of erff, which made this pass bound by arithmetic.
struct Gelu {
  static constexpr bool kSavesOutput = false, kReadsSaved = true;
  // exponential: of -x^2 / 2
  static __device__ __forceinline__ float cdf(float x, float exponential) {
    const float t = __fdividef(1.f, 1.f + 0.23164188f * fabsf(x));  // 0.3275911 / sqrt(2)
    const float polynomial =
        t * (0.127414796f + t * (-0.142248368f + t * (0.71070687f + t * (-0.7265760135f + t * 0.5307027145f))));
    const float tail = polynomial * exponential;  // of the distribution beyond |x|
    return x > 0.f ? 1.f - tail : tail;
  }
  static __device__ __forceinline__ float value(float x) { return x * cdf(x, __expf(-0.5f * x * x)); }
  static __device__ __forceinline__ float slope(float x) {
    const float exponential = __expf(-0.5f * x * x);
    return cdf(x, exponential) + x * 0.39894228f * exponential;  // 1 / sqrt(2 pi)
  }
};

// The tanh form: (1 + tanh u) / 2 is sigmoid(2u).
struct GeluTanh {
  static constexpr bool kSavesOutput = false, kReadsSaved = true;
  static constexpr float kScale = 1.59576912f, kCubic = 0.044715f;  // 2 sqrt(2 / pi)
  static __device__ __forceinline__ float value(float x) { return x * sigmoid(kScale * x * (1.f + kCubic * x * x)); }
  static __device__ __forceinline__ float slope(float x) {
    const float s = sigmoid(kScale * x * (1.f + kCubic * x * x));
    return s + x * s * (1.f - s) * kScale * (1.f + 3.f * kCubic * x * x);
  }
};

struct Swish {
  static constexpr bool kSavesOutput = false, kReadsSaved = true;
  static __device__ __forceinline__ float value(float x) { return x * sigmoid(x); }
  static __device__ __forceinline__ float slope(float x) {
    const float s = sigmoid(x);
    return s + x * s * (1.f - s);
  }
};

struct Tanh {
  static constexpr bool kSavesOutput = false, kReadsSaved = true;
  static __device__ __forceinline__ float value(float x) { return tanhf(x); }
  static __device__ __forceinline__ float slope(float x) {
    const float t = tanhf(x);
    return 1.f - t * t;
  }
};

struct Linear {
  static constexpr bool kSavesOutput = true, kReadsSaved = false;
  static __device__ __forceinline__ float value(float x) { return x; }
  static __device__ __forceinline__ float slope(float) { return 1.f; }
};

// ----------------------------------------------------------------------------------------------------------------
// passes of column_sum::walk

// x, y (N, I); bias (I,)
template <typename T, int VEC, class A>
struct Forward {
  static constexpr int kSums = 0;
  struct Column {
    float bias[VEC];
    DropoutMask mask;
  };
  using Input = Packed<T, VEC>;

  T* y;
  const T* x;
  Parameter bias;
  Dropout dropout;

  __device__ __forceinline__ Column prepare(int column) const {
    Column constants{{}, DropoutMask(dropout)};
    bias.load<T, VEC>(column, constants.bias);
    return constants;
  }

  __device__ __forceinline__ Input read(long, long offset) const { return *reinterpret_cast<const Input*>(x + offset); }

  __device__ __forceinline__ void write(const Input& input, const Column& constants, long offset,
                                        float (&)[1][VEC]) const {
    float lane[VEC];
    input.widen(lane);
#pragma unroll
    for (int i = 0; i < VEC; ++i) lane[i] = A::value(lane[i] + constants.bias[i]);
    constants.mask.template apply<VEC>(offset, lane);
    store<VEC>(y + offset, lane);
  }
};

// dout, saved, dx (N, I); bias (I,); the sum is dbias
template <typename T, int VEC, class A>
struct Backward {
  static constexpr int kSums = 1;
  struct Column {
    float bias[VEC];
    DropoutMask mask;
  };
  struct Input {
    Packed<T, VEC> dout, saved;
  };

  T* dx;
  const T* dout;
  const T* saved;
  Parameter bias;
  Dropout dropout;

  __device__ __forceinline__ Column prepare(int column) const {
    Column constants{{}, DropoutMask(dropout)};
    if constexpr (!A::kSavesOutput) bias.load<T, VEC>(column, constants.bias);
    return constants;
  }

  __device__ __forceinline__ Input read(long, long offset) const {
    Input input;
    input.dout = request<VEC>(dout + offset);
    if constexpr (A::kReadsSaved) input.saved = request<VEC>(saved + offset);
    return input;
  }

  __device__ __forceinline__ void write(const Input& input, const Column& constants, long offset,
                                        float (&sums)[1][VEC]) const {
    float lane[VEC], saved_lane[VEC] = {};
    input.dout.widen(lane);
    if constexpr (A::kReadsSaved) input.saved.widen(saved_lane);
    if constexpr (A::kSavesOutput && A::kReadsSaved) {  // what was dropped has y = 0: no mask to draw again
#pragma unroll
      for (int i = 0; i < VEC; ++i) lane[i] *= A::slope(saved_lane[i]) * dropout.scale;
    } else {
#pragma unroll
      for (int i = 0; i < VEC; ++i) lane[i] *= A::slope(saved_lane[i] + constants.bias[i]);
      constants.mask.template apply<VEC>(offset, lane);
    }
#pragma unroll
    for (int i = 0; i < VEC; ++i) sums[0][i] += lane[i];
    store<VEC>(dx + offset, lane);
  }
};

// ----------------------------------------------------------------------------------------------------------------
// kernel launchers

template <typename T, class A>
void forward(T* y, const T* x, Parameter bias, Dropout dropout, long rows, int columns, cudaStream_t stream) {
  column_sum::run(
      "bias_activation_dropout::forward", in_octets(columns, {y, x, bias.values}),
      [&](auto vec) { return Forward<T, decltype(vec)::value, A>{y, x, bias, dropout}; }, nullptr,
      column_sum::chunks(rows, columns), rows, columns, stream);
}

// partial (chunks, 1, I) fp32: the parts of dbias
template <typename T, class A>
void backward(T* dx, float* partial, const T* dout, const T* saved, Parameter bias, Dropout dropout, int chunks,
              long rows, int columns, cudaStream_t stream) {
  column_sum::run(
      "bias_activation_dropout::backward", in_octets(columns, {dx, dout, saved, bias.values}),
      [&](auto vec) { return Backward<T, decltype(vec)::value, A>{dx, dout, saved, bias, dropout}; }, partial, chunks,
      rows, columns, stream);
}

}  // namespace bias_activation_dropout
}  // namespace lightseq
