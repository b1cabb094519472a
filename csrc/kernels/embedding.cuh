// Embedding of tokens and positions (lightseq_fairseq/ops/embedding.py has the formula), and the gradient of a table.
//
// Forward: a warp a token. Backward, deterministic and without atomics: the indices are sorted by counting, for each of
// them, how many stand before it. These are N * N comparisons, but no more than one kernel, which clears the table on
// the side; a radix sort takes half a dozen launches. Then each chunk of 8 sorted indices adds up its runs of equal
// ones, and what runs across chunks is joined last.
// Bytes for N tokens of C 16-bit elements, a table of V rows: 4NC forward (rows, y; positions come from cache),
// 2VC + 2NC backward (the table cleared, dout) and 2C for each row in use.
#pragma once

#include <cassert>
#include <type_traits>

#include "../common/early_launch.cuh"
#include "../common/octet.cuh"
#include "../common/philox.cuh"
#include "../common/reduce.cuh"

namespace lightseq {
namespace embedding {

constexpr int kTokens = 8;       // of a block of the forward kernel
constexpr int kSlices = 16;      // threads that count for one index
constexpr int kIndices = 64;     // indices of a block while sorting
constexpr int kTile = 4096;      // indices in shared memory at a time
constexpr int kChunk = 8;        // sorted indices that are added up together
constexpr int kAhead = 4;        // of them, rows requested before the first is needed
constexpr int kAddThreads = 64;  // of a block that does
constexpr int kJoinDown = 8;     // threads that join one column's parts
constexpr int kClearBlocks = 256;
constexpr long kIndicesAtMost = 1 << 24;  // and rows of the table: floats count exactly so far

// ----------------------------------------------------------------------------------------------------------------
// CUDA kernels

// Block (kWarp, kTokens), a warp a token. tokens, position_rows (N,); weight (V, C); position_weight (P, C); y (N, C)
template <typename T, int VEC>
__global__ void __launch_bounds__(kWarp* kTokens)
    forward_rows(T* y, const long* tokens, const T* weight, const long* position_rows, const T* position_weight,
                 const Dropout dropout, const long rows, const int columns, const long vocab, const long positions,
                 const float scale) {
  const long row = static_cast<long>(blockIdx.x) * kTokens + threadIdx.y;
  if (row >= rows) return;
  wait_for_previous();
  const DropoutMask mask(dropout);
  const long token = tokens[row], position = position_rows ? position_rows[row] : 0;
  assert(token >= 0 && token < vocab && "embedding: a token is not in the vocabulary");
  assert((!position_rows || (position >= 0 && position < positions)) && "embedding: a position is not in the table");
#pragma unroll 2
  for (int column = threadIdx.x * VEC; column < columns; column += kWarp * VEC) {
    float lane[VEC], position_lane[VEC] = {};
    request<VEC>(weight + token * columns + column).widen(lane);
    if (position_rows) request<VEC>(position_weight + position * columns + column).widen(position_lane);
#pragma unroll
    for (int i = 0; i < VEC; ++i) lane[i] = scale * lane[i] + position_lane[i];
    mask.template apply<VEC>(row * columns + column, lane);
    store<VEC>(y + row * columns + column, lane);
  }
}

// indices (N,) -> sorted (N,) ascending and order (N,), equal ones in the order of their places: sorted[i] is
// indices[order[i]]. An index belongs at the place that is the number of those smaller, and of its equals before it;
// kSlices threads count, each over its part of every tile. They do so in floats, exact up to kIndicesAtMost: for whole
// numbers, saturate(b - a) is 1 if a < b and else 0, and floats are added twice as fast as integers are compared.
// Blocks from sort_blocks on clear `table`, 16 bytes a thread.
__global__ void __launch_bounds__(kIndices* kSlices)
    sort_and_clear(int* sorted, int* order, const long* indices, const int count, const int sort_blocks, uint4* table,
                   const long table_size) {
  wait_for_previous();
  if (static_cast<int>(blockIdx.x) >= sort_blocks) {
    const long stride = static_cast<long>(gridDim.x - sort_blocks) * blockDim.x;
    for (long i = static_cast<long>(blockIdx.x - sort_blocks) * blockDim.x + threadIdx.x; i < table_size; i += stride) {
      table[i] = {};
    }
    return;
  }
  __shared__ __align__(16) float tile[kTile];
  __shared__ float counts[kSlices][kIndices];
  const int slice = threadIdx.x / kIndices, mine = threadIdx.x % kIndices;
  const int place = blockIdx.x * kIndices + mine;      // of this thread's index
  const int warp_place = place - threadIdx.x % kWarp;  // of its warp's first
  const float index = place < count ? static_cast<float>(indices[place]) : 0.f;
  float before[4] = {};
  for (int start = 0; start < count; start += kTile) {
    const int part = (min(kTile, count - start) + kSlices * kWarp - 1) / (kSlices * kWarp) * kWarp;  // of a slice
    __syncthreads();
    for (int i = threadIdx.x; i < part * kSlices; i += blockDim.x) {
      tile[i] = start + i < count ? static_cast<float>(indices[start + i]) : INFINITY;
    }
    __syncthreads();
    for (int group = slice * part; group < (slice + 1) * part; group += kWarp) {
      if (start + group != warp_place) {  // all on one side of the warp's own: equals count, or not
        const float bound = index + (start + group < warp_place);
#pragma unroll
        for (int i = 0; i < kWarp; i += 4) {
          const float4 other = *reinterpret_cast<const float4*>(tile + group + i);
          before[0] += __saturatef(bound - other.x);
          before[1] += __saturatef(bound - other.y);
          before[2] += __saturatef(bound - other.z);
          before[3] += __saturatef(bound - other.w);
        }
      } else {
        for (int i = 0; i < kWarp; ++i) {
          before[0] += __saturatef(index + (i < place - warp_place) - tile[group + i]);
        }
      }
    }
  }
  counts[slice][mine] = before[0] + before[1] + (before[2] + before[3]);
  __syncthreads();
  if (slice == 0 && place < count) {
    float to = 0.f;
#pragma unroll
    for (int i = 0; i < kSlices; ++i) to += counts[i][mine];
    sorted[static_cast<int>(to)] = static_cast<int>(index);
    order[static_cast<int>(to)] = place;
  }
}

// Block (x: chunk, y: columns). dout (N, C), sorted, order (N,) -> rows of dtable (V, C) whose index has its whole run
// within the chunk; of others the chunk's part goes to parts (chunks, 2, C): slot 0 where the run began before this
// chunk, slot 1 where it begins in it. A thread past the last column repeats the first.
template <typename T, int VEC>
__global__ void __launch_bounds__(kAddThreads)
    add_runs(T* dtable, float* parts, const T* dout, const int* sorted, const int* order, const Dropout dropout,
             const int count, const int columns, const int padding_index, const float scale) {
  wait_for_previous();
  const DropoutMask mask(dropout);
  const int first = blockIdx.x * kChunk, size = min(kChunk, count - first), lane = threadIdx.x % kWarp;
  // lane i: the index at place first + i, that in front of it and that behind it, -1 past the ends
  const auto index_at = [&](int place) { return place >= 0 && place < count ? sorted[place] : -1; };
  const int index = index_at(first + lane), row = lane < size ? order[first + lane] : 0;
  const unsigned ends = __ballot_sync(0xffffffffu, lane < size && index != index_at(first + lane + 1));
  bool begun = first > 0 && index_at(first - 1) == index_at(first);
  int column = (blockIdx.y * kAddThreads + threadIdx.x) * VEC;
  if (column >= columns) column = 0;

  float sum[VEC] = {};
  for (int start = 0; start < size; start += kAhead) {
    long offset[kAhead];
    Packed<T, VEC> input[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      offset[i] = static_cast<long>(__shfl_sync(0xffffffffu, row, start + i)) * columns + column;
      input[i] = request<VEC>(dout + offset[i]);
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int at = start + i, run_index = __shfl_sync(0xffffffffu, index, at);
      if (at >= size) break;
      float lanes[VEC];
      input[i].widen(lanes);
      mask.template apply<VEC>(offset[i], lanes);
#pragma unroll
      for (int j = 0; j < VEC; ++j) sum[j] += lanes[j];
      const bool ends_here = ends >> at & 1;
      if (!ends_here && at + 1 < size) continue;
      if (begun || !ends_here) {
        store<VEC>(parts + (blockIdx.x * 2l + !begun) * columns + column, sum);
      } else if (run_index != padding_index) {
#pragma unroll
        for (int j = 0; j < VEC; ++j) sum[j] *= scale;
        store<VEC>(dtable + static_cast<long>(run_index) * columns + column, sum);
      }
      begun = false;
#pragma unroll
      for (int j = 0; j < VEC; ++j) sum[j] = 0.f;
    }
  }
}

// Block (kWarp, kJoinDown), a chunk a block: adds up the parts of the run that begins in the chunk, if one does and
// goes on, each thread every kJoinDown-th, then all of a column.
template <typename T, int VEC>
__global__ void __launch_bounds__(kWarp* kJoinDown)
    join_runs(T* dtable, const float* parts, const int* sorted, const int count, const int columns,
              const int padding_index, const float scale) {
  __shared__ float tile[kJoinDown][kWarp * VEC];
  const int first = blockIdx.x * kChunk, next = first + kChunk;
  if (next >= count) return;
  wait_for_previous();
  const int index = sorted[next - 1];
  const bool begins_here = first == 0 || sorted[first - 1] != index;
  if (sorted[next] != index || !begins_here || index == padding_index) return;
  for (int start = 0; start < columns; start += kWarp * VEC) {
    const int column = start + threadIdx.x * VEC;
    float sum[VEC] = {};
    for (int chunk = blockIdx.x + threadIdx.y; column < columns && chunk * kChunk < count; chunk += kJoinDown) {
      const bool here = chunk == static_cast<int>(blockIdx.x);
      if (!here && sorted[chunk * kChunk] != index) break;
      float lane[VEC];
      request<VEC>(parts + (chunk * 2l + here) * columns + column).widen(lane);
#pragma unroll
      for (int i = 0; i < VEC; ++i) sum[i] += lane[i];
    }
    __syncthreads();
    store<VEC>(&tile[threadIdx.y][threadIdx.x * VEC], sum);
    __syncthreads();
    if (threadIdx.y != 0 || column >= columns) continue;
#pragma unroll
    for (int row = 1; row < kJoinDown; ++row) {
#pragma unroll
      for (int i = 0; i < VEC; ++i) sum[i] += tile[row][threadIdx.x * VEC + i];
    }
#pragma unroll
    for (int i = 0; i < VEC; ++i) sum[i] *= scale;
    store<VEC>(dtable + static_cast<long>(index) * columns + column, sum);
  }
}

// ----------------------------------------------------------------------------------------------------------------
// kernel launchers

template <typename T>
void forward(T* y, const long* tokens, const T* weight, const long* position_rows, const T* position_weight,
             Dropout dropout, long rows, int columns, long vocab, long positions, float scale, cudaStream_t stream) {
  if (rows == 0) return;
  const auto kernel = in_octets(columns, {y, weight, position_weight}) ? forward_rows<T, kOctet> : forward_rows<T, 1>;
  launch_early("embedding::forward_rows", kernel, ceil_div(rows, kTokens), dim3(kWarp, kTokens), stream, y, tokens,
               weight, position_rows, position_weight, dropout, rows, columns, vocab, positions, scale);
}

inline int chunks(long count) { return ceil_div(count, kChunk); }

// dtable (V, C), allocated in multiples of 16 bytes; sorted, order (N,) int32 and parts (chunks, 2, C) fp32 are scratch
template <typename T>
void backward(T* dtable, int* sorted, int* order, float* parts, const T* dout, const long* indices, Dropout dropout,
              int count, int columns, long vocab, int padding_index, float scale, cudaStream_t stream) {
  const int sort_blocks = ceil_div(count, kIndices);
  const long table_size = (vocab * columns * static_cast<long>(sizeof(T)) + 15) / 16;
  launch_early("embedding::sort_and_clear", sort_and_clear, sort_blocks + kClearBlocks, kIndices * kSlices, stream,
               sorted, order, indices, count, sort_blocks, reinterpret_cast<uint4*>(dtable), table_size);
  if (count == 0) return;
  const auto launch = [&](auto vec) {
    constexpr int VEC = decltype(vec)::value;
    launch_early("embedding::add_runs", add_runs<T, VEC>, dim3(chunks(count), ceil_div(columns, kAddThreads * VEC)),
                 kAddThreads, stream, dtable, parts, dout, sorted, order, dropout, count, columns, padding_index,
                 scale);
    launch_early("embedding::join_runs", join_runs<T, VEC>, chunks(count), dim3(kWarp, kJoinDown), stream, dtable,
                 parts, sorted, count, columns, padding_index, scale);
  };
  if (in_octets(columns, {dtable, parts, dout})) {
    launch(std::integral_constant<int, kOctet>{});
  } else {
    launch(std::integral_constant<int, 1>{});
  }
}

}  // namespace embedding
}  // namespace lightseq
