// Layers of V4-Flash's geometry on rocm:emulated, one rank of eight (8 heads, one output group; all
// else is whole): decode steps after a long prompt, whose caches the CPU's layer has filled. Both
// layers get the same input and the same caches, so that what differs is the arithmetic of a step.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>

#include "tests/attention/layer_harness.h"

namespace dsv4::testing {
namespace {

constexpr TensorParallel kRank{3, 8};
// More entries than index_topk = 512 from position 2051 on; a step across position 2175, which
// completes an entry of both ratios.
constexpr int64_t kPrompt = 2174, kChunk = 512, kSteps = 3;

// Everything that a layer has written, from one device to another with the same pool.
class CacheCopy {
 public:
  CacheCopy(LayerHarness& from, LayerHarness& to) : from_(from), to_(to) {
    const LayerCaches source = from.pool().caches(0), target = to.pool().caches(0);
    copy(source.window, target.window);
    if (source.compressed) copy(source.compressed, target.compressed);
    if (source.index) copy(source.index, target.index);
    if (source.state) copy(source.state, target.state);
    if (source.index_state) copy(source.index_state, target.index_state);
  }

 private:
  void copy(const CacheView& source, const CacheView& target) {
    ASSERT_EQ(source.num_blocks, target.num_blocks);
    ASSERT_EQ(source.block_stride_bytes, target.block_stride_bytes);
    put(from_.download(source), target.base);
  }
  void copy(const StateView& source, const StateView& target) {
    ASSERT_EQ(source.num_slots, target.num_slots);
    ASSERT_EQ(source.slot_stride_elems, target.slot_stride_elems);
    const int64_t elems = (source.num_slots - 1) * source.slot_stride_elems +
                          int64_t{source.ring_rows} * source.row_elems;
    put(from_.download(source.base, elems), target.base);
  }
  template <typename T>
  void put(const std::vector<T>& values, void* to) {
    Device& device = to_.device();
    device.copy_to_device(to, values.data(), std::ssize(values) * int64_t{sizeof(T)},
                          device.default_stream());
    device.synchronize(device.default_stream());
  }

  LayerHarness& from_;
  LayerHarness& to_;
};

double cosine_distance(const std::vector<float>& a, const std::vector<float>& b) {
  double ab = 0, aa = 0, bb = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    ab += double{a[i]} * b[i];
    aa += double{a[i]} * a[i];
    bb += double{b[i]} * b[i];
  }
  return 1 - ab / std::sqrt(aa * bb);
}

class FlashSlice : public ::testing::TestWithParam<int> {};

TEST_P(FlashSlice, DecodesLikeTheCpu) {
  const ModelConfig config =
      ModelConfig::load(std::string(DSV4_SOURCE_DIR) + "/configs/v4-flash.json");
  const StepLimits limits{kChunk, 1, kPrompt + kSteps};
  Numerics numerics = kServing;
  numerics.wo_a = WoA::kBf16;
  LayerHarness cpu(config, GetParam(), numerics, limits, kRank);
  LayerHarness emulated(config, GetParam(), numerics, limits, kRank, emulated_target());
  const SequenceId on_cpu = cpu.pool().create().value();
  const SequenceId on_emulated = emulated.pool().create().value();
  for (int64_t done = 0; done < kPrompt; done += kChunk) {
    const int64_t count = std::min(kChunk, kPrompt - done);
    (void)cpu.forward(on_cpu, formula_hidden(count, config.hidden_size, 100 + done));
    ASSERT_TRUE(emulated.pool().reserve(on_emulated, count));
    emulated.pool().advance(on_emulated, count);
  }
  double worst = 0;
  for (int64_t step = 0; step < kSteps; ++step) {
    CacheCopy(cpu, emulated);
    const std::vector<float> hidden = formula_hidden(1, config.hidden_size, 900 + step);
    const std::vector<float> expected = cpu.forward(on_cpu, hidden);
    worst = std::max(worst, cosine_distance(emulated.forward(on_emulated, hidden), expected));
  }
  // Each side rounds P to bf16 (2^-8 / sqrt(3), root mean square) and quantises the input of wo_b,
  // where a change d becomes a whole step s of at most 2^-3 with probability |d| / s: a mean square
  // of |d| s, and half of it is the cosine distance (layer_oracle_test.cc).
  EXPECT_LT(worst, 0x1p-8 / std::sqrt(3.0) * 0x1p-3 / 2 * 2);
  printf("ratio %d: cosine distance %.2g\n", GetParam(), worst);
}

INSTANTIATE_TEST_SUITE_P(Ratios, FlashSlice, ::testing::Values(0, 4, 128));

}  // namespace
}  // namespace dsv4::testing
