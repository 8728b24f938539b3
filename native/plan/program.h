// A planned graph: steps over one arena, run by a team of threads. Steps are built once; running allocates nothing.
#pragma once
#include <atomic>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "core.h"
#include "plan/arena.h"
#include "plan/pool.h"
#include "plan/recording.h"
#include "plan/tuning.h"

namespace hasten {

// A batch that cannot be run: a number out of range, a table that names no block.
struct BatchError : std::invalid_argument {
  using std::invalid_argument::invalid_argument;
};
// A position at or past the context.
struct ContextLimitError : std::invalid_argument {
  using std::invalid_argument::invalid_argument;
};

struct Sizes {
  int64_t context, max_tokens, max_sequences, max_rows, block_size, kv_blocks;
  int threads;
};

// A float32 value [tokens or wanted rows, width] in the arena.
struct Value {
  int64_t offset = 0, width = 0, stride = 0;  // in floats
  bool selected = false;                      // one row for each wanted row, not for each token
};

struct BatchView {
  const int32_t* tokens;        // [tokens]
  const int32_t* positions;     // [tokens]
  const int32_t* starts;        // [sequences + 1]
  const int32_t* block_tables;  // [sequences, table_stride]
  const int32_t* rows;          // [rows]
  const float* hidden;          // [tokens, hidden_width] or null
  int64_t token_count, sequence_count, row_count, table_stride, hidden_width;
};

// Query tokens that attention computes together: enough to make a matrix product of the scores, few enough to share out.
inline constexpr int64_t kQueryTile = 32;

// Query rows [first, last) of one sequence: the unit that attention hands to threads.
struct QueryTile {
  int32_t sequence, first, last;
};

// What every thread of a step sees.
struct Run {
  const Kernels& kernels;
  BatchView batch;
  float* arena;
  std::byte* shared;                   // scratch that the threads of one plan step share
  const int32_t* sequences;            // [tokens] sequence of each token
  const std::vector<QueryTile>& tiles;
  int fault_parts;                     // see fault.h; 0 always but in tests
  Tuning& tuning;

  int64_t count(const Value& value) const { return value.selected ? batch.row_count : batch.token_count; }
  float* row(const Value& value, int64_t index) const { return arena + value.offset + index * value.stride; }
};

struct Worker {
  Team& team;
  const Run& run;
  std::byte* scratch;  // this thread's own
};

class Step {
 public:
  virtual ~Step() = default;
  // Called by every thread of the team; all memory but the thread's own scratch is touched inside phases only.
  virtual void run(const Worker& worker) const = 0;
  virtual int64_t scratch_bytes() const { return 0; }  // for each thread
  virtual int64_t shared_bytes() const { return 0; }
};

// cos and sin of position * frequency, filled as positions are first met and shared by all layers.
class RopeTable {
 public:
  RopeTable(std::vector<float> frequencies, float factor, int64_t context);
  bool same(const std::vector<float>& frequencies, float factor) const;
  int64_t rotary() const { return 2 * pairs(); }
  const float* cosine(int64_t position) const { return row(position); }   // [rotary / 2]
  const float* sine(int64_t position) const { return row(position) + pairs(); }
  int64_t bytes() const { return table_.bytes(); }
  void note(const int32_t* positions, int64_t count);   // which of them are new
  void fill(Team& team);                                // computes the new ones
  void filled();                                        // the job that computed them is over: they are known from now on

 private:
  int64_t pairs() const { return static_cast<int64_t>(frequencies_.size()); }
  float* row(int64_t position) const { return reinterpret_cast<float*>(table_.data()) + position * 2 * pairs(); }
  std::vector<float> frequencies_;
  float factor_;
  Arena table_;
  std::vector<bool> known_;
  std::vector<int32_t> fresh_;
};

class Program {
 public:
  Program(const Kernels& kernels, const Sizes& sizes) : kernels_(kernels), sizes_(sizes) {}

  // --- building, in execution order; finish() comes last
  void add(std::unique_ptr<Step> step) { steps_.push_back(std::move(step)); }
  void set_vocabulary(int64_t rows) { vocabulary_ = rows; }       // token ids are checked against it
  void set_hidden_width(int64_t width) { hidden_width_ = width; }
  const RopeTable& rope(const std::vector<float>& frequencies, float factor);
  KvLayer kv_layer(int64_t layer, KvKind kind, int64_t kv_heads, int64_t head_dim);
  void finish(int64_t arena_floats, const Value& output);

  // Held while a step runs or its outputs are read, sizes checked and all: they change with the next step. Never waits:
  // throws where another thread is in the program.
  class Use {
   public:
    explicit Use(const Program& program);
    ~Use() { busy_ = false; }
    Use(const Use&) = delete;
    Use& operator=(const Use&) = delete;

   private:
    std::atomic<bool>& busy_;
  };

  // --- running. Throws BatchError or ContextLimitError and changes nothing, where the batch is not well formed.
  void step(const BatchView& batch);
  // From here on, the next `runs` steps are recorded; 0 ends it. What was recorded before is gone.
  void record(int64_t runs);
  const Recording& recording() const { return recording_; }
  int64_t step_count() const { return static_cast<int64_t>(steps_.size()); }

  const Kernels& kernels() const { return kernels_; }
  const Sizes& sizes() const { return sizes_; }
  int64_t row_count(const Value& value) const { return value.selected ? last_rows_ : last_tokens_; }
  const float* row(const Value& value, int64_t index) const { return arena_floats() + value.offset + index * value.stride; }
  const Value& output() const { return output_; }
  int64_t kv_bytes() const;
  int64_t buffer_bytes() const;
  Tuning& tuning() { return tuning_; }

 private:
  float* arena_floats() const { return reinterpret_cast<float*>(arena_.data()); }
  void check(const BatchView& batch);
  void check_sequence(const BatchView& batch, int64_t sequence);
  void cut_tiles(const BatchView& batch);

  const Kernels& kernels_;
  const Sizes sizes_;
  std::vector<std::unique_ptr<Step>> steps_;
  std::vector<std::unique_ptr<RopeTable>> ropes_;
  struct Layer {
    int64_t layer;
    KvLayer view;
    Arena keys, values;
  };
  std::vector<Layer> layers_;
  Tuning tuning_;
  int64_t vocabulary_ = 0, hidden_width_ = 0;
  Value output_;
  Arena arena_, shared_, scratch_;
  int64_t scratch_stride_ = 0;
  std::vector<int32_t> sequences_;       // [max_tokens]
  std::vector<QueryTile> tiles_;
  std::vector<uint64_t> written_;        // [kv_blocks] the step that last wrote a block: it is written once in a step
  uint64_t writer_ = 0;
  int64_t last_tokens_ = 0, last_rows_ = 0;
  Recording recording_;
  mutable std::atomic<bool> busy_{false};
};

}  // namespace hasten
