// Attention of 16-bit types on tensor cores, forward. One block computes up to 64 queries of one (sentence, head), 16 a
// warp.
//
// Sentences of translation have 20 to 60 tokens: their keys fit one tile in shared memory, the softmax of a row is
// taken at once in registers, and nothing is rescaled. Longer ones loop over tiles, the next one being copied
// meanwhile, with the running maximum and sum of flash attention (Dao et al. 2022).
// Floor: each of q, k, v, out moves once, 8 N H D bytes; 2646 tokens, H = 8, D = 64: 10.8 MB, 2.6 us at 4.2 TB/s. At
// that size latency rules: two dependent trips to memory (cu_seqlens, rows), then arithmetic in a line. What does not
// depend on the rows, the random numbers above all, is done while they are on their way.
#pragma once

#include <type_traits>

#include "../common/tensor_core.cuh"
#include "attention.cuh"

namespace lightseq {
namespace attention {

constexpr float kLog2e = 1.4426950408889634f;

// Elements between rows of a shared tile: an odd number of 16-byte units.
constexpr int padded(int columns) { return columns + 8; }

// exp of x in powers of 2
__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// The number of this thread's warp, in a form that the compiler knows to be the same in all its lanes.
__device__ __forceinline__ int warp_number() { return __shfl_sync(0xffffffffu, threadIdx.x / kWarp, 0); }

// Starts copying `rows` rows of one head of each of COUNT tensors, D wide, from `first` on, into shared tiles that lie
// `apart` elements from each other; zeros past `inside` rows and past head_dim columns.
template <int D, int COUNT, typename T>
__device__ __forceinline__ void copy_rows(T* tile, int apart, const Heads<const T> (&x)[COUNT], int first, int head,
                                          int rows, int inside, int head_dim) {
  constexpr int kUnits = D / 8;  // of 16 bytes
  const unsigned column = threadIdx.x % kUnits * 8, step = blockDim.x / kUnits;
  int row = threadIdx.x / kUnits;
  if (column >= head_dim) inside = 0;
  const T* from[COUNT];
#pragma unroll
  for (int i = 0; i < COUNT; ++i) from[i] = x[i].row(first + row, head) + column;
  tile += row * padded(D) + column;
#pragma unroll 1
  for (; row < rows; row += step, tile += step * padded(D)) {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
      copy_async(tile + i * apart, from[i], row < inside);
      from[i] += static_cast<uint64_t>(step) * x[i].token_stride;
    }
  }
}

// Writes the accumulators of 16 rows x 32 columns, times a factor for each half of the rows, from `row` on.
template <typename T>
__device__ __forceinline__ void store_rows(const Heads<T>& x, int row, int head, int rows, int column, int head_dim,
                                           const float (*c)[4], float upper, float lower) {
  const int lane = threadIdx.x % kWarp, g = lane / 4;
  column += lane % 4 * 8;
  T* const to = x.row(row + g, head) + column;
  if (column >= head_dim) rows = 0;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float factor = half ? lower : upper;
    uint32_t words[4];
#pragma unroll
    for (int n = 0; n < 4; ++n) words[n] = pack<T>(c[n][2 * half] * factor, c[n][2 * half + 1] * factor);
    const uint4 columns = gather_columns(words);
    if (g + 8 * half < rows) *reinterpret_cast<uint4*>(to + (half ? 8ul * x.token_stride : 0)) = columns;
  }
}

// -inf where a row does not see a key: scores (16, 8 COUNT) of a warp, the first key `base`; rows g + 8 i of lane
// 4 g + t see seen[i].
template <int COUNT>
__device__ __forceinline__ void hide(float (&s)[COUNT][4], int base, int t, const int (&seen)[2]) {
#pragma unroll
  for (int n = 0; n < COUNT; ++n) {
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      if (base + 8 * n + 2 * t + c % 2 >= seen[c / 2]) s[n][c] = -INFINITY;
    }
  }
}

// exp(scale s - shift) in powers of 2 of 16 keys, s their left and right 8, summed before dropout, in 16 bits as left
// operand of a product: rows g and g + 8.
template <typename T, bool DROPOUT>
__device__ __forceinline__ void take_probabilities(uint32_t (&p)[4], float (&sum)[2], const float (&left)[4],
                                                   const float (&right)[4], float scale, const float (&shift)[2],
                                                   const Draw& draw) {
#pragma unroll
  for (int part = 0; part < 4; ++part) {  // half of the rows + 2 * half of the keys
    const int half = part % 2;
    float kept[2];
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const float e = exp2_fast(fmaf((part / 2 ? right : left)[2 * half + c], scale, -shift[half]));
      sum[half] += e;
      kept[c] = !DROPOUT || draw.keeps(2 * part + c) ? e : 0.f;
    }
    p[part] = pack<T>(kept[0], kept[1]);
  }
}

// What rows `row` + g + 8 i are to be multiplied by, given the sums over the keys of lane 4 g + t; writes their lse.
__device__ __forceinline__ void finish_softmax(float (&factor)[2], float (&sum)[2], const float (&top)[2], float scale,
                                               float* lse, const Problem& p, const Span& span, int row, int g, int t,
                                               int head) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    sum[half] += __shfl_xor_sync(0xffffffffu, sum[half], 1);
    sum[half] += __shfl_xor_sync(0xffffffffu, sum[half], 2);
    factor[half] = sum[half] > 0.f ? __fdividef(p.dropout.scale, sum[half]) : 0.f;
    const int query = row + g + 8 * half;
    if (t == 0 && query < span.q_len) {
      lse[span.sums_begin(p, head) + query] =
          sum[half] > 0.f ? (top[half] * scale + __log2f(sum[half])) / kLog2e : INFINITY;
    }
  }
}

// ----------------------------------------------------------------------------------------------------------------
// CUDA kernels

constexpr int kForwardWarps = 4;

// Blocks of forward_tiles that registers must allow on a multiprocessor: 98 sentences with 8 heads want 6.
constexpr int forward_blocks(int width, bool many) { return width <= 64 ? (many ? 4 : 6) : width <= 128 ? 3 : 2; }

// Grid: (B + 1, H, query tiles of 16 rows a warp). out, q (Nq, H, head_dim), k, v (Nk, H, head_dim), lse (H, Nq).
// Shared: k and v (KEYS, D), each once, or twice if MANY tiles of keys may have to be walked over; q (16 warps, D).
template <typename T, int D, int KEYS, bool MANY>
__global__ void __launch_bounds__(kForwardWarps* kWarp, forward_blocks(D, MANY))
    forward_tiles(Heads<T> out, float* lse, Heads<const T> q, Heads<const T> k, Heads<const T> v, Problem p) {
  extern __shared__ uint4 shared[];
  constexpr int kStride = padded(D), kPlaces = MANY ? 2 : 1;
  const int sentence = blockIdx.x, head = blockIdx.y, block_rows = blockDim.x / 2, first = blockIdx.z * block_rows;
  wait_for_previous();
  const ProbabilityMask mask(p.dropout, sentence, head);
  const Span span(p, sentence);
  if (!has_queries(out, span, first, head, p.head_dim)) return;

  // Shared memory, and the first tiles on their way into it
  T* const k_tiles = reinterpret_cast<T*>(shared);
  T* const v_tiles = k_tiles + kPlaces * KEYS * kStride;
  T* const q_tile = v_tiles + kPlaces * KEYS * kStride;
  const int keys = span.visible(min(first + block_rows, span.q_len) - 1);
  const auto copy_keys = [&](int base) {
    const int inside = min(keys - base, KEYS);
    if (inside > 0) {
      copy_rows<D>(k_tiles + base / KEYS % kPlaces * KEYS * kStride, kPlaces * KEYS * kStride, {k, v},
                   span.k_begin + base, head, (inside + 31) / 32 * 32, inside, p.head_dim);
    }
    commit_copies();
  };
  copy_rows<D>(q_tile, 0, {q}, span.q_begin + first, head, block_rows, span.q_len - first, p.head_dim);
  copy_keys(0);

  const int lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
  const int offset = warp_number() * 16, row = first + offset;  // of this warp
  const int reach = row < span.q_len ? span.visible(row + 15) : 0;
  const int least = span.visible(row);
  const int seen[2] = {span.visible(row + g), span.visible(row + g + 8)};
  const float scale = static_cast<float>(p.scale) * kLog2e;
  float o[D / 8][4] = {}, top[2] = {-INFINITY, -INFINITY}, sum[2] = {0.f, 0.f};

  for (int base = 0; base < keys; base += KEYS) {
    if constexpr (MANY) copy_keys(base + KEYS);
    const T* const k_tile = k_tiles + base / KEYS % kPlaces * KEYS * kStride;
    const T* const v_tile = v_tiles + base / KEYS % kPlaces * KEYS * kStride;
    Draw draws[KEYS / 16];
    if constexpr (!MANY) {
#pragma unroll
      for (int j = 0; j < KEYS / 16; ++j) {
        if (j / 2 * 32 < reach) draws[j] = mask.draw_block(row / 16, j);
      }
    }
    await_copies<MANY ? 1 : 0>();
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

    // -inf where nothing is seen; the rows' new maxima
    if (base + KEYS > least) hide(s, base, t, seen);
    float peak[2] = {top[0], top[1]};
#pragma unroll
    for (int n = 0; n < KEYS / 8; ++n) {
      if (base + n / 4 * 32 < reach) {
#pragma unroll
        for (int c = 0; c < 4; ++c) peak[c / 2] = fmaxf(peak[c / 2], s[n][c]);
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      peak[half] = fmaxf(peak[half], __shfl_xor_sync(0xffffffffu, peak[half], 1));
      peak[half] = fmaxf(peak[half], __shfl_xor_sync(0xffffffffu, peak[half], 2));
    }
    if (MANY && base > 0) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float shrink = peak[half] == top[half] ? 1.f : exp2_fast((top[half] - peak[half]) * scale);
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

    // p = exp(s - top), summed before dropout, in 16 bits as left operand: rows g and g + 8, 16 keys each
    const float shift[2] = {top[0] == -INFINITY ? 0.f : top[0] * scale, top[1] == -INFINITY ? 0.f : top[1] * scale};
    uint32_t probabilities[KEYS / 16][4];
#pragma unroll
    for (int j = 0; j < KEYS / 16; ++j) {
      if (base + j / 2 * 32 < reach) {
        if constexpr (MANY) draws[j] = mask.draw_block(row / 16, base / 16 + j);
        take_probabilities<T, true>(probabilities[j], sum, s[2 * j], s[2 * j + 1], scale, shift, draws[j]);
      }
    }

    // o += dropout(p) v, 16 keys at a time
#pragma unroll
    for (int j = 0; j < KEYS / 16; ++j) {
      if (base + j / 2 * 32 < reach) {
#pragma unroll
        for (int n = 0; n < D / 8; n += 2) {
          uint32_t b[4];
          load_right_transposed(b, v_tile + j * 16 * kStride + n * 8, kStride);
          multiply_add<T>(o[n], probabilities[j], b[0], b[1]);
          multiply_add<T>(o[n + 1], probabilities[j], b[2], b[3]);
        }
      }
    }
    if (!MANY) break;
    if (base + KEYS < keys) __syncthreads();  // before the tile after the next overwrites this one
  }

  float factor[2];
  finish_softmax(factor, sum, top, scale, lse, p, span, row, g, t, head);
#pragma unroll
  for (int n = 0; n < D / 8; n += 4) {
    store_rows(out, span.q_begin + row, head, span.q_len - row, 8 * n, p.head_dim, o + n, factor[0], factor[1]);
  }
}

// ----------------------------------------------------------------------------------------------------------------
// kernel launchers

template <typename T, int D, int KEYS, bool MANY>
void launch_forward(const Heads<T>& out, float* lse, const Heads<const T>& q, const Heads<const T>& k,
                    const Heads<const T>& v, const Problem& p, int shared_limit, cudaStream_t stream) {
  const auto bytes = [](int warps) { return (16 * warps + (MANY ? 4 : 2) * KEYS) * padded(D) * int(sizeof(T)); };
  int warps = max(1, min(kForwardWarps, ceil_div(p.max_len_q, 16)));
  while (warps > 1 && bytes(warps) > shared_limit) --warps;
  const dim3 grid(p.sentences + 1, p.heads, max(1, ceil_div(p.max_len_q, 16 * warps)));
  launch_early("attention::forward_tiles", forward_tiles<T, D, KEYS, MANY>, grid, warps * kWarp, bytes(warps), stream,
               out, lse, q, k, v, p);
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

// head_dim a multiple of 8 up to 256; rows of q, k, v, out at multiples of 16 bytes; scale positive.
template <typename T>
void forward_on_tensor_cores(const Heads<T>& out, float* lse, const Heads<const T>& q, const Heads<const T>& k,
                             const Heads<const T>& v, const Problem& p, int shared_limit, cudaStream_t stream) {
  with_width(p.head_dim, [&](auto width) {
    constexpr int kKeys = width() <= 128 ? 64 : 32;
    if (p.max_len_k <= 32) {
      launch_forward<T, width(), 32, false>(out, lse, q, k, v, p, shared_limit, stream);
    } else if (p.max_len_k <= kKeys) {
      launch_forward<T, width(), kKeys, false>(out, lse, q, k, v, p, shared_limit, stream);
    } else {
      launch_forward<T, width(), kKeys, true>(out, lse, q, k, v, p, shared_limit, stream);
    }
  });
}

}  // namespace attention
}  // namespace lightseq
