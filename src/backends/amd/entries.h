// For .hip files of ops/: the entries of a code object, without a list of them.
//
// Operations are templates over a launcher (gpu/rowwise_ops.h), and a launcher that only names the
// kernels makes them: every kernel that some choice of the operations starts becomes an entry. So
// a file is
//   #include "backends/amd/entries.h"
//   #include "backends/amd/ops/attend_ops.h"
//   DSV4_AMD_ENTRIES(amd::install_attend)      // template <typename Launch> void (Ops&)
// and code object and host cannot disagree. ops/*.hip are compiled for gfx942 and gfx950,
// ops/*_gfx950.hip for gfx950 alone.
#pragma once
#include "backends/gpu/platform.h"
#include "ops/ops.h"

namespace dsv4::amd {

class EntryLaunch {
 public:
  static constexpr bool kBf16Only = true;  // as the descriptor's activations
  explicit EntryLaunch(const OpContext&) {}
  template <typename Kernel>
  void run(int64_t, const typename Kernel::Params&) const {
    (void)&gpu::amd_entry<Kernel>;
  }
};

}  // namespace dsv4::amd

/// Entries of all kernels that `install<Launch>(Ops&)` reaches. Once per file.
#define DSV4_AMD_ENTRIES(install)       \
  namespace dsv4 {                      \
  void entries_of_this_file(Ops& ops) { \
    install<amd::EntryLaunch>(ops);     \
  }                                     \
  }
