// Attention of 16-bit types on tensor cores, backward.
//
// With p = exp(s - lse) recomputed, m the dropout mask (0 or 1 / (1 - rate)) and delta = sum(dout * out) of each row:
//   dv = (m p)^T dout,   ds = p (m dout v^T - delta),   dq = scale ds k,   dk = scale ds^T q
//
// Sentences that fit: one block computes all three gradients of a (sentence, head), everything in shared memory: q, k, v,
// dout and, in 16 bits, m p and ds. Three steps with a barrier between: copy; squares of scores; strips of the three
// products. Squares and strips are dealt to the warps in turn, so that all are busy even for a short sentence, and no
// accumulator outlives its piece, which keeps registers few whatever D is.
// Longer ones: one block a tile of 64 queries makes dq, then one block a tile of 64 keys makes dk and dv. Each walks
// over the other side and computes the scores again: 7 products of tiles in place of 5, and no atomics.
// Floor: q, k, v, out, dout in and dq, dk, dv out, 16 N H D bytes; 2646 tokens, H = 8, D = 64: 21.7 MB, 5.2 us at 4.2 TB/s.
#pragma once

#include "attention_tiles.cuh"

namespace lightseq {
namespace attention {

// What the scores of a block are computed from and go to, in shared memory.
template <typename T>
struct ScoreTiles {
  T *q, *dout;         // (queries, D)
  T *k, *v;            // (keys, D)
  T *mp, *ds;          // (queries, keys), rows score_stride apart
  float *lse, *delta;  // (queries,); lse in powers of 2
  int score_stride;
};

// m p and ds of the square of 16 MQ queries from query0 on and 16 MK keys from key0 on, counted in the tiles, which start at
// first_query and first_key of the sentence.
template <typename T, int D, int MQ, int MK>
__device__ __forceinline__ void score_square(const ScoreTiles<T>& tile, int query0, int key0, int first_query,
                                             int first_key, const Span& span, const ProbabilityMask& mask,
                                             const Problem& p) {
  constexpr int kStride = padded(D);
  float s[MQ][2 * MK][4] = {}, dp[MQ][2 * MK][4] = {};
  const auto multiply = [&](float(&c)[MQ][2 * MK][4], const T* left, const T* right, int d) {
    uint32_t a[MQ][4], b[MK][4];
#pragma unroll
    for (int m = 0; m < MQ; ++m) load_left(a[m], left + (query0 + 16 * m) * kStride + d, kStride);
#pragma unroll
    for (int n = 0; n < MK; ++n) load_right(b[n], right + (key0 + 16 * n) * kStride + d, kStride);
#pragma unroll
    for (int m = 0; m < MQ; ++m) {
#pragma unroll
      for (int n = 0; n < 2 * MK; ++n) multiply_add<T>(c[m][n], a[m], b[n / 2][n % 2 * 2], b[n / 2][n % 2 * 2 + 1]);
    }
  };
#pragma unroll
  for (int d = 0; d < D; d += 16) {
    multiply(s, tile.q, tile.k, d);
    multiply(dp, tile.dout, tile.v, d);
  }

  const int lane = threadIdx.x % kWarp;
  const float scale = static_cast<float>(p.scale) * kLog2e;
#pragma unroll
  for (int m = 0; m < MQ; ++m) {
    uint32_t kept[MK];
#pragma unroll
    for (int n = 0; n < MK; ++n) {
      kept[n] = mask.kept((first_query + query0) / 16 + m, (first_key + key0) / 16 + n);
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int query = query0 + 16 * m + 8 * half + lane / 4;
      const int seen = span.visible(first_query + query) - first_key;
      const float lse = tile.lse[query], delta = tile.delta[query];
#pragma unroll
      for (int n = 0; n < 2 * MK; ++n) {
        const int key = key0 + 8 * n + lane % 4 * 2;
        float mp[2], ds[2];
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const bool keep = kept[n / 2] >> (4 * (n % 2) + 2 * half + c) & 1;
          const float e = key + c < seen ? exp2_fast(s[m][n][2 * half + c] * scale - lse) : 0.f;
          mp[c] = keep ? e * p.dropout.scale : 0.f;
          ds[c] = e * ((keep ? dp[m][n][2 * half + c] * p.dropout.scale : 0.f) - delta);
        }
        const int at = query * tile.score_stride + key;
        *reinterpret_cast<uint32_t*>(tile.mp + at) = pack<T>(mp[0], mp[1]);
        *reinterpret_cast<uint32_t*>(tile.ds + at) = pack<T>(ds[0], ds[1]);
      }
    }
  }
}

// c (16 M, 32) += left (16 M, 16) right (16, 32); left stored (16, 16 M) if TRANSPOSED.
template <typename T, int D, int M, bool TRANSPOSED>
__device__ __forceinline__ void multiply_strip(float (&c)[M][4][4], const T* left, int left_stride, const T* right) {
  uint32_t a[M][4], b[2][4];
#pragma unroll
  for (int m = 0; m < M; ++m) {
    if constexpr (TRANSPOSED) {
      load_left_transposed(a[m], left + 16 * m, left_stride);
    } else {
      load_left(a[m], left + 16 * m * left_stride, left_stride);
    }
  }
#pragma unroll
  for (int n = 0; n < 2; ++n) load_right_transposed(b[n], right + 16 * n, padded(D));
#pragma unroll
  for (int m = 0; m < M; ++m) {
#pragma unroll
    for (int n = 0; n < 4; ++n) multiply_add<T>(c[m][n], a[m], b[n / 2][n % 2 * 2], b[n / 2][n % 2 * 2 + 1]);
  }
}

// Writes 16 M rows from `row` on of the sentence's rows first, first + 1, ...; none past `len`.
template <typename T, int M>
__device__ __forceinline__ void store_strip(const Heads<T>& x, long first, int row, int len, int head, int column,
                                            int head_dim, const float (&c)[M][4][4], float factor) {
#pragma unroll
  for (int m = 0; m < M; ++m) {
    const int start = row + 16 * m;
    store_rows(x, first + start, head, len - start, column, head_dim, c[m], factor, factor);
  }
}

// delta = sum(dout * out) of rows [first, first + rows) of a sentence, into shared memory and, unless null, to where
// the sentence's rows are; 0 past the sentence.
template <int D, typename T>
__device__ __forceinline__ void sum_rows(float* delta, float* global, int first, int rows, const Span& span,
                                         const Heads<const T>& dout, const Heads<const T>& out, int head,
                                         int head_dim) {
  constexpr int kLanes = D / 8;  // of a row
  for (int i = threadIdx.x; i < rows * kLanes; i += blockDim.x) {
    const int row = i / kLanes, column = i % kLanes * 8;
    const bool inside = first + row < span.q_len;
    float sum = 0.f;
    if (inside && column < head_dim) {
      float a[8], b[8];
      load<8>(dout.row(span.q_begin + first + row, head) + column, a);
      load<8>(out.row(span.q_begin + first + row, head) + column, b);
#pragma unroll
      for (int c = 0; c < 8; ++c) sum += a[c] * b[c];
    }
#pragma unroll
    for (int apart = kLanes / 2; apart > 0; apart /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, apart);
    if (column == 0) {
      delta[row] = sum;
      if (global != nullptr && inside) global[first + row] = sum;
    }
  }
}

__device__ __forceinline__ float in_powers_of_2(const float* lse, int row, int len) {
  return row < len ? lse[row] * kLog2e : INFINITY;
}

constexpr int rounded(int rows, int to) { return (rows + to - 1) / to * to; }

// ----------------------------------------------------------------------------------------------------------------
// CUDA kernels. dq, dout, out, q (Nq, H, head_dim), dk, dv, k, v (Nk, H, head_dim), lse, delta (H, Nq).

// Shared memory of backward_sentences for the longest sentence.
template <typename T, int D, int M>
constexpr int sentence_bytes(int max_len_q, int max_len_k) {
  const int rows = rounded(max_len_q, 16 * M), columns = rounded(max_len_k, 16 * M);
  return (2 * (rows + columns) * padded(D) + 2 * rows * padded(columns)) * sizeof(T) + 2 * rows * sizeof(float);
}

// Grid: (B + 1) H. Squares are 16 M x 16 M, strips 16 M x 32.
template <typename T, int D, int M>
__global__ void __launch_bounds__(kMaxWarps* kWarp)
    backward_sentences(Heads<T> dq, Heads<T> dk, Heads<T> dv, Heads<const T> dout, Heads<const T> out,
                       const float* lse, Heads<const T> q, Heads<const T> k, Heads<const T> v, Problem p) {
  extern __shared__ uint4 shared[];
  constexpr int kRows = 16 * M;
  const int head = blockIdx.x % p.heads, sentence = blockIdx.x / p.heads;
  const Span span(p, sentence);
  if (!span.real) {
    clear_rows(dq, span.q_begin, span.q_len, head, p.head_dim);
    clear_rows(dk, span.k_begin, span.k_len, head, p.head_dim);
    clear_rows(dv, span.k_begin, span.k_len, head, p.head_dim);
    return;
  }

  ScoreTiles<T> tile;
  const int most_rows = rounded(p.max_len_q, kRows), most_columns = rounded(p.max_len_k, kRows);
  tile.score_stride = padded(most_columns);
  tile.q = reinterpret_cast<T*>(shared);
  tile.dout = tile.q + most_rows * padded(D);
  tile.k = tile.dout + most_rows * padded(D);
  tile.v = tile.k + most_columns * padded(D);
  tile.mp = tile.v + most_columns * padded(D);
  tile.ds = tile.mp + most_rows * tile.score_stride;
  tile.lse = reinterpret_cast<float*>(tile.ds + most_rows * tile.score_stride);
  tile.delta = tile.lse + most_rows;

  const int rows = rounded(span.q_len, kRows), columns = rounded(span.k_len, kRows);
  copy_rows<D>(tile.q, q.row(span.q_begin, head), q.token_stride, rows, span.q_len, p.head_dim);
  copy_rows<D>(tile.k, k.row(span.k_begin, head), k.token_stride, columns, span.k_len, p.head_dim);
  copy_rows<D>(tile.dout, dout.row(span.q_begin, head), dout.token_stride, rows, span.q_len, p.head_dim);
  copy_rows<D>(tile.v, v.row(span.k_begin, head), v.token_stride, columns, span.k_len, p.head_dim);
  commit_copies();
  sum_rows<D>(tile.delta, nullptr, 0, rows, span, dout, out, head, p.head_dim);
  for (int i = threadIdx.x; i < rows; i += blockDim.x) {
    tile.lse[i] = in_powers_of_2(lse + head * p.tokens_q + span.q_begin, i, span.q_len);
  }
  const ProbabilityMask mask(p.dropout, sentence, head);
  await_copies<0>();
  __syncthreads();

  // Squares that no query of theirs sees are left out, here and in the products below.
  const int warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  const auto hidden = [&](int query, int key) {
    return span.visible(query / kRows * kRows + kRows - 1) <= key / kRows * kRows;
  };
  const int squares = columns / kRows;
  for (int i = warp; i < rows / kRows * squares; i += warps) {
    const int query = i / squares * kRows, key = i % squares * kRows;
    if (!hidden(query, key)) score_square<T, D, M, M>(tile, query, key, 0, 0, span, mask, p);
  }
  __syncthreads();

  // Strips of dq, then of dk, then of dv
  constexpr int kStrips = D / 32;
  const float scale = static_cast<float>(p.scale);
  for (int i = warp; i < (rows + 2 * columns) / kRows * kStrips; i += warps) {
    const int column = i % kStrips * 32;
    int row = i / kStrips * kRows;
    float c[M][4][4] = {};
    if (row < rows) {
      for (int key = 0; key < columns && !hidden(row, key); key += 16) {
        multiply_strip<T, D, M, false>(c, tile.ds + row * tile.score_stride + key, tile.score_stride,
                                       tile.k + key * padded(D) + column);
      }
      store_strip(dq, span.q_begin, row, span.q_len, head, column, p.head_dim, c, scale);
      continue;
    }
    row -= rows;
    const bool values = row >= columns;
    if (values) row -= columns;
    const T* const left = (values ? tile.mp : tile.ds) + row;
    const T* const right = (values ? tile.dout : tile.q) + column;
    for (int query = 0; query < rows; query += 16) {
      if (hidden(query, row)) continue;
      multiply_strip<T, D, M, true>(c, left + query * tile.score_stride, tile.score_stride, right + query * padded(D));
    }
    const Heads<T> gradient = {values ? dv.data : dk.data, values ? dv.token_stride : dk.token_stride,
                               values ? dv.head_stride : dk.head_stride};
    store_strip(gradient, span.k_begin, row, span.k_len, head, column, p.head_dim, c, values ? 1.f : scale);
  }
}

constexpr int kTile = 64;

// Shared memory of backward_tiles: a tile that stays and two that pass, of two operands each; mp, ds, lse, delta.
template <typename T, int D>
constexpr int tile_bytes() {
  return (6 * kTile * padded(D) + 2 * kTile * padded(kTile)) * sizeof(T) + 2 * kTile * sizeof(float);
}

// Grid: ((B + 1) H, tiles of 64 keys if KEYS_STAY, else of queries). With KEYS_STAY dk and dv, else dq and delta, which the
// former reads. Squares are 32 x 32, or 32 x 16 for 8 warps; strips 32 x 32, their sums kept in registers over all tiles.
template <typename T, int D, bool KEYS_STAY, int WARPS>
__global__ void __launch_bounds__(WARPS* kWarp)
    backward_tiles(Heads<T> dq, Heads<T> dk, Heads<T> dv, float* delta, Heads<const T> dout, Heads<const T> out,
                   const float* lse, Heads<const T> q, Heads<const T> k, Heads<const T> v, Problem p) {
  extern __shared__ uint4 shared[];
  constexpr int kStride = padded(D), kScoreStride = padded(kTile), kSize = kTile * kStride;
  const int head = blockIdx.x % p.heads, sentence = blockIdx.x / p.heads;
  const Span span(p, sentence);
  if (!span.real) {
    if (blockIdx.y > 0) return;
    if (!KEYS_STAY) clear_rows(dq, span.q_begin, span.q_len, head, p.head_dim);
    if (KEYS_STAY) clear_rows(dk, span.k_begin, span.k_len, head, p.head_dim);
    if (KEYS_STAY) clear_rows(dv, span.k_begin, span.k_len, head, p.head_dim);
    return;
  }
  const int first = blockIdx.y * kTile;
  if (first >= (KEYS_STAY ? span.k_len : span.q_len)) return;
  lse += head * p.tokens_q + span.q_begin;
  delta += head * p.tokens_q + span.q_begin;

  // The other side's tiles that see this one, or that it sees: [begin, end)
  const int hidden_queries = span.causal ? max(0, first - (span.k_len - span.q_len)) : 0;
  const int begin = KEYS_STAY ? hidden_queries / kTile * kTile : 0;
  const int end = KEYS_STAY ? span.q_len : span.visible(min(first + kTile, span.q_len) - 1);

  // Queries (q, dout) and keys (k, v); those that pass have two places each.
  T* const staying = reinterpret_cast<T*>(shared);
  T* const passing = staying + 2 * kSize;
  ScoreTiles<T> tile;
  tile.mp = passing + 4 * kSize;
  tile.ds = tile.mp + kTile * kScoreStride;
  tile.lse = reinterpret_cast<float*>(tile.ds + kTile * kScoreStride);
  tile.delta = tile.lse + kTile;
  tile.score_stride = kScoreStride;
  const auto copy_queries = [&](T* to, int row) {
    const int inside = span.q_len - row;
    copy_rows<D>(to, q.row(span.q_begin + row, head), q.token_stride, kTile, inside, p.head_dim);
    copy_rows<D>(to + kSize, dout.row(span.q_begin + row, head), dout.token_stride, kTile, inside, p.head_dim);
  };
  const auto copy_keys = [&](T* to, int row) {
    const int inside = span.k_len - row;
    copy_rows<D>(to, k.row(span.k_begin + row, head), k.token_stride, kTile, inside, p.head_dim);
    copy_rows<D>(to + kSize, v.row(span.k_begin + row, head), v.token_stride, kTile, inside, p.head_dim);
  };
  const auto copy_passing = [&](int row) {
    T* const to = passing + row / kTile % 2 * 2 * kSize;
    if (row < end) KEYS_STAY ? copy_queries(to, row) : copy_keys(to, row);
    commit_copies();
  };
  KEYS_STAY ? copy_keys(staying, first) : copy_queries(staying, first);
  copy_passing(begin);

  // Row sums: those of staying queries once, those of passing ones a tile ahead, in a register of one thread each.
  const int row_of_thread = threadIdx.x % kTile;
  const auto row_sum = [&](int row) {
    if (threadIdx.x < kTile) return in_powers_of_2(lse, row + row_of_thread, span.q_len);
    return row + row_of_thread < span.q_len ? delta[row + row_of_thread] : 0.f;
  };
  float next_sum = KEYS_STAY ? row_sum(begin) : 0.f;
  if (!KEYS_STAY) {
    sum_rows<D>(tile.delta, delta, first, kTile, span, dout, out, head, p.head_dim);
    if (threadIdx.x < kTile) tile.lse[row_of_thread] = in_powers_of_2(lse, first + row_of_thread, span.q_len);
  }

  const ProbabilityMask mask(p.dropout, sentence, head);
  constexpr int kColumns = D / 32, kStrips = (KEYS_STAY ? 4 : 2) * kColumns, kOwn = (kStrips + WARPS - 1) / WARPS;
  const int warp = threadIdx.x / kWarp;
  float c[kOwn][2][4][4] = {};
  for (int base = begin; base < end; base += kTile) {
    copy_passing(base + kTile);
    T* const passing_tile = passing + base / kTile % 2 * 2 * kSize;
    tile.q = KEYS_STAY ? passing_tile : staying;
    tile.k = KEYS_STAY ? staying : passing_tile;
    tile.dout = tile.q + kSize;
    tile.v = tile.k + kSize;
    if (KEYS_STAY) {
      if (threadIdx.x < 2 * kTile) tile.lse[threadIdx.x] = next_sum;  // delta lies behind lse
      next_sum = row_sum(base + kTile);
    }
    await_copies<1>();
    __syncthreads();

    constexpr int kSquareKeys = WARPS == 8 ? 1 : 2, kSquares = kTile / (16 * kSquareKeys);
    score_square<T, D, 2, kSquareKeys>(tile, warp / kSquares * 32, warp % kSquares * 16 * kSquareKeys,
                                       KEYS_STAY ? base : first, KEYS_STAY ? first : base, span, mask, p);
    __syncthreads();

#pragma unroll
    for (int own = 0; own < kOwn; ++own) {
      const int strip = warp + own * WARPS, column = strip % kColumns * 32, row = strip / kColumns % 2 * 32;
      if (strip >= kStrips) break;
      const bool values = strip / kColumns >= 2;
#pragma unroll
      for (int i = 0; i < kTile; i += 16) {
        if constexpr (KEYS_STAY) {
          multiply_strip<T, D, 2, true>(c[own], (values ? tile.mp : tile.ds) + i * kScoreStride + row, kScoreStride,
                                        (values ? tile.dout : tile.q) + i * kStride + column);
        } else {
          multiply_strip<T, D, 2, false>(c[own], tile.ds + row * kScoreStride + i, kScoreStride,
                                         tile.k + i * kStride + column);
        }
      }
    }
    __syncthreads();  // before scores and the tile after the next are written
  }

  const float scale = static_cast<float>(p.scale);
#pragma unroll
  for (int own = 0; own < kOwn; ++own) {
    const int strip = warp + own * WARPS, column = strip % kColumns * 32, row = first + strip / kColumns % 2 * 32;
    if (strip >= kStrips) break;
    if (!KEYS_STAY) {
      store_strip(dq, span.q_begin, row, span.q_len, head, column, p.head_dim, c[own], scale);
    } else if (strip / kColumns < 2) {
      store_strip(dk, span.k_begin, row, span.k_len, head, column, p.head_dim, c[own], scale);
    } else {
      store_strip(dv, span.k_begin, row, span.k_len, head, column, p.head_dim, c[own], 1.f);
    }
  }
}

// ----------------------------------------------------------------------------------------------------------------
// kernel launchers

template <typename T, int D, int M>
void launch_sentences(const Heads<T>& dq, const Heads<T>& dk, const Heads<T>& dv, const Heads<const T>& dout,
                      const Heads<const T>& out, const float* lse, const Heads<const T>& q, const Heads<const T>& k,
                      const Heads<const T>& v, const Problem& p, cudaStream_t stream) {
  const int bytes = sentence_bytes<T, D, M>(p.max_len_q, p.max_len_k);
  const int warps = ceil_div(p.max_len_q, 16 * M) * ceil_div(p.max_len_k, 16 * M) > 4 ? kMaxWarps : 4;
  allow_shared(backward_sentences<T, D, M>, "attention::backward_sentences", bytes);
  backward_sentences<T, D, M><<<(p.sentences + 1) * p.heads, warps * kWarp, bytes, stream>>>(dq, dk, dv, dout, out, lse,
                                                                                            q, k, v, p);
  LIGHTSEQ_CHECK_LAUNCH("attention::backward_sentences");
}

template <typename T, int D, bool KEYS_STAY>
void launch_tiles(const Heads<T>& dq, const Heads<T>& dk, const Heads<T>& dv, float* delta, const Heads<const T>& dout,
                  const Heads<const T>& out, const float* lse, const Heads<const T>& q, const Heads<const T>& k,
                  const Heads<const T>& v, const Problem& p, cudaStream_t stream) {
  constexpr int kWarps = D > 64 ? 8 : 4;
  const dim3 grid((p.sentences + 1) * p.heads, max(1, ceil_div(KEYS_STAY ? p.max_len_k : p.max_len_q, kTile)));
  allow_shared(backward_tiles<T, D, KEYS_STAY, kWarps>, "attention::backward_tiles", tile_bytes<T, D>());
  backward_tiles<T, D, KEYS_STAY, kWarps><<<grid, kWarps * kWarp, tile_bytes<T, D>(), stream>>>(dq, dk, dv, delta, dout,
                                                                                               out, lse, q, k, v, p);
  LIGHTSEQ_CHECK_LAUNCH("attention::backward_tiles");
}

// As forward_on_tensor_cores. delta is written only for long sentences. False, with nothing done, where the device's shared
// memory does not hold the tiles: long sentences of D = 128 before sm_80's 163 KiB, of D = 256 before sm_90's 227.
template <typename T>
bool backward_on_tensor_cores(const Heads<T>& dq, const Heads<T>& dk, const Heads<T>& dv, float* delta,
                              const Heads<const T>& dout, const Heads<const T>& out, const float* lse,
                              const Heads<const T>& q, const Heads<const T>& k, const Heads<const T>& v,
                              const Problem& p, int shared_limit, cudaStream_t stream) {
  bool done = true;
  with_width(p.head_dim, [&](auto width) {
    if (p.max_len_q <= 32 && p.max_len_k <= 32) {
      launch_sentences<T, width, 1>(dq, dk, dv, dout, out, lse, q, k, v, p, stream);
    } else if (sentence_bytes<T, width, 2>(p.max_len_q, p.max_len_k) <= shared_limit) {
      launch_sentences<T, width, 2>(dq, dk, dv, dout, out, lse, q, k, v, p, stream);
    } else if (tile_bytes<T, width>() <= shared_limit) {
      launch_tiles<T, width, false>(dq, dk, dv, delta, dout, out, lse, q, k, v, p, stream);
      launch_tiles<T, width, true>(dq, dk, dv, delta, dout, out, lse, q, k, v, p, stream);
    } else {
      done = false;
    }
  });
  return done;
}

}  // namespace attention
}  // namespace lightseq
