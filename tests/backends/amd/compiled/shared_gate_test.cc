// The compiled kernels that AMD shares with NVIDIA: the host and the code objects know the same
// ones, and each keeps its budget.
#include <set>

#include "backends/gpu/model_rows_ops.h"
#include "tests/backends/amd/compiled/kernel_gate.h"
#include "tests/backends/amd/compiled/kernel_list.h"

namespace dsv4::testing {
namespace {

using amd::isa::Arch;

class SharedKernels : public ::testing::TestWithParam<Arch> {
 protected:
  void SetUp() override {
    if (!why_not_interpreted().empty()) GTEST_SKIP() << why_not_interpreted();
  }
};
INSTANTIATE_TEST_SUITE_P(Chips, SharedKernels, ::testing::Values(Arch::kGfx942, Arch::kGfx950),
                         [](const auto& param) { return std::string(arch_name(param.param)); });

struct Rowwise {};
struct ModelRows {};

void expect_same_kernels(const std::vector<StartedKernel>& started, const std::string& file,
                         Arch arch) {
  std::set<std::string> entries;
  const auto& code = CompiledKernels::of(arch).by_file().at(file + "_" + arch_name(arch) + ".co");
  for (const amd::isa::KernelInfo& kernel : code.kernels()) entries.insert(kernel.name);
  EXPECT_FALSE(started.empty());
  for (const StartedKernel& kernel : started) {
    const std::string name = kernel_of(kernel.symbol);
    ASSERT_TRUE(entries.contains(kernel.symbol)) << name << " has no entry";
    EXPECT_EQ(code.kernel(kernel.symbol).max_workgroup_size, kernel.threads) << name;
    EXPECT_EQ(code.kernel(kernel.symbol).explicit_bytes(), kernel.param_bytes) << name;
    entries.erase(kernel.symbol);
  }
  for (const std::string& symbol : entries)
    ADD_FAILURE() << kernel_of(symbol) << " is an entry that no operation starts";
}

TEST_P(SharedKernels, EntriesAreWhatOperationsStart) {
  expect_same_kernels(started_kernels<Rowwise, gpu::install_rowwise<ListLaunch<Rowwise>>>(),
                      "rowwise", GetParam());
  expect_same_kernels(started_kernels<ModelRows, gpu::install_model_rows<ListLaunch<ModelRows>>>(),
                      "model_rows", GetParam());
}

// Budgets are what clang 22 needs, rounded up to a step of occupancy (64, 72, 80, 96, 128, 168
// registers: 8, 7, 6, 5, 4, 3 waves). Forms for V4's shapes come before those for any shape.

constexpr const char* kShuffle = "ds_bpermute_b32";
constexpr const char* kBarrier = "s_barrier";
// Angles in double; correctly rounded division and square root.
constexpr const char* kAngle = "v_mul_f64";
constexpr const char* kDivision = "v_div_fixup_f32";
constexpr const char* kRoot = "v_sqrt_f32";

TEST_P(SharedKernels, RowwiseKeepsItsBudgets) {
  const uint32_t table = sizeof(gpu::RopeTable);
  const std::vector<KernelBudget> budgets{
      {"RmsNormPair<RmsNormBlock<Bf16, Bf16, 2", 64, 4096, {{kBarrier, 2}, {kShuffle, 20}}, 8},
      {"RmsNormPair", 96, 16384, {{kBarrier, 2}, {kShuffle, 20}}, 2},
      {"RmsNormRows", 64, 0, {{kShuffle, 10}, {kDivision, 2}, {kRoot}}, 8},
      {"RmsNormBlock<Bf16, Bf16, 2", 64, 4096, {{kBarrier, 2}, {kShuffle, 10}}, 8},
      {"RmsNormBlock<Bf16, float, 2", 64, 4096, {{kBarrier, 2}, {kShuffle, 10}}, 8},
      {"RmsNormBlock<float, Bf16, 2", 64, 4096, {{kBarrier, 2}, {kShuffle, 10}}, 8},
      {"RmsNormBlock<float, float, 2", 64, 4096, {{kBarrier, 2}, {kShuffle, 10}}, 8},
      {"RmsNormBlock", 96, 32768, {{kBarrier, 2}, {kShuffle, 10}}, 2},
      {"RmsNormLong", 64, 0, {{kShuffle, 10}, {kDivision, 2}, {kRoot}}, 8},
      {"QnormRopeInsert<Bf16, Fp8DsMlaRows, 8, (Access)0",
       80,
       table,
       {{kBarrier}, {kAngle, 10}, {kShuffle, 15}, {"global_store_short"}},
       6},
      {"QnormRopeInsert", 128, table, {{kBarrier}, {kAngle, 10}, {kShuffle, 10}}, 4},
      {"InverseRope<Bf16, Bf16, true, 8, (Access)0",
       64,
       table,
       {{kBarrier}, {kAngle, 10}, {kShuffle, 20}},
       8},
      {"InverseRope<Bf16, Bf16, false, 8, (Access)0",
       64,
       table,
       {{kBarrier}, {kAngle, 10}, {"global_load_dword", 8}},
       8},
      {"InverseRope", 128, table, {{kBarrier}, {kAngle, 10}}, 4},
      {"IndexQuery<Bf16, (IndexForm)1, 2, (Access)0", 64, table, {{kBarrier}, {kShuffle}}, 8},
      {"IndexQuery<Bf16, (IndexForm)2, 2, (Access)0", 64, table, {{kBarrier}, {kShuffle}}, 8},
      {"IndexQuery", 128, table, {{kBarrier}, {kAngle, 10}, {kShuffle}}, 4},
      {"CompressPoolTiles", 128, 33792, {{kBarrier, 3}, {"global_load_dwordx4", 12}}, 1},
      {"CompressEntries<IndexFp8Rows, 2", 72, 2560, {{kAngle, 10}, {kShuffle, 15}}, 6},
      {"CompressEntries<IndexMxfp4Rows, 2", 72, 2560, {{kAngle, 10}}, 6},
      {"CompressEntries", 128, 6144, {{kBarrier}, {kAngle, 10}, {kShuffle, 10}}, 4},
      {"CompressFinish", 128, 0, {{kAngle, 10}, {kShuffle, 10}}, 4},
      {"ExpandPlan", 24, 0, {}, 8},
      {"MapSlots", 24, 0, {{"global_load_dwordx4"}, {"global_store_dwordx4"}}, 8},
      {"RaggedIndptr", 24, 2048, {{kBarrier, 3}}, 8},
      {"RaggedFill", 24, 0, {}, 8},
      {"GatherRows", 24, 0, {{"global_load_dwordx4"}, {"global_store_dwordx4"}}, 8},
      {"Zero", 24, 0, {{"global_store_dwordx4"}}, 8}};
  expect_within_budgets("rowwise", GetParam(), budgets);
}

TEST_P(SharedKernels, ModelRowsKeepTheirBudgets) {
  const std::vector<KernelBudget> budgets{
      {"Embed", 24, 0, {}, 8},
      {"HcDots<Bf16, 2, 1>", 40, 0, {{"v_fma", 4}, {kShuffle, 15}}, 8},
      {"HcDots<float, 2, 1>", 40, 0, {{"v_fma", 4}, {kShuffle, 15}}, 8},
      {"HcDots", 168, 0, {{kShuffle, 240}}, 3},
      {"HcFinish", 40, 644, {{kBarrier, 2}, {kDivision, 15}, {"v_readlane_b32", 16}}, 8},
      {"HcPost<Bf16, 4>", 24, 0, {{"v_mul_f32"}, {"v_add_f32"}}, 8},
      {"HcPost<float, 4>", 24, 0, {}, 8},
      {"HcPost", 256, 0, {}, 2},
      {"Route", 40, 8448, {{kShuffle, 10}, {kRoot}, {kDivision}}, 1}};
  expect_within_budgets("model_rows", GetParam(), budgets);
}

// One instruction for two conversions, where the chip has it.
TEST_P(SharedKernels, Bf16PairsAreOneInstructionOnGfx950) {
  const auto& code = CompiledKernels::of(GetParam())
                         .by_file()
                         .at(concat("rowwise_", arch_name(GetParam()), ".co"));
  int pairs = 0;
  for (const amd::isa::KernelInfo& kernel : code.kernels()) {
    const auto counts = count_mnemonics(code, kernel);
    const auto at = counts.find("v_cvt_pk_bf16_f32");
    if (at != counts.end()) pairs += at->second;
  }
  EXPECT_EQ(pairs > 0, GetParam() == Arch::kGfx950);
}

}  // namespace
}  // namespace dsv4::testing
