// out = act(norm(x) weight^T + bias) + residual for few rows (lightseq_fairseq/ops/decode_linear.py has the shapes).
//
// Such a product is bound by the weights' way from memory and by the launch. So a block has all of its operands in
// shared memory at once, BM rows and BN outputs by all columns or, where they do not fit, by its part of them; it asks
// for its weights before the kernel ahead has ended (launch_chain.cuh), and lets the kernel behind it do the same.
// Parts are added up by a cluster of blocks through one another's shared memory (sm_90). A norm costs next to nothing:
// its gain is in the weights, and mean and deviation come from moments that the kernel ahead has left of every 16
// columns. (To normalise the rows in shared memory, once in each block, took as long as all the rest, 7.4 instead
// of 3.8 us.)
#pragma once

#include "../common/cluster.cuh"
#include "../common/launch_chain.cuh"
#include "../common/octet.cuh"
#include "../common/reduce.cuh"
#include "../common/tensor_core.cuh"
#include "bias_activation_dropout.cuh"

namespace lightseq {
namespace decode_linear {

constexpr int kMaxShared = 220 * 1024;  // bytes of a block's operands
constexpr int kMaxSplits = 8;           // blocks that share a row
constexpr int kTilePadding = 8;         // floats behind each row of a tile of results, against bank conflicts
constexpr int kMomentColumns = 16;      // columns that share their moments
constexpr int kLaneMoments = 4;         // moments of a row that a lane reads, at most
constexpr int kMaxNormed = kMomentColumns * kWarp * kLaneMoments;

enum class Activation { kLinear, kRelu, kReluSquared, kGelu, kGeluTanh, kSwish, kTanh };

__device__ __forceinline__ float activate(Activation activation, float x) {
  namespace functions = bias_activation_dropout;
  switch (activation) {
    case Activation::kRelu:
      return functions::Relu::value(x);
    case Activation::kReluSquared:
      return functions::ReluSquared::value(x);
    case Activation::kGelu:
      return functions::Gelu::value(x);
    case Activation::kGeluTanh:
      return functions::GeluTanh::value(x);
    case Activation::kSwish:
      return functions::Swish::value(x);
    case Activation::kTanh:
      return functions::Tanh::value(x);
    default:
      return x;
  }
}

// Mean of kMomentColumns elements, and their sum of squared deviations from it.
struct Moments {
  float mean, squares;
};

// x (R, I), weight (O, I), bias (O,), sums (O,), residual, out (R, O), gain, shift (O,); null where absent. moments
// (R, C / 16) are those of x where there are sums, else of the residual; those of out go to `left`. A block has
// I / splits columns.
template <typename T>
struct Operands {
  T* out;
  Moments* left;
  const T *x, *weight, *bias, *residual, *gain, *shift;
  const float* sums;
  const Moments* moments;
  int rows, outer, inner, splits;
  float eps;
  Activation activation;
};

// BM x BN results by WM x WN warps, each of which WK share along the columns.
template <int BM_, int BN_, int WM_, int WN_, int WK_>
struct Tile {
  static constexpr int BM = BM_, BN = BN_, WM = WM_, WN = WN_, WK = WK_;
  static constexpr int kWarps = WM * WN * WK, kThreads = kWarps * kWarp;
  static constexpr int kRowTiles = BM / WM / 16, kColumnTiles = BN / WN / 16;  // of a warp, 16 wide each
  static constexpr int kStride = BN + kTilePadding;

  static __host__ __device__ constexpr int operand_bytes(int chunk) {
    const int operands = (BM + BN) * (chunk + kOctet) * 2, results = WK * BM * kStride * 4;
    return operands > results ? operands : results;
  }
  static __host__ __device__ constexpr int bytes(int chunk) {
    return operand_bytes(chunk) + (3 * BN + BM * BN) * 2 + BN * 4 + BM * 8;
  }
};

// ----------------------------------------------------------------------------------------------------------------
// CUDA kernels

__device__ __forceinline__ void load_octet(const float* from, float (&to)[kOctet]) {
#pragma unroll
  for (int i = 0; i < kOctet; i += 4) {
    const float4 four = *reinterpret_cast<const float4*>(from + i);
    to[i] = four.x;
    to[i + 1] = four.y;
    to[i + 2] = four.z;
    to[i + 3] = four.w;
  }
}

// Starts copying ROWS rows of `columns` elements, a warp a row; zeros for rows from `inside` on.
template <int ROWS, int WARPS, typename T>
__device__ __forceinline__ void copy_rows(T* to, int to_stride, const T* from, long from_stride, int columns,
                                          int inside) {
  for (int row = threadIdx.x / kWarp; row < ROWS; row += WARPS) {
    const bool real = row < inside;
    const T* const source = from + (real ? row : 0) * from_stride;
    for (int c = threadIdx.x % kWarp * kOctet; c < columns; c += kWarp * kOctet) {
      copy_async(to + row * to_stride + c, source + c, real);
    }
  }
}

// Mean and 1 / deviation of each row of `columns` elements, from its moments; a warp has kRowsAtOnce rows under way.
template <typename T, class Shape>
__device__ __forceinline__ void row_statistics(float2* statistics, const Operands<T>& a, int columns, int first_row,
                                               int rows) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, tiles = columns / kMomentColumns;
  constexpr int kEach = (Shape::BM + Shape::kWarps - 1) / Shape::kWarps, kRowsAtOnce = kEach < 4 ? kEach : 4;
  const float inverse = __fdividef(1.f, tiles);
  for (int first = warp; first < rows; first += kRowsAtOnce * Shape::kWarps) {
    Moments part[kRowsAtOnce][kLaneMoments];
    float mean[kRowsAtOnce] = {}, squares[kRowsAtOnce] = {};
#pragma unroll
    for (int j = 0; j < kRowsAtOnce; ++j) {
      const long row = first_row + min(first + j * Shape::kWarps, rows - 1);
#pragma unroll
      for (int n = 0; n < kLaneMoments; ++n) {
        const int tile = lane + n * kWarp;
        if (tile < tiles) part[j][n] = a.moments[row * tiles + tile];
      }
    }
#pragma unroll
    for (int j = 0; j < kRowsAtOnce; ++j) {
#pragma unroll
      for (int n = 0; n < kLaneMoments; ++n) mean[j] += lane + n * kWarp < tiles ? part[j][n].mean : 0.f;
    }
#pragma unroll
    for (int apart = kWarp / 2; apart > 0; apart /= 2) {
#pragma unroll
      for (int j = 0; j < kRowsAtOnce; ++j) mean[j] += __shfl_xor_sync(0xffffffffu, mean[j], apart);
    }
#pragma unroll
    for (int j = 0; j < kRowsAtOnce; ++j) {
      mean[j] *= inverse;
#pragma unroll
      for (int n = 0; n < kLaneMoments; ++n) {
        const float difference = part[j][n].mean - mean[j];
        if (lane + n * kWarp < tiles) squares[j] += part[j][n].squares + kMomentColumns * difference * difference;
      }
    }
#pragma unroll
    for (int apart = kWarp / 2; apart > 0; apart /= 2) {
#pragma unroll
      for (int j = 0; j < kRowsAtOnce; ++j) squares[j] += __shfl_xor_sync(0xffffffffu, squares[j], apart);
    }
#pragma unroll
    for (int j = 0; j < kRowsAtOnce; ++j) {
      const int row = first + j * Shape::kWarps;
      if (lane == 0 && row < rows) {
        statistics[row] = make_float2(mean[j], rsqrtf(squares[j] * inverse / kMomentColumns + a.eps));
      }
    }
  }
}

// What a warp has of x (BM, chunk) times weight (BN, chunk) transposed, both in shared memory, rows `stride` apart;
// then of all warps to `results` (WK, BM, kStride).
template <typename T, class Shape>
struct Products {
  static constexpr int kRowTiles = Shape::kRowTiles, kColumnTiles = Shape::kColumnTiles;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, part = warp % Shape::WK;
  const int column = warp / Shape::WK % Shape::WN * kColumnTiles * 16;
  const int row = warp / (Shape::WK * Shape::WN) * kRowTiles * 16;
  float sum[kRowTiles][kColumnTiles * 2][4] = {};

  __device__ __forceinline__ void add(const T* x, const T* weight, int stride, int chunk) {
#pragma unroll 4
    for (int k = part * 16; k < chunk; k += Shape::WK * 16) {
      uint32_t left[kRowTiles][4], right[4];
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) load_left(left[m], x + (row + m * 16) * stride + k, stride);
#pragma unroll
      for (int n = 0; n < kColumnTiles; ++n) {
        load_right(right, weight + (column + n * 16) * stride + k, stride);
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) {
          multiply_add<T>(sum[m][2 * n], left[m], right[0], right[1]);
          multiply_add<T>(sum[m][2 * n + 1], left[m], right[2], right[3]);
        }
      }
    }
  }

  __device__ __forceinline__ void keep(float* results) const {
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int n = 0; n < kColumnTiles * 2; ++n) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int r = row + m * 16 + half * 8 + lane / 4, c = column + n * 8 + lane % 4 * 2;
          float2* const to = reinterpret_cast<float2*>(results + (part * Shape::BM + r) * Shape::kStride + c);
          *to = make_float2(sum[m][n][2 * half], sum[m][n][2 * half + 1]);
        }
      }
    }
  }
};

// The parts of octet i of the results, added up.
template <class Shape>
__device__ __forceinline__ void add_parts(float (&y)[kOctet], const float* results, int i) {
  constexpr int kRowOctets = Shape::BN / kOctet;
  const float* const first = results + i / kRowOctets * Shape::kStride + i % kRowOctets * kOctet;
  float add[Shape::WK][kOctet];
#pragma unroll
  for (int p = 0; p < Shape::WK; ++p) load_octet(first + p * Shape::BM * Shape::kStride, add[p]);
#pragma unroll
  for (int e = 0; e < kOctet; ++e) {
    y[e] = add[0][e];
#pragma unroll
    for (int p = 1; p < Shape::WK; ++p) y[e] += add[p][e];
  }
}

// What becomes of octet i of the results, by all of `lanes`. Tables in shared memory: bias, gain, shift, column_sums
// (BN,), residual (BM, BN), its rows residual_stride apart, statistics (BM,).
template <typename T, class Shape>
struct Epilogue {
  const T *bias, *gain, *shift, *residual;
  const float* column_sums;
  const float2* statistics;
  int residual_stride, first_row, rows, first_output, outputs;

  __device__ __forceinline__ void finish(const Operands<T>& a, int i, float (&y)[kOctet], unsigned lanes) const {
    constexpr int kRowOctets = Shape::BN / kOctet;
    const int r = i / kRowOctets, c = i % kRowOctets * kOctet;
    const bool inside = r < rows && c < outputs;
    const float2 row_statistics = a.moments && inside ? statistics[r] : make_float2(0.f, 1.f);
    float more[kOctet], times[kOctet];
    if (a.sums) {
#pragma unroll
      for (int e = 0; e < kOctet; ++e) y[e] = row_statistics.y * (y[e] - row_statistics.x * column_sums[c + e]);
    }
    if (a.bias) {
      load<kOctet>(bias + c, more);
#pragma unroll
      for (int e = 0; e < kOctet; ++e) y[e] += more[e];
    }
    if (a.activation != Activation::kLinear) {
#pragma unroll
      for (int e = 0; e < kOctet; ++e) y[e] = activate(a.activation, y[e]);
    }
    if (a.residual) {
      load<kOctet>(residual + r * residual_stride + c, more);
      if (a.gain) {
        load<kOctet>(gain + c, times);
#pragma unroll
        for (int e = 0; e < kOctet; ++e) more[e] = (more[e] - row_statistics.x) * (row_statistics.y * times[e]);
        load<kOctet>(shift + c, times);
#pragma unroll
        for (int e = 0; e < kOctet; ++e) more[e] += times[e];
      }
#pragma unroll
      for (int e = 0; e < kOctet; ++e) y[e] += more[e];
    }
    Packed<T, kOctet> rounded;
    rounded.narrow(y);
    const long row = first_row + r;
    if (inside) *reinterpret_cast<Packed<T, kOctet>*>(a.out + row * a.outer + first_output + c) = rounded;
    if (a.left) {  // of two octets, which are neighbours' both
      rounded.widen(y);
      float mean = 0.f, squares = 0.f;
#pragma unroll
      for (int e = 0; e < kOctet; ++e) mean += y[e] / kMomentColumns;
      mean += __shfl_xor_sync(lanes, mean, 1);
#pragma unroll
      for (int e = 0; e < kOctet; ++e) squares += (y[e] - mean) * (y[e] - mean);
      squares += __shfl_xor_sync(lanes, squares, 1);
      if (inside && i % 2 == 0) {
        a.left[row * (a.outer / kMomentColumns) + (first_output + c) / kMomentColumns] = {mean, squares};
      }
    }
  }
};

// Grid: (outputs / BN) * splits, rows / BM; the `splits` blocks of a cluster have the same results and other columns.
template <typename T, class Shape>
__global__ void __launch_bounds__(Shape::kThreads) forward(const Operands<T> a) {
  extern __shared__ __align__(16) unsigned char shared[];
  constexpr int BM = Shape::BM, BN = Shape::BN;
  const int chunk = a.inner / a.splits, stride = chunk + kOctet;
  const int rank = blockIdx.x % a.splits, first_output = blockIdx.x / a.splits * BN, first_row = blockIdx.y * BM;
  T* const weight = reinterpret_cast<T*>(shared);                              // (BN, stride)
  T* const x = weight + BN * stride;                                           // (BM, stride)
  T* const bias = reinterpret_cast<T*>(shared + Shape::operand_bytes(chunk));  // (BN,)
  T* const gain = bias + BN;                                                   // (BN,)
  T* const shift = gain + BN;                                                  // (BN,)
  T* const residual = shift + BN;                                              // (BM, BN)
  float* const column_sums = reinterpret_cast<float*>(residual + BM * BN);     // (BN,)
  float2* const statistics = reinterpret_cast<float2*>(column_sums + BN);      // (BM,)

  launch_next();
  const int outputs = min(BN, a.outer - first_output), rows = min(BM, a.rows - first_row);
  copy_rows<BN, Shape::kWarps>(weight, stride, a.weight + static_cast<long>(first_output) * a.inner + rank * chunk,
                               a.inner, chunk, outputs);
  if (a.bias) copy_rows<1, Shape::kWarps>(bias, 0, a.bias + first_output, 0, outputs, 1);
  if (a.gain) {
    copy_rows<1, Shape::kWarps>(gain, 0, a.gain + first_output, 0, outputs, 1);
    copy_rows<1, Shape::kWarps>(shift, 0, a.shift + first_output, 0, outputs, 1);
  }
  if (a.sums && threadIdx.x < outputs) column_sums[threadIdx.x] = a.sums[first_output + threadIdx.x];
  wait_for_previous();
  copy_rows<BM, Shape::kWarps>(x, stride, a.x + static_cast<long>(first_row) * a.inner + rank * chunk, a.inner, chunk,
                               rows);
  if (a.residual) {
    copy_rows<BM, Shape::kWarps>(residual, BN, a.residual + static_cast<long>(first_row) * a.outer + first_output,
                                 a.outer, outputs, rows);
  }
  commit_copies();
  if (a.moments) row_statistics<T, Shape>(statistics, a, a.sums ? a.inner : a.outer, first_row, rows);
  await_copies<0>();
  __syncthreads();

  Products<T, Shape> products;
  products.add(x, weight, stride, chunk);
  __syncthreads();
  float* const results = reinterpret_cast<float*>(shared);  // (WK, BM, kStride), where the operands were
  products.keep(results);
  __syncthreads();

  constexpr int kRowOctets = BN / kOctet, kOctets = BM * kRowOctets;
  const auto result = [&](int i) { return results + i / kRowOctets * Shape::kStride + i % kRowOctets * kOctet; };
  const Epilogue<T, Shape> epilogue{bias,       gain, shift,     residual, column_sums,
                                    statistics, BN,   first_row, rows,     first_output, outputs};
  for (int i = threadIdx.x; i < kOctets; i += Shape::kThreads) {
    float y[kOctet];
    add_parts<Shape>(y, results, i);
    if (a.splits == 1) {
      epilogue.finish(a, i, y, 0xffffffffu);
    } else {
      store<kOctet>(result(i), y);
    }
  }
  if (a.splits == 1) return;
  cluster_sync();
  const int share = kOctets / a.splits;  // which this block finishes
  for (int i = rank * share + threadIdx.x; i < (rank + 1) * share; i += Shape::kThreads) {
    float y[kOctet] = {}, add[kMaxSplits][kOctet];
#pragma unroll
    for (int other = 0; other < kMaxSplits; ++other) {
      if (other < a.splits) load_octet(of_rank(result(i), other), add[other]);
    }
#pragma unroll
    for (int other = 0; other < kMaxSplits; ++other) {
#pragma unroll
      for (int e = 0; e < kOctet; ++e) y[e] += other < a.splits ? add[other][e] : 0.f;
    }
    epilogue.finish(a, i, y, share < kWarp ? (1u << share) - 1 : 0xffffffffu);
  }
  cluster_sync();  // until all have read it, this block's shared memory must stay
}

// ----------------------------------------------------------------------------------------------------------------
// kernel launchers

// The fewest blocks that can share rows of `inner` columns in such tiles; 0 where none can.
template <class Shape>
int splits_for(int inner) {
  int splits = 1;
  while (splits <= kMaxSplits && (inner % (16 * splits) != 0 || Shape::bytes(inner / splits) > kMaxShared)) splits *= 2;
  return splits <= kMaxSplits ? splits : 0;
}

template <typename T, class Shape>
bool launch(Operands<T> a, cudaStream_t stream) {
  a.splits = splits_for<Shape>(a.inner);
  if (a.splits == 0) return false;
  const dim3 grid(ceil_div(a.outer, Shape::BN) * a.splits, ceil_div(a.rows, Shape::BM));
  launch_early_in_clusters("decode_linear::forward", forward<T, Shape>, grid, Shape::kThreads,
                           Shape::bytes(a.inner / a.splits), a.splits, stream, a);
  return true;
}

// Few rows take narrow tiles, whose eight warps share the columns, until the weights of wide maps are read too often
// (measured on an H200, 512 to 4096 columns). False if the columns are too many.
template <typename T>
bool forward(const Operands<T>& a, cudaStream_t stream) {
  constexpr int kNarrow = 512, kWide = 1536;
  if (a.rows <= 16 && a.outer <= kNarrow) return launch<T, Tile<16, 16, 1, 1, 8>>(a, stream);
  if (a.rows <= 32 || (a.rows <= 64 && a.outer < kWide)) return launch<T, Tile<16, 32, 1, 1, 8>>(a, stream);
  if (a.rows <= 64) return launch<T, Tile<32, 32, 2, 2, 4>>(a, stream);
  return launch<T, Tile<64, 32, 2, 2, 2>>(a, stream);
}

}  // namespace decode_linear
}  // namespace lightseq
