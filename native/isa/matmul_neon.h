// Matmul with NEON: the table of kernels, quantised activations, the limits that peaks measure.
#pragma once
#include "isa/matmul_neon_float.h"
#include "isa/matmul_neon_int.h"

namespace hasten {
namespace {

// Magnitudes are compared as integers: the same order, with infinities and NaNs above every finite value.
void quantise(const float* x, int64_t columns, int64_t group, int8_t* codes, float* scales, int32_t* sums) {
  const uint32x4_t magnitude = vdupq_n_u32(0x7fffffff);
  for (int64_t g = 0; g * group < columns; ++g) {
    const int64_t first = g * group, last = smaller(first + group, columns);
    uint32x4_t extreme = vdupq_n_u32(0);
    for (int64_t c = first; c < last; c += 4)
      extreme = vmaxq_u32(extreme, vandq_u32(magnitude, vreinterpretq_u32_f32(load_four(x + c, last - c))));
    const float largest = bits_to_float(vmaxvq_u32(extreme));
    if (!std::isfinite(largest)) {
      not_finite(g, first, last, codes, scales, sums);
      continue;
    }
    const float inverse = largest < 1e-30f ? 0.0f : 127.0f / largest;
    int32x4_t sum = vdupq_n_s32(0);
    for (int64_t c = first; c < last; c += 8) {
      const int32x4_t low = vcvtnq_s32_f32(vmulq_n_f32(load_four(x + c, last - c), inverse));
      const int32x4_t high = vcvtnq_s32_f32(vmulq_n_f32(load_four(x + c + 4, last - c - 4), inverse));
      sum = vaddq_s32(sum, vaddq_s32(low, high));
      vst1_s8(codes + c, vmovn_s16(vcombine_s16(vmovn_s32(low), vmovn_s32(high))));
    }
    scales[g] = largest < 1e-30f ? 0.0f : largest / 127.0f;
    sums[g] = vaddvq_s32(sum);
  }
  for (int64_t c = round_up(columns, 8); c < round_up(columns, 64); c += 8) std::memset(codes + c, 0, 8);
}

void to_bf16(const float* x, int64_t columns, uint16_t* out) {
  for (int64_t c = 0; c < columns; ++c) out[c] = float_to_bf16(x[c]);
  for (int64_t c = columns; c < round_up(columns, 64); ++c) out[c] = 0;
}

int64_t matmul_scratch(const Weight& w, int64_t tokens) {
  return w.is_float() ? float_scratch(w, tokens) : int_scratch(w, tokens);
}

float read_memory(const void* data, int64_t bytes) {
  const uint8_t* p = static_cast<const uint8_t*>(data);
  uint8x16_t sums[8];
  for (auto& sum : sums) sum = vdupq_n_u8(0);
  for (int64_t i = 0; i + 128 <= bytes; i += 128)
    HASTEN_UNROLL
    for (int64_t lane = 0; lane < 8; ++lane) sums[lane] = veorq_u8(sums[lane], vld1q_u8(p + i + lane * 16));
  for (int lane = 1; lane < 8; ++lane) sums[0] = veorq_u8(sums[0], sums[lane]);
  return static_cast<float>(vaddlvq_u8(sums[0]));
}

// The product of bytes as the widest tiles take it: eight columns of four rows at a time.
int64_t int8_peak(int64_t iterations) {
  constexpr int kSets = 8, kPartials = ManyTokens::kPartials;
  alignas(16) const int8_t ones[32] = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};
  Eight w{vdupq_n_s8(1), vdupq_n_s8(2)};
  const typename ManyTokens::X x = ManyTokens::load(ones, 8);
  int32x4_t sums[kSets][kPartials];
  HASTEN_UNROLL
  for (int s = 0; s < kSets; ++s)
    HASTEN_UNROLL
    for (int part = 0; part < kPartials; ++part) sums[s][part] = vdupq_n_s32(0);
  for (int64_t n = 0; n < iterations; ++n) {
    HASTEN_UNROLL
    for (int s = 0; s < kSets; ++s) {
      asm volatile("" : "+w"(w.first), "+w"(w.second));            // or the products would be worked out once
      ManyTokens::add(sums[s], w, x);
    }
  }
  HASTEN_UNROLL
  for (int s = 0; s < kSets; ++s)
    HASTEN_UNROLL
    for (int part = 0; part < kPartials; ++part) asm volatile("" : : "w"(sums[s][part]));
  return iterations * kSets * 32 * ManyTokens::kTokens;
}

// bfloat16 weights are widened and multiplied as float32.
int64_t bf16_peak(int64_t iterations) {
  constexpr int kSums = 16;
  float32x4_t sums[kSums], a = vdupq_n_f32(1.0f);
  HASTEN_UNROLL
  for (int i = 0; i < kSums; ++i) sums[i] = vdupq_n_f32(0.0f);
  for (int64_t n = 0; n < iterations; ++n) {
    asm volatile("" : "+w"(a));
    HASTEN_UNROLL
    for (int i = 0; i < kSums; ++i) sums[i] = vfmaq_f32(sums[i], a, a);
  }
  HASTEN_UNROLL
  for (int i = 0; i < kSums; ++i) asm volatile("" : : "w"(sums[i]));
  return iterations * kSums * 4;
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
