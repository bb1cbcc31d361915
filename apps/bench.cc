#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <map>
#include <mutex>
#include <nlohmann/json.hpp>
#include <thread>

#include "cache/kv_format.h"
#include "command_line.h"
#include "core/checked_math.h"
#include "core/fail.h"
#include "core/numbers.h"
#include "dsv4/single_layer.h"

namespace dsv4::cli {
namespace {

// Of a case, and tokens that they decode beyond its context.
constexpr int kMaxRepeats = 64, kMaxAttempts = 4, kMaxTokens = kMaxRepeats * kMaxAttempts;

struct Options {
  CommonOptions common;
  std::string config = "configs/v4-flash.json";
  std::vector<std::string> kinds{"sliding", "csa", "hca"};
  std::vector<int64_t> contexts{1024, 8192, 65536, 524288, 1048576};
  std::vector<int> batches{1};
  int prefill = 2048;
  std::string index_cache = "auto";
  double seconds = 1.0;

  /// Engine options for `limits`, with the chosen format of the indexer's keys.
  EngineOptions engine_options(const StepLimits& limits) const {
    EngineOptions out = common.engine_options(limits);
    if (index_cache == "fp8") out.numerics.index = KvFormat::kIndexFp8;
    if (index_cache == "mxfp4") out.numerics.index = KvFormat::kIndexMxfp4;
    return out;
  }
};

double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// Sums the time of each named step.
class StepTimes final : public StepObserver {
 public:
  void begin(std::string_view) override { begin_ = now(); }
  void end(std::string_view step) override { seconds_[std::string(step)] += now() - begin_; }
  std::map<std::string, double> take() { return std::exchange(seconds_, {}); }

 private:
  double begin_ = 0;
  std::map<std::string, double> seconds_;
};

// What one step must read, write and compute at least.
struct Work {
  double bytes = 0;
  double flops = 0;
};

double row_bytes(const CacheSpec& spec) {
  return static_cast<double>(page_bytes(spec.format, 1024, spec.row_elems)) / 1024;
}

// `tokens` new tokens in each of `batch` sequences after `context - tokens` others.
Work work_of(const ModelConfig& config, const LayerKind& kind, const Numerics& numerics,
             int64_t context, int64_t tokens, int64_t batch) {
  Work out;
  const int64_t all_tokens = tokens * batch;
  for (const ExpectedTensor& tensor : expected_attention_tensors(config, kind, "")) {
    out.bytes += static_cast<double>(tensor.num_bytes());
    if (tensor.shape.size() == 2 && tensor.dtype != DType::kF8E8M0 &&
        tensor.name.find("ape") == std::string::npos) {
      out.flops += 2.0 * static_cast<double>(tensor.shape[0] * tensor.shape[1] * all_tokens);
    }
  }
  const std::vector<CacheSpec> specs = attention_cache_specs(config, kind, numerics);
  const auto role_bytes = [&](CacheRole role) {
    for (const CacheSpec& spec : specs) {
      if (spec.role == role) return row_bytes(spec);
    }
    return 0.0;
  };
  double window_rows = 0, entry_rows = 0, scored = 0;
  for (int64_t t = context - tokens; t < context; ++t) {
    window_rows += static_cast<double>(std::min<int64_t>(t + 1, config.sliding_window));
    if (kind.compress_ratio == 0) continue;
    const int64_t visible = (t + 1) / kind.compress_ratio;
    entry_rows +=
        static_cast<double>(kind.indexer ? std::min<int64_t>(visible, config.index_topk) : visible);
    if (kind.indexer && context / kind.compress_ratio > config.index_topk)
      scored += static_cast<double>(visible);
  }
  const double rows = (window_rows + entry_rows) * static_cast<double>(batch);
  out.flops += rows * config.num_heads * 4.0 * config.head_dim;
  out.flops +=
      scored * static_cast<double>(batch) * 2.0 * config.index_n_heads * config.index_head_dim;
  // Each cached row once a sequence; of a selected list every row once a token, at most all
  // entries.
  const double entries =
      kind.compress_ratio == 0 ? 0 : static_cast<double>(context / kind.compress_ratio);
  out.bytes += static_cast<double>(batch) *
               std::min<double>(static_cast<double>(context),
                                static_cast<double>(tokens + config.sliding_window)) *
               role_bytes(CacheRole::kWindow);
  out.bytes += static_cast<double>(batch) * std::min(entries, entry_rows) *
               role_bytes(CacheRole::kCompressed);
  if (scored > 0) out.bytes += static_cast<double>(batch) * entries * role_bytes(CacheRole::kIndex);
  const double activations =
      static_cast<double>(all_tokens * size_of(numerics.activation)) *
      (2.0 * static_cast<double>(config.hidden_size) + 2.0 * config.num_heads * config.head_dim);
  out.bytes += activations;
  return out;
}

// Deterministic values of unit size, for caches that no real text filled.
class Values {
 public:
  explicit Values(uint64_t seed) : state_(seed * 2654435761u + 1) {}
  float next() {
    state_ = state_ * 6364136223846793005u + 1442695040888963407u;
    return static_cast<float>(static_cast<int32_t>(state_ >> 33) - (1 << 30)) * 0x1p-30f;
  }

 private:
  uint64_t state_;
};

// Brings `sequence` to `context` tokens without computing them: rows of random values in every
// cache.
void fill(SingleLayer& layer, SequenceId sequence, int64_t context) {
  KvCachePool& pool = layer.pool();
  const LayerCaches caches = pool.caches(0);
  const int64_t step = layer.options().limits.max_tokens;
  while (pool.length(sequence) < context) {
    const int64_t count = std::min(step, context - pool.length(sequence));
    if (!pool.reserve(sequence, count))
      fail(ErrorCode::kOutOfMemory, "bench: no room for ", context, " tokens");
    pool.advance(sequence, count);
  }
  Device& device = layer.device();
  const Stream stream = device.default_stream();
  std::mutex copying;  // pages are encoded on all threads, copied one by one
  // `blocks` are the physical blocks of the first `rows` rows.
  const auto fill_rows = [&](const CacheView& cache, int64_t rows,
                             std::span<const int32_t> blocks) {
    if (!cache || rows == 0) return;
    const int threads = std::max(1, layer.options().threads);
    std::vector<std::thread> workers;
    for (int worker = 0; worker < threads; ++worker) {
      workers.emplace_back([&, worker] {
        std::vector<float> row(static_cast<size_t>(cache.row_elems));
        std::vector<std::byte> page(
            static_cast<size_t>(page_bytes(cache.format, cache.rows_per_block, cache.row_elems)));
        CacheView one = cache;
        one.base = page.data();
        one.num_blocks = 1;
        const int64_t count = (rows + cache.rows_per_block - 1) / cache.rows_per_block;
        for (int64_t b = worker; b < count; b += threads) {
          const int64_t begin = b * cache.rows_per_block;
          for (int64_t r = begin; r < std::min<int64_t>(rows, begin + cache.rows_per_block); ++r) {
            Values values(static_cast<uint64_t>(r) + 7);
            for (float& value : row) value = values.next();
            encode_row(one, r - begin, row.data());
          }
          const std::lock_guard<std::mutex> lock(copying);
          device.copy_to_device(
              cache.base + blocks[static_cast<size_t>(b)] * cache.block_stride_bytes, page.data(),
              static_cast<int64_t>(page.size()), stream);
          device.synchronize(stream);
        }
      });
    }
    for (std::thread& worker : workers) worker.join();
  };
  const auto window = pool.window_blocks(sequence);
  fill_rows(caches.window, context - window.first_token, window.blocks);
  const int ratio = layer.kind().compress_ratio;
  for (const CacheView& cache : {caches.compressed, caches.index}) {
    fill_rows(cache, ratio == 0 ? 0 : context / ratio, pool.growing_blocks(sequence));
  }
  for (const StateView& state : {caches.state, caches.index_state}) {
    if (!state) continue;
    Values values(11);
    std::vector<float> ring(static_cast<size_t>(int64_t{state.ring_rows} * state.row_elems));
    for (float& value : ring) value = values.next();
    device.copy_to_device(state.base + pool.state_slot(sequence) * state.slot_stride_elems,
                          ring.data(), static_cast<int64_t>(ring.size() * sizeof(float)), stream);
    device.synchronize(stream);
  }
}

struct Result {
  std::string kind, what;
  int64_t context = 0, batch = 1, tokens = 1;
  double median = 0, p10 = 0, p90 = 0, floor = 0;
  Work work;
  DeviceLimits limits;
  std::map<std::string, double> steps;
};

Result measure(const Options& options, const ModelConfig& config, const std::string& kind_name,
               int64_t context, int64_t tokens, int64_t batch) {
  const LayerKind kind = layer_kind_of(config, kind_name);
  const int64_t fill_chunk = std::min<int64_t>(4096, context);
  EngineOptions engine_options = options.engine_options(
      {static_cast<int>(std::max(tokens * batch, tokens == 1 ? batch : fill_chunk)),
       static_cast<int>(batch), context + kMaxTokens + 1});
  if (tokens == 1)
    engine_options.limits.max_tokens = static_cast<int>(std::max<int64_t>(batch, 256));
  engine_options.total_tokens = batch * (context + kMaxTokens + 256);
  const FormulaStorage storage = engine_options.numerics.quantise_linear_input
                                     ? FormulaStorage::kReleased
                                     : FormulaStorage::kBf16Values;
  const std::string prefix = concat(kind.name(), ".");
  const auto layer = SingleLayer::create(
      config, kind, formula_source(expected_attention_tensors(config, kind, prefix), 1, storage),
      prefix, engine_options);
  std::vector<SequenceId> sequences;
  for (int64_t b = 0; b < batch; ++b) {
    sequences.push_back(layer->pool().create().value());
    fill(*layer, sequences.back(), context - tokens);
  }
  const int64_t all_tokens = tokens * batch;
  std::vector<uint16_t> hidden(static_cast<size_t>(all_tokens * config.hidden_size));
  std::vector<uint16_t> out(hidden.size());
  Values values(3);
  for (uint16_t& value : hidden) value = f32_to_bf16(values.next());
  StepTimes steps;
  const ForwardOptions forward{nullptr, &steps};
  const auto once = [&] {
    std::vector<BatchEntry> entries;
    for (SequenceId sequence : sequences)
      entries.push_back({sequence, static_cast<int32_t>(tokens)});
    const double begin = now();
    layer->forward(entries,
                   ConstTensor(hidden.data(), DType::kBf16, {all_tokens, config.hidden_size}),
                   Tensor(out.data(), DType::kBf16, {all_tokens, config.hidden_size}), forward);
    return now() - begin;
  };
  // Later steps have a token more of context each; a prefill starts anew instead.
  const auto rewind = [&] {
    if (tokens == 1) return;
    for (SequenceId& sequence : sequences) {
      layer->pool().release(sequence);
      sequence = layer->pool().create().value();
      fill(*layer, sequence, context - tokens);
    }
  };
  Result result;
  result.kind = kind_name;
  result.what = tokens == 1 ? "decode" : "prefill";
  result.context = context;
  result.batch = batch;
  result.tokens = tokens;
  result.work = work_of(config, kind, layer->options().numerics, context, tokens, batch);
  std::vector<double> times;
  std::vector<std::map<std::string, double>> breakdown;
  // The machine may be shared, and be another one in a second: limits are measured before and
  // after, the better ones count, and where they lie apart the case is repeated.
  for (int attempt = 1; attempt <= kMaxAttempts; ++attempt) {
    const DeviceLimits before = layer->device().measure_limits();
    once();
    rewind();
    steps.take();
    times.clear();
    breakdown.clear();
    const double begin = now();
    while (static_cast<int>(times.size()) < kMaxRepeats - 1 &&
           (times.size() < 5 || now() - begin < options.seconds)) {
      times.push_back(once());
      breakdown.push_back(steps.take());
      rewind();
    }
    const DeviceLimits after = layer->device().measure_limits();
    bool alike = true;
    for (const auto limit :
         {&DeviceLimits::read_bytes_per_second, &DeviceLimits::f32_flops_per_second,
          &DeviceLimits::bf16_flops_per_second}) {
      const double worse = std::min(before.*limit, after.*limit);
      const double better = std::max(before.*limit, after.*limit);
      result.limits.*limit = better;
      alike = alike && worse >= 0.85 * better;
    }
    if (alike) break;
  }
  std::vector<double> sorted = times;
  std::sort(sorted.begin(), sorted.end());
  const auto quantile = [&](double q) {
    return sorted[static_cast<size_t>(q * static_cast<double>(sorted.size() - 1))];
  };
  result.median = quantile(0.5);
  result.p10 = quantile(0.1);
  result.p90 = quantile(0.9);
  for (const auto& one : breakdown) {
    for (const auto& [name, seconds] : one)
      result.steps[name] += seconds / static_cast<double>(breakdown.size());
  }
  result.floor = std::max(result.work.bytes / result.limits.read_bytes_per_second,
                          result.work.flops / result.limits.peak_flops_per_second());
  return result;
}

void print(const Result& result) {
  const double us = 1e6;
  std::printf("%-8s %-8s %8lld %5lld %10.0f %9.0f..%-9.0f %7.1f %7.1f %6.0f%% %6.0f%% %6.2fx ",
              result.kind.c_str(), result.what.c_str(), static_cast<long long>(result.context),
              static_cast<long long>(result.batch), result.median * us, result.p10 * us,
              result.p90 * us, result.work.bytes / result.median / 1e9,
              result.work.flops / result.median / 1e9,
              100 * result.work.bytes / result.median / result.limits.read_bytes_per_second,
              100 * result.work.flops / result.median / result.limits.peak_flops_per_second(),
              result.median / result.floor);
  for (const auto& [name, seconds] : result.steps)
    std::printf(" %s=%.0f", name.c_str(), seconds * us);
  std::printf("\n");
  std::fflush(stdout);
}

nlohmann::json to_json(const Result& result) {
  nlohmann::json out{{"kind", result.kind},
                     {"what", result.what},
                     {"context", result.context},
                     {"batch", result.batch},
                     {"tokens", result.tokens},
                     {"seconds_median", result.median},
                     {"seconds_p10", result.p10},
                     {"seconds_p90", result.p90},
                     {"bytes", result.work.bytes},
                     {"flops", result.work.flops},
                     {"floor_seconds", result.floor},
                     {"read_bytes_per_second", result.limits.read_bytes_per_second},
                     {"peak_flops_per_second", result.limits.peak_flops_per_second()}};
  for (const auto& [name, seconds] : result.steps) out["steps_seconds"][name] = seconds;
  return out;
}

int run(Options& options) {
  const ModelConfig config = ModelConfig::load(options.config);
  for (const std::string& kind : options.kinds) layer_kind_of(config, kind);
  for (int64_t context : options.contexts) {
    if (context < 2 || context > INT32_MAX - kMaxTokens) {
      fail(ErrorCode::kInvalidArgument, "--contexts ", context, ", expected 2 to ",
           INT32_MAX - kMaxTokens);
    }
  }
  for (int batch : options.batches) {
    if (batch < 1) fail(ErrorCode::kInvalidArgument, "--batches ", batch, ", expected 1 or more");
  }
  if (options.prefill < 0) {
    fail(ErrorCode::kInvalidArgument, "--prefill ", options.prefill, ", expected 0 or more");
  }
  if (!std::isfinite(options.seconds) || options.seconds < 0) {
    fail(ErrorCode::kInvalidArgument, "--seconds ", options.seconds, ", expected 0 or more");
  }
  // Decoding past the model's longest context by the repeats of the measurement is fine here.
  ModelConfig roomy = config;
  roomy.max_position_embeddings =
      std::max<int64_t>(roomy.max_position_embeddings, int64_t{1} << 21);
  nlohmann::json results = nlohmann::json::array();
  if (!options.common.json) {
    std::printf("%-8s %-8s %8s %5s %10s %20s %7s %7s %7s %7s %7s  us by step\n", "kind", "what",
                "context", "batch", "us median", "p10..p90", "GB/s", "GFLOP/s", "of read",
                "of peak", "floor");
  }
  const auto report = [&](const Result& result) {
    if (options.common.json) {
      results.push_back(to_json(result));
    } else {
      print(result);
    }
  };
  DeviceLimits last;
  for (const std::string& kind : options.kinds) {
    for (int64_t context : options.contexts) {
      for (int batch : options.batches) {
        const Result result = measure(options, roomy, kind, context, 1, batch);
        last = result.limits;
        report(result);
      }
    }
    if (options.prefill > 0) {
      const Result result = measure(options, roomy, kind, options.prefill, options.prefill, 1);
      last = result.limits;
      report(result);
    }
  }
  if (options.common.json) {
    print_json(results);
  } else {
    std::printf(
        "limits measured in the last case: read %.1f GB/s, f32 %.0f GFLOP/s, bf16 %.0f GFLOP/s\n",
        last.read_bytes_per_second / 1e9, last.f32_flops_per_second / 1e9,
        last.bf16_flops_per_second / 1e9);
  }
  return 0;
}

}  // namespace

Command add_bench(CLI::App& app) {
  CLI::App* command =
      app.add_subcommand("bench", "Benchmarks on this machine, against its own measured limits");
  command->require_subcommand(1);
  auto options = std::make_shared<Options>();
  CLI::App* attention = command->add_subcommand(
      "attention",
      "One attention layer: decode of one token at several contexts (caches filled with random "
      "rows), and "
      "prefill. Prints time, bytes, GB/s, GFLOP/s, the shares of the machine's read bandwidth and "
      "peak "
      "rate measured in the same run, and time over max(bytes / bandwidth, FLOPs / peak)");
  add_common_options(*attention, options->common, ModelOption::kNone);
  attention->add_option("--config", options->config, "config.json whose geometry is used")
      ->capture_default_str();
  attention->add_option("--kinds", options->kinds, "Layer kinds: sliding, csa, hca")
      ->capture_default_str()
      ->delimiter(',');
  check_number<int64_t>(
      attention->add_option("--contexts", options->contexts, "Contexts of decode"))
      ->capture_default_str()
      ->delimiter(',');
  check_number<int>(
      attention->add_option("--batches", options->batches, "Sequences decoded at once"))
      ->capture_default_str()
      ->delimiter(',');
  check_number<int>(
      attention->add_option("--prefill", options->prefill, "Tokens of the prefill; 0: none"))
      ->capture_default_str();
  attention
      ->add_option("--index-cache", options->index_cache,
                   "Keys of the indexer: auto (as --numerics says), fp8, mxfp4")
      ->capture_default_str()
      ->check(CLI::IsMember({"auto", "fp8", "mxfp4"}));
  check_number<double>(attention->add_option("--seconds", options->seconds, "Time per case"))
      ->capture_default_str();
  attention->footer(
      "Example:\n"
      "  dsv4 bench attention --config configs/v4-flash.json --kinds csa --contexts 1024,8192 "
      "--prefill 0");
  return {command, [options] { return run(*options); }};
}

}  // namespace dsv4::cli
