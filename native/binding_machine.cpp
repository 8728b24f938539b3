// The pool and the machine's limits.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <atomic>
#include <stdexcept>
#include <thread>
#include <vector>

#include "isa/dispatch.h"
#include "plan/cpus.h"
#include "plan/machine.h"
#include "plan/pool.h"

namespace nb = nanobind;
using namespace nb::literals;
using Release = nb::call_guard<nb::gil_scoped_release>;

namespace hasten {
namespace {

int team_of(int threads) {
  if (threads < 0 || threads > 1024) throw std::invalid_argument("threads must be 0 (all granted) to 1024");
  return threads == 0 ? granted_threads() : threads;
}

// For tests. First every thread waits for all others and notes whether it flushes denormals; then, `rounds` times, each of
// `count` pieces adds its index to a cell that other pieces had before: phases that overlap lose a sum.
std::vector<int64_t> pool_check(int threads, int64_t count, int rounds) {
  std::vector<int64_t> cells(count, 0), flushed(threads, 0);
  std::atomic<int> here{0};
  Pool::instance().run(threads, [&](Team& team) {
    team.for_each(threads, [&](int64_t) {
      flushed[team.thread()] = FloatMode::flushes_denormals();
      for (++here; here < threads;) std::this_thread::yield();
    });
    for (int round = 0; round < rounds; ++round)
      team.for_each(count, [&](int64_t i) { cells[(i + round) % count] += i; });
  });
  for (int64_t flag : flushed) cells.push_back(flag);
  return cells;
}

}  // namespace
}  // namespace hasten

void bind_machine(nb::module_& m) {
  using namespace hasten;
  m.def("granted_threads", &granted_threads, "Threads worth starting: affinity, container quotas, at least 1");
  m.def("cpu_quota", &cpu_quota, "membership"_a, "root"_a, "Cores that cgroups grant; 0 where there is no limit");
  m.def("pool_workers", [] { return Pool::instance().workers(); }, "Threads of the pool so far, callers not counted");
  m.def("pool_check", &pool_check, "threads"_a, "count"_a, "rounds"_a, Release(),
        "For tests: [count] sums over phases, then for each thread whether it flushes denormals");
  m.def("flushes_denormals", &FloatMode::flushes_denormals, "Whether the calling thread flushes denormals to zero");
  m.def("read_gbs",
        [](int64_t bytes, double seconds, int threads) { return read_gbs(active_kernels(), bytes, seconds, team_of(threads)); },
        "bytes"_a, "seconds"_a, "threads"_a = 0, Release(), "Gigabytes a second read from memory: the best pass");
  m.def("int8_gmacs", [](double seconds, int threads) { return int8_gmacs(active_kernels(), seconds, team_of(threads)); },
        "seconds"_a, "threads"_a = 0, Release(), "Billions of int8 multiply-accumulates a second");
  m.def("bf16_gmacs", [](double seconds, int threads) { return bf16_gmacs(active_kernels(), seconds, team_of(threads)); },
        "seconds"_a, "threads"_a = 0, Release(), "Billions of bfloat16 multiply-accumulates a second");
}
