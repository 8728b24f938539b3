// Everything but the matmuls, written once over isa/simd_*.h, which the including file has chosen. All of it has internal
// linkage, and std:: templates are avoided: a weak symbol compiled for one instruction set may be the one the linker keeps.
#pragma once
#include <cmath>

#include "core.h"
#include "isa/simd_math.h"
#include "isa/attention.h"
#include "isa/compress.h"
#include "isa/outer.h"

namespace hasten {
namespace {
namespace ops {

using simd::V;

// Sum over i of f(x[i]) in four interleaved accumulators; f(0) of the lanes past the end is masked away by `keep`.
template <class F>
HASTEN_INLINE float reduce(const float* x, int64_t n, F f) {
  V sums[4] = {simd::zero(), simd::zero(), simd::zero(), simd::zero()};
  int64_t i = 0;
  for (; i + 64 <= n; i += 64)
    for (int j = 0; j < 4; ++j) sums[j] = f(simd::load(x + i + 16 * j), sums[j]);
  for (int j = 0; i < n; i += 16, ++j) {
    const int64_t left = n - i < 16 ? n - i : 16;
    sums[j] = simd::select(simd::lanes(0, left), f(simd::load(x + i, left), sums[j]), sums[j]);
  }
  return simd::sum(simd::add(simd::add(sums[0], sums[1]), simd::add(sums[2], sums[3])));
}

// (x - mean) / sqrt(variance + eps) * weight + bias, mean 0 for rms. weight and bias may be null; out may be x.
inline void norm(NormKind kind, const float* x, int64_t n, const float* weight, const float* bias, float eps, float* out) {
  const float count = static_cast<float>(n);
  float mean = 0;
  if (kind == NormKind::layer) mean = reduce(x, n, [](V v, V s) { return simd::add(s, v); }) / count;
  const V centre = simd::set(mean);
  const float square = reduce(x, n, [=](V v, V s) {
    const V d = simd::sub(v, centre);
    return simd::fma(d, d, s);
  });
  const V factor = simd::set(1.0f / __builtin_sqrtf(square / count + eps));
  sixteens(n, [=](int64_t i, int64_t lanes) {
    V y = simd::mul(simd::sub(read(x + i, lanes), centre), factor);
    if (weight != nullptr) y = simd::mul(y, read(weight + i, lanes));
    if (bias != nullptr) y = simd::add(y, read(bias + i, lanes));
    write(out + i, y, lanes);
  });
}

// In place on one token's heads: pairs (i, i + rotary / 2) of each head's first `rotary` features turn (Su et al. 2021).
inline void rope(float* x, int64_t heads, int64_t head_dim, int64_t rotary, const float* cosine, const float* sine) {
  const int64_t half = rotary / 2;
  for (int64_t head = 0; head < heads; ++head) {
    float* first = x + head * head_dim;
    float* second = first + half;
    sixteens(half, [=](int64_t i, int64_t lanes) {
      const V a = read(first + i, lanes), b = read(second + i, lanes);
      const V c = read(cosine + i, lanes), s = read(sine + i, lanes);
      write(first + i, simd::fnma(b, s, simd::mul(a, c)), lanes);
      write(second + i, simd::fma(a, s, simd::mul(b, c)), lanes);
    });
  }
}

template <ActivationKind kind>
HASTEN_INLINE V activate(V x) {
  if constexpr (kind == ActivationKind::silu) return simd::silu(x);
  if constexpr (kind == ActivationKind::gelu) return simd::gelu(x);
  if constexpr (kind == ActivationKind::gelu_tanh) return simd::gelu_tanh(x);
  if constexpr (kind == ActivationKind::relu) return simd::relu(x);
  if constexpr (kind == ActivationKind::tanh) return simd::tanh(x);
  if constexpr (kind == ActivationKind::sigmoid) return simd::sigmoid(x);
  return x;
}

// Calls body.template operator()<kind>() for the kind known at run time.
template <class Body>
HASTEN_INLINE void with_kind(ActivationKind kind, Body body) {
  using enum ActivationKind;
  switch (kind) {
    case none: return body.template operator()<none>();
    case silu: return body.template operator()<silu>();
    case gelu: return body.template operator()<gelu>();
    case gelu_tanh: return body.template operator()<gelu_tanh>();
    case relu: return body.template operator()<relu>();
    case tanh: return body.template operator()<tanh>();
    case sigmoid: return body.template operator()<sigmoid>();
  }
}

inline void activation(ActivationKind kind, const float* x, int64_t n, float* out) {
  with_kind(kind, [=]<ActivationKind k>() {
    sixteens(n, [=](int64_t i, int64_t lanes) { write(out + i, activate<k>(read(x + i, lanes)), lanes); });
  });
}

inline void gate(ActivationKind kind, const float* gate, const float* up, int64_t n, float* out) {
  with_kind(kind, [=]<ActivationKind k>() {
    sixteens(n, [=](int64_t i, int64_t lanes) {
      write(out + i, simd::mul(activate<k>(read(gate + i, lanes)), read(up + i, lanes)), lanes);
    });
  });
}

inline void add(const float* a, const float* b, int64_t n, float* out) {
  sixteens(n, [=](int64_t i, int64_t lanes) { write(out + i, simd::add(read(a + i, lanes), read(b + i, lanes)), lanes); });
}

inline void multiply(const float* a, const float* b, int64_t n, float* out) {
  sixteens(n, [=](int64_t i, int64_t lanes) { write(out + i, simd::mul(read(a + i, lanes), read(b + i, lanes)), lanes); });
}

inline void scale(const float* a, float factor, int64_t n, float* out) {
  sixteens(n, [=](int64_t i, int64_t lanes) { write(out + i, simd::mul(read(a + i, lanes), simd::set(factor)), lanes); });
}

inline void softcap(const float* a, float cap, int64_t n, float* out) {
  const V limit = simd::set(cap);
  sixteens(n, [=](int64_t i, int64_t lanes) {
    write(out + i, simd::mul(limit, simd::tanh(simd::div(read(a + i, lanes), limit))), lanes);
  });
}

// NaN never wins.
inline float largest(const float* x, int64_t n) {
  const V lowest = simd::set(-simd::kInfinity);
  V most[4] = {lowest, lowest, lowest, lowest};
  int64_t i = 0;
  for (; i + 64 <= n; i += 64)
    for (int j = 0; j < 4; ++j) most[j] = simd::maximum(simd::load(x + i + 16 * j), most[j]);
  for (; i < n; i += 16) {
    const int64_t left = n - i < 16 ? n - i : 16;
    most[0] = simd::maximum(simd::select(simd::lanes(0, left), simd::load(x + i, left), lowest), most[0]);
  }
  return simd::largest(simd::maximum(simd::maximum(most[0], most[1]), simd::maximum(most[2], most[3])));
}

inline double logsumexp(const float* logits, int64_t n) {
  const float most = largest(logits, n);
  if (most == -simd::kInfinity) return most;
  simd::D total = simd::zero_double();
  sixteens(n, [&](int64_t i, int64_t lanes) {
    const V e = simd::exp(simd::sub(read(logits + i, lanes), simd::set(most)));
    total = simd::accumulate(total, simd::select(simd::lanes(0, lanes), e, simd::zero()));
  });
  return most + ::log(simd::sum(total));
}

inline void masses(const float* logits, float top, float factor, int64_t n, float* out) {
  sixteens(n, [=](int64_t i, int64_t lanes) {
    write(out + i, simd::exp(simd::mul(simd::sub(read(logits + i, lanes), simd::set(top)), simd::set(factor))), lanes);
  });
}

// sum p (log p - log q) = sum e_i (p_i - q_i) / sum e_i - (log sum e^p - log sum e^q), e_i = e^(p_i - max p).
inline double divergence(const float* p, const float* q, int64_t n) {
  const V p_most = simd::set(largest(p, n)), q_most = simd::set(largest(q, n));
  simd::D p_sum = simd::zero_double(), q_sum = simd::zero_double(), weighted = simd::zero_double();
  sixteens(n, [&](int64_t i, int64_t lanes) {
    const simd::M inside = simd::lanes(0, lanes);
    const V a = read(p + i, lanes), b = read(q + i, lanes);
    const V ea = simd::select(inside, simd::exp(simd::sub(a, p_most)), simd::zero());
    const V eb = simd::select(inside, simd::exp(simd::sub(b, q_most)), simd::zero());
    p_sum = simd::accumulate(p_sum, ea);
    q_sum = simd::accumulate(q_sum, eb);
    // What p never says counts for nothing, even where both logits are -infinity.
    const simd::M silent = simd::equal(ea, simd::zero());
    weighted = simd::accumulate_difference(weighted, ea, simd::select(silent, simd::zero(), a),
                                           simd::select(silent, simd::zero(), b));
  });
  const double total = simd::sum(p_sum);
  const double shift = static_cast<double>(largest(p, n)) - static_cast<double>(largest(q, n));
  const double kl = simd::sum(weighted) / total - (shift + ::log(total) - ::log(simd::sum(q_sum)));
  return kl < 0 ? 0.0 : kl;   // rounding only: a divergence is never negative
}

inline int64_t argmax(const float* logits, int64_t n) {
  const V most = simd::set(largest(logits, n));
  for (int64_t i = 0; i < n; i += 16) {
    const int64_t left = n - i < 16 ? n - i : 16;
    const uint32_t found = simd::bits(simd::equal(simd::load(logits + i, left), most)) & ((1u << left) - 1u);
    if (found != 0) return i + __builtin_ctz(found);
  }
  return 0;   // all NaN
}

}  // namespace ops

void fill_ops(Kernels& k) {
  k.norm = ops::norm;
  k.rope = ops::rope;
  k.activation = ops::activation;
  k.gate = ops::gate;
  k.add = ops::add;
  k.multiply = ops::multiply;
  k.scale = ops::scale;
  k.softcap = ops::softcap;
  k.kv_write = attention::kv_write;
  k.attend = attention::attend;
  k.attend_span = attention::attend_span;
  k.attend_join = attention::attend_join;
  k.attend_scratch = attention::attend_scratch;
  k.logsumexp = ops::logsumexp;
  k.divergence = ops::divergence;
  k.argmax = ops::argmax;
  k.masses = ops::masses;
  k.sweep = ops::sweep;
  k.outer_pack = ops::outer_pack;
  k.outer_add = ops::outer_add;
  k.level_products = ops::level_products;
  k.solve_positive = ops::solve_positive;
}

}  // namespace
}  // namespace hasten
