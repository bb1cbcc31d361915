// The scalar candidate of the indexer scores: one loop per sum, in the order of index_logits.h.
#include <array>
#include <cstring>
#include <vector>

#include "backends/cpu/ops/attend_arith.h"
#include "backends/cpu/ops/attend_reference.h"
#include "backends/cpu/ops/index_logits.h"
#include "backends/cpu/parallel.h"
#include "core/fail.h"

namespace dsv4::cpu {
namespace {

float load(const ConstTensor& tensor, int64_t i) {
  return tensor.dtype == DType::kBf16 ? bf16_to_f32(tensor.as<uint16_t>()[i])
                                      : tensor.as<float>()[i];
}

float tree_sum(std::array<float, kIndexLanes> lanes) {
  for (int half = kIndexLanes / 2; half >= 1; half /= 2) {
    for (int l = 0; l < half; ++l) lanes[l] = add_flushed(lanes[l], lanes[l + half]);
  }
  return lanes[0];
}

// A key without its scale, and the scale.
float load_key(RowRef row, KvFormat format, int dim, float* key) {
  if (format != KvFormat::kIndexFp8) {
    decode_row_flushed(row, format, dim, key);
    return 1.0f;
  }
  for (int d = 0; d < dim; ++d) key[d] = e4m3_to_f32(static_cast<uint8_t>(row.values[d]));
  float scale;
  std::memcpy(&scale, row.scales, sizeof(scale));
  return scale;
}

void score_token(const IndexLogitsParams& params, int64_t token, float* key) {
  const int heads = static_cast<int>(params.q.shape[1]), dim = static_cast<int>(params.q.shape[2]);
  const KvFormat format = params.cache.format;
  float* logits = params.logits.as<float>() + token * params.logits.strides[0];
  for (int64_t j = 0; j < params.end[token]; ++j) {
    const float scale =
        load_key(index_row(params, params.token_to_seq[token], j), format, dim, key);
    std::array<float, kIndexLanes> lanes{};
    for (int h = 0; h < static_cast<int>(round_up(heads, kIndexLanes)); ++h) {
      float dot = 0.0f, weight = 0.0f;
      if (h < heads) {
        const int64_t at = token * params.q.strides[0] + h * params.q.strides[1];
        for (int d = 0; d < dim; d += 2) {
          dot =
              dot_pair(dot, load(params.q, at + d), load(params.q, at + d + 1), key[d], key[d + 1]);
        }
        weight = load(params.weights, token * params.weights.strides[0] + h);
      }
      float& lane = lanes[static_cast<size_t>(h % kIndexLanes)];
      lane = fma_flushed(weight, max_lane(0.0f, dot), lane);
    }
    const float sum = tree_sum(lanes);
    logits[j] = format == KvFormat::kIndexFp8 ? mul_flushed(sum, scale) : sum;
  }
}

}  // namespace

void index_logits_reference(const IndexLogitsParams& params, const OpContext& context) {
  const int64_t dim = params.q.shape[2];
  DSV4_CHECK(dim % 2 == 0);
  const int threads = num_threads(context.stream);
  Arena::Scope scope(*context.scratch);
  float* keys = context.scratch->take_array<float>(dim * threads);
  if (context.scratch->measuring()) return;
  parallel_chunks(context.stream, params.q.shape[0], 1,
                  [&](int64_t token, int64_t, int thread_idx) {
                    score_token(params, token, keys + (threads == 1 ? 0 : thread_idx) * dim);
                  });
}

}  // namespace dsv4::cpu
