// Our attention beside FlashMLA's kernels in one process: the same inputs, the same clock, the same
// hour. Built where CMake is given a checkout of FlashMLA (DSV4_FLASH_MLA_SOURCE).
//
//   cuda_pair_bench [--heads H[,H...]] [--case LETTER...] [--batch B[,B...]] [--s-q N[,N...]]
//                   [--tokens T[,T...]] [--pool N[,N...]] [--blocks-per-chain N|batch]
//                   [--candidate NAME] [--load SECONDS] [--json FILE]
//
// --case    as in cuda_attend_bench: a b c d e f g decode, p prefill; default: all
// --batch   requests of a decode; --s-q: tokens of a request
// --tokens  of a prefill; --pool: entries of its sequence, from which rows are selected
// --load    after the table: keeps the GPU busy for so long, then prints the table again, every row
//           after a third of a second of its own calls
// --candidate, --blocks-per-chain  as in cuda_attend_bench
//
// Decode: both read the packed pages; FlashMLA's lists of slots hold the rows that ours finds
// through block tables, in the same order. Its scheduling kernel runs once per step and is not
// counted, the merge of splits is. Prefill: FlashMLA reads bf16 rows; "gather +" counts what makes
// them from pages, every row in use once per call. Fewer than 64 heads are padded for FlashMLA.
// Method and inputs: cuda_attend_cases.h; replays of both take turns.
//
// Both results are compared. P and output are rounded to bf16 on both sides: four independent
// errors of at most 2^-9, so norms of a token's head differ by less than 2^-7.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "backends/nvidia/candidates.h"
#include "backends/nvidia/cuda_device.h"
#include "backends/nvidia/ops/gpu_check.h"
#include "bench/cuda_attend_cases.h"
#include "bench/cuda_pair_kernels.h"
#include "bench/flash_mla.h"
#include "core/checked_math.h"
#include "core/fail.h"
#include "dsv4/backend.h"

namespace dsv4::nvidia::bench {
namespace {

constexpr double kOutBound = 0x1p-7, kLseBound = 0x1p-8;
constexpr double kRowLoadSeconds = 0.33;
constexpr int kShortBatch = 16;

struct Options {
  std::string candidate, cases = "abcdefgp", json;
  std::vector<int> heads{64, 128, 8, 16, 32};
  std::vector<int> batches{std::begin(kBatches), std::end(kBatches)};
  std::vector<int> s_q{1}, tokens{kPrefillTokens}, pools{kPrefillPool, 32768};
  double load_seconds = 0;
  int blocks_per_chain = ReductionGrid{}.blocks_per_chain;  // 0: by the batch
};

struct Result {
  double ours_us = 0, theirs_us = 0;
  double gather_us = 0, end_to_end_us = 0;  // prefill: theirs with the gather
  float out_difference = 0, lse_difference = 0;
};

// A problem with the input sets of both sides.
class Pair {
 public:
  Pair(Device& device, const Ops& ops, const Problem& problem, int blocks_per_chain)
      : device_(device),
        ops_(ops),
        problem_(problem),
        stream_(stream_of(device.default_stream())),
        their_heads_(std::max(problem.heads, 64)),
        sets_(problem.cold_sets()),
        memory_(device) {
    InputSets inputs(memory_, problem, sets_);
    const int64_t q_bytes = int64_t{2} * problem.tokens() * their_heads_ * kDim;
    std::byte* their_q =
        problem.heads == their_heads_ ? nullptr : memory_.fill(query_sample(), q_bytes * sets_);
    their_out_ = memory_.take(q_bytes);
    their_lse_ = take_floats(int64_t{problem.tokens()} * their_heads_);
    max_logits_ = take_floats(int64_t{problem.tokens()} * their_heads_);
    sink_ = memory_.put(std::vector<float>(static_cast<size_t>(their_heads_), 0.3f));
    for (int set = 0; set < sets_; ++set) {
      LogicalRows rows;
      ours_.push_back(inputs.make(set, &rows));
      ours_.back().grid.blocks_per_chain = blocks_per_chain;
      const void* q = ours_.back().q.data;
      if (their_q != nullptr) {
        q = their_q + q_bytes * set;
        copy_heads(their_q + q_bytes * set, ours_.back().q.data);
      }
      if (problem.which.prefill) {
        make_prefill(inputs, set, q, rows);
      } else {
        make_decode(inputs, set, q, rows);
      }
    }
    if (!decodes_.empty()) {
      workspace_ = memory_.take(flash_mla::workspace_bytes(decodes_.front()));
      flash_mla::schedule(decodes_.front(), workspace_, stream_);
    }
    scratch_ = scratch_for(device, memory_, ops, ours_.front());
  }

  Result measure(double load_seconds) {
    Result result;
    check(result);
    std::vector<Call> calls{[&](int64_t set) { run_ours(at(set)); },
                            [&](int64_t set) { run_theirs(at(set)); }};
    if (problem_.which.prefill) {
      calls.push_back([&](int64_t set) { gather(at(set)); });
      calls.push_back([&](int64_t set) {
        gather(at(set));
        run_theirs(at(set));
      });
    }
    const std::vector<double> us = medians_us(device_, sets_, load_seconds, calls);
    result.ours_us = us[0];
    result.theirs_us = us[1];
    if (problem_.which.prefill) {
      result.gather_us = us[2];
      result.end_to_end_us = us[3];
    }
    return result;
  }

 private:
  static size_t at(int64_t set) { return static_cast<size_t>(set); }
  float* take_floats(int64_t count) { return reinterpret_cast<float*>(memory_.take(4 * count)); }
  void copy_heads(void* to, const void* from) {
    const size_t ours = size_t{2} * kDim * static_cast<size_t>(problem_.heads);
    const size_t theirs = size_t{2} * kDim * static_cast<size_t>(their_heads_);
    DSV4_CUDA_CHECK(cudaMemcpy2DAsync(to, theirs, from, ours, ours,
                                      static_cast<size_t>(problem_.tokens()),
                                      cudaMemcpyDeviceToDevice, stream_));
  }

  flash_mla::ListedPages listed(const CacheView& cache, const std::vector<int32_t>& slots) {
    if (slots.empty()) return {};
    return {cache.base,           cache.num_blocks,
            cache.rows_per_block, cache.block_stride_bytes,
            memory_.put(slots),   static_cast<int>(slots.size()) / problem_.tokens()};
  }

  void make_decode(const InputSets& inputs, int set, const void* q, const LogicalRows& rows) {
    std::vector<int32_t> window, compressed(rows.entries.size());
    for (int t = 0; t < problem_.tokens(); ++t) {
      const int begin = rows.window_begin[at(t)];
      for (int i = 0; i < kWindow; ++i) {
        window.push_back(inputs.window_slot(set, t / problem_.tokens_per_seq, begin + i));
      }
    }
    const int64_t per_seq = int64_t{problem_.which.entries} * problem_.tokens_per_seq;
    for (size_t i = 0; i < compressed.size(); ++i) {
      const auto seq = static_cast<int>(static_cast<int64_t>(i) / per_seq);
      compressed[i] = inputs.entry_slot(set, seq, rows.entries[i]);
    }
    flash_mla::Decode call{};
    call.batch = problem_.seqs;
    call.tokens_per_seq = problem_.tokens_per_seq;
    call.heads = their_heads_;
    call.softmax_scale = ours_.back().softmax_scale;
    call.q = q;
    call.out = their_out_;
    call.lse = their_lse_;
    call.sink = sink_;
    call.window = listed(inputs.window(), window);
    call.compressed = listed(inputs.compressed(), compressed);
    decodes_.push_back(call);
  }

  // Rows there: positions of the window in order, then the entries of the pool.
  void make_prefill(const InputSets& inputs, int set, const void* q, const LogicalRows& rows) {
    const int positions = kWindow + problem_.tokens_per_seq;
    const int entries = problem_.which.entries > 0 ? problem_.pool : 0;
    std::vector<int32_t> window, compressed, indices;
    for (int i = 0; i < positions; ++i) window.push_back(inputs.window_slot(set, 0, i));
    for (int i = 0; i < entries; ++i) compressed.push_back(inputs.entry_slot(set, 0, i));
    for (int t = 0; t < problem_.tokens(); ++t) {
      for (int i = 0; i < kWindow; ++i) indices.push_back(rows.window_begin[at(t)] + i);
      for (int i = 0; i < problem_.which.entries; ++i) {
        indices.push_back(positions + rows.entries[at(t * problem_.which.entries + i)]);
      }
    }
    flash_mla::Prefill call{};
    call.tokens = problem_.tokens();
    call.heads = their_heads_;
    call.softmax_scale = ours_.back().softmax_scale;
    call.q = q;
    call.rows = positions + entries;
    std::byte* kv = memory_.take(int64_t{2} * kDim * call.rows);
    call.kv = kv;
    call.indices = memory_.put(indices);
    call.count = kWindow + problem_.which.entries;
    call.sink = sink_;
    call.out = their_out_;
    call.max_logits = max_logits_;
    call.lse = their_lse_;
    prefills_.push_back(call);
    gathers_.push_back({inputs.window(), memory_.put(window), positions, kv});
    if (entries > 0) {
      gathers_.push_back({inputs.compressed(), memory_.put(compressed), entries,
                          kv + int64_t{2} * kDim * positions});
    }
    gather(at(set));
  }

  void run_ours(size_t set) {
    ops_.attend(ours_[set], {device_.default_stream(), &scratch_, &ops_});
  }
  void run_theirs(size_t set) {
    if (problem_.which.prefill) {
      flash_mla::prefill(prefills_[set], stream_);
    } else {
      flash_mla::decode(decodes_[set], workspace_, stream_);
    }
  }
  void gather(size_t set) {
    const size_t parts = problem_.which.entries > 0 ? 2 : 1;
    for (size_t i = parts * set; i < parts * (set + 1); ++i) {
      const Gather& part = gathers_[i];
      gather_bf16(part.cache, part.slots, part.count, part.out, stream_);
    }
  }

  // The last set, into outputs that hold NaN before.
  void check(Result& result) {
    const AttendParams& ours = ours_.back();
    const int64_t tokens = problem_.tokens();
    float* worst = take_floats(2);
    DSV4_CUDA_CHECK(cudaMemsetAsync(worst, 0, 8, stream_));
    const auto poison = [&](void* data, int64_t bytes) {
      DSV4_CUDA_CHECK(cudaMemsetAsync(data, 0xff, static_cast<size_t>(bytes), stream_));
    };
    poison(ours.out.data, 2 * tokens * problem_.heads * kDim);
    poison(ours.lse, 4 * tokens * problem_.heads);
    poison(their_out_, 2 * tokens * their_heads_ * kDim);
    poison(their_lse_, 4 * tokens * their_heads_);
    run_ours(ours_.size() - 1);
    run_theirs(ours_.size() - 1);
    compare({ours.out.data, their_out_, ours.lse, their_lse_, tokens, problem_.heads, their_heads_},
            worst, stream_);
    float found[2];
    DSV4_CUDA_CHECK(cudaMemcpyAsync(found, worst, sizeof(found), cudaMemcpyDeviceToHost, stream_));
    DSV4_CUDA_CHECK(cudaStreamSynchronize(stream_));
    result.out_difference = found[0];
    result.lse_difference = found[1];
  }

  struct Gather {
    CacheView cache;
    const int32_t* slots;
    int64_t count;
    std::byte* out;
  };

  Device& device_;
  const Ops& ops_;
  const Problem problem_;
  cudaStream_t stream_;
  int their_heads_, sets_;
  Memory memory_;
  std::vector<AttendParams> ours_;
  Arena scratch_;
  std::vector<flash_mla::Decode> decodes_;
  std::vector<flash_mla::Prefill> prefills_;
  std::vector<Gather> gathers_;
  void* workspace_ = nullptr;
  std::byte* their_out_ = nullptr;
  float *their_lse_ = nullptr, *max_logits_ = nullptr, *sink_ = nullptr;
};

class Tables {
 public:
  Tables(Device& device, const Ops& ops, const Options& options)
      : device_(device), ops_(ops), options_(options) {}

  /// `name` of the pass in the saved rows.
  void run(const char* name, double load_seconds) {
    name_ = name;
    load_seconds_ = load_seconds;
    std::printf(
        "%s\ncase entries heads requests s_q pool | ours us | FlashMLA us | its time over "
        "ours\n",
        name);
    for (int heads : options_.heads) {
      for (int s_q : options_.s_q) decode(heads, s_q);
      prefill(heads);
    }
  }

  bool agreed() const { return agreed_; }
  const nlohmann::json& rows() const { return rows_; }

 private:
  bool wanted(const Case& which) const {
    return options_.cases.find(which.letter) != std::string::npos;
  }

  void decode(int heads, int s_q) {
    GeometricMean few, many;  // up to kShortBatch requests, and the others
    for (const Case& which : kCases) {
      if (which.prefill || !wanted(which)) continue;
      for (int batch : options_.batches) {
        const Result result = measure({which, KvFormat::kFp8DsMla, heads, batch, s_q});
        (batch <= kShortBatch ? few : many).add(result.theirs_us / result.ours_us);
      }
    }
    const GeometricMean all{few.log_sum + many.log_sum, few.count + many.count};
    if (all.count == 0) return;
    std::printf(
        "%d heads, s_q %d, FlashMLA's time over ours, geometric mean: %.3f; to %d requests "
        "%.3f, beyond %.3f\n",
        heads, s_q, all.value(), kShortBatch, few.value(), many.value());
  }

  void prefill(int heads) {
    for (const Case& which : kCases) {
      if (!which.prefill || !wanted(which)) continue;
      for (int tokens : options_.tokens) {
        for (int pool : options_.pools) {
          measure({which, KvFormat::kFp8DsMla, heads, 1, tokens, pool});
          if (which.rows == Rows::kWindowOnly) break;  // reads no pool
        }
      }
    }
  }

  Result measure(const Problem& problem) {
    const int blocks =
        options_.blocks_per_chain > 0 ? options_.blocks_per_chain : blocks_by_batch(problem);
    const Result result = Pair(device_, ops_, problem, blocks).measure(load_seconds_);
    const bool agreed = result.out_difference <= kOutBound && result.lse_difference <= kLseBound;
    agreed_ = agreed_ && agreed;
    const Case& which = problem.which;
    const double ours_tflops = problem.flop() / result.ours_us / 1e6;
    const double their_tflops = problem.flop() / result.theirs_us / 1e6;
    std::printf("%c %5d %4d %4d %4d %6d | %8.2f (%3.0f TFLOP/s) | %8.2f (%3.0f) | %5.2fx",
                which.letter, which.entries, problem.heads, problem.seqs, problem.tokens_per_seq,
                which.entries > 0 && which.rows == Rows::kSelected ? problem.pool : 0,
                result.ours_us, ours_tflops, result.theirs_us, their_tflops,
                result.theirs_us / result.ours_us);
    if (which.prefill) {
      std::printf(" | gather %.2f, gather + FlashMLA %.2f, %.2fx", result.gather_us,
                  result.end_to_end_us, result.end_to_end_us / result.ours_us);
    }
    std::printf(" | differ by %.4f, lse %.5f%s\n", static_cast<double>(result.out_difference),
                static_cast<double>(result.lse_difference), agreed ? "" : " TOO MUCH");
    std::fflush(stdout);
    nlohmann::json row{{"pass", name_},
                       {"case", std::string(1, which.letter)},
                       {"entries", which.entries},
                       {"heads", problem.heads},
                       {"requests", problem.seqs},
                       {"s_q", problem.tokens_per_seq},
                       {"pool", problem.pool},
                       {"blocks_per_chain", blocks},
                       {"flop", problem.flop()},
                       {"bytes", problem.kv_bytes() + 2 * problem.q_bytes()},
                       {"ours_us", result.ours_us},
                       {"flash_mla_us", result.theirs_us},
                       {"out_difference", result.out_difference},
                       {"lse_difference", result.lse_difference}};
    if (which.prefill) {
      row["gather_us"] = result.gather_us;
      row["gather_flash_mla_us"] = result.end_to_end_us;
    }
    rows_.push_back(std::move(row));
    return result;
  }

  Device& device_;
  const Ops& ops_;
  const Options& options_;
  std::string name_;
  double load_seconds_ = 0;
  bool agreed_ = true;
  nlohmann::json rows_ = nlohmann::json::array();
};

Options parse(int argc, char** argv) {
  Options options;
  for (int i = 1; i < argc; ++i) {
    const std::string_view name = argv[i];
    if (i + 1 == argc) fail(ErrorCode::kInvalidArgument, name, " needs a value");
    const char* value = argv[++i];
    const std::map<std::string_view, std::vector<int>*> lists{{"--heads", &options.heads},
                                                              {"--batch", &options.batches},
                                                              {"--s-q", &options.s_q},
                                                              {"--tokens", &options.tokens},
                                                              {"--pool", &options.pools}};
    if (const auto found = lists.find(name); found != lists.end()) {
      *found->second = parse_list(value);
    } else if (name == "--candidate") {
      options.candidate = value;
    } else if (name == "--case") {
      options.cases = value;
    } else if (name == "--blocks-per-chain") {
      options.blocks_per_chain =
          value == std::string_view("batch") ? 0 : std::max(1, std::atoi(value));
    } else if (name == "--load") {
      options.load_seconds = std::strtod(value, nullptr);
    } else if (name == "--json") {
      options.json = value;
    } else {
      fail(ErrorCode::kInvalidArgument, "unknown option ", name, " ", value);
    }
  }
  return options;
}

/// False where results differ.
bool run(const Options& options) {
  const std::unique_ptr<Device> device = open_cuda_device(0);
  const DeviceSearch search = find_devices(Platform::kCuda);
  const Ops ops = make_ops(search.devices.at(0).capability,
                           options.candidate.empty() ? "" : "attend:" + options.candidate);
  int driver = 0;
  DSV4_CUDA_CHECK(cudaDriverGetVersion(&driver));
  std::printf("%s, candidate %s\n", device->description().c_str(),
              options.candidate.empty() ? "best" : options.candidate.c_str());
  Tables tables(*device, ops, options);
  tables.run("bursts", 0);
  if (options.load_seconds > 0) {
    const Case& heavy = kCases[6];
    Pair(*device, ops, {heavy, KvFormat::kFp8DsMla, 128, 128, 1}, ReductionGrid{}.blocks_per_chain)
        .measure(options.load_seconds / 2);
    tables.run("sustained", kRowLoadSeconds);
  }
  if (!options.json.empty()) {
    const nlohmann::json document{{"device", device->description()},
                                  {"driver_cuda_version", driver},
                                  {"candidate", options.candidate},
                                  {"rows", tables.rows()}};
    std::ofstream(options.json) << document.dump(1) << "\n";
  }
  return tables.agreed();
}

}  // namespace
}  // namespace dsv4::nvidia::bench

int main(int argc, char** argv) {
  using namespace dsv4::nvidia::bench;
  try {
    if (run(parse(argc, argv))) return 0;
    std::fprintf(stderr, "cuda_pair_bench: results differ by more than rounding explains\n");
  } catch (const std::exception& error) {
    std::fprintf(stderr, "cuda_pair_bench: %s\n", error.what());
  }
  return 1;
}
