// Integer matmul, AVX2: where weights come from, and which form multiplies them. isa/matmul_avx2_tile.h has the products.
//
// A block is 32 columns of a panel. Few tokens read it as it is stored; many unpack a stretch of a panel once, into bytes
// in the first-level cache, and reuse it for every tile of tokens.
#pragma once
#include <type_traits>

#include "isa/matmul_avx2_sources.h"

namespace hasten {
namespace {

// What `unpack` wrote: bytes [columns / 4][16][4].
template <Dot dot>
struct UnpackedSource {
  static constexpr Dot kDot = dot;
  static constexpr int64_t kBlock = 512, kAhead = 0;
  explicit UnpackedSource(const Weight&) {}
  HASTEN_INLINE __m256i load(const uint8_t* p, int half, int lane) const { return load32(p + lane * 64 + half * 32); }
};

// `blocks` blocks of a panel.
template <class Source>
void unpack(const Source& source, const uint8_t* codes, int64_t blocks, uint8_t* to) {
  for (int64_t b = 0; b < blocks; ++b, codes += Source::kBlock)
#pragma GCC unroll 8
    for (int lane = 0; lane < 8; ++lane) {
      const __m256i low = source.load(codes, 0, lane), high = source.load(codes, 1, lane);
      _mm256_store_si256(reinterpret_cast<__m256i*>(to), low);
      _mm256_store_si256(reinterpret_cast<__m256i*>(to + 32), high);
      to += 64;
    }
}

// --- the two forms

constexpr int64_t kStretch = 16 * 1024;                              // bytes unpacked at a time: half a first-level cache

// Columns unpacked at a time: whole groups of the weight.
inline int64_t stretch_columns(const Weight& w) { return smaller(w.padded(), kStretch / kPanel / w.group * w.group); }

template <class Source>
void multiply_few(const Weight& w, const Quantised& x, const Packed& packed, int64_t tokens, int64_t panel0, int64_t panel1,
                  float* out, int64_t out_stride) {
  for (int64_t panel = panel0; panel < panel1; ++panel) {
    const uint8_t* codes = static_cast<const uint8_t*>(w.codes) + panel * (w.padded() / kUnit) * Source::kBlock;
    const Stretch all{w, panel, 0, x.groups, x.groups, x.group};
    for (int64_t token = 0; token < tokens; token += kTokens) {        // a second tile finds the codes in the first-level cache
      const int64_t count = smaller(kTokens, tokens - token);
      kMultiplyTile<Source>[count - 1](all, codes, packed.tile(token, count), nullptr, out + token * out_stride, out_stride);
    }
  }
}

template <class Source>
void multiply_many(const Weight& w, const Quantised& x, const Packed& packed, int64_t tokens, int64_t panel0, int64_t panel1,
                   float* out, int64_t out_stride, uint8_t* bytes, float* totals) {
  const int64_t columns = stretch_columns(w);
  const Source source(w);
  for (int64_t panel = panel0; panel < panel1; ++panel) {
    const uint8_t* codes = static_cast<const uint8_t*>(w.codes) + panel * (w.padded() / kUnit) * Source::kBlock;
    for (int64_t first = 0; first < w.padded(); first += columns) {
      const int64_t last = smaller(first + columns, w.padded());
      unpack(source, codes + first / kUnit * Source::kBlock, (last - first) / kUnit, bytes);
      const Stretch stretch{w, panel, first / x.group, smaller((last + x.group - 1) / x.group, x.groups), x.groups, x.group};
      for (int64_t token = 0; token < tokens; token += kTokens) {
        const int64_t count = smaller(kTokens, tokens - token);
        kMultiplyTile<UnpackedSource<Source::kDot>>[count - 1](stretch, bytes, packed.tile(token, count), totals + token * kPanel,
                                                       out + token * out_stride, out_stride);
      }
    }
  }
}

// Tokens that read weights as they are stored: taking codes apart twice is cheaper than writing bytes and reading them back.
template <class Source>
constexpr int64_t kDirect = std::is_same_v<Source, SparseSource> ? kTokens : 8 * kTokens;

template <class Source>
void multiply(const Weight& w, const Quantised& x, int64_t tokens, int64_t panel0, int64_t panel1, float* out,
              int64_t out_stride, std::byte* scratch) {
  if (tokens <= kDirect<Source>) {
    const Packed packed = pack(w, x, tokens, Source::kDot, scratch);
    multiply_few<Source>(w, x, packed, tokens, panel0, panel1, out, out_stride);
    return;
  }
  float* totals = reinterpret_cast<float*>(scratch + kStretch);
  const int64_t total_bytes = tokens * kPanel * static_cast<int64_t>(sizeof(float));
  const Packed packed = pack(w, x, tokens, Source::kDot, scratch + kStretch + total_bytes);
  multiply_many<Source>(w, x, packed, tokens, panel0, panel1, out, out_stride, reinterpret_cast<uint8_t*>(scratch), totals);
}

inline int64_t int_scratch(const Weight& w, int64_t tokens) {
  const int64_t many = tokens <= kTokens ? 0 : kStretch + tokens * kPanel * static_cast<int64_t>(sizeof(float));
  return many + packed_bytes(w, tokens);
}

void matmul_int(const Weight& w, const Quantised& x, int64_t tokens, int64_t panel0, int64_t panel1, float* out,
                int64_t out_stride, std::byte* scratch) {
  if (tokens == 0) return;
  switch (w.kind) {
    case Kind::int8: return multiply<Int8Source>(w, x, tokens, panel0, panel1, out, out_stride, scratch);
    case Kind::int4: return multiply<Int4Source>(w, x, tokens, panel0, panel1, out, out_stride, scratch);
    case Kind::int3: return multiply<Int3Source>(w, x, tokens, panel0, panel1, out, out_stride, scratch);
    case Kind::int2: return multiply<Int2Source>(w, x, tokens, panel0, panel1, out, out_stride, scratch);
    case Kind::int1: return multiply<Int1Source>(w, x, tokens, panel0, panel1, out, out_stride, scratch);
    case Kind::codebook4: return multiply<CodebookSource<Int4Source>>(w, x, tokens, panel0, panel1, out, out_stride, scratch);
    case Kind::codebook3: return multiply<CodebookSource<Int3Source>>(w, x, tokens, panel0, panel1, out, out_stride, scratch);
    case Kind::codebook2: return multiply<CodebookSource<PlaneSource<2, 0>>>(w, x, tokens, panel0, panel1, out, out_stride, scratch);
    case Kind::codebook1: return multiply<CodebookSource<PlaneSource<1, 0>>>(w, x, tokens, panel0, panel1, out, out_stride, scratch);
    default: return multiply<SparseSource>(w, x, tokens, panel0, panel1, out, out_stride, scratch);
  }
}

}  // namespace
}  // namespace hasten
