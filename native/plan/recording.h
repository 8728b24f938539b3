// When each thread came to the end of each plan step, and when it waited for the others: what a profile is made of.
#pragma once
#include <chrono>
#include <cstdint>
#include <vector>

#include "core.h"

namespace hasten {

inline int64_t steady_nanoseconds() {
  using namespace std::chrono;
  return duration_cast<nanoseconds>(steady_clock::now().time_since_epoch()).count();
}

// Room for a number of runs, made before the first; what comes after the last is not recorded. Every thread of a run writes
// a row of its own, zeros where it wrote nothing:
//   marks [steps + 2]: it has entered, rope tables are filled, then each plan step is over for it
//   waits [3 * (steps + 1)][2]: it began and ended to wait; where there are more, the first ones
class Recording {
 public:
  Recording() = default;
  Recording(int64_t runs, int threads, int64_t steps)
      : runs_(runs), threads_(threads), marks_(steps + 2), row_(round_up(marks_ + 6 * (steps + 1), kLine)),
        data_(runs * threads * row_) {}

  int64_t* row(int thread) { return done_ == runs_ ? nullptr : data_.data() + (done_ * threads_ + thread) * row_; }
  int64_t* waits(int64_t* row) const { return row + marks_; }
  int64_t* waits_end(int64_t* row) const { return row + marks_ + 6 * (marks_ - 1); }
  void over() { done_ += done_ != runs_; }

  int64_t runs() const { return done_; }
  int64_t row_length() const { return row_; }
  const int64_t* data() const { return data_.data(); }  // [runs][threads][row_length]

 private:
  static constexpr int64_t kLine = 8;  // so that no two threads write into one cache line, but for the vector's own start
  int64_t runs_ = 0, threads_ = 0, marks_ = 0, row_ = 0, done_ = 0;
  std::vector<int64_t> data_;
};

}  // namespace hasten
