// What the ops between GEMMs share at their border with PyTorch: parameters, dropout, sums over rows.
#pragma once

#include <array>
#include <optional>

#include "../common/philox.cuh"
#include "../kernels/column_sum.cuh"
#include "binding.h"

namespace lightseq {

// fp32 or the dtype of the activations, which the reference has checked.
inline Parameter parameter(const Tensor& tensor) {
  LIGHTSEQ_EXPECT(tensor.is_contiguous());
  return {tensor.data_ptr(), tensor.scalar_type() == ScalarType::Float};
}

inline Dropout dropout(double p, const std::optional<Tensor>& seed) {
  if (p > 0) LIGHTSEQ_EXPECT(seed.has_value() && seed->scalar_type() == ScalarType::Long);
  return make_dropout(p, seed ? data<long>(*seed) : nullptr);
}

// The parts of `sums` sums over the rows of `like` (N, C), which column_sum::run fills.
inline Tensor new_partial(const Tensor& like, int64_t sums) {
  return new_float(like, {column_sum::chunks(like.size(0), like.size(1)), sums, like.size(1)});
}

// partial (chunks, K, C) -> K tensors (C,) in the dtype of `like`
template <int K>
std::array<Tensor, K> add_up(const char* op, const Tensor& partial, const Tensor& like, cudaStream_t stream) {
  std::array<Tensor, K> out;
  for (Tensor& sum : out) sum = torch::stable::empty_like(like);
  dispatch(op, like, [&](auto type) {
    using P = decltype(type);
    column_sum::Sums<P, K> sums;
    for (int k = 0; k < K; ++k) sums.sum[k] = data<P>(out[k]);
    column_sum::add_up<P, K>(sums, data<float>(partial), partial.size(0), partial.size(2), false, stream);
  });
  return out;
}

}  // namespace lightseq
