#include "core.h"
#include "isa/simd_neon.h"
#include "isa/ops.h"
#include "isa/matmul_neon.h"

namespace hasten {

const Kernels* neon_dotprod_kernels() {
  static const Kernels table = [] {
    Kernels k{};
    k.name = "neon_dotprod";
    fill_matmul(k);
    fill_ops(k);
    return k;
  }();
  return &table;
}

}  // namespace hasten
