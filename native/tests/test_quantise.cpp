// Activations to int8 and to bfloat16, and what measures the machine.
#include "check.h"

namespace hasten::test {
namespace {

constexpr int64_t kColumns[] = {1, 7, 31, 64, 100, 172, 300};

void check_group(const std::vector<float>& x, int64_t first, int64_t last, const int8_t* codes, float scale,
                 int32_t sum) {
  float extreme = 0;
  int32_t total = 0;
  for (int64_t c = first; c < last; ++c) extreme = std::fmax(extreme, std::fabs(x[static_cast<size_t>(c)]));
  expect(std::fabs(scale - extreme / 127.0) <= 1e-6 * extreme / 127.0,
         "quantise: the scale of [%d, %d) is %.9g, the largest %.9g",
         static_cast<int>(first), static_cast<int>(last), static_cast<double>(scale), static_cast<double>(extreme));
  for (int64_t c = first; c < last; ++c) {
    const double exact = extreme == 0 ? 0 : x[static_cast<size_t>(c)] * 127.0 / extreme;
    expect(std::fabs(codes[c] - exact) <= 0.5 + 1e-4, "quantise: column %d has code %d for %.6f", static_cast<int>(c),
           codes[c], exact);
    total += codes[c];
  }
  expect(sum == total, "quantise: the sum of [%d, %d) is %d, its codes add up to %d", static_cast<int>(first),
         static_cast<int>(last), sum, total);
}

void check_quantised(const Kernels& k, int64_t columns, int64_t group, double spoilt, int64_t place) {
  Random random(static_cast<uint64_t>(columns * 131 + group));
  const int64_t groups = (columns + group - 1) / group, padded = (columns + 63) / 64 * 64;
  const double spread = std::ldexp(1, static_cast<int>(random.between(-40, 40)));
  std::vector<float> x = random.normals(columns, static_cast<float>(spread));
  if (spoilt != 0) x[static_cast<size_t>(place)] = static_cast<float>(spoilt);
  const Exact<float> input(x, 4);
  Guarded<int8_t> codes(padded);
  Guarded<float> scales(groups, 4);
  Guarded<int32_t> sums(groups, 4);
  k.quantise(input.data(), columns, group, codes.data(), scales.data(), sums.data());
  expect(codes.intact() && scales.intact() && sums.intact(), "quantise of %d columns wrote outside its outputs",
         static_cast<int>(columns));
  for (int64_t c = columns; c < padded; ++c)
    expect(codes[c] == 0, "quantise: column %d, past the end, is not zero", static_cast<int>(c));
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t first = g * group, last = first + group < columns ? first + group : columns;
    if (spoilt == 0 || place / group != g) {
      check_group(x, first, last, codes.data(), scales[g], sums[g]);
      continue;
    }
    bool zeros = sums[g] == 0;
    for (int64_t c = first; c < last; ++c) zeros &= codes[c] == 0;
    expect(std::isnan(scales[g]) && zeros, "quantise: a group with %g in it has scale %g", spoilt,
           static_cast<double>(scales[g]));
  }
}

void check_ties(const Kernels& k) {
  std::vector<float> x(32);
  const float values[] = {127, 0.5f, 1.5f, 2.5f, -0.5f, -1.5f, -2.5f};
  const int8_t wanted[] = {127, 0, 2, 2, 0, -2, -2};
  std::memcpy(x.data(), values, sizeof values);
  int8_t codes[64];
  float scale;
  int32_t sum;
  k.quantise(x.data(), 32, 32, codes, &scale, &sum);
  expect(scale == 1 && std::memcmp(codes, wanted, sizeof wanted) == 0, "quantise: ties do not go to even");
}

void check_bf16(const Kernels& k, int64_t columns) {
  Random random(static_cast<uint64_t>(columns));
  std::vector<float> x(static_cast<size_t>(columns));
  for (float& value : x) {
    const uint32_t exponent = static_cast<uint32_t>(random.between(1, 253)) << 23;   // subnormals are flushed by some
    const int64_t rest = random.below(3) ? random.below(1 << 23) : 0x8000 * random.below(8);   // often a tie
    value = bits_as_float(static_cast<uint32_t>(random.below(2)) << 31 | exponent | static_cast<uint32_t>(rest));
  }
  const int64_t padded = (columns + 63) / 64 * 64;
  const Exact<float> input(x, 4);
  Guarded<uint16_t> out(padded, 2);
  k.to_bf16(input.data(), columns, out.data());
  expect(out.intact(), "to_bf16 of %d columns wrote outside its output", static_cast<int>(columns));
  for (int64_t c = 0; c < padded; ++c) {
    const uint16_t wanted = c < columns ? nearest_bf16(x[static_cast<size_t>(c)]) : uint16_t{0};
    if (!expect(out[c] == wanted, "to_bf16: column %d of %d is %04x, not %04x", static_cast<int>(c),
                static_cast<int>(columns), out[c], wanted))
      return;
  }
}

}  // namespace

void test_quantise(const Kernels& k) {
  for (const int64_t columns : kColumns) {
    check_bf16(k, columns);
    for (const int64_t group : {32, 64, 128}) {
      check_quantised(k, columns, group, 0, 0);
      for (const double spoilt : {static_cast<double>(NAN), HUGE_VAL, -HUGE_VAL})
        check_quantised(k, columns, group, spoilt, columns * 2 / 3);
    }
  }
  check_ties(k);
  const std::vector<float> zeros(64);
  int8_t codes[64];
  float scale = 1;
  int32_t sum = 1;
  k.quantise(zeros.data(), 64, 64, codes, &scale, &sum);
  check_group(zeros, 0, 64, codes, scale, sum);
}

void test_limits(const Kernels& k) {
  Random random(1);
  Exact<uint8_t> memory(4096);
  for (int64_t i = 0; i < memory.count(); ++i) memory[i] = static_cast<uint8_t>(random.next());
  const float before = k.read_memory(memory.data(), memory.count());
  expect(before == k.read_memory(memory.data(), memory.count()), "read_memory gives two answers");
  int seen = 0;
  for (int64_t line = 0; line < memory.count(); line += 64) {
    memory[line] ^= 0x5b;
    seen += k.read_memory(memory.data(), memory.count()) != before;
    memory[line] ^= 0x5b;
  }
  expect(seen == 64, "read_memory sees %d of 64 changed cache lines", seen);
  expect(k.int8_peak(10) > 0 && k.int8_peak(20) == 2 * k.int8_peak(10), "int8_peak does not count what it does");
  expect(k.bf16_peak(10) > 0 && k.bf16_peak(20) == 2 * k.bf16_peak(10), "bf16_peak does not count what it does");
}

}  // namespace hasten::test
