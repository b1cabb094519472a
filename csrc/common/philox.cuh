// Dropout masks that any kernel can draw again from seed and position alone (Philox4x32-10: Salmon et al. 2011,
// "Parallel random numbers: as easy as 1, 2, 3").
//
// Element e (flat index) of an output owns 16 random bits: number e % 8 of the eight that Philox gives for the key
// `seed` and the counter (e / 8, 0), low halves of words first. The element is kept iff its number is at least
// threshold = round(65536 p), and then scaled by 65536 / (65536 - threshold). About 10 instructions an element when
// eight are drawn at once.
#pragma once

#include <algorithm>
#include <cstdint>

namespace lightseq {

constexpr unsigned kDropoutLevels = 65536;

// Kernel argument. `seed` is read on the device, so that a captured graph draws anew when the seed changes.
struct Dropout {
  const long* seed;
  unsigned bound;  // threshold in the upper half: 0 if nothing is dropped, and then seed is not read
  float scale;     // 0 if everything is, as the threshold of 65536 has no place in 16 bits
};

inline Dropout make_dropout(double p, const long* seed) {
  const auto threshold = static_cast<unsigned>(p * kDropoutLevels + 0.5);
  const unsigned kept = kDropoutLevels - threshold;
  const double scale = kept == 0 ? 0. : static_cast<double>(kDropoutLevels) / kept;
  return {seed, std::min(threshold, kDropoutLevels - 1) << 16, static_cast<float>(scale)};
}

// Both halves of the product in one instruction; from plain C++ the compiler adds a useless third.
__device__ __forceinline__ uint2 multiply_wide(uint32_t a, uint32_t b) {
  uint2 product;
  asm("{ .reg .u64 wide; mul.wide.u32 wide, %2, %3; mov.b64 {%0, %1}, wide; }"
      : "=r"(product.x), "=r"(product.y)
      : "r"(a), "r"(b));
  return product;
}

__device__ __forceinline__ uint4 philox(uint64_t key, uint4 c) {
  uint32_t key0 = static_cast<uint32_t>(key), key1 = static_cast<uint32_t>(key >> 32);
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint2 a = multiply_wide(c.x, 0xD2511F53u), b = multiply_wide(c.z, 0xCD9E8D57u);
    c = {b.y ^ c.y ^ key0, b.x, a.y ^ c.w ^ key1, a.x};
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return c;
}

__device__ __forceinline__ uint4 philox(uint64_t key, uint64_t counter) {
  return philox(key, make_uint4(static_cast<uint32_t>(counter), static_cast<uint32_t>(counter >> 32), 0, 0));
}

// A thread's view of a Dropout: made once, applied to many elements.
class DropoutMask {
 public:
  __device__ __forceinline__ explicit DropoutMask(const Dropout& dropout)
      : key_(dropout.bound ? static_cast<uint64_t>(*dropout.seed) : 0), bound_(dropout.bound), scale_(dropout.scale) {}

  // x holds the elements from flat index `element` on: eight, `element` a multiple of eight, or one.
  template <int VEC>
  __device__ __forceinline__ void apply(uint64_t element, float (&x)[VEC]) const {
    static_assert(VEC == 8 || VEC == 1);
    if (bound_ == 0) return;
    const uint4 bits = philox(key_, element / 8);
    const uint32_t word[4] = {bits.x, bits.y, bits.z, bits.w};
    if constexpr (VEC == 8) {
#pragma unroll
      for (int i = 0; i < 8; i += 2) {
        x[i] = word[i / 2] << 16 >= bound_ ? x[i] * scale_ : 0.f;
        x[i + 1] = word[i / 2] >= bound_ ? x[i + 1] * scale_ : 0.f;  // what the lower half adds cannot matter
      }
    } else {
      const unsigned i = element % 8;
      const uint32_t pair = i < 4 ? (i < 2 ? word[0] : word[1]) : (i < 6 ? word[2] : word[3]);
      x[0] = (i % 2 ? pair : pair << 16) >= bound_ ? x[0] * scale_ : 0.f;
    }
  }

 private:
  uint64_t key_;
  unsigned bound_;
  float scale_;
};

}  // namespace lightseq
