// config.json -> ModelConfig. Every field is read through `FieldReader`, which notes problems
// instead of throwing, so that one error lists them all.
#include "dsv4/config.h"

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <limits>
#include <set>

#include <nlohmann/json.hpp>

#include "checkpoint/mapped_file.h"
#include "checkpoint/problems.h"
#include "checkpoint/strict_json.h"
#include "core/fail.h"

namespace dsv4 {
namespace {

using nlohmann::json;

// Bounds far above every known model: products of any four of them fit int64_t, and a hostile file
// cannot ask for more tensors than memory holds names for.
constexpr int64_t kMaxWidth = int64_t{1} << 20;
constexpr int64_t kMaxVocab = int64_t{1} << 24;
constexpr int64_t kMaxLayers = 512;
constexpr int64_t kMaxExperts = 4096;
constexpr int64_t kMaxAllExperts = int64_t{1} << 18;                  // of all layers together
constexpr int64_t kMaxContext = std::numeric_limits<int32_t>::max();  // positions are int32
constexpr int64_t kMaxMtpLayers = 8;
/// Entries of compress_ratios after the main layers that released files are known to carry.
constexpr int64_t kMaxTrailingRatios = 3;

class FieldReader {
 public:
  FieldReader(const json& object, std::string prefix, Problems& problems)
      : object_(object), prefix_(std::move(prefix)), problems_(problems) {}

  /// Null counts as absent, as in the files of Python programs.
  const json* find(const char* name) const {
    const auto it = object_.find(name);
    return it == object_.end() || it->is_null() ? nullptr : &*it;
  }

  template <typename Int>
  void integer(const char* name, Int& out, int64_t low, int64_t high) {
    if (find(name) == nullptr) return missing(name, concat("an integer from ", low, " to ", high));
    optional_integer(name, out, low, high);
  }
  template <typename Int>
  void optional_integer(const char* name, Int& out, int64_t low, int64_t high) {
    const json* value = find(name);
    if (value == nullptr) return;
    const std::optional<int64_t> given = as_integer(*value);
    if (!given || *given < low || *given > high) {
      return wrong(name, concat("an integer from ", low, " to ", high), *value);
    }
    out = static_cast<Int>(*given);
  }

  template <typename Real>
  void real(const char* name, Real& out, double low, double high) {
    if (find(name) == nullptr) return missing(name, concat("a number from ", low, " to ", high));
    optional_real(name, out, low, high);
  }
  template <typename Real>
  void optional_real(const char* name, Real& out, double low, double high) {
    const json* value = find(name);
    if (value == nullptr) return;
    // Written so that NaN fails too.
    if (!value->is_number() || !(value->get<double>() >= low && value->get<double>() <= high)) {
      return wrong(name, concat("a number from ", low, " to ", high), *value);
    }
    out = static_cast<Real>(value->get<double>());
  }

  /// A field that this code has one answer to: absent, or exactly `expected`.
  void only(const char* name, const json& expected) {
    const json* value = find(name);
    if (value == nullptr || *value == expected) return;
    wrong(name, excerpt(expected), *value);
  }

  static std::optional<int64_t> as_integer(const json& value) {
    if (value.is_number_unsigned()) {
      const uint64_t given = value.get<uint64_t>();
      if (given > static_cast<uint64_t>(std::numeric_limits<int64_t>::max())) return std::nullopt;
      return static_cast<int64_t>(given);
    }
    if (value.is_number_integer()) return value.get<int64_t>();
    // Whole floats (1e6) are integers that another program printed.
    if (value.is_number_float()) {
      const double given = value.get<double>();
      if (std::abs(given) <= 9007199254740992.0 && given == std::floor(given)) {
        return static_cast<int64_t>(given);
      }
    }
    return std::nullopt;
  }

  void missing(const char* name, const std::string& expected) {
    problems_.add(ErrorCode::kInvalidArgument, prefix_, name, ": missing, expected ", expected);
  }
  void wrong(const char* name, const std::string& expected, const json& given) {
    problems_.add(ErrorCode::kInvalidArgument, prefix_, name, ": expected ", expected, ", given ",
                  excerpt(given));
  }

 private:
  const json& object_;
  std::string prefix_;
  Problems& problems_;
};

void read_sizes(FieldReader& fields, ModelConfig& config) {
  fields.integer("vocab_size", config.vocab_size, 1, kMaxVocab);
  fields.integer("hidden_size", config.hidden_size, 1, kMaxWidth);
  fields.integer("num_hidden_layers", config.num_hidden_layers, 1, kMaxLayers);
  fields.integer("num_attention_heads", config.num_heads, 1, 1024);
  fields.integer("head_dim", config.head_dim, 2, 8192);
  fields.integer("qk_rope_head_dim", config.qk_rope_head_dim, 2, 8192);
  fields.integer("q_lora_rank", config.q_lora_rank, 1, kMaxWidth);
  fields.integer("o_lora_rank", config.o_lora_rank, 1, kMaxWidth);
  fields.integer("o_groups", config.o_groups, 1, 1024);
  fields.integer("sliding_window", config.sliding_window, 1, kMaxWidth);
  fields.integer("max_position_embeddings", config.max_position_embeddings, 1, kMaxContext);
  fields.integer("n_routed_experts", config.n_routed_experts, 1, kMaxExperts);
  config.n_shared_experts = 1;
  fields.optional_integer("n_shared_experts", config.n_shared_experts, 0, 1);
  fields.integer("num_experts_per_tok", config.num_experts_per_tok, 1, 64);
  fields.integer("moe_intermediate_size", config.moe_intermediate_size, 1, kMaxWidth);
  fields.integer("num_hash_layers", config.num_hash_layers, 0, kMaxLayers);
  fields.integer("hc_mult", config.hc_mult, 1, 16);
  fields.integer("hc_sinkhorn_iters", config.hc_sinkhorn_iters, 1, 1000);
  fields.optional_integer("num_nextn_predict_layers", config.num_nextn_predict_layers, 0,
                          kMaxMtpLayers);
  fields.real("hc_eps", config.hc_eps, 0, 0.1);
  fields.real("rms_norm_eps", config.rms_norm_eps, 1e-20, 0.1);
  fields.real("routed_scaling_factor", config.routed_scaling_factor, 1e-6, 1e6);
  fields.optional_real("swiglu_limit", config.swiglu_limit, 0, 1e30);
  fields.optional_integer("bos_token_id", config.bos_token_id, 0, kMaxVocab);
  fields.optional_integer("eos_token_id", config.eos_token_id, 0, kMaxVocab);
}

/// Fields whose other values would mean another model.
void check_fixed_choices(FieldReader& fields) {
  fields.only("model_type", "deepseek_v4");
  fields.only("num_key_value_heads", 1);
  fields.only("scoring_func", "sqrtsoftplus");
  fields.only("topk_method", "noaux_tc");
  fields.only("norm_topk_prob", true);
  fields.only("hidden_act", "silu");
  fields.only("tie_word_embeddings", false);
  fields.only("attention_bias", false);
}

void read_rope(FieldReader& fields, ModelConfig& config, Problems& problems) {
  fields.real("rope_theta", config.rope_theta, 1.0001, 1e12);
  config.compress_rope_theta = config.rope_theta;
  fields.real("compress_rope_theta", config.compress_rope_theta, 1.0001, 1e12);
  const json* scaling = fields.find("rope_scaling");
  if (scaling == nullptr) return;
  if (!scaling->is_object()) return fields.wrong("rope_scaling", "an object or null", *scaling);
  FieldReader inner(*scaling, "rope_scaling.", problems);
  inner.only("type", "yarn");
  inner.only("rope_type", "yarn");
  if (inner.find("type") == nullptr && inner.find("rope_type") == nullptr) {
    inner.missing("type", "\"yarn\"");
  }
  inner.real("factor", config.rope_factor, 1, 1e6);
  inner.optional_real("beta_fast", config.rope_beta_fast, 1e-6, 1e6);
  inner.optional_real("beta_slow", config.rope_beta_slow, 1e-6, 1e6);
  inner.integer("original_max_position_embeddings", config.rope_original_max_position, 1,
                kMaxContext);
  if (config.rope_beta_fast < config.rope_beta_slow) {
    problems.add(ErrorCode::kInvalidArgument,
                 "rope_scaling.beta_fast: expected at least beta_slow = ", config.rope_beta_slow,
                 ", given ", config.rope_beta_fast);
  }
}

void read_ratios(FieldReader& fields, ModelConfig& config, Problems& problems) {
  const json* ratios = fields.find("compress_ratios");
  if (ratios == nullptr) {
    return fields.missing("compress_ratios",
                          "an array with one of 0, 4, 128 for every layer (the layer_types of the "
                          "transformers library are not read)");
  }
  if (!ratios->is_array()) {
    return fields.wrong("compress_ratios", "an array of integers", *ratios);
  }
  const auto count = static_cast<int64_t>(ratios->size());
  const int64_t layers = config.num_hidden_layers;
  const int64_t trailing = std::max<int64_t>(kMaxTrailingRatios, config.num_nextn_predict_layers);
  if (layers > 0 && (count < layers || count > layers + trailing)) {
    return problems.add(ErrorCode::kInvalidArgument, "compress_ratios: expected ", layers,
                        " entries (num_hidden_layers) and up to ", trailing,
                        " more for MTP layers, given ", count);
  }
  int reported = 0;
  for (int64_t i = 0; i < count; ++i) {
    const json& value = (*ratios)[static_cast<size_t>(i)];
    const std::optional<int64_t> ratio = FieldReader::as_integer(value);
    const bool main = i < layers;
    const bool known =
        ratio && (*ratio == 0 || *ratio == 1 || (main && (*ratio == 4 || *ratio == 128)));
    if (!known && reported++ < 8) {
      problems.add(ErrorCode::kInvalidArgument, "compress_ratios[", i, "]: expected ",
                   main ? "0 (sliding window only; 1 means the same), 4 (CSA) or 128 (HCA)"
                        : "0 (MTP layers attend to the sliding window only)",
                   ", given ", excerpt(value));
    }
    config.compress_ratios.push_back(known && *ratio != 1 ? static_cast<int>(*ratio) : 0);
  }
  if (reported > 8)
    problems.add(ErrorCode::kInvalidArgument, "compress_ratios: ", reported - 8,
                 " more unknown values");
}

void read_indexer(FieldReader& fields, ModelConfig& config) {
  const bool needed = std::find(config.compress_ratios.begin(), config.compress_ratios.end(), 4) !=
                      config.compress_ratios.end();
  const auto read = [&](const char* name, int& out, int64_t low, int64_t high) {
    if (needed) {
      fields.integer(name, out, low, high);
    } else {
      fields.optional_integer(name, out, low, high);
    }
  };
  read("index_n_heads", config.index_n_heads, 1, 1024);
  read("index_head_dim", config.index_head_dim, 2, 8192);
  read("index_topk", config.index_topk, 1, 65536);
}

/// Returns whether the file says that weights are quantised.
bool read_quantisation(FieldReader& fields, ModelConfig& config, Problems& problems) {
  const json* quantisation = fields.find("quantization_config");
  if (quantisation != nullptr && !quantisation->is_object()) {
    fields.wrong("quantization_config", "an object or null", *quantisation);
    quantisation = nullptr;
  }
  if (quantisation != nullptr) {
    FieldReader inner(*quantisation, "quantization_config.", problems);
    inner.only("quant_method", "fp8");
    inner.only("fmt", "e4m3");
    inner.only("scale_fmt", "ue8m0");
    inner.only("activation_scheme", "dynamic");
    if (const json* block = inner.find("weight_block_size")) {
      const auto side = [&](size_t i) -> int64_t {
        const std::optional<int64_t> given = FieldReader::as_integer((*block)[i]);
        return given && *given >= 32 && *given <= 1024 && *given % 32 == 0 ? *given : 0;
      };
      if (!block->is_array() || block->size() != 2 || side(0) == 0 || side(1) == 0) {
        inner.wrong("weight_block_size",
                    "[rows, columns], both multiples of 32 from 32 to 1024 (released: [128,128])",
                    *block);
      } else {
        config.weight_block_rows = static_cast<int>(side(0));
        config.weight_block_cols = static_cast<int>(side(1));
      }
    }
  }
  config.expert_dtype = quantisation != nullptr ? ExpertFormat::kFp4 : ExpertFormat::kBf16;
  if (const json* dtype = fields.find("expert_dtype")) {
    if (*dtype == "fp4") {
      config.expert_dtype = ExpertFormat::kFp4;
    } else if (*dtype == "fp8") {
      config.expert_dtype = ExpertFormat::kFp8;
    } else if (*dtype == "bf16" || *dtype == "bfloat16") {
      config.expert_dtype = ExpertFormat::kBf16;
    } else {
      fields.wrong("expert_dtype", "\"fp4\", \"fp8\" or \"bf16\"", *dtype);
    }
  }
  return quantisation != nullptr;
}

/// Conditions between fields. A field that was refused is 0 and is not reported again.
void check_together(const ModelConfig& config, bool quantised, Problems& problems) {
  if (config.num_heads > 0 && config.o_groups > 0 && config.num_heads % config.o_groups != 0) {
    problems.add(ErrorCode::kInvalidArgument,
                 "o_groups: expected a divisor of num_attention_heads = ", config.num_heads,
                 ", given ", config.o_groups);
  }
  if (config.qk_rope_head_dim % 2 != 0) {
    problems.add(ErrorCode::kInvalidArgument, "qk_rope_head_dim: expected an even number, given ",
                 config.qk_rope_head_dim);
  }
  if (config.head_dim > 0 && config.qk_rope_head_dim >= config.head_dim) {
    problems.add(ErrorCode::kInvalidArgument,
                 "qk_rope_head_dim: expected less than head_dim = ", config.head_dim, ", given ",
                 config.qk_rope_head_dim);
  }
  if (config.index_head_dim > 0 && config.qk_rope_head_dim > config.index_head_dim) {
    problems.add(ErrorCode::kInvalidArgument,
                 "index_head_dim: expected at least qk_rope_head_dim = ", config.qk_rope_head_dim,
                 ", given ", config.index_head_dim);
  }
  if (config.n_routed_experts > 0 && config.num_experts_per_tok > config.n_routed_experts) {
    problems.add(ErrorCode::kInvalidArgument,
                 "num_experts_per_tok: expected at most n_routed_experts = ",
                 config.n_routed_experts, ", given ", config.num_experts_per_tok);
  }
  const int64_t experts = int64_t{config.num_hidden_layers} * config.n_routed_experts;
  if (experts > kMaxAllExperts) {
    problems.add(ErrorCode::kInvalidArgument, "n_routed_experts: expected at most ", kMaxAllExperts,
                 " experts in all layers together, given ", config.num_hidden_layers, " x ",
                 config.n_routed_experts, " = ", experts);
  }
  if (config.num_hidden_layers > 0 && config.num_hash_layers > config.num_hidden_layers) {
    problems.add(ErrorCode::kInvalidArgument,
                 "num_hash_layers: expected at most num_hidden_layers = ", config.num_hidden_layers,
                 ", given ", config.num_hash_layers);
  }
  if (config.expert_dtype == ExpertFormat::kFp4) {
    if (config.hidden_size % 32 != 0) {
      problems.add(ErrorCode::kInvalidArgument,
                   "hidden_size: expected a multiple of 32 (scale block of fp4 experts), given ",
                   config.hidden_size);
    }
    if (config.moe_intermediate_size % 32 != 0) {
      problems.add(
          ErrorCode::kInvalidArgument,
          "moe_intermediate_size: expected a multiple of 32 (scale block of fp4 experts), given ",
          config.moe_intermediate_size);
    }
  }
  // Output groups are row slices of wo_a; a scale block must not straddle two of them.
  if (quantised && config.o_groups > 1 && config.o_lora_rank % config.weight_block_rows != 0) {
    problems.add(
        ErrorCode::kInvalidArgument,
        "o_lora_rank: expected a multiple of weight_block_size[0] = ", config.weight_block_rows,
        " when there are output groups, given ", config.o_lora_rank);
  }
  if (config.vocab_size > 0) {
    if (config.bos_token_id >= config.vocab_size) {
      problems.add(ErrorCode::kInvalidArgument,
                   "bos_token_id: expected less than vocab_size = ", config.vocab_size, ", given ",
                   config.bos_token_id);
    }
    if (config.eos_token_id >= config.vocab_size) {
      problems.add(ErrorCode::kInvalidArgument,
                   "eos_token_id: expected less than vocab_size = ", config.vocab_size, ", given ",
                   config.eos_token_id);
    }
  }
}

}  // namespace

ModelConfig ModelConfig::parse(std::string_view text, const std::string& origin) {
  const json document = parse_strict_json(text, origin);
  if (!document.is_object()) {
    fail(ErrorCode::kDataCorrupt, origin, ": expected a JSON object, given ", excerpt(document));
  }
  Problems problems(1000);
  FieldReader fields(document, "", problems);
  ModelConfig config;
  check_fixed_choices(fields);
  read_sizes(fields, config);
  read_rope(fields, config, problems);
  read_ratios(fields, config, problems);
  read_indexer(fields, config);
  const bool quantised = read_quantisation(fields, config, problems);
  check_together(config, quantised, problems);
  problems.raise(origin + ": this model configuration cannot be used:");
  return config;
}

ModelConfig ModelConfig::load(const std::string& path) {
  std::error_code ignored;  // a path that cannot be examined fails below, with its reason
  const std::string file =
      std::filesystem::is_directory(path, ignored) ? path + "/config.json" : path;
  const MappedFile mapped(file);
  constexpr size_t kMaxConfigBytes = size_t{16} << 20;
  if (mapped.bytes().size() > kMaxConfigBytes) {
    fail(ErrorCode::kDataCorrupt, file, ": expected a config of at most ", kMaxConfigBytes,
         " bytes, given ", mapped.bytes().size());
  }
  return parse({reinterpret_cast<const char*>(mapped.bytes().data()), mapped.bytes().size()}, file);
}

float ModelConfig::softmax_scale() const {
  return static_cast<float>(1.0 / std::sqrt(static_cast<double>(head_dim)));
}

float ModelConfig::index_scale() const {
  const double width = static_cast<double>(index_n_heads) * index_head_dim;
  return width > 0 ? static_cast<float>(1.0 / std::sqrt(width)) : 0.0f;
}

LayerKind ModelConfig::layer_kind(int layer_idx) const {
  if (layer_idx < 0 || layer_idx >= num_hidden_layers + num_nextn_predict_layers) {
    fail(ErrorCode::kInvalidArgument, "layer index: expected 0 to ",
         num_hidden_layers + num_nextn_predict_layers - 1, ", given ", layer_idx);
  }
  LayerKind kind;
  if (layer_idx < num_hidden_layers) {
    DSV4_CHECK(static_cast<size_t>(layer_idx) < compress_ratios.size());
    kind.compress_ratio = compress_ratios[static_cast<size_t>(layer_idx)];
  }
  if (kind.compress_ratio == 0) {
    kind.rope.theta = rope_theta;
    return kind;
  }
  // The one place where V4's ratios become properties.
  kind.overlap = kind.compress_ratio == 4;
  kind.indexer = kind.compress_ratio == 4;
  kind.rope = {.theta = compress_rope_theta,
               .yarn = rope_factor != 1.0,
               .factor = rope_factor,
               .beta_fast = rope_beta_fast,
               .beta_slow = rope_beta_slow,
               .original_max_position = rope_original_max_position};
  return kind;
}

std::vector<int> ModelConfig::distinct_ratios() const {
  const auto layers = std::min(compress_ratios.size(), static_cast<size_t>(num_hidden_layers));
  std::set<int> ratios(compress_ratios.begin(),
                       compress_ratios.begin() + static_cast<std::ptrdiff_t>(layers));
  ratios.erase(0);
  return {ratios.begin(), ratios.end()};
}

}  // namespace dsv4
