// lightseq::layer_norm on CUDA; schema and reference: lightseq_fairseq/ops/layer_norm.py.
#include "../kernels/layer_norm.cuh"
#include "pointwise.h"

namespace lightseq {
namespace {

// x (N, C), weight (C,), bias (C,) -> y (N, C), mean (N,), rstd (N,) fp32
std::tuple<Tensor, Tensor, Tensor> forward(Tensor x, Tensor weight, Tensor bias, double eps) {
  LIGHTSEQ_EXPECT(x.is_contiguous());
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const int64_t rows = x.size(0), columns = x.size(1);
  Tensor y = torch::stable::empty_like(x), mean = new_float(x, {rows}), rstd = new_float(x, {rows});
  dispatch("layer_norm", x, [&](auto type) {
    using T = decltype(type);
    const layer_norm::Plain<T> step{data<T>(x), nullptr};
    layer_norm::forward<T>(data<T>(y), data<float>(mean), data<float>(rstd), step, in_octets(columns, {step.x}),
                           parameter(weight), parameter(bias), rows, columns, eps, current_stream(x));
  });
  return {y, mean, rstd};
}

// dout (N, C), x (N, C), weight (C,), mean (N,), rstd (N,) -> dx (N, C), dweight (C,), dbias (C,)
std::tuple<Tensor, Tensor, Tensor> backward(Tensor dout, Tensor x, Tensor weight, Tensor mean, Tensor rstd) {
  LIGHTSEQ_EXPECT(dout.is_contiguous() && x.is_contiguous());
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const cudaStream_t stream = current_stream(x);
  const int64_t rows = x.size(0), columns = x.size(1);
  Tensor dx = torch::stable::empty_like(x), partial = new_float(x, {layer_norm::chunks(rows, columns), 2, columns});
  dispatch("layer_norm", x, [&](auto type) {
    using T = decltype(type);
    const layer_norm::Plain<T> step{nullptr, data<T>(dx)};
    layer_norm::backward<T>(data<float>(partial), step, in_octets(columns, {step.dx}), data<T>(dout), data<T>(x),
                            data<float>(mean), data<float>(rstd), parameter(weight), partial.size(0), rows, columns,
                            stream);
  });
  const auto [dweight, dbias] = add_up<2>("layer_norm", partial, weight, stream);
  return {dx, dweight, dbias};
}

}  // namespace
}  // namespace lightseq

STABLE_TORCH_LIBRARY_IMPL(lightseq, CUDA, m) {
  m.impl("layer_norm", TORCH_BOX(&lightseq::forward));
  m.impl("layer_norm_backward", TORCH_BOX(&lightseq::backward));
}
