// Integer matmul, AVX2. Integer sums are exact in any order; of floats there is one sequence for every row and token,
// whatever the form: total = fma(float(sum), weight_scale * activation_scale, total), group after group.
//
// maddubs adds two products of an unsigned and a signed byte in 16 bits: codebook entries are at most 127, so
// 2 * 127 * 127 fits; int8 weights give |w| <= 128 as the unsigned factor and their sign to x; 2 * 128 * 127 fits too.
// int4 products are so small (2 * 15 * 127) that eight of them are added in 16 bits before they are widened.
#pragma once
#include "isa/matmul_avx2_base.h"

namespace hasten {
namespace {

// Kernel kinds of bytes, by how far they are from overflow.
enum class Bytes { sign, seven_bits, four_bits };

inline __m256i nibbles(__m256i both, bool high) {
  return _mm256_and_si256(high ? _mm256_srli_epi16(both, 4) : both, _mm256_set1_epi8(15));
}

// Sources: four columns (the first or second four of eight) of eight rows, bytes as the products take them.
struct Int8Source {
  static constexpr Bytes kBytes = Bytes::sign;
  static constexpr int64_t kEight = 128;                             // bytes of eight columns of a panel
  explicit Int8Source(const Weight&) {}
  __m256i load(const uint8_t* p, int half, int second) const {
    return _mm256_xor_si256(load32(p + second * 64 + half * 32), _mm256_set1_epi8(static_cast<char>(0x80)));
  }
};

struct Int4Source {
  static constexpr Bytes kBytes = Bytes::four_bits;
  static constexpr int64_t kEight = 64;
  explicit Int4Source(const Weight&) {}
  __m256i load(const uint8_t* p, int half, int second) const { return nibbles(load32(p + half * 32), second); }
};

struct CodebookSource {
  static constexpr Bytes kBytes = Bytes::seven_bits;
  static constexpr int64_t kEight = 64;
  const __m256i table;
  explicit CodebookSource(const Weight& w)
      : table(_mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(w.codebook)))) {}
  __m256i load(const uint8_t* p, int half, int second) const {
    return _mm256_shuffle_epi8(table, nibbles(load32(p + half * 32), second));
  }
};

// Bytes that unpack_panel wrote: [columns / 4][16][4].
template <Bytes kind>
struct UnpackedSource {
  static constexpr Bytes kBytes = kind;
  static constexpr int64_t kEight = 128;
  explicit UnpackedSource(const Weight&) {}
  __m256i load(const uint8_t* p, int half, int second) const { return load32(p + second * 64 + half * 32); }
};

struct IntMatmul {
  const Weight& w;
  const Quantised& x;
  float* out;
  int64_t out_stride;
};

// Pairs of products in 16 bits.
template <Bytes kind>
inline __m256i products(__m256i weights, __m256i x) {
  if constexpr (kind == Bytes::sign) return _mm256_maddubs_epi16(_mm256_abs_epi8(weights), _mm256_sign_epi8(x, weights));
  return _mm256_maddubs_epi16(weights, x);
}

// One panel for T tokens: 2 T sums in registers.
template <class Source, int T>
void multiply_panel(const IntMatmul& m, const uint8_t* codes, int64_t panel, int64_t token) {
  constexpr bool kSmall = Source::kBytes == Bytes::four_bits;
  const Source source(m.w);
  const int32_t zero = Source::kBytes == Bytes::sign ? 0 : zero_point(m.w.kind);
  const int64_t stride = m.x.stride, groups = m.x.groups, group = m.x.group, padded = m.w.padded();
  const int shift = __builtin_ctzll(static_cast<uint64_t>(m.w.group / group));
  const uint16_t* scales = m.w.scales + panel * m.w.groups() * kPanel;
  const int8_t* x = m.x.codes + token * stride;
  const int32_t* x_sums = m.x.sums + token * groups;
  const float* x_scales = m.x.scales + token * groups;
  const __m256i ones = _mm256_set1_epi16(1);
  __m256 total[T][2];
  for (int t = 0; t < T; ++t) total[t][0] = total[t][1] = _mm256_setzero_ps();
  for (int64_t g = 0, c = 0; g < groups; ++g) {
    __m256i sum[T][2];
#pragma GCC unroll 4
    for (int t = 0; t < T; ++t) sum[t][0] = sum[t][1] = _mm256_set1_epi32(-zero * x_sums[t * groups + g]);
    for (const int64_t last = smaller(c + group, padded); c < last;) {
      __m256i small[T][2];                                           // four_bits: sums of 32 columns in 16 bits
#pragma GCC unroll 4
      for (int step = 0; step < 4; ++step, c += 8, codes += Source::kEight) {
        _mm_prefetch(codes + 1024, _MM_HINT_T0);
        if constexpr (Source::kEight == 128) _mm_prefetch(codes + 1024 + 64, _MM_HINT_T0);
#pragma GCC unroll 2
        for (int second = 0; second < 2; ++second) {
          const __m256i w[2] = {source.load(codes, 0, second), source.load(codes, 1, second)};
#pragma GCC unroll 4
          for (int t = 0; t < T; ++t) {
            const __m256i four = broadcast4(x + t * stride + c + second * 4);
#pragma GCC unroll 2
            for (int half = 0; half < 2; ++half) {
              const __m256i pairs = products<Source::kBytes>(w[half], four);
              if constexpr (!kSmall) sum[t][half] = _mm256_add_epi32(sum[t][half], _mm256_madd_epi16(pairs, ones));
              else small[t][half] = step + second ? _mm256_add_epi16(small[t][half], pairs) : pairs;
            }
          }
        }
      }
      if constexpr (kSmall)
#pragma GCC unroll 4
        for (int t = 0; t < T; ++t)
#pragma GCC unroll 2
          for (int half = 0; half < 2; ++half)
            sum[t][half] = _mm256_add_epi32(sum[t][half], _mm256_madd_epi16(small[t][half], ones));
    }
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      const __m256 factor = _mm256_cvtph_ps(
          _mm_loadu_si128(reinterpret_cast<const __m128i*>(scales + (g >> shift) * kPanel + half * 8)));
#pragma GCC unroll 4
      for (int t = 0; t < T; ++t)
        total[t][half] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum[t][half]),
                                         _mm256_mul_ps(factor, _mm256_broadcast_ss(x_scales + t * groups + g)), total[t][half]);
    }
  }
  for (int t = 0; t < T; ++t)
    for (int half = 0; half < 2; ++half)
      _mm256_maskstore_ps(m.out + (token + t) * m.out_stride + panel * kPanel + half * 8,
                          lane_mask(m.w.rows - panel * kPanel - half * 8), total[t][half]);
}

constexpr int64_t kTokens = 4;
using MultiplyPanel = void (*)(const IntMatmul&, const uint8_t*, int64_t, int64_t);
template <class S>
constexpr MultiplyPanel kMultiplyPanel[] = {multiply_panel<S, 1>, multiply_panel<S, 2>, multiply_panel<S, 3>, multiply_panel<S, 4>};

template <class Source>
void unpack_panel(const Weight& w, const uint8_t* codes, uint8_t* bytes) {
  const Source source(w);
  for (int64_t c = 0; c < w.padded(); c += 8, codes += Source::kEight, bytes += 128)
    for (int second = 0; second < 2; ++second)
      for (int half = 0; half < 2; ++half)
        _mm256_store_si256(reinterpret_cast<__m256i*>(bytes + second * 64 + half * 32), source.load(codes, half, second));
}

template <class Source>
void multiply(const IntMatmul& m, int64_t tokens, int64_t panel0, int64_t panel1, std::byte* scratch) {
  const int64_t stride = m.w.padded() / 8 * Source::kEight;
  for (int64_t panel = panel0; panel < panel1; ++panel) {
    const uint8_t* codes = static_cast<const uint8_t*>(m.w.codes) + panel * stride;
    if (tokens <= kTokens) {
      kMultiplyPanel<Source>[tokens - 1](m, codes, panel, 0);
      continue;
    }
    uint8_t* bytes = reinterpret_cast<uint8_t*>(scratch);
    unpack_panel<Source>(m.w, codes, bytes);
    for (int64_t token = 0; token < tokens; token += kTokens)
      kMultiplyPanel<UnpackedSource<Source::kBytes>>[smaller(kTokens, tokens - token) - 1](m, bytes, panel, token);
  }
}

inline int64_t int_scratch(const Weight& w, int64_t tokens) { return tokens <= kTokens ? 0 : w.padded() * kPanel; }

void matmul_int(const Weight& w, const Quantised& x, int64_t tokens, int64_t panel0, int64_t panel1, float* out,
                int64_t out_stride, std::byte* scratch) {
  if (tokens == 0) return;
  const IntMatmul m{w, x, out, out_stride};
  if (w.kind == Kind::int8) return multiply<Int8Source>(m, tokens, panel0, panel1, scratch);
  if (w.kind == Kind::int4) return multiply<Int4Source>(m, tokens, panel0, panel1, scratch);
  multiply<CodebookSource>(m, tokens, panel0, panel1, scratch);
}

}  // namespace
}  // namespace hasten
