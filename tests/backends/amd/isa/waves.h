// Runs kernels of corpus/waves.hip on both chips and in both wave orders.
#pragma once
#include <gtest/gtest.h>

#include <memory>
#include <string>
#include <vector>

#include "backends/amd/isa/machine.h"
#include "dsv4/error.h"
#include "tests/backends/amd/isa/compiled.h"
#include "tests/testing/random.h"

namespace dsv4::amd::isa {

struct Setting {
  Arch arch;
  WaveOrder order;
};

class Waves : public ::testing::TestWithParam<Setting> {
 protected:
  void SetUp() override {
    if (!why_not_compiled().empty()) GTEST_SKIP() << why_not_compiled();
    machine = std::make_unique<Machine>(code(GetParam().arch));
  }
  static const CodeObject& code(Arch arch) {
    static const CodeObject gfx942 = CodeObject::load(compiled("waves", Arch::kGfx942));
    static const CodeObject gfx950 = CodeObject::load(compiled("waves", Arch::kGfx950));
    return arch == Arch::kGfx942 ? gfx942 : gfx950;
  }
  LaunchOptions options() const {
    LaunchOptions out;
    out.order = GetParam().order;
    return out;
  }
  template <typename T>
  T* writable(std::vector<T>& v, const char* name) {
    machine->add_buffer(v.data(), v.size() * sizeof(T), name);
    return v.data();
  }
  template <typename T>
  const T* readable(const std::vector<T>& v, const char* name) {
    machine->add_read_only_buffer(v.data(), v.size() * sizeof(T), name);
    return v.data();
  }
  template <typename Arguments>
  void run(const std::string& kernel, Dim3 grid, Dim3 block, const Arguments& arguments) {
    machine->run(kernel, grid, block, arguments, options());
  }
  /// The message of the error that a launch throws.
  template <typename Arguments>
  std::string error_of(const std::string& kernel, Dim3 grid, Dim3 block, const Arguments& arguments,
                       const LaunchOptions& options, ErrorCode expected = ErrorCode::kDeviceError) {
    try {
      machine->run(kernel, grid, block, arguments, options);
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), expected) << error.what();
      return error.what();
    }
    return "";
  }
  std::unique_ptr<Machine> machine;
};
inline auto all_settings() {
  return ::testing::Values(
      Setting{Arch::kGfx942, WaveOrder::kForward}, Setting{Arch::kGfx942, WaveOrder::kReverse},
      Setting{Arch::kGfx950, WaveOrder::kForward}, Setting{Arch::kGfx950, WaveOrder::kReverse});
}
inline std::string setting_name(const ::testing::TestParamInfo<Setting>& info) {
  return std::string(arch_name(info.param.arch)) +
         (info.param.order == WaveOrder::kForward ? "_forward" : "_reverse");
}

template <typename T = int>
inline std::vector<T> numbers(size_t count, int64_t below, uint64_t seed = 1) {
  dsv4::testing::Random random(seed);
  std::vector<T> out(count);
  for (T& x : out) x = static_cast<T>(random.below(below));
  return out;
}

}  // namespace dsv4::amd::isa
