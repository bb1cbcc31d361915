// moe: the bits of a token depend on its own input and experts only: not on the other tokens, and
// so not on the kernels that their number chooses.
#include <span>

#include "tests/ops/oracle_testing.h"
#include "tests/ops/stored_weight.h"

namespace dsv4::testing {
namespace {

constexpr int64_t kHidden = 256;
constexpr int kExperts = 6, kTopK = 3;
// Of the largest call, and parts of it: all kernels that a number of tokens may choose.
struct Part {
  int64_t begin, count;
};
const std::vector<Part> kParts{{0, 400}, {0, 1},    {399, 1},  {7, 2},  {9, 16},
                               {30, 17}, {100, 33}, {11, 100}, {1, 260}};
const std::vector<Part> kEmulatedParts{{0, 140}, {139, 1}, {9, 16}, {30, 40}};

class MoeInvariance : public CandidateTest {
 protected:
  ExpertWeights make_expert(DType dtype, uint64_t seed) {
    return {make_weight(memory(), dtype, inter(), kHidden, seed).weight,
            make_weight(memory(), dtype, inter(), kHidden, seed + 1).weight,
            make_weight(memory(), dtype, kHidden, inter(), seed + 2).weight};
  }
  int64_t inter() const { return emulated() ? 160 : 640; }
};

TEST_P(MoeInvariance, TokensAloneAndTogether) {
  Random random(3);
  const std::vector<Part>& parts = emulated() ? kEmulatedParts : kParts;
  const int64_t tokens = parts[0].count;
  std::vector<ExpertWeights> experts;
  for (uint64_t e = 0; e < kExperts; ++e)
    experts.push_back(make_expert(DType::kF4E2M1, 100 + 3 * e));
  const Tensor x =
      memory().tensor(DType::kBf16, {tokens, kHidden},
                      rounded(DType::kBf16, normal_values(random, tokens * kHidden, 1.0)));
  std::vector<int32_t> ids;
  Vector weights;
  for (int64_t t = 0; t < tokens; ++t) {
    std::vector<int32_t> order = random.permutation(kExperts);
    order.resize(kTopK);
    std::sort(order.begin(), order.end());
    ids.insert(ids.end(), order.begin(), order.end());
    for (int k = 0; k < kTopK; ++k) weights.push_back(0.1 + 0.5 * (random.uniform() + 1));
  }
  const ConstTensor device_ids(memory().put(ids), DType::kI32, {tokens, kTopK});
  const Tensor device_weights =
      memory().tensor(DType::kF32, {tokens, kTopK}, rounded(DType::kF32, weights));
  for (const ExpertWeights& shared : {ExpertWeights{}, make_expert(DType::kF8E4M3, 900)}) {
    const auto compute = [&](int64_t begin, int64_t count) {
      const Tensor out = memory().tensor(DType::kBf16, {count, kHidden});
      ScratchLimits limits;
      limits.max_tokens = count;
      limits.max_cols = limits.max_rows = std::max(inter(), kHidden);
      limits.hidden_size = kHidden;
      limits.moe_intermediate = inter();
      limits.num_experts = kExperts;
      limits.experts_per_token = kTopK;
      run(ops_.moe,
          {.x = x.rows(begin, count),
           .expert_ids = device_ids.rows(begin, count),
           .expert_weights = device_weights.rows(begin, count),
           .experts = experts,
           .shared = shared,
           .swiglu_limit = 4.0f,
           .quantise_input = true,
           .out = out},
          limits);
      return memory().get(out.as<uint16_t>(), out.num_elements());
    };
    const std::vector<uint16_t> all = compute(0, tokens);
    for (const Part& part : std::span(parts).subspan(1)) {
      const std::vector<uint16_t> some = compute(part.begin, part.count);
      for (int64_t i = 0; i < part.count * kHidden; ++i) {
        ASSERT_EQ(some[static_cast<size_t>(i)], all[static_cast<size_t>(part.begin * kHidden + i)])
            << "token " << part.begin + i / kHidden << ", element " << i % kHidden << ", "
            << part.count << " tokens" << (shared.w1 ? ", shared" : "");
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Candidates, MoeInvariance, ::testing::ValuesIn(op_candidates("moe")),
                         candidate_name);

}  // namespace
}  // namespace dsv4::testing
