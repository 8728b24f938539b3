#include "plan/machine.h"

#include <algorithm>
#include <chrono>
#include <cstring>

#include "plan/arena.h"
#include "plan/pool.h"

namespace hasten {
namespace {

using Clock = std::chrono::steady_clock;

double since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

// Each pass is short enough that a quiet moment of a shared machine shows, long enough to time well.
double gmacs(int64_t (*peak)(int64_t), double seconds, int threads) {
  constexpr int64_t kIterations = 20000;
  double best = 0;
  const auto start = Clock::now();
  do {
    std::atomic<int64_t> total{0};
    const auto pass = Clock::now();
    Pool::instance().run(threads, [&](Team&) { total += peak(kIterations); });
    best = std::max(best, static_cast<double>(total.load()) / since(pass) / 1e9);
  } while (since(start) < seconds);
  return best;
}

}  // namespace

double read_gbs(const Kernels& kernels, int64_t bytes, double seconds, int threads) {
  constexpr int64_t kPiece = int64_t{1} << 20;
  const int64_t pieces = std::max<int64_t>(1, bytes / kPiece);
  const Arena memory(pieces * kPiece);
  const auto pass = [&](auto&& body) {
    Pool::instance().run(threads, [&](Team& team) {
      team.for_each(pieces, [&](int64_t i) { body(memory.data() + i * kPiece); });
    });
  };
  pass([](std::byte* piece) { std::memset(piece, 1, kPiece); });  // pages exist from here
  double best = 0;
  std::atomic<float> keep{0};                                      // so that no read is left out
  const auto start = Clock::now();
  do {
    const auto began = Clock::now();
    pass([&](std::byte* piece) { keep.store(kernels.read_memory(piece, kPiece), std::memory_order_relaxed); });
    best = std::max(best, static_cast<double>(pieces * kPiece) / since(began) / 1e9);
  } while (since(start) < seconds);
  return best;
}

double int8_gmacs(const Kernels& kernels, double seconds, int threads) { return gmacs(kernels.int8_peak, seconds, threads); }
double bf16_gmacs(const Kernels& kernels, double seconds, int threads) { return gmacs(kernels.bf16_peak, seconds, threads); }

}  // namespace hasten
