// Where the bytes of the NEON matmuls come from: blocks of 32 columns of a panel, eight lines of four columns each, read by
// pairs of lines. Each source says what is to be taken off its bytes (kZero) after they are multiplied.
#pragma once
#include "isa/matmul_neon_base.h"

namespace hasten {
namespace {

// A line's codes of four rows in a plane of `width` bits a code, whose 8 / width lines stand side by side in each 64 bytes.
template <int width, int line>
inline uint8x16_t plane_line(const uint8_t* plane, int quarter) {
  constexpr int shift = line * width % 8;
  uint8x16_t codes = vld1q_u8(plane + line * width / 8 * 64 + quarter * 16);
  if constexpr (shift != 0) codes = vshrq_n_u8(codes, shift);
  if constexpr (shift + width < 8) codes = vandq_u8(codes, vdupq_n_u8((1 << width) - 1));
  return codes;
}

template <int width>
struct Plane {
  static constexpr int64_t kBlock = 64 * width;                      // bytes of 32 columns
  static constexpr int kBits = width;
  template <int line>
  static uint8x16_t codes(const uint8_t* block, int quarter) { return plane_line<width, line>(block, quarter); }
};

// A plane of the low two bits, then one of the high bit.
struct ThreeBits {
  static constexpr int64_t kBlock = 192;
  static constexpr int kBits = 3;
  template <int line>
  static uint8x16_t codes(const uint8_t* block, int quarter) {
    return vorrq_u8(plane_line<2, line>(block, quarter), vshlq_n_u8(plane_line<1, line>(block + 128, quarter), 2));
  }
};

template <class Codes>
struct Twice {
  static constexpr int64_t kBlock = Codes::kBlock;
  template <int line>
  static uint8x16_t codes(const uint8_t* block, int quarter) {
    return vshlq_n_u8(Codes::template codes<line>(block, quarter), 1);
  }
};

struct Int8Source {
  static constexpr int64_t kBlock = 512;
  static constexpr int32_t kZero = 0;                                // 128 is taken off before
  explicit Int8Source(const Weight&) {}
  template <int pair>
  Eight load(const uint8_t* block, int quarter) const {
    return {centred(block + pair * 128 + quarter * 16), centred(block + pair * 128 + 64 + quarter * 16)};
  }
  static int8x16_t centred(const uint8_t* p) { return vreinterpretq_s8_u8(veorq_u8(vld1q_u8(p), vdupq_n_u8(0x80))); }
};

// code - zero
template <class Codes, int32_t zero>
struct GridSource {
  static constexpr int64_t kBlock = Codes::kBlock;
  static constexpr int32_t kZero = zero;
  explicit GridSource(const Weight&) {}
  template <int pair>
  Eight load(const uint8_t* block, int quarter) const {
    return {vreinterpretq_s8_u8(Codes::template codes<2 * pair>(block, quarter)),
            vreinterpretq_s8_u8(Codes::template codes<2 * pair + 1>(block, quarter))};
  }
};

// codebook[code] - 64
template <class Codes>
struct CodebookSource {
  static constexpr int64_t kBlock = Codes::kBlock;
  static constexpr int32_t kZero = 64;
  uint8x16_t table;
  explicit CodebookSource(const Weight& w) {
    uint8_t entries[16] = {};
    std::memcpy(entries, w.codebook, size_t{1} << Codes::kBits);
    table = vld1q_u8(entries);
  }
  template <int pair>
  Eight load(const uint8_t* block, int quarter) const {
    return {vreinterpretq_s8_u8(vqtbl1q_u8(table, Codes::template codes<2 * pair>(block, quarter))),
            vreinterpretq_s8_u8(vqtbl1q_u8(table, Codes::template codes<2 * pair + 1>(block, quarter)))};
  }
};

// What `store_arranged` wrote for ManyTokens: [4 pairs of lines][4 quarters][2][16].
struct UnpackedSource {
  static constexpr int64_t kBlock = 512;
  explicit UnpackedSource(const Weight&) {}
  template <int pair>
  Eight load(const uint8_t* block, int quarter) const {
    const int8_t* at = reinterpret_cast<const int8_t*>(block) + pair * 128 + quarter * 32;
    return {vld1q_s8(at), vld1q_s8(at + 16)};
  }
};

inline void store_arranged(uint8_t* block, int pair, int quarter, Eight w) {
  const Eight arranged = ManyTokens::arrange(w);
  int8_t* at = reinterpret_cast<int8_t*>(block) + pair * 128 + quarter * 32;
  vst1q_s8(at, arranged.first);
  vst1q_s8(at + 16, arranged.second);
}

// body<0>() .. body<3>(): the four pairs of lines of a block.
template <class Body>
inline __attribute__((always_inline)) void each_pair(Body body) {
  body.template operator()<0>();
  body.template operator()<1>();
  body.template operator()<2>();
  body.template operator()<3>();
}

template <class Source>
void unpack_panel(const Weight& w, int64_t panel, uint8_t* bytes) {
  const Source source(w);
  const int64_t blocks = w.padded() / kUnit;
  const uint8_t* codes = static_cast<const uint8_t*>(w.codes) + panel * blocks * Source::kBlock;
  for (int64_t b = 0; b < blocks; ++b, codes += Source::kBlock, bytes += UnpackedSource::kBlock)
    each_pair([&]<int pair>() {
      for (int quarter = 0; quarter < 4; ++quarter)
        store_arranged(bytes, pair, quarter, source.template load<pair>(codes, quarter));
    });
}

// For each mask of eight places, which byte goes to each; one past the eight, which a look-up turns into zero, where none.
struct Places {
  uint8_t of[256][8];
};
inline constexpr Places kPlaces = [] {
  Places places{};
  for (unsigned mask = 0; mask < 256; ++mask)
    for (unsigned place = 0, next = 0; place < 8; ++place)
      places.of[mask][place] = mask >> place & 1 ? static_cast<uint8_t>(next++) : uint8_t{8};
  return places;
}();

// Half-sparse blocks are counted through from their first place to their last, so they are unpacked whole. Loads go up to
// eight bytes past the last value, which stay within the block: its mask comes last.
void unpack_sparse(const Weight& w, int64_t panel, uint8_t* bytes) {
  const int64_t blocks = w.padded() / kUnit;
  const uint8_t* block = static_cast<const uint8_t*>(w.codes) + panel * blocks * kSparseBlock;
  for (int64_t b = 0; b < blocks; ++b, block += kSparseBlock, bytes += UnpackedSource::kBlock) {
    const uint8_t *values = block, *mask = block + kSparseValues;
    int8_t lines[8][64];
    for (int64_t i = 0; i < 64; ++i) {
      const uint8x8_t eight = vtbl1_u8(vld1_u8(values), vld1_u8(kPlaces.of[mask[i]]));
      vst1_s8(lines[i / 8] + i % 8 * 8, vreinterpret_s8_u8(eight));
      values += __builtin_popcount(mask[i]);
    }
    for (int pair = 0; pair < 4; ++pair)
      for (int quarter = 0; quarter < 4; ++quarter)
        store_arranged(bytes, pair, quarter,
                       {vld1q_s8(lines[2 * pair] + quarter * 16), vld1q_s8(lines[2 * pair + 1] + quarter * 16)});
  }
}

}  // namespace
}  // namespace hasten
