// rocm:N over a runtime that is not AMD's (fake_runtime.cc): two devices, launches executed by the
// interpreter. What is proven is our side: the table of functions, device search, memory, streams,
// loading and finding kernels, arguments, recording. AMD's own runtime was never asked.
#include <gtest/gtest.h>

#include <cmath>
#include <cstdlib>
#include <numeric>
#include <set>
#include <string>
#include <vector>

#include "backends/amd/candidate_list.h"
#include "backends/amd/driver.h"
#include "backends/amd/hip_device.h"
#include "backends/amd/hip_launch.h"
#include "backends/amd/hip_runtime.h"
#include "backends/amd/isa/code_object.h"
#include "backends/amd/kernel_name.h"
#include "backends/amd/kernel_table.h"
#include "core/numbers.h"
#include "dsv4/backend.h"
#include "tests/attention/layer_harness.h"
#include "tests/testing/device_memory.h"

namespace dsv4::testing {
namespace {

// Before the runtime is first asked.
const bool kEnvironment = [] {
  setenv("FAKE_HIP_DEVICES", "gfx942,gfx950", 1);
  setenv("FAKE_HIP_BYTES", "67108864", 1);
  return true;
}();

template <typename F>
std::string error_of(ErrorCode code, F&& f) {
  try {
    f();
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), code) << error.what();
    return error.what();
  }
  ADD_FAILURE() << "expected an error";
  return "";
}

TEST(HipRuntime, IsTheFake) {
  ASSERT_TRUE(kEnvironment);
  std::string why_not;
  const amd::HipRuntime* hip = amd::find_hip_runtime(&why_not);
  ASSERT_NE(hip, nullptr) << why_not;
  EXPECT_EQ(hip->file_name, "libamdhip64.so.7");
}

TEST(HipDriver, DescribesTheDevices) {
  const DeviceSearch search = find_devices(Platform::kRocm);
  ASSERT_EQ(search.devices.size(), 2u) << search.why_none;
  EXPECT_EQ(search.devices[0].capability, (Capability{9, 4, 2}));
  EXPECT_EQ(search.devices[1].capability, (Capability{9, 5, 0}));
  EXPECT_EQ(search.devices[1].id, (DeviceId{Platform::kRocm, 1}));
  EXPECT_EQ(search.devices[0].name, "AMD Instinct (fake gfx)");
  for (const BackendReport& report : describe_backends()) {
    if (report.descriptor->platform == Platform::kRocm) {
      EXPECT_TRUE(report.usable()) << join_reasons(report.reasons);
    }
  }
  EXPECT_NE(error_of(ErrorCode::kUnsupported,
                     [] {
                       open_device({Platform::kRocm, 2}, 1);
                     })
                .find("rocm:2 of 2 devices"),
            std::string::npos);
}

class HipDevice : public ::testing::TestWithParam<int> {
 protected:
  void SetUp() override {
    if (!amd::isa::find_objdump().empty()) return;
    GTEST_SKIP() << "llvm-objdump-22 not found";
  }
  std::unique_ptr<Device> open() const { return open_device({Platform::kRocm, GetParam()}, 1); }
};

TEST_P(HipDevice, HasMemoryAndCopies) {
  const auto device = open();
  EXPECT_EQ(device->id(), (DeviceId{Platform::kRocm, GetParam()}));
  EXPECT_NE(device->description().find(GetParam() == 0 ? "(gfx942)" : "(gfx950)"),
            std::string::npos);
  const Stream stream = device->default_stream();
  std::vector<int32_t> values(1000), back(1000);
  std::iota(values.begin(), values.end(), 7);
  const Buffer first = device->allocate(4000), second = device->allocate(4000);
  device->copy_to_device(first.data(), values.data(), 4000, stream);
  device->copy_on_device(second.data(), first.data(), 4000, stream);
  device->copy_to_host(back.data(), second.data(), 4000, stream);
  device->synchronize(stream);
  EXPECT_EQ(back, values);
  const std::string text =
      error_of(ErrorCode::kOutOfMemory, [&] { (void)device->allocate(int64_t{1} << 27); });
  EXPECT_NE(text.find("134217728 bytes could not be allocated, 67100"), std::string::npos) << text;
  (void)device->allocate(1 << 20);  // and there it is again
}

// Two operations, each of several kernels, against what they must give.
TEST_P(HipDevice, RunsOperations) {
  const auto device = open();
  const Ops& ops = device->ops();
  const Subject subject{device.get(), &ops};
  DeviceMemory memory(*device);
  {
    constexpr int kTokens = 300;
    std::vector<int32_t> begin(kTokens), end(kTokens), expected, ptr{0};
    for (int t = 0; t < kTokens; ++t) {
      begin[static_cast<size_t>(t)] = std::max(0, t - 9);
      end[static_cast<size_t>(t)] = t + 1;
      for (int row = std::max(0, t - 9); row <= t; ++row)
        expected.push_back((row / 64 % 2 == 0 ? 5 : 3) * 64 + row % 64);
      ptr.push_back(static_cast<int32_t>(expected.size()));
    }
    int32_t* indptr = memory.put(std::vector<int32_t>(kTokens + 1, -7));
    int32_t* slots = memory.put(std::vector<int32_t>(expected.size(), -7));
    run_op(subject, ops.ragged_rows,
           RaggedRowsParams{.rows = RangeRows{{},
                                              {memory.put(std::vector<int32_t>{5, 3}), 2, 2, 64},
                                              memory.put(begin),
                                              memory.put(end)},
                            .token_to_seq = memory.put(std::vector<int32_t>(kTokens, 0)),
                            .num_tokens = kTokens,
                            .indptr = indptr,
                            .slots = slots});
    EXPECT_EQ(memory.get(indptr, kTokens + 1), ptr);
    EXPECT_EQ(memory.get(slots, std::ssize(expected)), expected);
  }
  const auto cpu = open_device({Platform::kCpu, 0}, 1);
  std::vector<Bf16> x;
  for (int i = 0; i < 3 * 512; ++i) x.emplace_back(static_cast<float>((i * 37) % 101) / 16 - 3);
  const auto norm = [&](Device& on) {
    DeviceMemory its(on);
    Bf16* out = its.put(std::vector<Bf16>(x.size()));
    run_op(Subject{&on, &on.ops()}, on.ops().rms_norm,
           RmsNormParams{
               .x = ConstTensor(its.put(x), DType::kBf16, {3, 512}),
               .weight = ConstTensor(its.put(std::vector<float>(512, 1.25f)), DType::kF32, {512}),
               .eps = 1e-6f,
               .out = Tensor(out, DType::kBf16, {3, 512})});
    std::vector<uint16_t> bits;
    for (Bf16 value : its.get(out, std::ssize(x))) bits.push_back(value.bits);
    return bits;
  };
  EXPECT_EQ(norm(*device), norm(*cpu)) << "bit for bit the CPU's";
}

TEST_P(HipDevice, RecordsAndReplays) {
  const auto device = open();
  const Ops& ops = device->ops();
  DeviceMemory memory(*device);
  const Stream stream = device->default_stream();
  std::vector<float> table(64);
  std::iota(table.begin(), table.end(), 0.f);
  int32_t* row = memory.put(std::vector<int32_t>{2});
  float* out = memory.put(std::vector<float>(4, -1.f));
  ASSERT_TRUE(device->can_record());
  Arena scratch(memory.raw(4096), 4096);
  const float* in = memory.put(table);
  const auto gather = [&] {
    ops.gather_rows({.x = ConstTensor(in, DType::kF32, {16, 4}),
                     .rows = row,
                     .out = Tensor(out, DType::kF32, {1, 4})},
                    {stream, &scratch, &ops});
  };
  const std::unique_ptr<RecordedWork> work = device->record(stream, gather);
  EXPECT_EQ(memory.get(out, 4), std::vector<float>(4, -1.f)) << "recording runs nothing";
  for (int32_t wanted : {2, 9}) {
    device->copy_to_device(row, &wanted, sizeof wanted, stream);
    work->launch(stream);
    EXPECT_EQ(memory.get(out, 1)[0], static_cast<float>(4 * wanted));
  }
  const std::string text = error_of(ErrorCode::kInternal, [&] {
    (void)device->record(stream, [] { fail(ErrorCode::kInternal, "the body"); });
  });
  EXPECT_EQ(text, "the body");
  gather();  // the stream records no more
}

// A fault of a kernel is the launch's error.
TEST_P(HipDevice, ReportsAFault) {
  const auto device = open();
  const Ops& ops = device->ops();
  DeviceMemory memory(*device);
  Arena scratch(memory.raw(4096), 4096);
  const std::string text = error_of(ErrorCode::kDeviceError, [&] {
    static float elsewhere[4];
    ops.zero({Tensor(elsewhere, DType::kF32, {1, 4})}, {device->default_stream(), &scratch, &ops});
  });
  EXPECT_NE(text.find("module_launch_kernel"), std::string::npos) << text;
  EXPECT_NE(text.find(concat("rocm:", GetParam())), std::string::npos) << text;
}

// The layer through the runtime: compiled kernels of every step in the interpreter, against the
// same sources on the executor, which the oracle is compared with (tests/attention).
TEST_P(HipDevice, RunsTheLayer) {
  for (int ratio : {0, 4, 128}) {
    ModelConfig config = small_config(4, 2);
    config.index_topk = 8;  // leaves entries out from position 35 on
    Numerics numerics = kServing;
    numerics.wo_a = WoA::kBf16;
    const StepLimits limits{48, 1, 136};
    const LayerTarget target{"ROCM_FLASHMLA_SPARSE_DSV4", concat("rocm:", GetParam())};
    LayerHarness compiled(config, ratio, numerics, limits, {}, target);
    LayerHarness emulated(config, ratio, numerics, limits, {}, emulated_target());
    const SequenceId a = compiled.pool().create().value(), b = emulated.pool().create().value();
    double difference = 0, magnitude = 0;
    for (int tokens : {40, 1}) {
      const std::vector<float> hidden = formula_hidden(tokens, config.hidden_size, 50 + tokens);
      const std::vector<float> actual = compiled.forward(a, hidden);
      const std::vector<float> expected = emulated.forward(b, hidden);
      for (size_t i = 0; i < actual.size(); ++i) {
        ASSERT_TRUE(std::isfinite(actual[i]));
        difference += std::pow(double{actual[i]} - expected[i], 2);
        magnitude += std::pow(double{expected[i]}, 2);
      }
    }
    // Exponentials differ in the last place (isa/README.md), which now and then turns a rounding of
    // P or of a head to bf16 the other way, and then, at the input of wo_b, one to E4M3.
    EXPECT_LT(std::sqrt(difference / magnitude), 0x1p-6) << "ratio " << ratio;
    printf("ratio %d: relative difference %.2g\n", ratio, std::sqrt(difference / magnitude));
  }
}

// Names of every kernel that some operation of the list may start.
std::set<std::string>& reached() {
  static std::set<std::string> names;
  return names;
}
class NamingLaunch {
 public:
  static constexpr bool kBf16Only = amd::HipLaunch::kBf16Only;
  explicit NamingLaunch(const OpContext&) {}
  template <typename Kernel>
  void run(int64_t, const typename Kernel::Params&) const {
    (void)kNamed<Kernel>;
  }

 private:
  template <typename Kernel>
  static inline const bool kNamed = reached().insert(gpu::amd_entry_name<Kernel>()).second;
};

TEST_P(HipDevice, EveryKernelOfTheHostIsInACodeObject) {
  const auto device = open();
  (void)amd::candidates<NamingLaunch>();  // instantiates them all
  EXPECT_GT(reached().size(), 60u);
  amd::KernelTable& kernels = amd::KernelTable::current();
  for (const std::string& name : reached()) {
    if (name.find("gfx950") != std::string::npos && GetParam() == 0) continue;
    EXPECT_NO_THROW((void)kernels.find(name)) << name;
  }
  EXPECT_NE(error_of(ErrorCode::kInternal, [&] { (void)kernels.find("no_such_kernel"); })
                .find(GetParam() == 0 ? "gfx942 has the kernel no_such" : "gfx950 has the kernel"),
            std::string::npos);
}

INSTANTIATE_TEST_SUITE_P(Chips, HipDevice, ::testing::Values(0, 1), [](const auto& info) {
  return std::string(info.param == 0 ? "gfx942" : "gfx950");
});

}  // namespace
}  // namespace dsv4::testing
