// Sixteen float lanes in plain C++, with the compiler's own vector type so that it can use what the baseline has; the same
// names as simd_avx512.h, which describes them. Multiply-adds round twice here: the baseline has no fused ones.
#pragma once
#include <cstring>

#include "core.h"

#define HASTEN_INLINE inline __attribute__((always_inline))

namespace hasten {
namespace {
namespace simd {

inline constexpr int kLanes = 16;
inline constexpr int kTileRows = 2, kMostRows = 2, kPart = 16;
constexpr int tile_parts(int) { return 1; }

typedef float Float4 __attribute__((vector_size(16)));
typedef int32_t Int4 __attribute__((vector_size(16)));
typedef uint32_t Bits4 __attribute__((vector_size(16)));
typedef double Double2 __attribute__((vector_size(16)));

struct V { Float4 part[4]; };
struct M { Int4 part[4]; };
struct D { Double2 part[8]; };
using P = V;

template <class F>
HASTEN_INLINE V each(F f) { return {{f(0), f(1), f(2), f(3)}}; }
template <class F>
HASTEN_INLINE M each_mask(F f) { return {{f(0), f(1), f(2), f(3)}}; }

template <class To, class From>
HASTEN_INLINE To cast(From a) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &a, sizeof to);
  return to;
}
HASTEN_INLINE Float4 choose(Int4 m, Float4 a, Float4 b) {
  return cast<Float4>((cast<Int4>(a) & m) | (cast<Int4>(b) & ~m));
}

HASTEN_INLINE V set(float x) { return each([=](int) { return Float4{x, x, x, x}; }); }
HASTEN_INLINE V zero() { return set(0.0f); }

HASTEN_INLINE M lanes(int64_t lo, int64_t hi) {
  const int32_t from = lo < 0 ? 0 : lo > kLanes ? kLanes : static_cast<int32_t>(lo);
  const int32_t to = hi < 0 ? 0 : hi > kLanes ? kLanes : static_cast<int32_t>(hi);
  return each_mask([=](int i) {
    const Int4 lane = Int4{0, 1, 2, 3} + 4 * i;
    return (lane >= from) & (lane < to);
  });
}

HASTEN_INLINE V load(const float* p) {
  V a;
  memcpy(&a, p, sizeof a);
  return a;
}
HASTEN_INLINE V load(const float* p, int64_t n) {
  V a = zero();
  memcpy(&a, p, static_cast<size_t>(n) * sizeof *p);
  return a;
}
HASTEN_INLINE void store(float* p, V a) { memcpy(p, &a, sizeof a); }
HASTEN_INLINE void store(float* p, V a, int64_t n) { memcpy(p, &a, static_cast<size_t>(n) * sizeof *p); }

HASTEN_INLINE V load(const uint16_t* p) {
  uint32_t wide[kLanes];
  for (int i = 0; i < kLanes; ++i) wide[i] = static_cast<uint32_t>(p[i]) << 16;
  V a;
  memcpy(&a, wide, sizeof a);
  return a;
}
HASTEN_INLINE V load(const uint16_t* p, int64_t n) {
  uint16_t full[kLanes] = {};
  memcpy(full, p, static_cast<size_t>(n) * sizeof *p);
  return load(full);
}
HASTEN_INLINE V load(const int8_t* p) {
  float wide[kLanes];
  for (int i = 0; i < kLanes; ++i) wide[i] = p[i];
  return load(wide);
}
HASTEN_INLINE V load(const int8_t* p, int64_t n) {
  int8_t full[kLanes] = {};
  memcpy(full, p, static_cast<size_t>(n));
  return load(full);
}
HASTEN_INLINE void store(uint16_t* p, V a, int64_t n) {
  uint32_t wide[kLanes];
  memcpy(wide, &a, sizeof wide);
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t bits = wide[i];
    const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
    p[i] = static_cast<uint16_t>((nan ? bits | 0x400000u : bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
  }
}

inline constexpr int kNibbleBytes = 16;
HASTEN_INLINE void odd_nibbles(const uint8_t* p, int8_t* low, int8_t* high) {
  for (int i = 0; i < kNibbleBytes; ++i) {
    low[i] = static_cast<int8_t>(2 * (p[i] & 15) - 15);
    high[i] = static_cast<int8_t>(2 * (p[i] >> 4) - 15);
  }
}

HASTEN_INLINE V add(V a, V b) { return each([&](int i) { return a.part[i] + b.part[i]; }); }
HASTEN_INLINE V sub(V a, V b) { return each([&](int i) { return a.part[i] - b.part[i]; }); }
HASTEN_INLINE V mul(V a, V b) { return each([&](int i) { return a.part[i] * b.part[i]; }); }
HASTEN_INLINE V div(V a, V b) { return each([&](int i) { return a.part[i] / b.part[i]; }); }
HASTEN_INLINE V fma(V a, V b, V c) { return add(mul(a, b), c); }
HASTEN_INLINE V fnma(V a, V b, V c) { return sub(c, mul(a, b)); }
HASTEN_INLINE M less(V a, V b) { return each_mask([&](int i) { return a.part[i] < b.part[i]; }); }
HASTEN_INLINE M equal(V a, V b) { return each_mask([&](int i) { return a.part[i] == b.part[i]; }); }
HASTEN_INLINE V select(M m, V a, V b) { return each([&](int i) { return choose(m.part[i], a.part[i], b.part[i]); }); }
HASTEN_INLINE V maximum(V a, V b) { return select(less(b, a), a, b); }
HASTEN_INLINE V minimum(V a, V b) { return select(less(a, b), a, b); }
HASTEN_INLINE V copy_sign(V magnitude, V from) {
  const Int4 sign = cast<Int4>(Float4{-0.0f, -0.0f, -0.0f, -0.0f});
  return each([&](int i) {
    return cast<Float4>((cast<Int4>(magnitude.part[i]) & ~sign) | (cast<Int4>(from.part[i]) & sign));
  });
}
HASTEN_INLINE V absolute(V a) { return copy_sign(a, zero()); }
HASTEN_INLINE P part_zero() { return zero(); }
HASTEN_INLINE P part_set(float x) { return set(x); }
template <class T>
HASTEN_INLINE P part_load(const T* p) { return load(p); }

HASTEN_INLINE uint32_t bits(M m) {
  uint32_t found = 0;
  for (int i = 0; i < kLanes; ++i) found |= (m.part[i / 4][i % 4] != 0 ? 1u : 0u) << i;
  return found;
}

HASTEN_INLINE V power_of_two(V t) {
  return each([&](int i) { return cast<Float4>((cast<Bits4>(t.part[i]) << 23) + 0x3f800000u); });   // wraps where t is NaN
}

HASTEN_INLINE float sum(V a) {
  const Float4 four = (a.part[0] + a.part[2]) + (a.part[1] + a.part[3]);
  return (four[0] + four[2]) + (four[1] + four[3]);
}
HASTEN_INLINE float largest(V a) {
  const V half = maximum(a, V{{a.part[2], a.part[3], a.part[2], a.part[3]}});
  float parts[8];
  memcpy(parts, &half, sizeof parts);
  float most = parts[0];
  for (float part : parts) most = most > part ? most : part;
  return most;
}

inline constexpr int kSumsTogether = 2;
// Pairs of 16-bit numbers, and sums of their products: isa/outer.h.
inline constexpr int kOuterRows = 1;
struct I { int32_t lane[kLanes]; };
HASTEN_INLINE I no_pairs() { return {}; }
HASTEN_INLINE I load_pairs(const int16_t* p) {
  I found;
  memcpy(&found, p, sizeof found);
  return found;
}
HASTEN_INLINE I set_pair(const int16_t* p) {
  I found;
  for (int32_t& lane : found.lane) memcpy(&lane, p, sizeof lane);
  return found;
}
HASTEN_INLINE I add_products(I sum, I a, I b) {
  int16_t x[2 * kLanes], y[2 * kLanes];
  memcpy(x, &a, sizeof x);
  memcpy(y, &b, sizeof y);
  for (int i = 0; i < kLanes; ++i) sum.lane[i] += x[2 * i] * y[2 * i] + x[2 * i + 1] * y[2 * i + 1];
  return sum;
}
HASTEN_INLINE V floats(I a) {
  float wide[kLanes];
  for (int i = 0; i < kLanes; ++i) wide[i] = static_cast<float>(a.lane[i]);
  return load(wide);
}

HASTEN_INLINE D zero_double() { return D{}; }
HASTEN_INLINE D accumulate(D s, V x) {
  for (int i = 0; i < 8; ++i)
    s.part[i] += Double2{static_cast<double>(x.part[i / 2][i % 2 * 2]), static_cast<double>(x.part[i / 2][i % 2 * 2 + 1])};
  return s;
}
HASTEN_INLINE Double2 pair(V a, int i) {
  return Double2{static_cast<double>(a.part[i / 2][i % 2 * 2]), static_cast<double>(a.part[i / 2][i % 2 * 2 + 1])};
}
HASTEN_INLINE void store(double* p, D s, int64_t n) { memcpy(p, &s, static_cast<size_t>(n) * sizeof *p); }
HASTEN_INLINE D accumulate_difference(D s, V w, V a, V b) {
  for (int i = 0; i < 8; ++i) s.part[i] += pair(w, i) * (pair(a, i) - pair(b, i));
  return s;
}
HASTEN_INLINE double sum(D s) {
  Double2 total = s.part[0];
  for (int i = 1; i < 8; ++i) total += s.part[i];
  return total[0] + total[1];
}

}  // namespace simd
}  // namespace
}  // namespace hasten
