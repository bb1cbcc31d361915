// The compiled attend kernels of both chips: budgets, head tiles that give the same bits, NaN
// codes, and mistakes that must be noticed. Results in general: tests/ops/oracle_attend_test.cc,
// which runs the same code objects.
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <functional>
#include <map>
#include <string>
#include <vector>

#include "backends/amd/isa/gate.h"
#include "backends/amd/isa/machine.h"
#include "backends/amd/kernel_name.h"
#include "backends/amd/ops/attend.h"
#include "core/numbers.h"
#include "dsv4/error.h"
#include "tests/oracle/layer_parts.h"
#include "tests/testing/hip/interpreter_device.h"
#include "tests/testing/random.h"
#include "tests/testing/tolerance.h"

namespace dsv4::amd {
namespace {

using isa::Arch;
using isa::CodeObject;
using isa::Machine;
using isa::WaveOrder;
using oracle::Vector;
using testing::CompiledKernels;
using testing::Random;

using OneTile = Attend<Fp8DsMlaRows, 1, false>;
using TwoTiles = Attend<Fp8DsMlaRows, 2, false>;

constexpr uint8_t kNanCode = 0x7f, kMinusZero = 0x80;
constexpr size_t kDim = 512, kNope = 448;

// One page of fp8_ds_mla rows, a list of them for one token, and its heads.
struct Scene {
  static constexpr size_t kRows = 80;

  explicit Scene(int num_heads)
      : heads(static_cast<size_t>(num_heads)),
        page(kRows * 584),
        q(heads * kDim),
        out(heads * kDim, 0xffff),
        lse(heads, std::nanf("")) {
    Random random(3);
    for (size_t r = 0; r < kRows; ++r) {
      for (size_t d = 0; d < kNope; ++d) {
        auto code = static_cast<uint8_t>(random.below(256));
        if ((code & 0x7f) == kNanCode) code = kMinusZero;
        page[r * 576 + d] = code;
      }
      for (size_t d = 0; d < kDim - kNope; ++d) {
        const uint16_t bits = f32_to_bf16(static_cast<float>(random.normal()));
        std::memcpy(&page[r * 576 + kNope + 2 * d], &bits, sizeof bits);
      }
      // Scales of 2^-8 to 2^-6: values of about 1.
      for (size_t b = 0; b < 7; ++b)
        page[kRows * 576 + r * 8 + b] = static_cast<uint8_t>(119 + random.below(3));
    }
    for (uint16_t& x : q) x = f32_to_bf16(static_cast<float>(random.normal()));
    // A block with holes, one that is all holes, one that is not full.
    for (int32_t i = 0; i < 64; ++i) slots.push_back(i % 5 == 3 ? -1 : i);
    slots.insert(slots.end(), 64, -1);
    for (int32_t i = 64; i < 80; ++i) slots.push_back(i);
    length = {static_cast<int32_t>(slots.size())};
  }

  AttendArgs args(int heads_per_block) {
    AttendArgs a{};
    a.q = q.data();
    a.q_token_stride = static_cast<int64_t>(heads * kDim);
    a.q_head_stride = kDim;
    a.out = out.data();
    a.out_token_stride = a.q_token_stride;
    a.out_head_stride = kDim;
    a.lse = lse.data();
    RowSource& rows = a.rows[1];
    rows.kind = RowSource::kList;
    rows.rows_per_block = kRows;
    rows.base = page.data();
    rows.block_stride_bytes = static_cast<int64_t>(page.size());
    rows.value_bytes = 576;
    rows.scale_bytes = 8;
    rows.table = slots.data();
    rows.table_stride = static_cast<int64_t>(slots.size());
    rows.end = length.data();
    a.scale_log2 = static_cast<float>(1.4426950408889634074 / std::sqrt(512.0));
    a.num_heads = static_cast<int32_t>(heads);
    a.head_tiles = (a.num_heads + heads_per_block - 1) / heads_per_block;
    a.blocks_per_chain = 32;
    return a;
  }

  /// Runs a kernel whose blocks have that many heads. @throws Error of the interpreter.
  void run(const CodeObject& code, const std::string& kernel, int heads_per_block,
           WaveOrder order = WaveOrder::kForward) {
    std::fill(out.begin(), out.end(), 0xffff);
    Machine machine(code);
    machine.add_read_only_buffer(page.data(), page.size(), "page");
    machine.add_read_only_buffer(slots.data(), slots.size() * sizeof(int32_t), "slots");
    machine.add_read_only_buffer(length.data(), sizeof(int32_t), "length");
    machine.add_read_only_buffer(q.data(), q.size() * 2, "q");
    machine.add_buffer(out.data(), out.size() * 2, "out");
    machine.add_buffer(lse.data(), lse.size() * 4, "lse");
    const AttendArgs a = args(heads_per_block);
    machine.run(kernel, {static_cast<uint32_t>(a.head_tiles)}, {OneTile::kThreads}, a,
                {.order = order});
  }

  double value(size_t row, size_t dim) const {
    if (dim >= kNope) {
      uint16_t bits;
      std::memcpy(&bits, &page[row * 576 + kNope + 2 * (dim - kNope)], sizeof bits);
      return static_cast<double>(bf16_to_f32(bits));
    }
    return static_cast<double>(e4m3_to_f32(page[row * 576 + dim])) *
           static_cast<double>(e8m0_to_f32(page[kRows * 576 + row * 8 + dim / 64]));
  }

  /// Whether `out` is what the oracle says; bounds as in tests/testing/reduction_suite.cc.
  bool is_right() const {
    std::vector<Vector> rows;
    for (const int32_t slot : slots) {
      if (slot < 0) continue;
      Vector row(kDim);
      for (size_t d = 0; d < kDim; ++d) row[d] = value(static_cast<size_t>(slot), d);
      rows.push_back(row);
    }
    const std::vector<std::span<const double>> views(rows.begin(), rows.end());
    for (size_t h = 0; h < heads; ++h) {
      Vector query(kDim);
      for (size_t d = 0; d < kDim; ++d)
        query[d] = static_cast<double>(bf16_to_f32(q[h * kDim + d]));
      const oracle::Attended exact =
          oracle::attend(query, views, -INFINITY, 1.0 / std::sqrt(512.0));
      const double z = exact.max_z_abs;
      const double weight = std::expm1(testing::gamma(516) * z + 3 * z * testing::kRoundoffF32) +
                            testing::gamma(8 + 10 * 6);
      const double bound = 2 * weight + testing::kRoundoffBf16 + 2 * testing::gamma(84);
      for (size_t d = 0; d < kDim; ++d) {
        const auto actual = static_cast<double>(bf16_to_f32(out[h * kDim + d]));
        const double slack = bound * exact.magnitude[d];
        const double error = std::abs(actual - exact.out[d]);
        if (!(error <= slack + testing::rounding_bound(DType::kBf16, exact.out[d], slack)))
          return false;
      }
    }
    return true;
  }

  size_t heads;
  std::vector<uint8_t> page;
  std::vector<uint16_t> q, out;
  std::vector<float> lse;
  std::vector<int32_t> slots, length;
};

class CompiledAttend : public ::testing::TestWithParam<Arch> {
 protected:
  void SetUp() override {
    if (!testing::why_not_interpreted().empty()) GTEST_SKIP() << testing::why_not_interpreted();
  }
  template <typename Kernel>
  static const CodeObject& code_of() {
    return CompiledKernels::of(GetParam()).with(gpu::amd_entry_name<Kernel>());
  }
  static CodeObject faults() {
    return CodeObject::load(std::string(DSV4_AMD_FAULTS_DIR) + "/attend_faults_" +
                            arch_name(GetParam()) + ".co");
  }
  /// Whether a kernel of the faulty ones gives a right result.
  static bool is_right(const std::string& kernel) {
    Scene scene(16);
    scene.run(faults(), kernel, 16);
    return scene.is_right();
  }
};
INSTANTIATE_TEST_SUITE_P(Chips, CompiledAttend, ::testing::Values(Arch::kGfx942, Arch::kGfx950),
                         [](const auto& param) { return std::string(arch_name(param.param)); });

// ---- gate

template <typename Kernel>
std::string violations(Arch arch, int min_blocks) {
  const std::string name = gpu::amd_entry_name<Kernel>();
  const CodeObject& code = CompiledKernels::of(arch).with(name);
  // Kinds of slices x (scores of 4 row tiles, values of 4 dim tiles x 2 halves) x products of an
  // operand of 32 values of k.
  const int kinds = std::is_base_of_v<Fp8DsMlaRows, typename Kernel::RowFormat> ? 2 : 1;
  const int products = kinds * Kernel::kHeads / 16 * (4 * 2 + 2 * 4);
  isa::GateRules rules;
  if (arch == Arch::kGfx950) {
    rules.expected = {{"v_mfma_f32_16x16x32_bf16", products}};
    rules.forbidden = {"v_mfma_f32_16x16x16"};
    rules.max_lds_bytes = 160 * 1024 / static_cast<uint32_t>(min_blocks);
  } else {
    rules.expected = {{"v_mfma_f32_16x16x16_bf16", 2 * products}};
    rules.max_lds_bytes = 64 * 1024;
  }
  rules.forbidden.push_back("scratch_");
  rules.forbidden.push_back("flat_");
  // Eight waves a block, 512 registers a lane of each SIMD.
  rules.max_vgprs = 256 / static_cast<uint32_t>(min_blocks);
  rules.workgroup_size = Kernel::kThreads;
  std::string out;
  for (const std::string& line : gate_violations(code, name, rules)) out += line + "\n";
  return out;
}

template <typename Rows>
void check_gate(Arch arch) {
  EXPECT_EQ((violations<Attend<Rows, 1, false>>(arch, arch == Arch::kGfx950 ? 2 : 1)), "");
  EXPECT_EQ((violations<Attend<Rows, 1, true>>(arch, 1)), "");
  EXPECT_EQ((violations<Attend<Rows, 2, false>>(arch, 1)), "");
}

TEST_P(CompiledAttend, KeepsItsBudgets) {
  check_gate<Fp8DsMlaRows>(GetParam());
  check_gate<PlainBf16Rows>(GetParam());
  check_gate<PlainFp8Rows>(GetParam());
}

// ---- results

TEST_P(CompiledAttend, HeadTilesGiveTheSameBits) {
  Scene one(20), two(20);
  one.run(code_of<OneTile>(), gpu::amd_entry_name<OneTile>(), OneTile::kHeads);
  two.run(code_of<TwoTiles>(), gpu::amd_entry_name<TwoTiles>(), TwoTiles::kHeads,
          WaveOrder::kReverse);
  EXPECT_TRUE(one.is_right());
  EXPECT_EQ(one.out, two.out);
  EXPECT_EQ(0, std::memcmp(one.lse.data(), two.lse.data(), one.lse.size() * sizeof(float)));
}

// A NaN of the cache is seen in every head, though gfx942's converter makes a number of its code.
TEST_P(CompiledAttend, NanCodesMakeTheTokenNan) {
  for (const uint8_t code : {0x7f, 0xff}) {
    Scene scene(3);
    scene.page[70 * 576 + 447] = code;
    scene.run(code_of<OneTile>(), gpu::amd_entry_name<OneTile>(), OneTile::kHeads);
    for (const uint16_t value : scene.out) ASSERT_TRUE(std::isnan(bf16_to_f32(value)));
    for (const float value : scene.lse) EXPECT_TRUE(std::isnan(value));
    // A row that the list leaves out.
    scene.slots[128 + 70 - 64] = -1;
    scene.run(code_of<OneTile>(), gpu::amd_entry_name<OneTile>(), OneTile::kHeads);
    EXPECT_TRUE(scene.is_right());
  }
}

// ---- negative controls

TEST_P(CompiledAttend, AMissingFnuzFixIsNoticed) {
  const bool is_fnuz = GetParam() == Arch::kGfx942;  // elsewhere there is nothing to fix
  EXPECT_EQ(is_right("attend_unfixed"), !is_fnuz);
  EXPECT_EQ(is_right("attend_minus_zero"), !is_fnuz);
}

TEST_P(CompiledAttend, AnIndexOffByOneIsNoticed) {
  EXPECT_FALSE(is_right("attend_shifted"));
  // One place more than there are, and a slot after the last row of the page.
  const auto error_of = [](Scene& scene) -> std::string {
    try {
      scene.run(code_of<OneTile>(), gpu::amd_entry_name<OneTile>(), OneTile::kHeads);
    } catch (const Error& error) {
      return error.what();
    }
    return "";
  };
  Scene longer(1);
  ++longer.length[0];
  EXPECT_NE(error_of(longer).find("nearest buffer is slots"), std::string::npos);
  Scene further(1);
  further.slots.back() = Scene::kRows;
  EXPECT_NE(error_of(further).find("nearest buffer is page"), std::string::npos);
}

// Each barrier of the compiled kernel in turn becomes an s_nop.
TEST_P(CompiledAttend, EveryDroppedBarrierIsNoticed) {
  constexpr uint32_t kBarrier = 0xbf8a0000, kNop = 0xbf800000;
  const std::string name = gpu::amd_entry_name<OneTile>();
  const CodeObject& code = code_of<OneTile>();
  const isa::KernelInfo& kernel = code.kernel(name);
  int barriers = 0;
  for (const isa::Segment& segment : code.segments()) {
    for (uint64_t at = kernel.begin; at < kernel.end; at += 4) {
      if (at < segment.address || at + 4 > segment.address + segment.file_bytes) continue;
      const uint64_t offset = segment.file_offset + at - segment.address;
      std::vector<std::byte> bytes(code.bytes().begin(), code.bytes().end());
      uint32_t word;
      std::memcpy(&word, &bytes[offset], sizeof word);
      if (word != kBarrier) continue;
      ++barriers;
      std::memcpy(&bytes[offset], &kNop, sizeof kNop);
      const CodeObject changed = CodeObject::from_bytes(bytes);
      std::string message;
      bool right = false;
      try {
        Scene scene(16);
        scene.run(changed, name, OneTile::kHeads);
        right = scene.is_right();
      } catch (const Error& error) {
        message = error.what();
      }
      EXPECT_TRUE(!right || !message.empty()) << "barrier " << barriers << " is not missed";
      // The waves of the last slice have a loop of their own, and run ahead of the others.
      if (!message.empty()) {
        EXPECT_NE(message.find("LDS race"), std::string::npos) << message;
      }
    }
  }
  EXPECT_EQ(barriers, 10);
}

}  // namespace
}  // namespace dsv4::amd
