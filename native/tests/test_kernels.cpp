// Every kernel of every instruction set that this processor runs, against float64 formulas; then pool and program.
//
//   test_kernels [--faults] [ISA ...]      all sets by default; exit status 1 and a line for each failure
//
// --faults also plants mistakes in each table and fails where no test notices. It needs no Python, so it runs under an
// emulator and under sanitizers too.
#include <chrono>
#include <cstring>

#include "check.h"
#include "isa/dispatch.h"

namespace hasten::test {
namespace {

struct Part { const char* name; void (*run)(const Kernels& k); };
constexpr Part kParts[] = {{"quantise", test_quantise},         {"matmul_int", test_matmul_int},
                           {"matmul_float", test_matmul_float}, {"rows", test_rows},
                           {"vocabulary", test_vocabulary},     {"attention", test_attention},
                           {"limits", test_limits},             {"sampling", test_sampling},
                           {"outer", test_outer},               {"compress", test_compress},
                           {"program", test_program}};

void test_table(const Kernels& k, bool faults) {
  std::printf("%s:", k.name);
  for (const Part& part : kParts) {
    subject = std::string(k.name) + " " + part.name;
    const int before = failures;
    const auto start = std::chrono::steady_clock::now();
    part.run(k);
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    std::printf(" %s %s (%.1f s)", part.name, failures == before ? "ok" : "FAILED", seconds);
    std::fflush(stdout);
  }
  std::printf("\n");
  subject = k.name;
  if (faults) test_that_faults_are_noticed(k);
}

}  // namespace
}  // namespace hasten::test

int main(int count, char** arguments) {
  using namespace hasten;
  bool faults = false;
  std::vector<std::string> names;
  for (int i = 1; i < count; ++i) {
    if (std::strcmp(arguments[i], "--faults") == 0) faults = true;
    else names.emplace_back(arguments[i]);
  }
  if (names.empty()) {
    names = available_isas();
    for (const char* emulated : {"avx2_vnni_emulated", "avx512_bf16_emulated"})
      if (kernels_for(emulated) != nullptr) names.emplace_back(emulated);
  }
  for (const std::string& name : names) {
    const Kernels* table = kernels_for(name);
    if (table == nullptr) {
      std::fprintf(stderr, "error: %s is not available here; this processor runs", name.c_str());
      for (const std::string& known : available_isas()) std::fprintf(stderr, " %s", known.c_str());
      std::fprintf(stderr, "\n");
      return 2;
    }
    test::test_table(*table, faults);
  }
  test::test_pool();
  std::printf("pool: done\n%s: %d failures\n", test::failures == 0 ? "ok" : "FAILED", test::failures);
  return test::failures == 0 ? 0 : 1;
}
