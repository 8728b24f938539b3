// The table avx512_bf16 with its one special instruction emulated, so that its very kernels are tested on any AVX-512
// machine. Never chosen by itself: HASTEN_ISA=avx512_bf16_emulated asks for it.
#define HASTEN_EMULATE_BF16
#include "core.h"
#include "isa/simd_avx512.h"
#include "isa/ops.h"
#include "isa/matmul_avx512.h"

namespace hasten {

const Kernels* avx512_bf16_emulated_kernels() {
  static const Kernels table = [] {
    Kernels k{};
    k.name = "avx512_bf16_emulated";
    fill_matmul(k);
    fill_ops(k);
    return k;
  }();
  return &table;
}

}  // namespace hasten
