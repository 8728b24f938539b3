// Functions of sixteen lanes, written once over isa/simd_*.h. Bits differ between instruction sets, never between calls.
#pragma once
#include "core.h"

namespace hasten {
namespace {
namespace simd {

inline constexpr float kInfinity = __builtin_inff();

// e^x within 2 units in the last place. 0 below -87.33 (so also for -infinity; results are never subnormal), infinity
// above 88.37. Range reduction and polynomial: Cephes expf (Moshier 1992).
HASTEN_INLINE V exp(V x) {
  const V lowest = set(-87.33654f), magic = set(12582912.0f);   // 1.5 * 2^23: adding it rounds to an integer
  const V bounded = minimum(set(89.0f), maximum(set(-88.0f), x));   // this order of arguments lets NaN through
  const V shifted = fma(bounded, set(1.44269504f), magic);
  const V n = sub(shifted, magic);
  const V r = fnma(n, set(-2.12194440e-4f), fnma(n, set(0.693359375f), bounded));
  V p = fma(set(1.9875691500e-4f), r, set(1.3981999507e-3f));
  p = fma(p, r, set(8.3334519073e-3f));
  p = fma(p, r, set(4.1665795894e-2f));
  p = fma(p, r, set(1.6666665459e-1f));
  p = fma(p, r, set(5.0000001201e-1f));
  const V result = mul(add(fma(p, mul(r, r), r), set(1.0f)), power_of_two(shifted));
  return select(less(x, lowest), zero(), result);
}

// 2^x for x <= 0 within 2e-7 of its value, exactly 1 at 0; 0 below -126.5; NaN stays NaN. 2^r on -0.5..0.5 is a minimax fit
// of ours with constant term 1. Half the work of exp: nothing to reduce by, nothing to clamp above.
HASTEN_INLINE V exp2_nonpositive(V x) {
  const V magic = set(12582912.0f);   // 1.5 * 2^23, as in exp
  const V bounded = maximum(set(-127.0f), x);   // 2^-127 comes out as 0; this order of arguments lets NaN through
  const V shifted = add(bounded, magic);
  const V r = sub(bounded, sub(shifted, magic));
  V p = fma(set(0.001326472731307149f), r, set(0.009671512991189957f));
  p = fma(p, r, set(0.05550733581185341f));
  p = fma(p, r, set(0.24022242426872253f));
  p = fma(p, r, set(0.6931470036506653f));
  return mul(fma(p, r, set(1.0f)), power_of_two(shifted));
}

// x / (1 + e^-x)
HASTEN_INLINE V silu(V x) { return div(x, add(set(1.0f), exp(sub(zero(), x)))); }
HASTEN_INLINE V sigmoid(V x) { return div(set(1.0f), add(set(1.0f), exp(sub(zero(), x)))); }

// Near zero an odd polynomial (Cephes tanhf), elsewhere 1 - 2 / (e^2|x| + 1).
HASTEN_INLINE V tanh(V x) {
  const V a = absolute(x), z = mul(x, x);
  V p = fma(set(-5.70498872745e-3f), z, set(2.06390887954e-2f));
  p = fma(p, z, set(-5.37397155531e-2f));
  p = fma(p, z, set(1.33314422036e-1f));
  p = fma(p, z, set(-3.33332819422e-1f));
  const V near = fma(mul(p, z), x, x);
  const V far = sub(set(1.0f), div(set(2.0f), add(exp(add(a, a)), set(1.0f))));
  return select(less(a, set(0.625f)), near, copy_sign(far, x));
}

// x * Phi(x), Phi the normal distribution function. Phi(-a) = e^(-a^2 / 2) * t * P(t), t = 1 / (1 + 0.35 a); P is a
// minimax fit of ours to erfcx, relative error 1.5e-7, so that the left tail is right too.
HASTEN_INLINE V gelu(V x) {
  const V a = absolute(x), t = div(set(1.0f), fma(a, set(0.35f), set(1.0f)));
  V p = fma(set(-0.0291461591f), t, set(0.143972874f));
  p = fma(p, t, set(-0.255716801f));
  p = fma(p, t, set(0.159177184f));
  p = fma(p, t, set(-0.0231119804f));
  p = fma(p, t, set(0.105508931f));
  p = fma(p, t, set(0.119832627f));
  p = fma(p, t, set(0.139861897f));
  p = fma(p, t, set(0.139621407f));
  const V tail = mul(exp(mul(mul(a, a), set(-0.5f))), mul(t, p));
  return mul(x, select(less(x, zero()), tail, sub(set(1.0f), tail)));
}

// x / 2 * (1 + tanh(u)) = x / (1 + e^-2u), u = sqrt(2 / pi) * (x + 0.044715 x^3)
HASTEN_INLINE V gelu_tanh(V x) {
  const V inner = fma(mul(mul(x, x), x), set(0.044715f), x);
  return div(x, add(set(1.0f), exp(mul(inner, set(-1.59576912f)))));
}

HASTEN_INLINE V relu(V x) { return maximum(zero(), x); }

}  // namespace simd
}  // namespace
}  // namespace hasten
