// Indexer scores on the CPU: one token against a long context, and prefill tiles.
//
//   index_logits_bench [--threads N] [--candidate NAME] [--filter TEXT] [--seconds S]
//                      [--clock wall|cpu]
//
// FLOP: 2 x heads x keys x dim per token.
#include "bench/cpu_bench.h"

#include <random>

#include "cache/kv_format.h"
#include "core/numbers.h"

namespace dsv4::cpu::bench {
namespace {

struct Shape {
  const char* name;
  KvFormat format;
  int tokens;
  int keys;      // of the first token; later ones see (their number / 4) more
  int best = 0;  // how many scores of a token matter; 0: all
};

// 64 heads x 128 dims, one key per 4 tokens.
constexpr Shape kShapes[] = {
    {"decode 1M context", KvFormat::kIndexFp8, 1, 262144},
    {"decode 1M context, best 512", KvFormat::kIndexFp8, 1, 262144, 512},
    {"decode 512k context, best 512", KvFormat::kIndexFp8, 1, 131072, 512},
    {"decode 1M context", KvFormat::kIndexMxfp4, 1, 262144},
    {"decode 1M context", KvFormat::kIndexF32, 1, 262144},
    {"decode 64k context", KvFormat::kIndexFp8, 1, 16384},
    {"decode 64k context, best 512", KvFormat::kIndexFp8, 1, 16384, 512},
    {"decode 4k context", KvFormat::kIndexFp8, 1, 1024},
    {"prefill 64k context", KvFormat::kIndexFp8, 64, 16384},
    {"prefill 64k context, best 512", KvFormat::kIndexFp8, 64, 16384, 512},
    {"prefill 1M context, best 512", KvFormat::kIndexFp8, 64, 262144, 512},
    {"prefill 64k context", KvFormat::kIndexMxfp4, 64, 16384},
    {"prefill from 0", KvFormat::kIndexFp8, 2048, 0},
};

void run(const Shape& shape, const Candidate& candidate, const Options& options, Machine& machine) {
  constexpr int kHeads = 64, kDim = 128, kRows = 64;
  std::mt19937 random(7);
  const int64_t tokens = shape.tokens;
  std::vector<int32_t> seq(static_cast<size_t>(tokens), 0), end;
  double pairs = 0;
  for (int64_t t = 0; t < tokens; ++t) {
    end.push_back(static_cast<int32_t>(shape.keys + (t + 1) / 4));
    pairs += end.back();
  }
  CacheView cache;
  cache.format = shape.format;
  cache.rows_per_block = kRows;
  cache.row_elems = kDim;
  cache.num_blocks = end.back() / kRows + 1;
  cache.block_stride_bytes = upstream_page_bytes(shape.format, kRows, kDim);
  cache.base = zeroed_bytes(cache.block_stride_bytes * cache.num_blocks);
  std::uniform_real_distribution<float> uniform(-1, 1);
  std::vector<float> values(kDim);
  for (int64_t slot = 0; slot < int64_t{cache.num_blocks} * kRows; ++slot) {
    for (float& v : values) v = uniform(random);
    encode_row(cache, slot, values.data());
  }
  std::vector<int32_t> table(static_cast<size_t>(cache.num_blocks));
  for (size_t i = 0; i < table.size(); ++i) table[i] = static_cast<int32_t>(i);
  std::shuffle(table.begin(), table.end(), random);

  const bool exact = shape.format == KvFormat::kIndexF32;
  const DType act = exact ? DType::kF32 : DType::kBf16;
  std::byte* q = zeroed_bytes(tokens * kHeads * kDim * size_of(act));
  for (int64_t i = 0; i < tokens * kHeads * kDim; ++i) {
    float v = e4m3_to_f32(f32_to_e4m3(448 * uniform(random)));
    if (shape.format == KvFormat::kIndexMxfp4) v = e2m1_to_f32(f32_to_e2m1(6 * uniform(random)));
    if (exact) {
      reinterpret_cast<float*>(q)[i] = v;
    } else {
      reinterpret_cast<uint16_t*>(q)[i] = f32_to_bf16(v);
    }
  }
  std::vector<float> weights(static_cast<size_t>(tokens * kHeads));
  for (float& w : weights) w = uniform(random);
  const int64_t width = end.back();
  std::byte* logits = zeroed_bytes(std::max<int64_t>(1, tokens * width) * 4);

  IndexLogitsParams params{};
  params.q = ConstTensor(q, act, {tokens, kHeads, kDim});
  params.weights = ConstTensor(weights.data(), DType::kF32, {tokens, kHeads});
  params.token_to_seq = seq.data();
  params.end = end.data();
  params.max_end = end.back();
  params.blocks = {table.data(), cache.num_blocks, cache.num_blocks, 4 * kRows};
  params.cache = cache;
  params.logits = Tensor(logits, DType::kF32, {tokens, width});
  params.best = shape.best;
  ScratchLimits limits;
  limits.max_tokens = tokens;
  limits.index_heads = kHeads;
  limits.index_dim = kDim;
  limits.index_topk = shape.best;
  limits.num_threads = options.threads;
  Arena arena = make_arena(index_logits_scratch_bytes(limits));
  Ops ops;
  candidate.install(ops);
  const OpContext context{machine.stream(), &arena, &ops};
  const Measured measured = machine.measure([&] { ops.index_logits(params, context); });
  const double bytes = static_cast<double>(end.back()) *
                           static_cast<double>(row_layout(shape.format, kDim).row_bytes()) +
                       pairs * 4;
  print(concat(shape.name, ", ", kv_format_name(shape.format), ", T ", tokens), candidate.name,
        measured, 2.0 * kHeads * kDim * pairs, bytes);
}

}  // namespace
}  // namespace dsv4::cpu::bench

int main(int argc, char** argv) {
  using namespace dsv4::cpu;
  const bench::Options options = bench::parse(argc, argv);
  bench::Machine machine(options);
  for (const auto& shape : bench::kShapes) {
    if (std::string(shape.name).find(options.filter) == std::string::npos) continue;
    for (const Candidate& candidate : index_logits_candidates()) {
      const bool chosen = options.candidate.empty() ? candidate.name != "reference"
                                                    : candidate.name == options.candidate;
      if (chosen && candidate.why_not().empty()) bench::run(shape, candidate, options, machine);
    }
  }
}
