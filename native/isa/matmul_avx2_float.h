// Float matmul, AVX2. Each row and token has one chain of fused multiply-adds over the columns in order, whatever the
// form, so a row's bits do not depend on how many tokens stand beside it.
#pragma once
#include "isa/matmul_avx2_base.h"

namespace hasten {
namespace {

constexpr int64_t kTile = 6;                                         // tokens of a register tile, over 16 rows
constexpr int64_t kBlock = 1024;                                     // columns unpacked to float32 at a time: 64 KiB

// By hand, so that GCC 12 does not reorder products until it has to spill sums.
inline void multiply_add(__m256& sum, __m256 a, __m256 b) { asm("vfmadd231ps %2, %1, %0" : "+x"(sum) : "x"(a), "x"(b)); }

// Sources: column 2j + odd of eight rows of a panel as float32; p points at the pair's eight rows.
struct F32Source {
  static constexpr int64_t kPairBytes = 128, kHalfBytes = 32;
  static __m256 load(const uint8_t* p, int odd) { return _mm256_loadu_ps(reinterpret_cast<const float*>(p + odd * 64)); }
};

struct Bf16Source {
  static constexpr int64_t kPairBytes = 64, kHalfBytes = 32;
  static __m256 load(const uint8_t* p, int odd) {
    const __m256i both = load32(p);
    return _mm256_castsi256_ps(odd ? _mm256_and_si256(both, _mm256_set1_epi32(static_cast<int>(0xffff0000)))
                                   : _mm256_slli_epi32(both, 16));
  }
};

struct F16Source {
  static constexpr int64_t kPairBytes = 64, kHalfBytes = 32;
  static __m256 load(const uint8_t* p, int odd) {
    const __m256i both = load32(p);
    const __m256i one = odd ? _mm256_srli_epi32(both, 16) : _mm256_and_si256(both, _mm256_set1_epi32(0xffff));
    return _mm256_cvtph_ps(_mm_packus_epi32(_mm256_castsi256_si128(one), _mm256_extracti128_si256(one, 1)));
  }
};

struct FloatMatmul {
  const Weight& w;
  const float* x;
  int64_t x_stride;
  float* out;
  int64_t out_stride;
};

// P panels side by side (those past `end` repeat the last and are not stored) for T tokens over columns
// [column, column + columns); the chains go on from `out` unless they start here.
template <class Source, int P, int T>
void multiply_floats(const FloatMatmul& m, const uint8_t* codes, int64_t codes_stride, int64_t panel, int64_t end, int64_t token,
                     int64_t column, int64_t columns) {
  const uint8_t* w[P];
  __m256 sum[P][T][2];
  float* out = m.out + token * m.out_stride + panel * kPanel;
  const float* x = m.x + token * m.x_stride + column;
  const int64_t rows = smaller(m.w.rows, end * kPanel) - panel * kPanel;
#pragma GCC unroll 4
  for (int p = 0; p < P; ++p) {
    w[p] = codes + smaller(p, end - 1 - panel) * codes_stride;
#pragma GCC unroll 6
    for (int t = 0; t < T; ++t)
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half)
        sum[p][t][half] = column ? _mm256_maskload_ps(out + t * m.out_stride + p * 16 + half * 8, lane_mask(rows - p * 16 - half * 8))
                                 : _mm256_setzero_ps();
  }
  for (int64_t c = 0; c < columns; c += 2) {
    const int64_t offset = c / 2 * Source::kPairBytes;
#pragma GCC unroll 2
    for (int odd = 0; odd < 2; ++odd) {
      if (odd && c + 1 == columns) break;
#pragma GCC unroll 4
      for (int p = 0; p < P; ++p) {
        const __m256 a = Source::load(w[p] + offset, odd), b = Source::load(w[p] + offset + Source::kHalfBytes, odd);
#pragma GCC unroll 6
        for (int t = 0; t < T; ++t) {
          const __m256 value = _mm256_broadcast_ss(x + t * m.x_stride + c + odd);
          multiply_add(sum[p][t][0], a, value);
          multiply_add(sum[p][t][1], b, value);
        }
      }
    }
  }
#pragma GCC unroll 4
  for (int p = 0; p < P; ++p)
#pragma GCC unroll 6
    for (int t = 0; t < T; ++t)
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half)
        _mm256_maskstore_ps(out + t * m.out_stride + p * 16 + half * 8, lane_mask(rows - p * 16 - half * 8), sum[p][t][half]);
}

using MultiplyFloats = void (*)(const FloatMatmul&, const uint8_t*, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t);
template <class S>
constexpr MultiplyFloats kOnePanel[] = {multiply_floats<S, 1, 1>, multiply_floats<S, 1, 2>, multiply_floats<S, 1, 3>,
                                        multiply_floats<S, 1, 4>, multiply_floats<S, 1, 5>, multiply_floats<S, 1, 6>};

template <class Source>
int64_t panel_bytes(const Weight& w) {
  return Source::kPairBytes == 128 ? w.columns * 64 : (w.columns + 1) / 2 * 64;
}

// Columns of a panel as float32 [columns][16].
template <class Source>
void unpack_floats(const uint8_t* codes, int64_t columns, float* values) {
  for (int64_t c = 0; c < columns; ++c)
    for (int half = 0; half < 2; ++half)
      _mm256_store_ps(values + c * kPanel + half * 8, Source::load(codes + c / 2 * 64 + half * 32, static_cast<int>(c % 2)));
}

template <class Source>
void multiply_by_floats(const FloatMatmul& m, int64_t tokens, int64_t panel0, int64_t panel1, std::byte* scratch) {
  const int64_t bytes = panel_bytes<Source>(m.w);
  const uint8_t* codes = static_cast<const uint8_t*>(m.w.codes) + panel0 * bytes;
  if (tokens == 1) {                                                 // four panels: enough chains under way
    for (int64_t panel = panel0; panel < panel1; panel += 4, codes += 4 * bytes)
      multiply_floats<Source, 4, 1>(m, codes, bytes, panel, panel1, 0, 0, m.w.columns);
    return;
  }
  for (int64_t panel = panel0; panel < panel1; ++panel, codes += bytes) {
    if (tokens <= kTile) {
      kOnePanel<Source>[tokens - 1](m, codes, bytes, panel, panel + 1, 0, 0, m.w.columns);
      continue;
    }
    for (int64_t column = 0; column < m.w.columns; column += kBlock) {
      const int64_t columns = smaller(kBlock, m.w.columns - column);
      const uint8_t* values = codes + column * 64;
      if constexpr (Source::kPairBytes == 64) {
        unpack_floats<Source>(codes + column * 32, columns, reinterpret_cast<float*>(scratch));
        values = reinterpret_cast<const uint8_t*>(scratch);
      }
      for (int64_t token = 0; token < tokens; token += kTile)
        kOnePanel<F32Source>[smaller(kTile, tokens - token) - 1](m, values, 0, panel, panel + 1, token, column, columns);
    }
  }
}

void matmul_float(const Weight& w, const void* x, int64_t x_stride, int64_t tokens, int64_t panel0, int64_t panel1,
                  float* out, int64_t out_stride, std::byte* scratch) {
  if (tokens == 0) return;
  const FloatMatmul m{w, static_cast<const float*>(x), x_stride, out, out_stride};
  if (w.kind == Kind::f32) return multiply_by_floats<F32Source>(m, tokens, panel0, panel1, scratch);
  if (w.kind == Kind::f16) return multiply_by_floats<F16Source>(m, tokens, panel0, panel1, scratch);
  multiply_by_floats<Bf16Source>(m, tokens, panel0, panel1, scratch);
}

}  // namespace
}  // namespace hasten
