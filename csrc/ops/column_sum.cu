// lightseq::column_sum_ on CUDA; schema and reference: lightseq_fairseq/ops/column_sum.py.
#include "pointwise.h"

namespace lightseq {
namespace {

// x (N, C) -> out (C,), written or added to
void column_sum_(Tensor out, Tensor x, bool add) {
  LIGHTSEQ_EXPECT(x.is_contiguous() && out.is_contiguous());
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const cudaStream_t stream = current_stream(x);
  const Tensor partial = new_partial(x, 1);
  dispatch("column_sum_", x, [&](auto type) {
    using T = decltype(type);
    const int chunks = partial.size(0), columns = x.size(1);
    column_sum::rows<T>(data<T>(x), data<float>(partial), chunks, x.size(0), columns, stream);
    column_sum::add_up<T, 1>({{data<T>(out)}}, data<float>(partial), chunks, columns, add, stream);
  });
}

}  // namespace
}  // namespace lightseq

STABLE_TORCH_LIBRARY_IMPL(lightseq, CUDA, m) { m.impl("column_sum_", TORCH_BOX(&lightseq::column_sum_)); }
