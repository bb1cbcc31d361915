// Loading a model onto a device, and steps over several sequences.
#include "dsv4/engine.h"

#include <algorithm>
#include <charconv>
#include <filesystem>
#include <map>
#include <thread>

#include "checkpoint/bind.h"
#include "dsv4/backend.h"
#include "dsv4/tokenizer.h"
#include "engine/resolve.h"
#include "model/transformer.h"

namespace dsv4 {
namespace {

namespace fs = std::filesystem;

std::vector<std::vector<CacheSpec>> model_cache_specs(const ModelConfig& config,
                                                      const Numerics& numerics) {
  std::vector<std::vector<CacheSpec>> out;
  for (int layer = 0; layer < config.num_hidden_layers; ++layer) {
    out.push_back(attention_cache_specs(config, config.layer_kind(layer), numerics));
  }
  return out;
}

// The part of the model that a released tensor belongs to.
std::string part_of(const std::string& name) {
  if (name.starts_with("mtp.")) return "weights: multi-token prediction";
  if (name.find(".ffn.experts.") != std::string::npos) return "weights: routed experts";
  if (name.find(".ffn.") != std::string::npos) return "weights: router and shared experts";
  if (name.find(".attn.indexer.") != std::string::npos) return "weights: indexer";
  if (name.find(".attn.compressor.") != std::string::npos) return "weights: compressor";
  if (name.find(".attn.") != std::string::npos) return "weights: attention";
  if (name.find("hc_") != std::string::npos) return "weights: hyper-connections";
  if (name.starts_with("embed.") || name.starts_with("head.")) return "weights: embedding and head";
  return "weights: norms";
}

MemoryPlan memory_of(const ModelConfig& config, const ResolvedOptions& resolved) {
  MemoryPlan out;
  const auto add = [&](const std::string& name, int64_t bytes) {
    for (MemoryPlan::Part& part : out.parts) {
      if (part.name == name) {
        part.bytes += bytes;
        return;
      }
    }
    out.parts.push_back({name, bytes});
  };
  for (const ExpectedTensor& tensor : expected_tensors(config))
    add(part_of(tensor.name), tensor.num_bytes());
  const EngineOptions& options = resolved.options;
  if (resolved.descriptor->expands_wo_a && options.numerics.wo_a == WoA::kBf16) {
    add("weights: wo_a in bf16", int64_t{config.num_hidden_layers} * config.o_groups *
                                     config.o_lora_rank * config.group_width() *
                                     size_of(DType::kBf16));
  }
  out.pool = KvCachePool::plan(model_cache_specs(config, options.numerics), resolved.pool);
  add("caches: growing (compressed, index)",
      out.pool.growing_blocks * out.pool.growing_block_bytes);
  add("caches: window", out.pool.window_blocks * out.pool.window_block_bytes);
  add("caches: compressor state", out.pool.state_slots * out.pool.state_slot_bytes);
  add("step plan", StepPlan::device_bytes(config, options.limits, resolved.pool));
  add("workspace",
      model_workspace_bytes(config, options.numerics, options.limits, resolved.max_logits,
                            resolved.descriptor->padded_num_q_heads(config.num_heads),
                            resolved.device->ops(), options.threads));
  // Code, libraries, conversion tables, tokenizer: what a run of the small model holds beyond its
  // own bytes.
  constexpr int64_t kProgramBytes = 4 << 20;
  add("program", kProgramBytes);
  add("logits", resolved.max_logits * config.vocab_size * int64_t{sizeof(float)});
  return out;
}

}  // namespace

ModelSource ModelSource::parse(const std::string& text) {
  ModelSource out;
  out.text = text;
  constexpr std::string_view kPrefix = "formula:";
  if (!text.starts_with(kPrefix)) {
    out.path = text;
    if (text.empty())
      fail(ErrorCode::kInvalidArgument,
           "the model folder is empty: expected DIR or formula:CONFIG[:SEED]");
    return out;
  }
  out.is_formula = true;
  out.path = text.substr(kPrefix.size());
  const size_t colon = out.path.rfind(':');
  if (colon != std::string::npos) {
    const std::string digits = out.path.substr(colon + 1);
    const auto [end, error] =
        std::from_chars(digits.data(), digits.data() + digits.size(), out.seed);
    if (digits.empty() || error != std::errc() || end != digits.data() + digits.size()) {
      fail(ErrorCode::kInvalidArgument, "model \"", text, "\": the seed \"", digits,
           "\" is not a number, expected formula:CONFIG[:SEED]");
    }
    out.path.resize(colon);
  }
  if (out.path.empty()) {
    fail(ErrorCode::kInvalidArgument, "model \"", text,
         "\": no config, expected formula:CONFIG[:SEED]");
  }
  return out;
}

int64_t MemoryPlan::total() const {
  int64_t sum = 0;
  for (const Part& part : parts) sum += part.bytes;
  return sum;
}

MemoryPlan plan_memory(const ModelConfig& config, const EngineOptions& options) {
  return memory_of(config, resolve_options(config, options));
}

struct Engine::Impl {
  ModelConfig config;
  ResolvedOptions resolved;
  MemoryPlan memory;
  std::unique_ptr<TensorSource> source;
  std::unique_ptr<Tokenizer> tokenizer;
  std::unique_ptr<Transformer> model;
  std::unique_ptr<KvCachePool> pool;
  std::unique_ptr<StepPlan> plan;
  Buffer workspace;
  Buffer token_ids;   // [max_tokens] i32 on the device
  Buffer logit_rows;  // [max_logits] i32 on the device
  Buffer logits;      // [max_logits, vocab] f32 on the device
  std::vector<int32_t> host_ids, host_rows;
  std::vector<float> host_logits;  // devices that the host cannot read
  // Decode steps by number of tokens: the first one runs as it is, the second one is recorded.
  std::map<int64_t, std::unique_ptr<RecordedWork>> recorded_steps;

  Device& device() { return *resolved.device; }
};

Engine::Engine() : impl_(std::make_unique<Impl>()) {}
Engine::~Engine() = default;

std::unique_ptr<Engine> Engine::load(const ModelSource& source, const EngineOptions& options,
                                     const Progress& progress) {
  const auto report = [&](double fraction, const std::string& what) {
    if (progress) progress(fraction, what);
  };
  std::unique_ptr<Engine> engine(new Engine());
  Impl& impl = *engine->impl_;
  report(0.0, "config");
  impl.config = ModelConfig::load(source.path);
  const ModelConfig& config = impl.config;
  impl.resolved = resolve_options(config, options);
  impl.memory = memory_of(config, impl.resolved);
  const EngineOptions& resolved = impl.resolved.options;

  report(0.1, source.is_formula ? "making weights" : "mapping weights");
  if (source.is_formula) {
    const FormulaStorage storage = resolved.numerics.quantise_linear_input
                                       ? FormulaStorage::kReleased
                                       : FormulaStorage::kBf16Values;
    impl.source = formula_source(expected_tensors(config), source.seed, storage);
  } else {
    impl.source = open_checkpoint(source.path, config);
    const fs::path tokenizer = fs::path(source.path) / "tokenizer.json";
    if (fs::exists(tokenizer)) impl.tokenizer = Tokenizer::load(tokenizer.string());
  }
  const ModelWeights weights = bind_model(*impl.source, config);
  report(0.7, "layers");
  impl.model = std::make_unique<Transformer>(
      config, weights, resolved.numerics, impl.device(),
      [&](const AttentionArgs& args) { return create_attention(*impl.resolved.descriptor, args); });
  impl.model->prepare_for(resolved.limits);
  report(0.8, "caches");
  impl.pool =
      std::make_unique<KvCachePool>(impl.model->cache_specs(), impl.resolved.pool, impl.device());
  impl.plan =
      std::make_unique<StepPlan>(config, resolved.limits, impl.resolved.pool, impl.device());
  impl.workspace = impl.device().allocate(
      model_workspace_bytes(config, resolved.numerics, resolved.limits, impl.resolved.max_logits,
                            impl.resolved.descriptor->padded_num_q_heads(config.num_heads),
                            impl.device().ops(), resolved.threads));
  impl.token_ids = impl.device().allocate(resolved.limits.max_tokens * int64_t{sizeof(int32_t)});
  impl.logit_rows = impl.device().allocate(impl.resolved.max_logits * int64_t{sizeof(int32_t)});
  impl.logits =
      impl.device().allocate(impl.resolved.max_logits * config.vocab_size * int64_t{sizeof(float)});
  impl.host_ids.reserve(static_cast<size_t>(resolved.limits.max_tokens));
  impl.host_rows.reserve(static_cast<size_t>(impl.resolved.max_logits));
  if (!impl.device().reads_host_memory()) {
    impl.host_logits.resize(static_cast<size_t>(impl.resolved.max_logits * config.vocab_size));
  }
  report(1.0, "ready");
  return engine;
}

const ModelConfig& Engine::config() const {
  return impl_->config;
}
const EngineOptions& Engine::options() const {
  return impl_->resolved.options;
}
const Tokenizer* Engine::tokenizer() const {
  return impl_->tokenizer.get();
}
KvCachePool& Engine::pool() {
  return *impl_->pool;
}
const MemoryPlan& Engine::memory() const {
  return impl_->memory;
}

std::string Engine::description() const {
  const EngineOptions& options = impl_->resolved.options;
  return concat(impl_->resolved.device->description(), "; ", impl_->resolved.descriptor->name, ", ",
                options.numerics.str(), ", ", kv_format_name(options.numerics.kv), " cache");
}

SequenceId Engine::create_sequence() {
  const std::optional<SequenceId> sequence = impl_->pool->create();
  if (!sequence) {
    fail(ErrorCode::kOutOfMemory, "all ", impl_->resolved.pool.max_seqs,
         " sequences are in use: release one, or load with more");
  }
  return *sequence;
}

void Engine::release_sequence(SequenceId sequence) {
  impl_->pool->release(sequence);
}

ConstTensor Engine::step(std::span<const Feed> feeds, const ForwardOptions& options) {
  Impl& impl = *impl_;
  const StepLimits& limits = impl.resolved.options.limits;
  const Stream stream = impl.device().default_stream();

  // Check everything first: a refused step changes nothing.
  if (feeds.empty()) fail(ErrorCode::kInvalidArgument, "a step without sequences");
  if (static_cast<int64_t>(feeds.size()) > limits.max_seqs) {
    fail(ErrorCode::kInvalidArgument, "a step of ", feeds.size(), " sequences, the limit is ",
         limits.max_seqs);
  }
  int64_t num_tokens = 0, num_logits = 0;
  std::vector<BatchEntry> batch;
  for (const Feed& feed : feeds) {
    const auto count = static_cast<int64_t>(feed.tokens.size());
    if (count == 0)
      fail(ErrorCode::kInvalidArgument, "sequence ", feed.sequence, ": no tokens to feed");
    if (feed.num_logits < 0 || feed.num_logits > count) {
      fail(ErrorCode::kInvalidArgument, "sequence ", feed.sequence, ": logits of the last ",
           feed.num_logits, " of ", count, " tokens");
    }
    const int64_t context = impl.pool->length(feed.sequence) + count;
    if (context > limits.max_context) {
      fail(ErrorCode::kInvalidArgument, "sequence ", feed.sequence, " would hold ", context,
           " tokens, the limit is ", limits.max_context);
    }
    for (size_t i = 0; i < feed.tokens.size(); ++i) {
      if (feed.tokens[i] >= 0 && feed.tokens[i] < impl.config.vocab_size) continue;
      fail(ErrorCode::kInvalidArgument, "token id ", feed.tokens[i], " at position ",
           context - count + static_cast<int64_t>(i), ", expected 0 to ",
           impl.config.vocab_size - 1);
    }
    for (const BatchEntry& other : batch) {
      if (other.sequence == feed.sequence) {
        fail(ErrorCode::kInvalidArgument, "sequence ", feed.sequence, " occurs twice in one step");
      }
    }
    batch.push_back({feed.sequence, static_cast<int32_t>(count)});
    num_tokens += count;
    num_logits += feed.num_logits;
  }
  if (num_tokens > limits.max_tokens) {
    fail(ErrorCode::kInvalidArgument, "a step of ", num_tokens, " tokens, the limit is ",
         limits.max_tokens);
  }
  if (num_logits > impl.resolved.max_logits) {
    fail(ErrorCode::kInvalidArgument, num_logits, " rows of logits in one step, the limit is ",
         impl.resolved.max_logits);
  }
  impl.pool->reserve_step(batch);

  impl.host_ids.clear();
  impl.host_rows.clear();
  for (const Feed& feed : feeds) {
    impl.host_ids.insert(impl.host_ids.end(), feed.tokens.begin(), feed.tokens.end());
    const auto end = static_cast<int32_t>(impl.host_ids.size());
    for (int32_t row = end - feed.num_logits; row < end; ++row) impl.host_rows.push_back(row);
  }
  Device& device = impl.device();
  device.copy_to_device(impl.token_ids.data(), impl.host_ids.data(),
                        num_tokens * int64_t{sizeof(int32_t)}, stream);
  device.copy_to_device(impl.logit_rows.data(), impl.host_rows.data(),
                        num_logits * int64_t{sizeof(int32_t)}, stream);
  // One new token and its logits for every sequence: the same work at every step.
  const bool is_decode =
      num_tokens == static_cast<int64_t>(feeds.size()) && num_logits == num_tokens;
  const bool record =
      is_decode && device.can_record() && options.taps == nullptr && options.observer == nullptr;
  impl.plan->update(batch, *impl.pool, stream, 0, record);
  Tensor logits(impl.logits.data(), DType::kF32, {num_logits, impl.config.vocab_size});
  const auto forward = [&] {
    impl.model->forward(*impl.plan, *impl.pool,
                        reinterpret_cast<const int32_t*>(impl.token_ids.data()),
                        reinterpret_cast<const int32_t*>(impl.logit_rows.data()), num_logits,
                        logits, {impl.workspace.data(), impl.workspace.bytes()}, stream, options);
  };
  if (const auto [at, is_first] = record ? impl.recorded_steps.try_emplace(num_tokens)
                                         : std::pair{impl.recorded_steps.end(), true};
      is_first) {
    forward();
  } else {
    if (at->second == nullptr) at->second = device.record(stream, forward);
    at->second->launch(stream);
  }
  for (const BatchEntry& entry : batch) impl.pool->advance(entry.sequence, entry.num_tokens);
  if (!device.reads_host_memory()) {
    device.copy_to_host(impl.host_logits.data(), logits.data, logits.num_bytes(), stream);
    logits.data = impl.host_logits.data();
  }
  device.synchronize(stream);
  return logits;
}

}  // namespace dsv4
