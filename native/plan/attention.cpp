#include <algorithm>
#include <cstring>

#include "plan/steps.h"

namespace hasten {

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
  if (q_norm_ || k_norm_ || rope_) shared_bytes_ = sizes.max_tokens * (q_stride_ + k_stride_) * sizeof(float);
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
  const bool prepared = shared_bytes_ != 0;
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
  const int64_t heads = args.kv.kv_heads;
  w.team.for_each(static_cast<int64_t>(r.tiles.size()) * heads, [&](int64_t i) {
    const QueryTile& tile = r.tiles[i / heads];
    r.kernels.attend(args, tile.sequence, i % heads, tile.first, tile.last, w.scratch);
  });
}

}  // namespace hasten
