// lightseq::attention on CUDA; schema and reference: lightseq_fairseq/ops/attention.py.
#include <optional>
#include <type_traits>
#include <vector>

#include "../kernels/attention_plain.cuh"
#include "../kernels/attention_tiles.cuh"
#include "../kernels/attention_tiles_backward.cuh"
#include "../kernels/attention_warpgroups.cuh"
#include "binding.h"

namespace lightseq {
namespace {

using attention::Heads, attention::Problem, attention::Wide;
using Parts = std::vector<Tensor>;  // q, k, v | q, kv (Nk, 2, H, D) | qkv (N, 3, H, D)

// Where q, k and v (0, 1, 2) lie in the parts.
template <typename T>
Heads<T> heads(const Parts& parts, int which) {
  const int part = min(which, static_cast<int>(parts.size()) - 1), slice = which - part;
  const Tensor& x = parts[part];
  LIGHTSEQ_EXPECT(x.stride(x.dim() - 1) == 1 || x.size(x.dim() - 1) == 1 || x.numel() == 0);
  T* const first = reinterpret_cast<T*>(x.data_ptr()) + (x.dim() == 4 ? slice * x.stride(1) : 0);
  const int64_t token_stride = x.stride(0), head_stride = x.stride(x.dim() - 2);
  LIGHTSEQ_EXPECT(token_stride <= UINT32_MAX && head_stride <= UINT32_MAX && x.size(0) <= INT32_MAX);
  return {first, static_cast<unsigned>(token_stride), static_cast<unsigned>(head_stride)};
}

template <typename T>
Heads<T> heads(const Tensor& x) {
  return heads<T>(Parts{x}, 0);
}

// What the tensor cores take: 16-bit types, rows that start at multiples of 16 bytes and end there, a positive scale.
template <typename T>
bool in_vectors(const Problem& p, std::initializer_list<Heads<const T>> all) {
  bool fits = sizeof(T) == 2 && p.head_dim % 8 == 0 && p.scale > 0;
  for (const auto& x : all) {
    fits = fits && reinterpret_cast<uintptr_t>(x.data) % 16 == 0 && x.token_stride % 8 == 0 && x.head_stride % 8 == 0;
  }
  return fits;
}

template <typename F>
void dispatch_all(const Tensor& tensor, F&& f) {
  if (tensor.scalar_type() == ScalarType::Double) return f(double{});
  dispatch("attention", tensor, f);
}

Problem problem(const Parts& parts, const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k, int64_t max_len_q,
                int64_t max_len_k, bool causal, double dropout_p, double scale, const std::optional<Tensor>& seed) {
  LIGHTSEQ_EXPECT(cu_seqlens_q.scalar_type() == ScalarType::Int && cu_seqlens_q.is_contiguous());
  LIGHTSEQ_EXPECT(cu_seqlens_k.scalar_type() == ScalarType::Int && cu_seqlens_k.is_contiguous());
  if (dropout_p > 0) LIGHTSEQ_EXPECT(seed.has_value() && seed->scalar_type() == ScalarType::Long);
  const Tensor &q = parts.front(), &k = parts[parts.size() == 1 ? 0 : 1];
  const int head_dim = q.size(q.dim() - 1);
  STD_TORCH_CHECK(head_dim <= attention::kMaxHeadDim, "attention: on CUDA the head size must be at most ",
                  attention::kMaxHeadDim, ", got ", head_dim);
  Problem p;
  p.cu_seqlens_q = data<int>(cu_seqlens_q);
  p.cu_seqlens_k = data<int>(cu_seqlens_k);
  p.sentences = cu_seqlens_q.numel() - 1;
  p.heads = q.size(q.dim() - 2);
  p.head_dim = head_dim;
  p.tokens_q = q.size(0);
  p.tokens_k = k.size(0);
  p.max_len_q = max_len_q;
  p.max_len_k = max_len_k;
  p.causal = causal;
  p.scale = scale;
  p.dropout = make_dropout(dropout_p, seed ? data<long>(*seed) : nullptr);
  return p;
}

Tensor new_sums(const Tensor& like, const Problem& p) {
  const auto wide = like.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  return torch::stable::new_empty(like, {p.heads, p.tokens_q}, wide);
}

// -> out (Nq, H, D), lse (H, Nq)
std::tuple<Tensor, Tensor> forward(Parts parts, Tensor cu_seqlens_q, Tensor cu_seqlens_k, int64_t max_len_q,
                                   int64_t max_len_k, bool causal, double dropout_p, double scale,
                                   std::optional<Tensor> seed) {
  const Tensor& first = parts.front();
  const torch::stable::accelerator::DeviceGuard guard(first.get_device_index());
  const Problem p = problem(parts, cu_seqlens_q, cu_seqlens_k, max_len_q, max_len_k, causal, dropout_p, scale, seed);
  const cudaStream_t stream = current_stream(first);
  Tensor out = torch::stable::new_empty(first, {p.tokens_q, p.heads, p.head_dim}), lse = new_sums(first, p);
  dispatch_all(first, [&](auto type) {
    using T = decltype(type);
    const auto q = heads<const T>(parts, 0), k = heads<const T>(parts, 1), v = heads<const T>(parts, 2);
    if constexpr (sizeof(T) == 2) {
      if (in_vectors<T>(p, {q, k, v})) {
        if (attention::forward_on_warpgroups<T>(heads<T>(out), data<float>(lse), q, k, v, p, stream)) return;
        return attention::forward_on_tensor_cores<T>(heads<T>(out), data<float>(lse), q, k, v, p, most_shared_bytes(),
                                                     stream);
      }
    }
    attention::forward_plain<T>(heads<T>(out), data<Wide<T>>(lse), q, k, v, p, stream);
  });
  return {out, lse};
}

// dout, out (Nq, H, D), lse (H, Nq) -> the gradients of the parts, each contiguous
Parts backward(Tensor dout, Parts parts, Tensor out, Tensor lse, Tensor cu_seqlens_q, Tensor cu_seqlens_k,
               int64_t max_len_q, int64_t max_len_k, bool causal, double dropout_p, double scale,
               std::optional<Tensor> seed) {
  LIGHTSEQ_EXPECT(dout.is_contiguous() && out.is_contiguous() && lse.is_contiguous());
  const torch::stable::accelerator::DeviceGuard guard(dout.get_device_index());
  const Problem p = problem(parts, cu_seqlens_q, cu_seqlens_k, max_len_q, max_len_k, causal, dropout_p, scale, seed);
  const cudaStream_t stream = current_stream(dout);
  Tensor delta = new_sums(dout, p);
  Parts grads;
  for (const Tensor& part : parts) grads.push_back(torch::stable::new_empty(part, part.sizes()));
  dispatch_all(dout, [&](auto type) {
    using T = decltype(type);
    const auto q = heads<const T>(parts, 0), k = heads<const T>(parts, 1), v = heads<const T>(parts, 2);
    const auto dq = heads<T>(grads, 0), dk = heads<T>(grads, 1), dv = heads<T>(grads, 2);
    const auto dout_rows = heads<const T>(dout), out_rows = heads<const T>(out);
    if constexpr (sizeof(T) == 2) {
      if (in_vectors<T>(p, {q, k, v, dout_rows}) &&
          attention::backward_on_tensor_cores<T>(dq, dk, dv, data<float>(delta), dout_rows, out_rows, data<float>(lse),
                                                 q, k, v, p, most_shared_bytes(), stream)) {
        return;
      }
    }
    attention::backward_plain<T>(dq, dk, dv, data<Wide<T>>(delta), dout_rows, out_rows, data<Wide<T>>(lse), q, k, v, p,
                                 stream);
  });
  return grads;
}

}  // namespace
}  // namespace lightseq

STABLE_TORCH_LIBRARY_IMPL(lightseq, CUDA, m) {
  m.impl("attention", TORCH_BOX(&lightseq::forward));
  m.impl("attention_backward", TORCH_BOX(&lightseq::backward));
}
