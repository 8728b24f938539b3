// A piece of a row's logits as it is drawn from: bias, then penalties, then bans.
#pragma once
#include "ops/sample.h"

namespace hasten {

// Kept between calls so that a step allocates nothing.
struct EditScratch {
  std::vector<float> logits;      // [piece]
  std::vector<int32_t> counts;    // [piece]; zero between calls
  std::vector<int32_t> seen;      // tokens of the history in this piece, less its first
};

// Where the edited logits of tokens [begin, begin + count) lie until the next call. `begin` is a multiple of 32.
const float* edit_piece(const SampleRow& row, int64_t begin, int64_t count, EditScratch& scratch);

}  // namespace hasten
