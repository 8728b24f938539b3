// How a linear's work is cut into chunks is measured, not guessed: the steps that serve try each way in turn, in the very
// conditions that count, and the quickest stays. Whatever is chosen, the bits are the same.
#pragma once
#include <cstdint>
#include <span>
#include <string>
#include <vector>

namespace hasten {

struct Blocking {
  int64_t chunks_per_thread;          // work is cut at least this fine, so that a slow thread delays little
  int64_t tokens;                     // a chunk's at most: what a kernel prepares of tokens serves the more panels
  int64_t tile_bytes;                 // of output that a thread keeps in its cache between kernel and epilogue
  bool operator==(const Blocking&) const = default;
};

class Tuning {
 public:
  static constexpr int kRegimes = 5;  // steps of 1, 2 to 4, 5 to 32, 33 to 128 and more tokens
  static int regime(int64_t tokens);
  static std::span<const Blocking> candidates(int regime);            // the first is what is used unmeasured
  static int64_t most_tokens();                                       // of any candidate

  // Linears of one signature do the same work: they share a place, whose measurements count for all of them.
  int join(const std::string& signature);                             // returns the place
  int64_t member(int place) { return places_[place].members++; }

  // During a step nothing that `blocking` reads changes.
  const Blocking& blocking(int place, int64_t member, int64_t tokens) const;
  bool wants(int place, int64_t tokens) const;
  void note(int place, int64_t member, int64_t tokens, double seconds);   // by one thread of the step only
  void settle();                                                      // between steps

  void measure(bool on) { measuring_ = on; }
  // What was found, and what an earlier process found: blockings that are no candidates any more are not taken.
  struct Found {
    std::string signature;
    int regime;
    Blocking blocking;
  };
  int64_t found_count() const { return found_; }                      // since the program was made
  bool open() const;                                                  // a choice that steps have begun to make
  std::vector<Found> found() const;
  void remember(const Found& known);

 private:
  struct Choice {
    int chosen = -1;                                                  // none yet
    int64_t tokens = 0;                                               // of the steps compared: the most that were met
    std::vector<std::vector<double>> seconds;                         // of each candidate, for a token
  };
  struct Place {
    std::string signature;
    int64_t members = 0;
    Choice choices[kRegimes];
  };
  int trial(const Choice& choice, int64_t member, int regime) const;
  std::vector<Place> places_;
  bool measuring_ = false;
  int64_t round_ = 0, found_ = 0;
};

}  // namespace hasten
