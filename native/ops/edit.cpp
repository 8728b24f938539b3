#include "ops/edit.h"

#include <algorithm>
#include <limits>

namespace hasten {
namespace {

constexpr float kBanned = -std::numeric_limits<float>::infinity();

// body(offset) for each token of the list that lies in the piece.
template <typename Body>
void each_in_piece(std::span<const int32_t> tokens, int64_t begin, int64_t count, Body&& body) {
  for (size_t i = 0; i < tokens.size(); ++i) {
    const int64_t offset = tokens[i] - begin;
    if (static_cast<uint64_t>(offset) < static_cast<uint64_t>(count)) body(static_cast<int32_t>(offset), i);
  }
}

void penalise(const SampleRow& row, int64_t begin, int64_t count, float* logits, EditScratch& scratch) {
  std::vector<int32_t>&counts = scratch.counts, &seen = scratch.seen;
  if (counts.empty()) counts.resize(kVocabularyPiece, 0);
  seen.clear();
  const auto note = [&](int32_t offset, size_t) { seen.push_back(offset); };
  each_in_piece(row.history.first(static_cast<size_t>(row.prompt_length)), begin, count, note);
  const size_t prompt = seen.size();
  each_in_piece(row.history.subspan(static_cast<size_t>(row.prompt_length)), begin, count, note);
  // First sight of a token, prompt included, takes the repetition penalty; -1 marks it.
  for (int32_t token : seen) {
    if (counts[token] != 0) continue;
    counts[token] = -1;
    if (row.repetition != 1) logits[token] = logits[token] > 0 ? logits[token] / row.repetition : logits[token] * row.repetition;
  }
  for (int32_t token : seen) counts[token] = 0;
  for (size_t i = prompt; i < seen.size(); ++i) ++counts[seen[i]];
  for (size_t i = prompt; i < seen.size(); ++i) {
    const int32_t token = seen[i];
    if (counts[token] == 0) continue;
    logits[token] -= row.frequency * static_cast<float>(counts[token]);
    logits[token] -= row.presence;
    counts[token] = 0;
  }
}

void ban_all_but(const uint32_t* allowed, int64_t begin, int64_t count, float* logits) {
  for (int64_t at = 0; at < count; at += 32) {
    const uint32_t word = allowed[(begin + at) / 32];
    if (word == 0xffffffffu) continue;
    for (int64_t i = at; i < std::min(count, at + 32); ++i) logits[i] = word >> (i - at) & 1u ? logits[i] : kBanned;
  }
}

}  // namespace

const float* edit_piece(const SampleRow& row, int64_t begin, int64_t count, EditScratch& scratch) {
  scratch.logits.assign(row.logits + begin, row.logits + begin + count);
  float* logits = scratch.logits.data();
  each_in_piece(row.bias_tokens, begin, count, [&](int32_t offset, size_t i) { logits[offset] += row.bias[i]; });
  if (row.penalised()) penalise(row, begin, count, logits, scratch);
  each_in_piece(row.banned, begin, count, [&](int32_t offset, size_t) { logits[offset] = kBanned; });
  if (row.allowed != nullptr) ban_all_but(row.allowed, begin, count, logits);
  return logits;
}

}  // namespace hasten
