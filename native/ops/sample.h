// Drawing a token from a row of logits. A row's result depends on that row and its key alone, never on its company.
//
// In this order: bias is added, penalties are taken, bans are set; temperature divides; top_k, top_p, min_p and typical_p
// leave tokens out, each what the one before left; the greatest of logit plus noise is drawn. Filters that order tokens do
// so before temperature divides, where no rounding makes equals of them.
#pragma once
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <vector>

#include "core.h"
#include "ops/candidates.h"

namespace hasten {

// How to draw; the defaults change nothing.
struct SampleRow {
  const float* logits = nullptr;          // [vocabulary]
  float temperature = 1;                  // 0: the most likely token, lowest id among equals
  int32_t top_k = 0;                      // 0: all
  float top_p = 1;                        // 1 or more: all
  float min_p = 0;                        // 0: all
  float typical_p = 1;                    // 1 or more: all (Meister et al. 2022)
  float repetition = 1;                   // over prompt and output (Keskar et al. 2019): logit > 0 ? / r : * r
  float presence = 0, frequency = 0;      // over output: logit - frequency * count - presence
  uint64_t seed = 0;
  int64_t position = 0;                   // of the token being drawn: with the seed, the key of its randomness
  // Token ids within the vocabulary, all of them.
  std::span<const int32_t> history = {};  // prompt and output; read where a penalty is set
  int64_t prompt_length = 0;
  std::span<const int32_t> bias_tokens = {};
  const float* bias = nullptr;            // of each of bias_tokens
  std::span<const int32_t> banned = {};
  const uint32_t* allowed = nullptr;      // a bit for each token, lowest first; null: all

  bool penalised() const { return !history.empty() && (repetition != 1 || presence != 0 || frequency != 0); }
  bool edited() const { return penalised() || !bias_tokens.empty() || !banned.empty() || allowed != nullptr; }
  bool ranked(int64_t n) const { return top_k > 0 && top_k < n; }
  bool filtered(int64_t n) const { return top_p < 1 || typical_p < 1 || ranked(n); }
};

// Where drawn tokens go: tokens and logprobs [rows], top_tokens and top_logprobs [rows, top]. Log-probabilities are of the
// model's own distribution: before bias, penalties, bans, temperature and filters.
struct Drawn {
  int32_t* tokens;
  float* logprobs;
  int32_t* top_tokens;
  float* top_logprobs;
  int64_t top;   // at most the vocabulary
};

// Of a piece of a row, and of a row.
struct Reduced {
  double logsumexp;
  int64_t likeliest;   // lowest index among equals
  float most;          // its logit
};
// Of n logits whose first is of token `first`. `sums`: not only the likeliest, which costs a tenth.
Reduced reduce_piece(const Kernels& kernels, const float* logits, int64_t n, int64_t first, bool sums = true);
Reduced reduce_fold(const Reduced* pieces, int64_t count);

// The one place where a log-probability is rounded: a token has the same float wherever it is reported.
inline float log_probability(const float* logits, double logsumexp, int64_t token) {
  return static_cast<float>(static_cast<double>(logits[token]) - logsumexp);
}

// body(i) for each i in [0, count), in any order, on any threads; returns when all are done.
using Share = std::function<void(int64_t count, const std::function<void(int64_t)>& body)>;

// What a step's draws need, kept between calls so that a step allocates nothing.
class SampleScratch {
 public:
  SampleScratch();
  ~SampleScratch();
  struct State;
  State& state() { return *state_; }

 private:
  std::unique_ptr<State> state_;
};

// Draws a token for every row of `n` logits. Where bans leave no number to draw, the likeliest of the allowed tokens stands
// for the draw, as if nothing were banned; where there is none either, the likeliest of all.
void sample(const Kernels& kernels, int64_t n, const std::vector<SampleRow>& rows, SampleScratch& scratch, const Share& share,
            const Drawn& out);

}  // namespace hasten
