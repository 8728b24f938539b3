// Float matmul, AVX-512. Each row and token has one chain of fused multiply-adds over the columns in order (bf16
// products: over pairs of columns), whatever the form, so a row's bits do not depend on how many tokens stand beside it.
#pragma once
#include <immintrin.h>

#include "isa/matmul_common.h"

namespace hasten {
namespace {

constexpr int64_t kTile = 12;                                        // tokens of a register tile, over 32 rows
constexpr int64_t kBlock = 1024;                                     // columns unpacked to float32 at a time: 128 KiB a pair

// Lanes of `panel` that are rows of w; none for a panel past `end`.
inline __mmask16 row_mask(const Weight& w, int64_t panel, int64_t end) {
  const int64_t rows = w.rows - panel * kPanel;
  if (panel >= end) return 0;
  return static_cast<__mmask16>(rows >= kPanel ? 0xffff : (1 << rows) - 1);
}

inline __m512i broadcast4(const void* x) {
  int32_t bits;
  std::memcpy(&bits, x, sizeof bits);
  return _mm512_set1_epi32(bits);
}

inline __mmask16 columns_mask(int64_t left) {
  return static_cast<__mmask16>(left >= 16 ? 0xffff : left <= 0 ? 0 : (1 << left) - 1);
}

// By hand, because GCC 12 reorders the intrinsic until it has to spill accumulators of large tiles.
#if defined(HASTEN_EMULATE_AVX512)
inline void multiply_add(__m512& sum, __m512 a, __m512 b) { sum = _mm512_fmadd_ps(a, b, sum); }
#define HASTEN_USED(vector) asm volatile("" : : "m"(vector))
#else
inline void multiply_add(__m512& sum, __m512 a, __m512 b) { asm("vfmadd231ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b)); }
#define HASTEN_USED(vector) asm volatile("" : : "v"(vector))
#endif

// Tokens of a tile: as even as tiles of at most kTile can be.
inline int64_t tile_tokens(int64_t tokens) {
  const int64_t tiles = (tokens + kTile - 1) / kTile;
  return (tokens + tiles - 1) / tiles;
}

// Sources: columns 2j and 2j+1 of a panel as float32 [16 rows] each; `first` where the second must not be read.
struct F32Source {
  static constexpr int64_t kBytes = 128;
  static __m512 first(const uint8_t* p) { return _mm512_loadu_ps(p); }
  static void load(const uint8_t* p, __m512& a, __m512& b) {
    a = _mm512_loadu_ps(p);
    b = _mm512_loadu_ps(p + 64);
  }
};

struct Bf16Source {
  static constexpr int64_t kBytes = 64;
  static __m512 first(const uint8_t* p) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_loadu_si512(p), 16)); }
  static void load(const uint8_t* p, __m512& a, __m512& b) {
    const __m512i both = _mm512_loadu_si512(p);
    a = _mm512_castsi512_ps(_mm512_slli_epi32(both, 16));
    b = _mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32(static_cast<int>(0xffff0000))));
  }
};

struct F16Source {
  static constexpr int64_t kBytes = 64;
  static __m512 first(const uint8_t* p) { return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_loadu_si512(p))); }
  static void load(const uint8_t* p, __m512& a, __m512& b) {
    const __m512i both = _mm512_loadu_si512(p);
    a = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(both));
    b = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32(both, 16)));
  }
};

// Some panels, found side by side in memory or in scratch, and the tokens that they meet.
struct FloatMatmul {
  const Weight& w;
  const void* x;
  int64_t x_stride;
  float* out;
  int64_t out_stride;
};

struct PanelCodes {
  const uint8_t* data;
  int64_t stride;                                                    // bytes from panel to panel
};

// P panels from `panel` on (those past `end` repeat the last and are not stored) for T tokens over columns
// [column, column + columns); the chains go on from `out` unless they start here.
template <class Source, int P, int T>
void multiply_floats(const FloatMatmul& m, PanelCodes codes, int64_t panel, int64_t end, int64_t token, int64_t column,
                     int64_t columns) {
  const uint8_t* w[P];
  __mmask16 mask[P];
  __m512 sum[P][T];
  float* out = m.out + token * m.out_stride + panel * kPanel;
#pragma GCC unroll 4
  for (int p = 0; p < P; ++p) {
    w[p] = codes.data + smaller(p, end - 1 - panel) * codes.stride;
    mask[p] = row_mask(m.w, panel + p, end);
#pragma GCC unroll 12
    for (int t = 0; t < T; ++t)
      sum[p][t] = column ? _mm512_maskz_loadu_ps(mask[p], out + t * m.out_stride + p * kPanel) : _mm512_setzero_ps();
  }
  const float* x[4];                                                 // rows 3i as base, base + stride, base + 2 stride
  for (int i = 0; i < 4; ++i) x[i] = static_cast<const float*>(m.x) + (token + 3 * i) * m.x_stride + column;
  int64_t offset = 0, c = 0;
  for (; c + 2 <= columns; c += 2, offset += Source::kBytes) {
    __m512 a[P], b[P];
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p) Source::load(w[p] + offset, a[p], b[p]);
#pragma GCC unroll 12
    for (int t = 0; t < T; ++t) {
      const __m512 value = _mm512_set1_ps(x[t / 3][t % 3 * m.x_stride + c]);
#pragma GCC unroll 4
      for (int p = 0; p < P; ++p) multiply_add(sum[p][t], a[p], value);
    }
#pragma GCC unroll 12
    for (int t = 0; t < T; ++t) {
      const __m512 value = _mm512_set1_ps(x[t / 3][t % 3 * m.x_stride + c + 1]);
#pragma GCC unroll 4
      for (int p = 0; p < P; ++p) multiply_add(sum[p][t], b[p], value);
    }
  }
  if (c < columns) {
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p)
#pragma GCC unroll 12
      for (int t = 0; t < T; ++t)
        multiply_add(sum[p][t], Source::first(w[p] + offset), _mm512_set1_ps(x[t / 3][t % 3 * m.x_stride + c]));
  }
#pragma GCC unroll 4
  for (int p = 0; p < P; ++p)
#pragma GCC unroll 12
    for (int t = 0; t < T; ++t) _mm512_mask_storeu_ps(out + t * m.out_stride + p * kPanel, mask[p], sum[p][t]);
}

using MultiplyFloats = void (*)(const FloatMatmul&, PanelCodes, int64_t, int64_t, int64_t, int64_t, int64_t);

// One or two tokens take four panels, so that enough chains are under way; more fill the registers with two.
template <class S>
constexpr MultiplyFloats kFourPanels[] = {multiply_floats<S, 4, 1>, multiply_floats<S, 4, 2>};
template <class S>
constexpr MultiplyFloats kTwoPanels[] = {
    multiply_floats<S, 2, 1>, multiply_floats<S, 2, 2>,  multiply_floats<S, 2, 3>,  multiply_floats<S, 2, 4>,
    multiply_floats<S, 2, 5>, multiply_floats<S, 2, 6>,  multiply_floats<S, 2, 7>,  multiply_floats<S, 2, 8>,
    multiply_floats<S, 2, 9>, multiply_floats<S, 2, 10>, multiply_floats<S, 2, 11>, multiply_floats<S, 2, 12>};

template <class Source>
PanelCodes panel_codes(const Weight& w, int64_t panel) {
  const int64_t stride = Source::kBytes == 128 ? w.columns * 64 : (w.columns + 1) / 2 * 64;
  return {static_cast<const uint8_t*>(w.codes) + panel * stride, stride};
}

// Columns [column, column + columns) of two panels as float32 [columns][16], one after the other.
template <class Source>
PanelCodes unpack_floats(const Weight& w, int64_t panel, int64_t end, int64_t column, int64_t columns, std::byte* scratch) {
  float* values = reinterpret_cast<float*>(scratch);
  for (int64_t p = 0; p < 2 && panel + p < end; ++p) {
    const uint8_t* codes = panel_codes<Source>(w, panel + p).data + column / 2 * 64;
    float* to = values + p * kBlock * 16;
    int64_t c = 0;
    for (; c + 2 <= columns; c += 2, codes += 64, to += 32) {
      __m512 a, b;
      Source::load(codes, a, b);
      _mm512_storeu_ps(to, a);
      _mm512_storeu_ps(to + 16, b);
    }
    if (c < columns) _mm512_storeu_ps(to, Source::first(codes));
  }
  return {reinterpret_cast<const uint8_t*>(scratch), kBlock * 64};
}

template <class Source>
void multiply_by_floats(const FloatMatmul& m, int64_t tokens, int64_t panel0, int64_t panel1, std::byte* scratch) {
  if (tokens <= kTile) {
    const int64_t step = tokens <= 2 ? 4 : 2;
    const MultiplyFloats run = tokens <= 2 ? kFourPanels<Source>[tokens - 1] : kTwoPanels<Source>[tokens - 1];
    for (int64_t panel = panel0; panel < panel1; panel += step)
      run(m, panel_codes<Source>(m.w, panel), panel, panel1, 0, 0, m.w.columns);
    return;
  }
  const int64_t tile = tile_tokens(tokens);
  for (int64_t panel = panel0; panel < panel1; panel += 2)
    for (int64_t column = 0; column < m.w.columns; column += kBlock) {
      const int64_t columns = smaller(kBlock, m.w.columns - column);
      PanelCodes codes = panel_codes<Source>(m.w, panel);
      if constexpr (Source::kBytes == 128) codes.data += column * 64;
      else codes = unpack_floats<Source>(m.w, panel, panel1, column, columns, scratch);
      for (int64_t token = 0; token < tokens; token += tile)
        kTwoPanels<F32Source>[smaller(tile, tokens - token) - 1](m, codes, panel, panel1, token, column, columns);
    }
}

#if HASTEN_BF16_PRODUCTS
inline void dot_bf16(__m512& sum, __m512i weights, __m512i x) {
#if defined(HASTEN_EMULATE_BF16)
  const __m512i high = _mm512_set1_epi32(static_cast<int>(0xffff0000));
  sum = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_and_si512(weights, high)), _mm512_castsi512_ps(_mm512_and_si512(x, high)), sum);
  sum = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_slli_epi32(weights, 16)), _mm512_castsi512_ps(_mm512_slli_epi32(x, 16)), sum);
#else
  asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(weights), "v"(x));
#endif
}

template <int P, int T>
void multiply_bf16(const FloatMatmul& m, PanelCodes codes, int64_t panel, int64_t end, int64_t token) {
  const uint8_t* w[P];
  __m512 sum[P][T];
#pragma GCC unroll 4
  for (int p = 0; p < P; ++p) {
    w[p] = codes.data + smaller(p, end - 1 - panel) * codes.stride;
#pragma GCC unroll 12
    for (int t = 0; t < T; ++t) sum[p][t] = _mm512_setzero_ps();
  }
  const uint16_t* x[4];
  for (int i = 0; i < 4; ++i) x[i] = static_cast<const uint16_t*>(m.x) + (token + 3 * i) * m.x_stride;
  for (int64_t c = 0; c < m.w.columns; c += 2) {                     // x is zero past the columns, as the weight is
    __m512i pair[P];
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p) pair[p] = _mm512_loadu_si512(w[p] + c * 32);
#pragma GCC unroll 12
    for (int t = 0; t < T; ++t) {
      const __m512i two = broadcast4(x[t / 3] + t % 3 * m.x_stride + c);
#pragma GCC unroll 4
      for (int p = 0; p < P; ++p) dot_bf16(sum[p][t], pair[p], two);
    }
  }
#pragma GCC unroll 4
  for (int p = 0; p < P; ++p)
#pragma GCC unroll 12
    for (int t = 0; t < T; ++t)
      _mm512_mask_storeu_ps(m.out + (token + t) * m.out_stride + (panel + p) * kPanel, row_mask(m.w, panel + p, end), sum[p][t]);
}

using MultiplyBf16 = void (*)(const FloatMatmul&, PanelCodes, int64_t, int64_t, int64_t);
constexpr MultiplyBf16 kFourOfBf16[] = {multiply_bf16<4, 1>, multiply_bf16<4, 2>};
constexpr MultiplyBf16 kTwoOfBf16[] = {multiply_bf16<2, 1>, multiply_bf16<2, 2>,  multiply_bf16<2, 3>,  multiply_bf16<2, 4>,
                                       multiply_bf16<2, 5>, multiply_bf16<2, 6>,  multiply_bf16<2, 7>,  multiply_bf16<2, 8>,
                                       multiply_bf16<2, 9>, multiply_bf16<2, 10>, multiply_bf16<2, 11>, multiply_bf16<2, 12>};

void multiply_by_bf16(const FloatMatmul& m, int64_t tokens, int64_t panel0, int64_t panel1) {
  if (tokens <= 2) {
    for (int64_t panel = panel0; panel < panel1; panel += 4)
      kFourOfBf16[tokens - 1](m, panel_codes<Bf16Source>(m.w, panel), panel, panel1, 0);
    return;
  }
  const int64_t tile = tile_tokens(tokens);
  for (int64_t panel = panel0; panel < panel1; panel += 2)
    for (int64_t token = 0; token < tokens; token += tile)
      kTwoOfBf16[smaller(tile, tokens - token) - 1](m, panel_codes<Bf16Source>(m.w, panel), panel, panel1, token);
}
#endif

void matmul_float(const Weight& w, const void* x, int64_t x_stride, int64_t tokens, int64_t panel0, int64_t panel1,
                  float* out, int64_t out_stride, std::byte* scratch) {
  if (tokens == 0) return;
  const FloatMatmul m{w, x, x_stride, out, out_stride};
  if (w.kind == Kind::f32) return multiply_by_floats<F32Source>(m, tokens, panel0, panel1, scratch);
  if (w.kind == Kind::f16) return multiply_by_floats<F16Source>(m, tokens, panel0, panel1, scratch);
#if HASTEN_BF16_PRODUCTS
  multiply_by_bf16(m, tokens, panel0, panel1);
#else
  multiply_by_floats<Bf16Source>(m, tokens, panel0, panel1, scratch);
#endif
}

}  // namespace
}  // namespace hasten
