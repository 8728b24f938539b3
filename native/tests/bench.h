// What the benches share: memory of their own and the clock of one thread.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <ctime>
#include <new>

namespace hasten::bench {

struct Memory {
  Memory(int64_t bytes, int fill)
      : data(static_cast<std::byte*>(::operator new(static_cast<size_t>(bytes), std::align_val_t(64)))) {
    std::memset(data, fill, static_cast<size_t>(bytes));
  }
  ~Memory() { ::operator delete(data, std::align_val_t(64)); }
  Memory(const Memory&) = delete;
  template <typename T>
  T* as() const { return reinterpret_cast<T*>(data); }
  std::byte* data;
};

// Processor time of this thread: other work on the machine slows it by cache and memory, not by waiting.
inline double now() {
  timespec t;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
  return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
}

template <typename Call>
double seconds_of(Call call) {
  const double start = now();
  call();
  return now() - start;
}

}  // namespace hasten::bench
