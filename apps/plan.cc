#include <cstdio>
#include <nlohmann/json.hpp>

#include "command_line.h"
#include "core/fail.h"

namespace dsv4::cli {
namespace {

struct Options {
  CommonOptions common;
  std::string config;
  int64_t context = 0;
  int seqs = 1;
  int step_tokens = 512;
};

int run(Options& options) {
  if (options.common.model.empty() == options.config.empty()) {
    throw UsageError("give the model as -m DIR or its config as --config FILE, one of them");
  }
  if (options.context < 1)
    fail(ErrorCode::kInvalidArgument, "--ctx ", options.context, ", expected 1 or more");
  if (options.seqs < 1)
    fail(ErrorCode::kInvalidArgument, "--seqs ", options.seqs, ", expected 1 or more");
  if (options.step_tokens < 1) {
    fail(ErrorCode::kInvalidArgument, "--step-tokens ", options.step_tokens,
         ", expected 1 or more");
  }
  const std::string path =
      options.config.empty() ? ModelSource::parse(options.common.model).path : options.config;
  const ModelConfig config = ModelConfig::load(path);
  const int step_tokens = static_cast<int>(std::max<int64_t>(
      options.seqs, std::min<int64_t>(options.step_tokens, options.context * options.seqs)));
  EngineOptions engine_options =
      options.common.engine_options({step_tokens, options.seqs, options.context});
  const MemoryPlan plan = plan_memory(config, engine_options);
  const int64_t available = host_memory_bytes();
  const bool fits = plan.total() <= available;
  if (options.common.json) {
    nlohmann::json out;
    for (const MemoryPlan::Part& part : plan.parts) out["parts"][part.name] = part.bytes;
    out["total_bytes"] = plan.total();
    out["available_bytes"] = available;
    out["fits"] = fits;
    out["kv_bytes_per_token"] = plan.pool.growing_bytes_per_token;
    print_json(out);
  } else {
    std::printf("%d sequence%s of %lld tokens, steps of up to %d tokens, on %s:\n", options.seqs,
                options.seqs == 1 ? "" : "s", static_cast<long long>(options.context), step_tokens,
                options.common.device.c_str());
    for (const MemoryPlan::Part& part : plan.parts) {
      std::printf("  %-40s %16lld  %12s\n", part.name.c_str(), static_cast<long long>(part.bytes),
                  human_bytes(static_cast<double>(part.bytes)).c_str());
    }
    std::printf("  %-40s %16lld  %12s of %s\n", "total", static_cast<long long>(plan.total()),
                human_bytes(static_cast<double>(plan.total())).c_str(),
                human_bytes(static_cast<double>(available)).c_str());
    std::printf("  growing caches: %.1f bytes a token\n", plan.pool.growing_bytes_per_token);
  }
  if (!fits) {
    fail(ErrorCode::kOutOfMemory, "does not fit: ", human_bytes(static_cast<double>(plan.total())),
         " needed, ", options.common.device, " has ", human_bytes(static_cast<double>(available)));
  }
  return 0;
}

}  // namespace

Command add_plan(CLI::App& app) {
  CLI::App* command = app.add_subcommand(
      "plan", "What fits: weights, caches and workspace, without loading anything");
  auto options = std::make_shared<Options>();
  add_common_options(*command, options->common, ModelOption::kOptional);
  command->add_option("--config", options->config, "config.json instead of a model folder");
  check_number<int64_t>(command->add_option("--ctx", options->context,
                                            "Tokens of each sequence, prompt and answer together"))
      ->required();
  check_number<int>(command->add_option("--seqs", options->seqs, "Sequences at once"))
      ->capture_default_str();
  check_number<int>(
      command->add_option("--step-tokens", options->step_tokens, "Tokens of one step at most"))
      ->capture_default_str();
  command->footer(
      "Exit code 1 when it does not fit.\n"
      "Examples:\n"
      "  dsv4 plan -m models/tiny-shakespeare --ctx 4096 --seqs 8\n"
      "  dsv4 plan --config configs/v4-flash.json --ctx 1048576 --json");
  return {command, [options] { return run(*options); }};
}

}  // namespace dsv4::cli
