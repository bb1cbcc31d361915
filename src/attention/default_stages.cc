// The stages that a backend may fuse, one operation per step name: project_in .. qnorm_rope_insert,
// compress, index and select.
#include <algorithm>
#include <limits>
#include <vector>

#include "attention/layer.h"
#include "attention/observe.h"

namespace dsv4 {
namespace {

Tensor col_slice(const Tensor& tensor, int64_t begin, int64_t count) {
  Tensor out = tensor;
  out.data = static_cast<char*>(tensor.data) + begin * size_of(tensor.dtype);
  out.shape[1] = count;
  return out;
}

// [T, ...] -> [T, n] without changing memory.
Tensor flatten(const Tensor& tensor) {
  Tensor out(tensor.data, tensor.dtype,
             {tensor.shape[0], tensor.num_elements() / std::max<int64_t>(1, tensor.shape[0])});
  out.strides[0] = tensor.strides[0];
  return out;
}

// qnorm_rope_insert; of kv alone where attention norms the queries.
void insert(const DeepseekV4Attention::Step& step, const DeepseekV4Attention::Layer& layer,
            const Ops& ops, const OpContext& context) {
  StepScope observe(*step.options, AttentionStep::kQnormRopeInsert);
  ops.qnorm_rope_insert({.q = step.attend_norms ? Tensor{} : step.q,
                         .kv = step.kv,
                         .rope = layer.rope(),
                         .eps = layer.config.rms_norm_eps,
                         .positions = step.plan->positions,
                         .slot_mapping = step.plan->window_slot_mapping,
                         .window = step.caches->window,
                         .kv_norm = step.norms_late() ? layer.weights.kv_norm : ConstTensor{}},
                        context);
}

// project_q and qnorm_rope_insert: all queries, or those of the heads where the indexer's are
// there.
void make_queries(const DeepseekV4Attention::Step& step, const DeepseekV4Attention::Layer& layer,
                  const Ops& ops, const OpContext& context) {
  const ForwardOptions& options = *step.options;
  const AttentionWeights& weights = layer.weights;
  {
    StepScope observe(options, AttentionStep::kProjectQ);
    const Tensor q =
        col_slice(flatten(step.q), 0, int64_t{layer.num_heads} * layer.config.head_dim);
    if (layer.padded_heads > layer.num_heads) {
      const int64_t used = q.shape[1];
      ops.zero({col_slice(flatten(step.q), used, flatten(step.q).shape[1] - used)}, context);
    }
    std::array<LinearProblem, 2> problems{step.of_qr(weights.wq_b, q)};
    const bool indexer = weights.indexer && !step.inserts_beside();
    if (indexer) problems[1] = step.of_qr(weights.indexer->wq_b, flatten(step.index_q));
    project(ops, context, layer.numerics, {problems.data(), indexer ? size_t{2} : size_t{1}},
            step.scores_beside());
  }
  if (!step.inserts_kv_beside()) insert(step, layer, ops, context);
}

// The same on a branch of the step's stream, joined before attention.
void make_queries_beside(const DeepseekV4Attention::Step& step,
                         const DeepseekV4Attention::Layer& layer, const Ops& ops, Stream branch) {
  OpContext beside = step.context(ops);
  beside.stream = branch;
  beside.scratch = step.insert_scratch;
  make_queries(step, layer, ops, beside);
}

}  // namespace

void tap_tensor(const ForwardOptions& options, Device& device, Stream stream, std::string_view name,
                const ConstTensor& value) {
  if (options.taps == nullptr) return;
  const int64_t rows = value.shape[0];
  int64_t row_bytes = size_of(value.dtype);
  for (int i = 1; i < value.rank; ++i) row_bytes *= value.shape[i];
  std::vector<std::byte> host(static_cast<size_t>(rows * row_bytes));
  for (int64_t row = 0; row < rows; ++row) {
    device.copy_to_host(
        host.data() + row * row_bytes,
        static_cast<const char*>(value.data) + row * value.strides[0] * size_of(value.dtype),
        row_bytes, stream);
  }
  device.synchronize(stream);
  ConstTensor copy = value;
  copy.data = host.data();
  int64_t stride = 1;
  for (int i = value.rank - 1; i >= 0; --i) {
    copy.strides[i] = stride;
    stride *= copy.shape[i];
  }
  options.taps->tap(name, copy);
}

void DeepseekV4Attention::prepare(Step& step) const {
  const Layer& layer = *layer_;
  const AttentionWeights& weights = layer.weights;
  const ModelConfig& config = layer.config;
  const ForwardOptions& options = *step.options;
  const OpContext context = step.context(ops());
  const int64_t tokens = step.num_tokens();
  // Products that read qr norm it themselves, or all of them take codes.
  const auto all_that_read_qr = [&](auto predicate) {
    return predicate(weights.wq_b) && (!weights.indexer || predicate(weights.indexer->wq_b));
  };
  const NormedInput norm{weights.q_norm, config.rms_norm_eps};
  if (all_that_read_qr([&](const Weight& w) {
        return makes_input(ops(), layer.numerics, step.branches,
                           {.x = step.qr, .w = w, .out = {}, .input = norm});
      })) {
    step.qr_input = norm;
  }
  Arena::Scope scope(*step.scratch);
  Tensor a = step.qr;
  if (!step.norms_late()) {
    a = step.scratch->take_tensor(layer.numerics.activation, {tokens, config.q_lora_rank});
    if (config.q_lora_rank <= 4096 &&
        all_that_read_qr([&](const Weight& w) { return takes_codes(layer.numerics, w); })) {
      const InputRows codes = codes_in_place(step.qr);
      step.qr = codes.rows;
      step.qr_scale = codes.scale;
    }
  }
  {
    StepScope observe(options, AttentionStep::kProjectIn);
    const LinearProblem problems[] = {{step.hidden, weights.wq_a, a},
                                      {step.hidden, weights.wkv, step.kv}};
    project(ops(), context, layer.numerics, problems);
  }
  if (!step.norms_late()) {
    StepScope observe(options, AttentionStep::kNormQKv);
    const RmsNormParams norm_kv{
        .x = step.kv, .weight = weights.kv_norm, .eps = config.rms_norm_eps, .out = step.kv};
    ops().rms_norm({.x = a,
                    .weight = weights.q_norm,
                    .eps = config.rms_norm_eps,
                    .out = step.qr,
                    .scale = step.qr_scale,
                    .beside = &norm_kv},
                   context);
  }
  if (step.inserts_beside()) {
    // Indexer and selection want their queries first, and a launch that comes first finds room
    // first; the heads' follow beside them, from here or from select() on.
    const bool early = step.inserts_start_early();
    const Stream branch = early ? step.branches->fork(step.stream, kInsertBranch) : Stream{};
    const LinearProblem problem = step.of_qr(weights.indexer->wq_b, flatten(step.index_q));
    project(ops(), context, layer.numerics, {&problem, 1});
    if (early) make_queries_beside(step, layer, ops(), branch);
  } else {
    if (step.inserts_kv_beside()) {
      OpContext beside = context;
      beside.stream = step.branches->fork(step.stream, kInsertBranch);
      insert(step, layer, ops(), beside);
    }
    make_queries(step, layer, ops(), context);
  }
  if (options.taps == nullptr) return;
  Tensor real_heads = step.q;
  real_heads.shape[1] = layer.num_heads;
  tap_tensor(options, *layer.device, step.stream, "q", real_heads);
  tap_tensor(options, *layer.device, step.stream, "kv", step.kv);
}

void DeepseekV4Attention::compress(Step& step) const {
  const Layer& layer = *layer_;
  const ForwardOptions& options = *step.options;
  const OpContext context = step.context(ops());
  {
    StepScope observe(options, AttentionStep::kProjectIn);
    std::array<LinearProblem, 5> problems;
    size_t count = 0;
    const auto add = [&](const Weight& weight, const Tensor& out) {
      problems[count++] = {step.hidden, weight, out};
    };
    const auto add_gates = [&](const CompressorWeights& compressor, const Tensor& gates) {
      add(compressor.wkv, col_slice(gates, 0, compressor.wkv.rows));
      add(compressor.wgate, col_slice(gates, compressor.wkv.rows, compressor.wgate.rows));
    };
    add_gates(*layer.weights.compressor, step.gates);
    if (layer.weights.indexer) {
      add_gates(layer.weights.indexer->compressor, step.index_gates);
      add(layer.weights.indexer->weights_proj, step.index_weights);
    }
    project(ops(), context, layer.numerics, {problems.data(), count});
  }
  StepScope observe(options, AttentionStep::kCompress);
  Arena::Scope scope(*step.scratch);
  Tensor entries;
  if (options.taps != nullptr) {
    entries = step.scratch->take_tensor(DType::kF32, {step.num_tokens(), layer.config.head_dim});
  }
  const auto run = [&](const CompressorWeights& weights, const Tensor& gates, bool hadamard,
                       const StateView& state, const CacheView& cache, const Tensor& tap_rows) {
    ops().compress({.plan = step.plan,
                    .ratio = step.ratio,
                    .overlap = layer.kind.overlap,
                    .gates = gates,
                    .ape = weights.ape,
                    .norm = weights.norm,
                    .eps = layer.config.rms_norm_eps,
                    .rope = layer.rope(),
                    .hadamard = hadamard,
                    .activation = layer.numerics.activation,
                    .state = state,
                    .cache = cache,
                    .entries = tap_rows},
                   context);
  };
  // The indexer waits for its rows only.
  if (layer.kind.indexer) {
    run(layer.weights.indexer->compressor, step.index_gates, layer.numerics.index_hadamard,
        step.caches->index_state, step.caches->index, {});
    step.index_rows_are_enqueued();
  }
  run(*layer.weights.compressor, step.gates, false, step.caches->state, step.caches->compressed,
      entries);
  if (options.taps == nullptr) return;
  // Only the rows of tokens that complete an entry hold one.
  Device& device = *layer.device;
  std::vector<int32_t> positions(static_cast<size_t>(step.num_tokens()));
  device.copy_to_host(positions.data(), step.plan->positions,
                      step.num_tokens() * int64_t{sizeof(int32_t)}, step.stream);
  device.synchronize(step.stream);
  const int64_t width = layer.config.head_dim;
  std::vector<float> rows;
  for (int64_t t = 0; t < step.num_tokens(); ++t) {
    if ((positions[static_cast<size_t>(t)] + 1) % layer.kind.compress_ratio != 0) continue;
    rows.resize(rows.size() + static_cast<size_t>(width));
    device.copy_to_host(rows.data() + rows.size() - width, entries.as<float>() + t * width,
                        width * int64_t{sizeof(float)}, step.stream);
  }
  device.synchronize(step.stream);
  options.taps->tap("compressed", ConstTensor(rows.data(), DType::kF32,
                                              {static_cast<int64_t>(rows.size()) / width, width}));
}

void DeepseekV4Attention::select(Step& step) const {
  if (step.all_entries_visible) return;
  const Layer& layer = *layer_;
  const ForwardOptions& options = *step.options;
  const OpContext context = step.context(ops());
  const PlanView& plan = *step.plan;
  const int64_t tokens = step.num_tokens();
  const auto max_end = static_cast<int32_t>(plan.max_context / layer.kind.compress_ratio);
  {
    StepScope observe(options, AttentionStep::kIndex);
    ops().index_query({.q = step.index_q,
                       .weights = step.index_weights,
                       .rope = layer.rope(),
                       .positions = plan.positions,
                       .format = layer.numerics.index,
                       .hadamard = layer.numerics.index_hadamard,
                       .q_out = step.index_q_quantised,
                       .weights_out = step.index_weights_folded},
                      context);
  }
  if (step.inserts_beside() && !step.inserts_start_early()) {
    // Small launches of the selection come first, so that they find room; so does a large one.
    make_queries_beside(step, layer, ops(), step.branches->fork(step.stream, kInsertBranch));
  }
  const bool maps_slots = ops().top_k_maps_slots;
  const int32_t rows_per_block = step.caches->compressed.rows_per_block;
  const auto topk = static_cast<int32_t>(step.topk_indices.shape[1]);
  std::vector<float> scores;  // taps only
  for (int64_t begin = 0; begin < tokens; begin += step.logits.shape[0]) {
    const int64_t count = std::min<int64_t>(step.logits.shape[0], tokens - begin);
    Tensor logits = step.logits;
    logits.shape[0] = count;
    {
      StepScope observe(options, AttentionStep::kIndex);
      ops().index_logits({.q = step.index_q_quantised.rows(begin, count),
                          .weights = step.index_weights_folded.rows(begin, count),
                          .token_to_seq = plan.token_to_seq + begin,
                          .end = step.ratio->end + begin,
                          .max_end = max_end,
                          .blocks = plan.growing_blocks,
                          .cache = step.caches->index,
                          .logits = logits,
                          .best = options.taps == nullptr ? topk : 0},
                         context);
    }
    {
      StepScope observe(options, AttentionStep::kSelect);
      ops().top_k({.logits = logits,
                   .end = step.ratio->end + begin,
                   .topk_indices = step.topk_indices.rows(begin, count),
                   .topk_length = step.topk_length + begin,
                   .slots = maps_slots ? TopKSlots{.token_to_seq = plan.token_to_seq + begin,
                                                   .blocks = plan.growing_blocks,
                                                   .rows_per_block = rows_per_block,
                                                   .slots = step.topk_slots.rows(begin, count)}
                                       : TopKSlots{}},
                  context);
    }
    if (options.taps == nullptr) continue;
    Device& device = *layer.device;
    std::vector<int32_t> end(static_cast<size_t>(count));
    device.copy_to_host(end.data(), step.ratio->end + begin, count * int64_t{sizeof(int32_t)},
                        step.stream);
    device.synchronize(step.stream);
    for (int64_t t = 0; t < count; ++t) {
      const size_t row = scores.size();
      scores.resize(row + static_cast<size_t>(max_end), -std::numeric_limits<float>::infinity());
      device.copy_to_host(scores.data() + row, logits.as<float>() + t * logits.strides[0],
                          int64_t{end[static_cast<size_t>(t)]} * int64_t{sizeof(float)},
                          step.stream);
    }
    device.synchronize(step.stream);
  }
  if (!maps_slots) {
    StepScope observe(options, AttentionStep::kSelect);
    ops().map_slots({.topk_indices = step.topk_indices,
                     .token_to_seq = plan.token_to_seq,
                     .blocks = plan.growing_blocks,
                     .rows_per_block = rows_per_block,
                     .slots = step.topk_slots},
                    context);
  }
  if (options.taps == nullptr) return;
  options.taps->tap("index_scores", ConstTensor(scores.data(), DType::kF32, {tokens, max_end}));
  tap_tensor(options, *layer.device, step.stream, "topk", step.topk_indices);
}

}  // namespace dsv4
