// Rows walked eight elements at a time: what one Philox draw covers and, in 16-bit types, one 16-byte access.
#pragma once

#include <cstdint>
#include <initializer_list>

#include "vector.cuh"

namespace lightseq {

constexpr int kOctet = 8;

// Whether rows of `columns` elements may be accessed so: no octet may reach into the next row, and every pointer must
// be aligned (an absent one, null, is).
inline bool in_octets(long columns, std::initializer_list<const void*> pointers) {
  bool fits = columns % kOctet == 0;
  for (const void* pointer : pointers) {
    fits = fits && reinterpret_cast<uintptr_t>(pointer) % (kOctet * sizeof(float)) == 0;
  }
  return fits;
}

// VEC elements in accesses of 16 bytes, whatever the compiler makes of branches around them.
template <int VEC, typename T>
__device__ __forceinline__ Packed<T, VEC> request(const T* from) {
  constexpr int kBytes = sizeof(T) * VEC;
  Packed<T, VEC> packed;
  if constexpr (kBytes % 16 == 0) {
#pragma unroll
    for (int i = 0; i < kBytes / 16; ++i) {
      reinterpret_cast<uint4*>(&packed)[i] = reinterpret_cast<const uint4*>(from)[i];
    }
  } else {
    packed = *reinterpret_cast<const Packed<T, VEC>*>(from);
  }
  return packed;
}

// One parameter a column, in fp32 (as autocast leaves them) or in the type T of the activations. The latter can be
// requested long before its value is needed; `value` then takes what was requested.
struct Parameter {
  const void* values;
  bool is_float;

  template <typename T, int VEC>
  __device__ __forceinline__ Packed<T, VEC> request(int column) const {
    if (std::is_same_v<T, float> || !is_float) return lightseq::request<VEC>(static_cast<const T*>(values) + column);
    return {};
  }

  template <typename T, int VEC>
  __device__ __forceinline__ void value(const Packed<T, VEC>& requested, int column, float (&to)[VEC]) const {
    requested.widen(to);
    if (!std::is_same_v<T, float> && is_float) {
      lightseq::request<VEC>(static_cast<const float*>(values) + column).widen(to);
    }
  }

  template <typename T, int VEC>
  __device__ __forceinline__ void load(int column, float (&to)[VEC]) const {
    value(request<T, VEC>(column), column, to);
  }
};

}  // namespace lightseq
