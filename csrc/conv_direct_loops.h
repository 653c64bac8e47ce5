// The loops of the direct convolution, compiled once for each instruction set (vector.h says how to include this file).

namespace admfast {
namespace ADMFAST_ISA {
namespace {

constexpr int64_t kHalf = kTileRows;
static_assert(kDirectGroup == kTileRows && kDirectChunk == kTileDepth && kDirectPanel == kBlockSide);

// y = sums + bias + residual for outputs [begin, end) of a panel.
template <typename V>
ADMFAST_INLINE void outputs(const DirectPanel& p, const DirectGroup& group, const float* sums, int64_t begin,
                            int64_t end) {
  for (int64_t r = 0; r < group.rows; ++r) {
    const int64_t at = (group.to + r) * p.stride;
    for (int64_t o = begin; o < end; o += V::kWidth) {
      V y = V::load(sums + r * kDirectPanel + o);
      if (p.bias) y = y + V::load(p.bias + o);
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
  for (int64_t r = 0; r < group.rows; ++r, sums += kDirectPanel) {
    const int64_t at = (group.to + r) * p.stride;
    Vector y0 = Vector::load(sums) + bias[0], y1 = Vector::load(sums + kHalf) + bias[1];
    if (p.residual) y0 = y0 + Vector::load(p.residual + at), y1 = y1 + Vector::load(p.residual + at + kHalf);
    store_both(y0, y1, p.y + at);
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
  alignas(64) float sums[kBlockSide * kBlockSide];
  constexpr int64_t kSumsOfGroup = kTileRows * kBlockSide;
  for (int64_t i = 0; i < p.count; i += 2) {
    const int64_t last = lesser(i + 1, p.count - 1);
    const Product product{p.x + p.groups[i].from, p.x + p.groups[last].from, p.row, p.chunk, p.chunks, p.tap, p.taps,
                          p.w,                    kDirectStep};
#if ADMFAST_LEVEL >= 513
    if (p.outputs == kDirectPanel) {
      for (int64_t group = i; group <= last; ++group) fetch_outputs(p, p.groups[group]);
      multiply<false>(product, sums, kBlockSide);
      for (int64_t group = i; group <= last; ++group)
        whole_outputs(p, p.groups[group], sums + (group - i) * kSumsOfGroup);
      continue;
    }
#endif
    multiply<false>(product, sums, kBlockSide);
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

}  // namespace
}  // namespace ADMFAST_ISA

extern const DirectLoops ADMFAST_LOOPS;
const DirectLoops ADMFAST_LOOPS = {ADMFAST_LOOPS_NAME, &ADMFAST_ISA::panel, &ADMFAST_ISA::pack};

}  // namespace admfast
