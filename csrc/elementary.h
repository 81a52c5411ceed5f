// Elementary functions as plain scalar code that a compiler can turn into SIMD: no branch, no
// table, no call.
//
// Everything is forced inline, so that each copy is compiled for the instruction set of the
// function it ends up in (KD_TARGET, cpu_level.h), and nothing is left for the linker to merge
// across instruction sets.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>

#include "inline.h"

namespace kd {

template <class To, class From>
KD_INLINE To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From), "bit casts keep the size");
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

// Per type: the constant whose addition rounds to an integer and leaves it in the low bits, and
// where 2^x underflows.
template <class Real>
struct Format;

template <>
struct Format<float> {
  using Limits = std::numeric_limits<float>;
  static constexpr float infinity = Limits::infinity(), nan = Limits::quiet_NaN();
  static constexpr float smallest = Limits::min();  // normal number
  using Bits = uint32_t;
  static constexpr int mantissa = 23;
  static constexpr float round = 12582912.f;
  static constexpr float lowest = -126.f, highest = 128.f, bias = 127.f;
  static constexpr Bits one = 0x3f800000u, sqrt_half = 0x3f3504f3u, magnitude = 0x7fffffffu;
};

template <>
struct Format<double> {
  using Limits = std::numeric_limits<double>;
  static constexpr double infinity = Limits::infinity(), nan = Limits::quiet_NaN();
  static constexpr double smallest = Limits::min();  // normal number
  using Bits = uint64_t;
  static constexpr int mantissa = 52;
  static constexpr double round = 6755399441055744.0;
  static constexpr double lowest = -1022.0, highest = 1024.0, bias = 1023.0;
  static constexpr Bits one = 0x3ff0000000000000u, sqrt_half = 0x3fe6a09e667f3bcdu,
                        magnitude = 0x7fffffffffffffffu;
};

// c[0] + c[1]·x + … by Horner's rule. (Estrin's scheme, with a shorter chain but more operations,
// makes the exponentials 14 % slower and JSD 9 % faster.)
template <class Real, int N>
KD_INLINE Real polynomial(Real x, const Real (&c)[N]) {
  Real y = c[N - 1];
  for (int k = N - 2; k >= 0; --k) y = y * x + c[k];
  return y;
}

template <class Real>
KD_INLINE Real infinity() {
  return Format<Real>::infinity;
}

template <class Real>
KD_INLINE Real not_a_number() {
  return Format<Real>::nan;
}

// (2^r − 1)/r for |r| ≤ ½: minimax of degree 5 (relative error 1.1e-8), Taylor of degree 12 in
// double (2e-16).
KD_INLINE float exp2m1_ratio(float r) {
  constexpr float c[] = {0.693147188f,   0.240226498f,   0.0555035743f,
                         0.00961823751f, 0.00133907358f, 0.000154035086f};
  return polynomial(r, c);
}
KD_INLINE double exp2m1_ratio(double r) {
  constexpr double c[] = {0.6931471805599453,     0.2402265069591007,     0.055504108664821576,
                          0.009618129107628477,   0.0013333558146428441,  0.00015403530393381606,
                          1.5252733804059838e-05, 1.3215486790144305e-06, 1.0178086009239696e-07,
                          7.054911620801121e-09,  4.44553827187081e-10,   2.5678435993488196e-11,
                          1.3691488853904124e-12};
  return polynomial(r, c);
}

template <class Real>
KD_INLINE Real exp2_fraction(Real r) {
  return r * exp2m1_ratio(r) + Real(1);
}

// 2^(x·c) for x ≤ 0 < c: what a softmax needs. 0 below the normal numbers; NaN kept. The product is
// never rounded where the CPU has FMA. The constant is F::round plus the exponent's bias, so that a
// shift turns its low bits into the number 2^n.
template <class Real>
KD_INLINE Real exp2_scaled(Real x, Real c) {
  using F = Format<Real>;
  using Bits = typename F::Bits;
  constexpr Real magic = F::round + F::bias;
  Real shifted = x * c + magic;
  Real fraction = x * c + (magic - shifted);
  Real power = bits_as<Real>(static_cast<Bits>(bits_as<Bits>(shifted) << F::mantissa));
  Real y = exp2_fraction(fraction) * power;
  return x < F::lowest / c ? Real(0) : y;
}

// The same with c in two pieces, high + low, for results whose own relative error matters: a c
// rounded to one number costs |x·c| roundings.
template <class Real>
KD_INLINE Real exp2_scaled(Real x, Real high, Real low) {
  using F = Format<Real>;
  using Bits = typename F::Bits;
  constexpr Real magic = F::round + F::bias;
  Real shifted = x * high + magic;
  Real fraction = (x * high - (shifted - magic)) + x * low;
  Real power = bits_as<Real>(static_cast<Bits>(bits_as<Bits>(shifted) << F::mantissa));
  Real y = exp2_fraction(fraction) * power;
  return x < F::lowest / high ? Real(0) : y;
}

template <class Real>
KD_INLINE Real exp(Real x) {
  // log2(e) in two pieces: rounded to one float it would be off by 1e-6 at x = −87.
  constexpr Real high = sizeof(Real) == 4 ? Real(1.44269502162933349609) : Real(1.4426950408889634);
  constexpr Real low = sizeof(Real) == 4 ? Real(1.92596299e-8) : Real(2.0355273740931033e-17);
  using F = Format<Real>;
  using Bits = typename F::Bits;
  Real shifted = x * high + F::round;
  Real fraction = x * low + (x * high + (F::round - shifted));
  Bits exponent = static_cast<Bits>(bits_as<Bits>(shifted) << F::mantissa);
  Real y = bits_as<Real>(static_cast<Bits>(bits_as<Bits>(exp2_fraction(fraction)) + exponent));
  y = x < F::lowest / high ? Real(0) : y;
  return x < F::highest / high ? y : x + infinity<Real>();
}

// expm1(x)/x for |x| ≤ ½.
KD_INLINE float expm1_ratio(float x) {
  constexpr float c[] = {1.f,           0.500000043f,   0.166666684f,
                         0.0416653039f, 0.00833305216f, 0.00139977836f,
                         0.00019996821f};
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
  return bits_as<Real>(bits_as<typename Format<Real>::Bits>(x) & Format<Real>::magnitude);
}

template <class Real>
KD_INLINE Real expm1(Real x) {
  return absolute(x) < Real(0.5) ? x * expm1_ratio(x) : exp(x) - 1;
}

template <class Real>
constexpr Real log2_e = Real(1.4426950408889634);

// expm1(x) for x ≤ 0, exact to a few roundings near 0 too: 2^n·(2^f − 1) + (2^n − 1) has n = 0
// there. −1 below −64.
template <class Real>
KD_INLINE Real expm1_nonpositive(Real x) {
  using F = Format<Real>;
  using Bits = typename F::Bits;
  constexpr Real magic = F::round + F::bias, c = log2_e<Real>;
  x = x < -64 ? Real(-64) : x;
  Real shifted = x * c + magic;
  Real fraction = x * c + (magic - shifted);
  Real power = bits_as<Real>(static_cast<Bits>(bits_as<Bits>(shifted) << F::mantissa));
  return power * (fraction * exp2m1_ratio(fraction)) + (power - 1);
}

// (expm1(x) − x)/x for |x| ≤ ¼ (elsewhere meaningless), a few roundings of relative error.
KD_INLINE float expm1_minus_over_x(float x) {
  constexpr float c[] = {0.5f, 0.166666424f, 0.0416665879f, 0.0083488485f, 0.00139160386f};
  return x * polynomial(x, c);
}
KD_INLINE double expm1_minus_over_x(double x) {
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
  return x * polynomial(x, c);
}

template <class Real>
KD_INLINE Real expm1_minus(Real x) {
  return x * expm1_minus_over_x(x);
}

// log(1 + f)/f for 1 + f in [√½, √2]: minimax of degree 9 (4e-9); in double 2·atanh(g)/f with g =
// f/(2 + f), to 1e-17.
KD_INLINE float log1p_ratio(float f) {
  constexpr float c[] = {1.f,          -0.499999883f, 0.33333326f,  -0.250015866f,
                         0.20001968f,  -0.166090116f, 0.141818431f, -0.132434795f,
                         0.129046209f, -0.0762102624f};
  return polynomial(f, c);
}
KD_INLINE double log1p_ratio(double f) {
  constexpr double c[] = {1.0,      1.0 / 3,  1.0 / 5,  1.0 / 7,  1.0 / 9, 1.0 / 11,
                          1.0 / 13, 1.0 / 15, 1.0 / 17, 1.0 / 19, 1.0 / 21};
  double g = f / (2 + f);
  return 2 * polynomial(g * g, c) / (2 + f);
}

// The exponent in the bits above a mantissa of 0, as a number. AVX2 cannot convert 64-bit integers.
KD_INLINE float exponent_value(uint32_t bits) {
  return static_cast<float>(static_cast<int32_t>(bits) >> 23);
}
KD_INLINE double exponent_value(uint64_t bits) {
  constexpr uint64_t one = Format<double>::one;
  uint64_t biased = ((bits + one) >> 52) & 0x7ff;
  return bits_as<double>(bits_as<uint64_t>(Format<double>::round) + biased) -
         (Format<double>::round + Format<double>::bias);
}

// log(x): −inf at 0, NaN below; subnormal numbers are scaled up first.
template <class Real>
KD_INLINE Real log(Real x) {
  using F = Format<Real>;
  using Bits = typename F::Bits;
  constexpr Real scale = Real(Bits(1) << F::mantissa), smallest = F::smallest;
  Real normal = x < smallest ? x * scale : x;
  Bits exponent_bits = (bits_as<Bits>(normal) - F::sqrt_half) & (~Bits(0) << F::mantissa);
  Real exponent = exponent_value(exponent_bits) - (x < smallest ? Real(F::mantissa) : Real(0));
  Real f = bits_as<Real>(static_cast<Bits>(bits_as<Bits>(normal) - exponent_bits)) - 1;
  Real result = exponent * Real(0.69314718055994531) + f * log1p_ratio(f);
  result = x > 0 ? result : (x == 0 ? -infinity<Real>() : not_a_number<Real>());
  return x < infinity<Real>() ? result : x;
}

// log(1 + y) for −1 < y ≤ 0; y itself is used while 1 + y needs no scaling, so that a small y keeps
// its digits. NaN kept.
template <class Real>
KD_INLINE Real log1p_nonpositive(Real y) {
  using F = Format<Real>;
  using Bits = typename F::Bits;
  Real u = 1 + y;
  Bits exponent_bits = (bits_as<Bits>(u) - F::sqrt_half) & (~Bits(0) << F::mantissa);
  Real exponent = exponent_value(exponent_bits);
  Real mantissa = bits_as<Real>(static_cast<Bits>(bits_as<Bits>(u) - exponent_bits));
  Real f = exponent_bits == 0 ? y : mantissa - 1;
  Real result = exponent * Real(0.69314718055994531) + f * log1p_ratio(f);
  return y <= 0 ? result : y;
}

// The same for y ≥ √½/2 − 1: one halving is then enough, 4 operations instead of 10.
template <class Real>
KD_INLINE Real log1p_moderate(Real y) {
  bool halved = y < Real(-0.29289321881345248);  // √½ − 1
  Real f = halved ? 2 * y + 1 : y;
  Real result = f * log1p_ratio(f);
  return halved ? result - Real(0.69314718055994531) : result;
}

// x/y; on a device by the hardware's reciprocal (2 units in the last place), since nothing that
// ends in a loss or a gradient has more digits.
template <class Real>
KD_INLINE Real quotient(Real x, Real y) {
#if defined(__CUDA_ARCH__)
  return __fdividef(x, y);
#else
  return x / y;
#endif
}

#if defined(__CUDACC__)
// 2^x by the hardware: 2 units in the last place, 0 below the normal numbers.
__device__ __forceinline__ float exp2_hardware(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
#endif

// Zero weight wins over inf and NaN.
template <class Real>
KD_INLINE Real times(Real weight, Real x) {
  return weight == 0 ? Real(0) : weight * x;
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
