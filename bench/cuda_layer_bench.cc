// One attention layer's decode step on an NVIDIA GPU, as a CUDA graph: time of every named step and
// in total, against the floor (all weight, cache and activation bytes once, or the matrix rate).
//
//   cuda_layer_bench [--config configs/v4-flash.json] [--kinds sliding,csa,hca]
//                    [--contexts 8192,131072] [--batches 1,16,64,128] [--backend NAME]
//                    [--products f32|fp8] [--entries-end] [--layers N] [--json FILE]
//
// Sequence b of a batch is at position context - 2 - b, as sequences of a server are: one of four
// ends an entry of a CSA layer, one of 128 of an HCA layer. With --entries-end all are at context
// - 1 and end one: the dearest step.
//
// Three layers with weights and caches of their own take turns, so that inputs are cold. Totals
// come from a graph of --layers of them, one behind the other as in a model's step, without timers:
// the start of a graph, 5 to 8 us more, is part of the first. Step times come from a second graph,
// of three layers, with an event at every border (each costs a little, so steps add up to more than
// the total).
#include <cuda_runtime_api.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cstdio>
#include <fstream>
#include <map>
#include <nlohmann/json.hpp>

#include "attention/layer.h"
#include "cache/kv_format.h"
#include "checkpoint/bind.h"
#include "core/fail.h"
#include "core/numbers.h"
#include "dsv4/backend.h"
#include "dsv4/checkpoint.h"
#include "dsv4/single_layer.h"
#include "model/place_weights.h"

namespace dsv4 {
namespace {

// Ceilings of an H200 that shares are given of: a large device-to-device copy (bytes read and
// written), and a bf16 matrix product of 8192^3.
constexpr double kCopyBytesPerSecond = 4274e9;
constexpr double kMatrixFlopsPerSecond = 790e12;
constexpr int kSets = 3;  // of weights and caches: 3 x 110 MB, five times the L2
constexpr int kRepeats = 15;

void check(cudaError_t code) {
  if (code != cudaSuccess) fail(ErrorCode::kDeviceError, cudaGetErrorString(code));
}

// Events at the borders of steps, recorded as nodes of a graph.
class StepEvents final : public StepObserver {
 public:
  explicit StepEvents(cudaStream_t stream) : stream_(stream) {}
  void begin(std::string_view step) override { mark(std::string(step)); }
  void end(std::string_view) override { mark(""); }
  /// Microseconds by step of one replay, all layers together.
  std::map<std::string, double> times() const {
    std::map<std::string, double> out;
    for (size_t i = 0; i + 1 < marks_.size(); ++i) {
      if (marks_[i].step.empty()) continue;
      float milliseconds = 0;
      check(cudaEventElapsedTime(&milliseconds, marks_[i].event, marks_[i + 1].event));
      out[marks_[i].step] += 1e3 * milliseconds;
    }
    return out;
  }

 private:
  struct Mark {
    std::string step;
    cudaEvent_t event;
  };
  void mark(std::string step) {
    cudaEvent_t event;
    check(cudaEventCreate(&event));
    check(cudaEventRecordWithFlags(event, stream_, cudaEventRecordExternal));
    marks_.push_back({std::move(step), event});
  }
  cudaStream_t stream_;
  std::vector<Mark> marks_;
};

struct Options {
  std::string config = "configs/v4-flash.json", backend = "FLASHMLA_SPARSE_DSV4", products = "f32",
              json;
  std::vector<std::string> kinds{"sliding", "csa", "hca"};
  std::vector<int64_t> contexts{8192, 131072};
  std::vector<int> batches{1, 16, 64, 128};
  bool entries_end = false;
  int layers = 12;
};

// Weights of a layer by formula, made once for all its batches.
struct BenchWeights {
  BenchWeights(const ModelConfig& config, const LayerKind& kind, Device& device, uint64_t seed)
      : source(formula_source(expected_attention_tensors(config, kind, "bench."), seed,
                              FormulaStorage::kReleased)),
        weights(place_weights(bind_attention(*source, config, kind, "bench."), device, owned)) {}
  std::unique_ptr<TensorSource> source;
  std::vector<Buffer> owned;
  AttentionWeights weights;
};

// One layer, its caches filled to `context` tokens of each of `batch` sequences.
class BenchLayer {
 public:
  BenchLayer(const ModelConfig& config, const LayerKind& kind, const AttentionDescriptor& backend,
             Device& device, int64_t context, int batch, bool entries_end, Products products,
             const AttentionWeights& weights, uint64_t seed)
      : config_(config), device_(device), weights_(weights) {
    Numerics numerics = kServing;
    numerics.kv = backend.native_format;
    numerics.products = products;
    layer_ = create_attention(backend, {.config = &config_,
                                        .kind = kind,
                                        .name = "bench",
                                        .weights = &weights_,
                                        .numerics = numerics,
                                        .tensor_parallel = {},
                                        .device = &device,
                                        .names = nullptr});
    const StepLimits limits{std::max(batch, 256), batch, context + 1};
    layer_->prepare_for(limits);
    const PoolLimits pool_limits{.total_tokens = batch * (context + 257),
                                 .max_seqs = batch,
                                 .max_step_tokens = limits.max_tokens};
    const auto specs = layer_->cache_specs();
    pool_ = std::make_unique<KvCachePool>(
        std::vector<std::vector<CacheSpec>>{{specs.begin(), specs.end()}}, pool_limits, device);
    plan_ = std::make_unique<StepPlan>(config_, limits, pool_limits, device);
    workspace_ = device.allocate(layer_->workspace_bytes(limits));
    const int64_t row_bytes = config_.hidden_size * int64_t{sizeof(Bf16)};
    hidden_ = device.allocate(batch * row_bytes);
    out_ = device.allocate(batch * row_bytes);
    std::vector<uint16_t> hidden(static_cast<size_t>(batch * config_.hidden_size));
    const uint64_t key = formula_key("x", seed);
    for (size_t i = 0; i < hidden.size(); ++i)
      hidden[i] = f32_to_bf16(static_cast<float>(1.75 * formula_uniform(key, i)));
    device.copy_to_device(hidden_.data(), hidden.data(), batch * row_bytes,
                          device.default_stream());
    device.synchronize(device.default_stream());
    fill_caches();
    for (int b = 0; b < batch; ++b) {
      const SequenceId sequence = pool_->create().value();
      const int64_t position = entries_end ? context - 1 : context - 2 - b;
      for (int64_t done = 0; done < position;) {
        const int64_t count = std::min<int64_t>(limits.max_tokens / 2, position - done);
        if (!pool_->reserve(sequence, count)) fail(ErrorCode::kOutOfMemory, "bench: no room");
        pool_->advance(sequence, count);
        done += count;
      }
      if (!pool_->reserve(sequence, 1)) fail(ErrorCode::kOutOfMemory, "bench: no room");
      batch_.push_back({sequence, 1});
    }
    plan_->update(batch_, *pool_, device.default_stream(), 0, true);
    device.synchronize(device.default_stream());
  }

  void forward(const ForwardOptions& options) {
    const auto tokens = static_cast<int64_t>(batch_.size());
    layer_->forward(*plan_, pool_->caches(0),
                    ConstTensor(hidden_.data(), DType::kBf16, {tokens, config_.hidden_size}),
                    Tensor(out_.data(), DType::kBf16, {tokens, config_.hidden_size}),
                    {workspace_.data(), workspace_.bytes()}, device_.default_stream(), options);
  }

 private:
  // One page of random rows, copied to every block of every cache.
  void fill_caches() {
    const LayerCaches caches = pool_->caches(0);
    const Stream stream = device_.default_stream();
    uint64_t state = 99;
    const auto value = [&] {
      state = state * 6364136223846793005u + 1442695040888963407u;
      return static_cast<float>(static_cast<int32_t>(state >> 33) - (1 << 30)) * 0x1p-30f;
    };
    for (const CacheView& cache : {caches.window, caches.compressed, caches.index}) {
      if (!cache) continue;
      const int64_t bytes = page_bytes(cache.format, cache.rows_per_block, cache.row_elems);
      std::vector<std::byte> page(static_cast<size_t>(bytes));
      CacheView one = cache;
      one.base = page.data();
      std::vector<float> row(static_cast<size_t>(cache.row_elems));
      for (int r = 0; r < cache.rows_per_block; ++r) {
        for (float& x : row) x = value();
        encode_row(one, r, row.data());
      }
      for (int32_t b = 0; b < cache.num_blocks; ++b) {
        device_.copy_to_device(cache.base + b * cache.block_stride_bytes, page.data(), bytes,
                               stream);
      }
      device_.synchronize(stream);
    }
    for (const StateView& ring : {caches.state, caches.index_state}) {
      if (!ring) continue;
      std::vector<float> rows(static_cast<size_t>(int64_t{ring.ring_rows} * ring.row_elems));
      for (float& x : rows) x = value();
      for (int32_t slot = 0; slot < ring.num_slots; ++slot) {
        device_.copy_to_device(ring.base + slot * ring.slot_stride_elems, rows.data(),
                               static_cast<int64_t>(rows.size() * sizeof(float)), stream);
      }
      device_.synchronize(stream);
    }
  }

  ModelConfig config_;
  Device& device_;
  AttentionWeights weights_;
  std::unique_ptr<DeepseekV4Attention> layer_;
  std::unique_ptr<KvCachePool> pool_;
  std::unique_ptr<StepPlan> plan_;
  Buffer workspace_, hidden_, out_;
  std::vector<BatchEntry> batch_;
};

// Least time of one decode step of `batch` sequences, in seconds.
double floor_seconds(const ModelConfig& config, const LayerKind& kind, KvFormat format,
                     int64_t context, int batch) {
  double bytes = 0, flops = 0;
  for (const ExpectedTensor& tensor : expected_attention_tensors(config, kind, "")) {
    bytes += static_cast<double>(tensor.num_bytes());
    if (tensor.shape.size() == 2 && tensor.dtype != DType::kF8E8M0) {
      flops += 2.0 * static_cast<double>(tensor.shape[0] * tensor.shape[1]) * batch;
    }
  }
  const auto row_bytes = [](KvFormat f, int elems) {
    return static_cast<double>(page_bytes(f, 1024, elems)) / 1024;
  };
  double rows = static_cast<double>(std::min<int64_t>(context, config.sliding_window));
  if (kind.compress_ratio != 0) {
    const auto entries = static_cast<double>(context / kind.compress_ratio);
    rows += kind.indexer ? std::min<double>(entries, config.index_topk) : entries;
    if (kind.indexer && entries > config.index_topk) {
      bytes += batch * entries * (row_bytes(KvFormat::kIndexFp8, config.index_head_dim) + 8);
      flops += batch * entries * 2.0 * config.index_n_heads * config.index_head_dim;
    }
  }
  bytes += batch * rows * row_bytes(format, config.head_dim);
  flops += batch * rows * config.num_heads * 4.0 * config.head_dim;
  bytes +=
      batch * 2.0 *
      (2.0 * static_cast<double>(config.hidden_size) + 4.0 * config.num_heads * config.head_dim +
       2.0 * static_cast<double>(config.o_groups * config.o_lora_rank));
  return std::max(bytes / kCopyBytesPerSecond, flops / kMatrixFlopsPerSecond);
}

double median_us(Device& device, RecordedWork& work, int replays) {
  const auto stream = static_cast<cudaStream_t>(device.default_stream().handle);
  cudaEvent_t begin, end;
  check(cudaEventCreate(&begin));
  check(cudaEventCreate(&end));
  std::vector<double> times;
  for (int r = 0; r < kRepeats; ++r) {
    check(cudaEventRecord(begin, stream));
    for (int i = 0; i < replays; ++i) work.launch(device.default_stream());
    check(cudaEventRecord(end, stream));
    check(cudaEventSynchronize(end));
    float milliseconds = 0;
    check(cudaEventElapsedTime(&milliseconds, begin, end));
    times.push_back(1e3 * milliseconds / replays);
  }
  std::sort(times.begin(), times.end());
  return times[times.size() / 2];
}

int run(const Options& options) {
  const ModelConfig loaded = ModelConfig::load(options.config);
  const auto device = open_device({Platform::kCuda, 0}, 1);
  const AttentionDescriptor* backend = nullptr;
  for (const BackendEntry& entry : backends()) {
    if (entry.descriptor->name == options.backend) backend = entry.descriptor;
  }
  if (backend == nullptr) fail(ErrorCode::kNotFound, "no backend ", options.backend);
  const std::optional<Products> products = parse_products(options.products);
  if (!products) fail(ErrorCode::kInvalidArgument, "--products ", options.products);
  std::printf("%s; %s; %s products\n", device->description().c_str(), options.backend.c_str(),
              options.products.c_str());
  std::printf("%-8s %8s %5s %9s %9s %6s  us by step\n", "kind", "context", "batch", "us", "floor",
              "x");
  nlohmann::json rows = nlohmann::json::array();
  for (const std::string& kind_name : options.kinds) {
    ModelConfig config = loaded;
    const LayerKind kind = layer_kind_of(config, kind_name);
    config.num_hidden_layers = 1;
    config.compress_ratios = {kind.compress_ratio};
    config.max_position_embeddings = std::max<int64_t>(config.max_position_embeddings, 1 << 21);
    std::vector<std::unique_ptr<BenchWeights>> weights;
    for (uint64_t i = 0; i < kSets; ++i)
      weights.push_back(std::make_unique<BenchWeights>(config, kind, *device, i + 1));
    for (int64_t context : options.contexts) {
      for (int batch : options.batches) {
        std::vector<std::unique_ptr<BenchLayer>> layers;
        for (uint64_t i = 0; i < kSets; ++i) {
          layers.push_back(std::make_unique<BenchLayer>(config, kind, *backend, *device, context,
                                                        batch, options.entries_end, *products,
                                                        weights[i]->weights, i + 1));
        }
        const auto run_layers = [&](int count, const ForwardOptions& forward) {
          for (int i = 0; i < count; ++i)
            layers[static_cast<size_t>(i) % layers.size()]->forward(forward);
        };
        const Stream stream = device->default_stream();
        run_layers(kSets, {});
        device->synchronize(stream);
        const auto plain = device->record(stream, [&] { run_layers(options.layers, {}); });
        StepEvents events(static_cast<cudaStream_t>(stream.handle));
        const auto timed = device->record(stream, [&] { run_layers(kSets, {nullptr, &events}); });
        median_us(*device, *plain, 2);  // warm up
        const double total = median_us(*device, *plain, 4) / options.layers;
        std::map<std::string, std::vector<double>> samples;
        for (int r = 0; r < kRepeats; ++r) {
          timed->launch(stream);
          device->synchronize(stream);
          for (const auto& [step, us] : events.times()) samples[step].push_back(us / kSets);
        }
        const double floor =
            1e6 * floor_seconds(config, kind, backend->native_format, context, batch);
        std::printf("%-8s %8lld %5d %9.1f %9.1f %6.2f ", kind_name.c_str(),
                    static_cast<long long>(context), batch, total, floor, total / floor);
        nlohmann::json row{{"kind", kind_name},
                           {"context", context},
                           {"batch", batch},
                           {"us", total},
                           {"floor_us", floor}};
        for (std::string_view step : kAttentionStepNames) {
          auto found = samples.find(std::string(step));
          if (found == samples.end()) continue;
          std::sort(found->second.begin(), found->second.end());
          const double us = found->second[found->second.size() / 2];
          row["steps_us"][found->first] = us;
          std::printf(" %s=%.1f", found->first.c_str(), us);
        }
        std::printf("\n");
        std::fflush(stdout);
        rows.push_back(row);
      }
    }
  }
  if (!options.json.empty()) std::ofstream(options.json) << rows.dump(1) << "\n";
  return 0;
}

}  // namespace
}  // namespace dsv4

int main(int argc, char** argv) {
  CLI::App app("One attention layer's decode step as a CUDA graph, by step and against the floor");
  dsv4::Options options;
  app.add_option("--config", options.config)->capture_default_str();
  app.add_option("--backend", options.backend)->capture_default_str();
  app.add_option("--kinds", options.kinds)->delimiter(',')->capture_default_str();
  app.add_option("--contexts", options.contexts)->delimiter(',')->capture_default_str();
  app.add_option("--batches", options.batches)->delimiter(',')->capture_default_str();
  app.add_flag("--entries-end", options.entries_end, "Every sequence ends a compressed entry");
  app.add_option("--products", options.products, "f32 or fp8: Numerics::products")
      ->capture_default_str();
  app.add_option("--layers", options.layers, "Layers of a graph")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  app.add_option("--json", options.json, "File to write the rows to");
  CLI11_PARSE(app, argc, argv);
  try {
    return dsv4::run(options);
  } catch (const dsv4::Error& error) {
    std::fprintf(stderr, "cuda_layer_bench: %s\n", error.what());
    return 1;
  }
}
