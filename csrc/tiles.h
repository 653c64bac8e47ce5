// Products of small matrices in bfloat16 or of 8 bits, for each instruction set: AMX, AVX-512 with bfloat16, or any.
// Include it after factors.h and vector.h. A product takes tiles of 16 rows of 64 bytes; a block is two tiles high and two wide.

namespace admfast {
namespace ADMFAST_ISA {
namespace {

constexpr int64_t kTileRows = 16;   // rows of a tile of A and of the sums, columns of a tile of B
constexpr int64_t kTileDepth = 32;  // columns of a tile of A, rows of a tile of B, in bfloat16
constexpr int64_t kTileSize = kTileRows * kTileDepth;
constexpr int64_t kBlockSide = 2 * kTileRows;
constexpr int64_t kFirstTap = 0;

ADMFAST_INLINE int64_t lesser(int64_t a, int64_t b) { return a < b ? a : b; }

// sums[i][j] = the sum over chunks k, taps t and c of A[i][depth k + c] of tap t times B[k][t][c][j], for 32 by 32 sums
// and a depth of 64 bytes. A row of A begins `row` elements after the one before, its chunks are `chunk` elements apart,
// and tap t begins tap[t] elements after the first. B is [chunks][taps] blocks, `step` elements apart, of [2 tiles]
// [16 words][16 columns][numbers of a word of 32 bits].
template <typename T>
struct ProductOf {
  const T *a0, *a1;  // rows 0 to 15 and 16 to 31
  int64_t row, chunk, chunks;
  const int64_t* tap;
  int64_t taps;
  const typename Factors<T>::Right* b;
  int64_t step;
  static constexpr int64_t kWord = 4 / sizeof(T), kDepth = 16 * kWord, kTile = kTileRows * kDepth;
};
using Product = ProductOf<bfloat16>;

// Store two vectors next to each other; in bfloat16 a whole cache line with AVX-512.
ADMFAST_INLINE void store_both(Vector a, Vector b, bfloat16* to) {
#if ADMFAST_LEVEL >= 513
  _mm512_storeu_si512(to, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(b.v, a.v)));
#else
  a.store(to);
  b.store(to + Vector::kWidth);
#endif
}
ADMFAST_INLINE void store_both(Vector a, Vector b, float* to) {
  a.store(to);
  b.store(to + Vector::kWidth);
}

#if ADMFAST_LEVEL == 514
struct alignas(64) TileShapes {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// Tiles of 16 rows of 64 bytes, for as long as it lives. oneDNN loads its own shapes before it uses tiles.
struct Tiles {
  Tiles() {
    const TileShapes shapes;
    _tile_loadconfig(&shapes);
  }
  ~Tiles() { _tile_release(); }
};

// sums (tile kSums) += tile kA times tile kB.
#define ADMFAST_ADD_PRODUCT(kSums, kA, kB)   \
  if constexpr (sizeof(T) == 1)              \
    _tile_dpbusd(kSums, kA, kB);             \
  else                                       \
    _tile_dpbf16ps(kSums, kA, kB)

// Write the sums to rows of `width` numbers, or add to what is there.
template <bool kAdd, typename T = bfloat16>
ADMFAST_INLINE void multiply(const ProductOf<T>& p, typename Factors<T>::Sum* sums, int64_t width) {
  using Sum = typename Factors<T>::Sum;
  Sum *lower = sums + kTileRows * width, *const halves[] = {sums, sums + kTileRows, lower, lower + kTileRows};
  if (kAdd) {
    _tile_loadd(0, halves[0], 4 * width);
    _tile_loadd(1, halves[1], 4 * width);
    _tile_loadd(2, halves[2], 4 * width);
    _tile_loadd(3, halves[3], 4 * width);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  const T *a0 = p.a0, *a1 = p.a1;
  auto* b = p.b;
  for (int64_t k = 0; k < p.chunks; ++k, a0 += p.chunk, a1 += p.chunk)
    for (int64_t t = 0; t < p.taps; ++t, b += p.step) {
      _tile_loadd(6, b, 64);
      _tile_loadd(4, a0 + p.tap[t], sizeof(T) * p.row);
      ADMFAST_ADD_PRODUCT(0, 4, 6);
      _tile_loadd(7, b + p.kTile, 64);
      ADMFAST_ADD_PRODUCT(1, 4, 7);
      _tile_loadd(5, a1 + p.tap[t], sizeof(T) * p.row);
      ADMFAST_ADD_PRODUCT(2, 5, 6);
      ADMFAST_ADD_PRODUCT(3, 5, 7);
    }
  _tile_stored(0, halves[0], 4 * width);
  _tile_stored(1, halves[1], 4 * width);
  _tile_stored(2, halves[2], 4 * width);
  _tile_stored(3, halves[3], 4 * width);
}
#undef ADMFAST_ADD_PRODUCT

#elif ADMFAST_LEVEL == 513
struct Tiles {};

ADMFAST_INLINE __m512i plus_product(__m512i sums, __m512i a, __m512i b, const bfloat16*) {
  const __m512bh pairs = reinterpret_cast<__m512bh>(a), by = reinterpret_cast<__m512bh>(b);
  return _mm512_castps_si512(_mm512_dpbf16_ps(_mm512_castsi512_ps(sums), pairs, by));
}
ADMFAST_INLINE __m512i plus_product(__m512i sums, __m512i a, __m512i b, const uint8_t*) {
  return _mm512_dpbusd_epi32(sums, a, b);
}

template <bool kAdd, typename T = bfloat16>
ADMFAST_INLINE void multiply(const ProductOf<T>& p, typename Factors<T>::Sum* sums, int64_t width) {
  constexpr int64_t kRows = 8;  // 16 vectors of sums stay in registers
  for (int64_t first = 0; first < kBlockSide; first += kRows) {
    const T* a = (first < kTileRows ? p.a0 : p.a1) + first % kTileRows * p.row;
    auto* b = p.b;
    auto* to = sums + first * width;
    __m512i total[kRows][2];
#pragma GCC unroll 8
    for (int64_t r = 0; r < kRows; ++r) {
      total[r][0] = kAdd ? _mm512_loadu_si512(to + r * width) : _mm512_setzero_si512();
      total[r][1] = kAdd ? _mm512_loadu_si512(to + r * width + kTileRows) : _mm512_setzero_si512();
    }
    for (int64_t k = 0; k < p.chunks; ++k, a += p.chunk)
      for (int64_t t = 0; t < p.taps; ++t, b += p.step)
        for (int64_t c = 0; c < p.kDepth; c += p.kWord) {
          const __m512i b0 = _mm512_loadu_si512(b + kTileRows * c);
          const __m512i b1 = _mm512_loadu_si512(b + p.kTile + kTileRows * c);
#pragma GCC unroll 8
          for (int64_t r = 0; r < kRows; ++r) {
            int32_t word;
            __builtin_memcpy(&word, a + p.tap[t] + r * p.row + c, sizeof word);
            const __m512i words = _mm512_set1_epi32(word);
            total[r][0] = plus_product(total[r][0], words, b0, a);
            total[r][1] = plus_product(total[r][1], words, b1, a);
          }
        }
#pragma GCC unroll 8
    for (int64_t r = 0; r < kRows; ++r) {
      _mm512_storeu_si512(to + r * width, total[r][0]);
      _mm512_storeu_si512(to + r * width + kTileRows, total[r][1]);
    }
  }
}

#else
struct Tiles {};

ADMFAST_INLINE float number(bfloat16 value) { return to_float(value); }
ADMFAST_INLINE int32_t number(uint8_t value) { return value; }
ADMFAST_INLINE int32_t number(int8_t value) { return value; }

template <bool kAdd, typename T = bfloat16>
ADMFAST_INLINE void multiply(const ProductOf<T>& p, typename Factors<T>::Sum* sums, int64_t width) {
  for (int64_t i = 0; i < kBlockSide; ++i) {
    const T* a = (i < kTileRows ? p.a0 : p.a1) + i % kTileRows * p.row;
    auto* b = p.b;
    auto* total = sums + i * width;
    for (int64_t j = 0; j < kBlockSide && !kAdd; ++j) total[j] = 0;
    for (int64_t k = 0; k < p.chunks; ++k, a += p.chunk)
      for (int64_t t = 0; t < p.taps; ++t, b += p.step)
        for (int64_t c = 0; c < p.kDepth; ++c) {
          const auto value = number(a[p.tap[t] + c]);
          auto* of_c = b + c / p.kWord * p.kWord * kTileRows + c % p.kWord;
          for (int64_t j = 0; j < kTileRows; ++j) {
            total[j] += value * number(of_c[p.kWord * j]);
            total[j + kTileRows] += value * number(of_c[p.kTile + p.kWord * j]);
          }
        }
  }
}
#endif

}  // namespace
}  // namespace ADMFAST_ISA
}  // namespace admfast
