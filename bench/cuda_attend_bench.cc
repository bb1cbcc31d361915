// Attention kernels on a GPU: decode and prefill at the shapes of the released models, beside
// FlashMLA's times on an H200 and the floor of the hardware.
//
//   cuda_attend_bench [--candidate NAME] [--format fp8_ds_mla|bf16|fp8] [--heads H[,H...]]
//                     [--batch T[,T...]] [--case LETTER...] [--quick] [--load SECONDS]
//                     [--blocks-per-chain N|batch]
//
// --candidate  forces a kernel of the attend family (sm90, sm80, reference); default: the best one
// --case       of a b c (window; + 512, + 1024 selected rows), d e f g (+ all of 64, 512, 4096,
// 8192
//              entries), p (prefill of 4096 tokens with 0, 512, 1024 selected rows); default: all
// --quick      heads 64, batches 1, 8, 64, 128, cases b d e g p
// --blocks-per-chain  length of a chain in blocks of 64 rows; batch: as many chains as fill the
//              multiprocessors, so that a token's bits depend on the batch (gives up rule 2.2)
// --load       keeps the GPU busy for so long before the first row is timed, and for a second with
//              a row's own calls before it: what is left under the power limit
//
// Method: a graph of calls over input sets of 256 MB together (four times the L2; the smallest
// cases less) is replayed; time is the median of replays divided by the calls, gap between launches
// included. The window is 128 positions at an arbitrary alignment in pages of 256 rows; selected
// rows are random ones of 16384 entries in pages of 64 (prefill: of 8192 entries, one sequence);
// all entries lie in pages of 2. floor = max(FLOPs at 790 TFLOP/s, bytes at 4274 GB/s, 2.8 us);
// bytes are rows, q and out, each once.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <numeric>
#include <random>
#include <string>
#include <string_view>
#include <vector>

#include "backends/nvidia/candidates.h"
#include "backends/nvidia/cuda_device.h"
#include "backends/nvidia/ops/gpu_check.h"
#include "cache/kv_format.h"
#include "core/arena.h"
#include "core/checked_math.h"
#include "core/fail.h"
#include "core/numbers.h"
#include "dsv4/backend.h"

namespace dsv4::nvidia {
namespace {

constexpr int kDim = 512, kWindow = 128;
constexpr int64_t kColdBytes = int64_t{256} << 20;
constexpr double kBytesPerUs = 4274e3, kFlopPerUs = 790e6, kLaunchUs = 2.8;
constexpr int kReplays = 7;
constexpr double kReplayUs = 2500;

enum class Rows { kWindowOnly, kSelected, kAll };

struct Case {
  char letter;
  Rows rows;
  int entries;
  bool prefill;
};
constexpr Case kCases[] = {
    {'a', Rows::kWindowOnly, 0, false},  {'b', Rows::kSelected, 512, false},
    {'c', Rows::kSelected, 1024, false}, {'d', Rows::kAll, 64, false},
    {'e', Rows::kAll, 512, false},       {'f', Rows::kAll, 4096, false},
    {'g', Rows::kAll, 8192, false},      {'p', Rows::kWindowOnly, 0, true},
    {'p', Rows::kSelected, 512, true},   {'p', Rows::kSelected, 1024, true},
};
constexpr int kPrefillTokens = 4096;
constexpr int kBatches[] = {1, 2, 8, 16, 32, 64, 128, 148, 256};

// FlashMLA 9241ae3 on an H200, us; decode by batch of kBatches, s_q 1, packed rows; prefill bf16
// KV.
struct Anchor {
  char letter;
  int entries, heads;
  double us[9];
};
constexpr Anchor kAnchors[] = {
    {'a', 0, 64, {11.6, 11.7, 11.9, 12.3, 12.5, 13.1, 14.9, 27.3, 28.2}},
    {'b', 512, 64, {13.4, 13.6, 15.1, 18.0, 25.0, 44.2, 45.6, 69.6, 87.9}},
    {'c', 1024, 64, {15.1, 15.4, 18.2, 22.9, 34.5, 61.1, 74.0, 104, 144}},
    {'d', 64, 64, {11.8, 12.0, 12.1, 13.1, 16.5, 16.6, 18.4, 34.7, 36.0}},
    {'e', 512, 64, {13.4, 13.6, 15.1, 18.0, 24.8, 43.1, 44.5, 68.2, 85.9}},
    {'f', 4096, 64, {25.9, 22.7, 31.8, 52.3, 82.7, 137, 235, 292, 464}},
    {'g', 8192, 64, {29.1, 28.8, 49.1, 82.1, 130, 241, 450, 538, 906}},
    {'a', 0, 128, {10.7, 10.8, 11.3, 10.4, 11.2, 13.0, 23.2, 31.0, 46.9}},
    {'b', 512, 128, {13.0, 13.3, 16.2, 20.8, 33.3, 33.1, 64.9, 88.9, 126}},
    {'c', 1024, 128, {14.7, 15.4, 20.0, 27.7, 45.8, 53.5, 104, 133, 203}},
    {'d', 64, 128, {11.1, 11.3, 12.2, 14.6, 13.9, 15.7, 28.9, 44.8, 57.0}},
    {'e', 512, 128, {13.0, 13.3, 16.1, 20.7, 33.0, 32.7, 64.2, 87.9, 125}},
    {'f', 4096, 128, {20.8, 21.5, 41.5, 62.2, 99.6, 169, 334, 399, 668}},
    {'g', 8192, 128, {26.1, 27.9, 62.6, 97.0, 175, 326, 645, 744, 1275}},
    {'p', 0, 64, {263}},
    {'p', 512, 64, {610}},
    {'p', 1024, 64, {1040}},
    {'p', 0, 128, {516}},
    {'p', 512, 128, {1244}},
    {'p', 1024, 128, {2127}},
};
// Fewer than 64 heads are padded to 64 there.
double anchor(const Case& which, int heads, int batch) {
  if (heads < 64) heads = 64;
  for (const Anchor& a : kAnchors) {
    if (a.letter != which.letter || a.entries != which.entries || a.heads != heads) continue;
    if (which.prefill) return a.us[0];
    for (size_t i = 0; i < std::size(kBatches); ++i) {
      if (kBatches[i] == batch) return a.us[i];
    }
  }
  return 0;
}

struct Options {
  std::string candidate, cases = "abcdefgp";
  KvFormat format = KvFormat::kFp8DsMla;
  std::vector<int> heads{64, 128, 8, 16, 32};
  std::vector<int> batches{std::begin(kBatches), std::end(kBatches)};
  double load_seconds = 0;
  int blocks_per_chain = ReductionGrid{}.blocks_per_chain;  // 0: by the batch
};

// Device memory of one case: bump allocation from slabs, so that many input sets cost few calls.
class Memory {
 public:
  explicit Memory(Device& device) : device_(device) {}
  std::byte* take(int64_t bytes) {
    constexpr int64_t kSlabBytes = int64_t{64} << 20;
    bytes = round_up(bytes, Arena::kAlignment);
    if (used_ + bytes > (slabs_.empty() ? 0 : slabs_.back().bytes())) {
      slabs_.push_back(device_.allocate(std::max(bytes, kSlabBytes)));
      used_ = 0;
    }
    used_ += bytes;
    return slabs_.back().data() + used_ - bytes;
  }
  template <typename T>
  T* put(const std::vector<T>& values) {
    const auto bytes = static_cast<int64_t>(values.size() * sizeof(T));
    std::byte* out = take(bytes);
    device_.copy_to_device(out, values.data(), bytes, device_.default_stream());
    return reinterpret_cast<T*>(out);
  }
  /// `sample` again and again.
  std::byte* fill(const std::vector<std::byte>& sample, int64_t bytes) {
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

 private:
  Device& device_;
  std::vector<Buffer> slabs_;
  int64_t used_ = 0;
};

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

// Input sets of a case: the caches are shared, every set has blocks of its own.
class InputSets {
 public:
  InputSets(Memory& memory, const Case& which, KvFormat format, int heads, int tokens, int sets)
      : memory_(memory),
        which_(which),
        heads_(heads),
        tokens_(tokens),
        seqs_(which.prefill ? 1 : tokens),
        window_columns_(which.prefill ? ceil_div(kWindow + tokens, kWindowPage) + 1 : 2) {
    window_ = make_cache(memory, format, kWindowPage, window_columns_ * seqs_ * sets);
    window_blocks_ = permutation(window_.num_blocks);
    if (which.rows != Rows::kWindowOnly) {
      const bool all = which.rows == Rows::kAll;
      pool_ = all ? which.entries : which.prefill ? 8192 : 16384;
      const int page = all ? kAllPage : kSelectedPage;
      columns_ = ceil_div(pool_, page);
      compressed_ = make_cache(memory, format, page, columns_ * seqs_ * sets);
      blocks_ = permutation(compressed_.num_blocks);
      entries_ = permutation(pool_);
    }
    q_ = memory.fill(query_sample(), 2 * q_elems() * sets);
    out_ = memory.take(2 * q_elems());
    lse_ = memory.take(int64_t{4} * tokens * heads);
    sink_ = memory.put(std::vector<float>(static_cast<size_t>(heads), 0.3f));
  }

  AttendParams make(int set) {
    const auto count = static_cast<size_t>(tokens_);
    std::vector<int32_t> begin, end, seq;
    for (int t = 0; t < tokens_; ++t) {
      const int position =
          kWindow + (which_.prefill ? t : static_cast<int>(random_() % kWindowPage));
      begin.push_back(position - kWindow + 1);
      end.push_back(position + 1);
      seq.push_back(which_.prefill ? 0 : t);
    }
    AttendParams params{};
    params.q = ConstTensor(q_ + 2 * q_elems() * set, DType::kBf16, {tokens_, heads_, kDim});
    params.out = Tensor(out_, DType::kBf16, {tokens_, heads_, kDim});
    params.lse = reinterpret_cast<float*>(lse_);
    params.window = RangeRows{window_, table(window_blocks_, window_columns_, set, kWindowPage),
                              memory_.put(begin), memory_.put(end)};
    params.max_entries = which_.entries;
    const std::vector<int32_t> lengths(count, which_.entries);
    if (which_.rows == Rows::kAll) {
      params.compressed =
          RangeRows{compressed_, table(blocks_, columns_, set, kAllPage),
                    memory_.put(std::vector<int32_t>(count, 0)), memory_.put(lengths)};
    } else if (which_.rows == Rows::kSelected) {
      params.compressed =
          ListedRows{compressed_, memory_.put(select(set)), which_.entries, memory_.put(lengths)};
    }
    params.token_to_seq = memory_.put(seq);
    params.sink = sink_;
    params.softmax_scale = 1.0f / std::sqrt(512.0f);
    params.round_p_to_bf16 = true;
    return params;
  }

 private:
  static constexpr int kWindowPage = 256, kSelectedPage = 64, kAllPage = 2;
  int64_t q_elems() const { return int64_t{tokens_} * heads_ * kDim; }
  std::vector<int32_t> permutation(int64_t count) {
    std::vector<int32_t> out(static_cast<size_t>(count));
    std::iota(out.begin(), out.end(), 0);
    std::shuffle(out.begin(), out.end(), random_);
    return out;
  }
  BlockTable table(const std::vector<int32_t>& blocks, int64_t columns, int set, int page) {
    const auto first = blocks.begin() + columns * seqs_ * set;
    return {memory_.put(std::vector<int32_t>(first, first + columns * seqs_)), columns,
            static_cast<int32_t>(columns), page};
  }
  // Distinct random entries per token, ascending.
  std::vector<int32_t> select(int set) {
    std::vector<int32_t> slots;
    for (int t = 0; t < tokens_; ++t) {
      for (int i = 0; i < which_.entries; ++i) {
        const auto other = static_cast<int64_t>(random_() % static_cast<unsigned>(pool_ - i));
        std::swap(entries_[static_cast<size_t>(i)], entries_[static_cast<size_t>(i + other)]);
      }
      std::vector<int32_t> chosen(entries_.begin(), entries_.begin() + which_.entries);
      std::sort(chosen.begin(), chosen.end());
      const int64_t first = columns_ * (int64_t{seqs_} * set + (which_.prefill ? 0 : t));
      for (int32_t entry : chosen) {
        slots.push_back(blocks_[static_cast<size_t>(first + entry / kSelectedPage)] *
                            kSelectedPage +
                        entry % kSelectedPage);
      }
    }
    return slots;
  }

  Memory& memory_;
  const Case& which_;
  int heads_, tokens_, seqs_;
  int64_t window_columns_, columns_ = 0;
  int pool_ = 0;
  CacheView window_, compressed_;
  std::vector<int32_t> window_blocks_, blocks_, entries_;
  std::byte *q_ = nullptr, *out_ = nullptr, *lse_ = nullptr;
  float* sink_ = nullptr;
  std::mt19937 random_{1};
};

double time_graph(Device& device, const Ops& ops, std::vector<AttendParams>& calls, Arena& arena,
                  double load_seconds) {
  const Stream stream = device.default_stream();
  const auto cuda_stream = stream_of(stream);
  const OpContext context{stream, &arena, &ops};
  for (AttendParams& call : calls) ops.attend(call, context);  // first calls prepare the device
  device.synchronize(stream);
  cudaEvent_t events[2];
  for (cudaEvent_t& event : events) DSV4_CUDA_CHECK(cudaEventCreate(&event));
  const auto capture = [&](int64_t launches) {
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    DSV4_CUDA_CHECK(cudaStreamBeginCapture(cuda_stream, cudaStreamCaptureModeThreadLocal));
    for (int64_t i = 0; i < launches; ++i) ops.attend(calls[i % calls.size()], context);
    DSV4_CUDA_CHECK(cudaStreamEndCapture(cuda_stream, &graph));
    DSV4_CUDA_CHECK(cudaGraphInstantiate(&exec, graph, 0));
    cudaGraphDestroy(graph);
    return exec;
  };
  const auto replay = [&](cudaGraphExec_t exec) {
    DSV4_CUDA_CHECK(cudaEventRecord(events[0], cuda_stream));
    DSV4_CUDA_CHECK(cudaGraphLaunch(exec, cuda_stream));
    DSV4_CUDA_CHECK(cudaEventRecord(events[1], cuda_stream));
    DSV4_CUDA_CHECK(cudaEventSynchronize(events[1]));
    float ms = 0;
    DSV4_CUDA_CHECK(cudaEventElapsedTime(&ms, events[0], events[1]));
    return 1e3 * ms;
  };
  const auto sets = static_cast<int64_t>(calls.size());
  cudaGraphExec_t exec = capture(sets);
  replay(exec);
  const double once = replay(exec) / static_cast<double>(sets);
  cudaGraphExecDestroy(exec);
  const int64_t launches =
      round_up(std::max<int64_t>(sets, static_cast<int64_t>(kReplayUs / once)), sets);
  exec = capture(launches);
  replay(exec);
  for (double seconds = 0; seconds < load_seconds;) seconds += 1e-6 * replay(exec);
  std::vector<double> us;
  for (int i = 0; i < kReplays; ++i) us.push_back(replay(exec) / static_cast<double>(launches));
  cudaGraphExecDestroy(exec);
  for (cudaEvent_t event : events) cudaEventDestroy(event);
  std::sort(us.begin(), us.end());
  return us[us.size() / 2];
}

// Chains of equal length, as many as there are multiprocessors for.
int blocks_by_batch(int entries, int heads, int tokens) {
  constexpr int kMultiprocessors = 132;
  const int items = tokens * static_cast<int>(ceil_div(heads, 64));
  const int blocks = static_cast<int>(ceil_div(std::max(entries, 1), 64));
  const int chains = std::clamp(kMultiprocessors / items, 1, blocks);
  return std::min(static_cast<int>(ceil_div(blocks, chains)), ReductionGrid{}.blocks_per_chain);
}

/// FlashMLA's time over ours; 0 where there is no time of theirs.
double run_case(Device& device, const Ops& ops, const Options& options, const Case& which,
                int heads, int tokens, double load_seconds) {
  Memory memory(device);
  const double row_bytes = static_cast<double>(page_bytes(options.format, 64, kDim)) / 64;
  const double rows = static_cast<double>(kWindow + which.entries);
  const double q_bytes = 4.0 * tokens * heads * kDim;
  // Rows that the call reads once; prefill tokens share theirs.
  const double unique_rows =
      which.prefill ? kWindow + tokens + (which.entries > 0 ? 8192 : 0) : rows * tokens;
  const double kv_bytes = unique_rows * row_bytes;
  constexpr double kMostSets = 512;
  const int sets = static_cast<int>(
      std::clamp(std::ceil(static_cast<double>(kColdBytes) / (kv_bytes + q_bytes / 2)), 1.0,
                 which.rows == Rows::kSelected ? kMostSets / std::min(tokens, 8) : kMostSets));
  InputSets inputs(memory, which, options.format, heads, tokens, sets);
  std::vector<AttendParams> calls;
  for (int i = 0; i < sets; ++i) {
    calls.push_back(inputs.make(i));
    calls.back().grid.blocks_per_chain = options.blocks_per_chain > 0
                                             ? options.blocks_per_chain
                                             : blocks_by_batch(which.entries, heads, tokens);
  }
  Arena measure;
  ops.attend(calls.front(), {device.default_stream(), &measure, &ops});
  const int64_t scratch = std::max<int64_t>(measure.peak(), Arena::kAlignment);
  Arena arena(memory.take(scratch), scratch);
  const double us = time_graph(device, ops, calls, arena, load_seconds);
  const double flop = 4.0 * tokens * heads * rows * kDim;
  const double floor = std::max({flop / kFlopPerUs, (kv_bytes + q_bytes) / kBytesPerUs, kLaunchUs});
  const double theirs = anchor(which, heads, tokens);
  std::printf("%c %5d %4d %5d | %8.2f us %6.0f TFLOP/s %6.0f GB/s %5.1fx floor", which.letter,
              which.entries, heads, tokens, us, flop / us / 1e6, kv_bytes / us / 1e3, us / floor);
  if (theirs > 0) std::printf(" | FlashMLA %6.1f us, %.2fx", theirs, theirs / us);
  std::printf("\n");
  std::fflush(stdout);
  return theirs / us;
}

struct GeometricMean {
  double log_sum = 0;
  int count = 0;
  void add(double value) {
    if (value > 0) log_sum += std::log(value), ++count;
  }
  double value() const { return count > 0 ? std::exp(log_sum / count) : 0; }
};

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

void run(int argc, char** argv) {
  Options options;
  for (int i = 1; i < argc; ++i) {
    const std::string_view name = argv[i];
    if (name == "--quick") {
      options.heads = {64};
      options.batches = {1, 8, 64, 128};
      options.cases = "bdegp";
      continue;
    }
    if (i + 1 == argc) fail(ErrorCode::kInvalidArgument, name, " needs a value");
    const char* value = argv[++i];
    if (name == "--candidate") {
      options.candidate = value;
    } else if (name == "--heads") {
      options.heads = parse_list(value);
    } else if (name == "--batch") {
      options.batches = parse_list(value);
    } else if (name == "--case") {
      options.cases = value;
    } else if (name == "--blocks-per-chain") {
      options.blocks_per_chain =
          value == std::string_view("batch") ? 0 : std::max(1, std::atoi(value));
    } else if (name == "--load") {
      options.load_seconds = std::strtod(value, nullptr);
    } else if (name == "--format" && parse_kv_format(value)) {
      options.format = *parse_kv_format(value);
    } else {
      fail(ErrorCode::kInvalidArgument, "unknown option ", name, " ", value);
    }
  }
  const std::unique_ptr<Device> device = open_cuda_device(0);
  const DeviceSearch search = find_devices(Platform::kCuda);
  const Ops ops = make_ops(search.devices.at(0).capability,
                           options.candidate.empty() ? "" : "attend:" + options.candidate);
  std::printf("%s, rows %s, candidate %s\ncase entries heads tokens\n",
              device->description().c_str(), kv_format_name(options.format),
              options.candidate.empty() ? "best" : options.candidate.c_str());
  constexpr double kRowLoadSeconds = 1;
  double load = options.load_seconds;
  for (int heads : options.heads) {
    GeometricMean few, many;  // decode rows of up to 16 tokens, and the others
    for (const Case& which : kCases) {
      if (options.cases.find(which.letter) == std::string::npos) continue;
      const std::vector<int> tokens =
          which.prefill ? std::vector<int>{kPrefillTokens} : options.batches;
      for (int count : tokens) {
        const double ratio = run_case(*device, ops, options, which, heads, count, load);
        if (!which.prefill) (count <= 16 ? few : many).add(ratio);
        load = std::min(load, kRowLoadSeconds);
      }
    }
    GeometricMean all{few.log_sum + many.log_sum, few.count + many.count};
    if (all.count > 0) {
      std::printf(
          "%d heads, decode, FlashMLA's time over ours, geometric mean: %.2f; to 16 tokens "
          "%.2f, beyond %.2f\n",
          heads, all.value(), few.value(), many.value());
    }
  }
}

}  // namespace
}  // namespace dsv4::nvidia

int main(int argc, char** argv) {
  try {
    dsv4::nvidia::run(argc, argv);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "cuda_attend_bench: %s\n", error.what());
    return 1;
  }
  return 0;
}
