// What all attention kernels share: the problem, a sentence's rows, the dropout mask.
//
// Letters: B sentences, H heads, D head size, Nq and Nk tokens of queries and of keys. lse is (H, Nq): the log of the sum of
// exp(scaled scores) that a query sees, +inf where it sees no key, which makes its every probability exp(s - lse) = 0.
#pragma once

#include <cstdint>

#include "../common/launch.cuh"
#include "../common/philox.cuh"
#include "../common/reduce.cuh"
#include "../common/vector.cuh"

namespace lightseq {
namespace attention {

// A tensor (N, H, D) that may be a slice of a fused projection: contiguous in D, strides in elements.
template <typename T>
struct Heads {
  T* data;
  long token_stride, head_stride;

  __device__ __forceinline__ T* row(long token, int head) const {
    return data + token * token_stride + head * head_stride;
  }
};

struct Problem {
  const int *cu_seqlens_q, *cu_seqlens_k;  // (B + 1,)
  int sentences, heads, head_dim;
  long tokens_q, tokens_k;
  int max_len_q, max_len_k;  // upper bounds, known on the host
  bool causal;
  double scale;
  Dropout dropout;
};

// Rows of one sentence. The blocks past the last one get the rows behind it, which are not `real`: they belong to no
// sentence, and zeros are written there.
struct Span {
  long q_begin, k_begin;
  int q_len, k_len;
  bool causal, real;

  __device__ __forceinline__ Span(const Problem& p, int sentence) : causal(p.causal), real(sentence < p.sentences) {
    q_begin = p.cu_seqlens_q[sentence];
    k_begin = p.cu_seqlens_k[sentence];
    q_len = static_cast<int>((real ? p.cu_seqlens_q[sentence + 1] : p.tokens_q) - q_begin);
    k_len = static_cast<int>((real ? p.cu_seqlens_k[sentence + 1] : p.tokens_k) - k_begin);
  }

  // How many keys, from the first on, a query sees.
  __device__ __forceinline__ int visible(int query) const {
    return causal ? max(0, min(k_len, query + 1 + k_len - q_len)) : k_len;
  }
};

// Which probabilities dropout keeps: a function of seed, sentence, head, query i and key j, whatever the tiling. One
// Philox draw serves the eight (i, j), (i, j + 1), (i + 8, j), (i + 8, j + 1) and the same at j + 8, where i % 16 < 8, j % 16 < 8
// and j is even: what one lane holds of two neighbouring accumulators. Its numbers are used in this order, with
//   key      seed
//   counter  (i / 16 * 8 + i % 8, j / 16 * 4 + j % 8 / 2, head, 1 + sentence)
class ProbabilityMask {
 public:
  __device__ __forceinline__ ProbabilityMask(const Dropout& dropout, int sentence, int head)
      : key_(dropout.threshold ? static_cast<uint64_t>(*dropout.seed) : 0),
        threshold_(dropout.threshold),
        head_(head),
        sentence_(sentence) {}

  // Bit e: element e of this lane's eight in the 16 x 16 block (row_block, column_block) of scores is kept.
  __device__ __forceinline__ uint32_t kept(int row_block, int column_block) const {
    const int lane = threadIdx.x % kWarp;
    return threshold_ ? draw(row_block * 8 + lane / 4, column_block * 4 + lane % 4) : 0xffu;
  }

  __device__ __forceinline__ bool kept_one(int i, int j) const {
    if (threshold_ == 0) return true;
    return draw(i / 16 * 8 + i % 8, j / 16 * 4 + j % 8 / 2) >> (j / 8 % 2 * 4 + i / 8 % 2 * 2 + j % 2) & 1;
  }

 private:
  __device__ __forceinline__ uint32_t draw(uint32_t x, uint32_t y) const {
    const uint4 numbers = philox(key_, make_uint4(x, y, head_, 1 + sentence_));
    const uint32_t words[4] = {numbers.x, numbers.y, numbers.z, numbers.w};
    uint32_t bits = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      bits |= static_cast<uint32_t>((words[i] & 0xffff) >= threshold_) << (2 * i);
      bits |= static_cast<uint32_t>(words[i] >> 16 >= threshold_) << (2 * i + 1);
    }
    return bits;
  }

  uint64_t key_;
  unsigned threshold_, head_, sentence_;
};

// Zeros in rows first, first + 1, ... of one head; for rows that belong to no sentence.
template <typename T>
__device__ void clear_rows(const Heads<T>& x, long first, long count, int head, int head_dim) {
  for (long i = threadIdx.x; i < count * head_dim; i += blockDim.x) {
    x.row(first + i / head_dim, head)[i % head_dim] = from_float<T>(0.f);
  }
}

}  // namespace attention
}  // namespace lightseq
