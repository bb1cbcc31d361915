// What the base class hands to its stages: the layer's constants, and one step's inputs and
// intermediates.
#pragma once
#include <memory>
#include <string>
#include <vector>

#include "attention/steps.h"
#include "checkpoint/weights.h"
#include "core/arena.h"
#include "core/branches.h"
#include "dsv4/attention.h"
#include "ops/ops.h"

namespace dsv4 {

/// Branches of a stream: the compressor beside prepare(); queries of the heads and insert beside
/// select().
constexpr int kCompressorBranch = 0, kInsertBranch = 1;
static_assert(kInsertBranch < StreamBranches::kMaxBranches);

/// Constants of a layer, made once: weights of this rank, geometry, rope frequencies and sinks on
/// the device.
struct DeepseekV4Attention::Layer {
  std::string name;
  ModelConfig config;
  LayerKind kind;
  Numerics numerics;
  TensorParallel tensor_parallel;
  Device* device = nullptr;
  StreamBranches* branches = nullptr;  // of the device; null: steps run one after the other
  AttentionWeights weights;            // sliced: heads of wq_b, groups of wo_a, columns of wo_b
  std::vector<CacheSpec> specs;
  ReductionGrid grid;
  int num_heads = 0;        // of this rank
  int num_groups = 0;       // of this rank
  Buffer rope_frequencies;  // [rope_dim / 2] f32
  Buffer sink;  // [padded heads] f32, -inf above num_heads; filled when the padded count is known
  // Fixed by prepare_for:
  StepLimits limits;
  int padded_heads = 0;
  int64_t max_entries = 0;  // compressed entries of the longest context
  int logits_tile_tokens = 0;

  RopeView rope() const {
    return {reinterpret_cast<const float*>(rope_frequencies.data()), config.qk_rope_head_dim};
  }
  /// f32 columns of gates and state rows: v and s of a compressor of `width`.
  int64_t gate_cols(int64_t width) const { return 2 * kind.pooled_windows() * width; }
};

/// One step: inputs and named intermediates. Stages read and write these; nothing else is shared
/// between them.
struct DeepseekV4Attention::Step {
  const PlanView* plan = nullptr;
  const RatioPlan* ratio = nullptr;  // null for sliding layers
  const LayerCaches* caches = nullptr;
  ConstTensor hidden;  // [T, hidden]
  Stream stream;
  Arena* scratch = nullptr;  // for operations
  const ForwardOptions* options = nullptr;
  StreamBranches* branches = nullptr;    // where steps may run beside others; null: in order
  Arena* insert_scratch = nullptr;       // where inserts_beside(): for operations of that branch
  Step* waits_for_index_rows = nullptr;  // of the compressor's branch: the step it is a branch of
  bool has_index_rows = true;            // of the layer's step: index rows need no more waiting

  Tensor qr;                    // [T, q_lora_rank] act, after q_norm, or its codes
  RowScales qr_scale;           // of codes
  LinearInput qr_input;         // its norm, where products that read qr norm it; kv has none then
  Tensor kv;                    // [T, head_dim] act
  Tensor q;                     // [T, padded heads, head_dim] act
  Tensor gates;                 // [T, 2 * coff * head_dim] f32
  Tensor index_gates;           // [T, 2 * coff * index_head_dim] f32
  Tensor index_q;               // [T, index_n_heads, index_head_dim] act, from wq_b
  Tensor index_weights;         // [T, index_n_heads] act, from weights_proj
  Tensor index_q_quantised;     // as index_query writes it
  Tensor index_weights_folded;  // [T, index_n_heads] f32
  Tensor logits;                // [tile, max_entries] f32
  Tensor topk_indices;          // [T, index_topk] i32, local entries
  Tensor topk_slots;            // [T, index_topk] i32, global slots
  int32_t* topk_length = nullptr;  // [T]
  bool all_entries_visible =
      false;  // no token of the step has more entries than index_topk: ranges serve as lists
  Tensor o;   // [T, padded heads, head_dim] act
  bool attend_rotates = false;  // attention wrote o_rotated, as codes, and not o
  bool attend_norms = false;    // q is as wq_b leaves it: attention norms and rotates it
  Tensor o_rotated;             // [T, heads, head_dim] act
  Tensor z;                     // [T, groups * o_lora_rank] act

  int64_t num_tokens() const { return plan->num_tokens; }
  /// By compress(), once the indexer's rows are enqueued and its weights, before the rest: what
  /// the layer's step enqueues from then on reads them.
  void index_rows_are_enqueued() const {
    if (waits_for_index_rows == nullptr) return;
    branches->join(waits_for_index_rows->stream, kCompressorBranch);
    waits_for_index_rows->has_index_rows = true;
  }
  /// Do queries of the heads and qnorm_rope_insert run beside index and select, which do not read
  /// what they write?
  bool inserts_beside() const {
    return branches != nullptr && index_q.data != nullptr && !all_entries_visible;
  }
  /// And do they start with the indexer's queries, or behind them? Where few tokens leave the
  /// device room for the indexer's small launches it is the sooner the better.
  bool inserts_start_early() const { return inserts_beside() && num_tokens() <= 16; }
  /// Is kv inserted beside the queries' product, which has nothing else behind it?
  bool inserts_kv_beside() const { return attend_norms && !inserts_beside(); }
  /// That the selection makes beside the queries of the heads; 0: none.
  int64_t scores_beside() const {
    return inserts_beside() ? num_tokens() * (plan->max_context / ratio->ratio) : 0;
  }
  bool norms_late() const { return !std::holds_alternative<std::monostate>(qr_input); }
  /// A product with `w` that reads qr.
  LinearProblem of_qr(const Weight& w, const Tensor& out) const {
    return {.x = qr, .w = w, .out = out, .x_scale = qr_scale, .input = qr_input};
  }
  OpContext context(const Ops& ops) const { return {stream, scratch, &ops}; }
};

/// Workspace that forward() of one layer borrows, known from the config alone. `padded_heads` as
/// the backend pads config.num_heads / tensor_parallel.size.
int64_t attention_workspace_bytes(const ModelConfig& config, const LayerKind& kind,
                                  const Numerics& numerics, const TensorParallel& tensor_parallel,
                                  int padded_heads, const StepLimits& limits, const Ops& ops,
                                  int num_threads);

/// Rows that an operation hands to products: values, or E4M3 codes and scales (Ops::takes_e4m3).
struct InputRows {
  Tensor rows;
  RowScales scale;  ///< of codes
};
/// Codes and scales in the memory of bf16 values [T, ...], which take more room.
InputRows codes_in_place(const Tensor& values);
/// Do products with `w` take codes?
bool takes_codes(const Numerics& numerics, const Weight& w);
/// Does a product do what `problem.input` says itself, in this step? Not where somebody watches the
/// steps one by one.
bool makes_input(const Ops& ops, const Numerics& numerics, const StreamBranches* branches,
                 const LinearProblem& problem);

/// Linear problems in as few regions as their input kinds allow: FP8 and FP4 weights take quantised
/// input where the numerics say so, others take the input as it is. `scores_beside` as in
/// LinearParams.
void project(const Ops& ops, const OpContext& context, const Numerics& numerics,
             std::span<const LinearProblem> problems, int64_t scores_beside = 0);

}  // namespace dsv4
