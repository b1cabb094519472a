// The loops of the CPU operators. operators.cpp includes this file once for each instruction set, with LIGHTSEQ_ISA as
// the namespace and LIGHTSEQ_LANES floats in a register; hence no include guard, and no include: what is used stands
// in operators.cpp.
//
// Shapes: R rows (a beam of a sentence each), C width, F width of the feed-forward, H heads of D, V types, S source
// tokens. C, D and F are multiples of 16, so that vectors of 4, 8 and 16 lanes all fit.

namespace lightseq::cpu::LIGHTSEQ_ISA {

constexpr int W = LIGHTSEQ_LANES;
constexpr int TILE_ROWS = W == 16 ? 12 : 6;  // sums, 2 vectors a row, leave room for 3 more registers of 32 or 16
constexpr int TILE_VECTORS = 2;

typedef float Vector __attribute__((vector_size(4 * W), aligned(4), may_alias));
typedef int32_t Integers __attribute__((vector_size(4 * W)));

inline Vector load(const float* p) { return *reinterpret_cast<const Vector*>(p); }
inline void store(float* p, Vector v) { *reinterpret_cast<Vector*>(p) = v; }
inline Vector larger(Vector a, Vector b) { return a > b ? a : b; }

// v with the lanes of every two runs of HALF exchanged.
template <int HALF>
inline Vector exchange(Vector v) {
#ifdef __clang__
  Vector out;
  for (int i = 0; i < W; ++i) out[i] = v[i ^ HALF];
  return out;
#else
  Integers from{};
  for (int i = 0; i < W; ++i) from[i] = i ^ HALF;
  return __builtin_shuffle(v, from);
#endif
}

template <int HALF = W / 2>
inline float add_up(Vector v) {
  v += exchange<HALF>(v);
  if constexpr (HALF > 1) return add_up<HALF / 2>(v);
  return v[0];
}

template <int HALF = W / 2>
inline float largest(Vector v) {
  v = larger(v, exchange<HALF>(v));
  if constexpr (HALF > 1) return largest<HALF / 2>(v);
  return v[0];
}

// e^x for x <= 0, to 2 units in the last place (Cephes' expf); below -87 it is e^-87.
inline Vector exponential(Vector x) {
  x = x < -87.0f ? Vector{} - 87.0f : x;  // NaN stays
  const Vector n = (x * 1.44269504f + 12582912.0f) - 12582912.0f;  // rounds to an integer: 1.5 * 2^23
  const Vector r = x - n * 0.693359375f + n * 2.12194440e-4f;
  Vector p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const Integers power = (__builtin_convertvector(n, Integers) + 127) << 23;
  return p * reinterpret_cast<const Vector&>(power);
}

// One tile of a linear map: ROWS rows of x (ROWS, inner), TILE_VECTORS vectors of columns of a panel (inner, PANEL).
// `valid` columns are written to out (ROWS, columns) and read from the residual, which may be out itself.
template <int ROWS>
void tile(float* out, const float* x, const float* panel, const float* bias, const float* residual, int inner,
          int columns, int valid, bool relu) {
  Vector sums[ROWS][TILE_VECTORS] = {};
  for (int k = 0; k < inner; ++k) {
    Vector weights[TILE_VECTORS];
    for (int n = 0; n < TILE_VECTORS; ++n) weights[n] = load(panel + k * PANEL + n * W);
    for (int row = 0; row < ROWS; ++row) {
      const float value = x[static_cast<int64_t>(row) * inner + k];
      for (int n = 0; n < TILE_VECTORS; ++n) sums[row][n] += value * weights[n];
    }
  }
  for (int row = 0; row < ROWS; ++row) {
    const int64_t at = static_cast<int64_t>(row) * columns;
    for (int n = 0; n < TILE_VECTORS; ++n) {
      Vector y = sums[row][n] + load(bias + n * W);
      if (relu) y = larger(y, Vector{});
      const int left = valid - n * W;
      if (left >= W) {
        store(out + at + n * W, residual ? y + load(residual + at + n * W) : y);
      } else {
        float lanes[W];
        store(lanes, y);
        for (int i = 0; i < left; ++i) out[at + n * W + i] = lanes[i] + (residual ? residual[at + n * W + i] : 0.0f);
      }
    }
  }
}

using Tile = void (*)(float*, const float*, const float*, const float*, const float*, int, int, int, bool);

template <int... ROWS>
constexpr std::array<Tile, sizeof...(ROWS)> tiles_of(std::integer_sequence<int, ROWS...>) {
  return {tile<ROWS + 1>...};
}

constexpr auto TILES = tiles_of(std::make_integer_sequence<int, TILE_ROWS>{});  // of 1 row, of 2 rows...

// y (rows, f.out) = act(x (rows, f.in) weight^T + bias) [+ residual]; a panel of the weight stays in the first cache
// while all rows go by.
inline void linear(float* y, const float* x, int rows, const Linear& f, const float* residual = nullptr,
                   bool relu = false) {
  const int blocks = (rows + TILE_ROWS - 1) / TILE_ROWS;
  for (int panel = 0; panel < f.out; panel += PANEL) {
    for (int column = panel; column < std::min(panel + PANEL, f.out); column += TILE_VECTORS * W) {
      const float* weights = f.panels + static_cast<int64_t>(panel) * f.in + (column - panel);
      for (int block = 0; block < blocks; ++block) {
        const int row = rows * block / blocks, end = rows * (block + 1) / blocks;  // tiles of like height
        const int64_t at = static_cast<int64_t>(row) * f.out + column;
        TILES[end - row - 1](y + at, x + static_cast<int64_t>(row) * f.in, weights, f.bias + column,
                             residual ? residual + at : nullptr, f.in, f.out, f.out - column, relu);
      }
    }
  }
}

// y (rows, C) = layer norm of x (rows, C); y may be x.
inline void normalize(float* y, const float* x, int rows, int columns, const Norm& norm) {
  for (int row = 0; row < rows; ++row, x += columns, y += columns) {
    Vector sum{}, squares{};
    for (int i = 0; i < columns; i += W) sum += load(x + i);
    const float mean = add_up(sum) / columns;
    for (int i = 0; i < columns; i += W) {
      const Vector centred = load(x + i) - mean;
      squares += centred * centred;
    }
    const float rstd = 1.0f / std::sqrt(add_up(squares) / columns + norm.eps);
    for (int i = 0; i < columns; i += W) {
      store(y + i, (load(x + i) - mean) * rstd * load(norm.weight + i) + load(norm.bias + i));
    }
  }
}

// scores (count, and room up to a multiple of W) become their softmax.
inline void softmax(float* scores, int count) {
  const int padded = (count + W - 1) / W * W;
  for (int i = count; i < padded; ++i) scores[i] = -std::numeric_limits<float>::infinity();
  Vector most = load(scores), sum{};
  for (int i = W; i < padded; i += W) most = larger(most, load(scores + i));
  const float top = largest(most);
  for (int i = 0; i < padded; i += W) {
    const Vector p = exponential(load(scores + i) - top);
    store(scores + i, p);
    sum += p;
  }
  const float factor = 1.0f / add_up(sum);
  for (int i = 0; i < padded; i += W) store(scores + i, load(scores + i) * factor);
}

// For each of a few queries: out (D,) = softmax(q (D,) keys^T) values over `count` keys, of which key(query, i) is
// where number i begins, its value lying `to_value` floats behind. Queries and outputs are `q_step` and `out_step` floats
// apart. The softmaxes are left in scores (queries, room); stages go by all queries, so that none waits for itself.
template <typename Key>
inline void attend(float* out, int out_step, const float* q, int q_step, int queries, int count, int head_dim,
                   int to_value, float* scores, int room, Key&& key) {
  for (int query = 0; query < queries; ++query) {
    for (int i = 0; i < count; ++i) {
      const float* const k = key(query, i);
      Vector sum{};
      for (int d = 0; d < head_dim; d += W) sum += load(q + query * q_step + d) * load(k + d);
      scores[query * room + i] = add_up(sum);
    }
  }
  for (int query = 0; query < queries; ++query) softmax(scores + query * room, count);
  for (int query = 0; query < queries; ++query) {
    for (int d = 0; d < head_dim; d += W) {
      Vector sum{};
      for (int i = 0; i < count; ++i) sum += scores[query * room + i] * load(key(query, i) + to_value + d);
      store(out + query * out_step + d, sum);
    }
  }
}

// What a sublayer of pre- or post-LN layers reads and leaves behind, x (rows, C) being the residual stream.
struct Stream {
  float* x;
  float* y;
  int rows, columns;
  bool pre_norm;

  const float* enter(const Norm& norm) const {
    if (!pre_norm) return x;
    normalize(y, x, rows, columns, norm);
    return y;
  }
  void leave(const Norm& norm) const {
    if (!pre_norm) normalize(x, x, rows, columns, norm);
  }
};

inline void feed_forward(const Stream& stream, float* wide, const Layer& layer) {
  linear(wide, stream.enter(layer.final_norm), stream.rows, layer.fc1, nullptr, true);
  linear(stream.x, wide, stream.rows, layer.fc2, stream.x);
  stream.leave(layer.final_norm);
}

// One step of sentences [begin, end) of the live ones, for all layers.
inline void decode(const Decoder& model, const Step& step, int64_t begin, int64_t end) {
  const int columns = model.columns, head_dim = columns / model.heads, fed = step.fed, beam = step.beam;
  const int rows = static_cast<int>(end - begin) * fed;
  int longest = step.step + 1;
  for (int64_t b = begin; b < end; ++b) longest = std::max(longest, step.source_length(b));
  Scratch scratch;
  float* x = scratch.take(rows * columns);
  float* y = scratch.take(rows * columns);
  float* wide = scratch.take(rows * std::max(3 * columns, model.inner));
  const int room = (longest + W - 1) / W * W;
  float* scores = scratch.take(fed * room);
  const Stream stream{x, y, rows, columns, model.pre_norm};

  for (int row = 0; row < rows; ++row) {
    const float* embedding = model.embeddings + step.tokens[begin * fed + row] * columns;
    for (int i = 0; i < columns; i += W) {
      const Vector position = model.position ? load(model.position + i) : Vector{};
      store(x + row * columns + i, load(embedding + i) + position);
    }
  }
  if (model.embedding_norm.weight) normalize(x, x, rows, columns, model.embedding_norm);

  for (int index = 0; index < model.num_layers; ++index) {
    const Layer& layer = model.layers[index];
    linear(wide, stream.enter(layer.self_norm), rows, layer.qkv);
    for (int64_t b = begin; b < end; ++b) {
      const int64_t first = (b - begin) * fed;
      for (int head = 0; head < model.heads; ++head) {
        float* const slots = step.slots(b, index, head);  // (capacity, K, 2, D)
        const float* const qkv = wide + first * 3 * columns + head * head_dim;
        for (int k = 0; k < fed; ++k) {
          float* const slot = slots + (int64_t{step.step} * beam + k) * 2 * head_dim;
          std::copy_n(qkv + (3 * k + 1) * columns, head_dim, slot);
          std::copy_n(qkv + (3 * k + 2) * columns, head_dim, slot + head_dim);
        }
        const int32_t* const path = step.path(b);  // (capacity, K): the slots that each beam came through
        attend(y + first * columns + head * head_dim, columns, qkv, 3 * columns, fed, step.step + 1, head_dim, head_dim,
               scores, room, [&](int k, int t) { return slots + (t * beam + path[t * beam + k]) * 2 * head_dim; });
      }
    }
    linear(x, y, rows, layer.out, x);
    stream.leave(layer.self_norm);

    if (layer.cross_q.panels) {
      linear(wide, stream.enter(layer.cross_norm), rows, layer.cross_q);
      float* const weights = index == model.num_layers - 1 ? step.attention : nullptr;
      for (int64_t b = begin; b < end; ++b) {
        const int64_t first = (b - begin) * fed;
        const int length = step.source_length(b);
        for (int head = 0; head < model.heads; ++head) {
          const float* const source = step.source(b, index, head);  // (S, 2, D)
          const int64_t at = first * columns + head * head_dim;
          attend(y + at, columns, wide + at, columns, fed, length, head_dim, head_dim, scores, room,
                 [&](int, int i) { return source + i * 2 * head_dim; });
          for (int k = 0; weights && k < fed; ++k) {
            for (int i = 0; i < length; ++i) {
              weights[(b * fed + k) * step.attention_width + i] += scores[k * room + i] / model.heads;
            }
          }
        }
      }
      linear(x, y, rows, layer.cross_out, x);
      stream.leave(layer.cross_norm);
    }

    feed_forward(stream, wide, layer);
  }
  if (model.final_norm.weight) normalize(x, x, rows, columns, model.final_norm);
  linear(step.logits + begin * fed * model.output.out, x, rows, model.output);
}

// Sentences [begin, end) through all layers of an encoder, in place: x (N, C) packed.
inline void encode(const Encoder& model, float* x, const int32_t* cu_seqlens, int64_t begin, int64_t end) {
  constexpr int QUERIES = 8;
  const int columns = model.columns, head_dim = columns / model.heads, rows = cu_seqlens[end] - cu_seqlens[begin];
  int longest = 1;
  for (int64_t b = begin; b < end; ++b) longest = std::max(longest, cu_seqlens[b + 1] - cu_seqlens[b]);
  const int room = (longest + W - 1) / W * W;
  Scratch scratch;
  float* y = scratch.take(rows * columns);
  float* wide = scratch.take(rows * std::max(3 * columns, model.inner));
  float* scores = scratch.take(QUERIES * room);
  x += int64_t{cu_seqlens[begin]} * columns;
  const Stream stream{x, y, rows, columns, model.pre_norm};

  for (const Layer& layer : model.layers) {
    linear(wide, stream.enter(layer.self_norm), rows, layer.qkv);
    for (int64_t b = begin; b < end; ++b) {
      const int first = cu_seqlens[b] - cu_seqlens[begin], length = cu_seqlens[b + 1] - cu_seqlens[b];
      for (int column = 0; column < columns; column += head_dim) {
        const float* const qkv = wide + first * 3 * columns + column;
        for (int row = 0; row < length; row += QUERIES) {
          attend(y + (first + row) * columns + column, columns, qkv + row * 3 * columns, 3 * columns,
                 std::min(QUERIES, length - row), length, head_dim, columns, scores, room,
                 [&](int, int i) { return qkv + (3 * i + 1) * columns; });
        }
      }
    }
    linear(x, y, rows, layer.out, x);
    stream.leave(layer.self_norm);
    feed_forward(stream, wide, layer);
  }
  if (model.final_norm.weight) normalize(x, x, rows, columns, model.final_norm);
}

// row (V,) becomes row - log sum exp(row).
inline void log_softmax(float* row, int types) {
  Vector most = Vector{} - std::numeric_limits<float>::infinity();
  int i = 0;
  for (; i + W <= types; i += W) most = larger(load(row + i), most);
  float top = largest(most);
  for (int rest = i; rest < types; ++rest) top = std::max(top, row[rest]);
  Vector sum{};
  for (i = 0; i + W <= types; i += W) sum += exponential(load(row + i) - top);
  float total = add_up(sum);
  for (; i < types; ++i) total += std::exp(row[i] - top);
  const float subtrahend = top + std::log(total);
  for (i = 0; i + W <= types; i += W) store(row + i, load(row + i) - subtrahend);
  for (; i < types; ++i) row[i] -= subtrahend;
}

inline bool any(Integers lanes) {
  int64_t words[W / 2], all = 0;
  std::memcpy(words, &lanes, sizeof(words));
  for (int i = 0; i < W / 2; ++i) all |= words[i];
  return all != 0;
}

// The `count` largest of scores[r] + table (rows, V), best first, the earlier first among equals; NaN counts as -inf.
inline void choose(float* values, int64_t* tokens, int64_t* beams, const float* table, const float* scores, int rows,
                   int types, int count) {
  const float none = -std::numeric_limits<float>::infinity();
  int found = 0;
  const auto insert = [&](float value, int row, int token) {
    int place = found < count ? found++ : count - 1;
    for (; place > 0 && values[place - 1] < value; --place) {
      values[place] = values[place - 1], tokens[place] = tokens[place - 1], beams[place] = beams[place - 1];
    }
    values[place] = value, tokens[place] = token, beams[place] = row;
  };
  for (int row = 0; row < rows; ++row, table += types) {
    const float score = scores ? scores[row] : 0.0f;
    const auto offer = [&](int token) {
      const float value = table[token] + score;
      if (found < count || value > values[count - 1]) insert(value == value ? value : none, row, token);
    };
    int token = 0;
    for (; token < types && found < count; ++token) offer(token);
    for (; token + 4 * W <= types; token += 4 * W) {  // few vectors hold anything better than what was found
      const auto better = [&](int i) -> Integers { return load(table + i) + score > values[count - 1]; };
      if (!any(better(token) | better(token + W) | better(token + 2 * W) | better(token + 3 * W))) continue;
      for (int i = token; i < token + 4 * W; i += W) {
        if (!any(better(i))) continue;
        for (int lane = 0; lane < W; ++lane) offer(i + lane);
      }
    }
    for (; token < types; ++token) offer(token);
  }
}

}  // namespace lightseq::cpu::LIGHTSEQ_ISA
