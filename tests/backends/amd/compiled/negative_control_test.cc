// Compiled kernels that are wrong on purpose: the machine code of the backend with one barrier that
// does nothing, and the sources of wrong/ with one mistake each. What tests of the right kernels
// look at must change, or the interpreter must refuse.
#include <algorithm>

#include "backends/cpu/candidates.h"
#include "backends/cpu/cpu_device.h"
#include "backends/gpu/model_rows_ops.h"
#include "dsv4/error.h"
#include "tests/backends/amd/compiled/kernel_gate.h"
#include "tests/backends/amd/compiled/small_steps.h"

namespace dsv4::testing {
namespace {

using amd::isa::Arch;
using amd::isa::WaveOrder;

Ops interpreted_ops() {
  Ops ops;
  gpu::install_rowwise<InterpreterLaunch>(ops);
  gpu::install_model_rows<InterpreterLaunch>(ops);
  return ops;
}

std::string chip_name(const ::testing::TestParamInfo<Arch>& info) {
  return arch_name(info.param);
}

// ---- barriers

class DroppedBarriers : public ::testing::TestWithParam<Arch> {
 protected:
  void SetUp() override {
    if (!why_not_interpreted().empty()) GTEST_SKIP() << why_not_interpreted();
  }
};
INSTANTIATE_TEST_SUITE_P(Chips, DroppedBarriers, ::testing::Values(Arch::kGfx942, Arch::kGfx950),
                         chip_name);

// Addresses of the barriers of an entry.
std::vector<uint64_t> barriers_of(Arch arch, const std::string& symbol) {
  const amd::isa::CodeObject& code = CompiledKernels::of(arch).with(symbol);
  const amd::isa::KernelInfo& kernel = code.kernel(symbol);
  std::vector<uint64_t> out;
  for (const amd::isa::Instruction& i : code.program().code()) {
    if (i.address >= kernel.begin && i.address < kernel.end &&
        code.program().listed(i).mnemonic == "s_barrier")
      out.push_back(i.address);
  }
  return out;
}

// What the interpreter says to a step, in both orders of waves, with that barrier dropped.
bool is_caught(Arch arch, const SmallStep& step, const std::string& symbol, uint64_t address) {
  const Ops ops = interpreted_ops();
  int races = 0;
  for (const WaveOrder order : {WaveOrder::kForward, WaveOrder::kReverse}) {
    InterpreterDevice device(arch, order, 1);
    DeviceMemory memory(device);
    device.drop_barrier(symbol, address);
    try {
      step.run(memory, {&device, &ops});
    } catch (const Error& error) {
      races += std::string(error.what()).find("LDS race") != std::string::npos ? 1 : 0;
    }
  }
  EXPECT_NE(races, 1) << step.name << ": the two orders disagree";
  return races == 2;
}

// Barriers that no wave of 64 needs: their data stay in one wave.
bool is_within_a_wave(const std::string& kernel, size_t barrier) {
  // 25 sums of a token with four streams; eight streams have 81.
  return kernel.starts_with("HcFinish") && kernel.ends_with("4>") && barrier == 0;
}

// Every barrier of every kernel is missed by one of the steps that start it.
TEST_P(DroppedBarriers, AreAllCaught) {
  std::map<std::string, std::vector<SmallStep>> steps_of;  // by entry
  const Ops ops = interpreted_ops();
  for (const SmallStep& step : small_steps()) {
    InterpreterDevice device(GetParam(), WaveOrder::kForward, 1);
    DeviceMemory memory(device);
    step.run(memory, {&device, &ops});
    for (const auto& [symbol, count] : device.launches()) steps_of[symbol].push_back(step);
  }
  size_t dropped = 0;
  for (const auto& [symbol, steps] : steps_of) {
    const std::vector<uint64_t> barriers = barriers_of(GetParam(), symbol);
    for (size_t i = 0; i < barriers.size(); ++i, ++dropped) {
      const bool caught = std::any_of(steps.begin(), steps.end(), [&](const SmallStep& step) {
        return is_caught(GetParam(), step, symbol, barriers[i]);
      });
      const std::string kernel = kernel_of(symbol);
      EXPECT_EQ(caught, !is_within_a_wave(kernel, i))
          << kernel << ", barrier " << i << " at 0x" << std::hex << barriers[i];
    }
  }
  EXPECT_GE(dropped, 15u);
}

// ---- wrong sources

class WrongKernels : public ::testing::TestWithParam<Arch> {
 protected:
  void SetUp() override {
    if (!why_not_interpreted().empty()) GTEST_SKIP() << why_not_interpreted();
    cpu_ = cpu::open_cpu_device(1);
    cpu_ops_ = cpu::make_ops("");
    right_ = bytes_on(*cpu_, cpu_ops_);
  }
  static Bytes bytes_on(Device& device, const Ops& ops) {
    DeviceMemory memory(device);
    return small_insert(memory, {&device, &ops});
  }
  /// wrong/<file>.hip
  CompiledKernels wrong(const std::string& file) const {
    return {std::string(DSV4_WRONG_KERNELS_DIR) + "/" + file, GetParam()};
  }

  const Ops ops_ = interpreted_ops();
  Bytes right_;
  std::unique_ptr<Device> cpu_;
  Ops cpu_ops_;
};
INSTANTIATE_TEST_SUITE_P(Chips, WrongKernels, ::testing::Values(Arch::kGfx942, Arch::kGfx950),
                         chip_name);

TEST_P(WrongKernels, TheRightOneHasTheBytesOfTheCpu) {
  InterpreterDevice device(GetParam(), WaveOrder::kForward, 1);
  EXPECT_EQ(bytes_on(device, ops_), right_);
}

TEST_P(WrongKernels, WithoutTheFixFp8IsFnuzOnGfx942) {
  const CompiledKernels kernels = wrong("hardware_fp8");
  InterpreterDevice device(kernels, WaveOrder::kForward, 1);
  const Bytes actual = bytes_on(device, ops_);
  ASSERT_EQ(actual.size(), right_.size());
  int differ = 0;
  for (size_t i = 0; i < actual.size(); ++i) differ += actual[i] != right_[i];
  // Three rows of 448 codes; a zero has the same code in both.
  if (GetParam() == Arch::kGfx942) {
    EXPECT_GT(differ, 3 * 400);
    EXPECT_LE(differ, 3 * 448);
  } else {
    EXPECT_EQ(differ, 0);  // the instruction is what the integer code computes
  }
}

TEST_P(WrongKernels, RowOffByOneIsOutOfBounds) {
  const CompiledKernels kernels = wrong("next_block");
  InterpreterDevice device(kernels, WaveOrder::kForward, 1);
  try {
    bytes_on(device, ops_);
    ADD_FAILURE() << "the last block reads heads of a token that does not exist";
  } catch (const Error& error) {
    EXPECT_NE(std::string(error.what()).find("out-of-bounds read"), std::string::npos)
        << error.what();
  }
}

// Without guard bytes around them allocations end where the kernel leaves them.
TEST_P(WrongKernels, IndexOffByOneIsOutOfBounds) {
  const CompiledKernels kernels = wrong("next_block");
  const auto gather = [&](const CompiledKernels& from) -> std::string {
    InterpreterDevice device(from, WaveOrder::kForward, 1);
    const Buffer x = device.allocate(3 * 256), out = device.allocate(2 * 256),
                 rows = device.allocate(8);
    const int32_t numbers[] = {2, 0};
    device.copy_to_device(rows.data(), numbers, sizeof numbers, {});
    Arena scratch(nullptr, 0);
    const gpu::GatherRowsArgs args{.x = reinterpret_cast<const uint8_t*>(x.data()),
                                   .x_stride_bytes = 256,
                                   .rows = reinterpret_cast<const int32_t*>(rows.data()),
                                   .out = reinterpret_cast<uint8_t*>(out.data()),
                                   .out_stride_bytes = 256,
                                   .row_bytes = 256,
                                   .blocks_per_row = 1};
    try {
      InterpreterLaunch({device.default_stream(), &scratch, &ops_}).run<gpu::GatherRows>(2, args);
    } catch (const Error& error) {
      return error.what();
    }
    return "";
  };
  EXPECT_EQ(gather(CompiledKernels::of(GetParam())), "");
  const std::string message = gather(kernels);
  EXPECT_NE(message.find("out-of-bounds read of 4 bytes"), std::string::npos) << message;
  EXPECT_NE(message.find("nearest buffer is allocation of 8 bytes"), std::string::npos) << message;
  EXPECT_NE(message.find("workgroup (1, 0, 0)"), std::string::npos) << message;
}

}  // namespace
}  // namespace dsv4::testing
