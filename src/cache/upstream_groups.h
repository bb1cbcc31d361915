// How vLLM lays the caches of a model into one slab of blocks: specs per layer, groups, block
// stride, number of blocks. For exchange of caches and for comparing memory; the pool of this
// library has its own three groups. Source: spec/dispatch.md 4.2-4.4.
#pragma once
#include <cstdint>
#include <span>
#include <string>
#include <vector>

namespace dsv4 {

/// One cache that a layer registers.
struct UpstreamSpec {
  std::string role;          ///< "main", "indexer", "swa", "state", "indexer_state"
  int compress_ratio = 1;    ///< of the layer; main caches of different ratios are different roles
  int64_t block_tokens = 0;  ///< tokens that one block covers
  int64_t window = 0;        ///< sliding window; 0: full (MLA kind)
  int64_t page_bytes = 0;    ///< aligned page
  bool operator==(const UpstreamSpec&) const = default;
};

/// Specs of a layer of ratio 1 (or 0), 4 or 128 on a backend with packed fp8_ds_mla pages.
/// @throws Error kInvalidArgument for another ratio, with the list.
std::vector<UpstreamSpec> upstream_layer_specs(int compress_ratio);

/// At most `layers_per_group` tuples of one bucket; blocks of a group hold all its pages.
struct UpstreamGroup {
  int64_t block_tokens = 0;
  int64_t window = 0;      ///< 0: the group of full (MLA) caches
  int64_t num_tuples = 0;  ///< layers
  int64_t width_bytes = 0;
};

struct UpstreamGroups {
  std::vector<int64_t> tuple_counts;  ///< per bucket: full caches first, then as first seen
  int64_t layers_per_group = 0;       ///< d
  std::vector<UpstreamGroup> groups;
  int64_t block_stride_bytes = 0;      ///< widest group: groups share the slab's blocks
  int64_t scheduler_block_tokens = 0;  ///< least common multiple of the groups' blocks
  int64_t hash_unit_tokens = 0;        ///< greatest common divisor
  int64_t num_blocks(int64_t memory_bytes) const { return memory_bytes / block_stride_bytes; }
};

/// Groups the caches of layers with these ratios (0 or 1, 4, 128).
/// @throws Error kInvalidArgument without layers, or for another ratio.
UpstreamGroups upstream_groups(std::span<const int> compress_ratios);

/// Rows from one block to the next in units of rows, as TRTLLM-gen addresses them.
/// @throws Error kUnsupported when the stride is not a whole number of rows.
int64_t block_span_rows(int64_t block_stride_bytes, int64_t row_bytes);

}  // namespace dsv4
