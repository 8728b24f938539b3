// The only files that know Python are native/binding*.cpp.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "isa/dispatch.h"

namespace nb = nanobind;

void bind_program(nb::module_& m);  // binding_program.cpp: weights, plans, steps and what is read off them
void bind_matmul(nb::module_& m);    // binding_matmul.cpp: raw matmul kernels by instruction set, for tests and benches
void bind_ops(nb::module_& m);      // binding_ops.cpp: the other kernels, likewise
void bind_compress(nb::module_& m);  // binding_compress.cpp: statistics of what flows into a matrix
void bind_machine(nb::module_& m);  // binding_machine.cpp: the pool and the machine's limits

NB_MODULE(_native, m) {
  m.def("available_isas", &hasten::available_isas, "Instruction sets of this build that this processor runs, best first");
  m.def("active_isa", [] { return std::string(hasten::active_kernels().name); }, "The one in use (HASTEN_ISA forces one)");
  bind_program(m);
  bind_matmul(m);
  bind_ops(m);
  bind_compress(m);
  bind_machine(m);
}
