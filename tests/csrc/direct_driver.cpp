// Runs the loops of the direct convolution of every instruction set that this machine has over buffers of exactly the
// size they need, compares with the sum itself in double, and prints the largest error of each, divided by what its
// roundings can come to. A sanitizer must be silent.
#include <algorithm>
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

struct Panel {
  Case k;
  int64_t row, positions, chunk, stride;
  int64_t tap[9];
  std::vector<DirectGroup> groups;
  Exact<bfloat16> x, w, bias, residual, y;

  explicit Panel(const Case& k)
      : k(k), row(k.packed ? kDirectChunk : k.chunks * kDirectChunk + 8),
        positions(k.groups * kDirectGroup + tap_of(k.taps - 1)), chunk(k.packed ? positions * row : kDirectChunk),
        stride(k.outputs + k.gap), x(last_x() + kDirectChunk), w(k.chunks * k.taps * kDirectStep), bias(k.outputs),
        residual((written() - 1) * stride + k.outputs), y(residual.size()) {
    for (int64_t t = 0; t < k.taps; ++t) tap[t] = tap_of(t) * row;
    // The last positions of x come first in y.
    int64_t to = written();
    for (int64_t g = 0; g < k.groups; ++g) {
      const int64_t rows = g == k.groups - 1 ? k.rows : kDirectGroup;
      groups.push_back({g * kDirectGroup * row, to -= rows, rows});
    }
    fill();
  }

  static int64_t tap_of(int64_t t) { return t / 3 * kWidth + t % 3; }
  int64_t last_x() const { return (positions - 1) * row + (k.chunks - 1) * chunk; }
  int64_t written() const { return (k.groups - 1) * kDirectGroup + k.rows; }

  // What no output depends on stays NaN: other positions, weights of other outputs, gaps.
  void fill() {
    Numbers numbers;
    for (int64_t p = 0; p < written() + tap_of(k.taps - 1); ++p)
      for (int64_t i = 0; i < k.chunks * kDirectChunk; ++i)
        x[p * row + i / kDirectChunk * chunk + i % kDirectChunk] = half_of(numbers);
    for (int64_t i = 0; i < k.chunks * k.taps; ++i)
      for (int64_t c = 0; c < kDirectChunk; ++c)
        for (int64_t o = 0; o < k.outputs; ++o) w[weight(i, c, o)] = half_of(numbers);
    for (int64_t o = 0; o < k.outputs; ++o) bias[o] = half_of(numbers);
    for (int64_t i = 0; i < residual.size(); ++i)
      if (i % stride < k.outputs) residual[i] = half_of(numbers);
  }

  // [chunks][taps][2][16][16][2]: halves of the panel, pairs of channels, outputs.
  static int64_t weight(int64_t chunk_and_tap, int64_t c, int64_t o) {
    return (((chunk_and_tap * 2 + o / 16) * 16 + c / 2) * 16 + o % 16) * 2 + c % 2;
  }

  Bounded expected(const DirectGroup& group, int64_t r, int64_t o) const {
    Sum sum;
    for (int64_t i = 0; i < k.chunks; ++i)
      for (int64_t t = 0; t < k.taps; ++t)
        for (int64_t c = 0; c < kDirectChunk; ++c)
          sum.add({to_float(x[group.from + r * row + i * chunk + tap[t] + c])},
                  {to_float(w[weight(i * k.taps + t, c, o)])});
    if (k.bias) sum.add({to_float(bias[o])});
    if (k.residual) sum.add({to_float(residual[(group.to + r) * stride + o])});
    return rounded(sum.total(k.chunks * k.taps * kDirectChunk + 2), kHalf);
  }

  void check(const DirectLoops& loops, const std::vector<Bounded>& truth, Worst& worst) {
    Exact<bfloat16> found(y.size());
    loops.panel({groups.data(), k.groups, x.data(), row, chunk, k.chunks, tap, k.taps, w.data(),
                 k.bias ? bias.data() : nullptr, k.residual ? residual.data() : nullptr, found.data(), stride,
                 k.outputs});
    for (int64_t i = 0; i < found.size(); ++i)
      if (i % stride < k.outputs)
        worst.judge(to_float(found[i]), truth[static_cast<size_t>(i / stride * k.outputs + i % stride)]);
      else if (!found.untouched(i))
        fail(loops, "panel wrote between the positions");
  }
};

void pack(const DirectLoops& loops, int64_t count, int64_t channels) {
  constexpr int64_t kGap = 3;
  const int64_t chunks = (channels + kDirectChunk - 1) / kDirectChunk, chunk = count * kDirectChunk + kGap;
  Exact<bfloat16> from(count * channels), to(chunks * chunk - kGap);
  Numbers numbers;
  for (int64_t i = 0; i < from.size(); ++i) from[i] = half_of(numbers);
  loops.pack(from.data(), count, channels, to.data(), chunk);
  for (int64_t i = 0; i < to.size(); ++i) {
    const int64_t place = i % chunk, position = place / kDirectChunk;
    const int64_t channel = i / chunk * kDirectChunk + place % kDirectChunk;
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
    Panel panel(k);
    std::vector<Bounded> truth(static_cast<size_t>(panel.written() * k.outputs));
    for (const DirectGroup& group : panel.groups)
      for (int64_t i = 0; i < group.rows * k.outputs; ++i)
        truth[static_cast<size_t>(group.to * k.outputs + i)] = panel.expected(group, i / k.outputs, i % k.outputs);
    for (size_t i = 0; i < here.size(); ++i) panel.check(*here[i], truth, worst[i]);
  });
  for (size_t i = 0; i < here.size(); ++i) {
    for (int64_t channels : {3, 32, 33, 70})
      for (int64_t count : {0, 1, 5, 16}) pack(*here[i], count, channels);
    std::printf("%s %.3e\n", here[i]->name, worst[i].error);
  }
}
