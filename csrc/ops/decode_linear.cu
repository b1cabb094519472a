// lightseq::decode_linear on CUDA; schema and reference: lightseq_fairseq/ops/decode_linear.py.
#include <optional>
#include <string>
#include <tuple>

#include "../kernels/decode_linear.cuh"
#include "binding.h"

namespace lightseq {
namespace {

using decode_linear::Activation;

Activation activation_of(const std::string& name) {
  if (name == "linear") return Activation::kLinear;
  if (name == "relu") return Activation::kRelu;
  if (name == "relu_squared") return Activation::kReluSquared;
  if (name == "gelu") return Activation::kGelu;
  if (name == "gelu_accurate" || name == "gelu_fast") return Activation::kGeluTanh;
  if (name == "swish") return Activation::kSwish;
  if (name == "tanh") return Activation::kTanh;
  STD_TORCH_CHECK(false, "decode_linear: unknown activation ", name);
}

// x (R, I), weight (O, I), bias (O,), sums (O,), moments (R, C / 16, 2), residual (R, O), gain, shift (O,) -> out
// (R, O), its moments (R, O / 16, 2) or nothing
std::tuple<Tensor, Tensor> forward(Tensor x, Tensor weight, std::optional<Tensor> bias, std::string activation,
                                   std::optional<Tensor> sums, std::optional<Tensor> moments,
                                   std::optional<Tensor> residual, std::optional<Tensor> gain,
                                   std::optional<Tensor> shift, double eps, bool collect) {
  const int64_t rows = x.size(0), inner = x.size(1), outer = weight.size(0);
  LIGHTSEQ_EXPECT(rows > 0 && outer > 0 && outer % (collect ? decode_linear::kMomentColumns : kOctet) == 0);
  LIGHTSEQ_EXPECT(!moments || (sums ? inner : outer) <= decode_linear::kMaxNormed);
  for (const std::optional<Tensor>& tensor :
       {std::optional(x), std::optional(weight), bias, sums, moments, residual, gain, shift}) {
    LIGHTSEQ_EXPECT(!tensor || (tensor->is_contiguous() && reinterpret_cast<uintptr_t>(tensor->data_ptr()) % 16 == 0));
  }
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  Tensor out = torch::stable::new_empty(x, {rows, outer});
  Tensor left = collect ? new_float(x, {rows, outer / decode_linear::kMomentColumns, 2}) : new_float(x, {0});
  dispatch_16_bits("decode_linear", x, [&](auto type) {
    using T = decltype(type);
    const auto pointer = [](const std::optional<Tensor>& tensor) { return tensor ? data<T>(*tensor) : nullptr; };
    const decode_linear::Operands<T> operands{data<T>(out),
                                              collect ? data<decode_linear::Moments>(left) : nullptr,
                                              data<T>(x),
                                              data<T>(weight),
                                              pointer(bias),
                                              pointer(residual),
                                              pointer(gain),
                                              pointer(shift),
                                              sums ? data<float>(*sums) : nullptr,
                                              moments ? data<decode_linear::Moments>(*moments) : nullptr,
                                              static_cast<int>(rows),
                                              static_cast<int>(outer),
                                              static_cast<int>(inner),
                                              1,
                                              static_cast<float>(eps),
                                              activation_of(activation)};
    LIGHTSEQ_EXPECT(decode_linear::forward<T>(operands, current_stream(x)));
  });
  return {out, left};
}

}  // namespace
}  // namespace lightseq

STABLE_TORCH_LIBRARY_IMPL(lightseq, CUDA, m) { m.impl("decode_linear", TORCH_BOX(&lightseq::forward)); }
