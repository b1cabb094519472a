// What all attention kernels share: the problem, a sentence's rows, the dropout mask.
//
// Letters: B sentences, H heads, D head size, Nq and Nk tokens of queries and of keys. lse is (H, Nq): the log of the
// sum of exp(scaled scores) that a query sees, +inf where it sees no key, which makes its every probability exp(s -
// lse) = 0.
#pragma once

#include <cstdint>

#include "../common/early_launch.cuh"
#include "../common/philox.cuh"
#include "../common/reduce.cuh"
#include "../common/vector.cuh"

namespace lightseq {
namespace attention {

// A tensor (N, H, D) that may be a slice of a fused projection: contiguous in D, strides in elements.
template <typename T>
struct Heads {
  T* data;
  unsigned token_stride, head_stride;

  // In unsigned numbers, whose products of 64 bits are one instruction.
  __device__ __forceinline__ T* row(unsigned token, unsigned head) const {
    return data + static_cast<uint64_t>(token) * token_stride + static_cast<uint64_t>(head) * head_stride;
  }
};

struct Problem {
  const int *cu_seqlens_q, *cu_seqlens_k;  // (B + 1,)
  int sentences, heads, head_dim, tokens_q, tokens_k;
  int max_len_q, max_len_k;  // upper bounds, known on the host
  bool causal;
  double scale;
  Dropout dropout;
};

// Rows of one sentence. The blocks past the last one get the rows behind it, which are not `real`: they belong to no
// sentence, and zeros are written there.
struct Span {
  int q_begin, k_begin, q_len, k_len;
  bool causal, real;

  __device__ __forceinline__ Span(const Problem& p, int sentence) : causal(p.causal), real(sentence < p.sentences) {
    q_begin = p.cu_seqlens_q[sentence];
    k_begin = p.cu_seqlens_k[sentence];
    q_len = (real ? p.cu_seqlens_q[sentence + 1] : p.tokens_q) - q_begin;
    k_len = (real ? p.cu_seqlens_k[sentence + 1] : p.tokens_k) - k_begin;
  }

  // Where the sentence begins in one head's row of an (H, Nq) tensor.
  __device__ __forceinline__ uint64_t sums_begin(const Problem& p, unsigned head) const {
    return static_cast<uint64_t>(head) * static_cast<unsigned>(p.tokens_q) + static_cast<unsigned>(q_begin);
  }

  // How many keys, from the first on, a query sees.
  __device__ __forceinline__ int visible(int query) const {
    return causal ? max(0, min(k_len, query + 1 + k_len - q_len)) : k_len;
  }
};

// Eight random numbers for eight probabilities, and the bound below which dropout drops them.
struct Draw {
  uint32_t words[4], bound;

  // `element` is a constant wherever this is unrolled; compared where it lies, in the upper half of a word.
  __device__ __forceinline__ bool keeps(int element) const {
    const uint32_t word = words[element / 2];
    return (element % 2 ? word : word << 16) >= bound;
  }

  // For a query and a key that share this draw.
  __device__ __forceinline__ bool keeps(int query, int key) const {
    const uint32_t upper = key & 8 ? words[2] : words[0], lower = key & 8 ? words[3] : words[1];
    const uint32_t word = query & 8 ? lower : upper;
    return (key & 1 ? word : word << 16) >= bound;
  }
};

// Which probabilities dropout keeps: a function of seed, sentence, head, query i and key j, whatever the tiling. One
// Philox draw serves the eight (i, j), (i, j + 1), (i + 8, j), (i + 8, j + 1) and the same at j + 8, where i % 16 < 8,
// j % 16 < 8 and j is even: what one lane holds of two neighbouring accumulators. Its numbers are used in this order,
// with
//   key      seed
//   counter  (i / 16 * 8 + i % 8, j / 16 * 4 + j % 8 / 2, head, 1 + sentence)
class ProbabilityMask {
 public:
  __device__ __forceinline__ ProbabilityMask(const Dropout& dropout, int sentence, int head)
      : key_(dropout.bound ? static_cast<uint64_t>(*dropout.seed) : 0),
        bound_(dropout.bound),
        head_(head),
        sentence_(sentence) {}

  __device__ __forceinline__ Draw draw(int query, int key) const {
    if (bound_ == 0) return {};
    const uint32_t x = query / 16 * 8 + query % 8, y = key / 16 * 4 + key % 8 / 2;
    const uint4 numbers = philox(key_, make_uint4(x, y, head_, 1 + sentence_));
    return {{numbers.x, numbers.y, numbers.z, numbers.w}, bound_};
  }

  // This lane's eight elements of a 16 x 16 block of scores, given the block's numbers.
  __device__ __forceinline__ Draw draw_block(int row_block, int column_block) const {
    const int lane = threadIdx.x % kWarp;
    return draw(row_block * 16 + lane / 4, column_block * 16 + lane % 4 * 2);
  }

 private:
  uint64_t key_;
  unsigned bound_, head_, sentence_;
};

// Zeros in rows first, first + 1, ... of one head; for rows that belong to no sentence.
template <typename T>
__device__ void clear_rows(const Heads<T>& x, int first, int count, int head, int head_dim) {
#pragma unroll 1
  for (int row = threadIdx.x / kWarp; row < count; row += blockDim.x / kWarp) {
#pragma unroll 1
    for (int d = threadIdx.x % kWarp; d < head_dim; d += kWarp) x.row(first + row, head)[d] = from_float<T>(0.f);
  }
}

// Whether a block has queries, rows from `first` on of its sentence. Of rows that belong to no sentence the first block
// clears those of x.
template <typename T>
__device__ __forceinline__ bool has_queries(const Heads<T>& x, const Span& span, int first, int head, int head_dim) {
  if (!span.real) {
    if (first == 0) clear_rows(x, span.q_begin, span.q_len, head, head_dim);
    return false;
  }
  return first < span.q_len;
}

}  // namespace attention
}  // namespace lightseq
