#include "backends/amd/isa/gate.h"

#include "core/fail.h"

namespace dsv4::amd::isa {

std::map<std::string, int> count_mnemonics(const CodeObject& code, const KernelInfo& kernel) {
  std::map<std::string, int> out;
  for (const Instruction& i : code.program().code()) {
    if (i.address >= kernel.begin && i.address < kernel.end)
      ++out[code.program().listed(i).mnemonic];
  }
  return out;
}

std::string describe_resources(const KernelInfo& k) {
  return concat(k.name, " ", arch_name(k.arch), ": ", k.num_vgprs, " VGPRs (", k.num_agprs,
                " AGPRs), ", k.num_sgprs, " SGPRs, ", k.lds_bytes, " B LDS, ", k.scratch_bytes,
                " B scratch, ", k.vgpr_spills + k.sgpr_spills, " spills, workgroup ",
                k.max_workgroup_size);
}

std::vector<std::string> gate_violations(const CodeObject& code, const std::string& name,
                                         const GateRules& rules) {
  const KernelInfo& kernel = code.kernel(name);
  std::vector<std::string> out;
  const auto violate = [&](const auto&... parts) {
    out.push_back(concat(name, " (", arch_name(code.arch()), "): ", parts...));
  };
  const std::map<std::string, int> counts = count_mnemonics(code, kernel);
  const auto count_of = [&](const std::string& prefix) {
    int count = 0;
    for (auto it = counts.lower_bound(prefix); it != counts.end() && it->first.starts_with(prefix);
         ++it) {
      count += it->second;
    }
    return count;
  };
  for (const ExpectedInstruction& expected : rules.expected) {
    if (const int count = count_of(expected.prefix); count < expected.min_count) {
      violate(count, " instructions ", expected.prefix, "*, expected at least ",
              expected.min_count);
    }
  }
  for (const std::string& prefix : rules.forbidden) {
    if (const int count = count_of(prefix); count > 0)
      violate(count, " instructions ", prefix, "*, expected none");
  }
  if (kernel.vgpr_spills != 0)
    violate(kernel.vgpr_spills, " spilled vector registers, expected none");
  if (kernel.sgpr_spills != 0)
    violate(kernel.sgpr_spills, " spilled scalar registers, expected none");
  if (kernel.scratch_bytes != 0)
    violate(kernel.scratch_bytes, " bytes of scratch a lane, expected none");
  if (kernel.num_vgprs > rules.max_vgprs) {
    violate(kernel.num_vgprs, " vector registers, expected at most ", rules.max_vgprs);
  }
  if (kernel.num_sgprs > rules.max_sgprs) {
    violate(kernel.num_sgprs, " scalar registers, expected at most ", rules.max_sgprs);
  }
  const uint32_t lds = kernel.lds_bytes + rules.dynamic_lds_bytes;
  const uint32_t lds_limit =
      rules.max_lds_bytes != 0 ? rules.max_lds_bytes : lds_limit_bytes(code.arch());
  if (lds > lds_limit) violate(lds, " bytes of LDS, expected at most ", lds_limit);
  if (kernel.max_workgroup_size != rules.workgroup_size) {
    violate("declares workgroups of ", kernel.max_workgroup_size, " threads, expected ",
            rules.workgroup_size);
  }
  for (const std::string& problem : code.program().problems(kernel.begin, kernel.end)) {
    violate("cannot be executed here: ", problem);
  }
  return out;
}

}  // namespace dsv4::amd::isa
