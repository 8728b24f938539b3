// The table avx2_vnni with its one special instruction emulated, so that its very kernels are tested on any AVX2 machine.
// Never chosen by itself: HASTEN_ISA=avx2_vnni_emulated asks for it.
#define HASTEN_EMULATE_VNNI
#include "core.h"
#include "isa/simd_avx2.h"
#include "isa/ops.h"
#include "isa/matmul_avx2.h"

namespace hasten {

const Kernels* avx2_vnni_emulated_kernels() {
  static const Kernels table = [] {
    Kernels k{};
    k.name = "avx2_vnni_emulated";
    fill_matmul(k);
    fill_ops(k);
    return k;
  }();
  return &table;
}

}  // namespace hasten
