// Steps that treat every row, or every element, alike.
#include <algorithm>
#include <cstring>

#include "plan/fault.h"
#include "plan/steps.h"

namespace hasten {
namespace {

constexpr int64_t kColumns = 2048;  // of a row that one thread takes at a time, elementwise

}  // namespace

void NormSpec::apply(const Run& run, const float* x, int64_t width, float* out) const {
  const int64_t n = width / heads;
  for (int64_t head = 0; head < heads; ++head) {
    if (run.fault_parts != 0)
      faulty_norm(kind, x + head * n, n, weight, bias, eps, run.fault_parts, out + head * n);
    else
      run.kernels.norm(kind, x + head * n, n, weight, bias, eps, out + head * n);
  }
}

void EmbedStep::run(const Worker& w) const {
  const Run& r = w.run;
  w.team.for_each(r.batch.token_count, [&](int64_t i) {
    float* out = r.row(out_, i);
    r.kernels.decode_row(table_, r.batch.tokens[i], out);
    if (scale_ != 1.0f) r.kernels.scale(out, scale_, out_.width, out);
  });
}

void InputStep::run(const Worker& w) const {
  const Run& r = w.run;
  w.team.for_each(r.batch.token_count, [&](int64_t i) {
    std::memcpy(r.row(out_, i), r.batch.hidden + i * out_.width, out_.width * sizeof(float));
  });
}

void SelectStep::run(const Worker& w) const {
  const Run& r = w.run;
  if (r.batch.row_count == 0) return;
  w.team.for_each(r.batch.row_count, [&](int64_t i) {
    std::memcpy(r.row(out_, i), r.row(in_, r.batch.rows[i]), out_.width * sizeof(float));
  });
}

void NormStep::run(const Worker& w) const {
  const Run& r = w.run;
  const int64_t count = r.count(out_);
  if (count == 0) return;
  w.team.for_each(count, [&](int64_t i) {
    if (!residual_) return norm_.apply(r, r.row(in_, i), in_.width, r.row(out_, i));
    float* normed = reinterpret_cast<float*>(w.scratch);
    norm_.apply(r, r.row(in_, i), in_.width, normed);
    r.kernels.add(r.row(*residual_, i), normed, in_.width, r.row(out_, i));
  });
}

void RopeStep::run(const Worker& w) const {
  const Run& r = w.run;
  w.team.for_each(r.batch.token_count, [&](int64_t i) {
    const int64_t position = r.batch.positions[i];
    float* out = r.row(out_, i);
    std::memcpy(out, r.row(in_, i), in_.width * sizeof(float));
    r.kernels.rope(out, heads_, head_dim_, table_.rotary(), table_.cosine(position), table_.sine(position));
  });
}

void ElementwiseStep::run(const Worker& w) const {
  const Run& r = w.run;
  const int64_t count = r.count(out_), pieces = (out_.width + kColumns - 1) / kColumns;
  if (count == 0) return;
  w.team.for_each(count * pieces, [&](int64_t i) {
    const int64_t row = i / pieces, column = i % pieces * kColumns, n = std::min(kColumns, out_.width - column);
    const float* a = r.row(first_, row) + column;
    const float* b = second_ ? r.row(*second_, row) + column : nullptr;
    float* out = r.row(out_, row) + column;
    switch (op_) {
      case Elementwise::activation: return r.kernels.activation(kind_, a, n, out);
      case Elementwise::gate: return r.kernels.gate(kind_, a, b, n, out);
      case Elementwise::add: return r.kernels.add(a, b, n, out);
      case Elementwise::multiply: return r.kernels.multiply(a, b, n, out);
      case Elementwise::scale: return r.kernels.scale(a, factor_, n, out);
      case Elementwise::softcap: return r.kernels.softcap(a, factor_, n, out);
    }
  });
}

}  // namespace hasten
