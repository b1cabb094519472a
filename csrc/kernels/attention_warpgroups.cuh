// Attention of 16-bit types, forward, of long sentences on Hopper's tensor cores (wgmma). A block has GROUPS warpgroups
// of 64 queries each of one (sentence, head), which share the keys and values: kStages tiles of 64 keys, the next ones
// on their way. Scores, probabilities and sums stay in registers, with the running maximum and sum of flash attention
// (Dao et al. 2022); the lanes of a warp have of them what they have of mma.sync's, so that dropout's mask is that of
// attention_tiles.cuh.
//
// Floor: 4 H D L^2 operations a sentence of L tokens, and as many exponentials as scores, which take as long: 64
// sentences of 300 tokens, H = 16, D = 64: 24 GFLOP and 92 million exponentials, 30 us each; 8 N H D bytes: 37 us.
// Measured on an H200: two warpgroups a block 95 us, 50 with the copies alone; one, which such lengths take now, 84,
// but without the fence behind the copies (two take 94 so); forward_tiles 134.
#pragma once

#include "../common/warpgroup.cuh"
#include "attention_tiles.cuh"

namespace lightseq {
namespace attention {

constexpr int kGroupRows = 64, kSlabRows = 64;

// Slabs (64 rows, 64 columns), each a multiple of 1024 bytes.
template <typename T, int D, int GROUPS>
struct Slabs {
  static constexpr int kWide = D / kSlab, kStages = D <= 64 ? 3 : 2;
  using Tile = T[kWide * kSlabRows * kSlab];
  Tile q[GROUPS], k[kStages], v[kStages];
};

// What one of THREADS threads copies of 64 rows of one head, D columns wide, into slabs; zeros past head_dim columns.
template <typename T, int D, int THREADS>
class SlabCopy {
 public:
  __device__ __forceinline__ SlabCopy(const Heads<const T>& x, int first, int head, int head_dim, int thread)
      : row_(thread / kUnits), stride_(x.token_stride), there_(thread % kUnits * kVec<T> < head_dim) {
    const int unit = thread % kUnits;
    from_ = x.row(first + row_, head) + (there_ ? unit * kVec<T> : 0);
    to_ = unit / kSlabUnits * kSlabRows * kSlab + slab_place(row_, unit % kSlabUnits);
  }

  // Rows from `base` on, of which `inside` exist.
  __device__ __forceinline__ void start(T* slabs, int base, int inside) const {
    const T* from = from_ + static_cast<uint64_t>(base) * stride_;
#pragma unroll
    for (int i = 0; i < kSlabRows / kStep; ++i) {  // steps of 8 rows have the same swizzle
      const bool there = there_ && row_ + i * kStep < inside;
      copy_async(slabs + to_ + i * kStep * kSlab, from, there);
      from += kStep * stride_;
    }
  }

 private:
  static constexpr int kUnits = D / kVec<T>, kStep = THREADS / kUnits;
  static_assert(kStep % kSlabUnits == 0);
  const T* from_;
  int row_, to_;
  unsigned stride_;
  bool there_;
};

// ----------------------------------------------------------------------------------------------------------------
// CUDA kernels

// Grid: ((B + 1) * tiles, H), of query tiles of GROUPS * kGroupRows rows: those of a sentence one after the other, so
// that they find its keys and values in the cache, the last and, if causal, longest one first. Other arguments as
// forward_tiles.
template <typename T, int D, int GROUPS, bool DROPOUT>
__global__ void __launch_bounds__(GROUPS* kWarpgroup, (D <= 64 ? 4 : 2) / GROUPS)
    forward_warpgroups(Heads<T> out, float* lse, Heads<const T> q, Heads<const T> k, Heads<const T> v, Problem p,
                       int query_tiles) {
#ifdef LIGHTSEQ_WARPGROUPS
  extern __shared__ __align__(1024) unsigned char bytes[];
  using Shared = Slabs<T, D, GROUPS>;
  Shared& shared = *reinterpret_cast<Shared*>(bytes);
  constexpr int kStages = Shared::kStages, kWide = D / kSlab, kKeys = kSlabRows;
  const int head = blockIdx.y, sentence = blockIdx.x / query_tiles;
  const int first = (query_tiles - 1 - blockIdx.x % query_tiles) * GROUPS * kGroupRows;
  wait_for_previous();
  const ProbabilityMask mask(p.dropout, sentence, head);
  const Span span(p, sentence);
  if (!has_queries(out, span, first, head, p.head_dim)) return;

  const int keys = span.visible(min(first + GROUPS * kGroupRows, span.q_len) - 1);
  const int tiles = (keys + kKeys - 1) / kKeys;
  const SlabCopy<T, D, GROUPS * kWarpgroup> k_copy(k, span.k_begin, head, p.head_dim, threadIdx.x);
  const SlabCopy<T, D, GROUPS * kWarpgroup> v_copy(v, span.k_begin, head, p.head_dim, threadIdx.x);
  const auto fetch = [&](int tile) {
    if (tile < tiles) {
      k_copy.start(shared.k[tile % kStages], tile * kKeys, keys - tile * kKeys);
      v_copy.start(shared.v[tile % kStages], tile * kKeys, keys - tile * kKeys);
    }
    commit_copies();
  };
  const int group = warp_number() * kWarp / kWarpgroup, lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
  const int group_row = first + group * kGroupRows, row = group_row + warp_number() % 4 * 16;
  SlabCopy<T, D, kWarpgroup>(q, span.q_begin, head, p.head_dim, threadIdx.x % kWarpgroup)
      .start(shared.q[group], group_row, span.q_len - group_row);
#pragma unroll
  for (int tile = 0; tile < kStages - 1; ++tile) fetch(tile);

  const int reach = group_row < span.q_len ? span.visible(min(group_row + kGroupRows, span.q_len) - 1) : 0;
  const int least = span.visible(row);
  const int seen[2] = {span.visible(row + g), span.visible(row + g + 8)};
  const float scale = static_cast<float>(p.scale) * kLog2e;
  const uint64_t queries = slab_descriptor(shared.q[group]);
  constexpr uint64_t kNextSlab = kSlabRows * kSlab * 2 / 16;
  float o[kWide][kSlab / 8][4] = {}, top[2] = {-INFINITY, -INFINITY}, sum[2] = {0.f, 0.f};

  for (int tile = 0; tile < tiles; ++tile) {
    const int base = tile * kKeys;
    await_copies<kStages - 2>();
    publish_to_products();
    __syncthreads();  // all are done with the tile before, where the next one goes
    fetch(tile + kStages - 1);
    if (base >= reach) continue;

    // s = q k^T
    float s[kKeys / 8][4];
    const uint64_t key_slabs = slab_descriptor(shared.k[tile % kStages]);
    begin_products();
#pragma unroll
    for (int d = 0; d < D / kSlabStep; ++d) {
      const uint64_t at = d / (kSlab / kSlabStep) * kNextSlab + d % (kSlab / kSlabStep) * kNextColumns;
      if (d == 0) {
        add_product<T, false>(s, queries + at, key_slabs + at);
      } else {
        add_product<T, true>(s, queries + at, key_slabs + at);
      }
    }
    await_products();

    // -inf where nothing is seen; the rows' new maxima
    if (base + kKeys > least) hide(s, base, t, seen);
    float peak[2] = {top[0], top[1]};
#pragma unroll
    for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
      for (int c = 0; c < 4; ++c) peak[c / 2] = fmaxf(peak[c / 2], s[n][c]);
    }
    float shift[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      peak[half] = fmaxf(peak[half], __shfl_xor_sync(0xffffffffu, peak[half], 1));
      peak[half] = fmaxf(peak[half], __shfl_xor_sync(0xffffffffu, peak[half], 2));
      shift[half] = peak[half] == -INFINITY ? 0.f : peak[half] * scale;
      const float shrink = exp2_fast(fmaf(top[half], scale, -shift[half]));
      top[half] = peak[half];
      sum[half] *= shrink;
#pragma unroll
      for (int w = 0; w < kWide; ++w) {
#pragma unroll
        for (int n = 0; n < kSlab / 8; ++n) {
          o[w][n][2 * half] *= shrink;
          o[w][n][2 * half + 1] *= shrink;
        }
      }
    }

    // p = exp(s - top), summed before dropout, in 16 bits as left operand: rows g and g + 8, 16 keys each
    uint32_t probabilities[kKeys / kSlabStep][4];
#pragma unroll
    for (int j = 0; j < kKeys / kSlabStep; ++j) {
      const Draw draw = DROPOUT ? mask.draw_block(row / 16, base / 16 + j) : Draw{};
      take_probabilities<T, DROPOUT>(probabilities[j], sum, s[2 * j], s[2 * j + 1], scale, shift, draw);
    }

    // o += dropout(p) v
    const uint64_t value_slabs = slab_descriptor(shared.v[tile % kStages]);
    begin_products();
#pragma unroll
    for (int j = 0; j < kKeys / kSlabStep; ++j) {
#pragma unroll
      for (int w = 0; w < kWide; ++w) {
        add_product<T>(o[w], probabilities[j], value_slabs + w * kNextSlab + j * kNextRows);
      }
    }
    await_products();
  }
  if (row >= span.q_len) return;

  float factor[2];
  finish_softmax(factor, sum, top, scale, lse, p, span, row, g, t, head);
#pragma unroll
  for (int w = 0; w < kWide; ++w) {
#pragma unroll
    for (int n = 0; n < kSlab / 8; n += 4) {
      store_rows(out, span.q_begin + row, head, span.q_len - row, w * kSlab + 8 * n, p.head_dim, o[w] + n, factor[0],
                 factor[1]);
    }
  }
#endif
}

// ----------------------------------------------------------------------------------------------------------------
// kernel launchers

// False, with nothing done, where forward_tiles is as good or this GPU has no such products.
template <typename T>
bool forward_on_warpgroups(const Heads<T>& out, float* lse, const Heads<const T>& q, const Heads<const T>& k,
                           const Heads<const T>& v, const Problem& p, cudaStream_t stream) {
  if (p.max_len_k <= 64 || p.max_len_q <= 32 || p.head_dim <= 32 || p.head_dim > 128 || !has_warpgroups()) return false;
  const auto launch = [&](auto width, auto groups, auto dropout) {
    constexpr int D = decltype(width)::value, GROUPS = decltype(groups)::value;
    const int tiles = ceil_div(p.max_len_q, GROUPS * kGroupRows);
    launch_early("attention::forward_warpgroups", forward_warpgroups<T, D, GROUPS, decltype(dropout)::value>,
                 dim3((p.sentences + 1) * tiles, p.heads), GROUPS * kWarpgroup, sizeof(Slabs<T, D, GROUPS>), stream,
                 out, lse, q, k, v, p, tiles);
  };
  const auto launch_dropout = [&](auto width, auto groups) {
    p.dropout.bound ? launch(width, groups, std::true_type{}) : launch(width, groups, std::false_type{});
  };
  const int groups = ceil_div(p.max_len_q, kGroupRows);  // two share their keys; one without queries is in the way
  const auto launch_groups = [&](auto width) {
    if (groups % 2 == 1 && groups < 8) return launch_dropout(width, std::integral_constant<int, 1>{});
    launch_dropout(width, std::integral_constant<int, 2>{});
  };
  if (p.head_dim <= 64) {
    launch_groups(std::integral_constant<int, 64>{});
  } else {
    launch_groups(std::integral_constant<int, 128>{});
  }
  return true;
}

}  // namespace attention
}  // namespace lightseq
