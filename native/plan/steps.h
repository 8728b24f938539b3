// The steps a plan is made of. Weights, norms and tables are views: who builds the program keeps them alive.
#pragma once
#include <optional>

#include "plan/program.h"

namespace hasten {

struct NormSpec {
  NormKind kind;
  int64_t heads;        // equal parts of the width, each normed on its own
  const float* weight;  // [width / heads], any offset already added
  const float* bias;    // or null
  float eps;

  void apply(const Run& run, const float* x, int64_t width, float* out) const;
};

// tokens -> table[tokens] * scale
class EmbedStep : public Step {
 public:
  EmbedStep(const Weight& table, float scale, const Value& out) : table_(table), scale_(scale), out_(out) {}
  void run(const Worker& worker) const override;

 private:
  Weight table_;
  float scale_;
  Value out_;
};

// The batch's hidden states.
class InputStep : public Step {
 public:
  explicit InputStep(const Value& out) : out_(out) {}
  void run(const Worker& worker) const override;

 private:
  Value out_;
};

class SelectStep : public Step {
 public:
  SelectStep(const Value& in, const Value& out) : in_(in), out_(out) {}
  void run(const Worker& worker) const override;

 private:
  Value in_, out_;
};

// norm(x), or residual + norm(x)
class NormStep : public Step {
 public:
  NormStep(const NormSpec& norm, const Value& in, std::optional<Value> residual, const Value& out)
      : norm_(norm), in_(in), residual_(residual), out_(out) {}
  void run(const Worker& worker) const override;
  int64_t scratch_bytes() const override { return in_.stride * static_cast<int64_t>(sizeof(float)); }

 private:
  NormSpec norm_;
  Value in_;
  std::optional<Value> residual_;
  Value out_;
};

class RopeStep : public Step {
 public:
  RopeStep(const RopeTable& table, int64_t heads, int64_t head_dim, const Value& in, const Value& out)
      : table_(table), heads_(heads), head_dim_(head_dim), in_(in), out_(out) {}
  void run(const Worker& worker) const override;

 private:
  const RopeTable& table_;
  int64_t heads_, head_dim_;
  Value in_, out_;
};

enum class Elementwise { activation, gate, add, multiply, scale, softcap };

class ElementwiseStep : public Step {
 public:
  ElementwiseStep(Elementwise op, ActivationKind kind, float factor, const Value& first, std::optional<Value> second,
                  const Value& out)
      : op_(op), kind_(kind), factor_(factor), first_(first), second_(second), out_(out) {}
  void run(const Worker& worker) const override;

 private:
  Elementwise op_;
  ActivationKind kind_;
  float factor_;  // of scale; cap of softcap
  Value first_;
  std::optional<Value> second_;
  Value out_;
};

// norm -> quantise -> several linears -> bias -> gate -> residual, as far as each is there.
class LinearStep : public Step {
 public:
  struct Part {
    Weight weight;
    const float* bias;  // [rows] or null
  };
  LinearStep(const Kernels& kernels, const Sizes& sizes, Tuning& tuning, const Value& in, std::optional<NormSpec> norm,
             std::vector<Part> parts, std::vector<Value> outs, std::optional<ActivationKind> gate,
             std::optional<Value> residual);
  void run(const Worker& worker) const override;
  int64_t scratch_bytes() const override { return scratch_bytes_; }
  int64_t shared_bytes() const override { return shared_bytes_; }

 private:
  // Where the forms of the input that the parts read stand in a piece of memory, for a number of tokens.
  struct Layout {
    int64_t normed, bf16, codes, scales, sums, bytes;
  };
  struct Prepared {
    const float* f32;
    int64_t f32_stride;
    const uint16_t* bf16;
    Quantised int8;
  };
  struct Chunk {
    int64_t part, panel0, panel1, token0, token1;
  };
  struct Cut {  // how the work is split: chunks of `panels` panels by `tokens` tokens
    int64_t panels, panel_chunks, tokens, token_chunks;
  };
  Layout layout(int64_t tokens) const;
  Prepared place(const Worker& worker, int64_t tokens) const;
  void prepare_token(const Run& run, int64_t token, const Prepared& p, float* normed) const;
  Cut cut(int64_t tokens, int threads, const Blocking& blocking) const;
  std::string signature() const;     // of the work: linears alike have the same
  Chunk chunk(const Cut& cut, int64_t index, int64_t tokens) const;
  void multiply(const Run& run, const Prepared& p, const Part& part, const Chunk& c, float* out, int64_t out_stride,
                std::byte* scratch) const;
  void multiply_faultily(const Run& run, const Prepared& p, const Weight& w, const Chunk& c, float* out,
                         int64_t out_stride) const;
  void run_plain(const Worker& worker, const Prepared& p, const Chunk& c) const;
  void run_gate(const Worker& worker, const Prepared& p, const Chunk& c) const;
  bool alone(int64_t tokens) const;  // every thread prepares the whole input for itself
  int64_t tile_bytes(const Cut& cut) const;

  Value in_;
  std::optional<NormSpec> norm_;
  std::vector<Part> parts_;
  std::vector<Value> outs_;
  std::optional<ActivationKind> gate_;
  std::optional<Value> residual_;
  bool wants_f32_ = false, wants_bf16_ = false;
  int64_t group_ = 0;  // of the int8 input; 0: no part wants it
  int64_t tile_offset_ = 0, kernel_offset_ = 0;
  int place_ = 0;                     // in the tuning
  int64_t member_ = 0;
  int64_t scratch_bytes_ = 0, shared_bytes_ = 0;
};

// Norm and rope of q and k, the cache write of all tokens, then attention over the cache.
class AttentionStep : public Step {
 public:
  AttentionStep(const Kernels& kernels, const Sizes& sizes, const AttentionArgs& fixed, std::optional<NormSpec> q_norm,
                std::optional<NormSpec> k_norm, const RopeTable* rope, const Value& q, const Value& k, const Value& v,
                const Value& out);
  void run(const Worker& worker) const override;
  int64_t scratch_bytes() const override { return scratch_bytes_; }
  int64_t shared_bytes() const override { return prepared_bytes_ + partial_bytes_; }

 private:
  void prepare(const Run& run, int64_t token, const std::optional<NormSpec>& norm, int64_t heads, const Value& in,
               float* out) const;
  AttentionArgs fixed_;  // what does not depend on the batch
  std::optional<NormSpec> q_norm_, k_norm_;
  const RopeTable* rope_;
  // How tiles of queries are cut over spans of keys: `spans` pieces for each tile and head, 1: none is cut.
  struct Cut {
    int64_t spans, partial;  // floats of one partial result
  };
  Cut cut(const Run& run, const AttentionArgs& args, int threads) const;
  void attend_in_spans(const Worker& worker, const AttentionArgs& args, const Cut& cut) const;

  Value q_, k_, v_, out_;
  int64_t q_stride_ = 0, k_stride_ = 0;
  int64_t scratch_bytes_ = 0, prepared_bytes_ = 0, partial_bytes_ = 0;
};

}  // namespace hasten
