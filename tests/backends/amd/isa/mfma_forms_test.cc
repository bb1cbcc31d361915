// The functions of mfma.h: the executor's product against plain sums, and the compiled instruction
// in the interpreter against the executor.
#include <gtest/gtest.h>

#include <cstring>
#include <vector>

#include "backends/amd/isa/machine.h"
#include "core/numbers.h"
#include "tests/backends/amd/isa/compiled.h"
#include "tests/backends/amd/isa/corpus/mfma_forms.h"
#include "tests/testing/random.h"

namespace dsv4::amd::isa {
namespace {

using dsv4::testing::Random;

// Operands of one product: numbers by (row or column, k), and as the lanes hold them.
template <typename Form>
struct Operands {
  static constexpr bool kFp8 = std::is_same_v<Form, forms::Fp8K32>;
  static constexpr int kPerLane = sizeof(typename Form::Operand) / (kFp8 ? 1 : 2);
  static constexpr int kDepth = 4 * kPerLane;

  // Integers up to 15 are exact in every sum; others are not.
  explicit Operands(bool integers) : a(64), b(64), c(64), a_values(16), b_values(16) {
    Random random(11);
    const auto fill = [&](std::vector<typename Form::Operand>& lanes,
                          std::vector<std::vector<float>>& values) {
      for (auto& row : values) row.resize(kDepth);
      for (size_t lane = 0; lane < 64; ++lane) {
        for (size_t j = 0; j < kPerLane; ++j) {
          const auto drawn = static_cast<float>(
              integers ? static_cast<double>(random.below(31)) - 15 : random.normal());
          auto* at = reinterpret_cast<uint8_t*>(&lanes[lane]) + j * (kFp8 ? 1 : 2);
          float value = 0;
          if (kFp8) {
            *at = f32_to_e4m3(drawn);
            value = e4m3_to_f32(*at);
          } else {
            const uint16_t bits = f32_to_bf16(drawn);
            std::memcpy(at, &bits, sizeof bits);
            value = bf16_to_f32(bits);
          }
          values[lane % 16][kPerLane * (lane / 16) + j] = value;
        }
      }
    };
    fill(a, a_values);
    fill(b, b_values);
    for (F32x4& lane : c) {
      for (int i = 0; i < 4; ++i)
        lane[i] =
            static_cast<float>(integers ? static_cast<double>(random.below(9)) : random.normal());
    }
  }
  std::vector<F32x4> executed() const {
    std::vector<F32x4> out(64);
    gpu::execute<forms::Product<Form>>(1, {a.data(), b.data(), c.data(), out.data()});
    return out;
  }
  std::vector<F32x4> interpreted(const std::string& kernel, Arch arch) const {
    Machine machine(CodeObject::load(compiled("mfma_forms", arch)));
    std::vector<F32x4> out(64);
    machine.add_read_only_buffer(a.data(), a.size() * sizeof(a[0]), "a");
    machine.add_read_only_buffer(b.data(), b.size() * sizeof(b[0]), "b");
    machine.add_read_only_buffer(c.data(), c.size() * sizeof(c[0]), "c");
    machine.add_buffer(out.data(), out.size() * sizeof(out[0]), "out");
    const typename forms::Product<Form>::Params params{a.data(), b.data(), c.data(), out.data()};
    machine.run(kernel, {1}, {64}, params);
    return out;
  }
  double exact(size_t lane, int i) const {
    const size_t row = 4 * (lane / 16) + static_cast<size_t>(i), col = lane % 16;
    double sum = c[lane][i];
    for (size_t k = 0; k < kDepth; ++k)
      sum += static_cast<double>(a_values[row][k]) * static_cast<double>(b_values[col][k]);
    return sum;
  }

  std::vector<typename Form::Operand> a, b;
  std::vector<F32x4> c;
  std::vector<std::vector<float>> a_values, b_values;  // [row or column][k]
};

template <typename Form>
void check_executor() {
  const Operands<Form> integers(true);
  const std::vector<F32x4> out = integers.executed();
  for (size_t lane = 0; lane < 64; ++lane) {
    for (int i = 0; i < 4; ++i) EXPECT_EQ(out[lane][i], integers.exact(lane, i)) << lane;
  }
}

TEST(MfmaForms, ExecutorMultiplies) {
  check_executor<forms::Bf16K16>();
  check_executor<forms::Bf16K32>();
  check_executor<forms::Fp8K32>();
}

class CompiledMfmaForms : public ::testing::TestWithParam<Arch> {
 protected:
  void SetUp() override {
    if (!why_not_compiled().empty()) GTEST_SKIP() << why_not_compiled();
  }
};
INSTANTIATE_TEST_SUITE_P(Chips, CompiledMfmaForms, ::testing::Values(Arch::kGfx942, Arch::kGfx950),
                         [](const auto& param) { return std::string(arch_name(param.param)); });

// `same_order`: bits must agree for any numbers, not only where sums are exact.
template <typename Form>
void check_compiled(const std::string& kernel, Arch arch, bool same_order) {
  for (const bool integers : {true, false}) {
    if (!integers && !same_order) continue;
    const Operands<Form> operands(integers);
    const std::vector<F32x4> executed = operands.executed();
    const std::vector<F32x4> interpreted = operands.interpreted(kernel, arch);
    EXPECT_EQ(0, std::memcmp(executed.data(), interpreted.data(), 64 * sizeof(F32x4)))
        << kernel << (integers ? " of integers" : "");
  }
}

TEST_P(CompiledMfmaForms, AgreeWithTheExecutor) {
  check_compiled<forms::Bf16K16>("product_bf16x4", GetParam(), true);
  // One instruction with another order on gfx950.
  check_compiled<forms::Bf16K32>("product_bf16x8", GetParam(), GetParam() == Arch::kGfx942);
  if (GetParam() == Arch::kGfx950) check_compiled<forms::Fp8K32>("product_fp8x8", GetParam(), true);
}

}  // namespace
}  // namespace dsv4::amd::isa
