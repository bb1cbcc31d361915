// Where the build put the compiled kernels of corpus/, and why there may be none.
#pragma once
#include <string>

#include "backends/amd/isa/code_object.h"

namespace dsv4::amd::isa {

/// Path of a compiled source of corpus/.
inline std::string compiled(const std::string& name, Arch arch) {
  return std::string(DSV4_CORPUS_DIR) + "/" + name + "_" + arch_name(arch) + ".co";
}
/// A reason to skip; empty when compiled kernels can be executed.
inline std::string why_not_compiled() {
  if (std::string(DSV4_CORPUS_DIR).empty()) {
    return "kernels were not compiled: configure with -DDSV4_ENABLE_HIP=ON (needs clang++-22)";
  }
  if (find_objdump().empty()) return "llvm-objdump-22 not found";
  return "";
}

}  // namespace dsv4::amd::isa
