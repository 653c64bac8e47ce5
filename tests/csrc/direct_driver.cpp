// Runs the loops of the direct convolution of every instruction set that this machine has over buffers of exactly the
// size they need, in bfloat16 and of 8 bits, compares with the sum itself in double, and prints the largest error of
// each, divided by what its roundings can come to. A sanitizer must be silent.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "bounded.h"
#include "conv_direct.h"
#include "cpu_isa.h"
#include "exact.h"

using namespace admfast;

namespace {

// `rows`: of the last group. `packed`: whether a chunk of all positions comes before the next one; else the chunks of a
// position adjoin. `gap`: elements of y from one position's outputs to the next one's.
struct Case {
  int64_t groups, rows, taps, chunks, outputs, gap;
  bool packed, bias, residual;
};

template <typename Run>
void cases(Run&& run) {
  for (int64_t groups : {1, 2, 3})
    for (int64_t rows : {16, 11, 1})
      for (int64_t taps : {1, 9})
        for (int64_t chunks : {1, 3})
          for (int64_t outputs : {32, 6, 17})
            for (int bits = 0; bits < 8; ++bits)
              run(Case{groups, rows, taps, chunks, outputs, bits & 1 ? 0 : 5, (bits & 1) != 0, (bits & 2) != 0,
                       (bits & 4) != 0});
}

[[noreturn]] void fail(const DirectLoops& loops, const char* what) {
  std::fprintf(stderr, "%s: %s\n", loops.name, what);
  std::exit(1);
}

// The arguments of a call of `panel`. The filter's taps are three by three positions of rows of kWidth.
constexpr int64_t kWidth = 7;

float number_of(float value) { return value; }
float number_of(bfloat16 value) { return to_float(value); }
void draw(Numbers& numbers, bfloat16& to) { to = half_of(numbers); }
void draw(Numbers& numbers, float& to) { to = numbers.next(); }
void draw(Numbers& numbers, uint8_t& to) { to = static_cast<uint8_t>(127.5f + 127.9f * numbers.next()); }
void draw(Numbers& numbers, int8_t& to) { to = static_cast<int8_t>(127.9f * numbers.next()); }

template <typename T, typename Y>
struct Panel {
  static constexpr int64_t kChunk = kDirectChunk<T>, kWord = 4 / sizeof(T);
  static constexpr bool kLevels = sizeof(T) == 1;
  Case k;
  int64_t row, positions, chunk, stride;
  int64_t tap[9];
  std::vector<DirectGroup> groups;
  Exact<T> x;
  Exact<typename Factors<T>::Right> w;
  Exact<Y> bias, residual, y;
  std::vector<DirectLevels> levels;
  Exact<float> weight_scale, weight_sum;

  explicit Panel(const Case& k)
      : k(k), row(k.packed ? kChunk : k.chunks * kChunk + 8), positions(k.groups * kDirectGroup + tap_of(k.taps - 1)),
        chunk(k.packed ? positions * row : kChunk), stride(k.outputs + k.gap), x(last_x() + kChunk),
        w(k.chunks * k.taps * kDirectStep<T>), bias(k.outputs), residual((written() - 1) * stride + k.outputs),
        y(residual.size()), weight_scale(k.outputs), weight_sum(k.outputs) {
    for (int64_t t = 0; t < k.taps; ++t) tap[t] = tap_of(t) * row;
    // The last positions of x come first in y. Groups are of two images in turn.
    int64_t to = written();
    for (int64_t g = 0; g < k.groups; ++g) {
      const int64_t rows = g == k.groups - 1 ? k.rows : kDirectGroup;
      groups.push_back({g * kDirectGroup * row, to -= rows, rows, g % 2});
    }
    fill();
  }

  static int64_t tap_of(int64_t t) { return t / 3 * kWidth + t % 3; }
  int64_t last_x() const { return (positions - 1) * row + (k.chunks - 1) * chunk; }
  int64_t written() const { return (k.groups - 1) * kDirectGroup + k.rows; }

  // What no output depends on stays as it is, in bfloat16 NaN: other positions, weights of other outputs, gaps.
  void fill() {
    Numbers numbers;
    for (int64_t p = 0; p < written() + tap_of(k.taps - 1); ++p)
      for (int64_t i = 0; i < k.chunks * kChunk; ++i) draw(numbers, x[p * row + i / kChunk * chunk + i % kChunk]);
    for (int64_t i = 0; i < k.chunks * k.taps; ++i)
      for (int64_t c = 0; c < kChunk; ++c)
        for (int64_t o = 0; o < k.outputs; ++o) draw(numbers, w[weight(i, c, o)]);
    for (int64_t o = 0; o < k.outputs; ++o) draw(numbers, bias[o]);
    for (int64_t i = 0; i < residual.size(); ++i)
      if (i % stride < k.outputs) draw(numbers, residual[i]);
    if constexpr (kLevels) {
      levels = {{0.03f, 77}, {0.5f, 200}};
      for (int64_t o = 0; o < k.outputs; ++o) {
        weight_scale[o] = 0.01f + 0.005f * numbers.next();
        int64_t sum = 0;
        for (int64_t i = 0; i < k.chunks * k.taps; ++i)
          for (int64_t c = 0; c < kChunk; ++c) sum += w[weight(i, c, o)];
        weight_sum[o] = static_cast<float>(sum);
      }
    }
  }

  // [chunks][taps][2][16][16][n]: halves of the panel, n channels of a word, outputs.
  static int64_t weight(int64_t chunk_and_tap, int64_t c, int64_t o) {
    return (((chunk_and_tap * 2 + o / 16) * 16 + c / kWord) * 16 + o % 16) * kWord + c % kWord;
  }

  Bounded expected(const DirectGroup& group, int64_t r, int64_t o) const {
    Sum sum;
    for (int64_t i = 0; i < k.chunks; ++i)
      for (int64_t t = 0; t < k.taps; ++t)
        for (int64_t c = 0; c < kChunk; ++c) {
          const T at = x[group.from + r * row + i * chunk + tap[t] + c];
          const auto by = w[weight(i * k.taps + t, c, o)];
          if constexpr (kLevels) {
            const DirectLevels& of = levels[static_cast<size_t>(group.image)];
            const double scale = static_cast<double>(of.scale) * static_cast<double>(weight_scale[o]);
            sum.add({scale * at}, {static_cast<double>(by)});
            sum.add({-scale * of.zero}, {static_cast<double>(by)});
          } else {
            sum.add({to_float(at)}, {to_float(by)});
          }
        }
    if (k.bias) sum.add({number_of(bias[o])});
    if (k.residual) sum.add({number_of(residual[(group.to + r) * stride + o])});
    // In 8 bits sums are exact; three roundings follow: of the conversion and of two scales.
    const int64_t roundings = kLevels ? 3 : k.chunks * k.taps * kChunk;
    return rounded(sum.total(roundings + 2), sizeof(Y) == 4 ? kSingle : kHalf);
  }

  const auto& panel_of(const DirectLoops& loops) const {
    if constexpr (!kLevels)
      return loops.panel;
    else if constexpr (sizeof(Y) == 4)
      return loops.single.panel;
    else
      return loops.half.panel;
  }

  void check(const DirectLoops& loops, const std::vector<Bounded>& truth, Worst& worst) {
    Exact<Y> found(y.size());
    panel_of(loops)({groups.data(), k.groups, x.data(), row, chunk, k.chunks, tap, k.taps, w.data(),
                     k.bias ? bias.data() : nullptr, k.residual ? residual.data() : nullptr, found.data(), stride,
                     k.outputs, levels.data(), weight_scale.data(), weight_sum.data()});
    for (int64_t i = 0; i < found.size(); ++i)
      if (i % stride < k.outputs)
        worst.judge(number_of(found[i]), truth[static_cast<size_t>(i / stride * k.outputs + i % stride)]);
      else if (!found.untouched(i))
        fail(loops, "panel wrote between the positions");
  }
};

template <typename T, typename Y>
void check_panel(const Case& k, const std::vector<const DirectLoops*>& here, std::vector<Worst>& worst) {
  Panel<T, Y> panel(k);
  std::vector<Bounded> truth(static_cast<size_t>(panel.written() * k.outputs));
  for (const DirectGroup& group : panel.groups)
    for (int64_t i = 0; i < group.rows * k.outputs; ++i)
      truth[static_cast<size_t>(group.to * k.outputs + i)] = panel.expected(group, i / k.outputs, i % k.outputs);
  for (size_t i = 0; i < here.size(); ++i) panel.check(*here[i], truth, worst[i]);
}

template <typename Y>
void pack_int8(const DirectLoops& loops, const DirectInt8Loops<Y>& int8, int64_t count, int64_t channels) {
  constexpr int64_t kGap = 3, kChunk = kDirectChunk<uint8_t>;
  const int64_t chunks = (channels + kChunk - 1) / kChunk, chunk = count * kChunk + kGap;
  Exact<Y> from(count * channels);
  Exact<uint8_t> to(chunks * chunk - kGap);
  Numbers numbers;
  for (int64_t i = 0; i < from.size(); ++i) draw(numbers, from[i]);
  // The numbers reach beyond both ends of the levels.
  const DirectLevels levels{1.0f / 128, 90};
  int8.pack(from.data(), count, channels, levels, to.data(), chunk);
  for (int64_t i = 0; i < to.size(); ++i) {
    const int64_t place = i % chunk, position = place / kChunk, channel = i / chunk * kChunk + place % kChunk;
    if (position == count || channel >= channels) {
      if (!to.untouched(i)) fail(loops, "pack_int8 wrote behind the channels or between the chunks");
      continue;
    }
    const double level = std::nearbyint(static_cast<double>(number_of(from[position * channels + channel])) * 128) + 90;
    if (to[i] != static_cast<uint8_t>(std::fmin(std::fmax(level, 0), 255))) fail(loops, "pack_int8 gave another level");
  }
}

template <typename Y>
void range(const DirectLoops& loops, const DirectInt8Loops<Y>& int8, int64_t count) {
  Exact<Y> from(count);
  Numbers numbers;
  for (int64_t i = 0; i < count; ++i) draw(numbers, from[i]);
  const auto found = [&] {
    float ends[2] = {5, 5};
    int8.range(from.data(), count, &ends[0], &ends[1]);
    return std::vector<float>{ends[0], ends[1]};
  };
  const auto same = [&] {
    std::vector<float> ends{0, 0};
    for (int64_t i = 0; i < count; ++i)
      ends = {std::fmin(ends[0], number_of(from[i])), std::fmax(ends[1], number_of(from[i]))};
    return found() == ends;
  };
  if (!same()) fail(loops, "range is another one");
  for (int64_t i = 0; i < count; ++i) {
    const Y before = from[i];
    for (uint32_t bits : {0x80000000u, 0xFF800000u, 0x7F800000u, 0xC0400000u, 0x40400000u}) {  // -0, infinities, -3, 3
      if constexpr (sizeof(Y) == 4)
        from[i] = float_of_bits(bits);
      else
        from[i] = {static_cast<uint16_t>(bits >> 16)};
      if (!same()) fail(loops, "range misses a number");
    }
    for (uint32_t bits : {0x7FC00000u, 0xFFC00000u}) {
      if constexpr (sizeof(Y) == 4)
        from[i] = float_of_bits(bits);
      else
        from[i] = {static_cast<uint16_t>(bits >> 16)};
      const std::vector<float> ends = found();
      if (ends[0] == ends[0] && ends[1] == ends[1]) fail(loops, "range misses NaN");
    }
    from[i] = before;
  }
}

void pack(const DirectLoops& loops, int64_t count, int64_t channels) {
  constexpr int64_t kGap = 3;
  constexpr int64_t kChunk = kDirectChunk<bfloat16>;
  const int64_t chunks = (channels + kChunk - 1) / kChunk, chunk = count * kChunk + kGap;
  Exact<bfloat16> from(count * channels), to(chunks * chunk - kGap);
  Numbers numbers;
  for (int64_t i = 0; i < from.size(); ++i) from[i] = half_of(numbers);
  loops.pack(from.data(), count, channels, to.data(), chunk);
  for (int64_t i = 0; i < to.size(); ++i) {
    const int64_t place = i % chunk, position = place / kChunk;
    const int64_t channel = i / chunk * kChunk + place % kChunk;
    const bool there = channel < channels;
    if (position == count ? !to.untouched(i) : to[i].bits != (there ? from[position * channels + channel].bits : 0))
      fail(loops, "pack copied something else");
  }
}

}  // namespace

int main(int argc, char**) {
  std::vector<const DirectLoops*> here{&direct_generic};
#if defined(__x86_64__) && !defined(__clang__)
  const CpuIsa widest = widest_cpu_isa();  // it asks for the registers of AMX
  if (widest >= CpuIsa::kAvx512Bf16) here.push_back(&direct_avx512_bf16);
#if defined(ADMFAST_AMX)
  if (widest >= CpuIsa::kAmx) here.push_back(&direct_amx);
#endif
#endif
  std::printf("chosen %s\n", direct_loops().name);
  if (argc > 1) return 0;  // asked for the name only
  std::vector<Worst> worst(here.size());
  cases([&](const Case& k) {
    check_panel<bfloat16, bfloat16>(k, here, worst);
    if (k.taps == 1) return;
    check_panel<uint8_t, bfloat16>(k, here, worst);
    if (k.chunks == 3) check_panel<uint8_t, float>(k, here, worst);
  });
  for (size_t i = 0; i < here.size(); ++i) {
    for (int64_t channels : {3, 32, 33, 70, 128})
      for (int64_t count : {0, 1, 5, 16}) {
        pack(*here[i], count, channels);
        pack_int8(*here[i], here[i]->half, count, channels);
        pack_int8(*here[i], here[i]->single, count, channels);
      }
    for (int64_t count : {0, 1, 31, 77}) {
      range(*here[i], here[i]->half, count);
      range(*here[i], here[i]->single, count);
    }
    std::printf("%s %.3e\n", here[i]->name, worst[i].error);
  }
}
