// Choosing a backend: every condition of a request, checked against descriptors. Pure functions;
// the registry supplies the descriptors, dsv4/backend.h the public form.
// Source: spec/dispatch.md 1.2, 2.2, 10.
#pragma once
#include <span>
#include <vector>

#include "dsv4/backend.h"

namespace dsv4 {

/// Conditions of the machine and the build: platform, device, kernels for its architecture, those
/// of `products` among them where the backend has such.
std::vector<Reason> device_reasons(const AttentionDescriptor& descriptor,
                                   const SelectionTarget& target,
                                   Products products = Products::kF32);

/// Conditions of the request alone: cache dtype, numerics, block size. Sets `numerics` to those of
/// the request with the cache format filled in (unchanged when that has no answer).
std::vector<Reason> request_reasons(const AttentionDescriptor& descriptor,
                                    const SelectionRequest& request, Numerics& numerics);

/// Conditions of the model and its split over ranks: heads, groups, head size, ratios.
std::vector<Reason> model_reasons(const AttentionDescriptor& descriptor, const ModelConfig& config,
                                  const SelectionRequest& request, const Numerics& numerics);

/// As the public select_attention(), among `descriptors` in order of preference.
AttentionSelection select_among(std::span<const AttentionDescriptor* const> descriptors,
                                const ModelConfig& config, const SelectionTarget& target,
                                const SelectionRequest& request);

}  // namespace dsv4
