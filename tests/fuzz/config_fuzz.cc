// Input: a config.json. It may be refused; one that is accepted must be safe to compute with.
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <string_view>

#include "checkpoint/rope.h"
#include "dsv4/checkpoint.h"
#include "dsv4/error.h"

namespace {

void require(bool condition) {
  if (!condition) std::abort();
}

void check(const dsv4::ModelConfig& config) {
  require(config.num_heads % config.o_groups == 0);
  require(config.nope_head_dim() > 0 && config.group_width() > 0);
  require(std::isfinite(config.softmax_scale()) && config.softmax_scale() > 0);
  for (int layer = 0; layer < config.num_hidden_layers + config.num_nextn_predict_layers; ++layer) {
    const dsv4::LayerKind kind = config.layer_kind(layer);
    require(kind.compress_ratio == 0 || kind.compress_ratio == 4 || kind.compress_ratio == 128);
    require(!kind.indexer || config.index_topk > 0);
    for (float frequency : dsv4::rope_frequencies(kind.rope, config.qk_rope_head_dim)) {
      require(frequency >= 0 && frequency <= 1);
    }
    for (const auto& tensor : dsv4::expected_attention_tensors(config, kind, "attn.")) {
      require(tensor.num_bytes() > 0);
    }
  }
  // The whole table of a large config takes too long for a search.
  if (int64_t{config.num_hidden_layers} * config.n_routed_experts > 256) return;
  int64_t total = 0;
  for (const auto& tensor : dsv4::expected_tensors(config)) {
    require(!__builtin_add_overflow(total, tensor.num_bytes(), &total));
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  try {
    check(dsv4::ModelConfig::parse({reinterpret_cast<const char*>(data), size}, "fuzz"));
  } catch (const dsv4::Error& error) {
    require(error.code() == dsv4::ErrorCode::kInvalidArgument ||
            error.code() == dsv4::ErrorCode::kDataCorrupt);
  }
  return 0;
}
