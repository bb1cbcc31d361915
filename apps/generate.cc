#include <cstdio>
#include <nlohmann/json.hpp>

#include "command_line.h"
#include "core/fail.h"
#include "dsv4/tokenizer.h"
#include "engine/sampler.h"

namespace dsv4::cli {
namespace {

struct Options {
  CommonOptions common;
  PromptOptions prompt;
  GenerateOptions generate;
  bool stats = false;
};

int run(Options& options) {
  const ModelSource source = ModelSource::parse(options.common.model);
  const ModelConfig config = ModelConfig::load(source.path);
  const std::vector<int32_t> prompt = read_prompt(options.prompt, config, options.common.model);
  if (options.generate.max_new_tokens < 0) {
    fail(ErrorCode::kInvalidArgument, "-n ", options.generate.max_new_tokens,
         ", expected 0 or more");
  }
  const Sampler checked(options.generate.sampling);  // bad options are refused before loading
  constexpr int64_t kMaxStepTokens = 512;
  const auto length = static_cast<int64_t>(prompt.size());
  StepLimits limits;
  limits.max_tokens = static_cast<int>(std::min(length, kMaxStepTokens));
  limits.max_seqs = 1;
  limits.max_context = length + options.generate.max_new_tokens;

  const EngineOptions engine_options = options.common.engine_options(limits);
  check_model_fits(source, config, engine_options, 0);
  ProgressLine line;
  const Progress progress = line.callback();
  const std::unique_ptr<Engine> engine = Engine::load(source, engine_options, progress);
  const Tokenizer* tokenizer = engine->tokenizer();
  const bool stream = !options.common.json;
  std::optional<StreamDecoder> decoder;
  if (tokenizer != nullptr) decoder.emplace(*tokenizer);
  std::string text;
  const auto emit = [&](const std::string& piece) {
    text += piece;
    if (!stream) return;
    std::fputs(piece.c_str(), stdout);
    std::fflush(stdout);
  };
  const GenerateResult result = generate(
      *engine, prompt, options.generate,
      [&](int32_t token) {
        emit(decoder ? decoder->push(token) : concat(token, " "));
        return true;
      },
      progress);
  if (decoder) emit(decoder->finish());

  const double new_tokens = static_cast<double>(result.tokens.size());
  const double prompt_rate = static_cast<double>(length) / std::max(result.prompt_seconds, 1e-9);
  const double rate = new_tokens / std::max(result.generate_seconds, 1e-9);
  if (options.common.json) {
    nlohmann::json out;
    out["prompt_ids"] = prompt;
    out["ids"] = result.tokens;
    if (tokenizer != nullptr) out["text"] = text;
    out["stopped_at_eos"] = result.stopped_at_eos;
    out["timings"] = {{"prompt_seconds", result.prompt_seconds},
                      {"prompt_tokens_per_second", prompt_rate},
                      {"generate_seconds", result.generate_seconds},
                      {"generate_tokens_per_second", rate}};
    print_json(out);
    return 0;
  }
  std::fputs("\n", stdout);
  if (options.stats) {
    std::fprintf(
        stderr,
        "%s\nprompt: %lld tokens in %.3f s (%.1f/s); generated: %zu tokens in %.3f s (%.1f/s)\n",
        engine->description().c_str(), static_cast<long long>(length), result.prompt_seconds,
        prompt_rate, result.tokens.size(), result.generate_seconds, rate);
  }
  return 0;
}

}  // namespace

Command add_generate(CLI::App& app) {
  CLI::App* command = app.add_subcommand("generate", "Continue a prompt, streaming text");
  auto options = std::make_shared<Options>();
  add_common_options(*command, options->common, ModelOption::kRequired);
  add_prompt_options(*command, options->prompt);
  GenerateOptions& generate = options->generate;
  check_number<int>(
      command->add_option("-n,--num-tokens", generate.max_new_tokens, "New tokens at most"))
      ->capture_default_str();
  check_number<double>(
      command->add_option("--temp", generate.sampling.temperature, "Temperature; 0 is greedy"))
      ->capture_default_str();
  check_number<double>(command->add_option("--top-p", generate.sampling.top_p,
                                           "Keep the likeliest tokens up to this mass, in (0, 1]"))
      ->capture_default_str();
  check_number<int>(command->add_option("--top-k", generate.sampling.top_k,
                                        "Keep this many likeliest tokens; 0: all"))
      ->capture_default_str();
  check_number<uint64_t>(
      command->add_option("--seed", generate.sampling.seed,
                          "Seed of the draws; the same seed gives the same text"))
      ->capture_default_str();
  command->add_flag("--stats", options->stats, "Print device, kernels and speeds to stderr");
  command->footer(
      "Text goes to stdout as it is made; progress goes to stderr, only when that is a terminal.\n"
      "--json prints prompt_ids, ids, text, stopped_at_eos and timings instead.\n"
      "Examples:\n"
      "  dsv4 generate -m models/tiny-shakespeare -p 'JULIET:' -n 60 --stats\n"
      "  dsv4 generate -m models/tiny-shakespeare -p 'JULIET:' --temp 0.8 --top-p 0.9 --seed 7\n"
      "  dsv4 generate -m formula:models/tiny-shakespeare:1 --ids prompt.json -n 4 --json");
  return {command, [options] { return run(*options); }};
}

}  // namespace dsv4::cli
