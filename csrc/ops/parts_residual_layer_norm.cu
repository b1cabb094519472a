// lightseq::parts_residual_layer_norm on CUDA; schema and reference: lightseq_fairseq/ops/parts_residual_layer_norm.py.
#include "../kernels/parts_residual_layer_norm.cuh"

#include <tuple>

#include "pointwise.h"

namespace lightseq {
namespace {

// parts (S, N, C) fp32, bias (C,), residual (N, C), weight, norm_bias (C,) -> sum, y (N, C)
std::tuple<Tensor, Tensor> forward(Tensor parts, Tensor bias, Tensor residual, Tensor weight, Tensor norm_bias,
                                   double eps) {
  LIGHTSEQ_EXPECT(parts.is_contiguous() && residual.is_contiguous() && parts.scalar_type() == ScalarType::Float);
  const torch::stable::accelerator::DeviceGuard guard(residual.get_device_index());
  const int64_t rows = residual.size(0), columns = residual.size(1);
  Tensor sum = torch::stable::empty_like(residual), y = torch::stable::empty_like(residual);
  Tensor statistics = new_float(residual, {2, rows});
  dispatch("parts_residual_layer_norm", residual, [&](auto type) {
    using T = decltype(type);
    const parts_residual_layer_norm::Parts<T> step{data<T>(sum),    data<float>(parts), rows * columns,
                                                   static_cast<int>(parts.size(0)), parameter(bias), data<T>(residual)};
    parts_residual_layer_norm::forward<T>(data<T>(y), data<float>(statistics), data<float>(statistics) + rows, step,
                                          parameter(weight), parameter(norm_bias), rows, columns, eps,
                                          current_stream(residual));
  });
  return {sum, y};
}

}  // namespace
}  // namespace lightseq

STABLE_TORCH_LIBRARY_IMPL(lightseq, CUDA, m) {
  m.impl("parts_residual_layer_norm", TORCH_BOX(&lightseq::forward));
}
