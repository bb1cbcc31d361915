// Inputs of indexer scores for tests of the CPU's candidates.
#pragma once
#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#include "backends/cpu/candidates.h"
#include "cache/kv_format.h"
#include "core/numbers.h"
#include "core/thread_pool.h"

namespace dsv4::cpu {

using Random = std::mt19937;

inline float uniform(Random& random, float magnitude) {
  return std::uniform_real_distribution<float>(-magnitude, magnitude)(random);
}
inline int pick(Random& random, int low, int high) {
  return std::uniform_int_distribution<int>(low, high)(random);
}

struct CaseOptions {
  KvFormat format = KvFormat::kIndexFp8;
  int heads = 64;
  int dim = 128;
  std::vector<int> ends = {70, 0, 133};
  int seqs = 2;
  int rows_per_block = 64;
  float magnitude = 1.0f;
};

// One call of index_logits with everything that it points to. Bytes of the cache that no row was
// written to are 0xff: NaN in every format, also as a scale.
struct Case {
  CaseOptions options;
  std::vector<std::byte> bytes;
  CacheView view;
  std::vector<int32_t> table, token_to_seq, end;
  std::vector<float> q, weights;
  std::vector<uint16_t> q_bf16;
  int32_t max_end = 0;
  int32_t columns = 0;

  Case(Random& random, const CaseOptions& o) : options(o) {
    const auto tokens = static_cast<int>(o.ends.size());
    for (int t = 0; t < tokens; ++t) {
      token_to_seq.push_back(t * o.seqs / tokens);
      end.push_back(o.ends[static_cast<size_t>(t)]);
      max_end = std::max(max_end, end.back());
    }
    columns = max_end / o.rows_per_block + 1;
    view.block_stride_bytes = page_bytes(o.format, o.rows_per_block, o.dim) + 192;
    view.num_blocks = columns * o.seqs + 2;
    view.rows_per_block = o.rows_per_block;
    view.format = o.format;
    view.row_elems = o.dim;
    bytes.assign(static_cast<size_t>(view.block_stride_bytes * view.num_blocks), std::byte{0xff});
    view.base = bytes.data();
    table.resize(static_cast<size_t>(view.num_blocks));
    std::iota(table.begin(), table.end(), 0);
    std::shuffle(table.begin(), table.end(), random);
    for (int seq = 0; seq < o.seqs; ++seq) {
      int used = 0;
      for (int t = 0; t < tokens; ++t) {
        if (token_to_seq[static_cast<size_t>(t)] == seq) {
          used = std::max(used, end[static_cast<size_t>(t)]);
        }
      }
      for (int j = 0; j < used; ++j) {
        std::vector<float> values(static_cast<size_t>(o.dim));
        for (float& v : values) v = uniform(random, o.magnitude);
        encode_row(view, slot(seq, j), values.data());
      }
    }
    const bool wide = o.format == KvFormat::kIndexF32;
    for (int i = 0; i < tokens * o.heads * o.dim; ++i) {
      // Values as index_query leaves them: E4M3, E2M1 times a power of two, or f32.
      float v = uniform(random, o.magnitude);
      if (o.format == KvFormat::kIndexFp8) v = e4m3_to_f32(f32_to_e4m3(v * 400));
      if (o.format == KvFormat::kIndexMxfp4) v = e2m1_to_f32(f32_to_e2m1(v * 6)) * 0x1p-5f;
      q.push_back(v);
      if (!wide) q_bf16.push_back(f32_to_bf16(v));
    }
    for (int i = 0; i < tokens * o.heads; ++i) weights.push_back(uniform(random, 0.1f));
  }
  int64_t slot(int seq, int64_t j) const {
    const int64_t rows = view.rows_per_block;
    return table[static_cast<size_t>(seq * columns + j / rows)] * rows + j % rows;
  }
  IndexLogitsParams params() const {
    const auto t = static_cast<int64_t>(end.size());
    const int64_t h = options.heads, d = options.dim;
    IndexLogitsParams p{};
    p.q = options.format == KvFormat::kIndexF32
              ? ConstTensor(q.data(), DType::kF32, {t, h, d})
              : ConstTensor(q_bf16.data(), DType::kBf16, {t, h, d});
    p.weights = ConstTensor(weights.data(), DType::kF32, {t, h});
    p.token_to_seq = token_to_seq.data();
    p.end = end.data();
    p.max_end = max_end;
    p.blocks = {table.data(), columns, columns, view.rows_per_block * 4};
    p.cache = view;
    return p;
  }
};

constexpr float kUntouched = 12345.0f;

// Logits [tokens][max_end + 5]; what lies past end[t] must stay untouched.
inline std::vector<float> run(const Candidate& candidate, IndexLogitsParams params, int threads) {
  Ops ops;
  candidate.install(ops);
  ThreadPool pool(threads);
  ScratchLimits limits;
  limits.max_tokens = params.q.shape[0];
  limits.index_heads = static_cast<int>(params.q.shape[1]);
  limits.index_dim = static_cast<int>(params.q.shape[2]);
  limits.index_topk = params.best;
  limits.num_threads = threads;
  const int64_t scratch_bytes = index_logits_scratch_bytes(limits);
  std::vector<std::byte> scratch(static_cast<size_t>(scratch_bytes + Arena::kAlignment),
                                 std::byte{0xff});
  void* base = scratch.data();
  size_t space = scratch.size();
  std::align(Arena::kAlignment, 1, base, space);
  Arena arena(static_cast<std::byte*>(base), scratch_bytes);
  const int64_t tokens = params.q.shape[0], width = params.max_end + 5;
  std::vector<float> logits(static_cast<size_t>(tokens * width) + 2, kUntouched);
  params.logits = Tensor(logits.data() + 1, DType::kF32, {tokens, width});
  ops.index_logits(params, OpContext{Stream{threads == 1 ? nullptr : &pool}, &arena, &ops});
  EXPECT_EQ(arena.used(), 0);
  EXPECT_EQ(logits.front(), kUntouched);
  EXPECT_EQ(logits.back(), kUntouched);
  logits.erase(logits.begin());
  logits.pop_back();
  for (int64_t t = 0; t < tokens; ++t) {
    for (int64_t j = params.end[t]; j < width; ++j) {
      EXPECT_EQ(logits[static_cast<size_t>(t * width + j)], kUntouched)
          << candidate.name << " wrote past the end: token " << t << " entry " << j;
    }
  }
  return logits;
}

}  // namespace dsv4::cpu
