// Folders and files for tests of readers: temporary directories, raw safetensors files that may be
// wrong on purpose, and small checkpoints in released and transformers naming.
#pragma once
#include <gtest/gtest.h>
#include <unistd.h>

#include <cstring>
#include <filesystem>
#include <fstream>
#include <functional>
#include <map>
#include <string>
#include <vector>

#include <nlohmann/json.hpp>

#include "core/numbers.h"
#include "dsv4/checkpoint.h"
#include "dsv4/error.h"

namespace dsv4::testing {

class TempDir {
 public:
  TempDir() {
    std::string pattern = (std::filesystem::temp_directory_path() / "dsv4_test_XXXXXX").string();
    if (::mkdtemp(pattern.data()) == nullptr) throw std::runtime_error("no temporary folder");
    path_ = pattern;
  }
  ~TempDir() {
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
  }
  TempDir(const TempDir&) = delete;
  TempDir& operator=(const TempDir&) = delete;
  const std::string& path() const { return path_; }
  std::string file(const std::string& name) const { return path_ + "/" + name; }

 private:
  std::string path_;
};

inline void write_file(const std::string& path, const std::string& bytes) {
  std::ofstream out(path, std::ios::binary);
  out << bytes;
  ASSERT_TRUE(out.good()) << path;
}
inline std::string read_file(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(in), {}};
}

/// A file with this header text and data, whatever they are.
inline std::string raw_safetensors(const std::string& header, const std::string& data) {
  std::string out(8, '\0');
  const uint64_t length = header.size();
  std::memcpy(out.data(), &length, 8);
  return out + header + data;
}

/// Runs `f` and expects an Error of `code` whose message holds every one of `parts`.
inline void expect_error(ErrorCode code, const std::vector<std::string>& parts,
                         const std::function<void()>& f) {
  try {
    f();
    ADD_FAILURE() << "expected an error, given none";
  } catch (const Error& error) {
    EXPECT_STREQ(error_code_name(error.code()), error_code_name(code)) << error.what();
    for (const std::string& part : parts) {
      EXPECT_NE(std::string(error.what()).find(part), std::string::npos)
          << "expected in the message: " << part << "\ngiven: " << error.what();
    }
  }
}

/// A tensor as a file stores it.
struct StoredTensor {
  std::string dtype;
  std::vector<int64_t> shape;
  std::string bytes;
};
using StoredTensors = std::map<std::string, StoredTensor>;

/// Writes a valid file; an independent writer, so that reader and writer cannot agree on a fault.
inline void write_tensors(const std::string& path, const StoredTensors& tensors) {
  nlohmann::json header = nlohmann::json::object();
  std::string data;
  for (const auto& [name, tensor] : tensors) {
    header[name] = {{"dtype", tensor.dtype},
                    {"shape", tensor.shape},
                    {"data_offsets", {data.size(), data.size() + tensor.bytes.size()}}};
    data += tensor.bytes;
  }
  write_file(path, raw_safetensors(header.dump(), data));
}

/// Splits `tensors` over `num_files` files with an index.
inline void write_sharded(const std::string& directory, const StoredTensors& tensors,
                          int num_files) {
  std::vector<StoredTensors> shards(static_cast<size_t>(num_files));
  nlohmann::json map = nlohmann::json::object();
  size_t next = 0;
  for (const auto& [name, tensor] : tensors) {
    const size_t shard = next++ % shards.size();
    shards[shard][name] = tensor;
    map[name] = "shard" + std::to_string(shard) + ".safetensors";
  }
  for (size_t i = 0; i < shards.size(); ++i) {
    write_tensors(directory + "/shard" + std::to_string(i) + ".safetensors", shards[i]);
  }
  write_file(directory + "/model.safetensors.index.json",
             nlohmann::json{{"weight_map", map}}.dump());
}

/// All three layer kinds, hash and score routing, one MTP layer: 15 thousand values.
inline nlohmann::json small_config_json() {
  return nlohmann::json::parse(R"({
    "model_type": "deepseek_v4", "vocab_size": 24, "hidden_size": 64, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 64, "qk_rope_head_dim": 16,
    "q_lora_rank": 48, "o_lora_rank": 128, "o_groups": 2, "sliding_window": 8,
    "compress_ratios": [0, 4, 128, 0], "compress_rope_theta": 160000, "rope_theta": 10000,
    "rope_scaling": {"type": "yarn", "factor": 16, "beta_fast": 32, "beta_slow": 1,
                     "original_max_position_embeddings": 65536},
    "max_position_embeddings": 4096, "index_n_heads": 2, "index_head_dim": 32, "index_topk": 4,
    "n_routed_experts": 3, "n_shared_experts": 1, "num_experts_per_tok": 2,
    "moe_intermediate_size": 32, "num_hash_layers": 1, "scoring_func": "sqrtsoftplus",
    "topk_method": "noaux_tc", "norm_topk_prob": true, "routed_scaling_factor": 1.5,
    "swiglu_limit": 10.0, "hidden_act": "silu", "hc_mult": 2, "hc_sinkhorn_iters": 3,
    "hc_eps": 1e-6, "rms_norm_eps": 1e-6, "num_nextn_predict_layers": 1, "expert_dtype": "fp4",
    "quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "scale_fmt": "ue8m0",
                            "activation_scheme": "dynamic", "weight_block_size": [128, 128]},
    "bos_token_id": 0, "eos_token_id": 1})");
}
inline ModelConfig small_config() {
  return ModelConfig::parse(small_config_json().dump(), "config.json");
}

inline std::string bytes_of(const ConstTensor& tensor) {
  return {static_cast<const char*>(tensor.data), static_cast<size_t>(tensor.num_bytes())};
}
inline const char* stored_dtype_name(DType dtype) {
  switch (dtype) {
    case DType::kF32:
      return "F32";
    case DType::kBf16:
      return "BF16";
    case DType::kF8E4M3:
      return "F8_E4M3";
    case DType::kF8E8M0:
      return "F8_E8M0";
    case DType::kF4E2M1:
      return "I8";
    case DType::kI64:
      return "I64";
    case DType::kI32:
      return "I32";
    case DType::kU8:
      return "U8";
  }
  return "";
}
inline StoredTensor stored(const ConstTensor& tensor) {
  return {stored_dtype_name(tensor.dtype),
          {tensor.shape.begin(), tensor.shape.begin() + tensor.rank},
          bytes_of(tensor)};
}

/// Every tensor that `source` has of the config's table, under released names.
inline StoredTensors tensors_of(const TensorSource& source, const ModelConfig& config) {
  StoredTensors out;
  for (const ExpectedTensor& tensor : expected_tensors(config)) {
    if (source.contains(tensor.name)) out[tensor.name] = stored(source.get(tensor.name));
  }
  return out;
}
inline StoredTensors small_checkpoint(FormulaStorage storage = FormulaStorage::kReleased) {
  const ModelConfig config = small_config();
  return tensors_of(*formula_source(expected_tensors(config), 7, storage), config);
}

/// Opens `tensors` as the single file of a checkpoint of small_config().
inline std::unique_ptr<TensorSource> open_small(const TempDir& dir, const StoredTensors& tensors) {
  write_tensors(dir.file("model.safetensors"), tensors);
  return open_checkpoint(dir.path(), small_config());
}

/// UE8M0 bytes as the floats that they stand for.
inline StoredTensor scales_to_f32(const StoredTensor& e8m0) {
  StoredTensor out{"F32", e8m0.shape, ""};
  for (char byte : e8m0.bytes) {
    const float value = e8m0_to_f32(static_cast<uint8_t>(byte));
    out.bytes.append(reinterpret_cast<const char*>(&value), sizeof(value));
  }
  return out;
}

}  // namespace dsv4::testing
