// What compressing a model takes: the sweep that rounds a matrix.
#pragma once
#include "isa/lanes.h"

namespace hasten {
namespace {
namespace ops {

// Quotients to the nearest levels, by the table over half-levels; NaN to its first entry.
HASTEN_INLINE V nearest_levels(V quotients, const float* levels) {
  float q[simd::kLanes];
  simd::store(q, quotients);
  for (float& x : q) {
    const float place = 2 * x + kHalfLevels / 2;
    const float low = place > 0 ? place : 0;
    x = levels[static_cast<int32_t>(low < kHalfLevels - 1 ? low : kHalfLevels - 1)];
  }
  return simd::load(q);
}

// A block of columns of the sweep that GPTQ and SparseGPT make (compress/methods/_sweep.py says by what rule): each is
// rounded in turn, and the columns after it make up for what was lost.
inline void sweep(const SweepArgs& a) {
  float moved[kSweepColumns][simd::kLanes];
  sixteens(a.rows, [&](int64_t row, int64_t lanes) {
    for (int64_t c = 0; c < a.columns; ++c) simd::store(moved[c], read(a.moved + c * a.rows + row, lanes));
    V error = simd::zero();
    for (int64_t c = 0; c < a.columns; ++c) {
      const int64_t at = c * a.rows + row;
      const float* ahead = a.ahead + c * a.columns;
      const V value = read(a.values + at, lanes), wanted = simd::add(value, simd::load(moved[c]));
      V made = nearest_levels(simd::div(wanted, read(a.divisors + at, lanes)), a.levels);
      made = simd::mul(made, read(a.scales + at, lanes));
      if (a.kept != nullptr) made = simd::mul(made, read(a.kept + at, lanes));
      const V lost = simd::sub(value, made), off = simd::sub(wanted, made);
      error = simd::fma(simd::mul(off, off), simd::set(a.weights[c]), error);
      write(a.made + at, made, lanes);
      write(a.lost + at, lost, lanes);
      for (int64_t next = c + 1; next < a.columns; ++next)
        simd::store(moved[next], simd::fma(lost, simd::set(ahead[next]), simd::load(moved[next])));
    }
    write(a.error + row, error, lanes);
  });
}

}  // namespace ops
}  // namespace
}  // namespace hasten
