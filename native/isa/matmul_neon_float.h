// Float matmul, NEON. Each row and token has one chain of fused multiply-adds over the columns in order, whatever the
// form, so a row's bits do not depend on how many tokens stand beside it.
#pragma once
#include "isa/matmul_neon_base.h"

namespace hasten {
namespace {

constexpr int64_t kFloatTile = 6;                                    // tokens of a register tile, over 16 rows
constexpr int64_t kBlock = 512;                                      // columns unpacked to float32 at a time: 32 KiB

// Sources: column 2j + odd of four rows of a panel as float32; p points at the pair's four rows.
struct F32Source {
  static constexpr int64_t kPairBytes = 128, kQuarterBytes = 16;
  static float32x4_t load(const uint8_t* p, int odd) { return vld1q_f32(reinterpret_cast<const float*>(p + odd * 64)); }
};

struct Bf16Source {
  static constexpr int64_t kPairBytes = 64, kQuarterBytes = 16;
  static float32x4_t load(const uint8_t* p, int odd) {
    const uint32x4_t both = vreinterpretq_u32_u8(vld1q_u8(p));
    return vreinterpretq_f32_u32(odd ? vandq_u32(both, vdupq_n_u32(0xffff0000u)) : vshlq_n_u32(both, 16));
  }
};

struct F16Source {
  static constexpr int64_t kPairBytes = 64, kQuarterBytes = 16;
  static float32x4_t load(const uint8_t* p, int odd) {
    const uint32x4_t both = vreinterpretq_u32_u8(vld1q_u8(p));
    return vcvt_f32_f16(vreinterpret_f16_u16(odd ? vshrn_n_u32(both, 16) : vmovn_u32(both)));
  }
};

struct FloatMatmul {
  const Weight& w;
  const float* x;
  int64_t x_stride;
  float* out;
  int64_t out_stride;
};

// Of a panel that has `rows` rows left.
inline size_t row_bytes(int64_t rows) { return static_cast<size_t>(rows < 0 ? 0 : smaller(rows, kPanel)) * sizeof(float); }

// P panels side by side (those past `end` repeat the last and are not stored) for T tokens over columns
// [column, column + columns); the chains go on from `out` unless they start here.
template <class Source, int P, int T>
void multiply_floats(const FloatMatmul& m, const uint8_t* codes, int64_t codes_stride, int64_t panel, int64_t end, int64_t token,
                     int64_t column, int64_t columns) {
  const uint8_t* w[P];
  float32x4_t sum[P][T][4];
  float* out = m.out + token * m.out_stride + panel * kPanel;
  const float* x = m.x + token * m.x_stride + column;
  const int64_t rows = smaller(m.w.rows, end * kPanel) - panel * kPanel;
  HASTEN_UNROLL
  for (int p = 0; p < P; ++p) {
    w[p] = codes + smaller(p, end - 1 - panel) * codes_stride;
    HASTEN_UNROLL
    for (int t = 0; t < T; ++t) {
      float row[kPanel] = {};
      if (column) std::memcpy(row, out + t * m.out_stride + p * kPanel, row_bytes(rows - p * kPanel));
      HASTEN_UNROLL
      for (int q = 0; q < 4; ++q) sum[p][t][q] = vld1q_f32(row + q * 4);
    }
  }
  for (int64_t c = 0; c < columns; c += 2) {
    const int64_t offset = c / 2 * Source::kPairBytes;
    HASTEN_UNROLL
    for (int odd = 0; odd < 2; ++odd) {
      if (odd && c + 1 == columns) break;
      float value[T];
      HASTEN_UNROLL
      for (int t = 0; t < T; ++t) value[t] = x[t * m.x_stride + c + odd];
      HASTEN_UNROLL
      for (int p = 0; p < P; ++p)
        HASTEN_UNROLL
        for (int q = 0; q < 4; ++q) {
          const float32x4_t four = Source::load(w[p] + offset + q * Source::kQuarterBytes, odd);
          HASTEN_UNROLL
          for (int t = 0; t < T; ++t) sum[p][t][q] = vfmaq_n_f32(sum[p][t][q], four, value[t]);
        }
    }
  }
  HASTEN_UNROLL
  for (int p = 0; p < P; ++p)
    HASTEN_UNROLL
    for (int t = 0; t < T; ++t) {
      float row[kPanel];
      HASTEN_UNROLL
      for (int q = 0; q < 4; ++q) vst1q_f32(row + q * 4, sum[p][t][q]);
      std::memcpy(out + t * m.out_stride + p * kPanel, row, row_bytes(rows - p * kPanel));
    }
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
    for (int q = 0; q < 4; ++q)
      vst1q_f32(values + c * kPanel + q * 4, Source::load(codes + c / 2 * 64 + q * 16, static_cast<int>(c % 2)));
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
    if (tokens <= kFloatTile) {
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
      for (int64_t token = 0; token < tokens; token += kFloatTile)
        kOnePanel<F32Source>[smaller(kFloatTile, tokens - token) - 1](m, values, 0, panel, panel + 1, token, column, columns);
    }
  }
}

inline int64_t float_scratch(const Weight& w, int64_t tokens) {
  if (w.kind == Kind::f32 || tokens <= kFloatTile) return 0;         // read where they are
  return kBlock * kPanel * static_cast<int64_t>(sizeof(float));
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
