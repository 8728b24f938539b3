#include "isa/dispatch.h"

#include <cstdlib>
#include <iterator>
#include <stdexcept>

#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace hasten {
namespace {

#if defined(__x86_64__)
// Asked of the processor itself: not every compiler's __builtin_cpu_supports knows the name. The builtins say whether the
// system saves the registers.
bool converts_halves() {
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}

bool adds_bytes() {  // AVX-VNNI, the form of 256-bit registers without AVX-512
  unsigned a, b, c, d;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & 1u << 4);
}

bool runs(const std::string& name) {
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && converts_halves();
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vnni");
  if (name == "avx2") return avx2;
  if (name == "avx2_vnni") return avx2 && adds_bytes();
  if (name == "avx512") return avx512;
  return avx512 && __builtin_cpu_supports("avx512bf16");
}
#elif defined(__aarch64__)
#if defined(__APPLE__)
bool has(const char* feature) {
  int value = 0;
  size_t size = sizeof value;
  return sysctlbyname(feature, &value, &size, nullptr, 0) == 0 && value != 0;
}
bool multiplies_bytes() { return has("hw.optional.arm.FEAT_DotProd"); }
bool multiplies_matrices() { return has("hw.optional.arm.FEAT_I8MM"); }
#elif defined(__linux__)
// Bits of the kernel's interface (asm/hwcap.h), which old headers lack.
bool multiplies_bytes() { return getauxval(AT_HWCAP) >> 20 & 1; }
bool multiplies_matrices() { return getauxval(AT_HWCAP2) >> 13 & 1; }
#else
bool multiplies_bytes() { return false; }
bool multiplies_matrices() { return false; }
#endif

bool runs(const std::string& name) {
  if (name == "neon") return true;                                   // part of the architecture
  return multiplies_bytes() && (name == "neon_dotprod" || multiplies_matrices());
}
#endif

std::vector<const Kernels*> tables() {
  std::vector<const Kernels*> found;
#if defined(HASTEN_HAS_AVX512_BF16)
  if (runs("avx512_bf16")) found.push_back(avx512_bf16_kernels());
#endif
#if defined(HASTEN_HAS_AVX512)
  if (runs("avx512")) found.push_back(avx512_kernels());
#endif
#if defined(HASTEN_HAS_AVX2_VNNI)
  if (runs("avx2_vnni")) found.push_back(avx2_vnni_kernels());
#endif
#if defined(HASTEN_HAS_AVX2)
  if (runs("avx2")) found.push_back(avx2_kernels());
#endif
#if defined(HASTEN_HAS_NEON_I8MM)
  if (runs("neon_i8mm")) found.push_back(neon_i8mm_kernels());
#endif
#if defined(HASTEN_HAS_NEON_DOTPROD)
  if (runs("neon_dotprod")) found.push_back(neon_dotprod_kernels());
#endif
#if defined(HASTEN_HAS_NEON)
  if (runs("neon")) found.push_back(neon_kernels());
#endif
  found.push_back(scalar_kernels());
  return found;
}

}  // namespace

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (const Kernels* table : tables()) names.emplace_back(table->name);
  return names;
}

const Kernels* kernels_for(const std::string& name) {
#if defined(HASTEN_HAS_AVX2_VNNI_EMULATED)
  if (name == "avx2_vnni_emulated" && runs("avx2")) return avx2_vnni_emulated_kernels();
#endif
#if defined(HASTEN_HAS_AVX512_BF16_EMULATED)
  if (name == "avx512_bf16_emulated" && runs("avx512")) return avx512_bf16_emulated_kernels();
#endif
#if defined(HASTEN_HAS_AVX512_EMULATED)
  if (name == "avx512_emulated" && runs("avx2")) return avx512_emulated_kernels();
  if (name == "avx512_bf16_emulated" && runs("avx2")) return avx512_bf16_all_emulated_kernels();
#endif
  for (const Kernels* table : tables())
    if (name == table->name) return table;
  return nullptr;
}

const Kernels& active_kernels() {
  static const Kernels* chosen = [] {
    const char* asked = std::getenv("HASTEN_ISA");
    if (asked == nullptr || *asked == '\0') return tables().front();
    if (const Kernels* table = kernels_for(asked)) return table;
    std::string message = std::string("HASTEN_ISA=") + asked + " is not available here; this machine runs";
    for (const std::string& name : available_isas()) message += " " + name;
    throw std::invalid_argument(message);
  }();
  return *chosen;
}

KvKind kv_kind(const std::string& name) {
  for (size_t i = 0; i < std::size(kKvNames); ++i)
    if (name == kKvNames[i]) return static_cast<KvKind>(i);
  throw std::invalid_argument("unknown kv format '" + name + "'");
}

}  // namespace hasten
