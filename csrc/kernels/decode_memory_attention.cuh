// context = softmax(q memory^T) memory, one step (lightseq_fairseq/ops/decode_memory_attention.py has the shapes).
//
// All heads of a sentence read the same rows, so that both products are the tensor cores', with kTileHeads heads as
// columns: scores (tokens, heads) = memory q^T, context (columns, heads) = memory^T weights. A block has every
// BLOCKS-th kTileTokens of a sentence's tokens, and stages of them under way. Each of its warpgroups has a quarter of
// the columns, which it copies, multiplies and gives up on its own; what it knows of the scores goes through shared
// memory, where all warps meet: a warp has a head's. Blocks that share a sentence are a cluster and add up their parts
// by columns.
//
// Bytes: 2C a token of memory, once for all heads; 4GC a sentence for q and context.
#pragma once

#include <algorithm>
#include <stdexcept>
#include <string>

#include "../common/cluster.cuh"
#include "../common/launch_chain.cuh"
#include "../common/octet.cuh"
#include "../common/reduce.cuh"
#include "../common/warpgroup.cuh"

namespace lightseq {
namespace decode_memory_attention {

constexpr int kTileHeads = 16, kTileTokens = 32;
constexpr int kGroups = 4, kThreads = kGroups * kWarpgroup;
constexpr int kScoreStride = kTileTokens + 4;  // floats
constexpr int kStageBytes = 128 * 1024, kMaxStages = 4;
static_assert(kTileHeads * kWarp == kThreads && kTileTokens == kWarp);  // a warp has a head, a lane a token
static_assert(kTileTokens <= kSlab);

// q, context (B, G, C), memory (N, C); the tokens of sentence b are bounds[b * apart] to bounds[b * apart + 1].
template <typename T>
struct Operands {
  T* context;
  const T *q, *memory;
  const int* bounds;
  int apart, heads;
};

template <int C>
struct Layout {
  static constexpr int kSlabs = C / kSlab, kOwnSlabs = kSlabs / kGroups;  // of all columns, of a warpgroup
  static constexpr int kStages = std::min(kStageBytes / (kTileTokens * C * 2), kMaxStages);
  static constexpr int kPartStride = C + 4;  // floats of a row of a block's part of the context
  static_assert(kSlabs % kGroups == 0 && kStages >= 2 && kTileHeads * kPartStride * 4 <= kStages * kTileTokens * C * 2);
};

// Slabs first, each a multiple of 1024 bytes. Products of 64 tokens read what lies behind kTileTokens of them, too, and
// make scores of it that nobody looks at.
template <typename T, int C>
struct Shared {
  T stages[Layout<C>::kStages][Layout<C>::kSlabs][kTileTokens * kSlab];
  T q[Layout<C>::kSlabs][kTileHeads * kSlab];
  T weights[kTileHeads * kSlab];                    // of the tokens, up to the head's sum
  float scores[kGroups][kTileHeads][kScoreStride];  // of each warpgroup's columns
  float rescale[kTileHeads];                        // what this tile's maximum makes of the context so far
  float max[kTileHeads], sum[kTileHeads];           // which the other blocks read
  float factors[4][kTileHeads];                     // of each block's part
};

// ----------------------------------------------------------------------------------------------------------------
// CUDA kernels

// Grid: (BLOCKS, B, G / kTileHeads), clusters of BLOCKS.
template <typename T, int C, int BLOCKS>
__global__ void __launch_bounds__(kThreads, 1) attend(const Operands<T> a) {
#ifdef LIGHTSEQ_WARPGROUPS
  using L = Layout<C>;
  extern __shared__ __align__(1024) unsigned char bytes[];
  Shared<T, C>& shared = *reinterpret_cast<Shared<T, C>*>(bytes);
  const int rank = blockIdx.x, sentence = blockIdx.y, first_head = blockIdx.z * kTileHeads;
  const int group = threadIdx.x / kWarpgroup, thread = threadIdx.x % kWarpgroup, first_slab = group * L::kOwnSlabs;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, row = thread / kWarp * 16 + lane / 4;
  const int pair = lane % 4 * 2, heads = min(kTileHeads, a.heads - first_head);

  launch_next();
  const int* const bounds = a.bounds + sentence * a.apart;  // the source is there all along
  const int begin = bounds[0], length = bounds[1] - begin;
  const int tiles = ((length + kTileTokens - 1) / kTileTokens - rank + BLOCKS - 1) / BLOCKS;
  constexpr int kRowUnits = L::kOwnSlabs * kSlabUnits;  // of this warpgroup's columns
  const T* const memory = a.memory + static_cast<long>(begin) * C + first_slab * kSlab;
  const auto fetch = [&](int tile) {
    if (tile < tiles) {
      T(*const slabs)[kTileTokens * kSlab] = shared.stages[tile % L::kStages] + first_slab;
      const int first = (tile * BLOCKS + rank) * kTileTokens;
#pragma unroll
      for (int n = 0; n < kTileTokens * kRowUnits / kWarpgroup; ++n) {
        const int i = thread + n * kWarpgroup, token = i / kRowUnits, unit = i % kRowUnits;
        const bool inside = first + token < length;
        copy_async(slabs[unit / kSlabUnits] + slab_place(token, unit % kSlabUnits),
                   memory + static_cast<long>(inside ? first + token : 0) * C + unit * kOctet, inside);
      }
    }
    commit_copies();
  };
#pragma unroll
  for (int tile = 0; tile < L::kStages; ++tile) fetch(tile);

  wait_for_previous();
  const long base = (static_cast<long>(sentence) * a.heads + first_head) * C;
  const T* const queries = a.q + base + first_slab * kSlab;
#pragma unroll
  for (int n = 0; n < kTileHeads * kRowUnits / kWarpgroup; ++n) {
    const int i = thread + n * kWarpgroup, head = i / kRowUnits, unit = i % kRowUnits;
    uint4 octet = make_uint4(0u, 0u, 0u, 0u);
    if (head < heads) octet = *reinterpret_cast<const uint4*>(queries + static_cast<long>(head) * C + unit * kOctet);
    *reinterpret_cast<uint4*>(shared.q[first_slab + unit / kSlabUnits] + slab_place(head, unit % kSlabUnits)) = octet;
  }

  const uint64_t q = slab_descriptor(shared.q[first_slab]), weights = slab_descriptor(shared.weights);
  constexpr uint64_t kNextQ = kTileHeads * kSlab * 2 / 16, kNextSlab = kTileTokens * kSlab * 2 / 16;
  float max = -INFINITY, sum = 0.f;  // of this warp's head; the sum of this lane's tokens
  float value[L::kOwnSlabs][8] = {};
  for (int tile = 0; tile < tiles; ++tile) {
    const uint64_t slabs = slab_descriptor(shared.stages[tile % L::kStages][first_slab]);
    await_copies<L::kStages - 1>();
    publish_to_products();
    warpgroup_sync();
    float score[8] = {};
    begin_products();
#pragma unroll
    for (int s = 0; s < L::kOwnSlabs; ++s) {
#pragma unroll
      for (int k = 0; k < kSlab / kSlabStep; ++k) {
        add_product<T>(score, slabs + s * kNextSlab + k * kNextColumns, q + s * kNextQ + k * kNextColumns);
      }
    }
    await_products();
    if (row < kTileTokens) {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        shared.scores[group][i / 4 * 8 + pair + i % 2][row + i / 2 % 2 * 8] = score[i];
      }
    }
    __syncthreads();

    float own = 0.f;
#pragma unroll
    for (int g = 0; g < kGroups; ++g) own += shared.scores[g][warp][lane];
    if ((tile * BLOCKS + rank) * kTileTokens + lane >= length) own = -INFINITY;
    const float top = fmaxf(max, warp_reduce(own, Max{}));
    const float rescale = __expf(max - top);  // each tile has a token, so that top is finite
    max = top;
    own = __expf(own - top);
    sum = sum * rescale + own;
    shared.weights[slab_place(warp, lane / kOctet) + lane % kOctet] = from_float<T>(own);
    if (lane == 0) shared.rescale[warp] = rescale;
    publish_to_products();
    __syncthreads();

    const float2 low = *reinterpret_cast<const float2*>(&shared.rescale[pair]);
    const float2 high = *reinterpret_cast<const float2*>(&shared.rescale[pair + 8]);
#pragma unroll
    for (int s = 0; s < L::kOwnSlabs; ++s) {
#pragma unroll
      for (int i = 0; i < 8; ++i) value[s][i] *= i / 4 ? (i % 2 ? high.y : high.x) : (i % 2 ? low.y : low.x);
    }
    begin_products();
#pragma unroll
    for (int s = 0; s < L::kOwnSlabs; ++s) {
#pragma unroll
      for (int k = 0; k < kTileTokens / kSlabStep; ++k) {
        add_product<T, true>(value[s], slabs + s * kNextSlab + k * kNextRows, weights + k * kNextColumns);
      }
    }
    await_products();
    warpgroup_sync();  // its warps are done with these columns
    fetch(tile + L::kStages);
  }
  sum = warp_reduce(sum, Sum{});
  if (lane == 0) {
    shared.max[warp] = max;
    shared.sum[warp] = sum;
  }
  await_copies<0>();
  __syncthreads();  // which the stages can be written over behind, too

  float* const part = reinterpret_cast<float*>(shared.stages);  // (kTileHeads, kPartStride)
#pragma unroll
  for (int s = 0; s < L::kOwnSlabs; ++s) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      part[(i / 4 * 8 + pair + i % 2) * L::kPartStride + (first_slab + s) * kSlab + row + i / 2 % 2 * 8] = value[s][i];
    }
  }
  BLOCKS == 1 ? __syncthreads() : cluster_sync();
  constexpr int kOctets = C / BLOCKS / kOctet;  // of a head, of this block
  if (threadIdx.x < kTileHeads) {
    float factors[BLOCKS], sums[BLOCKS], top = -INFINITY, total = 0.f;
#pragma unroll
    for (int b = 0; b < BLOCKS; ++b) {
      factors[b] = (BLOCKS == 1 ? shared.max : of_rank(shared.max, b))[threadIdx.x];
      sums[b] = (BLOCKS == 1 ? shared.sum : of_rank(shared.sum, b))[threadIdx.x];
    }
#pragma unroll
    for (int b = 0; b < BLOCKS; ++b) top = fmaxf(top, factors[b]);
#pragma unroll
    for (int b = 0; b < BLOCKS; ++b) {
      factors[b] = factors[b] == -INFINITY ? 0.f : __expf(factors[b] - top);
      total += sums[b] * factors[b];
    }
#pragma unroll
    for (int b = 0; b < BLOCKS; ++b) shared.factors[b][threadIdx.x] = total > 0.f ? factors[b] / total : 0.f;
  }
  __syncthreads();
#pragma unroll
  for (int n = 0; n < (kTileHeads * kOctets + kThreads - 1) / kThreads; ++n) {
    const int i = threadIdx.x + n * kThreads, head = i / kOctets, column = (rank * kOctets + i % kOctets) * kOctet;
    if (head >= heads) break;
    float all[kOctet] = {};
#pragma unroll
    for (int b = 0; b < BLOCKS; ++b) {
      const float* const theirs = (BLOCKS == 1 ? part : of_rank(part, b)) + head * L::kPartStride + column;
      const float factor = shared.factors[b][head];
#pragma unroll
      for (int e = 0; e < kOctet; e += 4) {
        const float4 four = *reinterpret_cast<const float4*>(theirs + e);
        all[e] += four.x * factor;
        all[e + 1] += four.y * factor;
        all[e + 2] += four.z * factor;
        all[e + 3] += four.w * factor;
      }
    }
    store<kOctet>(a.context + base + static_cast<long>(head) * C + column, all);
  }
  if constexpr (BLOCKS > 1) cluster_sync();  // until all have read it, this block's shared memory must stay
#endif
}

// ----------------------------------------------------------------------------------------------------------------
// kernel launchers

// No more blocks than there is room for at once (clusters of four leave some multiprocessors free), nor than have a few
// tiles each; there is room for `tokens` of all sources.
template <typename T>
void forward(const Operands<T>& a, int batch, int width, int tokens, cudaStream_t stream) {
  const int groups = ceil_div(a.heads, kTileHeads), all = batch * groups;
  const int tiles = ceil_div(tokens, batch * kTileTokens);
  const auto launch = [&](auto columns, auto cluster) {
    constexpr int C = decltype(columns)::value, BLOCKS = decltype(cluster)::value;
    launch_early_in_clusters("decode_memory_attention::attend", attend<T, C, BLOCKS>, dim3(BLOCKS, batch, groups),
                             kThreads, sizeof(Shared<T, C>), BLOCKS, stream, a);
  };
  const auto launch_blocks = [&](auto columns) {
    if (all <= 24 && tiles >= 8) return launch(columns, std::integral_constant<int, 4>{});
    if (all <= 66 && tiles >= 4) return launch(columns, std::integral_constant<int, 2>{});
    launch(columns, std::integral_constant<int, 1>{});
  };
  if (width == 512) return launch_blocks(std::integral_constant<int, 512>{});
  if (width == 768) return launch_blocks(std::integral_constant<int, 768>{});
  if (width == 1024) return launch_blocks(std::integral_constant<int, 1024>{});
  throw std::invalid_argument("decode_memory_attention: width " + std::to_string(width));
}

}  // namespace decode_memory_attention
}  // namespace lightseq
