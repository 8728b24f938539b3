// Chooses the kernel table: by what the processor says it has (cpuid, auxiliary vector, sysctl), or by name where the caller (HASTEN_ISA) asks.
#pragma once
#include <string>
#include <vector>

#include "core.h"

namespace hasten {

// Names of the instruction sets that this build has and this processor runs, best first; "scalar" is always last.
std::vector<std::string> available_isas();
// The table of that name; null where it is not available here.
const Kernels* kernels_for(const std::string& name);
// The process's table: HASTEN_ISA if set (throws std::invalid_argument naming what is available), else the best.
const Kernels& active_kernels();
// The cache format of that name. Throws std::invalid_argument.
KvKind kv_kind(const std::string& name);

}  // namespace hasten
