// The vocabulary as the kernels of the search know it.
#pragma once

#include <algorithm>

#include "../kernels/beam_step.cuh"
#include "binding.h"

namespace lightseq {

inline beam_step::Types types_of(const Tensor& logits, int64_t vocab, int64_t pad, int64_t eos, int64_t unk) {
  LIGHTSEQ_EXPECT(logits.is_contiguous() && logits.size(1) % beam_step::kTile == 0);
  return {static_cast<int>(vocab), static_cast<int>(logits.size(1)),
          static_cast<int>(pad),   static_cast<int>(eos),
          static_cast<int>(unk),   static_cast<int>(std::max({pad, eos, unk}))};
}

}  // namespace lightseq
