// Integer matmul, NEON. Integer sums are exact in any order; of floats there is one sequence for every row and token,
// whatever the form: total = fma(float(sum), weight_scale * activation_scale, total), group after group.
#pragma once
#include "isa/matmul_neon_sources.h"

namespace hasten {
namespace {

struct IntMatmul {
  const Weight& w;
  const Quantised& x;
  float* out;
  int64_t out_stride;
  int32_t zero;                                                      // of the bytes that are multiplied
};

inline float32x4_t widen_halves(const uint16_t* p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }

// One panel for T tokens. Sums of a group stay in registers; totals, touched once a group, lie in memory.
template <class Source, class Products, bool arranged, int T>
void multiply_panel(const IntMatmul& m, const uint8_t* codes, int64_t panel, int64_t token) {
  constexpr int kTokens = Products::kTokens, kSets = (T + kTokens - 1) / kTokens, kPartials = Products::kPartials;
  const Source source(m.w);
  const int64_t stride = m.x.stride, groups = m.x.groups, group = m.x.group, padded = m.w.padded();
  const int shift = __builtin_ctzll(static_cast<uint64_t>(m.w.group / group));
  const uint16_t* scales = m.w.scales + panel * m.w.groups() * kPanel;
  const int8_t* x = m.x.codes + token * stride;
  const int32_t* x_sums = m.x.sums + token * groups;
  const float* x_scales = m.x.scales + token * groups;
  const int64_t last_step = T % kTokens ? 0 : stride;                // an odd last token is multiplied beside itself
  float total[T][kPanel] = {};
  for (int64_t g = 0, c = 0; g < groups; ++g) {
    int32x4_t sum[kSets][4][kPartials];
    HASTEN_UNROLL
    for (int s = 0; s < kSets; ++s)
      HASTEN_UNROLL
      for (int quarter = 0; quarter < 4; ++quarter)
        HASTEN_UNROLL
        for (int part = 0; part < kPartials; ++part) sum[s][quarter][part] = vdupq_n_s32(0);
    for (const int64_t last = smaller(c + group, padded); c < last; c += kUnit, codes += Source::kBlock) {
      if constexpr (!arranged)
        for (int64_t ahead = 0; ahead < Source::kBlock; ahead += 64) __builtin_prefetch(codes + 1024 + ahead);
      each_pair([&]<int pair>() __attribute__((always_inline)) {
        typename Products::X activations[kSets];
        HASTEN_UNROLL
        for (int s = 0; s < kSets; ++s)
          activations[s] = Products::load(x + s * kTokens * stride + c + pair * 8, s + 1 == kSets ? last_step : stride);
        HASTEN_UNROLL
        for (int quarter = 0; quarter < 4; ++quarter) {
          Eight w = source.template load<pair>(codes, quarter);
          if constexpr (!arranged) w = Products::arrange(w);
          HASTEN_UNROLL
          for (int s = 0; s < kSets; ++s) Products::add(sum[s][quarter], w, activations[s]);
        }
      });
    }
    HASTEN_UNROLL
    for (int quarter = 0; quarter < 4; ++quarter) {
      const float32x4_t factor = widen_halves(scales + (g >> shift) * kPanel + quarter * 4);
      HASTEN_UNROLL
      for (int t = 0; t < T; ++t) {
        const int32x4_t all = Products::total(sum[t / kTokens][quarter], t % kTokens);
        const int32x4_t centred = vsubq_s32(all, vdupq_n_s32(m.zero * x_sums[t * groups + g]));
        float* at = total[t] + quarter * 4;
        vst1q_f32(at, vfmaq_f32(vld1q_f32(at), vcvtq_f32_s32(centred), vmulq_n_f32(factor, x_scales[t * groups + g])));
      }
    }
  }
  const int64_t rows = smaller(kPanel, m.w.rows - panel * kPanel);
  for (int t = 0; t < T; ++t)
    std::memcpy(m.out + (token + t) * m.out_stride + panel * kPanel, total[t], static_cast<size_t>(rows) * sizeof(float));
}

// Arranged bytes are in the form of ManyTokens; one token alone takes weights as they come.
using MultiplyPanel = void (*)(const IntMatmul&, const uint8_t*, int64_t, int64_t);
template <class Source, bool arranged, int T>
constexpr MultiplyPanel form() {
  if constexpr (T == 1 && !arranged) return multiply_panel<Source, OneToken, false, 1>;
  else if constexpr (T <= ManyTokens::kTile) return multiply_panel<Source, ManyTokens, arranged, T>;
  else return nullptr;
}
template <class S, bool arranged>
constexpr MultiplyPanel kMultiplyPanel[] = {form<S, arranged, 1>(), form<S, arranged, 2>(), form<S, arranged, 3>(),
                                            form<S, arranged, 4>(), form<S, arranged, 5>(), form<S, arranged, 6>()};

// Every tile of tokens against one panel's arranged bytes.
inline void multiply_arranged(const IntMatmul& m, const uint8_t* bytes, int64_t panel, int64_t tokens) {
  constexpr int64_t kTile = ManyTokens::kTile;
  for (int64_t token = 0; token < tokens; token += kTile)
    kMultiplyPanel<UnpackedSource, true>[smaller(kTile, tokens - token) - 1](m, bytes, panel, token);
}

template <class Source>
void multiply(const Weight& w, const Quantised& x, int64_t tokens, int64_t panel0, int64_t panel1, float* out,
              int64_t out_stride, std::byte* scratch) {
  const IntMatmul m{w, x, out, out_stride, Source::kZero};
  const int64_t stride = w.padded() / kUnit * Source::kBlock;
  uint8_t* bytes = reinterpret_cast<uint8_t*>(scratch);
  for (int64_t panel = panel0; panel < panel1; ++panel) {
    if (tokens <= ManyTokens::kTile) {
      const uint8_t* codes = static_cast<const uint8_t*>(w.codes) + panel * stride;
      kMultiplyPanel<Source, false>[tokens - 1](m, codes, panel, 0);
      continue;
    }
    unpack_panel<Source>(w, panel, bytes);
    multiply_arranged(m, bytes, panel, tokens);
  }
}

void multiply_plain(const Weight& w, const Quantised& x, int64_t tokens, int64_t panel0, int64_t panel1, float* out,
                    int64_t out_stride, std::byte* scratch) {
  const IntMatmul m{w, x, out, out_stride, 0};
  uint8_t* bytes = reinterpret_cast<uint8_t*>(scratch);
  for (int64_t panel = panel0; panel < panel1; ++panel) {
    unpack_plain(w, panel, bytes);
    multiply_arranged(m, bytes, panel, tokens);
  }
}

// Of kinds without a source, panels are unpacked for one token too.
inline bool has_source(Kind kind) { return kind == Kind::int8 || kind == Kind::int4 || kind == Kind::codebook4; }

inline int64_t int_scratch(const Weight& w, int64_t tokens) {
  return has_source(w.kind) && tokens <= ManyTokens::kTile ? 0 : w.padded() * kPanel;
}

void matmul_int(const Weight& w, const Quantised& x, int64_t tokens, int64_t panel0, int64_t panel1, float* out,
                int64_t out_stride, std::byte* scratch) {
  if (tokens == 0) return;
  switch (w.kind) {
    case Kind::int8: return multiply<Int8Source>(w, x, tokens, panel0, panel1, out, out_stride, scratch);
    case Kind::int4: return multiply<GridSource<Plane<4>, 8>>(w, x, tokens, panel0, panel1, out, out_stride, scratch);
    case Kind::codebook4: return multiply<CodebookSource<Plane<4>>>(w, x, tokens, panel0, panel1, out, out_stride, scratch);
    default: return multiply_plain(w, x, tokens, panel0, panel1, out, out_stride, scratch);
  }
}

}  // namespace
}  // namespace hasten
