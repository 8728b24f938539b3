// The nouns of the native core: weights, quantised activations, and the table of kernels that each instruction set fills.
// Layouts here are the ones that src/hasten/formats writes; docs/kernels.md describes them for readers.
#pragma once
#include <cstddef>
#include <cstdint>

namespace hasten {

inline constexpr int64_t kPanel = 16;      // weight rows that stand together
inline constexpr int64_t kUnit = 32;       // columns of quantised weights are padded to this
inline constexpr int64_t kAlign = 64;      // bytes; every array and buffer row starts on it

inline constexpr int64_t round_up(int64_t value, int64_t to) { return (value + to - 1) / to * to; }

// Elements from row to row of activations that matmul kernels read: whole cache lines, but never a multiple of 2 KiB,
// where the rows of a tile of tokens would contend for a few sets of the first-level cache.
inline constexpr int64_t activation_stride(int64_t columns, int64_t element_bytes) {
  const int64_t bytes = round_up(columns, 64) * element_bytes;
  return (bytes % 2048 == 0 ? bytes + kAlign : bytes) / element_bytes;
}

enum class Kind : uint8_t { f32, f16, bf16, int8, int4, codebook4, int3, codebook3, int2, codebook2, int1, codebook1, sparse8 };
inline constexpr const char* kKindNames[] = {"f32",       "f16",  "bf16",      "int8", "int4",      "codebook4", "int3",
                                             "codebook3", "int2", "codebook2", "int1", "codebook1", "sparse8"};

// Bits of a code; 0 where weights are floats or stored unevenly.
inline constexpr int kind_bits(Kind kind) {
  constexpr int bits[] = {0, 0, 0, 8, 4, 4, 3, 3, 2, 2, 1, 1, 0};
  return bits[static_cast<int>(kind)];
}

inline constexpr bool has_codebook(Kind kind) {
  return kind == Kind::codebook4 || kind == Kind::codebook3 || kind == Kind::codebook2 || kind == Kind::codebook1;
}

// sparse8: of 16 rows by 32 columns (512 places) half are stored, wherever they are; the others are zeros.
inline constexpr int64_t kSparseValues = 256;                        // int8 values, in the order of their places
inline constexpr int64_t kSparseBlock = kSparseValues + 64;          // then a bit for each place

// Bytes of 32 columns of a panel of quantised weights.
inline constexpr int64_t unit_bytes(Kind kind) {
  return kind == Kind::sparse8 ? kSparseBlock : kUnit * kPanel / 8 * kind_bits(kind);
}

// A matrix [rows, columns], rows in panels of 16 (the last one ragged: absent rows are stored as zeros).
//   f32        codes: float    [panels][columns][16]
//   f16, bf16  codes: uint16_t [panels][round_up(columns, 2) / 2][16][2]      two neighbouring columns a lane
//   others     codes: uint8_t [panels][padded / 32][64 * bits], 32 columns a block, which has eight lines of places
//              [16][4]: four columns of each row. A plane of b bits a place has 8 / b of these lines side by side in each
//              64 bytes: line l is in bytes l * b / 8 * 64 on, from bit l * b % 8 on. Codes of 1, 2, 4 and 8 bits are one
//              plane, codes of 3 bits a plane of the low two, then one of the high bit.
//   int8       value = (code - 128) * scale, codes 1..255
//   int4, int3 value = (code - 8) * scale, (code - 4) * scale
//   int2, int1 value = (2 * code - 3) * scale, (2 * code - 1) * scale: no zero, but levels on both sides alike
//   codebook*  value = (codebook[code] - 64) * scale, entries 0..127
//   sparse8    codes: uint8_t [panels][padded / 32][320]: 256 values, value = int8 * scale, then 512 bits, one for each
//              place of the block, line after line, set where a value is stored: 256 are
// where padded = round_up(columns, 32), padding codes are the zero point (any code where there is none; activations there
// are 0), scales: f16 [panels][ceil(columns / group)][16], may be negative.
struct Weight {
  Kind kind;
  int64_t rows, columns, group;       // group: 32, 64 or 128; 0 for f32, f16, bf16
  const void* codes;
  const uint16_t* scales;             // null for f32, f16, bf16
  const uint8_t* codebook;            // [2 ^ bits], codebook* only

  int64_t panels() const { return (rows + kPanel - 1) / kPanel; }
  int64_t padded() const { return round_up(columns, kUnit); }
  int64_t groups() const { return group ? (columns + group - 1) / group : 0; }
  bool is_float() const { return kind <= Kind::bf16; }
  int64_t panel_bytes() const {       // of `codes`
    if (kind == Kind::f32) return columns * 64;
    return is_float() ? round_up(columns, 2) * 32 : padded() / kUnit * unit_bytes(kind);
  }
};

// Activations in int8 by row and group: x = code * scale, codes -127..127, zero from `columns` to round_up(columns, 64).
// `group` (32, 64 or 128) divides the group of every weight that it meets.
struct Quantised {
  const int8_t* codes;                // [tokens][stride], stride at least round_up(columns, 64)
  const float* scales;                // [tokens][groups]
  const int32_t* sums;                // [tokens][groups] sum of the codes of a group
  int64_t stride, groups, group;
};

enum class NormKind : uint8_t { rms, layer };
enum class ActivationKind : uint8_t { none, silu, gelu, gelu_tanh, relu, tanh, sigmoid };
enum class KvKind : uint8_t { f32, bf16, int8, int4 };
inline constexpr const char* kKvNames[] = {"f32", "bf16", "int8", "int4"};

inline constexpr int64_t kMostInt4Features = 1024;   // of a head in a cache of int4

// One layer's paged cache. A block holds block_size tokens of every key/value head:
//   keys   [blocks][kv_heads][head_dim][block_size]      tokens run fastest: a score tile is a broadcast product
//   values [blocks][kv_heads][block_size][head_dim]
// int8: value = code * scale, codes -127..127; behind a head's codes of a block stand its scales, bfloat16 [block_size], one
// for each token's key and one for its value.
// int4: value = (2 * code - 15) * scale + centre, codes 0..15, two a byte: with half = ceil(head_dim / 2), feature d < half low
// and d + half high, so that a token's bytes are its own. Behind them the scales, then the centres, bfloat16 [block_size] each.
//   keys   [blocks][kv_heads][half][block_size], of keys turned by the Hadamard matrix of isa/attention_cache.h
//   values [blocks][kv_heads][block_size][half]
struct KvLayer {
  KvKind kind;
  void* keys;
  void* values;
  int64_t kv_heads, head_dim, block_size;

  // Inlined always: a copy that stood for all instruction sets might be made of the wrong one's instructions.
  __attribute__((always_inline)) int64_t half() const { return (head_dim + 1) / 2; }
  __attribute__((always_inline)) int64_t head_bytes() const {   // of one head's keys, or values, in a block
    const int64_t token = kind == KvKind::f32    ? 4 * head_dim
                          : kind == KvKind::bf16 ? 2 * head_dim
                          : kind == KvKind::int8 ? head_dim + 2
                                                 : half() + 4;
    return token * block_size;
  }
};

// Keys that attention folds into one partial result: the unit that threads share where a context is long. Fixed, so that
// the fold is the same whoever makes the parts.
inline constexpr int64_t kSpanKeys = 512;
inline constexpr int64_t span_blocks(int64_t block_size) { return block_size < kSpanKeys ? kSpanKeys / block_size : 1; }
// Floats of a partial result of so many query rows: maxima, sums (both read sixteen at a time), outputs.
inline constexpr int64_t partial_floats(int64_t rows, int64_t head_dim) {
  return round_up(2 * (rows + 16), 16) + rows * round_up(head_dim, 16);
}

// Attention of a ragged batch over one layer's cache.
struct AttentionArgs {
  KvLayer kv;
  const float* q;                     // [tokens][heads * head_dim], row stride q_stride
  const float* k;                     // [tokens][kv_heads * head_dim]
  const float* v;
  float* out;                         // [tokens][heads * head_dim]
  int64_t q_stride, k_stride, v_stride, out_stride;
  int64_t heads;
  float scale, softcap;               // softcap 0: none
  int64_t window;                     // 0: none; else key j is seen by query i iff i - window < j <= i
  bool causal;
  const int32_t* positions;           // [tokens]
  const int32_t* starts;              // [sequences + 1] rows of each sequence
  const int32_t* block_tables;        // [sequences][table_stride]
  int64_t table_stride;

  // The positions begin..end of keys that a row of the batch sees.
  struct Keys { int64_t begin, end; };
  Keys seen(int64_t sequence, int64_t token) const {
    const int64_t position = positions[token];
    const int64_t end = (causal ? position : positions[starts[sequence + 1] - 1]) + 1;
    return {window > 0 && position >= window ? position - window + 1 : 0, end};
  }
};

// Every function is single-threaded; the executor splits work by panel, token, row or (sequence, head), never a sum.
// One block of columns of a sweep; matrices are [columns, rows] but for `ahead` [columns, columns].
inline constexpr int64_t kSweepColumns = 128;    // at most
inline constexpr int64_t kHalfLevels = 516;
struct SweepArgs {
  int64_t rows, columns;
  const float* values;
  const float* moved;      // by what earlier columns lost: values + moved is rounded
  const float* ahead;      // [from, to]: by how much a column moves for what one before it lost
  const float* scales;
  const float* divisors;   // scales, infinite where these are zero
  const float* levels;     // [kHalfLevels]: what a quotient q becomes, at floor(2 q) + kHalfLevels / 2
  const float* kept;       // 0 where a weight is pruned, else 1; or null
  const float* weights;    // [columns]: of a squared rounding error
  float* made;             // what the values became
  float* lost;             // values - made
  float* error;            // [rows]: sum of weights * (values + moved - made)^2
};

// What outer_pack sees of tokens [tokens, columns], and their codes for outer_add (isa/outer.h).
inline constexpr int64_t kOuterTokens = 256;     // at most
struct OuterPackArgs {
  int64_t tokens, columns;
  const float* x;
  double* squares;         // [columns] sums over the tokens
  float* magnitudes;       // [columns] sums of sizes
  float* peaks;            // [columns] largest sizes
  int16_t* codes;          // a chunk of those that outer_add takes; or null
  int64_t stride;          // from one panel's codes to the next's
  float* scales;           // [panels * 16] of the codes
};
struct OuterAddArgs {
  int64_t chunks, columns, panel0, panel1;
  const int16_t* codes;    // [panels of 16 columns][chunks][kOuterTokens / 2][16][2]
  const float* scales;     // [chunks][panels * 16]
  float* into;             // [columns][columns]
};

// left[r, g, h] = sum over c in group g, d in group h of levels[c, r] * hessian[c, d] * levels[d, r].
inline constexpr int64_t kLevelColumns = 8;      // of which a group's columns are a multiple
struct LevelProductsArgs {
  int64_t rows, columns, group;
  const float* levels;     // [columns, rows]
  const float* hessian;    // [columns, columns], symmetric
  float* left;             // [rows, groups, groups]
};

struct Kernels {
  const char* name;                   // "scalar", "avx2", "avx2_vnni", "avx512", "avx512_bf16", "neon", ...
  bool bf16_inputs;                   // matmul_float takes bf16 activations for bf16 weights

  // --- isa/matmul
  void (*quantise)(const float* x, int64_t columns, int64_t group, int8_t* codes, float* scales, int32_t* sums);
  void (*to_bf16)(const float* x, int64_t columns, uint16_t* out);   // round to nearest even; zero up to round_up(columns, 64)
  // out[t * out_stride + row] for tokens [0, tokens) and rows of panels [panel0, panel1); rows past w.rows are not written.
  void (*matmul_int)(const Weight& w, const Quantised& x, int64_t tokens, int64_t panel0, int64_t panel1, float* out,
                     int64_t out_stride, std::byte* scratch);
  void (*matmul_float)(const Weight& w, const void* x, int64_t x_stride, int64_t tokens, int64_t panel0, int64_t panel1,
                       float* out, int64_t out_stride, std::byte* scratch);
  int64_t (*matmul_scratch)(const Weight& w, int64_t tokens);        // bytes per thread
  void (*decode_row)(const Weight& w, int64_t row, float* out);      // one row as float32 (embedding look-up)
  float (*read_memory)(const void* data, int64_t bytes);             // touches every cache line at full rate
  int64_t (*int8_peak)(int64_t iterations);                          // multiply-accumulates done, all in registers
  int64_t (*bf16_peak)(int64_t iterations);                          // the same with the best bf16-weight instruction

  // --- ops (isa/ops.h over isa/simd_*.h)
  void (*norm)(NormKind kind, const float* x, int64_t n, const float* weight, const float* bias, float eps, float* out);
  void (*rope)(float* x, int64_t heads, int64_t head_dim, int64_t rotary, const float* cosine, const float* sine);
  void (*activation)(ActivationKind kind, const float* x, int64_t n, float* out);
  void (*gate)(ActivationKind kind, const float* gate, const float* up, int64_t n, float* out);   // act(gate) * up
  void (*add)(const float* a, const float* b, int64_t n, float* out);
  void (*multiply)(const float* a, const float* b, int64_t n, float* out);
  void (*scale)(const float* a, float factor, int64_t n, float* out);
  void (*softcap)(const float* a, float cap, int64_t n, float* out);                              // cap * tanh(a / cap)
  void (*kv_write)(const AttentionArgs& a, int64_t sequence, int64_t token);                      // one row of the batch, all heads
  // Query rows [token0, token1) of the batch, all of one sequence, one key/value head (all query heads that share it).
  void (*attend)(const AttentionArgs& a, int64_t sequence, int64_t kv_head, int64_t token0, int64_t token1,
                 std::byte* scratch);
  // The same in two steps: partial_floats() of each span of keys (span i: positions from i * span_blocks * block_size), then
  // all spans from the first row's first to the last row's last, `stride` floats apart, in order.
  void (*attend_span)(const AttentionArgs& a, int64_t sequence, int64_t kv_head, int64_t token0, int64_t token1, int64_t span,
                      float* partial, std::byte* scratch);
  void (*attend_join)(const AttentionArgs& a, int64_t sequence, int64_t kv_head, int64_t token0, int64_t token1,
                      const float* partials, int64_t stride, std::byte* scratch);
  int64_t (*attend_scratch)(const AttentionArgs& a, int64_t tokens); // bytes per thread for a query tile of `tokens`
  double (*logsumexp)(const float* logits, int64_t n);
  // KL(p || q) in nats over the whole vocabulary, both given as logits, accumulated in double.
  double (*divergence)(const float* p, const float* q, int64_t n);
  int64_t (*argmax)(const float* logits, int64_t n);                 // lowest index among equals
  void (*masses)(const float* logits, float top, float factor, int64_t n, float* out);   // e^((logit - top) * factor)
  void (*sweep)(const SweepArgs& a);
  void (*outer_pack)(const OuterPackArgs& a);
  void (*outer_add)(const OuterAddArgs& a);
  void (*level_products)(const LevelProductsArgs& a);
  bool (*solve_positive)(int64_t n, double* matrix, double* right);  // in place; false: the matrix is not positive definite
};

const Kernels* scalar_kernels();
const Kernels* avx2_kernels();          // null where not compiled in
const Kernels* avx2_vnni_kernels();
const Kernels* avx512_kernels();
const Kernels* avx512_bf16_kernels();
const Kernels* neon_kernels();                   // ARMv8.0
const Kernels* neon_dotprod_kernels();           // with products of bytes that add up four
const Kernels* neon_i8mm_kernels();              // with products of matrices of bytes
const Kernels* avx2_vnni_emulated_kernels();     // for tests where the instruction is missing
const Kernels* avx512_bf16_emulated_kernels();
const Kernels* avx512_emulated_kernels();        // every instruction: HASTEN_EMULATE_AVX512
const Kernels* avx512_bf16_all_emulated_kernels();

}  // namespace hasten
