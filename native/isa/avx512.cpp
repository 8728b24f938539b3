#include "core.h"
#include "isa/simd_avx512.h"
#include "isa/ops.h"
#include "isa/matmul_avx512.h"

namespace hasten {

const Kernels* avx512_kernels() {
  static const Kernels table = [] {
    Kernels k{};
    k.name = "avx512";
    fill_matmul(k);
    fill_ops(k);
    return k;
  }();
  return &table;
}

}  // namespace hasten
