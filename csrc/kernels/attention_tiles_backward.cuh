// Attention of 16-bit types on tensor cores, backward.
//
// With p = exp(s - lse) recomputed, m the dropout mask (0 or 1), r = 1 / (1 - rate), delta = sum(dout * out) of a row:
//   dv = r (m p)^T dout,   ds = p (r m dout v^T - delta),   dq = scale ds k,   dk = scale ds^T q
//
// Sentences that fit: one block computes all three gradients of a (sentence, head), everything in shared memory: q, k,
// v, dout and, in 16 bits, m p and ds. Three steps with a barrier between: copy; squares of scores; strips of the three
// products. Squares and strips are dealt to the warps in turn, so that all are busy even for a short sentence, and no
// accumulator outlives its piece, which keeps registers few whatever D is.
// Longer ones: one block a tile of 64 queries makes dq, then one block a tile of 64 keys makes dk and dv. Each walks
// over the other side and computes the scores again: 7 products of tiles in place of 5, and no atomics.
// Floor: q, k, v, out, dout in, dq, dk, dv out, 16 N H D bytes; 2646 tokens, H = 8, D = 64: 21.7 MB, 5.2 us at 4.2
// TB/s.
//
// Measured on an H200 against torch's flash attention, microseconds forward + backward inside a CUDA graph, fp16, H =
// 8, D = 64, dropout 0.1, every call on other data:
//   sentences x tokens   15 x 27     98 x 27    270 x 27    98 x 10-50   60 x 64   30 x 80-128   24 x 100-160
//   here                  2.8 + 3.9   5.1 + 11   11 + 25      8.3 + 16   8.0 + 15     12 + 24        14 + 29
//   flash                 5.8 + 17     19 + 74   47 + 221      19 + 75    14 + 53     11 + 32        18 + 46
//   sentences x tokens   16 x 150-256   8 x 300-512   8 x 1024    8 x 1024 causal
//   here                    19 + 58       29 + 93     112 + 372       73 + 214
//   flash                   16 + 43       25 + 64      87 + 222       75 + 165
// Flash is faster from some 200 tokens on. It is not called there: its mask is no function of the seed, its dq is
// summed in no fixed order, and it is reached only through private operators of torch.
#pragma once

#include "attention_tiles.cuh"

namespace lightseq {
namespace attention {

// What the scores of a block are computed from and go to, in shared memory.
template <typename T>
struct ScoreTiles {
  T *q, *dout;         // (queries, D)
  T *k, *v;            // (keys, D)
  T *kept, *ds;        // m p and ds (queries, keys), rows score_stride apart
  float *lse, *delta;  // (queries,); lse in powers of 2
  int score_stride;
};

// m p and ds of the square of 16 MQ queries from query0 on and 16 MK keys from key0 on, counted in the tiles, which
// start at first_query and first_key of the sentence. draw(m, n) has the random numbers of its 16 x 16 block (m, n).
template <typename T, int D, int MQ, int MK, typename F>
__device__ __forceinline__ void score_square(const ScoreTiles<T>& tile, int query0, int key0, int first_query,
                                             int first_key, const Span& span, const Problem& p, F&& draw) {
  constexpr int kStride = padded(D);
  float s[MQ][2 * MK][4] = {}, dp[MQ][2 * MK][4] = {};
  const auto multiply = [&](float (&c)[MQ][2 * MK][4], const T* left, const T* right, int d) {
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
  const bool whole = first_key + key0 + 16 * MK <= span.visible(first_query + query0);  // seen by all of these queries
#pragma unroll
  for (int m = 0; m < MQ; ++m) {
    Draw draws[MK];
#pragma unroll
    for (int n = 0; n < MK; ++n) draws[n] = draw(m, n);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int query = query0 + 16 * m + 8 * half + lane / 4;
      const float lse = tile.lse[query], delta = tile.delta[query];
      if (!whole) {
        const int seen = span.visible(first_query + query) - first_key - key0 - lane % 4 * 2;
#pragma unroll
        for (int n = 0; n < 2 * MK; ++n) {
#pragma unroll
          for (int c = 0; c < 2; ++c) s[m][n][2 * half + c] = 8 * n + c < seen ? s[m][n][2 * half + c] : -INFINITY;
        }
      }
#pragma unroll
      for (int n = 0; n < 2 * MK; ++n) {
        float kept[2], ds[2];
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const bool keep = draws[n / 2].keeps(4 * (n % 2) + 2 * half + c);
          const float e = exp2_fast(fmaf(s[m][n][2 * half + c], scale, -lse));
          kept[c] = keep ? e : 0.f;
          ds[c] = e * (keep ? fmaf(dp[m][n][2 * half + c], p.dropout.scale, -delta) : -delta);
        }
        const int at = query * tile.score_stride + key0 + 8 * n + lane % 4 * 2;
        *reinterpret_cast<uint32_t*>(tile.kept + at) = pack<T>(kept[0], kept[1]);
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
__device__ __forceinline__ void store_strip(const Heads<T>& x, int first, int row, int len, int head, int column,
                                            int head_dim, const float (&c)[M][4][4], float factor) {
#pragma unroll
  for (int m = 0; m < M; ++m) {
    const int start = row + 16 * m;
    store_rows(x, first + start, head, len - start, column, head_dim, c[m], factor, factor);
  }
}

// delta = sum(dout * out) of rows [first, first + rows) of a sentence, into shared memory and, unless null, to where
// the sentence's rows are; 0 past the sentence. `meanwhile` is called while the first rows are on their way.
template <int D, typename T, typename F>
__device__ __forceinline__ void sum_rows(float* delta, float* global, int first, int rows, const Span& span,
                                         const Heads<const T>& dout, const Heads<const T>& out, int head, int head_dim,
                                         F&& meanwhile) {
  constexpr int kLanes = D / 8, kAhead = 2;  // lanes of a row, with 16 bytes each; accesses under way
  const int column = threadIdx.x % kLanes * 8, step = blockDim.x / kLanes, end = min(rows, span.q_len - first);
  uint4 a[kAhead], b[kAhead];
  const auto fetch = [&](int row) {
#pragma unroll
    for (int i = 0; i < kAhead; ++i, row += step) {
      a[i] = b[i] = make_uint4(0, 0, 0, 0);
      if (row >= end || column >= head_dim) continue;
      a[i] = *reinterpret_cast<const uint4*>(dout.row(span.q_begin + first + row, head) + column);
      b[i] = *reinterpret_cast<const uint4*>(out.row(span.q_begin + first + row, head) + column);
    }
  };
  int row = threadIdx.x / kLanes;
  fetch(row);
  meanwhile();
  while (row < rows) {
#pragma unroll
    for (int i = 0; i < kAhead; ++i, row += step) {
      const auto &x = reinterpret_cast<const Packed<T, 8>&>(a[i]), &y = reinterpret_cast<const Packed<T, 8>&>(b[i]);
      float sum = 0.f;
#pragma unroll
      for (int c = 0; c < 8; ++c) sum += to_float(x.lane[c]) * to_float(y.lane[c]);
#pragma unroll
      for (int apart = kLanes / 2; apart > 0; apart /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, apart);
      if (column == 0 && row < rows) {
        delta[row] = sum;
        if (global != nullptr && row < end) global[first + row] = sum;
      }
    }
    fetch(row);
  }
}

__device__ __forceinline__ float in_powers_of_2(const float* lse, int row, int len) {
  return row < len ? lse[row] * kLog2e : INFINITY;
}

constexpr int sentence_warps(int m) { return m == 1 ? 4 : 8; }

constexpr int rounded(int rows, int to) { return (rows + to - 1) / to * to; }

// ----------------------------------------------------------------------------------------------------------------
// CUDA kernels. dq, dout, out, q (Nq, H, head_dim), dk, dv, k, v (Nk, H, head_dim), lse, delta (H, Nq).

// Shared memory of backward_sentences has room for so many queries and keys: CAPACITY, or whole squares for the longest
// sentence if that is 0.
template <typename T, int D, int M, int CAPACITY>
struct Room {
  int queries, keys;

  __host__ __device__ __forceinline__ Room(const Problem& p)
      : queries(CAPACITY ? CAPACITY : rounded(p.max_len_q, 16 * M)),
        keys(CAPACITY ? CAPACITY : rounded(p.max_len_k, 16 * M)) {}

  int bytes() const {
    return (2 * (queries + keys) * padded(D) + 2 * queries * padded(keys)) * sizeof(T) + 2 * queries * sizeof(float);
  }

  __device__ __forceinline__ ScoreTiles<T> tiles(void* shared) const {
    ScoreTiles<T> tile;
    tile.score_stride = padded(keys);
    tile.q = static_cast<T*>(shared);
    tile.dout = tile.q + queries * padded(D);
    tile.k = tile.dout + queries * padded(D);
    tile.v = tile.k + keys * padded(D);
    tile.kept = tile.v + keys * padded(D);
    tile.ds = tile.kept + queries * tile.score_stride;
    tile.lse = reinterpret_cast<float*>(tile.ds + queries * tile.score_stride);
    tile.delta = tile.lse + queries;
    return tile;
  }
};

// What backward_sentences does with one sentence, in squares of 16 M x 16 M and strips of 16 M x 32.
template <typename T, int D, int M, int CAPACITY>
__device__ __forceinline__ void differentiate_sentence(void* shared, const Heads<T>& dq, const Heads<T>& dk,
                                                       const Heads<T>& dv, const Heads<const T>& dout,
                                                       const Heads<const T>& out, const float* lse,
                                                       const Heads<const T>& q, const Heads<const T>& k,
                                                       const Heads<const T>& v, const Problem& p, const Span& span,
                                                       const ProbabilityMask& mask, int head) {
  constexpr int kRows = 16 * M;
  const ScoreTiles<T> tile = Room<T, D, M, CAPACITY>(p).tiles(shared);
  const int rows = rounded(span.q_len, kRows), columns = rounded(span.k_len, kRows);
  copy_rows<D>(tile.q, tile.dout - tile.q, {q, dout}, span.q_begin, head, rows, span.q_len, p.head_dim);
  copy_rows<D>(tile.k, tile.v - tile.k, {k, v}, span.k_begin, head, columns, span.k_len, p.head_dim);
  commit_copies();

  // Squares, but those that no query of theirs sees. A warp draws the random numbers of its next square ahead: those
  // of the first while the rows are on their way.
  const int warp = warp_number(), warps = blockDim.x / kWarp;
  Draw draws[M][M];
  int row = 0, column = warp * kRows;
  const auto draw_ahead = [&] {
    for (; column >= columns && row < rows; column -= columns) row += kRows;
#pragma unroll
    for (int m = 0; m < M; ++m) {
#pragma unroll
      for (int n = 0; n < M; ++n) draws[m][n] = mask.draw_block(row / 16 + m, column / 16 + n);
    }
  };
  sum_rows<D>(tile.delta, nullptr, 0, rows, span, dout, out, head, p.head_dim, draw_ahead);
  for (int i = threadIdx.x; i < rows; i += blockDim.x) {
    tile.lse[i] = in_powers_of_2(lse + span.sums_begin(p, head), i, span.q_len);
  }
  await_copies<0>();
  __syncthreads();
  while (row < rows) {
    if (column < span.visible(row + kRows - 1)) {
      score_square<T, D, M, M>(tile, row, column, 0, 0, span, p, [&](int m, int n) { return draws[m][n]; });
    }
    column += warps * kRows;
    draw_ahead();
  }
  __syncthreads();

  // Strips of dq, then of dk, then of dv, summed over those squares
  constexpr int kStrips = D / 32;
  for (int i = warp; i < (rows + 2 * columns) / kRows * kStrips; i += warps) {
    const int strip = i / kStrips * kRows, column = i % kStrips * 32;
    const bool queries = strip < rows, values = strip >= rows + columns;
    const int row = strip - (queries ? 0 : values ? rows + columns : rows);
    float c[M][4][4] = {};
    if (queries) {
      const int end = min(columns, rounded(span.visible(row + kRows - 1), kRows));
#pragma unroll 2
      for (int key = 0; key < end; key += 16) {
        multiply_strip<T, D, M, false>(c, tile.ds + row * tile.score_stride + key, tile.score_stride,
                                       tile.k + key * padded(D) + column);
      }
    } else {
      const T* const left = (values ? tile.kept : tile.ds) + row;
      const T* const right = (values ? tile.dout : tile.q) + column;
      const int begin = span.causal ? max(0, row - (span.k_len - span.q_len)) / kRows * kRows : 0;
#pragma unroll 2
      for (int query = begin; query < rows; query += 16) {
        multiply_strip<T, D, M, true>(c, left + query * tile.score_stride, tile.score_stride,
                                      right + query * padded(D));
      }
    }
    const Heads<T> gradient = {queries  ? dq.data
                               : values ? dv.data
                                        : dk.data,
                               queries  ? dq.token_stride
                               : values ? dv.token_stride
                                        : dk.token_stride,
                               queries  ? dq.head_stride
                               : values ? dv.head_stride
                                        : dk.head_stride};
    store_strip(gradient, queries ? span.q_begin : span.k_begin, row, queries ? span.q_len : span.k_len, head, column,
                p.head_dim, c, values ? p.dropout.scale : static_cast<float>(p.scale));
  }
}

// Grid: (B + 1, H). M = 1 for batches of sentences up to 32; with M = 2 such sentences still take small squares.
template <typename T, int D, int M, int CAPACITY>
__global__ void __launch_bounds__(sentence_warps(M) * kWarp, M == 1 ? 6 : 2)
    backward_sentences(Heads<T> dq, Heads<T> dk, Heads<T> dv, Heads<const T> dout, Heads<const T> out, const float* lse,
                       Heads<const T> q, Heads<const T> k, Heads<const T> v, Problem p) {
  extern __shared__ uint4 shared[];
  const int sentence = blockIdx.x, head = blockIdx.y;
  wait_for_previous();
  const ProbabilityMask mask(p.dropout, sentence, head);
  const Span span(p, sentence);
  if (!span.real) {
    clear_rows(dq, span.q_begin, span.q_len, head, p.head_dim);
    clear_rows(dk, span.k_begin, span.k_len, head, p.head_dim);
    clear_rows(dv, span.k_begin, span.k_len, head, p.head_dim);
  } else if (M == 1 || (span.q_len <= 32 && span.k_len <= 32)) {
    differentiate_sentence<T, D, 1, 32>(shared, dq, dk, dv, dout, out, lse, q, k, v, p, span, mask, head);
  } else if constexpr (M > 1) {
    differentiate_sentence<T, D, M, CAPACITY>(shared, dq, dk, dv, dout, out, lse, q, k, v, p, span, mask, head);
  }
}

constexpr int kTile = 64, kTileWarps = 8;

// Shared memory of backward_tiles: a tile that stays and two that pass, of two operands each; m p, ds, lse, delta.
template <typename T, int D>
constexpr int tile_bytes() {
  return (6 * kTile * padded(D) + 2 * kTile * padded(kTile)) * sizeof(T) + 2 * kTile * sizeof(float);
}

// Grid: (B + 1, H, tiles of 64 keys if KEYS_STAY, else of queries). With KEYS_STAY dk and dv, else dq and delta, which
// the former reads. Squares are 32 x 16, strips 32 x 32, their sums kept in registers over all tiles.
template <typename T, int D, bool KEYS_STAY>
__global__ void __launch_bounds__(kTileWarps* kWarp, D <= 64 ? 2 : 1)
    backward_tiles(Heads<T> dq, Heads<T> dk, Heads<T> dv, float* delta, Heads<const T> dout, Heads<const T> out,
                   const float* lse, Heads<const T> q, Heads<const T> k, Heads<const T> v, Problem p) {
  extern __shared__ uint4 shared[];
  constexpr int kStride = padded(D), kScoreStride = padded(kTile), kSize = kTile * kStride;
  const int sentence = blockIdx.x, head = blockIdx.y;
  wait_for_previous();
  const Span span(p, sentence);
  if (!span.real) {
    if (blockIdx.z > 0) return;
    if (!KEYS_STAY) clear_rows(dq, span.q_begin, span.q_len, head, p.head_dim);
    if (KEYS_STAY) clear_rows(dk, span.k_begin, span.k_len, head, p.head_dim);
    if (KEYS_STAY) clear_rows(dv, span.k_begin, span.k_len, head, p.head_dim);
    return;
  }
  const int first = blockIdx.z * kTile;
  if (first >= (KEYS_STAY ? span.k_len : span.q_len)) return;
  lse += span.sums_begin(p, head);
  delta += span.sums_begin(p, head);

  // The other side's tiles that see this one, or that it sees: [begin, end)
  const int hidden_queries = span.causal ? max(0, first - (span.k_len - span.q_len)) : 0;
  const int begin = KEYS_STAY ? hidden_queries / kTile * kTile : 0;
  const int end = KEYS_STAY ? span.q_len : span.visible(min(first + kTile, span.q_len) - 1);

  // Queries (q, dout) and keys (k, v); those that pass have two places each.
  T* const staying = reinterpret_cast<T*>(shared);
  T* const passing = staying + 2 * kSize;
  ScoreTiles<T> tile;
  tile.kept = passing + 4 * kSize;
  tile.ds = tile.kept + kTile * kScoreStride;
  tile.lse = reinterpret_cast<float*>(tile.ds + kTile * kScoreStride);
  tile.delta = tile.lse + kTile;
  tile.score_stride = kScoreStride;
  const auto copy_queries = [&](T* to, int row) {
    copy_rows<D>(to, kSize, {q, dout}, span.q_begin + row, head, kTile, span.q_len - row, p.head_dim);
  };
  const auto copy_keys = [&](T* to, int row) {
    copy_rows<D>(to, kSize, {k, v}, span.k_begin + row, head, kTile, span.k_len - row, p.head_dim);
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
    sum_rows<D>(tile.delta, delta, first, kTile, span, dout, out, head, p.head_dim, [] {});
    if (threadIdx.x < kTile) tile.lse[row_of_thread] = in_powers_of_2(lse, first + row_of_thread, span.q_len);
  }

  const ProbabilityMask mask(p.dropout, sentence, head);
  constexpr int kColumns = D / 32, kStrips = (KEYS_STAY ? 4 : 2) * kColumns,
                kOwn = (kStrips + kTileWarps - 1) / kTileWarps;
  const int warp = warp_number();
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

    const int query = warp / 4 * 32, key = warp % 4 * 16;
    const int first_query = KEYS_STAY ? base : first, first_key = KEYS_STAY ? first : base;
    score_square<T, D, 2, 1>(tile, query, key, first_query, first_key, span, p, [&](int m, int n) {
      return mask.draw_block((first_query + query) / 16 + m, (first_key + key) / 16 + n);
    });
    __syncthreads();

#pragma unroll
    for (int own = 0; own < kOwn; ++own) {
      const int strip = warp + own * kTileWarps, column = strip % kColumns * 32, row = strip / kColumns % 2 * 32;
      if (strip >= kStrips) break;
      const bool values = strip / kColumns >= 2;
#pragma unroll
      for (int i = 0; i < kTile; i += 16) {
        if constexpr (KEYS_STAY) {
          multiply_strip<T, D, 2, true>(c[own], (values ? tile.kept : tile.ds) + i * kScoreStride + row, kScoreStride,
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
    const int strip = warp + own * kTileWarps, column = strip % kColumns * 32, row = first + strip / kColumns % 2 * 32;
    if (strip >= kStrips) break;
    if (!KEYS_STAY) {
      store_strip(dq, span.q_begin, row, span.q_len, head, column, p.head_dim, c[own], scale);
    } else if (strip / kColumns < 2) {
      store_strip(dk, span.k_begin, row, span.k_len, head, column, p.head_dim, c[own], scale);
    } else {
      store_strip(dv, span.k_begin, row, span.k_len, head, column, p.head_dim, c[own], p.dropout.scale);
    }
  }
}

// ----------------------------------------------------------------------------------------------------------------
// kernel launchers

// False, with nothing done, where a block's shared memory does not hold the longest sentence.
template <typename T, int D, int M, int CAPACITY>
bool launch_sentences(const Heads<T>& dq, const Heads<T>& dk, const Heads<T>& dv, const Heads<const T>& dout,
                      const Heads<const T>& out, const float* lse, const Heads<const T>& q, const Heads<const T>& k,
                      const Heads<const T>& v, const Problem& p, int shared_limit, cudaStream_t stream) {
  const int bytes = Room<T, D, M, CAPACITY>(p).bytes();
  if (bytes > shared_limit) return false;
  const int warps = CAPACITY ? 4 : sentence_warps(M);
  launch_early("attention::backward_sentences", backward_sentences<T, D, M, CAPACITY>, dim3(p.sentences + 1, p.heads),
               warps * kWarp, bytes, stream, dq, dk, dv, dout, out, lse, q, k, v, p);
  return true;
}

template <typename T, int D, bool KEYS_STAY>
bool launch_tiles(const Heads<T>& dq, const Heads<T>& dk, const Heads<T>& dv, float* delta, const Heads<const T>& dout,
                  const Heads<const T>& out, const float* lse, const Heads<const T>& q, const Heads<const T>& k,
                  const Heads<const T>& v, const Problem& p, int shared_limit, cudaStream_t stream) {
  if (tile_bytes<T, D>() > shared_limit) return false;
  const dim3 grid(p.sentences + 1, p.heads, max(1, ceil_div(KEYS_STAY ? p.max_len_k : p.max_len_q, kTile)));
  launch_early("attention::backward_tiles", backward_tiles<T, D, KEYS_STAY>, grid, kTileWarps * kWarp,
               tile_bytes<T, D>(), stream, dq, dk, dv, delta, dout, out, lse, q, k, v, p);
  return true;
}

// As forward_on_tensor_cores. delta is written only for long sentences. False, with nothing done, where the device's
// shared memory does not hold the tiles: long sentences of D = 128 before sm_80's 163 KiB, of D = 256 before sm_90's
// 227.
template <typename T>
bool backward_on_tensor_cores(const Heads<T>& dq, const Heads<T>& dk, const Heads<T>& dv, float* delta,
                              const Heads<const T>& dout, const Heads<const T>& out, const float* lse,
                              const Heads<const T>& q, const Heads<const T>& k, const Heads<const T>& v,
                              const Problem& p, int shared_limit, cudaStream_t stream) {
  bool done = false;
  with_width(p.head_dim, [&](auto width) {
    const auto sentences = [&](auto m, auto capacity) {
      return launch_sentences<T, width(), m(), capacity()>(dq, dk, dv, dout, out, lse, q, k, v, p, shared_limit,
                                                           stream);
    };
    const auto tiles = [&](auto keys_stay) {
      return launch_tiles<T, width(), keys_stay()>(dq, dk, dv, delta, dout, out, lse, q, k, v, p, shared_limit, stream);
    };
    constexpr std::integral_constant<int, 0> any;
    constexpr std::integral_constant<int, 1> small;
    constexpr std::integral_constant<int, 2> large;
    const int most = max(p.max_len_q, p.max_len_k);
    done = most <= 32   ? sentences(small, std::integral_constant<int, 32>{})
           : most <= 64 ? sentences(large, std::integral_constant<int, 64>{})
                        : sentences(large, any);
    if (!done) done = tiles(std::false_type{}) && tiles(std::true_type{});
  });
  return done;
}

}  // namespace attention
}  // namespace lightseq
