#include "engine/resolve.h"

#include <algorithm>

#include "core/fail.h"

namespace dsv4 {

ResolvedOptions resolve_options(const ModelConfig& config, const EngineOptions& given) {
  ResolvedOptions out;
  out.options = given;
  EngineOptions& options = out.options;
  if (options.limits.max_tokens < 1 || options.limits.max_seqs < 1 ||
      options.limits.max_context < 1) {
    fail(ErrorCode::kInvalidArgument, "limits of ", options.limits.max_tokens, " tokens a step, ",
         options.limits.max_seqs, " sequences and ", options.limits.max_context,
         " tokens of context: each must be at least 1");
  }
  if (options.limits.max_context > config.max_position_embeddings) {
    fail(ErrorCode::kInvalidArgument, "a context of ", options.limits.max_context,
         " tokens, the model takes at most ", config.max_position_embeddings,
         " (max_position_embeddings)");
  }
  // A step never holds more tokens than all its sequences can.
  options.limits.max_tokens = static_cast<int>(std::min<int64_t>(
      options.limits.max_tokens, options.limits.max_context * options.limits.max_seqs));
  if (options.total_tokens == 0)
    options.total_tokens = options.limits.max_seqs * options.limits.max_context;
  if (options.total_tokens < 1) {
    fail(ErrorCode::kInvalidArgument, "a pool of ", options.total_tokens,
         " tokens, expected at least 1");
  }
  out.max_logits = options.max_logits == 0 ? options.limits.max_seqs : options.max_logits;
  out.max_logits = std::min(out.max_logits, options.limits.max_tokens);
  const DeviceId id = DeviceId::parse(options.device);
  const AttentionSelection selection =
      select_attention(config, target_of(id),
                       {.backend = options.attention_backend,
                        .kv_cache_dtype = options.kv_cache_dtype,
                        .numerics = options.numerics,
                        .tensor_parallel_size = 1,
                        .growing_block_tokens = options.growing_block_tokens});
  if (selection.descriptor == nullptr) fail(ErrorCode::kUnsupported, selection.message());
  out.descriptor = selection.descriptor;
  options.numerics = selection.numerics;
  out.device = open_device(id, options.threads);
  options.threads = out.device->num_threads();
  out.pool = {.total_tokens = options.total_tokens,
              .max_seqs = options.limits.max_seqs,
              .max_step_tokens = options.limits.max_tokens,
              .window_block_tokens = options.window_block_tokens,
              .growing_block_tokens = options.growing_block_tokens};
  out.pool.shuffle_seed = options.block_shuffle_seed;
  return out;
}

}  // namespace dsv4
