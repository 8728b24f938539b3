#include "core.h"
#include "isa/simd_neon.h"
#include "isa/ops.h"
#include "isa/matmul_neon.h"

namespace hasten {

const Kernels* neon_i8mm_kernels() {
  static const Kernels table = [] {
    Kernels k{};
    k.name = "neon_i8mm";
    fill_matmul(k);
    fill_ops(k);
    return k;
  }();
  return &table;
}

}  // namespace hasten
