#include "backends/amd/isa/code_object.h"

#include <elf.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <unordered_map>

#include "core/fail.h"

namespace dsv4::amd::isa {
namespace {

using nlohmann::json;

constexpr uint16_t kMachineAmdGpu = 224;
constexpr uint32_t kNoteMetadata = 32;
constexpr uint32_t kRelocationRelative64 = 13;
// EF_AMDGPU_MACH values.
constexpr uint32_t kMachGfx942 = 0x4c, kMachGfx950 = 0x4f;

// Reads structures at checked offsets: every byte of the file is untrusted.
class Reader {
 public:
  explicit Reader(std::span<const std::byte> bytes) : bytes_(bytes) {}
  template <typename T>
  T at(uint64_t offset) const {
    T out;
    std::memcpy(&out, range(offset, sizeof(T)).data(), sizeof(T));
    return out;
  }
  std::span<const std::byte> range(uint64_t offset, uint64_t bytes) const {
    if (offset > bytes_.size() || bytes > bytes_.size() - offset) {
      fail(ErrorCode::kDataCorrupt, "code object: bytes [", offset, ", +", bytes, ") of a file of ",
           bytes_.size());
    }
    return bytes_.subspan(offset, bytes);
  }
  std::string text(uint64_t offset) const {
    std::string out;
    for (char c; (c = at<char>(offset)) != 0; ++offset) out += c;
    return out;
  }

 private:
  std::span<const std::byte> bytes_;
};

struct Symbol {
  uint64_t address, bytes;
};

class Elf {
 public:
  explicit Elf(std::span<const std::byte> bytes)
      : reader_(bytes), header_(reader_.at<Elf64_Ehdr>(0)) {
    if (std::memcmp(header_.e_ident, ELFMAG, SELFMAG) != 0 ||
        header_.e_ident[EI_CLASS] != ELFCLASS64 || header_.e_machine != kMachineAmdGpu) {
      fail(ErrorCode::kDataCorrupt, "not a code object of an AMD GPU (64-bit ELF file)");
    }
    for (int i = 0; i < header_.e_shnum; ++i) {
      sections_.push_back(
          reader_.at<Elf64_Shdr>(header_.e_shoff + static_cast<uint64_t>(i) * header_.e_shentsize));
    }
  }
  const Reader& reader() const { return reader_; }

  Arch arch() const {
    const uint32_t mach = header_.e_flags & kMachMask;
    if (mach == kMachGfx942) return Arch::kGfx942;
    if (mach == kMachGfx950) return Arch::kGfx950;
    fail(ErrorCode::kUnsupported, "code object is for machine ", mach, ", expected gfx942 (",
         kMachGfx942, ") or gfx950 (", kMachGfx950, ")");
  }

  std::vector<Segment> segments() const {
    std::vector<Segment> out;
    for (int i = 0; i < header_.e_phnum; ++i) {
      const auto p =
          reader_.at<Elf64_Phdr>(header_.e_phoff + static_cast<uint64_t>(i) * header_.e_phentsize);
      if (p.p_type != PT_LOAD || p.p_memsz == 0) continue;
      reader_.range(p.p_offset, p.p_filesz);
      if (p.p_filesz > p.p_memsz || p.p_vaddr > kMaxImage || p.p_memsz > kMaxImage) {
        fail(ErrorCode::kDataCorrupt, "code object: segment ", i, " has impossible sizes");
      }
      out.push_back({p.p_vaddr, p.p_offset, p.p_filesz, p.p_memsz, (p.p_flags & PF_W) != 0});
    }
    return out;
  }

  std::unordered_map<std::string, Symbol> symbols() const {
    std::unordered_map<std::string, Symbol> out;
    for (const Elf64_Shdr& section : sections_) {
      if (section.sh_type != SHT_DYNSYM || section.sh_link >= sections_.size()) continue;
      for (uint64_t at = 0; at + sizeof(Elf64_Sym) <= section.sh_size; at += sizeof(Elf64_Sym)) {
        const auto symbol = reader_.at<Elf64_Sym>(section.sh_offset + at);
        out[reader_.text(sections_[section.sh_link].sh_offset + symbol.st_name)] = {symbol.st_value,
                                                                                    symbol.st_size};
      }
    }
    return out;
  }

  std::vector<Relocation> relocations() const {
    std::vector<Relocation> out;
    for (const Elf64_Shdr& section : sections_) {
      if (section.sh_type != SHT_RELA) continue;
      for (uint64_t at = 0; at + sizeof(Elf64_Rela) <= section.sh_size; at += sizeof(Elf64_Rela)) {
        const auto relocation = reader_.at<Elf64_Rela>(section.sh_offset + at);
        if (ELF64_R_TYPE(relocation.r_info) != kRelocationRelative64) {
          fail(ErrorCode::kUnsupported, "code object: relocation of type ",
               ELF64_R_TYPE(relocation.r_info), " (a variable that other code objects can see)");
        }
        out.push_back({relocation.r_offset, static_cast<uint64_t>(relocation.r_addend)});
      }
    }
    return out;
  }

  // The metadata note: MessagePack.
  json metadata() const {
    for (const Elf64_Shdr& section : sections_) {
      if (section.sh_type != SHT_NOTE) continue;
      uint64_t at = section.sh_offset;
      const uint64_t end = at + section.sh_size;
      while (at + sizeof(Elf64_Nhdr) <= end) {
        const auto note = reader_.at<Elf64_Nhdr>(at);
        const uint64_t name = at + sizeof(Elf64_Nhdr);
        const uint64_t description = name + (note.n_namesz + 3u) / 4 * 4;
        if (note.n_type == kNoteMetadata) {
          const auto bytes = reader_.range(description, note.n_descsz);
          const auto* begin = reinterpret_cast<const uint8_t*>(bytes.data());
          json out = json::from_msgpack(begin, begin + bytes.size(), true, false);
          if (out.is_discarded()) break;
          return out;
        }
        at = description + (note.n_descsz + 3u) / 4 * 4;
      }
    }
    fail(ErrorCode::kDataCorrupt, "code object has no kernel metadata");
  }

  /// Offset in the file of an address in memory.
  uint64_t file_offset(uint64_t address) const {
    for (const Segment& segment : segments()) {
      if (address >= segment.address && address - segment.address < segment.file_bytes) {
        return segment.file_offset + (address - segment.address);
      }
    }
    fail(ErrorCode::kDataCorrupt, "code object: address ", address, " is not in the file");
  }

 private:
  static constexpr uint64_t kMaxImage = uint64_t{1} << 30;
  static constexpr uint32_t kMachMask = 0xff;
  Reader reader_;
  Elf64_Ehdr header_;
  std::vector<Elf64_Shdr> sections_;
};

uint32_t number(const json& kernel, const char* key) {
  const auto it = kernel.find(key);
  return it != kernel.end() && it->is_number_unsigned() ? it->get<uint32_t>() : 0;
}

KernelInfo read_kernel(const Elf& elf, const std::unordered_map<std::string, Symbol>& symbols,
                       const json& data) {
  KernelInfo out;
  out.name = data.value(".name", "");
  out.arch = elf.arch();
  out.num_vgprs = number(data, ".vgpr_count");
  out.num_agprs = number(data, ".agpr_count");
  out.num_sgprs = number(data, ".sgpr_count");
  out.vgpr_spills = number(data, ".vgpr_spill_count");
  out.sgpr_spills = number(data, ".sgpr_spill_count");
  out.lds_bytes = number(data, ".group_segment_fixed_size");
  out.scratch_bytes = number(data, ".private_segment_fixed_size");
  out.kernarg_bytes = number(data, ".kernarg_segment_size");
  out.max_workgroup_size = number(data, ".max_flat_workgroup_size");
  if (data.contains(".args")) {
    for (const json& argument : data.at(".args")) {
      out.arguments.push_back({number(argument, ".offset"), number(argument, ".size"),
                               argument.value(".value_kind", "")});
    }
  }
  const auto code = symbols.find(out.name),
             descriptor = symbols.find(data.value(".symbol", out.name + ".kd"));
  if (code == symbols.end() || descriptor == symbols.end()) {
    fail(ErrorCode::kDataCorrupt, "code object: kernel ", out.name,
         " has no code or no descriptor");
  }
  out.begin = code->second.address;
  out.end = code->second.address + code->second.bytes;
  const uint64_t at = elf.file_offset(descriptor->second.address);
  out.resources3 = elf.reader().at<uint32_t>(at + 44);
  out.resources1 = elf.reader().at<uint32_t>(at + 48);
  out.resources2 = elf.reader().at<uint32_t>(at + 52);
  out.properties = elf.reader().at<uint16_t>(at + 56);
  out.preload = elf.reader().at<uint16_t>(at + 58);
  return out;
}

std::vector<std::byte> read_file(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) fail(ErrorCode::kNotFound, "code object ", path, " cannot be opened");
  const std::string text((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
  const auto* begin = reinterpret_cast<const std::byte*>(text.data());
  return {begin, begin + text.size()};
}

}  // namespace

uint32_t KernelInfo::explicit_bytes() const {
  uint32_t bytes = 0;
  for (const KernelArgument& argument : arguments) {
    if (!argument.hidden()) bytes = std::max(bytes, argument.offset + argument.size);
  }
  return bytes;
}

CodeObject CodeObject::from_bytes(std::span<const std::byte> bytes, std::string_view listing) {
  CodeObject out;
  out.bytes_.assign(bytes.begin(), bytes.end());
  const Elf elf(out.bytes_);
  out.arch_ = elf.arch();
  out.segments_ = elf.segments();
  out.relocations_ = elf.relocations();
  const json metadata = elf.metadata();
  const auto symbols = elf.symbols();
  if (metadata.is_object() && metadata.contains("amdhsa.kernels")) {
    try {
      for (const json& kernel : metadata.at("amdhsa.kernels")) {
        out.kernels_.push_back(read_kernel(elf, symbols, kernel));
      }
    } catch (const json::exception& error) {
      fail(ErrorCode::kDataCorrupt, "code object: kernel metadata: ", error.what());
    }
  }
  out.program_ = std::make_shared<const Program>(listing, out.arch_);
  return out;
}

CodeObject CodeObject::load(const std::string& path) {
  return from_bytes(read_file(path), disassemble(path));
}

CodeObject CodeObject::from_bytes(std::span<const std::byte> bytes) {
  // The disassembler wants a file.
  std::string path = (std::filesystem::temp_directory_path() / "dsv4_code_XXXXXX").string();
  const int file = mkstemp(path.data());
  if (file < 0) fail(ErrorCode::kDeviceError, "cannot create ", path);
  const bool written =
      write(file, bytes.data(), bytes.size()) == static_cast<ssize_t>(bytes.size());
  close(file);
  struct Remove {
    const std::string& path;
    ~Remove() { std::remove(path.c_str()); }
  } remove{path};
  if (!written) fail(ErrorCode::kDeviceError, "cannot write ", path);
  return from_bytes(bytes, disassemble(path));
}

const KernelInfo& CodeObject::kernel(const std::string& name) const {
  std::string names;
  for (const KernelInfo& kernel : kernels_) {
    if (kernel.name == name) return kernel;
    names += (names.empty() ? "" : ", ") + kernel.name;
  }
  fail(ErrorCode::kNotFound, "code object has no kernel ", name, "; it has ",
       names.empty() ? "none" : names);
}

}  // namespace dsv4::amd::isa
