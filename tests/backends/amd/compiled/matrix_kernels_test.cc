// The compiled kernels of linear, index_logits, top_k and moe: the host and the code objects know
// the same ones, each keeps its budget, every barrier is needed, wrong kernels are caught.
#include <cstring>
#include <map>
#include <set>

#include "backends/amd/ops/index_ops.h"
#include "backends/amd/ops/linear_ops.h"
#include "backends/amd/ops/moe_ops.h"
#include "dsv4/error.h"
#include "tests/backends/amd/compiled/kernel_gate.h"
#include "tests/backends/amd/compiled/kernel_list.h"
#include "tests/backends/amd/compiled/small_steps.h"
#include "tests/ops/stored_weight.h"

namespace dsv4::testing {
namespace {

using amd::isa::Arch;
using amd::isa::WaveOrder;

class MatrixKernels : public ::testing::TestWithParam<Arch> {
 protected:
  void SetUp() override {
    if (!why_not_interpreted().empty()) GTEST_SKIP() << why_not_interpreted();
    amd::install_linear<InterpreterLaunch>(ops_);
    amd::install_top_k<InterpreterLaunch>(ops_);
    amd::install_moe<InterpreterLaunch>(ops_);
  }
  Ops ops_;
};
INSTANTIATE_TEST_SUITE_P(Chips, MatrixKernels, ::testing::Values(Arch::kGfx942, Arch::kGfx950),
                         [](const auto& param) { return std::string(arch_name(param.param)); });

struct Linear {};
struct IndexLogits {};
struct TopK {};
struct Moe {};

void expect_entries(const std::vector<StartedKernel>& started, const std::string& file, Arch arch,
                    size_t count) {
  const auto& code = CompiledKernels::of(arch).by_file().at(file + "_" + arch_name(arch) + ".co");
  std::set<std::string> entries;
  for (const amd::isa::KernelInfo& kernel : code.kernels()) entries.insert(kernel.name);
  EXPECT_EQ(started.size(), count);
  for (const StartedKernel& kernel : started) {
    ASSERT_EQ(entries.erase(kernel.symbol), 1u) << kernel_of(kernel.symbol) << " has no entry";
    EXPECT_EQ(code.kernel(kernel.symbol).max_workgroup_size, kernel.threads);
    EXPECT_EQ(code.kernel(kernel.symbol).explicit_bytes(), kernel.param_bytes);
  }
  for (const std::string& symbol : entries)
    ADD_FAILURE() << kernel_of(symbol) << " is an entry that no operation starts";
}

TEST_P(MatrixKernels, EntriesAreWhatOperationsStart) {
  expect_entries(started_kernels<Linear, amd::install_linear<ListLaunch<Linear>>>(), "linear",
                 GetParam(), 5);
  expect_entries(started_kernels<IndexLogits, amd::install_index_logits<ListLaunch<IndexLogits>>>(),
                 "index_logits", GetParam(), 4);
  expect_entries(started_kernels<TopK, amd::install_top_k<ListLaunch<TopK>>>(), "top_k", GetParam(),
                 1);
  expect_entries(started_kernels<Moe, amd::install_moe<ListLaunch<Moe>>>(), "moe", GetParam(), 8);
}

// Budgets are what clang 22 needs, rounded up to a step of occupancy (64, 80, 104, 128, 168, 256
// registers: 8, 6, 4, 4, 3, 2 waves).
TEST_P(MatrixKernels, KeepTheirBudgets) {
  const bool gfx950 = GetParam() == Arch::kGfx950;
  // A piece is two instructions on gfx942 and one of twice the k on gfx950.
  const std::string mfma = gfx950 ? "v_mfma_f32_16x16x32_bf16" : "v_mfma_f32_16x16x16_bf16";
  const std::string fp8 = gfx950 ? "v_cvt_scalef32_pk_bf16_fp8" : "v_cvt_pk_f32_fp8";
  const std::string fp4 = gfx950 ? "v_cvt_scalef32_pk_bf16_fp4" : "v_perm_b32";
  const int pieces = gfx950 ? 1 : 2;
  const auto products = [&](int tiles) {
    return std::vector<amd::isa::ExpectedInstruction>{
        {mfma, 12 * pieces * tiles}, {fp8, 16}, {fp4, 16}, {"global_load_dwordx4", 4}};
  };
  std::vector<amd::isa::ExpectedInstruction> stream = products(1), stream64 = products(4);
  stream.push_back({"s_barrier", 1});
  stream64.push_back({"s_barrier", 1});
  expect_within_budgets("linear", GetParam(),
                        {{"LinearMatrix<StreamShape<1> >", 104, 8192, stream, 4},
                         {"LinearMatrix<StreamShape<4> >", 168, 32768, stream64, 2},
                         {"LinearMatrix<TileShape>", 256, 0, products(8), 2},
                         {"LinearAny", 128, 0, {{"v_pk_fma_f32", 16}, {"ds_bpermute_b32", 5}}, 4},
                         {"LinearPrepare", 16, 0, {{"ds_bpermute_b32", 5}}, 8}});
  expect_within_budgets("moe", GetParam(),
                        {{"MoeProducts<StreamShape<1> >", 104, 8192, stream, 4},
                         {"MoeProducts<StreamShape<4> >", 168, 32768, stream64, 2},
                         {"MoeProducts<TileShape>", 256, 0, products(8), 2},
                         {"LinearPrepare", 16, 0, {{"ds_bpermute_b32", 5}}, 8},
                         {"MoePointers", 16, 0, {}, 8},
                         {"MoeSort", 40, 2048, {{"s_barrier", 1}}, 8},
                         {"MoeSwiglu", 32, 0, {{"v_div_fixup_f32"}, {"ds_bpermute_b32", 5}}, 8},
                         {"MoeCombine", 16, 0, {{"v_add_f32"}}, 8}});
  expect_within_budgets(
      "index_logits", GetParam(),
      {{"IndexLogits<(dsv4::DType)2, 1>", 64, 0, {{mfma, 4 * pieces}, {fp8, 16}}, 8},
       {"IndexLogits<(dsv4::DType)2, 4>", 128, 0, {{mfma, 16 * pieces}}, 4},
       {"IndexLogits<(dsv4::DType)4, 1>", 72, 0, {{mfma, 4 * pieces}, {fp4, 16}}, 7},
       {"IndexLogits<(dsv4::DType)4, 4>", 128, 0, {{mfma, 16 * pieces}}, 4}});
  expect_within_budgets("top_k", GetParam(),
                        {{"TopK", 64, 8460, {{"ds_add_u32", 3}, {"s_barrier", 13}}, 8}});
}

// ---- small calls that reach every barrier

Bytes small_linear(DeviceMemory& memory, const Subject& subject, int64_t tokens) {
  const Tensor x = some_tensor(memory, DType::kBf16, {tokens, 160});
  std::vector<LinearProblem> problems;
  for (DType dtype : {DType::kF8E4M3, DType::kF4E2M1, DType::kBf16}) {
    problems.push_back({x, make_weight(memory, dtype, 24, 160, 3).weight,
                        memory.tensor(DType::kF32, {tokens, 24})});
  }
  run_small(subject, subject.ops->linear, {.problems = problems});
  return bytes_of(memory, problems[0].out);
}

Bytes small_top_k(DeviceMemory& memory, const Subject& subject) {
  const Tensor indices(memory.put(std::vector<int32_t>(128, -7)), DType::kI32, {2, 64});
  run_small(subject, subject.ops->top_k,
            {.logits = some_tensor(memory, DType::kF32, {2, 3000}),
             .end = memory.put(std::vector<int32_t>{3000, 2900}),
             .topk_indices = indices,
             .topk_length = memory.put(std::vector<int32_t>{0, 0})});
  return bytes_of(memory, indices);
}

// Experts of all types, one after the other.
Bytes small_moe(DeviceMemory& memory, const Subject& subject, int64_t tokens) {
  Bytes out;
  for (DType dtype : {DType::kF8E4M3, DType::kF4E2M1, DType::kBf16}) {
    const auto expert = [&](uint64_t seed) {
      return ExpertWeights{make_weight(memory, dtype, 32, 64, seed).weight,
                           make_weight(memory, dtype, 32, 64, seed + 1).weight,
                           make_weight(memory, dtype, 64, 32, seed + 2).weight};
    };
    const std::vector<ExpertWeights> experts{expert(1), expert(4)};
    const Tensor y = memory.tensor(DType::kBf16, {tokens, 64});
    const std::vector<int32_t> ids(static_cast<size_t>(tokens), 1);
    run_small(subject, subject.ops->moe,
              {.x = some_tensor(memory, DType::kBf16, {tokens, 64}),
               .expert_ids = ConstTensor(memory.put(ids), DType::kI32, {tokens, 1}),
               .expert_weights = some_tensor(memory, DType::kF32, {tokens, 1}),
               .experts = experts,
               .shared = expert(7),
               .swiglu_limit = 4.0f,
               .quantise_input = true,
               .out = y});
    const Bytes bytes = bytes_of(memory, y);
    out.insert(out.end(), bytes.begin(), bytes.end());
  }
  return out;
}

const std::vector<SmallStep>& matrix_steps() {
  static const std::vector<SmallStep> steps{
      {"linear, 2 tokens",
       [](auto& memory, auto& subject) { return small_linear(memory, subject, 2); }},
      {"linear, 20 tokens",
       [](auto& memory, auto& subject) { return small_linear(memory, subject, 20); }},
      {"top_k", small_top_k},
      {"moe, 3 tokens", [](auto& memory, auto& subject) { return small_moe(memory, subject, 3); }},
      {"moe, 40 tokens",
       [](auto& memory, auto& subject) { return small_moe(memory, subject, 40); }}};
  return steps;
}

// A barrier that does nothing is a race of local memory; around the atomics of top_k, which the
// interpreter lets race, it gives another result in one of the orders of waves.
TEST_P(MatrixKernels, EveryBarrierIsNeeded) {
  std::map<std::string, std::set<size_t>> caught;  // by entry: barriers
  std::map<std::string, std::vector<uint64_t>> barriers;
  for (const SmallStep& step : matrix_steps()) {
    InterpreterDevice device(GetParam(), WaveOrder::kForward, 1);
    DeviceMemory memory(device);
    const Bytes right = step.run(memory, {&device, &ops_});
    for (const auto& [symbol, launches] : device.launches()) {
      const amd::isa::CodeObject& code = CompiledKernels::of(GetParam()).with(symbol);
      std::vector<uint64_t>& addresses = barriers[symbol];
      addresses.clear();
      for (const amd::isa::Instruction& i : code.program().code()) {
        const amd::isa::KernelInfo& kernel = code.kernel(symbol);
        if (i.address >= kernel.begin && i.address < kernel.end &&
            code.program().listed(i).mnemonic == "s_barrier")
          addresses.push_back(i.address);
      }
      for (size_t b = 0; b < addresses.size(); ++b) {
        if (caught[symbol].contains(b)) continue;
        bool noticed = false;
        for (const WaveOrder order : {WaveOrder::kForward, WaveOrder::kReverse}) {
          InterpreterDevice dropped(GetParam(), order, 1);
          DeviceMemory own(dropped);
          dropped.drop_barrier(symbol, addresses[b]);
          try {
            noticed = noticed || step.run(own, {&dropped, &ops_}) != right;
          } catch (const Error&) {
            noticed = true;
          }
        }
        if (noticed) caught[symbol].insert(b);
      }
    }
  }
  size_t dropped = 0;
  for (const auto& [symbol, addresses] : barriers) {
    dropped += addresses.size();
    EXPECT_EQ(caught[symbol].size(), addresses.size()) << kernel_of(symbol);
  }
  EXPECT_GE(dropped, 18u);
}

// ---- wrong sources

TEST_P(MatrixKernels, WithoutTheFixWeightsAreFnuzOnGfx942) {
  const auto bytes_on = [&](const CompiledKernels& kernels) {
    InterpreterDevice device(kernels, WaveOrder::kForward, 1);
    DeviceMemory memory(device);
    const Subject subject{&device, &ops_};
    return small_linear(memory, subject, 2);
  };
  const CompiledKernels wrong(std::string(DSV4_WRONG_KERNELS_DIR) + "/fnuz_weights", GetParam());
  const Bytes expected = bytes_on(CompiledKernels::of(GetParam())), actual = bytes_on(wrong);
  size_t differ = 0;
  for (size_t i = 0; i < expected.size(); i += sizeof(float))
    differ += std::memcmp(&expected[i], &actual[i], sizeof(float)) != 0;
  EXPECT_EQ(differ, GetParam() == Arch::kGfx942 ? expected.size() / sizeof(float) : 0u);
}

TEST_P(MatrixKernels, ColumnsOffByAPieceAreOutOfBounds) {
  const CompiledKernels wrong(std::string(DSV4_WRONG_KERNELS_DIR) + "/next_columns", GetParam());
  InterpreterDevice device(wrong, WaveOrder::kForward, 1);
  const Buffer x = device.allocate(16 * 64 * 2), w = device.allocate(16 * 64 * 2),
               out = device.allocate(16 * 16 * 4);
  Arena scratch(nullptr, 0);
  amd::LinearBatch batch{};
  batch.count = 1;
  amd::WeightView& view = batch.items[0].w;
  view.data = reinterpret_cast<const uint8_t*>(w.data());
  view.row_bytes = 128;
  view.rows = 16;
  view.cols = 64;
  view.dtype = DType::kBf16;
  batch.items[0].x = x.data();
  batch.items[0].x_stride = 64;
  batch.items[0].out = out.data();
  batch.items[0].out_stride = 16;
  batch.items[0].tokens = 16;
  batch.items[0].out_f32 = true;
  try {
    InterpreterLaunch({device.default_stream(), &scratch, &ops_})
        .run<amd::LinearStream16>(1, batch);
    ADD_FAILURE() << "the last lanes read columns that do not exist";
  } catch (const Error& error) {
    EXPECT_NE(std::string(error.what()).find("out-of-bounds read of 16 bytes"), std::string::npos)
        << error.what();
  }
}

}  // namespace
}  // namespace dsv4::testing
