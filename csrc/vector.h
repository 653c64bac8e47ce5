// A vector of floats for each instruction set, so that a kernel's loops are written only once.
// Include it after `#pragma GCC target`. ADMFAST_ISA is the namespace, and ADMFAST_LEVEL chooses the vectors: 0 for any
// machine, 256 for AVX2, 512 for AVX-512, 513 for AVX-512 with bfloat16, 514 for AMX. This file includes nothing, so
// that no standard function is compiled for an instruction set that the machine may lack.

namespace admfast {
namespace ADMFAST_ISA {

// One float, for the elements that don't fill a vector. It has the operations of the vectors below.
struct Scalar {
  static constexpr int64_t kWidth = 1;
  float v;
  static ADMFAST_INLINE Scalar set(float value) { return {value}; }
  static ADMFAST_INLINE Scalar load(const float* from) { return {*from}; }
  static ADMFAST_INLINE Scalar load(const bfloat16* from) { return {to_float(*from)}; }
  static ADMFAST_INLINE Scalar difference(const int32_t* a, const int32_t* b) { return {static_cast<float>(*a - *b)}; }
  ADMFAST_INLINE void store(float* to) const { *to = v; }
  // Round to nearest even; NaN stays NaN.
  ADMFAST_INLINE void store(bfloat16* to) const {
    const uint32_t bits = bits_of_float(v);
    to->bits = v == v ? static_cast<uint16_t>((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16) : uint16_t{0x7FC0};
  }
};
ADMFAST_INLINE Scalar operator+(Scalar a, Scalar b) { return {a.v + b.v}; }
ADMFAST_INLINE Scalar operator-(Scalar a, Scalar b) { return {a.v - b.v}; }
ADMFAST_INLINE Scalar operator*(Scalar a, Scalar b) { return {a.v * b.v}; }
ADMFAST_INLINE Scalar fma(Scalar a, Scalar b, Scalar c) { return {a.v * b.v + c.v}; }
// NaN stays NaN in both.
ADMFAST_INLINE Scalar at_least(Scalar a, float low) { return {a.v < low ? low : a.v}; }
ADMFAST_INLINE Scalar at_most(Scalar a, float high) { return {a.v > high ? high : a.v}; }
ADMFAST_INLINE Scalar larger(Scalar a, Scalar b) { return {a.v < b.v ? b.v : a.v}; }
template <bool kHalf>
ADMFAST_INLINE Scalar reciprocal(Scalar a) {
  return {1.0f / a.v};
}
// p * 2^n for a whole number n in [-127, 127].
ADMFAST_INLINE Scalar scaled(Scalar p, Scalar n) {
  return {p.v * float_of_bits(static_cast<uint32_t>(static_cast<int32_t>(n.v) + 127) << 23)};
}

#if ADMFAST_LEVEL >= 512
struct Vector {
  static constexpr int64_t kWidth = 16;
  __m512 v;
  static ADMFAST_INLINE Vector set(float value) { return {_mm512_set1_ps(value)}; }
  static ADMFAST_INLINE Vector load(const float* from) { return {_mm512_loadu_ps(from)}; }
  static ADMFAST_INLINE Vector load(const bfloat16* from) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16))};
  }
  static ADMFAST_INLINE Vector difference(const int32_t* a, const int32_t* b) {
    return {_mm512_cvtepi32_ps(_mm512_sub_epi32(_mm512_loadu_si512(a), _mm512_loadu_si512(b)))};
  }
  ADMFAST_INLINE void store(float* to) const { _mm512_storeu_ps(to, v); }
  ADMFAST_INLINE void store(bfloat16* to) const {
#if ADMFAST_LEVEL >= 513
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(v)));
#else
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i up = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7FFF)), odd);
    const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    const __m512i kept = _mm512_mask_mov_epi32(_mm512_srli_epi32(up, 16), nan, _mm512_set1_epi32(0x7FC0));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16(kept));
#endif
  }
};
ADMFAST_INLINE Vector operator+(Vector a, Vector b) { return {_mm512_add_ps(a.v, b.v)}; }
ADMFAST_INLINE Vector operator-(Vector a, Vector b) { return {_mm512_sub_ps(a.v, b.v)}; }
ADMFAST_INLINE Vector operator*(Vector a, Vector b) { return {_mm512_mul_ps(a.v, b.v)}; }
ADMFAST_INLINE Vector fma(Vector a, Vector b, Vector c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
ADMFAST_INLINE Vector at_least(Vector a, float low) { return {_mm512_max_ps(_mm512_set1_ps(low), a.v)}; }
ADMFAST_INLINE Vector at_most(Vector a, float high) { return {_mm512_min_ps(_mm512_set1_ps(high), a.v)}; }
ADMFAST_INLINE Vector larger(Vector a, Vector b) { return {_mm512_max_ps(a.v, b.v)}; }
// An estimate of 14 bits, and one Newton iteration if float32 is wanted. A division would cost as much as the rest.
template <bool kHalf>
ADMFAST_INLINE Vector reciprocal(Vector a) {
  const __m512 r = _mm512_rcp14_ps(a.v);
  if (kHalf) return {r};
  return {_mm512_fmadd_ps(_mm512_fnmadd_ps(a.v, r, _mm512_set1_ps(1.0f)), r, r)};
}
ADMFAST_INLINE Vector scaled(Vector p, Vector n) { return {_mm512_scalef_ps(p.v, n.v)}; }

#elif ADMFAST_LEVEL == 256
struct Vector {
  static constexpr int64_t kWidth = 8;
  __m256 v;
  static ADMFAST_INLINE Vector set(float value) { return {_mm256_set1_ps(value)}; }
  static ADMFAST_INLINE Vector load(const float* from) { return {_mm256_loadu_ps(from)}; }
  static ADMFAST_INLINE Vector load(const bfloat16* from) {
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(wide, 16))};
  }
  ADMFAST_INLINE void store(float* to) const { _mm256_storeu_ps(to, v); }
  ADMFAST_INLINE void store(bfloat16* to) const {
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i up = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7FFF)), odd);
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    const __m256i kept = _mm256_blendv_epi8(_mm256_srli_epi32(up, 16), _mm256_set1_epi32(0x7FC0), nan);
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(kept, kept), 0x08);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_castsi256_si128(packed));
  }
};
ADMFAST_INLINE Vector operator+(Vector a, Vector b) { return {_mm256_add_ps(a.v, b.v)}; }
ADMFAST_INLINE Vector operator-(Vector a, Vector b) { return {_mm256_sub_ps(a.v, b.v)}; }
ADMFAST_INLINE Vector operator*(Vector a, Vector b) { return {_mm256_mul_ps(a.v, b.v)}; }
ADMFAST_INLINE Vector fma(Vector a, Vector b, Vector c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
ADMFAST_INLINE Vector at_least(Vector a, float low) { return {_mm256_max_ps(_mm256_set1_ps(low), a.v)}; }
ADMFAST_INLINE Vector at_most(Vector a, float high) { return {_mm256_min_ps(_mm256_set1_ps(high), a.v)}; }
ADMFAST_INLINE Vector larger(Vector a, Vector b) { return {_mm256_max_ps(a.v, b.v)}; }
template <bool kHalf>
ADMFAST_INLINE Vector reciprocal(Vector a) {
  if (kHalf) return {_mm256_rcp_ps(a.v)};
  return {_mm256_div_ps(_mm256_set1_ps(1.0f), a.v)};
}
ADMFAST_INLINE Vector scaled(Vector p, Vector n) {
  const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n.v), _mm256_set1_epi32(127));
  return {_mm256_mul_ps(p.v, _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23)))};
}

#else
// Eight floats in loops that any compiler turns into the vectors of its machine.
struct Vector {
  static constexpr int64_t kWidth = 8;
  Scalar lane[kWidth];
#define ADMFAST_EACH(expression)                                                       \
  Vector result;                                                                       \
  for (int64_t i = 0; i < Vector::kWidth; ++i) result.lane[i] = expression; \
  return result
  static ADMFAST_INLINE Vector set(float value) { ADMFAST_EACH(Scalar::set(value)); }
  template <typename T>
  static ADMFAST_INLINE Vector load(const T* from) {
    ADMFAST_EACH(Scalar::load(from + i));
  }
  static ADMFAST_INLINE Vector difference(const int32_t* a, const int32_t* b) {
    ADMFAST_EACH(Scalar::difference(a + i, b + i));
  }
  template <typename T>
  ADMFAST_INLINE void store(T* to) const {
    for (int64_t i = 0; i < kWidth; ++i) lane[i].store(to + i);
  }
};
ADMFAST_INLINE Vector operator+(Vector a, Vector b) { ADMFAST_EACH(a.lane[i] + b.lane[i]); }
ADMFAST_INLINE Vector operator-(Vector a, Vector b) { ADMFAST_EACH(a.lane[i] - b.lane[i]); }
ADMFAST_INLINE Vector operator*(Vector a, Vector b) { ADMFAST_EACH(a.lane[i] * b.lane[i]); }
ADMFAST_INLINE Vector fma(Vector a, Vector b, Vector c) { ADMFAST_EACH(fma(a.lane[i], b.lane[i], c.lane[i])); }
ADMFAST_INLINE Vector at_least(Vector a, float low) { ADMFAST_EACH(at_least(a.lane[i], low)); }
ADMFAST_INLINE Vector at_most(Vector a, float high) { ADMFAST_EACH(at_most(a.lane[i], high)); }
ADMFAST_INLINE Vector larger(Vector a, Vector b) { ADMFAST_EACH(larger(a.lane[i], b.lane[i])); }
template <bool kHalf>
ADMFAST_INLINE Vector reciprocal(Vector a) {
  ADMFAST_EACH(reciprocal<kHalf>(a.lane[i]));
}
ADMFAST_INLINE Vector scaled(Vector p, Vector n) { ADMFAST_EACH(scaled(p.lane[i], n.lane[i])); }
#undef ADMFAST_EACH
#endif

// 2^f on [-1/2, 1/2], relative error 1.1e-7.
template <typename V>
ADMFAST_INLINE V exp2_fraction(V f) {
  V p = fma(V::set(0x1.5bba14p-10f), f, V::set(0x1.3cea88p-7f));
  p = fma(p, f, V::set(0x1.c6b752p-5f));
  p = fma(p, f, V::set(0x1.ebf9bcp-3f));
  p = fma(p, f, V::set(0x1.62e42ap-1f));
  return fma(p, f, V::set(1.0f));
}

// e^-u for float32. u is limited to [-87, 87]: beyond, the sigmoid is 0 or 1 to every digit.
template <typename V>
ADMFAST_INLINE V exp_negative(V u) {
  const V magic = V::set(0x1.8p23f);  // adding and subtracting it rounds to a whole number
  const V bounded = at_most(at_least(u, -87.0f), 87.0f);
  const V n = fma(bounded, V::set(-0x1.715476p+0f), magic) - magic;
  V f = fma(bounded, V::set(-0x1.715476p+0f), V::set(0.0f) - n);
  f = fma(bounded, V::set(-0x1.4ae0cp-26f), f);
  return scaled(exp2_fraction(f), n);
}

// 2^t for results that are rounded to bfloat16: a relative error of 1.0e-4, a fortieth of that rounding error.
template <typename V>
ADMFAST_INLINE V exp2_half(V t) {
#if ADMFAST_LEVEL >= 512
  if constexpr (V::kWidth == 16) {
    const V f = {_mm512_reduce_ps(t.v, 0)};  // t less its nearest whole number
    V p = fma(V::set(0x1.c2a21ap-5f), f, V::set(0x1.f00c4ep-3f));
    p = fma(p, f, V::set(0x1.62f5fap-1f));
    return {_mm512_scalef_ps(fma(p, f, V::set(1.0f)).v, (t - f).v)};
  }
#endif
  const V magic = V::set(0x1.8p23f), bounded = at_most(at_least(t, -126.0f), 126.0f);
  const V n = (bounded + magic) - magic;
  return scaled(exp2_fraction(bounded - n), n);
}

// The same for e^-u.
template <typename V>
ADMFAST_INLINE V exp_negative_half(V u) {
#if ADMFAST_LEVEL >= 512
  if constexpr (V::kWidth == 16) return exp2_half(u * V::set(-0x1.715476p+0f));
#endif
  return exp_negative(u);
}

// 1 / (1 + e^-u).
template <bool kHalf, typename V>
ADMFAST_INLINE V sigmoid(V u) {
  return reciprocal<kHalf>(V::set(1.0f) + (kHalf ? exp_negative_half(u) : exp_negative(u)));
}

}  // namespace ADMFAST_ISA
}  // namespace admfast
