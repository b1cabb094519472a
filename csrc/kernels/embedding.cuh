// Embedding of tokens and positions (lightseq_fairseq/ops/embedding.py has the formula), and the gradient of a table.
//
// Forward: a warp a token. Backward, deterministic and without atomics: the indices are sorted by counting, for each of
// them, how many stand before it, which is N * N comparisons in one small kernel (5 us for N = 7305; a radix sort takes
// several launches more) that clears the table on the side. Then each chunk of 16 sorted indices adds up its runs of
// equal ones, and what runs across chunks is joined last.
// Bytes for N tokens of C 16-bit elements, a table of V rows: 4NC forward (rows, y; positions come from cache),
// 2VC + 2NC backward (the table cleared, dout) and 2C for each row in use.
#pragma once

#include <cassert>
#include <climits>
#include <type_traits>

#include "../common/launch.cuh"
#include "../common/octet.cuh"
#include "../common/philox.cuh"
#include "../common/reduce.cuh"

namespace lightseq {
namespace embedding {

constexpr int kTokens = 8;       // of a block of the forward kernel
constexpr int kSlices = 16;      // threads that count for one index
constexpr int kIndices = 64;     // indices of a block while sorting
constexpr int kTile = 4096;      // indices in shared memory at a time
constexpr int kChunk = 16;       // sorted indices that are added up together
constexpr int kAddThreads = 64;  // of a block that does
constexpr int kJoinDown = 8;     // threads that join one column's parts
constexpr int kClearBlocks = 256;

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
  const long token = tokens[row], position = position_rows ? position_rows[row] : 0;
  assert(token >= 0 && token < vocab && "embedding: a token is not in the vocabulary");
  assert((!position_rows || (position >= 0 && position < positions)) && "embedding: a position is not in the table");
  const DropoutMask mask(dropout);
#pragma unroll 2
  for (int column = threadIdx.x * VEC; column < columns; column += kWarp * VEC) {
    float lane[VEC], position_lane[VEC] = {};
    load<VEC>(weight + token * columns + column, lane);
    if (position_rows) load<VEC>(position_weight + position * columns + column, position_lane);
#pragma unroll
    for (int i = 0; i < VEC; ++i) lane[i] = scale * lane[i] + position_lane[i];
    mask.template apply<VEC>(row * columns + column, lane);
    store<VEC>(y + row * columns + column, lane);
  }
}

// indices (N,) -> sorted (N,) ascending and order (N,), equal ones in the order of their places: sorted[i] is
// indices[order[i]]. An index belongs at the place that is the number of those smaller, and of its equals before it;
// kSlices warps count, each over its part of every tile. Blocks from sort_blocks on clear `table`, 16 bytes a thread.
__global__ void __launch_bounds__(kIndices* kSlices)
    sort_and_clear(int* sorted, int* order, const long* indices, const int count, const int sort_blocks, uint4* table,
                   const long table_size) {
  if (static_cast<int>(blockIdx.x) >= sort_blocks) {
    const long stride = static_cast<long>(gridDim.x - sort_blocks) * blockDim.x;
    for (long i = static_cast<long>(blockIdx.x - sort_blocks) * blockDim.x + threadIdx.x; i < table_size; i += stride) {
      table[i] = {};
    }
    return;
  }
  __shared__ __align__(16) int tile[kTile];
  __shared__ int places[kSlices][kIndices];
  const int slice = threadIdx.x / kIndices, mine = threadIdx.x % kIndices;
  const int place = blockIdx.x * kIndices + mine;      // of this thread's index
  const int warp_place = place - threadIdx.x % kWarp;  // of its warp's first
  const int index = place < count ? static_cast<int>(indices[place]) : 0;
  int before = 0;
  for (int start = 0; start < count; start += kTile) {
    __syncthreads();
    for (int i = threadIdx.x; i < kTile && start + i < count + 3; i += blockDim.x) {
      tile[i] = start + i < count ? static_cast<int>(indices[start + i]) : INT_MAX;  // which is never smaller
    }
    __syncthreads();
    const int size = min(kTile, (count - start + 3) / 4 * 4);
    for (int i = slice * 4; i < size; i += kSlices * 4) {
      const int4 other = *reinterpret_cast<const int4*>(tile + i);
      const int other_place = start + i;
      if (other_place + 3 < warp_place || other_place >= warp_place + kWarp) {  // all four on one side of the warp's
        const int bound = index + (other_place < warp_place);
        before += (other.x < bound) + (other.y < bound) + (other.z < bound) + (other.w < bound);
      } else {
        before += (other.x < index + (other_place < place)) + (other.y < index + (other_place + 1 < place)) +
                  (other.z < index + (other_place + 2 < place)) + (other.w < index + (other_place + 3 < place));
      }
    }
  }
  places[slice][mine] = before;
  __syncthreads();
  if (slice == 0 && place < count) {
    int to = 0;
#pragma unroll
    for (int i = 0; i < kSlices; ++i) to += places[i][mine];
    sorted[to] = index;
    order[to] = place;
  }
}

// Block (x: chunk, y: columns). dout (N, C), sorted, order (N,) -> rows of dtable (V, C) whose index has its whole run
// within the chunk; of others the chunk's part goes to parts (chunks, 2, C): slot 0 where the run began before this
// chunk, slot 1 where it begins in it.
template <typename T, int VEC>
__global__ void __launch_bounds__(kAddThreads)
    add_runs(T* dtable, float* parts, const T* dout, const int* sorted, const int* order, const Dropout dropout,
             const int count, const int columns, const int padding_index, const float scale) {
  const int column = (blockIdx.y * kAddThreads + threadIdx.x) * VEC;
  if (column >= columns) return;
  const int first = blockIdx.x * kChunk, last = min(first + kChunk, count) - 1;
  const bool begun = first > 0 && sorted[first - 1] == sorted[first];
  const bool continues = last + 1 < count && sorted[last + 1] == sorted[last];
  const DropoutMask mask(dropout);

  Packed<T, VEC> input[kChunk];
#pragma unroll
  for (int i = 0; i < kChunk; ++i) {
    if (first + i <= last) {
      input[i] =
          *reinterpret_cast<const Packed<T, VEC>*>(dout + static_cast<long>(order[first + i]) * columns + column);
    }
  }
  float sum[VEC] = {};
  bool from_before = begun;
#pragma unroll
  for (int i = 0; i < kChunk; ++i) {
    if (first + i > last) break;
    const int index = sorted[first + i];
    float lane[VEC];
    input[i].widen(lane);
    mask.template apply<VEC>(static_cast<long>(order[first + i]) * columns + column, lane);
#pragma unroll
    for (int j = 0; j < VEC; ++j) sum[j] += lane[j];
    const bool is_last = first + i == last;
    if (!is_last && sorted[first + i + 1] == index) continue;
    if (from_before || (is_last && continues)) {
      store<VEC>(parts + (blockIdx.x * 2l + !from_before) * columns + column, sum);
    } else if (index != padding_index) {
#pragma unroll
      for (int j = 0; j < VEC; ++j) sum[j] *= scale;
      store<VEC>(dtable + static_cast<long>(index) * columns + column, sum);
    }
    from_before = false;
#pragma unroll
    for (int j = 0; j < VEC; ++j) sum[j] = 0.f;
  }
}

// Block (kWarp, kJoinDown), grid (chunks, columns): adds up the parts of the run that begins in the chunk, if one does
// and goes on, each thread every kJoinDown-th, then all of a column.
template <typename T, int VEC>
__global__ void __launch_bounds__(kWarp* kJoinDown)
    join_runs(T* dtable, const float* parts, const int* sorted, const int count, const int columns,
              const int padding_index, const float scale) {
  __shared__ float tile[kJoinDown][kWarp * VEC];
  const int first = blockIdx.x * kChunk, next = first + kChunk;
  if (next >= count) return;
  const int index = sorted[next - 1];
  const bool begins_here = first == 0 || sorted[first - 1] != index;
  if (sorted[next] != index || !begins_here || index == padding_index) return;
  const int column = (blockIdx.y * kWarp + threadIdx.x) * VEC;
  float sum[VEC] = {};
  if (column < columns) {
    for (int chunk = blockIdx.x + threadIdx.y; chunk * kChunk < count; chunk += kJoinDown) {
      const bool here = chunk == static_cast<int>(blockIdx.x);
      if (!here && sorted[chunk * kChunk] != index) break;
      float lane[VEC];
      load<VEC>(parts + (chunk * 2l + here) * columns + column, lane);
#pragma unroll
      for (int i = 0; i < VEC; ++i) sum[i] += lane[i];
    }
  }
  store<VEC>(&tile[threadIdx.y][threadIdx.x * VEC], sum);
  __syncthreads();
  if (threadIdx.y == 0 && column < columns) {
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
  const auto launch = [&](auto kernel) {
    kernel<<<ceil_div(rows, kTokens), dim3(kWarp, kTokens), 0, stream>>>(
        y, tokens, weight, position_rows, position_weight, dropout, rows, columns, vocab, positions, scale);
  };
  if (in_octets(columns, {y, weight, position_weight})) {
    launch(forward_rows<T, kOctet>);
  } else {
    launch(forward_rows<T, 1>);
  }
  LIGHTSEQ_CHECK_LAUNCH("embedding::forward_rows");
}

inline int chunks(long count) { return ceil_div(count, kChunk); }

// dtable (V, C), allocated in multiples of 16 bytes; sorted, order (N,) int32 and parts (chunks, 2, C) fp32 are scratch
template <typename T>
void backward(T* dtable, int* sorted, int* order, float* parts, const T* dout, const long* indices, Dropout dropout,
              int count, int columns, long vocab, int padding_index, float scale, cudaStream_t stream) {
  const int sort_blocks = ceil_div(count, kIndices);
  const long table_size = (vocab * columns * static_cast<long>(sizeof(T)) + 15) / 16;
  sort_and_clear<<<sort_blocks + kClearBlocks, kIndices * kSlices, 0, stream>>>(
      sorted, order, indices, count, sort_blocks, reinterpret_cast<uint4*>(dtable), table_size);
  LIGHTSEQ_CHECK_LAUNCH("embedding::sort_and_clear");
  if (count == 0) return;
  const auto launch = [&](auto vec) {
    constexpr int VEC = decltype(vec)::value;
    add_runs<T, VEC><<<dim3(chunks(count), ceil_div(columns, kAddThreads * VEC)), kAddThreads, 0, stream>>>(
        dtable, parts, dout, sorted, order, dropout, count, columns, padding_index, scale);
    LIGHTSEQ_CHECK_LAUNCH("embedding::add_runs");
    join_runs<T, VEC><<<dim3(chunks(count), ceil_div(columns, kWarp * VEC)), dim3(kWarp, kJoinDown), 0, stream>>>(
        dtable, parts, sorted, count, columns, padding_index, scale);
    LIGHTSEQ_CHECK_LAUNCH("embedding::join_runs");
  };
  if (in_octets(columns, {dtable, parts, dout})) {
    launch(std::integral_constant<int, kOctet>{});
  } else {
    launch(std::integral_constant<int, 1>{});
  }
}

}  // namespace embedding
}  // namespace lightseq
