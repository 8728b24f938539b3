#include <algorithm>
#include <cstring>

#include "plan/steps.h"

namespace hasten {
namespace {

constexpr int64_t kPieces = 4;         // for each thread: with fewer tiles, their keys are cut into spans
constexpr int64_t kCutSequences = 16;  // single tokens, all heads, that partial results have room for over a full context

int64_t span_keys(const AttentionArgs& a) { return span_blocks(a.kv.block_size) * a.kv.block_size; }

int64_t first_span(const AttentionArgs& a, const QueryTile& tile) {
  return a.seen(tile.sequence, tile.first).begin / span_keys(a);
}

int64_t spans_of(const AttentionArgs& a, const QueryTile& tile) {
  return (a.seen(tile.sequence, tile.last - 1).end - 1) / span_keys(a) - first_span(a, tile) + 1;
}

}  // namespace

AttentionStep::AttentionStep(const Kernels& kernels, const Sizes& sizes, const AttentionArgs& fixed,
                             std::optional<NormSpec> q_norm, std::optional<NormSpec> k_norm, const RopeTable* rope,
                             const Value& q, const Value& k, const Value& v, const Value& out)
    : fixed_(fixed), q_norm_(q_norm), k_norm_(k_norm), rope_(rope), q_(q), k_(k), v_(v), out_(out) {
  q_stride_ = q.stride;
  k_stride_ = k.stride;
  fixed_.q_stride = q_stride_;
  fixed_.k_stride = k_stride_;
  fixed_.v_stride = v.stride;
  fixed_.out_stride = out.stride;
  fixed_.table_stride = (sizes.context + sizes.block_size - 1) / sizes.block_size;
  scratch_bytes_ = kernels.attend_scratch(fixed_, std::min(kQueryTile, sizes.max_tokens));
  // Normed and turned copies of q and k: the values themselves may be read by others.
  if (q_norm_ || k_norm_ || rope_)
    prepared_bytes_ = round_up(sizes.max_tokens * (q_stride_ + k_stride_) * sizeof(float), kAlign);
  const int64_t spans = (sizes.context + span_keys(fixed_) - 1) / span_keys(fixed_);
  if (sizes.threads > 1 && spans > 1)
    partial_bytes_ = std::min(sizes.max_sequences, kCutSequences) * spans * fixed_.kv.kv_heads *
                     partial_floats(fixed_.heads / fixed_.kv.kv_heads, fixed_.kv.head_dim) * sizeof(float);
}

void AttentionStep::prepare(const Run& r, int64_t token, const std::optional<NormSpec>& norm, int64_t heads,
                            const Value& in, float* out) const {
  if (norm)
    norm->apply(r, r.row(in, token), in.width, out);
  else
    std::memcpy(out, r.row(in, token), in.width * sizeof(float));
  if (rope_ == nullptr) return;
  const int64_t position = r.batch.positions[token];
  r.kernels.rope(out, heads, fixed_.kv.head_dim, rope_->rotary(), rope_->cosine(position), rope_->sine(position));
}

void AttentionStep::run(const Worker& w) const {
  const Run& r = w.run;
  const BatchView& b = r.batch;
  AttentionArgs args = fixed_;
  float* q = r.row(q_, 0);
  float* k = r.row(k_, 0);
  const bool prepared = prepared_bytes_ != 0;
  if (prepared) {
    q = reinterpret_cast<float*>(r.shared);
    k = q + b.token_count * q_stride_;
  }
  args.q = q;
  args.k = k;
  args.v = r.row(v_, 0);
  args.out = r.row(out_, 0);
  args.positions = b.positions;
  args.starts = b.starts;
  args.block_tables = b.block_tables;
  args.table_stride = b.table_stride;
  // Two pieces of work a token: its key and value go to the cache, its query gets ready.
  w.team.for_each(2 * b.token_count, [&](int64_t i) {
    const int64_t token = i / 2;
    if (i % 2 == 0) {
      if (prepared) prepare(r, token, k_norm_, args.kv.kv_heads, k_, k + token * k_stride_);
      r.kernels.kv_write(args, r.sequences[token], token);
    } else if (prepared) {
      prepare(r, token, q_norm_, args.heads, q_, q + token * q_stride_);
    }
  });
  if (const Cut c = cut(r, args, w.team.threads()); c.spans > 1) return attend_in_spans(w, args, c);
  const int64_t heads = args.kv.kv_heads;
  w.team.for_each(static_cast<int64_t>(r.tiles.size()) * heads, [&](int64_t i) {
    const QueryTile& tile = r.tiles[i / heads];
    r.kernels.attend(args, tile.sequence, i % heads, tile.first, tile.last, w.scratch);
  });
}

// Few tiles over many keys would leave threads idle. Whether keys are cut changes no bit: a row folds the same spans anyway.
AttentionStep::Cut AttentionStep::cut(const Run& r, const AttentionArgs& args, int threads) const {
  const int64_t pieces = static_cast<int64_t>(r.tiles.size()) * args.kv.kv_heads;
  if (partial_bytes_ == 0 || pieces >= kPieces * threads) return {1, 0};
  int64_t spans = 1, tokens = 1;
  for (const QueryTile& tile : r.tiles) {
    spans = std::max(spans, spans_of(args, tile));
    tokens = std::max<int64_t>(tokens, tile.last - tile.first);
  }
  const int64_t partial = partial_floats(tokens * (args.heads / args.kv.kv_heads), args.kv.head_dim);
  const bool fits = pieces * spans * partial * static_cast<int64_t>(sizeof(float)) <= partial_bytes_;
  return {fits ? spans : 1, partial};
}

void AttentionStep::attend_in_spans(const Worker& w, const AttentionArgs& args, const Cut& c) const {
  const Run& r = w.run;
  const int64_t heads = args.kv.kv_heads, pieces = static_cast<int64_t>(r.tiles.size()) * heads;
  float* partials = reinterpret_cast<float*>(r.shared + prepared_bytes_);
  w.team.for_each(pieces * c.spans, [&](int64_t i) {
    const QueryTile& tile = r.tiles[i / (heads * c.spans)];
    if (i % c.spans >= spans_of(args, tile)) return;
    r.kernels.attend_span(args, tile.sequence, i / c.spans % heads, tile.first, tile.last, first_span(args, tile) + i % c.spans,
                          partials + i * c.partial, w.scratch);
  });
  w.team.for_each(pieces, [&](int64_t i) {
    const QueryTile& tile = r.tiles[i / heads];
    r.kernels.attend_join(args, tile.sequence, i % heads, tile.first, tile.last, partials + i * c.spans * c.partial, c.partial,
                          w.scratch);
  });
}

}  // namespace hasten
