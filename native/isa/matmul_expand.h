// Bytes that stand close together, spread to the places that a mask names: vpexpandb for processors without it.
#pragma once
#include <immintrin.h>

#include <array>

#include "isa/matmul_common.h"

namespace hasten {
namespace {

// For each mask of eight places, which byte goes to each; 0x80, which a byte shuffle turns into zero, where none does.
inline constexpr auto kExpand = [] {
  std::array<std::array<uint8_t, 8>, 256> table{};
  for (unsigned mask = 0; mask < 256; ++mask)
    for (unsigned place = 0, next = 0; place < 8; ++place)
      table[mask][place] = mask >> place & 1 ? static_cast<uint8_t>(next++) : uint8_t{0x80};
  return table;
}();

// Added to the indices of sixteen places: the second eight go on where the first, of so many bytes, ended.
inline constexpr auto kSecondEight = [] {
  std::array<std::array<uint8_t, 16>, 9> table{};
  for (unsigned count = 0; count < 9; ++count)
    for (unsigned place = 8; place < 16; ++place) table[count][place] = static_cast<uint8_t>(count);
  return table;
}();

// The first bytes of `values`, 16 of which are read, at the places of the 16-bit mask.
inline __m128i expand16(const uint8_t* values, uint32_t mask) {
  const uint32_t first = mask & 255, second = mask >> 8;
  __m128i index = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(kExpand[first].data()));
  index = _mm_castps_si128(_mm_loadh_pi(_mm_castsi128_ps(index), reinterpret_cast<const __m64*>(kExpand[second].data())));
  const int count = __builtin_popcount(first);
  index = _mm_add_epi8(index, _mm_loadu_si128(reinterpret_cast<const __m128i*>(kSecondEight[static_cast<size_t>(count)].data())));
  return _mm_shuffle_epi8(_mm_loadu_si128(reinterpret_cast<const __m128i*>(values)), index);
}

}  // namespace
}  // namespace hasten
