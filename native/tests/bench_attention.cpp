// Rates of the attention kernels on one thread beside the machine's limits, measured in turn.
//   cmake --build build/dev --target bench_attention && build/dev/bench_attention [isa]
// decode: one token at a depth, cache cold (copies beyond the last-level cache), share of read_memory. prefill: a prompt from
// an empty cache, visible products only, share of the float32 multiply-add peak.
#include <algorithm>
#include <cstdio>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "bench.h"
#include "isa/dispatch.h"

using namespace hasten;
using namespace hasten::bench;

namespace {

constexpr int64_t kBlock = 32, kQueryTile = 32;
constexpr int kFill = 0x11;   // small numbers in every format

struct Shape { int64_t heads, kv_heads, head_dim; };

// A cache of `copies` layers, each with blocks for `depth` tokens in shuffled order, and room for `tokens` queries.
struct Bench {
  Bench(const Kernels& k, const Shape& s, KvKind kind, int64_t depth, int64_t tokens, int64_t copies)
      : kernels(k), blocks((depth + kBlock - 1) / kBlock), layer(KvLayer{kind, {}, {}, s.kv_heads, s.head_dim, kBlock}),
        bytes(blocks * s.kv_heads * layer.head_bytes()), keys(bytes * copies, kFill), values(bytes * copies, kFill),
        q(4 * tokens * s.heads * s.head_dim, kFill), out(4 * tokens * s.heads * s.head_dim, kFill), positions(tokens), table(blocks) {
    std::iota(table.begin(), table.end(), 0);
    std::shuffle(table.begin(), table.end(), std::mt19937(1));
    for (int64_t i = 0; i < tokens; ++i) positions[i] = static_cast<int32_t>(depth - tokens + i);
    starts[1] = static_cast<int32_t>(tokens);
    a.q = q.as<float>();
    a.out = out.as<float>();
    a.q_stride = a.out_stride = s.heads * s.head_dim;
    a.heads = s.heads;
    a.scale = 0.125f;
    a.causal = true;
    a.positions = positions.data();
    a.starts = starts;
    a.block_tables = table.data();
    a.table_stride = blocks;
    scratch = std::vector<std::byte>(k.attend_scratch(view(0), kQueryTile) + 64);
  }
  const AttentionArgs& view(int64_t copy) {
    a.kv = layer;
    a.kv.keys = keys.data + copy * bytes;
    a.kv.values = values.data + copy * bytes;
    return a;
  }
  void run(int64_t copy, int64_t tokens) {
    auto* own = reinterpret_cast<std::byte*>(round_up(reinterpret_cast<int64_t>(scratch.data()), 64));
    for (int64_t first = 0; first < tokens; first += kQueryTile)
      for (int64_t head = 0; head < layer.kv_heads; ++head)
        kernels.attend(view(copy), 0, head, first, std::min(tokens, first + kQueryTile), own);
  }
  const Kernels& kernels;
  int64_t blocks;
  KvLayer layer;
  int64_t bytes;   // of the keys, or the values, of a layer
  Memory keys, values, q, out;
  std::vector<int32_t> positions, table;
  int32_t starts[2] = {0, 0};
  AttentionArgs a{};
  std::vector<std::byte> scratch;
};

void decode(const Kernels& k, const Shape& s, KvKind kind, int64_t depth) {
  const int64_t layer = 2 * (depth + kBlock) * s.kv_heads * s.head_dim, copies = std::max<int64_t>(2, 100'000'000 / layer);
  Bench bench(k, s, kind, depth, 1, copies);
  double read = 1e9, attend = 1e9;
  const double most = static_cast<double>(2 * bench.bytes);
  for (int64_t i = 0; i < std::min<int64_t>(3 * copies, 1000); ++i) {
    const int64_t other = (i + copies / 2) % copies;
    read = std::min(read, seconds_of([&] {
      k.read_memory(bench.keys.data + other * bench.bytes, bench.bytes);
      k.read_memory(bench.values.data + other * bench.bytes, bench.bytes);
    }));
    attend = std::min(attend, seconds_of([&] { bench.run(i % copies, 1); }));
  }
  std::printf(" | %lld: %.1f GB/s %.0f%% %.1f us", static_cast<long long>(depth), most / attend / 1e9, 100 * read / attend,
              attend * 1e6);
}

void prefill(const Kernels& k, const Kernels& peak, const Shape& s, KvKind kind, int64_t tokens) {
  Bench bench(k, s, kind, tokens, tokens, 1);
  double rate = 0, limit = 0;
  const double products = static_cast<double>(s.heads * s.head_dim * tokens * (tokens + 1));
  for (int i = 0; i < (tokens > 1000 ? 4 : 20); ++i) {
    int64_t done = 0;
    const double seconds = seconds_of([&] { done = peak.bf16_peak(100'000); });
    limit = std::max(limit, static_cast<double>(done) / seconds / 1e9);
    rate = std::max(rate, products / seconds_of([&] { bench.run(0, tokens); }) / 1e9);
  }
  std::printf(" | %lld: %.1f of %.1f GFMA/s %.0f%%", static_cast<long long>(tokens), rate, limit, 100 * rate / limit);
}

}  // namespace

int main(int argc, char** argv) {
  std::setvbuf(stdout, nullptr, _IONBF, 0);
  const std::string isa = argc > 1 ? argv[1] : available_isas().front();
  const Kernels* kernels = kernels_for(isa);
  if (kernels == nullptr) {
    std::fprintf(stderr, "error: instruction set %s is not available here\n", isa.c_str());
    return 2;
  }
  // bf16_peak is float32's multiply-adds, but where there is an instruction for bf16.
  const Kernels& peak = isa.starts_with("avx512_bf16") ? *kernels_for("avx512") : *kernels;
  const std::pair<const char*, KvKind> kinds[] = {
      {"f32", KvKind::f32}, {"bf16", KvKind::bf16}, {"int8", KvKind::int8}, {"int4", KvKind::int4},
  };
  for (const Shape& s : {Shape{14, 2, 64}, Shape{32, 4, 64}, Shape{8, 8, 64}})
    for (const auto& [name, kind] : kinds) {
      std::printf("%s %lld/%lld x %lld %-5s decode", isa.c_str(), static_cast<long long>(s.heads),
                  static_cast<long long>(s.kv_heads), static_cast<long long>(s.head_dim), name);
      for (int64_t depth : {128, 4096, 16384}) decode(*kernels, s, kind, depth);
      std::printf("\n   prefill");
      for (int64_t tokens : {512, 2048}) prefill(*kernels, peak, s, kind, tokens);
      std::printf("\n");
    }
}
