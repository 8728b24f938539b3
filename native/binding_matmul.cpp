// Raw matmul kernels by instruction set, on NumPy arrays, for tests and benches: hasten._native.matmul.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <cstring>
#include <memory>
#include <new>
#include <optional>
#include <stdexcept>

#include "binding_weight.h"
#include "isa/dispatch.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace hasten {
namespace {

using Rows = nb::ndarray<float, nb::ndim<2>, nb::device::cpu>;       // last axis contiguous, any stride between rows
template <typename T>
using Matrix = nb::ndarray<nb::numpy, T, nb::ndim<2>>;

// Aligned memory with a guarded end, filled with a pattern so that values never written are seen.
struct Buffer {
  explicit Buffer(int64_t bytes) : size(static_cast<size_t>(bytes + kAlign)) {
    data = static_cast<std::byte*>(::operator new(size, std::align_val_t(kAlign)));
    std::memset(data, 0x55, size);
  }
  ~Buffer() { ::operator delete(data, std::align_val_t(kAlign)); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  size_t size;
  std::byte* data;
};

// Throws where something was written past the `bytes` of a Buffer.
void check_end(const void* data, int64_t bytes) {
  const std::byte* end = static_cast<const std::byte*>(data) + bytes;
  for (int64_t i = 0; i < kAlign; ++i)
    if (end[i] != std::byte{0x55}) throw std::runtime_error("the kernel wrote past the end of its buffer");
}

template <typename T>
Matrix<T> matrix(int64_t rows, int64_t columns) {
  auto* buffer = new Buffer(rows * columns * static_cast<int64_t>(sizeof(T)));
  nb::capsule owner(buffer, [](void* p) noexcept { delete static_cast<Buffer*>(p); });
  return Matrix<T>(buffer->data, {static_cast<size_t>(rows), static_cast<size_t>(columns)}, owner);
}

const Kernels& table(const std::string& isa) {
  if (const Kernels* found = kernels_for(isa)) return *found;
  throw std::invalid_argument("instruction set " + isa + " is not available here");
}

std::vector<std::string> testable_isas() {
  std::vector<std::string> names = available_isas();
  for (const char* emulated : {"avx2_vnni_emulated", "avx512_bf16_emulated", "avx512_emulated"})
    if (kernels_for(emulated)) names.emplace_back(emulated);
  return names;
}

void require(bool holds, const char* what) {
  if (!holds) throw std::invalid_argument(what);
}

using Held = HeldWeight;

struct Panels {
  int64_t first, last;
  Panels(const Weight& w, const Rows& out, int64_t first_, std::optional<int64_t> last_)
      : first(first_), last(last_.value_or(w.panels())) {
    require(first >= 0 && first <= last && last <= w.panels(), "panels out of range");
    require(static_cast<int64_t>(out.shape(1)) == w.rows && out.stride(1) == 1, "out must be [tokens, rows], rows contiguous");
  }
};

nb::tuple quantise(const std::string& isa, nb::ndarray<const float, nb::ndim<2>, nb::c_contig> x, int64_t group) {
  require(group == 32 || group == 64 || group == 128, "group must be 32, 64 or 128");
  const Kernels& kernels = table(isa);
  const int64_t tokens = static_cast<int64_t>(x.shape(0)), columns = static_cast<int64_t>(x.shape(1));
  const int64_t groups = (columns + group - 1) / group, stride = round_up(columns, 64);
  auto codes = matrix<int8_t>(tokens, stride);
  auto scales = matrix<float>(tokens, groups);
  auto sums = matrix<int32_t>(tokens, groups);
  for (int64_t t = 0; t < tokens; ++t)
    kernels.quantise(x.data() + t * columns, columns, group, codes.data() + t * stride, scales.data() + t * groups,
                     sums.data() + t * groups);
  check_end(codes.data(), tokens * stride);
  check_end(scales.data(), tokens * groups * 4);
  check_end(sums.data(), tokens * groups * 4);
  return nb::make_tuple(codes, scales, sums);
}

void matmul_int(const std::string& isa, const Held& held, nb::ndarray<const int8_t, nb::ndim<2>, nb::c_contig> codes,
                nb::ndarray<const float, nb::ndim<2>, nb::c_contig> scales,
                nb::ndarray<const int32_t, nb::ndim<2>, nb::c_contig> sums, int64_t group, Rows out, int64_t panel0,
                std::optional<int64_t> panel1) {
  const Kernels& kernels = table(isa);
  const Weight& w = held.weight;
  const int64_t tokens = static_cast<int64_t>(codes.shape(0)), groups = (w.columns + group - 1) / group;
  require(!w.is_float() && group > 0 && w.group % group == 0, "the activations' group must divide the weight's");
  require(static_cast<int64_t>(codes.shape(1)) >= round_up(w.columns, 64), "codes must be [tokens, round_up(columns, 64) or more]");
  require(static_cast<int64_t>(scales.size()) == tokens * groups && scales.size() == sums.size(), "scales or sums have another size");
  require(static_cast<int64_t>(out.shape(0)) == tokens, "out has another number of tokens");
  const Panels panels(w, out, panel0, panel1);
  const Quantised x{codes.data(), scales.data(), sums.data(), static_cast<int64_t>(codes.shape(1)), groups, group};
  const int64_t scratch_bytes = kernels.matmul_scratch(w, tokens);
  Buffer scratch(scratch_bytes);
  kernels.matmul_int(w, x, tokens, panels.first, panels.last, out.data(), out.stride(0), scratch.data);
  check_end(scratch.data, scratch_bytes);
}

void matmul_float(const std::string& isa, const Held& held, nb::ndarray<nb::ro, nb::ndim<2>, nb::c_contig> x, Rows out,
                  int64_t panel0, std::optional<int64_t> panel1) {
  const Kernels& kernels = table(isa);
  const Weight& w = held.weight;
  const bool bf16 = kernels.bf16_inputs && w.kind == Kind::bf16;
  require(w.is_float() && x.shape(0) == out.shape(0), "x must be [tokens, columns], the weight f32, f16 or bf16");
  require(x.dtype() == (bf16 ? nb::dtype<uint16_t>() : nb::dtype<float>()), "x must be float32, or what to_bf16 gives");
  require(static_cast<int64_t>(x.shape(1)) >= (bf16 ? round_up(w.columns, 64) : w.columns), "x has another width");
  const Panels panels(w, out, panel0, panel1);
  const int64_t tokens = static_cast<int64_t>(x.shape(0));
  const int64_t scratch_bytes = kernels.matmul_scratch(w, tokens);
  Buffer scratch(scratch_bytes);
  kernels.matmul_float(w, x.data(), static_cast<int64_t>(x.shape(1)), tokens, panels.first, panels.last, out.data(),
                       out.stride(0), scratch.data);
  check_end(scratch.data, scratch_bytes);
}

Matrix<uint16_t> to_bf16(const std::string& isa, nb::ndarray<const float, nb::ndim<2>, nb::c_contig> x) {
  const int64_t tokens = static_cast<int64_t>(x.shape(0)), columns = static_cast<int64_t>(x.shape(1));
  auto out = matrix<uint16_t>(tokens, round_up(columns, 64));
  for (int64_t t = 0; t < tokens; ++t) table(isa).to_bf16(x.data() + t * columns, columns, out.data() + t * round_up(columns, 64));
  check_end(out.data(), tokens * round_up(columns, 64) * 2);
  return out;
}

Matrix<float> decode_row(const std::string& isa, const Held& held, int64_t row) {
  require(row >= 0 && row < held.weight.rows, "row out of range");
  auto out = matrix<float>(1, held.weight.columns);
  table(isa).decode_row(held.weight, row, out.data());
  check_end(out.data(), held.weight.columns * 4);
  return out;
}

}  // namespace
}  // namespace hasten

void bind_matmul(nb::module_& parent) {
  using namespace hasten;
  nb::module_ m = parent.def_submodule("matmul", "Matmul kernels by instruction set, for tests and benches");
  m.attr("Weight") = parent.attr("Weight");
  m.def("isas", &testable_isas, "Tables that can be tested here, emulated ones among them");
  m.def("bf16_inputs", [](const std::string& isa) { return table(isa).bf16_inputs; }, "isa"_a);
  m.def("quantise", &quantise, "isa"_a, "x"_a, "group"_a, "-> codes [tokens, stride], scales and sums [tokens, groups]");
  m.def("matmul_int", &matmul_int, "isa"_a, "weight"_a, "codes"_a, "scales"_a, "sums"_a, "group"_a, "out"_a, "panel0"_a = 0,
        "panel1"_a = nb::none());
  m.def("matmul_float", &matmul_float, "isa"_a, "weight"_a, "x"_a, "out"_a, "panel0"_a = 0, "panel1"_a = nb::none());
  m.def("to_bf16", &to_bf16, "isa"_a, "x"_a);
  m.def("decode_row", &decode_row, "isa"_a, "weight"_a, "row"_a);
}
