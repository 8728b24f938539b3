// What steps found out about how work is best cut, for Python to keep between processes.
#pragma once
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include "plan/tuning.h"

namespace hasten {

using FoundBlocking = std::tuple<std::string, int, int64_t, int64_t, int64_t>;

inline std::vector<FoundBlocking> found_blockings(Tuning& tuning) {
  std::vector<FoundBlocking> all;
  for (const auto& [signature, regime, b] : tuning.found())
    all.emplace_back(signature, regime, b.chunks_per_thread, b.tokens, b.tile_bytes);
  return all;
}

template <class Planned>
void bind_tuning(nanobind::class_<Planned>& c) {
  using namespace nanobind::literals;
  c.def("tune", [](Planned& p, bool on) { p.program.tuning().measure(on); }, "on"_a, "Measure how work is best cut, in passing")
      .def_prop_ro("tuned", [](Planned& p) { return p.program.tuning().found_count(); }, "Choices made so far")
      .def_prop_ro("tuning", [](Planned& p) { return p.program.tuning().open(); }, "Whether a choice is being made")
      .def("blockings", [](Planned& p) { return found_blockings(p.program.tuning()); }, "(signature, regime, chunks per thread, tokens, tile bytes) of each choice")
      .def("remember",
           [](Planned& p, const FoundBlocking& f) {
             const auto& [signature, regime, chunks, tokens, tile] = f;
             p.program.tuning().remember({signature, regime, {chunks, tokens, tile}});
           },
           "found"_a);
}

}  // namespace hasten
