// The tables avx512 and (with HASTEN_EMULATE_BF16) avx512_bf16 on a machine without AVX-512, every intrinsic emulated:
// HASTEN_ISA=avx512_emulated or avx512_bf16_emulated asks for them.
#define HASTEN_EMULATE_AVX512
#include "tests/emulated_avx512.h"

#include "core.h"
#include "isa/simd_avx512.h"
#include "isa/ops.h"
#include "isa/matmul_avx512.h"

namespace hasten {

#if defined(HASTEN_EMULATE_BF16)
const Kernels* avx512_bf16_all_emulated_kernels() {
#else
const Kernels* avx512_emulated_kernels() {
#endif
  static const Kernels table = [] {
    Kernels k{};
    k.name = HASTEN_BF16_PRODUCTS ? "avx512_bf16_emulated" : "avx512_emulated";
    fill_matmul(k);
    fill_ops(k);
    return k;
  }();
  return &table;
}

}  // namespace hasten
