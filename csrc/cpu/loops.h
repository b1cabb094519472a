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
// `valid` columns are read from the residual, if there is one, and written to out, which may be the residual.
template <int ROWS>
void tile(Rows out, Rows x, Rows residual, const float* panel, const float* bias, int inner, int valid, bool relu) {
  Vector sums[ROWS][TILE_VECTORS];
  for (int n = 0; n < TILE_VECTORS; ++n) {
    for (int row = 0; row < ROWS; ++row) sums[row][n] = load(bias + n * W);
  }
  for (int k = 0; k < inner; ++k) {
    Vector weights[TILE_VECTORS];
    for (int n = 0; n < TILE_VECTORS; ++n) weights[n] = load(panel + k * PANEL + n * W);
    for (int row = 0; row < ROWS; ++row) {
      const float value = x.at(row)[k];
      for (int n = 0; n < TILE_VECTORS; ++n) sums[row][n] += value * weights[n];
    }
  }
  for (int row = 0; row < ROWS; ++row) {
    for (int n = 0; relu && n < TILE_VECTORS; ++n) sums[row][n] = larger(sums[row][n], Vector{});
    float* const to = out.at(row);
    const float* const addend = residual.data ? residual.at(row) : nullptr;
    if (valid >= TILE_VECTORS * W) {
      for (int n = 0; n < TILE_VECTORS; ++n) {
        store(to + n * W, addend ? sums[row][n] + load(addend + n * W) : sums[row][n]);
      }
    } else {
      float lanes[TILE_VECTORS * W];
      for (int n = 0; n < TILE_VECTORS; ++n) store(lanes + n * W, sums[row][n]);
      for (int i = 0; i < valid; ++i) to[i] = lanes[i] + (addend ? addend[i] : 0.0f);
    }
  }
}

using Tile = void (*)(Rows, Rows, Rows, const float*, const float*, int, int, bool);

template <int... ROWS>
constexpr std::array<Tile, sizeof...(ROWS)> tiles_of(std::integer_sequence<int, ROWS...>) {
  return {tile<ROWS + 1>...};
}

constexpr auto TILES = tiles_of(std::make_integer_sequence<int, TILE_ROWS>{});  // of 1 row, of 2 rows...

// y (rows, f.out) = act(x (rows, f.in) weight^T + bias) [+ residual], where the residual may be y. A panel of the
// weight stays in a cache while all rows go by.
inline void linear(Rows y, Rows x, int rows, const Linear& f, Rows residual = {}, bool relu = false) {
  const int blocks = (rows + TILE_ROWS - 1) / TILE_ROWS;
  for (int panel = 0; panel < f.out; panel += PANEL) {
    const float* const weights = f.panels + static_cast<int64_t>(panel) * f.in;
    for (int column = panel; column < std::min(panel + PANEL, f.out); column += TILE_VECTORS * W) {
      for (int block = 0; block < blocks; ++block) {
        const int row = rows * block / blocks, end = rows * (block + 1) / blocks;  // tiles of like height
        TILES[end - row - 1](y.from(row, column), x.from(row, 0), residual.data ? residual.from(row, column) : residual,
                             weights + (column - panel), f.bias + column, f.in, f.out - column, relu);
      }
    }
  }
}

// y (rows, C) = layer norm of x (rows, C); y may be x.
inline void normalize(Rows y, Rows x, int rows, int columns, const Norm& norm) {
  for (int row = 0; row < rows; ++row) {
    const float* const from = x.at(row);
    float* const to = y.at(row);
    Vector sum{}, squares{};
    for (int i = 0; i < columns; i += W) sum += load(from + i);
    const float mean = add_up(sum) / columns;
    for (int i = 0; i < columns; i += W) {
      const Vector centred = load(from + i) - mean;
      squares += centred * centred;
    }
    const float rstd = 1.0f / std::sqrt(add_up(squares) / columns + norm.eps);
    for (int i = 0; i < columns; i += W) {
      store(to + i, (load(from + i) - mean) * rstd * load(norm.weight + i) + load(norm.bias + i));
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

// For each of a few queries (queries, D): out (D,) = softmax(q (D,) keys^T) values over `count` keys, of which
// key(query, i) is where number i begins, its value lying `to_value` floats behind. The softmaxes are left in scores
// (queries, room); stages go by all queries, so that none waits for itself.
template <typename Key>
inline void attend(Rows out, Rows q, int queries, int count, int head_dim, int to_value, Rows scores, Key&& key) {
  for (int query = 0; query < queries; ++query) {
    for (int i = 0; i < count; ++i) {
      const float* const k = key(query, i);
      Vector sum{};
      for (int d = 0; d < head_dim; d += W) sum += load(q.at(query) + d) * load(k + d);
      scores.at(query)[i] = add_up(sum);
    }
  }
  for (int query = 0; query < queries; ++query) softmax(scores.at(query), count);
  for (int query = 0; query < queries; ++query) {
    for (int d = 0; d < head_dim; d += W) {
      Vector sum{};
      for (int i = 0; i < count; ++i) sum += scores.at(query)[i] * load(key(query, i) + to_value + d);
      store(out.at(query) + d, sum);
    }
  }
}

// The residual stream x (rows, C) of pre- or post-LN layers, and room for what a sublayer reads, y (rows, C).
struct Stream {
  Rows x, y;
  int rows, columns;
  bool pre_norm;

  Rows enter(const Norm& norm) const {
    if (!pre_norm) return x;
    normalize(y, x, rows, columns, norm);
    return y;
  }
  void leave(const Norm& norm) const {
    if (!pre_norm) normalize(x, x, rows, columns, norm);
  }
};

inline void feed_forward(const Stream& stream, Rows hidden, const Layer& layer) {
  linear(hidden, stream.enter(layer.final_norm), stream.rows, layer.fc1, {}, true);
  linear(stream.x, hidden, stream.rows, layer.fc2, stream.x);
  stream.leave(layer.final_norm);
}

// One step of sentences [begin, end) of the live ones, for all layers.
inline void decode(const Decoder& model, const Step& step, int64_t begin, int64_t end) {
  const int columns = model.columns, head_dim = columns / model.heads, fed = step.fed, beam = step.beam;
  const int rows = static_cast<int>(end - begin) * fed;
  int longest = step.step + 1;
  for (int64_t b = begin; b < end; ++b) longest = std::max(longest, step.source_length(b));
  Scratch scratch;
  const Rows x = scratch.take(rows, columns), y = scratch.take(rows, columns);
  const Rows wide = scratch.take(rows, 3 * columns), hidden = scratch.take(rows, model.inner);
  const Rows scores = scratch.take(fed, longest);
  const Stream stream{x, y, rows, columns, model.pre_norm};

  for (int row = 0; row < rows; ++row) {
    const float* const embedding = model.embeddings + step.tokens[begin * fed + row] * columns;
    for (int i = 0; i < columns; i += W) {
      store(x.at(row) + i, load(embedding + i) + (model.position ? load(model.position + i) : Vector{}));
    }
  }
  if (model.embedding_norm.weight) normalize(x, x, rows, columns, model.embedding_norm);

  for (int index = 0; index < model.num_layers; ++index) {
    const Layer& layer = model.layers[index];
    linear(wide, stream.enter(layer.self_norm), rows, layer.qkv);
    for (int64_t b = begin; b < end; ++b) {
      const int first = static_cast<int>(b - begin) * fed;
      const int32_t* const path = step.path(b);  // (capacity, K): the slots that each beam came through
      for (int head = 0; head < model.heads; ++head) {
        float* const slots = step.slots(b, index, head);  // (capacity, K, 2, D)
        const Rows q = wide.from(first, head * head_dim);
        for (int k = 0; k < fed; ++k) {
          float* const slot = slots + (int64_t{step.step} * beam + k) * 2 * head_dim;
          std::copy_n(q.at(k) + columns, head_dim, slot);
          std::copy_n(q.at(k) + 2 * columns, head_dim, slot + head_dim);
        }
        attend(y.from(first, head * head_dim), q, fed, step.step + 1, head_dim, head_dim, scores,
               [&](int k, int t) { return slots + (t * beam + path[t * beam + k]) * 2 * head_dim; });
      }
    }
    linear(x, y, rows, layer.out, x);
    stream.leave(layer.self_norm);

    if (layer.cross_q.panels) {
      linear(wide, stream.enter(layer.cross_norm), rows, layer.cross_q);
      float* const weights = index == model.num_layers - 1 ? step.attention : nullptr;
      for (int64_t b = begin; b < end; ++b) {
        const int first = static_cast<int>(b - begin) * fed, length = step.source_length(b);
        for (int head = 0; head < model.heads; ++head) {
          const float* const source = step.source(b, index, head);  // (S, 2, D)
          attend(y.from(first, head * head_dim), wide.from(first, head * head_dim), fed, length, head_dim, head_dim,
                 scores, [&](int, int i) { return source + i * 2 * head_dim; });
          for (int k = 0; weights && k < fed; ++k) {
            for (int i = 0; i < length; ++i) {
              weights[(b * fed + k) * step.attention_width + i] += scores.at(k)[i] / model.heads;
            }
          }
        }
      }
      linear(x, y, rows, layer.cross_out, x);
      stream.leave(layer.cross_norm);
    }
    feed_forward(stream, hidden, layer);
  }
  const int types = model.output.out;
  if (model.final_norm.weight) normalize(x, x, rows, columns, model.final_norm);
  linear({step.logits + begin * fed * types, types}, x, rows, model.output);
}

// Sentences [begin, end) through all layers of an encoder, in place: packed (N, C).
inline void encode(const Encoder& model, float* packed, const int32_t* cu_seqlens, int64_t begin, int64_t end) {
  constexpr int QUERIES = 8;
  const int columns = model.columns, head_dim = columns / model.heads, rows = cu_seqlens[end] - cu_seqlens[begin];
  int longest = 1;
  for (int64_t b = begin; b < end; ++b) longest = std::max(longest, cu_seqlens[b + 1] - cu_seqlens[b]);
  Scratch scratch;
  const Rows x = scratch.take(rows, columns), y = scratch.take(rows, columns);
  const Rows wide = scratch.take(rows, 3 * columns), hidden = scratch.take(rows, model.inner);
  const Rows scores = scratch.take(QUERIES, longest);
  const Stream stream{x, y, rows, columns, model.pre_norm};
  const Rows outside{packed + int64_t{cu_seqlens[begin]} * columns, columns};
  for (int row = 0; row < rows; ++row) std::copy_n(outside.at(row), columns, x.at(row));

  for (const Layer& layer : model.layers) {
    linear(wide, stream.enter(layer.self_norm), rows, layer.qkv);
    for (int64_t b = begin; b < end; ++b) {
      const int first = cu_seqlens[b] - cu_seqlens[begin], length = cu_seqlens[b + 1] - cu_seqlens[b];
      for (int column = 0; column < columns; column += head_dim) {
        const Rows keys = wide.from(first, columns + column);
        for (int query = 0; query < length; query += QUERIES) {
          attend(y.from(first + query, column), wide.from(first + query, column), std::min(QUERIES, length - query),
                 length, head_dim, columns, scores, [&](int, int i) { return keys.at(i); });
        }
      }
    }
    linear(x, y, rows, layer.out, x);
    stream.leave(layer.self_norm);
    feed_forward(stream, hidden, layer);
  }
  if (model.final_norm.weight) normalize(x, x, rows, columns, model.final_norm);
  for (int row = 0; row < rows; ++row) std::copy_n(x.at(row), columns, outside.at(row));
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

// out (C,) = 128 + x / scale, rounded to even; scale is the largest |x| / 127.
inline void quantize(uint8_t* out, float* scale, const float* x, int columns) {
  typedef uint8_t Bytes __attribute__((vector_size(W), aligned(1), may_alias));
  Vector most{};
  int i = 0;
  for (; i + W <= columns; i += W) {
    const Vector v = load(x + i);
    most = larger(most, larger(v, -v));
  }
  float top = largest(most);
  for (int rest = i; rest < columns; ++rest) top = std::max(top, std::abs(x[rest]));
  *scale = std::max(top / 127.0f, std::numeric_limits<float>::min());
  const float inverse = 1.0f / *scale;
  for (i = 0; i + W <= columns; i += W) {
    const Vector shifted = load(x + i) * inverse + 12582912.0f;  // 1.5 * 2^23: the last byte is the integer
    Integers bits;
    std::memcpy(&bits, &shifted, sizeof(bits));
    *reinterpret_cast<Bytes*>(out + i) = __builtin_convertvector((bits + 128) & 255, Bytes);
  }
  for (; i < columns; ++i) out[i] = static_cast<uint8_t>(128 + static_cast<int>(std::nearbyint(x[i] * inverse)));
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
