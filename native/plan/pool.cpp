#include "plan/pool.h"

#include "plan/recording.h"

#include <pthread.h>
#include <sched.h>

#include <chrono>
#include <mutex>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace hasten {
namespace {

void relax() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

// Waits until `flag` is no longer `old`. Spinning is fastest where every thread has its core; where they must share one,
// yielding lets the thread that is waited for run; after that the thread sleeps.
void wait_for_change(const std::atomic<uint32_t>& flag, uint32_t old) {
  using Clock = std::chrono::steady_clock;
  for (int i = 0; i < 200; ++i) {
    if (flag.load(std::memory_order_acquire) != old) return;
    relax();
  }
  const auto until = Clock::now() + std::chrono::microseconds(60);
  while (Clock::now() < until) {
    for (int i = 0; i < 20; ++i) {
      if (flag.load(std::memory_order_acquire) != old) return;
      relax();
    }
    sched_yield();
  }
  while (flag.load(std::memory_order_acquire) == old) flag.wait(old, std::memory_order_acquire);
}

}  // namespace

void Team::wait(uint32_t phase) {
  const bool noted = note_ != note_end_;
  if (noted) *note_++ = steady_nanoseconds();
  wait_for_change(state_.phase, phase);
  if (noted) *note_++ = steady_nanoseconds();
}

void Team::finish(uint32_t phase) {
  state_.done.store(0, std::memory_order_relaxed);
  state_.claim.store(uint64_t{phase + 1} << 32, std::memory_order_release);
  state_.phase.exchange(phase + 1);  // a full fence: whoever went to sleep on the old value is seen by notify_all
  state_.phase.notify_all();
}

struct Pool::Impl {
  // Each worker waits on a state of its own, so that a small team does not wake the threads it does not need.
  enum : uint32_t { idle, offered, taken };
  struct Worker {
    alignas(64) std::atomic<uint32_t> state{idle};
  };
  std::mutex turn;
  std::vector<std::unique_ptr<Worker>> workers;
  TeamState* team = nullptr;
  Erased job = nullptr;
  void* context = nullptr;

  void work(Worker& self, int index) {
    FloatMode mode;
    for (;;) {
      wait_for_change(self.state, idle);
      uint32_t expected = offered;
      if (!self.state.compare_exchange_strong(expected, taken)) continue;  // too late for this job
      Team view(*team, index);
      job(context, view);
      self.state.exchange(idle);  // from here on, nothing of the job is touched
      self.state.notify_all();
    }
  }
};

Pool& Pool::instance() {
  // Never destroyed: a worker may still look at it while the process ends.
  static Pool* pool = [] {
    auto* made = new Pool;
    pthread_atfork(nullptr, nullptr, [] { instance().start_afresh(); });
    return made;
  }();
  return *pool;
}

Pool::Pool() : impl_(new Impl) {}

// A forked child has none of the threads, and perhaps a lock that another thread held: it leaves all that behind.
void Pool::start_afresh() { impl_ = new Impl; }

int Pool::workers() const { return static_cast<int>(impl_->workers.size()); }

void Pool::run_erased(int threads, Erased job, void* context) {
  Impl& pool = *impl_;
  std::lock_guard<std::mutex> lock(pool.turn);
  while (static_cast<int>(pool.workers.size()) < threads - 1) {
    const int index = static_cast<int>(pool.workers.size()) + 1;
    auto worker = std::make_unique<Impl::Worker>();
    pool.workers.reserve(pool.workers.size() + 1);  // nothing may throw once the thread has its worker
    std::thread([&pool, self = worker.get(), index] { pool.work(*self, index); }).detach();
    pool.workers.push_back(std::move(worker));
  }
  TeamState state(threads);
  pool.team = &state;
  pool.job = job;
  pool.context = context;
  for (int i = 0; i < threads - 1; ++i) {
    pool.workers[i]->state.exchange(Impl::offered);
    pool.workers[i]->state.notify_all();
  }
  Team team(state, 0);
  {
    FloatMode mode;
    job(context, team);
  }
  for (int i = 0; i < threads - 1; ++i) {
    std::atomic<uint32_t>& worker = pool.workers[i]->state;
    uint32_t expected = Impl::offered;
    if (!worker.compare_exchange_strong(expected, Impl::idle)) wait_for_change(worker, Impl::taken);
  }
}

// --- floating-point mode

#if defined(__x86_64__)
constexpr uint64_t kMode = 0x1F80 | 0x8040;  // exceptions masked, nearest; flush to zero, denormals are zero
static uint64_t read_mode() { return _mm_getcsr(); }
static void write_mode(uint64_t mode) { _mm_setcsr(static_cast<unsigned>(mode)); }
#elif defined(__aarch64__)
constexpr uint64_t kMode = uint64_t{1} << 24;  // FZ; rounding mode 0 is nearest
static uint64_t read_mode() {
  uint64_t mode;
  __asm__ volatile("mrs %0, fpcr" : "=r"(mode));
  return mode;
}
static void write_mode(uint64_t mode) { __asm__ volatile("msr fpcr, %0" ::"r"(mode)); }
#else
constexpr uint64_t kMode = 0;
static uint64_t read_mode() { return 0; }
static void write_mode(uint64_t) {}
#endif

FloatMode::FloatMode() : before_(read_mode()) { write_mode(kMode); }
FloatMode::~FloatMode() { write_mode(before_); }

bool FloatMode::flushes_denormals() {
  volatile float smallest = 1.17549435e-38f;
  volatile float half = smallest * 0.5f;
  return half == 0.0f;
}

}  // namespace hasten
