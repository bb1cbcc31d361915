// Filling a table of operations from a device's list of candidate kernels, with some forced by
// "family:name[,family:name]" (DSV4_KERNEL).
#pragma once
#include <algorithm>
#include <cstdlib>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "core/fail.h"
#include "ops/ops.h"

namespace dsv4 {

/// Splits "family:name,family:name"; empty parts are skipped. @throws Error kInvalidArgument.
inline std::vector<std::pair<std::string_view, std::string_view>> parse_forced(
    std::string_view text) {
  std::vector<std::pair<std::string_view, std::string_view>> out;
  while (!text.empty()) {
    const size_t comma = std::min(text.find(','), text.size());
    const std::string_view part = text.substr(0, comma);
    text.remove_prefix(std::min(comma + 1, text.size()));
    if (part.empty()) continue;
    const size_t colon = part.find(':');
    if (colon == std::string_view::npos) {
      fail(ErrorCode::kInvalidArgument, "DSV4_KERNEL: \"", part, "\", expected family:name");
    }
    out.emplace_back(part.substr(0, colon), part.substr(colon + 1));
  }
  return out;
}

/// Installs the first usable candidate of every family, then the forced ones. `why_not(candidate)`
/// is empty where it can run.
/// @throws Error kInvalidArgument: unknown family or name (lists them); kUnsupported: the forced
/// one cannot run here.
template <typename Candidate, typename WhyNot>
void install_candidates(Ops& ops, std::span<const Candidate> candidates, std::string_view forced,
                        WhyNot why_not) {
  std::string_view installed;
  for (const Candidate& candidate : candidates) {
    if (candidate.family == installed || !why_not(candidate).empty()) continue;
    candidate.install(ops);
    installed = candidate.family;
  }
  for (const auto& [family, name] : parse_forced(forced)) {
    const Candidate* found = nullptr;
    std::string known;
    for (const Candidate& candidate : candidates) {
      known += concat(known.empty() ? "" : ", ", candidate.family, ":", candidate.name);
      if (candidate.family == family && candidate.name == name) found = &candidate;
    }
    if (found == nullptr) {
      fail(ErrorCode::kInvalidArgument, "DSV4_KERNEL: no kernel ", family, ":", name,
           "; there are ", known);
    }
    if (const std::string reason = why_not(*found); !reason.empty()) {
      fail(ErrorCode::kUnsupported, "DSV4_KERNEL: ", family, ":", name,
           " cannot run here: ", reason);
    }
    found->install(ops);
  }
}

/// What the environment forces: DSV4_KERNEL, or nothing.
inline std::string forced_kernels() {
  const char* forced = std::getenv("DSV4_KERNEL");
  return forced == nullptr ? "" : forced;
}

/// For people: ", kernels linear:sm90 attend:sm90", of every family the best that can run, then
/// what is forced.
template <typename Candidate, typename WhyNot>
std::string describe_candidates(std::span<const Candidate> candidates, std::string_view forced,
                                WhyNot why_not) {
  std::string out;
  std::string_view last_family;
  for (const Candidate& candidate : candidates) {
    if (candidate.family == last_family || !why_not(candidate).empty()) continue;
    out += concat(last_family.empty() ? ", kernels " : " ", candidate.family, ":", candidate.name);
    last_family = candidate.family;
  }
  if (!forced.empty()) out += concat(", DSV4_KERNEL=", forced);
  return out;
}

}  // namespace dsv4
