// The table avx512 on a machine without AVX-512, every intrinsic emulated: HASTEN_ISA=avx512_emulated asks for it.
#define HASTEN_EMULATE_AVX512
#include "tests/emulated_avx512.h"

#include "core.h"
#include "isa/simd_avx512.h"
#include "isa/ops.h"
#include "isa/matmul_avx512.h"

namespace hasten {

const Kernels* avx512_emulated_kernels() {
  static const Kernels table = [] {
    Kernels k{};
    k.name = "avx512_emulated";
    fill_matmul(k);
    fill_ops(k);
    return k;
  }();
  return &table;
}

}  // namespace hasten
