// Drawing a token from a row of logits. A row's result depends on that row and its key alone, never on its company.
#pragma once
#include <cstdint>
#include <vector>

#include "core.h"

namespace hasten {

// How to draw; the defaults change nothing.
struct SampleRow {
  float temperature = 1;              // 0: the most likely token, lowest id among equals
  int32_t top_k = 0;                  // 0: all
  float top_p = 1;                    // 1 or more: all
  float min_p = 0;                    // 0: all
  float repetition = 1;               // over prompt and output (Keskar et al. 2019): logit > 0 ? / r : * r
  float presence = 0, frequency = 0;  // over output: logit - frequency * count - presence
  uint64_t seed = 0;
  int64_t position = 0;               // of the token being drawn: with the seed, the key of its randomness
  const int32_t* history = nullptr;   // prompt and output tokens, ids within [0, n); read where a penalty is set
  int64_t history_length = 0, prompt_length = 0;

  bool penalised() const { return history_length > 0 && (repetition != 1 || presence != 0 || frequency != 0); }
  bool filtered(int64_t n) const { return top_p < 1 || (top_k > 0 && top_k < n); }
  // Every token is drawn for on its own, so that pieces of the vocabulary can be.
  bool by_pieces(int64_t n) const { return temperature != 0 && !penalised() && !filtered(n); }
};

struct SampleResult {
  int32_t token;
  float logprob;                      // of the model's own distribution: before penalties, temperature and filters
};

// Kept between calls so that a step allocates nothing; one for each thread.
struct SampleScratch {
  std::vector<float> logits;
  std::vector<int32_t> counts;        // zero between calls
  std::vector<uint64_t> candidates;
};

// A vocabulary is reduced in pieces of a fixed size, folded in order, so that threads can share one row's.
inline constexpr int64_t kVocabularyPiece = 16384;
inline int64_t vocabulary_pieces(int64_t n) { return (n + kVocabularyPiece - 1) / kVocabularyPiece; }

// Of one piece of a row, and of a row.
struct Reduced {
  double logsumexp;
  int64_t likeliest;                  // lowest index among equals
};
Reduced reduce_piece(const Kernels& kernels, const float* logits, int64_t n, int64_t piece, bool sums = true);
Reduced reduce_fold(const float* logits, const Reduced* pieces, int64_t count);
Reduced reduce_row(const Kernels& kernels, const float* logits, int64_t n);   // all of it on one thread

// The best logit + noise met so far.
struct Best {
  double value;
  int32_t token;
};
// Of a row that is drawn by pieces.
Best draw_piece(const float* logits, int64_t n, const Reduced& known, const SampleRow& row, int64_t piece);
Best draw_fold(const Best* pieces, int64_t count);

// The one place where a log-probability is rounded: a token has the same float wherever it is reported.
inline float log_probability(const float* logits, double logsumexp, int64_t token) {
  return static_cast<float>(static_cast<double>(logits[token]) - logsumexp);
}

void sample_row(const Kernels& kernels, const float* logits, int64_t n, const Reduced& known, const SampleRow& row,
                SampleResult& result, SampleScratch& scratch);

// The `count` (at most n) most likely tokens of the model's own distribution, best first, lower id first among equals.
void top_logprobs(const float* logits, int64_t n, const Reduced& known, int64_t count, int32_t* tokens, float* values,
                  SampleScratch& scratch);

// Uniform in (0, 1) from seed, position and token: the top 53 bits of a splitmix64 sequence (Steele et al. 2014) whose state
// starts at a mix of seed and position. The lowest bit is set, so that neither end is met.
uint64_t sample_key(uint64_t seed, int64_t position);
uint64_t sample_bits(uint64_t key, int64_t token);   // odd, below 2^53; the uniform is these times 2^-53

}  // namespace hasten
