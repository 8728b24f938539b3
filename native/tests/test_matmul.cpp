// Matmuls against float64 sums over the same quantised values, integer parts exactly; the same bits in any company.
#include <algorithm>

#include "weights.h"

namespace hasten::test {
namespace {

struct Shape { int64_t rows, columns; };
constexpr Shape kShapes[] = {{1, 1}, {3, 172}, {16, 64}, {17, 33}, {31, 96}, {33, 129}, {50, 300}, {48, 7}, {5, 128},
                             {70, 610}};
constexpr int64_t kTokens[] = {1, 2, 3, 4, 5, 6, 7, 9, 13};

// Int8 activations whose rows start anywhere, with what must not be read between them.
struct IntInput {
  IntInput(int64_t tokens, int64_t columns, int64_t group, uint64_t seed, bool unit_scales)
      : stride((columns + 63) / 64 * 64 + 13), groups((columns + group - 1) / group), group(group),
        codes(tokens * stride - 13, 3), scales(tokens * groups, 4), sums(tokens * groups, 4) {
    Random random(seed);
    for (int64_t i = 0; i < codes.count(); ++i)
      codes[i] = i % stride < columns ? random_code(random) : i % stride < stride - 13 ? int8_t{0} : int8_t{99};
    for (int64_t i = 0; i < scales.count(); ++i)
      scales[i] = unit_scales ? 1.0f : static_cast<float>(std::ldexp(0.5 + random.uniform(), -6));
    for (int64_t t = 0; t < tokens; ++t)
      for (int64_t c = 0; c < columns; ++c) sums[t * groups + c / group] += codes[t * stride + c];
  }
  static int8_t random_code(Random& random) {
    const int64_t kind = random.below(6);
    return static_cast<int8_t>(kind == 0 ? 127 : kind == 1 ? -127 : random.between(-127, 127));
  }
  Quantised from(int64_t token) const {
    return {codes.data() + token * stride, scales.data() + token * groups, sums.data() + token * groups, stride, groups,
            group};
  }
  double value(int64_t token, int64_t column) const {
    return static_cast<double>(codes[token * stride + column]) * scales[token * groups + column / group];
  }
  int64_t stride, groups, group;
  Exact<int8_t> codes;
  Exact<float> scales;
  Exact<int32_t> sums;
};

// Float32 rows; the kernels that want bfloat16 for bfloat16 weights get that.
struct FloatInput {
  FloatInput(const Kernels& k, Kind kind, int64_t tokens, int64_t columns, uint64_t seed)
      : as_bf16(k.bf16_inputs && kind == Kind::bf16), stride(as_bf16 ? (columns + 63) / 64 * 64 : columns + 5),
        floats(as_bf16 ? 0 : tokens * stride - 5, 4), halves(as_bf16 ? tokens * stride : 0, 2) {
    Random random(seed);
    for (int64_t t = 0; t < tokens; ++t) {
      const std::vector<float> row = random.normals(columns);
      if (as_bf16) k.to_bf16(row.data(), columns, halves.data() + t * stride);
      else std::copy(row.begin(), row.end(), floats.data() + t * stride);
    }
    for (int64_t i = 0; i < floats.count(); ++i)
      if (i % stride >= columns) floats[i] = bits_as_float(0x7fc00000);
  }
  const void* from(int64_t token) const {
    return as_bf16 ? static_cast<const void*>(halves.data() + token * stride) : floats.data() + token * stride;
  }
  double value(int64_t token, int64_t column) const {
    return as_bf16 ? bf16_value(halves[token * stride + column]) : floats[token * stride + column];
  }
  bool as_bf16;
  int64_t stride;
  Exact<float> floats;
  Exact<uint16_t> halves;
};

// An output [tokens][stride] of which panels [panel0, panel1) may be written, and nothing else.
class Output {
 public:
  Output(int64_t tokens, int64_t rows) : tokens_(tokens), rows_(rows), stride_(rows + 9), out_(tokens * stride_, 12) {}
  float* data() { return out_.data(); }
  int64_t stride() const { return stride_; }
  const float* row(int64_t token) const { return out_.data() + token * stride_; }
  bool outside_untouched(int64_t panel0, int64_t panel1) const {
    const int64_t first = panel0 * 16, last = std::min(rows_, panel1 * 16);
    for (int64_t i = 0; i < tokens_ * stride_; ++i) {
      const int64_t column = i % stride_;
      if (!(first <= column && column < last) && !out_.untouched(i)) return false;
    }
    return out_.intact();
  }

 private:
  int64_t tokens_, rows_, stride_;
  Guarded<float> out_;
};

// Runs tokens [token0, token0 + tokens) on panels [panel0, panel1).
template <class Input>
Output multiply(const Kernels& k, const TestWeight& weight, const Input& input, int64_t token0, int64_t tokens,
                int64_t panel0, int64_t panel1) {
  const Weight& w = weight.view();
  Output out(tokens, w.rows);
  Guarded<std::byte> scratch(k.matmul_scratch(w, tokens));
  if constexpr (std::is_same_v<Input, IntInput>)
    k.matmul_int(w, input.from(token0), tokens, panel0, panel1, out.data(), out.stride(), scratch.data());
  else
    k.matmul_float(w, input.from(token0), input.stride, tokens, panel0, panel1, out.data(), out.stride(),
                   scratch.data());
  expect(scratch.intact(), "matmul wrote past its scratch: %d rows, %d columns, %d tokens", static_cast<int>(w.rows),
         static_cast<int>(w.columns), static_cast<int>(tokens));
  expect(out.outside_untouched(panel0, panel1), "matmul wrote outside its output: %d rows, panels %d to %d",
         static_cast<int>(w.rows), static_cast<int>(panel0), static_cast<int>(panel1));
  return out;
}

// |found - sum| <= bound * sum of magnitudes
template <class Input>
void check_formula(const char* name, const TestWeight& weight, const Input& input, const Output& out, int64_t tokens,
                   double bound) {
  const Weight& w = weight.view();
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t row = 0; row < w.rows; ++row) {
      double sum = 0, size = 0;
      for (int64_t c = 0; c < w.columns; ++c) {
        const double product = weight.value(row, c) * input.value(t, c);
        sum += product;
        size += std::fabs(product);
      }
      if (!expect(std::fabs(out.row(t)[row] - sum) <= bound * size + 1e-30,
                  "%s [%d, %d] times %d tokens: token %d row %d is %.9g, the formula gives %.9g", name,
                  static_cast<int>(w.rows), static_cast<int>(w.columns), static_cast<int>(tokens), static_cast<int>(t),
                  static_cast<int>(row), static_cast<double>(out.row(t)[row]), sum))
        return;
    }
}

// Any split of tokens and panels gives the bits that the whole gives.
template <class Input>
void check_splits(const Kernels& k, const char* name, const TestWeight& weight, const Input& input, int64_t tokens) {
  const Weight& w = weight.view();
  const Output whole = multiply(k, weight, input, 0, tokens, 0, w.panels());
  Random random(7);
  for (int round = 0; round < 12; ++round) {
    const int64_t token0 = random.below(tokens), count = random.between(1, tokens - token0);
    const int64_t panel0 = random.below(w.panels()), panel1 = random.between(panel0, w.panels());
    const Output part = multiply(k, weight, input, token0, count, panel0, panel1);
    const int64_t first = panel0 * 16, rows = std::min(w.rows, panel1 * 16) - first;
    for (int64_t t = 0; t < count && rows > 0; ++t)
      expect(same_bits(part.row(t) + first, whole.row(token0 + t) + first, rows),
             "%s: tokens %d + %d, panels %d to %d: token %d has other bits than among %d tokens", name,
             static_cast<int>(token0), static_cast<int>(count), static_cast<int>(panel0), static_cast<int>(panel1),
             static_cast<int>(t), static_cast<int>(tokens));
  }
}

void check_integers(const Kernels& k, const KindName& kind, Shape shape, int64_t group, int64_t x_group,
                    int64_t tokens) {
  const TestWeight weight(kind.kind, shape.rows, shape.columns, group, 11, true);
  const IntInput input(tokens, shape.columns, x_group, 12, true);
  const Output out = multiply(k, weight, input, 0, tokens, 0, weight.view().panels());
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t row = 0; row < shape.rows; ++row) {
      int64_t sum = 0;
      for (int64_t c = 0; c < shape.columns; ++c) sum += weight.level(row, c) * input.codes[t * input.stride + c];
      if (!expect(out.row(t)[row] == static_cast<float>(sum),
                  "%s [%d, %d]: token %d row %d is %.9g, the exact sum is %d",
                  kind.name, static_cast<int>(shape.rows), static_cast<int>(shape.columns), static_cast<int>(t),
                  static_cast<int>(row), static_cast<double>(out.row(t)[row]), static_cast<int>(sum)))
        return;
    }
}

// A weight's rows one by one are its values, rounded once to float32.
void check_decoded(const Kernels& k, const char* name, const TestWeight& weight) {
  const Weight& w = weight.view();
  for (int64_t row = 0; row < w.rows; ++row) {
    Guarded<float> out(w.columns, 4);
    k.decode_row(w, row, out.data());
    expect(out.intact(), "decode_row of %s wrote outside its output", name);
    for (int64_t c = 0; c < w.columns; ++c)
      if (!expect(out[c] == static_cast<float>(weight.value(row, c)),
                  "decode_row of %s: row %d column %d is %.9g, not %.9g",
                  name, static_cast<int>(row), static_cast<int>(c), static_cast<double>(out[c]), weight.value(row, c)))
        return;
  }
}

}  // namespace

void test_matmul_int(const Kernels& k) {
  int round = 0;
  for (const KindName& kind : kIntKinds)
    for (const Shape shape : kShapes) {
      const int64_t group = 32 << round % 3, x_group = round % 2 ? group : 32;
      const int64_t tokens = kTokens[round % std::size(kTokens)];
      ++round;
      check_integers(k, kind, shape, group, x_group, tokens);
      const TestWeight weight(kind.kind, shape.rows, shape.columns, group, 21);
      const IntInput input(tokens, shape.columns, x_group, 22, false);
      check_formula(kind.name, weight, input, multiply(k, weight, input, 0, tokens, 0, weight.view().panels()), tokens,
                    1e-6);
      check_decoded(k, kind.name, weight);
    }
  for (const KindName& kind : kIntKinds) {
    const TestWeight weight(kind.kind, 70, 172, 64, 31);
    check_splits(k, kind.name, weight, IntInput(23, 172, 32, 32, false), 23);
    for (const int64_t tokens : kTokens) check_integers(k, kind, {17, 96}, 32, 32, tokens);
    // More tokens than read weights as they are stored, more columns than are unpacked at a time.
    const TestWeight wide(kind.kind, 18, 1234, 64, 33);
    const IntInput many(45, 1234, 32, 34, false);
    check_formula(kind.name, wide, many, multiply(k, wide, many, 0, 45, 0, wide.view().panels()), 45, 1e-6);
    check_splits(k, kind.name, wide, many, 45);
  }
}

void test_matmul_float(const Kernels& k) {
  int round = 0;
  for (const KindName& kind : kFloatKinds)
    for (const Shape shape : kShapes) {
      const int64_t tokens = kTokens[round++ % std::size(kTokens)];
      const TestWeight weight(kind.kind, shape.rows, shape.columns, 0, 41);
      const FloatInput input(k, kind.kind, tokens, shape.columns, 42);
      check_formula(kind.name, weight, input, multiply(k, weight, input, 0, tokens, 0, weight.view().panels()), tokens,
                    2e-6);
      check_decoded(k, kind.name, weight);
    }
  for (const KindName& kind : kFloatKinds) {
    const TestWeight weight(kind.kind, 70, 173, 0, 51);
    check_splits(k, kind.name, weight, FloatInput(k, kind.kind, 23, 173, 52), 23);
    const TestWeight wide(kind.kind, 17, 2051, 0, 53);                // longer than any block of columns
    check_splits(k, kind.name, wide, FloatInput(k, kind.kind, 13, 2051, 54), 13);
  }
}

}  // namespace hasten::test
