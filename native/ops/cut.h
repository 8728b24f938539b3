// Filters over so many tokens that threads must share them: the key at which a filter cuts is searched for in rounds, each a
// histogram by piece of the range of keys that the round before left. Keys are total, so the cut is exact, and the sums are
// by piece and bin in order, so that it does not depend on who made them.
#pragma once
#include <cmath>

#include "ops/sample.h"

namespace hasten {

// Above every key of a number.
inline constexpr uint64_t kHighest = uint64_t{0xff800000u} << 32 | 0xffffffffu;

// Which of a row's tokens its filters have kept so far, and what they weigh.
struct Kept {
  double top = 0;             // the greatest logit: masses are in units of e^(top * inverse)
  double inverse = 1;         // 1 / temperature
  double mean = 0;            // of relative(logit) over what typical_p is applied to
  uint64_t bar = pack(std::numeric_limits<float>::lowest(), std::numeric_limits<int32_t>::max());
  uint64_t typical_bar = 0;

  double relative(float logit) const { return (static_cast<double>(logit) - top) * inverse; }
  double mass(float logit) const { return std::exp(relative(logit)); }
  // Greater = nearer to the expected information: |-log p - entropy| = |relative - mean| (Meister et al. 2022, eq. 5).
  uint64_t typical_key(float logit, int64_t token) const {
    return pack(static_cast<float>(-std::abs(relative(logit) - mean)), token);
  }
};

// body(i, pack(logits[i], first + i)) for each kept token of a piece; those above `high` need not be met.
template <typename Body>
void each_kept(const float* logits, int64_t n, int64_t first, const Kept& kept, uint64_t high, Body&& body) {
  each_within(logits, n, value_of(kept.bar), value_of(high), [&](int64_t i) {
    const uint64_t key = pack(logits[i], first + i);
    if (key < kept.bar || key > high) return;
    if (kept.typical_bar != 0 && kept.typical_key(logits[i], first + i) < kept.typical_bar) return;
    body(i, key);
  });
}

// A logit below which all tokens together weigh less than what top_p may leave out, where it is the first filter; masses sum
// to `total`.
inline double nucleus_floor(const SampleRow& how, int64_t n, const Kept& kept, double total) {
  const double depth = std::log(static_cast<double>(n) / ((1 - static_cast<double>(how.top_p)) * total)) + 1;
  return kept.top - depth / kept.inverse;
}

// What a piece adds to one round of a search.
inline constexpr int64_t kBins = 1024;
struct Tally {
  double weight[kBins];
  int32_t count[kBins];
  double mass, weighted;   // sum of masses; of masses times relative logits
};

// The filters of one row, one after the other.
class Cuts {
 public:
  // `kept`: what there is to filter. `total`: of masses, where top_p comes before all else. `least_logit`: min_p's.
  void begin(const SampleRow& how, int64_t n, const Kept& kept, double total, double least_logit);
  bool searching() const { return stage_ != Stage::done; }
  // A piece's part of a round. masses[i]: of logits[i].
  void tally(const float* logits, const float* masses, int64_t n, int64_t first, Tally& out) const;
  // Ends a round, given every piece's part in order.
  void advance(const std::vector<const Tally*>& pieces);
  const Kept& kept() const { return kept_; }

 private:
  enum class Stage { top_k, top_p, moments, typical, done };
  void enter(Stage stage);
  bool narrow(const std::vector<const Tally*>& pieces);
  int shift() const;

  SampleRow how_;
  int64_t n_ = 0;
  Kept kept_;
  double total_ = 0, least_logit_ = 0;
  Stage stage_ = Stage::done;
  // The search: the first keys of [low, high], greatest first, whose weight reaches what is wanted.
  uint64_t low_ = 0, high_ = 0;
  double reached_ = 0;     // by keys above high
  double wanted_ = 0;      // unknown yet: top_p's share of all in the first round
};

}  // namespace hasten
