// No n-gram twice (lightseq_fairseq/ops/block_ngrams.py has the rule and the shapes): logits of what would be one
// become -inf, and the maxima of their tiles are taken anew.
#pragma once

#include "beam_step.cuh"

namespace lightseq {
namespace block_ngrams {

constexpr int kThreads = 128, kWarps = kThreads / kWarp;

// ----------------------------------------------------------------------------------------------------------------
// CUDA kernels

// A block a beam: grid (K, B). logits (R, columns), statistics (R, tiles), settings, now, complete (B,), forced (B,
// steps), ancestors (B, K, steps), record (steps, B, K, 6). Dynamic shared memory: tokens said, and those forbidden.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    block_of_beam(T* logits, float2* statistics, const beam_step::Settings* settings, const int* forced, const int* now,
                  const int* complete, const unsigned char* ancestors, const int* record, int steps,
                  const beam_step::Types types) {
  extern __shared__ int said[];
  __shared__ int count;
  int* const banned = said + steps;
  const int k = blockIdx.x, beams = gridDim.x, sentence = blockIdx.y, batch = gridDim.y;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, tiles = types.columns / beam_step::kTile;
  const long row = static_cast<long>(sentence) * beams + k;
  logits += row * types.columns;
  statistics += row * tiles;
  ancestors += row * steps;
  settings += sentence;
  launch_next();
  wait_for_previous();
  const int step = now[sentence], size = static_cast<int>(settings->ngram);
  const bool none = complete[sentence] >= beams || k >= static_cast<int>(settings->beam);
  if (none || size == 0 || step < size || forced[sentence * steps + step] != types.pad) return;
  for (int i = threadIdx.x; i < step; i += kThreads) {
    const int from = i + 1 < step ? ancestors[i + 1] : k;
    said[i] = record[((static_cast<long>(i) * batch + sentence) * beams + from) * 6 + 3];
  }
  if (threadIdx.x == 0) count = 0;
  __syncthreads();
  const int* const last = said + step - size + 1;
  for (int i = threadIdx.x; i + size <= step; i += kThreads) {
    bool same = true;
    for (int j = 0; j + 1 < size && same; ++j) same = said[i + j] == last[j];
    if (!same) continue;
    const int type = said[i + size - 1];
    logits[type] = from_float<T>(-INFINITY);
    banned[atomicAdd(&count, 1)] = type;
  }
  __syncthreads();
  for (int i = warp; i < count; i += kWarps) {  // several may be of one tile, and write the same
    const int tile = banned[i] / beam_step::kTile;
    float top = -INFINITY;
    for (int type = tile * beam_step::kTile + lane; type < (tile + 1) * beam_step::kTile; type += kWarp) {
      if (types.ordinary(type)) top = fmaxf(top, beam_step::tempered(to_float(logits[type]), settings->temperature));
    }
    top = warp_reduce(top, Max{});
    if (lane == 0) statistics[tile].y = top;
  }
}

// ----------------------------------------------------------------------------------------------------------------
// kernel launchers

template <typename T>
void block(T* logits, float2* statistics, const beam_step::Settings* settings, const int* forced, const int* now,
           const int* complete, const unsigned char* ancestors, const int* record, int batch, int beam, int steps,
           const beam_step::Types& types, cudaStream_t stream) {
  launch_early("block_ngrams::block_of_beam", block_of_beam<T>, dim3(beam, batch), kThreads,
               2 * steps * static_cast<int>(sizeof(int)), stream, logits, statistics, settings, forced, now, complete,
               ancestors, record, steps, types);
}

}  // namespace block_ngrams
}  // namespace lightseq
