// The kernels of isa/outer.h: statistics of what flows into a matrix.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include <stdexcept>

#include "isa/dispatch.h"

namespace nb = nanobind;
using namespace hasten;

namespace {

template <class T, class... Shape>
using Array = nb::ndarray<T, nb::c_contig, nb::device::cpu, Shape...>;

constexpr size_t kPanel = 16;

const Kernels& table(const std::string& isa) {
  const Kernels* found = isa.empty() ? &active_kernels() : kernels_for(isa);
  if (found == nullptr) throw std::invalid_argument("instruction set '" + isa + "' is not available here");
  return *found;
}

size_t panels(size_t columns) { return (columns + kPanel - 1) / kPanel; }

// x [tokens, columns] -> sums of squares and of sizes, and largest sizes; and, where wanted, its codes and scales as one
// chunk of those that outer_add takes.
void outer_pack(const std::string& isa, Array<const float, nb::ndim<2>> x, Array<double, nb::ndim<1>> squares,
                Array<float, nb::ndim<1>> magnitudes, Array<float, nb::ndim<1>> peaks, std::optional<Array<int16_t>> codes,
                std::optional<Array<float>> scales, size_t chunk) {
  const size_t tokens = x.shape(0), columns = x.shape(1), padded = panels(columns) * kPanel;
  const size_t chunks = scales && padded ? scales->size() / padded : 0, size = kPanel * kOuterTokens;
  if (columns == 0 || tokens > kOuterTokens || squares.size() != columns || magnitudes.size() != columns || peaks.size() != columns ||
      codes.has_value() != scales.has_value() || (codes && codes->size() != padded * kOuterTokens * chunks) ||
      (scales && (scales->size() != padded * chunks || chunk >= chunks)))
    throw std::invalid_argument("outer_pack: shapes do not go together");
  const Kernels& kernels = table(isa);
  nb::gil_scoped_release release;
  kernels.outer_pack({.tokens = static_cast<int64_t>(tokens), .columns = static_cast<int64_t>(columns), .x = x.data(),
                      .squares = squares.data(), .magnitudes = magnitudes.data(), .peaks = peaks.data(),
                      .codes = codes ? codes->data() + chunk * size : nullptr,
                      .stride = static_cast<int64_t>(chunks * size), .scales = scales ? scales->data() + chunk * padded : nullptr});
}

// codes [panels, chunks, 256, 16] and scales [chunks, panels * 16] -> into [columns, columns], panels [first, last) of its
// columns and rows up to them: the upper triangle, and what else lies in the blocks on the diagonal.
void outer_add(const std::string& isa, Array<const int16_t> codes, Array<const float, nb::ndim<2>> scales,
               Array<float, nb::ndim<2>> into, size_t first, size_t last) {
  const size_t columns = into.shape(0), padded = panels(columns) * kPanel, chunks = scales.shape(0);
  if (into.shape(1) != columns || scales.shape(1) != padded || codes.size() != chunks * padded * kOuterTokens ||
      first > last || last > panels(columns))
    throw std::invalid_argument("outer_add: shapes do not go together");
  const Kernels& kernels = table(isa);
  nb::gil_scoped_release release;
  kernels.outer_add({.chunks = static_cast<int64_t>(chunks), .columns = static_cast<int64_t>(columns),
                     .panel0 = static_cast<int64_t>(first), .panel1 = static_cast<int64_t>(last), .codes = codes.data(),
                     .scales = scales.data(), .into = into.data()});
}

}  // namespace

void bind_compress(nb::module_& m) {
  using namespace nb::literals;
  m.attr("OUTER_TOKENS") = kOuterTokens;
  m.def("outer_pack", &outer_pack, "isa"_a, "x"_a, "squares"_a.noconvert(), "magnitudes"_a.noconvert(),
        "peaks"_a.noconvert(), "codes"_a.noconvert().none(), "scales"_a.noconvert().none(), "chunk"_a);
  m.def("outer_add", &outer_add, "isa"_a, "codes"_a, "scales"_a, "into"_a.noconvert(), "first"_a, "last"_a);
}
