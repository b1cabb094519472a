// lightseq::decode_head_map on CUDA; schema and reference: lightseq_fairseq/ops/decode_head_map.py.
#include "../kernels/decode_head_map.cuh"

#include "binding.h"

namespace lightseq {
namespace {

// x (R, H * D), weight (H, D, O) -> (R, H, O)
Tensor forward(Tensor x, Tensor weight) {
  const int64_t rows = x.size(0), heads = weight.size(0), outer = weight.size(2);
  LIGHTSEQ_EXPECT(x.is_contiguous() && weight.is_contiguous() && rows > 0);
  LIGHTSEQ_EXPECT(weight.size(1) == decode_head_map::kDim && outer % decode_head_map::kOutputs == 0);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  Tensor out = torch::stable::new_empty(x, {rows, heads, outer});
  dispatch_16_bits("decode_head_map", x, [&](auto type) {
    using T = decltype(type);
    decode_head_map::forward<T>(data<T>(out), data<T>(x), data<T>(weight), rows, heads, outer, current_stream(x));
  });
  return out;
}

}  // namespace
}  // namespace lightseq

STABLE_TORCH_LIBRARY_IMPL(lightseq, CUDA, m) { m.impl("decode_head_map", TORCH_BOX(&lightseq::forward)); }
