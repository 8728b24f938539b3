// Can vector quantisation pay on this processor? One token times a matrix of indices into a codebook of four or eight weights,
// beside the grouped kernels of the same bits, one thread, weights cold, in turn.
//   cmake --build build/dev --target bench_vq && build/dev/bench_vq [columns] [rows]
// gather: entries are looked up by vpgatherdd and multiplied as bytes. loads: the same by scalar loads. table: products of four
// columns with every entry are made first (shared by all rows), then looked up and added. 16 bits: entries of eight weights,
// a codebook of 512 KiB. All leave scales out (one a row would do), so they are favoured.
#include <cstdio>

#include "isa/dispatch.h"

#if !defined(__x86_64__)
int main() { std::printf("written for AVX2 only\n"); }
#else
#include <immintrin.h>

#include <algorithm>
#include <cstdlib>
#include <random>
#include <vector>

#include "bench.h"

using namespace hasten;
using namespace hasten::bench;

namespace {

#define HASTEN_AVX2 __attribute__((target("avx2,fma")))

struct Problem {
  int64_t rows, columns;
  const uint8_t* codebook;              // [256][4], entries 0..127
  const uint8_t* wide;                  // [65536][8]
  const int8_t* x;                      // [columns]
  int32_t* out;                         // [rows]
  int16_t* table;                       // [kTableGroups][256]
};
constexpr int64_t kTableGroups = 16;    // of four columns: 8 KiB of products at a time

inline int32_t four(const void* p) {
  int32_t value;
  std::memcpy(&value, p, sizeof value);
  return value;
}

HASTEN_AVX2 inline __m256i add_products(__m256i sum, __m256i entries, __m256i x) {
  const __m256i pairs = _mm256_maddubs_epi16(entries, x);
  return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}

// Indices [rows / 16][columns / 4][16].
HASTEN_AVX2 void by_gather(const Problem& p, const uint8_t* indices) {
  const auto* book = reinterpret_cast<const int*>(p.codebook);
  for (int64_t row = 0; row < p.rows; row += 16) {
    __m256i low = _mm256_setzero_si256(), high = low;
    for (int64_t c = 0; c < p.columns; c += 4, indices += 16) {
      const __m128i line = _mm_loadu_si128(reinterpret_cast<const __m128i*>(indices));
      const __m256i x = _mm256_set1_epi32(four(p.x + c));
      low = add_products(low, _mm256_i32gather_epi32(book, _mm256_cvtepu8_epi32(line), 4), x);
      high = add_products(high, _mm256_i32gather_epi32(book, _mm256_cvtepu8_epi32(_mm_srli_si128(line, 8)), 4), x);
    }
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p.out + row), low);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p.out + row + 8), high);
  }
}

HASTEN_AVX2 inline __m256i loaded(const uint8_t* book, const uint8_t* i) {
  return _mm256_setr_epi32(four(book + 4 * i[0]), four(book + 4 * i[1]), four(book + 4 * i[2]), four(book + 4 * i[3]),
                           four(book + 4 * i[4]), four(book + 4 * i[5]), four(book + 4 * i[6]), four(book + 4 * i[7]));
}

HASTEN_AVX2 void by_loads(const Problem& p, const uint8_t* indices) {
  for (int64_t row = 0; row < p.rows; row += 16) {
    __m256i low = _mm256_setzero_si256(), high = low;
    for (int64_t c = 0; c < p.columns; c += 4, indices += 16) {
      const __m256i x = _mm256_set1_epi32(four(p.x + c));
      low = add_products(low, loaded(p.codebook, indices), x);
      high = add_products(high, loaded(p.codebook, indices + 8), x);
    }
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p.out + row), low);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p.out + row + 8), high);
  }
}

// Indices [columns / 64][rows][16].
void by_table(const Problem& p, const uint8_t* indices) {
  std::memset(p.out, 0, static_cast<size_t>(p.rows) * sizeof(int32_t));
  for (int64_t c = 0; c < p.columns; c += 4 * kTableGroups) {
    for (int64_t g = 0; g < kTableGroups; ++g)
      for (int64_t e = 0; e < 256; ++e) {
        int32_t sum = 0;
        for (int64_t i = 0; i < 4; ++i) sum += p.codebook[4 * e + i] * p.x[c + 4 * g + i];
        p.table[256 * g + e] = static_cast<int16_t>(sum);   // at most 4 * 127 * 64 here
      }
    for (int64_t row = 0; row < p.rows; ++row, indices += kTableGroups) {
      int32_t sum = 0;
      for (int64_t g = 0; g < kTableGroups; ++g) sum += p.table[256 * g + indices[g]];
      p.out[row] += sum;
    }
  }
}

// Indices of 16 bits [rows / 4][columns / 8][4].
HASTEN_AVX2 void by_wide_gather(const Problem& p, const uint8_t* bytes) {
  const auto* indices = reinterpret_cast<const uint16_t*>(bytes);
  const auto* book = reinterpret_cast<const long long*>(p.wide);
  for (int64_t row = 0; row < p.rows; row += 4) {
    __m256i sum = _mm256_setzero_si256();
    for (int64_t c = 0; c < p.columns; c += 8, indices += 4) {
      const __m128i line = _mm_cvtepu16_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(indices)));
      int64_t eight;
      std::memcpy(&eight, p.x + c, sizeof eight);
      sum = add_products(sum, _mm256_i32gather_epi64(book, line, 8), _mm256_set1_epi64x(eight));
    }
    alignas(32) int32_t parts[8];
    _mm256_store_si256(reinterpret_cast<__m256i*>(parts), sum);
    for (int r = 0; r < 4; ++r) p.out[row + r] = parts[2 * r] + parts[2 * r + 1];
  }
}

int32_t row_zero(const Problem& p, const uint8_t* indices, int64_t group_stride, bool wide) {
  int32_t sum = 0;
  const int64_t width = wide ? 8 : 4;
  for (int64_t c = 0; c < p.columns; c += width) {
    const int64_t g = c / width;
    uint16_t index = 0;
    std::memcpy(&index, indices + g * group_stride, wide ? 2 : 1);
    for (int64_t i = 0; i < width; ++i) sum += (wide ? p.wide + 8 * index : p.codebook + 4 * index)[i] * p.x[c + i];
  }
  return sum;
}

void report(const char* name, double bytes, double weights, double seconds, double read) {
  std::printf("%-12s %5.2f bits %7.2f GB/s (%3.0f%% of reading) %8.2f Gweights/s\n", name, 8 * bytes / weights, bytes / seconds / 1e9,
              100 * read / seconds, weights / seconds / 1e9);
}

}  // namespace

int main(int argc, char** argv) {
  const int64_t columns = (argc > 1 ? std::atoll(argv[1]) : 2048) / 64 * 64, rows = (argc > 2 ? std::atoll(argv[2]) : 2816) / 16 * 16;
  const Kernels* k = kernels_for("avx2");
  if (k == nullptr) return 2;
  const int64_t bytes = rows * columns / 4, copies = (100'000'000 + bytes) / bytes;
  const double weights = static_cast<double>(rows * columns);
  std::mt19937 random(1);
  Memory indices(bytes * copies, 0), small(1024, 0), wide(65536 * 8, 0), x(columns, 0), out(rows * 4 + 64, 0),
      table(kTableGroups * 512, 0);
  for (int64_t i = 0; i < bytes * copies; ++i) indices.as<uint8_t>()[i] = static_cast<uint8_t>(random());
  for (int64_t i = 0; i < 1024; ++i) small.as<uint8_t>()[i] = random() % 128;
  for (int64_t i = 0; i < 65536 * 8; ++i) wide.as<uint8_t>()[i] = random() % 128;
  for (int64_t i = 0; i < columns; ++i) x.as<int8_t>()[i] = static_cast<int8_t>(static_cast<int>(random() % 129) - 64);
  const Problem p{rows, columns, small.as<uint8_t>(), wide.as<uint8_t>(), x.as<int8_t>(), out.as<int32_t>(), table.as<int16_t>()};
  struct Way {
    const char* name;
    void (*run)(const Problem&, const uint8_t*);
    int64_t stride;                     // bytes from one of row 0's indices to its next
    bool wide;
  };
  std::printf("%lld columns, %lld rows, one thread\n", static_cast<long long>(columns), static_cast<long long>(rows));
  for (const Way& way : {Way{"vq4 gather", by_gather, 16, false}, Way{"vq4 loads", by_loads, 16, false},
                         Way{"vq4 table", by_table, 1, false}, Way{"vq8 16 bits", by_wide_gather, 8, true}}) {
    double best = 1e9, read = 1e9;
    for (int64_t i = 0; i < 2 * copies; ++i) {
      read = std::min(read, seconds_of([&] { k->read_memory(indices.data + (i + copies / 2) % copies * bytes, bytes); }));
      best = std::min(best, seconds_of([&] { way.run(p, indices.as<uint8_t>() + i % copies * bytes); }));
    }
    way.run(p, indices.as<uint8_t>());
    const bool table_order = way.run == by_table;
    Problem first = p;
    if (table_order) first.columns = 64;   // row 0's indices stand together for 64 columns only
    if (table_order) by_table(first, indices.as<uint8_t>());
    if (p.out[0] != row_zero(first, indices.as<uint8_t>(), way.stride, way.wide)) return std::printf("%s is wrong\n", way.name), 1;
    report(way.name, static_cast<double>(bytes), weights, best, read);
  }
  struct Grid { const char* name; Kind kind; int64_t group; };
  for (const Grid& g : {Grid{"int2-g64", Kind::int2, 64}, Grid{"codebook2", Kind::codebook2, 64}, Grid{"int3-g64", Kind::int3, 64},
                        Grid{"int4-g64", Kind::int4, 64}}) {
    static const uint8_t book[16] = {1, 40, 80, 120};
    Weight w{g.kind, rows, columns, g.group, nullptr, nullptr, book};
    const int64_t size = w.panels() * w.panel_bytes(), scale_bytes = rows * w.groups() * 2, many = (100'000'000 + size) / size;
    Memory codes(size * many, 0x55), scales(scale_bytes * many + 64, 0x11), sums((columns / 32 + 1) * 4, 0),
        steps((columns / 32 + 1) * 4, 0), own(k->matmul_scratch(w, 1) + 64, 0);
    const Quantised q{x.as<int8_t>(), steps.as<float>(), sums.as<int32_t>(), columns, w.groups(), g.group};
    double best = 1e9, read = 1e9;
    for (int64_t i = 0; i < 2 * many; ++i) {
      read = std::min(read, seconds_of([&] { k->read_memory(codes.data + (i + many / 2) % many * size, size); }));
      w.codes = codes.data + i % many * size;
      w.scales = reinterpret_cast<const uint16_t*>(scales.data + i % many * scale_bytes);
      best = std::min(best, seconds_of([&] { k->matmul_int(w, q, 1, 0, w.panels(), out.as<float>(), rows, own.data); }));
    }
    report(g.name, static_cast<double>(size + scale_bytes), weights, best, read);
  }
}
#endif
