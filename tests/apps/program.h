// Runs the built program as a user does: arguments in, exit code and both streams out.
#pragma once
#include <gtest/gtest.h>

#include <map>
#include <string>
#include <vector>

#include "checkpoint/safetensors.h"
#include "tests/checkpoint/files.h"

namespace dsv4::testing {

struct Finished {
  int exit_code = 0;  ///< as a shell says it: 128 + n after signal n
  std::string out, err;
};

struct RunOptions {
  std::map<std::string, std::string> environment;  ///< added to the test's own
  bool stderr_is_terminal = false;                 ///< else a file
  int timeout_seconds = 120;                       ///< then SIGKILL, exit code 137
};

/// Runs DSV4_CLI with `arguments`; stdin is empty, DSV4_KERNEL unset unless in `environment`.
Finished run_program(const std::vector<std::string>& arguments, const RunOptions& options = {});

inline std::string source_path(const std::string& path) {
  return std::string(DSV4_SOURCE_DIR) + "/" + path;
}
inline std::string small_model() {
  return source_path("models/tiny-shakespeare");
}

/// config.json of the small model, made smaller: what the CPU backend takes (head_dim 512), all
/// three kinds of layer, weights by formula in a fraction of a second.
inline nlohmann::json formula_config() {
  nlohmann::json config = nlohmann::json::parse(read_file(small_model() + "/config.json"));
  config["vocab_size"] = 96;
  config["hidden_size"] = 128;
  config["num_attention_heads"] = 2;
  config["o_groups"] = 1;
  config["n_routed_experts"] = 4;
  config["num_experts_per_tok"] = 2;
  config["num_hidden_layers"] = 3;
  config["num_hash_layers"] = 1;
  config["compress_ratios"] = {0, 4, 128};
  config["index_n_heads"] = 2;
  config["index_topk"] = 8;
  config["max_position_embeddings"] = 512;
  return config;
}

}  // namespace dsv4::testing
