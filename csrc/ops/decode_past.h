// What self-attention of a decoding step reads and writes, for the operators that have it in them.
#pragma once

#include <optional>

#include "../kernels/decode_attention.cuh"
#include "binding.h"

namespace lightseq {

// qkv (R, 3, H, D), cache (2, B, H, T * K, D), ancestors (B, K, T), steps (B,), before (N, 2, H, D) with cu_seqlens
// (B + 1,) or (B, 2), or neither
template <typename T>
decode_attention::Past<T> past_of(const Tensor& qkv, const Tensor& cache, const Tensor& ancestors, const Tensor& steps,
                                  const std::optional<Tensor>& before, const std::optional<Tensor>& cu_seqlens) {
  const int64_t batch = ancestors.size(0), beam = ancestors.size(1), most = ancestors.size(2), heads = qkv.size(2),
                dim = qkv.size(3);
  return {data<T>(cache),
          data<T>(qkv),
          before ? data<T>(*before) : nullptr,
          data<unsigned char>(ancestors),
          data<int>(steps),
          before ? data<int>(*cu_seqlens) : nullptr,
          before && cu_seqlens->dim() == 2 ? 2 : 1,
          static_cast<int>(beam),
          static_cast<int>(most),
          static_cast<int>(heads),
          static_cast<int>(dim),
          batch * heads * most * beam * dim};
}

}  // namespace lightseq
