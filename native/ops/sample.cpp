#include "ops/sample.h"

#include <cmath>

#include "ops/cut.h"
#include "ops/edit.h"
#include "ops/noise.h"

namespace hasten {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr double kLowest = std::numeric_limits<float>::lowest();
constexpr int64_t kFew = 2048;       // candidates of a row that one thread filters sooner than all would
constexpr int64_t kMostBest = 1024;  // top_k up to which each piece picks its own best

enum class Way {
  decided,   // nothing to draw for
  plain,     // every token by pieces
  best,      // top_k's tokens, on one thread
  floored,   // tokens above a floor, on one thread if they are few
  many,      // filters cut by all threads
};
struct Piece {
  const float* logits;                 // that are drawn from
  int64_t first, size;
  std::vector<uint64_t> candidates;    // more than kFew: too many
  std::vector<uint64_t> top;           // of the model's own distribution
  std::vector<float> scaled;           // logits over temperature, or masses
  bool weighed;                        // scaled holds masses
  EditScratch edit;
  std::unique_ptr<Tally> tally;        // made where it is first needed
  Best best;
};

struct Row {
  Reduced own, drawn;                  // of the model's logits; of those drawn from, logsumexp over temperature
  Way way;
  Kept kept;
  double total;                        // of masses, where top_p is the first filter
  int32_t token;
  std::vector<uint64_t> candidates;
  Cuts cuts;
  std::vector<const Tally*> tallies;
};

// The largest float no greater.
float round_down(double x) {
  const auto rounded = static_cast<float>(x);
  return static_cast<double>(rounded) > x ? std::nextafter(rounded, -kInfinity) : rounded;
}

// The least logit that min_p leaves.
double floor_of(const SampleRow& how, const Kept& kept) {
  return how.min_p > 0 ? kept.top + static_cast<double>(how.temperature) * std::log(static_cast<double>(how.min_p)) : -kInfinity;
}

// Where nothing is left to draw from.
int64_t likeliest_allowed(const SampleRow& how, int64_t n, int64_t likeliest) {
  if (how.allowed == nullptr) return likeliest;
  int64_t best = -1;
  for (int64_t i = 0; i < n; ++i)
    if ((how.allowed[i / 32] >> i % 32 & 1u) != 0 && (best < 0 || pack(how.logits[i], i) > pack(how.logits[best], best))) best = i;
  return best < 0 ? likeliest : best;
}

}  // namespace

struct SampleScratch::State {
  std::vector<Piece> pieces;           // [rows, pieces]
  std::vector<Reduced> own, drawn;     // [rows, pieces]
  std::vector<Row> rows;
};
SampleScratch::SampleScratch() : state_(new State) {}
SampleScratch::~SampleScratch() = default;

namespace {

class Sampling {
 public:
  Sampling(const Kernels& kernels, int64_t n, const std::vector<SampleRow>& rows, SampleScratch::State& state, const Drawn& out)
      : kernels_(kernels), n_(n), per_row_(vocabulary_pieces(n)), how_(rows), state_(state), out_(out) {
    const size_t pieces = rows.size() * static_cast<size_t>(per_row_);
    if (state.pieces.size() < pieces) state.pieces.resize(pieces);
    state.own.resize(pieces);
    state.drawn.resize(pieces);
    if (state.rows.size() < rows.size()) state.rows.resize(rows.size());
  }

  void run(const Share& share) {
    const auto rows = static_cast<int64_t>(how_.size()), pieces = rows * per_row_;
    share(pieces, [&](int64_t i) { reduce(i); });
    bool drawing = out_.top > 0;
    for (int64_t r = 0; r < rows; ++r) drawing |= plan(r) != Way::decided;
    if (drawing) share(pieces, [&](int64_t i) { gather(i); });
    share(rows, [&](int64_t r) { choose(r); });
    cut_many(share);
    for (int64_t r = 0; r < rows; ++r) {
      out_.tokens[r] = row(r).token;
      out_.logprobs[r] = log_probability(how_[r].logits, row(r).own.logsumexp, row(r).token);
    }
  }

 private:
  Row& row(int64_t r) { return state_.rows[r]; }
  Piece& piece(int64_t i) { return state_.pieces[i]; }
  std::span<Piece> pieces_of(int64_t r) { return {&state_.pieces[r * per_row_], static_cast<size_t>(per_row_)}; }
  float logit_of(int64_t r, int64_t token) {
    return state_.pieces[r * per_row_ + token / kVocabularyPiece].logits[token % kVocabularyPiece];
  }

  void reduce(int64_t i) {
    const SampleRow& how = how_[i / per_row_];
    Piece& p = piece(i);
    p.first = i % per_row_ * kVocabularyPiece;
    p.size = std::min(kVocabularyPiece, n_ - p.first);
    p.logits = how.logits + p.first;
    p.weighed = false;
    state_.own[i] = state_.drawn[i] = reduce_piece(kernels_, p.logits, p.size, p.first);
    if (how.edited()) {
      p.logits = edit_piece(how, p.first, p.size, p.edit);
      state_.drawn[i] = reduce_piece(kernels_, p.logits, p.size, p.first, false);
    }
    if (how.top_p >= 1 || how.ranked(n_) || (!how.edited() && how.temperature == 1) || how.temperature == 0) return;
    p.scaled.resize(static_cast<size_t>(p.size));
    kernels_.scale(p.logits, 1 / how.temperature, p.size, p.scaled.data());
    state_.drawn[i].logsumexp = kernels_.logsumexp(p.scaled.data(), p.size);
  }

  Way plan(int64_t r) {
    const SampleRow& how = how_[r];
    Row& own = row(r);
    own.own = reduce_fold(&state_.own[r * per_row_], per_row_);
    own.drawn = reduce_fold(&state_.drawn[r * per_row_], per_row_);
    own.token = static_cast<int32_t>(own.drawn.likeliest);
    own.kept = Kept{};
    own.kept.top = own.drawn.most;
    own.kept.inverse = how.temperature == 0 ? 1 : 1 / static_cast<double>(how.temperature);
    own.total = std::exp(own.drawn.logsumexp - own.kept.top * own.kept.inverse);
    if (!(own.drawn.most > -kInfinity)) {
      own.token = static_cast<int32_t>(likeliest_allowed(how, n_, own.own.likeliest));
      return own.way = Way::decided;
    }
    // An infinite logit has all the weight; sums that are no numbers cannot cut anything.
    const bool sound = own.drawn.most < kInfinity && (how.top_p >= 1 || how.ranked(n_) || std::isfinite(own.total));
    if (how.temperature == 0 || !sound) return own.way = Way::decided;
    if (!how.filtered(n_)) return own.way = Way::plain;
    if (how.ranked(n_) && how.top_k <= kMostBest) return own.way = Way::best;
    return own.way = n_ <= kFew || (how.top_p < 1 && !how.ranked(n_)) ? Way::floored : Way::many;
  }

  void gather(int64_t i) {
    const SampleRow& how = how_[i / per_row_];
    const Row& own = row(i / per_row_);
    Piece& p = piece(i);
    if (out_.top > 0) select_top(how.logits + p.first, p.size, p.first, out_.top, p.top);
    if (own.way == Way::plain) draw_plain(how, own, p);
    if (own.way == Way::best) select_top(p.logits, p.size, p.first, how.top_k, p.candidates);
    if (own.way != Way::floored) return;
    p.candidates.clear();
    const bool nucleus = how.top_p < 1 && !how.ranked(n_);
    const double floor = std::max(kLowest, nucleus ? nucleus_floor(how, n_, own.kept, own.total) : kLowest);
    each_within(p.logits, p.size, round_down(floor), kInfinity, [&](int64_t j) {
      if (p.candidates.size() <= kFew) p.candidates.push_back(pack(p.logits[j], p.first + j));
    });
  }

  void draw_plain(const SampleRow& how, const Row& own, Piece& p) {
    const double floor = std::max(kLowest, floor_of(how, own.kept));
    Draw draw(sample_key(how.seed, how.position));
    draw.offer(own.kept.top * own.kept.inverse, own.drawn.likeliest);   // rules most others out
    const auto offer = [&](int64_t j) {
      if (p.logits[j] >= floor) draw.offer(p.logits[j] * own.kept.inverse, p.first + j);
    };
    if (how.min_p > 0) each_within(p.logits, p.size, round_down(floor), kInfinity, offer);
    else for (int64_t j = 0; j < p.size; ++j) offer(j);
    p.best = draw.best;
  }

  // What needs a row whole, once its pieces have gathered.
  void choose(int64_t r) {
    Row& own = row(r);
    if (out_.top > 0) write_top(r);
    if (own.way == Way::plain) own.token = best_of_pieces(r);
    if (own.way == Way::best || own.way == Way::floored) {
      own.candidates.clear();
      for (const Piece& p : pieces_of(r)) own.candidates.insert(own.candidates.end(), p.candidates.begin(), p.candidates.end());
      if (own.way == Way::floored && own.candidates.size() > kFew) own.way = Way::many;
      else own.token = draw_few(r);
    }
    if (own.way == Way::many) own.cuts.begin(how_[r], n_, own.kept, own.total, floor_of(how_[r], own.kept));
  }

  void write_top(int64_t r) {
    std::vector<uint64_t>& best = row(r).candidates;
    best.clear();
    for (const Piece& p : pieces_of(r)) best.insert(best.end(), p.top.begin(), p.top.end());
    std::nth_element(best.begin(), best.begin() + (out_.top - 1), best.end(), std::greater<>());
    std::sort(best.begin(), best.begin() + out_.top, std::greater<>());
    for (int64_t j = 0; j < out_.top; ++j) {
      const int32_t token = token_of(best[j]);
      out_.top_tokens[r * out_.top + j] = token;
      out_.top_logprobs[r * out_.top + j] = log_probability(how_[r].logits, row(r).own.logsumexp, token);
    }
  }

  int32_t best_of_pieces(int64_t r) {
    Best best;
    for (const Piece& p : pieces_of(r))
      if (best.below(p.best)) best = p.best;
    return best.token;
  }

  int32_t draw_few(int64_t r) {
    const SampleRow& how = how_[r];
    Row& own = row(r);
    std::vector<uint64_t>& left = own.candidates;
    const auto mass = [&](uint64_t key) { return own.kept.mass(logit_of(r, token_of(key))); };
    std::erase_if(left, [](uint64_t key) { return key < Kept{}.bar; });
    if (how.ranked(n_) && static_cast<int64_t>(left.size()) > how.top_k) {
      std::nth_element(left.begin(), left.begin() + (how.top_k - 1), left.end(), std::greater<>());
      left.resize(static_cast<size_t>(how.top_k));
    }
    if (how.top_p < 1) {
      double total = how.ranked(n_) ? 0 : own.total;
      if (how.ranked(n_))
        for (const uint64_t key : left) total += mass(key);
      keep_prefix(left, static_cast<double>(how.top_p) * total, mass);
    }
    const double floor = floor_of(how, own.kept);
    std::erase_if(left, [&](uint64_t key) { return logit_of(r, token_of(key)) < floor; });
    if (how.typical_p < 1) keep_typical(r, mass);
    Draw draw(sample_key(how.seed, how.position));
    for (const uint64_t key : left) draw.offer(logit_of(r, token_of(key)) * own.kept.inverse, token_of(key));
    return draw.best.token;
  }

  template <typename Mass>
  void keep_typical(int64_t r, Mass&& mass) {
    Row& own = row(r);
    double total = 0, weighted = 0;
    for (const uint64_t key : own.candidates) {
      const double one = mass(key);
      total += one;
      weighted += one * own.kept.relative(logit_of(r, token_of(key)));
    }
    own.kept.mean = weighted / total;
    for (uint64_t& key : own.candidates) key = own.kept.typical_key(logit_of(r, token_of(key)), token_of(key));
    keep_prefix(own.candidates, static_cast<double>(how_[r].typical_p) * total, mass);
  }

  // --- rows whose filters are cut by all threads, in rounds

  bool searching(int64_t r) { return row(r).way == Way::many && row(r).cuts.searching(); }

  void cut_many(const Share& share) {
    const auto rows = static_cast<int64_t>(how_.size()), pieces = rows * per_row_;
    bool many = false, left = true;
    for (int64_t r = 0; r < rows; ++r) many |= row(r).way == Way::many;
    if (!many) return;
    while (left) {
      share(pieces, [&](int64_t i) { tally(i); });
      left = false;
      share(rows, [&](int64_t r) { advance(r); });
      for (int64_t r = 0; r < rows; ++r) left |= searching(r);
    }
    share(pieces, [&](int64_t i) { draw_kept(i); });
    for (int64_t r = 0; r < rows; ++r)
      if (row(r).way == Way::many) row(r).token = best_of_pieces(r);
  }

  void tally(int64_t i) {
    if (!searching(i / per_row_)) return;
    Piece& p = piece(i);
    if (!p.tally) p.tally = std::make_unique<Tally>();
    const Row& own = row(i / per_row_);
    if (!p.weighed && (how_[i / per_row_].top_p < 1 || how_[i / per_row_].typical_p < 1)) {
      p.scaled.resize(static_cast<size_t>(p.size));
      kernels_.masses(p.logits, static_cast<float>(own.kept.top), static_cast<float>(own.kept.inverse), p.size, p.scaled.data());
      p.weighed = true;
    }
    own.cuts.tally(p.logits, p.scaled.data(), p.size, p.first, *p.tally);
  }

  void advance(int64_t r) {
    if (!searching(r)) return;
    Row& own = row(r);
    own.tallies.clear();
    for (const Piece& p : pieces_of(r)) own.tallies.push_back(p.tally.get());
    own.cuts.advance(own.tallies);
  }

  void draw_kept(int64_t i) {
    const Row& own = row(i / per_row_);
    if (own.way != Way::many) return;
    Piece& p = piece(i);
    Draw draw(sample_key(how_[i / per_row_].seed, how_[i / per_row_].position));
    each_kept(p.logits, p.size, p.first, own.cuts.kept(), kHighest, [&](int64_t j, uint64_t) {
      draw.offer(p.logits[j] * own.kept.inverse, p.first + j);
    });
    p.best = draw.best;
  }

  const Kernels& kernels_;
  const int64_t n_, per_row_;
  const std::vector<SampleRow>& how_;
  SampleScratch::State& state_;
  const Drawn& out_;
};

}  // namespace

Reduced reduce_piece(const Kernels& kernels, const float* logits, int64_t n, int64_t first, bool sums) {
  const int64_t likeliest = kernels.argmax(logits, n);
  return {sums ? kernels.logsumexp(logits, n) : 0.0, first + likeliest, logits[likeliest]};
}

Reduced reduce_fold(const Reduced* pieces, int64_t count) {
  Reduced row = pieces[0];
  double most = pieces[0].logsumexp, total = 0;
  for (int64_t i = 1; i < count; ++i) {
    const Reduced& next = pieces[i];
    if (next.most > row.most || (row.most != row.most && next.most == next.most))
      row.likeliest = next.likeliest, row.most = next.most;
    most = std::max(most, next.logsumexp);
  }
  if (count == 1 || most == -std::numeric_limits<double>::infinity()) return row;
  for (int64_t i = 0; i < count; ++i) total += std::exp(pieces[i].logsumexp - most);
  row.logsumexp = most + std::log(total);
  return row;
}

void sample(const Kernels& kernels, int64_t n, const std::vector<SampleRow>& rows, SampleScratch& scratch, const Share& share,
            const Drawn& out) {
  if (!rows.empty()) Sampling(kernels, n, rows, scratch.state(), out).run(share);
}

}  // namespace hasten
