// Elementary functions as plain scalar code that a compiler can turn into SIMD: no branch, no table, no call.
//
// Everything is forced inline, so that each copy is compiled for the instruction set of the function it ends up in
// (KD_TARGET, cpu_level.h), and nothing is left for the linker to merge across instruction sets.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>

#if defined(__CUDACC__)
#define KD_INLINE __host__ __device__ __forceinline__
#else
#define KD_INLINE inline __attribute__((always_inline))
#endif

namespace kd {

template <class To, class From>
KD_INLINE To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From), "bit casts keep the size");
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

// Per type: the constant whose addition rounds to an integer and leaves it in the low bits, and where 2^x underflows.
template <class Real>
struct Format;

template <>
struct Format<float> {
  using Bits = uint32_t;
  static constexpr int mantissa = 23;
  static constexpr float round = 12582912.f;
  static constexpr float lowest = -126.f, highest = 128.f;
  static constexpr Bits one = 0x3f800000u, sqrt_half = 0x3f3504f3u;
};

template <>
struct Format<double> {
  using Bits = uint64_t;
  static constexpr int mantissa = 52;
  static constexpr double round = 6755399441055744.0;
  static constexpr double lowest = -1022.0, highest = 1024.0;
  static constexpr Bits one = 0x3ff0000000000000u, sqrt_half = 0x3fe6a09e667f3bcdu;
};

// c[0] + c[1]·x + … by Horner's rule.
template <class Real, int N>
KD_INLINE Real polynomial(Real x, const Real (&c)[N]) {
  Real y = c[N - 1];
  for (int k = N - 2; k >= 0; --k) y = y * x + c[k];
  return y;
}

template <class Real>
KD_INLINE Real infinity() {
  return std::numeric_limits<Real>::infinity();
}

// 2^r for |r| ≤ ½: minimax of degree 6 (relative error 1.6e-8), Taylor of degree 13 in double (2e-16).
KD_INLINE float exp2_fraction(float r) {
  constexpr float c[] = {1.f,           0.693147206f,  0.240226469f,  0.0555032878f,
                         0.00961848898f, 0.00133999316f, 0.000153458078f};
  return polynomial(r, c);
}
KD_INLINE double exp2_fraction(double r) {
  constexpr double c[] = {1.0,
                          0.69314718055994531,
                          0.24022650695910071,
                          0.055504108664821580,
                          0.0096181291076284772,
                          0.0013333558146428443,
                          0.00015403530393381610,
                          1.5252733804059840e-05,
                          1.3215486790144309e-06,
                          1.0178086009239699e-07,
                          7.0549116208011233e-09,
                          4.4455382718708114e-10,
                          2.5678435993488205e-11,
                          1.3691488853904128e-12};
  return polynomial(r, c);
}

// 2^(x·c) for c > 0; 0 below the normal numbers, +inf and NaN kept. The product is never rounded where the CPU has FMA.
template <class Real>
KD_INLINE Real exp2_scaled(Real x, Real c) {
  using F = Format<Real>;
  using Bits = typename F::Bits;
  Real shifted = x * c + F::round;
  Real fraction = x * c - (shifted - F::round);
  Bits exponent = static_cast<Bits>(bits_as<Bits>(shifted) << F::mantissa);
  Real y = bits_as<Real>(static_cast<Bits>(bits_as<Bits>(exp2_fraction(fraction)) + exponent));
  y = x < F::lowest / c ? Real(0) : y;
  return x < F::highest / c ? y : x + infinity<Real>();
}

template <class Real>
KD_INLINE Real exp(Real x) {
  // log2(e) in two pieces: rounded to one float it would be off by 1e-6 at x = −87.
  constexpr Real high = sizeof(Real) == 4 ? Real(1.44269502162933349609) : Real(1.4426950408889634);
  constexpr Real low = sizeof(Real) == 4 ? Real(1.92596299e-8) : Real(2.0355273740931033e-17);
  using F = Format<Real>;
  using Bits = typename F::Bits;
  Real shifted = x * high + F::round;
  Real fraction = (x * high - (shifted - F::round)) + x * low;
  Bits exponent = static_cast<Bits>(bits_as<Bits>(shifted) << F::mantissa);
  Real y = bits_as<Real>(static_cast<Bits>(bits_as<Bits>(exp2_fraction(fraction)) + exponent));
  y = x < F::lowest / high ? Real(0) : y;
  return x < F::highest / high ? y : x + infinity<Real>();
}

// expm1(x)/x for |x| ≤ ½.
KD_INLINE float expm1_ratio(float x) {
  constexpr float c[] = {1.f,            0.500000043f,  0.166666684f,  0.0416653039f,
                         0.00833305216f, 0.00139977836f, 0.00019996821f};
  return polynomial(x, c);
}
KD_INLINE double expm1_ratio(double x) {
  constexpr double c[] = {1.0,
                          0.5,
                          0.16666666666666667,
                          0.041666666666666667,
                          0.0083333333333333333,
                          0.0013888888888888889,
                          0.00019841269841269841,
                          2.4801587301587302e-05,
                          2.7557319223985891e-06,
                          2.7557319223985891e-07,
                          2.5052108385441719e-08,
                          2.0876756987868099e-09,
                          1.6059043836821615e-10,
                          1.1470745597729725e-11};
  return polynomial(x, c);
}

template <class Real>
KD_INLINE Real absolute(Real x) {
  return x < 0 ? -x : x;
}

template <class Real>
KD_INLINE Real expm1(Real x) {
  return absolute(x) < Real(0.5) ? x * expm1_ratio(x) : exp(x) - 1;
}

// expm1(x) − x for |x| ≤ ¼ (elsewhere meaningless), a few roundings of relative error.
KD_INLINE float expm1_minus(float x) {
  constexpr float c[] = {0.5f, 0.166666424f, 0.0416665879f, 0.0083488485f, 0.00139160386f};
  return x * x * polynomial(x, c);
}
KD_INLINE double expm1_minus(double x) {
  constexpr double c[] = {0.5,
                          0.16666666666666667,
                          0.041666666666666667,
                          0.0083333333333333333,
                          0.0013888888888888889,
                          0.00019841269841269841,
                          2.4801587301587302e-05,
                          2.7557319223985891e-06,
                          2.7557319223985891e-07,
                          2.5052108385441719e-08,
                          2.0876756987868099e-09,
                          1.6059043836821615e-10};
  return x * x * polynomial(x, c);
}

// atanh(√z)/√z for z ≤ 0.0295, that is for mantissas in [√½, √2].
KD_INLINE float atanh_ratio(float z) {
  constexpr float c[] = {1.f, 0.333334083f, 0.199873672f, 0.149635609f};
  return polynomial(z, c);
}
KD_INLINE double atanh_ratio(double z) {
  constexpr double c[] = {1.0,      1.0 / 3,  1.0 / 5,  1.0 / 7,  1.0 / 9, 1.0 / 11,
                          1.0 / 13, 1.0 / 15, 1.0 / 17, 1.0 / 19, 1.0 / 21};
  return polynomial(z, c);
}

// log(1 + y) for y ≥ −1; y itself is used while 1 + y needs no scaling, so that a small y keeps its digits.
template <class Real>
KD_INLINE Real log1p(Real y) {
  using F = Format<Real>;
  using Bits = typename F::Bits;
  Real u = 1 + y;
  Bits offset = bits_as<Bits>(u) - F::sqrt_half;
  Bits exponent_bits = offset & (~Bits(0) << F::mantissa);
  Real mantissa = bits_as<Real>(static_cast<Bits>(bits_as<Bits>(u) - exponent_bits));
  // The exponent as a number, without a conversion that AVX2 lacks for 64 bits: it sits below the bits of F::round.
  Bits biased = (exponent_bits >> F::mantissa) + (F::one >> F::mantissa);
  biased &= (Bits(1) << (sizeof(Real) * 8 - 1 - F::mantissa)) - 1;
  Real exponent = bits_as<Real>(static_cast<Bits>(bits_as<Bits>(F::round) + biased)) - F::round -
                  Real(F::one >> F::mantissa);
  Real f = exponent == 0 ? y : mantissa - 1;
  f = f / (f + 2);
  Real result = 2 * f * atanh_ratio(f * f) + exponent * Real(0.69314718055994531);
  result = u > 0 ? result : (u == 0 ? -infinity<Real>() : u - u);
  return u < infinity<Real>() ? result : u;
}

// ---- 16-bit storage ----

KD_INLINE float from_bfloat16(uint16_t x) { return bits_as<float>(static_cast<uint32_t>(x) << 16); }

// Round to nearest, ties to even; NaN stays NaN.
KD_INLINE uint16_t to_bfloat16(float x) {
  uint32_t u = bits_as<uint32_t>(x);
  uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  return static_cast<uint16_t>(x != x ? 0x7fc0u : rounded);
}

KD_INLINE float from_float16(uint16_t x) {
  uint32_t sign = (x & 0x8000u) << 16, magnitude = (x & 0x7fffu) << 13;
  // 2^112 moves the exponent's bias from 15 to 127, and makes subnormals normal.
  float value = bits_as<float>(magnitude) * bits_as<float>(0x77800000u);
  uint32_t special = magnitude >= 0x0f800000u ? 0x7f800000u | magnitude : bits_as<uint32_t>(value);
  return bits_as<float>(special | sign);
}

KD_INLINE uint16_t to_float16(float x) {
  uint32_t u = bits_as<uint32_t>(x), sign = (u >> 16) & 0x8000u, magnitude = u & 0x7fffffffu;
  // Normal halves: rebias and round to even in the integers.
  uint32_t normal = (magnitude + 0xc8000fffu + ((magnitude >> 13) & 1u)) >> 13;
  // Subnormal halves: adding ½ leaves the mantissa, rounded to even, in the low bits.
  uint32_t small = bits_as<uint32_t>(bits_as<float>(magnitude) + 0.5f) - 0x3f000000u;
  uint32_t half = magnitude < 0x38800000u ? small : normal;
  half = magnitude >= 0x47800000u ? 0x7c00u : half;
  half = magnitude > 0x7f800000u ? 0x7e00u : half;
  return static_cast<uint16_t>(half | sign);
}

}  // namespace kd
