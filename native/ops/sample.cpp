#include "ops/sample.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>

namespace hasten {
namespace {

constexpr uint64_t kGolden = 0x9e3779b97f4a7c15u;
constexpr double kLn2 = 0.693147180559945309417;

uint64_t mix(uint64_t x) {
  x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
  x = (x ^ x >> 27) * 0x94d049bb133111ebu;
  return x ^ x >> 31;
}

// --- candidates: logit and token in one integer, greater = larger logit, lower id among equals

uint64_t pack(float logit, int64_t token) {
  logit += 0.0f;   // -0 and 0 are equals
  const uint32_t bits = std::bit_cast<uint32_t>(logit);
  const uint32_t ordered = logit != logit ? 0u : bits >> 31 ? ~bits : bits | 0x80000000u;
  return static_cast<uint64_t>(ordered) << 32 | static_cast<uint32_t>(~static_cast<uint32_t>(token));
}

int32_t token_of(uint64_t candidate) { return static_cast<int32_t>(~static_cast<uint32_t>(candidate)); }

// The k greatest candidates of n logits, in no order. Keeps a buffer that is cut back to k whenever it fills, so that nearly
// all logits meet only one comparison with the k-th best so far.
void select_top(const float* logits, int64_t n, int64_t k, std::vector<uint64_t>& out) {
  out.clear();
  const size_t wanted = static_cast<size_t>(k), capacity = std::min<size_t>(static_cast<size_t>(n), 2 * wanted + 256);
  out.reserve(capacity);
  const auto cut = [&] {
    std::nth_element(out.begin(), out.begin() + k - 1, out.end(), std::greater<>());
    out.resize(wanted);
  };
  float bar = -std::numeric_limits<float>::infinity();   // ids ascend, so an equal of the k-th best comes too late
  bool full = false;
  for (int64_t i = 0; i < n; ++i) {
    if (full && !(logits[i] > bar)) continue;
    out.push_back(pack(logits[i], i));
    if (out.size() < capacity || out.size() <= wanted) continue;
    cut();
    bar = logits[token_of(out.back())];
    full = bar == bar;
  }
  if (out.size() > wanted) cut();
}

void sort_descending(std::vector<uint64_t>& candidates) { std::sort(candidates.begin(), candidates.end(), std::greater<>()); }

// --- the stages of a draw

void penalise(const SampleRow& row, int64_t n, float* logits, std::vector<int32_t>& counts) {
  if (counts.size() < static_cast<size_t>(n)) counts.resize(static_cast<size_t>(n), 0);
  // First sight of a token, prompt included, takes the repetition penalty; -1 marks it.
  for (int64_t i = 0; i < row.history_length; ++i) {
    const int32_t token = row.history[i];
    if (counts[token] != 0) continue;
    counts[token] = -1;
    if (row.repetition != 1) logits[token] = logits[token] > 0 ? logits[token] / row.repetition : logits[token] * row.repetition;
  }
  for (int64_t i = 0; i < row.history_length; ++i) counts[row.history[i]] = 0;
  for (int64_t i = row.prompt_length; i < row.history_length; ++i) ++counts[row.history[i]];
  for (int64_t i = row.prompt_length; i < row.history_length; ++i) {
    const int32_t token = row.history[i];
    if (counts[token] == 0) continue;
    logits[token] -= row.frequency * static_cast<float>(counts[token]);
    logits[token] -= row.presence;
    counts[token] = 0;
  }
}

// Meets tokens with their logits and keeps the best logit + Gumbel noise. The first is the likeliest, which stands where no
// logit is a number above -infinity.
struct Draw {
  uint64_t key;
  Best best;

  Draw(const SampleRow& row, double top, int64_t likeliest)
      : key(sample_key(row.seed, row.position)),
        best{-std::numeric_limits<double>::infinity(), static_cast<int32_t>(likeliest)} {
    offer(top, likeliest);
  }
  void offer(double logit, int64_t id) {
    const uint64_t bits = sample_bits(key, id);
    // The noise exceeds d only if 1 - u < e^-d. Knowing log2(1 - u) to its integer part rules nearly every token out
    // without a logarithm; the margin covers rounding.
    const int exponent = static_cast<int>(std::bit_width((uint64_t{1} << 53) - bits)) - 54;
    if (exponent * kLn2 >= logit - best.value + 1e-6) return;
    const Best one{logit - std::log(-std::log(static_cast<double>(bits) * 0x1p-53)), static_cast<int32_t>(id)};
    if (better(one, best)) best = one;
  }
  static bool better(const Best& a, const Best& b) { return a.value > b.value || (a.value == b.value && a.token < b.token); }
};

double floor_of(const SampleRow& row, double top) {
  return row.min_p > 0 ? top + std::log(static_cast<double>(row.min_p)) : -std::numeric_limits<double>::infinity();
}

double mass(uint64_t candidate, const float* logits, double top) {
  return std::exp(static_cast<double>(logits[token_of(candidate)]) - top);
}

// Cuts candidates to the smallest prefix of their descending order whose mass reaches `wanted`, in no order: halves them,
// and goes on in the half where it is reached.
void keep_nucleus(const float* logits, double top, double wanted, std::vector<uint64_t>& candidates) {
  auto low = candidates.begin(), high = candidates.end();
  double reached = 0;
  while (high - low > 64) {
    const auto middle = low + (high - low) / 2;
    std::nth_element(low, middle, high, std::greater<>());
    double upper = 0;
    for (auto c = low; c != middle; ++c) upper += mass(*c, logits, top);
    if (reached + upper >= wanted) {
      high = middle;
    } else {
      reached += upper;
      low = middle;
    }
  }
  std::sort(low, high, std::greater<>());
  while (low != high && (low == candidates.begin() || reached < wanted)) reached += mass(*low++, logits, top);
  candidates.resize(static_cast<size_t>(low - candidates.begin()));
}

// The tokens that top_k and top_p leave, in no order.
void select_kept(const Kernels& kernels, const float* logits, int64_t n, const SampleRow& row, double top,
                 std::vector<uint64_t>& kept) {
  double total = 0;   // in units of e^top, like every mass here
  if (row.top_k > 0 && row.top_k < n) {
    select_top(logits, n, row.top_k, kept);
    if (row.top_p >= 1) return;
    sort_descending(kept);
    for (uint64_t candidate : kept) total += mass(candidate, logits, top);
  } else {
    total = std::exp(kernels.logsumexp(logits, n) - top);
    // All tokens this far below the top together weigh less than what the nucleus may leave out.
    const double depth = std::log(static_cast<double>(n) / ((1 - static_cast<double>(row.top_p)) * total)) + 1;
    kept.clear();
    for (int64_t i = 0; i < n; ++i)
      if (logits[i] >= top - depth) kept.push_back(pack(logits[i], i));
  }
  keep_nucleus(logits, top, static_cast<double>(row.top_p) * total, kept);
}

int32_t draw(const Kernels& kernels, const float* logits, int64_t n, const SampleRow& row, std::vector<uint64_t>& kept) {
  const int64_t likeliest = kernels.argmax(logits, n);
  const double top = logits[likeliest];
  const double floor = floor_of(row, top);
  Draw draw(row, top, likeliest);
  const auto offer = [&](int64_t token) {
    if (logits[token] >= floor && token != likeliest) draw.offer(logits[token], token);
  };
  if (row.filtered(n)) {
    select_kept(kernels, logits, n, row, top, kept);
    for (uint64_t candidate : kept) offer(token_of(candidate));
  } else {
    for (int64_t i = 0; i < n; ++i) offer(i);
  }
  return draw.best.token;
}

}  // namespace

Reduced reduce_piece(const Kernels& kernels, const float* logits, int64_t n, int64_t piece, bool sums) {
  const int64_t begin = piece * kVocabularyPiece, count = std::min(kVocabularyPiece, n - begin);
  return {sums ? kernels.logsumexp(logits + begin, count) : 0.0, begin + kernels.argmax(logits + begin, count)};
}

Reduced reduce_fold(const float* logits, const Reduced* pieces, int64_t count) {
  Reduced row = pieces[0];
  double most = pieces[0].logsumexp, total = 0;
  for (int64_t i = 1; i < count; ++i) {
    const float best = logits[row.likeliest], next = logits[pieces[i].likeliest];
    if (next > best || (best != best && next == next)) row.likeliest = pieces[i].likeliest;
    most = std::max(most, pieces[i].logsumexp);
  }
  if (count == 1 || most == -std::numeric_limits<double>::infinity()) return row;
  for (int64_t i = 0; i < count; ++i) total += std::exp(pieces[i].logsumexp - most);
  row.logsumexp = most + std::log(total);
  return row;
}

Reduced reduce_row(const Kernels& kernels, const float* logits, int64_t n) {
  std::vector<Reduced> pieces(static_cast<size_t>(vocabulary_pieces(n)));
  for (size_t i = 0; i < pieces.size(); ++i) pieces[i] = reduce_piece(kernels, logits, n, static_cast<int64_t>(i));
  return reduce_fold(logits, pieces.data(), static_cast<int64_t>(pieces.size()));
}

Best draw_piece(const float* logits, int64_t n, const Reduced& known, const SampleRow& row, int64_t piece) {
  const double top = logits[known.likeliest] / row.temperature, floor = floor_of(row, top);
  Draw draw(row, top, known.likeliest);
  for (int64_t i = piece * kVocabularyPiece; i < std::min(n, (piece + 1) * kVocabularyPiece); ++i) {
    const float logit = logits[i] / row.temperature;
    if (logit >= floor && i != known.likeliest) draw.offer(logit, i);
  }
  return draw.best;
}

Best draw_fold(const Best* pieces, int64_t count) {
  Best best = pieces[0];
  for (int64_t i = 1; i < count; ++i)
    if (Draw::better(pieces[i], best)) best = pieces[i];
  return best;
}

uint64_t sample_key(uint64_t seed, int64_t position) {
  return mix(mix(seed + kGolden) + kGolden * (static_cast<uint64_t>(position) + 1));
}

uint64_t sample_bits(uint64_t key, int64_t token) {
  return mix(key + kGolden * (static_cast<uint64_t>(token) + 1)) >> 11 | 1u;
}

void sample_row(const Kernels& kernels, const float* logits, int64_t n, const Reduced& known, const SampleRow& row,
                SampleResult& result, SampleScratch& scratch) {
  const float* adjusted = logits;
  const bool greedy = row.temperature == 0;
  if (row.penalised() || (!greedy && row.temperature != 1)) {
    scratch.logits.assign(logits, logits + n);
    adjusted = scratch.logits.data();
    if (row.penalised()) penalise(row, n, scratch.logits.data(), scratch.counts);
    if (!greedy)
      for (float& logit : scratch.logits) logit /= row.temperature;
  }
  if (!greedy) result.token = draw(kernels, adjusted, n, row, scratch.candidates);
  else result.token = static_cast<int32_t>(adjusted == logits ? known.likeliest : kernels.argmax(adjusted, n));
  result.logprob = log_probability(logits, known.logsumexp, result.token);
}

void top_logprobs(const float* logits, int64_t n, const Reduced& known, int64_t count, int32_t* tokens, float* values,
                  SampleScratch& scratch) {
  select_top(logits, n, std::min(count, n), scratch.candidates);
  sort_descending(scratch.candidates);
  for (size_t i = 0; i < scratch.candidates.size(); ++i) {
    tokens[i] = token_of(scratch.candidates[i]);
    values[i] = log_probability(logits, known.logsumexp, tokens[i]);
  }
}

}  // namespace hasten
