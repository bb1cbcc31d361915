// The ISA gate: what must be true of a compiled kernel before anyone looks at its results.
#pragma once
#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "backends/amd/isa/code_object.h"

namespace dsv4::amd::isa {

/// At least `min_count` instructions of the listing whose mnemonic starts with `prefix`.
struct ExpectedInstruction {
  std::string prefix;
  int min_count = 1;
};

/// Budgets of one kernel. Spills and scratch are never allowed.
struct GateRules {
  std::vector<ExpectedInstruction> expected;
  /// Prefixes that must not appear, e.g. a scalar path that the compiler fell back to.
  std::vector<std::string> forbidden;
  uint32_t max_vgprs = 512;  ///< both kinds together: 512 / max_vgprs waves fit a SIMD
  uint32_t max_sgprs = 102;
  uint32_t max_lds_bytes = 0;      ///< 0: the chip's limit; dynamic LDS counts
  uint32_t dynamic_lds_bytes = 0;  ///< what the launch adds
  uint32_t workgroup_size = 0;     ///< must equal what the kernel declares
};

/// Every rule that a kernel breaks, one line each with expected and actual; empty when it passes.
/// Instructions that the interpreter does not model count as violations. Throws kNotFound when the
/// code object has no such kernel.
std::vector<std::string> gate_violations(const CodeObject& code, const std::string& kernel,
                                         const GateRules& rules);

/// How often each mnemonic stands in the listing of a kernel.
std::map<std::string, int> count_mnemonics(const CodeObject& code, const KernelInfo& kernel);

/// One line of resources, for reports: "name gfx942: 113 VGPRs (0 AGPRs), 35776 B LDS, ...".
std::string describe_resources(const KernelInfo& kernel);

}  // namespace dsv4::amd::isa
