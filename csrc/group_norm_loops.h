// The loops of GroupNorm + SiLU, compiled once for each instruction set (vector.h says how to include this file).

namespace admfast {
namespace ADMFAST_ISA {

constexpr int64_t kRun = 16;       // rows of a run: first their mean is computed, then their squares about it
constexpr int64_t kLaneBlock = 512;  // lanes that are processed together: 16 rows of them stay in the first-level cache
constexpr int64_t kSumRows = 64;   // rows that are summed in float32 before they are added to a sum in double

// Not std::min: no function of the standard library may be compiled for this instruction set.
ADMFAST_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

template <typename T>
constexpr bool kIsHalf = sizeof(T) == 2;

// The coefficients of the lanes from `lane` on: loaded, or the same for all.
template <typename V, bool kUniform>
ADMFAST_INLINE V at_lane(const float* values, int64_t lane) {
  return kUniform ? V::set(*values) : V::load(values + lane);
}

// Float32 sums of a block of lanes.
struct LaneSums {
  float first[kLaneBlock], second[kLaneBlock];
};

// Merge the mean and squares of one run of rows, at V::kWidth lanes, into `mean` and `squares` of the `before` rows
// before it, by Chan's formula, so that no large mean is ever squared. `origin`, a row of x, is subtracted from
// everything, so that the mean has more digits than float32.
template <typename V, typename T>
ADMFAST_INLINE void run_moments(const T* x, const T* origin_at, int64_t rows, int64_t stride, int64_t before, float* mean,
                                float* squares) {
  const V origin = V::load(origin_at);
  V sum = V::set(0.0f), run_squares = V::set(0.0f), values[kRun];
  if (rows == kRun) {
#pragma GCC unroll 16
    for (int64_t r = 0; r < kRun; ++r) sum = sum + (values[r] = V::load(x + r * stride) - origin);
    sum = sum * V::set(1.0f / kRun);
#pragma GCC unroll 16
    for (int64_t r = 0; r < kRun; ++r) {
      const V d = values[r] - sum;
      run_squares = fma(d, d, run_squares);
    }
  } else {
    for (int64_t r = 0; r < rows; ++r) sum = sum + (V::load(x + r * stride) - origin);
    sum = sum * V::set(1.0f / static_cast<float>(rows));
    for (int64_t r = 0; r < rows; ++r) {
      const V d = V::load(x + r * stride) - origin - sum;
      run_squares = fma(d, d, run_squares);
    }
  }
  if (before == 0) {
    sum.store(mean);
    run_squares.store(squares);
    return;
  }
  const float weight = static_cast<float>(rows) / static_cast<float>(before + rows);
  const V total = V::load(mean), delta = sum - total;
  fma(delta, V::set(weight), total).store(mean);
  (V::load(squares) + fma(delta * delta, V::set(weight * static_cast<float>(before)), run_squares)).store(squares);
}

// Mean and squares of `rows` rows at `lanes` lanes (at most kLaneBlock). All lanes of a run are processed before the
// next run, so that each cache line is read whole and in order.
template <typename T>
ADMFAST_INLINE void block_moments(const T* x, int64_t rows, int64_t stride, int64_t lanes, double* mean,
                                  double* squares) {
  LaneSums sums = {};
  for (int64_t first = 0; first < rows; first += kRun) {
    const int64_t here = smaller(kRun, rows - first);
    const T* from = x + first * stride;
    int64_t lane = 0;
    for (; lane + Vector::kWidth <= lanes; lane += Vector::kWidth)
      run_moments<Vector>(from + lane, x + lane, here, stride, first, sums.first + lane, sums.second + lane);
    for (; lane < lanes; ++lane)
      run_moments<Scalar>(from + lane, x + lane, here, stride, first, sums.first + lane, sums.second + lane);
  }
  for (int64_t lane = 0; lane < lanes; ++lane) {
    mean[lane] = static_cast<double>(Scalar::load(x + lane).v) + static_cast<double>(sums.first[lane]);
    squares[lane] = sums.second[lane];
  }
}

template <typename T>
void moments(const T* x, NormRows s, double* mean, double* squares) {
  for (int64_t lane = 0; lane < s.lanes; lane += kLaneBlock)
    block_moments(x + lane, s.rows, s.stride, smaller(kLaneBlock, s.lanes - lane), mean + lane, squares + lane);
}

template <typename T>
void line_moments(const T* x, int64_t count, double* mean, double* squares) {
  constexpr int64_t kShare = 1024;  // vectors whose moments are merged in float32
  double seen = 0.0, m[Vector::kWidth], q[Vector::kWidth];
  *mean = *squares = 0.0;
  const auto merge = [&](double n, double own_mean, double own_squares) {
    const double delta = own_mean - *mean, share = n / (seen + n);
    *squares += own_squares + delta * delta * seen * share;
    *mean += delta * share;
    seen += n;
  };
  int64_t done = 0;
  while (count - done >= Vector::kWidth) {
    const int64_t rows = smaller(kShare, (count - done) / Vector::kWidth);
    block_moments(x + done, rows, Vector::kWidth, Vector::kWidth, m, q);
    double own_mean = 0.0, own_squares = 0.0;
    for (int64_t i = 0; i < Vector::kWidth; ++i) own_mean += m[i] * (1.0 / Vector::kWidth);
    for (int64_t i = 0; i < Vector::kWidth; ++i)
      own_squares += q[i] + static_cast<double>(rows) * (m[i] - own_mean) * (m[i] - own_mean);
    merge(static_cast<double>(rows * Vector::kWidth), own_mean, own_squares);
    done += rows * Vector::kWidth;
  }
  if (done < count) {
    block_moments(x + done, count - done, 1, 1, m, q);
    merge(static_cast<double>(count - done), m[0], q[0]);
  }
}

template <typename V, typename T, bool kSilu, bool kUniform>
ADMFAST_INLINE void apply_at(const T* x, NormCoefficients k, int64_t lane, T* y) {
  const V centred = V::load(x + lane) - at_lane<V, kUniform>(k.mean, lane);
  const V u = fma(centred, at_lane<V, kUniform>(k.factor, lane), at_lane<V, kUniform>(k.offset, lane));
  (kSilu ? u * sigmoid<kIsHalf<T>>(u) : u).store(y + lane);
}

template <typename T, bool kSilu, bool kUniform>
void apply(const T* x, NormRows s, NormCoefficients k, T* y, int64_t y_stride) {
  for (int64_t row = 0; row < s.rows; ++row, x += s.stride, y += y_stride) {
    int64_t lane = 0;
    for (; lane + Vector::kWidth <= s.lanes; lane += Vector::kWidth)
      apply_at<Vector, T, kSilu, kUniform>(x, k, lane, y);
    for (; lane < s.lanes; ++lane) apply_at<Scalar, T, kSilu, kUniform>(x, k, lane, y);
  }
}

// du = act'(u) dy, with silu'(u) = s (1 + u (1 - s)); `kHalf`: the result is rounded to bfloat16.
template <typename V, typename T, bool kSilu, bool kUniform, bool kHalf>
ADMFAST_INLINE V before_activation(const T* dy, V centred, NormCoefficients k, int64_t lane) {
  const V gradient = V::load(dy + lane);
  if (!kSilu) return gradient;
  const V u = fma(centred, at_lane<V, kUniform>(k.factor, lane), at_lane<V, kUniform>(k.offset, lane));
  const V s = sigmoid<kHalf>(u);
  const V slope = s * fma(u, V::set(1.0f) - s, V::set(1.0f));
  return gradient * slope;
}

// Add du and du (x - mean) of `rows` rows at V::kWidth lanes to the sums.
template <typename V, typename T, bool kSilu>
ADMFAST_INLINE void run_gradient_sums(const T* dy, int64_t dy_stride, const T* x, int64_t rows, int64_t stride,
                                      NormCoefficients k, int64_t lane, float* sums, float* weighted_sums) {
  const V mean = at_lane<V, false>(k.mean, lane);
  V total = V::load(sums), weighted = V::load(weighted_sums);
  for (int64_t row = 0; row < rows; ++row) {
    const V centred = V::load(x + row * stride + lane) - mean;
    const V du = before_activation<V, T, kSilu, false, false>(dy + row * dy_stride, centred, k, lane);
    total = total + du;
    weighted = fma(du, centred, weighted);
  }
  total.store(sums);
  weighted.store(weighted_sums);
}

// Add to the sums of the lanes from `begin` on, at most kLaneBlock of them.
template <typename T, bool kSilu>
ADMFAST_INLINE void block_gradient_sums(const T* dy, int64_t dy_stride, const T* x, NormRows s, NormCoefficients k,
                                        int64_t begin, double* sums, double* weighted_sums) {
  const int64_t lanes = smaller(kLaneBlock, s.lanes - begin);
  LaneSums own;
  for (int64_t first = 0; first < s.rows; first += kSumRows) {
    const int64_t end = smaller(first + kSumRows, s.rows);
    for (int64_t i = 0; i < lanes; ++i) own.first[i] = own.second[i] = 0.0f;
    for (int64_t row = first; row < end; row += kRun) {
      const int64_t rows = smaller(kRun, end - row);
      const auto run = [&](auto vector, int64_t lane) {
        using V = decltype(vector);
        run_gradient_sums<V, T, kSilu>(dy + row * dy_stride, dy_stride, x + row * s.stride, rows, s.stride, k,
                                       begin + lane, own.first + lane, own.second + lane);
      };
      int64_t lane = 0;
      for (; lane + Vector::kWidth <= lanes; lane += Vector::kWidth) run(Vector{}, lane);
      for (; lane < lanes; ++lane) run(Scalar{}, lane);
    }
    for (int64_t i = 0; i < lanes; ++i) {
      sums[begin + i] += own.first[i];
      weighted_sums[begin + i] += own.second[i];
    }
  }
}

template <typename V, typename T, bool kSilu>
ADMFAST_INLINE void line_gradient_sums(const T* dy, const T* x, int64_t vectors, NormCoefficients k, double* sums,
                                       double* weighted_sums) {
  const V mean = V::set(*k.mean);
  for (int64_t first = 0; first < vectors; first += kSumRows) {
    const int64_t end = smaller(first + kSumRows, vectors);
    V total = V::set(0.0f), weighted = V::set(0.0f);
    for (int64_t i = first; i < end; ++i) {
      const V centred = V::load(x + i * V::kWidth) - mean;
      const V du = before_activation<V, T, kSilu, true, false>(dy, centred, k, i * V::kWidth);
      total = total + du;
      weighted = fma(du, centred, weighted);
    }
    float a[V::kWidth], b[V::kWidth];
    total.store(a);
    weighted.store(b);
    for (int64_t i = 0; i < V::kWidth; ++i) {
      *sums += a[i];
      *weighted_sums += b[i];
    }
  }
}

template <typename T, bool kSilu>
void gradient_sums(const T* dy, int64_t dy_stride, const T* x, NormRows s, NormCoefficients k, double* sums,
                   double* weighted_sums) {
  if (k.uniform) {
    const int64_t vectors = s.lanes / Vector::kWidth, done = vectors * Vector::kWidth;
    for (int64_t row = 0; row < s.rows; ++row, x += s.stride, dy += dy_stride) {
      line_gradient_sums<Vector, T, kSilu>(dy, x, vectors, k, sums, weighted_sums);
      line_gradient_sums<Scalar, T, kSilu>(dy + done, x + done, s.lanes - done, k, sums, weighted_sums);
    }
    return;
  }
  for (int64_t lane = 0; lane < s.lanes; lane += kLaneBlock)
    block_gradient_sums<T, kSilu>(dy, dy_stride, x, s, k, lane, sums, weighted_sums);
}

template <typename V, typename T, bool kSilu, bool kUniform>
ADMFAST_INLINE void gradient_at(const T* dy, const T* x, const NormGradCoefficients& k, int64_t lane, T* dx) {
  const V centred = V::load(x + lane) - at_lane<V, kUniform>(k.forward.mean, lane);
  const V du = before_activation<V, T, kSilu, kUniform, kIsHalf<T>>(dy, centred, k.forward, lane);
  const V common = fma(centred, at_lane<V, kUniform>(k.slope, lane), at_lane<V, kUniform>(k.constant, lane));
  fma(du, at_lane<V, kUniform>(k.forward.factor, lane), common).store(dx + lane);
}

template <typename T, bool kSilu, bool kUniform>
void gradient(const T* dy, int64_t dy_stride, const T* x, NormRows s, const NormGradCoefficients& k, T* dx) {
  for (int64_t row = 0; row < s.rows; ++row, x += s.stride, dx += s.stride, dy += dy_stride) {
    int64_t lane = 0;
    for (; lane + Vector::kWidth <= s.lanes; lane += Vector::kWidth)
      gradient_at<Vector, T, kSilu, kUniform>(dy, x, k, lane, dx);
    for (; lane < s.lanes; ++lane) gradient_at<Scalar, T, kSilu, kUniform>(dy, x, k, lane, dx);
  }
}

// Turn the run-time type into a C++ type: `call(T{})`.
template <typename Call>
ADMFAST_INLINE void for_type(NormType type, Call call) {
  if (type == NormType::kFloat32) {
    call(float{});
  } else {
    call(bfloat16{});
  }
}

void moments_of(NormType type, const void* x, NormRows s, double* mean, double* squares) {
  for_type(type, [&](auto t) { moments(static_cast<const decltype(t)*>(x), s, mean, squares); });
}

void line_moments_of(NormType type, const void* x, int64_t count, double* mean, double* squares) {
  for_type(type, [&](auto t) { line_moments(static_cast<const decltype(t)*>(x), count, mean, squares); });
}

void apply_of(NormType type, const void* x, NormRows s, NormCoefficients k, bool silu, void* y, int64_t y_stride) {
  for_type(type, [&](auto t) {
    using T = decltype(t);
    const auto loop = silu ? (k.uniform ? apply<T, true, true> : apply<T, true, false>)
                           : (k.uniform ? apply<T, false, true> : apply<T, false, false>);
    loop(static_cast<const T*>(x), s, k, static_cast<T*>(y), y_stride);
  });
}

void gradient_sums_of(NormType type, const void* dy, int64_t dy_stride, const void* x, NormRows s,
                      NormCoefficients k, bool silu, double* sums, double* weighted_sums) {
  for_type(type, [&](auto t) {
    using T = decltype(t);
    const auto loop = silu ? gradient_sums<T, true> : gradient_sums<T, false>;
    loop(static_cast<const T*>(dy), dy_stride, static_cast<const T*>(x), s, k, sums, weighted_sums);
  });
}

void gradient_of(NormType type, const void* dy, int64_t dy_stride, const void* x, NormRows s,
                 NormGradCoefficients k, bool silu, void* dx) {
  for_type(type, [&](auto t) {
    using T = decltype(t);
    const bool uniform = k.forward.uniform;
    const auto loop = silu ? (uniform ? gradient<T, true, true> : gradient<T, true, false>)
                           : (uniform ? gradient<T, false, true> : gradient<T, false, false>);
    loop(static_cast<const T*>(dy), dy_stride, static_cast<const T*>(x), s, k, static_cast<T*>(dx));
  });
}

}  // namespace ADMFAST_ISA

const GroupNormLoops ADMFAST_LOOPS = {ADMFAST_LOOPS_NAME,         ADMFAST_ISA::moments_of,
                                      ADMFAST_ISA::line_moments_of, ADMFAST_ISA::apply_of,
                                      ADMFAST_ISA::gradient_sums_of, ADMFAST_ISA::gradient_of};

}  // namespace admfast
