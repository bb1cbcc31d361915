#include "backends/amd/kernel_table.h"

#include <map>
#include <memory>

#include "backends/amd/code_objects.h"

namespace dsv4::amd {
namespace {

std::mutex tables_mutex;
std::map<int, std::unique_ptr<KernelTable>>& tables() {
  static auto& all = *new std::map<int, std::unique_ptr<KernelTable>>;  // outlives the runtime
  return all;
}

}  // namespace

KernelTable::KernelTable(const std::string& architecture) : architecture_(architecture) {
  for (const EmbeddedCodeObject& object : code_objects()) {
    if (object.architecture != architecture) continue;
    HipModule module = nullptr;
    DSV4_HIP(module_load_data(&module, object.image.data()));
    modules_.push_back(module);
  }
}

HipFunction KernelTable::find(const std::string& symbol) {
  const std::lock_guard lock(mutex_);
  HipFunction& function = functions_[symbol];
  for (HipModule module : modules_) {
    if (function != nullptr) break;
    const HipError code = hip_runtime().module_get_function(&function, module, symbol.c_str());
    if (code == kHipSuccess) break;
    function = nullptr;
    if (code != kHipNotFound) check_hip(code, "hipModuleGetFunction");
    hip_runtime().get_last_error();  // not in this one: later calls are not to blame
  }
  if (function == nullptr) {
    fail(ErrorCode::kInternal, "no code object for ", architecture_, " has the kernel ", symbol);
  }
  return function;
}

void KernelTable::load(int device, const std::string& architecture) {
  const std::lock_guard lock(tables_mutex);
  std::unique_ptr<KernelTable>& table = tables()[device];
  if (table == nullptr) table = std::make_unique<KernelTable>(architecture);
}

KernelTable& KernelTable::current() {
  int device = 0;
  DSV4_HIP(get_device(&device));
  const std::lock_guard lock(tables_mutex);
  const auto at = tables().find(device);
  DSV4_CHECK(at != tables().end() && at->second != nullptr);
  return *at->second;
}

}  // namespace dsv4::amd
