#include "ops/cut.h"

namespace hasten {
namespace {

constexpr int64_t kLastToken = std::numeric_limits<int32_t>::max();   // its key is the lowest of a value

constexpr double kUnknown = -1;

// The key of the lowest value no less than `x`.
uint64_t least_key(double x) {
  auto value = static_cast<float>(x);
  if (static_cast<double>(value) < x) value = std::nextafter(value, std::numeric_limits<float>::infinity());
  return pack(value, kLastToken);
}

}  // namespace

void Cuts::begin(const SampleRow& how, int64_t n, const Kept& kept, double total, double least_logit) {
  how_ = how;
  n_ = n;
  kept_ = kept;
  total_ = total;
  least_logit_ = least_logit;
  enter(Stage::top_k);
}

// Sets `stage` up, or the first after it that the row has.
void Cuts::enter(Stage stage) {
  if (stage == Stage::top_k && !how_.ranked(n_)) stage = Stage::top_p;
  if (stage == Stage::top_p && how_.top_p >= 1) stage = Stage::moments;
  if (stage >= Stage::moments) kept_.bar = std::max(kept_.bar, least_key(least_logit_));
  if (stage == Stage::moments && how_.typical_p >= 1) stage = Stage::done;
  stage_ = stage;
  low_ = kept_.bar;
  high_ = pack(static_cast<float>(kept_.top), 0);
  reached_ = 0;
  if (stage == Stage::top_k) wanted_ = how_.top_k;
  if (stage == Stage::top_p) wanted_ = how_.ranked(n_) ? kUnknown : static_cast<double>(how_.top_p) * total_;
  if (stage == Stage::top_p && !how_.ranked(n_)) low_ = std::max(low_, least_key(nucleus_floor(how_, n_, kept_, total_)));
  if (stage == Stage::typical) {
    wanted_ = static_cast<double>(how_.typical_p) * total_;
    low_ = pack(-std::numeric_limits<float>::infinity(), kLastToken);
    high_ = pack(0.0f, 0);
  }
}

// Bits by which keys of the range are shifted into bins.
int Cuts::shift() const {
  return std::max(0, static_cast<int>(std::bit_width(high_ - low_)) - static_cast<int>(std::bit_width(uint64_t{kBins - 1})));
}

void Cuts::tally(const float* logits, const float* masses, int64_t n, int64_t first, Tally& out) const {
  out = {};
  const int by = shift();
  const auto add = [&](uint64_t key, double weight) {
    const auto bin = static_cast<int64_t>((high_ - key) >> by);
    out.weight[bin] += weight;
    ++out.count[bin];
  };
  if (stage_ == Stage::moments) {
    each_kept(logits, n, first, kept_, kHighest, [&](int64_t i, uint64_t) {
      out.mass += static_cast<double>(masses[i]);
      out.weighted += static_cast<double>(masses[i]) * kept_.relative(logits[i]);
    });
  } else if (stage_ == Stage::typical) {
    each_kept(logits, n, first, kept_, kHighest, [&](int64_t i, uint64_t) {
      const uint64_t key = kept_.typical_key(logits[i], first + i);
      if (key >= low_ && key <= high_) add(key, static_cast<double>(masses[i]));
    });
  } else {
    Kept range = kept_;
    range.bar = std::max(range.bar, low_);
    const bool counts = stage_ == Stage::top_k;
    each_kept(logits, n, first, range, high_, [&](int64_t i, uint64_t key) {
      add(key, counts ? 1.0 : static_cast<double>(masses[i]));
    });
  }
}

void Cuts::advance(const std::vector<const Tally*>& pieces) {
  if (stage_ == Stage::moments) {
    double weighted = 0;
    total_ = 0;
    for (const Tally* piece : pieces) total_ += piece->mass, weighted += piece->weighted;
    kept_.mean = weighted / total_;
    return enter(Stage::typical);
  }
  if (!narrow(pieces)) return;
  if (stage_ == Stage::typical) {
    kept_.typical_bar = low_;
    stage_ = Stage::done;
  } else {
    kept_.bar = low_;
    enter(stage_ == Stage::top_k ? Stage::top_p : Stage::moments);
  }
}

// Goes on in the bin where the weight is reached. True once `low_` is the key of the last token kept.
bool Cuts::narrow(const std::vector<const Tally*>& pieces) {
  double weight[kBins] = {};
  int64_t count[kBins] = {};
  for (const Tally* piece : pieces)
    for (int64_t bin = 0; bin < kBins; ++bin) {
      weight[bin] += piece->weight[bin];
      count[bin] += piece->count[bin];
    }
  if (wanted_ == kUnknown) {
    wanted_ = 0;
    for (const double one : weight) wanted_ += one;
    wanted_ *= static_cast<double>(how_.top_p);
  }
  const int by = shift();
  for (int64_t bin = 0; bin < kBins; ++bin) {
    if (count[bin] == 0) continue;
    if (reached_ + weight[bin] < wanted_) {
      reached_ += weight[bin];
      continue;
    }
    high_ -= static_cast<uint64_t>(bin) << by;
    low_ = std::max(low_, high_ - std::min(high_, (uint64_t{1} << by) - 1));
    return count[bin] == 1 || by == 0;
  }
  return true;   // rounding kept the sums below what is wanted: all are kept
}

}  // namespace hasten
