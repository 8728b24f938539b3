// Paged, grouped-query attention over tiles of keys, written once over isa/simd_*.h.
//
// A tile is one block of the cache. Each gives every query row (max, sum, output) computed on their own; the row folds them
// left to right. A row's tiles, and the order of every addition in them, follow from its position alone, so its bits depend
// on its own query and the cache: not on the rows computed with it, nor on how the prompt was cut. Slots that a row may not
// see are masked before they meet arithmetic that could carry them on: they may hold anything.
#pragma once
#include <cstring>

#include "core.h"
#include "isa/simd_math.h"

namespace hasten {
namespace {
namespace attention {

using simd::V;
inline constexpr int kRows = simd::kTileRows;
inline constexpr int kColumns = simd::kTileColumns;

// --- out[row][column] = sum over i of weights[row][i] * matrix[i][column], one fused chain per element, i ascending

struct Product {
  const float* weights;               // [rows][weight_stride]
  int64_t weight_stride;
  int64_t begin, end;                 // of i
  int64_t stride;                     // of the matrix, in elements
  int64_t width;                      // columns of the matrix; loads past it are masked
  int64_t ahead;                      // elements from here to the matrix that is wanted next: fetched in passing
};

// `fold(row, column, value)` takes the results.
template <int R, int C, class T, class Fold>
HASTEN_INLINE void product_tile(const Product& p, const T* matrix, int64_t column, bool masked, Fold fold) {
  V sums[R][C];
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c) sums[r][c] = simd::zero();
  const T* line = matrix + p.begin * p.stride + column;
  const int64_t last = p.width - column - 16 * (C - 1), step = p.weight_stride;
  // Two pointers and one stride reach eight rows without a register for each.
  const float *low = p.weights + p.begin, *high = low + 4 * step, *end = p.weights + p.end;
  for (; low < end; ++low, ++high, line += p.stride) {
    V values[C];
    for (int c = 0; c < C - 1; ++c) values[c] = simd::load(line + 16 * c);
    values[C - 1] = masked ? simd::load(line + 16 * (C - 1), last) : simd::load(line + 16 * (C - 1));
    __builtin_prefetch(line + p.ahead);
    for (int r = 0; r < R; ++r) {
      const V weight = simd::set(r < 4 ? low[r * step] : high[(r - 4) * step]);
      for (int c = 0; c < C; ++c) sums[r][c] = simd::fma(weight, values[c], sums[r][c]);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c) fold(r, column + 16 * c, sums[r][c]);
}

template <int R, class T, class Fold>
inline void product_rows(const Product& p, const T* matrix, Fold fold) {
  int64_t column = 0;
  for (; column + 16 * kColumns <= p.width; column += 16 * kColumns)
    product_tile<R, kColumns>(p, matrix, column, false, fold);
  for (; column + 16 <= p.width; column += 16) product_tile<R, 1>(p, matrix, column, false, fold);
  if (column < p.width) product_tile<R, 1>(p, matrix, column, true, fold);
}

template <class T, class Fold>
inline void product(int rows, const Product& p, const T* matrix, Fold fold) {
  switch (rows) {
    case 1: return product_rows<1>(p, matrix, fold);
    case 2: return product_rows<2>(p, matrix, fold);
#define HASTEN_ROWS(n) \
    case n: if constexpr (n <= kRows) return product_rows<n>(p, matrix, fold); else return;
    HASTEN_ROWS(3)
    HASTEN_ROWS(4)
    HASTEN_ROWS(5)
    HASTEN_ROWS(6)
    HASTEN_ROWS(7)
    HASTEN_ROWS(8)
#undef HASTEN_ROWS
  }
}

// --- one call's view of the arguments

struct Span { int64_t begin, end; };

// Of the positions a row sees, the slots of a tile; empty where begin >= end.
HASTEN_INLINE Span slots(Span seen, int64_t tile, int64_t size) {
  const int64_t begin = seen.begin - tile * size, end = seen.end - tile * size;
  return {begin < 0 ? 0 : begin, end > size ? size : end};
}

struct Task {
  const AttentionArgs& a;
  int64_t width;                      // head_dim rounded up to 16
  int64_t row_count;                  // query rows: tokens * query heads that share the key head
  Span* seen;                         // [rows] positions that each sees
  float* query;                       // [rows][head_dim], times the scale
  float* output;                      // [rows][width] accumulated
  float* most;                        // [rows] running maximum of the scores
  float* total;                       // [rows] running sum
  float* scores;                      // [kRows][block_size]
  float* key_tile;                    // [head_dim][block_size] in float32
  float* value_tile;                  // [block_size][width]
};

// Scores of `count` rows in place -> weights e^(score - max); slots not seen become 0. Leaves each row's max and sum in the
// tile. Stage by stage over the rows, so that the processor overlaps their reductions.
inline void soften(const AttentionArgs& a, float* scores, const Span* seen, int count, float* most, float* total) {
  const int64_t size = a.kv.block_size;
  const V lowest = simd::set(-simd::kInfinity), cap = simd::set(a.softcap);
  if (a.softcap > 0)
    for (int64_t j = 0; j < count * size; j += 16)
      simd::store(scores + j, simd::mul(cap, simd::tanh(simd::div(simd::load(scores + j), cap))));
  V across[kRows];
  for (int r = 0; r < count; ++r) {
    float* row = scores + r * size;
    if (seen[r].begin > 0 || seen[r].end < size)
      for (int64_t j = 0; j < size; j += 16)
        simd::store(row + j, simd::select(simd::lanes(seen[r].begin - j, seen[r].end - j), simd::load(row + j), lowest));
    across[r] = lowest;
    for (int64_t j = 0; j < size; j += 16) across[r] = simd::maximum(simd::load(row + j), across[r]);
  }
  for (int r = 0; r < count; ++r) most[r] = simd::largest(across[r]);
  for (int r = 0; r < count; ++r) {
    float* row = scores + r * size;
    const V shift = simd::set(most[r]);
    across[r] = simd::zero();
    for (int64_t j = 0; j < size; j += 16) {
      // A slot not seen holds -infinity, so only a row whose every score is -infinity or NaN meets NaN here.
      const V e = simd::exp(simd::sub(simd::load(row + j), shift));
      across[r] = simd::add(across[r], e);
      simd::store(row + j, e);
    }
  }
  for (int r = 0; r < count; ++r) total[r] = simd::sum(across[r]);
}

// A block of the cache, of the cache's type or already float32.
template <class T>
struct Tile {
  int64_t index;
  const T *keys, *values;
  int64_t value_stride;
  int64_t ahead;                      // elements to the next tile; 0: none
};

// Rows [row0, row0 + count) against one tile.
template <class T>
inline void attend_rows(const Task& task, const Tile<T>& tile, int64_t row0, int count) {
  const AttentionArgs& a = task.a;
  const int64_t size = a.kv.block_size, width = task.width;
  Span seen[kRows];
  float sees[16];
  simd::store(sees, simd::zero());
  int any = 0;
  for (int r = 0; r < count; ++r) {
    seen[r] = slots(task.seen[row0 + r], tile.index, size);
    const bool some = seen[r].begin < seen[r].end;
    sees[r] = some ? 1.0f : 0.0f;
    any += some;
  }
  if (any == 0) return;
  float* scores = task.scores;
  const int64_t head_dim = a.kv.head_dim;
  product(count, {task.query + row0 * head_dim, head_dim, 0, head_dim, size, size, tile.ahead}, tile.keys,
          [=](int r, int64_t j, V s) { simd::store(scores + r * size + j, s); });

  // Fold factors: what stood before is multiplied by `keep`, the tile by `take`.
  float tile_most[16], tile_total[16], keep[16], take[16];
  simd::store(tile_most, simd::zero());
  simd::store(tile_total, simd::zero());
  soften(a, scores, seen, count, tile_most, tile_total);
  const V before = simd::load(task.most + row0, count), here = simd::load(tile_most);
  const V old_total = simd::load(task.total + row0, count), here_total = simd::load(tile_total);
  const V highest = simd::maximum(here, before);
  const V kept = simd::exp(simd::sub(before, highest)), taken = simd::exp(simd::sub(here, highest));
  const simd::M unseen = simd::equal(simd::load(sees), simd::zero());
  simd::store(keep, kept);
  simd::store(take, taken);
  simd::store(task.most + row0, simd::select(unseen, before, highest), count);
  simd::store(task.total + row0,
              simd::select(unseen, old_total, simd::add(simd::mul(old_total, kept), simd::mul(here_total, taken))), count);

  // Runs of rows that see the same slots: others are never multiplied, not even by zero.
  for (int first = 0; first < count;) {
    int next = first + 1;
    while (next < count && seen[next].begin == seen[first].begin && seen[next].end == seen[first].end) ++next;
    if (seen[first].begin < seen[first].end) {
      const Product w{scores + first * size, size, seen[first].begin, seen[first].end,
                      tile.value_stride, tile.value_stride < width ? head_dim : width, tile.ahead};
      float* output = task.output + (row0 + first) * width;
      const float *k = keep + first, *t = take + first;
      product(next - first, w, tile.values, [=](int r, int64_t d, V o) {
        float* at = output + r * width + d;
        simd::store(at, simd::fma(o, simd::set(t[r]), simd::mul(simd::load(at), simd::set(k[r]))));
      });
    }
    first = next;
  }
}

template <class T>
inline void attend_tile(const Task& task, const Tile<T>& tile) {
  for (int64_t r = 0; r < task.row_count; r += kRows)
    attend_rows(task, tile, r, static_cast<int>(task.row_count - r < kRows ? task.row_count - r : kRows));
}

// float32 copy of a bfloat16 tile, for rows enough to read it more than once; the bits are the same either way.
inline Tile<float> widen(const Task& task, const Tile<uint16_t>& tile) {
  const int64_t size = task.a.kv.block_size, head_dim = task.a.kv.head_dim;
  for (int64_t i = 0; i < head_dim * size; i += 16) {
    __builtin_prefetch(tile.keys + i + tile.ahead);
    simd::store(task.key_tile + i, simd::load(tile.keys + i));
  }
  for (int64_t j = 0; j < size; ++j)
    for (int64_t d = 0; d < head_dim; d += 16) {
      const int64_t left = head_dim - d;
      const uint16_t* from = tile.values + j * head_dim + d;
      __builtin_prefetch(from + tile.ahead);
      simd::store(task.value_tile + j * task.width + d, left >= 16 ? simd::load(from) : simd::load(from, left));
    }
  return {tile.index, task.key_tile, task.value_tile, task.width, 0};
}

template <class T>
inline void attend_as(const Task& task, const int32_t* table, int64_t kv_head) {
  const KvLayer& kv = task.a.kv;
  // Positions ascend, so the first row sees furthest back and the last furthest ahead.
  const int64_t first = task.seen[0].begin / kv.block_size;
  const int64_t last = (task.seen[task.row_count - 1].end - 1) / kv.block_size;
  const auto offset = [&](int64_t index) { return (table[index] * kv.kv_heads + kv_head) * kv.head_dim * kv.block_size; };
  for (int64_t index = first; index <= last; ++index) {
    const int64_t here = offset(index);
    const Tile<T> tile{index, static_cast<const T*>(kv.keys) + here, static_cast<const T*>(kv.values) + here, kv.head_dim,
                       index < last ? offset(index + 1) - here : 0};
    if constexpr (sizeof(T) < sizeof(float)) {
      if (task.row_count > kRows) {
        attend_tile(task, widen(task, tile));
        continue;
      }
    }
    attend_tile(task, tile);
  }
}

// Positions that a row of the batch sees.
inline Span visible(const AttentionArgs& a, int64_t sequence, int64_t token) {
  const int64_t position = a.positions[token];
  const int64_t end = (a.causal ? position : a.positions[a.starts[sequence + 1] - 1]) + 1;
  const int64_t begin = a.window > 0 && position >= a.window ? position - a.window + 1 : 0;
  return {begin, end};
}

// Cuts the scratch into a task's arrays; with null scratch only counts. Returns the bytes.
inline int64_t lay_out(Task& task, std::byte* scratch) {
  int64_t used = 0;
  const auto take = [&](int64_t bytes) {
    std::byte* here = scratch == nullptr ? nullptr : scratch + used;
    used += round_up(bytes, kAlign);
    return here;
  };
  const auto floats = [&](int64_t count) {
    return reinterpret_cast<float*>(take(count * static_cast<int64_t>(sizeof(float))));
  };
  const KvLayer& kv = task.a.kv;
  task.seen = reinterpret_cast<Span*>(take(task.row_count * static_cast<int64_t>(sizeof(Span))));
  task.query = floats(task.row_count * kv.head_dim);
  task.output = floats(task.row_count * task.width);
  task.most = floats(task.row_count);
  task.total = floats(task.row_count);
  task.scores = floats(kRows * kv.block_size);
  task.key_tile = floats(kv.head_dim * kv.block_size);
  task.value_tile = floats(kv.block_size * task.width);
  return used;
}

inline Task describe(const AttentionArgs& a, int64_t tokens) {
  return {a,       round_up(a.kv.head_dim, 16), tokens * (a.heads / a.kv.kv_heads),
          nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr};
}

// --- entries of the table

inline int64_t attend_scratch(const AttentionArgs& a, int64_t tokens) {
  Task task = describe(a, tokens);
  return lay_out(task, nullptr);
}

inline void attend(const AttentionArgs& a, int64_t sequence, int64_t kv_head, int64_t token0, int64_t token1,
                   std::byte* scratch) {
  if (token0 >= token1) return;
  Task task = describe(a, token1 - token0);
  lay_out(task, scratch);
  const int64_t head_dim = a.kv.head_dim, group = a.heads / a.kv.kv_heads;
  int64_t r = 0;
  for (int64_t token = token0; token < token1; ++token)
    for (int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head, ++r) {
      task.seen[r] = visible(a, sequence, token);
      const float* q = a.q + token * a.q_stride + head * head_dim;
      for (int64_t d = 0; d < head_dim; d += 16) {
        const int64_t lanes = head_dim - d < 16 ? head_dim - d : 16;
        simd::store(task.query + r * head_dim + d, simd::mul(simd::load(q + d, lanes), simd::set(a.scale)), lanes);
      }
      task.most[r] = -simd::kInfinity;
      task.total[r] = 0;
    }
  memset(task.output, 0, static_cast<size_t>(task.row_count * task.width) * sizeof(float));
  const int32_t* table = a.block_tables + sequence * a.table_stride;
  if (a.kv.kind == KvKind::f32) attend_as<float>(task, table, kv_head);
  else attend_as<uint16_t>(task, table, kv_head);
  r = 0;
  for (int64_t token = token0; token < token1; ++token)
    for (int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head, ++r) {
      float* out = a.out + token * a.out_stride + head * head_dim;
      const V total = simd::set(task.total[r]);
      for (int64_t d = 0; d < head_dim; d += 16)
        simd::store(out + d, simd::div(simd::load(task.output + r * task.width + d), total),
                    head_dim - d < 16 ? head_dim - d : 16);
    }
}

template <class T>
inline void write_token(const AttentionArgs& a, int64_t sequence, int64_t token) {
  const int64_t size = a.kv.block_size, head_dim = a.kv.head_dim, position = a.positions[token], slot = position % size;
  const int64_t block = a.block_tables[sequence * a.table_stride + position / size];
  const float *k = a.k + token * a.k_stride, *v = a.v + token * a.v_stride;
  for (int64_t head = 0; head < a.kv.kv_heads; ++head) {
    const int64_t offset = (block * a.kv.kv_heads + head) * head_dim * size;
    T* keys = static_cast<T*>(a.kv.keys) + offset + slot;
    T* values = static_cast<T*>(a.kv.values) + offset + slot * head_dim;
    for (int64_t d = 0; d < head_dim; d += 16) {
      const int64_t lanes = head_dim - d < 16 ? head_dim - d : 16;
      T column[16];
      simd::store(column, simd::load(k + head * head_dim + d, lanes), 16);
      for (int64_t i = 0; i < lanes; ++i) keys[(d + i) * size] = column[i];
      simd::store(values + d, simd::load(v + head * head_dim + d, lanes), lanes);
    }
  }
}

inline void kv_write(const AttentionArgs& a, int64_t sequence, int64_t token) {
  if (a.kv.kind == KvKind::f32) write_token<float>(a, sequence, token);
  else write_token<uint16_t>(a, sequence, token);
}

}  // namespace attention
}  // namespace
}  // namespace hasten
