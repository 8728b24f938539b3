// Sixteen float lanes in four NEON registers; the same names as simd_avx512.h, which describes them.
#pragma once
#include <arm_neon.h>

#include <cstring>

#include "core.h"

#define HASTEN_INLINE inline __attribute__((always_inline))

namespace hasten {
namespace {
namespace simd {

inline constexpr int kLanes = 16;
// Thirty-two registers hold 6 x 4 sums beside four parts and a broadcast; 7 or 8 rows, in one pass over the matrix, hold 8 x 2.
inline constexpr int kTileRows = 6, kMostRows = 8, kPart = 4;
constexpr int tile_parts(int rows) { return rows <= 2 ? 8 : rows <= 6 ? 4 : 2; }

struct V { float32x4_t part[4]; };
struct M { uint32x4_t part[4]; };
struct D { float64x2_t part[8]; };
struct P { float32x4_t v; };

template <class F>
HASTEN_INLINE V each(F f) { return {{f(0), f(1), f(2), f(3)}}; }
template <class F>
HASTEN_INLINE M each_mask(F f) { return {{f(0), f(1), f(2), f(3)}}; }

HASTEN_INLINE V set(float x) { return each([=](int) { return vdupq_n_f32(x); }); }
HASTEN_INLINE V zero() { return set(0.0f); }

HASTEN_INLINE int32x4_t clamped(int64_t n) { return vdupq_n_s32(n < 0 ? 0 : n > kLanes ? kLanes : static_cast<int32_t>(n)); }
HASTEN_INLINE M lanes(int64_t lo, int64_t hi) {
  static const int32_t kFirst[4] = {0, 1, 2, 3};
  const int32x4_t first = vld1q_s32(kFirst), from = clamped(lo), to = clamped(hi);
  return each_mask([=](int i) {
    const int32x4_t lane = vaddq_s32(first, vdupq_n_s32(4 * i));
    return vandq_u32(vcgeq_s32(lane, from), vcltq_s32(lane, to));
  });
}

HASTEN_INLINE V load(const float* p) { return each([=](int i) { return vld1q_f32(p + 4 * i); }); }
HASTEN_INLINE V load(const float* p, int64_t n) {
  float full[kLanes] = {};
  memcpy(full, p, static_cast<size_t>(n) * sizeof *p);
  return load(full);
}
HASTEN_INLINE void store(float* p, V a) {
  for (int i = 0; i < 4; ++i) vst1q_f32(p + 4 * i, a.part[i]);
}
HASTEN_INLINE void store(float* p, V a, int64_t n) {
  float full[kLanes];
  store(full, a);
  memcpy(p, full, static_cast<size_t>(n) * sizeof *p);
}

HASTEN_INLINE float32x4_t widen_four(const uint16_t* p) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p), 16)); }
HASTEN_INLINE float32x4_t widen_four(const int8_t* p) {
  int32_t four;
  memcpy(&four, p, sizeof four);
  return vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(vreinterpret_s8_s32(vdup_n_s32(four))))));
}
HASTEN_INLINE V load(const int8_t* p) {
  const int8x16_t bytes = vld1q_s8(p);
  const int16x8_t low = vmovl_s8(vget_low_s8(bytes)), high = vmovl_high_s8(bytes);
  return {{vcvtq_f32_s32(vmovl_s16(vget_low_s16(low))), vcvtq_f32_s32(vmovl_high_s16(low)),
           vcvtq_f32_s32(vmovl_s16(vget_low_s16(high))), vcvtq_f32_s32(vmovl_high_s16(high))}};
}
HASTEN_INLINE V load(const int8_t* p, int64_t n) {
  int8_t full[kLanes] = {};
  memcpy(full, p, static_cast<size_t>(n));
  return load(full);
}
HASTEN_INLINE V load(const uint16_t* p) {
  return each([=](int i) { return widen_four(p + 4 * i); });
}
HASTEN_INLINE V load(const uint16_t* p, int64_t n) {
  uint16_t full[kLanes] = {};
  memcpy(full, p, static_cast<size_t>(n) * sizeof *p);
  return load(full);
}
HASTEN_INLINE uint16x4_t rounded_bf16(float32x4_t a) {
  const uint32x4_t bits = vreinterpretq_u32_f32(a);
  const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
  const uint32x4_t rounded = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
  const uint32x4_t quiet = vorrq_u32(bits, vdupq_n_u32(0x400000));
  return vshrn_n_u32(vbslq_u32(vceqq_f32(a, a), rounded, quiet), 16);
}
HASTEN_INLINE void store(uint16_t* p, V a, int64_t n) {
  uint16_t full[kLanes];
  for (int i = 0; i < 4; ++i) vst1_u16(full + 4 * i, rounded_bf16(a.part[i]));
  memcpy(p, full, static_cast<size_t>(n) * sizeof *p);
}

inline constexpr int kNibbleBytes = 16;
HASTEN_INLINE void odd_nibbles(const uint8_t* p, int8_t* low, int8_t* high) {
  const uint8x16_t bytes = vld1q_u8(p), even = vdupq_n_u8(30), fifteen = vdupq_n_u8(15);
  vst1q_s8(low, vreinterpretq_s8_u8(vsubq_u8(vandq_u8(vshlq_n_u8(bytes, 1), even), fifteen)));
  vst1q_s8(high, vreinterpretq_s8_u8(vsubq_u8(vandq_u8(vshrq_n_u8(bytes, 3), even), fifteen)));
}

HASTEN_INLINE V add(V a, V b) { return each([&](int i) { return vaddq_f32(a.part[i], b.part[i]); }); }
HASTEN_INLINE V sub(V a, V b) { return each([&](int i) { return vsubq_f32(a.part[i], b.part[i]); }); }
HASTEN_INLINE V mul(V a, V b) { return each([&](int i) { return vmulq_f32(a.part[i], b.part[i]); }); }
HASTEN_INLINE V div(V a, V b) { return each([&](int i) { return vdivq_f32(a.part[i], b.part[i]); }); }
HASTEN_INLINE V fma(V a, V b, V c) { return each([&](int i) { return vfmaq_f32(c.part[i], a.part[i], b.part[i]); }); }
HASTEN_INLINE V fnma(V a, V b, V c) { return each([&](int i) { return vfmsq_f32(c.part[i], a.part[i], b.part[i]); }); }

HASTEN_INLINE P part_zero() { return {vdupq_n_f32(0.0f)}; }
HASTEN_INLINE P part_set(float x) { return {vdupq_n_f32(x)}; }
HASTEN_INLINE P part_load(const float* p) { return {vld1q_f32(p)}; }
template <class T>
HASTEN_INLINE P part_load(const T* p) { return {widen_four(p)}; }
HASTEN_INLINE void store(float* p, P a) { vst1q_f32(p, a.v); }
HASTEN_INLINE P add(P a, P b) { return {vaddq_f32(a.v, b.v)}; }
HASTEN_INLINE P mul(P a, P b) { return {vmulq_f32(a.v, b.v)}; }
HASTEN_INLINE P fma(P a, P b, P c) { return {vfmaq_f32(c.v, a.v, b.v)}; }

HASTEN_INLINE M less(V a, V b) { return each_mask([&](int i) { return vcltq_f32(a.part[i], b.part[i]); }); }
HASTEN_INLINE M equal(V a, V b) { return each_mask([&](int i) { return vceqq_f32(a.part[i], b.part[i]); }); }
HASTEN_INLINE V select(M m, V a, V b) {
  return each([&](int i) { return vbslq_f32(m.part[i], a.part[i], b.part[i]); });
}
// Not vmaxq: beside a NaN it gives NaN, and the other instruction sets give b.
HASTEN_INLINE V maximum(V a, V b) { return select(less(b, a), a, b); }
HASTEN_INLINE V minimum(V a, V b) { return select(less(a, b), a, b); }
HASTEN_INLINE V absolute(V a) { return each([&](int i) { return vabsq_f32(a.part[i]); }); }
HASTEN_INLINE V copy_sign(V magnitude, V from) {
  return each([&](int i) { return vbslq_f32(vdupq_n_u32(0x80000000u), from.part[i], magnitude.part[i]); });
}
HASTEN_INLINE uint32_t bits(M m) {
  static const uint32_t kBit[4] = {1, 2, 4, 8};
  const uint32x4_t bit = vld1q_u32(kBit);
  uint32_t found = 0;
  for (int i = 0; i < 4; ++i) found |= vaddvq_u32(vandq_u32(m.part[i], bit)) << (4 * i);
  return found;
}

HASTEN_INLINE V power_of_two(V t) {
  return each([&](int i) {
    const int32x4_t shifted = vshlq_n_s32(vreinterpretq_s32_f32(t.part[i]), 23);
    return vreinterpretq_f32_s32(vaddq_s32(shifted, vdupq_n_s32(0x3f800000)));
  });
}

HASTEN_INLINE float sum(V a) {
  const float32x4_t four = vaddq_f32(vaddq_f32(a.part[0], a.part[2]), vaddq_f32(a.part[1], a.part[3]));
  return vpadds_f32(vadd_f32(vget_low_f32(four), vget_high_f32(four)));
}
HASTEN_INLINE float largest(V a) {
  const auto larger = [](float32x4_t x, float32x4_t y) { return vbslq_f32(vcltq_f32(y, x), x, y); };
  float parts[4];
  vst1q_f32(parts, larger(larger(a.part[0], a.part[2]), larger(a.part[1], a.part[3])));
  float most = parts[0];
  for (float part : parts) most = most > part ? most : part;
  return most;
}

// Pair i of the lanes as doubles.
HASTEN_INLINE float64x2_t pair(V a, int i) {
  return i % 2 ? vcvt_high_f64_f32(a.part[i / 2]) : vcvt_f64_f32(vget_low_f32(a.part[i / 2]));
}
inline constexpr int kSumsTogether = 4;
// Pairs of 16-bit numbers, and sums of their products: isa/outer.h.
inline constexpr int kOuterRows = 4;
struct I { int32x4_t part[4]; };
HASTEN_INLINE I no_pairs() { return {{vdupq_n_s32(0), vdupq_n_s32(0), vdupq_n_s32(0), vdupq_n_s32(0)}}; }
HASTEN_INLINE int32x4_t four_pairs(const int16_t* p) { return vreinterpretq_s32_s16(vld1q_s16(p)); }
HASTEN_INLINE I load_pairs(const int16_t* p) {
  return {{four_pairs(p), four_pairs(p + 8), four_pairs(p + 16), four_pairs(p + 24)}};
}
HASTEN_INLINE I set_pair(const int16_t* p) {
  int32_t pair;
  memcpy(&pair, p, sizeof pair);
  const int32x4_t four = vdupq_n_s32(pair);
  return {{four, four, four, four}};
}
HASTEN_INLINE int32x4_t add_four(int32x4_t sum, int32x4_t a, int32x4_t b) {
  const int16x8_t x = vreinterpretq_s16_s32(a), y = vreinterpretq_s16_s32(b);
  return vaddq_s32(sum, vpaddq_s32(vmull_s16(vget_low_s16(x), vget_low_s16(y)), vmull_high_s16(x, y)));
}
HASTEN_INLINE I add_products(I sum, I a, I b) {
  for (int i = 0; i < 4; ++i) sum.part[i] = add_four(sum.part[i], a.part[i], b.part[i]);
  return sum;
}
HASTEN_INLINE V floats(I a) { return each([=](int i) { return vcvtq_f32_s32(a.part[i]); }); }

HASTEN_INLINE D zero_double() {
  D s;
  for (int i = 0; i < 8; ++i) s.part[i] = vdupq_n_f64(0.0);
  return s;
}
HASTEN_INLINE D accumulate(D s, V x) {
  for (int i = 0; i < 8; ++i) s.part[i] = vaddq_f64(s.part[i], pair(x, i));
  return s;
}
HASTEN_INLINE void store(double* p, D s, int64_t n) {
  double full[kLanes];
  for (int i = 0; i < 8; ++i) vst1q_f64(full + 2 * i, s.part[i]);
  memcpy(p, full, static_cast<size_t>(n) * sizeof *p);
}
HASTEN_INLINE D accumulate_difference(D s, V w, V a, V b) {
  for (int i = 0; i < 8; ++i) s.part[i] = vfmaq_f64(s.part[i], pair(w, i), vsubq_f64(pair(a, i), pair(b, i)));
  return s;
}
HASTEN_INLINE double sum(D s) {
  float64x2_t total = s.part[0];
  for (int i = 1; i < 8; ++i) total = vaddq_f64(total, s.part[i]);
  return vaddvq_f64(total);
}

}  // namespace simd
}  // namespace
}  // namespace hasten
