// The kernels of compression against float64 formulas: sums of outer products, equations of scales, the sweep.
#include <algorithm>

#include "check.h"

namespace hasten::test {
namespace {

bool within(double found, double wanted, double slack) { return std::fabs(found - wanted) <= slack; }

// --- sums of outer products

// Sizes from thousandths to thousands. One feature is always zero, of 255 tokens one stands out.
std::vector<float> features(int64_t tokens, int64_t columns, uint64_t seed) {
  Random random(seed);
  std::vector<float> x(static_cast<size_t>(tokens * columns));
  for (int64_t c = 0; c < columns; ++c) {
    const double size = columns > 1 && c == columns / 2 ? 0 : std::pow(10, random.between(-3, 3));
    for (int64_t t = 0; t < tokens; ++t)
      x[static_cast<size_t>(t * columns + c)] =
          static_cast<float>(random.normal() * size * (tokens == 255 && t == 100 ? 1000 : 1));
  }
  return x;
}

// Chunks of the same number of tokens, packed.
struct Outer {
  int64_t tokens, columns, chunks, panels = round_up(columns, kPanel) / kPanel;
  Guarded<int16_t> codes{panels * chunks * kOuterTokens * kPanel, 2};
  Guarded<float> scales{chunks * panels * kPanel, 4};

  double scale(int64_t chunk, int64_t column) { return scales[chunk * panels * kPanel + column]; }
  int64_t code(int64_t chunk, int64_t token, int64_t column) {
    const int64_t panel = (column / kPanel * chunks + chunk) * kOuterTokens * kPanel;
    return codes[panel + token / 2 * 2 * kPanel + column % kPanel * 2 + token % 2];
  }
};

void check_statistics(const char* name, const std::vector<float>& x, int64_t columns, Guarded<double>& squares,
                      Guarded<float>& magnitudes, Guarded<float>& peaks) {
  expect(squares.intact() && magnitudes.intact() && peaks.intact(), "%s: statistics outside their places", name);
  for (int64_t c = 0; c < columns; ++c) {
    double square = 0, magnitude = 0, peak = 0;
    for (size_t at = static_cast<size_t>(c); at < x.size(); at += static_cast<size_t>(columns)) {
      square += double{x[at]} * x[at];
      magnitude += std::fabs(x[at]);
      peak = std::max(peak, std::fabs(double{x[at]}));
    }
    expect(within(squares[c], square, 1e-7 * square), "%s: squares of feature %d are %.9g, not %.9g", name,
           static_cast<int>(c), squares[c], square);
    expect(within(magnitudes[c], magnitude, 1e-5 * magnitude), "%s: sizes of feature %d are %.9g, not %.9g", name,
           static_cast<int>(c), static_cast<double>(magnitudes[c]), magnitude);
    expect(double{peaks[c]} == peak, "%s: peak of feature %d is %.9g, not %.9g", name, static_cast<int>(c),
           static_cast<double>(peaks[c]), peak);
  }
}

void pack(const Kernels& k, const std::vector<float>& values, int64_t chunk, Outer& out) {
  const Exact<float> x(values, 4);
  Guarded<double> squares(out.columns, 8);
  Guarded<float> magnitudes(out.columns, 4), peaks(out.columns, 8);
  const int64_t size = kOuterTokens * kPanel;
  OuterPackArgs args = {.tokens = out.tokens, .columns = out.columns, .x = x.data(), .squares = squares.data(),
                        .magnitudes = magnitudes.data(), .peaks = peaks.data(), .codes = nullptr, .stride = 0,
                        .scales = nullptr};
  k.outer_pack(args);
  check_statistics("outer_pack without codes", values, out.columns, squares, magnitudes, peaks);
  std::fill_n(squares.data(), out.columns, -1);
  std::fill_n(magnitudes.data(), out.columns, -1);
  std::fill_n(peaks.data(), out.columns, -1);
  args.codes = out.codes.data() + chunk * size;
  args.stride = out.chunks * size;
  args.scales = out.scales.data() + chunk * out.panels * kPanel;
  k.outer_pack(args);
  check_statistics("outer_pack", values, out.columns, squares, magnitudes, peaks);
}

// Each code is its value to the nearest whole step of the feature's peak, and zero after the last token.
void check_codes(const std::vector<float>& x, int64_t chunk, Outer& out) {
  for (int64_t c = 0; c < out.columns; ++c) {
    const double scale = out.scale(chunk, c);
    double peak = 0;
    for (int64_t t = 0; t < kOuterTokens; ++t) {
      const double wanted = t < out.tokens ? x[static_cast<size_t>(t * out.columns + c)] : 0;
      const double found = static_cast<double>(out.code(chunk, t, c)) * scale;
      peak = std::max(peak, std::fabs(wanted));
      if (!expect(within(found, wanted, 0.501 * scale), "code of token %d, feature %d of %d: %.9g, not %.9g",
                  static_cast<int>(t), static_cast<int>(c), static_cast<int>(out.columns), found, wanted))
        return;
    }
    const double steps = scale > 0 ? peak / scale : 0;
    expect((scale > 0) == (peak > 0) && kOuterTokens * steps * steps < 0x1p31, "feature %d of %d: %g steps of %g",
           static_cast<int>(c), static_cast<int>(out.columns), steps, scale);
  }
}

// Some panels at a time: what the codes say is added in the panels asked for, up to the diagonal, and nowhere else.
void check_add(const Kernels& k, int64_t together, Outer& packed) {
  const int64_t columns = packed.columns;
  std::vector<double> sums(static_cast<size_t>(columns * columns));
  const auto sum = [&](int64_t i, int64_t j) -> double& { return sums[static_cast<size_t>(i * columns + j)]; };
  for (int64_t i = 0; i < columns; ++i)
    for (int64_t j = 0; j < columns; ++j)
      for (int64_t chunk = 0; chunk < packed.chunks; ++chunk) {
        int64_t whole = 0;
        for (int64_t t = 0; t < packed.tokens; ++t) whole += packed.code(chunk, t, i) * packed.code(chunk, t, j);
        sum(i, j) += static_cast<double>(whole) * packed.scale(chunk, i) * packed.scale(chunk, j);
      }
  Guarded<float> into(columns * columns, 4);
  std::fill_n(into.data(), columns * columns, 1.0f);
  for (int64_t first = 0; first < packed.panels; first += together) {
    const int64_t last = std::min(first + together, packed.panels);
    k.outer_add({.chunks = packed.chunks, .columns = columns, .panel0 = first, .panel1 = last,
                 .codes = packed.codes.data(), .scales = packed.scales.data(), .into = into.data()});
    expect(into.intact(), "outer_add of %d features wrote outside its output", static_cast<int>(columns));
    for (int64_t i = 0; i < columns; ++i)
      for (int64_t j = 0; j < columns; ++j) {
        const bool added = j / kPanel < last && i / kPanel <= j / kPanel;
        const double found = into[i * columns + j], wanted = 1 + (added ? sum(i, j) : 0);
        const double slack = added ? 1e-6 * (1 + std::sqrt(sum(i, i) * sum(j, j))) : 0;
        if (!expect(within(found, wanted, slack), "outer_add of %d features, panels %d to %d: [%d, %d] is %.9g, not %.9g",
                    static_cast<int>(columns), static_cast<int>(first), static_cast<int>(last), static_cast<int>(i),
                    static_cast<int>(j), found, wanted))
          return;
      }
  }
}

void check_outer(const Kernels& k, int64_t tokens, int64_t columns, int64_t chunks, int64_t together) {
  Outer out{.tokens = tokens, .columns = columns, .chunks = chunks};
  std::vector<std::vector<float>> x;
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    x.push_back(features(tokens, columns, static_cast<uint64_t>(tokens + columns + 1000 * chunk)));
    pack(k, x.back(), chunk, out);
  }
  expect(out.codes.intact() && out.scales.intact(), "outer_pack of %d features wrote outside its codes",
         static_cast<int>(columns));
  for (int64_t chunk = 0; chunk < chunks; ++chunk) check_codes(x[static_cast<size_t>(chunk)], chunk, out);
  check_add(k, together, out);
}

// Every value at its feature's peak, of either sign: in 32 bits the sums only just fit.
void check_largest(const Kernels& k) {
  const int64_t columns = 17, chunks = 2;
  Outer out{.tokens = kOuterTokens, .columns = columns, .chunks = chunks};
  std::vector<float> x(static_cast<size_t>(kOuterTokens * columns));
  for (size_t i = 0; i < x.size(); ++i) x[i] = i % columns % 2 == 0 ? -3.0f : 3.0f;
  for (int64_t chunk = 0; chunk < chunks; ++chunk) pack(k, x, chunk, out);
  Guarded<float> into(columns * columns);
  std::fill_n(into.data(), columns * columns, 0.0f);
  k.outer_add({.chunks = chunks, .columns = columns, .panel0 = 0, .panel1 = out.panels, .codes = out.codes.data(),
               .scales = out.scales.data(), .into = into.data()});
  for (int64_t i = 0; i < columns; ++i)
    for (int64_t j = i; j < columns; ++j) {
      const double wanted = 9.0 * static_cast<double>(chunks * kOuterTokens) * ((i + j) % 2 == 0 ? 1 : -1);
      expect(within(into[i * columns + j], wanted, 1e-2), "the largest sum [%d, %d] is %.9g, not %.9g",
             static_cast<int>(i), static_cast<int>(j), static_cast<double>(into[i * columns + j]), wanted);
    }
}

// --- the equations of scales

void check_level_products(const Kernels& k, int64_t rows, int64_t group) {
  const int64_t groups = 3, columns = groups * group;
  Random random(static_cast<uint64_t>(rows + group));
  Exact<float> levels(columns * rows, 4), hessian(columns * columns, 8);
  for (int64_t i = 0; i < levels.count(); ++i) levels[i] = static_cast<float>(random.between(-8, 7));
  for (int64_t c = 0; c < columns; ++c)
    for (int64_t d = 0; d <= c; ++d) hessian[c * columns + d] = hessian[d * columns + c] = random.normal();
  Guarded<float> left(rows * groups * groups, 4);
  k.level_products({.rows = rows, .columns = columns, .group = group, .levels = levels.data(),
                    .hessian = hessian.data(), .left = left.data()});
  expect(left.intact(), "level_products of %d rows wrote outside its output", static_cast<int>(rows));
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t g = 0; g < groups; ++g)
      for (int64_t h = 0; h < groups; ++h) {
        double wanted = 0, size = 0;
        for (int64_t c = g * group; c < (g + 1) * group; ++c)
          for (int64_t d = h * group; d < (h + 1) * group; ++d) {
            const double term = double{levels[c * rows + row]} * hessian[c * columns + d] * levels[d * rows + row];
            wanted += term;
            size += std::fabs(term);
          }
        const double found = left[(row * groups + g) * groups + h];
        if (!expect(within(found, wanted, 1e-6 * size), "level product [%d, %d, %d] of %d rows: %.9g, not %.9g",
                    static_cast<int>(row), static_cast<int>(g), static_cast<int>(h), static_cast<int>(rows), found,
                    wanted))
          return;
      }
}

// I + B B^T / n, less `taken` from one place of its diagonal; of the lower triangle nothing is read.
Guarded<double> system(int64_t n, int64_t place, double taken) {
  Random random(static_cast<uint64_t>(n));
  const std::vector<float> b = random.normals(n * n);
  Guarded<double> matrix(n * n, 8);
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < n; ++j) {
      double sum = i == j ? 1 - (i == place ? taken : 0) : 0;
      for (int64_t at = 0; at < n; ++at)
        sum += double{b[static_cast<size_t>(i * n + at)]} * b[static_cast<size_t>(j * n + at)] / static_cast<double>(n);
      matrix[i * n + j] = j < i ? NAN : sum;
    }
  return matrix;
}

void check_solve(const Kernels& k, int64_t n) {
  Random random(static_cast<uint64_t>(n + 1));
  const std::vector<float> wanted = random.normals(n);
  Guarded<double> matrix = system(n, 0, 0), right(n, 8);
  for (int64_t i = 0; i < n; ++i) {
    right[i] = 0;
    for (int64_t j = 0; j < n; ++j)
      right[i] += matrix[i < j ? i * n + j : j * n + i] * wanted[static_cast<size_t>(j)];
  }
  expect(k.solve_positive(n, matrix.data(), right.data()), "a system of %d has no solution", static_cast<int>(n));
  expect(matrix.intact() && right.intact(), "a system of %d is solved outside its places", static_cast<int>(n));
  for (int64_t i = 0; i < n; ++i)
    expect(within(right[i], wanted[static_cast<size_t>(i)], 1e-11), "solution %d of %d: %.12g, not %.12g",
           static_cast<int>(i), static_cast<int>(n), right[i], static_cast<double>(wanted[static_cast<size_t>(i)]));
  for (const int64_t place : {int64_t{0}, n / 2, n - 1})
    for (const double taken : {1e3, static_cast<double>(NAN)}) {
      Guarded<double> other = system(n, place, taken), some(n, 8);
      std::fill_n(some.data(), n, 1.0);
      expect(!k.solve_positive(n, other.data(), some.data()), "%g less at %d of %d is positive definite", taken,
             static_cast<int>(place), static_cast<int>(n));
      expect(other.intact() && some.intact(), "a system of %d is given up outside its places", static_cast<int>(n));
    }
  Guarded<double> none(n * n, 8), zeros(n, 8);
  std::fill_n(none.data(), n * n, 0.0);
  std::fill_n(zeros.data(), n, 0.0);
  expect(!k.solve_positive(n, none.data(), zeros.data()), "zeros of %d are positive definite", static_cast<int>(n));
}

// --- the sweep

// Every half-level its own, so that what comes out says which one it was.
Exact<float> half_levels() {
  Exact<float> levels(kHalfLevels, 4);
  for (int64_t i = 0; i < kHalfLevels; ++i) levels[i] = (static_cast<float>(i - kHalfLevels / 2) + 0.5f) / 2;
  return levels;
}

void check_sweep(const Kernels& k, int64_t rows, int64_t columns, bool pruned) {
  Random random(static_cast<uint64_t>(rows + columns));
  const int64_t size = columns * rows;
  Exact<float> values(random.normals(size), 4), ahead(columns * columns, 4), scales(size, 12), divisors(size, 4);
  Exact<float> kept(size, 8), weights(columns, 4);
  const Exact<float> moved(random.normals(size, 0.1f), 8), levels = half_levels();
  values[(columns - 1) * rows] = 100;                                // beyond the levels
  for (int64_t i = 0; i < size; ++i) {
    scales[i] = random.below(20) == 0 ? 0 : static_cast<float>(0.05 + 0.25 * random.uniform());
    divisors[i] = scales[i] == 0 ? INFINITY : scales[i];
    kept[i] = pruned && random.below(2) == 0 ? 0 : 1;
  }
  for (int64_t c = 0; c < columns; ++c) {
    weights[c] = static_cast<float>(0.5 + random.uniform());
    for (int64_t next = c + 1; next < columns; ++next)
      ahead[c * columns + next] = random.normal() / static_cast<float>(columns);
  }
  Guarded<float> made(size, 4), lost(size, 8), error(rows, 4);
  k.sweep({.rows = rows, .columns = columns, .values = values.data(), .moved = moved.data(), .ahead = ahead.data(),
           .scales = scales.data(), .divisors = divisors.data(), .levels = levels.data(),
           .kept = pruned ? kept.data() : nullptr, .weights = weights.data(), .made = made.data(), .lost = lost.data(),
           .error = error.data()});
  expect(made.intact() && lost.intact() && error.intact(), "a sweep of %d rows by %d columns wrote outside its outputs",
         static_cast<int>(rows), static_cast<int>(columns));
  for (int64_t row = 0; row < rows; ++row) {
    std::vector<double> shift(static_cast<size_t>(columns));
    double squares = 0;
    for (int64_t c = 0; c < columns; ++c) {
      const int64_t at = c * rows + row;
      const double wanted = double{values[at]} + moved[at] + shift[static_cast<size_t>(c)];
      const auto rounded = [&](double quotient) {
        const double place = std::floor(2 * quotient) + kHalfLevels / 2;
        return levels[static_cast<int64_t>(std::clamp(place, 0.0, kHalfLevels - 1.0))] * scales[at] * kept[at];
      };
      // Between two levels either is right; what follows from it is then held against this one.
      const double quotient = wanted / divisors[at];
      if (!expect((made[at] == rounded(quotient - 1e-4) || made[at] == rounded(quotient + 1e-4)) &&
                      lost[at] == values[at] - made[at],
                  "sweep of %d rows by %d columns, row %d column %d: %.9g becomes %.9g, %.9g lost",
                  static_cast<int>(rows), static_cast<int>(columns), static_cast<int>(row), static_cast<int>(c), wanted,
                  static_cast<double>(made[at]), static_cast<double>(lost[at])))
        return;
      squares += weights[c] * (wanted - made[at]) * (wanted - made[at]);
      for (int64_t next = c + 1; next < columns; ++next)
        shift[static_cast<size_t>(next)] += double{lost[at]} * ahead[c * columns + next];
    }
    expect(within(error[row], squares, 1e-8 + 1e-4 * squares),
           "sweep of %d rows by %d columns: error of row %d is %.9g, not %.9g", static_cast<int>(rows),
           static_cast<int>(columns), static_cast<int>(row), static_cast<double>(error[row]), squares);
  }
}

void check_sweep_ends(const Kernels& k) {
  const Exact<float> levels = half_levels();
  const float values[] = {NAN, -INFINITY, INFINITY, -1e30f, 1e30f}, none[5] = {}, ones[] = {1, 1, 1, 1, 1};
  const float first = levels[0], last = levels[kHalfLevels - 1], wanted[] = {first, first, last, first, last};
  float made[5], lost[5], error[5];
  k.sweep({.rows = 5, .columns = 1, .values = values, .moved = none, .ahead = none, .scales = ones, .divisors = ones,
           .levels = levels.data(), .kept = nullptr, .weights = ones, .made = made, .lost = lost, .error = error});
  expect(same_bits(made, wanted, 5), "a sweep of NaN, infinities and what is beyond the levels");
}

}  // namespace

void test_outer(const Kernels& k) {
  for (const int64_t columns : {1, 17, 63})
    for (const int64_t tokens : {1, 255, 256})
      for (const int64_t chunks : {1, 2}) check_outer(k, tokens, columns, chunks, 3);
  check_outer(k, 256, 100, 2, 7);                                    // more panels than one block has
  check_largest(k);
}

void test_compress(const Kernels& k) {
  for (const int64_t rows : {1, 16, 40}) {
    for (const int64_t group : {8, 32}) check_level_products(k, rows, group);
    for (const int64_t columns : {int64_t{1}, int64_t{17}, int64_t{63}, kSweepColumns})
      for (const bool pruned : {false, true}) check_sweep(k, rows, columns, pruned);
  }
  check_sweep_ends(k);
  for (const int64_t n : {1, 2, 5, 8, 28, 63}) check_solve(k, n);
}

}  // namespace hasten::test
