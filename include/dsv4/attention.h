// The attention layer of DeepSeek-V4, one class for all platforms, and the plan of a step. Used by
// engines that bring their own model around it; the model of this library is built on the same
// interface.
#pragma once
#include <cstddef>
#include <cstdint>
#include <memory>
#include <set>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "dsv4/cache.h"
#include "dsv4/config.h"
#include "dsv4/device.h"
#include "dsv4/numerics.h"
#include "dsv4/tensor.h"

namespace dsv4 {

struct AttentionDescriptor;
struct AttentionWeights;
struct PlanView;

/// Device memory that a call borrows for temporary results.
struct Workspace {
  std::byte* data = nullptr;
  int64_t bytes = 0;
};

/// Bounds that hold for every step of an engine; they fix all addresses, widths and grids.
struct StepLimits {
  int max_tokens = 1;       ///< tokens of one step, all sequences together
  int max_seqs = 1;         ///< sequences of one step
  int64_t max_context = 1;  ///< longest sequence, its new tokens included
};

/// Heads, groups and sinks of rank `rank` of `size`; everything else is replicated. The sum over
/// ranks is the caller's.
struct TensorParallel {
  int rank = 0;
  int size = 1;
};

/// Addresses, ranges and slots of one step, shared by all layers. Allocates once, at construction.
class StepPlan {
 public:
  /// @throws Error kInvalidArgument (limits), kOutOfMemory.
  StepPlan(const ModelConfig& config, const StepLimits& limits, const PoolLimits& pool_limits,
           Device& device);
  ~StepPlan();
  StepPlan(const StepPlan&) = delete;
  StepPlan& operator=(const StepPlan&) = delete;

  /// Refreshes the plan for `batch`; tokens of a sequence are adjacent, in batch order. Every
  /// sequence must have been reserved its tokens. Tokens up to `padded_tokens` (0: none) are
  /// padding: slot -1, no visible rows. With `for_recording` the host numbers that choose grids are
  /// those of the limits, so that work recorded with this plan (Device::record) fits every later
  /// batch that is updated the same way with as many tokens, padding included; where no sequence of
  /// this batch has more than one token, batches of which that is true, too.
  /// @throws Error kInvalidArgument naming the limit that the batch exceeds; the plan keeps its old
  /// content then.
  void update(std::span<const BatchEntry> batch, const KvCachePool& pool, Stream stream,
              int padded_tokens = 0, bool for_recording = false);

  const PlanView& view() const;
  const StepLimits& limits() const;
  int64_t device_bytes() const;
  /// What a plan of these limits allocates on the device.
  static int64_t device_bytes(const ModelConfig& config, const StepLimits& limits,
                              const PoolLimits& pool_limits);

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

/// Receives named intermediate results (host copies) under the names of the golden manifest:
/// "attn_in", "q", "kv", "compressed", "index_scores", "topk", "attn_before_o", "attn_out", ...
/// Slow; for comparison, never for serving.
class TapSink {
 public:
  virtual ~TapSink() = default;
  /// `value` is contiguous, host memory, valid during the call. First dimension: tokens of the step
  /// (entries for "compressed").
  virtual void tap(std::string_view name, const ConstTensor& value) = 0;
};

/// Told when a named step of the layer begins and ends (on the host; the observer synchronises if
/// it wants device time).
class StepObserver {
 public:
  virtual ~StepObserver() = default;
  virtual void begin(std::string_view step) = 0;
  virtual void end(std::string_view step) = 0;
};

struct ForwardOptions {
  TapSink* taps = nullptr;
  StepObserver* observer = nullptr;
};

/// What a layer is made from.
struct AttentionArgs {
  const ModelConfig* config = nullptr;
  LayerKind kind;
  std::string name;  ///< unique within `names`: "layers.7.attn"
  const AttentionWeights* weights =
      nullptr;  ///< of the whole layer, in memory that the device reads; must outlive it
  Numerics numerics = kServing;  ///< with kv and index formats as resolved
  TensorParallel tensor_parallel;
  Device* device = nullptr;
  std::set<std::string>* names = nullptr;  ///< names taken so far; null: not checked
};

/// Caches that a layer of `kind` declares for these numerics.
std::vector<CacheSpec> attention_cache_specs(const ModelConfig& config, const LayerKind& kind,
                                             const Numerics& numerics);

/// One attention layer: weights, caches it declares, and the flow of a step. Backends derive from
/// it directly.
class DeepseekV4Attention {
 public:
  struct Layer;  ///< weights of this rank, rope frequencies, sink, geometry (attention/layer.h)
  struct Step;   ///< plan, caches and named intermediates of one step (attention/layer.h)

  virtual ~DeepseekV4Attention();
  DeepseekV4Attention(const DeepseekV4Attention&) = delete;
  DeepseekV4Attention& operator=(const DeepseekV4Attention&) = delete;

  virtual const AttentionDescriptor& descriptor() const = 0;
  std::span<const CacheSpec> cache_specs() const;
  const LayerKind& kind() const;
  const Numerics& numerics() const;
  /// Workspace that forward() borrows, for any step within `limits`. Known before the first step.
  int64_t workspace_bytes(const StepLimits& limits) const;
  /// Lets the layer fix what depends on limits only (padded head count, logits tile). Called once,
  /// before forward.
  void prepare_for(const StepLimits& limits);

  /// Attends `hidden` to the cache and to itself, and appends its KV to the cache.
  ///
  /// @param plan       of this step; the caches must belong to the pool it was updated with.
  /// @param caches     slots named by the plan are written, all others left untouched.
  /// @param hidden     [num_tokens, hidden_size] bf16 (f32 in `exact`), after attn_norm; read only.
  /// @param out        [num_tokens, hidden_size], same dtype; must not overlap `hidden`.
  /// @param workspace  at least workspace_bytes of the limits given to prepare_for.
  /// @throws Error kInvalidArgument: a shape, dtype or plan does not fit (the message names it,
  /// expected and given). Asynchronous on `stream`. Thread-compatible: one call at a time per
  /// cache. Does not allocate (taps do). Source: spec/attention.md 2; checkpoint tensors
  /// layers.N.attn.*.
  void forward(const StepPlan& plan, const LayerCaches& caches, ConstTensor hidden, Tensor out,
               Workspace workspace, Stream stream, const ForwardOptions& options = {}) const;

 protected:
  explicit DeepseekV4Attention(const AttentionArgs& args);

  /// Smallest head count >= num_heads that the kernels take; q and o have that many heads, the
  /// surplus is zero.
  virtual int padded_num_q_heads(int num_heads) const = 0;
  /// step.q, caches -> step.o [T, padded heads, head_dim].
  virtual void forward_mqa(Step& step) const = 0;
  /// step.o -> out [T, hidden_size].
  virtual void o_proj(Step& step, Tensor out) const = 0;
  /// project_in of query and KV, .. qnorm_rope_insert. Default: one operation per step name.
  virtual void prepare(Step& step) const;
  virtual void compress(Step& step) const;  ///< project_in of the gates; perhaps beside prepare()
  /// index and select: which compressed entries every token attends to -> step.topk_*.
  virtual void select(Step& step) const;

  const Layer& layer() const { return *layer_; }
  const Ops& ops() const;
  Device& device() const;

 private:
  void validate(const StepPlan& plan, const LayerCaches& caches, const ConstTensor& hidden,
                const Tensor& out) const;
  std::unique_ptr<Layer> layer_;
};

}  // namespace dsv4
