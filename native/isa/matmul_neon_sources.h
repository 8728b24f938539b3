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

// Any kind that `level` knows, slowly, with the zero point taken off.
void unpack_plain(const Weight& w, int64_t panel, uint8_t* bytes) {
  for (int64_t c = 0; c < w.padded(); c += 8)
    for (int quarter = 0; quarter < 4; ++quarter) {
      int8_t eight[2][16];
      for (int i = 0; i < 32; ++i) {
        const int64_t row = quarter * 4 + i % 16 / 4, column = c + i / 16 * 4 + i % 4;
        eight[i / 16][i % 16] = column < w.columns ? static_cast<int8_t>(level(w, panel, row, column)) : int8_t{0};
      }
      store_arranged(bytes + c / kUnit * UnpackedSource::kBlock, static_cast<int>(c % kUnit / 8), quarter,
                     {vld1q_s8(eight[0]), vld1q_s8(eight[1])});
    }
}

}  // namespace
}  // namespace hasten
