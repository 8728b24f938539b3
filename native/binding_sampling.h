// How Python says what to draw, as native/ops/sample.h takes it. Sizes are checked here.
#pragma once
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <optional>
#include <string>

#include "plan/results.h"

namespace hasten {

template <typename T>
using PerRow = nanobind::ndarray<const T, nanobind::ndim<1>, nanobind::c_contig, nanobind::device::cpu>;
// A list of one array a row, empty where the row has none; or no list.
template <typename T>
using Lists = std::optional<std::vector<PerRow<T>>>;

template <typename T>
std::span<const T> span_of(const Lists<T>& lists, size_t row) {
  return lists ? std::span<const T>((*lists)[row].data(), (*lists)[row].size()) : std::span<const T>();
}

template <class Planned>
void sample(Planned& planned, const PerRow<float>& temperature, const PerRow<int32_t>& top_k, const PerRow<float>& top_p,
            const PerRow<float>& min_p, const std::optional<PerRow<float>>& typical_p, const PerRow<float>& repetition,
            const PerRow<float>& presence, const PerRow<float>& frequency, const PerRow<uint64_t>& seed,
            const PerRow<int64_t>& position, const Lists<int32_t>& history, const PerRow<int32_t>& prompt_length,
            const Lists<int32_t>& bias_tokens, const Lists<float>& bias, const Lists<int32_t>& banned,
            const Lists<uint32_t>& allowed,
            nanobind::ndarray<int32_t, nanobind::ndim<1>, nanobind::c_contig, nanobind::device::cpu> tokens,
            nanobind::ndarray<float, nanobind::ndim<1>, nanobind::c_contig, nanobind::device::cpu> logprobs,
            nanobind::ndarray<int32_t, nanobind::ndim<2>, nanobind::c_contig, nanobind::device::cpu> top_tokens,
            nanobind::ndarray<float, nanobind::ndim<2>, nanobind::c_contig, nanobind::device::cpu> top_logprobs) {
  const Program& program = planned.program;
  const Program::Use use(program);
  const auto count = static_cast<size_t>(program.row_count(program.output()));
  const auto words = static_cast<size_t>((program.output().width + 31) / 32);
  const auto rows_of = [&](const auto& list) { return list ? list->size() : count; };
  for (const size_t size : {temperature.size(), top_k.size(), top_p.size(), min_p.size(), rows_of(typical_p), repetition.size(),
                            presence.size(), frequency.size(), seed.size(), position.size(), rows_of(history),
                            prompt_length.size(), rows_of(bias_tokens), rows_of(bias), rows_of(banned), rows_of(allowed)})
    if (size != count)
      throw BatchError("sampling has " + std::to_string(size) + " entries for " + std::to_string(count) + " wanted rows");
  if (tokens.size() != count || logprobs.size() != count || top_tokens.shape(0) != count || top_logprobs.shape(0) != count ||
      top_tokens.shape(1) != top_logprobs.shape(1))
    throw std::invalid_argument("the array to fill has another shape");
  std::vector<SampleRow> rows(count);
  for (size_t i = 0; i < count; ++i) {
    const auto biased = span_of(bias_tokens, i);
    const auto values = span_of(bias, i);
    const auto mask = span_of(allowed, i);
    if (biased.size() != values.size())
      throw BatchError(std::to_string(values.size()) + " biases for " + std::to_string(biased.size()) + " tokens");
    if (!mask.empty() && mask.size() != words)
      throw BatchError("a mask of " + std::to_string(mask.size()) + " words for a vocabulary of " +
                       std::to_string(program.output().width) + " tokens, must have " + std::to_string(words));
    rows[i] = {.temperature = temperature.data()[i], .top_k = top_k.data()[i], .top_p = top_p.data()[i],
               .min_p = min_p.data()[i], .typical_p = typical_p ? typical_p->data()[i] : 1.0f,
               .repetition = repetition.data()[i], .presence = presence.data()[i], .frequency = frequency.data()[i],
               .seed = seed.data()[i], .position = position.data()[i], .history = span_of(history, i),
               .prompt_length = prompt_length.data()[i], .bias_tokens = biased, .bias = values.data(),
               .banned = span_of(banned, i), .allowed = mask.empty() ? nullptr : mask.data()};
  }
  const Drawn out{tokens.data(), logprobs.data(), top_tokens.data(), top_logprobs.data(),
                  static_cast<int64_t>(top_tokens.shape(1))};
  nanobind::gil_scoped_release release;
  hasten::sample(program, rows, planned.sample_scratch, out);
}

template <class Planned>
void bind_sampling(nanobind::class_<Planned>& c) {
  using namespace nanobind::literals;
  c.def("sample", &sample<Planned>, "temperature"_a.noconvert(), "top_k"_a.noconvert(), "top_p"_a.noconvert(),
        "min_p"_a.noconvert(), "typical_p"_a.noconvert().none(), "repetition"_a.noconvert(), "presence"_a.noconvert(),
        "frequency"_a.noconvert(), "seed"_a.noconvert(), "position"_a.noconvert(), "history"_a.noconvert().none(),
        "prompt_length"_a.noconvert(), "bias_tokens"_a.noconvert().none(), "bias"_a.noconvert().none(),
        "banned"_a.noconvert().none(), "allowed"_a.noconvert().none(), "tokens"_a.noconvert(), "logprobs"_a.noconvert(),
        "top_tokens"_a.noconvert(), "top_logprobs"_a.noconvert());
}

}  // namespace hasten
