#include "ops/candidates.h"

namespace hasten {
namespace {

constexpr int64_t kSmallest = 8, kLargest = 256;   // blocks whose greatest values bound the k-th best

constexpr float kLowest = -std::numeric_limits<float>::infinity();

float greatest_of(const float* x, int64_t n) {
  float most[kSmallest];
  std::fill_n(most, kSmallest, kLowest);
  for (int64_t i = 0; i < n; i += kSmallest)
    for (int64_t j = 0; j < kSmallest; ++j) most[j] = x[i + j] > most[j] ? x[i + j] : most[j];
  return *std::max_element(most, most + kSmallest);
}

// The values that may be among the k greatest. The k-th greatest of blocks' greatest values bounds them from below: as many
// values at least are no smaller. False where that bounds nothing.
bool gather_top(const float* values, int64_t n, int64_t first, int64_t k, std::vector<uint64_t>& out) {
  // Four times as many blocks as wanted bring the bound near the k-th best.
  const auto size = static_cast<int64_t>(std::bit_floor(static_cast<uint64_t>(std::max<int64_t>(n / (4 * k), 1))));
  const int64_t block = std::clamp(size, kSmallest, kLargest), count = n / block;
  if (k > count) return false;
  float greatest[kVocabularyPiece / kSmallest], sorted[kVocabularyPiece / kSmallest];
  for (int64_t i = 0; i < count; ++i) sorted[i] = greatest[i] = greatest_of(values + i * block, block);
  std::nth_element(sorted, sorted + (k - 1), sorted + count, std::greater<>());
  const float bound = sorted[k - 1];
  if (!(bound > kLowest)) return false;
  for (int64_t i = 0; i * block < n; ++i) {
    if (i < count && greatest[i] < bound) continue;
    for (int64_t j = i * block; j < std::min(n, (i + 1) * block); ++j)
      if (values[j] >= bound) out.push_back(pack(values[j], first + j));
  }
  return true;
}

}  // namespace

void select_top(const float* values, int64_t n, int64_t first, int64_t k, std::vector<uint64_t>& out) {
  out.clear();
  k = std::min(k, n);
  if (k <= 0) return;
  if (!gather_top(values, n, first, k, out))
    for (int64_t i = 0; i < n; ++i) out.push_back(pack(values[i], first + i));   // NaN too, where numbers are too few
  if (static_cast<int64_t>(out.size()) <= k) return;
  std::nth_element(out.begin(), out.begin() + (k - 1), out.end(), std::greater<>());
  out.resize(static_cast<size_t>(k));
}

}  // namespace hasten
