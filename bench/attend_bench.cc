// Attention on the CPU: decode over random rows, long HCA ranges, prefill chunks.
//
//   attend_bench [--threads N] [--candidate NAME] [--filter TEXT] [--seconds S] [--clock wall|cpu]
//
// FLOP counts unmasked rows only: 4 x heads x rows x head_dim.
#include "bench/cpu_bench.h"

#include <cmath>
#include <random>

#include "cache/kv_format.h"
#include "core/numbers.h"

namespace dsv4::cpu::bench {
namespace {

struct Shape {
  const char* name;
  KvFormat format;
  int heads;
  int tokens;
  int position;  // of the first token
  int selected;  // CSA: rows of the list; 0: none
  int ratio;     // HCA: entries are position / ratio; 0: none
};

// DeepSeek-V4-Flash has 64 heads and top-512, Pro 128 heads and top-1024; 4 to 16 heads are what
// one rank of a tensor-parallel group holds.
constexpr KvFormat kPacked = KvFormat::kFp8DsMla;
constexpr Shape kShapes[] = {
    {"decode CSA 128+512", kPacked, 64, 1, 100000, 512, 0},
    {"decode CSA 128+512", kPacked, 4, 1, 100000, 512, 0},
    {"decode CSA 128+512", kPacked, 16, 1, 100000, 512, 0},
    {"decode CSA 128+512", KvFormat::kBf16, 64, 1, 100000, 512, 0},
    {"decode CSA 128+512", KvFormat::kF32, 64, 1, 100000, 512, 0},
    {"decode CSA 128+1024", kPacked, 128, 1, 100000, 1024, 0},
    {"decode CSA 128+512, 8 sequences", kPacked, 64, 8, 100000, 512, 0},
    {"decode sliding 128", kPacked, 64, 1, 100000, 0, 0},
    {"decode HCA 1M context", kPacked, 64, 1, 1048575, 0, 128},
    {"prefill sliding", kPacked, 64, 512, 0, 0, 0},
    {"prefill HCA from 0", kPacked, 64, 512, 0, 0, 128},
    {"prefill HCA from 64k", kPacked, 64, 64, 65536, 0, 128},
    {"prefill CSA from 64k", kPacked, 64, 64, 65536, 512, 0},
};

// Random rows; the same values in each format.
CacheView make_cache(KvFormat format, int64_t rows, std::mt19937& random) {
  constexpr int kRows = 64, kDim = 512;
  CacheView view;
  view.format = format;
  view.rows_per_block = kRows;
  view.row_elems = kDim;
  view.num_blocks = static_cast<int32_t>((rows + kRows - 1) / kRows);
  view.block_stride_bytes = upstream_page_bytes(format, kRows, kDim);
  view.base = zeroed_bytes(view.block_stride_bytes * view.num_blocks);
  std::uniform_real_distribution<float> uniform(-1, 1);
  std::vector<float> values(kDim);
  for (int64_t slot = 0; slot < int64_t{view.num_blocks} * kRows; ++slot) {
    for (float& v : values) v = uniform(random);
    encode_row(view, slot, values.data());
  }
  return view;
}

void run(const Shape& shape, const Candidate& candidate, const Options& options, Machine& machine) {
  constexpr int kDim = 512, kWindow = 128, kBlock = 64;
  std::mt19937 random(7);
  const bool exact = shape.format == KvFormat::kF32;
  const int64_t tokens = shape.tokens, heads = shape.heads;
  const int64_t last = shape.position + tokens;
  // A CSA cache far beyond every cache of the CPU; the window's rows are the last ones.
  const int64_t csa_rows = shape.selected > 0 ? (exact ? 32768 : 131072) : 64;
  const int64_t entries = shape.ratio > 0 ? last / shape.ratio + 1 : csa_rows;
  const int window_columns = static_cast<int>((kWindow + tokens) / kBlock + 3);
  const CacheView window = make_cache(shape.format, int64_t{window_columns} * kBlock, random);
  const CacheView compressed = make_cache(shape.format, entries, random);

  std::vector<int32_t> window_table(static_cast<size_t>(window_columns));
  std::vector<int32_t> table(static_cast<size_t>(compressed.num_blocks));
  for (size_t i = 0; i < window_table.size(); ++i) window_table[i] = static_cast<int32_t>(i);
  for (size_t i = 0; i < table.size(); ++i) table[i] = static_cast<int32_t>(i);
  std::shuffle(table.begin(), table.end(), random);
  std::vector<int32_t> seq(static_cast<size_t>(tokens), 0), begin, end, hca_begin, hca_end, length;
  double rows = 0;
  for (int64_t t = 0; t < tokens; ++t) {
    const auto position = static_cast<int32_t>(shape.position + t);
    begin.push_back(std::max(0, position - kWindow + 1));
    end.push_back(position + 1);
    hca_begin.push_back(0);
    hca_end.push_back(shape.ratio > 0 ? (position + 1) / shape.ratio : 0);
    length.push_back(shape.selected);
    rows += end.back() - begin.back() + hca_end.back() + shape.selected;
  }
  // Another list at every call, so that no cache holds its rows.
  const int64_t list_elems = tokens * std::max(shape.selected, 1);
  std::vector<int32_t> slots(static_cast<size_t>(64 * list_elems));
  for (int32_t& s : slots) s = static_cast<int32_t>(random() % static_cast<uint64_t>(entries));
  int64_t calls = 0;

  const DType act = exact ? DType::kF32 : DType::kBf16;
  const int64_t elems = tokens * heads * kDim;
  std::byte* q = zeroed_bytes(elems * size_of(act));
  std::byte* out = zeroed_bytes(elems * size_of(act));
  std::uniform_real_distribution<float> uniform(-1.5f, 1.5f);
  for (int64_t i = 0; i < elems; ++i) {
    const float v = uniform(random);
    if (exact) {
      reinterpret_cast<float*>(q)[i] = v;
    } else {
      reinterpret_cast<uint16_t*>(q)[i] = f32_to_bf16(v);
    }
  }
  std::vector<float> sink(static_cast<size_t>(heads), 0.3f),
      lse(static_cast<size_t>(tokens * heads));

  AttendParams params{};
  params.q = ConstTensor(q, act, {tokens, heads, kDim});
  params.window = RangeRows{window,
                            {window_table.data(), window_columns, window_columns, kBlock},
                            begin.data(),
                            end.data()};
  if (shape.ratio > 0) {
    params.compressed =
        RangeRows{compressed,
                  {table.data(), compressed.num_blocks, compressed.num_blocks, kBlock},
                  hca_begin.data(),
                  hca_end.data()};
  } else if (shape.selected > 0) {
    params.compressed = ListedRows{compressed, slots.data(), shape.selected, length.data()};
  }
  params.token_to_seq = seq.data();
  params.sink = sink.data();
  params.softmax_scale = 1.0f / std::sqrt(512.0f);
  params.round_p_to_bf16 = !exact;
  params.out = Tensor(out, act, {tokens, heads, kDim});
  params.lse = lse.data();

  ScratchLimits limits;
  limits.num_heads = shape.heads;
  limits.head_dim = kDim;
  limits.num_threads = options.threads;
  Arena arena = make_arena(attend_scratch_bytes(limits));
  Ops ops;
  candidate.install(ops);
  const OpContext context{machine.stream(), &arena, &ops};
  const Measured measured = machine.measure([&] {
    if (shape.selected > 0) {
      std::get<ListedRows>(params.compressed).slots = slots.data() + calls++ % 64 * list_elems;
    }
    ops.attend(params, context);
  });
  const RowLayout layout = row_layout(shape.format, kDim);
  const double bytes = rows * static_cast<double>(layout.row_bytes()) +
                       2.0 * static_cast<double>(elems * size_of(act));
  print(concat(shape.name, ", ", kv_format_name(shape.format), ", ", heads, " heads, T ", tokens),
        candidate.name, measured, 4.0 * static_cast<double>(heads) * rows * kDim, bytes);
}

}  // namespace
}  // namespace dsv4::cpu::bench

int main(int argc, char** argv) {
  using namespace dsv4::cpu;
  const bench::Options options = bench::parse(argc, argv);
  bench::Machine machine(options);
  for (const auto& shape : bench::kShapes) {
    if (std::string(shape.name).find(options.filter) == std::string::npos) continue;
    for (const Candidate& candidate : attend_candidates()) {
      const bool chosen = options.candidate.empty() ? candidate.name != "reference"
                                                    : candidate.name == options.candidate;
      if (chosen && candidate.why_not().empty()) bench::run(shape, candidate, options, machine);
    }
  }
}
