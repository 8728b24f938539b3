// AVX-512 intrinsics on a machine without it: SIMD Everywhere's, and by hand those that its release lacks. For tests only
// (-DHASTEN_EMULATE_AVX512=ON): correct and very slow, so never shipped and never chosen by itself.
#pragma once
#define SIMDE_ENABLE_NATIVE_ALIASES
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wpedantic"
#include <simde/x86/avx512.h>
#include <simde/x86/f16c.h>
#include <simde/x86/fma.h>
#pragma GCC diagnostic pop

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace hasten {
namespace {
namespace emulated {

template <typename To, typename From>
inline To bits(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

template <typename Lane, int lanes>
struct Lanes {
  Lane at[lanes];
};
using Floats = Lanes<float, 16>;
using Words = Lanes<int32_t, 16>;

inline __m256 half_of(const __m512& v, int i) {
  return _mm256_loadu_ps(reinterpret_cast<const float*>(&v) + 8 * i);
}
inline __m512 of_floats(const Floats& f) { return bits<__m512>(f); }
inline __m512i of_words(const Words& w) { return bits<__m512i>(w); }

inline __m512 maskz_loadu_ps(__mmask16 mask, const void* p) {
  Floats f{};
  for (int i = 0; i < 16; ++i)
    if (mask >> i & 1) std::memcpy(&f.at[i], static_cast<const float*>(p) + i, 4);
  return of_floats(f);
}
inline __m512i maskz_loadu_epi32(__mmask16 mask, const void* p) { return bits<__m512i>(maskz_loadu_ps(mask, p)); }
inline void mask_storeu_ps(void* p, __mmask16 mask, __m512 v) {
  const Floats f = bits<Floats>(v);
  for (int i = 0; i < 16; ++i)
    if (mask >> i & 1) std::memcpy(static_cast<float*>(p) + i, &f.at[i], 4);
}
inline __m256i maskz_loadu_epi16(__mmask16 mask, const void* p) {
  Lanes<uint16_t, 16> h{};
  for (int i = 0; i < 16; ++i)
    if (mask >> i & 1) std::memcpy(&h.at[i], static_cast<const uint16_t*>(p) + i, 2);
  return bits<__m256i>(h);
}
inline void mask_storeu_epi16(void* p, __mmask16 mask, __m256i v) {
  const auto h = bits<Lanes<uint16_t, 16>>(v);
  for (int i = 0; i < 16; ++i)
    if (mask >> i & 1) std::memcpy(static_cast<uint16_t*>(p) + i, &h.at[i], 2);
}
inline __m256i cvtepi32_epi16(__m512i v) {
  const Words w = bits<Words>(v);
  Lanes<int16_t, 16> h;
  for (int i = 0; i < 16; ++i) h.at[i] = static_cast<int16_t>(w.at[i]);
  return bits<__m256i>(h);
}
inline __m512i cvtepu16_epi32(__m256i v) {
  const auto h = bits<Lanes<uint16_t, 16>>(v);
  Words w;
  for (int i = 0; i < 16; ++i) w.at[i] = h.at[i];
  return of_words(w);
}
inline __m512i cvtepi8_epi32(__m128i v) {
  const auto b = bits<Lanes<int8_t, 16>>(v);
  Words w;
  for (int i = 0; i < 16; ++i) w.at[i] = b.at[i];
  return of_words(w);
}
inline __m128i maskz_loadu_epi8(__mmask16 mask, const void* p) {
  Lanes<int8_t, 16> b{};
  for (int i = 0; i < 16; ++i)
    if (mask >> i & 1) b.at[i] = static_cast<const int8_t*>(p)[i];
  return bits<__m128i>(b);
}
inline __m512 cvtepi32_ps(__m512i v) {
  const Words w = bits<Words>(v);
  Floats f;
  for (int i = 0; i < 16; ++i) f.at[i] = static_cast<float>(w.at[i]);
  return of_floats(f);
}
inline __m512i cvtps_epi32(__m512 v) {
  const Lanes<__m256i, 2> halves{{_mm256_cvtps_epi32(half_of(v, 0)), _mm256_cvtps_epi32(half_of(v, 1))}};
  return bits<__m512i>(halves);
}
inline __m512 cvtph_ps(__m256i v) {
  const auto h = bits<Lanes<__m128i, 2>>(v);
  const Lanes<__m256, 2> halves{{::_mm256_cvtph_ps(h.at[0]), ::_mm256_cvtph_ps(h.at[1])}};
  return bits<__m512>(halves);
}
inline __m512d cvtps_pd(__m256 v) {
  const auto f = bits<Lanes<float, 8>>(v);
  Lanes<double, 8> d;
  for (int i = 0; i < 8; ++i) d.at[i] = f.at[i];
  return bits<__m512d>(d);
}
inline __m256 extractf32x8_ps(__m512 v, int i) { return half_of(v, i); }
inline int32_t reduce_add(__m512i v) {
  uint32_t sum = 0;
  for (int32_t lane : bits<Words>(v).at) sum += static_cast<uint32_t>(lane);
  return static_cast<int32_t>(sum);
}
inline int32_t reduce_or(__m512i v) {
  int32_t all = 0;
  for (int32_t lane : bits<Words>(v).at) all |= lane;
  return all;
}
inline int32_t reduce_max(__m512i v) {
  const Words w = bits<Words>(v);
  return *std::max_element(w.at, w.at + 16);
}
// vpdpbusd: four products of an unsigned and a signed byte, added to the 32-bit lane without saturation.
inline __m512i dpbusd(__m512i sum, __m512i a, __m512i b) {
  Words s = bits<Words>(sum);
  const auto x = bits<Lanes<uint8_t, 64>>(a);
  const auto y = bits<Lanes<int8_t, 64>>(b);
  for (int i = 0; i < 64; ++i) s.at[i / 4] += x.at[i] * y.at[i];
  return of_words(s);
}
// vpexpandb, zeroing: the bytes of `v` in order, at the lanes of the mask's bits.
inline __m512i expand(uint64_t mask, __m512i v) {
  const auto from = bits<Lanes<uint8_t, 64>>(v);
  Lanes<uint8_t, 64> to{};
  for (int i = 0, next = 0; i < 64; ++i)
    if (mask >> i & 1) to.at[i] = from.at[next++];
  return bits<__m512i>(to);
}

}  // namespace emulated
}  // namespace
}  // namespace hasten

#undef _mm512_mask_storeu_ps
#undef _mm512_extractf32x8_ps
#undef _mm512_cvtepi32_epi16
#undef _mm512_maskz_loadu_ps
#undef _mm512_cvtps_pd
#undef _mm512_cvtph_ps
#undef _mm512_cvtepu16_epi32
#undef _mm512_cvtepi8_epi32
#undef _mm_maskz_loadu_epi8
#undef _mm512_cvtepi32_ps
#undef _mm256_maskz_loadu_epi16
#undef _mm256_mask_storeu_epi16
#undef _mm512_reduce_or_epi32
#undef _mm512_reduce_max_epi32
#undef _mm512_reduce_add_epi32
#undef _mm512_maskz_loadu_epi32
#undef _mm512_cvtps_epi32
#undef _mm512_dpbusd_epi32
#undef _mm512_madd_epi16
#define _mm512_mask_storeu_ps emulated::mask_storeu_ps
#define _mm512_extractf32x8_ps emulated::extractf32x8_ps
#define _mm512_cvtepi32_epi16 emulated::cvtepi32_epi16
#define _mm512_maskz_loadu_ps emulated::maskz_loadu_ps
#define _mm512_cvtps_pd emulated::cvtps_pd
#define _mm512_cvtph_ps emulated::cvtph_ps
#define _mm512_cvtepu16_epi32 emulated::cvtepu16_epi32
#define _mm512_cvtepi8_epi32 emulated::cvtepi8_epi32
#define _mm_maskz_loadu_epi8 emulated::maskz_loadu_epi8
#define _mm512_cvtepi32_ps emulated::cvtepi32_ps
#define _mm256_maskz_loadu_epi16 emulated::maskz_loadu_epi16
#define _mm256_mask_storeu_epi16 emulated::mask_storeu_epi16
#define _mm512_reduce_or_epi32 emulated::reduce_or
#define _mm512_reduce_max_epi32 emulated::reduce_max
#define _mm512_reduce_add_epi32 emulated::reduce_add
#define _mm512_maskz_loadu_epi32 emulated::maskz_loadu_epi32
#define _mm512_cvtps_epi32 emulated::cvtps_epi32
#define _mm512_dpbusd_epi32 emulated::dpbusd
#define _mm512_madd_epi16 simde_mm512_madd_epi16   // a release gives the alias the mask's arguments
