// Packed loads and stores: VEC elements of T move as one access of up to 16 bytes, computed on as floats.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

namespace lightseq {

template <typename T>
__device__ __forceinline__ float to_float(T x) {
  return static_cast<float>(x);
}

template <typename T>
__device__ __forceinline__ T from_float(float x) {
  return static_cast<T>(x);
}
template <>
__device__ __forceinline__ __half from_float<__half>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}

// Elements of T in 16 bytes: 8 of a 16-bit type, 4 floats.
template <typename T>
constexpr int kVec = 16 / sizeof(T);

// The two 16-bit values of a register, so that none is ever taken apart into halves.
template <typename T>
__device__ __forceinline__ float2 unpack(unsigned pair) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {  // the upper half of a float
    return {__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u)};
  } else {
    return __half22float2(*reinterpret_cast<const __half2*>(&pair));
  }
}

template <typename T>
__device__ __forceinline__ unsigned pack(float low, float high) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const unsigned*>(&pair);
  } else {
    const __half2 pair = __floats2half2_rn(low, high);
    return *reinterpret_cast<const unsigned*>(&pair);
  }
}

template <typename T, int VEC>
struct alignas(sizeof(T) * VEC) Packed {
  static constexpr bool kPairs = sizeof(T) == 2 && VEC % 2 == 0;

  T lane[VEC];

  __device__ __forceinline__ void widen(float (&out)[VEC]) const {
    if constexpr (kPairs) {
      const unsigned* pair = reinterpret_cast<const unsigned*>(lane);
#pragma unroll
      for (int i = 0; i < VEC; i += 2) {
        const float2 both = unpack<T>(pair[i / 2]);
        out[i] = both.x;
        out[i + 1] = both.y;
      }
    } else {
#pragma unroll
      for (int i = 0; i < VEC; ++i) out[i] = to_float(lane[i]);
    }
  }

  __device__ __forceinline__ void narrow(const float (&in)[VEC]) {
    if constexpr (kPairs) {
      unsigned* pair = reinterpret_cast<unsigned*>(lane);
#pragma unroll
      for (int i = 0; i < VEC; i += 2) pair[i / 2] = pack<T>(in[i], in[i + 1]);
    } else {
#pragma unroll
      for (int i = 0; i < VEC; ++i) lane[i] = from_float<T>(in[i]);
    }
  }
};

template <int VEC, typename T>
__device__ __forceinline__ void load(const T* from, float (&to)[VEC]) {
  reinterpret_cast<const Packed<T, VEC>*>(from)->widen(to);
}

template <int VEC, typename T>
__device__ __forceinline__ void store(T* to, const float (&from)[VEC]) {
  Packed<T, VEC> packed;
  packed.narrow(from);
  *reinterpret_cast<Packed<T, VEC>*>(to) = packed;
}

}  // namespace lightseq
