// Matmul in plain C++: what every processor runs and what other instruction sets are read beside.
#pragma once
#include "isa/matmul_common.h"

namespace hasten {
namespace {

void quantise(const float* x, int64_t columns, int64_t group, int8_t* codes, float* scales, int32_t* sums) {
  std::memset(codes, 0, static_cast<size_t>(round_up(columns, 64)));
  for (int64_t g = 0; g * group < columns; ++g) {
    const int64_t first = g * group, last = smaller(first + group, columns);
    float extreme = 0;
    bool finite = true;
    for (int64_t c = first; c < last; ++c) {
      extreme = std::fabs(x[c]) > extreme ? std::fabs(x[c]) : extreme;
      finite &= std::isfinite(x[c]);
    }
    if (!finite) {
      not_finite(g, first, last, codes, scales, sums);
      continue;
    }
    const float inverse = extreme < 1e-30f ? 0.0f : 127.0f / extreme;
    int32_t sum = 0;
    for (int64_t c = first; c < last; ++c) {
      codes[c] = static_cast<int8_t>(std::nearbyintf(x[c] * inverse));
      sum += codes[c];
    }
    scales[g] = extreme < 1e-30f ? 0.0f : extreme / 127.0f;
    sums[g] = sum;
  }
}

void to_bf16(const float* x, int64_t columns, uint16_t* out) {
  for (int64_t c = 0; c < columns; ++c) out[c] = float_to_bf16(x[c]);
  for (int64_t c = columns; c < round_up(columns, 64); ++c) out[c] = 0;
}

int64_t matmul_scratch(const Weight& w, int64_t) {
  return kPanel * (w.is_float() ? w.columns * static_cast<int64_t>(sizeof(float)) : w.padded());
}

void matmul_int(const Weight& w, const Quantised& x, int64_t tokens, int64_t panel0, int64_t panel1, float* out,
                int64_t out_stride, std::byte* scratch) {
  uint8_t* bytes = reinterpret_cast<uint8_t*>(scratch);              // [padded / 4][16][4]
  const int32_t zero = zero_point(w.kind);
  for (int64_t panel = panel0; panel < panel1; ++panel) {
    unpack_panel_plain(w, panel, bytes);
    const int64_t rows = smaller(kPanel, w.rows - panel * kPanel);
    for (int64_t t = 0; t < tokens; ++t) {
      const int8_t* codes = x.codes + t * x.stride;
      float total[kPanel] = {};
      for (int64_t g = 0; g < x.groups; ++g) {
        int32_t sum[kPanel] = {};
        for (int64_t c = g * x.group; c < smaller((g + 1) * x.group, w.columns); ++c)
          for (int64_t r = 0; r < kPanel; ++r) sum[r] += (bytes[c / 4 * 64 + r * 4 + c % 4] - zero) * codes[c];
        const uint16_t* scales = w.scales + (panel * w.groups() + g * x.group / w.group) * kPanel;
        const float x_scale = x.scales[t * x.groups + g];
        for (int64_t r = 0; r < kPanel; ++r)
          total[r] += static_cast<float>(sum[r]) * (half_to_float(scales[r]) * x_scale);
      }
      std::memcpy(out + t * out_stride + panel * kPanel, total, static_cast<size_t>(rows) * sizeof(float));
    }
  }
}

void matmul_float(const Weight& w, const void* x, int64_t x_stride, int64_t tokens, int64_t panel0, int64_t panel1,
                  float* out, int64_t out_stride, std::byte* scratch) {
  float* values = reinterpret_cast<float*>(scratch);                 // [columns][16]
  for (int64_t panel = panel0; panel < panel1; ++panel) {
    for (int64_t c = 0; c < w.columns; ++c)
      for (int64_t r = 0; r < kPanel; ++r) values[c * kPanel + r] = dense_value(w, panel, r, c);
    const int64_t rows = smaller(kPanel, w.rows - panel * kPanel);
    for (int64_t t = 0; t < tokens; ++t) {
      const float* row = static_cast<const float*>(x) + t * x_stride;
      float total[kPanel] = {};
      for (int64_t c = 0; c < w.columns; ++c)
        for (int64_t r = 0; r < kPanel; ++r) total[r] += values[c * kPanel + r] * row[c];
      std::memcpy(out + t * out_stride + panel * kPanel, total, static_cast<size_t>(rows) * sizeof(float));
    }
  }
}

float read_memory(const void* data, int64_t bytes) {
  const uint64_t* words = static_cast<const uint64_t*>(data);
  uint64_t sums[8] = {};
  for (int64_t i = 0; i + 8 <= bytes / 8; i += 8)
    for (int64_t lane = 0; lane < 8; ++lane) sums[lane] ^= words[i + lane];
  uint64_t all = 0;
  for (uint64_t sum : sums) all ^= sum;
  return static_cast<float>(all & 0xffff);
}

// Products of values that the compiler cannot know, in registers or the nearest cache.
template <typename Value, typename Sum>
int64_t plain_peak(int64_t iterations) {
  Value a[64], b[64];
  Sum sums[64] = {};
  for (int i = 0; i < 64; ++i) a[i] = b[i] = static_cast<Value>(i + 1);
  for (int64_t n = 0; n < iterations; ++n) {
    for (int i = 0; i < 64; ++i) sums[i] += static_cast<Sum>(a[i]) * static_cast<Sum>(b[i]);
    asm volatile("" : : "r"(a), "r"(b), "r"(sums) : "memory");
  }
  return iterations * 64;
}

int64_t int8_peak(int64_t iterations) { return plain_peak<int8_t, int32_t>(iterations); }
int64_t bf16_peak(int64_t iterations) { return plain_peak<float, float>(iterations); }

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
