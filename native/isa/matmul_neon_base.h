// What the NEON matmuls share: loads, and how each instruction set multiplies bytes.
//
// Every weight becomes a signed byte before it is multiplied (int8 codes less 128, int4 codes, codebook entries to 127), so
// one signed product serves all formats; zero points leave with the sums of the activations. A policy below says how eight
// columns of four rows meet eight columns of `kTokens` tokens; integer sums are exact, so all policies give the same bits.
#pragma once
#include <arm_neon.h>

#include "isa/matmul_common.h"

#if defined(__clang__)
#define HASTEN_UNROLL _Pragma("clang loop unroll(full)")
#else
#define HASTEN_UNROLL _Pragma("GCC unroll 16")
#endif

namespace hasten {
namespace {

// Eight columns of four rows: [4][4] of the first four columns and of the second.
struct Eight { int8x16_t first, second; };

// ARMv8.0: two products of bytes fit 16 bits (2 * 128 * 127 < 2^15), so the second is added before they are widened.
struct WidenProducts {
  static constexpr int kTokens = 1, kTile = 2, kPartials = 2;
  struct X { int8x8_t first, second; };
  static X load(const int8_t* x, int64_t) {
    int32_t four[2];
    std::memcpy(four, x, sizeof four);
    return {vreinterpret_s8_s32(vdup_n_s32(four[0])), vreinterpret_s8_s32(vdup_n_s32(four[1]))};
  }
  static Eight arrange(Eight w) { return w; }
  static void add(int32x4_t* sums, Eight w, X x) {
    const int16x8_t low = vmlal_s8(vmull_s8(vget_low_s8(w.first), x.first), vget_low_s8(w.second), x.second);
    const int16x8_t high = vmlal_s8(vmull_s8(vget_high_s8(w.first), x.first), vget_high_s8(w.second), x.second);
    sums[0] = vpadalq_s16(sums[0], low);
    sums[1] = vpadalq_s16(sums[1], high);
  }
  static int32x4_t total(const int32x4_t* sums, int) { return vpaddq_s32(sums[0], sums[1]); }
};

#if defined(__ARM_FEATURE_DOTPROD)
// One token's four sums would wait for one another; with two partials each there are eight under way.
template <int partials>
struct DotProducts {
  static constexpr int kTokens = 1, kTile = 4, kPartials = partials;
  using X = int8x8_t;
  static X load(const int8_t* x, int64_t) { return vld1_s8(x); }
  static Eight arrange(Eight w) { return w; }
  static void add(int32x4_t* sums, Eight w, X x) {
    sums[0] = vdotq_lane_s32(sums[0], w.first, x, 0);
    sums[partials - 1] = vdotq_lane_s32(sums[partials - 1], w.second, x, 1);
  }
  static int32x4_t total(const int32x4_t* sums, int) { return partials == 1 ? sums[0] : vaddq_s32(sums[0], sums[partials - 1]); }
};
#endif

#if defined(__ARM_FEATURE_MATMUL_INT8)
// Two rows times two tokens over eight columns an instruction: sums hold [row][token].
struct MatrixProducts {
  static constexpr int kTokens = 2, kTile = 6, kPartials = 2;
  using X = int8x16_t;
  static X load(const int8_t* x, int64_t stride) { return vcombine_s8(vld1_s8(x), vld1_s8(x + stride)); }
  static Eight arrange(Eight w) {
    const int32x4_t first = vreinterpretq_s32_s8(w.first), second = vreinterpretq_s32_s8(w.second);
    return {vreinterpretq_s8_s32(vzip1q_s32(first, second)), vreinterpretq_s8_s32(vzip2q_s32(first, second))};
  }
  static void add(int32x4_t* sums, Eight w, X x) {
    sums[0] = vmmlaq_s32(sums[0], w.first, x);
    sums[1] = vmmlaq_s32(sums[1], w.second, x);
  }
  static int32x4_t total(const int32x4_t* sums, int token) {
    return token ? vuzp2q_s32(sums[0], sums[1]) : vuzp1q_s32(sums[0], sums[1]);
  }
};
#endif

// Few tokens, and tiles of many: a matrix instruction would waste half of itself on one token.
#if defined(__ARM_FEATURE_MATMUL_INT8)
using OneToken = DotProducts<2>;
using ManyTokens = MatrixProducts;
#elif defined(__ARM_FEATURE_DOTPROD)
using OneToken = DotProducts<2>;
using ManyTokens = DotProducts<1>;
#else
using OneToken = WidenProducts;
using ManyTokens = WidenProducts;
#endif

// The first n of four lanes; the others are zero and their memory is not touched.
inline float32x4_t load_four(const float* x, int64_t n) {
  if (n >= 4) return vld1q_f32(x);
  float lanes[4] = {};
  for (int64_t i = 0; i < n; ++i) lanes[i] = x[i];
  return vld1q_f32(lanes);
}

}  // namespace
}  // namespace hasten
