// Runs the loops of attention of every instruction set that this machine has over buffers of exactly the size they
// need, compares with the formulas in double, and prints the largest error of each, divided by what its roundings can
// come to. A sanitizer must be silent.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "attention.h"
#include "bounded.h"
#include "cpu_isa.h"
#include "exact.h"

using namespace admfast;

namespace {

constexpr double kExp = 1.02e-4;  // the relative error of the polynomial of exp2_half in vector.h
constexpr int64_t kHeads = 2;
constexpr float kScale = 0.8f;  // of 300 weights of 64 numbers in [-1, 1), the largest is a fifth

// Logits near zero; all near -115, so that exp(-lse) overflows; near zero except the last key's, whose exponential
// overflows unless it is subtracted first.
enum class Kind { kNear, kFar, kLastFar };
constexpr uint16_t kTwelve = 0x4140, kMinusTwelve = 0xC140;

using Halves = std::vector<bfloat16>;
using Table = std::vector<Bounded>;

Halves some(Numbers& numbers, int64_t count) {
  Halves found(static_cast<size_t>(count));
  for (bfloat16& number : found) number = half_of(numbers);
  return found;
}

int64_t whole(int64_t count) { return (count + 31) / 32 * 32; }

Bounded exp_of(Bounded x) {
  const double is = std::exp(x.is), most = is * std::exp(x.off) * (1 + kExp);
  return {is, most - is + kTiny};
}

// The inputs of one head, [tokens][width], and what follows from them with the errors that are allowed.
struct Truth {
  int64_t T, d;
  Numbers numbers;
  Halves q = some(numbers, T * d), k = some(numbers, T * d), v = some(numbers, T * d), dout = some(numbers, T * d);
  Table logits, out, lse, dq, dk, dv;
  // What the gradient takes of the forward, rounded.
  Halves out_given;
  std::vector<float> lse_given;

  Truth(int64_t T, int64_t d, Kind kind) : T(T), d(d), dq(size()), dk(size()), dv(size()) {
    for (int64_t i = 0; i < T && kind != Kind::kNear; ++i) {
      q[static_cast<size_t>(i * d)].bits = kTwelve;
      if (kind == Kind::kFar) k[static_cast<size_t>(i * d)].bits = kMinusTwelve;
      if (kind == Kind::kLastFar && i == T - 1) k[static_cast<size_t>(i * d)].bits = kTwelve;
    }
    logits = products(q, k);
    forward();
    gradient();
  }

  size_t size() const { return static_cast<size_t>(T * d); }
  static Bounded at(const Halves& m, int64_t i) { return {to_float(m[static_cast<size_t>(i)])}; }
  Bounded of(const Table& square, int64_t i, int64_t j) const { return square[static_cast<size_t>(i * T + j)]; }

  // a b^T, [T][T].
  Table products(const Halves& a, const Halves& b) const {
    Table found;
    for (int64_t i = 0; i < T; ++i)
      for (int64_t j = 0; j < T; ++j) {
        Sum sum;
        for (int64_t c = 0; c < d; ++c) sum.add(at(a, i * d + c), at(b, j * d + c));
        found.push_back(sum.total(whole(d)));
      }
    return found;
  }

  // The exponent of a weight, scale (logit - from). In the loops it is a power of two, fma(logit, factor, offset):
  // log2(e) and two products are rounded for each, and then the sum.
  Bounded exponent(int64_t i, int64_t j, Bounded from) const {
    const auto scaled = [](Bounded x) { return rounded(x * Bounded{kScale}, kSingle, 3); };
    return rounded(scaled(of(logits, i, j)) - scaled(from), kSingle);
  }

  void forward() {
    for (int64_t i = 0; i < T; ++i) {
      Bounded largest = of(logits, i, 0);
      for (int64_t j = 1; j < T; ++j) {
        const Bounded other = of(logits, i, j);
        largest = {std::max(largest.is, other.is), std::max(largest.off, other.off)};
      }
      Table weights;
      Sum all;
      for (int64_t j = 0; j < T; ++j) {
        weights.push_back(exp_of(exponent(i, j, largest)));
        all.add(weights.back());
      }
      const Bounded sum = all.total(whole(T));
      for (int64_t c = 0; c < d; ++c) {
        Sum weighted;
        for (int64_t j = 0; j < T; ++j) weighted.add(rounded(weights[static_cast<size_t>(j)], kHalf), at(v, j * d + c));
        out.push_back(rounded(rounded(weighted.total(whole(T)) / sum, kSingle, 2), kHalf));
        out_given.push_back(rounded_half(out.back().is));
      }
      // logf of the C library is right to within a unit in the last place.
      const Bounded logarithm = rounded({std::log(sum.is), sum.off / (sum.is - sum.off)}, 2 * kSingle);
      lse.push_back(rounded(rounded(largest * Bounded{kScale}, kSingle) + logarithm, kSingle));
      lse_given.push_back(static_cast<float>(lse.back().is));
    }
  }

  static bfloat16 rounded_half(double value) {
    return {static_cast<uint16_t>(bits_of_float(static_cast<float>(value)) >> 16)};  // toward zero: any number will do
  }

  // From the given out and lse, as the loops are: with P = exp(scale logits - lse), dS = P (dout v^T - dout out) they
  // are dv = P^T dout, dk = scale dS^T q, dq = scale dS k.
  void gradient() {
    const Table dweights = products(dout, v);
    Table p, ds;
    for (int64_t i = 0; i < T; ++i) {
      Sum delta;
      for (int64_t c = 0; c < d; ++c) delta.add(at(dout, i * d + c), at(out_given, i * d + c));
      for (int64_t j = 0; j < T; ++j) {
        const Bounded lse_over_scale{static_cast<double>(lse_given[static_cast<size_t>(i)]) / kScale};
        const Bounded weight = exp_of(exponent(i, j, lse_over_scale));
        const Bounded less = rounded(of(dweights, i, j) - delta.total(whole(d)), kSingle);
        p.push_back(rounded(weight, kHalf));
        ds.push_back(rounded(rounded(weight * less, kSingle), kHalf));
      }
    }
    const auto total = [&](const Table& m, bool down, int64_t row, const Halves& b, int64_t c, double factor) {
      Sum sum;
      for (int64_t i = 0; i < T; ++i) sum.add(down ? of(m, i, row) : of(m, row, i), at(b, i * d + c));
      return rounded(rounded(sum.total(whole(T)) * Bounded{factor}, kSingle), kHalf);
    };
    for (int64_t i = 0; i < T; ++i)
      for (int64_t c = 0; c < d; ++c) {
        const size_t to = static_cast<size_t>(i * d + c);
        dv[to] = total(p, true, i, dout, c, 1);
        dk[to] = total(ds, true, i, q, c, kScale);
        dq[to] = total(ds, false, i, k, c, kScale);
      }
  }
};

// A call: the head in rows of all heads' q, k and v, [3, h, d] or [h, 3, d]; everything else in them is NaN.
struct Call {
  const AttentionLoops& loops;
  const Truth& t;
  int64_t number;
  bool legacy;
  Worst& worst;
  int64_t T = t.T, d = t.d, row = 3 * kHeads * d, out_row = kHeads * d;
  int64_t first = number * (legacy ? 3 * d : d), part = legacy ? d : kHeads * d;
  Exact<bfloat16> qkv{T * row}, dout{T * out_row}, out{T * out_row};
  AttentionHead head{qkv.data() + first, qkv.data() + first + part, qkv.data() + first + 2 * part, row, T, d, kScale};

  [[noreturn]] void fail(const char* what) const {
    std::fprintf(stderr, "%s, %d tokens of width %d: %s\n", loops.name, static_cast<int>(T), static_cast<int>(d), what);
    std::exit(1);
  }

  void put(const Halves& from, bfloat16* to, int64_t step) const {
    for (int64_t i = 0; i < T; ++i) std::copy_n(from.begin() + i * d, d, to + i * step);
  }

  // Column `begin` of rows `step` apart is the first of the head's own; all others must be as they were.
  void check(const Exact<bfloat16>& found, int64_t step, const std::vector<std::pair<int64_t, const Table*>>& parts) {
    for (int64_t i = 0; i < found.size(); ++i) {
      bool own = false;
      for (const auto& [begin, truth] : parts) {
        const int64_t column = i % step - begin;
        if (column < 0 || column >= d) continue;
        own = true;
        worst.judge(to_float(found[i]), (*truth)[static_cast<size_t>(i / step * d + column)]);
      }
      if (!own && !found.untouched(i)) fail("wrote to a column of another head");
    }
  }

  void forward() {
    put(t.q, qkv.data() + first, row), put(t.k, qkv.data() + first + part, row);
    put(t.v, qkv.data() + first + 2 * part, row);
    Exact<char> memory(loops.memory(head, false)), other(loops.memory(head, false));
    Exact<float> lse(T), lse_of_parts(T);
    Exact<bfloat16> of_parts(T * out_row);
    loops.forward(head, 0, T, false, out.data() + number * d, out_row, lse.data(), memory.data());
    check(out, out_row, {{number * d, &t.out}});
    for (int64_t i = 0; i < T; ++i) worst.judge(lse[i], t.lse[static_cast<size_t>(i)]);
    // The second part again finds keys and values in the memory.
    const int64_t middle = whole(T) / 64 * 32;
    loops.forward(head, middle, T, false, of_parts.data() + number * d, out_row, lse_of_parts.data(), other.data());
    if (middle)
      loops.forward(head, 0, middle, true, of_parts.data() + number * d, out_row, lse_of_parts.data(), other.data());
    loops.forward(head, middle, T, true, of_parts.data() + number * d, out_row, lse_of_parts.data(), other.data());
    if (std::memcmp(out.data(), of_parts.data(), 2 * static_cast<size_t>(T * out_row)) ||
        std::memcmp(lse.data(), lse_of_parts.data(), 4 * static_cast<size_t>(T)))
      fail("two parts differ from the whole");
  }

  void gradient() {
    Exact<char> memory(loops.memory(head, true));
    Exact<bfloat16> gradients(T * row);
    Exact<float> lse(T);
    std::copy(t.lse_given.begin(), t.lse_given.end(), lse.data());
    put(t.dout, dout.data() + number * d, out_row), put(t.out_given, out.data() + number * d, out_row);
    bfloat16* dq = gradients.data() + first;
    loops.gradient(head, dout.data() + number * d, out.data() + number * d, out_row, lse.data(), dq, dq + part,
                   dq + 2 * part, row, memory.data());
    check(gradients, row, {{first, &t.dq}, {first + part, &t.dk}, {first + 2 * part, &t.dv}});
  }
};

}  // namespace

int main(int argc, char**) {
  std::vector<const AttentionLoops*> here{&attention_generic};
#if defined(__x86_64__) && !defined(__clang__)
  const CpuIsa widest = widest_cpu_isa();  // it asks for the registers of AMX
  if (widest >= CpuIsa::kAvx512Bf16) here.push_back(&attention_avx512_bf16);
#if defined(ADMFAST_AMX)
  if (widest >= CpuIsa::kAmx) here.push_back(&attention_amx);
#endif
#endif
  std::printf("chosen %s\n", attention_loops().name);
  if (argc > 1) return 0;  // asked for the name only
  std::vector<Worst> worst(here.size());
  const auto run = [&](int64_t tokens, int64_t width, Kind kind) {
    const Truth truth(tokens, width, kind);
    for (size_t i = 0; i < here.size(); ++i)
      for (int64_t place = 0; place < 2 * kHeads; ++place) {
        Call call{*here[i], truth, place / 2, place % 2 == 1, worst[i]};
        call.forward();
        call.gradient();
      }
  };
  for (int64_t tokens : {1, 5, 32, 33, 70, 300})  // 300: two spans of queries of the gradient, three times its keys
    for (int64_t width : {3, 32, 40, 64, 96}) run(tokens, width, Kind::kNear);
  for (int64_t tokens : {5, 32, 70})
    for (Kind kind : {Kind::kFar, Kind::kLastFar}) run(tokens, 40, kind);
  for (size_t i = 0; i < here.size(); ++i) std::printf("%s %.3e\n", here[i]->name, worst[i].error);
}
