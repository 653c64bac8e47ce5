// The loops of the weights and of their gradient, and the struct of all loops. Include it after conv_winograd_loops.h.

namespace admfast {
namespace ADMFAST_ISA {
namespace {

constexpr int64_t kTaps = 3;

// G: the row of a point p has the powers of p, divided by the product of the differences to the other finite points.
constexpr double kToA = 1 / (2.0 * kA2 * (kA2 - kB2)), kToB = 1 / (2.0 * kB2 * (kB2 - kA2));
constexpr double kWeights[kPatch][kTaps] = {{1 / (double{kA2} * kB2), 0, 0},     {kToA, kA* kToA, kA2* kToA},
                                            {kToA, -kA * kToA, kA2* kToA},       {kToB, kB* kToB, kB2* kToB},
                                            {kToB, -kB * kToB, kB2* kToB}, {0, 0, 1}};

// A product of the gradient keeps kGradRows input channels by kAcross vectors of sums in registers. kGradRows divides
// kChunk.
constexpr int64_t kGradRows = ADMFAST_LEVEL >= 512 ? 8 : 4;

void weights(const WinogradWeights& w, int64_t begin, int64_t end, float* u) {
  using Lanes = double[kPanel];
  alignas(64) Lanes taps[kTaps * kTaps] = {}, half[kPatch][kTaps];
  for (int64_t i = begin; i < end; ++i) {
    const int64_t c = i % w.C_in, first = i / w.C_in * kPanel;
    for (int64_t lane = 0; lane < kPanel; ++lane) {
      const float* from = w.from + (first + lane) * w.out_step + c * w.in_step;
      for (int64_t t = 0; t < kTaps * kTaps; ++t)
        taps[t][lane] = first + lane < w.C_out ? from[t / kTaps * w.row_step + t % kTaps * w.column_step] : 0.0;
    }
    for (int64_t p = 0; p < kPatch; ++p)
      for (int64_t t = 0; t < kTaps; ++t)
        for (int64_t lane = 0; lane < kPanel; ++lane)
          half[p][t][lane] = kWeights[p][0] * taps[t][lane] + kWeights[p][1] * taps[kTaps + t][lane] +
                             kWeights[p][2] * taps[2 * kTaps + t][lane];
    for (int64_t p = 0; p < kPoints; ++p) {
      const double* row = kWeights[p % kPatch];
      const Lanes* values = half[p / kPatch];
      float* out = u + ((i / w.C_in * kPoints + p) * w.C_in + c) * kPanel;
      for (int64_t lane = 0; lane < kPanel; ++lane)
        out[lane] = static_cast<float>(row[0] * values[0][lane] + row[1] * values[1][lane] + row[2] * values[2][lane]);
    }
  }
}

// Transform four values to six by A.
template <typename V>
ADMFAST_INLINE void outputs_to_points(const V* d, V* out) {
  const V even_a = fma(V::set(kA2), d[2], d[0]), odd_a = fma(V::set(kA2), d[3], d[1]);
  const V even_b = fma(V::set(kB2), d[2], d[0]), odd_b = fma(V::set(kB2), d[3], d[1]);
  out[0] = d[0];
  out[1] = fma(V::set(kA), odd_a, even_a);
  out[2] = fma(V::set(-kA), odd_a, even_a);
  out[3] = fma(V::set(kB), odd_b, even_b);
  out[4] = fma(V::set(-kB), odd_b, even_b);
  out[5] = d[3];
}

// Transform the outputs of a tile to points, at V::kWidth channels from `c` on.
template <typename V>
ADMFAST_INLINE void gradient_tile(const float* const* outputs, int64_t c, float* e, int64_t e_point) {
  both_ways<V, kTile, kPatch>([&](int64_t i, int64_t j) ADMFAST_INLINED { return V::load(outputs[i * kTile + j] + c); },
                              outputs_to_points<V>,
                              [&](int64_t i, int64_t j, V value) ADMFAST_INLINED {
                                value.store(e + (i * kPatch + j) * e_point);
                              });
}

void gradient_input(const WinogradImages& images, const WinogradBlock& block, int64_t begin, int64_t end, float* e) {
  const int64_t H = images.H, W = images.W, C = images.C_in;
  for (int64_t tile = begin; tile < end; ++tile) {
    const Place at = place_of(block.first + tile, images);
    const float* outputs[kTile * kTile];
    for (int64_t i = 0; i < kTile; ++i)
      for (int64_t j = 0; j < kTile; ++j) {
        const int64_t row = at.row + i, column = at.column + j;
        const bool inside = row < H && column < W;
        outputs[i * kTile + j] = inside ? images.x + ((at.image * H + row) * W + column) * C : images.zeros;
      }
    const auto at_channel = [&](int64_t c) { return e + (c / kPanel * block.tiles + tile) * kPanel + c % kPanel; };
    int64_t c = 0;
    for (; c + Vector::kWidth <= C; c += Vector::kWidth) gradient_tile<Vector>(outputs, c, at_channel(c), block.m_point);
    for (; c < C; ++c) gradient_tile<Scalar>(outputs, c, at_channel(c), block.m_point);
  }
}

// The sums over tiles for kGradRows input channels by kAcross vectors of output channels.
ADMFAST_INLINE void gradient_sums(const float* v, const float* e, int64_t tiles, float* m) {
  Vector sum[kGradRows][kAcross];
#pragma GCC unroll 8
  for (int64_t r = 0; r < kGradRows; ++r)
#pragma GCC unroll 2
    for (int64_t i = 0; i < kAcross; ++i) sum[r][i] = Vector::set(0.0f);
  for (int64_t tile = 0; tile < tiles; ++tile, v += kChunk, e += kPanel) {
    Vector across[kAcross];
#pragma GCC unroll 2
    for (int64_t i = 0; i < kAcross; ++i) across[i] = Vector::load(e + i * Vector::kWidth);
#pragma GCC unroll 8
    for (int64_t r = 0; r < kGradRows; ++r) {
      const Vector value = Vector::set(v[r]);
#pragma GCC unroll 2
      for (int64_t i = 0; i < kAcross; ++i) sum[r][i] = fma(value, across[i], sum[r][i]);
    }
  }
#pragma GCC unroll 8
  for (int64_t r = 0; r < kGradRows; ++r)
#pragma GCC unroll 2
    for (int64_t i = 0; i < kAcross; ++i) sum[r][i].store(m + r * kPanel + i * Vector::kWidth);
}

void gradient_product(const WinogradGradient& p, float* m) {
  for (int64_t point = 0; point < kPoints; ++point, m += kChunk * kPanel)
    for (int64_t r = 0; r < kChunk; r += kGradRows)
      for (int64_t lane = 0; lane < kPanel; lane += kAcross * Vector::kWidth)
        gradient_sums(p.v + point * p.v_point + r, p.e + point * p.e_point + lane, p.tiles, m + r * kPanel + lane);
}

// Transform six values to three by G^T; +p and -p share the sums of even and of odd powers.
template <typename V>
ADMFAST_INLINE void to_taps(const V* m, V* out) {
  constexpr float zero = kWeights[0][0], a = kWeights[1][0], b = kWeights[3][0];
  const V even_a = m[1] + m[2], odd_a = m[1] - m[2];
  const V even_b = m[3] + m[4], odd_b = m[3] - m[4];
  out[0] = fma(V::set(zero), m[0], fma(V::set(a), even_a, V::set(b) * even_b));
  out[1] = fma(V::set(a * kA), odd_a, V::set(b * kB) * odd_b);
  out[2] = fma(V::set(a * kA2), even_a, fma(V::set(b * kB2), even_b, m[5]));
}

void gradient_output(const float* m, bool first, float* dg) {
  constexpr int64_t pairs = kChunk * kPanel;
  for (int64_t at = 0; at < pairs; at += Vector::kWidth)
    both_ways<Vector, kPatch, kTaps>(
        [&](int64_t i, int64_t j) ADMFAST_INLINED { return Vector::load(m + (i * kPatch + j) * pairs + at); },
        to_taps<Vector>,
        [&](int64_t i, int64_t j, Vector value) ADMFAST_INLINED {
          float* sum = dg + (i * kTaps + j) * pairs + at;
          (first ? value : Vector::load(sum) + value).store(sum);
        });
}

}  // namespace
}  // namespace ADMFAST_ISA

const WinogradLoops ADMFAST_LOOPS = {ADMFAST_LOOPS_NAME,
                                     ADMFAST_ISA::kRows,
                                     ADMFAST_ISA::input,
                                     ADMFAST_ISA::product<>,
                                     ADMFAST_ISA::output,
                                     ADMFAST_ISA::weights,
                                     ADMFAST_ISA::gradient_input,
                                     ADMFAST_ISA::gradient_product,
                                     ADMFAST_ISA::gradient_output};

}  // namespace admfast
