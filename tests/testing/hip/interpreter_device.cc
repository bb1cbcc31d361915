#include "tests/testing/hip/interpreter_device.h"

#include <cstdlib>
#include <cstring>
#include <filesystem>

#include "core/fail.h"

namespace dsv4::testing {
namespace {

using amd::isa::Arch;
using amd::isa::CodeObject;

constexpr int64_t kAlignment = 256;

void copy(void* to, const void* from, int64_t bytes) {
  if (bytes > 0) std::memcpy(to, from, static_cast<size_t>(bytes));
}

}  // namespace

std::string why_not_interpreted() {
  return amd::isa::find_objdump().empty() ? "llvm-objdump-22 not found" : "";
}

// ---- code objects

CompiledKernels::CompiledKernels(const std::string& folder, Arch arch)
    : arch_(arch), folder_(folder) {
  const std::string ending = concat("_", arch_name(arch), ".co");
  for (const auto& entry : std::filesystem::directory_iterator(folder)) {
    const std::string file = entry.path().filename().string();
    if (!file.ends_with(ending)) continue;
    const auto [at, is_new] = by_file_.emplace(file, CodeObject::load(entry.path().string()));
    for (const amd::isa::KernelInfo& kernel : at->second.kernels())
      by_symbol_[kernel.name] = &at->second;
  }
}

const CompiledKernels& CompiledKernels::of(Arch arch) {
  if (arch == Arch::kGfx942) {
    static const CompiledKernels gfx942(DSV4_AMD_OPS_DIR, Arch::kGfx942);
    return gfx942;
  }
  static const CompiledKernels gfx950(DSV4_AMD_OPS_DIR, Arch::kGfx950);
  return gfx950;
}

const CodeObject& CompiledKernels::with(const std::string& symbol) const {
  const auto at = by_symbol_.find(symbol);
  if (at == by_symbol_.end()) {
    fail(ErrorCode::kNotFound, "no code object for ", arch_name(arch_), " in ", folder_,
         " has the entry ", symbol);
  }
  return *at->second;
}

// ---- device

InterpreterDevice::InterpreterDevice(const CompiledKernels& kernels, amd::isa::WaveOrder order,
                                     int num_threads)
    : kernels_(kernels) {
  DSV4_CHECK(num_threads >= 1);
  options_.order = order;
  options_.num_threads = num_threads;
}

std::string InterpreterDevice::description() const {
  return concat("compiled kernels for ", arch_name(kernels_.arch()), ", interpreted");
}

const Ops& InterpreterDevice::ops() const {
  fail(ErrorCode::kUnsupported, "the interpreter's device has no operations of its own");
}

Buffer InterpreterDevice::allocate(int64_t bytes) {
  DSV4_CHECK(bytes >= 0);
  void* data = nullptr;
  if (posix_memalign(&data, kAlignment, static_cast<size_t>(std::max<int64_t>(bytes, 1))) != 0)
    fail(ErrorCode::kOutOfMemory, id().str(), ": ", bytes, " bytes could not be allocated");
  const auto changed = [this] {
    for (auto& [code, loaded] : loaded_) loaded.knows_memory = false;
  };
  if (bytes > 0) memory_[data] = bytes;
  changed();
  return Buffer(data, bytes, [this, changed](void* pointer) {
    memory_.erase(pointer);
    changed();
    std::free(pointer);
  });
}

void InterpreterDevice::copy_to_device(void* device, const void* host, int64_t bytes, Stream) {
  copy(device, host, bytes);
}
void InterpreterDevice::copy_to_host(void* host, const void* device, int64_t bytes, Stream) {
  copy(host, device, bytes);
}
void InterpreterDevice::copy_on_device(void* to, const void* from, int64_t bytes, Stream) {
  copy(to, from, bytes);
}

amd::isa::Machine& InterpreterDevice::machine_with(const std::string& symbol) {
  const CodeObject& code = kernels_.with(symbol);
  const auto [at, is_new] = loaded_.try_emplace(&code, Loaded{amd::isa::Machine(code), false});
  Loaded& loaded = at->second;
  if (!loaded.knows_memory) {
    loaded.machine.clear_buffers();
    for (const auto& [data, bytes] : memory_) {
      loaded.machine.add_buffer(const_cast<void*>(data), static_cast<uint64_t>(bytes),
                                concat("allocation of ", bytes, " bytes"));
    }
    loaded.knows_memory = true;
  }
  return loaded.machine;
}

void InterpreterDevice::drop_barrier(const std::string& symbol, uint64_t address) {
  dropped_in_ = symbol;
  options_.dropped_barrier = address;
}

void InterpreterDevice::run(const std::string& symbol, int64_t blocks, int threads,
                            std::span<const std::byte> params) {
  if (blocks == 0) return;
  DSV4_CHECK(blocks > 0 && blocks < int64_t{1} << 31);
  ++launches_[symbol];
  amd::isa::LaunchOptions options = options_;
  if (symbol != dropped_in_) options.dropped_barrier.reset();
  const amd::isa::RunResult result = machine_with(symbol).run(
      symbol, {static_cast<uint32_t>(blocks)}, {static_cast<uint32_t>(threads)}, params, options);
  wave_instructions_ += result.wave_instructions;
  for (const auto& [mnemonic, count] : result.mnemonics) executed_[symbol][mnemonic] += count;
}

}  // namespace dsv4::testing
