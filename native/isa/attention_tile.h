// Attention of many query rows over one tile of keys, written once over isa/simd_*.h; isa/attention.h says what a tile is.
//
// A row's results in a tile, and the order of every addition in them, follow from its own query and the cache: rows computed
// with it, and slots that only they see, change nothing. Slots that a row may not see are masked before they meet arithmetic
// that could carry them on: they may hold anything.
#pragma once
#include <cstring>

#include "core.h"
#include "isa/simd_math.h"

namespace hasten {
namespace {
namespace attention {

using simd::P;
using simd::V;
inline constexpr int64_t kTileKeys = 64;      // of a tile, or one block where that is longer
inline constexpr int kTileBlocks = 4;         // at most: blocks have 16 tokens or more
inline constexpr int kMostRows = simd::kMostRows;

// Masked moves are slow on some processors: they are for tails only.
template <class T>
HASTEN_INLINE V read(const T* p, int64_t lanes) { return lanes >= 16 ? simd::load(p) : simd::load(p, lanes); }
HASTEN_INLINE void write(float* p, V a, int64_t lanes) {
  if (lanes >= 16) simd::store(p, a);
  else simd::store(p, a, lanes);
}

// --- out[row][column] = sum over i of weights[row][i] * matrix[i][column], one fused chain per element, i ascending

template <class T>
struct Piece {                        // of a matrix that does not stand in one place
  const T* matrix;
  const float* weights;               // of row 0
  int64_t begin, end;                 // of i
  int64_t ahead;                      // elements from here to the matrix that is wanted next
};

template <class T>
struct Product {
  Piece<T> pieces[kTileBlocks];
  int count;
  int64_t weight_stride, stride;      // from row to row of the weights, from i to i of the matrix
  int64_t first, last;                // columns, multiples of 16
};

// `fold(row, column, part)` takes the results. With `fetch`, as much of the next matrix is asked for as this one has been read:
// kAsStored, or half as many bytes where that one is packed and this is a copy.
enum Fetch { kNone, kAsStored, kPacked };

template <int R, int C, Fetch fetch, class T, class Fold>
HASTEN_INLINE void product_tile(const Product<T>& p, int64_t column, Fold fold) {
  P sums[R][C];
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c) sums[r][c] = simd::part_zero();
  const int64_t step = p.weight_stride, stride = p.stride;
  for (const Piece<T>* piece = p.pieces; piece != p.pieces + p.count; ++piece) {
    const T* line = piece->matrix + piece->begin * stride + column;
    constexpr int pace = fetch == kPacked ? 2 : 1;
    const T* next = piece->matrix + piece->ahead + (column - p.first) * (piece->end - piece->begin) / pace;
    // Two pointers and one stride reach eight rows without a register for each.
    const float *low = piece->weights + piece->begin, *high = low + 4 * step, *end = piece->weights + piece->end;
#pragma GCC unroll 2
    for (; low < end; ++low, ++high, line += stride) {
      if constexpr (fetch != kNone) {
        __builtin_prefetch(next);
        next += simd::kPart * C / pace;
      }
      const auto weight = [&](int r) { return simd::part_set(r < 4 ? low[r * step] : high[(r - 4) * step]); };
      // Whichever are fewer stay in registers.
      if constexpr (R < C) {
        P weights[R];
        for (int r = 0; r < R; ++r) weights[r] = weight(r);
        for (int c = 0; c < C; ++c) {
          const P value = simd::part_load(line + simd::kPart * c);
          for (int r = 0; r < R; ++r) sums[r][c] = simd::fma(weights[r], value, sums[r][c]);
        }
      } else {
        P values[C];
        for (int c = 0; c < C; ++c) values[c] = simd::part_load(line + simd::kPart * c);
        for (int r = 0; r < R; ++r) {
          const P one = weight(r);
          for (int c = 0; c < C; ++c) sums[r][c] = simd::fma(one, values[c], sums[r][c]);
        }
      }
    }
  }
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c) fold(r, column + simd::kPart * c, sums[r][c]);
}

template <int R, Fetch fetch, class T, class Fold>
inline void product_rows(const Product<T>& p, Fold fold) {
  constexpr int C = simd::tile_parts(R);
  int64_t column = p.first;
  for (; column + simd::kPart * C <= p.last; column += simd::kPart * C) product_tile<R, C, fetch>(p, column, fold);
  if constexpr (simd::kPart * C > 16)
    for (; column < p.last; column += 16) product_tile<R, 16 / simd::kPart, fetch>(p, column, fold);
}

template <Fetch fetch, class T, class Fold>
HASTEN_INLINE void product(int rows, const Product<T>& p, Fold fold) {
  if constexpr (kMostRows > simd::kTileRows) {
    if (rows > simd::kTileRows) {   // four and the rest: a tile of them all would have more loads than multiply-adds
      product_rows<4, fetch>(p, fold);
      Product<T> rest = p;
      for (int i = 0; i < rest.count; ++i) rest.pieces[i].weights += 4 * p.weight_stride;
      const auto below = [=](int r, int64_t column, P sum) { fold(r + 4, column, sum); };
      return rows == 7 ? product_rows<3, kNone>(rest, below) : product_rows<4, kNone>(rest, below);
    }
  }
  switch (rows) {
    case 1: return product_rows<1, fetch>(p, fold);
    case 2: return product_rows<2, fetch>(p, fold);
#define HASTEN_ROWS(n) \
    case n: if constexpr (n <= simd::kTileRows) return product_rows<n, fetch>(p, fold); else return;
    HASTEN_ROWS(3)
    HASTEN_ROWS(4)
    HASTEN_ROWS(5)
    HASTEN_ROWS(6)
    HASTEN_ROWS(7)
    HASTEN_ROWS(8)
#undef HASTEN_ROWS
  }
}

// --- partial results of rows

struct Partial {
  float *most, *total;                // [rows, and room for 16 more] maximum of the scores, in units of log 2; sum of 2^(score - most), 0: saw nothing
  float* output;                      // [rows][width]
};

// What stood before is multiplied by keep, what comes by take.
struct Factors { float keep[16], take[16]; };

// Rows row0.. of `into` take in up to 16 rows' maxima and sums; rows whose sum is 0 saw nothing and change nothing.
inline Factors merge(const Partial& into, int64_t row0, int64_t rows, V most, V total) {
  const V before = simd::load(into.most + row0), old_total = simd::load(into.total + row0);
  const V highest = simd::maximum(most, before);
  const V kept = simd::exp2_nonpositive(simd::sub(before, highest)), taken = simd::exp2_nonpositive(simd::sub(most, highest));
  // Rows past the end keep what stands there.
  const V counted = simd::select(simd::lanes(0, rows), total, simd::zero());
  const simd::M unseen = simd::equal(counted, simd::zero());
  const V sum = simd::add(simd::mul(old_total, kept), simd::mul(total, taken));
  Factors f;
  simd::store(f.keep, kept);
  simd::store(f.take, taken);
  simd::store(into.most + row0, simd::select(unseen, before, highest));
  simd::store(into.total + row0, simd::select(unseen, old_total, sum));
  return f;
}

// --- a tile

struct Slots { int64_t begin, end; }; // of a tile, that a row sees; none where begin >= end

struct Rows {                         // of one call: query heads that share a key head, of all its tokens
  const AttentionArgs& a;
  int64_t count, width, tile_keys;    // width: head_dim rounded up to 16
  AttentionArgs::Keys* seen;          // [rows] positions that each sees, ascending
  float* query;                       // [rows][head_dim], times scale and log2 e (but for a soft cap)
  Partial span, whole;                // of one span; of all so far
  float* scores;                      // [kMostRows][tile_keys]
  float *key_tile, *value_tile;       // in float32: [head_dim][tile_keys], [tile_keys][width]
  float *key_scales, *value_scales;   // [tile_keys], int8 and int4
  float *key_centres, *value_centres; // [tile_keys], int4
  float* query_sums;                  // [rows] of a query's features, int4
  int8_t *key_codes, *value_codes;    // int4's as odd bytes, as an int8 cache's blocks stand, one behind the other
};

// Neighbouring blocks, of the cache's type; or, as one, in float32.
template <class T>
struct Tile {
  int64_t position;                   // of its first slot
  int blocks;
  const T *keys[kTileBlocks], *values[kTileBlocks];
  int64_t size;                       // tokens of a block
  int64_t key_stride, value_stride;
  int64_t ahead[kTileBlocks];         // elements to the block to fetch meanwhile; 0: none
  int64_t value_ahead[kTileBlocks];   // the same from values
  bool scaled, centred;               // rows' key_scales and value_scales hold; their centres
};

inline constexpr float kLog2e = 1.44269504f;

struct Sums { float most[16], total[16], centre[16]; };   // of rows in a tile: centre is what their values' centres add

// Scores of `count` rows in place -> weights 2^(score - max), times the values' scales; slots not seen have none. Leaves each
// row's sums over columns [first, last). Stage by stage over the rows, so that the processor overlaps their reductions.
template <class T>
inline void soften(const Rows& rows, const Tile<T>& tile, const Slots* seen, int count, int64_t first, int64_t last, Sums& sums) {
  const int64_t stride = rows.tile_keys;
  const V lowest = simd::set(-simd::kInfinity), cap = simd::set(rows.a.softcap), full = simd::set(rows.a.softcap * kLog2e);
  if (rows.a.softcap > 0)
    for (int r = 0; r < count; ++r)
      for (float* at = rows.scores + r * stride + first; at < rows.scores + r * stride + last; at += 16)
        simd::store(at, simd::mul(full, simd::tanh(simd::div(simd::load(at), cap))));
  V across[kMostRows];
  for (int r = 0; r < count; ++r) {
    float* row = rows.scores + r * stride;
    if (seen[r].begin > first || seen[r].end < last)
      for (int64_t j = first; j < last; j += 16)
        simd::store(row + j, simd::select(simd::lanes(seen[r].begin - j, seen[r].end - j), simd::load(row + j), lowest));
    across[r] = lowest;
    for (int64_t j = first; j < last; j += 16) across[r] = simd::maximum(simd::load(row + j), across[r]);
  }
  for (int r = 0; r < count; ++r) sums.most[r] = simd::largest(across[r]);
  for (int r = 0; r < count; ++r) {
    float* row = rows.scores + r * stride;
    if (seen[r].begin >= seen[r].end) {
      across[r] = simd::zero();
      continue;
    }
    const V shift = simd::set(sums.most[r]);
    V sum = simd::zero(), centre = simd::zero();
    for (int64_t j = first; j < last; j += 16) {
      // A slot not seen holds -infinity, so only a row whose every score is -infinity or NaN meets NaN here.
      const V e = simd::exp2_nonpositive(simd::sub(simd::load(row + j), shift));
      sum = simd::add(sum, e);
      simd::store(row + j, tile.scaled ? simd::mul(e, simd::load(rows.value_scales + j)) : e);
      if (!tile.centred) continue;
      const simd::M mask = simd::lanes(seen[r].begin - j, seen[r].end - j);   // a slot not seen may hold NaN
      centre = simd::fma(e, simd::select(mask, simd::load(rows.value_centres + j), simd::zero()), centre);
    }
    across[r] = sum;
    if (tile.centred) sums.centre[r] = simd::sum(centre);
  }
  for (int r = 0; r < count; ++r) sums.total[r] = simd::sum(across[r]);
}

// scores[row][slot] of rows row0.. in columns [first, last).
template <Fetch fetch, class T>
inline void score(const Rows& rows, const Tile<T>& tile, int64_t row0, int count, int64_t first, int64_t last) {
  const int64_t head_dim = rows.a.kv.head_dim;
  for (int b = 0; b < tile.blocks; ++b) {
    const int64_t begin = b * tile.size;
    const int64_t from = first > begin ? first - begin : 0, to = last - begin < tile.size ? last - begin : tile.size;
    if (from >= to) continue;
    Product<T> p;
    p.pieces[0] = {tile.keys[b], rows.query + row0 * head_dim, 0, head_dim, tile.ahead[b]};
    p.count = 1;
    p.weight_stride = head_dim;
    p.stride = tile.key_stride;
    p.first = from;
    p.last = to;
    float* scores = rows.scores + begin;
    const float *scales = rows.key_scales + begin, *centres = rows.key_centres + begin, *sums = rows.query_sums + row0;
    const int64_t stride = rows.tile_keys;
    const bool scaled = tile.scaled, centred = tile.centred;
    product<fetch>(count, p, [=](int r, int64_t j, P s) {
      if (scaled) s = simd::mul(s, simd::part_load(scales + j));
      if (centred) s = simd::fma(simd::part_set(sums[r]), simd::part_load(centres + j), s);
      simd::store(scores + r * stride + j, s);
    });
  }
}

// Weights of rows row0 + first.. times the values of the slots that they all see, into the span's outputs.
template <Fetch fetch, class T>
inline void add_values(const Rows& rows, const Tile<T>& tile, int64_t row0, int first, int count, Slots seen,
                       const Factors& factors, const Sums& sums) {
  const int64_t width = rows.width;
  Product<T> p;
  p.count = 0;
  p.weight_stride = rows.tile_keys;
  p.stride = tile.value_stride;
  p.first = 0;
  p.last = width;
  for (int b = 0; b < tile.blocks; ++b) {
    const int64_t base = b * tile.size;
    const int64_t from = seen.begin > base ? seen.begin - base : 0, to = seen.end - base < tile.size ? seen.end - base : tile.size;
    if (from >= to) continue;
    p.pieces[p.count++] = {tile.values[b], rows.scores + first * rows.tile_keys + base, from, to, tile.value_ahead[b]};
  }
  float* output = rows.span.output + (row0 + first) * width;
  const float *keep = factors.keep + first, *take = factors.take + first, *centre = sums.centre + first;
  const bool centred = tile.centred;
  product<fetch>(count, p, [=](int r, int64_t d, P o) {
    if (centred) o = simd::add(o, simd::part_set(centre[r]));
    float* at = output + r * width + d;
    simd::store(at, simd::fma(o, simd::part_set(take[r]), simd::mul(simd::part_load(at), simd::part_set(keep[r]))));
  });
}

// Rows [row0, row0 + count) against one tile, into the span.
template <Fetch fetch, class T>
inline void attend_rows(const Rows& rows, const Tile<T>& tile, int64_t row0, int count) {
  Slots seen[kMostRows];
  const int64_t slots = tile.blocks * tile.size;
  int64_t first = slots, last = 0;
  for (int r = 0; r < count; ++r) {
    const int64_t begin = rows.seen[row0 + r].begin - tile.position, end = rows.seen[row0 + r].end - tile.position;
    seen[r] = {begin < 0 ? 0 : begin, end > slots ? slots : end};
    if (seen[r].begin >= seen[r].end) continue;
    if (seen[r].begin < first) first = seen[r].begin;
    if (seen[r].end > last) last = seen[r].end;
  }
  if (first >= last) return;
  first = first / 16 * 16;
  last = round_up(last, 16);
  score<fetch>(rows, tile, row0, count, first, last);
  Sums sums;
  simd::store(sums.most, simd::zero());
  simd::store(sums.total, simd::zero());
  simd::store(sums.centre, simd::zero());
  soften(rows, tile, seen, count, first, last, sums);
  const Factors factors = merge(rows.span, row0, count, simd::load(sums.most), simd::load(sums.total));
  // Runs of rows that see the same slots: others are never multiplied, not even by zero.
  for (int run = 0; run < count;) {
    int next = run + 1;
    while (next < count && seen[next].begin == seen[run].begin && seen[next].end == seen[run].end) ++next;
    if (seen[run].begin < seen[run].end) add_values<fetch>(rows, tile, row0, run, next - run, seen[run], factors, sums);
    run = next;
  }
}

template <Fetch fetch, class T>
inline void attend_tile(const Rows& rows, const Tile<T>& tile) {
  const int64_t group = rows.count <= kMostRows ? kMostRows : simd::kTileRows;
  for (int64_t r = 0; r < rows.count; r += group)
    attend_rows<fetch>(rows, tile, r, static_cast<int>(rows.count - r < group ? rows.count - r : group));
}

// float32 copy of a tile, in one piece, for rows enough to read it more than once; the bits are the same either way.
template <class T>
inline Tile<float> widen(const Rows& rows, const Tile<T>& tile) {
  const int64_t head_dim = rows.a.kv.head_dim;
  for (int b = 0; b < tile.blocks; ++b) {
    float* keys = rows.key_tile + b * tile.size;
    for (int64_t d = 0; d < head_dim; ++d)
      for (int64_t j = 0; j < tile.size; j += 16) {
        const T* from = tile.keys[b] + d * tile.size + j;
        __builtin_prefetch(from + tile.ahead[b]);
        simd::store(keys + d * rows.tile_keys + j, simd::load(from));
      }
    float* values = rows.value_tile + b * tile.size * rows.width;
    for (int64_t j = 0; j < tile.size; ++j)
      for (int64_t d = 0; d < head_dim; d += 16) {
        const int64_t left = head_dim - d;
        const T* from = tile.values[b] + j * head_dim + d;
        __builtin_prefetch(from + tile.value_ahead[b]);
        simd::store(values + j * rows.width + d, read(from, left));
      }
  }
  return {tile.position, 1,       {rows.key_tile}, {rows.value_tile}, tile.blocks * tile.size, rows.tile_keys, rows.width,
          {},            {},      tile.scaled,      tile.centred};
}

}  // namespace attention
}  // namespace
}  // namespace hasten
