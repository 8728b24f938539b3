// Random weights of every kind, packed by the layouts that native/core.h states, their values in float64 beside them.
#pragma once
#include "check.h"

namespace hasten::test {

struct KindName { Kind kind; const char* name; };
inline constexpr KindName kIntKinds[] = {
    {Kind::int8, "int8"}, {Kind::int4, "int4"}, {Kind::codebook4, "codebook4"}};
inline constexpr KindName kFloatKinds[] = {{Kind::f32, "f32"}, {Kind::f16, "f16"}, {Kind::bf16, "bf16"}};

class TestWeight {
 public:
  // group 0 for float kinds. Scales of 1 make every sum of products an integer.
  TestWeight(Kind kind, int64_t rows, int64_t columns, int64_t group, uint64_t seed, bool unit_scales = false);
  const Weight& view() const { return view_; }
  double value(int64_t row, int64_t column) const { return values_[static_cast<size_t>(row * view_.columns + column)]; }
  // value / scale, an integer.
  int64_t level(int64_t row, int64_t column) const {
    return levels_[static_cast<size_t>(row * view_.columns + column)];
  }
  double scale(int64_t row, int64_t column) const;

 private:
  void draw_integers(Random& random, bool unit_scales);
  void draw_floats(Random& random);
  Weight view_;
  Exact<uint8_t> codes_;
  Exact<uint16_t> scales_;
  Exact<uint8_t> codebook_;
  std::vector<double> values_;
  std::vector<int32_t> levels_;
};

}  // namespace hasten::test
