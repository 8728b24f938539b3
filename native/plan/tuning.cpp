#include "plan/tuning.h"

#include <algorithm>

namespace hasten {
namespace {

constexpr int64_t KiB = 1024;
constexpr size_t kSamples = 8;                                        // of each candidate
constexpr double kClearly = 0.97;                                     // of the first one's time: less may be noise

// Few tokens: how finely panels are shared out. Many: the shape of a chunk.
constexpr Blocking kFew[] = {{6, 128, 128 * KiB}, {2, 128, 128 * KiB}, {16, 128, 128 * KiB}};
constexpr Blocking kMany[] = {{6, 128, 128 * KiB}, {6, 64, 128 * KiB}, {6, 256, 128 * KiB}, {6, 256, 512 * KiB}};

}  // namespace

int Tuning::regime(int64_t tokens) { return tokens == 1 ? 0 : tokens <= 4 ? 1 : tokens <= 32 ? 2 : tokens <= 128 ? 3 : 4; }

std::span<const Blocking> Tuning::candidates(int regime) {
  if (regime < 3) return kFew;
  return kMany;
}

int64_t Tuning::most_tokens() {
  int64_t most = 0;
  for (int regime = 0; regime < kRegimes; ++regime)
    for (const Blocking& b : candidates(regime)) most = std::max(most, b.tokens);
  return most;
}

int Tuning::join(const std::string& signature) {
  const auto same = [&](const Place& place) { return place.signature == signature; };
  const auto at = std::find_if(places_.begin(), places_.end(), same);
  if (at != places_.end()) return static_cast<int>(at - places_.begin());
  places_.push_back({signature, 0, {}});
  for (int regime = 0; regime < kRegimes; ++regime)
    places_.back().choices[regime].seconds.resize(candidates(regime).size());
  return static_cast<int>(places_.size()) - 1;
}

// Members try different candidates in one step, and each tries them all from step to step.
int Tuning::trial(const Choice& choice, int64_t member, int regime) const {
  if (choice.chosen >= 0) return choice.chosen;
  return measuring_ ? static_cast<int>((member + round_) % static_cast<int64_t>(candidates(regime).size())) : 0;
}

const Blocking& Tuning::blocking(int place, int64_t member, int64_t tokens) const {
  const int now = regime(tokens);
  return candidates(now)[static_cast<size_t>(trial(places_[place].choices[now], member, now))];
}

bool Tuning::wants(int place, int64_t tokens) const {
  return measuring_ && places_[place].choices[regime(tokens)].chosen < 0;
}

void Tuning::note(int place, int64_t member, int64_t tokens, double seconds) {
  const int now = regime(tokens);
  Choice& choice = places_[place].choices[now];
  if (tokens < choice.tokens) return;                                 // a short step says little about long ones
  if (tokens > choice.tokens)
    for (auto& seconds : choice.seconds) seconds.clear();
  choice.tokens = tokens;
  choice.seconds[static_cast<size_t>(trial(choice, member, now))].push_back(seconds / static_cast<double>(tokens));
}

void Tuning::settle() {
  if (!measuring_) return;
  ++round_;
  for (Place& place : places_)
    for (Choice& choice : place.choices) {
      if (choice.chosen >= 0) continue;
      if (!std::all_of(choice.seconds.begin(), choice.seconds.end(), [](const auto& s) { return s.size() >= kSamples; })) continue;
      // The quarter that was disturbed least.
      std::vector<double> quick;
      for (auto& s : choice.seconds) {
        std::nth_element(s.begin(), s.begin() + static_cast<int64_t>(s.size() / 4), s.end());
        quick.push_back(s[s.size() / 4]);
        s.clear();
      }
      const auto best = std::min_element(quick.begin(), quick.end());
      choice.chosen = *best < kClearly * quick[0] ? static_cast<int>(best - quick.begin()) : 0;
      ++found_;
    }
}

bool Tuning::open() const {
  for (const Place& place : places_)
    for (const Choice& choice : place.choices)
      if (choice.chosen < 0 && choice.tokens > 0) return true;
  return false;
}

std::vector<Tuning::Found> Tuning::found() const {
  std::vector<Found> all;
  for (const Place& place : places_)
    for (int regime = 0; regime < kRegimes; ++regime)
      if (const int chosen = place.choices[regime].chosen; chosen >= 0)
        all.push_back({place.signature, regime, candidates(regime)[static_cast<size_t>(chosen)]});
  return all;
}

void Tuning::remember(const Found& known) {
  if (known.regime < 0 || known.regime >= kRegimes) return;
  const auto options = candidates(known.regime);
  const auto at = std::find(options.begin(), options.end(), known.blocking);
  if (at == options.end()) return;
  for (Place& place : places_)
    if (place.signature == known.signature) place.choices[known.regime].chosen = static_cast<int>(at - options.begin());
}

}  // namespace hasten
