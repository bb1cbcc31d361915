// What all commands share: common options, reading ids, printing JSON, progress on a terminal.
#pragma once
#include <CLI/CLI.hpp>
#include <functional>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <vector>

#include "dsv4/engine.h"

namespace dsv4::cli {

/// Wrong usage found after parsing: exit code 2.
class UsageError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

struct CommonOptions {
  std::string model;
  std::string device = "cpu";
  bool device_given = false;
  std::string attention_backend;
  std::string kv_cache_dtype = "auto";
  std::string numerics = "serving";
  std::string products = "f32";
  int threads = 0;
  bool threads_given = false;
  bool json = false;

  /// Engine options for `limits`; checks words and threads. @throws Error kInvalidArgument.
  EngineOptions engine_options(const StepLimits& limits) const;
};

/// Makes `option` refuse text that is not a number of type Number, written out in full: CLI11
/// itself takes "" for 0, wraps "-1" to 2^64 - 1 and clamps what is too large. Returns `option`.
template <typename Number>
CLI::Option* check_number(CLI::Option* option);

enum class ModelOption { kRequired, kOptional, kNone };
/// Adds -m, --device, --attention-backend, --kv-cache-dtype, --numerics, --products, --threads,
/// --json to a command.
void add_common_options(CLI::App& command, CommonOptions& options, ModelOption model);

/// A prompt given as text or as ids; exactly one of them.
struct PromptOptions {
  std::string text;
  std::string ids_file;
  bool text_given = false;
};
void add_prompt_options(CLI::App& command, PromptOptions& options);
/// Token ids of the prompt: a JSON array as it is, or the begin token and the encoded text.
/// @throws Error kInvalidArgument: no tokenizer, an empty array, ids that are no integers or
/// outside the vocabulary; kNotFound: a file that cannot be read.
std::vector<int32_t> read_prompt(const PromptOptions& options, const ModelConfig& config,
                                 const std::string& model);

/// Refuses a path that write_safetensors() could not write to, before any work is done for it.
/// @param option  name for the message: "--out". @throws Error kInvalidArgument.
void check_output(const std::string& option, const std::string& path);

/// Physical memory of this machine.
int64_t host_memory_bytes();
/// Refuses what needs more than the machine has, instead of being killed half way.
/// @param what  for the message: "the model", "the logits". @throws Error kOutOfMemory.
void check_fits(double bytes, const std::string& what);
/// The same for a model: its weights count only where they are made (formula), not where they are
/// mapped from files; `extra_bytes` are what the command keeps beside it.
void check_model_fits(const ModelSource& source, const ModelConfig& config,
                      const EngineOptions& options, double extra_bytes);

/// Writes a progress line to stderr, only when that is a terminal.
class ProgressLine {
 public:
  ProgressLine();
  ~ProgressLine();
  Progress callback();

 private:
  void clear();
  bool enabled_;
  size_t width_ = 0;
};

/// "1.5 GB", "12.0 kB"; SI units.
std::string human_bytes(double bytes);

/// Prints JSON with a final newline; invalid UTF-8 becomes U+FFFD.
void print_json(const nlohmann::json& value);

// One function per command: adds itself to `app`; the returned action runs it and gives the exit
// code.
using Action = std::function<int()>;
struct Command {
  CLI::App* app;
  Action run;
};
Command add_generate(CLI::App& app);
Command add_logits(CLI::App& app);
Command add_attention(CLI::App& app);
Command add_inspect(CLI::App& app);
Command add_plan(CLI::App& app);
Command add_backends(CLI::App& app);
Command add_tokenize(CLI::App& app);
Command add_bench(CLI::App& app);

}  // namespace dsv4::cli
