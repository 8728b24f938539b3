// Draws of every kind, their pieces on threads: what the sanitizers watch. Their meaning is held against NumPy in
// tests/native/test_sampling.py; here a plain twin says which token has the greatest logit and noise of those kept.
#include <algorithm>
#include <numeric>

#include "check.h"
#include "ops/noise.h"
#include "ops/sample.h"
#include "plan/pool.h"

namespace hasten::test {
namespace {

constexpr int64_t kVocabulary = 2 * kVocabularyPiece + 77;
constexpr int64_t kTop = 5;
const int32_t kHistory[] = {3, 9, 20001, 9, 32800, 3};
const int32_t kBiased[] = {5, 20000, 32844}, kBanned[] = {1, 17000};
const float kBias[] = {3, 9, -4};

std::vector<SampleRow> kinds(const uint32_t* allowed) {
  return {
      {.temperature = 0},
      {.temperature = 0, .presence = 9},
      {},
      {.temperature = 0.7f, .min_p = 0.1f},
      {.temperature = 0.8f, .top_k = 40, .top_p = 0.95f},
      {.top_k = 5000, .top_p = 0.9f},
      {.top_p = 0.95f},
      {.temperature = 50, .top_p = 0.99f},
      {.typical_p = 0.4f},
      {.top_k = 7, .typical_p = 0.8f, .repetition = 1.5f, .frequency = 0.3f},
      {.top_p = 0.9f, .bias_tokens = kBiased, .bias = kBias, .banned = kBanned},
      {.typical_p = 0.9f, .allowed = allowed},
      {.top_k = 20000, .min_p = 0.001f, .banned = kBanned, .allowed = allowed},
  };
}

struct Results {
  explicit Results(size_t rows) : tokens(rows), logprobs(rows), top(rows * kTop), top_logprobs(rows * kTop) {}
  std::vector<int32_t> tokens;
  std::vector<float> logprobs;
  std::vector<int32_t> top;
  std::vector<float> top_logprobs;
  bool operator==(const Results&) const = default;
};

Results drawn(const Kernels& k, const std::vector<SampleRow>& rows, SampleScratch& scratch, int threads) {
  Results out(rows.size());
  const Share share = [&](int64_t count, const std::function<void(int64_t)>& body) {
    Pool::instance().run(threads, [&](Team& team) { team.for_each(count, body); });
  };
  sample(k, kVocabulary, rows, scratch, share,
         {out.tokens.data(), out.logprobs.data(), out.top.data(), out.top_logprobs.data(), kTop});
  return out;
}

// The draw among the top_k, or all, in float64.
int32_t twin(const SampleRow& row) {
  std::vector<int32_t> order(static_cast<size_t>(kVocabulary));
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) { return row.logits[a] > row.logits[b]; });
  if (row.top_k > 0) order.resize(static_cast<size_t>(row.top_k));
  double best = -HUGE_VAL;
  int32_t token = -1;
  for (const int32_t id : order) {
    const double uniform = static_cast<double>(sample_bits(sample_key(row.seed, row.position), id)) * 0x1p-53;
    const double value = row.logits[id] / static_cast<double>(row.temperature) - std::log(-std::log(uniform));
    if (value > best) best = value, token = id;
  }
  return token;
}

}  // namespace

void test_sampling(const Kernels& k) {
  Random random(11);
  std::vector<uint32_t> allowed(static_cast<size_t>((kVocabulary + 31) / 32));
  for (uint32_t& word : allowed) word = static_cast<uint32_t>(random.next());
  std::vector<SampleRow> rows = kinds(allowed.data());
  std::vector<std::vector<float>> logits;
  for (size_t i = 0; i < rows.size(); ++i) logits.push_back(random.normals(kVocabulary, 2));
  for (size_t i = 0; i < rows.size(); ++i) {
    rows[i].logits = logits[i].data();
    rows[i].history = kHistory;
    rows[i].prompt_length = 2;
    rows[i].seed = random.next();
    rows[i].position = static_cast<int64_t>(i);
  }
  SampleScratch fresh, used;
  const Results alone = drawn(k, rows, fresh, 1);
  for (const int threads : {1, 2, 4}) {
    expect(drawn(k, rows, used, threads) == alone, "sampling: other draws with %d threads", threads);
    std::vector<SampleRow> turned(rows.rbegin(), rows.rend());   // what a row's scratch held before was another's
    std::vector<int32_t> tokens = drawn(k, turned, used, threads).tokens;
    std::reverse(tokens.begin(), tokens.end());
    expect(tokens == alone.tokens, "sampling: other draws in other company with %d threads", threads);
  }
  for (const int32_t top_k : {0, 1, 40, 1500, 30000}) {
    SampleRow row{.logits = logits[0].data(), .temperature = 0.9f, .top_k = top_k, .seed = 5, .position = top_k};
    const int32_t wanted = twin(row);
    expect(drawn(k, {row}, used, 2).tokens[0] == wanted, "sampling: not token %d of the best %d", wanted, top_k);
  }
}

}  // namespace hasten::test
