// lightseq::decode_self_block and decode_cross_block on CUDA; schemas and references:
// lightseq_fairseq/ops/decode_block.py.
#include "../kernels/decode_block.cuh"

#include <optional>
#include <tuple>

#include "decode_past.h"

namespace lightseq {
namespace {

using Made = std::tuple<Tensor, Tensor>;

void expect_aligned(std::initializer_list<std::optional<Tensor>> tensors) {
  for (const std::optional<Tensor>& tensor : tensors) {
    LIGHTSEQ_EXPECT(!tensor || (tensor->is_contiguous() && reinterpret_cast<uintptr_t>(tensor->data_ptr()) % 16 == 0));
  }
}

// Room for out (R, E) and its moments (R, E / 16, 2), the latter if asked for.
Made room(const Tensor& residual, bool collect) {
  const int64_t rows = residual.size(0), tiles = residual.size(1) / decode_linear::kMomentColumns;
  return {torch::stable::empty_like(residual), collect ? new_float(residual, {rows, tiles, 2}) : new_float(residual, {0})};
}

template <typename T>
decode_block::Output<T> output_of(const Made& made, bool collect, const Tensor& weight, const Tensor& bias,
                                  const Tensor& residual, const std::optional<Tensor>& moments,
                                  const std::optional<Tensor>& gain, const std::optional<Tensor>& shift, double eps) {
  using decode_linear::Moments;
  return {data<T>(std::get<0>(made)),
          collect ? data<Moments>(std::get<1>(made)) : nullptr,
          data<T>(weight),
          data<T>(bias),
          data<T>(residual),
          gain ? data<T>(*gain) : nullptr,
          shift ? data<T>(*shift) : nullptr,
          moments ? data<Moments>(*moments) : nullptr,
          static_cast<float>(eps)};
}

// qkv (R, 3, H, D), cache (2, B, H, T * K, D), ancestors (B, K, T), steps (B,), before (N, 2, H, D) and cu_seqlens or
// neither, weight (E, E), bias, gain, shift (E,), residual (R, E), moments (R, E / 16, 2) -> out (R, E), its moments
Made self_block(Tensor qkv, Tensor cache, Tensor ancestors, Tensor steps, std::optional<Tensor> before,
                std::optional<Tensor> cu_seqlens, Tensor weight, Tensor bias, Tensor residual,
                std::optional<Tensor> moments, std::optional<Tensor> gain, std::optional<Tensor> shift, double eps,
                bool collect) {
  LIGHTSEQ_EXPECT(qkv.size(0) > 0 && decode_block::fits(qkv.size(2), qkv.size(3), ancestors.size(1)));
  LIGHTSEQ_EXPECT(before.has_value() == cu_seqlens.has_value() && moments.has_value() == gain.has_value());
  expect_aligned({qkv, cache, before, weight, bias, residual, moments, gain, shift});
  LIGHTSEQ_EXPECT(ancestors.is_contiguous() && (!cu_seqlens || cu_seqlens->is_contiguous()));
  const torch::stable::accelerator::DeviceGuard guard(qkv.get_device_index());
  const Made made = room(residual, collect);
  dispatch_16_bits("decode_self_block", qkv, [&](auto type) {
    using T = decltype(type);
    decode_block::self<T>(past_of<T>(qkv, cache, ancestors, steps, before, cu_seqlens),
                          output_of<T>(made, collect, weight, bias, residual, moments, gain, shift, eps),
                          ancestors.size(0), current_stream(qkv));
  });
  return made;
}

// x (R, E), moments (R, E / 16, 2), query_weight, weight (E, E), query_bias, bias, gain, shift (E,), sums (E,),
// keys_values (N, 2, H, D), cu_seqlens (B + 1,) or (B, 2) -> out (R, E), its moments
Made cross_block(Tensor x, Tensor moments, Tensor query_weight, Tensor query_bias, Tensor sums, Tensor keys_values,
                 Tensor cu_seqlens, int64_t beam, Tensor weight, Tensor bias, std::optional<Tensor> gain,
                 std::optional<Tensor> shift, double eps, bool collect) {
  const int64_t rows = x.size(0), heads = keys_values.size(2), dim = keys_values.size(3);
  LIGHTSEQ_EXPECT(rows > 0 && heads * dim == x.size(1) && decode_block::fits(heads, dim, beam));
  expect_aligned({x, moments, query_weight, query_bias, sums, keys_values, weight, bias, gain, shift});
  LIGHTSEQ_EXPECT(cu_seqlens.is_contiguous() && gain.has_value() == shift.has_value());
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const Made made = room(x, collect);
  dispatch_16_bits("decode_cross_block", x, [&](auto type) {
    using T = decltype(type);
    const decode_block::Source<T> source{data<T>(query_weight),    data<T>(query_bias),   data<float>(sums),
                                         data<T>(keys_values),     data<int>(cu_seqlens), cu_seqlens.dim() == 2 ? 2 : 1};
    decode_block::cross<T>(source, output_of<T>(made, collect, weight, bias, x, moments, gain, shift, eps), rows / beam,
                           beam, heads, dim, current_stream(x));
  });
  return made;
}

}  // namespace
}  // namespace lightseq

STABLE_TORCH_LIBRARY_IMPL(lightseq, CUDA, m) {
  m.impl("decode_self_block", TORCH_BOX(&lightseq::self_block));
  m.impl("decode_cross_block", TORCH_BOX(&lightseq::cross_block));
}
