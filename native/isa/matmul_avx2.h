// Matmul with AVX2: byte products by maddubs, which never saturates here because one factor is at most 7 bits wide.
#pragma once
#include "isa/matmul_avx2_float.h"
#include "isa/matmul_avx2_int.h"

namespace hasten {
namespace {

inline int32_t largest_lane(__m256i v) {
  __m128i half = _mm_max_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  half = _mm_max_epi32(half, _mm_shuffle_epi32(half, 0x4e));
  return _mm_cvtsi128_si32(_mm_max_epi32(half, _mm_shuffle_epi32(half, 0xb1)));
}

inline int32_t lane_sum(__m256i v) {
  __m128i half = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  half = _mm_add_epi32(half, _mm_shuffle_epi32(half, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(half, _mm_shuffle_epi32(half, 0xb1)));
}

// Magnitudes are compared as integers: the same order, with infinities and NaNs above every finite value.
void quantise(const float* x, int64_t columns, int64_t group, int8_t* codes, float* scales, int32_t* sums) {
  const __m256i magnitude = _mm256_set1_epi32(0x7fffffff);
  for (int64_t g = 0; g * group < columns; ++g) {
    const int64_t first = g * group, last = smaller(first + group, columns);
    __m256i extreme = _mm256_setzero_si256();
    for (int64_t c = first; c < last; c += 8) {
      const __m256i bits = _mm256_castps_si256(_mm256_maskload_ps(x + c, lane_mask(last - c)));
      extreme = _mm256_max_epi32(extreme, _mm256_and_si256(magnitude, bits));
    }
    const float largest = bits_to_float(static_cast<uint32_t>(largest_lane(extreme)));
    if (!std::isfinite(largest)) {
      not_finite(g, first, last, codes, scales, sums);
      continue;
    }
    const float inverse = largest < 1e-30f ? 0.0f : 127.0f / largest;
    __m256i sum = _mm256_setzero_si256();
    for (int64_t c = first; c < last; c += 8) {
      const __m256 value = _mm256_maskload_ps(x + c, lane_mask(last - c));
      const __m256i code = _mm256_cvtps_epi32(_mm256_mul_ps(value, _mm256_set1_ps(inverse)));
      sum = _mm256_add_epi32(sum, code);
      const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(code), _mm256_extracti128_si256(code, 1));
      _mm_storel_epi64(reinterpret_cast<__m128i*>(codes + c), _mm_packs_epi16(words, words));
    }
    scales[g] = largest < 1e-30f ? 0.0f : largest / 127.0f;
    sums[g] = lane_sum(sum);
  }
  for (int64_t c = round_up(columns, 8); c < round_up(columns, 64); c += 8) std::memset(codes + c, 0, 8);
}

void to_bf16(const float* x, int64_t columns, uint16_t* out) {
  for (int64_t c = 0; c < columns; ++c) out[c] = float_to_bf16(x[c]);
  for (int64_t c = columns; c < round_up(columns, 64); ++c) out[c] = 0;
}

int64_t matmul_scratch(const Weight& w, int64_t tokens) {
  if (!w.is_float()) return int_scratch(w, tokens);
  if (w.kind == Kind::f32 || tokens <= kTile) return 0;              // read where they are
  return kBlock * kPanel * static_cast<int64_t>(sizeof(float));
}

float read_memory(const void* data, int64_t bytes) {
  const char* p = static_cast<const char*>(data);
  __m256i sums[8];
  for (auto& sum : sums) sum = _mm256_setzero_si256();
  for (int64_t i = 0; i + 256 <= bytes; i += 256)
    for (int64_t lane = 0; lane < 8; ++lane) sums[lane] = _mm256_xor_si256(sums[lane], load32(p + i + lane * 32));
  for (int lane = 1; lane < 8; ++lane) sums[0] = _mm256_xor_si256(sums[0], sums[lane]);
  return static_cast<float>(lane_sum(sums[0]) & 0xffff);
}

// The product of bytes as the kernels take it, and as any of them could: with AVX-VNNI one instruction, else maddubs, then
// pairs of sums widened by madd.
int64_t int8_peak(int64_t iterations) {
  __m256i sums[8], a = _mm256_set1_epi8(1);
  const __m256i b = _mm256_set1_epi8(2);
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) sums[i] = _mm256_setzero_si256();
  for (int64_t n = 0; n < iterations; ++n) {
    asm volatile("" : "+x"(a));
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      __m256i product = a;
      asm volatile("" : "+x"(product));
      sums[i] = add_products<kVnni ? Dot::bytes : Dot::seven_bits>(sums[i], product, b);
      keep(sums[i]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) asm volatile("" : : "x"(sums[i]));
  return iterations * 8 * 32;
}

int64_t bf16_peak(int64_t iterations) {
  __m256 sums[12];
  const __m256 a = _mm256_set1_ps(1), b = a;
#pragma GCC unroll 12
  for (int i = 0; i < 12; ++i) sums[i] = _mm256_setzero_ps();
  for (int64_t n = 0; n < iterations; ++n) {
#pragma GCC unroll 12
    for (int i = 0; i < 12; ++i) multiply_add(sums[i], a, b);
  }
#pragma GCC unroll 12
  for (int i = 0; i < 12; ++i) asm volatile("" : : "x"(sums[i]));
  return iterations * 12 * 8;
}

void fill_matmul(Kernels& k) {
  k.bf16_inputs = false;
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
