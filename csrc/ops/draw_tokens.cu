// lightseq::draw_tokens on CUDA; schema and reference: lightseq_fairseq/ops/draw_tokens.py.
#include "../kernels/draw_tokens.cuh"

#include "binding.h"
#include "search_types.h"

namespace lightseq {
namespace {

// logits (R, V'), statistics (R, V' / 64, 2), uniforms (B, T, K) -> drawn (R, 2)
Tensor draw(Tensor logits, Tensor statistics, Tensor settings, Tensor forced, Tensor steps, Tensor complete,
            Tensor uniforms, int64_t vocab, int64_t pad, int64_t eos, int64_t unk) {
  const beam_step::Types types = types_of(logits, vocab, pad, eos, unk);
  const torch::stable::accelerator::DeviceGuard guard(logits.get_device_index());
  Tensor drawn = torch::stable::new_empty(logits, {logits.size(0), 2}, ScalarType::Int);
  dispatch("draw_tokens", logits, [&](auto type) {
    using T = decltype(type);
    draw_tokens::draw<T>(data<beam_step::Drawn>(drawn), data<T>(logits), data<float2>(statistics),
                         data<beam_step::Settings>(settings), data<int>(forced), data<int>(steps), data<int>(complete),
                         data<float>(uniforms), uniforms.size(0), uniforms.size(2), uniforms.size(1), types,
                         current_stream(logits));
  });
  return drawn;
}

}  // namespace
}  // namespace lightseq

STABLE_TORCH_LIBRARY_IMPL(lightseq, CUDA, m) { m.impl("draw_tokens", TORCH_BOX(&lightseq::draw)); }
