// lightseq::decode_memory_attention on CUDA; schema and reference: lightseq_fairseq/ops/decode_memory_attention.py.
#include "../kernels/decode_memory_attention.cuh"
#include "binding.h"

namespace lightseq {
namespace {

// q (B, G, C), memory (N, C), cu_seqlens (B + 1,) or (B, 2) -> context (B, G, C)
Tensor attend(Tensor q, Tensor memory, Tensor cu_seqlens) {
  LIGHTSEQ_EXPECT(q.is_contiguous() && memory.is_contiguous() && cu_seqlens.is_contiguous() && q.size(0) > 0);
  const torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
  Tensor context = torch::stable::empty_like(q);
  dispatch_16_bits("decode_memory_attention", q, [&](auto type) {
    using T = decltype(type);
    const decode_memory_attention::Operands<T> operands{data<T>(context),
                                                        data<T>(q),
                                                        data<T>(memory),
                                                        data<int>(cu_seqlens),
                                                        cu_seqlens.dim() == 2 ? 2 : 1,
                                                        static_cast<int>(q.size(1))};
    decode_memory_attention::forward<T>(operands, q.size(0), q.size(2), memory.size(0), current_stream(q));
  });
  return context;
}

// Whether the kernel is there for the GPU of `like`.
bool serves(Tensor like) {
  const torch::stable::accelerator::DeviceGuard guard(like.get_device_index());
  return has_warpgroups();
}

}  // namespace
}  // namespace lightseq

STABLE_TORCH_LIBRARY_IMPL(lightseq, CUDA, m) {
  m.impl("decode_memory_attention", TORCH_BOX(&lightseq::attend));
  m.impl("decode_memory_attention_serves", TORCH_BOX(&lightseq::serves));
}
