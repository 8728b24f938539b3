// Rates of the matmul kernels on one thread beside the machine's limits, measured in turn.
//   cmake --build build/dev --target bench_matmul && build/dev/bench_matmul [isa] [columns] [rows]
// decode: weights cold (copies beyond the last-level cache), share of read_memory. prefill: share of the peak products.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <new>
#include <string>
#include <vector>

#include "isa/dispatch.h"

using namespace hasten;

namespace {

struct Memory {
  explicit Memory(int64_t bytes) : data(static_cast<std::byte*>(::operator new(static_cast<size_t>(bytes), std::align_val_t(64)))) {
    std::memset(data, 0x11, static_cast<size_t>(bytes));
  }
  ~Memory() { ::operator delete(data, std::align_val_t(64)); }
  Memory(const Memory&) = delete;
  std::byte* data;
};

// Processor time of this thread: other work on the machine slows it by cache and memory, not by waiting.
double now() {
  timespec t;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
  return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
}

template <typename Call>
double seconds_of(Call call) {
  const double start = now();
  call();
  return now() - start;
}

struct Case {
  const char* name;
  Kind kind;
  int64_t group;
};

void run_case(const Kernels& k, const Case& c, int64_t rows, int64_t columns) {
  const int64_t bytes = Weight{c.kind, rows, columns, c.group, nullptr, nullptr, nullptr}.panel_bytes() * ((rows + 15) / 16);
  const int64_t groups = c.group ? (columns + c.group - 1) / c.group : 0, scale_bytes = round_up(rows, 16) * groups * 2;
  const int64_t stride = activation_stride(columns, c.group ? 1 : 4);
  const int64_t copies = (100'000'000 + bytes) / bytes, most = 240;
  Memory weights(bytes * copies), scales(scale_bytes * copies + 64), x(most * stride * 4 + 4096), out(most * rows * 4);
  Memory x_codes(most * stride), x_scales(most * (columns / 32 + 1) * 4), x_sums(most * (columns / 32 + 1) * 4);
  const uint8_t book[16] = {1, 9, 20, 30, 40, 50, 60, 64, 70, 75, 80, 90, 100, 110, 120, 127};
  auto weight = [&](int64_t copy) {
    return Weight{c.kind, rows, columns, c.group, weights.data + copy * bytes,
                  reinterpret_cast<const uint16_t*>(scales.data + copy * scale_bytes), book};
  };
  const Weight first = weight(0);
  const Memory own(k.matmul_scratch(first, most) + 64);
  const Quantised quantised{reinterpret_cast<int8_t*>(x_codes.data), reinterpret_cast<float*>(x_scales.data),
                            reinterpret_cast<int32_t*>(x_sums.data), stride, groups, c.group};
  auto product = [&](int64_t copy, int64_t tokens, int64_t panels) {
    const Weight w = weight(copy);
    float* to = reinterpret_cast<float*>(out.data);
    if (c.group) k.matmul_int(w, quantised, tokens, 0, panels, to, rows, own.data);
    else k.matmul_float(w, x.data, stride, tokens, 0, panels, to, rows, own.data);
  };
  std::printf("%-16s", c.name);
  const int64_t all = bytes + scale_bytes;
  for (int64_t tokens : {1, 2, 4, 8, 16}) {
    double read = 1e9, multiply = 1e9;
    for (int64_t i = 0; i < 3 * copies; ++i) {
      read = std::min(read, seconds_of([&] { k.read_memory(weights.data + (i + copies / 2) % copies * bytes, bytes); }));
      multiply = std::min(multiply, seconds_of([&] { product(i % copies, tokens, first.panels()); }));
    }
    std::printf(" | %lld: %.1f GB/s %.0f%%", static_cast<long long>(tokens), static_cast<double>(all) / multiply / 1e9,
                100 * read / static_cast<double>(bytes) * static_cast<double>(all) / multiply);
  }
  double limit = 0, rate = 0;
  const int64_t panels = std::min<int64_t>(first.panels(), 16);
  for (int i = 0; i < 20; ++i) {
    int64_t done = 0;
    const double peak_seconds = seconds_of([&] { done = (c.group ? k.int8_peak : k.bf16_peak)(100'000); });
    limit = std::max(limit, static_cast<double>(done) / peak_seconds / 1e9);
    const double products = static_cast<double>(panels * 16 * columns * most);
    rate = std::max(rate, products / seconds_of([&] { product(0, most, panels); }) / 1e9);
  }
  std::printf(" | %lld: %.1f of %.1f GMAC/s %.0f%%\n", static_cast<long long>(most), rate, limit, 100 * rate / limit);
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
  std::printf("%s, %lld columns, %lld rows; decode with cold weights by tokens, then prefill\n", isa.c_str(),
              static_cast<long long>(columns), static_cast<long long>(rows));
  for (const Case& c : {Case{"int4-g32", Kind::int4, 32}, Case{"int4-g128", Kind::int4, 128}, Case{"codebook4-g64", Kind::codebook4, 64},
                        Case{"int8-g32", Kind::int8, 32}, Case{"int8-g128", Kind::int8, 128}, Case{"bf16", Kind::bf16, 0},
                        Case{"f16", Kind::f16, 0}, Case{"f32", Kind::f32, 0}})
    run_case(*kernels, c, rows, columns);
}
