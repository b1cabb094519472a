// Matrix products of a warpgroup, four warps in a row, with fp32 sums (wgmma, which sm_90a alone has).
//
// Operands lie in shared memory in slabs: rows of kSlab 16-bit elements, 128 bytes, the 16-byte unit u of row r in
// place u ^ r % 8 (the swizzle of 128 bytes, against bank conflicts); a slab begins at a multiple of 1024 bytes. Of
// sums (64, 16), thread t of the warpgroup has rows g = t / 32 * 16 + t % 32 / 4 and g + 8: sum[4 j + 2 h + i] is row
// g + 8 h, column 8 j + t % 4 * 2 + i.
#pragma once

#include <type_traits>

#include "launch.cuh"
#include "tensor_core.cuh"

namespace lightseq {

constexpr int kWarpgroup = 128;  // threads
constexpr int kSlab = 64;        // elements of a row
constexpr int kSlabStep = 16;    // of the sum of products that one instruction takes
constexpr int kSlabUnits = 8;    // of 16 bytes, of a row

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define LIGHTSEQ_WARPGROUPS 1
#endif

// Where unit `unit` of row `row` of a slab is, in elements.
__device__ __forceinline__ int slab_place(int row, int unit) {
  return row * kSlab + (unit ^ row % kSlabUnits) * (kSlab / kSlabUnits);
}

// The threads of this warpgroup are here, and see what each has written.
__device__ __forceinline__ void warpgroup_sync() {
  asm volatile("bar.sync %0, %1;" ::"r"(static_cast<int>(threadIdx.x) / kWarpgroup + 1), "n"(kWarpgroup) : "memory");
}

// What this thread has written to shared memory is there for the products of all, after a barrier.
__device__ __forceinline__ void publish_to_products() {
#ifdef LIGHTSEQ_WARPGROUPS
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// Where a slab is, as products want to know it: groups of 8 rows are 1024 bytes apart.
__device__ __forceinline__ uint64_t slab_descriptor(const void* slab) {
  const uint64_t address = shared_address(slab) >> 4 & 0x3fff, apart = 1024 >> 4, swizzle_128 = 1;
  return address | uint64_t{1} << 16 | apart << 32 | swizzle_128 << 62;
}

// kSlabStep columns, or rows, further on in a slab.
constexpr uint64_t kNextColumns = kSlabStep * 2 / 16, kNextRows = kSlabStep * kSlab * 2 / 16;

__device__ __forceinline__ void begin_products() {
#ifdef LIGHTSEQ_WARPGROUPS
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}

__device__ __forceinline__ void await_products() {
#ifdef LIGHTSEQ_WARPGROUPS
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
  asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
#endif
}

#define LIGHTSEQ_WGMMA(TYPE)                                                                                      \
  asm volatile("wgmma.mma_async.sync.aligned.m64n16k16.f32." TYPE "." TYPE                                        \
               " {%0, %1, %2, %3, %4, %5, %6, %7}, %8, %9, 1, 1, 1, %10, 0;"                                      \
               : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3]), "+f"(sum[4]), "+f"(sum[5]), "+f"(sum[6]), \
                 "+f"(sum[7])                                                                                     \
               : "l"(a), "l"(b), "n"(TURNED ? 1 : 0))

// sum (64, 16) += a (64, 16) b (16, 16) transposed, of slabs whose rows are those of a and b; where a is TURNED its
// slab's rows are its columns. Between begin_products and await_products.
template <typename T, bool TURNED = false>
__device__ __forceinline__ void add_product(float (&sum)[8], uint64_t a, uint64_t b) {
#ifdef LIGHTSEQ_WARPGROUPS
  if constexpr (std::is_same_v<T, __half>) {
    LIGHTSEQ_WGMMA("f16");
  } else {
    LIGHTSEQ_WGMMA("bf16");
  }
#endif
}

#undef LIGHTSEQ_WGMMA

// Of sums (64, 64) thread t has rows g and g + 8 as above: sum[j][2 h + i] is row g + 8 h, column 8 j + t % 4 * 2 + i.
#define LIGHTSEQ_SUMS(j) "+f"(sum[j][0]), "+f"(sum[j][1]), "+f"(sum[j][2]), "+f"(sum[j][3])
#define LIGHTSEQ_WGMMA(TYPE, OPERANDS, ...)                                                                           \
  asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32." TYPE "." TYPE                                            \
               " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21," \
               " %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, " OPERANDS                                        \
               : LIGHTSEQ_SUMS(0), LIGHTSEQ_SUMS(1), LIGHTSEQ_SUMS(2), LIGHTSEQ_SUMS(3), LIGHTSEQ_SUMS(4),            \
                 LIGHTSEQ_SUMS(5), LIGHTSEQ_SUMS(6), LIGHTSEQ_SUMS(7)                                                 \
               : __VA_ARGS__)
#define LIGHTSEQ_WGMMA_OF_SLABS(TYPE) \
  LIGHTSEQ_WGMMA(TYPE, "%32, %33, %34, 1, 1, 0, 0;", "l"(a), "l"(b), "n"(ADD ? 1 : 0))
#define LIGHTSEQ_WGMMA_OF_REGISTERS(TYPE) \
  LIGHTSEQ_WGMMA(TYPE, "{%32, %33, %34, %35}, %36, 1, 1, 1, 1;", "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))

// sum (64, 64) = or, to ADD, += a (64, 16) b (64, 16) transposed, of slabs whose rows are those of a and b.
template <typename T, bool ADD>
__device__ __forceinline__ void add_product(float (&sum)[8][4], uint64_t a, uint64_t b) {
#ifdef LIGHTSEQ_WARPGROUPS
  if constexpr (std::is_same_v<T, __half>) {
    LIGHTSEQ_WGMMA_OF_SLABS("f16");
  } else {
    LIGHTSEQ_WGMMA_OF_SLABS("bf16");
  }
#endif
}

// sum (64, 64) += a (64, 16) b (16, 64); b's slab has its rows, a warp 16 rows of a as mma.sync has a left operand.
template <typename T>
__device__ __forceinline__ void add_product(float (&sum)[8][4], const uint32_t (&a)[4], uint64_t b) {
#ifdef LIGHTSEQ_WARPGROUPS
  if constexpr (std::is_same_v<T, __half>) {
    LIGHTSEQ_WGMMA_OF_REGISTERS("f16");
  } else {
    LIGHTSEQ_WGMMA_OF_REGISTERS("bf16");
  }
#endif
}

#undef LIGHTSEQ_WGMMA_OF_REGISTERS
#undef LIGHTSEQ_WGMMA_OF_SLABS
#undef LIGHTSEQ_WGMMA
#undef LIGHTSEQ_SUMS

// ----------------------------------------------------------------------------------------------------------------
// whether they are there

// Has shared memory of its own where the GPU runs what was compiled for sm_90a.
constexpr int kProbeWords = 256;
template <int WORDS>
__global__ void warpgroup_probe(int* to) {
#ifdef LIGHTSEQ_WARPGROUPS
  __shared__ int words[WORDS];
  words[threadIdx.x] = static_cast<int>(clock64());
  __syncthreads();
  *to = words[WORDS - 1 - threadIdx.x];
#endif
}

// Whether kernels have their bodies on this GPU: not where a build is for sm_90 and not for sm_90a, nor on later GPUs.
// Which of several builds serves is the driver's choice, which this asks for.
inline bool has_warpgroups() {
  cudaFuncAttributes attributes;
  check_launch("warpgroup_probe", cudaFuncGetAttributes(&attributes, warpgroup_probe<kProbeWords>));
  return attributes.sharedSizeBytes >= kProbeWords * sizeof(int);
}

}  // namespace lightseq
