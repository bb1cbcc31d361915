// Instructions that the compiled shared kernels execute for a token of V4-Flash in a long step:
// what bounds their speed besides memory (docs/kernels/rowwise_amd.md). Budgets are the counts of
// clang 22, rounded up; the table is printed.
#include <cstdio>

#include "backends/gpu/model_rows_ops.h"
#include "tests/backends/amd/compiled/kernel_gate.h"
#include "tests/backends/amd/compiled/small_steps.h"

namespace dsv4::testing {
namespace {

using amd::isa::Arch;

/// Grids as in a step of 4096 tokens (rowwise_ops.h, model_rows_ops.h).
class LongStepLaunch : public InterpreterLaunch {
 public:
  using InterpreterLaunch::InterpreterLaunch;
  template <typename Kernel>
  void run(int64_t blocks, typename Kernel::Params params) const {
    if constexpr (requires { params.cut; }) {  // all heads of a token in a block
      params.cut.units_per_block = static_cast<int32_t>(
          round_up(int64_t{params.cut.units}, int64_t{Kernel::kThreads / gpu::kGroupLanes}));
      params.cut.blocks_per_token = 1;
      blocks = params.cut.tokens;
    } else if constexpr (std::is_same_v<Kernel, gpu::CompressPoolTiles>) {
      params.tokens_per_block = params.channel_blocks;
      blocks = ceil_div(int64_t{params.tokens}, int64_t{params.tokens_per_block}) *
               params.channel_blocks;
    } else if constexpr (requires { params.ring_tokens_per_block; }) {
      if (blocks != params.tokens) {  // CompressFinish
        params.ring_tokens_per_block = 4;
        blocks = params.entry_blocks + ceil_div(int64_t{params.tokens}, int64_t{4});
      }
    } else if constexpr (requires { params.parts; }) {  // hc_finish runs in passes of 1024 tokens
      const int32_t parts = requires {
        params.iterations;
      }
      ? 4 : 1;
      blocks = blocks / params.parts * parts;
      params.parts = parts;
    }
    InterpreterLaunch::run<Kernel>(blocks, params);
  }
};

struct Call {
  const char* name;
  int64_t tokens;
  int64_t token_bytes;   // read and written
  double max_vector[2];  // vector instructions of waves for a token: gfx942, gfx950
  void (*run)(DeviceMemory&, const Subject&, int64_t tokens);
};

constexpr int64_t kHidden = 4096, kHeads = 64, kHeadDim = 512, kIndexDim = 128, kStreams = 4;
constexpr int64_t kQBytes = kHeads * kHeadDim * 2, kIndexBytes = kHeads * kIndexDim * 2;
constexpr int64_t kStreamBytes = kStreams * kHidden * 2, kExperts = 256, kChosen = 6;

std::vector<int32_t> late_positions(int64_t tokens) {
  std::vector<int32_t> out;
  for (int32_t i = 0; i < tokens; ++i) out.push_back(65536 + i);
  return out;
}

template <int64_t kCount>
void norm(DeviceMemory& memory, const Subject& subject, int64_t tokens) {
  run_small(subject, subject.ops->rms_norm,
            {.x = some_tensor(memory, DType::kBf16, {tokens, kCount}),
             .weight = some_tensor(memory, DType::kBf16, {kCount}),
             .eps = 1e-6f,
             .out = memory.tensor(DType::kBf16, {tokens, kCount})});
}

void insert(DeviceMemory& memory, const Subject& subject, int64_t tokens) {
  const PagedCache cache(memory, KvFormat::kFp8DsMla, kHeadDim, 64, 1);
  std::vector<int64_t> slots(static_cast<size_t>(tokens));
  for (size_t i = 0; i < slots.size(); ++i) slots[i] = static_cast<int64_t>(i);
  run_small(subject, subject.ops->qnorm_rope_insert,
            {.q = some_tensor(memory, DType::kBf16, {tokens, kHeads, kHeadDim}),
             .kv = some_tensor(memory, DType::kBf16, {tokens, kHeadDim}),
             .rope = some_rope(memory, 64),
             .eps = 1e-6f,
             .positions = memory.put(late_positions(tokens)),
             .slot_mapping = memory.put(slots),
             .window = cache.view()});
}

template <bool kQuantise>
void inverse(DeviceMemory& memory, const Subject& subject, int64_t tokens) {
  run_small(subject, subject.ops->inverse_rope,
            {.o = some_tensor(memory, DType::kBf16, {tokens, kHeads, kHeadDim}),
             .rope = some_rope(memory, 64),
             .positions = memory.put(late_positions(tokens)),
             .quantise = kQuantise,
             .out = memory.tensor(DType::kBf16, {tokens, kHeads, kHeadDim})});
}

template <KvFormat kFormat>
void index(DeviceMemory& memory, const Subject& subject, int64_t tokens) {
  run_small(subject, subject.ops->index_query,
            {.q = some_tensor(memory, DType::kBf16, {tokens, kHeads, kIndexDim}),
             .weights = some_tensor(memory, DType::kBf16, {tokens, kHeads}),
             .rope = some_rope(memory, 64),
             .positions = memory.put(late_positions(tokens)),
             .format = kFormat,
             .hadamard = kFormat == KvFormat::kIndexMxfp4,
             .q_out = memory.tensor(DType::kBf16, {tokens, kHeads, kIndexDim}),
             .weights_out = memory.tensor(DType::kF32, {tokens, kHeads})});
}

template <int kRatio, int64_t kWidth, KvFormat kFormat>
void compress_prompt(DeviceMemory& memory, const Subject& subject, int64_t tokens) {
  run_compress({kRatio, kRatio == 4, kWidth, kFormat, static_cast<int32_t>(tokens), false},
               subject.ops->compress, memory, subject);
}

void slots_of_topk(DeviceMemory& memory, const Subject& subject, int64_t tokens) {
  std::vector<int32_t> entries(static_cast<size_t>(tokens * 512)), table(64);
  for (size_t i = 0; i < entries.size(); ++i) entries[i] = static_cast<int32_t>(i * 7 % 4096);
  for (size_t i = 0; i < table.size(); ++i) table[i] = static_cast<int32_t>(63 - i);
  Tensor in(memory.put(entries), DType::kI32, {tokens, 512}),
      out(memory.raw(tokens * 512 * 4), DType::kI32, {tokens, 512});
  run_small(subject, subject.ops->map_slots,
            {.topk_indices = in,
             .token_to_seq = memory.put(std::vector<int32_t>(static_cast<size_t>(tokens), 0)),
             .blocks = {memory.put(table), 64, 64, 256},
             .rows_per_block = 64,
             .slots = out});
}

Tensor streams_of(DeviceMemory& memory, int64_t tokens) {
  return some_tensor(memory, DType::kBf16, {tokens, kStreams, kHidden});
}
void mix(DeviceMemory& memory, const Subject& subject, int64_t tokens) {
  constexpr int64_t kSums = (2 + kStreams) * kStreams;
  run_op_with(subject, subject.ops->hc_pre,
              HcPreParams{.streams = streams_of(memory, tokens),
                          .weights = {.fn = some_tensor(memory, DType::kF32,
                                                        {kSums, kStreams * kHidden}, 0.01),
                                      .base = some_tensor(memory, DType::kF32, {kSums}),
                                      .scale = some_tensor(memory, DType::kF32, {3})},
                          .norm_eps = 1e-6f,
                          .hc_eps = 1e-6f,
                          .sinkhorn_iters = 20,
                          .y = memory.tensor(DType::kBf16, {tokens, kHidden}),
                          .post = memory.tensor(DType::kF32, {tokens, kStreams}),
                          .comb = memory.tensor(DType::kF32, {tokens, kStreams, kStreams})},
              1 << 22);
}
void spread(DeviceMemory& memory, const Subject& subject, int64_t tokens) {
  run_small(subject, subject.ops->hc_post,
            {.f = some_tensor(memory, DType::kBf16, {tokens, kHidden}),
             .post = some_tensor(memory, DType::kF32, {tokens, kStreams}),
             .comb = some_tensor(memory, DType::kF32, {tokens, kStreams, kStreams}),
             .streams = streams_of(memory, tokens)});
}
void choose(DeviceMemory& memory, const Subject& subject, int64_t tokens) {
  run_small(subject, subject.ops->route,
            {.logits = some_tensor(memory, DType::kF32, {tokens, kExperts}),
             .bias = some_tensor(memory, DType::kF32, {kExperts}),
             .tid2eid = {},
             .token_ids = nullptr,
             .scaling = 1.5f,
             .expert_ids = Tensor(memory.raw(tokens * kChosen * 4), DType::kI32, {tokens, kChosen}),
             .expert_weights = memory.tensor(DType::kF32, {tokens, kChosen})});
}

constexpr int64_t kGateBytes4 = 4 * 4 * kHeadDim, kGateBytes128 = 2 * 4 * kHeadDim;
const Call kCalls[] = {
    {"rms_norm 4096", 8, 2 * 2 * kHidden, {1300, 950}, norm<kHidden>},
    {"rms_norm 1024", 8, 2 * 2 * 1024, {370, 300}, norm<1024>},
    {"qnorm_rope_insert fp8_ds_mla", 2, 2 * (kQBytes + 2 * kHeadDim) + 584, {8200, 5800}, insert},
    {"inverse_rope", 2, 2 * kQBytes, {4500, 2400}, inverse<false>},
    {"inverse_rope quantised", 2, 2 * kQBytes, {12700, 10600}, inverse<true>},
    {"index_query fp8", 2, 2 * kIndexBytes + 6 * kHeads, {4800, 3800}, index<KvFormat::kIndexFp8>},
    {"index_query mxfp4 Hadamard",
     2,
     2 * kIndexBytes + 6 * kHeads,
     {7200, 6100},
     index<KvFormat::kIndexMxfp4>},
    {"compress 4 fp8_ds_mla",
     64,
     kGateBytes4 + 584 / 4,
     {1100, 1000},
     compress_prompt<4, kHeadDim, KvFormat::kFp8DsMla>},
    {"compress 128 fp8_ds_mla",
     256,
     kGateBytes128 + 584 / 128,
     {980, 940},
     compress_prompt<128, kHeadDim, KvFormat::kFp8DsMla>},
    {"compress 4 index_fp8",
     64,
     4 * 4 * kIndexDim + 132 / 4,
     {380, 370},
     compress_prompt<4, kIndexDim, KvFormat::kIndexFp8>},
    {"map_slots 512", 8, 2 * 4 * 512, {300, 300}, slots_of_topk},
    {"hc_pre", 32, kStreamBytes + 2 * kHidden, {15000, 14700}, mix},
    {"hc_post", 4, 2 * kStreamBytes + 2 * kHidden, {4800, 3800}, spread},
    {"route 256", 8, 4 * kExperts + 8 * kChosen, {770, 770}, choose},
};

struct Issues {
  uint64_t vector = 0, scalar = 0, local = 0, global = 0;
};
Issues issues_of(InterpreterDevice& device) {
  Issues out;
  for (const auto& [symbol, launches] : device.launches()) {
    for (const auto& [mnemonic, count] : device.executed(symbol)) {
      uint64_t& sum = mnemonic.starts_with("v_")        ? out.vector
                      : mnemonic.starts_with("ds_")     ? out.local
                      : mnemonic.starts_with("global_") ? out.global
                                                        : out.scalar;
      sum += count;
    }
  }
  return out;
}

class ExecutedInstructions : public ::testing::TestWithParam<Arch> {};
INSTANTIATE_TEST_SUITE_P(Chips, ExecutedInstructions,
                         ::testing::Values(Arch::kGfx942, Arch::kGfx950),
                         [](const auto& param) { return std::string(arch_name(param.param)); });

TEST_P(ExecutedInstructions, OfATokenKeepTheirBudgets) {
  if (!why_not_interpreted().empty()) GTEST_SKIP() << why_not_interpreted();
  Ops ops;
  gpu::install_rowwise<LongStepLaunch>(ops);
  gpu::install_model_rows<LongStepLaunch>(ops);
  // Memory and issue limits of 4096 tokens: 304 processors at 2.1 GHz and 5.3 TB/s, or 256 at 2.4
  // GHz and 8 TB/s; four SIMDs issue a vector instruction of a wave every four clocks.
  const bool is_mi300 = GetParam() == Arch::kGfx942;
  const double bytes_per_us = is_mi300 ? 5.3e6 : 8e6;
  const double issues_per_us = is_mi300 ? 304 * 2100.0 : 256 * 2400.0;
  std::printf("%-30s %10s %8s %8s %7s %7s   %s\n", "wave instructions of a token", "bytes",
              "vector", "scalar", "local", "global", "us of 4096 tokens: memory, issue");
  for (const Call& call : kCalls) {
    InterpreterDevice device(GetParam(), amd::isa::WaveOrder::kForward, 2);
    device.count_mnemonics();
    DeviceMemory memory(device);
    call.run(memory, {&device, &ops}, call.tokens);
    const Issues sum = issues_of(device);
    const auto per_token = [&](uint64_t count) {
      return static_cast<double>(count) / static_cast<double>(call.tokens);
    };
    std::printf("%-30s %10lld %8.0f %8.0f %7.0f %7.0f   %6.1f %6.1f\n", call.name,
                static_cast<long long>(call.token_bytes), per_token(sum.vector),
                per_token(sum.scalar), per_token(sum.local), per_token(sum.global),
                4096 * static_cast<double>(call.token_bytes) / bytes_per_us,
                4096 * per_token(sum.vector) / issues_per_us);
    EXPECT_LE(per_token(sum.vector), call.max_vector[is_mi300 ? 0 : 1]) << call.name;
    EXPECT_GT(sum.vector, 0u);
  }
}

}  // namespace
}  // namespace dsv4::testing
