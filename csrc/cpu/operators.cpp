// lightseq_cpu::encode, decoder_step, quantize_rows, log_softmax_ and best_continuations: generation on the CPU. Schemas
// stand at the end; what they compute is said in lightseq_fairseq/ops/cpu.py, and lightseq_fairseq/layers/compiled.py makes their
// arguments.
//
// Only LibTorch's stable ABI is used, so one build serves every torch from 2.10 on and every Python.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

namespace lightseq::cpu {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int PANEL = 32;  // columns of a weight that lie together: pack_linear in lightseq_fairseq/ops/cpu.py

// A linear map: panels (out / PANEL, in, PANEL), zero where out ends before the last panel, and bias, padded likewise.
struct Linear {
  const float* panels = nullptr;
  const float* bias = nullptr;
  int in = 0, out = 0;
};

struct Norm {
  const float* weight = nullptr;
  const float* bias = nullptr;
  float eps = 0;
};

struct Layer {
  Norm self_norm;
  Linear qkv, out;
  Norm cross_norm;
  Linear cross_q, cross_out;
  Norm final_norm;
  Linear fc1, fc2;
};

struct Encoder {
  int columns, inner, heads;
  bool pre_norm;
  std::vector<Layer> layers;
  Norm final_norm;
};

struct Decoder {
  int columns, inner, heads, num_layers;
  bool pre_norm;
  const float* embeddings;  // (V, C), scaled
  const float* position;    // (C,) of this step, or null
  Norm embedding_norm, final_norm;
  std::vector<Layer> layers;
  Linear output;
};

// One step of B live sentences with K beams, of which `fed` are fed: all, or 1 at the first step.
struct Step {
  int step, fed, beam, capacity, num_layers, heads, head_dim;
  const int64_t* tokens;  // (B, fed)
  const int64_t* live;    // (B,) rows of the live sentences in cache, paths, starts and lengths
  float* cache;           // (B0, layers, H, capacity, K, 2, D); what one head reads lies together
  int32_t* paths;         // (B0, capacity, K)
  const float* sources;   // (layers, H, N, 2, D): keys and values of the source tokens, or null
  const int32_t* starts;   // (B0,) the first source token of each sentence
  const int32_t* lengths;  // (B0,) and how many it has
  int64_t num_sources;     // N
  float* logits;           // (B, fed, V)
  float* attention;        // (B, fed, S) zeros, or null
  int64_t attention_width;

  float* slots(int64_t b, int layer, int head) const {
    return cache + ((live[b] * num_layers + layer) * heads + head) * capacity * beam * 2 * head_dim;
  }
  int32_t* path(int64_t b) const { return paths + live[b] * capacity * beam; }
  const float* source(int64_t b, int layer, int head) const {
    return sources + ((int64_t{layer} * heads + head) * num_sources + starts[live[b]]) * 2 * head_dim;
  }
  int source_length(int64_t b) const { return sources ? lengths[live[b]] : 0; }

  // Beam k of each sentence continues beam parents[b, k]; the newest slot of a beam is its own.
  void follow(int64_t b, const int64_t* parents) const {
    int32_t* const table = path(b);
    std::vector<int32_t> former(beam);
    for (int t = 0; parents && t < step; ++t) {
      std::copy_n(table + t * beam, beam, former.begin());
      for (int k = 0; k < beam; ++k) table[t * beam + k] = former[parents[b * beam + k]];
    }
    for (int k = 0; k < beam; ++k) table[step * beam + k] = k < fed ? k : 0;
  }
};

// Rows of a matrix, `stride` floats apart.
struct Rows {
  float* data = nullptr;
  int stride = 0;

  float* at(int row) const { return data + static_cast<int64_t>(row) * stride; }
  Rows from(int row, int column) const { return {at(row) + column, stride}; }
};

// Memory of one thread's call, kept for its next.
class Scratch {
 public:
  // Rows lie an odd multiple of 512 bytes apart, so that a dozen of them do not compete for the same sets of a cache.
  Rows take(int rows, int columns) {
    const int stride = (columns + 127) / 256 * 256 + 128;
    auto& pieces = kept();
    if (next_ == pieces.size()) pieces.emplace_back();
    auto& piece = pieces[next_++];
    const size_t count = static_cast<size_t>(rows) * stride;
    if (piece.size() < count) piece.resize(count);
    return {piece.data(), stride};
  }

 private:
  static std::vector<std::vector<float>>& kept() {
    static thread_local std::vector<std::vector<float>> pieces;
    return pieces;
  }
  size_t next_ = 0;
};

}  // namespace lightseq::cpu

#define LIGHTSEQ_ISA portable
#define LIGHTSEQ_LANES 4
#include "loops.h"
#undef LIGHTSEQ_ISA
#undef LIGHTSEQ_LANES

#if defined(__x86_64__)
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
#define LIGHTSEQ_ISA avx2
#define LIGHTSEQ_LANES 8
#include "loops.h"
#undef LIGHTSEQ_ISA
#undef LIGHTSEQ_LANES
#ifdef __clang__
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx512f,avx512dq,avx512vl,avx512bw,fma"))), apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512dq,avx512vl,avx512bw,fma")
#endif
#define LIGHTSEQ_ISA avx512
#define LIGHTSEQ_LANES 16
#include "loops.h"
#undef LIGHTSEQ_ISA
#undef LIGHTSEQ_LANES
#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif

namespace lightseq::cpu {
namespace {

// Floats in a register of the widest instruction set that this machine has, at most `lanes` if that is not 0.
int64_t widest(int64_t lanes) {
  int64_t most = 4;
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) most = 8;
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512bw")) {
    most = 16;
  }
#endif
  return lanes == 0 ? most : std::min(lanes, most);
}

#if defined(__x86_64__)
#define LIGHTSEQ_DISPATCH(lanes, call)             \
  do {                                             \
    switch (widest(lanes)) {                       \
      case 16: avx512::call; break;                \
      case 8: avx2::call; break;                   \
      default: portable::call;                     \
    }                                              \
  } while (false)
#else
#define LIGHTSEQ_DISPATCH(lanes, call) portable::call
#endif

constexpr int MOST_ROWS = 128;  // at once, so that activations stay in the second cache

// How many things of `size` numbers are worth waking a thread for, when each number costs next to nothing.
int64_t share(int64_t size) { return std::max<int64_t>(1, (1 << 18) / std::max<int64_t>(1, size)); }

template <typename T>
T* data(const Tensor& tensor) {
  return reinterpret_cast<T*>(tensor.data_ptr());
}

// Hands out the pieces of the packed weights, in the order in which compiled.py has laid them.
class Pieces {
 public:
  Pieces(const float* packed, float eps) : next_(packed), eps_(eps) {}
  Norm norm(int columns) {
    const float* const weight = take(columns);
    return {weight, take(columns), eps_};
  }
  Linear linear(int in, int out) {
    const int padded = (out + PANEL - 1) / PANEL * PANEL;
    const float* const panels = take(int64_t{in} * padded);
    return {panels, take(padded), in, out};
  }
  Layer layer(int columns, int inner, bool has_cross) {
    Layer layer;
    layer.self_norm = norm(columns);
    layer.qkv = linear(columns, 3 * columns);
    layer.out = linear(columns, columns);
    if (has_cross) {
      layer.cross_norm = norm(columns);
      layer.cross_q = linear(columns, columns);
      layer.cross_out = linear(columns, columns);
    }
    layer.final_norm = norm(columns);
    layer.fc1 = linear(columns, inner);
    layer.fc2 = linear(inner, columns);
    return layer;
  }
  void expect_end_of(const Tensor& packed) const {
    STD_TORCH_CHECK(next_ == data<float>(packed) + packed.numel(), "lightseq_cpu: the weights have another shape");
  }

 private:
  const float* take(int64_t count) { return std::exchange(next_, next_ + count); }
  const float* next_;
  float eps_;
};

// See the schema below and IncrementalDecoder in lightseq_fairseq/layers/incremental.py, whose step this is.
Tensor decoder_step(Tensor packed, Tensor shape, double eps, Tensor embeddings, std::optional<Tensor> position,
                    Tensor tokens, std::optional<Tensor> parents, Tensor live, Tensor cache, Tensor paths,
                    std::optional<Tensor> sources, std::optional<Tensor> starts, std::optional<Tensor> lengths,
                    std::optional<Tensor> attention, int64_t step_index, int64_t lanes) {
  const int64_t* const sizes = data<int64_t>(shape);
  const int columns = static_cast<int>(embeddings.size(1)), types = static_cast<int>(sizes[3]);
  const bool has_embedding_norm = sizes[5], has_final_norm = sizes[6], has_cross = sizes[7];
  Decoder model{columns, static_cast<int>(sizes[0]), static_cast<int>(sizes[1]), static_cast<int>(sizes[2]),
                sizes[4] != 0, data<float>(embeddings), position ? data<float>(*position) : nullptr};
  Pieces pieces(data<float>(packed), static_cast<float>(eps));
  if (has_embedding_norm) model.embedding_norm = pieces.norm(columns);
  for (int i = 0; i < model.num_layers; ++i) {
    model.layers.push_back(pieces.layer(columns, model.inner, has_cross));
  }
  if (has_final_norm) model.final_norm = pieces.norm(columns);
  model.output = pieces.linear(columns, types);
  pieces.expect_end_of(packed);

  const int64_t batch = tokens.size(0), fed = tokens.size(1);
  Tensor logits = torch::stable::new_empty(packed, {batch, fed, types});
  const Step step{static_cast<int>(step_index), static_cast<int>(fed), static_cast<int>(cache.size(4)),
                  static_cast<int>(cache.size(3)), model.num_layers, model.heads, static_cast<int>(cache.size(6)),
                  data<int64_t>(tokens), data<int64_t>(live), data<float>(cache), data<int32_t>(paths),
                  sources ? data<float>(*sources) : nullptr, starts ? data<int32_t>(*starts) : nullptr,
                  lengths ? data<int32_t>(*lengths) : nullptr, sources ? sources->size(2) : 0, data<float>(logits),
                  attention ? data<float>(*attention) : nullptr, attention ? attention->size(2) : 0};
  const int64_t* const parent = parents ? data<int64_t>(*parents) : nullptr;
  const int64_t grain = std::max<int64_t>(1, 16 / fed);  // sentences worth a thread
  torch::stable::parallel_for(0, batch, grain, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) step.follow(b, parent);
    const int64_t most = std::max<int64_t>(1, MOST_ROWS / fed);
    for (int64_t b = begin; b < end; b += most) {
      LIGHTSEQ_DISPATCH(lanes, decode(model, step, b, std::min(end, b + most)));
    }
  });
  return logits;
}

void encode(Tensor packed, Tensor shape, double eps, Tensor x, Tensor cu_seqlens, int64_t lanes) {
  const int64_t* const sizes = data<int64_t>(shape);
  const int columns = static_cast<int>(x.size(1));
  Encoder model{columns, static_cast<int>(sizes[0]), static_cast<int>(sizes[1]), sizes[3] != 0};
  Pieces pieces(data<float>(packed), static_cast<float>(eps));
  for (int64_t i = 0; i < sizes[2]; ++i) model.layers.push_back(pieces.layer(columns, model.inner, false));
  if (sizes[4]) model.final_norm = pieces.norm(columns);
  pieces.expect_end_of(packed);
  const int32_t* const starts = data<int32_t>(cu_seqlens);
  torch::stable::parallel_for(0, cu_seqlens.size(0) - 1, 4, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end;) {
      int64_t next = b + 1;
      while (next < end && starts[next + 1] - starts[b] <= MOST_ROWS) ++next;
      LIGHTSEQ_DISPATCH(lanes, encode(model, data<float>(x), starts, b, next));
      b = next;
    }
  });
}

void log_softmax_(Tensor table, int64_t lanes) {
  const int64_t types = table.size(2);
  float* const first = data<float>(table);
  torch::stable::parallel_for(0, table.size(0) * table.size(1), share(types), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      LIGHTSEQ_DISPATCH(lanes, log_softmax(first + row * types, static_cast<int>(types)));
    }
  });
}

std::tuple<Tensor, Tensor> quantize_rows(Tensor x, int64_t lanes) {
  if (!x.is_contiguous()) x = torch::stable::contiguous(x);
  const int64_t rows = x.size(0), columns = x.size(1);
  Tensor bytes = torch::stable::new_empty(x, {rows, columns}, ScalarType::Byte);
  Tensor scales = torch::stable::new_empty(x, {rows, 1});
  torch::stable::parallel_for(0, rows, share(columns), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      LIGHTSEQ_DISPATCH(lanes, quantize(data<uint8_t>(bytes) + row * columns, data<float>(scales) + row,
                                        data<float>(x) + row * columns, static_cast<int>(columns)));
    }
  });
  return {bytes, scales};
}

std::tuple<Tensor, Tensor, Tensor> best_continuations(Tensor table, std::optional<Tensor> scores, int64_t count,
                                                      int64_t lanes) {
  const int64_t batch = table.size(0), rows = table.size(1), types = table.size(2);
  Tensor values = torch::stable::new_empty(table, {batch, count});
  Tensor tokens = torch::stable::new_empty(table, {batch, count}, ScalarType::Long);
  Tensor beams = torch::stable::new_empty(table, {batch, count}, ScalarType::Long);
  if (scores && !scores->is_contiguous()) scores = torch::stable::contiguous(*scores);
  const float* const row_scores = scores ? data<float>(*scores) : nullptr;
  torch::stable::parallel_for(0, batch, share(rows * types), [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      LIGHTSEQ_DISPATCH(lanes, choose(data<float>(values) + b * count, data<int64_t>(tokens) + b * count,
                                      data<int64_t>(beams) + b * count, data<float>(table) + b * rows * types,
                                      row_scores ? row_scores + b * rows : nullptr, static_cast<int>(rows),
                                      static_cast<int>(types), static_cast<int>(count)));
    }
  });
  return {values, tokens, beams};
}

}  // namespace
}  // namespace lightseq::cpu

STABLE_TORCH_LIBRARY(lightseq_cpu, m) {
  m.def(
      "decoder_step(Tensor packed, Tensor shape, float eps, Tensor embeddings, Tensor? position, Tensor tokens,"
      " Tensor? parents, Tensor live, Tensor(a!) cache, Tensor(b!) paths, Tensor? sources, Tensor? starts,"
      " Tensor? lengths, Tensor(c!)? attention, int step, int lanes) -> Tensor");
  m.def("encode(Tensor packed, Tensor shape, float eps, Tensor(a!) x, Tensor cu_seqlens, int lanes) -> ()");
  m.def("quantize_rows(Tensor x, int lanes) -> (Tensor, Tensor)");
  m.def("log_softmax_(Tensor(a!) table, int lanes) -> ()");
  m.def("best_continuations(Tensor table, Tensor? scores, int count, int lanes) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(lightseq_cpu, CPU, m) {
  m.impl("decoder_step", TORCH_BOX(&lightseq::cpu::decoder_step));
  m.impl("encode", TORCH_BOX(&lightseq::cpu::encode));
  m.impl("quantize_rows", TORCH_BOX(&lightseq::cpu::quantize_rows));
  m.impl("log_softmax_", TORCH_BOX(&lightseq::cpu::log_softmax_));
  m.impl("best_continuations", TORCH_BOX(&lightseq::cpu::best_continuations));
}
