// sparse8, AVX2: values are spread to their places by a table of shuffles, then multiplied as int8 is.
#pragma once
#include "isa/matmul_avx2_sources.h"
#include "isa/matmul_expand.h"

namespace hasten {
namespace {

// The next four columns of a panel as signed bytes, [16 rows][4] in two vectors; `values` moves on. Reads up to 16 bytes
// from any value on, which stay within the block: its masks come last.
inline void expand_four(const uint8_t*& values, const uint8_t* mask, __m256i w[2]) {
#pragma GCC unroll 2
  for (int half = 0; half < 2; ++half) {
    uint32_t places;
    std::memcpy(&places, mask + half * 4, sizeof places);
    const __m128i low = expand16(values, places & 0xffff);
    values += __builtin_popcount(places & 0xffff);
    const __m128i high = expand16(values, places >> 16);
    values += __builtin_popcount(places >> 16);
    w[half] = _mm256_set_m128i(high, low);
  }
}

// Signed bytes, [padded / 4][16][4].
inline void unpack_sparse(const Weight& w, int64_t panel, uint8_t* bytes) {
  const uint8_t* block = static_cast<const uint8_t*>(w.codes) + panel * w.panel_bytes();
  for (int64_t c = 0; c < w.padded(); c += kUnit, block += kSparseBlock) {
    const uint8_t* values = block;
    for (int64_t four = 0; four < 8; ++four, bytes += 64) {
      __m256i both[2];
      expand_four(values, block + kSparseValues + four * 8, both);
      _mm256_store_si256(reinterpret_cast<__m256i*>(bytes), both[0]);
      _mm256_store_si256(reinterpret_cast<__m256i*>(bytes + 32), both[1]);
    }
  }
}

// One panel for T tokens, with the sums and the order of multiply_panel.
template <int T>
void stream_sparse(const Weight& w, const Quantised& x, int64_t panel, float* out, int64_t out_stride) {
  const int64_t padded = w.padded();
  const int shift = __builtin_ctzll(static_cast<uint64_t>(w.group / x.group));
  const uint8_t* block = static_cast<const uint8_t*>(w.codes) + panel * w.panel_bytes();
  const uint16_t* scales = w.scales + panel * w.groups() * kPanel;
  const __m256i ones = _mm256_set1_epi16(1);
  __m256 total[T][2];
  for (int t = 0; t < T; ++t) total[t][0] = total[t][1] = _mm256_setzero_ps();
  for (int64_t g = 0, c = 0; g < x.groups; ++g) {
    __m256i sum[T][2];
    for (int t = 0; t < T; ++t) sum[t][0] = sum[t][1] = _mm256_setzero_si256();
    for (const int64_t last = smaller(c + x.group, padded); c < last; block += kSparseBlock) {
      const uint8_t* values = block;
      for (int64_t line = 0; line < kSparseBlock; line += 64) _mm_prefetch(block + 1280 + line, _MM_HINT_T0);
#pragma GCC unroll 2
      for (int four = 0; four < 8; ++four, c += 4) {
        __m256i weights[2];
        expand_four(values, block + kSparseValues + four * 8, weights);
#pragma GCC unroll 4
        for (int t = 0; t < T; ++t) {
          const __m256i input = broadcast4(x.codes + t * x.stride + c);
#pragma GCC unroll 2
          for (int half = 0; half < 2; ++half)
            sum[t][half] = _mm256_add_epi32(sum[t][half], _mm256_madd_epi16(products<Bytes::sign>(weights[half], input), ones));
        }
      }
    }
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      const __m256 factor = _mm256_cvtph_ps(
          _mm_loadu_si128(reinterpret_cast<const __m128i*>(scales + (g >> shift) * kPanel + half * 8)));
#pragma GCC unroll 4
      for (int t = 0; t < T; ++t)
        total[t][half] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum[t][half]),
                                         _mm256_mul_ps(factor, _mm256_broadcast_ss(x.scales + t * x.groups + g)), total[t][half]);
    }
  }
  for (int t = 0; t < T; ++t)
    for (int half = 0; half < 2; ++half)
      _mm256_maskstore_ps(out + t * out_stride + panel * kPanel + half * 8, lane_mask(w.rows - panel * kPanel - half * 8),
                          total[t][half]);
}

using StreamSparse = void (*)(const Weight&, const Quantised&, int64_t, float*, int64_t);
constexpr StreamSparse kStreamSparse[] = {stream_sparse<1>, stream_sparse<2>, stream_sparse<3>, stream_sparse<4>};

}  // namespace
}  // namespace hasten
