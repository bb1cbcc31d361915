// The flow of a step, once for all platforms.
#include "dsv4/attention.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "attention/layer.h"
#include "attention/observe.h"
#include "checkpoint/rope.h"

namespace dsv4 {
namespace {

// Logits of one tile of tokens at the longest context stay below this; a tile has at least one
// token. 64 MiB is 16 tokens at a million tokens of context, enough to share converted keys.
constexpr int64_t kMaxLogitsBytes = int64_t{64} << 20;

}  // namespace

std::vector<CacheSpec> attention_cache_specs(const ModelConfig& config, const LayerKind& kind,
                                             const Numerics& numerics) {
  std::vector<CacheSpec> specs{
      {CacheRole::kWindow, numerics.kv, 1, config.sliding_window, config.head_dim}};
  if (kind.compress_ratio == 0) return specs;
  const int pooled = kind.pooled_tokens(), state_elems = 2 * kind.pooled_windows();
  specs.push_back({CacheRole::kCompressed, numerics.kv, kind.compress_ratio, 0, config.head_dim});
  specs.push_back(
      {CacheRole::kState, KvFormat::kStateF32, 1, pooled, state_elems * config.head_dim});
  if (kind.indexer) {
    specs.push_back(
        {CacheRole::kIndex, numerics.index, kind.compress_ratio, 0, config.index_head_dim});
    specs.push_back({CacheRole::kIndexState, KvFormat::kStateF32, 1, pooled,
                     state_elems * config.index_head_dim});
  }
  return specs;
}

InputRows codes_in_place(const Tensor& values) {
  InputRows out{values, {}};
  out.rows.dtype = DType::kF8E4M3;
  out.scale = {reinterpret_cast<float*>(static_cast<char*>(values.data) + values.num_elements()),
               row_scale_stride(values.shape[0])};
  return out;
}

bool takes_codes(const Numerics& numerics, const Weight& w) {
  return numerics.products == Products::kFp8 && w.dtype == DType::kF8E4M3 && w.cols % 128 == 0 &&
         w.block_cols == 128 && w.block_rows % 128 == 0 && w.row_stride % 16 == 0;
}

bool makes_input(const Ops& ops, const Numerics& numerics, const StreamBranches* branches,
                 const LinearProblem& problem) {
  return branches != nullptr && numerics.products == Products::kFp8 && ops.makes_input != nullptr &&
         ops.makes_input(problem);
}

void project(const Ops& ops, const OpContext& context, const Numerics& numerics,
             std::span<const LinearProblem> problems, int64_t scores_beside) {
  std::array<LinearProblem, 16> group;
  DSV4_CHECK(problems.size() <= group.size());
  for (bool quantised_weights : {true, false}) {
    size_t count = 0;
    for (const LinearProblem& problem : problems) {
      const bool is_quantised =
          problem.w.dtype == DType::kF8E4M3 || problem.w.dtype == DType::kF4E2M1;
      if (is_quantised == quantised_weights) group[count++] = problem;
    }
    if (count == 0) continue;
    ops.linear({.problems = {group.data(), count},
                .quantise_input = quantised_weights && numerics.quantise_linear_input,
                .products = numerics.products,
                .scores_beside = scores_beside},
               context);
  }
}

DeepseekV4Attention::DeepseekV4Attention(const AttentionArgs& args)
    : layer_(std::make_unique<Layer>()) {
  Layer& layer = *layer_;
  DSV4_CHECK(args.config != nullptr && args.weights != nullptr && args.device != nullptr);
  const ModelConfig& config = *args.config;
  if (args.names != nullptr && !args.names->insert(args.name).second) {
    fail(ErrorCode::kInvalidArgument, "duplicate layer: the name \"", args.name,
         "\" is already taken");
  }
  const auto [rank, size] = args.tensor_parallel;
  if (size < 1 || rank < 0 || rank >= size) {
    fail(ErrorCode::kInvalidArgument, args.name, ": tensor-parallel rank ", rank, " of ", size,
         ", expected 0 <= rank < size");
  }
  if (config.num_heads % size != 0 || config.o_groups % size != 0) {
    fail(ErrorCode::kInvalidArgument, args.name, ": ", config.num_heads, " heads and ",
         config.o_groups, " output groups must both be divisible by the tensor-parallel size ",
         size);
  }
  if (args.numerics.products == Products::kFp8 && !args.device->ops().takes_e4m3) {
    fail(ErrorCode::kUnsupported, args.name, ": fp8 products, expected f32 on ",
         args.device->description());
  }
  layer.name = args.name;
  layer.config = config;
  layer.kind = args.kind;
  layer.numerics = args.numerics;
  layer.tensor_parallel = args.tensor_parallel;
  layer.device = args.device;
  layer.branches = branches_of(*args.device);
  layer.specs = attention_cache_specs(config, args.kind, args.numerics);
  layer.num_heads = config.num_heads / size;
  layer.num_groups = config.o_groups / size;

  layer.weights = *args.weights;
  AttentionWeights& weights = layer.weights;
  const int64_t q_rows = int64_t{layer.num_heads} * config.head_dim;
  const int64_t group_rows = layer.num_groups * config.o_lora_rank;
  if (size > 1) {
    weights.wq_b = weights.wq_b.row_slice(rank * q_rows, q_rows);
    weights.wo_a = weights.wo_a.row_slice(rank * group_rows, group_rows);
    weights.wo_b = weights.wo_b.col_slice(rank * group_rows, group_rows);
    weights.attn_sink = weights.attn_sink.rows(int64_t{rank} * layer.num_heads, layer.num_heads);
  }

  const std::vector<float> frequencies = rope_frequencies(args.kind.rope, config.qk_rope_head_dim);
  const auto bytes = static_cast<int64_t>(frequencies.size() * sizeof(float));
  Device& device = *args.device;
  layer.rope_frequencies = device.allocate(bytes);
  device.copy_to_device(layer.rope_frequencies.data(), frequencies.data(), bytes,
                        device.default_stream());
  device.synchronize(device.default_stream());
}

DeepseekV4Attention::~DeepseekV4Attention() = default;

std::span<const CacheSpec> DeepseekV4Attention::cache_specs() const {
  return layer_->specs;
}
const LayerKind& DeepseekV4Attention::kind() const {
  return layer_->kind;
}
const Numerics& DeepseekV4Attention::numerics() const {
  return layer_->numerics;
}
const Ops& DeepseekV4Attention::ops() const {
  return layer_->device->ops();
}
Device& DeepseekV4Attention::device() const {
  return *layer_->device;
}

namespace {

int64_t entries_for(const LayerKind& kind, const StepLimits& limits) {
  return kind.compress_ratio == 0 ? 0 : limits.max_context / kind.compress_ratio;
}

int64_t tile_tokens_for(int64_t max_entries, const StepLimits& limits) {
  const int64_t row_bytes = std::max<int64_t>(1, max_entries) * static_cast<int64_t>(sizeof(float));
  return std::clamp<int64_t>(kMaxLogitsBytes / row_bytes, 1, limits.max_tokens);
}

}  // namespace

void DeepseekV4Attention::prepare_for(const StepLimits& limits) {
  Layer& layer = *layer_;
  if (limits.max_tokens < 1 || limits.max_seqs < 1 || limits.max_context < 1) {
    fail(ErrorCode::kInvalidArgument, layer.name, ": step limits of ", limits.max_tokens,
         " tokens, ", limits.max_seqs, " sequences, ", limits.max_context,
         " context: each must be at least 1");
  }
  layer.limits = limits;
  layer.padded_heads = padded_num_q_heads(layer.num_heads);
  DSV4_CHECK(layer.padded_heads >= layer.num_heads);
  layer.max_entries = entries_for(layer.kind, limits);
  layer.logits_tile_tokens = static_cast<int>(tile_tokens_for(layer.max_entries, limits));

  // Surplus heads get a sink of -inf: they never influence anything.
  std::vector<float> sink(static_cast<size_t>(layer.padded_heads),
                          -std::numeric_limits<float>::infinity());
  Device& device = *layer.device;
  const Stream stream = device.default_stream();
  device.copy_to_host(sink.data(), layer.weights.attn_sink.data,
                      layer.num_heads * int64_t{sizeof(float)}, stream);
  device.synchronize(stream);
  const auto bytes = static_cast<int64_t>(sink.size() * sizeof(float));
  layer.sink = device.allocate(bytes);
  device.copy_to_device(layer.sink.data(), sink.data(), bytes, stream);
  device.synchronize(stream);
}

namespace {

// The intermediates of a step, taken from `arena`; with a measuring arena this answers how much a
// step needs.
void take_intermediates(DeepseekV4Attention::Step& step, const ModelConfig& config,
                        const LayerKind& kind, const Numerics& numerics, const Ops& ops,
                        int tensor_parallel_size, int64_t tokens, int64_t max_entries,
                        int64_t tile_tokens, int64_t padded_heads, Arena& arena) {
  const DType act = numerics.activation;
  const int64_t gate_cols = 2 * kind.pooled_windows();
  step.qr = arena.take_tensor(act, {tokens, config.q_lora_rank});
  step.kv = arena.take_tensor(act, {tokens, config.head_dim});
  step.q = arena.take_tensor(act, {tokens, padded_heads, config.head_dim});
  step.o = arena.take_tensor(act, {tokens, padded_heads, config.head_dim});
  step.o_rotated =
      arena.take_tensor(act, {tokens, config.num_heads / tensor_parallel_size, config.head_dim});
  step.z =
      arena.take_tensor(act, {tokens, config.o_groups / tensor_parallel_size * config.o_lora_rank});
  if (kind.compress_ratio == 0) return;
  step.gates = arena.take_tensor(DType::kF32, {tokens, gate_cols * config.head_dim});
  if (!kind.indexer) return;
  const int64_t heads = config.index_n_heads, dim = config.index_head_dim, topk = config.index_topk;
  step.index_gates = arena.take_tensor(DType::kF32, {tokens, gate_cols * dim});
  step.index_q = arena.take_tensor(act, {tokens, heads, dim});
  const bool codes = ops.index_takes_e4m3 && numerics.index == KvFormat::kIndexFp8;
  step.index_q_quantised = arena.take_tensor(codes ? DType::kF8E4M3 : act, {tokens, heads, dim});
  step.index_weights = arena.take_tensor(act, {tokens, heads});
  step.index_weights_folded = arena.take_tensor(DType::kF32, {tokens, heads});
  step.logits = arena.take_tensor(DType::kF32, {tile_tokens, std::max<int64_t>(1, max_entries)});
  step.topk_indices = arena.take_tensor(DType::kI32, {tokens, topk});
  step.topk_slots = arena.take_tensor(DType::kI32, {tokens, topk});
  step.topk_length = arena.take_array<int32_t>(tokens);
}

// What the compressor's branch takes at most, which has scratch memory of its own.
int64_t branch_scratch_bytes(const ModelConfig& config, const LayerKind& kind,
                             const StepLimits& limits, const Ops& ops, int num_threads) {
  if (kind.compress_ratio == 0) return 0;
  ScratchLimits scratch;
  scratch.max_tokens = limits.max_tokens;
  scratch.max_cols = config.hidden_size;
  scratch.max_rows = kind.pooled_windows() * int64_t{config.head_dim};
  scratch.head_dim = config.head_dim;
  if (kind.indexer) scratch.index_dim = config.index_head_dim;
  scratch.hidden_size = config.hidden_size;
  scratch.num_threads = num_threads;
  // The tap of the entries is taken there, too.
  return ops.scratch_bytes(scratch) + Arena::kAlignment +
         limits.max_tokens * int64_t{config.head_dim} * int64_t{sizeof(float)};
}

// What the branch of the heads' queries takes at most.
int64_t insert_scratch_bytes(const ModelConfig& config, int padded_heads, const StepLimits& limits,
                             const Ops& ops, int num_threads) {
  ScratchLimits scratch;
  scratch.max_tokens = limits.max_tokens;
  scratch.max_cols = config.q_lora_rank;
  scratch.max_rows = int64_t{padded_heads} * config.head_dim;
  scratch.num_heads = padded_heads;
  scratch.head_dim = config.head_dim;
  scratch.num_threads = num_threads;
  return ops.scratch_bytes(scratch) + Arena::kAlignment;
}

}  // namespace

int64_t attention_workspace_bytes(const ModelConfig& config, const LayerKind& kind,
                                  const Numerics& numerics, const TensorParallel& tensor_parallel,
                                  int padded_heads, const StepLimits& limits, const Ops& ops,
                                  int num_threads) {
  Arena measure;
  DeepseekV4Attention::Step step;
  const int64_t entries = entries_for(kind, limits);
  take_intermediates(step, config, kind, numerics, ops, tensor_parallel.size, limits.max_tokens,
                     entries, tile_tokens_for(entries, limits), padded_heads, measure);
  // A temporary of prepare(), which lives beside an operation's own scratch.
  const int64_t temporary_bytes =
      limits.max_tokens * size_of(numerics.activation) * config.q_lora_rank;
  const int64_t group_cols = config.o_groups / tensor_parallel.size * config.o_lora_rank;
  ScratchLimits scratch;
  scratch.max_tokens = limits.max_tokens;
  scratch.max_cols =
      std::max({config.hidden_size, config.q_lora_rank, config.group_width(), group_cols});
  scratch.max_rows =
      std::max({int64_t{padded_heads} * config.head_dim, group_cols, config.hidden_size,
                int64_t{config.index_n_heads} * config.index_head_dim});
  scratch.num_heads = padded_heads;
  scratch.head_dim = config.head_dim;
  scratch.max_entries = entries;
  scratch.sliding_window = config.sliding_window;
  if (kind.indexer) {
    scratch.index_heads = config.index_n_heads;
    scratch.index_dim = config.index_head_dim;
    scratch.index_topk = config.index_topk;
  }
  scratch.hidden_size = config.hidden_size;
  scratch.num_threads = num_threads;
  return measure.peak() + temporary_bytes + ops.scratch_bytes(scratch) +
         branch_scratch_bytes(config, kind, limits, ops, num_threads) +
         (kind.indexer ? insert_scratch_bytes(config, padded_heads, limits, ops, num_threads) : 0) +
         8 * Arena::kAlignment;
}

int64_t DeepseekV4Attention::workspace_bytes(const StepLimits& limits) const {
  const Layer& layer = *layer_;
  return attention_workspace_bytes(layer.config, layer.kind, layer.numerics, layer.tensor_parallel,
                                   padded_num_q_heads(layer.num_heads), limits, ops(),
                                   layer.device->num_threads());
}

void DeepseekV4Attention::validate(const StepPlan& plan, const LayerCaches& caches,
                                   const ConstTensor& hidden, const Tensor& out) const {
  const Layer& layer = *layer_;
  const int64_t tokens = plan.view().num_tokens;
  if (layer.padded_heads == 0) {
    fail(ErrorCode::kInvalidArgument, layer.name,
         ": prepare_for(limits) must be called before forward");
  }
  if (tokens > layer.limits.max_tokens || plan.limits().max_context > layer.limits.max_context) {
    fail(ErrorCode::kInvalidArgument, layer.name, ": the plan has ", tokens,
         " tokens and contexts up to ", plan.limits().max_context, ", the layer was prepared for ",
         layer.limits.max_tokens, " and ", layer.limits.max_context);
  }
  const ConstTensor expected(nullptr, layer.numerics.activation,
                             {tokens, layer.config.hidden_size});
  for (const auto& [what, given] :
       {std::pair<const char*, ConstTensor>{"hidden", hidden}, {"out", out}}) {
    if (given.rank != 2 || given.shape != expected.shape || given.dtype != expected.dtype ||
        given.strides[1] != 1) {
      fail(ErrorCode::kInvalidArgument, layer.name, ": ", what, " is ", describe(given),
           ", expected ", describe(expected), " with contiguous rows");
    }
  }
  const auto check_cache = [&](const char* what, const CacheView& cache, KvFormat format,
                               int row_elems) {
    if (cache && cache.format == format && cache.row_elems == row_elems) return;
    fail(ErrorCode::kInvalidArgument, layer.name, ": the ", what, " cache is ",
         cache ? concat(kv_format_name(cache.format), " with rows of ", cache.row_elems)
               : std::string("missing"),
         ", expected ", kv_format_name(format), " with rows of ", row_elems);
  };
  check_cache("window", caches.window, layer.numerics.kv, layer.config.head_dim);
  if (layer.kind.compress_ratio == 0) return;
  if (plan.view().ratio(layer.kind.compress_ratio) == nullptr) {
    fail(ErrorCode::kInvalidArgument, layer.name, ": the plan has no entry for compress ratio ",
         layer.kind.compress_ratio);
  }
  check_cache("compressed", caches.compressed, layer.numerics.kv, layer.config.head_dim);
  if (layer.kind.indexer)
    check_cache("index", caches.index, layer.numerics.index, layer.config.index_head_dim);
  const auto check_state = [&](const char* what, const StateView& state, int64_t row_elems) {
    if (state && state.ring_rows >= layer.kind.pooled_tokens() && state.row_elems == row_elems)
      return;
    fail(ErrorCode::kInvalidArgument, layer.name, ": the ", what, " has ", state.ring_rows,
         " rows of ", state.row_elems, " floats, expected ", layer.kind.pooled_tokens(), " of ",
         row_elems);
  };
  check_state("compressor state", caches.state, layer.gate_cols(layer.config.head_dim));
  if (layer.kind.indexer) {
    check_state("indexer's compressor state", caches.index_state,
                layer.gate_cols(layer.config.index_head_dim));
  }
}

void DeepseekV4Attention::forward(const StepPlan& plan, const LayerCaches& caches,
                                  ConstTensor hidden, Tensor out, Workspace workspace,
                                  Stream stream, const ForwardOptions& options) const {
  validate(plan, caches, hidden, out);
  const Layer& layer = *layer_;
  const PlanView& view = plan.view();
  const int64_t tokens = view.num_tokens;
  if (tokens == 0) return;
  if (workspace.bytes > 0 && workspace.data == nullptr) {
    fail(ErrorCode::kInvalidArgument, layer.name, ": the workspace has no memory");
  }
  const int ratio = layer.kind.compress_ratio;

  Arena arena(workspace.data, workspace.bytes);
  Step step;
  step.plan = &view;
  step.ratio = ratio == 0 ? nullptr : view.ratio(ratio);
  step.caches = &caches;
  step.hidden = hidden;
  step.stream = stream;
  step.scratch = &arena;
  step.options = &options;
  take_intermediates(step, layer.config, layer.kind, layer.numerics, ops(),
                     layer.tensor_parallel.size, tokens, layer.max_entries,
                     std::min<int64_t>(layer.logits_tile_tokens, tokens), layer.padded_heads,
                     arena);
  // Scores are only needed where something is left out; taps want to see them always.
  step.all_entries_visible = layer.kind.indexer && options.taps == nullptr &&
                             view.max_context / ratio <= layer.config.index_topk;

  tap_tensor(options, *layer.device, stream, "attn_in", hidden);
  // Where the device can, steps that need nothing of each other run side by side, unless somebody
  // watches them one by one. The compressor needs nothing of the query, and nothing needs it before
  // select(), which needs the indexer's rows, or attend.
  if (options.taps == nullptr && options.observer == nullptr) step.branches = layer.branches;
  const bool forks = step.branches != nullptr && ratio != 0;
  Step compressor = step;
  Arena compressor_scratch;
  if (forks) {
    const int64_t bytes =
        branch_scratch_bytes(layer.config, layer.kind, {.max_tokens = static_cast<int>(tokens)},
                             ops(), layer.device->num_threads());
    compressor_scratch = Arena(arena.take(bytes), bytes);
    compressor.scratch = &compressor_scratch;
    compressor.stream = step.branches->fork(stream, kCompressorBranch);
  }
  Arena insert_scratch;
  if (step.inserts_beside()) {
    const int64_t bytes = insert_scratch_bytes(layer.config, layer.padded_heads,
                                               {.max_tokens = static_cast<int>(tokens)}, ops(),
                                               layer.device->num_threads());
    insert_scratch = Arena(arena.take(bytes), bytes);
    step.insert_scratch = &insert_scratch;
  }
  prepare(step);
  if (forks) {
    compressor.waits_for_index_rows = &step;
    step.has_index_rows = false;
  }
  if (ratio != 0) compress(compressor);
  if (layer.kind.indexer) {
    if (!step.has_index_rows) step.branches->join(stream, kCompressorBranch);
    select(step);
  }
  if (forks) step.branches->join(stream, kCompressorBranch);
  if (step.inserts_beside() || step.inserts_kv_beside()) step.branches->join(stream, kInsertBranch);
  {
    StepScope scope(options, AttentionStep::kAttend);
    forward_mqa(step);
  }
  {
    StepScope scope(options, AttentionStep::kProjectOut);
    o_proj(step, out);
  }
  tap_tensor(options, *layer.device, stream, "attn_before_o", step.o_rotated);
  tap_tensor(options, *layer.device, stream, "attn_out", out);
}

}  // namespace dsv4
