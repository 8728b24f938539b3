// Tokens in the order in which a filter keeps them: one integer each, so that an order is total and its cut exact.
#pragma once
#include <algorithm>
#include <bit>
#include <cstdint>
#include <functional>
#include <limits>
#include <vector>

namespace hasten {

// A vocabulary is worked on in pieces of a fixed size, folded in order, so that threads can share one row's.
inline constexpr int64_t kVocabularyPiece = 16384;
inline int64_t vocabulary_pieces(int64_t n) { return (n + kVocabularyPiece - 1) / kVocabularyPiece; }

// A value and its token, greater = kept sooner: the larger value, the lower token among equals. NaN comes last.
inline uint64_t pack(float value, int64_t token) {
  value += 0.0f;   // -0 and 0 are equals
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const uint32_t ordered = value != value ? 0u : bits >> 31 ? ~bits : bits | 0x80000000u;
  return static_cast<uint64_t>(ordered) << 32 | static_cast<uint32_t>(~static_cast<uint32_t>(token));
}
inline int32_t token_of(uint64_t key) { return static_cast<int32_t>(~static_cast<uint32_t>(key)); }
inline float value_of(uint64_t key) {
  const auto ordered = static_cast<uint32_t>(key >> 32);
  return std::bit_cast<float>(ordered >> 31 ? ordered & 0x7fffffffu : ~ordered);
}

// body(i) for each x[i] within [low, high], ascending. Where most blocks hold none, this costs little more than reading them:
// compilers vectorise the test. Where many hold some, no branch depends on which.
template <typename Body>
void each_within(const float* x, int64_t n, float low, float high, Body&& body) {
  constexpr int64_t kBlock = 32;
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    const int64_t end = std::min(n, begin + kBlock);
    if (end - begin == kBlock) {
      int32_t any = 0;
      for (int64_t j = 0; j < kBlock; ++j) any |= (x[begin + j] >= low ? 1 : 0) & (x[begin + j] <= high ? 1 : 0);
      if (any == 0) continue;
    }
    int64_t found[kBlock], count = 0;
    for (int64_t i = begin; i < end; ++i) {
      found[count] = i;
      count += (x[i] >= low ? 1 : 0) & (x[i] <= high ? 1 : 0);
    }
    for (int64_t j = 0; j < count; ++j) body(found[j]);
  }
}

// The keys of the k greatest of a piece's n values, in no order. values[i] is of token first + i.
void select_top(const float* values, int64_t n, int64_t first, int64_t k, std::vector<uint64_t>& out);

// Cuts keys to the smallest first part of their descending order whose mass reaches `wanted`, at least one, in no order:
// halves them, and goes on in the half where it is reached.
template <typename Mass>
void keep_prefix(std::vector<uint64_t>& keys, double wanted, Mass&& mass) {
  auto low = keys.begin(), high = keys.end();
  double reached = 0;
  while (high - low > 64) {
    const auto middle = low + (high - low) / 2;
    std::nth_element(low, middle, high, std::greater<>());
    double upper = 0;
    for (auto key = low; key != middle; ++key) upper += mass(*key);
    if (reached + upper >= wanted) {
      high = middle;
    } else {
      reached += upper;
      low = middle;
    }
  }
  std::sort(low, high, std::greater<>());
  while (low != high && (low == keys.begin() || reached < wanted)) reached += mass(*low++);
  keys.erase(low, keys.end());
}

}  // namespace hasten
