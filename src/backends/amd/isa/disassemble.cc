#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <string>

#include "backends/amd/isa/code_object.h"
#include "core/fail.h"

namespace dsv4::amd::isa {
namespace {

// Quoted for the shell.
std::string quoted(const std::string& text) {
  std::string out = "'";
  for (const char c : text) {
    if (c == '\'')
      out += "'\\''";
    else
      out += c;
  }
  return out + "'";
}

bool is_file(const std::string& path) {
  std::error_code error;
  return std::filesystem::is_regular_file(path, error);
}

}  // namespace

std::string find_objdump() {
  if (const char* path = std::getenv("DSV4_LLVM_OBJDUMP"); path != nullptr)
    return is_file(path) ? path : "";
  if (is_file(DSV4_LLVM_OBJDUMP_PATH)) return DSV4_LLVM_OBJDUMP_PATH;
  const char* path = std::getenv("PATH");
  std::string rest = path == nullptr ? "" : path;
  while (!rest.empty()) {
    const size_t colon = rest.find(':');
    const std::string candidate = rest.substr(0, colon) + "/llvm-objdump-22";
    if (is_file(candidate)) return candidate;
    rest = colon == std::string::npos ? "" : rest.substr(colon + 1);
  }
  return "";
}

std::string disassemble(const std::string& path) {
  const std::string objdump = find_objdump();
  if (objdump.empty()) {
    fail(ErrorCode::kNotFound,
         "llvm-objdump-22 not found (package llvm-22, or set DSV4_LLVM_OBJDUMP)");
  }
  if (!is_file(path)) fail(ErrorCode::kNotFound, "code object ", path, " does not exist");
  const std::string command = quoted(objdump) + " -d " + quoted(path) + " 2>&1";
  std::FILE* pipe = popen(command.c_str(), "r");
  if (pipe == nullptr) fail(ErrorCode::kDeviceError, "cannot start ", objdump);
  std::string out;
  char buffer[1 << 16];
  while (const size_t bytes = std::fread(buffer, 1, sizeof buffer, pipe)) out.append(buffer, bytes);
  if (pclose(pipe) != 0) {
    fail(ErrorCode::kDataCorrupt, "llvm-objdump cannot read ", path, ": ", out.substr(0, 300));
  }
  return out;
}

}  // namespace dsv4::amd::isa
