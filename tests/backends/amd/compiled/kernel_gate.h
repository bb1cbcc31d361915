// Budgets of compiled kernels, by the name of the kernel type: what gate tests of every family
// share.
#pragma once
#include <cxxabi.h>
#include <gtest/gtest.h>

#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

#include "backends/amd/isa/gate.h"
#include "tests/testing/hip/interpreter_device.h"

namespace dsv4::testing {

/// "RmsNormRows<Bf16, float, 8, (Access)1>": the kernel type in an entry's symbol, without our
/// namespaces.
inline std::string kernel_of(const std::string& symbol) {
  int status = 0;
  const std::unique_ptr<char, void (*)(void*)> text(
      abi::__cxa_demangle(symbol.c_str(), nullptr, nullptr, &status), std::free);
  std::string out = status == 0 ? text.get() : symbol;
  const size_t begin = out.find("amd_entry<"), end = out.rfind(">(");
  if (begin == std::string::npos || end == std::string::npos) return symbol;
  out = out.substr(begin + 10, end - begin - 10);
  for (const std::string name : {"dsv4::gpu::", "dsv4::amd::"}) {
    for (size_t at; (at = out.find(name)) != std::string::npos;) out.erase(at, name.size());
  }
  while (out.ends_with(' ')) out.pop_back();
  return out;
}

/// Waves of a SIMD that registers and local memory allow: 512 vector registers a lane in blocks of
/// eight, four SIMDs, eight waves each at most.
inline uint32_t waves_per_simd(const amd::isa::KernelInfo& kernel) {
  const uint32_t registers = (std::max(kernel.num_vgprs, 1u) + 7) / 8 * 8;
  uint32_t waves = std::min(8u, 512 / registers);
  if (kernel.lds_bytes > 0) {
    const uint32_t blocks = amd::isa::lds_limit_bytes(kernel.arch) / kernel.lds_bytes;
    waves = std::min(waves, std::max(1u, blocks * (kernel.max_workgroup_size / 64) / 4));
  }
  return waves;
}

/// One line of a table of budgets; the first whose `kernel` begins the name counts.
struct KernelBudget {
  std::string kernel;
  uint32_t max_vgprs;
  uint32_t max_lds_bytes;
  std::vector<amd::isa::ExpectedInstruction> expected = {};
  uint32_t min_waves_per_simd = 1;
};

/// Every entry of `file` ("rowwise", without architecture) keeps within its line of the table. An
/// entry without a line fails.
inline void expect_within_budgets(const std::string& file, amd::isa::Arch arch,
                                  const std::vector<KernelBudget>& table) {
  const auto& files = CompiledKernels::of(arch).by_file();
  const auto at = files.find(file + "_" + arch_name(arch) + ".co");
  ASSERT_NE(at, files.end()) << "no code object " << file << " for " << arch_name(arch);
  for (const amd::isa::KernelInfo& kernel : at->second.kernels()) {
    const std::string name = kernel_of(kernel.name);
    const KernelBudget* budget = nullptr;
    for (const KernelBudget& line : table) {
      if (!name.starts_with(line.kernel)) continue;
      budget = &line;
      break;
    }
    if (budget == nullptr) {
      ADD_FAILURE() << name << " has no budget";
      continue;
    }
    amd::isa::GateRules rules;
    rules.expected = budget->expected;
    rules.forbidden = {"scratch_", "flat_", "buffer_"};  // every pointer is known to be global
    rules.max_vgprs = budget->max_vgprs;
    rules.max_lds_bytes = std::max(1u, budget->max_lds_bytes);
    rules.workgroup_size = kernel.max_workgroup_size;  // kernel_list.h knows what it must be
    rules.max_sgprs = 108;                             // 102, and VCC, XNACK mask and flat scratch
    for (const std::string& line : gate_violations(at->second, kernel.name, rules))
      ADD_FAILURE() << name << ": " << line;
    EXPECT_GE(waves_per_simd(kernel), budget->min_waves_per_simd)
        << name << ": " << describe_resources(kernel);
  }
}

}  // namespace dsv4::testing
