// How the AVX2 kernels read a block, 32 columns of a panel, of each kind of weight.
#pragma once
#include "isa/matmul_avx2_tile.h"
#include "isa/matmul_expand.h"

namespace hasten {
namespace {

// Sources: `load(block, half, lane)` gives columns [4 lane, 4 lane + 4) of rows [8 half, 8 half + 8), lane 0..7 of a block,
// as the kernel takes them; kBlock is a block's bytes. kAhead: how far ahead of them to fetch.
// Without AVX-VNNI they say how far their bytes are from overflow; with it all are bytes, and int8 stays unsigned.
constexpr Dot without_vnni(Dot dot) { return kVnni ? Dot::bytes : dot; }

inline __m256i turned(__m256i bytes) { return _mm256_xor_si256(bytes, _mm256_set1_epi8(static_cast<char>(0x80))); }

struct Int8Source {
  static constexpr Dot kDot = without_vnni(Dot::sign);
  static constexpr int64_t kBlock = 512, kAhead = 2048;
  explicit Int8Source(const Weight&) {}
  HASTEN_INLINE __m256i load(const uint8_t* p, int half, int lane) const {
    const __m256i codes = load32(p + lane * 64 + half * 32);
    return kVnni ? codes : turned(codes);
  }
};

// A plane of `bits` bits (native/core.h), each code left at bit `position` of its byte: 1 gives twice the code.
template <int bits, int position>
struct PlaneSource {
  static constexpr Dot kDot = without_vnni(Dot::four_bits);
  static constexpr int kBits = bits;
  static constexpr int64_t kBlock = 64 * bits, kAhead = 2048;
  explicit PlaneSource(const Weight&) {}
  HASTEN_INLINE __m256i load(const uint8_t* p, int half, int lane) const {
    const __m256i line = load32(p + lane * bits / 8 * 64 + half * 32);
    const int shift = lane * bits % 8 - position;
    const __m256i moved = shift < 0 ? _mm256_slli_epi16(line, -shift) : shift ? _mm256_srli_epi16(line, shift) : line;
    return _mm256_and_si256(moved, _mm256_set1_epi8(((1 << bits) - 1) << position));
  }
};

struct Int3Source {
  static constexpr Dot kDot = without_vnni(Dot::four_bits);
  static constexpr int kBits = 3;
  static constexpr int64_t kBlock = 192, kAhead = 2048;
  const PlaneSource<2, 0> low;
  const PlaneSource<1, 2> high;
  explicit Int3Source(const Weight& w) : low(w), high(w) {}
  HASTEN_INLINE __m256i load(const uint8_t* p, int half, int lane) const {
    return _mm256_or_si256(low.load(p, half, lane), high.load(p + 128, half, lane));
  }
};

using Int4Source = PlaneSource<4, 0>;
using Int2Source = PlaneSource<2, 1>;
using Int1Source = PlaneSource<1, 1>;

template <class Codes>
struct CodebookSource {
  static constexpr Dot kDot = without_vnni(Dot::seven_bits);
  static constexpr int64_t kBlock = Codes::kBlock, kAhead = 2048;
  const Codes codes;
  const __m256i table;
  explicit CodebookSource(const Weight& w) : codes(w), table(_mm256_broadcastsi128_si256(entries(w.codebook))) {}
  HASTEN_INLINE __m256i load(const uint8_t* p, int half, int lane) const {
    return _mm256_shuffle_epi8(table, codes.load(p, half, lane));
  }

 private:
  static __m128i entries(const uint8_t* codebook) {
    alignas(16) uint8_t all[16] = {};
    std::memcpy(all, codebook, 1 << Codes::kBits);
    return _mm_load_si128(reinterpret_cast<const __m128i*>(all));
  }
};

// Counts its way through a block's values, so a block must be loaded in order: lane after lane, low half first. Loads go up to
// eight bytes past the last value, which stay within the block: its mask comes last.
struct SparseSource {
  static constexpr Dot kDot = without_vnni(Dot::sign);
  static constexpr int64_t kBlock = kSparseBlock, kAhead = 2048;
  mutable const uint8_t* values = nullptr;
  explicit SparseSource(const Weight&) {}
  HASTEN_INLINE __m256i load(const uint8_t* p, int half, int lane) const {
    if (lane + half == 0) values = p;
    const uint8_t* mask = p + kSparseValues + lane * 8 + half * 4;
    const __m128i low = expand16(values, mask), high = expand16(values, mask + 2);
    const __m256i both = _mm256_set_m128i(high, low);
    return kVnni ? turned(both) : both;
  }
};

}  // namespace
}  // namespace hasten
