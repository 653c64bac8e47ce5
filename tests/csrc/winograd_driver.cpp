// Runs the Winograd loops of every instruction set that this machine has over buffers of exactly the size they need,
// compares with the sum itself in double, and prints the largest error of each; a sanitizer must be silent.
#include <cmath>
#include <cstdio>
#include <limits>
#include <utility>
#include <vector>

#include "conv_winograd.h"
#include "numbers.h"

using namespace admfast;

namespace {

struct Case {
  int64_t N, H, W, C_in, C_out, tiles, rows;
  bool residual;
};
// Odd sizes, partial tiles, panels, chunks and groups; blocks of one tile and of several images.
constexpr Case kCases[] = {{1, 4, 4, 16, 32, 1, 1, false},  {1, 1, 1, 1, 1, 1, 1, true},    {2, 5, 9, 19, 37, 7, 3, true},
                           {1, 8, 12, 70, 33, 6, 4, false}, {3, 3, 7, 5, 64, 6, 6, true},   {1, 13, 2, 33, 6, 3, 2, false},
                           {1, 24, 24, 8, 40, 36, 14, true}, {2, 6, 6, 130, 16, 8, 5, false}};

// G, whose points are 0, +-3/4, +-3/2 and infinity.
constexpr double kWeights[6][3] = {{64. / 81, 0, 0},
                                   {-128. / 243, -32. / 81, -8. / 27},
                                   {-128. / 243, 32. / 81, -8. / 27},
                                   {32. / 243, 16. / 81, 8. / 27},
                                   {32. / 243, -16. / 81, 8. / 27},
                                   {0, 0, 1}};

// [panels][36][C_in][32] from [C_out][C_in][9].
std::vector<float> transformed(const Case& k, const std::vector<float>& weight) {
  const int64_t panels = (k.C_out + 31) / 32;
  std::vector<float> u(static_cast<size_t>(panels * 36 * k.C_in * 32), 0.0f);
  for (int64_t o = 0; o < k.C_out; ++o)
    for (int64_t c = 0; c < k.C_in; ++c)
      for (int64_t p = 0; p < 36; ++p) {
        double sum = 0;
        for (int64_t t = 0; t < 9; ++t)
          sum += kWeights[p / 6][t / 3] * kWeights[p % 6][t % 3] * weight[(o * k.C_in + c) * 9 + t];
        u[((o / 32 * 36 + p) * k.C_in + c) * 32 + o % 32] = static_cast<float>(sum);
      }
  return u;
}

double expected(const Case& k, const WinogradImages& images, const std::vector<float>& weight, int64_t n, int64_t h,
                int64_t w, int64_t o) {
  const int64_t at = ((n * k.H + h) * k.W + w) * k.C_out + o;
  double sum = static_cast<double>(images.bias[o]) + (images.residual ? static_cast<double>(images.residual[at]) : 0.0);
  for (int64_t t = 0; t < 9; ++t) {
    const int64_t row = h + t / 3 - 1, column = w + t % 3 - 1;
    if (row < 0 || row >= k.H || column < 0 || column >= k.W) continue;
    const float* x = images.x + ((n * k.H + row) * k.W + column) * k.C_in;
    for (int64_t c = 0; c < k.C_in; ++c)
      sum += static_cast<double>(weight[(o * k.C_in + c) * 9 + t]) * static_cast<double>(x[c]);
  }
  return sum;
}

void convolve(const WinogradLoops& loops, const Case& k, const WinogradImages& images, const std::vector<float>& u) {
  const int64_t panels = (k.C_out + 31) / 32, all = k.N * ((k.H + 3) / 4) * ((k.W + 3) / 4);
  for (int64_t first = 0; first < all; first += k.tiles) {
    WinogradBlock b{};
    b.first = first;
    b.tiles = all - first < k.tiles ? all - first : k.tiles;
    b.rows = k.rows < loops.rows ? k.rows : loops.rows;
    b.groups = (b.tiles + b.rows - 1) / b.rows;
    b.chunks = (k.C_in + 15) / 16;
    b.v_point = b.groups * b.chunks * b.rows * 16;
    b.m_point = panels * b.tiles * 32;
    const float nan = std::numeric_limits<float>::quiet_NaN();
    std::vector<float> v(static_cast<size_t>(36 * b.v_point), nan), m(static_cast<size_t>(36 * b.m_point), nan);
    for (int64_t t = 0; t < b.tiles; ++t) loops.input(images, b, t, t + 1, v.data());
    for (int64_t point = 0; point < 36; ++point)
      for (int64_t panel = 0; panel < panels; ++panel)
        for (int64_t group = 0; group < b.groups; ++group) {
          const int64_t done = group * b.rows, rows = b.tiles - done < b.rows ? b.tiles - done : b.rows;
          loops.product({v.data() + point * b.v_point + done * b.chunks * 16,
                         u.data() + (panel * 36 + point) * k.C_in * 32,
                         m.data() + point * b.m_point + (panel * b.tiles + done) * 32, b.rows, rows, k.C_in, u.data(),
                         point % 3});
        }
    loops.output(images, b, 0, b.tiles, m.data());
  }
}

// The gradient of the weights, [C_out][C_in][9], for a gradient dy that lies as y does.
std::vector<float> gradient(const WinogradLoops& loops, const Case& k, const WinogradImages& x, const WinogradImages& dy) {
  const int64_t panels = (k.C_out + 31) / 32, chunks = (k.C_in + 15) / 16;
  const int64_t all = k.N * ((k.H + 3) / 4) * ((k.W + 3) / 4);
  const float nan = std::numeric_limits<float>::quiet_NaN();
  std::vector<float> dg(static_cast<size_t>(panels * chunks * 9 * 512), nan);
  for (int64_t first = 0; first < all; first += k.tiles) {
    const int64_t tiles = all - first < k.tiles ? all - first : k.tiles;
    const WinogradBlock b{first, tiles, tiles, 1, chunks, chunks * tiles * 16, panels * tiles * 32};
    std::vector<float> v(static_cast<size_t>(36 * b.v_point), nan), e(static_cast<size_t>(36 * b.m_point), nan);
    std::vector<float> m(36 * 512, nan);
    loops.input(x, b, 0, tiles, v.data());
    for (int64_t t = 0; t < tiles; ++t) loops.gradient_input(dy, b, t, t + 1, e.data());
    for (int64_t i = 0; i < panels * chunks; ++i) {
      loops.gradient_product({v.data() + i % chunks * tiles * 16, e.data() + i / chunks * tiles * 32, tiles, b.v_point,
                              b.m_point}, m.data());
      loops.gradient_output(m.data(), first == 0, dg.data() + i * 9 * 512);
    }
  }
  std::vector<float> dw;
  for (int64_t o = 0; o < k.C_out; ++o)
    for (int64_t c = 0; c < k.C_in; ++c)
      for (int64_t t = 0; t < 9; ++t)
        dw.push_back(dg[static_cast<size_t>((((o / 32 * chunks + c / 16) * 9 + t) * 16 + c % 16) * 32 + o % 32)]);
  return dw;
}

double expected_gradient(const Case& k, const float* x, const float* dy, int64_t o, int64_t c, int64_t t) {
  double sum = 0;
  for (int64_t n = 0; n < k.N; ++n)
    for (int64_t h = 0; h < k.H; ++h)
      for (int64_t w = 0; w < k.W; ++w) {
        const int64_t row = h + t / 3 - 1, column = w + t % 3 - 1;
        if (row < 0 || row >= k.H || column < 0 || column >= k.W) continue;
        sum += static_cast<double>(x[((n * k.H + row) * k.W + column) * k.C_in + c]) *
               static_cast<double>(dy[((n * k.H + h) * k.W + w) * k.C_out + o]);
      }
  return sum;
}

void compare(double found, double truth, double& worst) {
  const double error = std::fabs(found - truth);
  if (worst == worst && !(error <= worst)) worst = error;  // NaN stays
}

// The transformed weights and their transpose's, made of the weights where they lie.
void weights_of(const WinogradLoops& loops, const Case& k, const std::vector<float>& weight, double& worst) {
  for (const bool transposed : {false, true}) {
    Case other = k;
    std::vector<float> flipped = weight;
    WinogradWeights w{weight.data(), k.C_out, k.C_in, k.C_in * 9, 9, 3, 1};
    if (transposed) {
      std::swap(other.C_in, other.C_out);
      for (int64_t o = 0; o < k.C_out; ++o)
        for (int64_t i = 0; i < k.C_in * 9; ++i)
          flipped[static_cast<size_t>((i / 9 * k.C_out + o) * 9 + 8 - i % 9)] = weight[static_cast<size_t>(o * k.C_in * 9 + i)];
      w = {weight.data() + 8, k.C_in, k.C_out, 9, k.C_in * 9, -3, -1};
    }
    const std::vector<float> u = transformed(other, flipped);
    std::vector<float> made(u.size(), std::numeric_limits<float>::quiet_NaN());
    loops.weights(w, 0, static_cast<int64_t>(u.size()) / 36 / 32, made.data());
    for (size_t i = 0; i < u.size(); ++i) compare(static_cast<double>(made[i]), static_cast<double>(u[i]), worst);
  }
}

void with_loops(const WinogradLoops& loops) {
  double worst = 0;
  for (const Case& k : kCases) {
    Numbers numbers;
    const std::vector<float> x = numbers.some(k.N * k.H * k.W * k.C_in), zeros(static_cast<size_t>(k.C_in), 0.0f);
    const std::vector<float> weight = numbers.some(k.C_out * k.C_in * 9), bias = numbers.some(k.C_out);
    const std::vector<float> residual = numbers.some(k.N * k.H * k.W * k.C_out);
    std::vector<float> y(residual.size(), std::numeric_limits<float>::quiet_NaN());
    const WinogradImages images{k.H,         k.W,         k.C_in, k.C_out, x.data(), zeros.data(),
                                bias.data(), k.residual ? residual.data() : nullptr, y.data()};
    convolve(loops, k, images, transformed(k, weight));
    for (size_t i = 0; i < y.size(); ++i) {
      const int64_t at = static_cast<int64_t>(i), o = at % k.C_out, position = at / k.C_out;
      const double truth =
          expected(k, images, weight, position / (k.H * k.W), position / k.W % k.H, position % k.W, o);
      compare(static_cast<double>(y[i]), truth, worst);
    }
    weights_of(loops, k, weight, worst);
    const std::vector<float> dy = numbers.some(k.N * k.H * k.W * k.C_out), more(static_cast<size_t>(k.C_out), 0.0f);
    const WinogradImages of_dy{k.H, k.W, k.C_out, k.C_in, dy.data(), more.data(), nullptr, nullptr, nullptr};
    const std::vector<float> dw = gradient(loops, k, images, of_dy);
    for (size_t i = 0; i < dw.size(); ++i) {
      const int64_t at = static_cast<int64_t>(i), pair = at / 9;
      compare(static_cast<double>(dw[i]), expected_gradient(k, x.data(), dy.data(), pair / k.C_in, pair % k.C_in, at % 9),
              worst);
    }
  }
  std::printf("%s %.3e\n", loops.name, worst);
}

}  // namespace

int main() {
  with_loops(winograd_generic);
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) with_loops(winograd_avx2);
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    with_loops(winograd_avx512);
#endif
  std::printf("chosen %s\n", winograd_loops().name);
}
