// How the FP8 grouped output projection lays out its scales on an NVIDIA GPU.
// Source: spec/o_proj.md 3, spec/dispatch.md 1.4.
#pragma once
#include <array>
#include <optional>

#include "dsv4/backend.h"

namespace dsv4 {

struct EinsumRecipe {
  /// Numbers that share a scale: rows of the activations, rows of the weights, columns (K) of both.
  std::array<int, 3> granularity;
  /// Activation scales are four UE8M0 bytes in an int32, tokens contiguous and padded to 4.
  /// Otherwise one float per token and 128 inputs.
  bool tma_aligned_scales;
  bool operator==(const EinsumRecipe&) const = default;
};

/// @throws Error kUnsupported without a capability: the layout is a property of the device.
EinsumRecipe compute_fp8_einsum_recipe(const std::optional<Capability>& capability);

}  // namespace dsv4
