// NVIDIA kernels: which families exist, which candidates each has (best first, reference last),
// which one runs. DSV4_KERNEL=family:name[,family:name] forces a candidate; tests force every one
// in turn.
#pragma once
#include <span>
#include <string>
#include <string_view>

#include "dsv4/backend.h"
#include "ops/ops.h"

namespace dsv4::nvidia {

struct Candidate {
  std::string_view family;  ///< "linear", "attend", "index_logits", "rowwise", ...
  std::string_view name;    ///< "sm90", "sm80", "reference"
  /// Empty when it runs on a GPU of that capability; else why not: "needs sm_90".
  std::string (*why_not)(const Capability&);
  void (*install)(Ops&);  ///< sets the operations of its family
};

/// All candidates, grouped by family, best first.
std::span<const Candidate> candidates();

/// The table with the best usable candidate of every family, or the forced ones.
/// @throws Error kInvalidArgument: unknown family or name (lists them); kUnsupported: the forced
/// one cannot run there.
Ops make_ops(const Capability& capability, std::string_view forced);

/// For Candidate::why_not: empty on sm_80 and later / on sm_90 exactly.
std::string needs_sm80(const Capability& capability);
std::string needs_sm90(const Capability& capability);

}  // namespace dsv4::nvidia
