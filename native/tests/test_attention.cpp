// Attention over a paged cache against a plain float64 softmax, and the same bits however the prompt is cut.
#include <algorithm>
#include <optional>
#include <utility>

#include "check.h"

namespace hasten::test {
namespace {

struct Case {
  int64_t heads = 4, kv_heads = 2, head_dim = 16, block_size = 16, window = 0;
  float softcap = 0;
  bool causal = true;
  int64_t tile = 16;
};

const Case kCases[] = {
    {},
    {.heads = 1, .kv_heads = 1, .head_dim = 8},
    {.heads = 3, .kv_heads = 3, .head_dim = 24, .block_size = 32},
    {.heads = 7, .kv_heads = 1, .head_dim = 64, .block_size = 32},
    {.heads = 9, .kv_heads = 1, .head_dim = 100},
    {.heads = 2, .kv_heads = 1, .head_dim = 27},
    {.heads = 3, .kv_heads = 1, .head_dim = 96},
    {.heads = 6, .kv_heads = 3, .head_dim = 40, .block_size = 48, .tile = 5},
    {.window = 1},
    {.heads = 2, .block_size = 32, .window = 37},
    {.heads = 8, .head_dim = 36, .window = 20, .softcap = 5},
    {.softcap = 1.5f},
    {.causal = false, .tile = 7},
};

struct Sequence {
  Sequence(const Case& c, int64_t length, uint64_t seed) : length(length) {
    Random random(seed);
    q = random.normals(length * c.heads * c.head_dim);
    k = random.normals(length * c.kv_heads * c.head_dim);
    v = random.normals(length * c.kv_heads * c.head_dim);
  }
  int64_t length;
  std::vector<float> q, k, v;                                        // [length][heads or kv_heads][head_dim]
};

// Keys or values as a cache of floats keeps them.
std::vector<double> stored(const std::vector<float>& from, KvKind kind) {
  std::vector<double> values;
  for (const float value : from) values.push_back(kind == KvKind::f32 ? value : bf16_value(nearest_bf16(value)));
  return values;
}

// softmax(mask(cap(scale q k^T))) v, [length][heads][head_dim]
std::vector<double> textbook(const Case& c, const Sequence& s, const std::vector<double>& keys,
                             const std::vector<double>& values, float scale) {
  std::vector<double> out(s.q.size()), scores(static_cast<size_t>(s.length));
  for (int64_t i = 0; i < s.length; ++i)
    for (int64_t head = 0; head < c.heads; ++head) {
      const int64_t shared = head / (c.heads / c.kv_heads);
      const auto key = [&](int64_t j) { return static_cast<size_t>((j * c.kv_heads + shared) * c.head_dim); };
      const size_t query = static_cast<size_t>((i * c.heads + head) * c.head_dim);
      const int64_t begin = c.window > 0 ? std::max<int64_t>(0, i - c.window + 1) : 0;
      const int64_t end = c.causal ? i + 1 : s.length;
      double most = -HUGE_VAL, total = 0;
      for (int64_t j = begin; j < end; ++j) {
        double score = 0;
        for (size_t d = 0; d < static_cast<size_t>(c.head_dim); ++d)
          score += s.q[query + d] * keys[key(j) + d];
        score *= scale;
        if (c.softcap > 0) score = c.softcap * std::tanh(score / c.softcap);
        scores[static_cast<size_t>(j)] = score;
        most = std::max(most, score);
      }
      for (int64_t j = begin; j < end; ++j) {
        double& weight = scores[static_cast<size_t>(j)];
        total += weight = std::exp(weight - most);
      }
      for (int64_t j = begin; j < end; ++j)
        for (size_t d = 0; d < static_cast<size_t>(c.head_dim); ++d)
          out[query + d] += scores[static_cast<size_t>(j)] / total * values[key(j) + d];
    }
  return out;
}

// A cache whose blocks stand in shuffled order and hold NaN wherever nothing was written.
class Cache {
 public:
  Cache(const Case& c, KvKind kind, int64_t context)
      : blocks_((context + c.block_size - 1) / c.block_size + 2), keys_(bytes(c, kind)), values_(bytes(c, kind)) {
    const uint32_t nan = kind == KvKind::f32 ? 0x7fc00000 : 0x7fc07fc0;   // int8: codes of any kind, scales NaN
    for (int64_t i = 0; i < keys_.count(); i += 4) {
      std::memcpy(keys_.data() + i, &nan, 4);
      std::memcpy(values_.data() + i, &nan, 4);
    }
    for (int64_t i = 0; i < blocks_; ++i) table.push_back(static_cast<int32_t>((i * 5 + 3) % blocks_));
    if (blocks_ % 5 == 0)
      for (int64_t i = 0; i < blocks_; ++i) table[static_cast<size_t>(i)] = static_cast<int32_t>(blocks_ - 1 - i);
    layer = {};
    layer.kind = kind;
    layer.keys = keys_.data();
    layer.values = values_.data();
    layer.kv_heads = c.kv_heads;
    layer.head_dim = c.head_dim;
    layer.block_size = c.block_size;
  }
  bool intact() const { return keys_.intact() && values_.intact(); }
  // A number of an int8 or int4 cache, and how far from what was written it may be, as native/core.h states the layouts: the
  // block's scales, bfloat16, stand behind its codes, int4's centres behind these.
  struct Held { double number, reach; };
  Held held(bool value, int64_t position, int64_t head, int64_t d) const {
    const bool packed = layer.kind == KvKind::int4;
    const int64_t size = layer.block_size, slot = position % size, width = packed ? (layer.head_dim + 1) / 2 : layer.head_dim;
    const int64_t block = table[static_cast<size_t>(position / size)] * layer.kv_heads + head;
    const uint8_t* at = (value ? values_ : keys_).data() + block * (width + (packed ? 4 : 2)) * size;
    const auto half = [&](int64_t index) {
      uint16_t bits;
      std::memcpy(&bits, at + width * size + 2 * index, 2);
      return bf16_value(bits);
    };
    const int64_t byte = d % width;
    const uint8_t code = at[value ? slot * width + byte : byte * size + slot];
    if (!packed) return {static_cast<int8_t>(code) * half(slot), 0.51 * half(slot)};
    return {(2 * (d < width ? code % 16 : code / 16) - 15) * half(slot) + half(size + slot), 1.02 * half(slot)};
  }
  KvLayer layer;
  std::vector<int32_t> table;

 private:
  int64_t bytes(const Case& c, KvKind kind) const {
    const int64_t count = c.head_dim * c.block_size;
    const int64_t four = (c.head_dim + 1) / 2 * c.block_size + 4 * c.block_size;
    const int64_t heads[] = {4 * count, 2 * count, count + 2 * c.block_size, four};   // in the order of KvKind
    return blocks_ * c.kv_heads * heads[static_cast<int>(kind)];
  }
  int64_t blocks_;
  Guarded<uint8_t> keys_, values_;
};

// As several threads share a tile of queries over many keys: each span on its own, the last one first, then all joined.
void attend_in_spans(const Kernels& k, const AttentionArgs& a, int64_t head, int64_t token0, int64_t token1,
                     std::byte* scratch) {
  const int64_t keys = span_blocks(a.kv.block_size) * a.kv.block_size;
  const int64_t first = a.seen(0, token0).begin / keys, last = (a.seen(0, token1 - 1).end - 1) / keys;
  const int64_t floats = partial_floats((token1 - token0) * (a.heads / a.kv.kv_heads), a.kv.head_dim), stride = floats + 16;
  Guarded<float> all((last - first + 1) * stride);
  for (int64_t span = last; span >= first; --span) {
    Guarded<float> one(floats);
    k.attend_span(a, 0, head, token0, token1, span, one.data(), scratch);
    expect(one.intact(), "attention of a span wrote outside its partial result");
    std::memcpy(all.data() + (span - first) * stride, one.data(), static_cast<size_t>(floats) * sizeof(float));
  }
  k.attend_join(a, 0, head, token0, token1, all.data(), stride, scratch);
  expect(all.intact(), "joining spans wrote outside their partial results");
}

// Feeds the sequence in chunks of these lengths, queries in tiles of `tile` -> [length][heads][head_dim].
std::vector<float> run(const Kernels& k, const Case& c, KvKind kind, const Sequence& s, float scale,
                       const std::vector<int64_t>& chunks, int64_t tile, std::optional<Cache>* kept = nullptr,
                       bool in_spans = false) {
  std::optional<Cache> own;
  Cache& cache = (kept == nullptr ? own : *kept).emplace(c, kind, s.length);
  const int64_t q_width = c.heads * c.head_dim, k_width = c.kv_heads * c.head_dim, gap = 5;
  std::vector<float> all;
  int64_t begin = 0;
  for (const int64_t size : chunks) {
    const auto rows = [&](const std::vector<float>& from, int64_t width) {
      return Exact<float>(std::vector<float>(from.begin() + begin * width, from.begin() + (begin + size) * width), 4);
    };
    const Exact<float> q = rows(s.q, q_width), keys = rows(s.k, k_width), values = rows(s.v, k_width);
    Guarded<float> out(size * (q_width + gap), 8);
    std::vector<int32_t> positions;
    for (int64_t i = 0; i < size; ++i) positions.push_back(static_cast<int32_t>(begin + i));
    const int32_t starts[] = {0, static_cast<int32_t>(size)};
    AttentionArgs a{};
    a.kv = cache.layer;
    a.q = q.data();
    a.k = keys.data();
    a.v = values.data();
    a.out = out.data();
    a.q_stride = q_width;
    a.k_stride = a.v_stride = k_width;
    a.out_stride = q_width + gap;
    a.heads = c.heads;
    a.scale = scale;
    a.softcap = c.softcap;
    a.window = c.window;
    a.causal = c.causal;
    a.positions = positions.data();
    a.starts = starts;
    a.block_tables = cache.table.data();
    a.table_stride = static_cast<int64_t>(cache.table.size());
    for (int64_t token = 0; token < size; ++token) k.kv_write(a, 0, token);
    Guarded<std::byte> scratch(k.attend_scratch(a, tile));
    for (int64_t head = 0; head < c.kv_heads; ++head)
      for (int64_t token = 0; token < size; token += tile) {
        const int64_t end = std::min(size, token + tile);
        if (in_spans)
          attend_in_spans(k, a, head, token, end, scratch.data());
        else
          k.attend(a, 0, head, token, end, scratch.data());
      }
    expect(scratch.intact() && out.intact() && cache.intact(), "attention wrote outside its output, scratch or cache");
    for (int64_t token = 0; token < size; ++token) {
      const float* row = out.data() + token * a.out_stride;
      all.insert(all.end(), row, row + q_width);
      for (int64_t i = 0; i < gap; ++i)
        expect(out.untouched(token * a.out_stride + q_width + i), "attention wrote between rows");
    }
    begin += size;
  }
  return all;
}

struct Problem {
  Case c;
  KvKind kind;
  float scale;
  Sequence sequence;
  std::vector<double> wanted;
};

const std::vector<Problem>& problems() {
  static const std::vector<Problem> made = [] {
    std::vector<Problem> list;
    for (const Case& c : kCases)
      for (const KvKind kind : {KvKind::f32, KvKind::bf16}) {
        const float scale = 1.7f / std::sqrt(static_cast<float>(c.head_dim));
        Sequence sequence(c, 53, list.size() + 1);
        std::vector<double> wanted = textbook(c, sequence, stored(sequence.k, kind), stored(sequence.v, kind), scale);
        list.push_back({c, kind, scale, std::move(sequence), std::move(wanted)});
      }
    return list;
  }();
  return made;
}

void check_close(const std::vector<float>& found, const std::vector<double>& wanted, int number) {
  for (size_t i = 0; i < found.size(); ++i)
    if (!expect(std::fabs(found[i] - wanted[i]) <= 4e-6 + 2e-5 * std::fabs(wanted[i]),
                "attention case %d: element %d is %.9g, the textbook gives %.9g", number, static_cast<int>(i),
                static_cast<double>(found[i]), wanted[i]))
      return;
}

void check_cuts(const Kernels& k, const Case& c, KvKind kind, const Sequence& s, float scale,
                const std::vector<float>& whole, int number) {
  const auto same = [&](const std::vector<int64_t>& chunks, int64_t tile, const char* how) {
    const std::vector<float> other = run(k, c, kind, s, scale, chunks, tile);
    expect(same_bits(other.data(), whole.data(), static_cast<int64_t>(whole.size())),
           "attention case %d: other bits %s", number, how);
  };
  same({s.length}, 3, "in tiles of 3 queries");
  same({s.length}, 64, "in one tile of queries");
  if (!c.causal) return;
  same({20, s.length - 20}, c.tile, "in two chunks");
  same(std::vector<int64_t>(static_cast<size_t>(s.length), 1), 1, "token by token");
}

// Rows [heads' features] times the Hadamard matrix of the largest power of two that divides a head's, part by part.
std::vector<double> turned(const std::vector<double>& rows, int64_t head_dim) {
  const size_t size = static_cast<size_t>(head_dim & -head_dim);
  std::vector<double> out(rows.size());
  for (size_t i = 0; i < rows.size(); ++i) {
    for (size_t j = 0; j < size; ++j) {
      const double sign = __builtin_popcountll(i % static_cast<size_t>(head_dim) % size & j) % 2 ? -1 : 1;
      out[i] += sign * rows[i / size * size + j];
    }
    out[i] /= std::sqrt(static_cast<double>(size));
  }
  return out;
}

// What an int8 or int4 cache holds is within half a step of what was written; returns it.
std::vector<double> decoded(const Case& c, const Cache& cache, const Sequence& s, bool value, int number) {
  const std::vector<float>& given = value ? s.v : s.k;
  const bool turns = !value && cache.layer.kind == KvKind::int4;
  std::vector<double> from(given.begin(), given.end());
  if (turns) from = turned(from, c.head_dim);
  std::vector<double> all(from.size());
  for (int64_t i = 0; i < static_cast<int64_t>(all.size()); ++i) {
    const int64_t d = i % c.head_dim, head = i / c.head_dim % c.kv_heads, position = i / c.head_dim / c.kv_heads;
    const Cache::Held found = cache.held(value, position, head, d);
    const double wanted = from[static_cast<size_t>(i)];
    all[static_cast<size_t>(i)] = found.number;
    if (!expect(std::fabs(found.number - wanted) <= found.reach, "attention case %d: %g is kept as %g, half a step is %g",
                number, wanted, found.number, found.reach))
      break;
  }
  return turns ? turned(all, c.head_dim) : all;
}

void check_coded(const Kernels& k, const Case& c, KvKind kind, int number) {
  const Sequence s(c, 53, static_cast<uint64_t>(number + 100));
  const float scale = 1.7f / std::sqrt(static_cast<float>(c.head_dim));
  std::optional<Cache> cache;
  const std::vector<float> whole = run(k, c, kind, s, scale, {s.length}, c.tile, &cache);
  const std::vector<double> keys = decoded(c, *cache, s, false, number), values = decoded(c, *cache, s, true, number);
  check_close(whole, textbook(c, s, keys, values, scale), number);
  check_cuts(k, c, kind, s, scale, whole, number);
}

// Over several spans of keys: the textbook's result, and the same bits from spans made one by one.
void check_spans(const Kernels& k, int number) {
  const std::pair<Case, KvKind> cases[] = {{{.head_dim = 20}, KvKind::f32},
                                           {{.heads = 7, .kv_heads = 1, .block_size = 48, .window = 530}, KvKind::bf16},
                                           {{.block_size = 512}, KvKind::int8},
                                           {{.heads = 7, .kv_heads = 1, .head_dim = 32}, KvKind::int4}};
  for (const auto& [c, kind] : cases) {
    const Sequence s(c, 560, static_cast<uint64_t>(number));
    const std::vector<int64_t> chunks{540, 1, 19};
    const std::vector<float> whole = run(k, c, kind, s, 0.4f, chunks, c.tile);
    if (kind <= KvKind::bf16) check_close(whole, textbook(c, s, stored(s.k, kind), stored(s.v, kind), 0.4f), number);
    const std::vector<float> other = run(k, c, kind, s, 0.4f, chunks, c.tile, nullptr, true);
    expect(same_bits(other.data(), whole.data(), static_cast<int64_t>(whole.size())),
           "attention case %d: other bits in spans", number++);
  }
}

// What a row may not see may hold anything.
void check_leaks(const Kernels& k, KvKind kind, float bad) {
  const Case c{.head_dim = 20, .window = 9};
  Sequence s(c, 45, 77);
  const int64_t width = c.heads * c.head_dim, k_width = c.kv_heads * c.head_dim;
  const std::vector<float> clean = run(k, c, kind, s, 0.3f, {45}, 16);
  const auto spoil = [&](int64_t first, int64_t last) {
    std::fill(s.k.begin() + first * k_width, s.k.begin() + last * k_width, bad);
    std::fill(s.v.begin() + first * k_width, s.v.begin() + last * k_width, bad);
  };
  spoil(0, 5);
  spoil(35, 45);
  const std::vector<float> found = run(k, c, kind, s, 0.3f, {45}, 16);
  expect(same_bits(found.data() + 13 * width, clean.data() + 13 * width, (35 - 13) * width),
         "attention: %g outside the window leaks", static_cast<double>(bad));
  expect(std::isnan(found[static_cast<size_t>(35 * width)]), "attention: a row that sees %g is a number",
         static_cast<double>(bad));
}

}  // namespace

void test_attention(const Kernels& k) {
  int number = 0;
  for (const Problem& p : problems()) {
    const std::vector<float> whole = run(k, p.c, p.kind, p.sequence, p.scale, {p.sequence.length}, p.c.tile);
    check_close(whole, p.wanted, number);
    check_cuts(k, p.c, p.kind, p.sequence, p.scale, whole, number++);
  }
  for (const KvKind kind : {KvKind::int8, KvKind::int4})
    for (const Case& c : kCases) check_coded(k, c, kind, number++);
  check_spans(k, number);
  for (const KvKind kind : {KvKind::f32, KvKind::bf16, KvKind::int8, KvKind::int4})
    for (const float bad : {NAN, INFINITY}) check_leaks(k, kind, bad);
}

}  // namespace hasten::test
