// MemoryPlan as a dict.
#pragma once
#include "casters.h"

#include "dsv4/engine.h"

namespace dsv4::python {

/// {"total": bytes, "parts": {name: bytes}, "pool": {...}}
nanobind::dict memory_plan_dict(const MemoryPlan& plan);

}  // namespace dsv4::python
