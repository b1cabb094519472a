// lightseq::token_statistics and beam_step_ on CUDA; schemas and references: lightseq_fairseq/ops/beam_step.py.
#include "../kernels/beam_step.cuh"

#include <optional>

#include "binding.h"
#include "search_types.h"

namespace lightseq {
namespace {

// logits (R, V'), settings (B, 9) -> statistics (R, V' / 64, 2)
Tensor token_statistics(Tensor logits, Tensor settings, int64_t vocab, int64_t pad, int64_t eos, int64_t unk) {
  const beam_step::Types types = types_of(logits, vocab, pad, eos, unk);
  const torch::stable::accelerator::DeviceGuard guard(logits.get_device_index());
  Tensor statistics = new_float(logits, {logits.size(0), types.columns / beam_step::kTile, 2});
  dispatch("token_statistics", logits, [&](auto type) {
    using T = decltype(type);
    beam_step::token_statistics<T>(data<float2>(statistics), data<T>(logits), data<beam_step::Settings>(settings),
                                   logits.size(0), logits.size(0) / settings.size(0), types, current_stream(logits));
  });
  return statistics;
}

// See ops/beam_step.py.
void step(Tensor logits, Tensor statistics, Tensor settings, Tensor limits, Tensor forced, std::optional<Tensor> drawn,
          Tensor steps, Tensor complete, Tensor scores, Tensor idle, std::optional<Tensor> overlap, Tensor ancestors,
          Tensor record, Tensor x, Tensor tokens, std::optional<Tensor> positions, double scale, int64_t first_position,
          int64_t vocab, int64_t pad, int64_t eos, int64_t unk, bool siblings) {
  using beam_step::Search;
  const beam_step::Types types = types_of(logits, vocab, pad, eos, unk);
  const torch::stable::accelerator::DeviceGuard guard(logits.get_device_index());
  LIGHTSEQ_EXPECT(scores.size(1) <= beam_step::kMaxBeam && statistics.is_contiguous());
  LIGHTSEQ_EXPECT(x.is_contiguous() && tokens.is_contiguous() && (!positions || positions->is_contiguous()));
  const Search search = drawn      ? Search::kDrawn
                        : overlap  ? Search::kGroups
                        : siblings ? Search::kSiblings
                                   : Search::kBest;
  const beam_step::State state{data<int>(steps),
                               data<int>(complete),
                               data<float>(scores),
                               data<int>(idle),
                               overlap ? data<int>(*overlap) : nullptr,
                               data<unsigned char>(ancestors),
                               data<int>(record),
                               drawn ? data<beam_step::Drawn>(*drawn) : nullptr,
                               overlap ? static_cast<int>(overlap->size(1)) : 1};
  const int width = x.size(1);
  dispatch("beam_step_", x, [&](auto type) {
    using T = decltype(type);
    const T* const table = positions ? data<T>(*positions) : nullptr;
    const beam_step::Embedding<T> embedding{data<T>(x),
                                            data<T>(tokens),
                                            table,
                                            static_cast<float>(scale),
                                            static_cast<int>(first_position),
                                            width,
                                            in_octets(width, {x.data_ptr(), tokens.data_ptr(), table})};
    const auto launch = [&](auto logit) {
      using L = decltype(logit);
      beam_step::step<L, T>(search, state, data<L>(logits), data<float2>(statistics),
                            data<beam_step::Settings>(settings), data<int>(limits), data<int>(forced), scores.size(0),
                            scores.size(1), forced.size(1), types, embedding, current_stream(logits));
    };
    logits.scalar_type() == x.scalar_type() ? launch(type) : launch(0.f);
  });
}

}  // namespace
}  // namespace lightseq

STABLE_TORCH_LIBRARY_IMPL(lightseq, CUDA, m) {
  m.impl("token_statistics", TORCH_BOX(&lightseq::token_statistics));
  m.impl("beam_step_", TORCH_BOX(&lightseq::step));
}
