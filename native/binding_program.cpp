// Plans, steps and what is read off them. Sizes are checked here, as what Python hands over becomes pointers.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <optional>

#include "binding_sampling.h"
#include "binding_tuning.h"
#include "binding_weight.h"
#include "isa/dispatch.h"
#include "plan/cpus.h"
#include "plan/fault.h"
#include "plan/results.h"
#include "plan/steps.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace hasten {
namespace {

template <typename T>
using Input = nb::ndarray<const T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
template <typename T>
using InputMatrix = nb::ndarray<const T, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
template <typename T>
using Filled = nb::ndarray<T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
template <typename T>
using FilledMatrix = nb::ndarray<T, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

void require(bool holds, const std::string& what) {
  if (!holds) throw std::invalid_argument(what);
}

ActivationKind activation_of(const std::string& name) {
  const char* names[] = {"silu", "gelu", "gelu_tanh", "relu", "tanh", "sigmoid"};
  for (int i = 0; i < 6; ++i)
    if (name == names[i]) return static_cast<ActivationKind>(i + 1);
  throw std::invalid_argument("unknown activation " + name);
}

Elementwise elementwise_of(const std::string& name) {
  const char* names[] = {"activation", "gate", "add", "multiply", "scale", "softcap"};
  for (int i = 0; i < 6; ++i)
    if (name == names[i]) return static_cast<Elementwise>(i);
  throw std::invalid_argument("unknown elementwise op " + name);
}

struct HeldNorm {
  HeldNorm(const std::string& kind, int64_t heads, Input<float> weight_, std::optional<Input<float>> bias_, float eps)
      : weight(std::move(weight_)), bias(std::move(bias_)) {
    require(kind == "rms" || kind == "layer", "unknown norm " + kind);
    require(heads > 0 && (!bias || bias->size() == weight.size()), "a norm's bias has another size than its weight");
    spec = {kind == "rms" ? NormKind::rms : NormKind::layer, heads, weight.data(), bias ? bias->data() : nullptr, eps};
  }
  Input<float> weight;
  std::optional<Input<float>> bias;
  NormSpec spec;
};

struct Rotation {  // one Rope's frequencies
  std::vector<float> frequencies;
  float factor;
};

const Kernels& table(const std::string& isa) {
  if (isa.empty()) return active_kernels();
  if (const Kernels* found = kernels_for(isa)) return *found;
  std::string message = "instruction set " + isa + " is not available here; this machine runs";
  for (const std::string& name : available_isas()) message += " " + name;
  throw std::invalid_argument(message);
}

Sizes sizes_of(int64_t context, int64_t max_tokens, int64_t max_sequences, int64_t max_rows, int64_t block_size,
               int64_t kv_blocks, int threads) {
  constexpr int64_t kMost = int64_t{1} << 30;
  const auto positive = [](const char* name, int64_t value) {
    require(value >= 1 && value <= kMost, std::string(name) + " is " + std::to_string(value) + ", must be at least 1");
  };
  positive("context", context);
  positive("max_tokens", max_tokens);
  positive("max_sequences", max_sequences);
  positive("max_rows", max_rows);
  positive("kv_blocks", kv_blocks);
  require(block_size >= 16 && block_size <= 4096 && block_size % 16 == 0,
          "block_size is " + std::to_string(block_size) + ", must be a multiple of 16");
  require(threads >= 0 && threads <= 1024, "threads is " + std::to_string(threads) + ", must be 0 (all granted) to 1024");
  return {context, max_tokens, max_sequences, max_rows, block_size, kv_blocks, threads == 0 ? granted_threads() : threads};
}

// A program, and what keeps its views alive.
class Planned {
 public:
  Planned(const std::string& isa, int64_t context, int64_t max_tokens, int64_t max_sequences, int64_t max_rows,
          int64_t block_size, int64_t kv_blocks, int threads)
      : program(table(isa), sizes_of(context, max_tokens, max_sequences, max_rows, block_size, kv_blocks, threads)) {}

  int64_t value(int64_t offset, int64_t width, bool selected) {
    require(offset >= 0 && offset % kPanel == 0 && width > 0, "a value's place must be aligned");
    values_.push_back({offset, width, round_up(width, kPanel), selected});
    return static_cast<int64_t>(values_.size()) - 1;
  }

  void embed(const HeldWeight& weight, float scale, int64_t out) {
    require(weight.weight.columns == at(out).width, "the embedding has another width than its value");
    program.set_vocabulary(weight.weight.rows);
    program.add(std::make_unique<EmbedStep>(keep(weight), scale, at(out)));
  }

  void input(int64_t out) {
    program.set_hidden_width(at(out).width);
    program.add(std::make_unique<InputStep>(at(out)));
  }

  void select(int64_t in, int64_t out) {
    require(at(in).width == at(out).width && !at(in).selected && at(out).selected, "rows are selected once");
    program.add(std::make_unique<SelectStep>(at(in), at(out)));
  }

  void norm(const HeldNorm& norm, int64_t in, std::optional<int64_t> residual, int64_t out) {
    const NormSpec spec = keep(norm, at(in).width);
    same_shape(at(in), at(out));
    if (residual) same_shape(at(*residual), at(out));
    program.add(std::make_unique<NormStep>(spec, at(in), optional_at(residual), at(out)));
  }

  void rope(const Rotation& rope, int64_t heads, int64_t head_dim, int64_t in, int64_t out) {
    require(at(in).width == heads * head_dim && at(out).width == at(in).width && !at(in).selected, "rope has another width");
    program.add(std::make_unique<RopeStep>(turning(rope, head_dim), heads, head_dim, at(in), at(out)));
  }

  void elementwise(const std::string& op, const std::string& kind, float factor, int64_t first,
                   std::optional<int64_t> second, int64_t out) {
    const Elementwise which = elementwise_of(op);
    const bool two = which == Elementwise::gate || which == Elementwise::add || which == Elementwise::multiply;
    require(two == second.has_value(), op + " has another number of inputs");
    same_shape(at(first), at(out));
    if (second) same_shape(at(*second), at(out));
    program.add(std::make_unique<ElementwiseStep>(which, kind.empty() ? ActivationKind::none : activation_of(kind), factor,
                                                  at(first), optional_at(second), at(out)));
  }

  void linear(int64_t in, const HeldNorm* norm, const std::vector<const HeldWeight*>& weights,
              const std::vector<std::optional<Input<float>>>& biases, const std::vector<int64_t>& outs,
              const std::string& gate, std::optional<int64_t> residual) {
    require(!weights.empty() && biases.size() == weights.size(), "a linear needs weights, and a bias or None for each");
    require(outs.size() == (gate.empty() ? weights.size() : 1), "a linear gives one value for each weight, a gated one only one");
    require(gate.empty() || (weights.size() == 2 && !residual), "a gate joins two weights and takes no residual");
    require(!residual || weights.size() == 1, "a residual is added to one output only");
    std::vector<LinearStep::Part> parts;
    std::vector<Value> values;
    for (const int64_t out : outs) values.push_back(at(out));
    for (size_t i = 0; i < weights.size(); ++i) {
      const Value& out = values[gate.empty() ? i : 0];
      const Weight& w = weights[i]->weight;
      require(w.columns == at(in).width && w.rows == out.width && out.selected == at(in).selected,
              "a linear's weight fits neither its input nor its output");
      require(!biases[i] || static_cast<int64_t>(biases[i]->size()) == w.rows, "a bias has another size than its weight's rows");
      if (biases[i]) vectors_.push_back(*biases[i]);
      parts.push_back({keep(*weights[i]), biases[i] ? biases[i]->data() : nullptr});
    }
    if (residual) same_shape(at(*residual), values[0]);
    std::optional<NormSpec> spec;
    if (norm != nullptr) spec = keep(*norm, at(in).width);
    std::optional<ActivationKind> kind;
    if (!gate.empty()) kind = activation_of(gate);
    program.add(std::make_unique<LinearStep>(program.kernels(), program.sizes(), program.tuning(), at(in), spec,
                                             std::move(parts), std::move(values), kind, optional_at(residual)));
  }

  void attention(int64_t heads, int64_t kv_heads, int64_t head_dim, float scale, int64_t layer, const std::string& kv_format,
                 int64_t window, float softcap, bool causal, const HeldNorm* q_norm, const HeldNorm* k_norm, const Rotation* rope, int64_t q, int64_t k,
                 int64_t v, int64_t out) {
    require(kv_heads > 0 && heads % kv_heads == 0, "query heads must be a multiple of key heads");
    require(at(q).width == heads * head_dim && at(k).width == kv_heads * head_dim && at(v).width == at(k).width &&
                at(out).width == at(q).width && !at(q).selected,
            "attention's values have other widths than its heads");
    AttentionArgs fixed{};
    fixed.kv = program.kv_layer(layer, kv_kind(kv_format), kv_heads, head_dim);
    fixed.heads = heads;
    fixed.scale = scale;
    fixed.softcap = softcap;
    fixed.window = window;
    fixed.causal = causal;
    std::optional<NormSpec> q_spec, k_spec;
    if (q_norm != nullptr) q_spec = keep(*q_norm, at(q).width);
    if (k_norm != nullptr) k_spec = keep(*k_norm, at(k).width);
    const RopeTable* turn = rope != nullptr ? &turning(*rope, head_dim) : nullptr;
    program.add(std::make_unique<AttentionStep>(program.kernels(), program.sizes(), fixed, q_spec, k_spec, turn, at(q), at(k),
                                                at(v), at(out)));
  }

  void finish(int64_t arena_floats, int64_t output) {
    for (const Value& value : values_) {
      const int64_t rows = value.selected ? program.sizes().max_rows : program.sizes().max_tokens;
      require(value.offset + rows * value.stride <= arena_floats, "a value stands outside the arena");
    }
    program.finish(arena_floats, at(output));
    finished_ = true;
  }

  void step(const Input<int32_t>& tokens, const Input<int32_t>& positions, const Input<int32_t>& starts,
            const InputMatrix<int32_t>& block_tables, const Input<int32_t>& rows,
            const std::optional<InputMatrix<float>>& hidden) {
    require(finished_, "the program is not finished");
    const auto count = static_cast<int64_t>(tokens.size()), sequences = static_cast<int64_t>(starts.size()) - 1;
    const auto differs = [](const char* what, size_t found, int64_t expected) {
      throw BatchError(std::string(what) + " has " + std::to_string(found) + " entries, must have " + std::to_string(expected));
    };
    if (static_cast<int64_t>(positions.size()) != count) differs("positions", positions.size(), count);
    if (sequences < 0) differs("starts", 0, 1);
    if (static_cast<int64_t>(block_tables.shape(0)) != sequences) differs("block_tables", block_tables.shape(0), sequences);
    if (hidden && static_cast<int64_t>(hidden->shape(0)) != count) differs("hidden", hidden->shape(0), count);
    const BatchView batch{tokens.data(), positions.data(), starts.data(), block_tables.data(), rows.data(),
                          hidden ? hidden->data() : nullptr, count, sequences, static_cast<int64_t>(rows.size()),
                          static_cast<int64_t>(block_tables.shape(1)), hidden ? static_cast<int64_t>(hidden->shape(1)) : 0};
    nb::gil_scoped_release release;
    program.step(batch);
  }

  void copy_value(int64_t index, FilledMatrix<float> out) {
    const Value& value = at(index);
    const Program::Use use(program);
    filled(out.shape(0), program.row_count(value));
    filled(out.shape(1), value.width);
    nb::gil_scoped_release release;
    copy_rows(program, value, out.data());
  }
  void score(const Input<int32_t>& targets, Filled<float> out) {
    const Program::Use use(program);
    if (static_cast<int64_t>(targets.size()) != wanted_rows())
      throw BatchError(std::to_string(targets.size()) + " targets for " + std::to_string(wanted_rows()) + " wanted rows");
    filled(out.size(), wanted_rows());
    nb::gil_scoped_release release;
    hasten::score(program, targets.data(), out.data());
  }
  void argmax(Filled<int32_t> out) {
    const Program::Use use(program);
    filled(out.size(), wanted_rows());
    nb::gil_scoped_release release;
    hasten::argmax(program, out.data());
  }
  void divergence(const Planned& reference, Filled<double> out) {
    const Program::Use use(program);
    std::optional<Program::Use> other;  // neither use waits, so the order can lock nobody out
    if (&reference != this) other.emplace(reference.program);
    filled(out.size(), wanted_rows());
    nb::gil_scoped_release release;
    hasten::divergence(program, reference.program, out.data());
  }
  void record(int64_t runs) {
    require(finished_ && runs >= 0 && runs < 1 << 20, "a recording of " + std::to_string(runs) + " steps");
    program.record(runs);
  }
  std::pair<int64_t, int64_t> recorded() const {
    const Program::Use use(program);
    return {program.recording().runs() * program.sizes().threads, program.recording().row_length()};
  }
  void copy_recording(FilledMatrix<int64_t> out) const {
    const Program::Use use(program);
    const Recording& recording = program.recording();
    filled(out.shape(0), recording.runs() * program.sizes().threads);
    filled(out.shape(1), recording.row_length());
    std::copy_n(recording.data(), out.size(), out.data());
  }
  int64_t output_rows() const {
    const Program::Use use(program);
    return wanted_rows();
  }
  int64_t rows_of(int64_t index) const {
    const Program::Use use(program);
    return program.row_count(at(index));
  }

  Program program;
  SampleScratch sample_scratch;

 private:
  const Value& at(int64_t index) const {
    require(index >= 0 && index < static_cast<int64_t>(values_.size()), "no such value");
    return values_[index];
  }
  std::optional<Value> optional_at(std::optional<int64_t> index) const {
    return index ? std::optional<Value>(at(*index)) : std::nullopt;
  }
  int64_t wanted_rows() const { return program.row_count(program.output()); }
  static void same_shape(const Value& a, const Value& b) {
    require(a.width == b.width && a.selected == b.selected, "values of one elementwise op have different shapes");
  }
  static void filled(size_t found, int64_t expected) {
    require(static_cast<int64_t>(found) == expected, "the array to fill has another shape");
  }
  const Weight& keep(const HeldWeight& weight) {
    weights_.push_back(weight);
    return weight.weight;
  }
  NormSpec keep(const HeldNorm& norm, int64_t width) {
    require(static_cast<int64_t>(norm.weight.size()) * norm.spec.heads == width, "a norm has another width than its value");
    norms_.push_back(norm);
    return norm.spec;
  }
  const RopeTable& turning(const Rotation& rope, int64_t head_dim) {
    require(!rope.frequencies.empty() && static_cast<int64_t>(rope.frequencies.size()) * 2 <= head_dim,
            "rope turns more features than a head has");
    return program.rope(rope.frequencies, rope.factor);
  }

  std::vector<Value> values_;
  std::vector<HeldWeight> weights_;
  std::vector<HeldNorm> norms_;
  std::vector<Input<float>> vectors_;
  bool finished_ = false;
};

void bind_building(nb::class_<Planned>& c) {
  c.def(nb::init<const std::string&, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int>(), "isa"_a,
        "context"_a, "max_tokens"_a, "max_sequences"_a, "max_rows"_a, "block_size"_a, "kv_blocks"_a, "threads"_a)
      .def("value", &Planned::value, "offset"_a, "width"_a, "selected"_a, "A place in the arena -> its number")
      .def("embed", &Planned::embed, "weight"_a, "scale"_a, "out"_a)
      .def("input", &Planned::input, "out"_a)
      .def("select", &Planned::select, "input"_a, "out"_a)
      .def("norm", &Planned::norm, "norm"_a, "input"_a, "residual"_a.none(), "out"_a)
      .def("rope", &Planned::rope, "rope"_a, "heads"_a, "head_dim"_a, "input"_a, "out"_a)
      .def("elementwise", &Planned::elementwise, "op"_a, "kind"_a, "factor"_a, "first"_a, "second"_a.none(), "out"_a)
      .def("linear", &Planned::linear, "input"_a, "norm"_a.none(), "weights"_a, "biases"_a, "outs"_a, "gate"_a,
           "residual"_a.none())
      .def("attention", &Planned::attention, "heads"_a, "kv_heads"_a, "head_dim"_a, "scale"_a, "layer"_a, "kv_format"_a, "window"_a,
           "softcap"_a, "causal"_a, "q_norm"_a.none(), "k_norm"_a.none(), "rope"_a.none(), "q"_a, "k"_a, "v"_a, "out"_a)
      .def("finish", &Planned::finish, "arena_floats"_a, "output"_a);
}

void bind_running(nb::class_<Planned>& c) {
  c.def("step", &Planned::step, "tokens"_a.noconvert(), "positions"_a.noconvert(), "starts"_a.noconvert(),
        "block_tables"_a.noconvert(), "rows"_a.noconvert(), "hidden"_a.noconvert().none())
      .def("rows_of", &Planned::rows_of, "value"_a, "Rows of a value after the last step")
      .def("copy_value", &Planned::copy_value, "value"_a, "out"_a.noconvert())
      .def("score", &Planned::score, "targets"_a.noconvert(), "out"_a.noconvert())
      .def("argmax", &Planned::argmax, "out"_a.noconvert())
      .def("divergence", &Planned::divergence, "reference"_a, "out"_a.noconvert())
      .def("record", &Planned::record, "runs"_a, "Record the next steps, this many; 0 ends it")
      .def("recorded", &Planned::recorded, "(rows, their length), a row for each thread of each run")
      .def("copy_recording", &Planned::copy_recording, "out"_a.noconvert())
      .def_prop_ro("step_count", [](const Planned& p) { return p.program.step_count(); })
      .def_prop_ro("output_rows", &Planned::output_rows)
      .def_prop_ro("isa", [](const Planned& p) { return std::string(p.program.kernels().name); })
      .def_prop_ro("threads", [](const Planned& p) { return p.program.sizes().threads; })
      .def_prop_ro("kv_bytes", [](const Planned& p) { return p.program.kv_bytes(); })
      .def_prop_ro("buffer_bytes", [](const Planned& p) { return p.program.buffer_bytes(); });
}

}  // namespace
}  // namespace hasten

void bind_program(nb::module_& m) {
  using namespace hasten;
  nb::exception<BatchError>(m, "BatchError", PyExc_ValueError);
  nb::exception<ContextLimitError>(m, "ContextLimitError", PyExc_ValueError);
  using Array = HeldWeight::Array;
  nb::class_<HeldWeight>(m, "Weight")
      .def(nb::init<const std::string&, int64_t, int64_t, int64_t, Array, std::optional<Array>, std::optional<Array>>(),
           "kind"_a, "rows"_a, "columns"_a, "group"_a, "codes"_a.noconvert(), "scales"_a.noconvert() = nb::none(),
           "codebook"_a.noconvert() = nb::none());
  nb::class_<HeldNorm>(m, "Norm").def(
      nb::init<const std::string&, int64_t, Input<float>, std::optional<Input<float>>, float>(), "kind"_a, "heads"_a,
      "weight"_a.noconvert(), "bias"_a.noconvert().none(), "eps"_a);
  nb::class_<Rotation>(m, "Rotation")
      .def("__init__",
           [](Rotation* self, std::vector<float> frequencies, float factor) {
             new (self) Rotation{std::move(frequencies), factor};
           },
           "frequencies"_a, "factor"_a);
  nb::class_<Planned> program(m, "Program");
  bind_building(program);
  bind_running(program);
  bind_sampling(program);
  bind_tuning(program);
  m.def("kernel_scratch",
        [](const std::string& kind, int64_t rows, int64_t columns, int64_t group, int64_t tokens) {
          const Weight shape{HeldWeight::kind_of(kind), rows, columns, group, nullptr, nullptr, nullptr};
          return active_kernels().matmul_scratch(shape, std::min(tokens, Tuning::most_tokens()));
        },
        "kind"_a, "rows"_a, "columns"_a, "group"_a, "tokens"_a,
        "Bytes that a thread's matmul takes beside its operands, in the instruction set in use");
  m.def("clock_ns", &steady_nanoseconds, "The clock of recordings");
  m.def("set_fault",
        [](const std::string& name) {
          if (!set_fault(name)) throw std::invalid_argument("unknown fault " + name);
        },
        "name"_a, "For tests: 'thread_sum' makes sums depend on threads and company; '' ends it");
}
