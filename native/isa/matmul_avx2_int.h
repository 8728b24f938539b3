// Integer matmul, AVX2: where weights come from, and which form multiplies them. isa/matmul_avx2_tile.h has the products.
//
// A block is 32 columns of a panel. Few tokens read it as it is stored; many unpack a stretch of a panel once, into bytes
// or 16-bit words in the first-level cache, and reuse it for every tile of tokens.
#pragma once
#include "isa/matmul_avx2_tile.h"

namespace hasten {
namespace {

inline __m256i nibbles(__m256i both, bool high) {
  return _mm256_and_si256(high ? _mm256_srli_epi16(both, 4) : both, _mm256_set1_epi8(15));
}

// Sources: `load(block, half, lane)` gives columns [4 lane, 4 lane + 4) of rows [8 half, 8 half + 8), lane 0..7 of a block,
// as the kernel takes them; kBlock is a block's bytes. kAhead: how far ahead of them to fetch.
// Without AVX-VNNI they say how far their bytes are from overflow; with it all are bytes, and int8 stays unsigned.
constexpr Dot without_vnni(Dot dot) { return kVnni ? Dot::bytes : dot; }

struct Int8Source {
  static constexpr Dot kDot = without_vnni(Dot::sign);
  static constexpr int64_t kBlock = 512, kAhead = 1024;
  explicit Int8Source(const Weight&) {}
  HASTEN_INLINE __m256i load(const uint8_t* p, int half, int lane) const {
    const __m256i codes = load32(p + lane * 64 + half * 32);
    return kVnni ? codes : _mm256_xor_si256(codes, _mm256_set1_epi8(static_cast<char>(0x80)));
  }
};

struct Int4Source {
  static constexpr Dot kDot = without_vnni(Dot::four_bits);
  static constexpr int64_t kBlock = 256, kAhead = 1024;
  explicit Int4Source(const Weight&) {}
  HASTEN_INLINE __m256i load(const uint8_t* p, int half, int lane) const {
    return nibbles(load32(p + lane / 2 * 64 + half * 32), lane % 2);
  }
};

struct CodebookSource {
  static constexpr Dot kDot = without_vnni(Dot::seven_bits);
  static constexpr int64_t kBlock = 256, kAhead = 1024;
  const __m256i table;
  explicit CodebookSource(const Weight& w)
      : table(_mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(w.codebook)))) {}
  HASTEN_INLINE __m256i load(const uint8_t* p, int half, int lane) const {
    return _mm256_shuffle_epi8(table, nibbles(load32(p + lane / 2 * 64 + half * 32), lane % 2));
  }
};

// What `unpack` wrote: bytes [columns / 4][16][4], or words [columns / 2][16][2] and then a lane is two columns.
template <Dot dot>
struct UnpackedSource {
  static constexpr Dot kDot = dot;
  static constexpr int64_t kBlock = 512, kAhead = 0;
  explicit UnpackedSource(const Weight&) {}
  HASTEN_INLINE __m256i load(const uint8_t* p, int half, int lane) const { return load32(p + lane * 64 + half * 32); }
};

// How a source is unpacked for many tokens: signed bytes become words, whose products need no sign to be moved.
constexpr Dot unpacked(Dot dot) { return dot == Dot::sign ? Dot::words : dot; }
constexpr int64_t unpacked_bytes(Dot dot) { return dot == Dot::words ? 2 : 1; }

// `blocks` blocks of a panel.
template <class Source>
void unpack(const Source& source, const uint8_t* codes, int64_t blocks, uint8_t* to) {
  for (int64_t b = 0; b < blocks; ++b, codes += Source::kBlock)
#pragma GCC unroll 8
    for (int lane = 0; lane < 8; ++lane) {
      const __m256i low = source.load(codes, 0, lane), high = source.load(codes, 1, lane);
      if constexpr (unpacked(Source::kDot) == Dot::words) {
        // [16 rows][4] bytes -> two times [16 rows][2] words.
#pragma GCC unroll 4
        for (int quarter = 0; quarter < 4; ++quarter) {
          const __m256i half = quarter < 2 ? low : high;
          const __m256i four = _mm256_cvtepi8_epi16(quarter % 2 ? _mm256_extracti128_si256(half, 1) : _mm256_castsi256_si128(half));
          const __m256i pairs = _mm256_permute4x64_epi64(_mm256_shuffle_epi32(four, 0xd8), 0xd8);   // columns 0, 1 | 2, 3
          _mm_store_si128(reinterpret_cast<__m128i*>(to + quarter * 16), _mm256_castsi256_si128(pairs));
          _mm_store_si128(reinterpret_cast<__m128i*>(to + 64 + quarter * 16), _mm256_extracti128_si256(pairs, 1));
        }
        to += 128;
      } else {
        _mm256_store_si256(reinterpret_cast<__m256i*>(to), low);
        _mm256_store_si256(reinterpret_cast<__m256i*>(to + 32), high);
        to += 64;
      }
    }
}

// --- the two forms

constexpr int64_t kStretch = 16 * 1024;                              // bytes unpacked at a time: half a first-level cache

// Columns unpacked at a time: whole groups of the weight.
inline int64_t stretch_columns(const Weight& w, Dot dot) {
  return smaller(w.padded(), kStretch / (kPanel * unpacked_bytes(dot)) / w.group * w.group);
}

template <class Source>
void multiply_few(const Weight& w, const Quantised& x, const Packed& packed, int64_t tokens, int64_t panel0, int64_t panel1,
                  float* out, int64_t out_stride) {
  for (int64_t panel = panel0; panel < panel1; ++panel) {
    const uint8_t* codes = static_cast<const uint8_t*>(w.codes) + panel * (w.padded() / kUnit) * Source::kBlock;
    const Stretch all{w, panel, 0, x.groups, x.groups, x.group};
    kMultiplyTile<Source>[tokens - 1](all, codes, packed.tile(0, tokens), nullptr, out, out_stride);
  }
}

template <class Source>
void multiply_many(const Weight& w, const Quantised& x, const Packed& packed, int64_t tokens, int64_t panel0, int64_t panel1,
                   float* out, int64_t out_stride, uint8_t* bytes, float* totals) {
  constexpr Dot kDot = unpacked(Source::kDot);
  const int64_t columns = stretch_columns(w, kDot);
  const Source source(w);
  for (int64_t panel = panel0; panel < panel1; ++panel) {
    const uint8_t* codes = static_cast<const uint8_t*>(w.codes) + panel * (w.padded() / kUnit) * Source::kBlock;
    for (int64_t first = 0; first < w.padded(); first += columns) {
      const int64_t last = smaller(first + columns, w.padded());
      unpack(source, codes + first / kUnit * Source::kBlock, (last - first) / kUnit, bytes);
      const Stretch stretch{w, panel, first / x.group, smaller((last + x.group - 1) / x.group, x.groups), x.groups, x.group};
      for (int64_t token = 0; token < tokens; token += kTokens) {
        const int64_t count = smaller(kTokens, tokens - token);
        kMultiplyTile<UnpackedSource<kDot>>[count - 1](stretch, bytes, packed.tile(token, count), totals + token * kPanel,
                                                       out + token * out_stride, out_stride);
      }
    }
  }
}

template <class Source>
void multiply(const Weight& w, const Quantised& x, int64_t tokens, int64_t panel0, int64_t panel1, float* out,
              int64_t out_stride, std::byte* scratch) {
  if (tokens <= kTokens) {
    const Packed packed = pack<Source::kDot>(w, x, tokens, scratch);
    multiply_few<Source>(w, x, packed, tokens, panel0, panel1, out, out_stride);
    return;
  }
  float* totals = reinterpret_cast<float*>(scratch + kStretch);
  const int64_t total_bytes = tokens * kPanel * static_cast<int64_t>(sizeof(float));
  const Packed packed = pack<unpacked(Source::kDot)>(w, x, tokens, scratch + kStretch + total_bytes);
  multiply_many<Source>(w, x, packed, tokens, panel0, panel1, out, out_stride, reinterpret_cast<uint8_t*>(scratch), totals);
}

inline int64_t int_scratch(const Weight& w, int64_t tokens) {
  const int64_t many = tokens <= kTokens ? 0 : kStretch + tokens * kPanel * static_cast<int64_t>(sizeof(float));
  return many + packed_bytes(w, tokens);
}

void matmul_int(const Weight& w, const Quantised& x, int64_t tokens, int64_t panel0, int64_t panel1, float* out,
                int64_t out_stride, std::byte* scratch) {
  if (tokens == 0) return;
  if (w.kind == Kind::int8) return multiply<Int8Source>(w, x, tokens, panel0, panel1, out, out_stride, scratch);
  if (w.kind == Kind::int4) return multiply<Int4Source>(w, x, tokens, panel0, panel1, out, out_stride, scratch);
  multiply<CodebookSource>(w, x, tokens, panel0, panel1, out, out_stride, scratch);
}

}  // namespace
}  // namespace hasten
