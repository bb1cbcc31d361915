// Row-wise operations of GPU backends give the CPU's bits: the same order of sums, products rounded
// separately, angles and exponentials of one definition. Sizes that fill no register, rows that are
// aligned to nothing, and what is not a number.
#include <limits>

#include "backends/cpu/candidates.h"
#include "backends/cpu/cpu_device.h"
#include "tests/ops/oracle_testing.h"

namespace dsv4::testing {
namespace {

using Bytes = std::vector<uint8_t>;

// One of the two devices that compute the same.
struct Side {
  DeviceMemory& memory;
  Subject subject;

  template <typename Params>
  void run(Op<Params> op, const Params& params, ScratchLimits limits = {}) {
    limits.num_threads = 2;
    run_op_with(subject, op, params, subject.ops->scratch_bytes(limits));
  }
  // A tensor whose last dimension lies `gap` elements further apart than it is long.
  Tensor strided(DType dtype, std::initializer_list<int64_t> shape, const Vector& values,
                 int64_t gap) {
    const std::vector<int64_t> extents(shape);
    const int64_t cols = extents.back();
    const auto rows = static_cast<int64_t>(values.size()) / cols;
    Vector spread(static_cast<size_t>(rows * (cols + gap)), 0.0);
    for (int64_t r = 0; r < rows; ++r)
      std::copy_n(values.begin() + r * cols, cols, spread.begin() + r * (cols + gap));
    Tensor out(nullptr, dtype, shape);
    out.data = memory.tensor(dtype, {rows * (cols + gap)}, spread).data;
    int64_t stride = cols + gap;
    for (int i = out.rank - 2; i >= 0; --i) {
      out.strides[i] = stride;
      stride *= out.shape[i];
    }
    return out;
  }
  // Bytes from the first element to one past the last, gaps included.
  Bytes bytes(const ConstTensor& tensor) const {
    int64_t extent = 1;
    for (int i = 0; i < tensor.rank; ++i) extent += (tensor.shape[i] - 1) * tensor.strides[i];
    return memory.get(tensor.as<uint8_t>(), extent * size_of(tensor.dtype));
  }
};

class RowwiseBits : public CandidateTest {
 protected:
  void SetUp() override {
    CandidateTest::SetUp();
    if (IsSkipped()) return;
    cpu_ = cpu::open_cpu_device(2);
    cpu_ops_ = cpu::make_ops("");
  }
  bool takes(DType act) const { return act == DType::kBf16 || exact(); }
  // f(side) -> list of byte strings.
  template <typename F>
  void expect_same(F f) {
    DeviceMemory cpu_memory(*cpu_);
    Side here{memory(), subject()}, there{cpu_memory, {cpu_.get(), &cpu_ops_}};
    const std::vector<Bytes> actual = f(here), expected = f(there);
    ASSERT_EQ(actual.size(), expected.size());
    for (size_t i = 0; i < actual.size(); ++i) {
      ASSERT_EQ(actual[i].size(), expected[i].size());
      const auto at = std::mismatch(actual[i].begin(), actual[i].end(), expected[i].begin());
      EXPECT_TRUE(at.first == actual[i].end())
          << "output " << i << ", byte " << at.first - actual[i].begin() << " of "
          << actual[i].size() << ": " << int{*at.first} << ", the CPU has " << int{*at.second};
    }
    EXPECT_TRUE(cpu_memory.guards_intact());
    clear_memory();
  }

 private:
  std::unique_ptr<Device> cpu_;
  Ops cpu_ops_;
};

constexpr DType kActs[] = {DType::kBf16, DType::kF32};

TEST_P(RowwiseBits, RmsNorm) {
  constexpr int64_t kTokens = 5;
  for (int64_t n : {1, 7, 64, 100, 512, 1001, 1536, 4096, 7168}) {
    for (DType x_type : kActs) {
      if (!takes(x_type)) continue;
      for (DType w_type : kActs) {
        for (int64_t gap : {0, 3}) {
          Random random(static_cast<uint64_t>(n));
          const Vector x = rounded(x_type, normal_values(random, kTokens * n, 2.0));
          const Vector weight = rounded(w_type, normal_values(random, n, 1.0));
          for (DType y_type : kActs) {
            SCOPED_TRACE(::testing::Message() << n << " " << dtype_name(x_type) << " to "
                                              << dtype_name(y_type) << ", gap " << gap);
            expect_same([&](Side& side) {
              const Tensor out = side.strided(y_type, {kTokens, n}, Vector(x.size(), 0.0), gap);
              side.run(side.subject.ops->rms_norm,
                       {.x = side.strided(x_type, {kTokens, n}, x, gap),
                        .weight = side.memory.tensor(w_type, {n}, weight),
                        .eps = 1e-6f,
                        .out = out});
              return std::vector<Bytes>{side.bytes(out)};
            });
          }
        }
      }
    }
  }
}

// A pair of norms, in one launch where a kernel takes both, in two elsewhere.
TEST_P(RowwiseBits, RmsNormBeside) {
  struct Sizes {
    int64_t first, second;
  };
  for (const Sizes n : {Sizes{1024, 512},
                        {1536, 512},
                        {1000, 70},
                        {4096, 8},
                        {512, 512},
                        {64, 1024},
                        {1001, 512}}) {
    for (const int64_t tokens : {1, 9}) {
      for (DType act : kActs) {
        if (!takes(act)) continue;
        for (DType out_type : kActs) {
          for (int64_t gap : {0, 2, 3}) {
            SCOPED_TRACE(::testing::Message()
                         << n.first << " and " << n.second << " of " << tokens << " "
                         << dtype_name(act) << " to " << dtype_name(out_type) << ", gap " << gap);
            Random random(static_cast<uint64_t>(n.first + tokens));
            const Vector x = rounded(act, normal_values(random, tokens * n.first, 2.0));
            const Vector y = rounded(act, normal_values(random, tokens * n.second, 0.5));
            const Vector w = rounded(act, normal_values(random, n.first, 1.0));
            const Vector v = rounded(act, normal_values(random, n.second, 1.0));
            expect_same([&](Side& side) {
              const Tensor out =
                  side.strided(out_type, {tokens, n.first}, Vector(x.size(), 0.0), gap);
              const Tensor in_place = side.strided(act, {tokens, n.second}, y, gap);
              const RmsNormParams beside{.x = in_place,
                                         .weight = side.memory.tensor(act, {n.second}, v),
                                         .eps = 1e-6f,
                                         .out = in_place};
              side.run(side.subject.ops->rms_norm,
                       {.x = side.strided(act, {tokens, n.first}, x, gap),
                        .weight = side.memory.tensor(act, {n.first}, w),
                        .eps = 1e-5f,
                        .out = out,
                        .beside = &beside});
              return std::vector<Bytes>{side.bytes(out), side.bytes(in_place)};
            });
          }
        }
      }
    }
  }
}

struct HeadShape {
  int64_t heads, dim;
  int rope_dim;
};
const std::vector<int32_t> kPositions{0, 1, 129, 4097, 65535, 1000003};
constexpr int64_t kTokens = 6;

std::vector<float> frequencies(int rope_dim) {
  return oracle::rope_frequencies({.theta = 160000, .yarn = true}, rope_dim);
}

// A norm of kv, by an operation before or on its way; without a weight there is none.
struct KvNorm {
  ConstTensor weight{};
  bool before = false;
};

// q, kv and a window cache after six tokens.
std::vector<Bytes> qnorm_rope_insert(Side& side, const HeadShape& shape, KvFormat format, DType act,
                                     const Vector& q, const Vector& kv, int64_t gap,
                                     const KvNorm& norm = {}) {
  constexpr int kBlocks = 3;
  PagedCache cache(side.memory, format, static_cast<int>(shape.dim), 4, kBlocks);
  const Tensor device_q = side.strided(act, {kTokens, shape.heads, shape.dim}, q, gap);
  const Tensor device_kv = side.strided(act, {kTokens, shape.dim}, kv, gap);
  ScratchLimits limits;
  limits.max_tokens = kTokens;
  limits.num_heads = static_cast<int>(shape.heads);
  limits.head_dim = static_cast<int>(shape.dim);
  constexpr float kEps = 1e-6f;
  if (norm.before) {
    side.run(side.subject.ops->rms_norm,
             {.x = device_kv, .weight = norm.weight, .eps = kEps, .out = device_kv}, limits);
  }
  side.run(side.subject.ops->qnorm_rope_insert,
           {.q = device_q,
            .kv = device_kv,
            .rope = {side.memory.put(frequencies(shape.rope_dim)), shape.rope_dim},
            .eps = kEps,
            .positions = side.memory.put(kPositions),
            .slot_mapping = side.memory.put(std::vector<int64_t>{3, 0, 11, 5, -1, 6}),
            .window = cache.view(),
            .kv_norm = norm.before ? ConstTensor{} : norm.weight},
           limits);
  return {side.bytes(device_q), side.bytes(device_kv),
          side.memory.get(reinterpret_cast<const uint8_t*>(cache.view().base),
                          cache.view().block_stride_bytes * kBlocks)};
}

TEST_P(RowwiseBits, QnormRopeInsert) {
  for (const HeadShape& shape : {HeadShape{1, 512, 64}, HeadShape{3, 96, 32},
                                 HeadShape{65, 512, 64}, HeadShape{2, 1000, 6}}) {
    for (KvFormat format : {KvFormat::kFp8DsMla, KvFormat::kBf16, KvFormat::kFp8, KvFormat::kF32}) {
      if (format == KvFormat::kFp8DsMla && shape.dim != 512) continue;
      if (format == KvFormat::kF32 && !exact()) continue;
      for (DType act : kActs) {
        if (!takes(act)) continue;
        for (int64_t gap : {0, 1}) {
          SCOPED_TRACE(::testing::Message() << shape.heads << " x " << shape.dim << " "
                                            << kv_format_name(format) << " " << dtype_name(act));
          Random random(7);
          const Vector q =
              rounded(act, normal_values(random, kTokens * shape.heads * shape.dim, 3.0));
          Vector kv = normal_values(random, kTokens * shape.dim, 1.0);
          for (int64_t d = 0; d < shape.dim; ++d) kv[d] *= 1e-7;                    // the floor
          for (int64_t d = 0; d < shape.dim; ++d) kv[2 * shape.dim + d] *= 1000.0;  // saturates
          kv = rounded(act, kv);
          kv[shape.dim + 70] = std::numeric_limits<double>::infinity();
          // Formats with a NaN code; the payload of a bf16 or f32 NaN is the platform's.
          if (format == KvFormat::kFp8DsMla || format == KvFormat::kFp8)
            kv[3 * shape.dim + 1] = std::numeric_limits<double>::quiet_NaN();
          expect_same(
              [&](Side& side) { return qnorm_rope_insert(side, shape, format, act, q, kv, gap); });
        }
      }
    }
  }
}

// kv is normed on its way: the CPU's bits, and those of rms_norm before it.
TEST_P(RowwiseBits, QnormRopeInsertNormsKv) {
  for (const HeadShape& shape : {HeadShape{1, 512, 64}, HeadShape{3, 96, 32},
                                 HeadShape{65, 512, 64}, HeadShape{2, 1000, 6}}) {
    for (KvFormat format : {KvFormat::kFp8DsMla, KvFormat::kBf16, KvFormat::kF32}) {
      if (format == KvFormat::kFp8DsMla && shape.dim != 512) continue;
      if (format == KvFormat::kF32 && !exact()) continue;
      const DType act = format == KvFormat::kF32 ? DType::kF32 : DType::kBf16;
      for (DType weight_dtype : {DType::kBf16, DType::kF32}) {
        for (int64_t gap : {0, 1}) {
          SCOPED_TRACE(::testing::Message() << shape.heads << " x " << shape.dim << " "
                                            << kv_format_name(format) << " gap " << gap);
          Random random(8);
          const Vector q =
              rounded(act, normal_values(random, kTokens * shape.heads * shape.dim, 3.0));
          Vector kv = normal_values(random, kTokens * shape.dim, 1.0);
          for (int64_t d = 0; d < shape.dim; ++d) kv[static_cast<size_t>(d)] *= 1e-7;  // eps counts
          kv = rounded(act, kv);
          const Vector weight = rounded(weight_dtype, normal_values(random, shape.dim, 1.0));
          const auto insert = [&](Side& side, bool before) {
            const Tensor norm = side.memory.tensor(weight_dtype, {shape.dim}, weight);
            return qnorm_rope_insert(side, shape, format, act, q, kv, gap,
                                     {.weight = norm, .before = before});
          };
          expect_same([&](Side& side) {
            std::vector<Bytes> late = insert(side, false);
            EXPECT_EQ(late, insert(side, true));
            return late;
          });
        }
      }
    }
  }
}

// Blocks of several rounds of heads, the last one short, and kv without a block of its own.
TEST_P(RowwiseBits, QnormRopeInsertManyTokens) {
  struct Case {
    int64_t tokens, heads, dim;
  };
  for (const Case& shape : {Case{150, 19, 512}, Case{520, 9, 96}, Case{64, 64, 512}}) {
    if (emulated() && shape.dim != 96) continue;
    SCOPED_TRACE(::testing::Message()
                 << shape.tokens << " x " << shape.heads << " x " << shape.dim);
    const KvFormat format = shape.dim == 512 ? KvFormat::kFp8DsMla : KvFormat::kBf16;
    Random random(8);
    const Vector q =
        rounded(DType::kBf16, normal_values(random, shape.tokens * shape.heads * shape.dim, 3.0));
    const Vector kv = rounded(DType::kBf16, normal_values(random, shape.tokens * shape.dim, 1.0));
    std::vector<int32_t> positions;
    std::vector<int64_t> slots;
    for (int64_t t = 0; t < shape.tokens; ++t) {
      positions.push_back(static_cast<int32_t>(37 * t));
      slots.push_back(t % 5 == 3 ? -1 : shape.tokens - 1 - t);
    }
    expect_same([&](Side& side) {
      PagedCache cache(side.memory, format, static_cast<int>(shape.dim), 64, 9);
      const Tensor device_q =
          side.memory.tensor(DType::kBf16, {shape.tokens, shape.heads, shape.dim}, q);
      const Tensor device_kv = side.memory.tensor(DType::kBf16, {shape.tokens, shape.dim}, kv);
      ScratchLimits limits;
      limits.max_tokens = shape.tokens;
      limits.num_heads = static_cast<int>(shape.heads);
      limits.head_dim = static_cast<int>(shape.dim);
      side.run(side.subject.ops->qnorm_rope_insert,
               {.q = device_q,
                .kv = device_kv,
                .rope = {side.memory.put(frequencies(64)), 64},
                .eps = 1e-6f,
                .positions = side.memory.put(positions),
                .slot_mapping = side.memory.put(slots),
                .window = cache.view()},
               limits);
      return std::vector<Bytes>{side.bytes(device_q), side.bytes(device_kv),
                                side.memory.get(reinterpret_cast<const uint8_t*>(cache.view().base),
                                                cache.view().block_stride_bytes * 9)};
    });
  }
}

TEST_P(RowwiseBits, InverseRope) {
  for (const HeadShape& shape : {HeadShape{1, 512, 64}, HeadShape{3, 96, 32},
                                 HeadShape{65, 512, 64}, HeadShape{2, 1000, 6}}) {
    for (bool quantise : {false, true}) {
      for (DType act : kActs) {
        if (!takes(act)) continue;
        for (int64_t gap : {0, 1}) {
          SCOPED_TRACE(::testing::Message() << shape.heads << " x " << shape.dim << " "
                                            << dtype_name(act) << (quantise ? " quantised" : ""));
          Random random(8);
          Vector o = normal_values(random, kTokens * shape.heads * shape.dim, 0.3);
          for (int64_t d = 0; d < 128 && d < shape.dim; ++d) o[d] *= 1e-12;  // the floor
          o = rounded(act, o);
          expect_same([&](Side& side) {
            const Tensor out =
                side.strided(act, {kTokens, shape.heads, shape.dim}, Vector(o.size(), 0.0), gap);
            ScratchLimits limits;
            limits.max_tokens = kTokens;
            limits.num_heads = static_cast<int>(shape.heads);
            limits.head_dim = static_cast<int>(shape.dim);
            side.run(side.subject.ops->inverse_rope,
                     {.o = side.strided(act, {kTokens, shape.heads, shape.dim}, o, gap),
                      .rope = {side.memory.put(frequencies(shape.rope_dim)), shape.rope_dim},
                      .positions = side.memory.put(kPositions),
                      .quantise = quantise,
                      .out = out},
                     limits);
            return std::vector<Bytes>{side.bytes(out)};
          });
        }
      }
    }
  }
}

TEST_P(RowwiseBits, IndexQuery) {
  for (const HeadShape& shape : {HeadShape{1, 128, 64}, HeadShape{5, 32, 16},
                                 HeadShape{64, 128, 64}, HeadShape{3, 256, 64}}) {
    for (KvFormat format : {KvFormat::kIndexFp8, KvFormat::kIndexMxfp4, KvFormat::kIndexF32}) {
      for (bool hadamard : {false, true}) {
        for (DType act : kActs) {
          if (!takes(act)) continue;
          SCOPED_TRACE(::testing::Message()
                       << shape.heads << " x " << shape.dim << " " << kv_format_name(format) << " "
                       << dtype_name(act) << (hadamard ? " Hadamard" : ""));
          Random random(9);
          const Vector q =
              rounded(act, normal_values(random, kTokens * shape.heads * shape.dim, 2.0));
          const Vector weights = rounded(act, normal_values(random, kTokens * shape.heads, 1.0));
          expect_same([&](Side& side) {
            const DType out_type = format == KvFormat::kIndexF32 ? act : DType::kBf16;
            const Tensor q_out = side.memory.tensor(out_type, {kTokens, shape.heads, shape.dim});
            const Tensor weights_out = side.memory.tensor(DType::kF32, {kTokens, shape.heads});
            ScratchLimits limits;
            limits.max_tokens = kTokens;
            limits.index_heads = static_cast<int>(shape.heads);
            limits.index_dim = static_cast<int>(shape.dim);
            side.run(side.subject.ops->index_query,
                     {.q = side.strided(act, {kTokens, shape.heads, shape.dim}, q, 2),
                      .weights = side.memory.tensor(act, {kTokens, shape.heads}, weights),
                      .rope = {side.memory.put(frequencies(shape.rope_dim)), shape.rope_dim},
                      .positions = side.memory.put(kPositions),
                      .format = format,
                      .hadamard = hadamard,
                      .q_out = q_out,
                      .weights_out = weights_out},
                     limits);
            return std::vector<Bytes>{side.bytes(q_out), side.bytes(weights_out)};
          });
        }
      }
    }
  }
}

// Two sequences in chunks, ends of the state ring included; the second one is padded.
TEST_P(RowwiseBits, Compress) {
  struct Case {
    int ratio;
    bool overlap;
    int64_t width;
    KvFormat format;
    bool hadamard;
  };
  for (const Case& which :
       {Case{4, true, 512, KvFormat::kFp8DsMla, false}, Case{4, true, 512, KvFormat::kBf16, false},
        Case{128, false, 512, KvFormat::kFp8DsMla, false},
        Case{128, false, 512, KvFormat::kFp8, false},
        Case{4, true, 128, KvFormat::kIndexFp8, false},
        Case{4, true, 128, KvFormat::kIndexMxfp4, true},
        Case{4, true, 128, KvFormat::kIndexF32, false}, Case{160, true, 96, KvFormat::kBf16, false},
        Case{160, true, 96, KvFormat::kF32, false}, Case{2, false, 64, KvFormat::kF32, true}}) {
    if ((which.format == KvFormat::kF32 || which.format == KvFormat::kIndexF32) && !exact())
      continue;
    SCOPED_TRACE(::testing::Message()
                 << "ratio " << which.ratio << " " << kv_format_name(which.format));
    const int64_t half = (which.overlap ? 2 : 1) * which.width;
    const int ring = (which.overlap ? 2 : 1) * which.ratio;
    // Steps of one token a sequence at the end: decode writes the ring in the launch that reads it.
    // Both sequences complete an entry there.
    std::vector<std::vector<int32_t>> chunks{
        {ring + 1, 2},
        {1, which.ratio - 1},
        {which.ratio, 3},
        {std::max(1, which.ratio - 4), std::max(1, which.ratio - 5)}};
    for (int i = 0; i < 5; ++i) chunks.push_back({1, 1});
    Random random(11);
    const Vector ape = rounded(DType::kF32, normal_values(random, which.ratio * half, 0.5));
    const DType act = which.format == KvFormat::kF32 || which.format == KvFormat::kIndexF32
                          ? DType::kF32
                          : DType::kBf16;
    const Vector norm = rounded(act, normal_values(random, which.width, 1.0));
    std::vector<Vector> gates;
    constexpr int kPadding = 3;
    for (const std::vector<int32_t>& chunk : chunks) {
      gates.push_back(rounded(
          DType::kF32, normal_values(random, (chunk[0] + chunk[1] + kPadding) * 2 * half, 1.5)));
    }
    expect_same([&](Side& side) {
      constexpr int kRows = 4, kColumns = 3;
      PagedCache cache(side.memory, which.format, static_cast<int>(which.width), kRows,
                       2 * kColumns);
      const int64_t slot_stride = ring * 2 * half + 16;
      auto* state = reinterpret_cast<float*>(side.memory.raw(2 * slot_stride * 4));
      std::vector<Bytes> out;
      std::vector<int32_t> done{0, 0};
      for (size_t step = 0; step < chunks.size(); ++step) {
        std::vector<int32_t> query_start{0}, positions, token_to_seq;
        std::vector<int64_t> slots;
        for (int seq = 0; seq < 2; ++seq) {
          for (int32_t p = done[static_cast<size_t>(seq)];
               p < done[static_cast<size_t>(seq)] + chunks[step][static_cast<size_t>(seq)]; ++p) {
            positions.push_back(p);
            token_to_seq.push_back(seq);
            slots.push_back((p + 1) % which.ratio == 0 ? seq * kColumns * kRows + p / which.ratio
                                                       : -1);
          }
          query_start.push_back(static_cast<int32_t>(positions.size()));
        }
        for (int i = 0; i < kPadding; ++i) {
          positions.push_back(0);
          token_to_seq.push_back(0);
          slots.push_back(-1);
        }
        const auto tokens = static_cast<int64_t>(positions.size());
        RatioPlan ratio{which.ratio, side.memory.put(slots), nullptr, nullptr};
        PlanView plan;
        plan.num_tokens = static_cast<int32_t>(tokens);
        plan.num_seqs = 2;
        plan.max_query_len = std::max(chunks[step][0], chunks[step][1]);
        plan.query_start = side.memory.put(query_start);
        plan.context_len = side.memory.put(done);
        plan.state_slot = side.memory.put(std::vector<int32_t>{1, 0});
        plan.positions = side.memory.put(positions);
        plan.token_to_seq = side.memory.put(token_to_seq);
        plan.ratios = {&ratio, 1};
        ScratchLimits limits;
        limits.max_tokens = tokens;
        limits.head_dim = static_cast<int>(which.width);
        side.run(side.subject.ops->compress,
                 {.plan = &plan,
                  .ratio = &ratio,
                  .overlap = which.overlap,
                  .gates = side.memory.tensor(DType::kF32, {tokens, 2 * half}, gates[step]),
                  .ape = side.memory.tensor(DType::kF32, {which.ratio, half}, ape),
                  .norm = side.memory.tensor(act, {which.width}, norm),
                  .eps = 1e-6f,
                  .rope = {side.memory.put(frequencies(32)), 32},
                  .hadamard = which.hadamard,
                  .activation = act,
                  .state = {state, slot_stride, 2, ring, static_cast<int32_t>(2 * half)},
                  .cache = cache.view(),
                  .entries = {}},
                 limits);
        for (int seq = 0; seq < 2; ++seq)
          done[static_cast<size_t>(seq)] += chunks[step][static_cast<size_t>(seq)];
        out.push_back(side.memory.get(reinterpret_cast<const uint8_t*>(cache.view().base),
                                      cache.view().block_stride_bytes * 2 * kColumns));
        out.push_back(
            side.memory.get(reinterpret_cast<const uint8_t*>(state), 2 * slot_stride * 4));
      }
      return out;
    });
  }
}

// A step so long that blocks look at several tokens and make several entries.
TEST_P(RowwiseBits, CompressLongStep) {
  if (emulated()) GTEST_SKIP() << "too long for an interpreter";
  constexpr int64_t kLong = 9000, kWidth = 64;
  constexpr int32_t kContext = 37;
  for (const bool overlap : {true, false}) {
    const int ratio = overlap ? 4 : 16;
    SCOPED_TRACE(::testing::Message() << "ratio " << ratio);
    const int64_t half = (overlap ? 2 : 1) * kWidth;
    const int ring = (overlap ? 2 : 1) * ratio;
    Random random(13);
    const auto values = [&](int64_t count) {
      return rounded(DType::kF32, normal_values(random, count, 1.5));
    };
    const Vector gates = values(kLong * 2 * half), ape = values(ratio * half),
                 state_rows = values(ring * 2 * half);
    const Vector norm = rounded(DType::kBf16, normal_values(random, kWidth, 1.0));
    std::vector<int32_t> positions;
    std::vector<int64_t> slots;
    int64_t entries = 0;
    for (int32_t t = 0; t < kLong; ++t) {
      positions.push_back(kContext + t);
      slots.push_back((kContext + t + 1) % ratio == 0 ? entries++ : -1);
    }
    expect_same([&](Side& side) {
      constexpr int kRows = 64;
      const int blocks = static_cast<int>(entries / kRows + 1);
      PagedCache cache(side.memory, KvFormat::kBf16, kWidth, kRows, blocks);
      const Tensor state = side.memory.tensor(DType::kF32, {ring, 2 * half}, state_rows);
      RatioPlan of_ratio{ratio, side.memory.put(slots), nullptr, nullptr};
      PlanView plan;
      plan.num_tokens = plan.max_query_len = static_cast<int32_t>(kLong);
      plan.num_seqs = 1;
      plan.query_start = side.memory.put(std::vector<int32_t>{0, static_cast<int32_t>(kLong)});
      plan.context_len = side.memory.put(std::vector<int32_t>{kContext});
      plan.state_slot = side.memory.put(std::vector<int32_t>{0});
      plan.positions = side.memory.put(positions);
      plan.token_to_seq = side.memory.put(std::vector<int32_t>(kLong, 0));
      plan.ratios = {&of_ratio, 1};
      ScratchLimits limits;
      limits.max_tokens = kLong;
      limits.head_dim = kWidth;
      side.run(
          side.subject.ops->compress,
          {.plan = &plan,
           .ratio = &of_ratio,
           .overlap = overlap,
           .gates = side.memory.tensor(DType::kF32, {kLong, 2 * half}, gates),
           .ape = side.memory.tensor(DType::kF32, {ratio, half}, ape),
           .norm = side.memory.tensor(DType::kBf16, {kWidth}, norm),
           .eps = 1e-6f,
           .rope = {side.memory.put(frequencies(32)), 32},
           .hadamard = false,
           .activation = DType::kBf16,
           .state = {state.as<float>(), ring * 2 * half, 1, ring, static_cast<int32_t>(2 * half)},
           .cache = cache.view(),
           .entries = {}},
          limits);
      return std::vector<Bytes>{side.memory.get(reinterpret_cast<const uint8_t*>(cache.view().base),
                                                cache.view().block_stride_bytes * blocks),
                                side.bytes(state)};
    });
  }
}

// Many sequences of unequal lengths in a step, which is a short one or a long one.
TEST_P(RowwiseBits, CompressManySequences) {
  if (emulated()) GTEST_SKIP() << "too long for an interpreter";
  struct Case {
    int ratio;
    bool overlap;
    int64_t width;
    KvFormat format;
    int seqs, longest;
  };
  for (const Case& which : {Case{4, true, 512, KvFormat::kFp8DsMla, 70, 30},
                            Case{4, true, 128, KvFormat::kIndexFp8, 70, 30},
                            Case{4, true, 128, KvFormat::kIndexFp8, 70, 200},
                            Case{4, true, 128, KvFormat::kIndexMxfp4, 3, 9000},
                            Case{2, false, 96, KvFormat::kIndexFp8, 70, 200},
                            Case{12, false, 512, KvFormat::kFp8DsMla, 70, 60},
                            Case{12, false, 512, KvFormat::kFp8DsMla, 600, 2},
                            Case{12, true, 96, KvFormat::kBf16, 70, 60},
                            // At most one token each: the launch that pools writes the ring.
                            Case{4, true, 512, KvFormat::kFp8DsMla, 1500, 1},
                            Case{4, true, 128, KvFormat::kIndexFp8, 1500, 1},
                            Case{12, false, 512, KvFormat::kFp8DsMla, 600, 1},
                            Case{12, true, 96, KvFormat::kBf16, 70, 1}}) {
    SCOPED_TRACE(::testing::Message() << "ratio " << which.ratio << " width " << which.width
                                      << " sequences " << which.seqs);
    const int64_t half = (which.overlap ? 2 : 1) * which.width;
    const int ring = (which.overlap ? 2 : 1) * which.ratio + 1;
    Random random(17);
    std::vector<int32_t> query_start{0}, context_len, state_slot, positions, token_to_seq;
    std::vector<int64_t> slots;
    int64_t entries = 0;
    for (int32_t seq = 0; seq < which.seqs; ++seq) {
      const auto context = static_cast<int32_t>(random.below(3 * static_cast<uint64_t>(ring)));
      const auto count =
          static_cast<int32_t>(random.below(static_cast<uint64_t>(which.longest) + 1));
      for (int32_t p = context; p < context + count; ++p) {
        positions.push_back(p);
        token_to_seq.push_back(seq);
        slots.push_back((p + 1) % which.ratio == 0 ? entries++ : -1);
      }
      query_start.push_back(static_cast<int32_t>(positions.size()));
      context_len.push_back(context);
      state_slot.push_back(which.seqs - 1 - seq);
    }
    const auto tokens = static_cast<int64_t>(positions.size());
    const auto values = [&](int64_t count) {
      return rounded(DType::kF32, normal_values(random, count, 1.5));
    };
    const Vector gates = values(tokens * 2 * half), ape = values(which.ratio * half),
                 state_rows = values(which.seqs * ring * 2 * half);
    const Vector norm = rounded(DType::kBf16, normal_values(random, which.width, 1.0));
    expect_same([&](Side& side) {
      constexpr int kRows = 64;
      const int blocks = static_cast<int>(entries / kRows + 1);
      PagedCache cache(side.memory, which.format, static_cast<int>(which.width), kRows, blocks);
      const Tensor state =
          side.memory.tensor(DType::kF32, {which.seqs * ring, 2 * half}, state_rows);
      RatioPlan of_ratio{which.ratio, side.memory.put(slots), nullptr, nullptr};
      PlanView plan;
      plan.num_tokens = static_cast<int32_t>(tokens);
      plan.max_query_len = which.longest == 1 ? 1 : plan.num_tokens;  // as in recorded steps
      plan.num_seqs = which.seqs;
      plan.query_start = side.memory.put(query_start);
      plan.context_len = side.memory.put(context_len);
      plan.state_slot = side.memory.put(state_slot);
      plan.positions = side.memory.put(positions);
      plan.token_to_seq = side.memory.put(token_to_seq);
      plan.ratios = {&of_ratio, 1};
      ScratchLimits limits;
      limits.max_tokens = tokens;
      limits.head_dim = static_cast<int>(which.width);
      side.run(side.subject.ops->compress,
               {.plan = &plan,
                .ratio = &of_ratio,
                .overlap = which.overlap,
                .gates = side.memory.tensor(DType::kF32, {tokens, 2 * half}, gates),
                .ape = side.memory.tensor(DType::kF32, {which.ratio, half}, ape),
                .norm = side.memory.tensor(DType::kBf16, {which.width}, norm),
                .eps = 1e-6f,
                .rope = {side.memory.put(frequencies(32)), 32},
                .hadamard = false,
                .activation = DType::kBf16,
                .state = {state.as<float>(), ring * 2 * half, which.seqs, ring,
                          static_cast<int32_t>(2 * half)},
                .cache = cache.view(),
                .entries = {}},
               limits);
      return std::vector<Bytes>{side.memory.get(reinterpret_cast<const uint8_t*>(cache.view().base),
                                                cache.view().block_stride_bytes * blocks),
                                side.bytes(state)};
    });
  }
}

TEST_P(RowwiseBits, ExpandPlan) {
  for (uint64_t seed = 0; seed < 20; ++seed) {
    Random random(seed);
    const auto seqs = static_cast<int32_t>(random.below(9));
    std::vector<int32_t> query_start{0}, context_len;
    for (int s = 0; s < seqs; ++s) {
      const int64_t kind = random.below(4);  // empty, decode, short and long prompts
      const int64_t length = kind == 0 ? 0 : kind == 1 ? 1 : random.below(kind == 2 ? 20 : 300);
      query_start.push_back(query_start.back() + static_cast<int32_t>(length));
      context_len.push_back(static_cast<int32_t>(random.below(3) == 0 ? 0 : random.below(2000)));
    }
    const int64_t tokens = query_start.back() + random.below(3) * 5;
    constexpr int kWindowColumns = 5, kColumns = 10, kWindowBlock = 64, kBlock = 256;
    std::vector<int32_t> window_table = random.permutation(kWindowColumns * std::max(1, seqs));
    std::vector<int32_t> table = random.permutation(kColumns * std::max(1, seqs));
    for (size_t i = 0; i < table.size(); i += 7) table[i] = -1;  // no block
    expect_same([&](Side& side) {
      const auto ints = [&] {
        return side.memory.put(std::vector<int32_t>(static_cast<size_t>(tokens), -9));
      };
      const auto longs = [&] {
        return side.memory.put(std::vector<int64_t>(static_cast<size_t>(tokens), -9));
      };
      const std::vector<RatioPlan> ratios{{4, longs(), ints(), ints()},
                                          {128, longs(), ints(), ints()}};
      PlanView plan;
      plan.num_tokens = static_cast<int32_t>(tokens);
      plan.num_seqs = seqs;
      plan.query_start = side.memory.put(query_start);
      plan.context_len = side.memory.put(context_len);
      plan.window_blocks = {side.memory.put(window_table), kWindowColumns, kWindowColumns,
                            kWindowBlock};
      plan.growing_blocks = {side.memory.put(table), kColumns, kColumns, kBlock};
      plan.positions = ints();
      plan.token_to_seq = ints();
      plan.window_slot_mapping = longs();
      plan.window_begin = ints();
      plan.window_end = ints();
      plan.ratios = ratios;
      side.run(side.subject.ops->expand_plan, {.plan = plan, .sliding_window = 128});
      std::vector<Bytes> out;
      const auto add = [&](const auto* data) {
        out.push_back(side.memory.get(reinterpret_cast<const uint8_t*>(data),
                                      tokens * int64_t{sizeof(*data)}));
      };
      for (const int32_t* data :
           {plan.positions, plan.token_to_seq, plan.window_begin, plan.window_end})
        add(data);
      add(plan.window_slot_mapping);
      for (const RatioPlan& ratio : ratios) {
        add(ratio.slot_mapping);
        add(ratio.begin);
        add(ratio.end);
      }
      return out;
    });
  }
}

TEST_P(RowwiseBits, GatherRowsAndZero) {
  for (DType dtype : kActs) {
    for (int64_t n : {1, 7, 8, 129, 4096, 5000}) {
      for (int64_t gap : {0, 1, 8}) {
        SCOPED_TRACE(::testing::Message() << n << " " << dtype_name(dtype) << ", gap " << gap);
        Random random(static_cast<uint64_t>(n));
        const Vector x = rounded(dtype, normal_values(random, 5 * n, 1.0));
        expect_same([&](Side& side) {
          const Tensor from = side.strided(dtype, {5, n}, x, gap);
          const Tensor out =
              side.strided(dtype, {4, n}, Vector(static_cast<size_t>(4 * n), 3.0), gap);
          side.run(
              side.subject.ops->gather_rows,
              {.x = from, .rows = side.memory.put(std::vector<int32_t>{4, 0, 4, 2}), .out = out});
          // Three rows of four heads in the middle of six.
          Tensor heads =
              side.memory.tensor(dtype, {3, 6, n}, Vector(static_cast<size_t>(18 * n), 2.0));
          const Tensor all = heads;
          heads.data = heads.as<char>() + n * size_of(dtype);
          heads.shape[1] = 4;
          side.run(side.subject.ops->zero, {.out = heads});
          side.run(side.subject.ops->zero, {.out = from});
          return std::vector<Bytes>{side.bytes(out), side.bytes(all), side.bytes(from)};
        });
      }
    }
  }
}

std::vector<OpCandidate> gpu_candidates() {
  std::vector<OpCandidate> out = op_candidates("rowwise");
  std::erase_if(out, [](const OpCandidate& c) { return c.platform == Platform::kCpu; });
  return out;
}
INSTANTIATE_TEST_SUITE_P(Candidates, RowwiseBits, ::testing::ValuesIn(gpu_candidates()),
                         candidate_name);

}  // namespace
}  // namespace dsv4::testing
