// Paged, grouped-query attention, written once over isa/simd_*.h.
//
// A tile is a fixed run of the cache's blocks, a span a fixed run of tiles, both counted from position 0. A tile gives every
// query row (max, sum, output) computed on their own; a span folds its tiles, and a row its spans, left to right, each from
// nothing. So a row's bits do not depend on the rows computed with it, on how the prompt was cut, nor on which thread made
// which span. What no row sees is skipped: blocks outside a window are not even read.
#pragma once
#include "isa/attention_cache.h"

namespace hasten {
namespace {
namespace attention {

inline int64_t tile_blocks(const KvLayer& kv) { return kv.block_size < kTileKeys ? kTileKeys / kv.block_size : 1; }

inline void widen_scales(const void* from, int64_t count, float* out) {
  for (int64_t j = 0; j < count; j += 16) simd::store(out + j, simd::load(static_cast<const uint16_t*>(from) + j));
}

// Blocks first..last of a tile.
template <class T>
inline Tile<T> take_tile(const Rows& rows, const int32_t* table, int64_t kv_head, int64_t first, int64_t last, bool more) {
  const KvLayer& kv = rows.a.kv;
  const int64_t size = kv.block_size, bytes = kv.head_bytes();
  Tile<T> tile;
  tile.position = first * size;
  tile.blocks = static_cast<int>(last - first + 1);
  tile.size = tile.key_stride = size;
  tile.value_stride = kv.head_dim;
  tile.scaled = sizeof(T) == 1;
  tile.centred = false;
  const auto offset = [=, &kv](int64_t block) { return (table[block] * kv.kv_heads + kv_head) * bytes; };
  for (int b = 0; b < tile.blocks; ++b) {
    const int64_t block = first + b, at = offset(block);
    tile.keys[b] = reinterpret_cast<const T*>(static_cast<const std::byte*>(kv.keys) + at);
    tile.values[b] = reinterpret_cast<const T*>(static_cast<const std::byte*>(kv.values) + at);
    tile.ahead[b] = tile.value_ahead[b] = block < last || more ? (offset(block + 1) - at) / static_cast<int64_t>(sizeof(T)) : 0;
    if constexpr (sizeof(T) == 1) {
      widen_scales(tile.keys[b] + kv.head_dim * size, size, rows.key_scales + b * size);
      widen_scales(tile.values[b] + kv.head_dim * size, size, rows.value_scales + b * size);
    }
  }
  return tile;
}

// The same of an int4 cache, unpacked into bytes: few instructions beside those of the products. Blocks up to `end` are read
// after it.
inline Tile<int8_t> unpack_tile(const Rows& rows, const int32_t* table, int64_t kv_head, int64_t first, int64_t last,
                                int64_t end) {
  const KvLayer& kv = rows.a.kv;
  const int64_t size = kv.block_size, half = kv.half(), head_dim = kv.head_dim, codes = half * size;
  Tile<int8_t> tile;
  tile.position = first * size;
  tile.blocks = static_cast<int>(last - first + 1);
  tile.size = tile.key_stride = size;
  tile.value_stride = head_dim;
  tile.scaled = tile.centred = true;
  const auto offset = [=, &kv](int64_t block) { return (table[block] * kv.kv_heads + kv_head) * kv.head_bytes(); };
  for (int b = 0; b < tile.blocks; ++b) {
    const int64_t block = first + b, at = offset(block), place = b * size;
    const auto* from_keys = static_cast<const uint8_t*>(kv.keys) + at;
    const auto* from_values = static_cast<const uint8_t*>(kv.values) + at;
    int8_t *keys = rows.key_codes + 2 * half * place, *values = rows.value_codes + head_dim * place;
    unpack(from_keys, codes, keys, keys + codes);
    for (int64_t j = 0; j < size; ++j) unpack(from_values + j * half, half, values + j * head_dim, values + j * head_dim + half);
    tile.keys[b] = keys;
    tile.values[b] = values;
    const int64_t next = block + tile_blocks(kv);
    const auto ahead = [&](const void* cache, const int8_t* copy) {
      return next > end ? 0 : reinterpret_cast<intptr_t>(cache) + offset(next) - reinterpret_cast<intptr_t>(copy);
    };
    tile.ahead[b] = ahead(kv.keys, keys);
    tile.value_ahead[b] = ahead(kv.values, values);
    widen_scales(from_keys + codes, size, rows.key_scales + place);
    widen_scales(from_keys + codes + 2 * size, size, rows.key_centres + place);
    widen_scales(from_values + codes, size, rows.value_scales + place);
    widen_scales(from_values + codes + 2 * size, size, rows.value_centres + place);
  }
  return tile;
}

inline void begin(const Partial& p, int64_t rows, int64_t width) {
  for (int64_t r = 0; r < rows; ++r) p.most[r] = -simd::kInfinity;
  memset(p.total, 0, static_cast<size_t>(rows) * sizeof(float));
  memset(p.output, 0, static_cast<size_t>(rows * width) * sizeof(float));
}

// All rows over one span, into rows.span.
template <class T, bool packed = false>
inline void attend_span_as(const Rows& rows, const int32_t* table, int64_t kv_head, int64_t span) {
  const KvLayer& kv = rows.a.kv;
  const int64_t in_span = span_blocks(kv.block_size), in_tile = tile_blocks(kv);
  // Positions ascend, so the first row sees furthest back and the last furthest ahead.
  int64_t block = rows.seen[0].begin / kv.block_size, last = (rows.seen[rows.count - 1].end - 1) / kv.block_size;
  if (block < span * in_span) block = span * in_span;
  if (last >= (span + 1) * in_span) last = (span + 1) * in_span - 1;
  begin(rows.span, rows.count, rows.width);
  while (block <= last) {
    int64_t end = (block / in_tile + 1) * in_tile - 1;
    if (end > last) end = last;
    Tile<T> tile;
    if constexpr (packed) tile = unpack_tile(rows, table, kv_head, block, end, last);
    else tile = take_tile<T>(rows, table, kv_head, block, end, end < last);
    // Few rows read a tile once, or nearly, and need no copy; columns that are not whole registers do.
    if (rows.count <= kMostRows && kv.head_dim % 16 == 0) attend_tile<packed ? kPacked : kAsStored>(rows, tile);
    else attend_tile<kNone>(rows, widen(rows, tile));
    block = end + 1;
  }
}

inline void attend_one(const Rows& rows, int64_t sequence, int64_t kv_head, int64_t span) {
  const int32_t* table = rows.a.block_tables + sequence * rows.a.table_stride;
  switch (rows.a.kv.kind) {
    case KvKind::f32: return attend_span_as<float>(rows, table, kv_head, span);
    case KvKind::bf16: return attend_span_as<uint16_t>(rows, table, kv_head, span);
    case KvKind::int8: return attend_span_as<int8_t>(rows, table, kv_head, span);
    case KvKind::int4: return attend_span_as<int8_t, true>(rows, table, kv_head, span);
  }
}

// The whole takes in one span.
inline void join(const Rows& rows, const Partial& span) {
  for (int64_t row0 = 0; row0 < rows.count; row0 += 16) {
    const int64_t count = rows.count - row0 < 16 ? rows.count - row0 : 16;
    const Factors f = merge(rows.whole, row0, count, simd::load(span.most + row0), simd::load(span.total + row0));
    for (int64_t r = 0; r < count; ++r) {
      if (span.total[row0 + r] == 0) continue;
      const V keep = simd::set(f.keep[r]), take = simd::set(f.take[r]);
      for (int64_t i = (row0 + r) * rows.width; i < (row0 + r + 1) * rows.width; i += 16)
        simd::store(rows.whole.output + i,
                    simd::fma(simd::load(span.output + i), take, simd::mul(simd::load(rows.whole.output + i), keep)));
    }
  }
}

// --- one call

inline Partial partial_at(float* at, int64_t rows, int64_t width) {
  return {at, at + rows + 16, at + partial_floats(rows, width) - rows * width};
}

// Cuts the scratch into a call's arrays; with null scratch only counts. Returns the bytes.
inline int64_t lay_out(Rows& rows, std::byte* scratch) {
  int64_t used = 0;
  const auto take = [&](int64_t bytes) {
    std::byte* here = scratch == nullptr ? nullptr : scratch + used;
    used += round_up(bytes, kAlign);
    return here;
  };
  const auto floats = [&](int64_t count) {
    return reinterpret_cast<float*>(take(count * static_cast<int64_t>(sizeof(float))));
  };
  const int64_t head_dim = rows.a.kv.head_dim;
  rows.seen = reinterpret_cast<AttentionArgs::Keys*>(take(rows.count * static_cast<int64_t>(sizeof(AttentionArgs::Keys))));
  rows.query = floats(rows.count * head_dim);
  rows.span = partial_at(floats(partial_floats(rows.count, head_dim)), rows.count, rows.width);
  rows.whole = partial_at(floats(partial_floats(rows.count, head_dim)), rows.count, rows.width);
  rows.scores = floats(kMostRows * rows.tile_keys);
  rows.key_tile = floats(head_dim * rows.tile_keys);
  rows.value_tile = floats(rows.tile_keys * rows.width);
  rows.key_scales = floats(rows.tile_keys);
  rows.value_scales = floats(rows.tile_keys);
  rows.key_centres = floats(rows.tile_keys);
  rows.value_centres = floats(rows.tile_keys);
  rows.query_sums = floats(rows.count);
  const bool packed = rows.a.kv.kind == KvKind::int4;
  const auto codes = [&](int64_t features) { return reinterpret_cast<int8_t*>(take(packed ? rows.tile_keys * features : 0)); };
  rows.key_codes = codes(2 * rows.a.kv.half());
  rows.value_codes = codes(head_dim + 1);
  return used;
}

inline Rows describe(const AttentionArgs& a, int64_t tokens) {
  const Partial none{nullptr, nullptr, nullptr};
  return {a,       tokens * (a.heads / a.kv.kv_heads), round_up(a.kv.head_dim, 16), tile_blocks(a.kv) * a.kv.block_size,
          nullptr, nullptr, none, none, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr};
}

// As the keys that it meets are.
inline void turn_query(float* query, int64_t head_dim, float& total) {
  turn(query, head_dim);
  V sum = simd::zero();
  for (int64_t d = 0; d < head_dim; d += 16) sum = simd::add(sum, read(query + d, head_dim - d));
  total = simd::sum(sum);
}

// Rows of tokens [token0, token1), their queries scaled.
inline Rows take_rows(const AttentionArgs& a, int64_t sequence, int64_t kv_head, int64_t token0, int64_t token1,
                      std::byte* scratch) {
  Rows rows = describe(a, token1 - token0);
  lay_out(rows, scratch);
  const int64_t head_dim = a.kv.head_dim, group = a.heads / a.kv.kv_heads;
  const V scale = simd::set(a.softcap > 0 ? a.scale : a.scale * kLog2e);
  int64_t r = 0;
  for (int64_t token = token0; token < token1; ++token)
    for (int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head, ++r) {
      rows.seen[r] = a.seen(sequence, token);
      const float* q = a.q + token * a.q_stride + head * head_dim;
      for (int64_t d = 0; d < head_dim; d += 16) {
        const int64_t lanes = head_dim - d < 16 ? head_dim - d : 16;
        write(rows.query + r * head_dim + d, simd::mul(read(q + d, lanes), scale), lanes);
      }
      if (a.kv.kind == KvKind::int4) turn_query(rows.query + r * head_dim, head_dim, rows.query_sums[r]);
    }
  return rows;
}

inline void finish(const Rows& rows, int64_t kv_head, int64_t token0) {
  const AttentionArgs& a = rows.a;
  const int64_t head_dim = a.kv.head_dim, group = a.heads / a.kv.kv_heads;
  for (int64_t r = 0; r < rows.count; ++r) {
    float* out = a.out + (token0 + r / group) * a.out_stride + (kv_head * group + r % group) * head_dim;
    const V total = simd::set(rows.whole.total[r]);
    for (int64_t d = 0; d < head_dim; d += 16)
      write(out + d, simd::div(simd::load(rows.whole.output + r * rows.width + d), total), head_dim - d);
  }
}

struct Spans { int64_t first, last; };
inline Spans spans_of(const AttentionArgs& a, int64_t sequence, int64_t token0, int64_t token1) {
  const int64_t keys = span_blocks(a.kv.block_size) * a.kv.block_size;
  return {a.seen(sequence, token0).begin / keys, (a.seen(sequence, token1 - 1).end - 1) / keys};
}

// --- entries of the table

inline int64_t attend_scratch(const AttentionArgs& a, int64_t tokens) {
  Rows rows = describe(a, tokens);
  return lay_out(rows, nullptr);
}

inline void attend(const AttentionArgs& a, int64_t sequence, int64_t kv_head, int64_t token0, int64_t token1,
                   std::byte* scratch) {
  if (token0 >= token1) return;
  const Rows rows = take_rows(a, sequence, kv_head, token0, token1, scratch);
  begin(rows.whole, rows.count, rows.width);
  const Spans spans = spans_of(a, sequence, token0, token1);
  for (int64_t span = spans.first; span <= spans.last; ++span) {
    attend_one(rows, sequence, kv_head, span);
    join(rows, rows.span);
  }
  finish(rows, kv_head, token0);
}

inline void attend_span(const AttentionArgs& a, int64_t sequence, int64_t kv_head, int64_t token0, int64_t token1, int64_t span,
                        float* partial, std::byte* scratch) {
  Rows rows = take_rows(a, sequence, kv_head, token0, token1, scratch);
  rows.span = partial_at(partial, rows.count, rows.width);
  attend_one(rows, sequence, kv_head, span);
}

inline void attend_join(const AttentionArgs& a, int64_t sequence, int64_t kv_head, int64_t token0, int64_t token1,
                        const float* partials, int64_t stride, std::byte* scratch) {
  Rows rows = describe(a, token1 - token0);
  lay_out(rows, scratch);
  begin(rows.whole, rows.count, rows.width);
  const Spans spans = spans_of(a, sequence, token0, token1);
  for (int64_t i = 0; i <= spans.last - spans.first; ++i)
    join(rows, partial_at(const_cast<float*>(partials) + i * stride, rows.count, rows.width));
  finish(rows, kv_head, token0);
}

}  // namespace attention
}  // namespace
}  // namespace hasten
