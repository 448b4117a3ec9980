/* Scalar functions that compilers vectorise without fast-math, honest about NaN and infinity, and
   how steps get what they work on. DOUBLE, the type of the arithmetic, and MAX_BLOCK are defined by
   the generated file. */
#include <math.h>
#include <pthread.h>
#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))

#if DOUBLE
typedef double real;
typedef uint64_t bits;
#define F(name) name
#define LARGEST 1.7976931348623157e308
#define MANTISSA 52
#define BIAS 1023
#define SHIFT 6755399441055744.0 /* 1.5 * 2^52: adding it rounds to an integer in the low bits */
#define LN2_HIGH 6.93147180369123816490e-01
#define LN2_LOW 1.90821492927058770002e-10
#define EXP_LOW -746.0
#define EXP_HIGH 710.0
#define TANH_HIGH 44.0
#define SMALLEST 2.2250738585072014e-308
#define SQRT_HALF_BITS 0x3fe6a09e667f3bcdULL
#else
typedef float real;
typedef uint32_t bits;
#define F(name) name##f
#define LARGEST 3.402823466e38f
#define MANTISSA 23
#define BIAS 127
#define SHIFT 12582912.0f
#define LN2_HIGH 0.693359375f
#define LN2_LOW -2.12194440e-4f
#define EXP_LOW -104.0f
#define EXP_HIGH 89.0f
#define TANH_HIGH 22.0f
#define SMALLEST 1.17549435e-38f
#define SQRT_HALF_BITS 0x3f3504f3U
#endif
#define C(x) ((real)(x))

INLINE bits to_bits(real x) { bits b; memcpy(&b, &x, sizeof b); return b; }
INLINE real from_bits(bits b) { real x; memcpy(&x, &b, sizeof x); return x; }

/* 2^n for an integral n with -BIAS < n <= BIAS */
INLINE real power_of_two(real n) { return from_bits(to_bits(n + (SHIFT + BIAS)) << MANTISSA); }
INLINE real nearest(real x) { return (x + SHIFT) - SHIFT; }

/* e^r - 1 for |r| <= ln(2) / 2, by its Taylor series */
INLINE real expm1_small(real r) {
  const real r2 = r * r;
#if DOUBLE
  const real r4 = r2 * r2;
  const real low = (C(1. / 6) + r * C(1. / 24)) + r2 * (C(1. / 120) + r * C(1. / 720));
  const real high = (C(1. / 5040) + r * C(1. / 40320)) + r2 * (C(1. / 362880) + r * C(1. / 3628800));
  const real top = C(1. / 39916800) + r * (C(1. / 479001600) + r * C(1. / 6227020800.));
  return r + r2 * (C(0.5) + r * (low + r4 * (high + r4 * top)));
#else
  const real low = C(0.5) + r * C(1. / 6);
  const real high = C(1. / 24) + r * C(1. / 120) + r2 * (C(1. / 720) + r * C(1. / 5040));
  return r + r2 * (low + r2 * high);
#endif
}

INLINE real pr_exp(real x) {
  real c = x > EXP_HIGH ? EXP_HIGH : x;
  c = c < EXP_LOW ? EXP_LOW : c;
  const real n = nearest(c * C(1.4426950408889634));
  const real r = (c - n * LN2_HIGH) - n * LN2_LOW;
  const real half = nearest(n * C(0.5));
  return (expm1_small(r) + C(1)) * power_of_two(half) * power_of_two(n - half);
}

/* e^x - 1 for x below the overflow of e^x */
INLINE real expm1_finite(real x) {
  const real n = nearest(x * C(1.4426950408889634));
  const real r = (x - n * LN2_HIGH) - n * LN2_LOW;
  const real scale = power_of_two(n);
  return expm1_small(r) * scale + (scale - C(1));
}

INLINE real pr_expm1(real x) {
  real c = x > C(80) ? C(80) : x;
  c = c < C(-80) ? C(-80) : c;
  const real small = expm1_finite(c);
  return x > C(80) ? pr_exp(x) : small;
}

INLINE real pr_tanh(real x) {
  const real y = C(2) * F(fabs)(x);
  const real e = expm1_finite(y > TANH_HIGH ? TANH_HIGH : y);
  return F(copysign)(e / (e + C(2)), x);
}

INLINE real pr_sigmoid(real x) { return C(1) / (C(1) + pr_exp(-x)); }

INLINE real pr_log(real x) {
  const int tiny = x < SMALLEST;
  const bits b = to_bits(tiny ? x * C((bits)1 << MANTISSA) : x);
  const bits offset = (b - SQRT_HALF_BITS + ((bits)BIAS << MANTISSA)) >> MANTISSA;
  const real e = (from_bits(to_bits(SHIFT) + offset) - SHIFT) - (tiny ? C(BIAS + MANTISSA) : C(BIAS));
  const real m = from_bits(b - (offset << MANTISSA) + ((bits)BIAS << MANTISSA));
  const real f = m - C(1), s = f / (C(2) + f), z = s * s, half = C(0.5) * f * f;
#if DOUBLE
  const real series = z * (6.666666666666735130e-01 + z * (3.999999999940941908e-01
      + z * (2.857142874366239149e-01 + z * (2.222219843214978396e-01 + z * (1.818357216161805012e-01
      + z * (1.531383769920937332e-01 + z * 1.479819860511658591e-01))))));
#else
  const real series = z * (0.66666662693f + z * (0.40000972152f
      + z * (0.28498786688f + z * 0.24279078841f)));
#endif
  real y = e * LN2_HIGH - ((half - (s * (half + series) + e * LN2_LOW)) - f);
  y = x == C(INFINITY) ? x : y;
  y = x == C(0) ? C(-INFINITY) : y;
  return x < C(0) || x != x ? C(NAN) : y;
}

INLINE real pr_log1p(real x) {
  const real u = C(1) + x;
  const real y = pr_log(u) + (u == C(0) ? C(0) : (x - (u - C(1))) / u);
  return x == C(INFINITY) ? x : y;
}

INLINE real pr_maximum(real a, real b) { return a > b || a != a ? a : b; }
INLINE real pr_minimum(real a, real b) { return a < b || a != a ? a : b; }
INLINE real pr_to_float32(real x) { return (real)(float)x; }

INLINE real pr_to_bfloat16(real x) {
  const float f = (float)x;
  uint32_t b;
  memcpy(&b, &f, 4);
  const uint32_t rounded = (b + 0x7fffU + ((b >> 16) & 1U)) & 0xffff0000U;
  float out;
  memcpy(&out, &rounded, 4);
  return f == f ? (real)out : x;
}

/* float16 has 11 bits down to 2^-14, then a fixed step of 2^-24, and ends at 65504 */
INLINE real pr_to_float16(real x) {
  const float f = (float)x, a = fabsf(f);
  uint32_t b;
  memcpy(&b, &a, 4);
  b = (b + 0xfffU + ((b >> 13) & 1U)) & 0xffffe000U;
  float normal;
  memcpy(&normal, &b, 4);
  const float step = 0.75f; /* 1.5 * 2^23 * 2^-24: adding it rounds to multiples of 2^-24 */
  float y = a < 6.103515625e-05f ? (a + step) - step : normal;
  y = y > 65504.0f ? INFINITY : y;
  return f == f ? (real)copysignf(y, f) : x;
}

/* The arguments of steps, by number and channel: state[0][d]. */
typedef const real *const *inputs;
typedef real *const *outputs;
typedef real (*block_of_channels)[MAX_BLOCK];
typedef double (*block_of_sums)[MAX_BLOCK];
