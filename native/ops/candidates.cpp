#include "ops/candidates.h"

namespace hasten {
namespace {

constexpr int64_t kSmallest = 8, kLargest = 256;   // blocks whose greatest values bound the k-th best

// The k-th greatest of the blocks' greatest values: as many values at least are no smaller.
float bound_of(const float* x, int64_t n, int64_t k, int64_t block) {
  constexpr float kLowest = -std::numeric_limits<float>::infinity();
  float greatest[kVocabularyPiece / kSmallest];
  int64_t count = 0;
  for (int64_t begin = 0; begin + block <= n; begin += block) {
    float most[kSmallest];
    std::fill_n(most, kSmallest, kLowest);
    for (int64_t i = begin; i < begin + block; i += kSmallest)
      for (int64_t j = 0; j < kSmallest; ++j) most[j] = x[i + j] > most[j] ? x[i + j] : most[j];
    greatest[count++] = *std::max_element(most, most + kSmallest);
  }
  std::nth_element(greatest, greatest + (k - 1), greatest + count, std::greater<>());
  return greatest[k - 1];
}

}  // namespace

void select_top(const float* values, int64_t n, int64_t first, int64_t k, std::vector<uint64_t>& out) {
  out.clear();
  k = std::min(k, n);
  if (k <= 0) return;
  float bound = -std::numeric_limits<float>::infinity();
  if (k <= n / kSmallest) {
    // Four times as many blocks as wanted bring the bound near the k-th best.
    const auto size = static_cast<int64_t>(std::bit_floor(static_cast<uint64_t>(std::max<int64_t>(n / (4 * k), 1))));
    bound = bound_of(values, n, k, std::clamp(size, kSmallest, kLargest));
  }
  if (bound > -std::numeric_limits<float>::infinity()) {
    each_within(values, n, bound, std::numeric_limits<float>::infinity(),
                [&](int64_t i) { out.push_back(pack(values[i], first + i)); });
  } else {
    for (int64_t i = 0; i < n; ++i) out.push_back(pack(values[i], first + i));   // NaN too, where numbers are too few
  }
  if (static_cast<int64_t>(out.size()) <= k) return;
  std::nth_element(out.begin(), out.begin() + (k - 1), out.end(), std::greater<>());
  out.resize(static_cast<size_t>(k));
}

}  // namespace hasten
