// A compiled code object: the ELF file that clang writes for an AMD GPU, its kernels with their
// resources, and its disassembly.
#pragma once
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "backends/amd/isa/arch.h"
#include "backends/amd/isa/decode.h"

namespace dsv4::amd::isa {

/// One argument of a kernel, as the metadata describe it.
struct KernelArgument {
  uint32_t offset = 0, size = 0;
  std::string kind;  ///< "global_buffer", "by_value", "hidden_block_count_x", ...
  bool hidden() const { return kind.starts_with("hidden_"); }
};

/// What the compiler says about a kernel.
struct KernelInfo {
  std::string name;
  Arch arch = Arch::kGfx942;
  uint64_t begin = 0, end = 0;  ///< addresses of its code in the listing
  uint32_t num_vgprs = 0;       ///< both kinds of vector registers
  uint32_t num_agprs = 0;
  uint32_t num_sgprs = 0;
  uint32_t vgpr_spills = 0, sgpr_spills = 0;
  uint32_t lds_bytes = 0;      ///< static; the launch may add to it
  uint32_t scratch_bytes = 0;  ///< private memory of a lane
  uint32_t kernarg_bytes = 0;
  uint32_t max_workgroup_size = 0;
  std::vector<KernelArgument> arguments;
  // The kernel descriptor: what registers hold at the start.
  uint32_t resources1 = 0, resources2 = 0, resources3 = 0;
  uint16_t properties = 0, preload = 0;

  /// Bytes that the caller passes: up to the first hidden argument.
  uint32_t explicit_bytes() const;
  /// First AGPR of the unified register file: how many VGPRs there are.
  uint32_t accum_offset() const { return 4 * ((resources3 & 0x3f) + 1); }
};

/// A part of the file that is loaded into memory.
struct Segment {
  uint64_t address = 0, file_offset = 0, file_bytes = 0, memory_bytes = 0;
  bool writable = false;
};
/// A 64-bit word that the loader fills with the load address plus `addend`.
struct Relocation {
  uint64_t address = 0, addend = 0;
};

class CodeObject {
 public:
  /// Reads a file, or bytes. Throws dsv4::Error: kNotFound (file, or no llvm-objdump), kDataCorrupt
  /// (not an AMD code object), kUnsupported (another chip).
  static CodeObject load(const std::string& path);
  static CodeObject from_bytes(std::span<const std::byte> bytes);
  /// As from_bytes, with a listing made earlier: needs no tools.
  static CodeObject from_bytes(std::span<const std::byte> bytes, std::string_view listing);

  Arch arch() const { return arch_; }
  const Program& program() const { return *program_; }
  const std::vector<KernelInfo>& kernels() const { return kernels_; }
  /// Throws kNotFound, naming the kernels that there are.
  const KernelInfo& kernel(const std::string& name) const;
  const std::vector<Segment>& segments() const { return segments_; }
  const std::vector<Relocation>& relocations() const { return relocations_; }
  std::span<const std::byte> bytes() const { return bytes_; }

 private:
  CodeObject() = default;
  std::vector<std::byte> bytes_;
  Arch arch_ = Arch::kGfx942;
  std::vector<KernelInfo> kernels_;
  std::vector<Segment> segments_;
  std::vector<Relocation> relocations_;
  std::shared_ptr<const Program> program_;
};

/// Whether llvm-objdump was found, and where: DSV4_LLVM_OBJDUMP, the path of configuration, PATH.
std::string find_objdump();
/// The listing of a code object in a file.
std::string disassemble(const std::string& path);

}  // namespace dsv4::amd::isa
