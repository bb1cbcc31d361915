#include "cache/upstream_groups.h"

#include <algorithm>
#include <numeric>

#include "cache/kv_format.h"
#include "core/checked_math.h"
#include "core/fail.h"

namespace dsv4 {
namespace {

constexpr int64_t kSchedulerBlockTokens = 256;
constexpr int64_t kWindowBlockTokens = 64;
constexpr int64_t kSlidingWindow = 128;
constexpr int kHeadDim = Fp8DsMla::kHeadDim;
constexpr int kIndexHeadDim = 128;

UpstreamSpec full_spec(const char* role, int ratio, KvFormat format, int row_elems) {
  return {role, ratio, kSchedulerBlockTokens, 0,
          upstream_page_bytes(format, kSchedulerBlockTokens / ratio, row_elems)};
}

// Rows of [v | s], each of `windows` * width floats; a window of `windows` * ratio tokens is kept.
UpstreamSpec state_spec(const char* role, int ratio, int windows, int64_t block_tokens, int width) {
  return {role, ratio, block_tokens, int64_t{windows} * ratio,
          upstream_page_bytes(KvFormat::kStateF32, block_tokens, 2 * windows * width)};
}

// Specs with the same block and window, by role. The i-th layers of all its roles form tuple i.
struct Bucket {
  struct Role {
    UpstreamSpec spec;
    int64_t num_layers = 0;
  };
  int64_t block_tokens, window;
  std::vector<Role> roles;

  int64_t num_tuples() const {
    int64_t out = 0;
    for (const Role& role : roles) out = std::max(out, role.num_layers);
    return out;
  }
  // Bytes of tuples [begin, end).
  int64_t width_bytes(int64_t begin, int64_t end) const {
    int64_t out = 0;
    for (const Role& role : roles) {
      out += std::max<int64_t>(0, std::min(end, role.num_layers) - begin) * role.spec.page_bytes;
    }
    return out;
  }
};

void add(std::vector<Bucket>& buckets, const UpstreamSpec& spec) {
  const int64_t block_tokens = spec.window == 0 ? kSchedulerBlockTokens : spec.block_tokens;
  auto bucket = std::find_if(buckets.begin(), buckets.end(), [&](const Bucket& b) {
    return b.block_tokens == block_tokens && b.window == spec.window;
  });
  if (bucket == buckets.end()) {
    // Full caches come first: their count starts the search for the group size.
    const auto at = spec.window == 0 ? buckets.begin() : buckets.end();
    bucket = buckets.insert(at, Bucket{block_tokens, spec.window, {}});
  }
  auto role = std::find_if(bucket->roles.begin(), bucket->roles.end(),
                           [&](const Bucket::Role& r) { return r.spec == spec; });
  if (role == bucket->roles.end()) role = bucket->roles.insert(role, Bucket::Role{spec, 0});
  ++role->num_layers;
}

// Tuples that all groups of size d could hold, less those that exist; the smallest wins, a tie goes
// to the larger d.
int64_t best_group_size(const std::vector<int64_t>& counts) {
  const int64_t largest = *std::max_element(counts.begin(), counts.end());
  int64_t best = 0, best_padding = 0;
  for (int64_t d = counts.front(); d <= largest; ++d) {
    int64_t padding = 0;
    for (int64_t count : counts) padding += round_up(count, d) - count;
    if (best == 0 || padding <= best_padding) best = d, best_padding = padding;
  }
  return best;
}

}  // namespace

std::vector<UpstreamSpec> upstream_layer_specs(int compress_ratio) {
  std::vector<UpstreamSpec> out;
  // The window row is independent of the layer's ratio: one role for all layers.
  out.push_back({"swa", 1, kWindowBlockTokens, kSlidingWindow,
                 upstream_page_bytes(KvFormat::kFp8DsMla, kWindowBlockTokens, kHeadDim)});
  switch (compress_ratio) {
    case 0:
    case 1:
      return out;
    case 4:
      out.push_back(full_spec("main", 4, KvFormat::kFp8DsMla, kHeadDim));
      out.push_back(full_spec("indexer", 4, KvFormat::kIndexFp8, kIndexHeadDim));
      out.push_back(state_spec("state", 4, 2, 4, kHeadDim));
      out.push_back(state_spec("indexer_state", 4, 2, 4, kIndexHeadDim));
      return out;
    case 128:
      out.push_back(full_spec("main", 128, KvFormat::kFp8DsMla, kHeadDim));
      out.push_back(state_spec("state", 128, 1, 8, kHeadDim));
      return out;
    default:
      fail(ErrorCode::kInvalidArgument, "compress ratio ", compress_ratio,
           ", expected 0, 1, 4 or 128");
  }
}

UpstreamGroups upstream_groups(std::span<const int> compress_ratios) {
  if (compress_ratios.empty()) {
    fail(ErrorCode::kInvalidArgument, "cache groups of a model without layers");
  }
  std::vector<Bucket> buckets;
  for (int ratio : compress_ratios) {
    for (const UpstreamSpec& spec : upstream_layer_specs(ratio)) add(buckets, spec);
  }
  UpstreamGroups out;
  for (const Bucket& bucket : buckets) out.tuple_counts.push_back(bucket.num_tuples());
  out.layers_per_group = best_group_size(out.tuple_counts);
  out.scheduler_block_tokens = 1;
  for (const Bucket& bucket : buckets) {
    const int64_t count = bucket.num_tuples();
    for (int64_t begin = 0; begin < count; begin += out.layers_per_group) {
      const int64_t end = std::min(count, begin + out.layers_per_group);
      const int64_t width = bucket.width_bytes(begin, end);
      out.groups.push_back({bucket.block_tokens, bucket.window, end - begin, width});
      out.block_stride_bytes = std::max(out.block_stride_bytes, width);
    }
    out.scheduler_block_tokens = std::lcm(out.scheduler_block_tokens, bucket.block_tokens);
    out.hash_unit_tokens = std::gcd(out.hash_unit_tokens, bucket.block_tokens);
  }
  return out;
}

int64_t block_span_rows(int64_t block_stride_bytes, int64_t row_bytes) {
  if (row_bytes < 1 || block_stride_bytes % row_bytes != 0) {
    fail(ErrorCode::kUnsupported, "cache block stride of ", block_stride_bytes,
         " bytes, expected a multiple of the row of ", row_bytes, " bytes");
  }
  return block_stride_bytes / row_bytes;
}

}  // namespace dsv4
