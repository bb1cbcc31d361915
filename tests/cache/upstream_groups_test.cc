// The grouping example of spec/dispatch.md 4.2-4.4, and the rule at other models.
#include "cache/upstream_groups.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <vector>

#include "dsv4/error.h"

namespace dsv4 {
namespace {

std::vector<int> ratios(int sliding, int csa, int hca) {
  std::vector<int> out(static_cast<size_t>(sliding), 0);
  for (int i = 0; i < std::max(csa, hca); ++i) {
    if (i < hca) out.push_back(128);
    if (i < csa) out.push_back(4);
  }
  return out;
}

TEST(UpstreamSpecs, PagesOfEveryCache) {
  using Specs = std::vector<UpstreamSpec>;
  const UpstreamSpec swa{"swa", 1, 64, 128, 37440};
  EXPECT_EQ(upstream_layer_specs(0), Specs{swa});
  EXPECT_EQ(upstream_layer_specs(1), Specs{swa});
  EXPECT_EQ(upstream_layer_specs(4), (Specs{swa,
                                            {"main", 4, 256, 0, 37440},
                                            {"indexer", 4, 256, 0, 8640},
                                            {"state", 4, 4, 8, 32832},
                                            {"indexer_state", 4, 4, 8, 8640}}));
  EXPECT_EQ(upstream_layer_specs(128),
            (Specs{swa, {"main", 128, 256, 0, 1728}, {"state", 128, 8, 128, 32832}}));
  EXPECT_THROW(upstream_layer_specs(2), Error);
}

TEST(UpstreamGroups, SixtyOneLayers) {
  const std::vector<int> layers = ratios(0, 30, 31);
  size_t specs = 0;
  for (int ratio : layers) specs += upstream_layer_specs(ratio).size();
  EXPECT_EQ(specs, 243u);

  const UpstreamGroups groups = upstream_groups(layers);
  std::vector<int64_t> counts = groups.tuple_counts;
  EXPECT_EQ(counts.front(), 31);
  std::sort(counts.begin(), counts.end());
  EXPECT_EQ(counts, (std::vector<int64_t>{30, 31, 31, 61}));
  EXPECT_EQ(groups.layers_per_group, 31);
  ASSERT_EQ(groups.groups.size(), 5u);
  struct Expected {
    int64_t block_tokens, window, width_bytes;
    int count;
  };
  for (const Expected& e : {Expected{256, 0, 1435968, 1}, Expected{64, 128, 31 * 37440, 1},
                            Expected{64, 128, 30 * 37440, 1}, Expected{4, 8, 1244160, 1},
                            Expected{8, 128, 1017792, 1}}) {
    EXPECT_EQ(std::count_if(groups.groups.begin(), groups.groups.end(),
                            [&](const UpstreamGroup& g) {
                              return g.block_tokens == e.block_tokens && g.window == e.window &&
                                     g.width_bytes == e.width_bytes;
                            }),
              e.count)
        << e.width_bytes;
  }
  EXPECT_EQ(groups.block_stride_bytes, 1435968);
  EXPECT_EQ(groups.num_blocks(int64_t{10} << 30), 7477);
  EXPECT_EQ(groups.scheduler_block_tokens, 256);
  EXPECT_EQ(groups.hash_unit_tokens, 4);
  EXPECT_EQ(groups.block_stride_bytes % 576, 0);
}

// 43 layers (2 sliding, 21 CSA, 20 HCA): tuples 21, 43, 21, 20. Padding by hand: d = 21 -> 20 + 1,
// d = 22 -> 1 + 1 + 1 + 2 = 5, d = 23 -> 2 + 3 + 2 + 3 = 10, ... d = 43 -> 22 + 22 + 23.
TEST(UpstreamGroups, FortyThreeLayers) {
  const UpstreamGroups groups = upstream_groups(ratios(2, 21, 20));
  EXPECT_EQ(groups.layers_per_group, 22);
  EXPECT_EQ(groups.groups.size(), 5u);
  EXPECT_EQ(groups.block_stride_bytes, 21 * (37440 + 8640) + 20 * 1728);
}

TEST(UpstreamGroups, SlidingLayersOnly) {
  const UpstreamGroups groups = upstream_groups(std::vector<int>{0, 0, 0});
  EXPECT_EQ(groups.tuple_counts, std::vector<int64_t>{3});
  EXPECT_EQ(groups.block_stride_bytes, 3 * 37440);
  EXPECT_EQ(groups.scheduler_block_tokens, 64);
  EXPECT_EQ(groups.hash_unit_tokens, 64);
  EXPECT_THROW(upstream_groups({}), Error);
}

TEST(UpstreamGroups, SmallModels) {
  // Tuples 1 (main), 2 (windows), 1 (state): padding 0 at d = 1, 2 at d = 2.
  EXPECT_EQ(upstream_groups(ratios(1, 0, 1)).layers_per_group, 1);
  EXPECT_EQ(upstream_groups(ratios(1, 0, 1)).groups.size(), 4u);
  EXPECT_EQ(upstream_groups(ratios(0, 0, 1)).groups.size(), 3u);
  // Tuples 3, 4, 3: padding 2 at d = 3 (4 -> 6) and at d = 4 (3 -> 4 twice); the larger wins.
  EXPECT_EQ(upstream_groups(ratios(1, 0, 3)).layers_per_group, 4);
}

TEST(BlockSpan, WholeRowsOnly) {
  EXPECT_EQ(block_span_rows(65536, 1024), 64);
  EXPECT_EQ(block_span_rows(1435968, 576), 2493);
  try {
    block_span_rows(37440, 512);
    FAIL() << "expected a refusal";
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ErrorCode::kUnsupported);
  }
}

}  // namespace
}  // namespace dsv4
