// lightseq::label_smoothed_cross_entropy on CUDA; schema and reference: lightseq_fairseq/ops/cross_entropy.py.
#include "../kernels/cross_entropy.cuh"
#include "binding.h"

namespace lightseq {
namespace {

// logits (N, V), targets (N,) -> loss_sum (), nll_sum (), lse (N,) fp32
std::tuple<Tensor, Tensor, Tensor> label_smoothed_cross_entropy(Tensor logits, Tensor targets, double epsilon,
                                                                int64_t ignore_index) {
  LIGHTSEQ_EXPECT(logits.is_contiguous() && targets.is_contiguous());
  const torch::stable::accelerator::DeviceGuard guard(logits.get_device_index());
  const int64_t rows = logits.size(0);
  Tensor loss_sum = new_float(logits, {}), nll_sum = new_float(logits, {}), lse = new_float(logits, {rows});
  Tensor loss = new_float(logits, {rows}), nll = new_float(logits, {rows});
  dispatch("label_smoothed_cross_entropy", logits, [&](auto type) {
    using T = decltype(type);
    cross_entropy::forward<T>(data<float>(loss_sum), data<float>(nll_sum), data<float>(loss), data<float>(nll),
                              data<float>(lse), data<T>(logits), data<long>(targets), rows, logits.size(1), epsilon,
                              ignore_index, current_stream(logits));
  });
  return {loss_sum, nll_sum, lse};
}

void run_backward(const Tensor& dlogits, const Tensor& dloss, const Tensor& logits, const Tensor& targets,
                  const Tensor& lse, double epsilon, int64_t ignore_index) {
  LIGHTSEQ_EXPECT(logits.is_contiguous() && targets.is_contiguous());
  LIGHTSEQ_EXPECT(dloss.scalar_type() == ScalarType::Float);
  const torch::stable::accelerator::DeviceGuard guard(logits.get_device_index());
  dispatch("label_smoothed_cross_entropy", logits, [&](auto type) {
    using T = decltype(type);
    cross_entropy::backward<T>(data<T>(dlogits), data<float>(dloss), data<T>(logits), data<long>(targets),
                               data<float>(lse), logits.size(0), logits.size(1), epsilon, ignore_index,
                               current_stream(logits));
  });
}

// dloss () fp32 -> dlogits (N, V)
Tensor label_smoothed_cross_entropy_backward(Tensor dloss, Tensor logits, Tensor targets, Tensor lse, double epsilon,
                                             int64_t ignore_index) {
  Tensor dlogits = torch::stable::empty_like(logits);
  run_backward(dlogits, dloss, logits, targets, lse, epsilon, ignore_index);
  return dlogits;
}

// The same, written over the logits.
void label_smoothed_cross_entropy_backward_(Tensor logits, Tensor dloss, Tensor targets, Tensor lse, double epsilon,
                                            int64_t ignore_index) {
  run_backward(logits, dloss, logits, targets, lse, epsilon, ignore_index);
}

}  // namespace
}  // namespace lightseq

STABLE_TORCH_LIBRARY_IMPL(lightseq, CUDA, m) {
  m.impl("label_smoothed_cross_entropy", TORCH_BOX(&lightseq::label_smoothed_cross_entropy));
  m.impl("label_smoothed_cross_entropy_backward", TORCH_BOX(&lightseq::label_smoothed_cross_entropy_backward));
  m.impl("label_smoothed_cross_entropy_backward_", TORCH_BOX(&lightseq::label_smoothed_cross_entropy_backward_));
}
