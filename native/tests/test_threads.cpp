// The pool's phases, and a small program whose bits do not depend on its threads: what the thread sanitizer watches.
#include <algorithm>
#include <atomic>
#include <thread>

#include "plan/pool.h"
#include "plan/steps.h"
#include "weights.h"

namespace hasten::test {
namespace {

// Every piece adds its index to a cell that other pieces had in the phase before: phases that overlap lose a sum.
void check_phases(int threads, int64_t count, int rounds) {
  std::vector<int64_t> cells(static_cast<size_t>(count));
  Pool::instance().run(threads, [&](Team& team) {
    for (int round = 0; round < rounds; ++round)
      team.for_each(count, [&](int64_t i) { cells[static_cast<size_t>((i + round) % count)] += i; });
  });
  for (int64_t cell = 0; cell < count; ++cell) {
    int64_t wanted = 0;
    for (int64_t round = 0; round < rounds; ++round) wanted += ((cell - round) % count + count) % count;
    if (!expect(cells[static_cast<size_t>(cell)] == wanted, "pool: %d threads, cell %d is %lld, not %lld", threads,
                static_cast<int>(cell), static_cast<long long>(cells[static_cast<size_t>(cell)]),
                static_cast<long long>(wanted)))
      return;
  }
}

// Callers on threads of their own take turns.
void check_callers() {
  int64_t total = 0;
  std::vector<std::thread> callers;
  for (int caller = 0; caller < 3; ++caller)
    callers.emplace_back([&] {
      for (int round = 0; round < 20; ++round)
        Pool::instance().run(2, [&](Team& team) { team.for_each(1, [&](int64_t) { ++total; }); });
    });
  for (std::thread& caller : callers) caller.join();
  expect(total == 60, "pool: three callers of twenty jobs ran %d", static_cast<int>(total));
}

constexpr int64_t kWidth = 48, kHeads = 4, kKvHeads = 2, kHeadDim = 12, kInner = 80, kVocabulary = 70, kTokens = 20;

// One block of a transformer with every weight a kind of its own, over random numbers.
struct Model {
  Model()
      : embed(Kind::f16, kVocabulary, kWidth, 0, 1), q(Kind::int4, kHeads * kHeadDim, kWidth, 32, 2),
        k(Kind::int8, kKvHeads * kHeadDim, kWidth, 32, 3), v(Kind::codebook4, kKvHeads * kHeadDim, kWidth, 32, 4),
        o(Kind::bf16, kWidth, kHeads * kHeadDim, 0, 5), gate(Kind::int4, kInner, kWidth, 32, 6),
        up(Kind::int4, kInner, kWidth, 32, 7), down(Kind::int8, kWidth, kInner, 64, 8),
        head(Kind::int8, kVocabulary, kWidth, 32, 9),
        norm(kWidth, 1.1f) {}
  TestWeight embed, q, k, v, o, gate, up, down, head;
  std::vector<float> norm;
};

class Arrangement {                                                  // values one behind the other in the arena
 public:
  Value take(int64_t width, bool selected = false) {
    const Value value{floats, width, activation_stride(width, 4), selected};
    floats += value.stride * kTokens;
    return value;
  }
  int64_t floats = 0;
};

std::unique_ptr<Program> build(const Kernels& kernels, const Model& m, int threads) {
  const Sizes sizes{64, kTokens, 2, kTokens, 16, 8, threads};
  auto program = std::make_unique<Program>(kernels, sizes);
  Arrangement at;
  const Value x = at.take(kWidth), q = at.take(kHeads * kHeadDim), k = at.take(kKvHeads * kHeadDim),
              v = at.take(kKvHeads * kHeadDim), mixed = at.take(kHeads * kHeadDim), y = at.take(kWidth),
              inner = at.take(kInner), z = at.take(kWidth),
              rows = at.take(kWidth, true), logits = at.take(kVocabulary, true);
  const NormSpec norm{NormKind::rms, 1, m.norm.data(), nullptr, 1e-5f};
  AttentionArgs attention{};
  attention.kv = program->kv_layer(0, KvKind::bf16, kKvHeads, kHeadDim);
  attention.heads = kHeads;
  attention.scale = 0.3f;
  attention.causal = true;
  const auto linear = [&](const Value& in, bool normed, std::vector<const TestWeight*> weights, std::vector<Value> outs,
                          std::optional<ActivationKind> gate, std::optional<Value> residual) {
    std::vector<LinearStep::Part> parts;
    for (const TestWeight* weight : weights) parts.push_back({weight->view(), nullptr});
    program->add(std::make_unique<LinearStep>(kernels, sizes, program->tuning(), in,
                                              normed ? std::optional(norm) : std::nullopt,
                                              std::move(parts), std::move(outs), gate, residual));
  };
  program->set_vocabulary(kVocabulary);
  const RopeTable& rope = program->rope({1.0f, 0.3f, 0.1f, 0.03f, 0.01f, 0.003f}, 1);
  program->add(std::make_unique<EmbedStep>(m.embed.view(), 1.0f, x));
  linear(x, true, {&m.q, &m.k, &m.v}, {q, k, v}, std::nullopt, std::nullopt);
  program->add(std::make_unique<AttentionStep>(kernels, sizes, attention, std::nullopt, std::nullopt, &rope, q, k, v,
                                               mixed));
  linear(mixed, false, {&m.o}, {y}, std::nullopt, x);
  linear(y, true, {&m.gate, &m.up}, {inner}, ActivationKind::silu, std::nullopt);
  linear(inner, false, {&m.down}, {z}, std::nullopt, y);
  program->add(std::make_unique<SelectStep>(z, rows));
  linear(rows, true, {&m.head}, {logits}, std::nullopt, std::nullopt);
  program->finish(at.floats, logits);
  program->tuning().measure(true);                                   // cut otherwise from step to step
  return program;
}

// Logits of every token of one sequence, fed in these chunks.
std::vector<float> logits_of(const Kernels& kernels, const Model& m, int threads, const std::vector<int64_t>& chunks) {
  const std::unique_ptr<Program> program = build(kernels, m, threads);
  const int32_t table[] = {5, 2};
  std::vector<float> all;
  int32_t begin = 0;
  for (const int64_t size : chunks) {
    std::vector<int32_t> tokens, positions, rows;
    for (int32_t i = 0; i < size; ++i) {
      tokens.push_back((begin + i) * 7 % static_cast<int32_t>(kVocabulary));
      positions.push_back(begin + i);
      rows.push_back(i);
    }
    const int32_t starts[] = {0, static_cast<int32_t>(size)};
    program->step({tokens.data(), positions.data(), starts, table, rows.data(), nullptr, size, 1, size, 2, 0});
    for (int64_t i = 0; i < size; ++i) {
      const float* row = program->row(program->output(), i);
      all.insert(all.end(), row, row + kVocabulary);
    }
    begin += static_cast<int32_t>(size);
  }
  return all;
}

}  // namespace

void test_pool() {
  subject = "pool";
  for (const int threads : {1, 2, 3, 5})
    for (const int64_t count : {1, 3, 64}) check_phases(threads, count, 100);
  check_callers();
}

void test_program(const Kernels& k) {
  const Model model;
  const std::vector<float> alone = logits_of(k, model, 1, {kTokens});
  const auto same = [&](int threads, const std::vector<int64_t>& chunks, const char* how) {
    const std::vector<float> other = logits_of(k, model, threads, chunks);
    expect(same_bits(other.data(), alone.data(), static_cast<int64_t>(alone.size())),
           "program: other bits with %d threads%s", threads, how);
  };
  for (const float value : alone)
    if (!expect(std::isfinite(value), "program: a logit is %g", static_cast<double>(value))) break;
  for (const int threads : {2, 3, 4}) same(threads, {kTokens}, "");
  same(1, {7, 1, 12}, " in chunks");
  same(3, {1, 1, 1, 17}, " in chunks");
}

}  // namespace hasten::test
