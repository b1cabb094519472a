// Attention for what the tensor cores do not take: fp32, fp64, head sizes not a multiple of 8, sentences of any length.
//
// One warp a query (forward, dq) or a key (dk, dv). It takes the other side in runs of 32: a lane scores one of
// them, then the lanes share out the D columns and sum over the run. Arithmetic in fp32, in fp64 for fp64.
#pragma once

#include <type_traits>

#include "attention.cuh"

namespace lightseq {
namespace attention {

constexpr int kRowWarps = 4, kMaxHeadDim = 256, kLaneColumns = kMaxHeadDim / kWarp;

template <typename T>
using Wide = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <typename A>
__device__ __forceinline__ A sum_of_warp(A x) {
#pragma unroll
  for (int apart = kWarp / 2; apart > 0; apart /= 2) x += __shfl_xor_sync(0xffffffffu, x, apart);
  return x;
}

template <typename A>
__device__ __forceinline__ A max_of_warp(A x) {
#pragma unroll
  for (int apart = kWarp / 2; apart > 0; apart /= 2) x = max(x, __shfl_xor_sync(0xffffffffu, x, apart));
  return x;
}

template <typename A, typename T>
__device__ __forceinline__ A dot(const A* a, const T* b, int count) {
  A sum = 0;
  for (int d = 0; d < count; ++d) sum += a[d] * static_cast<A>(b[d]);
  return sum;
}

template <typename A, typename T>
__device__ __forceinline__ void widen_row(A* to, const T* from, int count) {
  for (int d = threadIdx.x % kWarp; d < count; d += kWarp) to[d] = static_cast<A>(from[d]);
}

// sum += weight row, this lane's columns
template <typename A, typename T>
__device__ __forceinline__ void add_row(A (&sum)[kLaneColumns], A weight, const T* row, int count) {
#pragma unroll
  for (int i = 0; i < kLaneColumns; ++i) {
    const int d = threadIdx.x % kWarp + i * kWarp;
    if (d < count) sum[i] += weight * static_cast<A>(row[d]);
  }
}

template <typename A, typename T>
__device__ __forceinline__ void write_row(T* to, const A (&from)[kLaneColumns], A factor, int count) {
#pragma unroll
  for (int i = 0; i < kLaneColumns; ++i) {
    const int d = threadIdx.x % kWarp + i * kWarp;
    if (d < count) to[d] = static_cast<T>(from[i] * factor);
  }
}

// ----------------------------------------------------------------------------------------------------------------
// CUDA kernels. Grid: ((B + 1) H, tiles of kRowWarps queries or keys). Shapes as in attention_tiles.cuh; delta (H, Nq).

template <typename T>
__global__ void __launch_bounds__(kRowWarps* kWarp)
    forward_queries(Heads<T> out, Wide<T>* lse, Heads<const T> q, Heads<const T> k, Heads<const T> v, Problem p) {
  using A = Wide<T>;
  __shared__ A q_rows[kRowWarps][kMaxHeadDim];
  const int head = blockIdx.x % p.heads, sentence = blockIdx.x / p.heads;
  const Span span(p, sentence);
  if (!span.real) {
    if (blockIdx.y == 0) clear_rows(out, span.q_begin, span.q_len, head, p.head_dim);
    return;
  }
  const int lane = threadIdx.x % kWarp, query = blockIdx.y * kRowWarps + threadIdx.x / kWarp;
  if (query >= span.q_len) return;
  A* const q_row = q_rows[threadIdx.x / kWarp];
  widen_row(q_row, q.row(span.q_begin + query, head), p.head_dim);
  __syncwarp();

  const ProbabilityMask mask(p.dropout, sentence, head);
  const int seen = span.visible(query);
  A o[kLaneColumns] = {}, top = -INFINITY, sum = 0;
  for (int base = 0; base < seen; base += kWarp) {
    const int key = base + lane;
    const A s = key < seen ? dot(q_row, k.row(span.k_begin + key, head), p.head_dim) * static_cast<A>(p.scale)
                           : static_cast<A>(-INFINITY);
    const A peak = max(top, max_of_warp(s)), shrink = exp(top - peak), e = exp(s - peak);
    const A weight = mask.kept_one(query, key) ? e : A(0);
    sum = sum * shrink + sum_of_warp(e);
    top = peak;
#pragma unroll
    for (int i = 0; i < kLaneColumns; ++i) o[i] *= shrink;
    for (int j = 0; j < min(kWarp, seen - base); ++j) {
      add_row(o, __shfl_sync(0xffffffffu, weight, j), v.row(span.k_begin + base + j, head), p.head_dim);
    }
  }
  write_row(out.row(span.q_begin + query, head), o, sum > 0 ? static_cast<A>(p.dropout.scale) / sum : A(0), p.head_dim);
  if (lane == 0) lse[head * p.tokens_q + span.q_begin + query] = sum > 0 ? top + log(sum) : static_cast<A>(INFINITY);
}

// Also writes delta = sum(dout * out), which backward_keys reads.
template <typename T>
__global__ void __launch_bounds__(kRowWarps* kWarp)
    backward_queries(Heads<T> dq, Wide<T>* delta, Heads<const T> dout, Heads<const T> out, const Wide<T>* lse,
                     Heads<const T> q, Heads<const T> k, Heads<const T> v, Problem p) {
  using A = Wide<T>;
  __shared__ A q_rows[kRowWarps][kMaxHeadDim], dout_rows[kRowWarps][kMaxHeadDim];
  const int head = blockIdx.x % p.heads, sentence = blockIdx.x / p.heads;
  const Span span(p, sentence);
  if (!span.real) {
    if (blockIdx.y == 0) clear_rows(dq, span.q_begin, span.q_len, head, p.head_dim);
    return;
  }
  const int lane = threadIdx.x % kWarp, query = blockIdx.y * kRowWarps + threadIdx.x / kWarp;
  if (query >= span.q_len) return;
  const long row = span.q_begin + query;
  A *const q_row = q_rows[threadIdx.x / kWarp], *const dout_row = dout_rows[threadIdx.x / kWarp];
  widen_row(q_row, q.row(row, head), p.head_dim);
  widen_row(dout_row, dout.row(row, head), p.head_dim);
  __syncwarp();
  A product = 0;
  for (int d = lane; d < p.head_dim; d += kWarp) product += dout_row[d] * static_cast<A>(out.row(row, head)[d]);
  product = sum_of_warp(product);
  if (lane == 0) delta[head * p.tokens_q + row] = product;

  const ProbabilityMask mask(p.dropout, sentence, head);
  const A scale = static_cast<A>(p.scale), log_sum = lse[head * p.tokens_q + row];
  const int seen = span.visible(query);
  A sum[kLaneColumns] = {};
  for (int base = 0; base < seen; base += kWarp) {
    const int key = base + lane;
    A ds = 0;
    if (key < seen) {
      const A e = exp(dot(q_row, k.row(span.k_begin + key, head), p.head_dim) * scale - log_sum);
      const A dp = dot(dout_row, v.row(span.k_begin + key, head), p.head_dim) * static_cast<A>(p.dropout.scale);
      ds = e * ((mask.kept_one(query, key) ? dp : A(0)) - product);
    }
    for (int j = 0; j < min(kWarp, seen - base); ++j) {
      add_row(sum, __shfl_sync(0xffffffffu, ds, j), k.row(span.k_begin + base + j, head), p.head_dim);
    }
  }
  write_row(dq.row(row, head), sum, scale, p.head_dim);
}

template <typename T>
__global__ void __launch_bounds__(kRowWarps* kWarp)
    backward_keys(Heads<T> dk, Heads<T> dv, const Wide<T>* delta, Heads<const T> dout, const Wide<T>* lse,
                  Heads<const T> q, Heads<const T> k, Heads<const T> v, Problem p) {
  using A = Wide<T>;
  __shared__ A k_rows[kRowWarps][kMaxHeadDim], v_rows[kRowWarps][kMaxHeadDim];
  const int head = blockIdx.x % p.heads, sentence = blockIdx.x / p.heads;
  const Span span(p, sentence);
  if (!span.real) {
    if (blockIdx.y == 0) clear_rows(dk, span.k_begin, span.k_len, head, p.head_dim);
    if (blockIdx.y == 0) clear_rows(dv, span.k_begin, span.k_len, head, p.head_dim);
    return;
  }
  const int lane = threadIdx.x % kWarp, key = blockIdx.y * kRowWarps + threadIdx.x / kWarp;
  if (key >= span.k_len) return;
  A *const k_row = k_rows[threadIdx.x / kWarp], *const v_row = v_rows[threadIdx.x / kWarp];
  widen_row(k_row, k.row(span.k_begin + key, head), p.head_dim);
  widen_row(v_row, v.row(span.k_begin + key, head), p.head_dim);
  __syncwarp();

  const ProbabilityMask mask(p.dropout, sentence, head);
  const A scale = static_cast<A>(p.scale), dropout_scale = p.dropout.scale;
  const long sums = head * p.tokens_q + span.q_begin;  // of this sentence in lse and delta
  A dk_sum[kLaneColumns] = {}, dv_sum[kLaneColumns] = {};
  const int first = p.causal ? max(0, key - (span.k_len - span.q_len)) : 0;  // query that sees this key
  for (int base = first; base < span.q_len; base += kWarp) {
    const int query = base + lane;
    A mp = 0, ds = 0;
    if (query < span.q_len) {
      const A e = exp(dot(k_row, q.row(span.q_begin + query, head), p.head_dim) * scale - lse[sums + query]);
      const A dp = dot(v_row, dout.row(span.q_begin + query, head), p.head_dim) * dropout_scale;
      const bool keep = mask.kept_one(query, key);
      mp = keep ? e * dropout_scale : A(0);
      ds = e * ((keep ? dp : A(0)) - delta[sums + query]);
    }
    for (int i = 0; i < min(kWarp, span.q_len - base); ++i) {
      const long row = span.q_begin + base + i;
      add_row(dk_sum, __shfl_sync(0xffffffffu, ds, i), q.row(row, head), p.head_dim);
      add_row(dv_sum, __shfl_sync(0xffffffffu, mp, i), dout.row(row, head), p.head_dim);
    }
  }
  write_row(dk.row(span.k_begin + key, head), dk_sum, scale, p.head_dim);
  write_row(dv.row(span.k_begin + key, head), dv_sum, A(1), p.head_dim);
}

// ----------------------------------------------------------------------------------------------------------------
// kernel launchers

inline dim3 row_grid(const Problem& p, int max_len) {
  return dim3((p.sentences + 1) * p.heads, max(1, ceil_div(max_len, kRowWarps)));
}

template <typename T>
void forward_row_by_row(const Heads<T>& out, Wide<T>* lse, const Heads<const T>& q, const Heads<const T>& k,
                        const Heads<const T>& v, const Problem& p, cudaStream_t stream) {
  forward_queries<T><<<row_grid(p, p.max_len_q), kRowWarps * kWarp, 0, stream>>>(out, lse, q, k, v, p);
  LIGHTSEQ_CHECK_LAUNCH("attention::forward_queries");
}

template <typename T>
void backward_row_by_row(const Heads<T>& dq, const Heads<T>& dk, const Heads<T>& dv, Wide<T>* delta,
                         const Heads<const T>& dout, const Heads<const T>& out, const Wide<T>* lse,
                         const Heads<const T>& q, const Heads<const T>& k, const Heads<const T>& v, const Problem& p,
                         cudaStream_t stream) {
  backward_queries<T><<<row_grid(p, p.max_len_q), kRowWarps * kWarp, 0, stream>>>(dq, delta, dout, out, lse, q, k, v, p);
  LIGHTSEQ_CHECK_LAUNCH("attention::backward_queries");
  backward_keys<T><<<row_grid(p, p.max_len_k), kRowWarps * kWarp, 0, stream>>>(dk, dv, delta, dout, lse, q, k, v, p);
  LIGHTSEQ_CHECK_LAUNCH("attention::backward_keys");
}

}  // namespace attention
}  // namespace lightseq
