// A GPU without hardware: launches execute the compiled code objects of one chip in the interpreter
// (src/backends/amd/isa), and kernels reach nothing but the device's own allocations. Tests open it
// through op_candidates.h ("gfx942", "gfx942_reverse", ...), or build a table of operations:
//
//   InterpreterDevice device(Arch::kGfx942, WaveOrder::kReverse, num_threads);
//   Ops ops;
//   amd::install_attend<InterpreterLaunch>(ops);
//
// What the interpreter refuses is an Error that names kernel, workgroup, wave and instruction: an
// access outside of every allocation, a race in local memory, an instruction that is not modelled.
#pragma once
#include <cstddef>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <utility>

#include "backends/amd/isa/machine.h"
#include "backends/amd/kernel_name.h"
#include "dsv4/device.h"
#include "ops/ops.h"

namespace dsv4::testing {

/// Empty when compiled kernels can be executed here, else why not.
std::string why_not_interpreted();

/// The code objects of one chip.
class CompiledKernels {
 public:
  /// Those of the AMD backend. Loaded once per process, thread-safe.
  static const CompiledKernels& of(amd::isa::Arch arch);
  /// <folder>/*_<arch>.co
  CompiledKernels(const std::string& folder, amd::isa::Arch arch);
  CompiledKernels(CompiledKernels&&) = default;
  amd::isa::Arch arch() const { return arch_; }
  /// The code object with the entry `symbol`. @throws Error kNotFound.
  const amd::isa::CodeObject& with(const std::string& symbol) const;
  const std::map<std::string, amd::isa::CodeObject>& by_file() const { return by_file_; }

 private:
  amd::isa::Arch arch_;
  std::string folder_;
  std::map<std::string, amd::isa::CodeObject> by_file_;
  std::map<std::string, const amd::isa::CodeObject*> by_symbol_;
};

class InterpreterDevice final : public Device {
 public:
  InterpreterDevice(amd::isa::Arch arch, amd::isa::WaveOrder order, int num_threads)
      : InterpreterDevice(CompiledKernels::of(arch), order, num_threads) {}
  /// `kernels` must outlive it.
  InterpreterDevice(const CompiledKernels& kernels, amd::isa::WaveOrder order, int num_threads);

  /// Starts the entry `symbol` with `params` as its one parameter.
  void run(const std::string& symbol, int64_t blocks, int threads,
           std::span<const std::byte> params);
  /// From now on the barrier at `address` of the entry `symbol` does nothing.
  void drop_barrier(const std::string& symbol, uint64_t address);
  /// Wave instructions of all launches so far.
  uint64_t wave_instructions() const { return wave_instructions_; }
  /// From now on `executed` is kept.
  void count_mnemonics() { options_.count_mnemonics = true; }
  /// Wave instructions of all launches of an entry so far, by mnemonic.
  const std::map<std::string, uint64_t>& executed(const std::string& symbol) {
    return executed_[symbol];
  }
  /// Launches of every entry so far.
  const std::map<std::string, int64_t>& launches() const { return launches_; }

  DeviceId id() const override { return {Platform::kRocm, -1}; }
  std::string description() const override;
  Buffer allocate(int64_t bytes) override;
  void copy_to_device(void* device, const void* host, int64_t bytes, Stream stream) override;
  void copy_to_host(void* host, const void* device, int64_t bytes, Stream stream) override;
  void copy_on_device(void* to, const void* from, int64_t bytes, Stream stream) override;
  void synchronize(Stream) override {}
  bool reads_host_memory() const override { return false; }
  Stream default_stream() override { return {this}; }
  int num_threads() const override { return options_.num_threads; }
  const Ops& ops() const override;  ///< throws: a table belongs to the test

 private:
  amd::isa::Machine& machine_with(const std::string& symbol);

  const CompiledKernels& kernels_;
  amd::isa::LaunchOptions options_;
  std::string dropped_in_;                 // options_.dropped_barrier belongs to this entry
  std::map<const void*, int64_t> memory_;  // allocation -> bytes
  // A code object's image, and whether it knows the allocations as they are.
  struct Loaded {
    amd::isa::Machine machine;
    bool knows_memory = false;
  };
  std::map<const amd::isa::CodeObject*, Loaded> loaded_;
  std::map<std::string, int64_t> launches_;
  std::map<std::string, std::map<std::string, uint64_t>> executed_;
  uint64_t wave_instructions_ = 0;
};

/// The launcher of operations (gpu/rowwise_ops.h) whose stream is an InterpreterDevice.
class InterpreterLaunch {
 public:
  static constexpr bool kBf16Only = true;  // as what is compiled (amd/entries.h)
  explicit InterpreterLaunch(const OpContext& context)
      : device_(static_cast<InterpreterDevice*>(context.stream.handle)) {}
  template <typename Kernel>
  void run(int64_t blocks, const typename Kernel::Params& params) const {
    device_->run(gpu::amd_entry_name<Kernel>(), blocks, Kernel::kThreads,
                 std::as_bytes(std::span(&params, 1)));
  }

 private:
  InterpreterDevice* device_;
};

}  // namespace dsv4::testing
