// The weights of a model as the code uses them: views by role instead of tensors by name. Bound
// once after loading.
#pragma once
#include <optional>
#include <vector>

#include "ops/ops.h"

namespace dsv4 {

/// Compressor of one kind (compressor.md 1.1); coff and width are those of the layer kind and of
/// the use (512 or index_head_dim).
struct CompressorWeights {
  Weight wkv;        // [coff * width, hidden]
  Weight wgate;      // [coff * width, hidden]
  ConstTensor ape;   // [ratio, coff * width] f32
  ConstTensor norm;  // [width]
};

struct IndexerWeights {
  Weight wq_b;          // [index_n_heads * index_head_dim, q_lora_rank]
  Weight weights_proj;  // [index_n_heads, hidden]
  CompressorWeights compressor;
};

/// layers.N.attn.*
struct AttentionWeights {
  Weight wq_a;            // [q_lora_rank, hidden]
  ConstTensor q_norm;     // [q_lora_rank]
  Weight wq_b;            // [heads * head_dim, q_lora_rank]
  Weight wkv;             // [head_dim, hidden]
  ConstTensor kv_norm;    // [head_dim]
  ConstTensor attn_sink;  // [heads] f32
  Weight wo_a;            // [o_groups * o_lora_rank, group_width]
  Weight wo_b;            // [hidden, o_groups * o_lora_rank]
  std::optional<CompressorWeights> compressor;
  std::optional<IndexerWeights> indexer;
};

/// layers.N.ffn.*
struct FfnWeights {
  Weight gate;          // [experts, hidden]
  ConstTensor bias;     // [experts] f32, or empty on hash layers
  ConstTensor tid2eid;  // [vocab, k] i64, or empty
  std::vector<ExpertWeights> experts;
  ExpertWeights shared;  // w1 empty when there is none
};

struct BlockWeights {
  ConstTensor attn_norm, ffn_norm;  // [hidden]
  HcWeights hc_attn, hc_ffn;
  AttentionWeights attn;
  FfnWeights ffn;
};

/// mtp.N.*
struct MtpWeights {
  BlockWeights block;
  Weight e_proj, h_proj;           // [hidden, hidden]
  ConstTensor enorm, hnorm, norm;  // [hidden]
  HcWeights hc_head;
};

struct ModelWeights {
  ConstTensor embed;  // [vocab, hidden]
  Weight head;        // [vocab, hidden]
  ConstTensor norm;   // [hidden]
  HcWeights hc_head;
  std::vector<BlockWeights> layers;
  std::vector<MtpWeights> mtp;
};

}  // namespace dsv4
