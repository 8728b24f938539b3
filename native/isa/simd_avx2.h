// Sixteen float lanes in two AVX2 registers; the same names as simd_avx512.h, which describes them.
#pragma once
#include <immintrin.h>

#include <cstring>

#include "core.h"

#define HASTEN_INLINE inline __attribute__((always_inline))

namespace hasten {
namespace {
namespace simd {

inline constexpr int kLanes = 16;
// Sixteen registers hold 6 x 2 sums beside two parts and a broadcast, or 3 x 4 beside three broadcasts and a part.
inline constexpr int kTileRows = 6, kMostRows = 8, kPart = 8;
constexpr int tile_parts(int rows) { return rows <= 3 ? 4 : 2; }

struct V { __m256 lo, hi; };
struct M { __m256 lo, hi; };
struct D { __m256d part[4]; };
struct P { __m256 v; };

HASTEN_INLINE V set(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
HASTEN_INLINE V zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }

HASTEN_INLINE __m256i clamped(int64_t n) { return _mm256_set1_epi32(n < 0 ? 0 : n > kLanes ? kLanes : static_cast<int>(n)); }
HASTEN_INLINE M lanes(int64_t lo, int64_t hi) {
  const __m256i first = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), second = _mm256_add_epi32(first, _mm256_set1_epi32(8));
  const __m256i from = clamped(lo), to = clamped(hi);
  return {_mm256_castsi256_ps(_mm256_andnot_si256(_mm256_cmpgt_epi32(from, first), _mm256_cmpgt_epi32(to, first))),
          _mm256_castsi256_ps(_mm256_andnot_si256(_mm256_cmpgt_epi32(from, second), _mm256_cmpgt_epi32(to, second)))};
}

HASTEN_INLINE V load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
HASTEN_INLINE V load(const float* p, int64_t n) {
  const M m = lanes(0, n);
  return {_mm256_maskload_ps(p, _mm256_castps_si256(m.lo)), _mm256_maskload_ps(p + 8, _mm256_castps_si256(m.hi))};
}
HASTEN_INLINE void store(float* p, V a) {
  _mm256_storeu_ps(p, a.lo);
  _mm256_storeu_ps(p + 8, a.hi);
}
HASTEN_INLINE void store(float* p, V a, int64_t n) {
  const M m = lanes(0, n);
  _mm256_maskstore_ps(p, _mm256_castps_si256(m.lo), a.lo);
  _mm256_maskstore_ps(p + 8, _mm256_castps_si256(m.hi), a.hi);
}

HASTEN_INLINE __m256 widen(__m128i h) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16)); }
HASTEN_INLINE V load(const uint16_t* p) {
  const __m128i* wide = reinterpret_cast<const __m128i*>(p);
  return {widen(_mm_loadu_si128(wide)), widen(_mm_loadu_si128(wide + 1))};
}
HASTEN_INLINE V load(const uint16_t* p, int64_t n) {
  uint16_t full[kLanes] = {};
  memcpy(full, p, static_cast<size_t>(n) * sizeof *p);
  return load(full);
}
HASTEN_INLINE __m256 widen_bytes(__m128i b) { return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(b)); }
HASTEN_INLINE V load(const int8_t* p) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return {widen_bytes(bytes), widen_bytes(_mm_srli_si128(bytes, 8))};
}
HASTEN_INLINE V load(const int8_t* p, int64_t n) {
  int8_t full[kLanes] = {};
  memcpy(full, p, static_cast<size_t>(n));
  return load(full);
}
HASTEN_INLINE __m256i rounded_bf16(__m256 a) {
  const __m256i bits = _mm256_castps_si256(a);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q));
  return _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
}
HASTEN_INLINE void store(uint16_t* p, V a, int64_t n) {
  // packus works within 128-bit halves; the permutation puts the quarters back in order.
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(rounded_bf16(a.lo), rounded_bf16(a.hi)), 0xd8);
  uint16_t full[kLanes];
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(full), packed);
  memcpy(p, full, static_cast<size_t>(n) * sizeof *p);
}

inline constexpr int kNibbleBytes = 32;
HASTEN_INLINE void odd_nibbles(const uint8_t* p, int8_t* low, int8_t* high) {
  const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  const __m256i even = _mm256_set1_epi8(30), fifteen = _mm256_set1_epi8(15);
  const auto odd = [&](__m256i doubled) { return _mm256_sub_epi8(_mm256_and_si256(doubled, even), fifteen); };
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(low), odd(_mm256_add_epi8(bytes, bytes)));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(high), odd(_mm256_srli_epi16(bytes, 3)));
}

HASTEN_INLINE V add(V a, V b) { return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)}; }
HASTEN_INLINE V sub(V a, V b) { return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)}; }
HASTEN_INLINE V mul(V a, V b) { return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)}; }
HASTEN_INLINE V div(V a, V b) { return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)}; }
HASTEN_INLINE V fma(V a, V b, V c) { return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)}; }
HASTEN_INLINE V fnma(V a, V b, V c) { return {_mm256_fnmadd_ps(a.lo, b.lo, c.lo), _mm256_fnmadd_ps(a.hi, b.hi, c.hi)}; }
HASTEN_INLINE V maximum(V a, V b) { return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)}; }
HASTEN_INLINE V minimum(V a, V b) { return {_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)}; }
HASTEN_INLINE V absolute(V a) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  return {_mm256_andnot_ps(sign, a.lo), _mm256_andnot_ps(sign, a.hi)};
}
HASTEN_INLINE V copy_sign(V magnitude, V from) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  return {_mm256_or_ps(_mm256_andnot_ps(sign, magnitude.lo), _mm256_and_ps(sign, from.lo)),
          _mm256_or_ps(_mm256_andnot_ps(sign, magnitude.hi), _mm256_and_ps(sign, from.hi))};
}

HASTEN_INLINE P part_zero() { return {_mm256_setzero_ps()}; }
HASTEN_INLINE P part_set(float x) { return {_mm256_set1_ps(x)}; }
HASTEN_INLINE P part_load(const float* p) { return {_mm256_loadu_ps(p)}; }
HASTEN_INLINE P part_load(const uint16_t* p) { return {widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))}; }
HASTEN_INLINE P part_load(const int8_t* p) { return {widen_bytes(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)))}; }
HASTEN_INLINE void store(float* p, P a) { _mm256_storeu_ps(p, a.v); }
HASTEN_INLINE P add(P a, P b) { return {_mm256_add_ps(a.v, b.v)}; }
HASTEN_INLINE P mul(P a, P b) { return {_mm256_mul_ps(a.v, b.v)}; }
HASTEN_INLINE P fma(P a, P b, P c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }

HASTEN_INLINE M less(V a, V b) { return {_mm256_cmp_ps(a.lo, b.lo, _CMP_LT_OQ), _mm256_cmp_ps(a.hi, b.hi, _CMP_LT_OQ)}; }
HASTEN_INLINE M equal(V a, V b) { return {_mm256_cmp_ps(a.lo, b.lo, _CMP_EQ_OQ), _mm256_cmp_ps(a.hi, b.hi, _CMP_EQ_OQ)}; }
HASTEN_INLINE V select(M m, V a, V b) {
  return {_mm256_blendv_ps(b.lo, a.lo, m.lo), _mm256_blendv_ps(b.hi, a.hi, m.hi)};
}
HASTEN_INLINE uint32_t bits(M m) {
  return static_cast<uint32_t>(_mm256_movemask_ps(m.lo)) | static_cast<uint32_t>(_mm256_movemask_ps(m.hi)) << 8;
}

HASTEN_INLINE __m256 power_of_two(__m256 t) {
  const __m256i shifted = _mm256_slli_epi32(_mm256_castps_si256(t), 23);
  return _mm256_castsi256_ps(_mm256_add_epi32(shifted, _mm256_set1_epi32(0x3f800000)));
}
HASTEN_INLINE V power_of_two(V t) { return {power_of_two(t.lo), power_of_two(t.hi)}; }

HASTEN_INLINE float sum(V a) {
  const __m256 half = _mm256_add_ps(a.lo, a.hi);
  __m128 quarter = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
  quarter = _mm_add_ps(quarter, _mm_movehl_ps(quarter, quarter));
  return _mm_cvtss_f32(_mm_add_ss(quarter, _mm_movehdup_ps(quarter)));
}
HASTEN_INLINE float largest(V a) {
  const __m256 half = _mm256_max_ps(a.lo, a.hi);
  __m128 quarter = _mm_max_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
  quarter = _mm_max_ps(quarter, _mm_movehl_ps(quarter, quarter));
  return _mm_cvtss_f32(_mm_max_ss(quarter, _mm_movehdup_ps(quarter)));
}

inline constexpr int kSumsTogether = 4;
// Pairs of 16-bit numbers, and sums of their products: isa/outer.h.
inline constexpr int kOuterRows = 4;
struct I { __m256i lo, hi; };
HASTEN_INLINE I no_pairs() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
HASTEN_INLINE I load_pairs(const int16_t* p) {
  const __m256i* wide = reinterpret_cast<const __m256i*>(p);
  __m256i lo = _mm256_loadu_si256(wide), hi = _mm256_loadu_si256(wide + 1);
  asm("" : "+x"(lo), "+x"(hi));  // kept in registers: read again for each product, loads would be what it waits for
  return {lo, hi};
}
HASTEN_INLINE I set_pair(const int16_t* p) {
  int32_t pair;
  memcpy(&pair, p, sizeof pair);
  return {_mm256_set1_epi32(pair), _mm256_set1_epi32(pair)};
}
// GCC 12 moves sums from register to register until there are too few: each is told to stay where it is.
HASTEN_INLINE __m256i add_in_place(__m256i sum, __m256i product) {
  asm("vpaddd %1, %0, %0" : "+x"(sum) : "x"(product));
  return sum;
}
HASTEN_INLINE I add_products(I sum, I a, I b) {
  return {add_in_place(sum.lo, _mm256_madd_epi16(a.lo, b.lo)), add_in_place(sum.hi, _mm256_madd_epi16(a.hi, b.hi))};
}
HASTEN_INLINE V floats(I a) { return {_mm256_cvtepi32_ps(a.lo), _mm256_cvtepi32_ps(a.hi)}; }

// Quarter i of the lanes as doubles.
template <int i>
HASTEN_INLINE __m256d quarter(V a) {
  const __m256 half = i < 2 ? a.lo : a.hi;
  return _mm256_cvtps_pd(i % 2 ? _mm256_extractf128_ps(half, 1) : _mm256_castps256_ps128(half));
}
HASTEN_INLINE D zero_double() {
  return {{_mm256_setzero_pd(), _mm256_setzero_pd(), _mm256_setzero_pd(), _mm256_setzero_pd()}};
}
HASTEN_INLINE D accumulate(D s, V x) {
  return {{_mm256_add_pd(s.part[0], quarter<0>(x)), _mm256_add_pd(s.part[1], quarter<1>(x)),
           _mm256_add_pd(s.part[2], quarter<2>(x)), _mm256_add_pd(s.part[3], quarter<3>(x))}};
}
template <int i>
HASTEN_INLINE __m256d difference(__m256d s, V w, V a, V b) {
  return _mm256_fmadd_pd(quarter<i>(w), _mm256_sub_pd(quarter<i>(a), quarter<i>(b)), s);
}
HASTEN_INLINE D accumulate_difference(D s, V w, V a, V b) {
  return {{difference<0>(s.part[0], w, a, b), difference<1>(s.part[1], w, a, b), difference<2>(s.part[2], w, a, b),
           difference<3>(s.part[3], w, a, b)}};
}
HASTEN_INLINE void store(double* p, D s, int64_t n) {
  double full[kLanes];
  for (int i = 0; i < 4; ++i) _mm256_storeu_pd(full + 4 * i, s.part[i]);
  memcpy(p, full, static_cast<size_t>(n) * sizeof *p);
}
HASTEN_INLINE double sum(D s) {
  double parts[4];
  _mm256_storeu_pd(parts, _mm256_add_pd(_mm256_add_pd(s.part[0], s.part[1]), _mm256_add_pd(s.part[2], s.part[3])));
  return (parts[0] + parts[1]) + (parts[2] + parts[3]);
}

}  // namespace simd
}  // namespace
}  // namespace hasten
