// Tests must be seen to fail: each entry of the table is spoilt in turn, as little as a real mistake might, and the
// test of that entry has to notice.
#include "check.h"

namespace hasten::test {
namespace {

const Kernels* sound = nullptr;                                      // what the spoilt entries call

void nudge(float& value) { value = value == 0 ? 1e-5f : value * (1 + 1e-5f); }

struct Fault {
  const char* what;
  void (*plant)(Kernels& k);
  void (*test)(const Kernels& k);
};

const Fault kFaults[] = {
    {"a rounded code is off by one", [](Kernels& k) {
       k.quantise = [](const float* x, int64_t n, int64_t group, int8_t* codes, float* scales, int32_t* sums) {
         sound->quantise(x, n, group, codes, scales, sums);
         if (n > 40) codes[40] = static_cast<int8_t>(codes[40] > 0 ? codes[40] - 1 : codes[40] + 1);
       };
     }, test_quantise},
    {"bfloat16 is cut off, not rounded", [](Kernels& k) {
       k.to_bf16 = [](const float* x, int64_t n, uint16_t* out) {
         sound->to_bf16(x, n, out);
         for (int64_t i = 0; i < n; ++i) out[i] = static_cast<uint16_t>(float_as_bits(x[i]) >> 16);
       };
     }, test_quantise},
    {"an integer product is one too many", [](Kernels& k) {
       k.matmul_int = [](const Weight& w, const Quantised& x, int64_t tokens, int64_t first, int64_t last, float* out,
                         int64_t stride, std::byte* scratch) {
         sound->matmul_int(w, x, tokens, first, last, out, stride, scratch);
         if (last == w.panels() && first < last && tokens > 0) out[(tokens - 1) * stride + w.rows - 1] += 1;
       };
     }, test_matmul_int},
    {"an integer matmul writes one row too many", [](Kernels& k) {
       k.matmul_int = [](const Weight& w, const Quantised& x, int64_t tokens, int64_t first, int64_t last, float* out,
                         int64_t stride, std::byte* scratch) {
         sound->matmul_int(w, x, tokens, first, last, out, stride, scratch);
         if (last == w.panels() && first < last) out[w.rows] = 0;
       };
     }, test_matmul_int},
    {"an integer matmul's last bit depends on the tokens beside it", [](Kernels& k) {
       k.matmul_int = [](const Weight& w, const Quantised& x, int64_t tokens, int64_t first, int64_t last, float* out,
                         int64_t stride, std::byte* scratch) {
         sound->matmul_int(w, x, tokens, first, last, out, stride, scratch);
         const bool whole = w.scales[0] == 0x3c00;                   // leave exact sums alone
         if (tokens > 6 && first < last && !whole) out[first * 16] = std::nextafterf(out[first * 16], HUGE_VALF);
       };
     }, test_matmul_int},
    {"a float matmul loses digits", [](Kernels& k) {
       k.matmul_float = [](const Weight& w, const void* x, int64_t x_stride, int64_t tokens, int64_t first,
                           int64_t last, float* out, int64_t stride, std::byte* scratch) {
         sound->matmul_float(w, x, x_stride, tokens, first, last, out, stride, scratch);
         for (int64_t t = 0; t < tokens; ++t)
           for (int64_t row = first * 16; row < w.rows && row < last * 16; ++row)
             out[t * stride + row] = static_cast<float>(bf16_value(nearest_bf16(out[t * stride + row])));
       };
     }, test_matmul_float},
    {"a decoded row is shifted", [](Kernels& k) {
       k.decode_row = [](const Weight& w, int64_t row, float* out) {
         sound->decode_row(w, row, out);
         if (w.columns > 1) out[0] = out[1];
       };
     }, test_matmul_float},
    {"a norm forgets an element", [](Kernels& k) {
       k.norm = [](NormKind kind, const float* x, int64_t n, const float* weight, const float* bias, float eps,
                   float* out) {
         sound->norm(kind, x, n, weight, bias, eps, out);
         nudge(out[n - 1]);
       };
     }, test_rows},
    {"rope turns the wrong way", [](Kernels& k) {
       k.rope = [](float* x, int64_t heads, int64_t head_dim, int64_t rotary, const float* cosine, const float*) {
         sound->rope(x, heads, head_dim, rotary, cosine, cosine);
       };
     }, test_rows},
    {"an activation is off in the fifth digit", [](Kernels& k) {
       k.activation = [](ActivationKind kind, const float* x, int64_t n, float* out) {
         sound->activation(kind, x, n, out);
         if (kind == ActivationKind::silu) nudge(out[n - 1]);
       };
     }, test_rows},
    {"a gate ignores its factor", [](Kernels& k) {
       k.gate = [](ActivationKind kind, const float* gate, const float*, int64_t n, float* out) {
         sound->activation(kind, gate, n, out);
       };
     }, test_rows},
    {"a sum is a product", [](Kernels& k) { k.add = sound->multiply; }, test_rows},
    {"a product is a sum", [](Kernels& k) { k.multiply = sound->add; }, test_rows},
    {"a scale is forgotten past sixteen", [](Kernels& k) {
       k.scale = [](const float* a, float factor, int64_t n, float* out) {
         std::memmove(out, a, static_cast<size_t>(n) * sizeof(float));
         sound->scale(a, factor, n < 16 ? n : 16, out);
       };
     }, test_rows},
    {"a soft cap is a scale", [](Kernels& k) {
       k.softcap = [](const float* a, float, int64_t n, float* out) { sound->scale(a, 1, n, out); };
     }, test_rows},
    {"a key is written twice", [](Kernels& k) {
       k.kv_write = [](const AttentionArgs& a, int64_t sequence, int64_t token) {
         sound->kv_write(a, sequence, token > 0 ? token - 1 : token);
       };
     }, test_attention},
    {"attention is off in the fourth digit", [](Kernels& k) {
       k.attend = [](const AttentionArgs& a, int64_t sequence, int64_t head, int64_t token0, int64_t token1,
                     std::byte* scratch) {
         AttentionArgs other = a;
         other.scale *= 1.0003f;
         sound->attend(other, sequence, head, token0, token1, scratch);
       };
     }, test_attention},
    {"attention depends on the queries beside it", [](Kernels& k) {
       k.attend = [](const AttentionArgs& a, int64_t sequence, int64_t head, int64_t token0, int64_t token1,
                     std::byte* scratch) {
         sound->attend(a, sequence, head, token0, token1, scratch);
         float& value = a.out[token0 * a.out_stride + head * (a.heads / a.kv.kv_heads) * a.kv.head_dim];
         if (token1 - token0 > 1) value = std::nextafterf(value, HUGE_VALF);
       };
     }, test_attention},
    {"a span of keys is off in the fourth digit", [](Kernels& k) {
       k.attend_span = [](const AttentionArgs& a, int64_t sequence, int64_t head, int64_t token0, int64_t token1,
                          int64_t span, float* partial, std::byte* scratch) {
         AttentionArgs other = a;
         other.scale *= 1.0003f;
         sound->attend_span(other, sequence, head, token0, token1, span, partial, scratch);
       };
     }, test_attention},
    {"the spans of keys are joined from the first one alone", [](Kernels& k) {
       k.attend_join = [](const AttentionArgs& a, int64_t sequence, int64_t head, int64_t token0, int64_t token1,
                          const float* partials, int64_t, std::byte* scratch) {
         sound->attend_join(a, sequence, head, token0, token1, partials, 0, scratch);
       };
     }, test_attention},
    {"a log of a sum is off in the sixth digit", [](Kernels& k) {
       k.logsumexp = [](const float* x, int64_t n) { return sound->logsumexp(x, n) * (1 + 1e-6); };
     }, test_vocabulary},
    {"a divergence is the other way round", [](Kernels& k) {
       k.divergence = [](const float* p, const float* q, int64_t n) { return sound->divergence(q, p, n); };
     }, test_vocabulary},
    {"the last of equals wins", [](Kernels& k) {
       k.argmax = [](const float* x, int64_t n) {
         int64_t best = sound->argmax(x, n);
         for (int64_t i = best; i < n; ++i)
           if (x[i] == x[best]) best = i;
         return best;
       };
     }, test_vocabulary},
    {"a mass is off in the fourth digit", [](Kernels& k) {
       k.masses = [](const float* x, float top, float factor, int64_t n, float* out) {
         sound->masses(x, top, factor * 1.0001f, n, out);
       };
     }, test_vocabulary},
    {"a feature's code is off by one", [](Kernels& k) {
       k.outer_pack = [](const OuterPackArgs& a) {
         sound->outer_pack(a);
         if (a.codes != nullptr) a.codes[0] = static_cast<int16_t>(a.codes[0] > 0 ? a.codes[0] - 1 : a.codes[0] + 1);
       };
     }, test_outer},
    {"a sum of squares is off in the sixth digit", [](Kernels& k) {
       k.outer_pack = [](const OuterPackArgs& a) {
         sound->outer_pack(a);
         a.squares[a.columns - 1] *= 1 + 1e-6;
       };
     }, test_outer},
    {"a sum of outer products is off in the fifth digit", [](Kernels& k) {
       k.outer_add = [](const OuterAddArgs& a) {
         sound->outer_add(a);
         nudge(a.into[(a.panel1 - 1) * 16 * (a.columns + 1)]);
       };
     }, test_outer},
    {"outer products of one panel too many are added", [](Kernels& k) {
       k.outer_add = [](const OuterAddArgs& a) {
         OuterAddArgs other = a;
         if (a.panel1 * 16 < a.columns) ++other.panel1;
         sound->outer_add(other);
       };
     }, test_outer},
    {"a product of levels is off in the fourth digit", [](Kernels& k) {
       k.level_products = [](const LevelProductsArgs& a) {
         sound->level_products(a);
         a.left[0] *= 1.0003f;
       };
     }, test_compress},
    {"a solution is off in the ninth digit", [](Kernels& k) {
       k.solve_positive = [](int64_t n, double* matrix, double* right) {
         const bool solved = sound->solve_positive(n, matrix, right);
         right[n - 1] *= 1 + 1e-9;
         return solved;
       };
     }, test_compress},
    {"a matrix that is not positive definite is taken", [](Kernels& k) {
       k.solve_positive = [](int64_t n, double* matrix, double* right) {
         sound->solve_positive(n, matrix, right);
         return true;
       };
     }, test_compress},
    {"a sweep keeps what is pruned", [](Kernels& k) {
       k.sweep = [](const SweepArgs& a) {
         SweepArgs other = a;
         other.kept = nullptr;
         sound->sweep(other);
       };
     }, test_compress},
    {"a sweep forgets what was lost", [](Kernels& k) {
       k.sweep = [](const SweepArgs& a) {
         const std::vector<float> none(static_cast<size_t>(a.columns * a.columns));
         SweepArgs other = a;
         other.ahead = none.data();
         sound->sweep(other);
       };
     }, test_compress},
};

}  // namespace

void test_that_faults_are_noticed(const Kernels& k) {
  const int before = failures;
  sound = &k;
  quiet = true;
  std::vector<const char*> missed;
  for (const Fault& fault : kFaults) {
    Kernels spoilt = k;
    fault.plant(spoilt);
    failures = 0;
    fault.test(spoilt);
    if (failures == 0) missed.push_back(fault.what);
  }
  quiet = false;
  failures = before;
  for (const char* what : missed) expect(false, "no test notices that %s", what);
  std::printf("%s: %zu of %zu planted faults noticed\n", k.name, std::size(kFaults) - missed.size(),
              std::size(kFaults));
}

}  // namespace hasten::test
