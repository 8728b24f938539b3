// What every instruction set's matmul shares: codes of one row read one by one, in the plainest way. Everything here has
// internal linkage, because each instruction set compiles it with flags of its own.
#pragma once
#include <cmath>
#include <cstring>

#include "core.h"

namespace hasten {
namespace {

[[maybe_unused]] inline float bits_to_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

[[maybe_unused]] inline uint32_t float_to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

[[maybe_unused]] inline float half_to_float(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16, magnitude = half & 0x7fff;
  if (magnitude >= 0x7c00) return bits_to_float(sign | 0x7f800000 | ((magnitude & 0x3ff) << 13));
  if (magnitude >= 0x400) return bits_to_float(sign | ((magnitude + (112 << 10)) << 13));
  const float small = static_cast<float>(magnitude) * 0x1p-24f;      // subnormal: exact
  return sign ? -small : small;
}

[[maybe_unused]] inline float bf16_to_float(uint16_t value) { return bits_to_float(static_cast<uint32_t>(value) << 16); }

[[maybe_unused]] inline uint16_t float_to_bf16(float value) {
  const uint32_t bits = float_to_bits(value);
  if ((bits & 0x7fffffff) > 0x7f800000) return static_cast<uint16_t>(bits >> 16 | 0x40);          // NaN stays one
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

[[maybe_unused]] inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// Group g of a quantised row where a value is NaN or infinite: every product with it becomes NaN, none a plausible number.
[[maybe_unused]] inline void not_finite(int64_t g, int64_t first, int64_t last, int8_t* codes, float* scales, int32_t* sums) {
  std::memset(codes + first, 0, static_cast<size_t>(round_up(last, 16) - first));   // whole vectors, as ever
  scales[g] = bits_to_float(0x7fc00000);
  sums[g] = 0;
}

// The zero point of the codes as the kernels read them: bytes for int8 and int4, looked-up entries for codebook4.
[[maybe_unused]] inline int32_t zero_point(Kind kind) { return kind == Kind::int8 ? 128 : kind == Kind::int4 ? 8 : 64; }

// value / scale of one weight; row is within the panel.
[[maybe_unused]] inline int32_t level(const Weight& w, int64_t panel, int64_t row, int64_t column) {
  const uint8_t* codes = static_cast<const uint8_t*>(w.codes);
  if (w.kind == Kind::int8) return codes[(panel * (w.padded() / 4) + column / 4) * 64 + row * 4 + column % 4] - 128;
  const uint8_t pair = codes[(panel * (w.padded() / 8) + column / 8) * 64 + row * 4 + column % 4];
  const int32_t code = column % 8 < 4 ? pair & 15 : pair >> 4;
  return w.kind == Kind::int4 ? code - 8 : w.codebook[code] - 64;
}

[[maybe_unused]] inline float dense_value(const Weight& w, int64_t panel, int64_t row, int64_t column) {
  if (w.kind == Kind::f32) return static_cast<const float*>(w.codes)[(panel * w.columns + column) * 16 + row];
  const int64_t pairs = (w.columns + 1) / 2;
  const uint16_t code = static_cast<const uint16_t*>(w.codes)[((panel * pairs + column / 2) * 16 + row) * 2 + column % 2];
  return w.kind == Kind::f16 ? half_to_float(code) : bf16_to_float(code);
}

// One row as float32: an embedding look-up.
void decode_row(const Weight& w, int64_t row, float* out) {
  const int64_t panel = row / kPanel, lane = row % kPanel;
  if (w.is_float()) {
    for (int64_t c = 0; c < w.columns; ++c) out[c] = dense_value(w, panel, lane, c);
    return;
  }
  const uint16_t* scales = w.scales + panel * w.groups() * kPanel + lane;
  for (int64_t g = 0; g < w.groups(); ++g) {
    const float scale = half_to_float(scales[g * kPanel]);
    for (int64_t c = g * w.group; c < smaller((g + 1) * w.group, w.columns); ++c)
      out[c] = static_cast<float>(level(w, panel, lane, c)) * scale;
  }
}

}  // namespace
}  // namespace hasten
