// Loads and masks of the AVX2 kernels.
#pragma once
#include <immintrin.h>

#include "isa/matmul_common.h"

#define HASTEN_INLINE inline __attribute__((always_inline))

namespace hasten {
namespace {

// Lanes of a half panel that are rows: `rows` counted from the half's first.
inline __m256i lane_mask(int64_t rows) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(rows < 0 ? 0 : rows > 8 ? 8 : rows)),
                            _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

// The first `count` of eight lanes, if so many are left. Masked moves are slow on AMD even where the mask is full.
HASTEN_INLINE __m256 load_lanes(const float* p, int64_t count) {
  return count >= 8 ? _mm256_loadu_ps(p) : _mm256_maskload_ps(p, lane_mask(count));
}
HASTEN_INLINE void store_lanes(float* p, int64_t count, __m256 value) {
  if (count >= 8)
    _mm256_storeu_ps(p, value);
  else
    _mm256_maskstore_ps(p, lane_mask(count), value);
}

inline __m256i load32(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }

inline __m256i broadcast4(const void* x) {
  int32_t bits;
  std::memcpy(&bits, x, sizeof bits);
  return _mm256_set1_epi32(bits);
}

}  // namespace
}  // namespace hasten
