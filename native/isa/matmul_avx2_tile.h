// Products of a panel with a tile of up to four tokens, AVX2. Integer sums are exact in any order; of floats there is one
// sequence for every row and token, whatever the form: total = fma(float(sum), weight_scale * activation_scale, total),
// group after group.
#pragma once
#include "isa/matmul_avx2_base.h"

namespace hasten {
namespace {

// How 32-bit lanes of weights and activations are multiplied and added to 32-bit sums. maddubs adds two products of an
// unsigned and a signed byte in 16 bits, and saturates past 32767:
//   four_bits   weights 0..15: eight products of a pair fit 16 bits (8 * 2 * 15 * 127), so they are widened once a block
//   seven_bits  weights 0..127: 2 * 127 * 127 fits; widened at once by madd
//   sign        weights -127..127: their magnitude is the unsigned factor, their sign moves to the activation
//   bytes       AVX-VNNI: weights 0..255, four products of a lane added in 32 bits by one instruction
enum class Dot { four_bits, seven_bits, sign, bytes };

#if defined(__AVXVNNI__) || defined(HASTEN_EMULATE_VNNI)
constexpr bool kVnni = true;
#else
constexpr bool kVnni = false;
#endif

HASTEN_INLINE __m256i dpbusd(__m256i sum, __m256i weights, __m256i x) {
#if defined(HASTEN_EMULATE_VNNI)
  const __m256i byte = _mm256_set1_epi16(255);
  const __m256i even = _mm256_madd_epi16(_mm256_and_si256(weights, byte), _mm256_srai_epi16(_mm256_slli_epi16(x, 8), 8));
  return _mm256_add_epi32(sum, _mm256_add_epi32(even, _mm256_madd_epi16(_mm256_srli_epi16(weights, 8), _mm256_srai_epi16(x, 8))));
#elif defined(__AVXVNNI__)
  return _mm256_dpbusd_avx_epi32(sum, weights, x);
#else
  (void)weights, (void)x;
  return sum;                                                        // never asked for
#endif
}

constexpr int64_t kLane = 4;                                         // columns
constexpr int64_t kTokens = 4;

// Activations of a tile of T tokens, as its kernel meets them: a column of lanes for all tokens, then the next.
struct TokenTile {
  const int32_t* lanes;               // [padded / kLane][T]
  const int32_t* starts;              // [groups][T] where sums start: minus the zero point times the sum of the codes
  const float* scales;                // [groups][T]
};

struct Packed {
  const int32_t* lanes;
  const int32_t* starts;
  const float* scales;
  int64_t lane_count, groups;         // of one token
  TokenTile tile(int64_t token, int64_t) const {                     // tiles before it are full
    return {lanes + token * lane_count, starts + token * groups, scales + token * groups};
  }
};

// Four tokens' lanes side by side.
inline void transpose4(__m128i a, __m128i b, __m128i c, __m128i d, int32_t* to) {
  const __m128i ab0 = _mm_unpacklo_epi32(a, b), ab1 = _mm_unpackhi_epi32(a, b);
  const __m128i cd0 = _mm_unpacklo_epi32(c, d), cd1 = _mm_unpackhi_epi32(c, d);
  __m128i* out = reinterpret_cast<__m128i*>(to);
  _mm_store_si128(out, _mm_unpacklo_epi64(ab0, cd0));
  _mm_store_si128(out + 1, _mm_unpackhi_epi64(ab0, cd0));
  _mm_store_si128(out + 2, _mm_unpacklo_epi64(ab1, cd1));
  _mm_store_si128(out + 3, _mm_unpackhi_epi64(ab1, cd1));
}

inline int64_t packed_bytes(const Weight& w, int64_t tokens) {
  const int64_t group = 32;                                          // the smallest that activations may have
  return tokens * w.padded() + 2 * round_up(tokens * (w.padded() / group) * 4, kAlign) + kAlign;
}

// Cuts the tokens into tiles of four and a rest.
inline Packed pack(const Weight& w, const Quantised& x, int64_t tokens, Dot dot, std::byte* memory) {
  const int64_t lanes = w.padded() / kLane, starts_bytes = round_up(tokens * x.groups * 4, kAlign);
  int32_t* starts = reinterpret_cast<int32_t*>(memory);
  float* scales = reinterpret_cast<float*>(memory + starts_bytes);
  int32_t* packed = reinterpret_cast<int32_t*>(memory + 2 * starts_bytes);
  const int32_t zero = dot == Dot::sign ? 0 : zero_point(w.kind);
  const bool as_it_is = tokens == 1;
  for (int64_t token = 0; token < tokens; token += kTokens) {
    const int64_t count = smaller(kTokens, tokens - token);
    const int8_t* codes = x.codes + token * x.stride;
    int32_t* to = packed + token * lanes;
    for (int64_t lane = 0; lane < lanes && !as_it_is; lane += 4) {
      __m128i four[kTokens];
      for (int64_t t = 0; t < kTokens; ++t)
        four[t] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + (t < count ? t : 0) * x.stride + lane * kLane));
      if (count == kTokens) {
        transpose4(four[0], four[1], four[2], four[3], to + lane * kTokens);
        continue;
      }
      alignas(16) int32_t all[16];
      transpose4(four[0], four[1], four[2], four[3], all);
      for (int64_t i = 0; i < 4; ++i)
        for (int64_t t = 0; t < count; ++t) to[(lane + i) * count + t] = all[i * 4 + t];
    }
    for (int64_t t = 0; t < count; ++t)
      for (int64_t g = 0; g < x.groups; ++g) {
        const int64_t from = (token + t) * x.groups + g, at = token * x.groups + g * count + t;
        starts[at] = -zero * x.sums[from];
        scales[at] = x.scales[from];
      }
  }
  return {as_it_is ? reinterpret_cast<const int32_t*>(x.codes) : packed, starts, scales, lanes, x.groups};
}

// Groups [first, last) of a panel, of `groups` in all, each of `group` columns (the last one may be shorter).
struct Stretch {
  const Weight& w;
  int64_t panel, first, last, groups, group;
};

template <Dot dot>
HASTEN_INLINE __m256i add_products(__m256i sum, __m256i weights, __m256i x) {   // not for four_bits
  const __m256i ones = _mm256_set1_epi16(1);
  if constexpr (dot == Dot::bytes) return dpbusd(sum, weights, x);
  const __m256i pairs = dot == Dot::sign ? _mm256_maddubs_epi16(_mm256_abs_epi8(weights), _mm256_sign_epi8(x, weights))
                                         : _mm256_maddubs_epi16(weights, x);
  return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, ones));
}

// GCC would rather add products up in pairs, far from here, and spill all of them: an opaque sum keeps its register.
HASTEN_INLINE void keep(__m256i& sum) { asm("" : "+x"(sum)); }

// Sums of one block of a source: lanes 0..7.
template <class Source, int T>
HASTEN_INLINE void add_block(const Source& source, const uint8_t* codes, const int32_t* lanes, __m256i (&sum)[T][2]) {
  if constexpr (Source::kDot == Dot::four_bits) {
    __m256i small[T][2];
#pragma GCC unroll 8
    for (int lane = 0; lane < 8; ++lane) {
      const __m256i low = source.load(codes, 0, lane), high = source.load(codes, 1, lane);
#pragma GCC unroll 4
      for (int t = 0; t < T; ++t) {
        const __m256i x = broadcast4(lanes + lane * T + t);
        const __m256i p0 = _mm256_maddubs_epi16(low, x), p1 = _mm256_maddubs_epi16(high, x);
        small[t][0] = lane ? _mm256_add_epi16(small[t][0], p0) : p0;
        small[t][1] = lane ? _mm256_add_epi16(small[t][1], p1) : p1;
        keep(small[t][0]);
        keep(small[t][1]);
      }
    }
    const __m256i ones = _mm256_set1_epi16(1);
#pragma GCC unroll 4
    for (int t = 0; t < T; ++t) {
      sum[t][0] = _mm256_add_epi32(sum[t][0], _mm256_madd_epi16(small[t][0], ones));
      sum[t][1] = _mm256_add_epi32(sum[t][1], _mm256_madd_epi16(small[t][1], ones));
    }
  } else {
#pragma GCC unroll 8
    for (int lane = 0; lane < 8; ++lane) {
      const __m256i low = source.load(codes, 0, lane), high = source.load(codes, 1, lane);
#pragma GCC unroll 4
      for (int t = 0; t < T; ++t) {
        const __m256i x = broadcast4(lanes + lane * T + t);
        sum[t][0] = add_products<Source::kDot>(sum[t][0], low, x);
        sum[t][1] = add_products<Source::kDot>(sum[t][1], high, x);
        keep(sum[t][0]);
        keep(sum[t][1]);
      }
    }
  }
}

// Where a stretch begins, totals start at zero or at what the stretch before it left in `totals` [T][16]; where the panel
// ends they go to `out`, else back to `totals`. `codes` stands at the stretch's first block.
template <class Source, int T>
void multiply_tile(const Stretch& s, const uint8_t* codes, TokenTile x, float* totals, float* out, int64_t out_stride) {
  const Source source(s.w);
  constexpr int64_t kColumns = 8 * kLane;                            // of a block
  const int shift = __builtin_ctzll(static_cast<uint64_t>(s.w.group / s.group));
  const uint16_t* scales = s.w.scales + s.panel * s.w.groups() * kPanel;
  const int32_t* lanes = x.lanes + s.first * s.group / kLane * T;
  __m256 total[T][2];
#pragma GCC unroll 4
  for (int t = 0; t < T; ++t) {
    total[t][0] = s.first ? _mm256_loadu_ps(totals + t * kPanel) : _mm256_setzero_ps();
    total[t][1] = s.first ? _mm256_loadu_ps(totals + t * kPanel + 8) : _mm256_setzero_ps();
  }
  // Everything in registers: at one token and group 32 what a group begins with would cost as much as its products.
  const int64_t last = s.last, whole = s.w.padded() / s.group, blocks = s.group / kColumns;
  const int64_t rest = (s.w.padded() - whole * s.group) / kColumns;  // blocks of a last group that is shorter
  const int32_t* starts = x.starts + s.first * T;
  const float* factors = x.scales + s.first * T;
  for (int64_t g = s.first; g < last; ++g, starts += T, factors += T) {
    __m256i sum[T][2];
#pragma GCC unroll 4
    for (int t = 0; t < T; ++t) sum[t][0] = sum[t][1] = _mm256_set1_epi32(starts[t]);
    int64_t left = g < whole ? blocks : rest;
    do {
      if constexpr (Source::kAhead > 0)
        for (int64_t line = 0; line < Source::kBlock; line += 64) _mm_prefetch(codes + Source::kAhead + line, _MM_HINT_T0);
      add_block<Source, T>(source, codes, lanes, sum);
      codes += Source::kBlock;
      lanes += 8 * T;
    } while (--left > 0);
    const uint16_t* scale = scales + (g >> shift) * kPanel;
    const __m256 low = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(scale)));
    const __m256 high = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(scale + 8)));
#pragma GCC unroll 4
    for (int t = 0; t < T; ++t) {
      const __m256 factor = _mm256_broadcast_ss(factors + t);
      total[t][0] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum[t][0]), _mm256_mul_ps(low, factor), total[t][0]);
      total[t][1] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum[t][1]), _mm256_mul_ps(high, factor), total[t][1]);
    }
  }
  const int64_t rows = s.w.rows - s.panel * kPanel;
  const bool ends = s.last >= s.groups;
  float* to = ends ? out + s.panel * kPanel : totals;
  const int64_t stride = ends ? out_stride : kPanel, lanes_left = ends ? rows : kPanel;
#pragma GCC unroll 4
  for (int t = 0; t < T; ++t, to += stride) {
    store_lanes(to, lanes_left, total[t][0]);
    store_lanes(to + 8, lanes_left - 8, total[t][1]);
  }
}

using MultiplyTile = void (*)(const Stretch&, const uint8_t*, TokenTile, float*, float*, int64_t);
template <class S>
constexpr MultiplyTile kMultiplyTile[] = {multiply_tile<S, 1>, multiply_tile<S, 2>, multiply_tile<S, 3>, multiply_tile<S, 4>};

}  // namespace
}  // namespace hasten
