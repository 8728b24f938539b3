// The kernels of isa/ops.h and the sampler, by name of the instruction set, for tests. Arrays are C-contiguous float32;
// results are new arrays. Sizes are the tests' business.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include <algorithm>
#include <limits>
#include <memory>
#include <stdexcept>
#include <vector>

#include "isa/dispatch.h"
#include "ops/sample.h"

namespace nb = nanobind;
using namespace hasten;

namespace {

template <class T>
using Array = nb::ndarray<T, nb::c_contig, nb::device::cpu>;
using Floats = Array<const float>;
using Ints = Array<const int32_t>;
template <class T>
using Result = nb::ndarray<nb::numpy, T, nb::c_contig>;

template <class T>
Result<T> make(std::initializer_list<size_t> shape) {
  size_t count = 1;
  for (size_t n : shape) count *= n;
  T* data = new T[count]();
  return Result<T>(data, shape, nb::capsule(data, [](void* p) noexcept { delete[] static_cast<T*>(p); }));
}

const Kernels& table(const std::string& isa) {
  const Kernels* found = kernels_for(isa);
  if (found == nullptr) throw std::invalid_argument("instruction set '" + isa + "' is not available here");
  return *found;
}

ActivationKind activation_kind(const std::string& name) {
  const char* const names[] = {"none", "silu", "gelu", "gelu_tanh", "relu", "tanh", "sigmoid"};
  for (size_t i = 0; i < std::size(names); ++i)
    if (name == names[i]) return static_cast<ActivationKind>(i);
  throw std::invalid_argument("unknown activation '" + name + "'");
}

Result<float> norm(const std::string& isa, const std::string& kind, Floats x, std::optional<Floats> weight,
                   std::optional<Floats> bias, float eps) {
  const size_t rows = x.shape(0), n = x.shape(1);
  auto out = make<float>({rows, n});
  const NormKind k = kind == "layer" ? NormKind::layer : NormKind::rms;
  for (size_t r = 0; r < rows; ++r)
    table(isa).norm(k, x.data() + r * n, static_cast<int64_t>(n), weight ? weight->data() : nullptr,
                    bias ? bias->data() : nullptr, eps, out.data() + r * n);
  return out;
}

// x [heads, head_dim], cosine and sine [rotary / 2]
Result<float> rope(const std::string& isa, Floats x, Floats cosine, Floats sine) {
  auto out = make<float>({x.shape(0), x.shape(1)});
  std::copy_n(x.data(), x.size(), out.data());
  table(isa).rope(out.data(), static_cast<int64_t>(x.shape(0)), static_cast<int64_t>(x.shape(1)),
                  2 * static_cast<int64_t>(cosine.size()), cosine.data(), sine.data());
  return out;
}

Result<float> activation(const std::string& isa, const std::string& kind, Floats x) {
  auto out = make<float>({x.size()});
  table(isa).activation(activation_kind(kind), x.data(), static_cast<int64_t>(x.size()), out.data());
  return out;
}

// "add", "multiply" of two arrays; "scale", "softcap" of an array and factor; else gate(a) * b of that activation.
Result<float> elementwise(const std::string& isa, const std::string& op, Floats a, std::optional<Floats> b, float factor) {
  const Kernels& k = table(isa);
  const auto n = static_cast<int64_t>(a.size());
  auto out = make<float>({a.size()});
  if (op == "scale") k.scale(a.data(), factor, n, out.data());
  else if (op == "softcap") k.softcap(a.data(), factor, n, out.data());
  else if (!b) throw std::invalid_argument("'" + op + "' takes two arrays");
  else if (op == "add") k.add(a.data(), b->data(), n, out.data());
  else if (op == "multiply") k.multiply(a.data(), b->data(), n, out.data());
  else k.gate(activation_kind(op), a.data(), b->data(), n, out.data());
  return out;
}

double logsumexp(const std::string& isa, Floats x) { return table(isa).logsumexp(x.data(), static_cast<int64_t>(x.size())); }
int64_t argmax(const std::string& isa, Floats x) { return table(isa).argmax(x.data(), static_cast<int64_t>(x.size())); }
double divergence(const std::string& isa, Floats p, Floats q) {
  return table(isa).divergence(p.data(), q.data(), static_cast<int64_t>(p.size()));
}

// One tile of queries over each span of keys by itself, then the join, as threads do it that share a long context.
void attend_in_spans(const Kernels& kernels, const AttentionArgs& a, int64_t sequence, int64_t head, int64_t first, int64_t last,
                     std::byte* scratch) {
  const int64_t keys = span_blocks(a.kv.block_size) * a.kv.block_size;
  const int64_t begin = a.seen(sequence, first).begin / keys, end = (a.seen(sequence, last - 1).end - 1) / keys + 1;
  const int64_t size = partial_floats((last - first) * (a.heads / a.kv.kv_heads), a.kv.head_dim);
  std::vector<float> partials(static_cast<size_t>((end - begin) * size));
  for (int64_t span = end - 1; span >= begin; --span)
    kernels.attend_span(a, sequence, head, first, last, span, partials.data() + (span - begin) * size, scratch);
  kernels.attend_join(a, sequence, head, first, last, partials.data(), size, scratch);
}

// Writes every row's keys and values into the cache (in place, bytes as native/core.h lays them out in format `kv`) and attends
// `query_tile` rows of a sequence at a time, whole or `in_spans`. q [tokens, heads, head_dim]; k, v [tokens, kv_heads,
// head_dim]; keys, values [blocks, kv_heads, bytes of a head in a block]; tables [sequences, blocks of one].
Result<float> attention(const std::string& isa, const std::string& kv, int64_t block_size, Floats q, Floats k, Floats v,
                        Array<uint8_t> keys, Array<uint8_t> values, Ints positions, Ints starts, Ints tables, float scale,
                        float softcap, int64_t window, bool causal, int64_t query_tile, bool in_spans) {
  const Kernels& kernels = table(isa);
  const auto heads = static_cast<int64_t>(q.shape(1)), head_dim = static_cast<int64_t>(q.shape(2));
  const auto kv_heads = static_cast<int64_t>(k.shape(1));
  auto out = make<float>({q.shape(0), q.shape(1), q.shape(2)});
  AttentionArgs a{};
  a.kv = {kv_kind(kv), keys.data(), values.data(), kv_heads, head_dim, block_size};
  if (static_cast<int64_t>(keys.shape(2)) != a.kv.head_bytes()) throw std::invalid_argument("the cache has another size");
  a.q = q.data();
  a.k = k.data();
  a.v = v.data();
  a.out = out.data();
  a.q_stride = a.out_stride = heads * head_dim;
  a.k_stride = a.v_stride = kv_heads * head_dim;
  a.heads = heads;
  a.scale = scale;
  a.softcap = softcap;
  a.window = window;
  a.causal = causal;
  a.positions = positions.data();
  a.starts = starts.data();
  a.block_tables = tables.data();
  a.table_stride = static_cast<int64_t>(tables.shape(1));
  std::vector<std::byte> storage(static_cast<size_t>(kernels.attend_scratch(a, query_tile)) + kAlign, std::byte{0xff});
  void* scratch = storage.data();
  size_t space = storage.size();
  std::align(kAlign, space - kAlign, scratch, space);
  for (int64_t s = 0; s + 1 < static_cast<int64_t>(starts.size()); ++s) {
    const int64_t begin = a.starts[s], end = a.starts[s + 1];
    for (int64_t t = begin; t < end; ++t) kernels.kv_write(a, s, t);
    for (int64_t head = 0; head < kv_heads; ++head)
      for (int64_t t = begin; t < end; t += query_tile) {
        auto* own = static_cast<std::byte*>(scratch);
        if (in_spans) attend_in_spans(kernels, a, s, head, t, std::min(end, t + query_tile), own);
        else kernels.attend(a, s, head, t, std::min(end, t + query_tile), own);
      }
  }
  return out;
}

// Pieces from the last to the first: what threads make of them in any order must be the same.
void backwards(int64_t count, const std::function<void(int64_t)>& body) {
  while (count > 0) body(--count);
}

template <class T>
std::span<const T> span_of(const Array<const T>& array) {
  return {array.data(), array.size()};
}

// As the programs draw; -> (token, its log-probability, tokens and log-probabilities of the `top` likeliest).
nb::tuple draw(const std::string& isa, Floats logits, float temperature, int32_t top_k, float top_p, float min_p,
               float typical_p, float repetition, float presence, float frequency, uint64_t seed, int64_t position,
               Ints history, int64_t prompt_length, Ints bias_tokens, Floats bias, Ints banned,
               std::optional<Array<const uint32_t>> allowed, int64_t top) {
  const auto n = static_cast<int64_t>(logits.size());
  const std::vector<SampleRow> rows{{.logits = logits.data(), .temperature = temperature, .top_k = top_k, .top_p = top_p,
                                     .min_p = min_p, .typical_p = typical_p, .repetition = repetition, .presence = presence,
                                     .frequency = frequency, .seed = seed, .position = position, .history = span_of(history),
                                     .prompt_length = prompt_length, .bias_tokens = span_of(bias_tokens), .bias = bias.data(),
                                     .banned = span_of(banned), .allowed = allowed ? allowed->data() : nullptr}};
  static SampleScratch scratch;   // reused, so that tests would see what a call leaves behind
  int32_t token;
  float logprob;
  const auto size = static_cast<size_t>(std::min(top, n));
  auto top_tokens = make<int32_t>({size});
  auto top_logprobs = make<float>({size});
  hasten::sample(table(isa), n, rows, scratch, backwards,
                 {&token, &logprob, top_tokens.data(), top_logprobs.data(), static_cast<int64_t>(size)});
  return nb::make_tuple(token, logprob, top_tokens, top_logprobs);
}

// values, moved, scales, kept [columns, rows], ahead [columns, columns], weights [columns] -> (made, lost) [columns, rows] and
// the error [rows], as core.h's SweepArgs says. isa "" is the process's.
nb::tuple sweep(const std::string& isa, Floats values, Floats moved, Floats ahead, Floats scales, Floats levels,
                Floats weights, std::optional<Floats> kept) {
  const size_t columns = values.shape(0), rows = values.shape(1), size = values.size();
  if (columns > kSweepColumns || moved.size() != size || ahead.size() != columns * columns || scales.size() != size ||
      levels.size() != kHalfLevels || weights.size() != columns || (kept && kept->size() != size))
    throw std::invalid_argument("sweep: shapes do not go together");
  auto made = make<float>({columns, rows}), lost = make<float>({columns, rows}), error = make<float>({rows});
  const Kernels& kernels = isa.empty() ? active_kernels() : table(isa);
  {
    nb::gil_scoped_release release;
    std::vector<float> divisors(scales.data(), scales.data() + size);
    std::replace(divisors.begin(), divisors.end(), 0.0f, std::numeric_limits<float>::infinity());
    kernels.sweep({.rows = static_cast<int64_t>(rows), .columns = static_cast<int64_t>(columns), .values = values.data(),
                   .moved = moved.data(), .ahead = ahead.data(), .scales = scales.data(), .divisors = divisors.data(),
                   .levels = levels.data(), .kept = kept ? kept->data() : nullptr, .weights = weights.data(),
                   .made = made.data(), .lost = lost.data(), .error = error.data()});
  }
  return nb::make_tuple(made, lost, error);
}

// levels [columns, rows], hessian [columns, columns], columns in whole groups -> [rows, groups, groups], as core.h's
// LevelProductsArgs says. isa "" is the process's.
Result<float> level_products(const std::string& isa, Floats levels, Floats hessian, size_t group) {
  const size_t columns = levels.shape(0), rows = levels.shape(1);
  if (hessian.size() != columns * columns || group == 0 || group % kLevelColumns != 0 || columns % group != 0)
    throw std::invalid_argument("level_products: shapes do not go together");
  const size_t groups = columns / group;
  auto left = make<float>({rows, groups, groups});
  const Kernels& kernels = isa.empty() ? active_kernels() : table(isa);
  {
    nb::gil_scoped_release release;
    kernels.level_products({.rows = static_cast<int64_t>(rows), .columns = static_cast<int64_t>(columns),
                            .group = static_cast<int64_t>(group), .levels = levels.data(), .hessian = hessian.data(),
                            .left = left.data()});
  }
  return left;
}

// matrices [rows, n, n], symmetric, right [rows, n] -> solutions [rows, n], found in float64; NaN where a matrix is not
// positive definite. isa "" is the process's.
Result<double> solve_positive(const std::string& isa, Floats matrices, Floats right) {
  const size_t rows = right.shape(0), n = right.shape(1);
  if (matrices.size() != rows * n * n) throw std::invalid_argument("solve_positive: shapes do not go together");
  auto out = make<double>({rows, n});
  const Kernels& kernels = isa.empty() ? active_kernels() : table(isa);
  {
    nb::gil_scoped_release release;
    std::copy_n(right.data(), right.size(), out.data());
    std::vector<double> matrix(n * n);
    for (size_t row = 0; row < rows; ++row) {
      std::copy_n(matrices.data() + row * n * n, n * n, matrix.data());
      double* solution = out.data() + row * n;
      if (!kernels.solve_positive(static_cast<int64_t>(n), matrix.data(), solution))
        std::fill_n(solution, n, std::numeric_limits<double>::quiet_NaN());
    }
  }
  return out;
}

}  // namespace

void bind_ops(nb::module_& m) {
  using namespace nb::literals;
  m.def("ops_norm", &norm, "isa"_a, "kind"_a, "x"_a, "weight"_a.none(), "bias"_a.none(), "eps"_a);
  m.def("ops_rope", &rope, "isa"_a, "x"_a, "cosine"_a, "sine"_a);
  m.def("ops_activation", &activation, "isa"_a, "kind"_a, "x"_a);
  m.def("ops_elementwise", &elementwise, "isa"_a, "op"_a, "a"_a, "b"_a.none() = nb::none(), "factor"_a = 1.0f);
  m.def("ops_logsumexp", &logsumexp, "isa"_a, "x"_a);
  m.def("ops_argmax", &argmax, "isa"_a, "x"_a);
  m.def("ops_divergence", &divergence, "isa"_a, "p"_a, "q"_a);
  m.def("ops_attention", &attention, "isa"_a, "kv"_a, "block_size"_a, "q"_a, "k"_a, "v"_a, "keys"_a.noconvert(),
        "values"_a.noconvert(), "positions"_a, "starts"_a, "tables"_a, "scale"_a, "softcap"_a = 0.0f, "window"_a = 0,
        "causal"_a = true, "query_tile"_a = 16, "in_spans"_a = false);
  m.def("sweep", &sweep, "isa"_a, "values"_a, "moved"_a, "ahead"_a, "scales"_a, "levels"_a, "weights"_a,
        "kept"_a.none());
  m.def("level_products", &level_products, "isa"_a, "levels"_a, "hessian"_a, "group"_a);
  m.def("solve_positive", &solve_positive, "isa"_a, "matrices"_a, "right"_a);
  m.def("ops_sample", &draw, "isa"_a, "logits"_a, "temperature"_a, "top_k"_a, "top_p"_a, "min_p"_a, "typical_p"_a,
        "repetition"_a, "presence"_a, "frequency"_a, "seed"_a, "position"_a, "history"_a, "prompt_length"_a, "bias_tokens"_a,
        "bias"_a, "banned"_a, "allowed"_a.none(), "top"_a);
}
