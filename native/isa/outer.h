// Sums of outer products of features, for second moments: twice as fast in 16-bit integers as in float32. Of 256 tokens at
// a time each feature is rounded to 2895 steps of its peak; products of two and their sums are exact.
#pragma once
#include "isa/lanes.h"

namespace hasten {
namespace {
namespace ops {

constexpr float kOuterSteps = 2895;  // kOuterTokens * kOuterSteps^2 < 2^31
constexpr float kOuterLeast = 1e-30f;  // of a feature's peak; below it is zero

// A panel's tokens, in pairs, as whole numbers of `step`: [kOuterTokens / 2][16 features][2].
inline void outer_codes(const float* x, int64_t tokens, int64_t stride, int64_t lanes, V step, int16_t* codes) {
  // Adding 1.5 * 2^23 leaves a whole number in the low bits of the float.
  const V whole = simd::set(12582912.0f), most = simd::set(kOuterSteps), least = simd::set(-kOuterSteps);
  const auto rounded = [&](int64_t token, uint32_t* bits) {
    const V steps = token < tokens ? simd::mul(read(x + token * stride, lanes), step) : simd::zero();
    float sum[simd::kLanes];
    simd::store(sum, simd::add(simd::minimum(simd::maximum(steps, least), most), whole));
    memcpy(bits, sum, sizeof sum);
  };
  for (int64_t token = 0; token < kOuterTokens; token += 2) {
    uint32_t even[simd::kLanes], odd[simd::kLanes];
    rounded(token, even);
    rounded(token + 1, odd);
    for (int i = 0; i < simd::kLanes; ++i) even[i] = (even[i] & 0xffff) | odd[i] << 16;
    memcpy(codes + token * simd::kLanes, even, sizeof even);
  }
}

inline void outer_pack(const OuterPackArgs& a) {
  for (int64_t panel = 0; panel < round_up(a.columns, simd::kLanes) / simd::kLanes; ++panel) {
    const int64_t first = panel * simd::kLanes;
    const int64_t lanes = a.columns - first < simd::kLanes ? a.columns - first : simd::kLanes;
    V peak = simd::zero(), magnitude = simd::zero();
    simd::D squares = simd::zero_double();
    for (int64_t token = 0; token < a.tokens; ++token) {
      const V x = read(a.x + token * a.columns + first, lanes), size = simd::absolute(x);
      peak = simd::maximum(size, peak);
      magnitude = simd::add(magnitude, size);
      squares = simd::accumulate(squares, simd::mul(x, x));
    }
    write(a.peaks + first, peak, lanes);
    write(a.magnitudes + first, magnitude, lanes);
    simd::store(a.squares + first, squares, lanes);
    if (a.codes == nullptr) continue;
    float peaks[simd::kLanes], steps[simd::kLanes];
    simd::store(peaks, peak);
    for (int i = 0; i < simd::kLanes; ++i) {
      const bool used = peaks[i] > kOuterLeast;
      steps[i] = used ? kOuterSteps / peaks[i] : 0;
      a.scales[first + i] = used ? peaks[i] / kOuterSteps : 0;
    }
    outer_codes(a.x + first, a.tokens, a.columns, lanes, simd::load(steps), a.codes + panel * a.stride);
  }
}

// tile[row][column] += the products of rows row0.. of panel a with panel b, over kOuterTokens tokens.
inline void outer_tile(const int16_t* a, const int16_t* b, int row0, const float* row_scales, const float* scales, float* tile) {
  simd::I sums[simd::kOuterRows];
  for (simd::I& sum : sums) sum = simd::no_pairs();
  for (int64_t at = 0; at < kOuterTokens * simd::kLanes; at += 2 * simd::kLanes) {
    const simd::I right = simd::load_pairs(b + at);
    for (int r = 0; r < simd::kOuterRows; ++r)
      sums[r] = simd::add_products(sums[r], simd::set_pair(a + at + 2 * (row0 + r)), right);
  }
  const V columns = simd::load(scales);
  for (int r = 0; r < simd::kOuterRows; ++r) {
    float* out = tile + (row0 + r) * simd::kLanes;
    const V factor = simd::mul(columns, simd::set(row_scales[row0 + r]));
    simd::store(out, simd::add(simd::load(out), simd::mul(factor, simd::floats(sums[r]))));
  }
}

constexpr int64_t kOuterPanels = 4;  // that each row panel meets while it is in the first cache

// into[i][j] += the products of features i and j, for j of panels [panel0, panel1) and i of no later panel.
inline void outer_add(const OuterAddArgs& a) {
  constexpr int64_t kLanes = simd::kLanes, kPanel = kOuterTokens * kLanes;
  const int64_t panels = round_up(a.columns, kLanes) / kLanes;
  for (int64_t block = a.panel0; block < a.panel1; block += kOuterPanels) {
    const int64_t stop = block + kOuterPanels < a.panel1 ? block + kOuterPanels : a.panel1;
    for (int64_t i = 0; i < stop; ++i) {
      float tiles[kOuterPanels][kLanes * kLanes] = {};
      const int64_t from = i > block ? i : block;
      for (int64_t c = 0; c < a.chunks; ++c) {
        const float* scales = a.scales + c * panels * kLanes;
        for (int64_t j = from; j < stop; ++j)
          for (int row = 0; row < kLanes; row += simd::kOuterRows)
            outer_tile(a.codes + (i * a.chunks + c) * kPanel, a.codes + (j * a.chunks + c) * kPanel, row, scales + i * kLanes, scales + j * kLanes, tiles[j - block]);
      }
      for (int64_t j = from; j < stop; ++j) {
        const int64_t lanes = a.columns - j * kLanes < kLanes ? a.columns - j * kLanes : kLanes;
        for (int64_t row = i * kLanes; row < (i + 1) * kLanes && row < a.columns; ++row) {
          float* out = a.into + row * a.columns + j * kLanes;
          write(out, simd::add(read(out, lanes), simd::load(tiles[j - block] + (row - i * kLanes) * kLanes)), lanes);
        }
      }
    }
  }
}

}  // namespace ops
}  // namespace
}  // namespace hasten
