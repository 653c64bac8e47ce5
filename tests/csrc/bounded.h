// Exact values with the most that rounding can change them: what a computation in float32 and bfloat16 is judged by.
#pragma once

#include <cmath>
#include <cstdint>

constexpr double kSingle = 0x1p-24, kHalf = 0x1p-8;  // half a unit in the last place of 1: the error of one rounding
constexpr double kTiny = 0x1p-126;  // smaller results may become zero

struct Bounded {
  double is, off = 0;  // without rounding; the largest error
  double most() const { return std::fabs(is) + off; }
};

inline Bounded operator+(Bounded a, Bounded b) { return {a.is + b.is, a.off + b.off}; }
inline Bounded operator-(Bounded a, Bounded b) { return {a.is - b.is, a.off + b.off}; }
inline Bounded operator*(Bounded a, Bounded b) {
  return {a.is * b.is, a.most() * b.most() - std::fabs(a.is * b.is)};
}
inline Bounded operator/(Bounded a, Bounded b) {
  return {a.is / b.is, (a.off + std::fabs(a.is / b.is) * b.off) / (std::fabs(b.is) - b.off)};
}

// What n roundings, one after the other, can change of 1 (Higham, Accuracy and Stability, lemma 3.1).
inline double several(double unit, int64_t n) {
  const double all = static_cast<double>(n) * unit;
  return all / (1 - all);
}

inline Bounded rounded(Bounded a, double unit, int64_t times = 1) {
  return {a.is, a.off + several(unit, times) * a.most() + static_cast<double>(times) * kTiny};
}

// A sum of products in float32, in any order; a product of two bfloat16 is exact.
struct Sum {
  double is = 0, off = 0, size = 0;
  void add(Bounded a, Bounded b = {1}) {
    const Bounded term = a * b;
    is += term.is, off += term.off, size += term.most();
  }
  Bounded total(int64_t roundings) const {
    return {is, off + several(kSingle, roundings) * size + static_cast<double>(roundings) * kTiny};
  }
};

// The largest error, divided by its bound. NaN stays.
struct Worst {
  double error = 0;
  void judge(double got, Bounded truth) {
    const double found = std::fabs(got - truth.is) / truth.off;
    if (error == error && !(found <= error)) error = found;
  }
};
