// Gumbel-max: the token of the greatest logit + noise is a draw from the softmax (Gumbel 1954; Maddison et al. 2014). The
// noise is a function of seed, position and token, so that tokens may be met in any order, by any thread.
#pragma once
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>

namespace hasten {

// Uniform in (0, 1) from seed, position and token: the top 53 bits of a splitmix64 sequence (Steele et al. 2014) whose state
// starts at a mix of seed and position. The lowest bit is set, so that neither end is met.
inline constexpr uint64_t kGolden = 0x9e3779b97f4a7c15u;
inline uint64_t splitmix(uint64_t x) {
  x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
  x = (x ^ x >> 27) * 0x94d049bb133111ebu;
  return x ^ x >> 31;
}
inline uint64_t sample_key(uint64_t seed, int64_t position) {
  return splitmix(splitmix(seed + kGolden) + kGolden * (static_cast<uint64_t>(position) + 1));
}
// Odd, below 2^53; the uniform is these times 2^-53.
inline uint64_t sample_bits(uint64_t key, int64_t token) {
  return splitmix(key + kGolden * (static_cast<uint64_t>(token) + 1)) >> 11 | 1u;
}

// The greatest logit + noise met so far.
struct Best {
  double value = -std::numeric_limits<double>::infinity();
  int32_t token = -1;

  bool below(const Best& other) const { return other.value > value || (other.value == value && other.token < token); }
};

struct Draw {
  explicit Draw(uint64_t key_) : key(key_) {}
  uint64_t key;
  Best best;

  void offer(double logit, int64_t token) {
    const uint64_t bits = sample_bits(key, token);
    // The noise exceeds d only if 1 - u < e^-d. Knowing log2(1 - u) to its integer part rules nearly every token out
    // without a logarithm; the margin covers rounding.
    constexpr double kLn2 = 0.693147180559945309417;
    const int exponent = static_cast<int>(std::bit_width((uint64_t{1} << 53) - bits)) - 54;
    if (exponent * kLn2 >= logit - best.value + 1e-6) return;
    const Best one{logit - std::log(-std::log(static_cast<double>(bits) * 0x1p-53)), static_cast<int32_t>(token)};
    if (best.below(one)) best = one;
  }
};

}  // namespace hasten
