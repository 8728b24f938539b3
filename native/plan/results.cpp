#include "plan/results.h"

#include <algorithm>
#include <cstring>

namespace hasten {
namespace {

int team_for(const Program& program, int64_t rows) {
  return static_cast<int>(std::min<int64_t>(program.sizes().threads, rows));
}

template <typename Body>
void for_rows(const Program& program, int64_t rows, Body&& body) {
  if (rows > 0) Pool::instance().run(team_for(program, rows), [&](Team& team) { team.for_each(rows, body); });
}

std::string text(int64_t number) { return std::to_string(number); }

std::string shape(int64_t rows, int64_t width) { return "[" + text(rows) + ", " + text(width) + "]"; }

}  // namespace

void copy_rows(const Program& program, const Value& value, float* out) {
  for_rows(program, program.row_count(value), [&](int64_t row) {
    std::memcpy(out + row * value.width, program.row(value, row), value.width * sizeof(float));
  });
}

void score(const Program& program, const int32_t* targets, float* out) {
  const Value& logits = program.output();
  const int64_t rows = program.row_count(logits);
  for (int64_t row = 0; row < rows; ++row)
    if (targets[row] < 0 || targets[row] >= logits.width)
      throw BatchError("target " + text(targets[row]) + " of row " + text(row) + " is not in the vocabulary of " +
                       text(logits.width));
  for_rows(program, rows, [&](int64_t row) {
    const float* x = program.row(logits, row);
    out[row] = log_probability(x, program.kernels().logsumexp(x, logits.width), targets[row]);
  });
}

// One row is cut as well: the largest of a whole is the largest of its parts' largest.
void argmax(const Program& program, int32_t* out) {
  constexpr int64_t kPiece = 16384;
  const Value& logits = program.output();
  const int64_t rows = program.row_count(logits), pieces = (logits.width + kPiece - 1) / kPiece;
  std::vector<int32_t> best(rows * pieces);
  for_rows(program, rows * pieces, [&](int64_t i) {
    const int64_t begin = i % pieces * kPiece, n = std::min(kPiece, logits.width - begin);
    best[i] = static_cast<int32_t>(begin + program.kernels().argmax(program.row(logits, i / pieces) + begin, n));
  });
  for (int64_t row = 0; row < rows; ++row) {
    const float* x = program.row(logits, row);
    out[row] = best[row * pieces];
    for (int64_t i = 1; i < pieces; ++i)
      if (x[best[row * pieces + i]] > x[out[row]]) out[row] = best[row * pieces + i];
  }
}

void divergence(const Program& program, const Program& reference, double* out) {
  const Value &q = program.output(), &p = reference.output();
  const int64_t rows = program.row_count(q);
  if (rows != reference.row_count(p) || q.width != p.width)
    throw BatchError("divergence of " + shape(rows, q.width) + " from " + shape(reference.row_count(p), p.width) +
                     ": both models must give the same rows and vocabulary");
  for_rows(program, rows, [&](int64_t row) {
    out[row] = program.kernels().divergence(reference.row(p, row), program.row(q, row), q.width);
  });
}

void sample(const Program& program, const std::vector<SampleRow>& rows, std::vector<SampleScratch>& scratch, const Drawn& out) {
  const Value& logits = program.output();
  for (const SampleRow& row : rows) {
    if (row.prompt_length < 0 || row.prompt_length > row.history_length)
      throw BatchError("a prompt of " + text(row.prompt_length) + " tokens in a history of " + text(row.history_length));
    for (int64_t i = 0; i < row.history_length; ++i)
      if (row.history[i] < 0 || row.history[i] >= logits.width)
        throw BatchError("token " + text(row.history[i]) + " of a history is not in the vocabulary of " + text(logits.width));
  }
  if (out.top < 0 || out.top > logits.width)
    throw BatchError(text(out.top) + " top log-probabilities of a vocabulary of " + text(logits.width));
  const int64_t count = static_cast<int64_t>(rows.size());
  if (count == 0) return;
  Pool::instance().run(team_for(program, count), [&](Team& team) {
    SampleScratch& own = scratch[team.thread()];
    team.for_each(count, [&](int64_t i) {
      const float* x = program.row(logits, i);
      SampleResult drawn{};
      sample_row(program.kernels(), x, logits.width, rows[i], drawn, own);
      out.tokens[i] = drawn.token;
      out.logprobs[i] = drawn.logprob;
      if (out.top > 0)
        top_logprobs(program.kernels(), x, logits.width, out.top, out.top_tokens + i * out.top, out.top_logprobs + i * out.top, own);
    });
  });
}

}  // namespace hasten
