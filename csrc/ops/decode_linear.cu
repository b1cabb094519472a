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

// Blocks that share a row: 1, 2, 4 or 8.
int splits_of(int64_t inner) {
  int splits = 1;
  while (splits <= 8 && (inner % (16 * splits) != 0 || inner / splits > decode_linear::kMaxChunk)) splits *= 2;
  STD_TORCH_CHECK(splits <= 8, "decode_linear: no kernel for rows of ", inner, " columns");
  return splits;
}

// x (R, I), weight (O, I), bias (O,), residual (R, O), norm_weight, norm_bias (I,) -> out (R, O), normed (R, I) or
// empty
std::tuple<Tensor, Tensor> forward(Tensor x, Tensor weight, std::optional<Tensor> bias, std::string activation,
                                   std::optional<Tensor> residual, std::optional<Tensor> norm_weight,
                                   std::optional<Tensor> norm_bias, double eps, bool keep) {
  LIGHTSEQ_EXPECT(x.is_contiguous() && weight.is_contiguous() && (!residual || residual->is_contiguous()));
  LIGHTSEQ_EXPECT(weight.size(0) % kOctet == 0 && x.size(0) > 0 && weight.size(0) > 0);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  Tensor out = torch::stable::new_empty(x, {x.size(0), weight.size(0)});
  Tensor normed = keep ? torch::stable::empty_like(x) : torch::stable::new_empty(x, {0});
  const auto run = [&](auto type) {
    using T = decltype(type);
    const auto pointer = [](const std::optional<Tensor>& tensor) { return tensor ? data<T>(*tensor) : nullptr; };
    const decode_linear::Operands<T> operands{data<T>(out),
                                              keep ? data<T>(normed) : nullptr,
                                              data<T>(x),
                                              data<T>(weight),
                                              pointer(bias),
                                              pointer(residual),
                                              pointer(norm_weight),
                                              pointer(norm_bias),
                                              static_cast<int>(x.size(0)),
                                              static_cast<int>(weight.size(0)),
                                              static_cast<int>(x.size(1)),
                                              splits_of(x.size(1)),
                                              static_cast<float>(eps),
                                              activation_of(activation)};
    for (const void* p :
         {static_cast<const void*>(operands.x), static_cast<const void*>(operands.weight),
          static_cast<const void*>(operands.bias), static_cast<const void*>(operands.residual),
          static_cast<const void*>(operands.norm_weight), static_cast<const void*>(operands.norm_bias)}) {
      LIGHTSEQ_EXPECT(reinterpret_cast<uintptr_t>(p) % 16 == 0);
    }
    decode_linear::forward<T>(operands, current_stream(x));
  };
  if (x.scalar_type() == ScalarType::Half) {
    run(__half{});
  } else {
    LIGHTSEQ_EXPECT(x.scalar_type() == ScalarType::BFloat16);
    run(__nv_bfloat16{});
  }
  return {out, normed};
}

}  // namespace
}  // namespace lightseq

STABLE_TORCH_LIBRARY_IMPL(lightseq, CUDA, m) { m.impl("decode_linear", TORCH_BOX(&lightseq::forward)); }
