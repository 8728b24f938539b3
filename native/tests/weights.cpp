#include "weights.h"

namespace hasten::test {
namespace {

// Bits of a code; 0 for the half-sparse kind, whose blocks of 16 rows by 32 columns take 320 bytes.
int bits_of(Kind kind) {
  switch (kind) {
    case Kind::int8: return 8;
    case Kind::int4:
    case Kind::codebook4: return 4;
    case Kind::int3:
    case Kind::codebook3: return 3;
    case Kind::int2:
    case Kind::codebook2: return 2;
    case Kind::int1:
    case Kind::codebook1: return 1;
    default: return 0;
  }
}

int64_t block_bytes(Kind kind) { return kind == Kind::sparse8 ? 320 : 64 * bits_of(kind); }

int64_t code_bytes(Kind kind, int64_t rows, int64_t columns) {
  const int64_t panels = (rows + 15) / 16, padded = (columns + 31) / 32 * 32;
  switch (kind) {
    case Kind::f32: return panels * columns * 16 * 4;
    case Kind::f16:
    case Kind::bf16: return panels * ((columns + 1) / 2) * 16 * 2 * 2;
    default: return panels * (padded / 32) * block_bytes(kind);
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
      scales_(group == 0 ? 0 : (rows + 15) / 16 * ((columns + group - 1) / group) * 16), codebook_(int64_t{1} << bits_of(kind)),
      values_(static_cast<size_t>(rows * columns)), levels_(static_cast<size_t>(rows * columns)) {
  view_.kind = kind;
  view_.rows = rows;
  view_.columns = columns;
  view_.group = group;
  view_.codes = codes_.data();
  view_.scales = group == 0 ? nullptr : scales_.data();
  view_.codebook = codebook_.data();
  Random random(seed);
  for (int64_t i = 0; i < scales_.count(); ++i) scales_[i] = unit_scales ? 0x3c00 : random_half(random, 5, 12);
  for (int64_t i = 0; i < codebook_.count(); ++i) codebook_[i] = static_cast<uint8_t>(random.below(128));
  codebook_[codebook_.count() - 1] = 127;
  if (group == 0) draw_floats(random);
  else if (kind == Kind::sparse8) draw_sparse(random);
  else draw_integers(random);
}

double TestWeight::scale(int64_t row, int64_t column) const {
  const int64_t groups = (view_.columns + view_.group - 1) / view_.group;
  return half_value(scales_[(row / 16 * groups + column / view_.group) * 16 + row % 16]);
}

// Line column % 32 / 4 of each plane: bytes [16 rows][4 columns], 8 / width lines side by side in each.
void TestWeight::put_code(int64_t row, int64_t column, int64_t code) {
  const int64_t blocks = (view_.columns + 31) / 32, line = column % 32 / 4;
  uint8_t* block = codes_.data() + (row / 16 * blocks + column / 32) * block_bytes(view_.kind);
  const auto put = [&](uint8_t* plane, int64_t width, int64_t bits) {
    plane[line * width / 8 * 64 + row % 16 * 4 + column % 4] |= static_cast<uint8_t>(bits << line * width % 8);
  };
  const int bits = bits_of(view_.kind);
  if (bits != 3) return put(block, bits, code);
  put(block, 2, code & 3);
  put(block + 128, 1, code >> 2);
}

void TestWeight::set_level(int64_t row, int64_t column, int64_t level) {
  levels_[static_cast<size_t>(row * view_.columns + column)] = static_cast<int32_t>(level);
  values_[static_cast<size_t>(row * view_.columns + column)] = static_cast<double>(level) * scale(row, column);
}

void TestWeight::draw_integers(Random& random) {
  const int64_t codes = int64_t{1} << bits_of(view_.kind), lowest = view_.kind == Kind::int8 ? 1 : 0;
  for (int64_t row = 0; row < (view_.rows + 15) / 16 * 16; ++row)
    for (int64_t column = 0; column < (view_.columns + 31) / 32 * 32; ++column) {
      int64_t code = random.between(lowest, codes - 1);
      if (random.below(8) == 0) code = random.below(2) ? codes - 1 : lowest;
      const auto level = [&]() -> int64_t {
        switch (view_.kind) {
          case Kind::int8: return code - 128;
          case Kind::int4: return code - 8;
          case Kind::int3: return code - 4;
          case Kind::int2: return 2 * code - 3;
          case Kind::int1: return 2 * code - 1;
          default: return codebook_[code] - 64;
        }
      };
      if (row < view_.rows && column < view_.columns) set_level(row, column, level());
      else if (view_.kind == Kind::int8 || view_.kind == Kind::int4 || view_.kind == Kind::int3) code = codes / 2;
      put_code(row, column, code);
    }
}

// Of each block's 512 places half have a value, a place outside the matrix none but zero.
void TestWeight::draw_sparse(Random& random) {
  const int64_t blocks = (view_.columns + 31) / 32;
  for (int64_t panel = 0; panel < view_.panels(); ++panel)
    for (int64_t b = 0; b < blocks; ++b) {
      uint8_t* block = codes_.data() + (panel * blocks + b) * 320;
      int64_t stored = 0;
      for (int64_t place = 0; place < 512; ++place) {
        if (random.below(512 - place) >= 256 - stored) continue;
        const int64_t row = panel * 16 + place % 64 / 4, column = b * 32 + place / 64 * 4 + place % 4;
        const int64_t value = random.below(8) ? random.between(-127, 127) : random.below(2) ? 127 : -127;
        const bool inside = row < view_.rows && column < view_.columns;
        block[stored++] = static_cast<uint8_t>(inside ? value : 0);
        block[256 + place / 8] |= static_cast<uint8_t>(1 << place % 8);
        if (inside) set_level(row, column, value);
      }
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
