// The steps of the attention layer, in order. The names used in code, documents, profiles and
// tests.
#pragma once
#include <array>
#include <string_view>

namespace dsv4 {

enum class AttentionStep {
  kProjectIn,        // wq_a + wkv, compressor and indexer gates
  kNormQKv,          // q_norm, kv_norm
  kProjectQ,         // wq_b, indexer wq_b
  kQnormRopeInsert,  // q norm, RoPE, KV quantise, page write
  kCompress,         // pool, norm, RoPE, quantise, page write
  kIndex,            // indexer queries, logits
  kSelect,           // top-k, slots
  kAttend,           // forward_mqa
  kProjectOut,       // o_proj: inverse RoPE, quantise, grouped wo_a, wo_b
};

inline constexpr std::array<std::string_view, 9> kAttentionStepNames{
    "project_in", "norm_q_kv", "project_q", "qnorm_rope_insert", "compress",
    "index",      "select",    "attend",    "project_out"};

constexpr std::string_view step_name(AttentionStep step) {
  return kAttentionStepNames[static_cast<size_t>(step)];
}

}  // namespace dsv4
