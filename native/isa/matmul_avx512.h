// Matmul with AVX-512 and VNNI; with __AVX512BF16__ also bf16 dot products. Compiled once for each of the two sets.
//
// No processor at hand may have AVX512-BF16: HASTEN_EMULATE_BF16 builds the same kernels with that one instruction
// replaced by two fused multiply-adds, as the table "avx512_bf16_emulated", which tests can run on any AVX-512 machine.
#pragma once
#if defined(__AVX512BF16__) || defined(HASTEN_EMULATE_BF16)
#define HASTEN_BF16_PRODUCTS 1
#else
#define HASTEN_BF16_PRODUCTS 0
#endif

#include "isa/matmul_avx512_float.h"
#include "isa/matmul_avx512_int.h"

namespace hasten {
namespace {

// Magnitudes are compared as integers: the same order, with infinities and NaNs above every finite value.
void quantise(const float* x, int64_t columns, int64_t group, int8_t* codes, float* scales, int32_t* sums) {
  for (int64_t g = 0; g * group < columns; ++g) {
    const int64_t first = g * group, last = smaller(first + group, columns);
    __m512i extreme = _mm512_setzero_si512();
    for (int64_t c = first; c < last; c += 16) {
      const __m512i bits = _mm512_maskz_loadu_epi32(columns_mask(last - c), x + c);
      extreme = _mm512_max_epi32(extreme, _mm512_and_si512(bits, _mm512_set1_epi32(0x7fffffff)));
    }
    const float largest = bits_to_float(static_cast<uint32_t>(_mm512_reduce_max_epi32(extreme)));
    if (!std::isfinite(largest)) {
      not_finite(g, first, last, codes, scales, sums);
      continue;
    }
    const float inverse = largest < 1e-30f ? 0.0f : 127.0f / largest;
    __m512i sum = _mm512_setzero_si512();
    for (int64_t c = first; c < last; c += 16) {
      const __m512 value = _mm512_maskz_loadu_ps(columns_mask(last - c), x + c);
      const __m512i code = _mm512_cvtps_epi32(_mm512_mul_ps(value, _mm512_set1_ps(inverse)));
      sum = _mm512_add_epi32(sum, code);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(codes + c), _mm512_cvtsepi32_epi8(code));
    }
    scales[g] = largest < 1e-30f ? 0.0f : largest / 127.0f;
    sums[g] = _mm512_reduce_add_epi32(sum);
  }
  for (int64_t c = round_up(columns, 16); c < round_up(columns, 64); c += 16)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(codes + c), _mm_setzero_si128());
}

void to_bf16(const float* x, int64_t columns, uint16_t* out) {
  for (int64_t c = 0; c < round_up(columns, 64); c += 16) {
    const __m512 value = _mm512_maskz_loadu_ps(columns_mask(columns - c), x + c);
    const __m512i bits = _mm512_castps_si512(value);
    const __m512i even = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(even, _mm512_set1_epi32(0x7fff))), 16);
    const __mmask16 nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
    rounded = _mm512_mask_or_epi32(rounded, nan, _mm512_srli_epi32(bits, 16), _mm512_set1_epi32(0x40));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + c), _mm512_cvtepi32_epi16(rounded));
  }
}

int64_t matmul_scratch(const Weight& w, int64_t tokens) {
  if (!w.is_float()) return int_scratch(w, tokens);
  if (w.kind == Kind::f32 || tokens <= kTile) return 0;              // read where they are
  return kBlock * 2 * kPanel * static_cast<int64_t>(sizeof(float));
}

float read_memory(const void* data, int64_t bytes) {
  const char* p = static_cast<const char*>(data);
  __m512i sums[8];
  for (auto& sum : sums) sum = _mm512_setzero_si512();
  for (int64_t i = 0; i + 512 <= bytes; i += 512)
    for (int64_t lane = 0; lane < 8; ++lane) sums[lane] = _mm512_xor_si512(sums[lane], _mm512_loadu_si512(p + i + lane * 64));
  for (int lane = 1; lane < 8; ++lane) sums[0] = _mm512_xor_si512(sums[0], sums[lane]);
  return static_cast<float>(_mm512_reduce_or_epi32(sums[0]) & 0xffff);
}

// Twenty-four independent sums, as in the kernels' tile; every loop unrolled, or the sums would live in memory.
int64_t int8_peak(int64_t iterations) {
  __m512i sums[24];
  const __m512i a = _mm512_set1_epi8(1), b = _mm512_set1_epi8(2);
#pragma GCC unroll 24
  for (int i = 0; i < 24; ++i) sums[i] = _mm512_setzero_si512();
  for (int64_t n = 0; n < iterations; ++n) {
#pragma GCC unroll 24
    for (int i = 0; i < 24; ++i) dot(sums[i], a, b);
  }
#pragma GCC unroll 24
  for (int i = 0; i < 24; ++i) HASTEN_USED(sums[i]);
  return iterations * 24 * 64;
}

int64_t bf16_peak(int64_t iterations) {
  __m512 sums[24];
#if HASTEN_BF16_PRODUCTS
  constexpr int64_t kProducts = 32;
  const __m512i a = _mm512_set1_epi32(0x3f803f80), b = a;
#else
  constexpr int64_t kProducts = 16;
  const __m512 a = _mm512_set1_ps(1), b = a;
#endif
#pragma GCC unroll 24
  for (int i = 0; i < 24; ++i) sums[i] = _mm512_setzero_ps();
  for (int64_t n = 0; n < iterations; ++n) {
#pragma GCC unroll 24
    for (int i = 0; i < 24; ++i) {
#if HASTEN_BF16_PRODUCTS
      dot_bf16(sums[i], a, b);
#else
      multiply_add(sums[i], a, b);
#endif
    }
  }
#pragma GCC unroll 24
  for (int i = 0; i < 24; ++i) HASTEN_USED(sums[i]);
  return iterations * 24 * kProducts;
}

void fill_matmul(Kernels& k) {
  k.bf16_inputs = HASTEN_BF16_PRODUCTS;
  k.quantise = quantise;
  k.to_bf16 = to_bf16;
  k.matmul_int = matmul_int;
  k.matmul_float = matmul_float;
  k.matmul_scratch = matmul_scratch;
  k.decode_row = decode_row;
  k.read_memory = read_memory;
  k.int8_peak = int8_peak;
  k.bf16_peak = bf16_peak;
}

}  // namespace
}  // namespace hasten
