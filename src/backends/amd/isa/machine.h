// Executes kernels of a code object on the host: workgroups, waves of 64 lanes, local memory,
// bounds-checked global memory. What is modelled and what is not: README.md.
#pragma once
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <string>

#include "backends/amd/isa/code_object.h"
#include "backends/amd/isa/memory.h"

namespace dsv4::amd::isa {

struct Dim3 {
  uint32_t x = 1, y = 1, z = 1;
};

/// In which order the waves of a workgroup run between two barriers.
enum class WaveOrder { kForward, kReverse };

struct LaunchOptions {
  WaveOrder order = WaveOrder::kForward;
  /// Workgroups run on this many threads. Use 1 where workgroups talk to each other.
  int num_threads = 1;
  uint32_t dynamic_lds_bytes = 0;
  /// Reports accesses of two waves to one byte of local memory without a barrier between them,
  /// unless both read or one is atomic. Costs about half of the speed of LDS-bound kernels.
  bool check_races = true;
  /// Fills RunResult::mnemonics.
  bool count_mnemonics = false;
  /// A wave that executes more is taken for one that never ends.
  uint64_t max_wave_instructions = 1'000'000'000;
  /// For negative controls: the barrier at this address of the listing does nothing.
  std::optional<uint64_t> dropped_barrier = {};
};

struct RunResult {
  uint64_t wave_instructions = 0;
  std::map<std::string, uint64_t> mnemonics;  ///< executed wave instructions of each
};

/// One loaded code object and the buffers its kernels may use. Thread-compatible.
class Machine {
 public:
  explicit Machine(CodeObject code);

  const CodeObject& code() const { return code_; }
  /// Lets kernels read, or also write, [data, data + bytes). The name appears in messages. Throws
  /// kInvalidArgument when it is empty or overlaps another buffer.
  void add_buffer(void* data, uint64_t bytes, std::string name);
  void add_read_only_buffer(const void* data, uint64_t bytes, std::string name);
  void clear_buffers();

  /// Runs a kernel to its end. `grid` counts workgroups, `block` their threads; `kernarg` are the
  /// explicit arguments, laid out as the kernel's parameters. Throws kInvalidArgument for a launch
  /// that a device would refuse, kUnsupported for an instruction that is not modelled, kDeviceError
  /// for a fault of the kernel; the message names kernel, workgroup, wave and instruction.
  RunResult run(const std::string& kernel, Dim3 grid, Dim3 block,
                std::span<const std::byte> kernarg, const LaunchOptions& options = {});
  /// As above for arguments in a struct that is laid out as the kernel's parameters.
  template <typename Arguments>
  RunResult run(const std::string& kernel, Dim3 grid, Dim3 block, const Arguments& arguments,
                const LaunchOptions& options = {}) {
    static_assert(std::is_trivially_copyable_v<Arguments>);
    return run(kernel, grid, block, std::as_bytes(std::span(&arguments, 1)), options);
  }

 private:
  void load_image();

  CodeObject code_;
  std::unique_ptr<std::byte[]> image_storage_;
  uint64_t image_base_ = 0;
  GlobalMemory memory_;
};

}  // namespace dsv4::amd::isa
