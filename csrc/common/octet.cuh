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

// One parameter a column, in fp32 (as autocast leaves them) or in the type T of the activations.
struct Parameter {
  const void* values;
  bool is_float;

  template <typename T, int VEC>
  __device__ __forceinline__ void load(int column, float (&to)[VEC]) const {
    if (is_float) {
      lightseq::load<VEC>(static_cast<const float*>(values) + column, to);
    } else {
      lightseq::load<VEC>(static_cast<const T*>(values) + column, to);
    }
  }
};

}  // namespace lightseq
