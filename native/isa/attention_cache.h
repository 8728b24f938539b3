// How keys and values come into the cache, and 4-bit ones out of it; native/core.h states the layouts.
#pragma once
#include "isa/attention_tile.h"

namespace hasten {
namespace {
namespace attention {

template <class T>
inline void write_token(const AttentionArgs& a, int64_t sequence, int64_t token) {
  const int64_t size = a.kv.block_size, head_dim = a.kv.head_dim, position = a.positions[token], slot = position % size;
  const int64_t block = a.block_tables[sequence * a.table_stride + position / size];
  const float *k = a.k + token * a.k_stride, *v = a.v + token * a.v_stride;
  for (int64_t head = 0; head < a.kv.kv_heads; ++head) {
    const int64_t offset = (block * a.kv.kv_heads + head) * head_dim * size;
    T* keys = static_cast<T*>(a.kv.keys) + offset + slot;
    T* values = static_cast<T*>(a.kv.values) + offset + slot * head_dim;
    for (int64_t d = 0; d < head_dim; d += 16) {
      const int64_t lanes = head_dim - d < 16 ? head_dim - d : 16;
      T column[16];
      simd::store(column, read(k + head * head_dim + d, lanes), 16);
      for (int64_t i = 0; i < lanes; ++i) keys[(d + i) * size] = column[i];
      simd::store(values + d, read(v + head * head_dim + d, lanes), lanes);
    }
  }
}

// codes[i * stride] of x [n] and its scale: the largest magnitude / 127, rounded up to bfloat16 so that no code exceeds 127.
// A number that is not finite makes the scale NaN, and with it all that reads the row.
inline uint16_t quantise_row(const float* x, int64_t n, int8_t* codes, int64_t stride) {
  V most = simd::zero(), bad = simd::zero();
  for (int64_t d = 0; d < n; d += 16) {
    const V v = read(x + d, n - d);
    most = simd::maximum(simd::absolute(v), most);
    bad = simd::fma(v, simd::zero(), bad);
  }
  const float exact = simd::largest(most) / 127.0f + simd::sum(bad);
  uint32_t bits;
  memcpy(&bits, &exact, sizeof bits);
  bits = exact == exact ? (bits + 0xffffu) & 0xffff0000u : 0x7fc00000u;
  float scale;
  memcpy(&scale, &bits, sizeof scale);
  const V inverse = simd::set(scale > 0 ? 1.0f / scale : 0.0f), magic = simd::set(12582912.0f);   // rounds, as in simd::exp
  for (int64_t d = 0; d < n; d += 16) {
    const int64_t lanes = n - d < 16 ? n - d : 16;
    float shifted[16];
    simd::store(shifted, simd::add(simd::mul(read(x + d, lanes), inverse), magic));
    for (int64_t i = 0; i < lanes; ++i) {
      uint32_t code;
      memcpy(&code, shifted + i, sizeof code);
      codes[(d + i) * stride] = static_cast<int8_t>(static_cast<uint8_t>(code));
    }
  }
  return static_cast<uint16_t>(bits >> 16);
}

inline void write_token_int8(const AttentionArgs& a, int64_t sequence, int64_t token) {
  const int64_t size = a.kv.block_size, head_dim = a.kv.head_dim, position = a.positions[token], slot = position % size;
  const int64_t block = a.block_tables[sequence * a.table_stride + position / size];
  for (int64_t head = 0; head < a.kv.kv_heads; ++head) {
    const int64_t offset = (block * a.kv.kv_heads + head) * a.kv.head_bytes();
    int8_t *keys = static_cast<int8_t*>(a.kv.keys) + offset, *values = static_cast<int8_t*>(a.kv.values) + offset;
    uint16_t scales[2];
    scales[0] = quantise_row(a.k + token * a.k_stride + head * head_dim, head_dim, keys + slot, size);
    scales[1] = quantise_row(a.v + token * a.v_stride + head * head_dim, head_dim, values + slot * head_dim, 1);
    reinterpret_cast<uint16_t*>(keys + head_dim * size)[slot] = scales[0];
    reinterpret_cast<uint16_t*>(values + head_dim * size)[slot] = scales[1];
  }
}

// --- 4 bits

template <int64_t kHalf>
HASTEN_INLINE void turn_stage(float* x, int64_t n, int64_t half) {
  for (int64_t i = 0; i < n; i += 2 * half)
    for (int64_t j = i; j < i + half; j += kHalf)
      for (int64_t lane = j; lane < j + kHalf; ++lane) {
        const float a = x[lane], b = x[lane + half];
        x[lane] = a + b;
        x[lane + half] = a - b;
      }
}

// x [n] times the orthonormal Hadamard matrix of the largest power of two that divides n, part by part (Sylvester's order).
// Keys have a few features far larger than the others: turned, they share them, and a scale fits all. Queries turn with them,
// so scores are the same (QuaRot, Ashkboos et al. 2024, section 4).
inline void turn(float* x, int64_t n) {
  const int64_t size = n & -n;
  if (size >= 2) turn_stage<1>(x, n, 1);
  if (size >= 4) turn_stage<2>(x, n, 2);
  if (size >= 8) turn_stage<4>(x, n, 4);
  if (size >= 16) turn_stage<8>(x, n, 8);
  for (int64_t half = 16; half < size; half *= 2) turn_stage<16>(x, n, half);
  const float factor = 1.0f / __builtin_sqrtf(static_cast<float>(size));
  for (int64_t i = 0; i < n; ++i) x[i] *= factor;
}

inline float from_bf16(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  memcpy(&value, &wide, sizeof value);
  return value;
}

// Codes 0..15 of x [n], their scale and centre: the centre of the numbers, to the nearest bfloat16, and the least scale, rounded
// up to bfloat16, that reaches them all. A number that is not finite makes both NaN, and with them all that reads the row.
struct Row4 { uint16_t scale, centre; };
inline Row4 quantise_row4(const float* x, int64_t n, uint8_t* codes, int64_t stride) {
  V most = simd::set(-simd::kInfinity), least = simd::set(-simd::kInfinity), bad = simd::zero();
  for (int64_t d = 0; d < n; d += 16) {
    const V v = read(x + d, n - d);
    const simd::M inside = simd::lanes(0, n - d);
    most = simd::maximum(simd::select(inside, v, most), most);
    least = simd::maximum(simd::select(inside, simd::sub(simd::zero(), v), least), least);
    bad = simd::fma(v, simd::zero(), bad);
  }
  const float high = simd::largest(most), low = -simd::largest(least);
  uint16_t rounded[1];
  simd::store(rounded, simd::set(0.5f * low + 0.5f * high), 1);
  const float centre = from_bf16(rounded[0]), above = high - centre, below = centre - low;
  const float reach = (above > below ? above : below) / 15.0f + simd::sum(bad);
  uint32_t bits;
  memcpy(&bits, &reach, sizeof bits);
  const uint16_t scale = static_cast<uint16_t>((bits + 0xffffu) >> 16);
  const float step = from_bf16(scale);
  if (!(step < simd::kInfinity)) return {0x7fc0, 0x7fc0};
  const bool divides = step > 1e-38f;   // not beyond float32: then all are the code in the middle
  const V inverse = simd::set(divides ? 0.5f / step : 0.0f), middle = simd::set(centre), offset = simd::set(7.5f);
  const V magic = simd::set(12582912.0f);   // rounds, as in simd::exp
  const int64_t half = (n + 1) / 2;
  for (int64_t d = 0; d < n; d += 16) {
    const int64_t lanes = n - d < 16 ? n - d : 16;
    float shifted[16];
    const V place = simd::add(simd::mul(simd::sub(read(x + d, lanes), middle), inverse), offset);
    simd::store(shifted, simd::add(place, magic));
    for (int64_t i = 0; i < lanes; ++i) {
      uint32_t code;
      memcpy(&code, shifted + i, sizeof code);
      const int64_t at = d + i;
      if (at < half) codes[at * stride] = code & 15;
      else codes[(at - half) * stride] |= static_cast<uint8_t>((code & 15) << 4);
    }
  }
  return {scale, rounded[0]};
}

inline void write_token_int4(const AttentionArgs& a, int64_t sequence, int64_t token) {
  const int64_t size = a.kv.block_size, head_dim = a.kv.head_dim, position = a.positions[token], slot = position % size;
  const int64_t block = a.block_tables[sequence * a.table_stride + position / size], codes = a.kv.half() * size;
  const auto keep = [=](uint8_t* head, Row4 row) {
    auto* scales = reinterpret_cast<uint16_t*>(head + codes);
    scales[slot] = row.scale;
    scales[size + slot] = row.centre;
  };
  float turned[kMostInt4Features];
  for (int64_t head = 0; head < a.kv.kv_heads; ++head) {
    const int64_t offset = (block * a.kv.kv_heads + head) * a.kv.head_bytes();
    uint8_t *keys = static_cast<uint8_t*>(a.kv.keys) + offset, *values = static_cast<uint8_t*>(a.kv.values) + offset;
    memcpy(turned, a.k + token * a.k_stride + head * head_dim, static_cast<size_t>(head_dim) * sizeof(float));
    turn(turned, head_dim);
    keep(keys, quantise_row4(turned, head_dim, keys + slot, size));
    keep(values, quantise_row4(a.v + token * a.v_stride + head * head_dim, head_dim, values + slot * a.kv.half(), 1));
  }
}

// `count` packed bytes -> their low nibbles and their high ones, as odd numbers -15..15.
inline void unpack(const uint8_t* from, int64_t count, int8_t* low, int8_t* high) {
  constexpr int64_t kBytes = simd::kNibbleBytes;
  if (count < kBytes) {
    uint8_t some[kBytes] = {};
    int8_t lows[kBytes], highs[kBytes];
    memcpy(some, from, static_cast<size_t>(count));
    simd::odd_nibbles(some, lows, highs);
    memcpy(low, lows, static_cast<size_t>(count));
    memcpy(high, highs, static_cast<size_t>(count));
    return;
  }
  for (int64_t i = 0; i + kBytes <= count; i += kBytes) simd::odd_nibbles(from + i, low + i, high + i);
  const int64_t last = count - kBytes;   // may overlap with what is done
  simd::odd_nibbles(from + last, low + last, high + last);
}

inline void kv_write(const AttentionArgs& a, int64_t sequence, int64_t token) {
  switch (a.kv.kind) {
    case KvKind::f32: return write_token<float>(a, sequence, token);
    case KvKind::bf16: return write_token<uint16_t>(a, sequence, token);
    case KvKind::int8: return write_token_int8(a, sequence, token);
    case KvKind::int4: return write_token_int4(a, sequence, token);
  }
}

}  // namespace attention
}  // namespace
}  // namespace hasten
