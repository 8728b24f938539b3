#include "core.h"
#include "isa/simd_scalar.h"
#include "isa/ops.h"
#include "isa/matmul_scalar.h"

namespace hasten {

const Kernels* scalar_kernels() {
  static const Kernels table = [] {
    Kernels k{};
    k.name = "scalar";
    fill_matmul(k);
    fill_ops(k);
    return k;
  }();
  return &table;
}

}  // namespace hasten
