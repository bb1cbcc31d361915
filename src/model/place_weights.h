// Weights into memory that a device reads: in place on the CPU (the file mapping), copied once
// elsewhere.
#pragma once
#include <vector>

#include "checkpoint/weights.h"
#include "dsv4/device.h"

namespace dsv4 {

/// Views of the same weights on `device`. Copies are owned by `owned`, which must outlive the
/// result; on devices that read host memory nothing is copied and the source must outlive it.
ModelWeights place_weights(const ModelWeights& weights, Device& device, std::vector<Buffer>& owned);
AttentionWeights place_weights(const AttentionWeights& weights, Device& device,
                               std::vector<Buffer>& owned);

}  // namespace dsv4
