// Element-wise passes over an (N, C) array, with sums over its rows at no extra pass: every bias gradient is one.
//
// A pass is a functor F, which says what is read and written; see Pass below. Its kSums sums over rows are taken in
// fp32 in a fixed order, hence the same in every run: a thread sums the rows it walks, a block its threads, one row of
// `partial` (chunks, kSums, C) a block; a second, small kernel adds the chunks up and rounds once.
// Bytes beyond those of F: 8 * chunks * kSums * C, of which a column gets at most 2 chunks a multiprocessor.
#pragma once

#include <algorithm>
#include <type_traits>

#include "../common/early_launch.cuh"
#include "../common/octet.cuh"

namespace lightseq {
namespace column_sum {

constexpr int kAcross = 32, kDown = 16, kThreads = kAcross * kDown;
constexpr int kFinishDown = 32;
constexpr int kBlocksPerMultiprocessor = 2;

// Rows that a thread requests before it needs the first: 64 bytes of them, which keeps clear of spills.
template <typename Input>
constexpr int kRowsAhead = std::clamp<int>(64 / sizeof(Input), 1, 4);

inline int multiprocessors() {
  int device = 0, count = 1;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  return count;
}

// Rows of `partial` that a pass over (rows, columns) fills: blocks for one full wave, no more than have work.
inline int chunks(long rows, int columns) {
  const int strips = ceil_div(columns, kAcross * (columns % kOctet ? 1 : kOctet));
  const long wave = std::max(1, kBlocksPerMultiprocessor * multiprocessors() / strips);
  return static_cast<int>(std::min<long>(wave, ceil_div(rows, kDown)));
}

template <typename P, int K>
struct Sums {
  P* sum[K];  // each (C,)
};

// ----------------------------------------------------------------------------------------------------------------
// CUDA kernels

// Block (kAcross, kDown): VEC columns a thread, rows blockIdx.y * kDown + threadIdx.y and on. Of F is asked:
//   kSums                                                  number of sums, 0 where only elements matter
//   Column prepare(column)                                 what stays while a thread walks down its columns
//   Input read(row, offset)                                what a row brings; offset is row * C + column
//   write(Input, Column, offset, float sums[][VEC])        the work; adds to the sums
template <int VEC, class F>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    walk(const F f, float* partial, const long rows, const int columns) {
  constexpr int K = F::kSums, kAhead = kRowsAhead<typename F::Input>;
  const int column = (blockIdx.x * kAcross + threadIdx.x) * VEC;
  const long stride = static_cast<long>(gridDim.y) * kDown;
  float sums[K ? K : 1][VEC] = {};
  wait_for_previous();
  if (column < columns) {
    const typename F::Column constants = f.prepare(column);
    for (long row = blockIdx.y * kDown + threadIdx.y; row < rows; row += kAhead * stride) {
      const long offset = row * columns + column, step = stride * columns;
      typename F::Input input[kAhead];
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        if (row + i * stride < rows) input[i] = f.read(row + i * stride, offset + i * step);
      }
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        if (row + i * stride < rows) f.write(input[i], constants, offset + i * step, sums);
      }
    }
  }
  if constexpr (K > 0) {
    __shared__ float tile[kDown][kAcross * VEC];
    const int thread = threadIdx.y * kAcross + threadIdx.x;
#pragma unroll
    for (int k = 0; k < K; ++k) {
      __syncthreads();
#pragma unroll
      for (int i = 0; i < VEC; ++i) tile[threadIdx.y][threadIdx.x * VEC + i] = sums[k][i];
      __syncthreads();
      const int mine = blockIdx.x * kAcross * VEC + thread;
      if (thread < kAcross * VEC && mine < columns) {
        float sum = 0.f;
#pragma unroll
        for (int row = 0; row < kDown; ++row) sum += tile[row][thread];
        partial[(static_cast<long>(blockIdx.y) * K + k) * columns + mine] = sum;
      }
    }
  }
}

// Block (kAcross, kFinishDown), a column a threadIdx.x, the sum a blockIdx.y: partial (chunks, K, C) -> K x (C,), which
// are written or, with `add`, added to.
template <typename P, int K>
__global__ void __launch_bounds__(kAcross* kFinishDown)
    finish(const __grid_constant__ Sums<P, K> out, const float* partial, const int chunks, const int columns,
           const bool add) {
  constexpr int kAhead = 8;  // requested at once: usually all that a thread adds up
  __shared__ float tile[kFinishDown][kAcross];
  const int column = blockIdx.x * kAcross + threadIdx.x;
  float sum = 0.f;
  wait_for_previous();
  if (column < columns) {
    for (int first = threadIdx.y; first < chunks; first += kAhead * kFinishDown) {
      float part[kAhead];
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        const long chunk = first + i * kFinishDown;
        part[i] = chunk < chunks ? partial[(chunk * K + blockIdx.y) * columns + column] : 0.f;
      }
#pragma unroll
      for (int i = 0; i < kAhead; ++i) sum += part[i];
    }
  }
  tile[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y == 0 && column < columns) {
    float total = add ? to_float(out.sum[blockIdx.y][column]) : 0.f;
#pragma unroll
    for (int row = 0; row < kFinishDown; ++row) total += tile[row][threadIdx.x];
    out.sum[blockIdx.y][column] = from_float<P>(total);
  }
}

// x (N, C), of which nothing but the sum is wanted
template <typename T, int VEC>
struct Rows {
  static constexpr int kSums = 1;
  struct Column {};
  using Input = Packed<T, VEC>;

  const T* x;

  __device__ __forceinline__ Column prepare(int) const { return {}; }

  __device__ __forceinline__ Input read(long, long offset) const { return request<VEC>(x + offset); }

  __device__ __forceinline__ void write(const Input& input, const Column&, long, float (&sums)[1][VEC]) const {
    float lane[VEC];
    input.widen(lane);
#pragma unroll
    for (int i = 0; i < VEC; ++i) sums[0][i] += lane[i];
  }
};

// ----------------------------------------------------------------------------------------------------------------
// kernel launchers

// partial (chunks, F::kSums, C) fp32, null where F sums nothing. pass_of(std::integral_constant<int, VEC>) gives F.
template <class PassOf>
void run(const char* name, bool octets, PassOf&& pass_of, float* partial, int chunks, long rows, int columns,
         cudaStream_t stream) {
  if (rows == 0) return;
  const auto launch = [&](auto vec) {
    const auto pass = pass_of(vec);
    const dim3 grid(ceil_div(columns, kAcross * vec), chunks);
    launch_early(name, walk<decltype(vec)::value, std::decay_t<decltype(pass)>>, grid, dim3(kAcross, kDown), stream,
                 pass, partial, rows, columns);
  };
  if (octets) {
    launch(std::integral_constant<int, kOctet>{});
  } else {
    launch(std::integral_constant<int, 1>{});
  }
}

template <typename P, int K>
void add_up(const Sums<P, K>& out, const float* partial, int chunks, int columns, bool add, cudaStream_t stream) {
  launch_early("column_sum::finish", finish<P, K>, dim3(ceil_div(columns, kAcross), K), dim3(kAcross, kFinishDown),
               stream, out, partial, chunks, columns, add);
}

// x (N, C) -> partial (chunks, 1, C)
template <typename T>
void rows(const T* x, float* partial, int chunks, long rows, int columns, cudaStream_t stream) {
  run("column_sum::rows", in_octets(columns, {x}), [&](auto vec) { return Rows<T, decltype(vec)::value>{x}; }, partial,
      chunks, rows, columns, stream);
}

}  // namespace column_sum
}  // namespace lightseq
