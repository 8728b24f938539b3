#include "weights.h"

namespace hasten::test {
namespace {

int64_t code_bytes(Kind kind, int64_t rows, int64_t columns) {
  const int64_t panels = (rows + 15) / 16, padded = (columns + 31) / 32 * 32;
  switch (kind) {
    case Kind::f32: return panels * columns * 16 * 4;
    case Kind::f16:
    case Kind::bf16: return panels * ((columns + 1) / 2) * 16 * 2 * 2;
    case Kind::int8: return panels * padded * 16;
    default: return panels * padded * 16 / 2;
  }
}

// A finite half, subnormal now and then.
uint16_t random_half(Random& random, int lowest, int highest) {
  const int64_t exponent = random.below(40) == 0 ? 0 : random.between(lowest, highest);
  return static_cast<uint16_t>(random.below(2) << 15 | exponent << 10 | random.between(1, 1023));
}

}  // namespace

TestWeight::TestWeight(Kind kind, int64_t rows, int64_t columns, int64_t group, uint64_t seed, bool unit_scales)
    : view_{}, codes_(code_bytes(kind, rows, columns)),
      scales_(group == 0 ? 0 : (rows + 15) / 16 * ((columns + group - 1) / group) * 16), codebook_(16),
      values_(static_cast<size_t>(rows * columns)), levels_(static_cast<size_t>(rows * columns)) {
  view_.kind = kind;
  view_.rows = rows;
  view_.columns = columns;
  view_.group = group;
  view_.codes = codes_.data();
  view_.scales = group == 0 ? nullptr : scales_.data();
  view_.codebook = codebook_.data();
  Random random(seed);
  if (group == 0) draw_floats(random);
  else draw_integers(random, unit_scales);
}

double TestWeight::scale(int64_t row, int64_t column) const {
  const int64_t groups = (view_.columns + view_.group - 1) / view_.group;
  return half_value(scales_[(row / 16 * groups + column / view_.group) * 16 + row % 16]);
}

void TestWeight::draw_integers(Random& random, bool unit_scales) {
  const int64_t padded = (view_.columns + 31) / 32 * 32;
  for (int64_t i = 0; i < scales_.count(); ++i) scales_[i] = unit_scales ? 0x3c00 : random_half(random, 5, 12);
  for (int64_t i = 0; i < 16; ++i) codebook_[i] = static_cast<uint8_t>(random.below(128));
  codebook_[3] = 127;
  codebook_[7] = 0;
  const bool bytes = view_.kind == Kind::int8;
  for (int64_t row = 0; row < (view_.rows + 15) / 16 * 16; ++row)
    for (int64_t column = 0; column < padded; ++column) {
      const bool inside = row < view_.rows && column < view_.columns;
      const int64_t zero = bytes ? 128 : view_.kind == Kind::int4 ? 8 : random.below(16);
      int64_t code = !inside ? zero : bytes ? random.between(1, 255) : random.below(16);
      if (inside && random.below(8) == 0) code = bytes ? (random.below(2) ? 255 : 1) : (random.below(2) ? 15 : 0);
      if (row >= view_.rows && view_.kind == Kind::codebook4) code = 0;
      const int64_t lane = row % 16 * 4 + column % 4, panel = row / 16;
      if (bytes) codes_[(panel * (padded / 4) + column / 4) * 64 + lane] = static_cast<uint8_t>(code);
      else
        codes_[(panel * (padded / 8) + column / 8) * 64 + lane] |=
            static_cast<uint8_t>(column % 8 < 4 ? code : code << 4);
      if (!inside) continue;
      const int64_t level = bytes ? code - 128 : view_.kind == Kind::int4 ? code - 8 : codebook_[code] - 64;
      levels_[static_cast<size_t>(row * view_.columns + column)] = static_cast<int32_t>(level);
      values_[static_cast<size_t>(row * view_.columns + column)] = static_cast<double>(level) * scale(row, column);
    }
}

void TestWeight::draw_floats(Random& random) {
  for (int64_t row = 0; row < view_.rows; ++row)
    for (int64_t column = 0; column < view_.columns; ++column) {
      const int64_t panel = row / 16, lane = row % 16, pairs = (view_.columns + 1) / 2;
      double& value = values_[static_cast<size_t>(row * view_.columns + column)];
      if (view_.kind == Kind::f32) {
        const float drawn = random.normal();
        reinterpret_cast<float*>(codes_.data())[(panel * view_.columns + column) * 16 + lane] = drawn;
        value = drawn;
        continue;
      }
      const bool half = view_.kind == Kind::f16;
      const uint32_t bits = float_as_bits(random.normal());
      const uint16_t code = half ? random_half(random, 8, 20) : static_cast<uint16_t>(bits >> 16);
      reinterpret_cast<uint16_t*>(codes_.data())[((panel * pairs + column / 2) * 16 + lane) * 2 + column % 2] = code;
      value = half ? half_value(code) : bf16_value(code);
    }
}

}  // namespace hasten::test
