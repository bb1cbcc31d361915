// The operations of a device: functions over views, without state. The layer and the model are
// written against this table; every device fills it; tests and benches walk it for every device and
// every candidate kernel.
//
// Rules for every operation
//   - outputs of a token depend on that token's own inputs and sequence only, bit for bit: not on
//     the other tokens of the call, the number of threads, or the block table;
//   - nothing is allocated: temporary memory comes from `context.scratch`, never more than
//     `Ops::scratch_bytes` answers for the limits;
//   - inputs were validated by the layer; an operation may assume them;
//   - asynchronous on `context.stream` where the device has streams.
// Activations are bf16, or f32 in `exact` (`Numerics::activation`); "act" below means either.
#pragma once
#include <cstdint>
#include <span>
#include <variant>

#include "core/arena.h"
#include "dsv4/cache.h"
#include "dsv4/numerics.h"
#include "dsv4/tensor.h"
#include "ops/weight.h"

namespace dsv4 {

struct Ops;

struct OpContext {
  Stream stream;
  Arena* scratch;
  const Ops*
      ops;  ///< the table that the operation was called through, for operations made of others
};

// ---- generic
// -------------------------------------------------------------------------------------------------------

/// Scales of rows of E4M3 codes, a power of two per 128 columns: of row r and columns 128 c .. at
/// data[c * stride + r]. `stride` is row_scale_stride(rows): what lies between is read, not used.
struct RowScales {
  float* data = nullptr;
  int64_t stride = 0;
};
constexpr int64_t row_scale_stride(int64_t rows) {
  const int64_t tile = rows <= 16 ? 16 : rows <= 64 ? 64 : 256;
  return (rows + tile - 1) / tile * tile;
}

/// x of a product is what rms_norm makes of it (weight [cols] bf16 or f32), ...
struct NormedInput {
  ConstTensor weight;
  float eps;
};
/// RoPE on the last rope_dim of a row of head_dim.
struct RopeView {
  const float* frequencies = nullptr;  ///< [rope_dim / 2] f32; angle = f32(position) * frequency
                                       ///< rounded to f32, then cos and sin
  int32_t rope_dim = 64;
};
/// ... or what inverse_rope with `quantise` does, whole heads. (attend does it to its outputs.)
struct RotatedInput {
  RopeView rope;
  const int32_t* positions = nullptr;  ///< [M], written before the operation that writes x
  int32_t head_dim = 0;
};

/// Done to an x in bf16, and rounded to codes, on its way (Ops::makes_input); monostate: nothing.
using LinearInput = std::variant<std::monostate, NormedInput, RotatedInput>;

/// out = x w^T. x [M, cols] act (row stride may exceed cols), out [M, rows] bf16 or f32 (row stride
/// may exceed rows). f32 accumulation in one order for every M. With bf16 x the products are bf16 x
/// bf16 (FP8 and FP4 weights with power-of-two scales are exact in bf16); with f32 x they are f32 x
/// f32. A kF8E4M3 out (of kF8E4M3 x only, rows of w a multiple of 128) holds the codes that linear
/// would make of the result in bf16 (numerics.md 4).
struct LinearProblem {
  ConstTensor x;
  Weight w;  ///< constant: may be read while operations before this one are under way
  Tensor out;
  RowScales x_scale{};    ///< where x is kF8E4M3 (Ops::takes_e4m3)
  RowScales out_scale{};  ///< where out is kF8E4M3, too: codes that the next product reads
  LinearInput input{};
};
/// Independent problems in one region. Neighbours with the same x share its preparation.
struct LinearParams {
  std::span<const LinearProblem> problems;
  /// Quantise x (bf16) to E4M3 per row and 128 columns with power-of-two scales first, amax >= 1e-4
  /// (numerics.md 4).
  bool quantise_input = false;
  /// The values of x (bf16) are such products of E4M3 numbers and scales already, however small.
  bool quantised_input = false;
  /// kFp8, where the device takes it (Ops::takes_e4m3): products of FP8 weights and quantised x are
  /// summed on FP8 tensor cores.
  Products products = Products::kF32;
  /// A selection that others wait for runs beside this call, on another branch of the stream, and
  /// makes so many scores: the call leaves it a part of the device. 0: nothing is beside.
  int64_t scores_beside = 0;
};

/// out = weight * x / sqrt(mean(x^2) + eps), f32 inside, one rounding. x [T, n] act, weight [n]
/// bf16 or f32, out act or f32; out may be x. A kF8E4M3 out (Ops::takes_e4m3) holds the codes that
/// linear would make of the result in bf16 (numerics.md 4).
struct RmsNormParams {
  ConstTensor x;
  ConstTensor weight;
  float eps;
  Tensor out;
  RowScales scale{};                      ///< of a kF8E4M3 out
  const RmsNormParams* beside = nullptr;  ///< another norm, independent; its own `beside` is null
};

/// Row gather: out[i, :] = x[rows[i], :]; x [N, n], out [count, n], same dtype. rows [count] i32.
struct GatherRowsParams {
  ConstTensor x;
  const int32_t* rows;
  Tensor out;
};

/// out[...] = 0 for a row-strided [T, n] or [T, heads, n] region: padded heads.
struct ZeroParams {
  Tensor out;
};

// ---- step metadata
// -------------------------------------------------------------------------------------------------

/// A paged cache seen by sequences: physical block of logical block b of sequence s is
/// table[s * stride + b % columns]. `columns` wraps for ring tables (window), and is the full width
/// for growing ones.
struct BlockTable {
  const int32_t* table = nullptr;
  int64_t stride = 0;
  int32_t columns = 0;
  int32_t tokens_per_block = 0;
};

/// Per-token arrays of a step for layers of one compress ratio; ratio 0 uses none of them.
struct RatioPlan {
  int32_t ratio = 0;
  int64_t* slot_mapping = nullptr;  ///< [T] compressed row slot when (pos+1) % ratio == 0, else -1
  int32_t* begin = nullptr;         ///< [T] zero: first visible entry
  int32_t* end = nullptr;           ///< [T] (pos+1) / ratio: one past the last visible entry
};

/// A step as kernels see it. All pointers are on the device and fixed by StepLimits; contents are
/// refreshed per step.
struct PlanView {
  int32_t num_tokens = 0;
  int32_t num_seqs = 0;
  int32_t max_query_len = 0;  ///< host numbers, for choosing grids and tiles
  int64_t max_context = 0;    ///< host: largest position + 1 of this step
  const int32_t* query_start =
      nullptr;  ///< [S + 1] tokens of sequence s are [query_start[s], query_start[s+1])
  const int32_t* context_len = nullptr;  ///< [S] tokens before this step
  const int32_t* state_slot = nullptr;   ///< [S] ring of the compressor state
  BlockTable window_blocks;
  BlockTable growing_blocks;
  int32_t* positions = nullptr;     ///< [T] absolute
  int32_t* token_to_seq = nullptr;  ///< [T]
  int64_t* window_slot_mapping =
      nullptr;                      ///< [T] block * rows_per_block + offset, -1: do not write
  int32_t* window_begin = nullptr;  ///< [T] first visible position max(0, pos - window + 1)
  int32_t* window_end = nullptr;    ///< [T] pos + 1
  std::span<const RatioPlan> ratios;
  const RatioPlan* ratio(int compress_ratio) const {
    for (const RatioPlan& plan : ratios) {
      if (plan.ratio == compress_ratio) return &plan;
    }
    return nullptr;
  }
};

/// Fills the per-token arrays of `plan` from its per-sequence arrays (spec/dispatch.md 5).
struct ExpandPlanParams {
  PlanView plan;
  int32_t sliding_window;
};

// ---- attention
// -----------------------------------------------------------------------------------------------------

/// Per head: q /= sqrt(mean(q^2) + eps); RoPE on the last rope_dim of q and kv at the token's
/// position; kv is rounded to act, written back in place and stored in the window cache in its
/// format. q in place [T, heads, head_dim] act, kv [T, head_dim] act. q and kv arithmetic in f32
/// with one rounding. Source: attention.md steps 3-5.
struct QnormRopeInsertParams {
  Tensor q;  // empty: kv alone (attend does the same to q: AttendParams::raw_queries)
  Tensor kv;
  RopeView rope;
  float eps;
  const int32_t* positions;     // [T]
  const int64_t* slot_mapping;  // [T], -1 skipped
  CacheView window;
  ConstTensor kv_norm{};  // [head_dim]: kv is normed first, as rms_norm does; empty: it is already
};

/// Compressor step (compressor.md 1): for every token, gates row = [v | s], s += ape[pos % ratio];
/// entries whose last token is in this step are pooled, normed, rotated at position j * ratio,
/// written to `cache` at their slot; then the ring state takes the last ring_rows tokens of each
/// sequence. Entries of a sequence read rows of this step from `gates`, older ones from `state`.
struct CompressParams {
  const PlanView* plan;
  const RatioPlan* ratio;
  bool overlap;
  Tensor gates;      // [T, 2 * coff * width] f32: v then s without ape; overwritten (ape is added)
  ConstTensor ape;   // [ratio, coff * width] f32 (or bf16-valued f32)
  ConstTensor norm;  // [width] bf16 or f32
  float eps;
  RopeView rope;  // rotates the last rope.rope_dim of width
  bool hadamard;  // multiply by the orthonormal Hadamard matrix before quantisation (indexer keys,
                  // `reference`)
  DType activation;  // kBf16: round as column V of compressor.md 1.4; kF32: no rounding
  StateView state;
  CacheView cache;
  Tensor entries;  // optional tap: [T, width] f32; row t of an emitting token t gets the entry
                   // before quantisation
};

/// Indexer queries (compressor.md 2.2, 2.4): RoPE on the last rope_dim of each head, optional
/// Hadamard, quantisation to the kind of `format`, weights folded. Outputs in the form index_logits
/// of the same device reads.
struct IndexQueryParams {
  ConstTensor q;        // [T, index_heads, index_dim] act, from indexer.wq_b
  ConstTensor weights;  // [T, index_heads] act, from weights_proj
  RopeView rope;
  const int32_t* positions;
  KvFormat format;  // kIndexFp8, kIndexMxfp4, kIndexF32
  bool hadamard;
  Tensor q_out;  // [T, index_heads, index_dim]: bf16 holding the quantised values without FP8's
                 // scale (f32 in kIndexF32), or FP8's codes (Ops::index_takes_e4m3)
  Tensor weights_out;  // [T, index_heads] f32, all factors folded in
};

/// logits[t, j] = k_scale_j * sum_h w[t,h] * max(0, q[t,h] . k_j) for j in [0, end[t]); the rest of
/// a row is not written. With `best` > 0 only scores matter that reach a token's `best`-th best: a
/// NaN or anything smaller than that may stand for any other.
struct IndexLogitsParams {
  ConstTensor q;  // q_out of index_query, rows of this tile
  ConstTensor weights;
  const int32_t* token_to_seq;  // [tile tokens]
  const int32_t* end;           // [tile tokens] visible entries
  int32_t max_end;              // host: upper bound of end
  BlockTable blocks;            // growing blocks; tokens_per_block / ratio rows per block
  CacheView cache;
  Tensor logits;  // [tile tokens, >= max_end] f32
  int32_t best = 0;
};

/// What map_slots of the selection would write, where top_k does so itself (Ops::top_k_maps_slots).
struct TopKSlots {
  const int32_t* token_to_seq = nullptr;  // [tokens]
  BlockTable blocks;
  int32_t rows_per_block = 0;
  Tensor slots;  // [tokens, k] i32; empty: not wanted
};

/// Larger score first, then smaller index; NaN counts as -inf. Emits ascending indices, then -1.
struct TopKParams {
  ConstTensor logits;    // [tokens, n] f32
  const int32_t* end;    // [tokens] candidates [0, end)
  Tensor topk_indices;   // [tokens, k] i32, local entry numbers, -1 = unused
  int32_t* topk_length;  // [tokens] min(end, k)
  TopKSlots slots{};
};

/// Local entry numbers -> global slots through the block table; -1 stays.
struct MapSlotsParams {
  ConstTensor topk_indices;  // [T, k] i32
  const int32_t* token_to_seq;
  BlockTable blocks;
  int32_t rows_per_block;
  Tensor slots;  // [T, k] i32
};

/// The canonical reduction of attention, a constant of the layer kind (never of a step): rows in
/// blocks of `rows_per_block`, window blocks from the token's first visible position (ranges) or
/// from the start of the list, so that a window of 128 is two blocks at every position; compressed
/// blocks from entry 0 (ranges) or from the start of the ascending list. Chain c holds the
/// compressed blocks [c * blocks_per_chain, (c + 1) * blocks_per_chain); chain 0 starts with the
/// window blocks. Within a chain blocks are accumulated in order by online softmax; chains are
/// merged in ascending order. Masked rows contribute exactly nothing, wholly masked blocks are
/// skipped.
struct ReductionGrid {
  int32_t rows_per_block = 64;
  int32_t blocks_per_chain = 32;  ///< 2048 entries: window + top-k (512, 1024) is always one chain
  bool operator==(const ReductionGrid&) const = default;
};

/// Rows [begin[t], end[t]) of a sequence's own list: window positions, or compressed entries.
struct RangeRows {
  CacheView cache;
  BlockTable blocks;  ///< tokens_per_block counts rows of this cache here
  const int32_t* begin;
  const int32_t* end;
};
/// Explicit slots per token, ascending entries; the first length[t] are used, -1 is skipped.
struct ListedRows {
  CacheView cache;
  const int32_t* slots;
  int64_t stride;
  const int32_t* length;
};

/// A flat list of slots: row t has slots[indptr[t] .. indptr[t + 1]), ascending entries; -1 is
/// skipped. The form of AMD's layer (spec/dispatch.md 7.4).
struct RaggedRows {
  CacheView cache;
  const int32_t* slots;
  const int32_t* indptr;  ///< [T + 1]
};

/// Flattens the rows of every token of a step; ranges go through their block table. Lists and
/// ranges may be empty. `slots` has room for every token's bound.
struct RaggedRowsParams {
  std::variant<RangeRows, ListedRows> rows;
  const int32_t* token_to_seq;  // read for ranges only
  int32_t num_tokens;
  int32_t* indptr;  // [T + 1]
  int32_t* slots;
};

/// out[t,h] = sum_j p_j k_j / (sum_j p_j + exp(sink_h - m)), p_j = exp(scale q.k_j - m). Source:
/// attention.md step 8. A kF8E4M3 out (Ops::attend_makes_codes) holds the codes that inverse_rope
/// with `quantise` would make of the result in bf16.
struct AttendParams {
  ConstTensor q;                                           // [T, heads, head_dim] act
  std::variant<RangeRows, ListedRows, RaggedRows> window;  // begin, or length, null: no window rows
  std::variant<std::monostate, RangeRows, ListedRows, RaggedRows> compressed;
  int64_t max_entries;  // host: upper bound of compressed end or length; a captured graph keeps it
  /// Read by ranges only. It, begin, end and blocks of ranges are a step's plan, older than the
  /// operations of the layer: they may be read while those before attend are under way.
  const int32_t* token_to_seq;
  const float* sink;  // [heads] f32, -inf: none
  float softmax_scale;
  ReductionGrid grid;
  bool round_p_to_bf16;
  Tensor out;  // [T, heads, head_dim] act, or codes; row without keys -> 0
  float* lse;  // optional [T, heads]: natural log, sink excluded, -inf without keys
  float* max_logits = nullptr;  // optional [T, heads]: largest scale q.k, -inf without keys
  RotatedInput rotation{};      // of raw queries, and back of a kF8E4M3 out
  RowScales scale{};            // of a kF8E4M3 out, as rows of heads * head_dim
  /// q is as wq_b leaves it: attend does what qnorm_rope_insert would do to it, the same bits, and
  /// leaves q as it is (Ops::attend_takes_raw_queries).
  bool raw_queries = false;
  float query_eps = 0;  // of raw queries' norm
};

/// Inverse RoPE of the last rope_dim of every head at the token's position (attention.md step 9),
/// then
///   quantise = false: one rounding to out's dtype;
///   quantise = true: E4M3 per 128 consecutive values of the f32 result, power-of-two scales, amax
///   >= 1e-10 (o_proj.md 4); `out` then holds the dequantised values, exact in bf16, or, where it
///   is kF8E4M3 (Ops::takes_e4m3), the codes.
struct InverseRopeParams {
  ConstTensor o;  // [T, heads, head_dim] act
  RopeView rope;
  const int32_t* positions;
  bool quantise;
  Tensor out;         // [T, heads, head_dim]
  RowScales scale{};  // of a kF8E4M3 out, as rows of heads * head_dim
};

// ---- the model around attention
// ------------------------------------------------------------------------------------

/// streams[t, i, :] = table[ids[t]] for every stream i. table [vocab, n] bf16 or f32, streams [T,
/// hc, n] act.
struct EmbedParams {
  const int32_t* ids;
  ConstTensor table;
  Tensor streams;
};

/// Hyper-connection parameters of one site (model.md 3): fn [rows, hc * n] f32, base [rows] f32,
/// scale [3 or 1] f32.
struct HcWeights {
  ConstTensor fn, base, scale;
};
/// Mixes hc streams into one input, and remembers how to spread the output again.
struct HcPreParams {
  ConstTensor streams;  // [T, hc, n] act
  HcWeights weights;
  float norm_eps, hc_eps;
  int32_t sinkhorn_iters;
  Tensor y;     // [T, n] act
  Tensor post;  // [T, hc] f32
  Tensor comb;  // [T, hc, hc] f32, C[i][j]: source i, destination j
};
/// streams[j] = act(post_j * f + sum_i C[i][j] * streams[i]), in place.
struct HcPostParams {
  ConstTensor f;  // [T, n] act
  ConstTensor post, comb;
  Tensor streams;  // [T, hc, n] act
};
/// y = act(sum_i pre_i X_i) with the head's own parameters (rows = hc).
struct HcHeadParams {
  ConstTensor streams;
  HcWeights weights;
  float norm_eps, hc_eps;
  Tensor y;  // [T, n] act
};

/// p = sqrt(softplus(logits)); ids by bias (top-k of p + bias, ties to the smaller id) or by table;
/// weights normalised and scaled (model.md 4.1). Output sorted by ascending expert id.
struct RouteParams {
  ConstTensor logits;        // [T, experts] f32
  ConstTensor bias;          // [experts] f32, or empty
  ConstTensor tid2eid;       // [vocab, k] i64, or empty
  const int32_t* token_ids;  // [T], for tid2eid
  float scaling;
  Tensor expert_ids;      // [T, k] i32, ascending
  Tensor expert_weights;  // [T, k] f32
};

struct ExpertWeights {
  Weight w1, w3, w2;
};
/// out = shared(x) + sum over routed experts, ascending id, in f32; one rounding to act at the end
/// (model.md 4.2). The routing weight multiplies the activation before w2's input is rounded and
/// quantised; the shared expert is added first.
struct MoeParams {
  ConstTensor x;           // [T, n] act
  ConstTensor expert_ids;  // [T, k] i32 ascending
  ConstTensor expert_weights;
  std::span<const ExpertWeights> experts;
  ExpertWeights shared;  // w1 empty: none
  float swiglu_limit;    // <= 0: no clamp
  bool quantise_input;
  Tensor out;  // [T, n] act
};

// ---- the table
// -----------------------------------------------------------------------------------------------------

/// Upper bounds from which scratch memory is sized.
struct ScratchLimits {
  int64_t max_tokens = 0;
  int64_t max_cols = 0;  ///< longest K of a linear
  int64_t max_rows = 0;
  int num_heads = 0, head_dim = 0;
  int index_heads = 0, index_dim = 0, index_topk = 0;
  int64_t max_entries = 0;  ///< compressed entries of the longest context
  int sliding_window = 0;
  int64_t hidden_size = 0, moe_intermediate = 0;
  int num_experts = 0, experts_per_token = 0;
  int num_threads = 1;
};

template <typename Params>
using Op = void (*)(const Params&, const OpContext&);

struct Ops {
  Op<LinearParams> linear = nullptr;
  Op<RmsNormParams> rms_norm = nullptr;
  Op<GatherRowsParams> gather_rows = nullptr;
  Op<ZeroParams> zero = nullptr;
  Op<ExpandPlanParams> expand_plan = nullptr;
  Op<QnormRopeInsertParams> qnorm_rope_insert = nullptr;
  Op<CompressParams> compress = nullptr;
  Op<IndexQueryParams> index_query = nullptr;
  Op<IndexLogitsParams> index_logits = nullptr;
  Op<TopKParams> top_k = nullptr;
  Op<MapSlotsParams> map_slots = nullptr;
  Op<RaggedRowsParams> ragged_rows = nullptr;
  Op<AttendParams> attend = nullptr;
  Op<InverseRopeParams> inverse_rope = nullptr;
  Op<EmbedParams> embed = nullptr;
  Op<HcPreParams> hc_pre = nullptr;
  Op<HcPostParams> hc_post = nullptr;
  Op<HcHeadParams> hc_head = nullptr;
  Op<RouteParams> route = nullptr;
  Op<MoeParams> moe = nullptr;
  /// Does linear know Products::kFp8? Then it takes codes and scales, too, for FP8 weights with
  /// scale blocks of 128 columns x a multiple of 128 rows and rows of a multiple of 16 bytes, and
  /// inverse_rope and rms_norm write them: a head_dim, a row (of at most 4096) that is a multiple
  /// of 128.
  bool takes_e4m3 = false;
  /// Does linear with Products::kFp8 do what `input` says itself? Null: never. The same bits as two
  /// operations, a launch less: for few tokens.
  bool (*makes_input)(const LinearProblem&) = nullptr;
  /// Does attend write codes in such a call (its out is kF8E4M3, and `rotation` given)? Null:
  /// never. The same bits as inverse_rope behind it.
  bool (*attend_makes_codes)(const AttendParams&) = nullptr;
  /// Does attend take queries as wq_b leaves them in such a call (`raw_queries` and `rotation`
  /// given)? Null: never.
  bool (*attend_takes_raw_queries)(const AttendParams&) = nullptr;
  /// Do index_query and index_logits know q as E4M3 codes (format kIndexFp8) and want it so?
  bool index_takes_e4m3 = false;
  /// Does top_k write the slots, too, so that no map_slots has to follow?
  bool top_k_maps_slots = false;
  /// Scratch that any single operation needs within these limits.
  int64_t (*scratch_bytes)(const ScratchLimits&) = nullptr;
};

}  // namespace dsv4
