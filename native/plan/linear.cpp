#include <algorithm>
#include <bit>
#include <chrono>
#include <sstream>

#include "plan/fault.h"
#include "plan/steps.h"

namespace hasten {
namespace {

constexpr int64_t kAlone = 4096;                // elements of input that each thread rather prepares itself than waits for
constexpr int64_t kFewestTokens = 16;           // a chunk of panels is not cut into fewer tokens than this

int64_t floats(int64_t count) { return round_up(count * static_cast<int64_t>(sizeof(float)), kAlign); }
int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace

LinearStep::LinearStep(const Kernels& kernels, const Sizes& sizes, Tuning& tuning, const Value& in, std::optional<NormSpec> norm,
                       std::vector<Part> parts, std::vector<Value> outs, std::optional<ActivationKind> gate,
                       std::optional<Value> residual)
    : in_(in), norm_(norm), parts_(std::move(parts)), outs_(std::move(outs)), gate_(gate), residual_(residual) {
  const int64_t most = in_.selected ? sizes.max_rows : sizes.max_tokens;
  int64_t kernel = 0;
  for (const Part& part : parts_) {
    const Weight& w = part.weight;
    if (!w.is_float())
      group_ = group_ == 0 ? w.group : std::min(group_, w.group);
    else if (w.kind == Kind::bf16 && kernels.bf16_inputs)
      wants_bf16_ = true;
    else
      wants_f32_ = true;
    kernel = std::max(kernel, kernels.matmul_scratch(w, std::min(most, Tuning::most_tokens())));
  }
  int64_t tile = 0, alone_tokens = 1;
  while (alone_tokens < most && alone(alone_tokens + 1)) ++alone_tokens;
  for (int64_t tokens = 1; tokens <= most; ++tokens)
    for (const Blocking& blocking : Tuning::candidates(Tuning::regime(tokens)))
      tile = std::max(tile, tile_bytes(cut(tokens, sizes.threads, blocking)));
  shared_bytes_ = layout(most).bytes;
  tile_offset_ = layout(alone_tokens).bytes + floats(in_.width);
  kernel_offset_ = tile_offset_ + round_up(tile, kAlign);
  scratch_bytes_ = kernel_offset_ + kernel;
  place_ = tuning.join(signature());
  member_ = tuning.member(place_);
}

std::string LinearStep::signature() const {
  std::ostringstream text;
  text << (gate_ ? "gate" : residual_ ? "residual" : "plain");
  for (const Part& part : parts_) {
    const Weight& w = part.weight;
    text << ' ' << static_cast<int>(w.kind) << "-g" << w.group << ':' << w.rows << 'x' << w.columns;
  }
  return text.str();
}

// --- the input, in the forms that the parts read

bool LinearStep::alone(int64_t tokens) const { return tokens == 1 || tokens * in_.width <= kAlone; }

LinearStep::Layout LinearStep::layout(int64_t tokens) const {
  Layout at{};
  const auto take = [&](int64_t bytes) {
    const int64_t offset = at.bytes;
    at.bytes += round_up(bytes, kAlign);
    return offset;
  };
  const int64_t groups = group_ == 0 ? 0 : ceil_div(in_.width, group_);
  if (wants_f32_ && norm_) at.normed = take(tokens * in_.stride * 4);
  if (wants_bf16_) at.bf16 = take(tokens * activation_stride(in_.width, 2) * 2);
  if (group_ != 0) {
    at.codes = take(tokens * activation_stride(in_.width, 1));
    at.scales = take(tokens * groups * 4);
    at.sums = take(tokens * groups * 4);
  }
  return at;
}

void LinearStep::prepare_token(const Run& r, int64_t token, const Prepared& p, float* normed) const {
  const float* x = r.row(in_, token);
  if (norm_) {
    float* out = wants_f32_ ? const_cast<float*>(p.f32) + token * p.f32_stride : normed;
    norm_->apply(r, x, in_.width, out);
    x = out;
  }
  if (wants_bf16_) r.kernels.to_bf16(x, in_.width, const_cast<uint16_t*>(p.bf16) + token * activation_stride(in_.width, 2));
  if (group_ != 0)
    r.kernels.quantise(x, in_.width, group_, const_cast<int8_t*>(p.int8.codes) + token * p.int8.stride,
                       const_cast<float*>(p.int8.scales) + token * p.int8.groups,
                       const_cast<int32_t*>(p.int8.sums) + token * p.int8.groups);
}

LinearStep::Prepared LinearStep::place(const Worker& w, int64_t tokens) const {
  std::byte* base = alone(tokens) ? w.scratch : w.run.shared;
  const Layout at = layout(tokens);
  const int64_t groups = group_ == 0 ? 0 : ceil_div(in_.width, group_);
  Prepared p{};
  p.f32 = norm_ ? reinterpret_cast<float*>(base + at.normed) : w.run.row(in_, 0);
  p.f32_stride = in_.stride;
  p.bf16 = reinterpret_cast<uint16_t*>(base + at.bf16);
  p.int8 = {reinterpret_cast<int8_t*>(base + at.codes), reinterpret_cast<float*>(base + at.scales),
            reinterpret_cast<int32_t*>(base + at.sums), activation_stride(in_.width, 1), groups, group_};
  return p;
}

// --- the products

LinearStep::Cut LinearStep::cut(int64_t tokens, int threads, const Blocking& blocking) const {
  int64_t panels = 0;
  for (const Part& part : parts_) panels += part.weight.panels();
  if (gate_) panels /= 2;
  Cut c{};
  const int64_t fine = ceil_div(panels, threads * blocking.chunks_per_thread);
  const int64_t rows = std::min(tokens, blocking.tokens);
  const int64_t in_cache = blocking.tile_bytes / (rows * kPanel * static_cast<int64_t>(sizeof(float)) * (gate_ ? 2 : 1));
  c.panels = std::max<int64_t>(2, std::min(fine, in_cache) / 2 * 2);  // kernels like pairs of panels
  for (size_t i = 0; i < (gate_ ? 1 : parts_.size()); ++i) c.panel_chunks += ceil_div(parts_[i].weight.panels(), c.panels);
  c.token_chunks = c.panel_chunks >= 2 * threads
                       ? 1
                       : std::clamp<int64_t>(ceil_div(2 * threads, c.panel_chunks), 1, ceil_div(tokens, kFewestTokens));
  c.token_chunks = std::max(c.token_chunks, ceil_div(tokens, blocking.tokens));
  c.tokens = ceil_div(tokens, c.token_chunks);
  c.token_chunks = ceil_div(tokens, c.tokens);
  return c;
}

LinearStep::Chunk LinearStep::chunk(const Cut& cut, int64_t index, int64_t tokens) const {
  Chunk c{};
  c.token0 = index % cut.token_chunks * cut.tokens;
  c.token1 = std::min(tokens, c.token0 + cut.tokens);
  int64_t piece = index / cut.token_chunks;
  for (;; ++c.part) {
    const int64_t panels = parts_[c.part].weight.panels(), pieces = ceil_div(panels, cut.panels);
    if (piece < pieces) {
      c.panel0 = piece * cut.panels;
      c.panel1 = std::min(panels, c.panel0 + cut.panels);
      return c;
    }
    piece -= pieces;
  }
}

int64_t LinearStep::tile_bytes(const Cut& cut) const {
  return gate_ ? 2 * floats(cut.tokens * cut.panels * kPanel) : 0;
}

// What a test must notice: a panel's first row over again, its products added up in parts that depend on the step.
void LinearStep::multiply_faultily(const Run& r, const Prepared& p, const Weight& w, const Chunk& c, float* out,
                                   int64_t out_stride) const {
  std::vector<float> row(w.columns), products(w.columns);
  for (int64_t i = c.panel0 * kPanel; i < std::min(w.rows, c.panel1 * kPanel); i += kPanel) {
    r.kernels.decode_row(w, i, row.data());
    for (int64_t t = c.token0; t < c.token1; ++t) {
      for (int64_t j = 0; j < w.columns; ++j) {
        float x;
        if (!w.is_float())
          x = p.int8.codes[t * p.int8.stride + j] * p.int8.scales[t * p.int8.groups + j / p.int8.group];
        else if (w.kind == Kind::bf16 && r.kernels.bf16_inputs)
          x = std::bit_cast<float>(static_cast<uint32_t>(p.bf16[t * activation_stride(in_.width, 2) + j]) << 16);
        else
          x = p.f32[t * p.f32_stride + j];
        products[j] = x * row[j];
      }
      out[(t - c.token0) * out_stride + i] = split_sum(products.data(), w.columns, r.fault_parts, false);
    }
  }
}

// out points at token c.token0; columns are the weight's rows.
void LinearStep::multiply(const Run& r, const Prepared& p, const Part& part, const Chunk& c, float* out,
                          int64_t out_stride, std::byte* scratch) const {
  const Weight& w = part.weight;
  const int64_t tokens = c.token1 - c.token0, row0 = c.panel0 * kPanel, rows = std::min(w.rows, c.panel1 * kPanel) - row0;
  if (!w.is_float()) {
    Quantised x = p.int8;
    x.codes += c.token0 * x.stride;
    x.scales += c.token0 * x.groups;
    x.sums += c.token0 * x.groups;
    r.kernels.matmul_int(w, x, tokens, c.panel0, c.panel1, out, out_stride, scratch);
  } else if (w.kind == Kind::bf16 && r.kernels.bf16_inputs) {
    const int64_t stride = activation_stride(in_.width, 2);
    r.kernels.matmul_float(w, p.bf16 + c.token0 * stride, stride, tokens, c.panel0, c.panel1, out, out_stride, scratch);
  } else {
    r.kernels.matmul_float(w, p.f32 + c.token0 * p.f32_stride, p.f32_stride, tokens, c.panel0, c.panel1, out, out_stride,
                           scratch);
  }
  if (r.fault_parts != 0) multiply_faultily(r, p, w, c, out, out_stride);
  if (part.bias == nullptr) return;
  for (int64_t t = 0; t < tokens; ++t) {
    float* at = out + t * out_stride + row0;
    r.kernels.add(at, part.bias + row0, rows, at);
  }
}

void LinearStep::run_plain(const Worker& w, const Prepared& p, const Chunk& c) const {
  const Part& part = parts_[c.part];
  const Value& value = outs_[c.part];
  multiply(w.run, p, part, c, w.run.row(value, c.token0), value.stride, w.scratch + kernel_offset_);
  if (!residual_) return;
  const int64_t row0 = c.panel0 * kPanel, rows = std::min(part.weight.rows, c.panel1 * kPanel) - row0;
  for (int64_t t = c.token0; t < c.token1; ++t) {
    float* at = w.run.row(value, t) + row0;
    w.run.kernels.add(at, w.run.row(*residual_, t) + row0, rows, at);
  }
}

// Gate and up meet in a tile of this thread's own.
void LinearStep::run_gate(const Worker& w, const Prepared& p, const Chunk& c) const {
  const Run& r = w.run;
  const int64_t stride = (c.panel1 - c.panel0) * kPanel, row0 = c.panel0 * kPanel;
  const int64_t rows = std::min(parts_[0].weight.rows, c.panel1 * kPanel) - row0;
  float* first = reinterpret_cast<float*>(w.scratch + tile_offset_);
  float* second = first + (c.token1 - c.token0) * stride;
  multiply(r, p, parts_[0], c, first - row0, stride, w.scratch + kernel_offset_);
  multiply(r, p, parts_[1], c, second - row0, stride, w.scratch + kernel_offset_);
  for (int64_t t = c.token0; t < c.token1; ++t) {
    const int64_t at = (t - c.token0) * stride;
    r.kernels.gate(*gate_, first + at, second + at, rows, r.row(outs_[0], t) + row0);
  }
}

// A small input each thread prepares for itself, once it has a piece in hand; a large one is a phase of its own.
void LinearStep::run(const Worker& w) const {
  const int64_t tokens = w.run.count(in_);
  if (tokens == 0) return;
  const Prepared p = place(w, tokens);
  float* normed = reinterpret_cast<float*>(w.scratch + tile_offset_ - floats(in_.width));
  bool ready = !norm_ && !wants_bf16_ && group_ == 0;
  if (!ready && !alone(tokens)) {
    w.team.for_each(tokens, [&](int64_t token) { prepare_token(w.run, token, p, normed); });
    ready = true;
  }
  const bool timed = w.team.thread() == 0 && w.run.tuning.wants(place_, tokens);
  const auto begun = timed ? std::chrono::steady_clock::now() : std::chrono::steady_clock::time_point{};
  bool worked = false;
  const Cut c = cut(tokens, w.team.threads(), w.run.tuning.blocking(place_, member_, tokens));
  w.team.for_each(c.panel_chunks * c.token_chunks, [&](int64_t i) {
    for (int64_t token = 0; !ready && token < tokens; ++token) prepare_token(w.run, token, p, normed);
    ready = worked = true;
    const Chunk piece = chunk(c, i, tokens);
    if (gate_)
      run_gate(w, p, piece);
    else
      run_plain(w, p, piece);
  });
  if (timed && worked)  // a thread that comes late finds all done, in no time
    w.run.tuning.note(place_, member_, tokens, std::chrono::duration<double>(std::chrono::steady_clock::now() - begun).count());
}

}  // namespace hasten
