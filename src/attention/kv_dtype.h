// Which row format a requested KV cache dtype means: for our layers, and as vLLM answers.
// Source: spec/dispatch.md 3.
#pragma once
#include <optional>
#include <string>
#include <string_view>
#include <variant>

#include "dsv4/backend.h"

namespace dsv4 {

/// The format of window and compressed rows for a word of --kv-cache-dtype, or why there is none.
/// "" and "auto" mean the backend's native format, f32 when activations are f32. "fp8" and
/// "fp8_e4m3" mean per-tensor FP8 rows where the backend has them, else the packed layout. f32 rows
/// go with f32 activations and with nothing else.
std::variant<KvFormat, Reason> resolve_kv_cache_dtype(const AttentionDescriptor& descriptor,
                                                      const Numerics& numerics,
                                                      std::string_view requested);

namespace upstream {

/// Which version of the rules is asked.
enum class Rules : uint8_t {
  kPullRequest,  ///< vLLM when the layer was refactored
  kLater,        ///< vLLM after it
  kAdopted,      ///< the first, with the later rules that fix a fault and what should be refused
};

struct KvCacheDtype {
  std::string name;  ///< the resolved word
  DType element;     ///< kU8 (packed bytes), kF8E4M3 or kBf16
  /// New dtype of the caller's cache config; nullopt: left alone.
  std::optional<std::string> write_back;
  bool logs = false;  ///< tells the user, once, that the word was replaced
  bool operator==(const KvCacheDtype&) const = default;
};

/// Why upstream stops: the exception it raises, and the condition.
struct Refusal {
  std::string_view raises;  ///< "AssertionError", "ValueError", ...; "ours" where only we refuse
  Reason reason;
};

struct KvCacheDtypeOptions {
  Rules rules = Rules::kAdopted;
  bool has_cache_config = true;      ///< something to write back to
  bool packed_accepts_auto = false;  ///< as one later version does: auto becomes fp8_ds_mla
};

/// vLLM's resolver. Its tests are prefix tests, so `fp8_e5m2` yields E4M3 storage and fp8_ds_mla
/// passes on plain backends; kAdopted refuses both.
std::variant<KvCacheDtype, Refusal> resolve_kv_cache_dtype(bool packed_layout,
                                                           std::string_view requested,
                                                           const KvCacheDtypeOptions& options = {});

}  // namespace upstream
}  // namespace dsv4
