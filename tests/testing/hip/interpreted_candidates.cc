// Candidates of the AMD backend as compiled kernels, for every chip and in both wave orders: what
// candidate_list.h lists appears here without another line.
#include "backends/amd/candidate_list.h"
#include "core/fail.h"
#include "tests/testing/hip/interpreter_device.h"
#include "tests/testing/op_candidates.h"

namespace dsv4::testing {
namespace {

using amd::isa::Arch;
using amd::isa::WaveOrder;

struct Chip {
  Arch arch;
  Capability capability;
};
constexpr Chip kChips[] = {{Arch::kGfx942, {9, 4, 2}}, {Arch::kGfx950, {9, 5, 0}}};
constexpr std::string_view kReverse = "_reverse";

// "gfx942_" + name, in reverse order with an ending; not those of the executor.
std::string name_on(const Chip& chip, std::string_view name) {
  return concat(arch_name(chip.arch), "_", name);
}

}  // namespace

void append_interpreted_candidates(const std::string& family, std::vector<OpCandidate>& out) {
  for (const Chip& chip : kChips) {
    for (const amd::Candidate& candidate : amd::candidates<InterpreterLaunch>()) {
      if (candidate.family != family || !candidate.why_not(chip.capability).empty()) continue;
      const std::string name = name_on(chip, candidate.name);
      for (const std::string& in_order : {name, name + std::string(kReverse)})
        out.push_back({Platform::kRocm, family, in_order, why_not_interpreted(), false});
    }
  }
}

OpenedCandidate open_interpreted_candidate(const OpCandidate& candidate, int num_threads) {
  std::string name = candidate.name;
  const bool reverse = name.ends_with(kReverse);
  if (reverse) name.resize(name.size() - kReverse.size());
  for (const Chip& chip : kChips) {
    const std::string prefix = name_on(chip, "");
    if (!name.starts_with(prefix)) continue;
    const std::string forced = candidate.family + ":" + name.substr(prefix.size());
    return {std::make_unique<InterpreterDevice>(
                chip.arch, reverse ? WaveOrder::kReverse : WaveOrder::kForward, num_threads),
            amd::make_ops(amd::candidates<InterpreterLaunch>(), chip.capability, forced)};
  }
  return {};
}

}  // namespace dsv4::testing
