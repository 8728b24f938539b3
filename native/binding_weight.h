// A packed weight over arrays that Python holds: hasten._native.Weight.
#pragma once
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <cstring>
#include <iterator>
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
    sized("codes", codes, weight.panels() * weight.panel_bytes());
    if (weight.is_float()) return;
    if (group != 32 && group != 64 && group != 128) throw std::invalid_argument("a weight's group must be 32, 64 or 128");
    sized("scales", scales, weight.panels() * weight.groups() * 32);
    weight.scales = static_cast<const uint16_t*>(scales->data());
    if (weight.kind == Kind::sparse8) check_masks();
    if (!has_codebook(weight.kind)) return;
    sized("codebook", codebook, int64_t{1} << kind_bits(weight.kind));
    weight.codebook = static_cast<const uint8_t*>(codebook->data());
    for (int i = 0; i < 1 << kind_bits(weight.kind); ++i)
      if (weight.codebook[i] > 127) throw std::invalid_argument("a weight's codebook must have entries of at most 127");
  }

  static Kind kind_of(const std::string& name) {
    for (size_t i = 0; i < std::size(kKindNames); ++i)
      if (name == kKindNames[i]) return static_cast<Kind>(i);
    throw std::invalid_argument("unknown weight kind " + name);
  }

 private:
  // Kernels step through the values by counting bits: more bits than values would lead them out of the array.
  void check_masks() const {
    const uint8_t* block = static_cast<const uint8_t*>(codes.data());
    for (int64_t left = weight.panels() * weight.padded() / kUnit; left > 0; --left, block += kSparseBlock) {
      int64_t places = 0;
      for (int64_t i = 0; i < 64; i += 8) {
        uint64_t word;
        std::memcpy(&word, block + kSparseValues + i, sizeof word);
        places += __builtin_popcountll(word);
      }
      if (places != kSparseValues)
        throw std::invalid_argument("a weight's mask must have " + std::to_string(kSparseValues) + " of 512 bits, has " +
                                    std::to_string(places));
    }
  }
  static void sized(const char* name, const std::optional<Array>& array, int64_t bytes) {
    if (!array || static_cast<int64_t>(array->nbytes()) != bytes)
      throw std::invalid_argument(std::string("a weight's ") + name + " must have " + std::to_string(bytes) + " bytes");
  }
};

}  // namespace hasten
