// Attention kernels on a GPU: decode and prefill at the shapes of the released models, beside
// FlashMLA's times on an H200 and the floor of the hardware.
//
//   cuda_attend_bench [--candidate NAME] [--format fp8_ds_mla|bf16|fp8] [--heads H[,H...]]
//                     [--batch T[,T...]] [--case LETTER...] [--quick] [--load SECONDS]
//                     [--blocks-per-chain N|batch] [--pool N] [--s-q N] [--codes | --raw-queries]
//
// --candidate  forces a kernel of the attend family (sm90, sm80, reference); default: the best one
// --case       of a b c (window; + 512, + 1024 selected rows), d e f g (+ all of 64, 512, 4096,
// 8192
//              entries), p (prefill of 4096 tokens with 0, 512, 1024 selected rows); default: all
// --quick      heads 64, batches 1, 8, 64, 128, cases b d e g p
// --blocks-per-chain  length of a chain in blocks of 64 rows; batch: the one that makes the call
//              fastest, by a model, so that a token's bits depend on the batch (gives up rule 2.2)
// --s-q        tokens of a request in decode, which follow each other (FlashMLA's times: of one)
// --codes      also with inverse_rope behind it, which makes wo_a's codes of the outputs, and as
//              one call that writes them, where there is one
// --raw-queries  also with qnorm_rope_insert in front of it, and as one call that takes queries as
//              wq_b leaves them, where there is one
// --pool       entries that a prefill selects its rows from; default: 8192
// --load       keeps the GPU busy for so long before the first row is timed, and for a second with
//              a row's own calls before it: what is left under the power limit
//
// Method and inputs: cuda_attend_cases.h. floor = max(FLOPs at 790 TFLOP/s, bytes at 4274 GB/s,
// 2.8 us); bytes are rows, q and out, each once.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "backends/nvidia/candidates.h"
#include "backends/nvidia/cuda_device.h"
#include "bench/cuda_attend_cases.h"
#include "cache/kv_format.h"
#include "core/fail.h"
#include "dsv4/backend.h"

namespace dsv4::nvidia::bench {
namespace {

constexpr double kBytesPerUs = 4274e3, kFlopPerUs = 790e6, kLaunchUs = 2.8;

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
  int prefill_pool = kPrefillPool;
  int s_q = 1;
  bool codes = false, raw_queries = false;
  int blocks_per_chain = ReductionGrid{}.blocks_per_chain;  // 0: by the batch
};

/// Of tokens at 100,000 and behind it.
RotatedInput rotation_of(Memory& memory, int64_t tokens) {
  constexpr int kRopeDim = 64;
  std::vector<float> frequencies;
  for (int i = 0; i < kRopeDim; i += 2)
    frequencies.push_back(static_cast<float>(std::pow(10000.0, -i / double{kRopeDim})));
  std::vector<int32_t> positions;
  for (int64_t t = 0; t < tokens; ++t) positions.push_back(static_cast<int32_t>(100000 + t));
  return {{memory.put(frequencies), kRopeDim}, memory.put(positions), kDim};
}

/// The inverse rotation of the outputs of every set to codes, by a call of its own and by attend.
struct RotatedCalls {
  std::vector<InverseRopeParams> after;
  std::vector<AttendParams> codes;

  RotatedCalls(Memory& memory, const std::vector<AttendParams>& calls) {
    const int64_t tokens = calls.front().q.shape[0], heads = calls.front().q.shape[1];
    const RotatedInput rotation = rotation_of(memory, tokens);
    const int64_t stride = row_scale_stride(tokens);
    for (const AttendParams& call : calls) {
      const Tensor out(memory.take(tokens * heads * kDim), DType::kF8E4M3, {tokens, heads, kDim});
      const RowScales scale{
          reinterpret_cast<float*>(memory.take(heads * kDim / 128 * stride * sizeof(float))),
          stride};
      after.push_back({.o = call.out,
                       .rope = rotation.rope,
                       .positions = rotation.positions,
                       .quantise = true,
                       .out = out,
                       .scale = scale});
      codes.push_back(call);
      codes.back().out = out;
      codes.back().scale = scale;
      codes.back().rotation = rotation;
    }
  }
};

/// The norm and rotation of the queries of every set, by a call of its own, with an insert of kv,
/// and by attend.
struct RawCalls {
  std::vector<QnormRopeInsertParams> before;
  std::vector<AttendParams> raw;

  RawCalls(Memory& memory, const std::vector<AttendParams>& calls) {
    constexpr float kEps = 1e-6f;
    const int64_t tokens = calls.front().q.shape[0];
    const RotatedInput rotation = rotation_of(memory, tokens);
    const int64_t* slots = memory.put(std::vector<int64_t>(static_cast<size_t>(tokens), -1));
    for (const AttendParams& call : calls) {
      const Tensor kv(memory.take(tokens * kDim * 2), DType::kBf16, {tokens, kDim});
      Tensor q(const_cast<void*>(call.q.data), call.q.dtype, {tokens, call.q.shape[1], kDim});
      q.strides = call.q.strides;
      before.push_back({.q = q,
                        .kv = kv,
                        .rope = rotation.rope,
                        .eps = kEps,
                        .positions = rotation.positions,
                        .slot_mapping = slots,
                        .window = std::get<RangeRows>(call.window).cache});
      raw.push_back(call);
      raw.back().rotation = rotation;
      raw.back().raw_queries = true;
      raw.back().query_eps = kEps;
    }
  }
};

/// FlashMLA's time over ours; 0 where there is no time of theirs.
double run_case(Device& device, const Ops& ops, const Options& options, const Problem& problem,
                double load_seconds) {
  Memory memory(device);
  const int sets = problem.cold_sets();
  InputSets inputs(memory, problem, sets);
  std::vector<AttendParams> calls;
  for (int i = 0; i < sets; ++i) {
    calls.push_back(inputs.make(i));
    calls.back().grid.blocks_per_chain =
        options.blocks_per_chain > 0 ? options.blocks_per_chain : blocks_by_batch(problem);
  }
  Arena arena = scratch_for(device, memory, ops, calls.front());
  const OpContext context{device.default_stream(), &arena, &ops};
  const Call call = [&](int64_t set) { ops.attend(calls[static_cast<size_t>(set)], context); };
  std::vector<Call> timed{call};
  std::unique_ptr<RotatedCalls> rotated;
  if (options.codes) {
    rotated = std::make_unique<RotatedCalls>(memory, calls);
    timed.push_back([&](int64_t set) {
      call(set);
      ops.inverse_rope(rotated->after[static_cast<size_t>(set)], context);
    });
    if (ops.attend_makes_codes != nullptr && ops.attend_makes_codes(rotated->codes.front())) {
      timed.push_back(
          [&](int64_t set) { ops.attend(rotated->codes[static_cast<size_t>(set)], context); });
    }
  }
  std::unique_ptr<RawCalls> raw;
  if (options.raw_queries) {
    raw = std::make_unique<RawCalls>(memory, calls);
    timed.push_back([&](int64_t set) {
      ops.qnorm_rope_insert(raw->before[static_cast<size_t>(set)], context);
      call(set);
    });
    if (ops.attend_takes_raw_queries != nullptr && ops.attend_takes_raw_queries(raw->raw.front())) {
      timed.push_back(
          [&](int64_t set) { ops.attend(raw->raw[static_cast<size_t>(set)], context); });
    }
  }
  const std::vector<double> times = medians_us(device, sets, load_seconds, timed);
  const double us = times.front();
  const Case& which = problem.which;
  const double flop = problem.flop(), kv_bytes = problem.kv_bytes();
  const double floor =
      std::max({flop / kFlopPerUs, (kv_bytes + 2 * problem.q_bytes()) / kBytesPerUs, kLaunchUs});
  const double theirs = anchor(which, problem.heads, problem.tokens());
  std::printf("%c %5d %4d %5d | %8.2f us %6.0f TFLOP/s %6.0f GB/s %5.1fx floor", which.letter,
              which.entries, problem.heads, problem.tokens(), us, flop / us / 1e6,
              kv_bytes / us / 1e3, us / floor);
  if (theirs > 0) std::printf(" | FlashMLA %6.1f us, %.2fx", theirs, theirs / us);
  if (options.codes) std::printf(" | + inverse_rope %8.2f us", times[1]);
  if (options.raw_queries) std::printf(" | qnorm_rope_insert + %8.2f us", times[1]);
  if (times.size() > 2)
    std::printf(", as %s %8.2f us", options.codes ? "codes" : "raw queries", times[2]);
  std::printf("\n");
  std::fflush(stdout);
  return theirs / us;
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
    if (name == "--codes") {
      options.codes = true;
      continue;
    }
    if (name == "--raw-queries") {
      options.raw_queries = true;
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
    } else if (name == "--pool") {
      options.prefill_pool = parse_list(value).front();
    } else if (name == "--s-q") {
      options.s_q = parse_list(value).front();
    } else if (name == "--load") {
      options.load_seconds = std::strtod(value, nullptr);
    } else if (name == "--format" && parse_kv_format(value)) {
      options.format = *parse_kv_format(value);
    } else {
      fail(ErrorCode::kInvalidArgument, "unknown option ", name, " ", value);
    }
  }
  if (options.codes && options.raw_queries)
    fail(ErrorCode::kInvalidArgument, "--codes or --raw-queries, not both");
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
        Problem problem{which, options.format, heads, count};
        problem.tokens_per_seq = options.s_q;
        if (which.prefill) {
          problem.seqs = 1;
          problem.tokens_per_seq = count;
          problem.pool = options.prefill_pool;
        }
        const double ratio = run_case(*device, ops, options, problem, load);
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
}  // namespace dsv4::nvidia::bench

int main(int argc, char** argv) {
  try {
    dsv4::nvidia::bench::run(argc, argv);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "cuda_attend_bench: %s\n", error.what());
    return 1;
  }
  return 0;
}
