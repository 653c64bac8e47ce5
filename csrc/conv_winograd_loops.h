// The loops of the convolution, compiled once for each instruction set (vector.h says how to include this file).

namespace admfast {
namespace ADMFAST_ISA {
namespace {

constexpr int64_t kTile = kWinogradTile, kPatch = kWinogradPatch, kPoints = kWinogradPoints;
constexpr int64_t kPanel = kWinogradPanel, kChunk = kWinogradChunk;

// A product keeps kRows x kAcross vectors of sums in registers: 28 of the 32 of AVX-512, else 12 of 16. The weights and
// one broadcast value fit into the others, so that nothing is spilled.
constexpr int64_t kAcross = 2;
constexpr int64_t kRows = ADMFAST_LEVEL >= 512 ? 14 : 6;

// Chunks (64 channels in all) that are summed before their sum is added to M. One running sum over 1152 channels would
// have three times the error, 3.1e-6 instead of 0.9e-6 for outputs of order one, and is at most 4 % faster.
constexpr int64_t kSum = 4;

// The points are 0, +-a, +-b and infinity. Of all a and b that are multiples of a quarter, these have the least error
// (see admfast/ops/conv/winograd.py). Every coefficient below is exact in float32.
constexpr float kA = 0.75f, kB = 1.5f, kA2 = kA * kA, kB2 = kB * kB;

// Not std::min: no function of the standard library may be compiled for this instruction set.
ADMFAST_INLINE int64_t lesser(int64_t a, int64_t b) { return a < b ? a : b; }

// Transform six values to six by B^T; +p and -p share the sums of even and of odd powers.
template <typename V>
ADMFAST_INLINE void to_points(const V* d, V* out) {
  const V even_a = fma(V::set(-kB2), d[2], d[4]), odd_a = fma(V::set(-kB2), d[1], d[3]);
  const V even_b = fma(V::set(-kA2), d[2], d[4]), odd_b = fma(V::set(-kA2), d[1], d[3]);
  const V product = V::set(kA2 * kB2), sum = V::set(-(kA2 + kB2));
  out[0] = fma(product, d[0], fma(sum, d[2], d[4]));
  out[1] = fma(V::set(kA), odd_a, even_a);
  out[2] = fma(V::set(-kA), odd_a, even_a);
  out[3] = fma(V::set(kB), odd_b, even_b);
  out[4] = fma(V::set(-kB), odd_b, even_b);
  out[5] = fma(product, d[1], fma(sum, d[3], d[5]));
}

// Transform six values to four by A^T.
template <typename V>
ADMFAST_INLINE void from_points(const V* m, V* out) {
  const V even_a = m[1] + m[2], odd_a = m[1] - m[2];
  const V even_b = m[3] + m[4], odd_b = m[3] - m[4];
  out[0] = m[0] + even_a + even_b;
  out[1] = fma(V::set(kA), odd_a, V::set(kB) * odd_b);
  out[2] = fma(V::set(kA2), even_a, V::set(kB2) * even_b);
  out[3] = fma(V::set(kA * kA2), odd_a, fma(V::set(kB * kB2), odd_b, m[5]));
}

// The image of a tile, and the row and column of its first output.
struct Place {
  int64_t image, row, column;
};

ADMFAST_INLINE Place place_of(int64_t tile, const WinogradImages& images) {
  const int64_t across = (images.W + kTile - 1) / kTile, down = (images.H + kTile - 1) / kTile;
  return {tile / (across * down), tile / across % down * kTile, tile % across * kTile};
}

// Transform kFrom values to kTo, first in the columns of a square and then in its rows. `load(i, j)` gives the value in
// row i and column j, `store(i, j, value)` takes a result; rows from `rows` on are not computed.
template <typename V, int64_t kFrom, int64_t kTo, typename Load, typename Transform, typename Store>
ADMFAST_INLINE void both_ways(Load load, Transform transform, Store store, int64_t rows = kTo) {
  V half[kTo * kFrom];
#pragma GCC unroll 6
  for (int64_t j = 0; j < kFrom; ++j) {
    V column[kFrom], made[kTo];
#pragma GCC unroll 6
    for (int64_t i = 0; i < kFrom; ++i) column[i] = load(i, j);
    transform(column, made);
#pragma GCC unroll 6
    for (int64_t i = 0; i < kTo; ++i) half[i * kFrom + j] = made[i];
  }
#pragma GCC unroll 6
  for (int64_t i = 0; i < kTo; ++i) {
    if (i >= rows) return;
    V made[kTo];
    transform(half + i * kFrom, made);
#pragma GCC unroll 6
    for (int64_t j = 0; j < kTo; ++j) store(i, j, made[j]);
  }
}

// For the lambdas that `both_ways` is given: without it the compiler would make 36 calls instead of inlining them.
#define ADMFAST_INLINED __attribute__((always_inline))

// Transform the patch of a tile, at V::kWidth channels from `c` on.
template <typename V>
ADMFAST_INLINE void input_tile(const float* const* patch, int64_t c, float* v, int64_t v_point) {
  both_ways<V, kPatch, kPatch>([&](int64_t i, int64_t j) ADMFAST_INLINED { return V::load(patch[i * kPatch + j] + c); },
                               to_points<V>,
                               [&](int64_t i, int64_t j, V value) ADMFAST_INLINED {
                                 value.store(v + (i * kPatch + j) * v_point);
                               });
}

void input(const WinogradImages& images, const WinogradBlock& block, int64_t begin, int64_t end, float* v) {
  const int64_t H = images.H, W = images.W, C = images.C_in;
  for (int64_t tile = begin; tile < end; ++tile) {
    const Place at = place_of(block.first + tile, images);
    const float* patch[kPoints];
    for (int64_t i = 0; i < kPatch; ++i)
      for (int64_t j = 0; j < kPatch; ++j) {
        const int64_t row = at.row + i - 1, column = at.column + j - 1;
        const bool inside = row >= 0 && row < H && column >= 0 && column < W;
        patch[i * kPatch + j] = inside ? images.x + ((at.image * H + row) * W + column) * C : images.zeros;
      }
    const int64_t group = tile / block.rows, row = tile - group * block.rows;
    float* own = v + (group * block.chunks * block.rows + row) * kChunk;
    const auto at_channel = [&](int64_t c) { return own + c / kChunk * block.rows * kChunk + c % kChunk; };
    int64_t c = 0;
    for (; c + Vector::kWidth <= C; c += Vector::kWidth) input_tile<Vector>(patch, c, at_channel(c), block.v_point);
    for (; c < C; ++c) input_tile<Scalar>(patch, c, at_channel(c), block.v_point);
  }
}

// A product of kCount rows, with kAcross vectors of the panel at a time.
template <int64_t kCount>
void product_of(const WinogradProduct& p) {
  const int64_t chunks = (p.C_in + kChunk - 1) / kChunk;
  for (int64_t lane = 0; lane < kPanel; lane += kAcross * Vector::kWidth) {
    for (int64_t first = 0; first < chunks; first += kSum) {
      Vector sum[kCount][kAcross];
#pragma GCC unroll 16
      for (int64_t r = 0; r < kCount; ++r)
#pragma GCC unroll 2
        for (int64_t i = 0; i < kAcross; ++i) sum[r][i] = Vector::set(0.0f);
      for (int64_t chunk = first; chunk < lesser(first + kSum, chunks); ++chunk) {
        const float* v = p.v + chunk * p.stride * kChunk;
        const float* u = p.u + chunk * kChunk * kPanel + lane;
        if (lane == 0)
          for (int64_t line = 0; line < p.lines; ++line) __builtin_prefetch(p.ahead + (chunk * p.lines + line) * 16, 0, 2);
        const int64_t channels = lesser(kChunk, p.C_in - chunk * kChunk);
        for (int64_t c = 0; c < channels; ++c, ++v, u += kPanel) {
          Vector weights[kAcross];
#pragma GCC unroll 2
          for (int64_t i = 0; i < kAcross; ++i) weights[i] = Vector::load(u + i * Vector::kWidth);
#pragma GCC unroll 16
          for (int64_t r = 0; r < kCount; ++r) {
            const Vector value = Vector::set(v[r * kChunk]);
#pragma GCC unroll 2
            for (int64_t i = 0; i < kAcross; ++i) sum[r][i] = fma(value, weights[i], sum[r][i]);
          }
        }
      }
#pragma GCC unroll 16
      for (int64_t r = 0; r < kCount; ++r)
#pragma GCC unroll 2
        for (int64_t i = 0; i < kAcross; ++i) {
          float* m = p.m + r * kPanel + lane + i * Vector::kWidth;
          (first == 0 ? sum[r][i] : Vector::load(m) + sum[r][i]).store(m);
        }
    }
  }
}

template <int64_t kCount = kRows>
void product(const WinogradProduct& p) {
  if constexpr (kCount > 1)
    if (p.rows < kCount) return product<kCount - 1>(p);
  product_of<kCount>(p);
}

// Write the outputs of a tile, at V::kWidth channels. Its first `rows` rows and `columns` columns are in the image.
template <typename V>
ADMFAST_INLINE void output_tile(const float* m, int64_t m_point, V bias, const float* residual, float* y, int64_t y_row,
                                int64_t y_column, int64_t rows, int64_t columns) {
  both_ways<V, kPatch, kTile>([&](int64_t i, int64_t j) ADMFAST_INLINED { return V::load(m + (i * kPatch + j) * m_point); },
                              from_points<V>,
                              [&](int64_t i, int64_t j, V value) ADMFAST_INLINED {
                                if (j >= columns) return;
                                const int64_t at = i * y_row + j * y_column;
                                const V sum = value + bias;
                                (residual ? sum + V::load(residual + at) : sum).store(y + at);
                              },
                              rows);
}

void output(const WinogradImages& images, const WinogradBlock& block, int64_t begin, int64_t end, const float* m) {
  const int64_t H = images.H, W = images.W, C = images.C_out;
  for (int64_t tile = begin; tile < end; ++tile) {
    const Place at = place_of(block.first + tile, images);
    const int64_t rows = lesser(kTile, H - at.row), columns = lesser(kTile, W - at.column);
    const int64_t origin = ((at.image * H + at.row) * W + at.column) * C;
    const auto channels = [&](auto bias, int64_t c) {
      const float* own = m + (c / kPanel * block.tiles + tile) * kPanel + c % kPanel;
      const float* residual = images.residual ? images.residual + origin + c : nullptr;
      output_tile(own, block.m_point, bias, residual, images.y + origin + c, W * C, C, rows, columns);
    };
    int64_t c = 0;
    for (; c + Vector::kWidth <= C; c += Vector::kWidth) channels(Vector::load(images.bias + c), c);
    for (; c < C; ++c) channels(Scalar::load(images.bias + c), c);
  }
}

}  // namespace
}  // namespace ADMFAST_ISA

}  // namespace admfast
