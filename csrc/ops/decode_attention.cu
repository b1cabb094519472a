// lightseq::decode_self_attention and decode_cross_attention on CUDA; schemas and references:
// lightseq_fairseq/ops/decode_attention.py.
#include "../kernels/decode_attention.cuh"
#include "decode_past.h"

namespace lightseq {
namespace {

// qkv (R, 3, H, D), cache (2, B, H, T * K, D), ancestors (B, K, T), steps (B,), before (N, 2, H, D) with cu_seqlens
// (B + 1,) or (B, 2), or neither -> context (R, H * D)
Tensor self_attention(Tensor qkv, Tensor cache, Tensor ancestors, Tensor steps, std::optional<Tensor> before,
                      std::optional<Tensor> cu_seqlens) {
  LIGHTSEQ_EXPECT(qkv.is_contiguous() && cache.is_contiguous() && ancestors.is_contiguous());
  LIGHTSEQ_EXPECT(before.has_value() == cu_seqlens.has_value());
  LIGHTSEQ_EXPECT(!before || (before->is_contiguous() && cu_seqlens->is_contiguous()));
  const torch::stable::accelerator::DeviceGuard guard(qkv.get_device_index());
  Tensor context = torch::stable::new_empty(qkv, {qkv.size(0), qkv.size(2) * qkv.size(3)});
  dispatch("decode_self_attention", qkv, [&](auto type) {
    using T = decltype(type);
    decode_attention::self_attention<T>(
        data<T>(context), past_of<T>(qkv, cache, ancestors, steps, before, cu_seqlens), ancestors.size(0),
        current_stream(qkv));
  });
  return context;
}

// q (R, H * D), keys_values (N, 2, H, D), cu_seqlens (B + 1,) or (B, 2) -> context (R, H * D)
Tensor cross_attention(Tensor q, Tensor keys_values, Tensor cu_seqlens, int64_t beam) {
  LIGHTSEQ_EXPECT(q.is_contiguous() && keys_values.is_contiguous() && cu_seqlens.is_contiguous());
  const torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
  Tensor context = torch::stable::empty_like(q);
  dispatch("decode_cross_attention", q, [&](auto type) {
    using T = decltype(type);
    const bool apart = cu_seqlens.dim() == 2;
    decode_attention::cross_attention<T>(data<T>(context), data<T>(q), data<T>(keys_values), data<int>(cu_seqlens),
                                         apart ? 2 : 1, keys_values.size(0),
                                         apart ? cu_seqlens.size(0) : cu_seqlens.numel() - 1, beam, keys_values.size(2),
                                         keys_values.size(3), current_stream(q));
  });
  return context;
}

}  // namespace
}  // namespace lightseq

STABLE_TORCH_LIBRARY_IMPL(lightseq, CUDA, m) {
  m.impl("decode_self_attention", TORCH_BOX(&lightseq::self_attention));
  m.impl("decode_cross_attention", TORCH_BOX(&lightseq::cross_attention));
}
