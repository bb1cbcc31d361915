// Row-wise operations of a CSA layer of V4-Flash (hidden 4096, 64 heads, 4 streams) on the CPU, one
// token and a prefill step.
//
//   rowwise_bench [--threads N] [--candidate NAME] [--filter TEXT] [--seconds S] [--clock wall|cpu]
//
// GB/s counts every operand and result once. "moe" runs with a linear operation that does nothing:
// what is left is gathering, SwiGLU and the sums.
#include <functional>
#include <random>

#include "bench/cpu_bench.h"
#include "core/numbers.h"

namespace dsv4::cpu::bench {
namespace {

constexpr int64_t kHidden = 4096, kStreams = 4, kHeads = 64, kHeadDim = 512, kIndexDim = 128;
constexpr int64_t kExperts = 256, kTop = 6, kInter = 2048;
constexpr int32_t kRopeDim = 64, kRatio = 4, kFirstPosition = 32768;

Tensor random_tensor(DType dtype, std::initializer_list<int64_t> shape) {
  Tensor out(nullptr, dtype, shape);
  out.data = zeroed_bytes(out.num_bytes());
  std::minstd_rand generator(1);
  for (int64_t i = 0; i < out.num_elements(); ++i) {
    const float value = static_cast<float>(generator() % 2000) * 1e-3f - 1.0f;
    if (dtype == DType::kBf16) {
      out.as<uint16_t>()[i] = f32_to_bf16(value);
    } else {
      out.as<float>()[i] = value;
    }
  }
  return out;
}

CacheView cache_of(KvFormat format, int64_t rows, int64_t row_elems) {
  const int64_t bytes = page_bytes(format, rows, static_cast<int>(row_elems));
  return {zeroed_bytes(bytes),        bytes,  1,
          static_cast<int32_t>(rows), format, static_cast<int32_t>(row_elems)};
}

// One sequence whose step starts in the middle; all arrays of a plan that the operations read.
struct Step {
  std::vector<int32_t> positions, token_to_seq, query_start, context_len, state_slot, ids;
  std::vector<int64_t> window_slots, ratio_slots;
  std::vector<float> frequencies;
  PlanView plan;
  RatioPlan ratio;

  explicit Step(int32_t tokens)
      : query_start{0, tokens}, context_len{kFirstPosition + kRatio - 1}, state_slot{0} {
    for (int32_t t = 0; t < tokens; ++t) {
      positions.push_back(kFirstPosition + kRatio - 1 + t);  // the first token completes an entry
      token_to_seq.push_back(0);
      ids.push_back(t % 1000);
      window_slots.push_back(t);
      ratio_slots.push_back(t % kRatio == 0 ? t / kRatio : -1);
    }
    for (int i = 0; i < kRopeDim / 2; ++i)
      frequencies.push_back(static_cast<float>(std::pow(160000.0, -2.0 * i / kRopeDim)));
    plan.num_tokens = tokens;
    plan.num_seqs = 1;
    plan.query_start = query_start.data();
    plan.context_len = context_len.data();
    plan.state_slot = state_slot.data();
    plan.positions = positions.data();
    plan.token_to_seq = token_to_seq.data();
    ratio.ratio = kRatio;
    ratio.slot_mapping = ratio_slots.data();
  }
  RopeView rope() const { return {frequencies.data(), kRopeDim}; }
};

void no_linear(const LinearParams&, const OpContext&) {}

class Suite {
 public:
  Suite(const Options& options, Machine& machine, const Candidate& candidate)
      : options_(options),
        machine_(machine),
        candidate_(candidate),
        arena_(make_arena(int64_t{256} << 20)) {
    candidate.install(ops_);
    ops_.moe = moe;
    ops_.linear = no_linear;
  }

  void run(int32_t tokens) {
    tokens_ = tokens;
    const Step step(tokens);
    norms(step);
    indexer(step);
    compressors(step);
    streams(step);
    experts();
  }

 private:
  template <typename Params>
  void measure(const char* what, Op<Params> op, const Params& params, double bytes) {
    const std::string name = concat(what, ", T ", tokens_);
    if (name.find(options_.filter) == std::string::npos) return;
    const OpContext context{machine_.stream(), &arena_, &ops_};
    print(name, candidate_.name, machine_.measure([&] { op(params, context); }), 0, bytes);
  }

  void norms(const Step& step) {
    const int64_t t = tokens_;
    const Tensor x = random_tensor(DType::kBf16, {t, kHidden});
    const Tensor w = random_tensor(DType::kBf16, {kHidden});
    const Tensor normed = random_tensor(DType::kBf16, {t, kHidden});
    measure("rms_norm", ops_.rms_norm, RmsNormParams{x, w, 1e-6f, normed}, 4.0 * t * kHidden);
    const Tensor q = random_tensor(DType::kBf16, {t, kHeads, kHeadDim});
    const Tensor out = random_tensor(DType::kBf16, {t, kHeads, kHeadDim});
    const Tensor kv = random_tensor(DType::kBf16, {t, kHeadDim});
    const double q_bytes = 4.0 * t * kHeads * kHeadDim;
    measure(
        "qnorm_rope_insert", ops_.qnorm_rope_insert,
        QnormRopeInsertParams{q, kv, step.rope(), 1e-6f, step.positions.data(),
                              step.window_slots.data(), cache_of(KvFormat::kFp8DsMla, t, kHeadDim)},
        q_bytes + 4.0 * t * kHeadDim);
    measure("inverse_rope fp8", ops_.inverse_rope,
            InverseRopeParams{q, step.rope(), step.positions.data(), true, out}, q_bytes);
    measure("inverse_rope bf16", ops_.inverse_rope,
            InverseRopeParams{q, step.rope(), step.positions.data(), false, out}, q_bytes);
  }

  void indexer(const Step& step) {
    const int64_t t = tokens_;
    const Tensor q = random_tensor(DType::kBf16, {t, kHeads, kIndexDim});
    const Tensor out = random_tensor(DType::kBf16, {t, kHeads, kIndexDim});
    const Tensor weights = random_tensor(DType::kBf16, {t, kHeads});
    const Tensor folded = random_tensor(DType::kF32, {t, kHeads});
    const auto query = [&](const char* what, KvFormat format, bool hadamard) {
      measure(what, ops_.index_query,
              IndexQueryParams{q, weights, step.rope(), step.positions.data(), format, hadamard,
                               out, folded},
              4.0 * t * kHeads * kIndexDim);
    };
    query("index_query fp8", KvFormat::kIndexFp8, false);
    query("index_query mxfp4, Hadamard", KvFormat::kIndexMxfp4, true);
  }

  void compressors(const Step& step) {
    const auto compress = [&](const char* what, int64_t width, KvFormat format) {
      const int64_t t = tokens_, half = 2 * width, ring = 2 * kRatio;
      const Tensor state = random_tensor(DType::kF32, {ring, 2 * half});
      CompressParams params{};
      params.plan = &step.plan;
      params.ratio = &step.ratio;
      params.overlap = true;
      params.gates = random_tensor(DType::kF32, {t, 2 * half});
      params.ape = random_tensor(DType::kF32, {kRatio, half});
      params.norm = random_tensor(DType::kBf16, {width});
      params.eps = 1e-6f;
      params.rope = step.rope();
      params.activation = DType::kBf16;
      params.state = {state.as<float>(), ring * 2 * half, 1, static_cast<int32_t>(ring),
                      static_cast<int32_t>(2 * half)};
      params.cache = cache_of(format, t / kRatio + 1, width);
      measure(what, ops_.compress, params, 8.0 * t * half);
    };
    compress("compress, CSA entry", kHeadDim, KvFormat::kFp8DsMla);
    compress("compress, indexer key", kIndexDim, KvFormat::kIndexFp8);
  }

  void streams(const Step& step) {
    const int64_t t = tokens_, rows = (2 + kStreams) * kStreams;
    const Tensor h = random_tensor(DType::kBf16, {t, kStreams, kHidden});
    const Tensor fn = random_tensor(DType::kF32, {rows, kStreams * kHidden});
    const Tensor base = random_tensor(DType::kF32, {rows}), scale = random_tensor(DType::kF32, {3});
    const Tensor y = random_tensor(DType::kBf16, {t, kHidden});
    const Tensor post = random_tensor(DType::kF32, {t, kStreams});
    const Tensor comb = random_tensor(DType::kF32, {t, kStreams, kStreams});
    const double stream_bytes = 2.0 * t * kStreams * kHidden, row_bytes = 2.0 * t * kHidden;
    measure("hc_pre", ops_.hc_pre,
            HcPreParams{h, {fn, base, scale}, 1e-6f, 1e-6f, 20, y, post, comb},
            stream_bytes + row_bytes + static_cast<double>(fn.num_bytes()));
    measure("hc_post", ops_.hc_post, HcPostParams{y, post, comb, h}, 2 * stream_bytes + row_bytes);
    const Tensor table = random_tensor(DType::kBf16, {1000, kHidden});
    measure("embed", ops_.embed, EmbedParams{step.ids.data(), table, h}, stream_bytes + row_bytes);
  }

  void experts() {
    const int64_t t = tokens_;
    std::minstd_rand generator(3);
    const Tensor weights = random_tensor(DType::kF32, {t, kTop});
    const Tensor ids = random_tensor(DType::kI32, {t, kTop});
    RouteParams route{};
    route.logits = random_tensor(DType::kF32, {t, kExperts});
    route.bias = random_tensor(DType::kF32, {kExperts});
    for (int64_t i = 0; i < t * kExperts; ++i) {
      const_cast<float*>(route.logits.as<float>())[i] =
          static_cast<float>(generator() % 8000) * 1e-3f - 4.0f;
    }
    route.scaling = 1.5f;
    route.expert_ids = ids;
    route.expert_weights = weights;
    measure("route", ops_.route, route, 4.0 * t * kExperts);
    ops_.route(route, {machine_.stream(), &arena_, &ops_});

    const Tensor x = random_tensor(DType::kBf16, {t, kHidden});
    const Tensor out = random_tensor(DType::kBf16, {t, kHidden});
    ExpertWeights expert;  // shapes only: no_linear reads nothing
    expert.w1 = {DType::kBf16, x.data, kInter, kHidden, kHidden};
    expert.w3 = expert.w1;
    expert.w2 = {DType::kBf16, x.data, kHidden, kInter, kInter};
    const std::vector<ExpertWeights> all(static_cast<size_t>(kExperts), expert);
    // Per visit: g, u and y in f32 read, a written, the sum read and written.
    measure("moe without linear", ops_.moe,
            MoeParams{x, ids, weights, all, expert, 10.0f, true, out},
            static_cast<double>(t * (kTop + 1)) * (10.0 * kInter + 12.0 * kHidden));
  }

  const Options& options_;
  Machine& machine_;
  const Candidate& candidate_;
  Arena arena_;
  Ops ops_;
  int32_t tokens_ = 0;
};

}  // namespace
}  // namespace dsv4::cpu::bench

int main(int argc, char** argv) {
  using namespace dsv4::cpu;
  const bench::Options options = bench::parse(argc, argv);
  bench::Machine machine(options);
  for (const Candidate& candidate : rowwise_candidates()) {
    if (!candidate.why_not().empty()) continue;
    if (!options.candidate.empty() && options.candidate != candidate.name) continue;
    bench::Suite suite(options, machine, candidate);
    for (int32_t tokens : {1, 2048}) suite.run(tokens);
  }
  return 0;
}
