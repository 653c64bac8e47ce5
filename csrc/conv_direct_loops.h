// The loops of the direct convolution, compiled once for each instruction set (vector.h says how to include this file).

namespace admfast {
namespace ADMFAST_ISA {
namespace {

constexpr int64_t kGroup = kDirectGroup, kChunk = kDirectChunk, kStep = kDirectStep;
constexpr int64_t kHalf = kDirectPanel / 2;
constexpr int64_t kSums = kGroup * kHalf;  // of a group and half a panel

ADMFAST_INLINE int64_t lesser(int64_t a, int64_t b) { return a < b ? a : b; }

// sums [2 groups][2 halves][16 positions][16 outputs] of the groups that begin at a0 and a1.
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

ADMFAST_INLINE void product(const DirectPanel& p, const bfloat16* a0, const bfloat16* a1, float* sums) {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  const bfloat16* w = p.w;
  const int64_t row = 2 * p.row;
  for (int64_t k = 0; k < p.chunks; ++k, a0 += p.chunk, a1 += p.chunk)
    for (int64_t t = 0; t < p.taps; ++t, w += kStep) {
      _tile_loadd(6, w, 64);
      _tile_loadd(4, a0 + p.tap[t], row);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(7, w + kStep / 2, 64);
      _tile_dpbf16ps(1, 4, 7);
      _tile_loadd(5, a1 + p.tap[t], row);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  _tile_stored(0, sums, 64);
  _tile_stored(1, sums + kSums, 64);
  _tile_stored(2, sums + 2 * kSums, 64);
  _tile_stored(3, sums + 3 * kSums, 64);
}
#elif ADMFAST_LEVEL == 513
struct Tiles {};

ADMFAST_INLINE void product(const DirectPanel& p, const bfloat16* a0, const bfloat16* a1, float* sums) {
  constexpr int64_t kRows = 8;  // 16 vectors of sums stay in registers
  for (int64_t first = 0; first < 2 * kGroup; first += kRows) {
    const bfloat16 *a = (first < kGroup ? a0 : a1) + first % kGroup * p.row, *w = p.w;
    float* to = sums + first / kGroup * 2 * kSums + first % kGroup * kHalf;
    __m512 total[kRows][2];
#pragma GCC unroll 8
    for (int64_t r = 0; r < kRows; ++r) total[r][0] = total[r][1] = _mm512_setzero_ps();
    for (int64_t k = 0; k < p.chunks; ++k, a += p.chunk)
      for (int64_t t = 0; t < p.taps; ++t, w += kStep)
        for (int64_t c = 0; c < kChunk / 2; ++c) {
          const __m512bh w0 = reinterpret_cast<__m512bh>(_mm512_loadu_si512(w + 2 * kHalf * c));
          const __m512bh w1 = reinterpret_cast<__m512bh>(_mm512_loadu_si512(w + kStep / 2 + 2 * kHalf * c));
#pragma GCC unroll 8
          for (int64_t r = 0; r < kRows; ++r) {
            int32_t pair;
            __builtin_memcpy(&pair, a + p.tap[t] + r * p.row + 2 * c, sizeof pair);
            const __m512bh both = reinterpret_cast<__m512bh>(_mm512_set1_epi32(pair));
            total[r][0] = _mm512_dpbf16_ps(total[r][0], both, w0);
            total[r][1] = _mm512_dpbf16_ps(total[r][1], both, w1);
          }
        }
#pragma GCC unroll 8
    for (int64_t r = 0; r < kRows; ++r) {
      _mm512_storeu_ps(to + r * kHalf, total[r][0]);
      _mm512_storeu_ps(to + r * kHalf + kSums, total[r][1]);
    }
  }
}
#else
struct Tiles {};

ADMFAST_INLINE void product(const DirectPanel& p, const bfloat16* a0, const bfloat16* a1, float* sums) {
  for (int64_t i = 0; i < 4 * kSums; ++i) sums[i] = 0;
  for (int64_t group = 0; group < 2; ++group)
    for (int64_t r = 0; r < kGroup; ++r) {
      const bfloat16 *a = (group ? a1 : a0) + r * p.row, *w = p.w;
      float* total = sums + 2 * group * kSums + r * kHalf;
      for (int64_t k = 0; k < p.chunks; ++k, a += p.chunk)
        for (int64_t t = 0; t < p.taps; ++t, w += kStep)
          for (int64_t c = 0; c < kChunk; ++c) {
            const float value = to_float(a[p.tap[t] + c]);
            const bfloat16* of_c = w + c / 2 * 2 * kHalf + c % 2;
            for (int64_t o = 0; o < kHalf; ++o) {
              total[o] += value * to_float(of_c[2 * o]);
              total[o + kSums] += value * to_float(of_c[kStep / 2 + 2 * o]);
            }
          }
    }
}
#endif

// y = sums + bias + residual for `rows` positions and `count` outputs of half a panel.
template <typename V>
ADMFAST_INLINE void outputs(const DirectPanel& p, const DirectGroup& group, const float* sums, int64_t first,
                            int64_t begin, int64_t end) {
  for (int64_t r = 0; r < group.rows; ++r) {
    const int64_t at = (group.to + r) * p.stride + first;
    for (int64_t o = begin; o < end; o += V::kWidth) {
      V y = V::load(sums + r * kHalf + o);
      if (p.bias) y = y + V::load(p.bias + first + o);
      if (p.residual) y = y + V::load(p.residual + at + o);
      y.store(p.y + at + o);
    }
  }
}

#if ADMFAST_LEVEL >= 513
// The same for a whole panel: a cache line of y at a time.
ADMFAST_INLINE void whole_outputs(const DirectPanel& p, const DirectGroup& group, const float* sums) {
  Vector bias[2] = {Vector::set(0), Vector::set(0)};
  if (p.bias) bias[0] = Vector::load(p.bias), bias[1] = Vector::load(p.bias + kHalf);
  for (int64_t r = 0; r < group.rows; ++r, sums += kHalf) {
    const int64_t at = (group.to + r) * p.stride;
    Vector y0 = Vector::load(sums) + bias[0], y1 = Vector::load(sums + kSums) + bias[1];
    if (p.residual) y0 = y0 + Vector::load(p.residual + at), y1 = y1 + Vector::load(p.residual + at + kHalf);
    _mm512_storeu_si512(p.y + at, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(y1.v, y0.v)));
  }
}

// Fetch the lines that `whole_outputs` will need while the products are computed.
ADMFAST_INLINE void fetch_outputs(const DirectPanel& p, const DirectGroup& group) {
  for (int64_t r = 0; r < group.rows; ++r) {
    const int64_t at = (group.to + r) * p.stride;
    if (p.residual) _mm_prefetch(reinterpret_cast<const char*>(p.residual + at), _MM_HINT_T0);
    __builtin_prefetch(p.y + at, 1);
  }
}
#endif

void panel(const DirectPanel& p) {
  [[maybe_unused]] const Tiles tiles;
  alignas(64) float sums[4 * kSums];
  for (int64_t i = 0; i < p.count; i += 2) {
    const int64_t last = lesser(i + 1, p.count - 1);
#if ADMFAST_LEVEL >= 513
    const bool whole = p.outputs == kDirectPanel;
    for (int64_t group = i; group <= last && whole; ++group) fetch_outputs(p, p.groups[group]);
#endif
    product(p, p.x + p.groups[i].from, p.x + p.groups[last].from, sums);
#if ADMFAST_LEVEL >= 513
    if (whole) {
      for (int64_t group = i; group <= last; ++group) whole_outputs(p, p.groups[group], sums + 2 * (group - i) * kSums);
      continue;
    }
#endif
    for (int64_t group = i; group <= last; ++group)
      for (int64_t first = 0; first < p.outputs; first += kHalf) {
        const float* half = sums + (2 * (group - i) + first / kHalf) * kSums;
        const int64_t count = lesser(kHalf, p.outputs - first), whole = count / Vector::kWidth * Vector::kWidth;
        outputs<Vector>(p, p.groups[group], half, first, 0, whole);
        outputs<Scalar>(p, p.groups[group], half, first, whole, count);
      }
  }
}

void pack(const bfloat16* from, int64_t count, int64_t channels, bfloat16* to, int64_t chunk) {
  for (int64_t i = 0; i < count; ++i, from += channels, to += kChunk) {
    bfloat16* place = to;
    int64_t c = 0;
    for (; c + kChunk <= channels; c += kChunk, place += chunk) __builtin_memcpy(place, from + c, 2 * kChunk);
    if (c == channels) continue;
    __builtin_memset(place, 0, 2 * kChunk);
    __builtin_memcpy(place, from + c, 2 * (channels - c));
  }
}

}  // namespace
}  // namespace ADMFAST_ISA

extern const DirectLoops ADMFAST_LOOPS;
const DirectLoops ADMFAST_LOOPS = {ADMFAST_LOOPS_NAME, &ADMFAST_ISA::panel, &ADMFAST_ISA::pack};

}  // namespace admfast
