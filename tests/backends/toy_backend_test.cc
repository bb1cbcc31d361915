// Adding a backend touches no shared file but the registry: this one overrides the three virtuals
// only, attends by plain loops over decoded cache rows, and runs the small model.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <vector>

#include "attention/layer.h"
#include "attention/stages.h"
#include "cache/kv_format.h"
#include "core/numbers.h"
#include "dsv4/backend.h"
#include "dsv4/engine.h"
#include "dsv4/tokenizer.h"

namespace dsv4 {
namespace {

// Pads to multiples of 8 heads, so that padding is exercised as well.
int padded_to_eight(int num_heads) {
  return (num_heads + 7) / 8 * 8;
}

const AttentionDescriptor& toy_descriptor() {
  static const AttentionDescriptor descriptor = [] {
    AttentionDescriptor out;
    out.name = "TOY_DSV4";
    out.class_name = "ToyAttention";
    out.platform = Platform::kCpu;
    out.kv_formats = {KvFormat::kFp8DsMla, KvFormat::kBf16};
    out.index_formats = {KvFormat::kIndexFp8};
    out.activations = {DType::kBf16};
    out.wo_a_forms = {WoA::kFp8};
    out.padded_num_q_heads = padded_to_eight;
    out.architectures = {"cpu"};
    return out;
  }();
  return descriptor;
}

class ToyAttention final : public DeepseekV4Attention {
 public:
  explicit ToyAttention(const AttentionArgs& args) : DeepseekV4Attention(args) {}
  const AttentionDescriptor& descriptor() const override { return toy_descriptor(); }

 protected:
  int padded_num_q_heads(int num_heads) const override { return padded_to_eight(num_heads); }

  void forward_mqa(Step& step) const override {
    const PlanView& plan = *step.plan;
    const int heads = static_cast<int>(step.q.shape[1]), dim = static_cast<int>(step.q.shape[2]);
    const auto* sink = reinterpret_cast<const float*>(layer().sink.data());
    for (int64_t t = 0; t < step.num_tokens(); ++t) {
      const int seq = plan.token_to_seq[t];
      std::vector<std::vector<float>> rows;
      const auto add = [&](const CacheView& cache, int64_t slot) {
        decode_row(cache, slot, rows.emplace_back(static_cast<size_t>(dim)).data());
      };
      const auto slot_of = [&](const BlockTable& blocks, int32_t rows_per_block, int64_t row) {
        const int64_t block = row / rows_per_block;
        return int64_t{blocks.table[seq * blocks.stride + block % blocks.columns]} *
                   rows_per_block +
               row % rows_per_block;
      };
      for (int64_t p = plan.window_begin[t]; p < plan.window_end[t]; ++p) {
        add(step.caches->window,
            slot_of(plan.window_blocks, step.caches->window.rows_per_block, p));
      }
      if (step.ratio != nullptr) {
        const CacheView& cache = step.caches->compressed;
        if (layer().kind.indexer && !step.all_entries_visible) {
          const int32_t* slots = step.topk_slots.as<int32_t>() + t * step.topk_slots.strides[0];
          for (int32_t i = 0; i < step.topk_length[t]; ++i) add(cache, slots[i]);
        } else {
          for (int32_t j = 0; j < step.ratio->end[t]; ++j)
            add(cache, slot_of(plan.growing_blocks, cache.rows_per_block, j));
        }
      }
      for (int h = 0; h < heads; ++h) {
        const Bf16* q = step.q.as<Bf16>() + (t * heads + h) * dim;
        std::vector<double> scores;
        double largest = -std::numeric_limits<double>::infinity();
        for (const auto& row : rows) {
          double score = 0;
          for (int d = 0; d < dim; ++d)
            score += static_cast<double>(q[d]) * row[static_cast<size_t>(d)];
          scores.push_back(score * layer().config.softmax_scale());
          largest = std::max(largest, scores.back());
        }
        double sum = std::exp(sink[h] - largest);
        std::vector<double> out(static_cast<size_t>(dim));
        for (size_t r = 0; r < rows.size(); ++r) {
          const double p = std::exp(scores[r] - largest);
          sum += p;
          for (int d = 0; d < dim; ++d)
            out[static_cast<size_t>(d)] += p * rows[r][static_cast<size_t>(d)];
        }
        for (int d = 0; d < dim; ++d) {
          step.o.as<Bf16>()[(t * heads + h) * dim + d] =
              Bf16(static_cast<float>(out[static_cast<size_t>(d)] / sum));
        }
      }
    }
  }

  void o_proj(Step& step, Tensor out) const override {
    project_out(step, layer(), ops(), layer().weights.wo_a, out);
  }
};

std::unique_ptr<DeepseekV4Attention> create_toy(const AttentionArgs& args) {
  return std::make_unique<ToyAttention>(args);
}

std::vector<int32_t> greedy(const std::string& backend, int tokens) {
  EngineOptions options;
  options.attention_backend = backend;
  options.limits = {64, 1, 400};
  const auto engine = Engine::load(
      ModelSource::parse(std::string(DSV4_SOURCE_DIR) + "/models/tiny-shakespeare"), options);
  // A prompt long enough for the indexer to select (from position 259 on), of memorised text.
  std::vector<int32_t> prompt{0};
  const std::string opening = "MENENIUS:\n";
  for (int32_t id : engine->tokenizer()->encode(opening)) prompt.push_back(id);
  GenerateOptions generate_options;
  generate_options.max_new_tokens = tokens;
  generate_options.stop_at_eos = false;
  return generate(*engine, prompt, generate_options).tokens;
}

TEST(ToyBackend, RunsTheSmallModel) {
  register_backend({&toy_descriptor(), [] { return std::string(); }, create_toy});
  const std::vector<int32_t> toy = greedy("TOY_DSV4", 40), cpu = greedy("CPU_DSV4", 40);
  ASSERT_EQ(toy.size(), 40u);
  // The text is memorised with wide margins: double precision in attention does not change a greedy
  // token of it.
  EXPECT_EQ(toy, cpu);
}

TEST(ToyBackend, IsRefusedWhereItsDescriptorSaysSo) {
  const ModelConfig config =
      ModelConfig::load(std::string(DSV4_SOURCE_DIR) + "/models/tiny-shakespeare");
  const AttentionSelection selection =
      select_attention(config, target_of({Platform::kCpu, 0}),
                       {.backend = "TOY_DSV4", .kv_cache_dtype = "auto", .numerics = kExact});
  EXPECT_EQ(selection.descriptor, nullptr);
  EXPECT_NE(selection.message().find("TOY_DSV4"), std::string::npos);
}

}  // namespace
}  // namespace dsv4
