// A packed weight over arrays that Python holds: hasten._native.Weight.
#pragma once
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <optional>
#include <stdexcept>
#include <string>

#include "core.h"

namespace hasten {

struct HeldWeight {
  using Array = nanobind::ndarray<nanobind::ro, nanobind::device::cpu, nanobind::c_contig>;
  Array codes;
  std::optional<Array> scales, codebook;
  Weight weight;

  HeldWeight(const std::string& kind, int64_t rows, int64_t columns, int64_t group, Array codes_,
             std::optional<Array> scales_, std::optional<Array> codebook_)
      : codes(std::move(codes_)), scales(std::move(scales_)), codebook(std::move(codebook_)) {
    weight = Weight{kind_of(kind), rows, columns, group, codes.data(), nullptr, nullptr};
    if (rows < 1 || columns < 1) throw std::invalid_argument("a weight needs at least one row and column");
    const int64_t padded = weight.padded();
    const int64_t panel_bytes = weight.kind == Kind::f32   ? columns * 64
                                : weight.is_float()        ? round_up(columns, 2) * 32
                                : weight.kind == Kind::int8 ? padded * 16
                                                            : padded * 8;
    sized("codes", codes, weight.panels() * panel_bytes);
    if (weight.is_float()) return;
    if (group != 32 && group != 64 && group != 128) throw std::invalid_argument("a weight's group must be 32, 64 or 128");
    sized("scales", scales, weight.panels() * weight.groups() * 32);
    weight.scales = static_cast<const uint16_t*>(scales->data());
    if (weight.kind != Kind::codebook4) return;
    sized("codebook", codebook, 16);
    weight.codebook = static_cast<const uint8_t*>(codebook->data());
  }

 private:
  static Kind kind_of(const std::string& name) {
    const char* names[] = {"f32", "f16", "bf16", "int8", "int4", "codebook4"};
    for (int i = 0; i < 6; ++i)
      if (name == names[i]) return static_cast<Kind>(i);
    throw std::invalid_argument("unknown weight kind " + name);
  }
  static void sized(const char* name, const std::optional<Array>& array, int64_t bytes) {
    if (!array || static_cast<int64_t>(array->nbytes()) != bytes)
      throw std::invalid_argument(std::string("a weight's ") + name + " must have " + std::to_string(bytes) + " bytes");
  }
};

}  // namespace hasten
