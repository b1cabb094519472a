// lightseq::block_ngrams_ on CUDA; schema and reference: lightseq_fairseq/ops/block_ngrams.py.
#include "../kernels/block_ngrams.cuh"

#include "binding.h"
#include "search_types.h"

namespace lightseq {
namespace {

void block(Tensor logits, Tensor statistics, Tensor settings, Tensor forced, Tensor steps, Tensor complete,
           Tensor ancestors, Tensor record, int64_t vocab, int64_t pad, int64_t eos, int64_t unk) {
  const beam_step::Types types = types_of(logits, vocab, pad, eos, unk);
  const torch::stable::accelerator::DeviceGuard guard(logits.get_device_index());
  dispatch("block_ngrams_", logits, [&](auto type) {
    using T = decltype(type);
    block_ngrams::block<T>(data<T>(logits), data<float2>(statistics), data<beam_step::Settings>(settings),
                           data<int>(forced), data<int>(steps), data<int>(complete), data<unsigned char>(ancestors),
                           data<int>(record), ancestors.size(0), ancestors.size(1), ancestors.size(2), types,
                           current_stream(logits));
  });
}

}  // namespace
}  // namespace lightseq

STABLE_TORCH_LIBRARY_IMPL(lightseq, CUDA, m) { m.impl("block_ngrams_", TORCH_BOX(&lightseq::block)); }
