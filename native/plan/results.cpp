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

// Of every row: its pieces shared out, so that one row's are made by all threads, then folded in order. `sums`: not only the
// likeliest, which costs a tenth.
std::vector<Reduced> reduce(const Program& program, int64_t rows, bool sums = true) {
  const Value& logits = program.output();
  const int64_t pieces = vocabulary_pieces(logits.width);
  std::vector<Reduced> parts(rows * pieces), known(rows);
  for_rows(program, rows * pieces, [&](int64_t i) {
    const int64_t first = i % pieces * kVocabularyPiece;
    parts[i] = reduce_piece(program.kernels(), program.row(logits, i / pieces) + first,
                            std::min(kVocabularyPiece, logits.width - first), first, sums);
  });
  for (int64_t row = 0; row < rows; ++row)
    known[row] = reduce_fold(parts.data() + row * pieces, pieces);
  return known;
}

void check_tokens(std::span<const int32_t> tokens, int64_t vocabulary, const char* where) {
  for (const int32_t token : tokens)
    if (token < 0 || token >= vocabulary)
      throw BatchError("token " + std::to_string(token) + " of " + where + " is not in the vocabulary of " +
                       std::to_string(vocabulary));
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
  const std::vector<Reduced> known = reduce(program, rows);
  for (int64_t row = 0; row < rows; ++row)
    out[row] = log_probability(program.row(logits, row), known[row].logsumexp, targets[row]);
}

void argmax(const Program& program, int32_t* out) {
  const int64_t rows = program.row_count(program.output());
  const std::vector<Reduced> known = reduce(program, rows, false);
  for (int64_t row = 0; row < rows; ++row) out[row] = static_cast<int32_t>(known[row].likeliest);
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

void sample(const Program& program, std::vector<SampleRow>& rows, SampleScratch& scratch, const Drawn& out) {
  const Value& logits = program.output();
  for (size_t i = 0; i < rows.size(); ++i) {
    SampleRow& row = rows[i];
    const auto length = static_cast<int64_t>(row.history.size());
    if (row.prompt_length < 0 || row.prompt_length > length)
      throw BatchError("a prompt of " + text(row.prompt_length) + " tokens in a history of " + text(length));
    check_tokens(row.history, logits.width, "a history");
    check_tokens(row.bias_tokens, logits.width, "a bias");
    check_tokens(row.banned, logits.width, "a ban");
    row.logits = program.row(logits, static_cast<int64_t>(i));
  }
  if (out.top < 0 || out.top > logits.width)
    throw BatchError(text(out.top) + " top log-probabilities of a vocabulary of " + text(logits.width));
  sample(program.kernels(), logits.width, rows, scratch,
         [&](int64_t count, const std::function<void(int64_t)>& body) { for_rows(program, count, body); }, out);
}

}  // namespace hasten
