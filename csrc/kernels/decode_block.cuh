// Attention of a decoding step and the linear maps around it in one launch (lightseq_fairseq/ops/decode_block.py has
// formulas and shapes).
//
// A cluster has a sentence, each of its blocks a head. A block attends for all beams, tells all blocks of the cluster
// through their shared memory what it found, and makes as many columns of the output as a head has; in cross-attention
// it makes the queries of its head first. Weights lie in shared memory before the kernel ahead has ended
// (launch_chain.cuh). A launch less is a wait less for all blocks of the one before: inside a cluster eight wait.
#pragma once

#include "decode_attention.cuh"
#include "decode_linear.cuh"

namespace lightseq {
namespace decode_block {

using decode_attention::Past;
using decode_attention::Piece;
using decode_attention::Softmax;
using decode_linear::Moments;

constexpr int kWarps = 8, kThreads = kWarps * kWarp;
constexpr int kRows = 16;                      // of a tile of the tensor cores, one for each beam
constexpr int kMaxBeams = 5;                   // whose softmax a thread holds in registers
constexpr int kLeastHeads = 4, kMaxHeads = 8;  // blocks of a cluster
constexpr int kMaxShared = 220 * 1024;

// out (R, E) = context weight^T + bias + residual, left (R, E / 16) its moments. weight (E, E), bias, gain, shift (E,),
// residual (R, E), moments (R, E / 16) of it. gain, shift and moments are null where the residual is not normalised,
// left where nobody asks.
template <typename T>
struct Output {
  T* out;
  Moments* left;
  const T *weight, *bias, *residual, *gain, *shift;
  const Moments* moments;
  float eps;
};

// Where the queries come from, x being the residual: query_weight (E, E), query_bias, sums (E,); and where they look:
// keys_values (N, 2, H, D), a sentence's first token and its end at bounds[b * apart] and the one behind.
template <typename T>
struct Source {
  const T *query_weight, *query_bias;
  const float* sums;
  const T* keys_values;
  const int* bounds;
  int apart;
};

// Shared memory of a block of a head of D elements, and what it does with it for the output.
template <typename T, int D>
struct Head {
  static constexpr int kColumnWarps = D / 16, kRowOctets = D / kOctet, LANES = D / kOctet;
  using Shape = decode_linear::Tile<kRows, D, 1, kColumnWarps, kWarps / kColumnWarps>;
  static_assert(Shape::kThreads == kThreads);
  static constexpr int kResults = Shape::WK * kRows * Shape::kStride;

  T *weight, *context;   // (D, stride), (kRows, stride)
  float* results;        // (WK, kRows, kStride)
  float2* statistics;    // (kRows,)
  T *bias, *gain, *shift;  // (D,)
  unsigned char* end;
  int head, heads, beams, first_row, width, stride;

  static __host__ __device__ constexpr int bytes(int width) {
    return (D + kRows) * (width + kOctet) * 2 + kResults * 4 + kRows * 8 + 3 * D * 2;
  }

  __device__ __forceinline__ Head(unsigned char* shared, int heads, int beams)
      : head(blockIdx.x), heads(heads), beams(beams), first_row(blockIdx.y * beams), width(heads * D),
        stride(heads * D + kOctet) {
    weight = reinterpret_cast<T*>(shared);
    context = weight + D * stride;
    results = reinterpret_cast<float*>(context + kRows * stride);
    statistics = reinterpret_cast<float2*>(results + kResults);
    bias = reinterpret_cast<T*>(statistics + kRows);
    gain = bias + D;
    shift = gain + D;
    end = reinterpret_cast<unsigned char*>(shift + D);
  }

  __device__ __forceinline__ decode_linear::Operands<T> operands(const Output<T>& a) const {
    decode_linear::Operands<T> made{};
    made.out = a.out;
    made.left = a.left;
    made.bias = a.bias;
    made.residual = a.residual;
    made.gain = a.gain;
    made.moments = a.moments;
    made.outer = width;
    made.eps = a.eps;
    return made;
  }

  // The weights of the head's columns of a map, before anything is waited for.
  __device__ __forceinline__ void fetch_weight(T* to, const T* from) const {
    decode_linear::copy_rows<D, kWarps>(to, stride, from + static_cast<long>(head * D) * width, width, width, D);
  }

  __device__ __forceinline__ void fetch_vector(T* to, const T* from) const {
    decode_linear::copy_rows<1, kWarps>(to, 0, from + head * D, 0, D, 1);
  }

  __device__ __forceinline__ void fetch(const Output<T>& a) const {
    fetch_weight(weight, a.weight);
    fetch_vector(bias, a.bias);
    if (a.gain) {
      fetch_vector(gain, a.gain);
      fetch_vector(shift, a.shift);
    }
  }

  // The context of beam b, eight elements from `column` on, to all blocks of the cluster.
  __device__ __forceinline__ void tell(const Softmax& softmax, int b, int column) const {
    for (int other = 0; other < heads; ++other) {
      decode_attention::finish(of_rank(context, other) + b * stride + head * D + column, softmax);
    }
  }

  // x (kRows, stride) times weight (D, stride) transposed, to `results`.
  __device__ __forceinline__ void multiply(const T* x, const T* weight) const {
    decode_linear::Products<T, Shape> products;
    products.add(x, weight, stride, width);
    products.keep(results);
    __syncthreads();
  }

  // Once all heads have told; `residual` is in shared memory.
  __device__ __forceinline__ void finish(const Output<T>& a, const T* residual, int residual_stride) const {
    multiply(context, weight);
    const decode_linear::Operands<T> output = operands(a);
    const decode_linear::Epilogue<T, Shape> epilogue{bias,       gain,            shift,     residual, nullptr,
                                                     statistics, residual_stride, first_row, beams,    head * D, D};
    for (int i = threadIdx.x; i < kRows * kRowOctets; i += kThreads) {
      float y[kOctet];
      decode_linear::add_parts<Shape>(y, results, i);
      epilogue.finish(output, i, y, 0xffffffffu);
    }
  }
};

constexpr int warps_for(int beams) { return beams > 4 ? 1 : beams > 2 ? 2 : beams > 1 ? 4 : 8; }

// ----------------------------------------------------------------------------------------------------------------
// CUDA kernels

// Grid: (H, B) in clusters of H.
template <typename T, int D, int BEAMS>
__global__ void __launch_bounds__(kThreads) self_block(const Past<T> past, const Output<T> a) {
  constexpr int LANES = Head<T, D>::LANES, WARPS = warps_for(BEAMS);
  extern __shared__ __align__(16) unsigned char shared[];
  const Head<T, D> head(shared, past.heads, past.beam);
  T* const residual = reinterpret_cast<T*>(head.end);                      // (kRows, D)
  Piece* const pieces = reinterpret_cast<Piece*>(residual + kRows * D);    // (8 / WARPS, WARPS, LANES)

  launch_next();
  head.fetch(a);
  cluster_sync();  // all blocks of the cluster are there, and so is their shared memory
  wait_for_previous();
  decode_linear::copy_rows<kRows, kWarps>(residual, D, a.residual + static_cast<long>(head.first_row) * head.width +
                                          head.head * D, head.width, D, head.beams);
  commit_copies();
  if (a.moments) {
    decode_linear::row_statistics<T, typename Head<T, D>::Shape>(head.statistics, head.operands(a), head.width,
                                                                 head.first_row, head.beams);
  }
  Softmax softmax;
  const int k = threadIdx.x / (WARPS * kWarp);
  if (decode_attention::attend_to_past<LANES, WARPS, true>(softmax, pieces, past, head.head, blockIdx.y, k,
                                                           k < head.beams)) {
    head.tell(softmax, k, threadIdx.x % LANES * kOctet);
  }
  await_copies<0>();
  cluster_sync();  // the context of all heads is there
  head.finish(a, residual, D);
}

// Grid: (H, B) in clusters of H.
template <typename T, int D, int BEAMS>
__global__ void __launch_bounds__(kThreads)
    cross_block(const Source<T> source, const Output<T> a, int heads, int beam) {
  using Own = Head<T, D>;
  constexpr int LANES = Own::LANES, kGroups = kWarp / LANES, kStep = kWarps * kGroups;
  constexpr int kUnroll = decode_attention::kCrossUnroll, kRowOctets = Own::kRowOctets;
  static_assert(kWarps * BEAMS * LANES * sizeof(Piece) <= D * (kLeastHeads * D + kOctet) * 2);
  extern __shared__ __align__(16) unsigned char shared[];
  const Own head(shared, heads, beam);
  T* const query_weight = reinterpret_cast<T*>(head.end);         // (D, stride)
  T* const x = query_weight + D * head.stride;                    // (kRows, stride)
  float* const sums = reinterpret_cast<float*>(x + kRows * head.stride);  // (D,)
  T* const query = reinterpret_cast<T*>(sums + D);                // (kRows, D)
  T* const query_bias = query + kRows * D;                        // (D,)
  Piece* const pieces = reinterpret_cast<Piece*>(query_weight);   // (kWarps, BEAMS, LANES), once it is used

  launch_next();
  head.fetch_weight(query_weight, source.query_weight);
  head.fetch_vector(query_bias, source.query_bias);
  head.fetch(a);
  if (threadIdx.x < D) sums[threadIdx.x] = source.sums[head.head * D + threadIdx.x];

  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, place = lane % LANES, column = place * kOctet;
  const int group = warp * kGroups + lane / LANES, beams = head.beams;
  const int* const bounds = source.bounds + blockIdx.y * source.apart;  // the source is there all along
  const int begin = bounds[0], length = bounds[1] - begin;
  const long width = head.width;
  const T* const keys = source.keys_values + begin * 2 * width + head.head * D + column;
  Packed<T, kOctet> key[kUnroll] = {}, value[kUnroll] = {};
  const auto fetch = [&](int first) {
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int p = first + u * kStep + group;
      if (p < length) {
        key[u] = request<kOctet>(keys + p * 2 * width);
        value[u] = request<kOctet>(keys + (p * 2 + 1) * width);
      }
    }
  };
  fetch(0);
  cluster_sync();  // all blocks of the cluster are there, and so is their shared memory
  wait_for_previous();
  decode_linear::copy_rows<kRows, kWarps>(x, head.stride, a.residual + head.first_row * width, width, head.width,
                                          beams);
  commit_copies();
  decode_linear::row_statistics<T, typename Own::Shape>(head.statistics, head.operands(a), head.width, head.first_row,
                                                        beams);
  await_copies<0>();
  __syncthreads();

  head.multiply(x, query_weight);
  for (int i = threadIdx.x; i < beams * kRowOctets; i += kThreads) {
    const int r = i / kRowOctets, c = i % kRowOctets * kOctet;
    float y[kOctet], more[kOctet];
    decode_linear::add_parts<typename Own::Shape>(y, head.results, i);
    load<kOctet>(query_bias + c, more);
#pragma unroll
    for (int e = 0; e < kOctet; ++e) {
      y[e] = head.statistics[r].y * (y[e] - head.statistics[r].x * sums[c + e]) + more[e];
    }
    store<kOctet>(query + r * D + c, y);
  }
  __syncthreads();

  float q[BEAMS][kOctet] = {};
#pragma unroll
  for (int b = 0; b < BEAMS; ++b) {
    if (b < beams) load<kOctet>(query + b * D + column, q[b]);
  }
  Softmax softmax[BEAMS];
  for (int first = 0; first < length; first += kStep * kUnroll) {
    float wide[kUnroll][kOctet], v[kUnroll][kOctet];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      key[u].widen(wide[u]);
      value[u].widen(v[u]);
    }
    if (first + kStep * kUnroll < length) fetch(first + kStep * kUnroll);
#pragma unroll
    for (int b = 0; b < BEAMS; ++b) {
      float score[kUnroll];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        score[u] = decode_attention::group_sum<LANES>(decode_attention::dot(q[b], wide[u]));
        if (first + u * kStep + group >= length) score[u] = -INFINITY;
      }
      softmax[b].add(score, v);
    }
  }
#pragma unroll
  for (int b = 0; b < BEAMS; ++b) {
    softmax[b].template merge_warp<LANES>();
    if (lane < LANES) pieces[(warp * BEAMS + b) * LANES + place].keep(softmax[b]);
  }
  __syncthreads();
  for (int i = threadIdx.x; i < beams * LANES; i += kThreads) {
    const int b = i / LANES, at = i % LANES;
    Softmax all;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) pieces[(w * BEAMS + b) * LANES + at].merge_into(all);
    head.tell(all, b, at * kOctet);
  }
  cluster_sync();  // the context of all heads is there
  head.finish(a, x + head.head * D, head.stride);
}

// ----------------------------------------------------------------------------------------------------------------
// kernel launchers

template <int D>
constexpr int self_bytes(int width) {
  return Head<__half, D>::bytes(width) + kRows * D * 2 +
         kWarps * Head<__half, D>::LANES * static_cast<int>(sizeof(Piece));
}

template <int D>
constexpr int cross_bytes(int width) {
  return Head<__half, D>::bytes(width) + (D + kRows) * (width + kOctet) * 2 + D * 4 + (kRows + 1) * D * 2;
}

// Whether such heads and beams are served.
inline bool fits(int heads, int dim, int beam) {
  if ((dim != 32 && dim != 64) || heads < kLeastHeads || heads > kMaxHeads || beam > kMaxBeams) return false;
  return (dim == 64 ? cross_bytes<64>(heads * 64) : cross_bytes<32>(heads * 32)) <= kMaxShared;
}

// Calls f with the head size and the beams that a kernel is made for.
template <typename F>
void dispatch_sizes(int dim, int beam, F&& f) {
  const auto with = [&](auto size) {
    if (beam == 1) return f(size, std::integral_constant<int, 1>{});
    if (beam == 2) return f(size, std::integral_constant<int, 2>{});
    if (beam <= 4) return f(size, std::integral_constant<int, 4>{});
    f(size, std::integral_constant<int, 5>{});
  };
  if (dim == 64) return with(std::integral_constant<int, 64>{});
  with(std::integral_constant<int, 32>{});
}

template <typename T>
void self(const Past<T>& past, const Output<T>& a, int batch, cudaStream_t stream) {
  dispatch_sizes(past.dim, past.beam, [&](auto size, auto beams) {
    constexpr int D = decltype(size)::value, BEAMS = decltype(beams)::value;
    launch_early_in_clusters("decode_block::self", self_block<T, D, BEAMS>, dim3(past.heads, batch), kThreads,
                             self_bytes<D>(past.heads * D), past.heads, stream, past, a);
  });
}

template <typename T>
void cross(const Source<T>& source, const Output<T>& a, int batch, int beam, int heads, int dim, cudaStream_t stream) {
  dispatch_sizes(dim, beam, [&](auto size, auto beams) {
    constexpr int D = decltype(size)::value, BEAMS = decltype(beams)::value;
    launch_early_in_clusters("decode_block::cross", cross_block<T, D, BEAMS>, dim3(heads, batch), kThreads,
                             cross_bytes<D>(heads * D), heads, stream, source, a, heads, beam);
  });
}

}  // namespace decode_block
}  // namespace lightseq
