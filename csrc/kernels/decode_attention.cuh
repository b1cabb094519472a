// One decoding step of attention (lightseq_fairseq/ops/decode_attention.py has formulas and shapes).
//
// Cross-attention of two to eight beams of 16 bits goes to the tensor cores (cross_attention_tiles). Elsewhere eight
// elements of a head are a lane's; LANES lanes have a key, the groups of LANES lanes of all warps of a block walk
// over the keys, each with its own running softmax. These are merged within a warp by shuffles, between warps through
// shared memory. Each key and value is read once, by self-attention for one beam, by cross-attention for all of them.
#pragma once

#include <type_traits>

#include "../common/launch_chain.cuh"
#include "../common/octet.cuh"
#include "../common/reduce.cuh"
#include "../common/tensor_core.cuh"

namespace lightseq {
namespace decode_attention {

constexpr int kUnroll = 4;       // keys that a group of lanes has under way in self-attention,
constexpr int kCrossUnroll = 2;  // and takes at once in cross-attention

// exp(score - max) summed, and the values weighted so; `max` is the largest score so far.
struct Softmax {
  float max = -INFINITY, sum = 0.f, value[kOctet] = {};

  // N keys; -inf is the score of what is not there.
  template <int N>
  __device__ __forceinline__ void add(const float (&score)[N], const float (&v)[N][kOctet]) {
    float top = max;
#pragma unroll
    for (int n = 0; n < N; ++n) top = fmaxf(top, score[n]);
    const float origin = top == -INFINITY ? 0.f : top, old = __expf(max - origin);
    sum *= old;
#pragma unroll
    for (int i = 0; i < kOctet; ++i) value[i] *= old;
#pragma unroll
    for (int n = 0; n < N; ++n) {
      const float weight = __expf(score[n] - origin);
      sum += weight;
#pragma unroll
      for (int i = 0; i < kOctet; ++i) value[i] += weight * v[n][i];
    }
    max = top;
  }

  __device__ __forceinline__ void merge(float other_max, float other_sum, const float (&other)[kOctet]) {
    const float top = fmaxf(max, other_max);
    const float mine = max == -INFINITY ? 0.f : __expf(max - top);
    const float theirs = other_max == -INFINITY ? 0.f : __expf(other_max - top);
    sum = sum * mine + other_sum * theirs;
#pragma unroll
    for (int i = 0; i < kOctet; ++i) value[i] = value[i] * mine + other[i] * theirs;
    max = top;
  }

  // With the groups of the same warp; all lanes must come.
  template <int LANES>
  __device__ __forceinline__ void merge_warp() {
#pragma unroll
    for (int apart = LANES; apart < kWarp; apart *= 2) {
      const float other_max = __shfl_xor_sync(0xffffffffu, max, apart);
      const float other_sum = __shfl_xor_sync(0xffffffffu, sum, apart);
      float other[kOctet];
#pragma unroll
      for (int i = 0; i < kOctet; ++i) other[i] = __shfl_xor_sync(0xffffffffu, value[i], apart);
      merge(other_max, other_sum, other);
    }
  }
};

// What a warp leaves of a beam for the others: LANES pieces of max, sum and values.
struct Piece {
  float max, sum, value[kOctet];

  __device__ __forceinline__ void keep(const Softmax& softmax) {
    max = softmax.max;
    sum = softmax.sum;
#pragma unroll
    for (int i = 0; i < kOctet; ++i) value[i] = softmax.value[i];
  }

  __device__ __forceinline__ void merge_into(Softmax& softmax) const { softmax.merge(max, sum, value); }
};

// Starts copying an octet into shared memory; zeros unless `inside`.
template <typename T>
__device__ __forceinline__ void copy_octet(Packed<T, kOctet>* shared, const T* global, bool inside) {
#pragma unroll
  for (int i = 0; i < kOctet; i += kVec<T>) copy_async(shared->lane + i, global + i, inside);
}

// The sum over a group's lanes.
template <int LANES>
__device__ __forceinline__ float group_sum(float x) {
#pragma unroll
  for (int apart = LANES / 2; apart > 0; apart /= 2) x += __shfl_xor_sync(0xffffffffu, x, apart);
  return x;
}

__device__ __forceinline__ float dot(const float (&a)[kOctet], const float (&b)[kOctet]) {
  float sum = 0.f;
#pragma unroll
  for (int i = 0; i < kOctet; ++i) sum += a[i] * b[i];
  return sum;
}

// The normalised values of one beam, by the lanes of the first group of the first warp.
template <typename T>
__device__ __forceinline__ void finish(T* context, const Softmax& softmax) {
  const float scale = softmax.sum > 0.f ? 1.f / softmax.sum : 0.f;
  float out[kOctet];
#pragma unroll
  for (int i = 0; i < kOctet; ++i) out[i] = softmax.value[i] * scale;
  store<kOctet>(context, out);
}

// ----------------------------------------------------------------------------------------------------------------
// CUDA kernels

// What self-attention reads and writes: qkv (R, 3, H, D), cache (2, B, H, T * K, D), ancestors (B, K, T), steps (B,).
// What comes first in each past, or null: before (N, 2, H, D), a sentence's first token and its end at
// bounds[b * apart] and the one behind, its last token left out.
template <typename T>
struct Past {
  T* cache;
  const T *qkv, *before;
  const unsigned char* ancestors;
  const int *steps, *bounds;
  int apart, beam, most, heads, dim;
  long value_offset;
};

// Beam k of a (head, sentence), by WARPS warps that leave LANES pieces each in `pieces` (beams, WARPS, LANES); all
// threads of the block must come, those of beams that are not there too. True for the lanes that then have the softmax.
// AHEAD: keys are asked for before those ahead of them are used, which takes twice the registers (128 sentences on an
// H200: 120 keys of one beam and 16 heads 18.6 instead of 20.7 us, part of which is that one beam has no ancestors to
// look up; 15 keys of four beams and 8 heads 7.5 instead of 6.1).
template <int LANES, int WARPS, bool AHEAD, typename T>
__device__ __forceinline__ bool attend_to_past(Softmax& softmax, Piece* pieces, const Past<T>& past, int head,
                                               int sentence, int k, bool there) {
  constexpr int kGroups = kWarp / LANES, kStride = WARPS * kGroups;
  const int heads = past.heads, dim = past.dim, beam = past.beam;
  const int warp = threadIdx.x / kWarp % WARPS, lane = threadIdx.x % kWarp, place = lane % LANES;
  const int column = place * kOctet, group = warp * kGroups + lane / LANES;
  const bool real = column < dim;
  const long row = static_cast<long>(sentence) * beam + (there ? k : 0);
  const T* const own = past.qkv + (row * 3 * heads + head) * dim + (real ? column : 0);
  T* const keys = past.cache + (static_cast<long>(sentence) * heads + head) * past.most * beam * dim +
                  (real ? column : 0);
  const unsigned char* const history = past.ancestors + row * past.most;
  Piece* const mine = pieces + (k * WARPS) * LANES + place;  // of the beam's first warp

  const int now = past.steps[sentence];
  float q[kOctet] = {};
  if (real) load<kOctet>(own, q);
  const auto walk = [&](int count, long values_at, const auto& origin_of, const auto& slot_of) {
    if (count == 0) return;
    int origin[kUnroll];
    Packed<T, kOctet> key[kUnroll], value[kUnroll];
    const auto key_at = [&](int first, int u) {
      const int p = first + u * kStride + group;
      return p < count ? p : 0;
    };
    const auto find = [&](int first) {
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) origin[u] = origin_of(key_at(first, u));
    };
    const auto fetch = [&](int first) {
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const T* const slot = slot_of(key_at(first, u), origin[u]);
        key[u] = request<kOctet>(slot);
        value[u] = request<kOctet>(slot + values_at);
      }
    };
    constexpr int kStep = kStride * kUnroll;
    if constexpr (AHEAD) {
      find(0);
      fetch(0);
      find(kStep);
    }
    for (int first = 0; first < count; first += kStep) {
      if constexpr (!AHEAD) {
        find(first);
        fetch(first);
      }
      float score[kUnroll], wide[kUnroll][kOctet], v[kUnroll][kOctet];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        key[u].widen(wide[u]);
        value[u].widen(v[u]);
      }
      if (AHEAD && first + kStep < count) {
        fetch(first + kStep);
        find(first + 2 * kStep);
      }
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        score[u] = group_sum<LANES>(real ? dot(q, wide[u]) : 0.f);
        if (first + u * kStride + group >= count) score[u] = -INFINITY;
      }
      softmax.add(score, v);
    }
  };
  if (past.before) {
    const int begin = past.bounds[sentence * past.apart], end = past.bounds[sentence * past.apart + 1];
    const long width = static_cast<long>(heads) * dim;
    const T* const texts = past.before + begin * 2 * width + head * dim + (real ? column : 0);
    walk(end - begin - 1, width, [](int) { return 0; }, [&](int at, int) { return texts + at * 2 * width; });
  }
  walk(
      now, past.value_offset, [&](int at) { return beam == 1 ? 0 : static_cast<int>(history[at]); },
      [&](int at, int origin) { return keys + (static_cast<long>(at) * beam + origin) * dim; });
  if (warp == 0) {  // this step's own key and value, which no slot holds yet
    float wide[kOctet] = {}, v[1][kOctet] = {};
    if (real) {
      const Packed<T, kOctet> key = request<kOctet>(own + heads * dim), value = request<kOctet>(own + 2 * heads * dim);
      if (lane < LANES && there) {
        T* const slot = keys + (static_cast<long>(now) * beam + k) * dim;
        *reinterpret_cast<Packed<T, kOctet>*>(slot) = key;
        *reinterpret_cast<Packed<T, kOctet>*>(slot + past.value_offset) = value;
      }
      key.widen(wide);
      value.widen(v[0]);
    }
    const float score[1] = {group_sum<LANES>(dot(q, wide))};
    if (lane < LANES) softmax.add(score, v);
  }
  softmax.merge_warp<LANES>();
  if constexpr (WARPS > 1) {
    if (lane < LANES) mine[warp * LANES].keep(softmax);
    __syncthreads();
  }
  if (warp > 0 || lane >= LANES || !real || !there) return false;
#pragma unroll
  for (int w = 1; w < WARPS; ++w) mine[w * LANES].merge_into(softmax);
  return true;
}

// WARPS warps a beam, all beams of a (head, sentence) a block, since they share much of their past: grid (H, B).
// context (R, H, D). Dynamic shared memory: LANES pieces a warp.
template <typename T, int LANES, int WARPS, bool ONE_BEAM>
__global__ void __launch_bounds__(ONE_BEAM ? WARPS * kWarp : 1024) self_attention(T* context, const Past<T> past) {
  extern __shared__ Piece pieces[];
  const int head = blockIdx.x, sentence = blockIdx.y, k = threadIdx.x / (WARPS * kWarp);
  launch_next();
  wait_for_previous();
  Softmax softmax;
  if (!attend_to_past<LANES, WARPS, ONE_BEAM>(softmax, pieces, past, head, sentence, k, true)) return;
  const long row = static_cast<long>(sentence) * past.beam + k;
  finish(context + (row * past.heads + head) * past.dim + threadIdx.x % LANES * kOctet, softmax);
}

// A block of WARPS warps for BEAMS beams of HEADS heads of a sentence: grid (H / HEADS, B, beams / BEAMS). The groups
// of LANES lanes of a warp have keys of one head; or, where HEADS is their number, one key of as many heads, which lie
// side by side in memory. q, context (R, H, D), keys_values (N, 2, H, D); a sentence's first token and its end are
// bounds[b * apart] and the one behind. Each thread has TURNS times kCrossUnroll of its keys and values under way, the
// first of them before the queries are there: on their way into shared memory they hold no registers, so that a GPU
// may have 25 MiB of them (64 sources of 300 tokens, 16 heads: 19.6 us with eight in registers, 18.1 with twelve here).
template <typename T, int LANES, int WARPS, int BEAMS, int HEADS, int TURNS>
constexpr int cross_bytes() {
  constexpr int kRing = TURNS * kCrossUnroll * 2 * WARPS * kWarp * static_cast<int>(sizeof(Packed<T, kOctet>));
  constexpr int kPieces = WARPS * BEAMS * HEADS * LANES * static_cast<int>(sizeof(Piece));
  return kRing > kPieces ? kRing : kPieces;
}

template <typename T, int LANES, int WARPS, int BEAMS, int HEADS, int TURNS>
__global__ void __launch_bounds__(WARPS* kWarp)
    cross_attention(T* context, const T* q_rows, const T* keys_values, const int* bounds, int apart, int beam,
                    int dim) {
  constexpr int kThreads = WARPS * kWarp, kGroups = kWarp / LANES / HEADS, kStride = WARPS * kGroups;
  constexpr int kTurn = kCrossUnroll * kStride, kPieces = HEADS * LANES;
  static_assert(HEADS == 1 || kGroups == 1, "a warp has keys of one head or heads of one key");
  extern __shared__ __align__(16) unsigned char shared[];  // of each thread TURNS times kCrossUnroll keys and values
  Packed<T, kOctet>* const ring = reinterpret_cast<Packed<T, kOctet>*>(shared) + threadIdx.x;
  Piece* const pieces = reinterpret_cast<Piece*>(shared);  // (WARPS, BEAMS, kPieces), where the ring was
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, place = lane % LANES, column = place * kOctet;
  const int heads = gridDim.x * HEADS, head = blockIdx.x * HEADS + lane / LANES % HEADS;
  const int sentence = blockIdx.y, first_beam = blockIdx.z * BEAMS, beams = min(BEAMS, beam - first_beam);
  const int group = warp * kGroups + lane / LANES % kGroups;
  const bool real = column < dim;
  const long rows = static_cast<long>(sentence) * beam + first_beam;

  launch_next();
  bounds += sentence * apart;  // the source is there all along
  const int begin = bounds[0], length = bounds[1] - begin;
  const long width = static_cast<long>(heads) * dim;
  const T* const keys = keys_values + begin * 2 * width + head * dim + (real ? column : 0);
  const int turns = (length + kTurn - 1) / kTurn;
  const auto slot_of = [&](int turn) { return ring + turn % TURNS * kCrossUnroll * 2 * kThreads; };
  const auto fetch = [&](int turn) {
    Packed<T, kOctet>* const slot = slot_of(turn);
    if (turn < turns) {
#pragma unroll
      for (int u = 0; u < kCrossUnroll; ++u) {
        const int p = turn * kTurn + u * kStride + group;
        const bool inside = p < length;
        const T* const from = keys + (inside ? p : 0) * 2 * width;
        copy_octet(slot + u * 2 * kThreads, from, inside);
        copy_octet(slot + (u * 2 + 1) * kThreads, from + width, inside);
      }
    }
    commit_copies();
  };
#pragma unroll
  for (int turn = 0; turn < TURNS; ++turn) fetch(turn);
  wait_for_previous();
  float q[BEAMS][kOctet] = {};
#pragma unroll
  for (int b = 0; b < BEAMS; ++b) {
    if (real && b < beams) load<kOctet>(q_rows + (rows + b) * width + head * dim + column, q[b]);
  }
  Softmax softmax[BEAMS];
  for (int turn = 0; turn < turns; ++turn) {
    await_copies<TURNS - 1>();
    const Packed<T, kOctet>* const slot = slot_of(turn);
    float wide[kCrossUnroll][kOctet], v[kCrossUnroll][kOctet];
#pragma unroll
    for (int u = 0; u < kCrossUnroll; ++u) {
      slot[u * 2 * kThreads].widen(wide[u]);
      slot[(u * 2 + 1) * kThreads].widen(v[u]);
    }
#pragma unroll
    for (int b = 0; b < BEAMS; ++b) {
      float score[kCrossUnroll];
#pragma unroll
      for (int u = 0; u < kCrossUnroll; ++u) {
        score[u] = group_sum<LANES>(real ? dot(q[b], wide[u]) : 0.f);
        if (turn * kTurn + u * kStride + group >= length) score[u] = -INFINITY;
      }
      softmax[b].add(score, v);
    }
    fetch(turn + TURNS);
  }
  __syncthreads();  // all have read their keys and values
#pragma unroll
  for (int b = 0; b < BEAMS; ++b) {
    if constexpr (HEADS == 1) softmax[b].template merge_warp<LANES>();
    if (lane < kPieces) pieces[(warp * BEAMS + b) * kPieces + lane].keep(softmax[b]);
  }
  __syncthreads();
  for (int i = threadIdx.x; i < beams * kPieces; i += WARPS * kWarp) {
    const int b = i / kPieces, piece = i % kPieces, at = piece % LANES;
    if (at * kOctet >= dim) continue;
    Softmax all;
#pragma unroll
    for (int w = 0; w < WARPS; ++w) pieces[(w * BEAMS + b) * kPieces + piece].merge_into(all);
    finish(context + (rows + b) * width + (blockIdx.x * HEADS + piece / LANES) * dim + at * kOctet, all);
  }
}

// Two to eight beams of a (head, sentence) are rows of a tile of the tensor cores, of which half or more stays empty:
// grid (H, B). Each of WARPS warps takes every WARPS-th kTileKeys keys, and has the next ones under way, the first
// before the queries are there. Probabilities are rounded to T. Arguments as above, heads have D elements.
constexpr int kTileBeams = 8, kTileKeys = 32;

template <int D, int WARPS>
constexpr int tiles_bytes() {
  return WARPS * 2 * 2 * kTileKeys * (D + kOctet) * 2;
}

template <typename T, int D, int WARPS>
__global__ void __launch_bounds__(WARPS* kWarp)
    cross_attention_tiles(T* context, const T* q_rows, const T* keys_values, const int* bounds, int apart, int beam) {
  constexpr int kStride = D + kOctet, kStage = 2 * kTileKeys * kStride, kRowOctets = D / kOctet;
  extern __shared__ __align__(16) unsigned char shared[];  // of each warp two stages of keys and values
  const int head = blockIdx.x, heads = gridDim.x, sentence = blockIdx.y;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, row = lane / 4, pair = lane % 4 * 2;
  T* const tiles = reinterpret_cast<T*>(shared) + warp * 2 * kStage;

  launch_next();
  bounds += sentence * apart;  // the source is there all along
  const int begin = bounds[0], length = bounds[1] - begin, chunks = (length + kTileKeys - 1) / kTileKeys;
  const long width = static_cast<long>(heads) * D;
  const T* const source = keys_values + begin * 2 * width + head * D;
  const auto fetch = [&](int chunk) {
    T* const stage = tiles + chunk / WARPS % 2 * kStage;
#pragma unroll 8
    for (int i = lane; i < 2 * kTileKeys * kRowOctets; i += kWarp) {
      const int at = i / kRowOctets, column = i % kRowOctets * kOctet;  // keys and then values
      const int key = chunk * kTileKeys + at % kTileKeys;
      const bool inside = key < length;
      copy_async(stage + at * kStride + column, source + ((inside ? key : 0) * 2 + at / kTileKeys) * width + column,
                 inside);
    }
    commit_copies();
  };
  if (warp < chunks) fetch(warp);

  wait_for_previous();
  const long own = (static_cast<long>(sentence) * beam + row) * width + head * D + pair;
  const auto query = [&](int column) {
    return row < beam ? *reinterpret_cast<const uint32_t*>(q_rows + own + column) : 0u;
  };
  uint32_t q[D / 16][4] = {};  // rows from kTileBeams on are 0
#pragma unroll
  for (int k = 0; k < D / 16; ++k) {
    q[k][0] = query(k * 16);
    q[k][2] = query(k * 16 + 8);
  }
  float max = -INFINITY, sum = 0.f, value[D / 8][4] = {};
  for (int chunk = warp; chunk < chunks; chunk += WARPS) {
    if (chunk + WARPS < chunks) {
      fetch(chunk + WARPS);
      await_copies<1>();
    } else {
      await_copies<0>();
    }
    __syncwarp();
    const T* const keys = tiles + chunk / WARPS % 2 * kStage;
    const T* const values = keys + kTileKeys * kStride;
    float score[kTileKeys / 8][4] = {};
#pragma unroll
    for (int k = 0; k < D / 16; ++k) {
#pragma unroll
      for (int n = 0; n < kTileKeys / 16; ++n) {
        uint32_t b[4];
        load_right(b, keys + n * 16 * kStride + k * 16, kStride);
        multiply_add<T>(score[2 * n], q[k], b[0], b[1]);
        multiply_add<T>(score[2 * n + 1], q[k], b[2], b[3]);
      }
    }
    float top = max;
#pragma unroll
    for (int n = 0; n < kTileKeys / 8; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        if (chunk * kTileKeys + n * 8 + pair + e >= length) score[n][e] = -INFINITY;
        top = fmaxf(top, score[n][e]);
      }
    }
    top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 1));
    top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 2));
    const float origin = top == -INFINITY ? 0.f : top, old = __expf(max - origin);
    max = top;
    sum *= old;
#pragma unroll
    for (int n = 0; n < D / 8; ++n) value[n][0] *= old, value[n][1] *= old;
#pragma unroll
    for (int n = 0; n < kTileKeys / 8; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) sum += score[n][e] = __expf(score[n][e] - origin);
    }
#pragma unroll
    for (int k = 0; k < kTileKeys / 16; ++k) {
      const uint32_t weights[4] = {pack<T>(score[2 * k][0], score[2 * k][1]), 0u,
                                   pack<T>(score[2 * k + 1][0], score[2 * k + 1][1]), 0u};
#pragma unroll
      for (int n = 0; n < D / 16; ++n) {
        uint32_t b[4];
        load_right_transposed(b, values + k * 16 * kStride + n * 16, kStride);
        multiply_add<T>(value[2 * n], weights, b[0], b[1]);
        multiply_add<T>(value[2 * n + 1], weights, b[2], b[3]);
      }
    }
    __syncwarp();  // before what this warp has read is written over
  }
  sum += __shfl_xor_sync(0xffffffffu, sum, 1);
  sum += __shfl_xor_sync(0xffffffffu, sum, 2);

  if constexpr (WARPS > 1) {
    constexpr int kPart = D + 2;  // values of a row, its max and sum
    float* const parts = reinterpret_cast<float*>(shared);  // (WARPS, kTileBeams, kPart)
    static_assert(WARPS * kTileBeams * kPart * 4 <= tiles_bytes<D, WARPS>());
    __syncthreads();  // all have read their keys and values
    float* const mine = parts + (warp * kTileBeams + row) * kPart;
#pragma unroll
    for (int n = 0; n < D / 8; ++n) mine[n * 8 + pair] = value[n][0], mine[n * 8 + pair + 1] = value[n][1];
    if (pair == 0) mine[D] = max, mine[D + 1] = sum;
    __syncthreads();
    if (warp > 0) return;
#pragma unroll
    for (int w = 1; w < WARPS; ++w) {
      const float* const other = parts + (w * kTileBeams + row) * kPart;
      const float top = fmaxf(max, other[D]);
      const float ours = max == -INFINITY ? 0.f : __expf(max - top);
      const float theirs = other[D] == -INFINITY ? 0.f : __expf(other[D] - top);
      max = top;
      sum = sum * ours + other[D + 1] * theirs;
#pragma unroll
      for (int n = 0; n < D / 8; ++n) {
        value[n][0] = value[n][0] * ours + other[n * 8 + pair] * theirs;
        value[n][1] = value[n][1] * ours + other[n * 8 + pair + 1] * theirs;
      }
    }
  }
  if (row >= beam) return;
  const float scale = sum > 0.f ? 1.f / sum : 0.f;
#pragma unroll
  for (int n = 0; n < D / 8; ++n) {
    *reinterpret_cast<uint32_t*>(context + own + n * 8) = pack<T>(value[n][0] * scale, value[n][1] * scale);
  }
}

// ----------------------------------------------------------------------------------------------------------------
// kernel launchers

// Calls f with the lanes that a head of `dim` elements takes, a power of two.
template <typename F>
void dispatch_lanes(int dim, F&& f) {
  if (dim <= 4 * kOctet) return f(std::integral_constant<int, 4>{});
  if (dim <= 8 * kOctet) return f(std::integral_constant<int, 8>{});
  if (dim <= 16 * kOctet) return f(std::integral_constant<int, 16>{});
  f(std::integral_constant<int, 32>{});
}

// Warps that share a beam's past: no more than have keys to read, nor than keep the GPU busy, since each costs a merge
// (measured on an H200).
template <typename T>
int self_warps(const Past<T>& past, int batch) {
  constexpr int kKeys = 16;  // that a warp has under way with heads of 64
  const bool is_long = past.most > 64 || past.before;
  const int beams = batch * past.heads * past.beam, busy = is_long ? 2048 : 1024;
  int warps = 8;
  while (warps > 1 && (warps * beams > busy || warps * past.beam * kWarp > 1024 ||
                       (!is_long && warps * kKeys > past.most))) {
    warps /= 2;
  }
  return warps;
}

template <typename T>
void self_attention(T* context, const Past<T>& past, int batch, cudaStream_t stream) {
  const int beam = past.beam;
  dispatch_lanes(past.dim, [&](auto lanes) {
    constexpr int LANES = decltype(lanes)::value;
    const auto launch = [&](auto warps) {
      constexpr int WARPS = decltype(warps)::value;
      const auto kernel = beam == 1 ? self_attention<T, LANES, WARPS, true> : self_attention<T, LANES, WARPS, false>;
      launch_early("decode_attention::self_attention", kernel, dim3(past.heads, batch), beam * WARPS * kWarp,
                   beam * WARPS * LANES * static_cast<int>(sizeof(Piece)), stream, context, past);
    };
    const int warps = self_warps(past, batch);
    if (warps == 8) return launch(std::integral_constant<int, 8>{});
    if (warps == 4) return launch(std::integral_constant<int, 4>{});
    if (warps == 2) return launch(std::integral_constant<int, 2>{});
    launch(std::integral_constant<int, 1>{});
  });
}

// Few heads and long sources are shared among more warps; there is room for `tokens` of all sources, of which slots,
// whose bounds lie apart, leave much free. Many heads of one beam are read side by side (300 tokens of 128 sources, 16
// heads, on an H200: 42 us one by one, 37 so; 30 tokens, 8 heads: 4.6 and 3.4).
template <typename T>
void cross_attention(T* context, const T* q, const T* keys_values, const int* bounds, int apart, int tokens, int batch,
                     int beam, int heads, int dim, cudaStream_t stream) {
  const bool is_long = tokens >= (apart == 1 ? 64 : 192) * batch;
  const int all = batch * heads;
  if constexpr (!std::is_same_v<T, float>) {
    if (beam > 1 && beam <= kTileBeams && (dim == 32 || dim == 64 || dim == 128)) {
      const auto launch = [&](auto size, auto warps) {
        constexpr int D = decltype(size)::value, WARPS = decltype(warps)::value;
        launch_early("decode_attention::cross_attention_tiles", cross_attention_tiles<T, D, WARPS>, dim3(heads, batch),
                     WARPS * kWarp, tiles_bytes<D, WARPS>(), stream, context, q, keys_values, bounds, apart, beam);
      };
      const auto launch_warps = [&](auto size) {
        if (is_long && all <= 512) return launch(size, std::integral_constant<int, 4>{});
        if (is_long) return launch(size, std::integral_constant<int, 2>{});
        launch(size, std::integral_constant<int, 1>{});
      };
      if (dim == 32) return launch_warps(std::integral_constant<int, 32>{});
      if (dim == 64) return launch_warps(std::integral_constant<int, 64>{});
      return launch_warps(std::integral_constant<int, 128>{});
    }
  }
  dispatch_lanes(dim, [&](auto lanes) {
    constexpr int LANES = decltype(lanes)::value, kTogether = kWarp / LANES;
    const auto launch_heads = [&](auto warps, auto beams, auto together) {
      constexpr int WARPS = decltype(warps)::value, BEAMS = decltype(beams)::value, HEADS = decltype(together)::value;
      const auto launch_turns = [&](auto turns) {
        constexpr int TURNS = decltype(turns)::value;
        launch_early("decode_attention::cross_attention", cross_attention<T, LANES, WARPS, BEAMS, HEADS, TURNS>,
                     dim3(heads / HEADS, batch, ceil_div(beam, BEAMS)), WARPS * kWarp,
                     cross_bytes<T, LANES, WARPS, BEAMS, HEADS, TURNS>(), stream, context, q, keys_values, bounds,
                     apart, beam, dim);
      };
      if constexpr (HEADS > 1 && !std::is_same_v<T, float>) {
        constexpr int kMany = 6;
        if (cross_bytes<T, LANES, WARPS, BEAMS, HEADS, kMany>() <= most_shared_bytes()) {
          return launch_turns(std::integral_constant<int, kMany>{});
        }
      }
      launch_turns(std::integral_constant<int, 2>{});
    };
    if constexpr (kTogether > 1) {
      if (beam == 1 && heads % kTogether == 0 && all >= (is_long ? 256 : 1024)) {
        const auto launch = [&](auto warps) {
          launch_heads(warps, std::integral_constant<int, 1>{}, std::integral_constant<int, kTogether>{});
        };
        if (!is_long || all >= 1536) return launch(std::integral_constant<int, 4>{});
        if (all >= 1024 || std::is_same_v<T, float>) return launch(std::integral_constant<int, 8>{});
        return launch(std::integral_constant<int, 16>{});
      }
    }
    const auto launch = [&](auto warps, auto beams) {
      launch_heads(warps, beams, std::integral_constant<int, 1>{});
    };
    const auto launch_beams = [&](auto warps) {
      if (beam == 1) return launch(warps, std::integral_constant<int, 1>{});
      if (beam == 2) return launch(warps, std::integral_constant<int, 2>{});
      if (beam == 5) return launch(warps, std::integral_constant<int, 5>{});
      launch(warps, std::integral_constant<int, 4>{});
    };
    if (all <= (is_long && beam == 1 ? 512 : 384)) return launch_beams(std::integral_constant<int, 4>{});
    if (is_long) return launch_beams(std::integral_constant<int, 2>{});
    launch_beams(std::integral_constant<int, 1>{});
  });
}

}  // namespace decode_attention
}  // namespace lightseq
