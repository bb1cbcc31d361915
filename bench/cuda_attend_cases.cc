#include "bench/cuda_attend_cases.h"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <map>
#include <numeric>

#include "backends/nvidia/ops/gpu_check.h"
#include "cache/kv_format.h"
#include "core/checked_math.h"
#include "core/fail.h"
#include "core/numbers.h"

namespace dsv4::nvidia::bench {
namespace {

constexpr int64_t kColdBytes = int64_t{256} << 20;
constexpr int kReplays = 7;
constexpr double kReplayUs = 2500;
constexpr int kWindowPage = 256, kSelectedPage = 64, kAllPage = 2;

// Pages of random rows. The same few repeat in memory; addresses differ, which is what caches see.
CacheView make_cache(Memory& memory, KvFormat format, int rows_per_block, int64_t num_blocks) {
  constexpr int kSampleRows = 256;
  static std::map<std::pair<KvFormat, int>, std::vector<std::byte>> samples;
  CacheView view;
  view.format = format;
  view.row_elems = kDim;
  view.rows_per_block = rows_per_block;
  view.num_blocks = static_cast<int32_t>(num_blocks);
  view.block_stride_bytes =
      round_up(page_bytes(format, rows_per_block, kDim), format == KvFormat::kFp8DsMla ? 576 : 512);
  std::vector<std::byte>& sample = samples[{format, rows_per_block}];
  if (sample.empty()) {
    sample.resize(static_cast<size_t>(kSampleRows / rows_per_block * view.block_stride_bytes));
    view.base = sample.data();
    std::mt19937 random(3);
    std::normal_distribution<float> normal;
    std::vector<float> row(kDim);
    for (int64_t slot = 0; slot < kSampleRows; ++slot) {
      for (float& value : row) value = normal(random);
      encode_row(view, slot, row.data());
    }
  }
  view.base = memory.fill(sample, num_blocks * view.block_stride_bytes);
  return view;
}

}  // namespace

double Problem::kv_bytes() const {
  const double row_bytes = static_cast<double>(page_bytes(format, 64, kDim)) / 64;
  double rows = kWindow + tokens_per_seq - 1;
  if (which.rows == Rows::kAll) rows += which.entries;
  if (which.rows == Rows::kSelected) rows += which.prefill ? pool : which.entries * tokens_per_seq;
  return rows * seqs * row_bytes;
}

int Problem::cold_sets() const {
  constexpr double kMostSets = 512;
  return static_cast<int>(
      std::clamp(std::ceil(static_cast<double>(kColdBytes) / (kv_bytes() + q_bytes())), 1.0,
                 which.rows == Rows::kSelected ? kMostSets / std::min(tokens(), 8) : kMostSets));
}

std::byte* Memory::take(int64_t bytes) {
  constexpr int64_t kSlabBytes = int64_t{64} << 20;
  bytes = round_up(bytes, Arena::kAlignment);
  if (used_ + bytes > (slabs_.empty() ? 0 : slabs_.back().bytes())) {
    slabs_.push_back(device_.allocate(std::max(bytes, kSlabBytes)));
    used_ = 0;
  }
  used_ += bytes;
  return slabs_.back().data() + used_ - bytes;
}

std::byte* Memory::fill(const std::vector<std::byte>& sample, int64_t bytes) {
  std::byte* out = take(bytes);
  auto have = std::min(bytes, static_cast<int64_t>(sample.size()));
  device_.copy_to_device(out, sample.data(), have, device_.default_stream());
  while (have < bytes) {
    const int64_t more = std::min(have, bytes - have);
    device_.copy_on_device(out + have, out, more, device_.default_stream());
    have += more;
  }
  return out;
}

const std::vector<std::byte>& query_sample() {
  static const std::vector<std::byte> sample = [] {
    std::vector<std::byte> out(size_t{2} << 16);
    std::mt19937 random(2);
    std::normal_distribution<float> normal;
    for (size_t i = 0; i < out.size(); i += 2) {
      const uint16_t bits = f32_to_bf16(normal(random));
      std::memcpy(out.data() + i, &bits, 2);
    }
    return out;
  }();
  return sample;
}

InputSets::InputSets(Memory& memory, const Problem& problem, int sets)
    : memory_(memory),
      problem_(problem),
      window_columns_(
          problem.which.prefill ? ceil_div(kWindow + problem.tokens_per_seq, kWindowPage) + 1 : 2) {
  const Case& which = problem_.which;
  const int64_t tables = int64_t{problem_.seqs} * sets;
  window_ = make_cache(memory, problem_.format, kWindowPage, window_columns_ * tables);
  window_blocks_ = permutation(window_.num_blocks);
  if (which.rows != Rows::kWindowOnly) {
    const bool all = which.rows == Rows::kAll;
    const int count = all ? which.entries : problem_.pool;
    columns_ = ceil_div(count, all ? kAllPage : kSelectedPage);
    compressed_ =
        make_cache(memory, problem_.format, all ? kAllPage : kSelectedPage, columns_ * tables);
    blocks_ = permutation(compressed_.num_blocks);
    entries_ = permutation(count);
  }
  q_ = memory.fill(query_sample(), 2 * q_elems() * sets);
  out_ = memory.take(2 * q_elems());
  lse_ = memory.take(int64_t{4} * problem_.tokens() * problem_.heads);
  sink_ = memory.put(std::vector<float>(static_cast<size_t>(problem_.heads), 0.3f));
}

int32_t InputSets::window_slot(int set, int seq, int position) const {
  const int64_t first = window_columns_ * (int64_t{problem_.seqs} * set + seq);
  return window_blocks_[static_cast<size_t>(first + position / kWindowPage)] * kWindowPage +
         position % kWindowPage;
}

int32_t InputSets::entry_slot(int set, int seq, int entry) const {
  const int page = compressed_.rows_per_block;
  const int64_t first = columns_ * (int64_t{problem_.seqs} * set + seq);
  return blocks_[static_cast<size_t>(first + entry / page)] * page + entry % page;
}

std::vector<int32_t> InputSets::permutation(int64_t count) {
  std::vector<int32_t> out(static_cast<size_t>(count));
  std::iota(out.begin(), out.end(), 0);
  std::shuffle(out.begin(), out.end(), random_);
  return out;
}

BlockTable InputSets::table(const std::vector<int32_t>& blocks, int64_t columns, int set,
                            int page) {
  const auto first = blocks.begin() + columns * problem_.seqs * set;
  return {memory_.put(std::vector<int32_t>(first, first + columns * problem_.seqs)), columns,
          static_cast<int32_t>(columns), page};
}

// Distinct random entries per token, ascending.
std::vector<int32_t> InputSets::select() {
  std::vector<int32_t> out;
  const int count = problem_.which.entries;
  for (int t = 0; t < problem_.tokens(); ++t) {
    for (int i = 0; i < count; ++i) {
      const auto other = static_cast<int64_t>(random_() % static_cast<unsigned>(problem_.pool - i));
      std::swap(entries_[static_cast<size_t>(i)], entries_[static_cast<size_t>(i + other)]);
    }
    out.insert(out.end(), entries_.begin(), entries_.begin() + count);
    std::sort(out.end() - count, out.end());
  }
  return out;
}

AttendParams InputSets::make(int set, LogicalRows* rows) {
  const Case& which = problem_.which;
  const int tokens = problem_.tokens();
  const auto count = static_cast<size_t>(tokens);
  std::vector<int32_t> begin, end, seq;
  for (int s = 0; s < problem_.seqs; ++s) {
    const int first = kWindow + (which.prefill ? 0 : static_cast<int>(random_() % kWindowPage));
    for (int i = 0; i < problem_.tokens_per_seq; ++i) {
      begin.push_back(first + i - kWindow + 1);
      end.push_back(first + i + 1);
      seq.push_back(s);
    }
  }
  AttendParams params{};
  params.q = ConstTensor(q_ + 2 * q_elems() * set, DType::kBf16, {tokens, problem_.heads, kDim});
  params.out = Tensor(out_, DType::kBf16, {tokens, problem_.heads, kDim});
  params.lse = reinterpret_cast<float*>(lse_);
  params.window = RangeRows{window_, table(window_blocks_, window_columns_, set, kWindowPage),
                            memory_.put(begin), memory_.put(end)};
  params.max_entries = which.entries;
  const std::vector<int32_t> lengths(count, which.entries);
  std::vector<int32_t> entries;
  if (which.rows == Rows::kAll) {
    params.compressed =
        RangeRows{compressed_, table(blocks_, columns_, set, kAllPage),
                  memory_.put(std::vector<int32_t>(count, 0)), memory_.put(lengths)};
  } else if (which.rows == Rows::kSelected) {
    entries = select();
    std::vector<int32_t> slots(entries.size());
    for (size_t i = 0; i < slots.size(); ++i) {
      slots[i] = entry_slot(set, seq[i / static_cast<size_t>(which.entries)], entries[i]);
    }
    params.compressed =
        ListedRows{compressed_, memory_.put(slots), which.entries, memory_.put(lengths)};
  }
  params.token_to_seq = memory_.put(seq);
  params.sink = sink_;
  params.softmax_scale = 1.0f / std::sqrt(512.0f);
  params.round_p_to_bf16 = true;
  if (rows != nullptr) {
    if (which.rows == Rows::kAll) {
      for (int t = 0; t < tokens; ++t) {
        for (int entry = 0; entry < which.entries; ++entry) entries.push_back(entry);
      }
    }
    *rows = {std::move(begin), std::move(entries)};
  }
  return params;
}

std::vector<double> medians_us(Device& device, int64_t sets, double load_seconds,
                               const std::vector<Call>& calls) {
  const Stream stream = device.default_stream();
  const auto cuda_stream = stream_of(stream);
  cudaEvent_t events[2];
  for (cudaEvent_t& event : events) DSV4_CUDA_CHECK(cudaEventCreate(&event));
  const auto capture = [&](const Call& call, int64_t launches) {
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    DSV4_CUDA_CHECK(cudaStreamBeginCapture(cuda_stream, cudaStreamCaptureModeThreadLocal));
    for (int64_t i = 0; i < launches; ++i) call(i % sets);
    DSV4_CUDA_CHECK(cudaStreamEndCapture(cuda_stream, &graph));
    DSV4_CUDA_CHECK(cudaGraphInstantiate(&exec, graph, 0));
    cudaGraphDestroy(graph);
    return exec;
  };
  const auto replay_us = [&](cudaGraphExec_t exec) {
    DSV4_CUDA_CHECK(cudaEventRecord(events[0], cuda_stream));
    DSV4_CUDA_CHECK(cudaGraphLaunch(exec, cuda_stream));
    DSV4_CUDA_CHECK(cudaEventRecord(events[1], cuda_stream));
    DSV4_CUDA_CHECK(cudaEventSynchronize(events[1]));
    float ms = 0;
    DSV4_CUDA_CHECK(cudaEventElapsedTime(&ms, events[0], events[1]));
    return 1e3 * ms;
  };
  struct Timed {
    cudaGraphExec_t exec;
    int64_t launches;
    std::vector<double> us;
  };
  std::vector<Timed> all;
  for (const Call& call : calls) {
    for (int64_t set = 0; set < sets; ++set) call(set);  // first calls prepare the device
    device.synchronize(stream);
    const cudaGraphExec_t probe = capture(call, sets);
    replay_us(probe);
    const double once = replay_us(probe) / static_cast<double>(sets);
    cudaGraphExecDestroy(probe);
    const int64_t launches =
        round_up(std::max<int64_t>(sets, static_cast<int64_t>(kReplayUs / once)), sets);
    all.push_back({capture(call, launches), launches, {}});
    replay_us(all.back().exec);
  }
  const auto time = [&](Timed& timed) {
    timed.us.push_back(replay_us(timed.exec) / static_cast<double>(timed.launches));
  };
  if (load_seconds > 0) {
    for (Timed& timed : all) {
      for (double seconds = 0; seconds < load_seconds;) seconds += 1e-6 * replay_us(timed.exec);
      for (int i = 0; i < kReplays; ++i) time(timed);
    }
  } else {
    for (int i = 0; i < kReplays; ++i) {
      for (Timed& timed : all) time(timed);
    }
  }
  std::vector<double> medians;
  for (Timed& timed : all) {
    cudaGraphExecDestroy(timed.exec);
    std::sort(timed.us.begin(), timed.us.end());
    medians.push_back(timed.us[kReplays / 2]);
  }
  for (cudaEvent_t event : events) cudaEventDestroy(event);
  return medians;
}

int blocks_by_batch(const Problem& problem) {
  // What attend takes on an H200 (docs/kernels/attend_sm90.md): clusters of 8, 4 and 2 CTAs serve
  // so many items (15 of 8 would run, but slower), one CTA each any number of them, 132 at a time.
  struct Kernel {
    int64_t items;
    double us, block_us;
  };
  constexpr Kernel kClusters[] = {{12, 6.2, 0.52}, {30, 6.9, 0.775}, {66, 7.5, 1.256}};
  constexpr Kernel kOneCta = {132, 12.5, 2.07};
  constexpr double kMergeUs = 1.3, kChainUs = 0.25, kItemUs = 0.06, kCutBlocks = 4;
  const int64_t tiles = problem.tokens() * ceil_div(problem.heads, 64);
  const int64_t blocks = ceil_div(std::max(problem.which.entries, 1), 64);
  double best_us = HUGE_VAL;
  int64_t best = 0;
  for (int64_t chains = 1; chains <= blocks; ++chains) {
    int64_t length = ceil_div(blocks, chains);
    // Up to 64 heads, chains of the default length are merged of two parts, whatever the batch.
    if (length == ReductionGrid{}.blocks_per_chain && problem.heads <= 64) ++length;
    const int64_t merged = ceil_div(blocks, length), items = tiles * merged;
    const auto* kernel = std::find_if(std::begin(kClusters), std::end(kClusters),
                                      [&](const Kernel& k) { return items <= k.items; });
    if (kernel == std::end(kClusters)) kernel = &kOneCta;
    auto rounds = static_cast<double>(ceil_div(items, kernel->items));
    if (kernel == &kOneCta && items > kernel->items && merged == 1 && problem.heads <= 64) {
      // Items are cut where that spares more than it costs.
      const auto share = static_cast<double>(items) / static_cast<double>(kernel->items);
      rounds = std::min(rounds, share + kCutBlocks / static_cast<double>(length + kWindow / 64));
    }
    double us = kernel->us + rounds * static_cast<double>(length + kWindow / 64) * kernel->block_us;
    if (merged > 1) {
      us +=
          kMergeUs + kChainUs * static_cast<double>(merged) + kItemUs * static_cast<double>(items);
    }
    if (us < best_us) {
      best_us = us;
      best = length;
    }
  }
  return static_cast<int>(best);
}

Arena scratch_for(Device& device, Memory& memory, const Ops& ops, const AttendParams& call) {
  Arena measure;
  ops.attend(call, {device.default_stream(), &measure, &ops});
  const int64_t bytes = std::max<int64_t>(measure.peak(), Arena::kAlignment);
  return Arena(memory.take(bytes), bytes);
}

std::vector<int> parse_list(const char* text) {
  std::vector<int> out;
  for (const char* at = text; *at != '\0';) {
    char* after = nullptr;
    out.push_back(static_cast<int>(std::strtol(at, &after, 10)));
    at = *after == ',' ? after + 1 : after;
    if (at == text || out.back() < 1) fail(ErrorCode::kInvalidArgument, "not a list: ", text);
  }
  return out;
}

}  // namespace dsv4::nvidia::bench
