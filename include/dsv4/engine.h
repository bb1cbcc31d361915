// The model and its caches as one object: load, feed tokens, read logits, generate text.
#pragma once
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "dsv4/attention.h"
#include "dsv4/cache.h"
#include "dsv4/checkpoint.h"
#include "dsv4/config.h"
#include "dsv4/numerics.h"

namespace dsv4 {

class Tokenizer;

struct EngineOptions {
  std::string device = "cpu";           ///< cpu | cuda:N | rocm:N | rocm:emulated
  std::string attention_backend;        ///< empty: the platform's default
  std::string kv_cache_dtype = "auto";  ///< auto | fp8_ds_mla | bf16 | fp8 | f32
  Numerics numerics = kServing;
  int threads = 0;                  ///< CPU threads; 0: all cores
  StepLimits limits{512, 1, 4096};  ///< tokens and sequences of one step, longest sequence
  int max_logits = 0;               ///< logits rows of one step; 0: max_seqs
  int64_t total_tokens = 0;  ///< tokens of all sequences in the pool; 0: max_seqs * max_context
  int window_block_tokens = 64;
  int growing_block_tokens = 256;
  uint64_t block_shuffle_seed = 0;  ///< tests: hand out cache blocks in another order
};

/// Where a model comes from: a folder, or "formula:CONFIG[:SEED]" (weights by formula for any
/// config).
struct ModelSource {
  std::string text;
  /// @throws Error kInvalidArgument when the form is wrong.
  static ModelSource parse(const std::string& text);
  bool is_formula = false;
  std::string path;  ///< folder, or the config of a formula
  uint64_t seed = 1;
};

/// Part done of a long piece of work, for progress display: 0..1 and what is being done.
using Progress = std::function<void(double fraction, const std::string& what)>;

/// Memory of an engine by part, in bytes; the same numbers before loading (`plan_memory`) and
/// after.
struct MemoryPlan {
  struct Part {
    std::string name;  ///< "weights: experts", "caches: growing", "workspace", ...
    int64_t bytes;
  };
  std::vector<Part> parts;
  PoolUsage pool;
  int64_t total() const;
};

/// What an engine with these options would need, without loading anything.
MemoryPlan plan_memory(const ModelConfig& config, const EngineOptions& options);

/// Tokens fed to one sequence in a step.
struct Feed {
  SequenceId sequence;
  std::span<const int32_t> tokens;
  int32_t num_logits = 1;  ///< logits of the last `num_logits` of them are computed
};

/// Thread-compatible.
class Engine {
 public:
  /// @throws Error: the first fault found, before anything large is allocated where possible.
  static std::unique_ptr<Engine> load(const ModelSource& source, const EngineOptions& options,
                                      const Progress& progress = {});
  ~Engine();

  const ModelConfig& config() const;
  const EngineOptions& options() const;
  /// Null for formula models, which have none.
  const Tokenizer* tokenizer() const;
  KvCachePool& pool();
  const MemoryPlan& memory() const;
  std::string description() const;  ///< device, backend, numerics, formats

  /// @throws Error kOutOfMemory when all sequences are taken.
  SequenceId create_sequence();
  void release_sequence(SequenceId sequence);

  /// Runs one step over all feeds (within limits) and appends their tokens to the sequences.
  /// Returns logits [sum of num_logits, vocab_size] f32, in feed order, valid until the next step.
  /// @throws Error kInvalidArgument: ids outside the vocabulary, empty feeds, limits exceeded;
  /// kOutOfMemory: the pool has no room. Nothing has changed then.
  ConstTensor step(std::span<const Feed> feeds, const ForwardOptions& options = {});

 private:
  Engine();
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

/// How the next token is drawn. temperature 0: greedy, ties to the smaller id.
struct SamplingOptions {
  double temperature = 0;
  double top_p = 1;
  int top_k = 0;  ///< 0: no limit
  uint64_t seed = 0;
};

struct GenerateOptions {
  int max_new_tokens = 128;
  SamplingOptions sampling;
  bool stop_at_eos = true;
  int chunk = 0;  ///< tokens of the prompt per step; 0: as many as the limits allow
};

struct GenerateResult {
  std::vector<int32_t> tokens;  ///< new tokens; the end token is not among them
  bool stopped_at_eos = false;
  double prompt_seconds = 0;
  double generate_seconds = 0;
};

/// Feeds `prompt` (not empty) to a new sequence and draws tokens until the limit or the end token.
/// `on_token` is called with each new id; returning false stops.
GenerateResult generate(Engine& engine, std::span<const int32_t> prompt,
                        const GenerateOptions& options,
                        const std::function<bool(int32_t)>& on_token = {},
                        const Progress& progress = {});

}  // namespace dsv4
