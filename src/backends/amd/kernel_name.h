// How the host names a kernel's entry in a code object: by its type, so that there is no list to
// keep.
#pragma once
#include <string>
#include <typeinfo>

namespace dsv4::gpu {

/// On the host a type with the name of the entry (platform.h): both compilers follow the Itanium
/// ABI, so the name of this type is the beginning of the entry's symbol, substitutions included.
template <typename Kernel>
struct amd_entry {};

/// Symbol of `void amd_entry<Kernel>(Kernel::Params)`.
template <typename Kernel>
const std::string& amd_entry_name() {
  static const std::string name =
      "_Z" + std::string(typeid(amd_entry<Kernel>).name()) + "vNT_6ParamsE";
  return name;
}

}  // namespace dsv4::gpu
