// Which kernels operations start, from the operations themselves: a launcher that only notes the
// kernel types that it is made for. Code objects must have an entry for each of them.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "backends/amd/kernel_name.h"
#include "ops/ops.h"
#include "tests/testing/hip/interpreter_device.h"

namespace dsv4::testing {

struct StartedKernel {
  std::string symbol;
  uint32_t threads = 0, param_bytes = 0;
};

/// Tag: one list for each.
template <typename Tag>
class ListLaunch {
 public:
  static constexpr bool kBf16Only = InterpreterLaunch::kBf16Only;
  static std::vector<StartedKernel>& kernels() {
    static std::vector<StartedKernel> list;
    return list;
  }
  explicit ListLaunch(const OpContext&) {}
  template <typename Kernel>
  void run(int64_t, const typename Kernel::Params&) const {
    (void)&is_listed<Kernel>;
  }

 private:
  template <typename Kernel>
  static bool add() {
    kernels().push_back(
        {gpu::amd_entry_name<Kernel>(), Kernel::kThreads, sizeof(typename Kernel::Params)});
    return true;
  }
  // Initialised before main, once for every kernel that some operation starts.
  template <typename Kernel>
  inline static const bool is_listed = add<Kernel>();
};

/// Of the operations that `kInstall` sets; it is `install_x<ListLaunch<Tag>>`.
template <typename Tag, void (*kInstall)(Ops&)>
const std::vector<StartedKernel>& started_kernels() {
  Ops ops;
  kInstall(ops);
  return ListLaunch<Tag>::kernels();
}

}  // namespace dsv4::testing
