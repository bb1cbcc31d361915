// AMD kernels: which families exist, which candidates each has (best first, reference last), which
// one runs. DSV4_KERNEL=family:name[,family:name] forces a candidate; tests force every one in
// turn. The list is the same for a GPU and for the executor; only the launcher differs.
#pragma once
#include <span>
#include <string>
#include <string_view>

#include "dsv4/backend.h"
#include "ops/ops.h"

namespace dsv4::amd {

struct Candidate {
  std::string_view family;  ///< "linear", "attend", "index_logits", "rowwise", ...
  std::string_view name;    ///< "gfx950", "mfma", "reference", "shared"
  /// Empty when it runs on a GPU of that capability; else why not: "needs gfx950, this is gfx942".
  std::string (*why_not)(const Capability&);
  void (*install)(Ops&);  ///< sets the operations of its family
};

/// What `rocm:emulated` is: no chip. The executor takes the kernels of all of them.
inline constexpr Capability kEmulated{};

/// For Candidate::why_not: gfx90a, gfx942 and gfx950 / gfx950 alone, and the executor.
std::string needs_cdna(const Capability& capability);
std::string needs_gfx950(const Capability& capability);

/// All candidates, grouped by family, best first (candidate_list.h).
template <typename Launch>
std::span<const Candidate> candidates();

/// The table with the best usable candidate of every family, or the forced ones.
/// @throws Error kInvalidArgument: unknown family or name (lists them); kUnsupported: the forced
/// one cannot run there.
Ops make_ops(std::span<const Candidate> candidates, const Capability& capability,
             std::string_view forced);

}  // namespace dsv4::amd
