// What follows from a config and options before anything large exists: limits, device, backend,
// formats.
#pragma once
#include <memory>

#include "dsv4/backend.h"
#include "dsv4/engine.h"

namespace dsv4 {

struct ResolvedOptions {
  EngineOptions options;  // with numerics, threads and totals filled in
  PoolLimits pool;
  int max_logits = 1;
  const AttentionDescriptor* descriptor = nullptr;
  std::unique_ptr<Device> device;
};

/// @throws Error kInvalidArgument (limits), kUnsupported (with every reason why no backend fits).
ResolvedOptions resolve_options(const ModelConfig& config, const EngineOptions& given);

}  // namespace dsv4
