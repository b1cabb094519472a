// 16-bit matrices in 8 bits, as they are and transposed, with their largest magnitude (lightseq_fairseq/ops/fp8_cast.py
// has the formulas), and the scales of the next casts.
//
// One pass: 4 bytes an element for both layouts (read 2, write 1 and 1). A block casts a tile of 64 x 128, which it
// turns in shared memory.
#pragma once

#include <cuda_fp8.h>

#include <algorithm>
#include <cstdint>

#include "../common/launch.cuh"
#include "../common/reduce.cuh"
#include "../common/vector.cuh"

namespace lightseq {
namespace fp8_cast {

constexpr int kThreads = 256;
constexpr int kTileRows = 64, kTileColumns = 128;
constexpr int kOctets = kTileColumns / 8;  // of columns; a thread casts four rows of one of them
constexpr int kQuads = kTileRows / 4;
static_assert(kThreads == kOctets * kQuads && kOctets == 16 && kQuads == 16);
constexpr float kRoom = 2.f;
constexpr float kExtreme = 1152921504606846976.f;  // 2^60

// ----------------------------------------------------------------------------------------------------------------
// CUDA kernels

// Eight 16-bit elements, zeros past the first `count`. VECTORS: 16-byte access, all eight or none are inside.
template <bool VECTORS>
__device__ __forceinline__ uint4 load_octet(const void* from, long count) {
  uint4 octet = make_uint4(0, 0, 0, 0);
  if constexpr (VECTORS) {
    if (count > 0) octet = *static_cast<const uint4*>(from);
  } else {
    uint16_t* element = reinterpret_cast<uint16_t*>(&octet);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (i < count) element[i] = static_cast<const uint16_t*>(from)[i];
    }
  }
  return octet;
}

// The first `count` bytes of `bytes` (uint2 or uint4); VECTORS: in one access, all or none are inside.
template <bool VECTORS, typename Bytes>
__device__ __forceinline__ void store_bytes(uint8_t* to, const Bytes& bytes, long count) {
  if constexpr (VECTORS) {
    if (count > 0) *reinterpret_cast<Bytes*>(to) = bytes;
  } else {
    const uint8_t* byte = reinterpret_cast<const uint8_t*>(&bytes);
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof(Bytes)); ++i) {
      if (i < count) to[i] = byte[i];
    }
  }
}

// The two 16-bit values of a register in 8 bits: finite ones saturate, others become NaN, which 0 times them is.
template <typename T, __nv_fp8_interpretation_t FORMAT>
__device__ __forceinline__ unsigned cast_pair(unsigned pair, float scale) {
  const float2 x = unpack<T>(pair);
  const float2 scaled = {fmaf(x.x, 0.f, x.x * scale), fmaf(x.y, 0.f, x.y * scale)};
  return __nv_cvt_float2_to_fp8x2(scaled, __NV_SATFINITE, FORMAT);
}

template <typename T, __nv_fp8_interpretation_t FORMAT>
__device__ __forceinline__ uint2 cast_octet(const uint4& octet, float scale) {
  return {cast_pair<T, FORMAT>(octet.x, scale) | cast_pair<T, FORMAT>(octet.y, scale) << 16,
          cast_pair<T, FORMAT>(octet.z, scale) | cast_pair<T, FORMAT>(octet.w, scale) << 16};
}

// Word c of `columns` gets byte c of each of the four `rows`.
__device__ __forceinline__ void transpose_bytes(unsigned (&columns)[4], unsigned row0, unsigned row1, unsigned row2,
                                                unsigned row3) {
  const unsigned low01 = __byte_perm(row0, row1, 0x5140), low23 = __byte_perm(row2, row3, 0x5140);
  const unsigned high01 = __byte_perm(row0, row1, 0x7362), high23 = __byte_perm(row2, row3, 0x7362);
  columns[0] = __byte_perm(low01, low23, 0x5410);
  columns[1] = __byte_perm(low01, low23, 0x7632);
  columns[2] = __byte_perm(high01, high23, 0x5410);
  columns[3] = __byte_perm(high01, high23, 0x7632);
}

// Both halves of `pair` as magnitudes: of 16-bit floats they are ordered as integers, NaN above infinity.
__device__ __forceinline__ unsigned larger_magnitudes(unsigned largest, unsigned pair) {
  return __vmaxu2(largest, pair & 0x7fff7fffu);
}

// The tile of x (R, C) at (first_row, first_column) into rows (R, C) and columns (C, R), either of them null if it is
// not wanted; amax (1,) is raised to the tile's largest magnitude. VECTORS: R and C are multiples of 16 and all
// pointers of 16 bytes.
//
// Word (column, quad) of the tile in shared memory, four rows of a column, stands at place quad ^ column / 8 of its
// column: two lanes of a warp at most then write to one bank.
template <typename T, __nv_fp8_interpretation_t FORMAT, bool VECTORS>
__device__ __forceinline__ void cast_tile(uint8_t* rows, uint8_t* columns, float* amax, const T* x, float scale, long R,
                                          long C, long first_row, long first_column) {
  __shared__ __align__(16) unsigned tile[kTileColumns * kQuads];
  __shared__ unsigned warp_largest[kThreads / kWarp];
  const int octet = threadIdx.x % kOctets, quad = threadIdx.x / kOctets;
  const long row = first_row + 4 * quad, column = first_column + 8 * octet;
  uint4 in[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) in[i] = load_octet<VECTORS>(x + (row + i) * C + column, row + i < R ? C - column : 0);

  unsigned largest = 0;
  uint2 out[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    largest = larger_magnitudes(largest, in[i].x), largest = larger_magnitudes(largest, in[i].y);
    largest = larger_magnitudes(largest, in[i].z), largest = larger_magnitudes(largest, in[i].w);
    out[i] = cast_octet<T, FORMAT>(in[i], scale);
    if (rows != nullptr) {
      store_bytes<VECTORS>(rows + (row + i) * C + column, out[i], row + i < R ? C - column : 0);
    }
  }
  if (columns != nullptr) {
    unsigned word[4];
    unsigned* place = tile + 8 * octet * kQuads + (quad ^ octet);
    transpose_bytes(word, out[0].x, out[1].x, out[2].x, out[3].x);
#pragma unroll
    for (int i = 0; i < 4; ++i) place[i * kQuads] = word[i];
    transpose_bytes(word, out[0].y, out[1].y, out[2].y, out[3].y);
#pragma unroll
    for (int i = 0; i < 4; ++i) place[(4 + i) * kQuads] = word[i];
  }
  largest = max(largest & 0xffffu, largest >> 16);
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    largest = max(largest, __shfl_xor_sync(0xffffffffu, largest, offset));
  }
  if (threadIdx.x % kWarp == 0) warp_largest[threadIdx.x / kWarp] = largest;
  __syncthreads();

  if (columns != nullptr) {
#pragma unroll
    for (int piece = threadIdx.x; piece < kTileColumns * kTileRows / 16; piece += kThreads) {
      const int c = piece / 4, part = piece % 4, o = c / 8;  // 16 rows of column c
      uint4 word = *reinterpret_cast<const uint4*>(tile + c * kQuads + 4 * (part ^ o / 4));
      if (o & 1) word = make_uint4(word.y, word.x, word.w, word.z);
      if (o & 2) word = make_uint4(word.z, word.w, word.x, word.y);
      const long to_row = first_row + 16 * part;
      store_bytes<VECTORS>(columns + (first_column + c) * R + to_row, word, first_column + c < C ? R - to_row : 0);
    }
  }
  if (threadIdx.x == 0) {
#pragma unroll
    for (int i = 1; i < kThreads / kWarp; ++i) largest = max(largest, warp_largest[i]);
    const unsigned bits = __float_as_uint(unpack<T>(largest).x);
    if (bits != 0) atomicMax(reinterpret_cast<unsigned*>(amax), bits);  // of floats that are not negative
  }
}

// One block a tile, along rows first. x (R, C), rows (R, C), columns (C, R), scale (1,), amax (1,).
template <typename T, __nv_fp8_interpretation_t FORMAT, bool VECTORS>
__global__ void __launch_bounds__(kThreads)
    cast(uint8_t* rows, uint8_t* columns, float* amax, const T* x, const float* scale, long R, long C, int across) {
  cast_tile<T, FORMAT, VECTORS>(rows, columns, amax, x, *scale, R, C,
                                static_cast<long>(blockIdx.x / across) * kTileRows,
                                static_cast<long>(blockIdx.x % across) * kTileColumns);
}

// A matrix in flat memory, and where its casts begin.
struct Matrix {
  long begin, rows, columns, place;
};

struct Tile {
  long matrix, row, column;
};

// One block a tile. rows, columns (Q,), amax, scale (M,), param (P,), matrices (M,), tiles (gridDim.x,).
template <typename T>
__global__ void __launch_bounds__(kThreads)
    cast_many(uint8_t* rows, uint8_t* columns, float* amax, const T* param, const float* scale, const Matrix* matrices,
              const Tile* tiles) {
  const Tile tile = tiles[blockIdx.x];
  const Matrix matrix = matrices[tile.matrix];
  cast_tile<T, __NV_E4M3, true>(rows + matrix.place, columns + matrix.place, amax + tile.matrix, param + matrix.begin,
                                scale[tile.matrix], matrix.rows, matrix.columns, tile.row, tile.column);
}

// One thread a tensor. amax, scale, limit (S,), inverse (S,) inverse_stride apart, history (S, H).
__global__ void __launch_bounds__(kThreads)
    update_scales(float* amax, float* history, float* scale, float* inverse, int inverse_stride, const float* limit,
                  int S, int H) {
  const int s = blockIdx.x * kThreads + threadIdx.x;
  if (s >= S) return;
  float* seen = history + static_cast<long>(s) * H;
  if (isfinite(amax[s])) {
    for (int i = H - 1; i > 0; --i) seen[i] = seen[i - 1];
    seen[0] = amax[s];
  }
  float largest = 0.f;
  for (int i = 0; i < H; ++i) largest = fmaxf(largest, seen[i]);
  if (largest > 0.f) {
    const float wanted = fminf(fmaxf(limit[s] / (kRoom * largest), 1.f / kExtreme), kExtreme);
    scale[s] = __uint_as_float(__float_as_uint(wanted) & 0x7f800000u);  // the power of two at or below it
  }
  inverse[s * inverse_stride] = 1.f / scale[s];
  amax[s] = 0.f;
}

// ----------------------------------------------------------------------------------------------------------------
// kernel launchers

template <typename T, __nv_fp8_interpretation_t FORMAT>
void launch(uint8_t* rows, uint8_t* columns, float* amax, const T* x, const float* scale, long R, long C,
            cudaStream_t stream) {
  const int across = ceil_div(C, kTileColumns), blocks = ceil_div(R, kTileRows) * across;
  if (blocks == 0) return;
  bool vectors = R % 16 == 0 && C % 16 == 0;
  for (const void* pointer : {static_cast<const void*>(rows), static_cast<const void*>(columns),
                              static_cast<const void*>(x)}) {
    vectors = vectors && reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
  }
  if (vectors) {
    cast<T, FORMAT, true><<<blocks, kThreads, 0, stream>>>(rows, columns, amax, x, scale, R, C, across);
  } else {
    cast<T, FORMAT, false><<<blocks, kThreads, 0, stream>>>(rows, columns, amax, x, scale, R, C, across);
  }
  LIGHTSEQ_CHECK_LAUNCH("fp8_cast::cast");
}

template <typename T>
void launch_many(uint8_t* rows, uint8_t* columns, float* amax, const T* param, const float* scale,
                 const Matrix* matrices, const Tile* tiles, int tile_count, cudaStream_t stream) {
  if (tile_count == 0) return;
  cast_many<T><<<tile_count, kThreads, 0, stream>>>(rows, columns, amax, param, scale, matrices, tiles);
  LIGHTSEQ_CHECK_LAUNCH("fp8_cast::cast_many");
}

inline void launch_update_scales(float* amax, float* history, float* scale, float* inverse, int inverse_stride,
                                 const float* limit, int S, int H, cudaStream_t stream) {
  if (S == 0) return;
  update_scales<<<ceil_div(S, kThreads), kThreads, 0, stream>>>(amax, history, scale, inverse, inverse_stride, limit, S,
                                                                  H);
  LIGHTSEQ_CHECK_LAUNCH("fp8_cast::update_scales");
}

}  // namespace fp8_cast
}  // namespace lightseq
