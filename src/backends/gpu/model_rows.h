// Embedding and the choice of experts (model.md 2 and 4.1).
//
// embed   streams[t, i, :] = table[ids[t], :], one rounding at most
// route   p = sqrt(softplus(logits)); the k largest of p + bias, or the experts of a table; weights
//         p / sum * scaling; ascending expert ids
//
// Tiling  embed: block = (token, part of the row). route: one lane group a token, lane l with the
//         experts l, l + 32, ...; k rounds of a search for the next best (6 rounds over 8 experts a
//         lane for 256 experts)
// Budget  embed: (1 + streams) rows; route: 4 experts bytes in, 8 k out, a few us of latency
// Contract  experts <= 1024, k <= 32 and <= experts. Ids of a table that are no experts are taken
// as
//         the nearest one: a device cannot refuse them
// Numerics  exact ties go to the smaller id, NaN counts as -inf; the sum of p in ascending id
#pragma once
#include <limits>

#include "backends/gpu/model_rows_pair.h"

namespace dsv4::gpu {

struct EmbedArgs {
  const int32_t* ids;
  const void* table;
  int64_t table_stride;
  void* streams;
  int64_t token_stride, stream_stride;
  int32_t hc, width, parts;
};

template <typename Table, typename Act>
struct Embed {
  using Params = EmbedArgs;
  static constexpr int kThreads = 128;

  DSV4_DEVICE static void run(const Params& args) {
    const auto block = static_cast<uint32_t>(block_idx());
    const int64_t token = block / static_cast<uint32_t>(args.parts);
    const auto part = static_cast<int>(block % static_cast<uint32_t>(args.parts));
    const Table* row = static_cast<const Table*>(args.table) + args.ids[token] * args.table_stride;
    Act* out = static_cast<Act*>(args.streams) + token * args.token_stride;
    const bool aligned = has_aligned_pairs(row);
    const bool out_aligned = has_aligned_pairs(out) && args.stream_stride % 2 == 0;
    const int pairs = (args.width + 1) / 2;
    for (int p = part * kThreads + thread_idx(); p < pairs; p += args.parts * kThreads) {
      const Pair pair = load_pair_of(row, 2 * p, args.width, aligned);
      for (int i = 0; i < args.hc; ++i)
        store_pair_of(out + i * args.stream_stride, 2 * p, args.width, out_aligned, pair);
    }
  }
};

struct RouteArgs {
  const float* logits;  // [tokens, experts]
  int64_t logits_stride;
  const float* bias;     // [experts], or null
  const int64_t* table;  // [vocab, k], or null
  int64_t table_stride;
  const int32_t* token_ids;
  int32_t* expert_ids;  // [tokens, k]
  int64_t ids_stride;
  float* expert_weights;
  int64_t weights_stride;
  int32_t tokens, experts, k;
  float scaling;
};

struct Route {
  using Params = RouteArgs;
  static constexpr int kThreads = 64;
  static constexpr int kTokens = kThreads / kGroupLanes;
  static constexpr int kMaxExperts = 1024;
  static constexpr int kMaxK = kGroupLanes;
  struct Shared {
    float p[kTokens][kMaxExperts];
    int32_t ids[kTokens][kMaxK];
  };
  /// A score and its expert; better: larger score, then smaller id.
  struct Choice {
    float score;
    int32_t id;
    DSV4_DEVICE bool better_than(const Choice& other) const {
      return other.score < score || (other.score == score && id < other.id);
    }
  };

  DSV4_DEVICE static void run(const Params& args) {
    DSV4_SHARED(Shared, shared);
    const int64_t token = block_idx() * kTokens + group_idx();
    if (token >= args.tokens) return;
    float* p = shared.p[group_idx()];
    int32_t* ids = shared.ids[group_idx()];
    const int lane = group_lane(), k = args.k;
    const float* logits = args.logits + token * args.logits_stride;
    for (int e = lane; e < args.experts; e += kGroupLanes) p[e] = sqrt(softplus(logits[e]));
    group_sync();
    const int32_t id = args.table != nullptr ? by_table(args, token) : by_bias(args, p);
    // Lane l < k has one of the ids, in any order.
    int rank = 0;
    for (int i = 0; i < k; ++i) {
      const int32_t other = shuffle(id, i);
      rank += other < id || (other == id && i < lane) ? 1 : 0;
    }
    if (lane < k) ids[rank] = id;
    group_sync();
    if (lane >= k) return;
    float sum = 0.0f;
    for (int i = 0; i < k; ++i) sum = sum + p[ids[i]];
    args.expert_ids[token * args.ids_stride + lane] = ids[lane];
    args.expert_weights[token * args.weights_stride + lane] = p[ids[lane]] / sum * args.scaling;
  }

  DSV4_DEVICE static int32_t by_table(const Params& args, int64_t token) {
    if (group_lane() >= args.k) return 0;
    const int64_t id = args.table[args.token_ids[token] * args.table_stride + group_lane()];
    const int64_t last = args.experts - 1;
    return static_cast<int32_t>(id < 0 ? 0 : last < id ? last : id);
  }

  DSV4_DEVICE static int32_t by_bias(const Params& args, const float* p) {
    constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();
    Choice last{0.0f, -1};  // taken in the round before
    int32_t mine = 0;
    for (int round = 0; round < args.k; ++round) {
      Choice best{kMinusInfinity, kMaxExperts};
      for (int e = group_lane(); e < args.experts; e += kGroupLanes) {
        float score = args.bias == nullptr ? p[e] : p[e] + args.bias[e];
        if (is_nan(score)) score = kMinusInfinity;
        const Choice choice{score, e};
        if ((round == 0 || last.better_than(choice)) && choice.better_than(best)) best = choice;
      }
      for (int distance = kGroupLanes / 2; distance > 0; distance /= 2) {
        const Choice other{shuffle_xor(best.score, distance), shuffle_xor(best.id, distance)};
        if (other.better_than(best)) best = other;
      }
      last = best;
      if (group_lane() == round) mine = best.id;
    }
    return mine;
  }
};

}  // namespace dsv4::gpu
