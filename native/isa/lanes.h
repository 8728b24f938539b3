// Sixteen elements at a time of arrays of any length.
#pragma once
#include "isa/simd_math.h"

namespace hasten {
namespace {
namespace ops {

using simd::V;

// Calls body(offset, lanes) for each sixteen of n elements; the last one may be partial.
template <class Body>
HASTEN_INLINE void sixteens(int64_t n, Body body) {
  int64_t i = 0;
  for (; i + simd::kLanes <= n; i += simd::kLanes) body(i, simd::kLanes);
  if (i < n) body(i, n - i);
}

HASTEN_INLINE V read(const float* p, int64_t lanes) { return lanes == simd::kLanes ? simd::load(p) : simd::load(p, lanes); }
HASTEN_INLINE void write(float* p, V a, int64_t lanes) {
  if (lanes == simd::kLanes) simd::store(p, a);
  else simd::store(p, a, lanes);
}

}  // namespace ops
}  // namespace
}  // namespace hasten
