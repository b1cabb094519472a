// lightseq::bias_activation_dropout on CUDA; schema and reference: lightseq_fairseq/ops/bias_activation_dropout.py.
#include <string>

#include "../kernels/bias_activation_dropout.cuh"
#include "pointwise.h"

namespace lightseq {
namespace {

// Calls f(A{}) with the activation of fairseq's name.
template <typename F>
void dispatch_activation(const std::string& name, F&& f) {
  namespace activations = bias_activation_dropout;
  if (name == "relu") return f(activations::Relu{});
  if (name == "relu_squared") return f(activations::ReluSquared{});
  if (name == "gelu") return f(activations::Gelu{});
  if (name == "gelu_accurate" || name == "gelu_fast") return f(activations::GeluTanh{});
  if (name == "swish") return f(activations::Swish{});
  if (name == "tanh") return f(activations::Tanh{});
  if (name == "linear") return f(activations::Linear{});
  STD_TORCH_CHECK(false, "bias_activation_dropout: unknown activation ", name);
}

// x (N, I), bias (I,) -> y (N, I)
Tensor forward(Tensor x, Tensor bias, std::string activation, double p, std::optional<Tensor> seed) {
  LIGHTSEQ_EXPECT(x.is_contiguous());
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  Tensor y = torch::stable::empty_like(x);
  dispatch("bias_activation_dropout", x, [&](auto type) {
    using T = decltype(type);
    dispatch_activation(activation, [&](auto function) {
      bias_activation_dropout::forward<T, decltype(function)>(data<T>(y), data<T>(x), parameter(bias), dropout(p, seed),
                                                              x.size(0), x.size(1), current_stream(x));
    });
  });
  return y;
}

// dout (N, I), saved (N, I), bias (I,) -> dx (N, I), dbias (I,)
std::tuple<Tensor, Tensor> backward(Tensor dout, Tensor saved, Tensor bias, std::string activation, double p,
                                    std::optional<Tensor> seed) {
  LIGHTSEQ_EXPECT(dout.is_contiguous() && saved.is_contiguous());
  const torch::stable::accelerator::DeviceGuard guard(dout.get_device_index());
  const cudaStream_t stream = current_stream(dout);
  Tensor dx = torch::stable::empty_like(dout), partial = new_partial(dout, 1);
  dispatch("bias_activation_dropout", dout, [&](auto type) {
    using T = decltype(type);
    dispatch_activation(activation, [&](auto function) {
      bias_activation_dropout::backward<T, decltype(function)>(data<T>(dx), data<float>(partial), data<T>(dout),
                                                               data<T>(saved), parameter(bias), dropout(p, seed),
                                                               partial.size(0), dout.size(0), dout.size(1), stream);
    });
  });
  return {dx, add_up<1>("bias_activation_dropout", partial, bias, stream)[0]};
}

}  // namespace
}  // namespace lightseq

STABLE_TORCH_LIBRARY_IMPL(lightseq, CUDA, m) {
  m.impl("bias_activation_dropout", TORCH_BOX(&lightseq::forward));
  m.impl("bias_activation_dropout_backward", TORCH_BOX(&lightseq::backward));
}
