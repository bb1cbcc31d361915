// The C interface: argument checks that C needs (null pointers, capacities), one lock per engine,
// and exceptions turned into status codes. No logic of its own.
#include "dsv4/c_api.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <mutex>
#include <new>
#include <string>
#include <vector>

#include "core/fail.h"
#include "dsv4/engine.h"
#include "dsv4/single_layer.h"
#include "dsv4/tokenizer.h"
#include "engine/sampler.h"

#ifndef DSV4_VERSION
#error "DSV4_VERSION is set by src/capi/CMakeLists.txt"
#endif

// The engine lives as long as the model handle or a session does.
struct EngineState {
  std::mutex mutex;
  std::unique_ptr<dsv4::Engine> engine;
};

struct dsv4_model {
  std::shared_ptr<EngineState> state;
};
struct dsv4_session {
  std::shared_ptr<EngineState> state;
  dsv4::SequenceId sequence;
};
struct dsv4_attention {
  mutable std::mutex mutex;
  std::unique_ptr<dsv4::SingleLayer> layer;
};

namespace {

using dsv4::ErrorCode;
using dsv4::fail;

// A fixed buffer: storing a message must not fail, not even without memory.
thread_local char last_error[8192] = "";

dsv4_status record(dsv4_status status, const char* message) noexcept {
  size_t length = std::min(std::strlen(message), sizeof last_error - 1);
  // Whole characters only.
  if (message[length] != '\0') {
    while (length > 0 && (static_cast<unsigned char>(message[length]) & 0xc0) == 0x80) --length;
  }
  std::memcpy(last_error, message, length);
  last_error[length] = '\0';
  return status;
}

template <typename F>
dsv4_status guarded(const F& f) noexcept {
  try {
    f();
    return DSV4_OK;
  } catch (const dsv4::Error& error) {
    return record(static_cast<dsv4_status>(error.code()), error.what());
  } catch (const std::bad_alloc&) {
    return record(DSV4_OUT_OF_MEMORY, "out of host memory");
  } catch (const std::exception& error) {
    return record(DSV4_INTERNAL, error.what());
  } catch (...) {
    return record(DSV4_INTERNAL, "an exception of unknown type");
  }
}

void require(const void* pointer, const char* name) {
  if (pointer == nullptr) fail(ErrorCode::kInvalidArgument, name, " is NULL");
}

template <typename Struct>
void require_size(const Struct& given, const char* name) {
  if (given.struct_size == sizeof(Struct)) return;
  fail(ErrorCode::kInvalidArgument, name, ".struct_size is ", given.struct_size, ", expected ",
       sizeof(Struct), ": fill the struct with ", name, "_init of this version");
}

std::string text_or(const char* text, const char* when_null) {
  return text == nullptr ? when_null : text;
}

dsv4::EngineOptions engine_options(const dsv4_options* given) {
  dsv4_options options;
  dsv4_options_init(&options);
  if (given != nullptr) {
    // What the first version knew ends where `products` begins.
    if (given->struct_size != offsetof(dsv4_options, products)) {
      require_size(*given, "dsv4_options");
    }
    std::memcpy(&options, given, given->struct_size);
  }
  dsv4::EngineOptions out;
  out.device = text_or(options.device, "cpu");
  out.attention_backend = text_or(options.attention_backend, "");
  out.kv_cache_dtype = text_or(options.kv_cache_dtype, "auto");
  const std::string numerics = text_or(options.numerics, "serving");
  const std::optional<dsv4::Numerics> parsed = dsv4::parse_numerics(numerics);
  if (!parsed) {
    fail(ErrorCode::kInvalidArgument, "numerics \"", numerics,
         "\", expected serving, reference or exact");
  }
  out.numerics = *parsed;
  const std::string products = text_or(options.products, "f32");
  const std::optional<dsv4::Products> parsed_products = dsv4::parse_products(products);
  if (!parsed_products) {
    fail(ErrorCode::kInvalidArgument, "products \"", products, "\", expected f32 or fp8");
  }
  out.numerics.products = *parsed_products;
  out.threads = options.threads;
  out.limits = {options.max_tokens, options.max_sequences, options.max_context};
  out.max_logits = options.max_logits;
  out.total_tokens = options.total_tokens;
  return out;
}

const dsv4::Tokenizer& tokenizer_of(const dsv4_model* model) {
  require(model, "model");
  const dsv4::Tokenizer* tokenizer = model->state->engine->tokenizer();
  if (tokenizer == nullptr) {
    fail(ErrorCode::kNotFound, "the model has no tokenizer: its folder holds no tokenizer.json");
  }
  return *tokenizer;
}

// A result of `needed` elements for a caller's buffer: true when it shall be copied.
bool fits(const void* buffer, size_t capacity, size_t needed, const char* unit) {
  if (buffer == nullptr) return false;
  if (capacity < needed) {
    fail(ErrorCode::kInvalidArgument, "the result needs room for ", needed, " ", unit,
         ", the buffer has ", capacity);
  }
  return true;
}

int32_t checked_count(size_t count, const char* name) {
  if (count > INT32_MAX) {
    fail(ErrorCode::kInvalidArgument, name, " is ", count, ", expected less than 2^31");
  }
  return static_cast<int32_t>(count);
}

std::unique_ptr<dsv4_attention> make_attention(const dsv4::ModelConfig& config,
                                               const dsv4::LayerKind& kind,
                                               std::unique_ptr<dsv4::TensorSource> source,
                                               const std::string& prefix,
                                               const dsv4::EngineOptions& options) {
  auto out = std::make_unique<dsv4_attention>();
  out->layer = dsv4::SingleLayer::create(config, kind, std::move(source), prefix, options);
  return out;
}

}  // namespace

extern "C" {

const char* dsv4_version(void) {
  return DSV4_VERSION;
}

const char* dsv4_status_name(dsv4_status status) {
  // C may pass any number, which C++ must not read as the enumeration.
  int number = 0;
  static_assert(sizeof number == sizeof status);
  std::memcpy(&number, &status, sizeof number);
  if (number == DSV4_OK) return "ok";
  if (number < DSV4_OK || number > DSV4_INTERNAL) return "unknown status";
  return dsv4::error_code_name(static_cast<ErrorCode>(number));
}

const char* dsv4_last_error(void) {
  return last_error;
}

void dsv4_options_init(dsv4_options* options) {
  if (options == nullptr) return;
  const dsv4::EngineOptions defaults;
  *options = {};
  options->struct_size = sizeof *options;
  options->threads = defaults.threads;
  options->max_tokens = defaults.limits.max_tokens;
  options->max_sequences = defaults.limits.max_seqs;
  options->max_logits = defaults.max_logits;
  options->max_context = defaults.limits.max_context;
  options->total_tokens = defaults.total_tokens;
}

dsv4_status dsv4_model_load(const char* source, const dsv4_options* options, dsv4_model** model) {
  return guarded([&] {
    require(model, "model");
    *model = nullptr;
    require(source, "source");
    auto out = std::make_unique<dsv4_model>();
    out->state = std::make_shared<EngineState>();
    out->state->engine =
        dsv4::Engine::load(dsv4::ModelSource::parse(source), engine_options(options));
    *model = out.release();
  });
}

void dsv4_model_free(dsv4_model* model) {
  delete model;
}

dsv4_status dsv4_model_get_info(const dsv4_model* model, dsv4_model_info* info) {
  return guarded([&] {
    require(model, "model");
    require(info, "info");
    const dsv4::Engine& engine = *model->state->engine;
    const dsv4::ModelConfig& config = engine.config();
    const dsv4::StepLimits& limits = engine.options().limits;
    *info = {};
    info->vocab_size = config.vocab_size;
    info->hidden_size = config.hidden_size;
    info->num_layers = config.num_hidden_layers;
    info->bos_token_id = config.bos_token_id;
    info->eos_token_id = config.eos_token_id;
    info->max_tokens = limits.max_tokens;
    info->max_sequences = limits.max_seqs;
    info->has_tokenizer = engine.tokenizer() != nullptr ? 1 : 0;
    info->max_context = limits.max_context;
    info->memory_bytes = engine.memory().total();
  });
}

dsv4_status dsv4_tokenize(const dsv4_model* model, const char* text, size_t text_bytes,
                          int32_t* ids, size_t capacity, size_t* num_ids) {
  return guarded([&] {
    const dsv4::Tokenizer& tokenizer = tokenizer_of(model);
    require(num_ids, "num_ids");
    if (text_bytes > 0) require(text, "text");
    const std::vector<int32_t> out = tokenizer.encode({text, text_bytes});
    *num_ids = out.size();
    if (fits(ids, capacity, out.size(), "ids")) std::copy(out.begin(), out.end(), ids);
  });
}

dsv4_status dsv4_detokenize(const dsv4_model* model, const int32_t* ids, size_t num_ids, char* text,
                            size_t capacity, size_t* text_bytes) {
  return guarded([&] {
    const dsv4::Tokenizer& tokenizer = tokenizer_of(model);
    require(text_bytes, "text_bytes");
    if (num_ids > 0) require(ids, "ids");
    const std::string out = tokenizer.decode({ids, num_ids});
    *text_bytes = out.size();
    if (fits(text, capacity, out.size() + 1, "bytes with the terminating zero")) {
      std::memcpy(text, out.c_str(), out.size() + 1);
    }
  });
}

dsv4_status dsv4_session_create(dsv4_model* model, dsv4_session** session) {
  return guarded([&] {
    require(session, "session");
    *session = nullptr;
    require(model, "model");
    auto out = std::make_unique<dsv4_session>();
    out->state = model->state;
    const std::lock_guard lock(out->state->mutex);
    out->sequence = out->state->engine->create_sequence();
    *session = out.release();
  });
}

void dsv4_session_free(dsv4_session* session) {
  if (session == nullptr) return;
  guarded([&] {
    const std::lock_guard lock(session->state->mutex);
    session->state->engine->release_sequence(session->sequence);
  });
  delete session;
}

dsv4_status dsv4_session_length(const dsv4_session* session, int64_t* num_tokens) {
  return guarded([&] {
    require(session, "session");
    require(num_tokens, "num_tokens");
    const std::lock_guard lock(session->state->mutex);
    *num_tokens = session->state->engine->pool().length(session->sequence);
  });
}

dsv4_status dsv4_generate_step(dsv4_session* session, const int32_t* tokens, size_t num_tokens,
                               size_t num_logits, float* logits, size_t logits_capacity) {
  return guarded([&] {
    require(session, "session");
    if (num_tokens > 0) require(tokens, "tokens");
    if (num_logits > 0) require(logits, "logits");
    const int32_t rows = checked_count(num_logits, "num_logits");
    const std::lock_guard lock(session->state->mutex);
    dsv4::Engine& engine = *session->state->engine;
    const auto vocab_size = static_cast<size_t>(engine.config().vocab_size);
    // Before the step: a refused call must not have appended anything.
    fits(logits, logits_capacity, num_logits * vocab_size, "floats");
    const dsv4::Feed feed{session->sequence, {tokens, num_tokens}, rows};
    const dsv4::ConstTensor result = engine.step({&feed, 1});
    if (num_logits > 0) {
      std::memcpy(logits, result.data, num_logits * vocab_size * sizeof(float));
    }
  });
}

void dsv4_sampling_init(dsv4_sampling* sampling) {
  if (sampling == nullptr) return;
  const dsv4::SamplingOptions defaults;
  *sampling = {};
  sampling->struct_size = sizeof *sampling;
  sampling->temperature = defaults.temperature;
  sampling->top_p = defaults.top_p;
  sampling->top_k = defaults.top_k;
  sampling->seed = defaults.seed;
}

dsv4_status dsv4_sample(const float* logits, size_t vocab_size, const dsv4_sampling* sampling,
                        uint64_t sequence, int64_t position, int32_t* token) {
  return guarded([&] {
    require(logits, "logits");
    require(token, "token");
    checked_count(vocab_size, "vocab_size");
    dsv4::SamplingOptions options;
    if (sampling != nullptr) {
      require_size(*sampling, "dsv4_sampling");
      options.temperature = sampling->temperature;
      options.top_p = sampling->top_p;
      options.top_k = sampling->top_k;
      options.seed = sampling->seed;
    }
    *token = dsv4::Sampler(options).draw({logits, vocab_size}, sequence, position);
  });
}

dsv4_status dsv4_attention_load(const char* directory, int32_t layer_idx,
                                const dsv4_options* options, dsv4_attention** attention) {
  return guarded([&] {
    require(attention, "attention");
    *attention = nullptr;
    require(directory, "directory");
    const dsv4::EngineOptions engine = engine_options(options);
    const dsv4::ModelConfig config = dsv4::ModelConfig::load(directory);
    if (layer_idx < 0 || layer_idx >= config.num_hidden_layers) {
      fail(ErrorCode::kInvalidArgument, "layer_idx is ", layer_idx, ", expected 0 to ",
           config.num_hidden_layers - 1);
    }
    *attention = make_attention(config, config.layer_kind(layer_idx),
                                dsv4::open_checkpoint(directory, config),
                                dsv4::concat("layers.", layer_idx, ".attn."), engine)
                     .release();
  });
}

dsv4_status dsv4_attention_create(const char* config_path, const char* kind, uint64_t seed,
                                  const dsv4_options* options, dsv4_attention** attention) {
  return guarded([&] {
    require(attention, "attention");
    *attention = nullptr;
    require(config_path, "config_path");
    require(kind, "kind");
    const dsv4::EngineOptions engine = engine_options(options);
    const dsv4::ModelConfig config = dsv4::ModelConfig::load(config_path);
    const dsv4::LayerKind layer_kind = dsv4::layer_kind_of(config, kind);
    // The storage that the numerics compute with, as the engine's formula models.
    const dsv4::FormulaStorage storage = engine.numerics.quantise_linear_input
                                             ? dsv4::FormulaStorage::kReleased
                                             : dsv4::FormulaStorage::kBf16Values;
    const std::string prefix = dsv4::concat(kind, ".");
    *attention = make_attention(config, layer_kind,
                                dsv4::formula_source(
                                    dsv4::expected_attention_tensors(config, layer_kind, prefix),
                                    seed, storage),
                                prefix, engine)
                     .release();
  });
}

void dsv4_attention_free(dsv4_attention* attention) {
  delete attention;
}

dsv4_status dsv4_attention_hidden_size(const dsv4_attention* attention, int64_t* hidden_size) {
  return guarded([&] {
    require(attention, "attention");
    require(hidden_size, "hidden_size");
    *hidden_size = attention->layer->config().hidden_size;
  });
}

dsv4_status dsv4_attention_add_sequence(dsv4_attention* attention, int64_t* sequence) {
  return guarded([&] {
    require(attention, "attention");
    require(sequence, "sequence");
    const std::lock_guard lock(attention->mutex);
    const std::optional<dsv4::SequenceId> created = attention->layer->pool().create();
    if (!created) {
      fail(ErrorCode::kOutOfMemory, "all ", attention->layer->options().limits.max_seqs,
           " sequences of the layer are in use");
    }
    *sequence = *created;
  });
}

dsv4_status dsv4_attention_remove_sequence(dsv4_attention* attention, int64_t sequence) {
  return guarded([&] {
    require(attention, "attention");
    const std::lock_guard lock(attention->mutex);
    attention->layer->pool().release(sequence);
  });
}

dsv4_status dsv4_attention_forward(dsv4_attention* attention, const int64_t* sequences,
                                   const int32_t* num_tokens, size_t num_sequences,
                                   const float* hidden, float* out, size_t num_values) {
  return guarded([&] {
    require(attention, "attention");
    require(sequences, "sequences");
    require(num_tokens, "num_tokens");
    require(hidden, "hidden");
    require(out, "out");
    const std::lock_guard lock(attention->mutex);
    dsv4::SingleLayer& layer = *attention->layer;
    const dsv4::StepLimits& limits = layer.options().limits;
    if (num_sequences == 0 || num_sequences > static_cast<size_t>(limits.max_seqs)) {
      fail(ErrorCode::kInvalidArgument, "num_sequences is ", num_sequences, ", expected 1 to ",
           limits.max_seqs);
    }
    std::vector<dsv4::BatchEntry> batch;
    int64_t total = 0;
    for (size_t i = 0; i < num_sequences; ++i) {
      const int64_t length = layer.pool().length(sequences[i]);
      if (num_tokens[i] < 1 || length + num_tokens[i] > limits.max_context) {
        fail(ErrorCode::kInvalidArgument, "num_tokens[", i, "] is ", num_tokens[i],
             ", expected 1 to ", limits.max_context - length, " after the ", length,
             " tokens of sequence ", sequences[i]);
      }
      for (const dsv4::BatchEntry& other : batch) {
        if (other.sequence != sequences[i]) continue;
        fail(ErrorCode::kInvalidArgument, "sequences[", i, "]: ", sequences[i], " occurs twice");
      }
      batch.push_back({sequences[i], num_tokens[i]});
      total += num_tokens[i];
    }
    const int64_t hidden_size = layer.config().hidden_size;
    if (num_values != static_cast<size_t>(total * hidden_size)) {
      fail(ErrorCode::kInvalidArgument, "num_values is ", num_values, ", expected ",
           total * hidden_size, " (", total, " tokens of ", hidden_size, ")");
    }
    layer.forward(batch, dsv4::ConstTensor(hidden, dsv4::DType::kF32, {total, hidden_size}),
                  dsv4::Tensor(out, dsv4::DType::kF32, {total, hidden_size}));
  });
}

}  // extern "C"
