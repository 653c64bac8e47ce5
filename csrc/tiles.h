// Products of small matrices in bfloat16, for each instruction set: AMX, AVX-512 with bfloat16, or any.
// Include it after vector.h. A product takes tiles of 16 rows of 32 numbers; a block is two tiles high and two wide.

namespace admfast {
namespace ADMFAST_ISA {
namespace {

constexpr int64_t kTileRows = 16;   // rows of a tile of A and of the sums, columns of a tile of B
constexpr int64_t kTileDepth = 32;  // columns of a tile of A, rows of a tile of B
constexpr int64_t kTileSize = kTileRows * kTileDepth;
constexpr int64_t kBlockSide = 2 * kTileRows;
constexpr int64_t kFirstTap = 0;

ADMFAST_INLINE int64_t lesser(int64_t a, int64_t b) { return a < b ? a : b; }

// sums[i][j] = the sum over chunks k, taps t and c of A[i][32 k + c] of tap t times B[k][t][c][j], for 32 by 32 sums.
// A row of A begins `row` elements after the one before, its chunks are `chunk` elements apart, and tap t begins tap[t]
// elements after the first. B is [chunks][taps] blocks, `step` elements apart, of [2 tiles][16 pairs][16 columns][2].
struct Product {
  const bfloat16 *a0, *a1;  // rows 0 to 15 and 16 to 31
  int64_t row, chunk, chunks;
  const int64_t* tap;
  int64_t taps;
  const bfloat16* b;
  int64_t step;
};

// Store two vectors next to each other; a whole cache line with AVX-512.
ADMFAST_INLINE void store_both(Vector a, Vector b, bfloat16* to) {
#if ADMFAST_LEVEL >= 513
  _mm512_storeu_si512(to, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(b.v, a.v)));
#else
  a.store(to);
  b.store(to + Vector::kWidth);
#endif
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

// Write the sums to rows of `width` floats, or add to what is there.
template <bool kAdd>
ADMFAST_INLINE void multiply(const Product& p, float* sums, int64_t width) {
  float *lower = sums + kTileRows * width, *const halves[] = {sums, sums + kTileRows, lower, lower + kTileRows};
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
  const bfloat16 *a0 = p.a0, *a1 = p.a1, *b = p.b;
  for (int64_t k = 0; k < p.chunks; ++k, a0 += p.chunk, a1 += p.chunk)
    for (int64_t t = 0; t < p.taps; ++t, b += p.step) {
      _tile_loadd(6, b, 64);
      _tile_loadd(4, a0 + p.tap[t], 2 * p.row);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(7, b + kTileSize, 64);
      _tile_dpbf16ps(1, 4, 7);
      _tile_loadd(5, a1 + p.tap[t], 2 * p.row);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  _tile_stored(0, halves[0], 4 * width);
  _tile_stored(1, halves[1], 4 * width);
  _tile_stored(2, halves[2], 4 * width);
  _tile_stored(3, halves[3], 4 * width);
}

#elif ADMFAST_LEVEL == 513
struct Tiles {};

template <bool kAdd>
ADMFAST_INLINE void multiply(const Product& p, float* sums, int64_t width) {
  constexpr int64_t kRows = 8;  // 16 vectors of sums stay in registers
  for (int64_t first = 0; first < kBlockSide; first += kRows) {
    const bfloat16 *a = (first < kTileRows ? p.a0 : p.a1) + first % kTileRows * p.row, *b = p.b;
    float* to = sums + first * width;
    __m512 total[kRows][2];
#pragma GCC unroll 8
    for (int64_t r = 0; r < kRows; ++r) {
      total[r][0] = kAdd ? _mm512_loadu_ps(to + r * width) : _mm512_setzero_ps();
      total[r][1] = kAdd ? _mm512_loadu_ps(to + r * width + kTileRows) : _mm512_setzero_ps();
    }
    for (int64_t k = 0; k < p.chunks; ++k, a += p.chunk)
      for (int64_t t = 0; t < p.taps; ++t, b += p.step)
        for (int64_t c = 0; c < kTileDepth; c += 2) {
          const __m512bh b0 = reinterpret_cast<__m512bh>(_mm512_loadu_si512(b + kTileRows * c));
          const __m512bh b1 = reinterpret_cast<__m512bh>(_mm512_loadu_si512(b + kTileSize + kTileRows * c));
#pragma GCC unroll 8
          for (int64_t r = 0; r < kRows; ++r) {
            int32_t pair;
            __builtin_memcpy(&pair, a + p.tap[t] + r * p.row + c, sizeof pair);
            const __m512bh both = reinterpret_cast<__m512bh>(_mm512_set1_epi32(pair));
            total[r][0] = _mm512_dpbf16_ps(total[r][0], both, b0);
            total[r][1] = _mm512_dpbf16_ps(total[r][1], both, b1);
          }
        }
#pragma GCC unroll 8
    for (int64_t r = 0; r < kRows; ++r) {
      _mm512_storeu_ps(to + r * width, total[r][0]);
      _mm512_storeu_ps(to + r * width + kTileRows, total[r][1]);
    }
  }
}

#else
struct Tiles {};

template <bool kAdd>
ADMFAST_INLINE void multiply(const Product& p, float* sums, int64_t width) {
  for (int64_t i = 0; i < kBlockSide; ++i) {
    const bfloat16 *a = (i < kTileRows ? p.a0 : p.a1) + i % kTileRows * p.row, *b = p.b;
    float* total = sums + i * width;
    for (int64_t j = 0; j < kBlockSide && !kAdd; ++j) total[j] = 0;
    for (int64_t k = 0; k < p.chunks; ++k, a += p.chunk)
      for (int64_t t = 0; t < p.taps; ++t, b += p.step)
        for (int64_t c = 0; c < kTileDepth; ++c) {
          const float value = to_float(a[p.tap[t] + c]);
          const bfloat16* of_c = b + c / 2 * 2 * kTileRows + c % 2;
          for (int64_t j = 0; j < kTileRows; ++j) {
            total[j] += value * to_float(of_c[2 * j]);
            total[j + kTileRows] += value * to_float(of_c[kTileSize + 2 * j]);
          }
        }
  }
}
#endif

}  // namespace
}  // namespace ADMFAST_ISA
}  // namespace admfast
