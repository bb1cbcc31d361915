#include "dsv4/single_layer.h"

#include <algorithm>
#include <initializer_list>
#include <string>
#include <vector>

#include "checkpoint/bind.h"
#include "core/fail.h"
#include "core/numbers.h"
#include "engine/resolve.h"
#include "model/place_weights.h"

namespace dsv4 {
namespace {

float load(const void* data, DType dtype, int64_t i) {
  return dtype == DType::kF32 ? static_cast<const float*>(data)[i]
                              : static_cast<float>(static_cast<const Bf16*>(data)[i]);
}

// Row-strided [rows, cols] of f32 or bf16 into a contiguous array of f32 or bf16.
void convert_rows(const ConstTensor& from, void* to, DType to_dtype) {
  for (int64_t row = 0; row < from.shape[0]; ++row) {
    for (int64_t col = 0; col < from.shape[1]; ++col) {
      const float value = load(from.data, from.dtype, row * from.strides[0] + col);
      const int64_t i = row * from.shape[1] + col;
      if (to_dtype == DType::kF32) {
        static_cast<float*>(to)[i] = value;
      } else {
        static_cast<Bf16*>(to)[i] = Bf16(value);
      }
    }
  }
}

}  // namespace

LayerKind layer_kind_of(const ModelConfig& config, const std::string& name) {
  ModelConfig one = config;
  one.num_hidden_layers = 1;
  for (int ratio : {0, 4, 128}) {
    one.compress_ratios = {ratio};
    const LayerKind kind = one.layer_kind(0);
    if (name == kind.name()) return kind;
  }
  fail(ErrorCode::kInvalidArgument, "layer kind \"", name, "\", expected sliding, csa or hca");
}

struct SingleLayer::Impl {
  ModelConfig config;
  ResolvedOptions resolved;
  std::unique_ptr<TensorSource> source;
  std::vector<Buffer> owned;
  AttentionWeights weights;
  std::unique_ptr<DeepseekV4Attention> attention;
  std::unique_ptr<KvCachePool> pool;
  std::unique_ptr<StepPlan> plan;
  Buffer workspace, hidden, out;
  std::vector<std::byte> staging;

  // Tokens of the batch; @throws Error kInvalidArgument when tensors or limits do not fit it.
  int64_t check_step(std::span<const BatchEntry> batch, const ConstTensor& hidden_in,
                     const ConstTensor& out_in, std::initializer_list<DType> dtypes) const;
  // A checked step on memory of the device.
  void run_step(std::span<const BatchEntry> batch, ConstTensor device_hidden, Tensor device_out,
                Stream stream, const ForwardOptions& options);
};

SingleLayer::SingleLayer() : impl_(std::make_unique<Impl>()) {}
SingleLayer::~SingleLayer() = default;

std::unique_ptr<SingleLayer> SingleLayer::create(const ModelConfig& config, const LayerKind& kind,
                                                 std::unique_ptr<TensorSource> source,
                                                 const std::string& prefix,
                                                 const EngineOptions& options) {
  std::unique_ptr<SingleLayer> layer(new SingleLayer());
  Impl& impl = *layer->impl_;
  impl.config = config;
  impl.config.num_hidden_layers = 1;
  impl.config.compress_ratios = {kind.compress_ratio};
  impl.resolved = resolve_options(impl.config, options);
  const EngineOptions& resolved = impl.resolved.options;
  Device& device = *impl.resolved.device;
  impl.source = std::move(source);
  impl.weights =
      place_weights(bind_attention(*impl.source, impl.config, kind, prefix), device, impl.owned);
  impl.attention = create_attention(*impl.resolved.descriptor, {.config = &impl.config,
                                                                .kind = kind,
                                                                .name = prefix,
                                                                .weights = &impl.weights,
                                                                .numerics = resolved.numerics,
                                                                .tensor_parallel = {},
                                                                .device = &device,
                                                                .names = nullptr});
  impl.attention->prepare_for(resolved.limits);
  const std::span<const CacheSpec> specs = impl.attention->cache_specs();
  impl.pool = std::make_unique<KvCachePool>(
      std::vector<std::vector<CacheSpec>>{{specs.begin(), specs.end()}}, impl.resolved.pool,
      device);
  impl.plan = std::make_unique<StepPlan>(impl.config, resolved.limits, impl.resolved.pool, device);
  impl.workspace = device.allocate(impl.attention->workspace_bytes(resolved.limits));
  const int64_t row_bytes = config.hidden_size * size_of(resolved.numerics.activation);
  impl.hidden = device.allocate(resolved.limits.max_tokens * row_bytes);
  impl.out = device.allocate(resolved.limits.max_tokens * row_bytes);
  impl.staging.resize(static_cast<size_t>(resolved.limits.max_tokens * row_bytes));
  return layer;
}

const ModelConfig& SingleLayer::config() const {
  return impl_->config;
}
const EngineOptions& SingleLayer::options() const {
  return impl_->resolved.options;
}
const LayerKind& SingleLayer::kind() const {
  return impl_->attention->kind();
}
Device& SingleLayer::device() {
  return *impl_->resolved.device;
}
KvCachePool& SingleLayer::pool() {
  return *impl_->pool;
}
int64_t SingleLayer::workspace_bytes() const {
  return impl_->workspace.bytes();
}

std::string SingleLayer::description() const {
  const EngineOptions& options = impl_->resolved.options;
  return concat(impl_->resolved.device->description(), "; ", impl_->resolved.descriptor->name, ", ",
                options.numerics.str(), ", ", kv_format_name(options.numerics.kv), " cache");
}

int64_t SingleLayer::Impl::check_step(std::span<const BatchEntry> batch,
                                      const ConstTensor& hidden_in, const ConstTensor& out_in,
                                      std::initializer_list<DType> dtypes) const {
  int64_t tokens = 0;
  for (const BatchEntry& entry : batch) tokens += entry.num_tokens;
  for (const auto& [what, given] :
       {std::pair<const char*, ConstTensor>{"hidden", hidden_in}, {"out", out_in}}) {
    const bool type_ok = std::find(dtypes.begin(), dtypes.end(), given.dtype) != dtypes.end();
    if (type_ok && given.rank == 2 && given.shape[0] == tokens &&
        given.shape[1] == config.hidden_size && given.strides[1] == 1) {
      continue;
    }
    std::string types;
    for (DType dtype : dtypes) types += concat(types.empty() ? "" : " or ", dtype_name(dtype));
    fail(ErrorCode::kInvalidArgument, what, " is ", describe(given), ", expected [", tokens, ", ",
         config.hidden_size, "] ", types, " with contiguous rows");
  }
  const StepLimits& limits = resolved.options.limits;
  if (tokens > limits.max_tokens) {
    fail(ErrorCode::kInvalidArgument, "a step of ", tokens, " tokens, the limit is ",
         limits.max_tokens);
  }
  return tokens;
}

void SingleLayer::Impl::run_step(std::span<const BatchEntry> batch, ConstTensor device_hidden,
                                 Tensor device_out, Stream stream, const ForwardOptions& options) {
  pool->reserve_step(batch);
  plan->update(batch, *pool, stream);
  attention->forward(*plan, pool->caches(0), device_hidden, device_out,
                     {workspace.data(), workspace.bytes()}, stream, options);
  for (const BatchEntry& entry : batch) pool->advance(entry.sequence, entry.num_tokens);
}

void SingleLayer::forward(std::span<const BatchEntry> batch, ConstTensor hidden, Tensor out,
                          const ForwardOptions& options) {
  Impl& impl = *impl_;
  Device& device = *impl.resolved.device;
  const Stream stream = device.default_stream();
  const int64_t tokens = impl.check_step(batch, hidden, out, {DType::kF32, DType::kBf16});
  const DType act = impl.resolved.options.numerics.activation;
  const int64_t bytes = tokens * impl.config.hidden_size * size_of(act);
  convert_rows(hidden, impl.staging.data(), act);
  device.copy_to_device(impl.hidden.data(), impl.staging.data(), bytes, stream);
  impl.run_step(batch, ConstTensor(impl.hidden.data(), act, {tokens, impl.config.hidden_size}),
                Tensor(impl.out.data(), act, {tokens, impl.config.hidden_size}), stream, options);
  device.copy_to_host(impl.staging.data(), impl.out.data(), bytes, stream);
  device.synchronize(stream);
  for (int64_t row = 0; row < tokens; ++row) {
    const ConstTensor from(impl.staging.data() + row * impl.config.hidden_size * size_of(act), act,
                           {1, impl.config.hidden_size});
    convert_rows(from, static_cast<char*>(out.data) + row * out.strides[0] * size_of(out.dtype),
                 out.dtype);
  }
}

void SingleLayer::forward_on_device(std::span<const BatchEntry> batch, ConstTensor hidden,
                                    Tensor out, Stream stream, const ForwardOptions& options) {
  Impl& impl = *impl_;
  const DType act = impl.resolved.options.numerics.activation;
  impl.check_step(batch, hidden, out, {act});
  for (const auto& [what, given] :
       {std::pair<const char*, ConstTensor>{"hidden", hidden}, {"out", out}}) {
    if (!given.is_contiguous()) {
      fail(ErrorCode::kInvalidArgument, what, " is ", describe(given), " with a row stride of ",
           given.strides[0], ", expected contiguous rows");
    }
  }
  impl.run_step(batch, hidden, out, stream, options);
}

}  // namespace dsv4
