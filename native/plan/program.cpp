#include "plan/program.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "plan/fault.h"

namespace hasten {
namespace {

std::string text(int64_t number) { return std::to_string(number); }

}  // namespace

RopeTable::RopeTable(std::vector<float> frequencies, float factor, int64_t context)
    : frequencies_(std::move(frequencies)), factor_(factor), known_(context) {
  table_ = Arena(context * rotary() * static_cast<int64_t>(sizeof(float)));
}

bool RopeTable::same(const std::vector<float>& frequencies, float factor) const {
  return frequencies == frequencies_ && factor == factor_;
}

void RopeTable::note(const int32_t* positions, int64_t count) {
  fresh_.clear();
  for (int64_t i = 0; i < count; ++i)
    if (!known_[positions[i]]) fresh_.push_back(positions[i]);
  std::sort(fresh_.begin(), fresh_.end());
  fresh_.erase(std::unique(fresh_.begin(), fresh_.end()), fresh_.end());
}

void RopeTable::filled() {
  for (const int32_t position : fresh_) known_[position] = true;
}

// The angle is a float32 product, as in Hugging Face's models; cos and sin of it are exact to a float32's last bit.
void RopeTable::fill(Team& team) {
  if (fresh_.empty()) return;
  team.for_each(static_cast<int64_t>(fresh_.size()), [&](int64_t i) {
    float* out = row(fresh_[i]);
    const float position = static_cast<float>(fresh_[i]);
    for (int64_t pair = 0; pair < pairs(); ++pair) {
      const double angle = position * frequencies_[pair];
      out[pair] = static_cast<float>(std::cos(angle)) * factor_;
      out[pairs() + pair] = static_cast<float>(std::sin(angle)) * factor_;
    }
  });
}

const RopeTable& Program::rope(const std::vector<float>& frequencies, float factor) {
  for (const auto& table : ropes_)
    if (table->same(frequencies, factor)) return *table;
  ropes_.push_back(std::make_unique<RopeTable>(frequencies, factor, sizes_.context));
  return *ropes_.back();
}

KvLayer Program::kv_layer(int64_t layer, KvKind kind, int64_t kv_heads, int64_t head_dim) {
  if (kind == KvKind::int4 && head_dim > kMostInt4Features)
    throw std::invalid_argument("cache layer " + text(layer) + " has heads of " + text(head_dim) + " features; int4 takes " +
                                text(kMostInt4Features));
  for (const Layer& known : layers_) {
    if (known.layer != layer) continue;
    if (known.view.kv_heads != kv_heads || known.view.head_dim != head_dim || known.view.kind != kind)
      throw std::invalid_argument("cache layer " + text(layer) + " is used with two shapes");
    return known.view;
  }
  Layer made{layer, {kind, nullptr, nullptr, kv_heads, head_dim, sizes_.block_size}, {}, {}};
  const int64_t bytes = sizes_.kv_blocks * kv_heads * made.view.head_bytes();
  made.keys = Arena(bytes);
  made.values = Arena(bytes);
  made.view.keys = made.keys.data();
  made.view.values = made.values.data();
  layers_.push_back(std::move(made));
  return layers_.back().view;
}

void Program::finish(int64_t arena_floats, const Value& output) {
  output_ = output;
  arena_ = Arena(arena_floats * static_cast<int64_t>(sizeof(float)));
  int64_t shared = 0;
  for (const auto& step : steps_) {
    shared = std::max(shared, step->shared_bytes());
    scratch_stride_ = std::max(scratch_stride_, step->scratch_bytes());
  }
  scratch_stride_ = round_up(scratch_stride_, 4096);  // no two threads on one page
  shared_ = Arena(shared);
  scratch_ = Arena(scratch_stride_ * sizes_.threads);
  sequences_.resize(sizes_.max_tokens);
  tiles_.reserve(sizes_.max_tokens);
  written_.resize(sizes_.kv_blocks);
}

int64_t Program::kv_bytes() const {
  int64_t total = 0;
  for (const Layer& layer : layers_) total += layer.keys.bytes() + layer.values.bytes();
  return total;
}

int64_t Program::buffer_bytes() const {
  int64_t total = arena_.bytes() + shared_.bytes() + scratch_.bytes();
  for (const auto& table : ropes_) total += table->bytes();
  return total;
}

// --- checks at the boundary: kernels trust every number after these

void Program::check(const BatchView& b) {
  if (b.token_count < 1 || b.token_count > sizes_.max_tokens)
    throw BatchError("a step of " + text(b.token_count) + " tokens; it takes 1 to " + text(sizes_.max_tokens));
  if (b.sequence_count < 1 || b.sequence_count > sizes_.max_sequences)
    throw BatchError("a step of " + text(b.sequence_count) + " sequences; it takes 1 to " + text(sizes_.max_sequences));
  if (b.row_count > sizes_.max_rows)
    throw BatchError("logits of " + text(b.row_count) + " rows wanted; a step gives at most " + text(sizes_.max_rows));
  if (b.starts[0] != 0 || b.starts[b.sequence_count] != b.token_count)
    throw BatchError("starts run from " + text(b.starts[0]) + " to " + text(b.starts[b.sequence_count]) +
                     ", must run from 0 to the " + text(b.token_count) + " tokens");
  for (int64_t i = 0; vocabulary_ != 0 && i < b.token_count; ++i)
    if (b.tokens[i] < 0 || b.tokens[i] >= vocabulary_)
      throw BatchError("token " + text(b.tokens[i]) + " at row " + text(i) + " is not in the vocabulary of " +
                       text(vocabulary_));
  for (int64_t i = 0; i < b.row_count; ++i)
    if (b.rows[i] < 0 || b.rows[i] >= b.token_count)
      throw BatchError("wanted row " + text(b.rows[i]) + " is not one of the " + text(b.token_count) + " tokens");
  if (hidden_width_ != 0 && (b.hidden == nullptr || b.hidden_width != hidden_width_))
    throw BatchError("this graph starts from hidden states [" + text(b.token_count) + ", " + text(hidden_width_) + "]" +
                     (b.hidden == nullptr ? ", none given" : ", given width " + text(b.hidden_width)));
  for (int64_t s = 0; s < b.sequence_count; ++s) check_sequence(b, s);
}

void Program::check_sequence(const BatchView& b, int64_t s) {
  const std::string who = "sequence " + text(s);
  const int64_t first = b.starts[s], last = b.starts[s + 1];
  if (first >= last || last > b.token_count) throw BatchError(who + " owns rows " + text(first) + " to " + text(last));
  const int64_t start = b.positions[first], stop = start + last - first;
  if (start < 0) throw BatchError(who + " starts at position " + text(start));
  if (stop > sizes_.context)
    throw ContextLimitError(who + " reaches position " + text(stop - 1) + "; the context holds " + text(sizes_.context) +
                            " tokens");
  for (int64_t i = first; i < last; ++i) {
    if (b.positions[i] != start + i - first)
      throw BatchError(who + " goes from position " + text(b.positions[i - 1]) + " to " + text(b.positions[i]));
    sequences_[i] = static_cast<int32_t>(s);
  }
  if (layers_.empty()) return;
  const int64_t needed = (stop + sizes_.block_size - 1) / sizes_.block_size;
  if (b.table_stride < needed)
    throw BatchError(who + " needs " + text(needed) + " cache blocks; its table names " + text(b.table_stride));
  for (int64_t i = 0; i < needed; ++i) {
    const int32_t block = b.block_tables[s * b.table_stride + i];
    if (block < 0 || block >= sizes_.kv_blocks)
      throw BatchError(who + " names cache block " + text(block) + " of " + text(sizes_.kv_blocks));
    if (i < start / sizes_.block_size) continue;
    if (written_[block] == writer_)
      throw BatchError("cache block " + text(block) + " would be written twice, the second time by " + who);
    written_[block] = writer_;
  }
}

void Program::cut_tiles(const BatchView& b) {
  tiles_.clear();
  for (int64_t s = 0; s < b.sequence_count; ++s)
    for (int32_t first = b.starts[s]; first < b.starts[s + 1]; first += kQueryTile)
      tiles_.push_back({static_cast<int32_t>(s), first, std::min(first + static_cast<int32_t>(kQueryTile), b.starts[s + 1])});
  // The longest first, so that no thread is left alone with one at the end.
  std::sort(tiles_.begin(), tiles_.end(), [&](const QueryTile& x, const QueryTile& y) {
    const int32_t end_x = b.positions[x.last - 1], end_y = b.positions[y.last - 1];
    return end_x != end_y ? end_x > end_y : x.first < y.first;
  });
}

Program::Use::Use(const Program& program) : busy_(program.busy_) {
  if (busy_.exchange(true)) throw std::runtime_error("a program runs one step at a time; another thread is in it");
}

void Program::record(int64_t runs) {
  const Use use(*this);
  recording_ = runs == 0 ? Recording() : Recording(runs, sizes_.threads, step_count());
}

void Program::step(const BatchView& batch) {
  const Use use(*this);
  ++writer_;
  check(batch);
  cut_tiles(batch);
  for (auto& table : ropes_) table->note(batch.positions, batch.token_count);
  const Run run{kernels_, batch, arena_floats(), shared_.data(), sequences_.data(), tiles_, fault_parts(sizes_, batch), tuning_};
  Pool::instance().run(sizes_.threads, [&](Team& team) {
    const Worker worker{team, run, scratch_.data() + team.thread() * scratch_stride_};
    int64_t* at = recording_.row(team.thread());
    if (at != nullptr) team.note_waits(recording_.waits(at), recording_.waits_end(at));
    const auto mark = [&at] {
      if (at != nullptr) *at++ = steady_nanoseconds();
    };
    mark();
    for (auto& table : ropes_) table->fill(team);
    mark();
    for (const auto& step : steps_) {
      step->run(worker);
      mark();
    }
  });
  recording_.over();
  // Where a thread could not be started, nothing ran: the last step's outputs stand, and no new position is known.
  for (auto& table : ropes_) table->filled();
  tuning_.settle();
  last_tokens_ = batch.token_count;
  last_rows_ = batch.row_count;
}

}  // namespace hasten
