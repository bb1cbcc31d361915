// Tensor names of the transformers library, for checkpoints that it wrote. Source: spec/model.md
// 6.5.
#pragma once
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace dsv4 {

/// Names under which transformers stores the tensor of this released name: one, or two for a scale
/// (".weight_scale_inv", ".weight_scale"). Empty for tensors that it does not have (mtp.*) or
/// stores in another arrangement (routed experts).
std::vector<std::string> hugging_face_names(std::string_view released);

/// A stacked tensor of all routed experts of a layer.
struct StackedExperts {
  int layer;
  bool gate_up;  ///< gate_up_proj [E, 2 * inner, hidden], rows of w1 first; else down_proj
};
/// Recognises "model.layers.N.mlp.experts.gate_up_proj" and ".down_proj".
std::optional<StackedExperts> parse_stacked_experts(std::string_view name);

}  // namespace dsv4
