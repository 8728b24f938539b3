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

// What is subtracted from the bytes that kernels multiply by: codes of int8, int4 and int3, twice the codes of int2 and
// int1, looked-up entries of codebooks, stored values of sparse8 plus 128.
[[maybe_unused]] inline int32_t zero_point(Kind kind) {
  switch (kind) {
    case Kind::int8:
    case Kind::sparse8: return 128;
    case Kind::int4: return 8;
    case Kind::int3: return 4;
    case Kind::int2: return 3;
    case Kind::int1: return 1;
    default: return 64;
  }
}

// The code at `place` (0..511) of 32 columns in a plane of `width` bits.
template <int width>
inline int32_t plane_at(const uint8_t* plane, int64_t place) {
  const int64_t bit = place / 64 * width;
  return plane[bit / 8 * 64 + place % 64] >> (bit % 8) & ((1 << width) - 1);
}

// The code at `place` of 32 columns.
[[maybe_unused]] inline int32_t code_at(const uint8_t* block, int bits, int64_t place) {
  switch (bits) {
    case 1: return plane_at<1>(block, place);
    case 2: return plane_at<2>(block, place);
    case 3: return plane_at<2>(block, place) | plane_at<1>(block + 128, place) << 2;
    case 4: return plane_at<4>(block, place);
    default: return block[place];
  }
}

// The value at `place` (0..511) of 32 columns; zero where none is stored.
[[maybe_unused]] inline int32_t sparse_at(const uint8_t* block, int64_t place) {
  const uint8_t* mask = block + kSparseValues;
  if (!(mask[place / 8] >> (place % 8) & 1)) return 0;
  int64_t before = __builtin_popcount(mask[place / 8] & ((1 << (place % 8)) - 1));
  for (int64_t i = 0; i < place / 8; ++i) before += __builtin_popcount(mask[i]);
  return static_cast<int8_t>(block[before]);
}

// value / scale of one weight; row is within the panel.
[[maybe_unused]] inline int32_t level(const Weight& w, int64_t panel, int64_t row, int64_t column) {
  const uint8_t* block = static_cast<const uint8_t*>(w.codes) + panel * w.panel_bytes() + column / kUnit * unit_bytes(w.kind);
  const int64_t place = column % kUnit / 4 * 64 + row * 4 + column % 4;
  if (w.kind == Kind::sparse8) return sparse_at(block, place);
  const int32_t code = code_at(block, kind_bits(w.kind), place);
  const bool doubled = w.kind == Kind::int2 || w.kind == Kind::int1;
  return (has_codebook(w.kind) ? w.codebook[code] : doubled ? 2 * code : code) - zero_point(w.kind);
}

// A panel as unsigned bytes, level plus zero point: [padded / 4][16][4]. For every kind, in the plainest way.
[[maybe_unused]] inline void unpack_panel_plain(const Weight& w, int64_t panel, uint8_t* bytes) {
  for (int64_t c = 0; c < w.padded(); ++c)
    for (int64_t r = 0; r < kPanel; ++r)
      bytes[c / 4 * 64 + r * 4 + c % 4] = static_cast<uint8_t>(level(w, panel, r, c) + zero_point(w.kind));
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
