// Values by formula, for inputs and tests; weights come from formula_source (dsv4/checkpoint.h).
#pragma once
#include <cstdint>
#include <string_view>
#include <vector>

#include "dsv4/checkpoint.h"

namespace dsv4 {

/// Element i of tensor `name` is bf16(float(offset + scale * u(key, i))).
struct FormulaRule {
  double scale = 1;
  double offset = 0;
};
/// Scale of hidden inputs "x.<length>" in the golden manifest.
constexpr FormulaRule kFormulaInput{1.75, 0.0};

/// Rule of a weight by the last parts of its name. Attention weights as in the golden manifest:
/// norms 1 + u/4, attn_sink 2u, ape u/2, matrices u * 2^ceil(log2(2 / sqrt(fan_in))). The rest of
/// the model, chosen so that streams, router logits and logits stay near 1: embed u, hc_*_scale
/// (2 + u)/8, hc_*_base u/2, gate.bias u/8; hc_*_fn and all other matrices by fan_in.
/// `fan_in` is the number of columns of a matrix (values, not bytes).
FormulaRule formula_rule(std::string_view name, int64_t fan_in);

/// Values [0, count) of a tensor, each exact in bf16.
std::vector<float> formula_values(std::string_view name, uint64_t seed, int64_t count,
                                  const FormulaRule& rule);

}  // namespace dsv4
