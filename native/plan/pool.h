// The process's one thread pool. A job is a function that the threads of a team run from beginning to end; what they share
// out among them are phases of many pieces. A phase is over when its pieces are done, not when every thread has come by: a
// thread that the system holds up delays the others by no more than the piece in its hands, and skips what it missed.
// No sum is ever split over threads here.
#pragma once
#include <atomic>
#include <cstdint>
#include <memory>
#include <type_traits>
#include <utility>

namespace hasten {

// What the threads of one team share; each counter on a cache line of its own.
struct TeamState {
  explicit TeamState(int n) : threads(n) {}
  const int threads;
  alignas(64) std::atomic<uint64_t> claim{0};  // current phase << 32 | next piece of it
  alignas(64) std::atomic<int64_t> done{0};    // pieces of the current phase
  alignas(64) std::atomic<uint32_t> phase{0};  // phases that are over
};

// A thread's view of its team.
class Team {
 public:
  Team(TeamState& state, int thread) : state_(state), thread_(thread) {}
  int thread() const { return thread_; }  // 0 is the caller of Pool::run
  int threads() const { return state_.threads; }
  // Where this thread notes when it begins and ends to wait, a pair each time while there is room.
  void note_waits(int64_t* first, int64_t* end) { note_ = first, note_end_ = end; }

  // body(i) for each i in [0, count), on whichever thread comes first; returns when all are done, and their writes seen.
  // Every thread of the team must make the same calls in the same order. Only inside a body may it look at memory that
  // other phases write: outside, they may be long past.
  template <typename Body>
  void for_each(int64_t count, Body&& body) {
    if (count == 0) return;
    if (state_.threads == 1) {
      for (int64_t i = 0; i < count; ++i) body(i);
      return;
    }
    const uint32_t phase = phase_++;
    for (uint64_t seen = state_.claim.load(std::memory_order_acquire);;) {
      if (seen >> 32 != phase) return;  // done without this thread
      const auto i = static_cast<int64_t>(seen & 0xffffffff);
      if (i >= count) return wait(phase);
      if (!state_.claim.compare_exchange_weak(seen, seen + 1, std::memory_order_acquire)) continue;
      body(i);
      if (state_.done.fetch_add(1, std::memory_order_acq_rel) + 1 == count) return finish(phase);
      seen = state_.claim.load(std::memory_order_acquire);
    }
  }

 private:
  void wait(uint32_t phase);
  void finish(uint32_t phase);
  TeamState& state_;
  const int thread_;
  uint32_t phase_ = 0;  // that this thread comes to next
  int64_t* note_ = nullptr;
  int64_t* note_end_ = nullptr;
};

class Pool {
 public:
  // The process's pool: made at first use, made anew in a forked child, never destroyed (its threads sleep at exit).
  static Pool& instance();

  // Runs job(team) on up to `threads` threads, the caller's among them, in the pool's floating-point mode: threads that
  // have not begun when the caller is done are left out. Jobs must not throw. Two callers take turns.
  template <typename Job>
  void run(int threads, Job&& job) {
    run_erased(threads, [](void* context, Team& team) { (*static_cast<std::remove_reference_t<Job>*>(context))(team); },
               const_cast<void*>(static_cast<const void*>(&job)));
  }
  int workers() const;  // threads started so far, callers not counted

 private:
  using Erased = void (*)(void* context, Team& team);
  struct Impl;
  Pool();
  void run_erased(int threads, Erased job, void* context);
  void start_afresh();
  Impl* impl_;
};

// Round to nearest, denormals flushed to zero: set on every thread of a team alike, put back when it goes.
class FloatMode {
 public:
  FloatMode();
  ~FloatMode();
  FloatMode(const FloatMode&) = delete;
  FloatMode& operator=(const FloatMode&) = delete;
  static bool flushes_denormals();  // of the calling thread, by trying

 private:
  uint64_t before_;
};

}  // namespace hasten
