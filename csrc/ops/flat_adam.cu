// lightseq::flat_adam_ on CUDA; schema and reference: lightseq_fairseq/ops/flat_adam.py.
#include "../kernels/flat_adam.cuh"
#include "binding.h"

namespace lightseq {
namespace {

// master, exp_avg, exp_avg_sq (P,) fp32; param, grad (Q,) of one dtype, param perhaps the master itself;
// steps () int64, norm () fp32; segments (S, 3) int64; lr (), multiplier () fp32
void flat_adam_(Tensor master, Tensor exp_avg, Tensor exp_avg_sq, Tensor param, Tensor steps, Tensor norm, Tensor grad,
                Tensor segments, Tensor lr, Tensor multiplier, double max_norm, double beta1, double beta2, double eps,
                double weight_decay) {
  LIGHTSEQ_EXPECT(master.is_contiguous() && exp_avg.is_contiguous() && exp_avg_sq.is_contiguous());
  LIGHTSEQ_EXPECT(param.is_contiguous() && grad.is_contiguous() && segments.is_contiguous());
  static_assert(sizeof(flat_adam::Segment) == 3 * sizeof(int64_t));
  const torch::stable::accelerator::DeviceGuard guard(master.get_device_index());
  dispatch("flat_adam_", grad, [&](auto type) {
    using T = decltype(type);
    Tensor factors = new_float(master, {5});
    Tensor partial = new_float(master, {flat_adam::partials_for<T>(grad.numel())});
    T* copy = param.data_ptr() == master.data_ptr() ? nullptr : data<T>(param);
    flat_adam::step<T>(data<float>(master), data<float>(exp_avg), data<float>(exp_avg_sq), copy, data<T>(grad),
                       grad.numel(), data<flat_adam::Segment>(segments), segments.size(0), data<float>(factors),
                       data<float>(norm), data<long>(steps), data<float>(partial), data<float>(lr),
                       data<float>(multiplier), max_norm, beta1, beta2, eps, weight_decay, current_stream(master));
  });
}

}  // namespace
}  // namespace lightseq

STABLE_TORCH_LIBRARY_IMPL(lightseq, CUDA, m) { m.impl("flat_adam_", TORCH_BOX(&lightseq::flat_adam_)); }
