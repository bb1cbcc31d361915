// What instructions this machine has: the conditions and the order of the CPU's candidates.
#pragma once
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "backends/cpu/candidates.h"

namespace dsv4::cpu {

// Candidate::why_not of the files that are compiled with the flags of these names
// (cmake/dsv4_targets.cmake).
std::string why_not_avx2();
std::string why_not_avx512();
std::string why_not_avx512vnni();
std::string why_not_avx512vbmi();  // VNNI, too
std::string why_not_avx512bf16();
std::string runs_anywhere();

/// Who made this CPU, as CPUID says it: "AuthenticAMD", "GenuineIntel"; empty elsewhere.
std::string cpu_maker();

/// `list`, written with avx512bf16 first, in the order that suits a maker's CPUs: it goes behind
/// avx512 where VDPBF16PS does not do more products a second than f32 FMAs. AMD's cores start as
/// many of one as of the other in a cycle, and VDPBF16PS does twice the work; Intel's were measured
/// at one VDPBF16PS in two cycles against two FMAs a cycle. Not measured at start: that would not
/// choose the same on every run. All have the same bits.
std::vector<Candidate> best_first(std::span<const Candidate> list, std::string_view maker);

}  // namespace dsv4::cpu
