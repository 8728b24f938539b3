// Norms, rope, elementwise kernels and reductions over a vocabulary against float64 formulas.
#include <algorithm>
#include <functional>

#include "check.h"

namespace hasten::test {
namespace {

constexpr int64_t kSizes[] = {1, 7, 15, 16, 17, 31, 48, 63, 64, 65, 100, 172, 257};

using Formula = double (*)(double);
struct Activation { ActivationKind kind; const char* name; Formula formula; };
const Activation kActivations[] = {
    {ActivationKind::none, "none", [](double x) { return x; }},
    {ActivationKind::silu, "silu", [](double x) { return x / (1 + std::exp(-x)); }},
    {ActivationKind::gelu, "gelu", [](double x) { return x * 0.5 * std::erfc(-x / std::sqrt(2.0)); }},
    {ActivationKind::gelu_tanh, "gelu_tanh", [](double x) {
       return 0.5 * x * (1 + std::tanh(std::sqrt(2 / 3.14159265358979323846) * (x + 0.044715 * x * x * x)));
     }},
    {ActivationKind::relu, "relu", [](double x) { return x > 0 ? x : 0; }},
    {ActivationKind::tanh, "tanh", [](double x) { return std::tanh(x); }},
    {ActivationKind::sigmoid, "sigmoid", [](double x) { return 1 / (1 + std::exp(-x)); }},
};

bool near(double found, double wanted, double relative, double absolute) {
  return std::fabs(found - wanted) <= absolute + relative * std::fabs(wanted);
}

// Runs `kernel(out)` into guarded memory and compares with the formula of each element.
void check_row(const char* name, int64_t n, int64_t offset, const std::function<void(float*)>& kernel,
               const std::function<double(int64_t)>& formula, double relative, double absolute) {
  Guarded<float> out(n, offset * 4);
  kernel(out.data());
  expect(out.intact(), "%s of %d wrote outside its output", name, static_cast<int>(n));
  for (int64_t i = 0; i < n; ++i)
    if (!expect(near(out[i], formula(i), relative, absolute), "%s of %d: element %d is %.9g, the formula gives %.9g",
                name, static_cast<int>(n), static_cast<int>(i), static_cast<double>(out[i]), formula(i)))
      return;
}

void check_norm(const Kernels& k, NormKind kind, int64_t n, int64_t offset) {
  const char* name = kind == NormKind::rms ? "rms norm" : "layer norm";
  Random random(static_cast<uint64_t>(n));
  std::vector<float> values = random.normals(n, 5);
  for (float& value : values) value += 2;
  const Exact<float> x(values, offset * 4), weight(random.normals(n), 4), bias(random.normals(n), 8);
  double mean = 0, square = 0;
  for (int64_t i = 0; kind == NormKind::layer && i < n; ++i) mean += x[i] / static_cast<double>(n);
  for (int64_t i = 0; i < n; ++i) square += (x[i] - mean) * (x[i] - mean) / static_cast<double>(n);
  const auto plain = [&](int64_t i) { return (x[i] - mean) / std::sqrt(square + 1e-5); };
  check_row(name, n, offset, [&](float* out) { k.norm(kind, x.data(), n, weight.data(), bias.data(), 1e-5f, out); },
            [&](int64_t i) { return plain(i) * weight[i] + bias[i]; }, 3e-6, 3e-6);
  check_row(name, n, offset, [&](float* out) { k.norm(kind, x.data(), n, nullptr, nullptr, 1e-5f, out); }, plain,
            3e-6, 3e-6);
  check_row(name, n, offset, [&](float* out) {                       // in place
    std::copy(values.begin(), values.end(), out);
    k.norm(kind, out, n, weight.data(), nullptr, 1e-5f, out);
  }, [&](int64_t i) { return plain(i) * weight[i]; }, 3e-6, 3e-6);
}

// The same numbers anywhere in memory give the same bits.
void check_alignment(const Kernels& k) {
  Random random(3);
  const std::vector<float> values = random.normals(157), weight = random.normals(157);
  std::vector<float> norm(157), silu(157), moved(157);
  k.norm(NormKind::rms, values.data(), 157, weight.data(), nullptr, 1e-6f, norm.data());
  k.activation(ActivationKind::silu, values.data(), 157, silu.data());
  const double total = k.logsumexp(values.data(), 157);
  for (int64_t offset = 0; offset < 64; offset += 4) {
    const Exact<float> x(values, offset);
    k.norm(NormKind::rms, x.data(), 157, weight.data(), nullptr, 1e-6f, moved.data());
    expect(same_bits(moved.data(), norm.data(), 157), "norm: other bits %d bytes past a cache line",
           static_cast<int>(offset));
    k.activation(ActivationKind::silu, x.data() + 3, 154, moved.data());
    expect(same_bits(moved.data(), silu.data() + 3, 154), "silu: other bits %d bytes past a cache line",
           static_cast<int>(offset));
    expect(k.logsumexp(x.data(), 157) == total, "logsumexp: other bits %d bytes past a cache line",
           static_cast<int>(offset));
  }
}

void check_rope(const Kernels& k, int64_t heads, int64_t head_dim, int64_t rotary) {
  Random random(static_cast<uint64_t>(head_dim + rotary));
  const int64_t half = rotary / 2;
  const std::vector<float> x = random.normals(heads * head_dim);
  Exact<float> cosine(half, 4), sine(half, 8);
  for (int64_t i = 0; i < half; ++i) {
    const double angle = 6 * random.uniform() - 3;
    cosine[i] = static_cast<float>(std::cos(angle));
    sine[i] = static_cast<float>(std::sin(angle));
  }
  check_row("rope", heads * head_dim, 1, [&](float* out) {
    std::copy(x.begin(), x.end(), out);
    k.rope(out, heads, head_dim, rotary, cosine.data(), sine.data());
  }, [&](int64_t i) -> double {
    const int64_t feature = i % head_dim, pair = feature % (half == 0 ? 1 : half);
    const auto at = [&](int64_t step) { return static_cast<double>(x[static_cast<size_t>(i + step)]); };
    if (feature >= rotary) return at(0);
    if (feature < half) return at(0) * cosine[pair] - at(half) * sine[pair];
    return at(0) * cosine[pair] + at(-half) * sine[pair];
  }, 1e-6, 1e-6);
}

void check_elementwise(const Kernels& k, int64_t n, int64_t offset) {
  Random random(static_cast<uint64_t>(n + 9));
  const Exact<float> a(random.normals(n, 3), offset * 4), b(random.normals(n), 12);
  const auto check = [&](const char* name, const auto& kernel, const auto& formula, double relative) {
    check_row(name, n, offset, kernel, formula, relative, 1e-6);
  };
  check("add", [&](float* out) { k.add(a.data(), b.data(), n, out); }, [&](int64_t i) { return double{a[i]} + b[i]; },
        1e-6);
  check("multiply", [&](float* out) { k.multiply(a.data(), b.data(), n, out); },
        [&](int64_t i) { return double{a[i]} * b[i]; }, 1e-6);
  check("scale", [&](float* out) { k.scale(a.data(), 0.37f, n, out); },
        [&](int64_t i) { return double{a[i]} * 0.37f; }, 1e-6);
  check("softcap", [&](float* out) { k.softcap(a.data(), 2.5f, n, out); },
        [&](int64_t i) { return 2.5 * std::tanh(a[i] / 2.5); }, 2e-6);
  for (const Activation& act : kActivations) {
    check(act.name, [&](float* out) { k.gate(act.kind, a.data(), b.data(), n, out); },
          [&](int64_t i) { return act.formula(a[i]) * b[i]; }, 3e-6);
    check(act.name, [&](float* out) { k.activation(act.kind, a.data(), n, out); },
          [&](int64_t i) { return act.formula(a[i]); }, 3e-6);
  }
}

// Far into the tails, where e^-450 carries its argument's rounding.
void check_tails(const Kernels& k) {
  std::vector<float> x;
  for (int i = -3000; i <= 3000; i += 7) x.push_back(static_cast<float>(i) * 0.01f);
  for (int i = -50; i <= 50; ++i) x.push_back(static_cast<float>(i) * 0.014f);
  const int64_t n = static_cast<int64_t>(x.size());
  for (const Activation& act : kActivations) {
    const bool gaussian = act.kind == ActivationKind::gelu || act.kind == ActivationKind::gelu_tanh;
    check_row(act.name, n, 1, [&](float* out) { k.activation(act.kind, x.data(), n, out); },
              [&](int64_t i) { return act.formula(x[static_cast<size_t>(i)]); }, gaussian ? 2e-4 : 4e-6, 1e-6);
  }
  const float ends[] = {-INFINITY, -1000, 1000, INFINITY, NAN};
  float out[5];
  k.activation(ActivationKind::sigmoid, ends, 5, out);
  expect(out[0] == 0 && out[1] == 0 && out[2] == 1 && out[3] == 1 && std::isnan(out[4]),
         "sigmoid of infinities and NaN");
  k.activation(ActivationKind::tanh, ends, 5, out);
  expect(out[0] == -1 && out[1] == -1 && out[2] == 1 && out[3] == 1 && std::isnan(out[4]),
         "tanh of infinities and NaN");
}

// --- over a vocabulary

double log_sum(const std::vector<float>& x) {
  double most = -HUGE_VAL, sum = 0;
  for (const float value : x) most = std::max(most, static_cast<double>(value));
  for (const float value : x) sum += std::exp(value - most);
  return most + std::log(sum);
}

void check_logsumexp(const Kernels& k, int64_t n) {
  Random random(static_cast<uint64_t>(n + 5));
  std::vector<float> x = random.normals(n, 4);
  expect(near(k.logsumexp(Exact<float>(x, 4).data(), n), log_sum(x), 2e-7, 2e-7), "logsumexp of %d",
         static_cast<int>(n));
  for (int64_t i = 0; i + 1 < n; i += 3) x[static_cast<size_t>(i)] = -INFINITY;
  expect(near(k.logsumexp(x.data(), n), log_sum(x), 2e-7, 2e-7), "logsumexp of %d with -infinity", static_cast<int>(n));
  const std::vector<float> nothing(static_cast<size_t>(n), -INFINITY);
  expect(k.logsumexp(nothing.data(), n) == -HUGE_VAL, "logsumexp of %d times -infinity", static_cast<int>(n));
}

void check_divergence(const Kernels& k, int64_t n) {
  Random random(static_cast<uint64_t>(n + 6));
  std::vector<float> p = random.normals(n, 3), q = random.normals(n, 3);
  for (float& value : q) value += 7;
  const double p_sum = log_sum(p), q_sum = log_sum(q);
  double kl = 0;
  for (size_t i = 0; i < p.size(); ++i) kl += std::exp(p[i] - p_sum) * (p[i] - p_sum - (q[i] - q_sum));
  expect(near(k.divergence(Exact<float>(p, 4).data(), Exact<float>(q, 8).data(), n), kl, 1e-4, 2e-7),
         "divergence of %d: not %.9g", static_cast<int>(n), kl);
  expect(k.divergence(p.data(), p.data(), n) == 0, "divergence of %d from itself", static_cast<int>(n));
  p.push_back(-INFINITY);
  q.push_back(-INFINITY);
  expect(near(k.divergence(p.data(), q.data(), n + 1), kl, 1e-4, 2e-7), "divergence of %d with what neither says",
         static_cast<int>(n));
  p.back() = 1;
  expect(k.divergence(p.data(), q.data(), n + 1) == HUGE_VAL, "divergence of %d from what says never",
         static_cast<int>(n));
}

void check_masses(const Kernels& k, int64_t n) {
  Random random(static_cast<uint64_t>(n + 9));
  const std::vector<float> x = random.normals(n, 9);
  const float top = *std::max_element(x.begin(), x.end()), factor = 1.25f;
  Guarded<float> out(n, 4);
  k.masses(Exact<float>(x, 8).data(), top, factor, n, out.data());
  expect(out.intact(), "masses of %d: written outside", static_cast<int>(n));
  for (int64_t i = 0; i < n; ++i) {
    const double wanted = std::exp((static_cast<double>(x[static_cast<size_t>(i)]) - top) * factor);
    if (!expect(near(out[i], wanted, 2e-5, 1e-37), "mass %d of %d is %g, not %g", static_cast<int>(i),
                static_cast<int>(n), static_cast<double>(out[i]), wanted))
      return;
  }
}

void check_argmax(const Kernels& k, int64_t n) {
  Random random(static_cast<uint64_t>(n + 8));
  std::vector<float> x(static_cast<size_t>(n));
  const auto wanted = [&] { return std::max_element(x.begin(), x.end()) - x.begin(); };   // the first among equals
  for (int round = 0; round < 8; ++round) {
    for (float& value : x) value = static_cast<float>(random.below(11));
    expect(k.argmax(Exact<float>(x, 4).data(), n) == wanted(), "argmax of %d among equals", static_cast<int>(n));
  }
  std::fill(x.begin(), x.end(), -INFINITY);
  x[static_cast<size_t>(n / 2)] = -1e30f;
  expect(k.argmax(x.data(), n) == n / 2, "argmax of %d among -infinity", static_cast<int>(n));
  if (n > 1) x[static_cast<size_t>(n / 2 - 1)] = NAN;
  expect(k.argmax(x.data(), n) == n / 2, "argmax of %d: NaN wins", static_cast<int>(n));
}

}  // namespace

void test_rows(const Kernels& k) {
  for (const int64_t n : kSizes) {
    for (const NormKind kind : {NormKind::rms, NormKind::layer}) check_norm(k, kind, n, n % 5);
    check_elementwise(k, n, n % 7);
  }
  for (const auto& [head_dim, rotary] : {std::pair<int64_t, int64_t>{8, 8}, {64, 64}, {80, 32}, {36, 18}, {96, 6}})
    check_rope(k, 3, head_dim, rotary);
  check_alignment(k);
  check_tails(k);
}

void test_vocabulary(const Kernels& k) {
  for (const int64_t n : kSizes) {
    check_logsumexp(k, n);
    check_divergence(k, n);
    check_argmax(k, n);
    check_masses(k, n);
  }
  check_logsumexp(k, 5003);
  check_divergence(k, 5003);
}

}  // namespace hasten::test
