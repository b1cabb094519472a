// lightseq::bias_dropout_residual_layer_norm on CUDA; schema and reference:
// lightseq_fairseq/ops/bias_dropout_residual_layer_norm.py.
#include "../kernels/bias_dropout_residual_layer_norm.cuh"
#include "pointwise.h"

namespace lightseq {
namespace {

// x, residual (N, C), bias, weight, norm_bias (C,) -> sum, y (N, C), mean, rstd (N,) fp32
std::tuple<Tensor, Tensor, Tensor, Tensor> forward(Tensor x, Tensor bias, Tensor residual, Tensor weight,
                                                   Tensor norm_bias, double eps, double p, std::optional<Tensor> seed) {
  LIGHTSEQ_EXPECT(x.is_contiguous() && residual.is_contiguous());
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const int64_t rows = x.size(0);
  Tensor sum = torch::stable::empty_like(x), y = torch::stable::empty_like(x);
  Tensor mean = new_float(x, {rows}), rstd = new_float(x, {rows});
  dispatch("bias_dropout_residual_layer_norm", x, [&](auto type) {
    using T = decltype(type);
    bias_dropout_residual_layer_norm::forward<T>(
        data<T>(sum), data<T>(y), data<float>(mean), data<float>(rstd), data<T>(x), parameter(bias), data<T>(residual),
        parameter(weight), parameter(norm_bias), dropout(p, seed), rows, x.size(1), eps, current_stream(x));
  });
  return {sum, y, mean, rstd};
}

// dsum (N, C) or none, dy, sum (N, C), weight (C,), mean, rstd (N,) -> dresidual (N, C), dx (N, C), empty where p is 0,
// dbias, dweight, dnorm_bias (C,)
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> backward(std::optional<Tensor> dsum, Tensor dy, Tensor sum,
                                                            Tensor weight, Tensor mean, Tensor rstd, double p,
                                                            std::optional<Tensor> seed) {
  LIGHTSEQ_EXPECT(dy.is_contiguous() && sum.is_contiguous() && (!dsum || dsum->is_contiguous()));
  const torch::stable::accelerator::DeviceGuard guard(dy.get_device_index());
  const cudaStream_t stream = current_stream(dy);
  const int64_t rows = dy.size(0), columns = dy.size(1);
  Tensor dresidual = torch::stable::empty_like(dy);
  Tensor dx = p > 0 ? torch::stable::empty_like(dy) : torch::stable::new_empty(dy, {0});
  Tensor partial = new_float(dy, {layer_norm::chunks(rows, columns), 3, columns});
  dispatch("bias_dropout_residual_layer_norm", dy, [&](auto type) {
    using T = decltype(type);
    bias_dropout_residual_layer_norm::backward<T>(data<T>(dresidual), p > 0 ? data<T>(dx) : nullptr,
                                                  data<float>(partial), dsum ? data<T>(*dsum) : nullptr, data<T>(dy),
                                                  data<T>(sum), data<float>(mean), data<float>(rstd), parameter(weight),
                                                  dropout(p, seed), partial.size(0), rows, columns, stream);
  });
  const auto [dweight, dnorm_bias, dbias] = add_up<3>("bias_dropout_residual_layer_norm", partial, weight, stream);
  return {dresidual, dx, dbias, dweight, dnorm_bias};
}

}  // namespace
}  // namespace lightseq

STABLE_TORCH_LIBRARY_IMPL(lightseq, CUDA, m) {
  m.impl("bias_dropout_residual_layer_norm", TORCH_BOX(&lightseq::forward));
  m.impl("bias_dropout_residual_layer_norm_backward", TORCH_BOX(&lightseq::backward));
}
