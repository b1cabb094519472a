// One step of a search on the device (lightseq_fairseq/ops/beam_step.py has the rules and the shapes).
//
// statistics_of_tiles goes over the logits once. step_of_sentence, a block a sentence, needs of them only the tiles
// that can hold one of the 2K best: those of the 2K largest maxima, beams compared with one another. Both selections
// are made by warps over 32-bit keys in the order of the scores, equal keys in the order of beams and types. Siblings
// select so for each beam, groups for each group.
#pragma once

#include <algorithm>

#include "../common/launch_chain.cuh"
#include "../common/octet.cuh"
#include "../common/reduce.cuh"

namespace lightseq {
namespace beam_step {

constexpr int kTile = 64, kMaxBeam = 16, kMaxCandidates = 2 * kMaxBeam;
constexpr int kTileLanes = kTile / kOctet, kTileThreads = 256;
constexpr int kThreads = 1024, kWarps = kThreads / kWarp, kMaxSurvivors = 512;
constexpr int kAsked = 2;  // statistics that a thread has under way

// The vocabulary: types, columns of the logits (a multiple of kTile), special types.
struct Types {
  int count, columns, pad, eos, unk, last_special;

  __device__ __forceinline__ bool ordinary(int type) const {
    return type < count && type != pad && type != eos && type != unk;
  }
};

// Where the candidates of a step come from.
enum class Search { kBest, kSiblings, kGroups, kDrawn };

// Of one sentence, as GenerationOptions has them; a row of (B, 9).
struct Settings {
  float temperature, unkpen, min_len, beam, diversity_rate, diverse_beam_strength, top_k, top_p, ngram;
};

// Token and log-probability of a beam.
struct Drawn {
  int token;
  float score;
};

// Those of other searches are null.
struct State {
  int *steps, *complete;
  float* scores;
  int *idle, *overlap;
  unsigned char* ancestors;
  int* record;
  const Drawn* drawn;
  int groups;
};

// What is fed next: x (R, width) = scale * tokens[token] + positions[first + step]; positions may be null.
template <typename T>
struct Embedding {
  T* x;
  const T *tokens, *positions;
  float scale;
  int first, width;
  bool octets;

  template <int VEC>
  __device__ __forceinline__ void write(long row, int token, int step, int column) const {
    float y[VEC], position[VEC] = {};
    load<VEC>(tokens + static_cast<long>(token) * width + column, y);
    if (positions) load<VEC>(positions + static_cast<long>(first + step) * width + column, position);
#pragma unroll
    for (int i = 0; i < VEC; ++i) y[i] = y[i] * scale + position[i];
    store<VEC>(x + row * width + column, y);
  }

  // By all threads of a block, for `rows` rows from `first_row` on.
  __device__ __forceinline__ void write(long first_row, int rows, const int* token, int step) const {
    const int columns = octets ? width / kOctet : width;
    for (int i = threadIdx.x; i < rows * columns; i += kThreads) {
      const int k = i / columns, c = i % columns;
      if (octets) {
        write<kOctet>(first_row + k, token[k], step, c * kOctet);
      } else {
        write<1>(first_row + k, token[k], step, c);
      }
    }
  }
};

__device__ __forceinline__ float tempered(float logit, float temperature) {
  return temperature == 1.f ? logit : logit / temperature;
}

// Larger for larger x, never 0; that of -inf for what is no number.
__device__ __forceinline__ unsigned key_of(float x) {
  const unsigned bits = __float_as_uint(isnan(x) ? -INFINITY : x);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

__device__ __forceinline__ float value_of(unsigned key) {
  if (key == 0) return -INFINITY;
  return __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key);
}

struct Choice {
  unsigned key, id;  // key 0: none

  __device__ __forceinline__ bool before(const Choice& other) const {
    return key > other.key || (key == other.key && id < other.id);
  }
};

// Items that may be among the first; what `select` works with.
struct Selection {
  unsigned best_of_warp[kWarps], least;
  int count;
  Choice survivors[kMaxSurvivors];
};

// The `wanted` first of `count` items by the whole block, to `chosen` (wanted,) in order, keys of 0 left out.
//
// With b the wanted-th best of the warps' best keys, as many items are at least b; those that are survive. There are
// hardly more of them than wanted, so each counts how many come before it.
template <typename Id>
__device__ __forceinline__ void select(Choice* chosen, Selection& selection, const unsigned* keys, int count,
                                       int wanted, const Id& id) {
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  unsigned best = 0;
  for (int i = threadIdx.x; i < count; i += kThreads) best = max(best, keys[i]);
  best = __reduce_max_sync(0xffffffffu, best);
  if (lane == 0) selection.best_of_warp[warp] = best;
  if (threadIdx.x < wanted) chosen[threadIdx.x] = {0, 0xffffffffu};
  if (threadIdx.x == 0) selection.count = 0;
  __syncthreads();
  if (warp == 0) {
    const unsigned mine = selection.best_of_warp[lane];
    int before = 0;
#pragma unroll
    for (int other = 0; other < kWarps; ++other) {
      const unsigned theirs = selection.best_of_warp[other];
      before += theirs > mine || (theirs == mine && other < lane);
    }
    if (before == wanted - 1) selection.least = max(mine, 1u);
  }
  __syncthreads();
  const unsigned least = selection.least;
  for (int i = threadIdx.x; i < count; i += kThreads) {
    if (keys[i] < least) continue;
    const int place = atomicAdd(&selection.count, 1);
    if (place < kMaxSurvivors) selection.survivors[place] = {keys[i], id(i)};
  }
  __syncthreads();
  const int survivors = selection.count;
  if (survivors <= kMaxSurvivors) {
    for (int i = threadIdx.x; i < survivors; i += kThreads) {
      const Choice mine = selection.survivors[i];
      int before = 0;
#pragma unroll 8
      for (int other = 0; other < survivors; ++other) before += selection.survivors[other].before(mine);
      if (before < wanted) chosen[before] = mine;
    }
  } else {  // many equals
    for (int i = threadIdx.x; i < count; i += kThreads) {
      if (keys[i] < least) continue;
      const Choice mine{keys[i], id(i)};
      int before = 0;
      for (int other = 0; other < count && before < wanted; ++other) {
        if (keys[other] >= mine.key) before += Choice{keys[other], id(other)}.before(mine);
      }
      if (before < wanted) chosen[before] = mine;
    }
  }
  __syncthreads();
}

// ----------------------------------------------------------------------------------------------------------------
// CUDA kernels

// Eight lanes have TILES tiles; grid (tiles / (TILES * kTileThreads / 8), R). statistics (R, tiles), logits
// (R, columns), settings (B,).
template <typename T, int TILES>
__global__ void __launch_bounds__(kTileThreads)
    statistics_of_tiles(float2* statistics, const T* logits, const Settings* settings, int beam, const Types types) {
  constexpr int kAtOnce = kTileThreads / kTileLanes;
  const int lane = threadIdx.x % kTileLanes, tiles = types.columns / kTile, row = blockIdx.y;
  const int first_tile = blockIdx.x * TILES * kAtOnce + threadIdx.x / kTileLanes;
  const auto tile_of = [&](int n) { return min(first_tile + n * kAtOnce, tiles - 1); };
  launch_next();
  wait_for_previous();
  const float temperature = settings[row / beam].temperature;
  Packed<T, kOctet> given[TILES];
#pragma unroll
  for (int n = 0; n < TILES; ++n) {
    given[n] = request<kOctet>(logits + static_cast<long>(row) * types.columns + tile_of(n) * kTile + lane * kOctet);
  }
#pragma unroll
  for (int n = 0; n < TILES; ++n) {
    const int tile = tile_of(n), first = tile * kTile + lane * kOctet;
    const bool plain = tile > types.last_special / kTile && (tile + 1) * kTile <= types.count;  // alike in all lanes
    float x[kOctet], top = -INFINITY, sum = 0.f;
    given[n].widen(x);
    if (temperature != 1.f) {
#pragma unroll
      for (int i = 0; i < kOctet; ++i) x[i] = tempered(x[i], temperature);
    }
    if (!plain) {
#pragma unroll
      for (int i = 0; i < kOctet; ++i) x[i] = first + i < types.count ? x[i] : -INFINITY;
    }
#pragma unroll
    for (int i = 0; i < kOctet; ++i) top = fmaxf(top, x[i]);
#pragma unroll
    for (int apart = 1; apart < kTileLanes; apart *= 2) top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, apart));
    float best = top;
    if (__any_sync(0xffffffffu, !plain)) {
      float own = plain ? top : -INFINITY;
#pragma unroll
      for (int i = 0; i < kOctet; ++i) {
        if (!plain && types.ordinary(first + i)) own = fmaxf(own, x[i]);
      }
#pragma unroll
      for (int apart = 1; apart < kTileLanes; apart *= 2) own = fmaxf(own, __shfl_xor_sync(0xffffffffu, own, apart));
      best = own;
    }
    const float origin = top == -INFINITY ? 0.f : top;
#pragma unroll
    for (int i = 0; i < kOctet; ++i) sum += __expf(x[i] - origin);
#pragma unroll
    for (int apart = 1; apart < kTileLanes; apart *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, apart);
    if (lane == 0) statistics[static_cast<long>(row) * tiles + tile] = make_float2(origin + __logf(sum), best);
  }
}

// Sum of exp(x - max).
struct LogSum {
  float max = -INFINITY, sum = 0.f;

  __device__ __forceinline__ void add(float log_sum) {
    if (log_sum != -INFINITY) merge(log_sum, 1.f);
  }

  __device__ __forceinline__ void merge(float other_max, float other_sum) {
    if (other_sum == 0.f) return;
    const float top = fmaxf(max, other_max);
    sum = sum * __expf(max - top) + other_sum * __expf(other_max - top);
    max = top;
  }

  __device__ __forceinline__ void merge_warp() {
#pragma unroll
    for (int apart = kWarp / 2; apart > 0; apart /= 2) {
      const float other_max = __shfl_xor_sync(0xffffffffu, max, apart);
      merge(other_max, __shfl_xor_sync(0xffffffffu, sum, apart));
    }
  }
};

// A block a sentence: grid (B,). logits (R, columns), statistics (R, tiles), settings, limits (B,), forced (B, steps),
// state as in ops/beam_step.py. Dynamic shared memory: a key for each tile of each beam; for each element of the chosen
// tiles, in the place of the former where one selection is all.
template <typename L, typename T, Search SEARCH>
__global__ void __launch_bounds__(kThreads)
    step_of_sentence(const State state, const L* logits, const float2* statistics, const Settings* settings,
                     const int* limits, const int* forced, int beams, int steps, const Types types,
                     const Embedding<T> embedding) {
  constexpr bool kTwice = SEARCH == Search::kBest || SEARCH == Search::kSiblings;  // candidates are twice the beams
  extern __shared__ unsigned keys[];
  __shared__ Selection selection;
  __shared__ Choice tile_choice[kMaxCandidates], choice[kMaxCandidates];
  __shared__ LogSum partial[kWarps];
  __shared__ float log_sum[kMaxBeam], score[kMaxBeam];
  __shared__ int parent[kMaxBeam], token[kMaxBeam], going_on;
  const int sentence = blockIdx.x, batch = gridDim.x, tiles = types.columns / kTile;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const long first_row = static_cast<long>(sentence) * beams;
  logits += first_row * types.columns;
  statistics += first_row * tiles;
  settings += sentence;
  launch_next();
  wait_for_previous();
  const int step = state.steps[sentence], old_complete = state.complete[sentence], limit = limits[sentence];
  const float temperature = settings->temperature, unkpen = settings->unkpen;
  const int must = forced[sentence * steps + step], beam = static_cast<int>(settings->beam);
  // Warps w, w + beams, ... have a row, whose statistics are under way before it is known that they are needed.
  const int own_row = warp % beams, sharing = (kWarps - own_row + beams - 1) / beams;
  const int first_tile = warp / beams * kWarp + lane;
  const auto tile_at = [&](int n) { return first_tile + n * sharing * kWarp; };
  float2 asked[kAsked];
  float own_score = 0.f;
  if constexpr (SEARCH != Search::kDrawn) {
#pragma unroll
    for (int n = 0; n < kAsked; ++n) {
      asked[n] = tile_at(n) < tiles ? statistics[own_row * tiles + tile_at(n)] : make_float2(-INFINITY, 0.f);
    }
    if (threadIdx.x < beams) own_score = state.scores[first_row + threadIdx.x];
  }
  if (old_complete >= beams) return;
  const int rows = step == 0 ? 1 : beam;  // all beams are still one
  const int candidates = kTwice ? 2 * beam : beam;

  if constexpr (SEARCH != Search::kDrawn) {
    unsigned* const elements = SEARCH == Search::kBest ? keys : keys + beams * tiles;
    const int groups = SEARCH == Search::kGroups ? state.groups : 1;
    const auto score_of = [&](float x, int k, int type) {
      return x - log_sum[k] - (type == types.unk ? unkpen : 0.f) + score[k];
    };
    const auto logit = [&](int k, int type) {
      return tempered(to_float(logits[static_cast<long>(k) * types.columns + type]), temperature);
    };
    // The keys of a group's beams lie together.
    const auto keys_of = [&](int k) {
      return keys + (groups == 1 ? k : k % groups * (beam / groups) + k / groups) * tiles;
    };

    if (own_row < rows) {
      unsigned* const own = keys_of(own_row);
      LogSum mine;
      const auto keep = [&](int t, const float2& tile) {
        own[t] = __float_as_uint(tile.y);
        mine.add(tile.x);
      };
#pragma unroll
      for (int n = 0; n < kAsked; ++n) {
        if (tile_at(n) < tiles) keep(tile_at(n), asked[n]);
      }
      for (int t = tile_at(kAsked); t < tiles; t += sharing * kWarp) keep(t, statistics[own_row * tiles + t]);
      mine.merge_warp();
      if (lane == 0) partial[warp] = mine;
    }
    if (threadIdx.x < rows) score[threadIdx.x] = own_score;
    __syncthreads();
    if (warp < rows) {
      LogSum all;
      if (warp + lane * beams < kWarps) all = partial[warp + lane * beams];
      all.merge_warp();
      if (lane == 0) log_sum[warp] = all.max + logf(all.sum);
    }
    __syncthreads();
    if (must == types.pad) {
      for (int i = threadIdx.x; i < rows * tiles; i += kThreads) {
        const int at = i / tiles, each = beam / groups, k = groups == 1 ? at : at % each * groups + at / each;
        keys[i] = key_of(score_of(__uint_as_float(keys[i]), k, types.pad));
      }
      __syncthreads();
    }

    // The `wanted` best, to `chosen`, of beams first, first + groups, ..., `count` in all, whose tokens lose what
    // `lost` says; keys of the tiles heed that already.
    const auto best = [&](Choice* chosen, int wanted, int first, int count, const auto& lost) {
      const auto beam_of = [&](int i) { return first + i * groups; };
      if (must != types.pad) {  // one way on for each beam
        if (threadIdx.x < count) {
          const int k = beam_of(threadIdx.x);
          elements[threadIdx.x] = key_of(score_of(logit(k, must), k, must) - lost(must));
        }
        __syncthreads();
        select(chosen, selection, elements, count, wanted,
               [&](int i) { return static_cast<unsigned>(beam_of(i) * types.columns + must); });
        return;
      }
      select(tile_choice, selection, keys_of(first), count * tiles, wanted, [&](int i) {
        return static_cast<unsigned>(groups == 1 ? first * tiles + i : beam_of(i / tiles) * tiles + i % tiles);
      });
      const bool may_end = step >= settings->min_len;
      const auto id = [&](int i) {
        const int special = i - wanted * kTile;
        return special < 0 ? tile_choice[i / kTile].id * kTile + i % kTile
                           : static_cast<unsigned>(beam_of(special / 2) * types.columns +
                                                   (special % 2 ? types.unk : types.eos));
      };
      const int items = wanted * kTile + 2 * count;
      for (int i = threadIdx.x; i < items; i += kThreads) {
        const bool special = i >= wanted * kTile;
        unsigned key = 0;
        if (special || tile_choice[i / kTile].key != 0) {
          const unsigned at = id(i);
          const int k = at / types.columns, type = at % types.columns;
          if (special ? type != types.eos || may_end : types.ordinary(type)) {
            key = key_of(score_of(logit(k, type), k, type) - lost(type));
          }
        }
        elements[i] = key;
      }
      __syncthreads();
      select(chosen, selection, elements, items, wanted, id);
    };
    const auto nothing = [](int) { return 0.f; };

    if constexpr (SEARCH == Search::kBest) {
      best(choice, candidates, 0, rows, nothing);
    } else if constexpr (SEARCH == Search::kSiblings) {
      __shared__ Choice sibling[kMaxBeam * kMaxCandidates];
      const float rate = settings->diversity_rate;
      if (step == 0) {
        best(choice, candidates, 0, 1, nothing);
      } else {
        for (int k = 0; k < beam; ++k) {
          best(choice, candidates, k, 1, nothing);
          if (threadIdx.x < candidates) {
            Choice mine = choice[threadIdx.x];
            if (mine.key) mine.key = key_of(value_of(mine.key) - rate * (threadIdx.x + 1));
            sibling[k * candidates + threadIdx.x] = mine;
          }
          __syncthreads();
        }
        for (int i = threadIdx.x; i < beam * candidates; i += kThreads) elements[i] = sibling[i].key;
        __syncthreads();
        select(choice, selection, elements, beam * candidates, candidates, [&](int i) { return sibling[i].id; });
      }
    } else {
      __shared__ Choice mine[kMaxBeam];
      __shared__ int used[kMaxBeam];       // at place c * groups + g, pad for none
      __shared__ float weight[kMaxBeam];  // of earlier groups' uses for the present one
      const int each = beam / groups, count = step == 0 ? 1 : each;
      const float strength = settings->diverse_beam_strength;
      int* const overlap = state.overlap + sentence * groups * groups;
      for (int group = 0; group < groups; ++group) {
        const int first = step == 0 ? 0 : group;
        const auto lost = [&](int type) {
          float sum = 0.f;
          for (int place = 0; place < beam; ++place) {
            if (place % groups < group && used[place] == type) sum += weight[place % groups];
          }
          return strength * sum;
        };
        if (threadIdx.x < group) weight[threadIdx.x] = 1.f + overlap[group * groups + threadIdx.x];
        __syncthreads();
        if (must == types.pad) {  // the tiles that have lost something; several of these may be one
          for (int i = warp; i < count * beam; i += kWarps) {
            const int place = i / count, k = first + i % count * groups;
            if (place % groups >= group || used[place] == types.pad) continue;
            const int tile = used[place] / kTile;
            float top = -INFINITY;
            for (int type = tile * kTile + lane; type < (tile + 1) * kTile; type += kWarp) {
              if (types.ordinary(type)) top = fmaxf(top, score_of(logit(k, type), k, type) - lost(type));
            }
            top = warp_reduce(top, Max{});
            if (lane == 0) keys_of(k)[tile] = key_of(top);
          }
          __syncthreads();
        }
        best(mine, each, first, count, lost);
        if (threadIdx.x < each) {
          const Choice found = mine[threadIdx.x];
          const int place = threadIdx.x * groups + group;
          choice[place] = found;
          used[place] = value_of(found.key) == -INFINITY ? types.pad : static_cast<int>(found.id % types.columns);
        }
        __syncthreads();
      }
      for (int i = threadIdx.x; i < groups * groups; i += kThreads) {
        int shared = 0;
        for (int c = 0; c < each; ++c) shared += used[c * groups + i / groups] == used[c * groups + i % groups];
        overlap[i] += shared;
      }
    }
  }

  if constexpr (SEARCH == Search::kDrawn) __syncthreads();  // all have read what is written now
  if (warp == 0) {  // lane c has candidate c
    const bool inside = lane < candidates;
    const int source = must == types.eos && step < limit || !inside ? 0 : lane;  // the prefix itself ends here
    int type, from;
    float total;
    if constexpr (SEARCH == Search::kDrawn) {
      const Drawn mine = state.drawn[first_row + source];
      total = mine.score + state.scores[first_row + source];
      type = mine.token;
      from = step == 0 ? 0 : source;
    } else {
      const Choice mine = choice[source];
      total = value_of(mine.key);
      type = mine.key ? static_cast<int>(mine.id % types.columns) : must == types.pad ? types.eos : must;
      from = mine.key ? static_cast<int>(mine.id / types.columns) : 0;
    }
    const bool was_idle = !kTwice && state.idle[sentence] >> lane & 1;
    const bool says_eos = type == types.eos && total != -INFINITY, stops = says_eos || was_idle;
    const unsigned ended = __ballot_sync(0xffffffffu, inside && says_eos && !was_idle);
    const unsigned stopping = __ballot_sync(0xffffffffu, inside && stops);
    const unsigned going = __ballot_sync(0xffffffffu, inside && !stops), before = (1u << lane) - 1;
    const int place = stops ? __popc(going) + __popc(stopping & before) : __popc(going & before);
    int* const record = state.record + (static_cast<long>(step) * batch * beams + first_row) * 6;
    if (lane < beam) {
      record[lane * 6] = ended >> lane & 1;
      record[lane * 6 + 1] = __float_as_int(total);
      record[lane * 6 + 2] = from;
    } else if (lane < beams) {
      record[lane * 6] = 0;
    }
    if (inside && place < beam) {
      record[place * 6 + 3] = token[place] = type;
      record[place * 6 + 4] = parent[place] = from;
      record[place * 6 + 5] = __float_as_int(total);
      state.scores[first_row + place] = total;
    }
    const int found = old_complete + __popc(ended & ((1u << beam) - 1));
    const int complete = step >= limit || found >= beam ? beams : found;
    if (lane == 0) {
      state.complete[sentence] = complete;
      going_on = complete < beams;
      if (going_on) state.steps[sentence] = step + 1;
      if (!kTwice) state.idle[sentence] = ((1u << beam) - 1) & ~((1u << __popc(going)) - 1);
    }
  }
  __syncthreads();
  if (!going_on) return;
  embedding.write(first_row, beam, token, step + 1);
  if (beams == 1) return;  // which is its own ancestor at all steps, 0, as it was before the first
  unsigned char* const old = reinterpret_cast<unsigned char*>(keys);  // (beam, step)
  unsigned char* const ancestors = state.ancestors + first_row * steps;
  for (int k = warp; k < beam; k += kWarps) {
    for (int p = lane; p < step; p += kWarp) old[k * step + p] = ancestors[k * steps + p];
  }
  __syncthreads();
  for (int k = warp; k < beam; k += kWarps) {
    for (int p = lane; p < step; p += kWarp) ancestors[k * steps + p] = old[parent[k] * step + p];
    if (lane == 0) ancestors[k * steps + step] = parent[k];
  }
}

// ----------------------------------------------------------------------------------------------------------------
// kernel launchers

// Two tiles for the lanes of one where there are many (over and over on an H200, 512 rows of 28 672 types: 11.8 us
// instead of 13.8, but 32 rows 2.4 instead of 2.1).
template <typename T>
void token_statistics(float2* statistics, const T* logits, const Settings* settings, int rows, int beam,
                      const Types& types, cudaStream_t stream) {
  const int tiles = types.columns / kTile;
  const auto launch = [&](auto constant) {
    constexpr int TILES = decltype(constant)::value;
    const dim3 grid(ceil_div(tiles, TILES * kTileThreads / kTileLanes), rows);
    launch_early("beam_step::statistics_of_tiles", statistics_of_tiles<T, TILES>, grid, kTileThreads, stream,
                 statistics, logits, settings, beam, types);
  };
  if (ceil_div(tiles, kTileThreads / kTileLanes) * rows > 512) return launch(std::integral_constant<int, 2>{});
  launch(std::integral_constant<int, 1>{});
}

// `steps` is the width of `forced` and of the ancestors.
template <typename L, typename T>
void step(Search search, const State& state, const L* logits, const float2* statistics, const Settings* settings,
          const int* limits, const int* forced, int batch, int beam, int steps, const Types& types,
          const Embedding<T>& embedding, cudaStream_t stream) {
  const int tiles = search == Search::kDrawn ? 0 : beam * (types.columns / kTile);
  const int elements = 2 * beam * (kTile + 1), history = ceil_div(beam * steps, sizeof(unsigned));
  const auto launch = [&](auto constant) {
    constexpr Search SEARCH = decltype(constant)::value;
    const int items = SEARCH == Search::kBest ? std::max(tiles, elements) : tiles + elements;
    launch_early("beam_step::step_of_sentence", step_of_sentence<L, T, SEARCH>, batch, kThreads,
                 std::max(items, history) * static_cast<int>(sizeof(unsigned)), stream, state, logits, statistics,
                 settings, limits, forced, beam, steps, types, embedding);
  };
  switch (search) {
    case Search::kBest: return launch(std::integral_constant<Search, Search::kBest>{});
    case Search::kSiblings: return launch(std::integral_constant<Search, Search::kSiblings>{});
    case Search::kGroups: return launch(std::integral_constant<Search, Search::kGroups>{});
    case Search::kDrawn: return launch(std::integral_constant<Search, Search::kDrawn>{});
  }
}

}  // namespace beam_step
}  // namespace lightseq
