// Runs the GroupNorm loops of every instruction set that this machine has over buffers of exactly the size they need,
// compares with the formulas in double, and prints the largest error of each; a sanitizer must be silent.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <vector>

#include "group_norm.h"
#include "numbers.h"

using namespace admfast;

namespace {

// `more`: elements between two rows of one source, as where the other source's channels lie.
struct Case {
  int64_t rows, lanes, more;
  bool uniform;
};
// Below, at and above the widths and runs of every instruction set.
constexpr Case kCases[] = {{1, 1, 0, false},  {1, 1, 0, true},    {5, 3, 0, false},   {16, 16, 5, false}, {17, 19, 0, false},
                           {33, 37, 3, false}, {70, 64, 0, false}, {300, 7, 2, false}, {1, 15, 0, true},   {1, 16, 0, true},
                           {1, 300, 0, true},  {1, 257, 0, true}};

// Elements of one type in a buffer without a byte to spare.
struct Elements {
  NormType type;
  std::vector<unsigned char> bytes;
  Elements(NormType type_, int64_t count) : type(type_), bytes(static_cast<size_t>(count) * width(), 0xFF) {}
  Elements(NormType type_, Numbers& numbers, int64_t count) : Elements(type_, count) {
    for (int64_t i = 0; i < count; ++i) {
      const float value = numbers.next();
      // The first two bytes of a float's upper half are a bfloat16.
      std::memcpy(bytes.data() + i * width(), reinterpret_cast<const char*>(&value) + 4 - width(), width());
    }
  }
  int64_t width() const { return type == NormType::kFloat32 ? 4 : 2; }
  void* data() { return bytes.data(); }
  double at(int64_t i) const {
    float value = 0;
    std::memcpy(reinterpret_cast<char*>(&value) + 4 - width(), bytes.data() + i * width(), width());
    return static_cast<double>(value);
  }
  double eps() const { return type == NormType::kFloat32 ? 0x1p-23 : 0x1p-7; }
};

double worst;  // error over what n roundings in float32 (one in the type itself) can come to; NaN stays

void judge(double got, double truth, double size, double roundings, double eps) {
  const double error = std::fabs(got - truth) / (size * (roundings * 0x1p-23 + eps) + 1e-30);
  if (worst == worst && !(error <= worst)) worst = error;
}

struct Tested {
  const GroupNormLoops& loops;
  Case k;
  NormType type;
  bool silu;
  Numbers numbers;
  NormRows shape{k.rows, k.lanes + k.more, k.lanes};
  int64_t count = (k.rows - 1) * (k.lanes + k.more) + k.lanes, parts = k.uniform ? 1 : k.lanes;
  Elements x{type, numbers, count}, dy{type, numbers, count};
  std::vector<float> mean = numbers.some(parts), factor = numbers.some(parts), offset = numbers.some(parts),
                     slope = numbers.some(parts), constant = numbers.some(parts);
  NormCoefficients forward{mean.data(), factor.data(), offset.data(), k.uniform};

  double centred(int64_t i, int64_t part) const { return x.at(i) - static_cast<double>(mean[part]); }
  double u(int64_t i, int64_t part) const { return centred(i, part) * factor[part] + offset[part]; }
  double du(int64_t i, int64_t part) const {
    const double s = 1 / (1 + std::exp(-u(i, part)));
    return dy.at(i) * (silu ? s * (1 + u(i, part) * (1 - s)) : 1.0);
  }
  template <typename Visit>
  void elements(Visit visit) const {
    for (int64_t row = 0; row < k.rows; ++row)
      for (int64_t lane = 0; lane < k.lanes; ++lane) visit(row * shape.stride + lane, k.uniform ? 0 : lane);
  }

  void moments() {
    std::vector<double> means(parts, 0.0), squares(parts, 0.0), mean_is(parts), squares_are(parts);
    const double n = static_cast<double>(k.uniform ? k.lanes : k.rows);
    if (k.uniform) {
      loops.line_moments(type, x.data(), k.lanes, means.data(), squares.data());
    } else {
      loops.moments(type, x.data(), shape, means.data(), squares.data());
    }
    elements([&](int64_t i, int64_t part) { mean_is[part] += x.at(i) / n; });
    elements([&](int64_t i, int64_t part) { squares_are[part] += std::pow(x.at(i) - mean_is[part], 2); });
    for (int64_t part = 0; part < parts; ++part) {
      judge(means[part], mean_is[part], 2, n, 0);
      judge(squares[part], squares_are[part], 4 * n, n, 0);
    }
  }

  void apply() {
    Elements y(type, count);
    loops.apply(type, x.data(), shape, forward, silu, y.data(), shape.stride);
    elements([&](int64_t i, int64_t part) {
      const double truth = silu ? u(i, part) / (1 + std::exp(-u(i, part))) : u(i, part);
      judge(y.at(i), truth, 3, 8, y.eps());
    });
  }

  void gradients() {
    std::vector<double> sums(parts, 0.0), weighted(parts, 0.0), sums_are(parts), weighted_are(parts);
    loops.gradient_sums(type, dy.data(), shape.stride, x.data(), shape, forward, silu, sums.data(), weighted.data());
    elements([&](int64_t i, int64_t part) {
      sums_are[part] += du(i, part);
      weighted_are[part] += du(i, part) * centred(i, part);
    });
    const double n = static_cast<double>(k.uniform ? k.lanes : k.rows);
    for (int64_t part = 0; part < parts; ++part) {
      judge(sums[part], sums_are[part], 2 * n, n + 8, 0);
      judge(weighted[part], weighted_are[part], 4 * n, n + 8, 0);
    }
    Elements dx(type, count);
    loops.gradient(type, dy.data(), shape.stride, x.data(), shape, {forward, slope.data(), constant.data()}, silu,
                   dx.data());
    elements([&](int64_t i, int64_t part) {
      const double truth = du(i, part) * factor[part] + centred(i, part) * slope[part] + constant[part];
      judge(dx.at(i), truth, 5, 8, dx.eps());
    });
  }
};

void with_loops(const GroupNormLoops& loops) {
  worst = 0;
  for (const Case& k : kCases)
    for (NormType type : {NormType::kFloat32, NormType::kBFloat16})
      for (bool silu : {false, true}) {
        Tested tested{loops, k, type, silu};
        tested.moments();
        tested.apply();
        tested.gradients();
      }
  std::printf("%s %.3e\n", loops.name, worst);
}

}  // namespace

int main() {
  with_loops(group_norm_generic);
#if defined(__x86_64__) && !defined(__clang__)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) with_loops(group_norm_avx2);
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl")) {
    with_loops(group_norm_avx512);
    if (__builtin_cpu_supports("avx512bf16")) with_loops(group_norm_avx512_bf16);
  }
#endif
  std::printf("chosen %s\n", group_norm_loops().name);
}
