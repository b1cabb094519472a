// lightseq::bias_dropout_residual on CUDA; schema and reference: lightseq_fairseq/ops/bias_dropout_residual.py.
#include "../kernels/bias_dropout_residual.cuh"
#include "pointwise.h"

namespace lightseq {
namespace {

// x (N, C), bias (C,), residual (N, C) -> y (N, C)
Tensor forward(Tensor x, Tensor bias, Tensor residual, double p, std::optional<Tensor> seed) {
  LIGHTSEQ_EXPECT(x.is_contiguous() && residual.is_contiguous());
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  Tensor y = torch::stable::empty_like(x);
  dispatch("bias_dropout_residual", x, [&](auto type) {
    using T = decltype(type);
    bias_dropout_residual::forward<T>(data<T>(y), data<T>(x), parameter(bias), data<T>(residual), dropout(p, seed),
                                      x.size(0), x.size(1), current_stream(x));
  });
  return y;
}

// dout (N, C), bias (C,) for its dtype -> dx (N, C), empty where p is 0, and dbias (C,)
std::tuple<Tensor, Tensor> backward(Tensor dout, Tensor bias, double p, std::optional<Tensor> seed) {
  LIGHTSEQ_EXPECT(dout.is_contiguous());
  const torch::stable::accelerator::DeviceGuard guard(dout.get_device_index());
  const cudaStream_t stream = current_stream(dout);
  Tensor dx = p > 0 ? torch::stable::empty_like(dout) : torch::stable::new_empty(dout, {0});
  Tensor partial = new_partial(dout, 1);
  dispatch("bias_dropout_residual", dout, [&](auto type) {
    using T = decltype(type);
    bias_dropout_residual::backward<T>(p > 0 ? data<T>(dx) : nullptr, data<float>(partial), data<T>(dout),
                                       dropout(p, seed), partial.size(0), dout.size(0), dout.size(1), stream);
  });
  return {dx, add_up<1>("bias_dropout_residual", partial, bias, stream)[0]};
}

}  // namespace
}  // namespace lightseq

STABLE_TORCH_LIBRARY_IMPL(lightseq, CUDA, m) {
  m.impl("bias_dropout_residual", TORCH_BOX(&lightseq::forward));
  m.impl("bias_dropout_residual_backward", TORCH_BOX(&lightseq::backward));
}
