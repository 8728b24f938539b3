// Bytes that stand close together, spread to the places that a mask names: vpexpandb for processors without it.
#pragma once
#include <immintrin.h>

#include <array>

#include "isa/matmul_common.h"

namespace hasten {
namespace {

// For each mask of eight places, which byte goes to each; 0x80, which a byte shuffle turns into zero, where none does.
// Of bytes 0..7, then of bytes 8..15.
inline constexpr auto kExpand = [] {
  std::array<std::array<std::array<uint8_t, 8>, 256>, 2> table{};
  for (unsigned half = 0; half < 2; ++half)
    for (unsigned mask = 0; mask < 256; ++mask)
      for (unsigned place = 0, next = 8 * half; place < 8; ++place)
        table[half][mask][place] = mask >> place & 1 ? static_cast<uint8_t>(next++) : uint8_t{0x80};
  return table;
}();

inline __m128i two_halves(const uint8_t* low, const uint8_t* high) {
  const __m128i first = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(low));
  return _mm_castps_si128(_mm_loadh_pi(_mm_castsi128_ps(first), reinterpret_cast<const __m64*>(high)));
}

// The next bytes of `values` at the sixteen places of a mask of two bytes. Eight are read from wherever a half starts.
__attribute__((always_inline)) inline __m128i expand16(const uint8_t*& values, const uint8_t* mask) {
  const uint64_t first = mask[0], second = mask[1];
  const uint8_t* middle = values + __builtin_popcountll(first);
  const __m128i bytes = two_halves(values, middle);
  values = middle + __builtin_popcountll(second);
  return _mm_shuffle_epi8(bytes, two_halves(kExpand[0][first].data(), kExpand[1][second].data()));
}

}  // namespace
}  // namespace hasten
