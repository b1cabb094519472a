// lightseq::fp8_cast, fp8_cast_many_ and fp8_scale_ on CUDA; schema and reference: lightseq_fairseq/ops/fp8_cast.py.
// Eight bits cross the border as uint8, which every version of the stable ABI knows.
#include "../kernels/fp8_cast.cuh"

#include <tuple>

#include "binding.h"

namespace lightseq {
namespace {

Tensor new_bytes(const Tensor& like, std::initializer_list<int64_t> size) {
  return torch::stable::new_empty(like, size, ScalarType::Byte);
}

// x (R, C), scale, amax (1,) -> (R, C) and (C, R) uint8, or (0,) for what is not wanted
std::tuple<Tensor, Tensor> cast(Tensor x, Tensor scale, Tensor amax, bool e5m2, bool rows, bool columns) {
  LIGHTSEQ_EXPECT(x.is_contiguous() && x.dim() == 2);
  LIGHTSEQ_EXPECT(scale.scalar_type() == ScalarType::Float && amax.scalar_type() == ScalarType::Float);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const int64_t R = x.size(0), C = x.size(1);
  Tensor eight = rows ? new_bytes(x, {R, C}) : new_bytes(x, {0});
  Tensor transposed = columns ? new_bytes(x, {C, R}) : new_bytes(x, {0});
  uint8_t* to_rows = rows ? data<uint8_t>(eight) : nullptr;
  uint8_t* to_columns = columns ? data<uint8_t>(transposed) : nullptr;
  dispatch_16_bits("fp8_cast", x, [&](auto type) {
    using T = decltype(type);
    const auto launch = e5m2 ? fp8_cast::launch<T, __NV_E5M2> : fp8_cast::launch<T, __NV_E4M3>;
    launch(to_rows, to_columns, data<float>(amax), data<T>(x), data<float>(scale), R, C, current_stream(x));
  });
  return {eight, transposed};
}

// rows, columns (Q,) uint8; amax, scale (M,); param (P,); matrices (M, 4), tiles (T, 3) int64
void cast_many(Tensor rows, Tensor columns, Tensor amax, Tensor param, Tensor scale, Tensor matrices,
               Tensor tiles) {
  LIGHTSEQ_EXPECT(rows.is_contiguous() && columns.is_contiguous() && amax.is_contiguous());
  LIGHTSEQ_EXPECT(param.is_contiguous() && scale.is_contiguous());
  LIGHTSEQ_EXPECT(matrices.is_contiguous() && tiles.is_contiguous());
  static_assert(sizeof(fp8_cast::Matrix) == 4 * sizeof(int64_t) && sizeof(fp8_cast::Tile) == 3 * sizeof(int64_t));
  const torch::stable::accelerator::DeviceGuard guard(param.get_device_index());
  dispatch_16_bits("fp8_cast_many_", param, [&](auto type) {
    using T = decltype(type);
    fp8_cast::launch_many<T>(data<uint8_t>(rows), data<uint8_t>(columns), data<float>(amax), data<T>(param),
                             data<float>(scale), data<fp8_cast::Matrix>(matrices), data<fp8_cast::Tile>(tiles),
                             tiles.size(0), current_stream(param));
  });
}

// amax, scale, limit (S,), inverse (S,) of any stride, history (S, H)
void update_scales(Tensor amax, Tensor history, Tensor scale, Tensor inverse, Tensor limit) {
  LIGHTSEQ_EXPECT(amax.is_contiguous() && history.is_contiguous() && scale.is_contiguous());
  LIGHTSEQ_EXPECT(limit.is_contiguous());
  const torch::stable::accelerator::DeviceGuard guard(amax.get_device_index());
  fp8_cast::launch_update_scales(data<float>(amax), data<float>(history), data<float>(scale), data<float>(inverse),
                                 inverse.stride(0), data<float>(limit), history.size(0), history.size(1), current_stream(amax));
}

}  // namespace
}  // namespace lightseq

STABLE_TORCH_LIBRARY_IMPL(lightseq, CUDA, m) {
  m.impl("fp8_cast", TORCH_BOX(&lightseq::cast));
  m.impl("fp8_cast_many_", TORCH_BOX(&lightseq::cast_many));
  m.impl("fp8_scale_", TORCH_BOX(&lightseq::update_scales));
}
