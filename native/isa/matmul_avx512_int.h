// Integer matmul, AVX-512 VNNI. Integer sums are exact in any order; of floats there is one sequence for every row and
// token, whatever the form: total = fma(float(sum), weight_scale * activation_scale, total), group after group.
#pragma once
#include "isa/matmul_avx512_sources.h"

namespace hasten {
namespace {

// By hand, because GCC 12 copies and spills the accumulators of _mm512_dpbusd_epi32 in rolled loops.
#if defined(HASTEN_EMULATE_AVX512)
inline void dot(__m512i& sum, __m512i weights, __m512i x) { sum = _mm512_dpbusd_epi32(sum, weights, x); }
inline void dot_at(__m512i& sum, __m512i weights, const int8_t* x) { dot(sum, weights, broadcast4(x)); }
#else
inline void dot(__m512i& sum, __m512i weights, __m512i x) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(weights), "v"(x));
}

inline void dot_at(__m512i& sum, __m512i weights, const int8_t* x) {
  asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(weights), "m"(*reinterpret_cast<const int32_t(*)[1]>(x)));
}
#endif

inline __m512 half_scales(const uint16_t* scales) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(scales)));
}

// One product and how its parts are found.
struct IntMatmul {
  const Weight& w;
  const Quantised& x;
  float* out;
  int64_t out_stride;
  int32_t zero;
  int shift;                                                         // log2 of activation groups in a weight group

  IntMatmul(const Weight& w_, const Quantised& x_, float* out_, int64_t out_stride_)
      : w(w_), x(x_), out(out_), out_stride(out_stride_), zero(zero_point(w_.kind)),
        shift(__builtin_ctzll(static_cast<uint64_t>(w_.group / x_.group))) {}

  const uint16_t* scales(int64_t panel) const { return w.scales + panel * w.groups() * kPanel; }
  const uint8_t* codes(int64_t panel) const { return static_cast<const uint8_t*>(w.codes) + panel * w.panel_bytes(); }
  int64_t group_columns(int64_t g) const { return smaller(x.group, w.padded() - g * x.group); }
  int32_t start(int64_t token, int64_t g) const { return -zero * x.sums[token * x.groups + g]; }
};

// A panel straight from its codes, for T tokens: decoding reads every weight once, so this must keep up with memory.
template <class Source, int T>
void stream_panel(const IntMatmul& m, int64_t panel, int64_t token) {
  constexpr int kChains = T <= 2 ? 4 : T <= 5 ? 2 : 1;               // enough sums under way to hide the product's latency
  const Source source(m.w);
  const uint8_t* codes = m.codes(panel);
  const uint16_t* scales = m.scales(panel);
  const int64_t stride = m.x.stride;
  __m512 total[T];
  for (int t = 0; t < T; ++t) total[t] = _mm512_setzero_ps();
  for (int64_t g = 0; g < m.x.groups; ++g) {
    const int8_t* x = m.x.codes + token * stride + g * m.x.group;
    __m512i sum[kChains][T];
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) {
      sum[0][t] = _mm512_set1_epi32(m.start(token + t, g));
#pragma GCC unroll 4
      for (int chain = 1; chain < kChains; ++chain) sum[chain][t] = _mm512_setzero_si512();
    }
    for (const int8_t* end = x + m.group_columns(g); x < end; x += 8 * Source::kSteps, codes += Source::kBytes) {
      for (int64_t line = 0; line < Source::kBytes; line += 64) _mm_prefetch(codes + line + 2048, _MM_HINT_T0);
#pragma GCC unroll 4
      for (int step = 0; step < Source::kSteps; ++step) {
        __m512i low, high;
        source.load(codes, step, low, high);
#pragma GCC unroll 8
        for (int t = 0; t < T; ++t) {
          dot_at(sum[2 * step % kChains][t], low, x + t * stride + step * 8);
          dot_at(sum[(2 * step + 1) % kChains][t], high, x + t * stride + step * 8 + 4);
        }
      }
    }
    const __m512 factor = half_scales(scales + (g >> m.shift) * kPanel);
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) {
#pragma GCC unroll 4
      for (int chain = 1; chain < kChains; ++chain) sum[0][t] = _mm512_add_epi32(sum[0][t], sum[chain][t]);
      const __m512 scale = _mm512_mul_ps(factor, _mm512_set1_ps(m.x.scales[(token + t) * m.x.groups + g]));
      total[t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum[0][t]), scale, total[t]);
    }
  }
  const __mmask16 mask = row_mask(m.w, panel, panel + 1);
  for (int t = 0; t < T; ++t)
    _mm512_mask_storeu_ps(m.out + (token + t) * m.out_stride + panel * kPanel, mask, total[t]);
}

// Bytes of two panels, and what a tile of tokens needs at the start and end of a group, side by side: [groups][T].
struct Pair {
  const uint8_t* codes[2];
  int64_t panel, end;                                                // panels from `end` on are not stored
};
struct Tile {
  int64_t token;
  const int32_t* starts;
  const float* scales;
};

// Two panels for T tokens: 2 T sums in registers, totals in the nearest cache.
template <int T>
void multiply_pair(const IntMatmul& m, const Pair& pair, const Tile& tile) {
  alignas(64) float total[T][2][16];
  const int64_t stride = m.x.stride, groups = m.x.groups, group = m.x.group, padded = m.w.padded();
  const int64_t other = pair.codes[1] - pair.codes[0];
  const int shift = m.shift;
  const uint8_t* w = pair.codes[0];
  const uint16_t* scales[2] = {m.scales(pair.panel), m.scales(smaller(pair.panel + 1, pair.end - 1))};
  const int32_t* starts = tile.starts;
  const float* x_scales = tile.scales;
  // Rows 3i, 3i+1, 3i+2 as base, base + stride, base + 2 stride: four pointers reach twelve tokens.
  const int8_t* x[4];
  for (int i = 0; i < 4; ++i) x[i] = m.x.codes + (tile.token + 3 * i) * stride;
  for (int t = 0; t < T; ++t)
    for (int p = 0; p < 2; ++p) _mm512_store_ps(total[t][p], _mm512_setzero_ps());
  int64_t c = 0;
  for (int64_t g = 0; g < groups; ++g, starts += T, x_scales += T) {
    __m512i sum[T][2];
#pragma GCC unroll 12
    for (int t = 0; t < T; ++t) sum[t][0] = sum[t][1] = _mm512_set1_epi32(starts[t]);
    const int64_t last = smaller(c + group, padded);
    do {
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        const __m512i a = _mm512_loadu_si512(w + half * 64), b = _mm512_loadu_si512(w + other + half * 64);
#pragma GCC unroll 12
        for (int t = 0; t < T; ++t) {
          const __m512i four = broadcast4(x[t / 3] + t % 3 * stride + c + half * 4);
          dot(sum[t][0], a, four);
          dot(sum[t][1], b, four);
        }
      }
      w += 128;
      c += 8;
    } while (c < last);
    const __m512 factor[2] = {half_scales(scales[0] + (g >> shift) * kPanel), half_scales(scales[1] + (g >> shift) * kPanel)};
#pragma GCC unroll 12
    for (int t = 0; t < T; ++t) {
      const __m512 x_scale = _mm512_set1_ps(x_scales[t]);
#pragma GCC unroll 2
      for (int p = 0; p < 2; ++p)
        _mm512_store_ps(total[t][p], _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum[t][p]), _mm512_mul_ps(factor[p], x_scale),
                                                     _mm512_load_ps(total[t][p])));
    }
  }
  for (int p = 0; p < 2; ++p)
    for (int t = 0; t < T; ++t)
      _mm512_mask_storeu_ps(m.out + (tile.token + t) * m.out_stride + (pair.panel + p) * kPanel,
                            row_mask(m.w, pair.panel + p, pair.end), _mm512_load_ps(total[t][p]));
}

using MultiplyPair = void (*)(const IntMatmul&, const Pair&, const Tile&);
constexpr MultiplyPair kMultiplyPair[] = {multiply_pair<1>, multiply_pair<2>,  multiply_pair<3>,  multiply_pair<4>,
                                          multiply_pair<5>, multiply_pair<6>,  multiply_pair<7>,  multiply_pair<8>,
                                          multiply_pair<9>, multiply_pair<10>, multiply_pair<11>, multiply_pair<12>};
using StreamPanel = void (*)(const IntMatmul&, int64_t, int64_t);
template <class Source>
constexpr StreamPanel kStreamPanel[] = {stream_panel<Source, 1>, stream_panel<Source, 2>, stream_panel<Source, 3>,
                                        stream_panel<Source, 4>, stream_panel<Source, 5>, stream_panel<Source, 6>,
                                        stream_panel<Source, 7>, stream_panel<Source, 8>};
constexpr int64_t kStreamed = 8;                                     // up to so many tokens weights are not unpacked

template <class Source>
void unpack_panel(const IntMatmul& m, int64_t panel, uint8_t* bytes) {
  const Source source(m.w);
  const uint8_t* codes = m.codes(panel);
  for (int64_t c = 0; c < m.w.padded(); c += 8 * Source::kSteps, codes += Source::kBytes)
#pragma GCC unroll 4
    for (int step = 0; step < Source::kSteps; ++step, bytes += 128) {
      __m512i low, high;
      source.load(codes, step, low, high);
      _mm512_store_si512(bytes, low);
      _mm512_store_si512(bytes + 64, high);
    }
}

// Tokens whose activations stay in the second-level cache beside a pair of panels.
inline int64_t block_tokens(const Weight& w, int64_t tokens) {
  const int64_t most = 384 * 1024 / w.padded() / kTile * kTile;
  return smaller(tokens, most < kTile ? kTile : most);
}

// Starts and scales of `tokens` tokens from `first`, tile after tile, each [groups][tokens of the tile].
void prepare_tiles(const IntMatmul& m, int64_t first, int64_t tokens, int64_t tile, int32_t* starts, float* scales) {
  for (int64_t token = first; token < first + tokens; token += tile) {
    const int64_t count = smaller(tile, first + tokens - token);
    for (int64_t t = 0; t < count; ++t)
      for (int64_t g = 0; g < m.x.groups; ++g) {
        starts[g * count + t] = m.start(token + t, g);
        scales[g * count + t] = m.x.scales[(token + t) * m.x.groups + g];
      }
    starts += count * m.x.groups;
    scales += count * m.x.groups;
  }
}

template <class Source>
void multiply(const IntMatmul& m, int64_t tokens, int64_t panel0, int64_t panel1, std::byte* scratch) {
  if (tokens <= kStreamed) {
    for (int64_t panel = panel0; panel < panel1; ++panel) kStreamPanel<Source>[tokens - 1](m, panel, 0);
    return;
  }
  const int64_t block = block_tokens(m.w, tokens);
  uint8_t* bytes = reinterpret_cast<uint8_t*>(scratch);              // [2][padded][16]
  int32_t* starts = reinterpret_cast<int32_t*>(bytes + 2 * m.w.padded() * kPanel);
  float* scales = reinterpret_cast<float*>(starts + block * m.x.groups);
  for (int64_t first = 0; first < tokens; first += block) {
    const int64_t count = smaller(block, tokens - first), tile = tile_tokens(count);
    prepare_tiles(m, first, count, tile, starts, scales);
    for (int64_t panel = panel0; panel < panel1; panel += 2) {
      Pair pair{{}, panel, panel1};
      for (int64_t p = 0; p < 2; ++p) {
        const int64_t present = smaller(panel + p, panel1 - 1);      // a lone last panel is its own neighbour
        pair.codes[p] = bytes + p * m.w.padded() * kPanel;
        if constexpr (std::is_same_v<Source, Int8Source>) pair.codes[p] = m.codes(present);
        else unpack_panel<Source>(m, present, bytes + p * m.w.padded() * kPanel);
      }
      for (int64_t t = 0; t < count; t += tile) {
        const Tile of{first + t, starts + t * m.x.groups, scales + t * m.x.groups};
        kMultiplyPair[smaller(tile, count - t) - 1](m, pair, of);
      }
    }
  }
}

// Panels as bytes, then starts and scales at the smallest group of activations.
inline int64_t int_scratch(const Weight& w, int64_t tokens) {
  if (tokens <= kStreamed) return 0;
  return w.padded() * 2 * kPanel + block_tokens(w, tokens) * (w.padded() / kUnit) * 2 * static_cast<int64_t>(sizeof(int32_t));
}

void matmul_int(const Weight& w, const Quantised& x, int64_t tokens, int64_t panel0, int64_t panel1, float* out,
                int64_t out_stride, std::byte* scratch) {
  if (tokens == 0) return;
  const IntMatmul m(w, x, out, out_stride);
  switch (w.kind) {
    case Kind::int8: return multiply<Int8Source>(m, tokens, panel0, panel1, scratch);
    case Kind::int4: return multiply<Int4Source>(m, tokens, panel0, panel1, scratch);
    case Kind::int3: return multiply<Int3Source>(m, tokens, panel0, panel1, scratch);
    case Kind::int2: return multiply<Int2Source>(m, tokens, panel0, panel1, scratch);
    case Kind::int1: return multiply<Int1Source>(m, tokens, panel0, panel1, scratch);
    case Kind::codebook4: return multiply<CodebookSource<Int4Source>>(m, tokens, panel0, panel1, scratch);
    case Kind::codebook3: return multiply<CodebookSource<Int3Source>>(m, tokens, panel0, panel1, scratch);
    case Kind::codebook2: return multiply<CodebookSource<PlaneSource<2, 0>>>(m, tokens, panel0, panel1, scratch);
    case Kind::codebook1: return multiply<CodebookSource<PlaneSource<1, 0>>>(m, tokens, panel0, panel1, scratch);
    default:
      if (has_expand()) return multiply<SparseSource<true>>(m, tokens, panel0, panel1, scratch);
      return multiply<SparseSource<false>>(m, tokens, panel0, panel1, scratch);
  }
}

}  // namespace
}  // namespace hasten
