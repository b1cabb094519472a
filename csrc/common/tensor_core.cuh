// Warp-wide pieces of a 16-bit matrix product with fp32 sums (mma m16n8k16, sm_80 on): copy, load, multiply, store.
//
// Lane l of a warp has the group g = l / 4 and the place t = l % 4 in it. A 16 x 8 accumulator c[4] holds rows g
// (c[0], c[1]) and g + 8 (c[2], c[3]) at columns 2t and 2t + 1. Tiles in shared memory have rows of an odd number of
// 16-byte units, so that the eight rows of a load fall on different banks.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace lightseq {

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Starts copying 16 bytes into shared memory; writes zeros and reads nothing unless `inside`.
__device__ __forceinline__ void copy_async(void* shared, const void* global, bool inside) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
               "r"(inside ? 16 : 0)
               : "memory");
}

__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;"); }

// Waits until at most PENDING of this thread's latest groups of copies are under way.
template <int PENDING>
__device__ __forceinline__ void await_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// Four 8 x 8 matrices; the row that lane l names is row l % 8 of matrix l / 8.
__device__ __forceinline__ void load_matrices(uint32_t (&to)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared_address(row))
               : "memory");
}

__device__ __forceinline__ void load_matrices_transposed(uint32_t (&to)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared_address(row))
               : "memory");
}

// The 16 x 16 matrix at `tile` (rows `stride` apart) as left operand, (m, k) row by row.
template <typename T>
__device__ __forceinline__ void load_left(uint32_t (&a)[4], const T* tile, int stride) {
  const int lane = threadIdx.x % 32;
  load_matrices(a, tile + lane % 16 * stride + lane / 16 * 8);
}

// The same of a tile stored (k, m).
template <typename T>
__device__ __forceinline__ void load_left_transposed(uint32_t (&a)[4], const T* tile, int stride) {
  const int lane = threadIdx.x % 32;
  load_matrices_transposed(a, tile + (lane % 8 + lane / 16 * 8) * stride + lane / 8 % 2 * 8);
}

// The 16 x 16 matrix at `tile`, stored (n, k), as right operand: b[0], b[1] for columns n 0-7, b[2], b[3] for 8-15.
template <typename T>
__device__ __forceinline__ void load_right(uint32_t (&b)[4], const T* tile, int stride) {
  const int lane = threadIdx.x % 32;
  load_matrices(b, tile + (lane % 8 + lane / 16 * 8) * stride + lane / 8 % 2 * 8);
}

// The same of a tile stored (k, n).
template <typename T>
__device__ __forceinline__ void load_right_transposed(uint32_t (&b)[4], const T* tile, int stride) {
  const int lane = threadIdx.x % 32;
  load_matrices_transposed(b, tile + lane % 16 * stride + lane / 16 * 8);
}

// c (16, 8) += a (16, 16) b (16, 8)
template <typename T>
__device__ __forceinline__ void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

template <>
__device__ __forceinline__ void multiply_add<__half>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <>
__device__ __forceinline__ void multiply_add<__nv_bfloat16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                                            uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Lane t of each four holds words[n], the columns 2t and 2t + 1 of an 8-wide piece n; after it, all 8 columns of piece
// t.
__device__ __forceinline__ uint4 gather_columns(const uint32_t (&words)[4]) {
  const bool odd = threadIdx.x & 1, late = threadIdx.x & 2;
  uint32_t w[4];
#pragma unroll
  for (int i = 0; i < 4; i += 2) {
    const uint32_t other = __shfl_xor_sync(0xffffffffu, odd ? words[i] : words[i + 1], 1);
    w[i] = odd ? other : words[i];
    w[i + 1] = odd ? words[i + 1] : other;
  }
  const uint32_t first = __shfl_xor_sync(0xffffffffu, late ? w[0] : w[2], 2);
  const uint32_t second = __shfl_xor_sync(0xffffffffu, late ? w[1] : w[3], 2);
  return late ? make_uint4(first, second, w[2], w[3]) : make_uint4(w[0], w[1], first, second);
}

}  // namespace lightseq
