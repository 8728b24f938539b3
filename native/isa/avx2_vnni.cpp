#include "core.h"
#include "isa/simd_avx2.h"
#include "isa/ops.h"
#include "isa/matmul_avx2.h"

namespace hasten {

const Kernels* avx2_vnni_kernels() {
  static const Kernels table = [] {
    Kernels k{};
    k.name = "avx2_vnni";
    fill_matmul(k);
    fill_ops(k);
    return k;
  }();
  return &table;
}

}  // namespace hasten
