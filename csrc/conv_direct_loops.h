// The loops of the direct convolution, compiled once for each instruction set (vector.h says how to include this file).

namespace admfast {
namespace ADMFAST_ISA {
namespace {

constexpr int64_t kHalf = kTileRows;
static_assert(kDirectGroup == kTileRows && kDirectPanel == kBlockSide && kDirectChunk<bfloat16> == kTileDepth);
static_assert(kDirectChunk<uint8_t> == ProductOf<uint8_t>::kDepth);

// The sums of a product as floats, for outputs [o, o + kWidth) of a panel.
template <typename V>
struct FloatSums {
  ADMFAST_INLINE FloatSums(const DirectPanel<bfloat16, bfloat16>&, const DirectGroup&, int64_t) {}
  ADMFAST_INLINE V of(const float* sums) const { return V::load(sums); }
};

// sum over (scale_x (q - zero)) (scale_w w) = scale_x scale_w (sum over q w - zero sum over w).
template <typename V>
struct LevelSums {
  V scale, weight_scale;
  int32_t zeros[V::kWidth];
  template <typename Y>
  ADMFAST_INLINE LevelSums(const DirectPanel<uint8_t, Y>& p, const DirectGroup& group, int64_t o)
      : scale(V::set(p.levels[group.image].scale)), weight_scale(V::load(p.weight_scale + o)) {
    for (int64_t i = 0; i < V::kWidth; ++i) zeros[i] = static_cast<int32_t>(p.weight_sum[o + i]) * p.levels[group.image].zero;
  }
  // The difference is exact. A product of the scales might overflow.
  ADMFAST_INLINE V of(const int32_t* sums) const { return V::difference(sums, zeros) * weight_scale * scale; }
};

template <typename V>
ADMFAST_INLINE FloatSums<V> sums_of(const DirectPanel<bfloat16, bfloat16>& p, const DirectGroup& group, int64_t o) {
  return {p, group, o};
}
template <typename V, typename Y>
ADMFAST_INLINE LevelSums<V> sums_of(const DirectPanel<uint8_t, Y>& p, const DirectGroup& group, int64_t o) {
  return {p, group, o};
}

// y = sums + bias + residual for outputs [begin, end) of a panel.
template <typename V, typename T, typename Y, typename Sum>
ADMFAST_INLINE void outputs(const DirectPanel<T, Y>& p, const DirectGroup& group, const Sum* sums, int64_t begin,
                            int64_t end) {
  for (int64_t o = begin; o < end; o += V::kWidth) {
    const auto floats = sums_of<V>(p, group, o);
    for (int64_t r = 0; r < group.rows; ++r) {
      const int64_t at = (group.to + r) * p.stride;
      V y = floats.of(sums + r * kDirectPanel + o);
      if (p.bias) y = y + V::load(p.bias + o);
      if (p.residual) y = y + V::load(p.residual + at + o);
      y.store(p.y + at + o);
    }
  }
}

#if ADMFAST_LEVEL >= 513
// The same for a whole panel: in bfloat16 a cache line of y at a time.
template <typename T, typename Y, typename Sum>
ADMFAST_INLINE void whole_outputs(const DirectPanel<T, Y>& p, const DirectGroup& group, const Sum* sums) {
  Vector bias[2] = {Vector::set(0), Vector::set(0)};
  if (p.bias) bias[0] = Vector::load(p.bias), bias[1] = Vector::load(p.bias + kHalf);
  const auto low = sums_of<Vector>(p, group, 0), high = sums_of<Vector>(p, group, kHalf);
  for (int64_t r = 0; r < group.rows; ++r, sums += kDirectPanel) {
    const int64_t at = (group.to + r) * p.stride;
    Vector y0 = low.of(sums) + bias[0], y1 = high.of(sums + kHalf) + bias[1];
    if (p.residual) y0 = y0 + Vector::load(p.residual + at), y1 = y1 + Vector::load(p.residual + at + kHalf);
    store_both(y0, y1, p.y + at);
  }
}

// Fetch the lines that `whole_outputs` will need while the products are computed.
template <typename T, typename Y>
ADMFAST_INLINE void fetch_outputs(const DirectPanel<T, Y>& p, const DirectGroup& group) {
  for (int64_t r = 0; r < group.rows; ++r) {
    for (int64_t o = 0; o < kDirectPanel; o += 64 / sizeof(Y)) {
      const int64_t at = (group.to + r) * p.stride + o;
      if (p.residual) _mm_prefetch(reinterpret_cast<const char*>(p.residual + at), _MM_HINT_T0);
      __builtin_prefetch(p.y + at, 1);
    }
  }
}
#endif

template <typename T, typename Y>
void panel(const DirectPanel<T, Y>& p) {
  [[maybe_unused]] const Tiles tiles;
  alignas(64) typename Factors<T>::Sum sums[kBlockSide * kBlockSide];
  constexpr int64_t kSumsOfGroup = kTileRows * kBlockSide;
  for (int64_t i = 0; i < p.count; i += 2) {
    const int64_t last = lesser(i + 1, p.count - 1);
    const ProductOf<T> product{p.x + p.groups[i].from, p.x + p.groups[last].from, p.row, p.chunk, p.chunks, p.tap,
                               p.taps, p.w, kDirectStep<T>};
#if ADMFAST_LEVEL >= 513
    if (p.outputs == kDirectPanel) {
      for (int64_t group = i; group <= last; ++group) fetch_outputs(p, p.groups[group]);
      multiply<false, T>(product, sums, kBlockSide);
      for (int64_t group = i; group <= last; ++group)
        whole_outputs(p, p.groups[group], sums + (group - i) * kSumsOfGroup);
      continue;
    }
#endif
    multiply<false, T>(product, sums, kBlockSide);
    for (int64_t group = i; group <= last; ++group) {
      const int64_t whole = p.outputs / Vector::kWidth * Vector::kWidth;
      outputs<Vector>(p, p.groups[group], sums + (group - i) * kSumsOfGroup, 0, whole);
      outputs<Scalar>(p, p.groups[group], sums + (group - i) * kSumsOfGroup, whole, p.outputs);
    }
  }
}

void pack(const bfloat16* from, int64_t count, int64_t channels, bfloat16* to, int64_t chunk) {
  for (int64_t i = 0; i < count; ++i, from += channels, to += kTileDepth) {
    bfloat16* place = to;
    int64_t c = 0;
    for (; c + kTileDepth <= channels; c += kTileDepth, place += chunk) __builtin_memcpy(place, from + c, 2 * kTileDepth);
    if (c == channels) continue;
    __builtin_memset(place, 0, 2 * kTileDepth);
    __builtin_memcpy(place, from + c, 2 * (channels - c));
  }
}

ADMFAST_INLINE uint8_t level_of(float x, float inverse, int32_t zero) {
  constexpr float kMagic = 0x1.8p23f;  // adding and subtracting it rounds to a whole number
  const float level = ((x * inverse + kMagic) - kMagic) + static_cast<float>(zero);
  return static_cast<uint8_t>(level < 0.0f ? 0.0f : level < 255.0f ? level : 255.0f);
}

// Write the levels of `count` numbers.
template <typename Y>
ADMFAST_INLINE void levels_of(const Y* from, int64_t count, const DirectLevels& levels, uint8_t* to) {
  const float inverse = 1.0f / levels.scale;
  int64_t i = 0;
#if ADMFAST_LEVEL >= 513
  const Vector inverses = Vector::set(inverse);
  const __m512i zero = _mm512_set1_epi32(levels.zero), none = _mm512_setzero_si512();
  for (; i + 16 <= count; i += 16) {
    const __m512i steps = _mm512_cvtps_epi32((Vector::load(from + i) * inverses).v);  // rounded to the nearest
    const __m512i level = _mm512_max_epi32(_mm512_add_epi32(steps, zero), none);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), _mm512_cvtusepi32_epi8(level));
  }
#endif
  for (; i < count; ++i) to[i] = level_of(to_float(from[i]), inverse, levels.zero);
}

template <typename Y>
void pack_int8(const Y* from, int64_t count, int64_t channels, const DirectLevels& levels, uint8_t* to, int64_t chunk) {
  constexpr int64_t kDepth = kDirectChunk<uint8_t>;
  for (int64_t i = 0; i < count; ++i, from += channels, to += kDepth) {
    uint8_t* place = to;
    int64_t c = 0;
    for (; c + kDepth <= channels; c += kDepth, place += chunk) levels_of(from + c, kDepth, levels, place);
    // The weights of the channels behind the last one are 0, so their levels can be anything.
    if (c < channels) levels_of(from + c, channels - c, levels, place);
  }
}

// Bits of numbers as whole numbers of the same order, and back; NaN comes before or after all others.
ADMFAST_INLINE int32_t ordered(int32_t bits) { return bits ^ static_cast<int32_t>(static_cast<uint32_t>(bits >> 31) >> 1); }
ADMFAST_INLINE int32_t order_of(float x) { return ordered(static_cast<int32_t>(bits_of_float(x))); }
ADMFAST_INLINE float of_order(int32_t order) { return float_of_bits(static_cast<uint32_t>(ordered(order))); }

struct Range {
  int32_t low = 0, high = 0;
  ADMFAST_INLINE void take(int32_t order) {
    low = order < low ? order : low;
    high = order > high ? order : high;
  }
};

template <typename Y>
void range(const Y* from, int64_t count, float* least, float* most) {
  Range found;
  int64_t i = 0;
#if ADMFAST_LEVEL >= 513
  __m512i low = _mm512_setzero_si512(), high = low;
  for (; i + 16 <= count; i += 16) {
    const __m512i bits = _mm512_castps_si512(Vector::load(from + i).v);
    const __m512i order = _mm512_xor_si512(bits, _mm512_srli_epi32(_mm512_srai_epi32(bits, 31), 1));
    low = _mm512_min_epi32(low, order);
    high = _mm512_max_epi32(high, order);
  }
  found.take(_mm512_reduce_min_epi32(low));
  found.take(_mm512_reduce_max_epi32(high));
#endif
  for (; i < count; ++i) found.take(order_of(to_float(from[i])));
  *least = of_order(found.low);
  *most = of_order(found.high);
}

}  // namespace
}  // namespace ADMFAST_ISA

extern const DirectLoops ADMFAST_LOOPS;
const DirectLoops ADMFAST_LOOPS = {
    ADMFAST_LOOPS_NAME,
    &ADMFAST_ISA::panel<bfloat16, bfloat16>,
    &ADMFAST_ISA::pack,
    {&ADMFAST_ISA::panel<uint8_t, bfloat16>, &ADMFAST_ISA::pack_int8<bfloat16>, &ADMFAST_ISA::range<bfloat16>},
    {&ADMFAST_ISA::panel<uint8_t, float>, &ADMFAST_ISA::pack_int8<float>, &ADMFAST_ISA::range<float>},
};

}  // namespace admfast
