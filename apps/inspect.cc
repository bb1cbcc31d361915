#include <cstdio>
#include <filesystem>
#include <map>
#include <nlohmann/json.hpp>

#include "command_line.h"
#include "core/fail.h"

namespace dsv4::cli {
namespace {

struct Options {
  CommonOptions common;
};

// Bytes of a cache row, its share of the block's scales included.
double bytes_per_row(const CacheSpec& spec) {
  constexpr int64_t kRows = 1024;
  return static_cast<double>(page_bytes(spec.format, kRows, spec.row_elems)) / kRows;
}

int run(Options& options) {
  const ModelSource source = ModelSource::parse(options.common.model);
  const ModelConfig config = ModelConfig::load(source.path);
  const EngineOptions engine_options = options.common.engine_options({1, 1, 1});
  const bool has_weights =
      !source.is_formula && std::filesystem::is_directory(source.path) &&
      (std::filesystem::exists(source.path + "/model.safetensors.index.json") ||
       std::filesystem::exists(source.path + "/model.safetensors"));
  if (has_weights) open_checkpoint(source.path, config);  // checks every tensor against the table

  const std::vector<ExpectedTensor> tensors = expected_tensors(config);
  int64_t total = 0;
  for (const ExpectedTensor& tensor : tensors) total += tensor.num_bytes();
  const MemoryPlan plan = plan_memory(config, engine_options);

  // Layer kinds and what a token of each costs.
  struct Kind {
    int layers = 0;
    double growing_per_token = 0;
    double constant = 0;
  };
  std::map<std::string, Kind> kinds;
  double growing_per_token = 0;
  for (int layer = 0; layer < config.num_hidden_layers; ++layer) {
    const LayerKind layer_kind = config.layer_kind(layer);
    Kind& kind = kinds[layer_kind.name()];
    kind.growing_per_token = kind.constant = 0;
    for (const CacheSpec& spec :
         attention_cache_specs(config, layer_kind, engine_options.numerics)) {
      const double bytes = bytes_per_row(spec) / spec.tokens_per_row;
      (spec.keep_tokens == 0 ? kind.growing_per_token : kind.constant) +=
          spec.keep_tokens == 0 ? bytes : bytes * spec.keep_tokens;
    }
    ++kind.layers;
    growing_per_token += kind.growing_per_token;
  }

  if (options.common.json) {
    nlohmann::json out;
    out["layers"] = config.num_hidden_layers;
    out["hidden_size"] = config.hidden_size;
    out["num_attention_heads"] = config.num_heads;
    out["tensors"] = tensors.size();
    out["weight_bytes"] = total;
    out["weights_checked"] = has_weights;
    for (const MemoryPlan::Part& part : plan.parts) {
      if (part.name.starts_with("weights")) out["parts"][part.name.substr(9)] = part.bytes;
    }
    for (const auto& [name, kind] : kinds) {
      out["kinds"][name] = {{"layers", kind.layers},
                            {"kv_bytes_per_token", kind.growing_per_token},
                            {"constant_bytes_per_sequence", kind.constant}};
    }
    out["kv_bytes_per_token"] = growing_per_token;
    print_json(out);
    return 0;
  }
  std::printf("%s\n", source.text.c_str());
  std::printf(
      "  layers %d, hidden %lld, %d heads of %d (%d rotated), q rank %lld, %d output groups of "
      "rank %lld\n",
      config.num_hidden_layers, static_cast<long long>(config.hidden_size), config.num_heads,
      config.head_dim, config.qk_rope_head_dim, static_cast<long long>(config.q_lora_rank),
      config.o_groups, static_cast<long long>(config.o_lora_rank));
  std::printf(
      "  experts %d (%d a token, %d shared) of width %lld; vocabulary %lld; indexer %d x %d, top-k "
      "%d\n",
      config.n_routed_experts, config.num_experts_per_tok, config.n_shared_experts,
      static_cast<long long>(config.moe_intermediate_size),
      static_cast<long long>(config.vocab_size), config.index_n_heads, config.index_head_dim,
      config.index_topk);
  std::printf("\nweights: %zu tensors, %lld bytes (%s)%s\n", tensors.size(),
              static_cast<long long>(total), human_bytes(static_cast<double>(total)).c_str(),
              has_weights ? ", every tensor checked against the table"
                          : ", not read: this is what the config asks for");
  for (const MemoryPlan::Part& part : plan.parts) {
    if (!part.name.starts_with("weights")) continue;
    std::printf("  %-32s %12s\n", part.name.substr(9).c_str(),
                human_bytes(static_cast<double>(part.bytes)).c_str());
  }
  std::printf("\ncaches (%s):\n  %-8s %6s  %18s  %20s\n", engine_options.numerics.name.data(),
              "kind", "layers", "bytes a token", "bytes a sequence");
  for (const auto& [name, kind] : kinds) {
    std::printf("  %-8s %6d  %18.2f  %20.0f\n", name.c_str(), kind.layers, kind.growing_per_token,
                kind.constant);
  }
  std::printf("  all layers: %.1f bytes a token (window and state are constant per sequence)\n",
              growing_per_token);
  return 0;
}

}  // namespace

Command add_inspect(CLI::App& app) {
  CLI::App* command = app.add_subcommand(
      "inspect", "Config, tensors checked against the table, bytes per part, KV bytes per token");
  auto options = std::make_shared<Options>();
  add_common_options(*command, options->common, ModelOption::kRequired);
  command->footer(
      "Examples:\n"
      "  dsv4 inspect -m models/tiny-shakespeare\n"
      "  dsv4 inspect -m formula:configs/v4-pro.json --json");
  return {command, [options] { return run(*options); }};
}

}  // namespace dsv4::cli
