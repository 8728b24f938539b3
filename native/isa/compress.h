// What compressing a model takes: the sweep that rounds a matrix, the equations that its scales solve.
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

static_assert(kLevelColumns % simd::kSumsTogether == 0);

// sum over c and d of one[c] * hessian[c, d] * other[d] for sixteen rows; levels and Hessian as a's strides say.
HASTEN_INLINE V level_product(const LevelProductsArgs& a, const float* one, const float* other, const float* hessian,
                              int64_t lanes) {
  V total = simd::zero();
  for (int64_t c = 0; c < a.group; c += simd::kSumsTogether) {
    V sums[simd::kSumsTogether];
    for (V& sum : sums) sum = simd::zero();
    for (int64_t d = 0; d < a.group; ++d) {
      const V level = read(other + d * a.rows, lanes);
      for (int k = 0; k < simd::kSumsTogether; ++k)
        sums[k] = simd::fma(simd::set(hessian[(c + k) * a.columns + d]), level, sums[k]);
    }
    for (int k = 0; k < simd::kSumsTogether; ++k) total = simd::fma(sums[k], read(one + (c + k) * a.rows, lanes), total);
  }
  return total;
}

// A block of the Hessian is asked for in good time: its rows lie too far apart for the processor to foresee them.
HASTEN_INLINE void prefetch_block(const float* block, int64_t group, int64_t stride) {
  for (int64_t c = 0; c < group; ++c)
    for (int64_t d = 0; d < group; d += 16) __builtin_prefetch(block + c * stride + d);
}

// The normal equations of each row's scales. A pair of groups' block of the Hessian stays in the cache while rows go by.
inline void level_products(const LevelProductsArgs& a) {
  const int64_t groups = a.columns / a.group, block = a.group * a.rows;
  for (int64_t g = 0; g < groups; ++g)
    for (int64_t h = g; h < groups; ++h) {
      const float* hessian = a.hessian + g * a.group * a.columns + h * a.group;
      if (h + 1 < groups) prefetch_block(hessian + a.group, a.group, a.columns);
      sixteens(a.rows, [&](int64_t row, int64_t lanes) {
        const float *one = a.levels + g * block + row, *other = a.levels + h * block + row;
        float found[simd::kLanes];
        simd::store(found, level_product(a, one, other, hessian, lanes));
        for (int64_t lane = 0; lane < lanes; ++lane) {
          float* left = a.left + (row + lane) * groups * groups;
          left[g * groups + h] = left[h * groups + g] = found[lane];
        }
      });
    }
}

// Symmetric elimination of one system in place, of which only the upper triangle is read; the solution stands in `right`.
// A row is finished with all rows above it, four at a time, so that it stays in the first-level cache. False where the
// matrix is not positive definite.
inline bool solve_positive(int64_t n, double* matrix, double* right) {
  for (int64_t j = 0; j < n; ++j) {
    double* row = matrix + j * n;
    for (int64_t k = 0; k < j; k += 4) {
      const double* above[4];
      double part[4];
      for (int64_t i = 0; i < 4; ++i) {
        const bool inside = k + i < j;
        above[i] = matrix + (inside ? k + i : k) * n;
        part[i] = inside ? above[i][j] / above[i][k + i] : 0.0;
        right[j] -= part[i] * right[inside ? k + i : k];
      }
      for (int64_t c = j; c < n; ++c)
        row[c] -= (part[0] * above[0][c] + part[1] * above[1][c]) + (part[2] * above[2][c] + part[3] * above[3][c]);
    }
    if (!(row[j] > 0)) return false;
  }
  for (int64_t j = n; j-- > 0;) {
    for (int64_t c = j + 1; c < n; ++c) right[j] -= matrix[j * n + c] * right[c];
    right[j] /= matrix[j * n + j];
  }
  return true;
}

}  // namespace ops
}  // namespace
}  // namespace hasten
