// lightseq::embedding on CUDA; schema and reference: lightseq_fairseq/ops/embedding.py.
#include "../kernels/embedding.cuh"
#include "pointwise.h"

namespace lightseq {
namespace {

// tokens (N,), weight (V, C), position_rows (N,), position_weight (P, C) -> y (N, C)
Tensor forward(Tensor tokens, Tensor weight, double scale, int64_t, std::optional<Tensor> position_rows,
               std::optional<Tensor> position_weight, double p, std::optional<Tensor> seed) {
  LIGHTSEQ_EXPECT(tokens.is_contiguous() && weight.is_contiguous());
  LIGHTSEQ_EXPECT(position_rows.has_value() == position_weight.has_value());
  LIGHTSEQ_EXPECT(!position_rows || (position_rows->is_contiguous() && position_weight->is_contiguous()));
  const torch::stable::accelerator::DeviceGuard guard(weight.get_device_index());
  const int64_t rows = tokens.size(0), columns = weight.size(1);
  Tensor y = torch::stable::new_empty(weight, {rows, columns});
  dispatch("embedding", weight, [&](auto type) {
    using T = decltype(type);
    embedding::forward<T>(
        data<T>(y), data<long>(tokens), data<T>(weight), position_rows ? data<long>(*position_rows) : nullptr,
        position_weight ? data<T>(*position_weight) : nullptr, dropout(p, seed), rows, columns, weight.size(0),
        position_weight ? position_weight->size(0) : 0, scale, current_stream(weight));
  });
  return y;
}

// dout (N, C), indices (N,) -> dtable (vocab, C)
Tensor backward(Tensor dout, Tensor indices, int64_t vocab, int64_t padding_index, double scale, double p,
                std::optional<Tensor> seed) {
  LIGHTSEQ_EXPECT(dout.is_contiguous() && indices.is_contiguous());
  const torch::stable::accelerator::DeviceGuard guard(dout.get_device_index());
  const int64_t count = indices.size(0), columns = dout.size(1);
  STD_TORCH_CHECK(count <= embedding::kIndicesAtMost && vocab <= embedding::kIndicesAtMost,
                  "embedding: its gradient on CUDA takes at most ", embedding::kIndicesAtMost, " tokens and rows, got ",
                  count, " tokens and ", vocab, " rows; split the batch or the table");
  const Tensor dtable = torch::stable::new_empty(dout, {vocab, columns});  // CUDA memory comes in 512-byte pieces
  const Tensor places = torch::stable::new_empty(dout, {2, count}, ScalarType::Int);
  const Tensor parts = new_float(dout, {embedding::chunks(count), 2, columns});
  dispatch("embedding", dout, [&](auto type) {
    using T = decltype(type);
    embedding::backward<T>(data<T>(dtable), data<int>(places), data<int>(places) + count, data<float>(parts),
                           data<T>(dout), data<long>(indices), dropout(p, seed), count, columns, vocab, padding_index,
                           scale, current_stream(dout));
  });
  return dtable;
}

}  // namespace
}  // namespace lightseq

STABLE_TORCH_LIBRARY_IMPL(lightseq, CUDA, m) {
  m.impl("embedding", TORCH_BOX(&lightseq::forward));
  m.impl("embedding_backward", TORCH_BOX(&lightseq::backward));
}
