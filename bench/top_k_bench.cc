// Exact top-k on the CPU: one long row, and many rows of a prefill tile.
//
//   top_k_bench [--threads N] [--filter TEXT] [--seconds S] [--clock wall|cpu]
//
// GB/s counts the scores once (4 bytes each); the GFLOP/s column is scores per second (1e9).
#include "bench/cpu_bench.h"

#include <random>

namespace dsv4::cpu::bench {
namespace {

struct Shape {
  const char* name;
  int tokens, n, k;
  bool ties;
};
constexpr Shape kShapes[] = {
    {"1M context", 1, 262144, 512, false},
    {"1M context, k 2048", 1, 262144, 2048, false},
    {"1M context, all equal", 1, 262144, 512, true},
    {"64k context", 1, 16384, 512, false},
    {"4k context", 1, 1024, 512, false},
    {"tile, 64k context", 64, 16384, 512, false},
};

void run(const Shape& shape, const Options& options, Machine& machine) {
  std::mt19937 random(7);
  std::normal_distribution<float> normal;
  const int64_t tokens = shape.tokens, n = shape.n;
  auto* logits = reinterpret_cast<float*>(zeroed_bytes(tokens * n * 4));
  for (int64_t i = 0; i < tokens * n; ++i) logits[i] = shape.ties ? 1.0f : normal(random);
  std::vector<int32_t> end(static_cast<size_t>(tokens), shape.n), length(end);
  std::vector<int32_t> indices(static_cast<size_t>(tokens * shape.k));
  TopKParams params{};
  params.logits = ConstTensor(logits, DType::kF32, {tokens, n});
  params.end = end.data();
  params.topk_indices = Tensor(indices.data(), DType::kI32, {tokens, shape.k});
  params.topk_length = length.data();
  ScratchLimits limits;
  limits.max_entries = n;
  limits.num_threads = options.threads;
  Arena arena = make_arena(top_k_scratch_bytes(limits));
  const OpContext context{machine.stream(), &arena, nullptr};
  const Measured measured = machine.measure([&] { top_k(params, context); });
  const auto scores = static_cast<double>(tokens * n);
  print(concat(shape.name, ", T ", tokens), "portable", measured, scores, scores * 4);
}

}  // namespace
}  // namespace dsv4::cpu::bench

int main(int argc, char** argv) {
  using namespace dsv4::cpu;
  const bench::Options options = bench::parse(argc, argv);
  bench::Machine machine(options);
  for (const auto& shape : bench::kShapes) {
    if (std::string(shape.name).find(options.filter) == std::string::npos) continue;
    bench::run(shape, options, machine);
  }
}
