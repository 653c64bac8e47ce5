// Layouts of matrices of bfloat16 for the products of tiles.h, made in blocks of 32 by 32. Include it after tiles.h.

namespace admfast {
namespace ADMFAST_ISA {
namespace {

ADMFAST_INLINE int64_t blocks_of(int64_t count) { return (count + kBlockSide - 1) / kBlockSide; }

// A matrix with rows of adjacent elements, `row` elements apart.
struct Matrix {
  const bfloat16* at;
  int64_t row, rows, columns;
};

// The block at (i, j) of a matrix; the part that is outside of the matrix is zero, and such a block is made in `room`.
ADMFAST_INLINE Matrix block_at(const Matrix& m, int64_t i, int64_t j, bfloat16* room) {
  const int64_t rows = lesser(kBlockSide, m.rows - i), columns = lesser(kBlockSide, m.columns - j);
  const bfloat16* from = m.at + i * m.row + j;
  if (rows == kBlockSide && columns == kBlockSide) return {from, m.row, rows, columns};
  __builtin_memset(room, 0, 2 * kBlockSide * kBlockSide);
  for (int64_t r = 0; r < rows; ++r) __builtin_memcpy(room + r * kBlockSide, from + r * m.row, 2 * columns);
  return {room, kBlockSide, kBlockSide, kBlockSide};
}

#if ADMFAST_LEVEL >= 513
// Transpose 16 by 16 numbers of 32 bits.
ADMFAST_INLINE void transpose(__m512i* v) {
  __m512i a[16], b[16];
#pragma GCC unroll 8
  for (int64_t i = 0; i < 16; i += 2) {
    a[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]);
    a[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
  }
#pragma GCC unroll 4
  for (int64_t i = 0; i < 16; i += 4) {
    b[i] = _mm512_unpacklo_epi64(a[i], a[i + 2]);
    b[i + 1] = _mm512_unpackhi_epi64(a[i], a[i + 2]);
    b[i + 2] = _mm512_unpacklo_epi64(a[i + 1], a[i + 3]);
    b[i + 3] = _mm512_unpackhi_epi64(a[i + 1], a[i + 3]);
  }
#pragma GCC unroll 4
  for (int64_t i = 0; i < 4; ++i) {
    a[i] = _mm512_shuffle_i32x4(b[i], b[i + 4], 0x88);
    a[i + 4] = _mm512_shuffle_i32x4(b[i], b[i + 4], 0xDD);
    a[i + 8] = _mm512_shuffle_i32x4(b[i + 8], b[i + 12], 0x88);
    a[i + 12] = _mm512_shuffle_i32x4(b[i + 8], b[i + 12], 0xDD);
  }
#pragma GCC unroll 8
  for (int64_t i = 0; i < 8; ++i) {
    v[i] = _mm512_shuffle_i32x4(a[i], a[i + 8], 0x88);
    v[i + 8] = _mm512_shuffle_i32x4(a[i], a[i + 8], 0xDD);
  }
}

// Columns [first, first + 16) of two rows of a block, in turn.
ADMFAST_INLINE __m512i paired(const bfloat16* even, const bfloat16* odd) {
  const __m512i low = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(even)));
  const __m512i high = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(odd)));
  return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
}
#endif

// A block of B = m: [half][pair r][n][2] = m[2 r][16 half + n], m[2 r + 1][16 half + n].
ADMFAST_INLINE void pair_rows(const Matrix& m, bfloat16* to) {
  for (int64_t half = 0; half < 2; ++half)
    for (int64_t r = 0; r < kTileRows; ++r, to += kTileDepth) {
      const bfloat16* even = m.at + 2 * r * m.row + half * kTileRows;
#if ADMFAST_LEVEL >= 513
      _mm512_storeu_si512(to, paired(even, even + m.row));
#else
      for (int64_t n = 0; n < kTileRows; ++n) to[2 * n] = even[n], to[2 * n + 1] = even[m.row + n];
#endif
    }
}

// A block of B = m^T: [half][pair r][n][2] = m[16 half + n][2 r], m[16 half + n][2 r + 1].
ADMFAST_INLINE void pair_columns(const Matrix& m, bfloat16* to) {
  for (int64_t half = 0; half < 2; ++half, to += kTileSize) {
    const bfloat16* from = m.at + half * kTileRows * m.row;
#if ADMFAST_LEVEL >= 513
    __m512i v[16];
#pragma GCC unroll 16
    for (int64_t n = 0; n < 16; ++n) v[n] = _mm512_loadu_si512(from + n * m.row);
    transpose(v);
#pragma GCC unroll 16
    for (int64_t r = 0; r < 16; ++r) _mm512_storeu_si512(to + r * kTileDepth, v[r]);
#else
    for (int64_t n = 0; n < kTileRows; ++n)
      for (int64_t c = 0; c < kTileDepth; ++c) to[c / 2 * kTileDepth + 2 * n + c % 2] = from[n * m.row + c];
#endif
  }
}

// A block of A = m^T, whose rows are `row` elements apart.
ADMFAST_INLINE void turn(const Matrix& m, bfloat16* to, int64_t row) {
#if ADMFAST_LEVEL >= 513
  for (int64_t half = 0; half < 2; ++half, to += kTileRows * row) {
    const bfloat16* from = m.at + half * kTileRows;
    __m512i v[16];
#pragma GCC unroll 16
    for (int64_t r = 0; r < 16; ++r) v[r] = paired(from + 2 * r * m.row, from + (2 * r + 1) * m.row);
    transpose(v);
#pragma GCC unroll 16
    for (int64_t n = 0; n < 16; ++n) _mm512_storeu_si512(to + n * row, v[n]);
  }
#else
  for (int64_t r = 0; r < kBlockSide; ++r)
    for (int64_t c = 0; c < kBlockSide; ++c) to[c * row + r] = m.at[r * m.row + c];
#endif
}

// The B of a whole matrix: for each 32 columns of B, its blocks from top to bottom.
ADMFAST_INLINE void pair_all_rows(const Matrix& m, bfloat16* to) {
  bfloat16 room[kBlockSide * kBlockSide];
  for (int64_t j = 0; j < m.columns; j += kBlockSide)
    for (int64_t i = 0; i < m.rows; i += kBlockSide, to += kBlockSide * kBlockSide)
      pair_rows(block_at(m, i, j, room), to);
}

ADMFAST_INLINE void pair_all_columns(const Matrix& m, bfloat16* to) {
  bfloat16 room[kBlockSide * kBlockSide];
  for (int64_t i = 0; i < m.rows; i += kBlockSide)
    for (int64_t j = 0; j < m.columns; j += kBlockSide, to += kBlockSide * kBlockSide)
      pair_columns(block_at(m, i, j, room), to);
}

}  // namespace
}  // namespace ADMFAST_ISA
}  // namespace admfast
