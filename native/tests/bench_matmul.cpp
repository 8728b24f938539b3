// Rates of the matmul kernels on one thread beside the machine's limits, measured in turn: for each kind of weight at 1, 4,
// 16 and 512 tokens GMAC/s (share of the peak of products in registers) and GB/s (share of read_memory).
//   cmake --build build/dev --target bench_matmul && build/dev/bench_matmul [isa] [columns] [rows] [kind]
// Up to 16 tokens weights are cold (copies beyond the last-level cache); at 512 they are the same few panels.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "bench.h"
#include "isa/dispatch.h"

using namespace hasten;
using namespace hasten::bench;

namespace {

struct Case {
  const char* name;
  Kind kind;
  int64_t group;
};

constexpr int64_t kMost = 512;
constexpr int kFill = 0x55;

// One copy of the weights and of what they meet, with room for kMost tokens.
struct Subject {
  const Kernels& k;
  const Case& c;
  int64_t rows, columns, groups, bytes, scale_bytes, copies, stride;
  Memory weights, scales, x, x_scales, x_sums, out, own;

  Subject(const Kernels& k_, const Case& c_, int64_t rows_, int64_t columns_)
      : k(k_), c(c_), rows(rows_), columns(columns_), groups(shape().groups()), bytes(shape().panels() * shape().panel_bytes()),
        scale_bytes(round_up(rows, 16) * groups * 2), copies((100'000'000 + bytes) / bytes),
        stride(activation_stride(columns, c.group ? 1 : 4)), weights(bytes * copies, kFill), scales(scale_bytes * copies + 64, kFill),
        x(kMost * stride * 4 + 4096, kFill), x_scales(kMost * (columns / 32 + 1) * 4, kFill), x_sums(kMost * (columns / 32 + 1) * 4, kFill),
        out(kMost * rows * 4, kFill), own(k.matmul_scratch(shape(), kMost) + 64, kFill) {}

  Weight shape() const { return {c.kind, rows, columns, c.group, nullptr, nullptr, nullptr}; }

  void multiply(int64_t copy, int64_t tokens, int64_t panels) {
    static const uint8_t book[16] = {1, 9, 20, 30, 40, 50, 60, 64, 70, 75, 80, 90, 100, 110, 120, 127};
    Weight w = shape();
    w.codes = weights.data + copy * bytes;
    w.scales = reinterpret_cast<const uint16_t*>(scales.data + copy * scale_bytes);
    w.codebook = book;
    float* to = reinterpret_cast<float*>(out.data);
    if (!c.group) return k.matmul_float(w, x.data, stride, tokens, 0, panels, to, rows, own.data);
    const Quantised q{reinterpret_cast<int8_t*>(x.data), reinterpret_cast<float*>(x_scales.data),
                      reinterpret_cast<int32_t*>(x_sums.data), stride, groups, c.group};
    k.matmul_int(w, q, tokens, 0, panels, to, rows, own.data);
  }
};

void run_case(const Kernels& k, const Case& c, int64_t rows, int64_t columns) {
  Subject s(k, c, rows, columns);
  const double all = static_cast<double>(s.bytes + s.scale_bytes), panels = static_cast<double>(s.shape().panels());
  std::printf("%-14s %5.2f bits", c.name, all * 8 / static_cast<double>(rows * columns));
  for (int64_t tokens : {int64_t{1}, int64_t{4}, int64_t{16}, kMost}) {
    const bool cold = tokens < kMost;
    const int64_t used = cold ? s.shape().panels() : std::min<int64_t>(s.shape().panels(), 16);
    double read = 1e9, multiply = 1e9, peak = 0;
    for (int64_t i = 0; i < (cold ? 3 * s.copies : 10); ++i) {
      int64_t done = 0;
      const double seconds = seconds_of([&] { done = (c.group ? k.int8_peak : k.bf16_peak)(cold ? 2'000 : 100'000); });
      peak = std::max(peak, static_cast<double>(done) / seconds / 1e9);
      const int64_t copy = cold ? i % s.copies : 0, other = (i + s.copies / 2) % s.copies;
      read = std::min(read, seconds_of([&] { k.read_memory(s.weights.data + other * s.bytes, s.bytes); }));
      multiply = std::min(multiply, seconds_of([&] { s.multiply(copy, tokens, used); }));
    }
    const double macs = static_cast<double>(used * 16 * columns * tokens) / multiply / 1e9;
    const double rate = all * static_cast<double>(used) / panels / multiply / 1e9, limit = static_cast<double>(s.bytes) / read / 1e9;
    std::printf(" | %3lld: %6.1f GMAC/s (%3.0f%%) %5.2f GB/s (%3.0f%%)", static_cast<long long>(tokens), macs, 100 * macs / peak,
                rate, 100 * rate / limit);
  }
  std::printf("\n");
}

}  // namespace

int main(int argc, char** argv) {
  const std::string isa = argc > 1 ? argv[1] : available_isas().front();
  const int64_t columns = argc > 2 ? std::atoll(argv[2]) : 2048, rows = argc > 3 ? std::atoll(argv[3]) : 2816;
  const Kernels* kernels = kernels_for(isa);
  if (kernels == nullptr) {
    std::fprintf(stderr, "error: instruction set %s is not available here\n", isa.c_str());
    return 2;
  }
  const std::string only = argc > 4 ? argv[4] : "";
  std::printf("%s, %lld columns, %lld rows, one thread\n", isa.c_str(), static_cast<long long>(columns), static_cast<long long>(rows));
  for (const Case& c : {Case{"int1-g128", Kind::int1, 128}, Case{"int2-g64", Kind::int2, 64}, Case{"int3-g64", Kind::int3, 64},
                        Case{"int4-g32", Kind::int4, 32}, Case{"int4-g64", Kind::int4, 64}, Case{"int4-g128", Kind::int4, 128},
                        Case{"codebook1-g128", Kind::codebook1, 128}, Case{"codebook2-g64", Kind::codebook2, 64},
                        Case{"codebook3-g64", Kind::codebook3, 64}, Case{"codebook4-g64", Kind::codebook4, 64},
                        Case{"sparse8-g64", Kind::sparse8, 64}, Case{"sparse8-g128", Kind::sparse8, 128},
                        Case{"int8-g32", Kind::int8, 32}, Case{"int8-g64", Kind::int8, 64}, Case{"int8-g128", Kind::int8, 128},
                        Case{"bf16", Kind::bf16, 0}, Case{"f16", Kind::f16, 0}, Case{"f32", Kind::f32, 0}})
    if (std::string(c.name).starts_with(only)) run_case(*kernels, c, rows, columns);
}
