// Sixteen float lanes in one AVX-512 register. The three simd_*.h files offer the same names; isa/simd_math.h, ops.h and
// attention.h are written once over them.
#pragma once
// GCC 12 takes its own headers' undefined pass-through operands for mistakes.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#else
#include <immintrin.h>
#endif

#include <cstring>

#include "core.h"

#define HASTEN_INLINE inline __attribute__((always_inline))

namespace hasten {
namespace {
namespace simd {

inline constexpr int kLanes = 16;
// Tile of the small matrix products in attention.h: up to kTileRows rows by tile_parts(rows) parts of kPart columns, as many
// sums as registers hold; a part is one register. Up to kMostRows (8, or kTileRows) read the cache itself, not a copy.
inline constexpr int kTileRows = 8, kMostRows = 8, kPart = 16;
constexpr int tile_parts(int) { return 2; }

struct V { __m512 v; };
struct M { __mmask16 m; };
struct D { __m512d lo, hi; };
using P = V;

HASTEN_INLINE V set(float x) { return {_mm512_set1_ps(x)}; }
HASTEN_INLINE V zero() { return {_mm512_setzero_ps()}; }

// Lanes lo <= i < hi; bounds outside 0..16 are fine.
HASTEN_INLINE M lanes(int64_t lo, int64_t hi) {
  const uint32_t below_lo = lo <= 0 ? 0u : lo >= kLanes ? 0xffffu : (1u << lo) - 1u;
  const uint32_t below_hi = hi <= 0 ? 0u : hi >= kLanes ? 0xffffu : (1u << hi) - 1u;
  return {static_cast<__mmask16>(below_hi & ~below_lo)};
}

HASTEN_INLINE V load(const float* p) { return {_mm512_loadu_ps(p)}; }
// The first n lanes, 0 <= n <= 16; the others are zero and their memory is not touched.
HASTEN_INLINE V load(const float* p, int64_t n) { return {_mm512_maskz_loadu_ps(lanes(0, n).m, p)}; }
HASTEN_INLINE void store(float* p, V a) { _mm512_storeu_ps(p, a.v); }
HASTEN_INLINE void store(float* p, V a, int64_t n) { _mm512_mask_storeu_ps(p, lanes(0, n).m, a.v); }

HASTEN_INLINE V widen(__m256i h) { return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16))}; }
HASTEN_INLINE V load(const uint16_t* p) { return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
HASTEN_INLINE V load(const uint16_t* p, int64_t n) { return widen(_mm256_maskz_loadu_epi16(lanes(0, n).m, p)); }
HASTEN_INLINE V load(const int8_t* p) {
  return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))))};
}
HASTEN_INLINE V load(const int8_t* p, int64_t n) {
  return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(lanes(0, n).m, p)))};
}
// bfloat16, rounded to nearest even; NaN stays NaN.
HASTEN_INLINE void store(uint16_t* p, V a, int64_t n) {
  const __m512i bits = _mm512_castps_si512(a.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
  const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
  const __m512i chosen = _mm512_mask_blend_epi32(nan, rounded, quiet);
  _mm256_mask_storeu_epi16(p, lanes(0, n).m, _mm512_cvtepi32_epi16(_mm512_srli_epi32(chosen, 16)));
}

// 2 * code - 15 of the low nibbles of kNibbleBytes bytes, and of their high ones.
inline constexpr int kNibbleBytes = 32;
HASTEN_INLINE void odd_nibbles(const uint8_t* p, int8_t* low, int8_t* high) {
  const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  const __m256i even = _mm256_set1_epi8(30), fifteen = _mm256_set1_epi8(15);
  const auto odd = [&](__m256i doubled) { return _mm256_sub_epi8(_mm256_and_si256(doubled, even), fifteen); };
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(low), odd(_mm256_add_epi8(bytes, bytes)));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(high), odd(_mm256_srli_epi16(bytes, 3)));
}

HASTEN_INLINE V add(V a, V b) { return {_mm512_add_ps(a.v, b.v)}; }
HASTEN_INLINE V sub(V a, V b) { return {_mm512_sub_ps(a.v, b.v)}; }
HASTEN_INLINE V mul(V a, V b) { return {_mm512_mul_ps(a.v, b.v)}; }
HASTEN_INLINE V div(V a, V b) { return {_mm512_div_ps(a.v, b.v)}; }
HASTEN_INLINE V fma(V a, V b, V c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }     // a * b + c
HASTEN_INLINE V fnma(V a, V b, V c) { return {_mm512_fnmadd_ps(a.v, b.v, c.v)}; }   // c - a * b
HASTEN_INLINE V maximum(V a, V b) { return {_mm512_max_ps(a.v, b.v)}; }             // a > b ? a : b
HASTEN_INLINE V minimum(V a, V b) { return {_mm512_min_ps(a.v, b.v)}; }             // a < b ? a : b
HASTEN_INLINE V absolute(V a) { return {_mm512_abs_ps(a.v)}; }
HASTEN_INLINE V copy_sign(V magnitude, V sign) {
  const __m512i top = _mm512_set1_epi32(static_cast<int>(0x80000000u));
  return {_mm512_castsi512_ps(_mm512_ternarylogic_epi32(top, _mm512_castps_si512(sign.v),
                                                        _mm512_castps_si512(magnitude.v), 0xca))};
}

HASTEN_INLINE P part_zero() { return zero(); }
HASTEN_INLINE P part_set(float x) { return set(x); }
template <class T>
HASTEN_INLINE P part_load(const T* p) { return load(p); }

HASTEN_INLINE M less(V a, V b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ)}; }
HASTEN_INLINE M equal(V a, V b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_EQ_OQ)}; }
HASTEN_INLINE V select(M m, V a, V b) { return {_mm512_mask_blend_ps(m.m, b.v, a.v)}; }   // m ? a : b
HASTEN_INLINE uint32_t bits(M m) { return m.m; }

// 2^n where t = 1.5 * 2^23 + n holds the integer n in its low bits, -126 <= n <= 128 (128 gives infinity).
HASTEN_INLINE V power_of_two(V t) {
  const __m512i shifted = _mm512_slli_epi32(_mm512_castps_si512(t.v), 23);
  return {_mm512_castsi512_ps(_mm512_add_epi32(shifted, _mm512_set1_epi32(0x3f800000)))};
}

HASTEN_INLINE float sum(V a) {
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(a.v), _mm512_extractf32x8_ps(a.v, 1));
  __m128 quarter = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
  quarter = _mm_add_ps(quarter, _mm_movehl_ps(quarter, quarter));
  return _mm_cvtss_f32(_mm_add_ss(quarter, _mm_movehdup_ps(quarter)));
}
HASTEN_INLINE float largest(V a) {
  const __m256 half = _mm256_max_ps(_mm512_castps512_ps256(a.v), _mm512_extractf32x8_ps(a.v, 1));
  __m128 quarter = _mm_max_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
  quarter = _mm_max_ps(quarter, _mm_movehl_ps(quarter, quarter));
  return _mm_cvtss_f32(_mm_max_ss(quarter, _mm_movehdup_ps(quarter)));
}

// Columns whose sums isa/compress.h keeps in registers: as many as hide the latency of fma, and no more than fit.
inline constexpr int kSumsTogether = 8;
// Pairs of 16-bit numbers, and sums of their products: isa/outer.h.
inline constexpr int kOuterRows = 8;
struct I { __m512i v; };
HASTEN_INLINE I no_pairs() { return {_mm512_setzero_si512()}; }
HASTEN_INLINE I load_pairs(const int16_t* p) { return {_mm512_loadu_si512(p)}; }
HASTEN_INLINE I set_pair(const int16_t* p) {
  int32_t pair;
  memcpy(&pair, p, sizeof pair);
  return {_mm512_set1_epi32(pair)};
}
HASTEN_INLINE I add_products(I sum, I a, I b) { return {_mm512_add_epi32(sum.v, _mm512_madd_epi16(a.v, b.v))}; }
HASTEN_INLINE V floats(I a) { return {_mm512_cvtepi32_ps(a.v)}; }

// Sixteen double accumulators.
HASTEN_INLINE __m512d low_half(V a) { return _mm512_cvtps_pd(_mm512_castps512_ps256(a.v)); }
HASTEN_INLINE __m512d high_half(V a) { return _mm512_cvtps_pd(_mm512_extractf32x8_ps(a.v, 1)); }
HASTEN_INLINE D zero_double() { return {_mm512_setzero_pd(), _mm512_setzero_pd()}; }
HASTEN_INLINE D accumulate(D s, V x) { return {_mm512_add_pd(s.lo, low_half(x)), _mm512_add_pd(s.hi, high_half(x))}; }
HASTEN_INLINE void store(double* p, D s, int64_t n) {
  double full[kLanes];
  _mm512_storeu_pd(full, s.lo);
  _mm512_storeu_pd(full + 8, s.hi);
  memcpy(p, full, static_cast<size_t>(n) * sizeof *p);
}
// s + w * (a - b) in double.
HASTEN_INLINE D accumulate_difference(D s, V w, V a, V b) {
  return {_mm512_fmadd_pd(low_half(w), _mm512_sub_pd(low_half(a), low_half(b)), s.lo),
          _mm512_fmadd_pd(high_half(w), _mm512_sub_pd(high_half(a), high_half(b)), s.hi)};
}
HASTEN_INLINE double sum(D s) {
  double parts[8];
  _mm512_storeu_pd(parts, _mm512_add_pd(s.lo, s.hi));
  double total = 0;
  for (double part : parts) total += part;
  return total;
}

}  // namespace simd
}  // namespace
}  // namespace hasten
