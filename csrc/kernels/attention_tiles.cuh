// Attention of 16-bit types on tensor cores, forward. One block computes up to 128 queries of one (sentence, head), 16 a warp.
//
// Sentences of translation have 20 to 60 tokens: their keys fit one tile of KEYS rows in shared memory, the softmax
// of a row is taken at once in registers, and nothing is rescaled. Longer ones loop over tiles, the next one being
// copied meanwhile, with the running maximum and sum of flash attention (Dao et al. 2022).
// Floor: each of q, k, v, out moves once, 8 N H D bytes; 2646 tokens, H = 8, D = 64: 10.8 MB, 2.6 us at 4.2 TB/s. At that size
// latency rules: two dependent trips to memory (cu_seqlens, rows), then about 1 us of arithmetic.
#pragma once

#include "../common/tensor_core.cuh"
#include "attention.cuh"

namespace lightseq {
namespace attention {

constexpr float kLog2e = 1.4426950408889634f;
constexpr int kMaxWarps = 8;

// Elements between rows of a shared tile: an odd number of 16-byte units.
constexpr int padded(int columns) { return columns + 8; }

__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Starts copying `rows` rows of one head, D wide, into a shared tile; zeros past `inside` rows and past head_dim columns.
template <int D, typename T>
__device__ __forceinline__ void copy_rows(T* tile, const T* from, long stride, int rows, int inside, int head_dim) {
  constexpr int kUnits = D / 8;  // of 16 bytes
  for (int i = threadIdx.x; i < rows * kUnits; i += blockDim.x) {
    const int row = i / kUnits, column = i % kUnits * 8;
    const bool real = row < inside && column < head_dim;
    copy_async(tile + row * padded(D) + column, real ? from + row * stride + column : from, real);
  }
}

// Writes the accumulators of 16 rows x 32 columns, times a factor for each half of the rows, from `row` on.
template <typename T>
__device__ __forceinline__ void store_rows(const Heads<T>& x, long row, int head, int rows, int column, int head_dim,
                                           const float (*c)[4], float upper, float lower) {
  const int lane = threadIdx.x % kWarp, g = lane / 4;
  column += lane % 4 * 8;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float factor = half ? lower : upper;
    uint32_t words[4];
#pragma unroll
    for (int n = 0; n < 4; ++n) words[n] = pack<T>(c[n][2 * half] * factor, c[n][2 * half + 1] * factor);
    const uint4 columns = gather_columns(words);
    if (g + 8 * half < rows && column < head_dim) {
      *reinterpret_cast<uint4*>(x.row(row + g + 8 * half, head) + column) = columns;
    }
  }
}

// ----------------------------------------------------------------------------------------------------------------
// CUDA kernels

// Grid: ((B + 1) H, query tiles of 16 rows a warp). out, q (Nq, H, head_dim), k, v (Nk, H, head_dim), lse (H, Nq).
// Shared: q (16 warps, D), then k and v (stages, KEYS, D) each; 2 stages if any sentence may need several tiles.
template <typename T, int D, int KEYS>
__global__ void __launch_bounds__(kMaxWarps* kWarp)
    forward_tiles(Heads<T> out, float* lse, Heads<const T> q, Heads<const T> k, Heads<const T> v, Problem p) {
  extern __shared__ uint4 shared[];
  constexpr int kStride = padded(D);
  const int head = blockIdx.x % p.heads, sentence = blockIdx.x / p.heads;
  const Span span(p, sentence);
  if (!span.real) {
    if (blockIdx.y == 0) clear_rows(out, span.q_begin, span.q_len, head, p.head_dim);
    return;
  }
  const int block_rows = blockDim.x / 2, first = blockIdx.y * block_rows;
  if (first >= span.q_len) return;

  // Shared memory, and the first tiles on their way into it: q with k, then v.
  const int stages = p.max_len_k > KEYS ? 2 : 1;
  T* const q_tile = reinterpret_cast<T*>(shared);
  T* const k_tiles = q_tile + block_rows * kStride;
  T* const v_tiles = k_tiles + stages * KEYS * kStride;
  const int keys = span.visible(min(first + block_rows, span.q_len) - 1);
  const T* const k_rows = k.row(span.k_begin, head);
  const T* const v_rows = v.row(span.k_begin, head);
  const auto copy_tile = [&](T* tiles, const T* rows, long stride, int base) {
    const int inside = min(keys - base, KEYS);
    if (inside > 0) {
      copy_rows<D>(tiles + base / KEYS % 2 * KEYS * kStride, rows + base * stride, stride, (inside + 31) / 32 * 32,
                   inside, p.head_dim);
    }
    commit_copies();
  };
  copy_rows<D>(q_tile, q.row(span.q_begin + first, head), q.token_stride, block_rows, span.q_len - first, p.head_dim);
  copy_tile(k_tiles, k_rows, k.token_stride, 0);
  copy_tile(v_tiles, v_rows, v.token_stride, 0);

  const ProbabilityMask mask(p.dropout, sentence, head);
  const int lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
  const int offset = threadIdx.x / kWarp * 16, row = first + offset;  // of this warp
  const int reach = row < span.q_len ? span.visible(row + 15) : 0;
  const int seen[2] = {span.visible(row + g), span.visible(row + g + 8)};
  const float scale = static_cast<float>(p.scale) * kLog2e;
  float o[D / 8][4] = {}, top[2] = {-INFINITY, -INFINITY}, sum[2] = {0.f, 0.f};

  for (int base = 0; base < keys; base += KEYS) {
    copy_tile(k_tiles, k_rows, k.token_stride, base + KEYS);
    copy_tile(v_tiles, v_rows, v.token_stride, base + KEYS);
    const T* const k_tile = k_tiles + base / KEYS % 2 * KEYS * kStride;
    const T* const v_tile = v_tiles + base / KEYS % 2 * KEYS * kStride;
    await_copies<3>();
    __syncthreads();

    // s = q k^T, 32 keys at a time
    float s[KEYS / 8][4];
#pragma unroll
    for (int j = 0; j < KEYS; j += 32) {
      if (base + j < reach) {
#pragma unroll
        for (int n = j / 8; n < j / 8 + 4; ++n) s[n][0] = s[n][1] = s[n][2] = s[n][3] = 0.f;
#pragma unroll
        for (int d = 0; d < D; d += 16) {
          uint32_t a[4], b[4];
          load_left(a, q_tile + offset * kStride + d, kStride);
#pragma unroll
          for (int n = j / 8; n < j / 8 + 4; n += 2) {
            load_right(b, k_tile + n * 8 * kStride + d, kStride);
            multiply_add<T>(s[n], a, b[0], b[1]);
            multiply_add<T>(s[n + 1], a, b[2], b[3]);
          }
        }
      }
    }

    // The rows' new maxima; -inf where nothing is seen
    float peak[2] = {top[0], top[1]};
#pragma unroll
    for (int n = 0; n < KEYS / 8; ++n) {
      if (base + n / 4 * 32 < reach) {
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          const int key = base + 8 * n + 2 * t + c % 2;
          s[n][c] = key < seen[c / 2] ? s[n][c] * scale : -INFINITY;
          peak[c / 2] = fmaxf(peak[c / 2], s[n][c]);
        }
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      peak[half] = fmaxf(peak[half], __shfl_xor_sync(0xffffffffu, peak[half], 1));
      peak[half] = fmaxf(peak[half], __shfl_xor_sync(0xffffffffu, peak[half], 2));
    }
    if (base > 0) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float shrink = peak[half] == top[half] ? 1.f : exp2_fast(top[half] - peak[half]);
        sum[half] *= shrink;
#pragma unroll
        for (int n = 0; n < D / 8; ++n) {
          o[n][2 * half] *= shrink;
          o[n][2 * half + 1] *= shrink;
        }
      }
    }
    top[0] = peak[0];
    top[1] = peak[1];
    await_copies<2>();
    __syncthreads();

    // p = exp(s - top), summed before dropout; o += dropout(p) v, 16 keys at a time
#pragma unroll
    for (int j = 0; j < KEYS; j += 16) {
      if (base + j / 32 * 32 < reach) {
        const uint32_t kept = mask.kept(row / 16, (base + j) / 16);
        uint32_t a[4];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float peak_or_0 = top[half] == -INFINITY ? 0.f : top[half];
#pragma unroll
          for (int n = 0; n < 2; ++n) {
            float probability[2];
#pragma unroll
            for (int c = 0; c < 2; ++c) {
              const float e = exp2_fast(s[j / 8 + n][2 * half + c] - peak_or_0);
              sum[half] += e;
              probability[c] = kept >> (4 * n + 2 * half + c) & 1 ? e : 0.f;
            }
            a[2 * n + half] = pack<T>(probability[0], probability[1]);
          }
        }
#pragma unroll
        for (int n = 0; n < D / 8; n += 2) {
          uint32_t b[4];
          load_right_transposed(b, v_tile + j * kStride + n * 8, kStride);
          multiply_add<T>(o[n], a, b[0], b[1]);
          multiply_add<T>(o[n + 1], a, b[2], b[3]);
        }
      }
    }
    if (base + KEYS < keys) __syncthreads();  // before the tile after the next overwrites this one
  }

#pragma unroll
  for (int half = 0; half < 2; ++half) {
    sum[half] += __shfl_xor_sync(0xffffffffu, sum[half], 1);
    sum[half] += __shfl_xor_sync(0xffffffffu, sum[half], 2);
    const int query = row + g + 8 * half;
    if (t == 0 && query < span.q_len) {
      lse[head * p.tokens_q + span.q_begin + query] =
          sum[half] > 0.f ? (top[half] + log2f(sum[half])) / kLog2e : INFINITY;
    }
  }
  const float upper = sum[0] > 0.f ? p.dropout.scale / sum[0] : 0.f;
  const float lower = sum[1] > 0.f ? p.dropout.scale / sum[1] : 0.f;
#pragma unroll
  for (int n = 0; n < D / 8; n += 4) {
    store_rows(out, span.q_begin + row, head, span.q_len - row, 8 * n, p.head_dim, o + n, upper, lower);
  }
}

// ----------------------------------------------------------------------------------------------------------------
// kernel launchers

// More than 48 KiB of shared memory must be asked for.
template <typename Kernel>
void allow_shared(Kernel kernel, const char* name, int bytes) {
  if (bytes > 48 * 1024) {
    check_launch(name, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
  }
}

template <typename T, int D, int KEYS>
void launch_forward(const Heads<T>& out, float* lse, const Heads<const T>& q, const Heads<const T>& k,
                    const Heads<const T>& v, const Problem& p, int shared_limit, cudaStream_t stream) {
  const int stages = p.max_len_k > KEYS ? 2 : 1;
  const auto bytes = [&](int warps) { return (16 * warps + 2 * stages * KEYS) * padded(D) * int(sizeof(T)); };
  int warps = max(1, min(kMaxWarps, ceil_div(p.max_len_q, 16)));
  while (warps > 1 && bytes(warps) > shared_limit) --warps;
  const dim3 grid((p.sentences + 1) * p.heads, max(1, ceil_div(p.max_len_q, 16 * warps)));
  allow_shared(forward_tiles<T, D, KEYS>, "attention::forward_tiles", bytes(warps));
  forward_tiles<T, D, KEYS><<<grid, warps * kWarp, bytes(warps), stream>>>(out, lse, q, k, v, p);
  LIGHTSEQ_CHECK_LAUNCH("attention::forward_tiles");
}

// Calls f with std::integral_constant of the tile width that holds head_dim.
template <typename F>
void with_width(int head_dim, F&& f) {
  if (head_dim <= 32) {
    f(std::integral_constant<int, 32>{});
  } else if (head_dim <= 64) {
    f(std::integral_constant<int, 64>{});
  } else if (head_dim <= 128) {
    f(std::integral_constant<int, 128>{});
  } else {
    f(std::integral_constant<int, 256>{});
  }
}

// head_dim a multiple of 8 up to 256; rows of q, k, v, out at multiples of 16 bytes.
template <typename T>
void forward_on_tensor_cores(const Heads<T>& out, float* lse, const Heads<const T>& q, const Heads<const T>& k,
                             const Heads<const T>& v, const Problem& p, int shared_limit, cudaStream_t stream) {
  with_width(p.head_dim, [&](auto width) {
    if (p.max_len_k <= 32 || width == 256) {
      launch_forward<T, width, 32>(out, lse, q, k, v, p, shared_limit, stream);
    } else {
      launch_forward<T, width, width == 256 ? 32 : 64>(out, lse, q, k, v, p, shared_limit, stream);
    }
  });
}

}  // namespace attention
}  // namespace lightseq
