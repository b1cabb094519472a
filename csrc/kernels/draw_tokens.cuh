// Drawing tokens (lightseq_fairseq/ops/draw_tokens.py has the rules and the shapes), a block a beam.
//
// Probabilities are added up as integers, so that neither the order of threads nor that of atomics matters. Where all
// types may be drawn, sums of tiles lead to the tile and its elements to the type. The most probable ones are never
// sorted: what lies at a certain number of types, or at a certain sum, in the order of falling probability is found
// digit by digit, by histograms of the types whose digits so far are the right ones, until few are left.
#pragma once

#include "beam_step.cuh"

namespace lightseq {
namespace draw_tokens {

using Mass = unsigned long long;

constexpr int kThreads = 512, kWarps = kThreads / kWarp, kBins = 256, kFew = 256, kLevels = 9;
constexpr int kLowBits = 13;                       // of a mass; sums of the rest and of these fit 32 bits
constexpr double kUnit = 17592186044416.;          // masses a probability of 1 has, 2^44
constexpr float kBinsANat = 8.f;                   // of the first digit

// What may be drawn in a row, type by type.
template <typename T>
struct Row {
  const T* logits;
  beam_step::Types types;
  float temperature, unkpen, log_sum;
  double unit;
  bool may_end;

  __device__ __forceinline__ float lprob(int type) const {
    const float x = beam_step::tempered(to_float(logits[type]), temperature);
    return x - log_sum - (type == types.unk ? unkpen : 0.f);
  }

  // 0 for what may not be drawn, or is no number.
  __device__ __forceinline__ Mass mass(int type, float lprob) const {
    if (type >= types.count || type == types.pad || (type == types.eos && !may_end) || !(lprob > -INFINITY)) return 0;
    return __double2ull_rn(static_cast<double>(expf(lprob)) * unit);
  }
};

// Digits of a type's place in the order of falling probability, equals in the order of types: two of the logarithm, the
// bytes of its bits, the bytes of the type.
__device__ __forceinline__ int digit(int level, float lprob, int type) {
  if (level < 2) {
    const float scaled = fmaxf(-lprob, 0.f) * kBinsANat, first = fminf(floorf(scaled), kBins - 1);
    return static_cast<int>(level == 0 ? first : fminf((scaled - first) * kBins, kBins - 1));
  }
  if (level < 6) return ~beam_step::key_of(lprob) >> (8 * (5 - level)) & 255;
  return type >> (8 * (8 - level)) & 255;
}

struct Item {
  unsigned key;
  int type;
  Mass mass;
};

// Shared memory of a block.
struct Space {
  unsigned count[kBins], high[kBins], low[kBins];
  int path[kLevels], few;
  Item items[kFew];
  Mass before, total, found_before, found_mass;
  int left, found;
  beam_step::LogSum partial[kWarps];
};

// What lies at `target` in the order of falling probability, in types or in mass: found, found_mass and the mass in
// front of it, found_before, in `space`. The target must be less than all there is.
template <bool BY_MASS, typename T>
__device__ __forceinline__ void locate(Space& space, const Row<T>& row, Mass target) {
  const int lane = threadIdx.x % kWarp;
  Mass mass_before = 0, count_before = 0;
  const auto on_path = [&](int level, float lprob, int type) {
    for (int l = 0; l < level; ++l) {
      if (digit(l, lprob, type) != space.path[l]) return false;
    }
    return true;
  };
  int level = 0, left = kFew + 1;
  while (left > kFew && level < kLevels) {
    for (int i = threadIdx.x; i < kBins; i += kThreads) space.count[i] = space.high[i] = space.low[i] = 0;
    __syncthreads();
    for (int type = threadIdx.x; type < row.types.count; type += kThreads) {
      const float lprob = row.lprob(type);
      const Mass mass = row.mass(type, lprob);
      if (mass == 0 || !on_path(level, lprob, type)) continue;
      const int bin = digit(level, lprob, type);
      atomicAdd(&space.count[bin], 1u);
      atomicAdd(&space.high[bin], static_cast<unsigned>(mass >> kLowBits));
      atomicAdd(&space.low[bin], static_cast<unsigned>(mass & ((1u << kLowBits) - 1)));
    }
    __syncthreads();
    if (threadIdx.x < kWarp) {  // a lane has eight bins
      constexpr int kEach = kBins / kWarp;
      Mass masses = 0, counts = 0;
      for (int i = lane * kEach; i < (lane + 1) * kEach; ++i) {
        masses += (static_cast<Mass>(space.high[i]) << kLowBits) + space.low[i];
        counts += space.count[i];
      }
      Mass mass_upto = masses, count_upto = counts;
#pragma unroll
      for (int apart = 1; apart < kWarp; apart *= 2) {
        const Mass other_mass = __shfl_up_sync(0xffffffffu, mass_upto, apart);
        const Mass other_count = __shfl_up_sync(0xffffffffu, count_upto, apart);
        if (lane >= apart) mass_upto += other_mass, count_upto += other_count;
      }
      Mass mass_at = mass_before + mass_upto - masses, count_at = count_before + count_upto - counts;
      const Mass start = BY_MASS ? mass_at : count_at, end = start + (BY_MASS ? masses : counts);
      if (start <= target && target < end) {
        for (int i = lane * kEach;; ++i) {
          const Mass mass = (static_cast<Mass>(space.high[i]) << kLowBits) + space.low[i];
          if (target < (BY_MASS ? mass_at + mass : count_at + space.count[i])) {
            space.path[level] = i;
            space.left = space.count[i];
            space.before = mass_at;
            space.found_before = count_at;
            break;
          }
          mass_at += mass;
          count_at += space.count[i];
        }
      }
    }
    __syncthreads();
    left = space.left;
    mass_before = space.before;
    count_before = space.found_before;
    ++level;
    __syncthreads();
  }
  if (threadIdx.x == 0) space.few = 0;
  __syncthreads();
  for (int type = threadIdx.x; type < row.types.count; type += kThreads) {
    const float lprob = row.lprob(type);
    const Mass mass = row.mass(type, lprob);
    if (mass == 0 || !on_path(level, lprob, type)) continue;
    space.items[atomicAdd(&space.few, 1)] = {beam_step::key_of(lprob), type, mass};
  }
  __syncthreads();
  if (threadIdx.x < space.few) {
    const Item mine = space.items[threadIdx.x];
    Mass mass_at = mass_before, count_at = count_before;
    for (int i = 0; i < space.few; ++i) {
      const Item other = space.items[i];
      if (other.key > mine.key || (other.key == mine.key && other.type < mine.type)) {
        mass_at += other.mass;
        ++count_at;
      }
    }
    const Mass start = BY_MASS ? mass_at : count_at, end = start + (BY_MASS ? mine.mass : 1);
    if (start <= target && target < end) {
      space.found = mine.type;
      space.found_mass = mine.mass;
      space.found_before = mass_at;
    }
  }
  __syncthreads();
}

// As locate by mass, in the order of types, of u times all there is; found is -1 if there is nothing.
// `tile_mass` (tiles,) is shared memory.
template <typename T>
__device__ __forceinline__ void locate_in_order(Space& space, const Row<T>& row, Mass* tile_mass, float u) {
  constexpr int kTile = beam_step::kTile;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, tiles = row.types.columns / kTile;
  const auto mass_at = [&](int type) { return type < row.types.count ? row.mass(type, row.lprob(type)) : 0; };
  for (int tile = warp; tile < tiles; tile += kWarps) {
    Mass sum = mass_at(tile * kTile + lane) + mass_at(tile * kTile + kWarp + lane);
#pragma unroll
    for (int apart = kWarp / 2; apart > 0; apart /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, apart);
    if (lane == 0) tile_mass[tile] = sum;
  }
  if (threadIdx.x == 0) space.found = -1;
  __syncthreads();
  if (warp == 0) {
    const int each = (tiles + kWarp - 1) / kWarp;
    Mass own = 0;
    for (int i = lane * each; i < min(tiles, (lane + 1) * each); ++i) own += tile_mass[i];
    Mass upto = own;
#pragma unroll
    for (int apart = 1; apart < kWarp; apart *= 2) {
      const Mass other = __shfl_up_sync(0xffffffffu, upto, apart);
      if (lane >= apart) upto += other;
    }
    const Mass total = __shfl_sync(0xffffffffu, upto, kWarp - 1);
    const Mass target = static_cast<Mass>(static_cast<double>(u) * static_cast<double>(total));
    if (upto - own <= target && target < upto) {
      Mass before = upto - own;
      for (int i = lane * each;; ++i) {
        if (target < before + tile_mass[i]) {
          for (int type = i * kTile;; ++type) {
            const Mass mass = mass_at(type);
            if (target < before + mass) {
              space.found = type;
              break;
            }
            before += mass;
          }
          break;
        }
        before += tile_mass[i];
      }
    }
  }
  __syncthreads();
}

// ----------------------------------------------------------------------------------------------------------------
// CUDA kernels

// A block a beam: grid (K, B). drawn (R,), logits (R, columns), statistics (R, tiles), settings, now, complete (B,),
// forced (B, steps), uniforms (B, steps, K). Dynamic shared memory: a mass for each tile.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    draw_of_beam(beam_step::Drawn* drawn, const T* logits, const float2* statistics,
                 const beam_step::Settings* settings, const int* forced, const int* now, const int* complete,
                 const float* uniforms, int steps, const beam_step::Types types) {
  extern __shared__ Mass tile_mass[];
  __shared__ Space space;
  const int k = blockIdx.x, beams = gridDim.x, sentence = blockIdx.y, tiles = types.columns / beam_step::kTile;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  settings += sentence;
  launch_next();
  wait_for_previous();
  const int step = now[sentence], must = forced[sentence * steps + step];
  if (complete[sentence] >= beams || k >= static_cast<int>(settings->beam)) return;
  const long first_row = static_cast<long>(sentence) * beams, from = first_row + (step == 0 ? 0 : k);
  const float u = uniforms[(static_cast<long>(sentence) * steps + step) * beams + k];

  beam_step::LogSum sum;
  for (int t = threadIdx.x; t < tiles; t += kThreads) sum.add(statistics[from * tiles + t].x);
  sum.merge_warp();
  if (lane == 0) space.partial[warp] = sum;
  __syncthreads();
  sum = {};
  if (lane < kWarps) sum = space.partial[lane];
  sum.merge_warp();
  const double unit = settings->unkpen < 0.f ? kUnit * exp(static_cast<double>(settings->unkpen)) : kUnit;
  const Row<T> row{logits + from * types.columns, types,
                   settings->temperature,         settings->unkpen,
                   sum.max + logf(sum.sum),       unit,
                   step >= settings->min_len};

  int token = must;
  if (must == types.pad) {
    const float top_k = settings->top_k, top_p = settings->top_p;
    if (top_k > 0.f || top_p > 0.f) {
      Mass all = 0, count = 0;
      for (int type = threadIdx.x; type < types.count; type += kThreads) {
        const Mass mass = row.mass(type, row.lprob(type));
        all += mass;
        count += mass != 0;
      }
#pragma unroll
      for (int apart = kWarp / 2; apart > 0; apart /= 2) {
        all += __shfl_xor_sync(0xffffffffu, all, apart);
        count += __shfl_xor_sync(0xffffffffu, count, apart);
      }
      if (lane == 0) space.items[warp] = {static_cast<unsigned>(count), 0, all};
      __syncthreads();
      all = count = 0;
      for (int w = 0; w < kWarps; ++w) all += space.items[w].mass, count += space.items[w].key;
      __syncthreads();
      Mass kept = all;
      if (top_k > 0.f) {
        if (static_cast<Mass>(top_k) < count) {
          locate<false>(space, row, static_cast<Mass>(top_k) - 1);
          kept = space.found_before + space.found_mass;
        }
      } else {
        const Mass least = static_cast<Mass>(ceil(static_cast<double>(top_p) * unit));
        if (least > 0 && least - 1 < all) {
          locate<true>(space, row, least - 1);
          kept = space.found_before + space.found_mass;
        }
      }
      token = -1;
      if (kept > 0) {
        const Mass target = static_cast<Mass>(static_cast<double>(u) * static_cast<double>(kept));
        locate<true>(space, row, target < kept ? target : kept - 1);
        token = space.found;
      }
    } else {
      locate_in_order(space, row, tile_mass, u);
      token = space.found;
    }
  }
  if (threadIdx.x == 0) {
    const float score = token < 0 ? -INFINITY : row.lprob(token);
    drawn[first_row + k] = {token < 0 ? types.count - 1 : token, isnan(score) ? -INFINITY : score};
  }
}

// ----------------------------------------------------------------------------------------------------------------
// kernel launchers

template <typename T>
void draw(beam_step::Drawn* drawn, const T* logits, const float2* statistics, const beam_step::Settings* settings,
          const int* forced, const int* now, const int* complete, const float* uniforms, int batch, int beam, int steps,
          const beam_step::Types& types, cudaStream_t stream) {
  const int shared = types.columns / beam_step::kTile * static_cast<int>(sizeof(Mass));
  launch_early("draw_tokens::draw_of_beam", draw_of_beam<T>, dim3(beam, batch), kThreads, shared, stream, drawn, logits,
               statistics, settings, forced, now, complete, uniforms, steps, types);
}

}  // namespace draw_tokens
}  // namespace lightseq
