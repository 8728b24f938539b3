// How the AVX-512 kernels read each kind of weight.
#pragma once
#include <type_traits>

#include "isa/matmul_avx512_float.h"
#include "isa/matmul_expand.h"

namespace hasten {
namespace {

// Sources: `load(p, step, low, high)` gives eight columns of a panel as two vectors [16 rows][4] of unsigned bytes; steps
// 0..kSteps-1 follow each other in the kBytes that start at p.
struct Int8Source {
  static constexpr int kSteps = 2;
  static constexpr int64_t kBytes = 256;
  explicit Int8Source(const Weight&) {}
  void load(const uint8_t* p, int step, __m512i& low, __m512i& high) const {
    low = _mm512_loadu_si512(p + step * 128);
    high = _mm512_loadu_si512(p + step * 128 + 64);
  }
};

// A plane of `bits` bits (native/core.h), each code left at bit `position` of its byte: 1 gives twice the code.
template <int bits, int position>
struct PlaneSource {
  static constexpr int kBits = bits, kSteps = bits == 4 ? 2 : 4;
  static constexpr int64_t kBytes = 16 * bits * kSteps;
  const __m512i mask = _mm512_set1_epi8(((1 << bits) - 1) << position);
  explicit PlaneSource(const Weight&) {}
  static __m512i moved(const uint8_t* p, int line) {                 // other codes' bits around it
    const __m512i codes = _mm512_loadu_si512(p + line * bits / 8 * 64);
    const int shift = line * bits % 8 - position;
    return shift < 0   ? _mm512_slli_epi16(codes, static_cast<unsigned>(-shift))
           : shift > 0 ? _mm512_srli_epi16(codes, static_cast<unsigned>(shift))
                       : codes;
  }
  void load(const uint8_t* p, int step, __m512i& low, __m512i& high) const {
    low = _mm512_and_si512(moved(p, 2 * step), mask);
    high = _mm512_and_si512(moved(p, 2 * step + 1), mask);
  }
};

struct Int3Source {
  static constexpr int kBits = 3, kSteps = 4;
  static constexpr int64_t kBytes = 192;
  const PlaneSource<2, 0> two;
  const PlaneSource<1, 2> third;
  explicit Int3Source(const Weight& w) : two(w), third(w) {}
  void load(const uint8_t* p, int step, __m512i& low, __m512i& high) const {
    third.load(p + 128, step, low, high);
    low = _mm512_ternarylogic_epi32(two.moved(p, 2 * step), two.mask, low, 0xea);          // moved & mask | third
    high = _mm512_ternarylogic_epi32(two.moved(p, 2 * step + 1), two.mask, high, 0xea);
  }
};

using Int4Source = PlaneSource<4, 0>;
using Int2Source = PlaneSource<2, 1>;
using Int1Source = PlaneSource<1, 1>;

template <class Codes>
struct CodebookSource {
  static constexpr int kSteps = Codes::kSteps;
  static constexpr int64_t kBytes = Codes::kBytes;
  const Codes codes;
  const __m512i table;
  explicit CodebookSource(const Weight& w) : codes(w), table(_mm512_broadcast_i32x4(entries(w.codebook))) {}
  void load(const uint8_t* p, int step, __m512i& low, __m512i& high) const {
    codes.load(p, step, low, high);
    low = _mm512_shuffle_epi8(table, low);
    high = _mm512_shuffle_epi8(table, high);
  }

 private:
  static __m128i entries(const uint8_t* codebook) {
    alignas(16) uint8_t all[16] = {};
    std::memcpy(all, codebook, 1 << Codes::kBits);
    return _mm_load_si128(reinterpret_cast<const __m128i*>(all));
  }
};

// Not every processor with VNNI has vpexpandb (VBMI2): the instruction is chosen when the program runs, so it is written
// by hand. Emulated tables take one form each, so that both are tested.
#if defined(HASTEN_EMULATE_AVX512)
inline bool has_expand() { return HASTEN_BF16_PRODUCTS; }
inline __m512i expand64(const uint8_t* values, uint64_t places) { return emulated::expand(places, _mm512_loadu_si512(values)); }
#else
inline bool has_expand() {
  static const bool has = (__builtin_cpu_init(), __builtin_cpu_supports("avx512vbmi2"));
  return has;
}
inline __m512i expand64(const uint8_t* values, uint64_t places) {
  __m512i spread;
  asm("vpexpandb %1, %0%{%2%}%{z%}" : "=v"(spread) : "v"(_mm512_loadu_si512(values)), "Yk"(places));
  return spread;
}
#endif

// Counts its way through a block's values, so steps must be loaded in order. Reads 64 bytes from any value on, which stay
// within the block: its mask comes last.
template <bool expands>
struct SparseSource {
  static constexpr int kSteps = 4;
  static constexpr int64_t kBytes = kSparseBlock;
  mutable const uint8_t* values = nullptr;
  explicit SparseSource(const Weight&) {}
  void load(const uint8_t* p, int step, __m512i& low, __m512i& high) const {
    if (step == 0) values = p;
    low = next(p + kSparseValues + step * 16);
    high = next(p + kSparseValues + step * 16 + 8);
  }

 private:
  __m512i next(const uint8_t* mask) const {
    const __m512i spread = expands ? by_instruction(mask) : by_table(mask);
    return _mm512_xor_si512(spread, _mm512_set1_epi8(static_cast<char>(0x80)));   // unsigned: plus 128
  }
  __m512i by_instruction(const uint8_t* mask) const {
    uint64_t places;
    std::memcpy(&places, mask, sizeof places);
    const uint8_t* from = values;
    values += __builtin_popcountll(places);
    return expand64(from, places);
  }
  __m512i by_table(const uint8_t* mask) const {
    __m128i part[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) part[i] = expand16(values, mask + 2 * i);
    const __m512i two = _mm512_inserti32x4(_mm512_castsi128_si512(part[0]), part[1], 1);
    return _mm512_inserti32x4(_mm512_inserti32x4(two, part[2], 2), part[3], 3);
  }
};

}  // namespace
}  // namespace hasten
