// Attention for what the tensor cores do not take: fp32, fp64, head sizes not a multiple of 8, sentences of any length.
//
// A block takes 32 queries (forward, dq) or keys (dk, dv) of one (sentence, head), ROWS a warp, and walks over the
// other side in runs of 32 that it copies to shared memory: each lane scores one of a run against the warp's rows, then
// the lanes share out the D columns and sum over the run. Arithmetic in fp32, in fp64 for fp64.
#pragma once

#include <type_traits>

#include "attention.cuh"

namespace lightseq {
namespace attention {

constexpr int kRun = kWarp, kMaxHeadDim = 256, kLaneColumns = kMaxHeadDim / kWarp, kStep = 8;

template <typename T>
using Wide = std::conditional_t<std::is_same_v<T, double>, double, float>;

// Rows a warp: 8 apart, so that pairs of them share random numbers.
template <typename T>
constexpr int kWarpRows = std::is_same_v<T, double> ? 2 : 4;

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

// A block's shared memory: two operands of its own rows, dim columns each, and two of a run, one column more, which
// puts the lanes of a warp on different banks.
template <typename A>
struct PlainTiles {
  A *own[2], *run[2];
  int dim;

  static __host__ __device__ int bytes(int rows, int dim) { return (rows * dim + kRun * (dim + 1)) * 2 * sizeof(A); }

  __device__ __forceinline__ PlainTiles(void* shared, int rows, int dim) : dim(dim) {
    own[0] = static_cast<A*>(shared);
    own[1] = own[0] + rows * dim;
    run[0] = own[1] + rows * dim;
    run[1] = run[0] + kRun * (dim + 1);
  }

  // Copies rows first, first + 1, ... of one head; zeros past `inside` of them.
  template <typename T>
  __device__ __forceinline__ void copy(A* to, int stride, const Heads<T>& x, int first, int head, int rows,
                                       int inside) const {
    for (int row = threadIdx.x / kWarp; row < rows; row += blockDim.x / kWarp) {
      for (int d = threadIdx.x % kWarp; d < dim; d += kWarp) {
        to[row * stride + d] = row < inside ? static_cast<A>(x.row(first + row, head)[d]) : A(0);
      }
    }
  }

  // This lane's row of the run times rows own, own + 8, ... of the block.
  template <int ROWS>
  __device__ __forceinline__ void dot(A (&products)[ROWS], int operand, int own_row) const {
    const A* const a = own[operand] + own_row * dim;
    const A* const b = run[operand] + threadIdx.x % kWarp * (dim + 1);
#pragma unroll
    for (int r = 0; r < ROWS; ++r) products[r] = 0;
#pragma unroll 4
    for (int d = 0; d < dim; ++d) {
#pragma unroll
      for (int r = 0; r < ROWS; ++r) products[r] += a[r * kStep * dim + d] * b[d];
    }
  }

  // sums += weights of the run, one a lane, times the run; this lane's columns.
  template <int ROWS>
  __device__ __forceinline__ void add_run(A (&sums)[ROWS][kLaneColumns], const A (&weights)[ROWS], int operand,
                                          int count) const {
    for (int j = 0; j < count; ++j) {
      A weight[ROWS];
#pragma unroll
      for (int r = 0; r < ROWS; ++r) weight[r] = __shfl_sync(0xffffffffu, weights[r], j);
#pragma unroll
      for (int i = 0; i < kLaneColumns; ++i) {
        const int d = threadIdx.x % kWarp + i * kWarp;
        if (d >= dim) break;
        const A x = run[operand][j * (dim + 1) + d];
#pragma unroll
        for (int r = 0; r < ROWS; ++r) sums[r][i] += weight[r] * x;
      }
    }
  }
};

template <typename A, typename T>
__device__ __forceinline__ void write_row(T* to, const A (&from)[kLaneColumns], A factor, int count) {
#pragma unroll
  for (int i = 0; i < kLaneColumns; ++i) {
    const int d = threadIdx.x % kWarp + i * kWarp;
    if (d < count) to[d] = static_cast<T>(from[i] * factor);
  }
}

// ----------------------------------------------------------------------------------------------------------------
// CUDA kernels. Grid: (B + 1, H, tiles of rows). Shapes as in attention_tiles.cuh; delta (H, Nq).

template <typename T>
__global__ void __launch_bounds__(kStep* kWarp)
    forward_queries(Heads<T> out, Wide<T>* lse, Heads<const T> q, Heads<const T> k, Heads<const T> v, Problem p) {
  using A = Wide<T>;
  constexpr int ROWS = kWarpRows<T>;
  extern __shared__ uint4 shared[];
  const int sentence = blockIdx.x, head = blockIdx.y, lane = threadIdx.x % kWarp, own = threadIdx.x / kWarp;
  wait_for_previous();
  const ProbabilityMask mask(p.dropout, sentence, head);
  const Span span(p, sentence);
  const int rows = ROWS * kStep, first = blockIdx.z * rows;
  if (!has_queries(out, span, first, head, p.head_dim)) return;
  const PlainTiles<A> tile(shared, rows, p.head_dim);
  tile.copy(tile.own[0], p.head_dim, q, span.q_begin + first, head, rows, span.q_len - first);

  const int keys = span.visible(min(first + rows, span.q_len) - 1);
  A o[ROWS][kLaneColumns] = {}, top[ROWS], sum[ROWS] = {};
#pragma unroll
  for (int r = 0; r < ROWS; ++r) top[r] = -INFINITY;
  for (int base = 0; base < keys; base += kRun) {
    __syncthreads();
    tile.copy(tile.run[0], p.head_dim + 1, k, span.k_begin + base, head, kRun, keys - base);
    tile.copy(tile.run[1], p.head_dim + 1, v, span.k_begin + base, head, kRun, keys - base);
    __syncthreads();
    A weights[ROWS];
    tile.dot(weights, 0, own);
    Draw draw;
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      const int query = first + own + kStep * r, key = base + lane;
      if (r % 2 == 0) draw = mask.draw(query, key);
      const A s = key < span.visible(query) ? weights[r] * static_cast<A>(p.scale) : static_cast<A>(-INFINITY);
      const A peak = max(top[r], max_of_warp(s));
      const A e = peak == -INFINITY ? A(0) : exp(s - peak), shrink = peak == top[r] ? A(1) : exp(top[r] - peak);
      sum[r] = sum[r] * shrink + sum_of_warp(e);
      top[r] = peak;
#pragma unroll
      for (int i = 0; i < kLaneColumns; ++i) o[r][i] *= shrink;
      weights[r] = draw.keeps(query, key) ? e : A(0);
    }
    tile.add_run(o, weights, 1, min(kRun, keys - base));
  }
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    const int query = first + own + kStep * r;
    if (query >= span.q_len) break;
    const int row = span.q_begin + query;
    write_row(out.row(row, head), o[r], sum[r] > 0 ? static_cast<A>(p.dropout.scale) / sum[r] : A(0), p.head_dim);
    if (lane == 0) lse[span.sums_begin(p, head) + query] = sum[r] > 0 ? top[r] + log(sum[r]) : static_cast<A>(INFINITY);
  }
}

// dq, and delta = sum(dout * out), which backward_keys reads.
template <typename T>
__global__ void __launch_bounds__(kStep* kWarp)
    backward_queries(Heads<T> dq, Wide<T>* delta, Heads<const T> dout, Heads<const T> out, const Wide<T>* lse,
                     Heads<const T> q, Heads<const T> k, Heads<const T> v, Problem p) {
  using A = Wide<T>;
  constexpr int ROWS = kWarpRows<T>;
  extern __shared__ uint4 shared[];
  const int sentence = blockIdx.x, head = blockIdx.y, lane = threadIdx.x % kWarp, own = threadIdx.x / kWarp;
  wait_for_previous();
  const ProbabilityMask mask(p.dropout, sentence, head);
  const Span span(p, sentence);
  const int rows = ROWS * kStep, first = blockIdx.z * rows;
  if (!has_queries(dq, span, first, head, p.head_dim)) return;
  const PlainTiles<A> tile(shared, rows, p.head_dim);
  tile.copy(tile.own[0], p.head_dim, q, span.q_begin + first, head, rows, span.q_len - first);
  tile.copy(tile.own[1], p.head_dim, dout, span.q_begin + first, head, rows, span.q_len - first);
  __syncthreads();

  A log_sum[ROWS], row_sum[ROWS], dq_sum[ROWS][kLaneColumns] = {};
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    const int query = first + own + kStep * r;
    log_sum[r] = INFINITY, row_sum[r] = 0;
    if (query >= span.q_len) continue;
    for (int d = lane; d < p.head_dim; d += kWarp) {
      row_sum[r] +=
          tile.own[1][(own + kStep * r) * p.head_dim + d] * static_cast<A>(out.row(span.q_begin + query, head)[d]);
    }
    row_sum[r] = sum_of_warp(row_sum[r]);
    log_sum[r] = lse[span.sums_begin(p, head) + query];
    if (lane == 0) delta[span.sums_begin(p, head) + query] = row_sum[r];
  }
  const A scale = static_cast<A>(p.scale), dropout_scale = static_cast<A>(p.dropout.scale);
  const int keys = span.visible(min(first + rows, span.q_len) - 1);
  for (int base = 0; base < keys; base += kRun) {
    __syncthreads();
    tile.copy(tile.run[0], p.head_dim + 1, k, span.k_begin + base, head, kRun, keys - base);
    tile.copy(tile.run[1], p.head_dim + 1, v, span.k_begin + base, head, kRun, keys - base);
    __syncthreads();
    A s[ROWS], ds[ROWS];
    tile.dot(s, 0, own);
    tile.dot(ds, 1, own);
    Draw draw;
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      const int query = first + own + kStep * r, key = base + lane;
      if (r % 2 == 0) draw = mask.draw(query, key);
      const A e = key < span.visible(query) ? exp(s[r] * scale - log_sum[r]) : A(0);
      ds[r] = e * ((draw.keeps(query, key) ? ds[r] * dropout_scale : A(0)) - row_sum[r]);
    }
    tile.add_run(dq_sum, ds, 0, min(kRun, keys - base));
  }
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    const int query = first + own + kStep * r;
    if (query < span.q_len) write_row(dq.row(span.q_begin + query, head), dq_sum[r], scale, p.head_dim);
  }
}

template <typename T>
__global__ void __launch_bounds__(kStep* kWarp)
    backward_keys(Heads<T> dk, Heads<T> dv, const Wide<T>* delta, Heads<const T> dout, const Wide<T>* lse,
                  Heads<const T> q, Heads<const T> k, Heads<const T> v, Problem p) {
  using A = Wide<T>;
  constexpr int ROWS = kWarpRows<T>;
  extern __shared__ uint4 shared[];
  const int sentence = blockIdx.x, head = blockIdx.y, lane = threadIdx.x % kWarp, own = threadIdx.x / kWarp;
  wait_for_previous();
  const ProbabilityMask mask(p.dropout, sentence, head);
  const Span span(p, sentence);
  if (!span.real) {
    if (blockIdx.z == 0) clear_rows(dk, span.k_begin, span.k_len, head, p.head_dim);
    if (blockIdx.z == 0) clear_rows(dv, span.k_begin, span.k_len, head, p.head_dim);
    return;
  }
  const int rows = ROWS * kStep, first = blockIdx.z * rows;
  if (first >= span.k_len) return;
  const PlainTiles<A> tile(shared, rows, p.head_dim);
  tile.copy(tile.own[0], p.head_dim, k, span.k_begin + first, head, rows, span.k_len - first);
  tile.copy(tile.own[1], p.head_dim, v, span.k_begin + first, head, rows, span.k_len - first);

  lse += span.sums_begin(p, head);
  delta += span.sums_begin(p, head);
  const A scale = static_cast<A>(p.scale), dropout_scale = static_cast<A>(p.dropout.scale);
  A dk_sum[ROWS][kLaneColumns] = {}, dv_sum[ROWS][kLaneColumns] = {};
  const int unseeing = p.causal ? max(0, first - (span.k_len - span.q_len)) : 0;  // queries that see none of these keys
  for (int base = unseeing / kRun * kRun; base < span.q_len; base += kRun) {
    __syncthreads();
    tile.copy(tile.run[0], p.head_dim + 1, q, span.q_begin + base, head, kRun, span.q_len - base);
    tile.copy(tile.run[1], p.head_dim + 1, dout, span.q_begin + base, head, kRun, span.q_len - base);
    __syncthreads();
    const int query = base + lane, seen = span.visible(query);
    const A log_sum = query < span.q_len ? lse[query] : static_cast<A>(INFINITY);
    const A row_sum = query < span.q_len ? delta[query] : A(0);
    A mp[ROWS], ds[ROWS];
    tile.dot(mp, 0, own);
    tile.dot(ds, 1, own);
    Draw draw;
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      const int key = first + own + kStep * r;
      if (r % 2 == 0) draw = mask.draw(query, key);
      const A e = key < seen ? exp(mp[r] * scale - log_sum) : A(0);
      const bool keep = draw.keeps(query, key);
      mp[r] = keep ? e * dropout_scale : A(0);
      ds[r] = e * ((keep ? ds[r] * dropout_scale : A(0)) - row_sum);
    }
    tile.add_run(dk_sum, ds, 0, min(kRun, span.q_len - base));
    tile.add_run(dv_sum, mp, 1, min(kRun, span.q_len - base));
  }
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    const int key = first + own + kStep * r;
    if (key >= span.k_len) break;
    write_row(dk.row(span.k_begin + key, head), dk_sum[r], scale, p.head_dim);
    write_row(dv.row(span.k_begin + key, head), dv_sum[r], A(1), p.head_dim);
  }
}

// ----------------------------------------------------------------------------------------------------------------
// kernel launchers

template <typename T>
dim3 plain_grid(const Problem& p, int max_len) {
  return dim3(p.sentences + 1, p.heads, max(1, ceil_div(max_len, kWarpRows<T> * kStep)));
}

template <typename T>
int plain_bytes(const Problem& p) {
  return PlainTiles<Wide<T>>::bytes(kWarpRows<T> * kStep, p.head_dim);
}

template <typename T>
void forward_plain(const Heads<T>& out, Wide<T>* lse, const Heads<const T>& q, const Heads<const T>& k,
                   const Heads<const T>& v, const Problem& p, cudaStream_t stream) {
  launch_early("attention::forward_queries", forward_queries<T>, plain_grid<T>(p, p.max_len_q), kStep * kWarp,
               plain_bytes<T>(p), stream, out, lse, q, k, v, p);
}

template <typename T>
void backward_plain(const Heads<T>& dq, const Heads<T>& dk, const Heads<T>& dv, Wide<T>* delta,
                    const Heads<const T>& dout, const Heads<const T>& out, const Wide<T>* lse, const Heads<const T>& q,
                    const Heads<const T>& k, const Heads<const T>& v, const Problem& p, cudaStream_t stream) {
  launch_early("attention::backward_queries", backward_queries<T>, plain_grid<T>(p, p.max_len_q), kStep * kWarp,
               plain_bytes<T>(p), stream, dq, delta, dout, out, lse, q, k, v, p);
  launch_early("attention::backward_keys", backward_keys<T>, plain_grid<T>(p, p.max_len_k), kStep * kWarp,
               plain_bytes<T>(p), stream, dk, dv, delta, dout, lse, q, k, v, p);
}

}  // namespace attention
}  // namespace lightseq
