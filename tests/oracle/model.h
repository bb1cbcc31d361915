// The whole model in float64, for one sequence from position 0 (model.md 2-4).
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "tests/oracle/attention.h"
#include "tests/oracle/checkpoint.h"

namespace oracle {

/// Field names of config.json (model.md 1).
struct ModelShape {
  int64_t vocab_size = 0, hidden_size = 0;
  int num_layers = 0, hc_mult = 0, sinkhorn_iters = 0;
  int num_experts = 0, experts_per_token = 0, num_hash_layers = 0;
  double hc_eps = 0, eps = 0, routed_scaling = 1, swiglu_limit = 0;
  std::vector<AttentionShape> layers;
};
/// Parses `folder`/config.json; RoPE frequencies are computed by rope_frequencies().
ModelShape read_shape(const std::string& folder);

struct ExpertWeights {
  Weight w1, w2, w3;
};
struct LayerWeights {
  Weight attn_norm, ffn_norm;
  HyperWeights hc_attn, hc_ffn;
  AttentionWeights attention;
  Weight gate, gate_bias;        ///< bias empty in hash layers
  std::vector<int64_t> tid2eid;  ///< empty in other layers
  std::vector<ExpertWeights> experts;
  ExpertWeights shared;
};
/// Tensors of layers.`layer`. of a released checkpoint (model.md 6.2).
LayerWeights read_layer(const Tensors& tensors, const ModelShape& shape, int layer);

/// MoE block: x [T, hidden] after ffn_norm (model.md 4); routes are returned when asked for.
Matrix moe(const Matrix& x, const std::vector<Route>& routes, const LayerWeights& weights,
           const ModelShape& shape, const Roundings& roundings);
/// One expert; `weight` multiplies the activation before it is rounded (model.md 4.2, column R).
Vector expert(std::span<const double> x, const ExpertWeights& weights, double weight, double limit,
              const Roundings& roundings);

/// Everything that the golden files record of a layer, for all tokens.
struct LayerTrace {
  Matrix attn_in;
  AttentionTrace attention;
  std::vector<Route> routes;
  Matrix mlp_out;
  std::vector<Matrix> streams_out;  ///< per token [hc, hidden]
};
struct ModelTrace {
  std::vector<LayerTrace> layers;
  Matrix logits;  ///< [P, vocab] at the positions asked for
};
class Model {
 public:
  explicit Model(const std::string& folder);
  ModelShape& shape() { return shape_; }
  const ModelShape& shape() const { return shape_; }
  /// `positions`: where logits are wanted.
  ModelTrace forward(const std::vector<int64_t>& ids, const std::vector<int64_t>& positions,
                     const Roundings& roundings) const;

 private:
  ModelShape shape_;
  Tensors tensors_;
  std::vector<LayerWeights> layers_;
};

}  // namespace oracle
