// The loops of attention, compiled once for each instruction set (vector.h says how to include this file).

namespace admfast {
namespace ADMFAST_ISA {
namespace {

constexpr int64_t kSide = kBlockSide, kBlockSize = kSide * kSide;
constexpr int64_t kQueries = kAttentionQueries, kKeys = kAttentionKeys;
static_assert(kQueries == kSide && kKeys % kSide == 0);
// Columns that the rows of a buffer are longer: rows a power of two apart would fall into the same set of a cache.
constexpr int64_t kGap = kSide;
constexpr int64_t kSpan = 256;         // queries whose logits the gradient makes at a time
constexpr float kLog2e = 0x1.715476p+0f, kLn2 = 0x1.62e43p-1f;
constexpr float kNever = -1e30f;       // a logit whose exponential is zero

// Memory that is given out piece by piece; without a base it only counts.
struct Room {
  char* base;
  int64_t used = 0;
  template <typename T>
  ADMFAST_INLINE T* of(int64_t count) {
    T* piece = reinterpret_cast<T*>(base + used);
    used += (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
    return piece;
  }
};

// The sizes of a head, rounded up to whole blocks.
struct Sizes {
  int64_t tokens, width, row, logits;  // `row`: of tokens, with a gap; `logits`: the same in floats
  explicit Sizes(const AttentionHead& head)
      : tokens(blocks_of(head.tokens) * kSide), width(blocks_of(head.width) * kSide), row(tokens + kGap),
        logits(tokens + kGap / 2) {}
};

struct ForwardRoom {
  bfloat16 *keys, *values, *queries, *weights;
  float* logits;
  ForwardRoom(Room& room, const Sizes& s)
      : keys(room.of<bfloat16>(s.tokens * s.width)), values(room.of<bfloat16>(s.tokens * s.width)),
        queries(room.of<bfloat16>(kQueries * s.width)), weights(room.of<bfloat16>(kQueries * s.row)),
        logits(room.of<float>(kQueries * s.logits)) {}
};

// `by_column`: B for products over the width; `by_row`: B for products over the tokens.
struct GradientRoom {
  bfloat16 *keys, *values, *keys_turned;
  bfloat16 *queries_by_column, *queries_by_row, *dout_by_column, *dout_by_row;
  bfloat16 *weights, *dlogits, *dlogits_by_row;  // of kKeys keys: weights and the logits' gradient, transposed
  float *logits, *dweights, *dq, *sums, *lse, *delta;
  GradientRoom(Room& room, const Sizes& s)
      : keys(room.of<bfloat16>(s.tokens * s.width)), values(room.of<bfloat16>(s.tokens * s.width)),
        keys_turned(room.of<bfloat16>(s.width * s.row)), queries_by_column(room.of<bfloat16>(s.tokens * s.width)),
        queries_by_row(room.of<bfloat16>(s.tokens * s.width)), dout_by_column(room.of<bfloat16>(s.tokens * s.width)),
        dout_by_row(room.of<bfloat16>(s.tokens * s.width)), weights(room.of<bfloat16>(kKeys * s.row)),
        dlogits(room.of<bfloat16>(kKeys * s.row)), dlogits_by_row(room.of<bfloat16>(kKeys * s.tokens)),
        logits(room.of<float>(kSide * (kSpan + kGap / 2))), dweights(room.of<float>(kSide * (kSpan + kGap / 2))),
        dq(room.of<float>(s.width * s.logits)), sums(room.of<float>(kBlockSize)), lse(room.of<float>(s.tokens)),
        delta(room.of<float>(s.tokens)) {}
};

int64_t memory(const AttentionHead& head, bool gradient) {
  Room room{nullptr};
  const Sizes s(head);
  if (gradient)
    GradientRoom{room, s};
  else
    ForwardRoom{room, s};
  return room.used;
}

ADMFAST_INLINE Matrix matrix(const AttentionHead& head, const bfloat16* at) {
  return {at, head.row, head.tokens, head.width};
}

// Copy rows [begin, begin + rows) to whole blocks of `width` columns, with zeros around them.
ADMFAST_INLINE void copy_rows(const Matrix& m, int64_t begin, int64_t rows, bfloat16* to, int64_t width) {
  for (int64_t r = begin; r < begin + rows; ++r, to += width) {
    if (r < m.rows) __builtin_memcpy(to, m.at + r * m.row, 2 * m.columns);
    const int64_t there = r < m.rows ? m.columns : 0;
    __builtin_memset(to + there, 0, 2 * (width - there));
  }
}

ADMFAST_INLINE float sum_of(Vector v) {
  float lanes[Vector::kWidth], sum = 0;
  v.store(lanes);
  for (const float lane : lanes) sum += lane;
  return sum;
}

ADMFAST_INLINE float largest_of(const float* from, int64_t count) {
  float largest = from[0];
  for (int64_t i = 1; i < count; ++i) largest = from[i] > largest ? from[i] : largest;
  return largest;
}

// to = factor * from, for `count` numbers.
ADMFAST_INLINE void store_scaled(const float* from, float factor, int64_t count, bfloat16* to) {
  int64_t j = 0;
  for (; j + Vector::kWidth <= count; j += Vector::kWidth)
    (Vector::load(from + j) * Vector::set(factor)).store(to + j);
  for (; j < count; ++j) Scalar{from[j] * factor}.store(to + j);
}

ADMFAST_INLINE float dot(const bfloat16* a, const bfloat16* b, int64_t count) {
  Vector sum = Vector::set(0);
  int64_t j = 0;
  for (; j + Vector::kWidth <= count; j += Vector::kWidth) sum = fma(Vector::load(a + j), Vector::load(b + j), sum);
  float total = sum_of(sum);
  for (; j < count; ++j) total += to_float(a[j]) * to_float(b[j]);
  return total;
}

// Transpose 16 by 16 floats with rows `width` apart.
ADMFAST_INLINE void transposed(const float* from, int64_t width, float* to) {
#if ADMFAST_LEVEL >= 513
  __m512i v[16];
#pragma GCC unroll 16
  for (int64_t i = 0; i < 16; ++i) v[i] = _mm512_loadu_si512(from + i * width);
  transpose(v);
#pragma GCC unroll 16
  for (int64_t i = 0; i < 16; ++i) _mm512_storeu_si512(to + 16 * i, v[i]);
#else
  for (int64_t i = 0; i < kTileRows; ++i)
    for (int64_t j = 0; j < kTileRows; ++j) to[j * kTileRows + i] = from[i * width + j];
#endif
}

// Store 16 numbers of each of two rows, in turn: a row of B whose pairs are the two rows.
ADMFAST_INLINE void store_paired(const Vector* even, const Vector* odd, bfloat16* to) {
#if ADMFAST_LEVEL >= 513
  const __m512i both = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(odd[0].v, even[0].v));
  // Word i of the first row, then word i of the second, which is 16 words later.
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i order = _mm512_or_si512(lane, _mm512_slli_epi32(_mm512_add_epi32(lane, _mm512_set1_epi32(16)), 16));
  _mm512_storeu_si512(to, _mm512_permutexvar_epi16(order, both));
#else
  bfloat16 rows[2][kTileRows];
  for (int64_t i = 0; i < kTileRows; i += Vector::kWidth) {
    even[i / Vector::kWidth].store(rows[0] + i);
    odd[i / Vector::kWidth].store(rows[1] + i);
  }
  for (int64_t i = 0; i < kTileRows; ++i) to[2 * i] = rows[0][i], to[2 * i + 1] = rows[1][i];
#endif
}

// Logits of 32 queries and all keys, and the largest of each row.
ADMFAST_INLINE void make_logits(const AttentionHead& head, const Sizes& s, const ForwardRoom& r, float* largest) {
  constexpr int64_t kWidth = Vector::kWidth;
  float most[kQueries][kWidth];
  for (auto& row : most)
    for (float& lane : row) lane = kNever;
  const int64_t chunks = s.width / kTileDepth;
  for (int64_t key = 0; key < s.tokens; key += kSide) {
    float* to = r.logits + key;
    multiply<false>({r.queries, r.queries + kTileRows * s.width, s.width, kTileDepth, chunks, &kFirstTap, 1,
                     r.keys + key * s.width, kBlockSize},
                    to, s.logits);
    for (int64_t i = 0; i < kQueries; ++i, to += s.logits) {
      for (int64_t j = head.tokens - key; j < kSide; ++j) to[j] = kNever;
      Vector row = Vector::load(most[i]);
      for (int64_t j = 0; j < kSide; j += kWidth) row = larger(row, Vector::load(to + j));
      row.store(most[i]);
    }
  }
  for (int64_t i = 0; i < kQueries; ++i) largest[i] = largest_of(most[i], kWidth);
}

void forward(const AttentionHead& head, int64_t begin, int64_t end, bool ready, bfloat16* out, int64_t out_row,
             float* lse, char* memory) {
  [[maybe_unused]] const Tiles tiles;
  const Sizes s(head);
  Room room{memory};
  const ForwardRoom r(room, s);
  if (!ready) {
    pair_all_columns(matrix(head, head.k), r.keys);
    pair_all_rows(matrix(head, head.v), r.values);
  }
  const Vector factor = Vector::set(head.scale * kLog2e);
  alignas(64) float sums[kBlockSize], largest[kQueries], inverse[kQueries];
  for (int64_t first = begin; first < end; first += kQueries) {
    const int64_t count = lesser(kQueries, end - first);
    copy_rows(matrix(head, head.q), first, kQueries, r.queries, s.width);
    make_logits(head, s, r, largest);
    for (int64_t i = 0; i < count; ++i) {
      const float* logits = r.logits + i * s.logits;
      bfloat16* weights = r.weights + i * s.row;
      const Vector offset = Vector::set(-largest[i] * head.scale * kLog2e);
      Vector even = Vector::set(0), odd = even;
      const auto weight = [&](int64_t j) { return exp2_half(fma(Vector::load(logits + j), factor, offset)); };
      for (int64_t j = 0; j < s.tokens; j += 2 * Vector::kWidth) {
        const Vector first_weight = weight(j), second_weight = weight(j + Vector::kWidth);
        even = even + first_weight;
        odd = odd + second_weight;
        store_both(first_weight, second_weight, weights + j);
      }
      const float sum = sum_of(even + odd);
      inverse[i] = 1 / sum;
      lse[first + i] = largest[i] * head.scale + __builtin_logf(sum);
    }
    for (int64_t column = 0; column < s.width; column += kSide) {
      multiply<false>({r.weights, r.weights + kTileRows * s.row, s.row, kTileDepth, s.tokens / kTileDepth, &kFirstTap,
                       1, r.values + column * s.tokens, kBlockSize},
                      sums, kSide);
      const int64_t columns = lesser(kSide, head.width - column);
      for (int64_t i = 0; i < count; ++i)
        store_scaled(sums + i * kSide, inverse[i], columns, out + (first + i) * out_row + column);
    }
  }
}

// The weights and the logits' gradient of keys [key, key + 32) and queries [first, first + count), transposed; `number`
// is the key's in the buffers of kKeys keys.
ADMFAST_INLINE void weigh(const AttentionHead& head, const Sizes& s, const GradientRoom& r, int64_t key, int64_t number,
                          int64_t first, int64_t count) {
  constexpr int64_t kWidth = Vector::kWidth, kPieces = kTileRows / kWidth, kRow = kSpan + kGap / 2;
  const int64_t chunks = s.width / kTileDepth;
  for (int64_t q = 0; q < count; q += kSide) {
    const auto product = [&](const bfloat16* a, const bfloat16* b) {
      const bfloat16* rows = a + key * s.width;
      return Product{rows, rows + kTileRows * s.width, s.width, kTileDepth, chunks, &kFirstTap, 1,
                     b + (first + q) * s.width, kBlockSize};
    };
    multiply<false>(product(r.keys, r.queries_by_column), r.logits + q, kRow);
    multiply<false>(product(r.values, r.dout_by_column), r.dweights + q, kRow);
  }
  const Vector factor = Vector::set(head.scale * kLog2e);
  for (int64_t i = 0; i < kSide; i += 2)
    for (int64_t q = 0; q < count; q += kTileRows) {
      Vector dlogit[2][kPieces];
      for (int64_t odd = 0; odd < 2; ++odd)
        for (int64_t piece = 0; piece < kPieces; ++piece) {
          const int64_t at = q + piece * kWidth, from = (i + odd) * kRow + at;
          const int64_t to = (number + i + odd) * s.row + first + at;
          Vector weight = Vector::set(0);  // of a key behind the last one
          if (key + i + odd < head.tokens)
            weight = exp2_half(fma(Vector::load(r.logits + from), factor, Vector::load(r.lse + first + at)));
          dlogit[odd][piece] = weight * (Vector::load(r.dweights + from) + Vector::load(r.delta + first + at));
          weight.store(r.weights + to);
          dlogit[odd][piece].store(r.dlogits + to);
        }
      // Blocks of 32 queries, in each the blocks of 32 keys.
      const int64_t query = first + q, block = query / kSide * (kKeys / kSide) + number / kSide;
      store_paired(dlogit[0], dlogit[1],
                   r.dlogits_by_row + block * kBlockSize + query % kSide / kTileRows * kTileSize + i * kTileRows);
    }
}

// The gradient of 32 keys or values: a product over all queries.
ADMFAST_INLINE void store_product(const AttentionHead& head, const Sizes& s, const bfloat16* rows, const bfloat16* b,
                                  float factor, int64_t key, bfloat16* to, int64_t row, float* sums) {
  for (int64_t column = 0; column < s.width; column += kSide) {
    multiply<false>({rows, rows + kTileRows * s.row, s.row, kTileDepth, s.tokens / kTileDepth, &kFirstTap, 1,
                     b + column * s.tokens, kBlockSize},
                    sums, kSide);
    for (int64_t i = 0; i < lesser(kSide, head.tokens - key); ++i)
      store_scaled(sums + i * kSide, factor, lesser(kSide, head.width - column), to + (key + i) * row + column);
  }
}

void gradient(const AttentionHead& head, const bfloat16* dout, const bfloat16* out, int64_t out_row, const float* lse,
              bfloat16* dq, bfloat16* dk, bfloat16* dv, int64_t row, char* memory) {
  [[maybe_unused]] const Tiles tiles;
  const Sizes s(head);
  Room room{memory};
  const GradientRoom r(room, s);
  const Matrix q = matrix(head, head.q), k = matrix(head, head.k), gradients{dout, out_row, head.tokens, head.width};
  copy_rows(k, 0, s.tokens, r.keys, s.width);
  copy_rows(matrix(head, head.v), 0, s.tokens, r.values, s.width);
  pair_all_columns(q, r.queries_by_column);
  pair_all_rows(q, r.queries_by_row);
  pair_all_columns(gradients, r.dout_by_column);
  pair_all_rows(gradients, r.dout_by_row);
  bfloat16 block[kBlockSize];
  for (int64_t i = 0; i < s.tokens; i += kSide)
    for (int64_t j = 0; j < s.width; j += kSide) turn(block_at(k, i, j, block), r.keys_turned + j * s.row + i, s.row);
  for (int64_t i = 0; i < s.tokens; ++i) {
    const bool there = i < head.tokens;
    r.delta[i] = there ? -dot(dout + i * out_row, out + i * out_row, head.width) : 0;
    r.lse[i] = there ? -lse[i] * kLog2e : kNever;
  }
  for (int64_t key = 0; key < s.tokens; key += kKeys) {
    const int64_t keys = lesser(kKeys, s.tokens - key);
    for (int64_t number = 0; number < keys; number += kSide) {
      for (int64_t first = 0; first < s.tokens; first += kSpan)
        weigh(head, s, r, key + number, number, first, lesser(kSpan, s.tokens - first));
      const int64_t from = number * s.row;
      store_product(head, s, r.weights + from, r.dout_by_row, 1, key + number, dv, row, r.sums);
      store_product(head, s, r.dlogits + from, r.queries_by_row, head.scale, key + number, dk, row, r.sums);
    }
    for (int64_t column = 0; column < s.width; column += kSide) {
      const bfloat16* rows = r.keys_turned + column * s.row + key;
      for (int64_t query = 0; query < s.tokens; query += kSide) {
        const Product product{rows, rows + kTileRows * s.row, s.row, kTileDepth, keys / kTileDepth, &kFirstTap, 1,
                              r.dlogits_by_row + query * kKeys, kBlockSize};
        float* to = r.dq + column * s.logits + query;
        key ? multiply<true>(product, to, s.logits) : multiply<false>(product, to, s.logits);
      }
    }
  }
  for (int64_t i = 0; i < head.tokens; i += kTileRows)
    for (int64_t j = 0; j < head.width; j += kTileRows) {
      transposed(r.dq + j * s.logits + i, s.logits, r.sums);
      for (int64_t n = 0; n < lesser(kTileRows, head.tokens - i); ++n)
        store_scaled(r.sums + n * kTileRows, head.scale, lesser(kTileRows, head.width - j), dq + (i + n) * row + j);
    }
}

}  // namespace
}  // namespace ADMFAST_ISA

extern const AttentionLoops ADMFAST_LOOPS;
const AttentionLoops ADMFAST_LOOPS = {ADMFAST_LOOPS_NAME, &ADMFAST_ISA::memory, &ADMFAST_ISA::forward,
                                      &ADMFAST_ISA::gradient};

}  // namespace admfast
