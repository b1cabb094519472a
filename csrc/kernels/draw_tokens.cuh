// Drawing tokens (lightseq_fairseq/ops/draw_tokens.py has the rules and the shapes), a cluster of blocks a beam.
//
// Probabilities are added up as integers, so that neither the order of threads nor that of atomics matters. Each block
// has a share of the types; the logits come from memory once, and lie in its L1 when they are gone over again.
//
// Where all types may be drawn, sums of shares and warps lead to the type. The most probable ones are never sorted.
// What lies at a certain number of types, or at a certain sum, in the order of falling probability is found bin by
// bin, by histograms that the blocks add up in one another's shared memory, until few types are left, which are
// compared with one another: for the usual distribution one histogram will do. The k most probable need none: as many
// types as there are tiles have at least the probabilities that `statistics` tells, so that hardly more than k are
// compared.
#pragma once

#include "../common/cluster.cuh"
#include "beam_step.cuh"

namespace lightseq {
namespace draw_tokens {

using Mass = unsigned long long;

constexpr int kThreads = 512, kWarps = kThreads / kWarp;
constexpr int kMaxBlocks = 8;                      // of a cluster
constexpr int kDigitBits = 10, kBins = 1 << kDigitBits, kThreadBins = kBins / kThreads;
constexpr int kTypeBits = 28, kPlaceBits = 32 + kTypeBits;
constexpr int kFew = kThreads;                     // types that are compared with one another
constexpr int kLowBits = 13;                       // of a mass; sums of the rest and of these fit 32 bits
constexpr double kUnit = 17592186044416.;          // masses a probability of 1 has, 2^44
constexpr float kFineNats = 14.f, kFineBins = 64.f, kCoarseBins = 7.f;  // bins a nat, down to kFineNats and below

static_assert(kPlaceBits % kDigitBits == 0 && kBins % kThreads == 0 && kBins % kMaxBlocks == 0);

// What may be drawn in a row, type by type.
template <typename T>
struct Row {
  const T* logits;
  beam_step::Types types;
  float temperature, unkpen, log_sum;
  double unit;  // as kUnit, so that no mass is above that
  int barred;  // what may not be drawn beside pad

  __device__ __forceinline__ float lprob(float logit, int type) const {
    return beam_step::tempered(logit, temperature) - log_sum - (type == types.unk ? unkpen : 0.f);
  }

  // 0 for what may not be drawn, or is no number.
  __device__ __forceinline__ Mass mass(int type, float lprob) const {
    if (type >= types.count || type == types.pad || type == barred || !(lprob > -INFINITY)) return 0;
    return __double2ull_rn(static_cast<double>(expf(lprob)) * unit);
  }
};

// Its place in the order of falling probability: less for larger lprob, equals in the order of types.
__device__ __forceinline__ Mass place_of(float lprob, int type) {
  return static_cast<Mass>(~beam_step::key_of(lprob)) << kTypeBits | type;
}

constexpr Mass kNowhere = ~static_cast<Mass>(0), kUnknown = kNowhere - 1;  // behind all places
constexpr int kNone = -1, kElsewhere = -2;        // instead of a type

__device__ __forceinline__ int type_at(Mass place) { return place & ((1 << kTypeBits) - 1); }

// Not less for smaller lprob. Below the last bin but one there is no mass.
__device__ __forceinline__ int bin_of(float lprob) {
  const float nats = fmaxf(-lprob, 0.f);
  if (nats < kFineNats) return static_cast<int>(nats * kFineBins);
  constexpr int kFine = static_cast<int>(kFineNats * kFineBins);
  return kFine + static_cast<int>(fminf((nats - kFineNats) * kCoarseBins, kBins - 1 - kFine));
}

// The types of a bin; of a digit of the place within that; of the next digit within that; ...
struct Path {
  int level = 0, bin = 0;  // level 0: all types
  Mass digits = 0;

  __device__ __forceinline__ bool has(float lprob, Mass place) const {
    return level == 0 || (bin_of(lprob) == bin && place >> (kPlaceBits - kDigitBits * (level - 1)) == digits);
  }

  // The bin of one of its types in a histogram of them.
  __device__ __forceinline__ int next(float lprob, Mass place) const {
    return level == 0 ? bin_of(lprob) : place >> (kPlaceBits - kDigitBits * level) & (kBins - 1);
  }

  __device__ __forceinline__ void enter(int next) {
    if (level == 0) bin = next;
    else digits = digits << kDigitBits | next;
    ++level;
  }
};

enum class By { kCount, kMass };

struct Amount {
  Mass mass;
  unsigned count;

  __device__ __forceinline__ Mass by(By what) const { return what == By::kMass ? mass : count; }
  __device__ __forceinline__ Amount operator+(const Amount& other) const {
    return {mass + other.mass, count + other.count};
  }
};

struct Item {
  Mass place, mass;
};

// What lies somewhere in that order: a bin or a type, and what comes before it.
struct Found {
  Amount before;
  int bin;
  unsigned count;
  Item item;

  __device__ __forceinline__ Mass upto() const { return before.mass + item.mass; }
};

// Shared memory of a block. The blocks of a cluster read one another's share_* and write one another's *_upto.
struct Space {
  unsigned share_count[kBins], share_high[kBins], share_low[kBins];  // the share's histogram, masses in two parts
  Mass mass_upto[kBins];                                             // the row's, running sums at last
  unsigned count_upto[kBins];
  Item share_items[kFew], items[kFew];
  Mass share_mass;
  int share_few;
  Amount of_warp[kWarps];
  Found found;
};

// A beam's draw, by all blocks of the cluster alike. Of what is said to be the cluster's, each begins with cluster_wait
// and ends with cluster_arrive, once it has read what it needs of the other blocks: so none overwrites what another
// still reads.
template <typename T>
struct Draw {
  Space& space;
  const Row<T> row;
  const int rank = blockIdx.x, blocks = gridDim.x;
  const int octets = row.types.columns / kOctet;
  const int first = octets * rank / blocks, last = octets * (rank + 1) / blocks;  // of the share
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  bool whole = false;  // the row's histogram is that of all types

  // f(type, lprob) for the types of an octet. In pairs, as code for all eight is too much for the instruction caches.
  template <typename F>
  __device__ __forceinline__ void each_of(int octet, const F& f) const {
    const Packed<T, kOctet> logits = request<kOctet>(row.logits + octet * kOctet);
    Packed<T, 2> pair[kOctet / 2];
#pragma unroll
    for (int i = 0; i < kOctet / 2; ++i) pair[i] = reinterpret_cast<const Packed<T, 2>*>(&logits)[i];
#pragma unroll 1
    for (int type = octet * kOctet; type < (octet + 1) * kOctet; type += 2) {
      float x[2];
      pair[0].widen(x);
      f(type, row.lprob(x[0], type));
      f(type + 1, row.lprob(x[1], type + 1));
#pragma unroll
      for (int i = 1; i < kOctet / 2; ++i) pair[i - 1] = pair[i];
    }
  }

  // Likewise for those of the share, which lie in L1 from the second time on.
  template <typename F>
  __device__ __forceinline__ void each(const F& f) const {
    for (int octet = first + threadIdx.x; octet < last; octet += kThreads) each_of(octet, f);
  }

  // The row's histogram becomes one of running sums.
  __device__ __forceinline__ void add_up() {
    Amount upto[kThreadBins], own{};
#pragma unroll
    for (int i = 0; i < kThreadBins; ++i) {
      const int bin = threadIdx.x * kThreadBins + i;
      upto[i] = own = own + Amount{space.mass_upto[bin], space.count_upto[bin]};
    }
    Amount sum = own;
#pragma unroll
    for (int apart = 1; apart < kWarp; apart *= 2) {
      const Amount other{__shfl_up_sync(0xffffffffu, sum.mass, apart), __shfl_up_sync(0xffffffffu, sum.count, apart)};
      if (lane >= apart) sum = sum + other;
    }
    if (lane == kWarp - 1) space.of_warp[warp] = sum;
    __syncthreads();
    Amount before{sum.mass - own.mass, sum.count - own.count};
    for (int w = 0; w < warp; ++w) before = before + space.of_warp[w];
#pragma unroll
    for (int i = 0; i < kThreadBins; ++i) {
      const int bin = threadIdx.x * kThreadBins + i;
      space.mass_upto[bin] = before.mass + upto[i].mass;
      space.count_upto[bin] = before.count + upto[i].count;
    }
    __syncthreads();
  }

  __device__ __forceinline__ Amount upto(int bin) const {
    return bin < 0 ? Amount{} : Amount{space.mass_upto[bin], space.count_upto[bin]};
  }

  // What the one thread that `has` it makes of it, told to all.
  template <typename Make>
  __device__ __forceinline__ Found tell(bool has, const Make& make) {
    if (has) space.found = make();
    __syncthreads();
    const Found found = space.found;
    __syncthreads();
    return found;
  }

  // The bin of the row's histogram where `target` lies, which must be less than all there is.
  __device__ __forceinline__ Found bin_at(By by, Mass target) {
    int bin = -1;
#pragma unroll
    for (int i = 0; i < kThreadBins; ++i) {
      const int at = threadIdx.x * kThreadBins + i;
      if (upto(at - 1).by(by) <= target && target < upto(at).by(by)) bin = at;
    }
    return tell(bin >= 0, [&] {
      const Amount before = upto(bin - 1);
      return Found{before, bin, upto(bin).count - before.count, {}};
    });
  }

  // The cluster's: the histogram of the types of the path.
  __device__ __forceinline__ void fill(const Path& path) {
    cluster_wait();
    for (int i = threadIdx.x; i < kBins; i += kThreads) {
      space.share_count[i] = space.share_high[i] = space.share_low[i] = 0;
    }
    __syncthreads();
    each([&](int type, float lprob) {
      const Mass mass = row.mass(type, lprob), place = place_of(lprob, type);
      if (mass == 0 || !path.has(lprob, place)) return;
      const int bin = path.next(lprob, place);
      atomicAdd(&space.share_count[bin], 1u);
      atomicAdd(&space.share_high[bin], static_cast<unsigned>(mass >> kLowBits));
      atomicAdd(&space.share_low[bin], static_cast<unsigned>(mass & ((1u << kLowBits) - 1)));
    });
    cluster_sync();
    const int bins = kBins / blocks;  // of which this block makes the sums
    for (int bin = rank * bins + threadIdx.x; bin < (rank + 1) * bins; bin += kThreads) {
      Amount sum{};
#pragma unroll 4
      for (int other = 0; other < blocks; ++other) {
        sum.mass += (static_cast<Mass>(*of_rank(&space.share_high[bin], other)) << kLowBits) +
                    *of_rank(&space.share_low[bin], other);
        sum.count += *of_rank(&space.share_count[bin], other);
      }
#pragma unroll 4
      for (int other = 0; other < blocks; ++other) {
        *of_rank(&space.mass_upto[bin], other) = sum.mass;
        *of_rank(&space.count_upto[bin], other) = sum.count;
      }
    }
    cluster_sync();
    cluster_arrive();
    add_up();
    whole = path.level == 0;
  }

  // The cluster's: the types that are `wanted(lprob, place)` to `items`, in any order; their number. If that is more
  // than kFew, `items` mean nothing.
  template <typename Wanted>
  __device__ __forceinline__ int collect(const Wanted& wanted) {
    cluster_wait();
    if (threadIdx.x == 0) space.share_few = 0;
    __syncthreads();
    each([&](int type, float lprob) {
      const Mass place = place_of(lprob, type);
      if (!wanted(lprob, place)) return;
      const Mass mass = row.mass(type, lprob);
      if (mass == 0) return;
      const int at = atomicAdd(&space.share_few, 1);
      if (at < kFew) space.share_items[at] = {place, mass};
    });
    cluster_sync();
    int count = 0, owner = 0, at = 0;  // thread i has item i
#pragma unroll 4
    for (int other = 0; other < blocks; ++other) {
      if (threadIdx.x >= count) owner = other, at = threadIdx.x - count;
      count += *of_rank(&space.share_few, other);
    }
    if (threadIdx.x < count && count <= kFew) space.items[threadIdx.x] = *of_rank(&space.share_items[at], owner);
    cluster_arrive();
    __syncthreads();
    return count;
  }

  // What comes before this thread's of `count` items.
  __device__ __forceinline__ Amount before_mine(int count) const {
    Amount before{};
    if (threadIdx.x >= count) return before;
    const Mass mine = space.items[threadIdx.x].place;
#pragma unroll 4
    for (int i = 0; i < count; ++i) {
      const Item other = space.items[i];
      if (other.place < mine) before = before + Amount{other.mass, 1};
    }
    return before;
  }

  // The item at `target`, which must be less than all `count` items are.
  __device__ __forceinline__ Found item_at(By by, Mass target, int count, const Amount& before) {
    const Item mine = threadIdx.x < count ? space.items[threadIdx.x] : Item{};
    const Mass start = before.by(by), end = start + Amount{mine.mass, 1}.by(by);
    return tell(threadIdx.x < count && start <= target && target < end, [&] { return Found{before, 0, 1, mine}; });
  }

  // The type at `target`; none, behind all types, if there are not so many.
  __device__ __forceinline__ Found locate(By by, Mass target) {
    Path path;
    Amount before{};
    unsigned left;
    do {
      if (path.level > 0 || !whole) fill(path);
      const Amount all = upto(kBins - 1);
      if (path.level == 0 && target >= all.by(by)) return {all};
      const Found found = bin_at(by, target - before.by(by));
      before = before + found.before;
      left = found.count;
      path.enter(found.bin);
    } while (left > kFew);
    const int count = collect([&](float lprob, Mass place) { return path.has(lprob, place); });
    Found found = item_at(by, target - before.by(by), count, before_mine(count));
    found.before = found.before + before;
    return found;
  }

  // The first bins of the order that have `wanted` types for certain: those of the tiles' best ordinary ones.
  __device__ __forceinline__ int bins_of_best(const float2* statistics, Mass wanted) {
    for (int i = threadIdx.x; i < kBins; i += kThreads) space.mass_upto[i] = space.count_upto[i] = 0;
    __syncthreads();
    for (int t = threadIdx.x; t < row.types.columns / beam_step::kTile; t += kThreads) {
      const float lprob = statistics[t].y - row.log_sum;
      if (lprob > -INFINITY) atomicAdd(&space.count_upto[bin_of(lprob)], 1u);
    }
    __syncthreads();
    add_up();
    return wanted <= upto(kBins - 1).count ? bin_at(By::kCount, wanted - 1).bin + 1 : kBins;
  }

  static __device__ __forceinline__ Mass point(float u, Mass kept) {
    const Mass target = static_cast<Mass>(static_cast<double>(u) * static_cast<double>(kept));
    return target < kept ? target : kept - 1;
  }

  // The place of what is drawn among the top_k first, if these can be told from the tiles' best.
  __device__ __forceinline__ Mass among_best(const float2* statistics, Mass top_k, float u) {
    const int bins = bins_of_best(statistics, top_k);
    const int few = collect([&](float lprob, Mass) { return bin_of(lprob) < bins; });
    if (few == 0) return kNowhere;
    if (few > kFew) return kUnknown;
    const Amount before = before_mine(few);
    const Found last = item_at(By::kCount, min(top_k, static_cast<Mass>(few)) - 1, few, before);
    return item_at(By::kMass, point(u, last.upto()), few, before).item.place;
  }

  // The place of what is drawn among the first up to that at `end`, or all.
  __device__ __forceinline__ Mass among_first(By by, Mass end, float u) {
    Found found;
#pragma unroll 1
    for (int round = 0; round < 2; ++round) {  // there shall be no second copy of all that code
      found = locate(by, end);
      if (round == 1) break;
      const Mass kept = found.upto();
      if (kept == 0) return kNowhere;
      by = By::kMass;
      end = point(u, kept);
    }
    return found.item.place;
  }

  // The cluster's: the type that lies at u times all there is in the order of types, for the one thread that finds it;
  // kElsewhere for others. kNone for one thread if there is nothing.
  __device__ __forceinline__ int among_all(float u) {
    const int begin = first + (last - first) * warp / kWarps, end = first + (last - first) * (warp + 1) / kWarps;
    const auto mass_of = [&](int octet) {
      Mass sum = 0;
      if (octet >= end) return sum;
      each_of(octet, [&](int type, float lprob) { sum += row.mass(type, lprob); });
      return sum;
    };
    Mass sum = 0;
    for (int octet = begin + lane; octet < end; octet += kWarp) sum += mass_of(octet);
#pragma unroll
    for (int apart = kWarp / 2; apart > 0; apart /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, apart);
    if (lane == 0) space.of_warp[warp].mass = sum;
    __syncthreads();
    Mass before = 0, share = 0, all = 0;
    for (int w = 0; w < kWarps; ++w) {
      if (w < warp) before += space.of_warp[w].mass;
      share += space.of_warp[w].mass;
    }
    cluster_wait();
    if (threadIdx.x == 0) space.share_mass = share;
    cluster_sync();
#pragma unroll 4
    for (int other = 0; other < blocks; ++other) {
      const Mass mass = *of_rank(&space.share_mass, other);
      all += mass;
      if (other < rank) before += mass;
    }
    cluster_arrive();
    if (all == 0) return rank == 0 && threadIdx.x == 0 ? kNone : kElsewhere;
    const Mass target = static_cast<Mass>(static_cast<double>(u) * static_cast<double>(all));
    if (target < before || target >= before + sum) return kElsewhere;
    for (int octet = begin + lane;; octet += kWarp) {
      const Mass own = mass_of(octet);
      Mass upto = own;
#pragma unroll
      for (int apart = 1; apart < kWarp; apart *= 2) {
        const Mass other = __shfl_up_sync(0xffffffffu, upto, apart);
        if (lane >= apart) upto += other;
      }
      const Mass next = before + __shfl_sync(0xffffffffu, upto, kWarp - 1);
      if (target < next) {
        Mass at = before + upto - own;
        if (target < at || target >= at + own) return kElsewhere;
        int found = kElsewhere;
        each_of(octet, [&](int type, float lprob) {
          const Mass mass = row.mass(type, lprob);
          if (at <= target && target < at + mass) found = type;
          at += mass;
        });
        return found;
      }
      before = next;
    }
  }
};

// ----------------------------------------------------------------------------------------------------------------
// CUDA kernels

// A cluster a beam: grid (blocks, K, B). drawn (R,), logits (R, columns), statistics (R, tiles), settings, now,
// complete (B,), forced (B, steps), uniforms (B, steps, K).
template <typename T>
__global__ void __launch_bounds__(kThreads, 2)
    draw_of_beam(beam_step::Drawn* drawn, const T* logits, const float2* statistics,
                 const beam_step::Settings* settings, const int* forced, const int* now, const int* complete,
                 const float* uniforms, int steps, const beam_step::Types types) {
  __shared__ Space space;
  __shared__ beam_step::LogSum partial[kWarps];
  const int rank = blockIdx.x, k = blockIdx.y, beams = gridDim.y, sentence = blockIdx.z;
  const int tiles = types.columns / beam_step::kTile;
  settings += sentence;
  launch_next();
  wait_for_previous();
  const int step = now[sentence], must = forced[sentence * steps + step];
  if (complete[sentence] >= beams || k >= static_cast<int>(settings->beam)) return;
  const long from = sentence * beams + (step == 0 ? 0 : k);
  const float u = uniforms[(sentence * steps + step) * beams + k];
  statistics += from * tiles;

  beam_step::LogSum sum;
  for (int t = threadIdx.x; t < tiles; t += kThreads) sum.add(statistics[t].x);
  sum.merge_warp();
  if (threadIdx.x % kWarp == 0) partial[threadIdx.x / kWarp] = sum;
  const float unkpen = settings->unkpen;
  __syncthreads();
  sum = {};
  if (threadIdx.x % kWarp < kWarps) sum = partial[threadIdx.x % kWarp];
  sum.merge_warp();
  const Row<T> row{logits + from * types.columns,
                   types,
                   settings->temperature,
                   unkpen,
                   sum.max + logf(sum.sum),
                   unkpen < 0.f ? kUnit * exp(static_cast<double>(unkpen)) : kUnit,
                   step >= settings->min_len ? types.pad : types.eos};
  const bool tells = rank == 0 && threadIdx.x == 0;
  int token = tells ? must : kElsewhere;
  if (must == types.pad) {
    cluster_arrive();
    Draw<T> draw{space, row};
    const float top_k = settings->top_k, top_p = settings->top_p;
    if (top_k > 0.f || top_p > 0.f) {
      Mass place = top_k > 0.f ? draw.among_best(statistics, static_cast<Mass>(top_k), u) : kUnknown;
      if (place == kUnknown) {
        const Mass least = static_cast<Mass>(ceil(static_cast<double>(top_p) * row.unit));  // if 0, all are kept
        place = draw.among_first(top_k > 0.f ? By::kCount : By::kMass,
                                 (top_k > 0.f ? static_cast<Mass>(top_k) : least) - 1, u);
      }
      if (tells) token = place == kNowhere ? kNone : type_at(place);
    } else {
      token = draw.among_all(u);
    }
    cluster_wait();
  }
  if (token == kElsewhere) return;
  const float lprob = token == kNone ? -INFINITY : row.lprob(to_float(row.logits[token]), token);
  drawn[sentence * beams + k] = {token == kNone ? types.count - 1 : token, isnan(lprob) ? -INFINITY : lprob};
}

// ----------------------------------------------------------------------------------------------------------------
// kernel launchers

// As many as find work and can be there all at once.
inline int blocks_for(int columns, int rows) {
  constexpr int kColumns = kThreads * kOctet / 2, kAtOnce = 264;
  int blocks = kMaxBlocks;
  while (blocks > 1 && (blocks * kColumns > columns || rows * blocks > kAtOnce)) blocks /= 2;
  return launches_early() ? blocks : 1;
}

template <typename T>
void draw(beam_step::Drawn* drawn, const T* logits, const float2* statistics, const beam_step::Settings* settings,
          const int* forced, const int* now, const int* complete, const float* uniforms, int batch, int beam, int steps,
          const beam_step::Types& types, cudaStream_t stream) {
  const int blocks = blocks_for(types.columns, batch * beam);
  launch_early_in_clusters("draw_tokens::draw_of_beam", draw_of_beam<T>, dim3(blocks, beam, batch), kThreads, 0, blocks,
                           stream, drawn, logits, statistics, settings, forced, now, complete, uniforms, steps, types);
}

}  // namespace draw_tokens
}  // namespace lightseq
