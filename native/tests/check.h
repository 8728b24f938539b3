// What the native tests share: one line for each failure, numbers from a seed, memory with guards around it.
#pragma once
#include <cmath>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <new>
#include <string>
#include <vector>

#include "core.h"

namespace hasten::test {

inline int failures = 0;
inline bool quiet = false;                                           // while faults are planted
inline std::string subject;                                          // the table under test

// Counts and prints what does not hold; the first twenty of a kind of mistake say enough.
[[gnu::format(printf, 2, 3)]] inline bool expect(bool holds, const char* format, ...) {
  if (holds) return true;
  ++failures;
  if (quiet || failures > 20) return false;
  std::va_list arguments;
  va_start(arguments, format);
  std::fprintf(stderr, "FAILED %s: ", subject.c_str());
  std::vfprintf(stderr, format, arguments);
  std::fputc('\n', stderr);
  va_end(arguments);
  return false;
}

class Random {                                                       // splitmix64 (Steele et al. 2014)
 public:
  explicit Random(uint64_t seed) : state_(seed * 0x9e3779b97f4a7c15u + 1) {}
  uint64_t next() {
    uint64_t z = state_ += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
  }
  int64_t below(int64_t n) { return static_cast<int64_t>(next() % static_cast<uint64_t>(n)); }
  int64_t between(int64_t low, int64_t high) { return low + below(high - low + 1); }   // both included
  double uniform() { return static_cast<double>(next() >> 11) * 0x1p-53; }
  float normal() {                                                   // near enough: twelve uniforms
    double sum = -6;
    for (int i = 0; i < 12; ++i) sum += uniform();
    return static_cast<float>(sum);
  }
  std::vector<float> normals(int64_t n, float spread = 1) {
    std::vector<float> values(static_cast<size_t>(n));
    for (float& value : values) value = normal() * spread;
    return values;
  }

 private:
  uint64_t state_;
};

// n elements that start `offset` bytes past a cache line, guard bytes in front of them and after them. Data that
// kernels only read stands in an Exact instead, where a sanitizer sees any read past the end.
template <class T>
class Guarded {
 public:
  explicit Guarded(int64_t n, int64_t offset = 0)
      : bytes_(n * static_cast<int64_t>(sizeof(T))), offset_(kBefore + offset),
        memory_(static_cast<uint8_t*>(::operator new(size(), std::align_val_t{64}))) {
    std::memset(memory_, kGuard, size());
  }
  Guarded(Guarded&& other) noexcept : bytes_(other.bytes_), offset_(other.offset_), memory_(other.memory_) {
    other.memory_ = nullptr;
  }
  Guarded& operator=(Guarded&&) = delete;
  ~Guarded() {
    if (memory_ != nullptr) ::operator delete(memory_, std::align_val_t{64});
  }
  T* data() { return reinterpret_cast<T*>(memory_ + offset_); }
  const T* data() const { return reinterpret_cast<const T*>(memory_ + offset_); }
  int64_t count() const { return bytes_ / static_cast<int64_t>(sizeof(T)); }
  T& operator[](int64_t i) { return data()[i]; }
  std::vector<T> values() const { return std::vector<T>(data(), data() + count()); }
  bool intact() const {
    for (int64_t i = 0; i < offset_; ++i)
      if (memory_[i] != kGuard) return false;
    for (size_t i = static_cast<size_t>(offset_ + bytes_); i < size(); ++i)
      if (memory_[i] != kGuard) return false;
    return true;
  }
  // Element i was never written.
  bool untouched(int64_t i) const {
    uint8_t guard[sizeof(T)];
    std::memset(guard, kGuard, sizeof guard);
    return std::memcmp(data() + i, guard, sizeof guard) == 0;
  }

 private:
  static constexpr uint8_t kGuard = 0xc9;
  static constexpr int64_t kBefore = 64, kAfter = 64;
  size_t size() const { return static_cast<size_t>(offset_ + bytes_ + kAfter); }
  int64_t bytes_, offset_;
  uint8_t* memory_;
};

// n elements and not a byte more, `offset` bytes past a cache line.
template <class T>
class Exact {
 public:
  explicit Exact(int64_t n, int64_t offset = 0) : offset_(offset), count_(n) {
    memory_ = static_cast<uint8_t*>(::operator new(static_cast<size_t>(offset + n * static_cast<int64_t>(sizeof(T))),
                                                   std::align_val_t{64}));
    std::memset(memory_, 0, static_cast<size_t>(offset + n * static_cast<int64_t>(sizeof(T))));
  }
  explicit Exact(const std::vector<T>& values, int64_t offset = 0)
      : Exact(static_cast<int64_t>(values.size()), offset) {
    if (!values.empty()) std::memcpy(data(), values.data(), values.size() * sizeof(T));
  }
  Exact(Exact&& other) noexcept : offset_(other.offset_), count_(other.count_), memory_(other.memory_) {
    other.memory_ = nullptr;
  }
  Exact& operator=(Exact&&) = delete;
  ~Exact() {
    if (memory_ != nullptr) ::operator delete(memory_, std::align_val_t{64});
  }
  T* data() { return reinterpret_cast<T*>(memory_ + offset_); }
  const T* data() const { return reinterpret_cast<const T*>(memory_ + offset_); }
  int64_t count() const { return count_; }
  T& operator[](int64_t i) { return data()[i]; }
  const T& operator[](int64_t i) const { return data()[i]; }

 private:
  int64_t offset_, count_;
  uint8_t* memory_;
};

inline bool same_bits(const float* a, const float* b, int64_t n) {
  return std::memcmp(a, b, static_cast<size_t>(n) * sizeof(float)) == 0;
}

inline float bits_as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline uint32_t float_as_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

// IEEE 754 binary16, from its definition.
inline double half_value(uint16_t bits) {
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  const double size = exponent == 0 ? std::ldexp(fraction, -24) : std::ldexp(1024 + fraction, exponent - 25);
  return bits >> 15 ? -size : size;
}

inline double bf16_value(uint16_t bits) { return bits_as_float(static_cast<uint32_t>(bits) << 16); }

// The nearest bfloat16, ties to even, found among the two neighbours.
inline uint16_t nearest_bf16(float value) {
  const uint32_t bits = float_as_bits(value);
  const uint16_t below = static_cast<uint16_t>(bits >> 16);
  const uint32_t rest = bits & 0xffff;
  const bool up = rest > 0x8000 || (rest == 0x8000 && (below & 1) != 0);
  return static_cast<uint16_t>(below + (up ? 1 : 0));
}

// --- the tests, each over one table

void test_quantise(const Kernels& k);
void test_matmul_int(const Kernels& k);
void test_matmul_float(const Kernels& k);
void test_rows(const Kernels& k);         // norm, rope, elementwise
void test_vocabulary(const Kernels& k);   // logsumexp, divergence, argmax, masses
void test_sampling(const Kernels& k);
void test_attention(const Kernels& k);
void test_limits(const Kernels& k);       // what measures the machine
void test_outer(const Kernels& k);        // outer_pack, outer_add
void test_compress(const Kernels& k);     // level_products, solve_positive, sweep
void test_pool();
void test_program(const Kernels& k);
// Plants each fault in a copy of the table; those that no test notices are failures.
void test_that_faults_are_noticed(const Kernels& k);

}  // namespace hasten::test
