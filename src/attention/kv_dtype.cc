#include "attention/kv_dtype.h"

#include <algorithm>

#include "attention/descriptor.h"
#include "core/fail.h"

namespace dsv4 {

std::variant<KvFormat, Reason> resolve_kv_cache_dtype(const AttentionDescriptor& descriptor,
                                                      const Numerics& numerics,
                                                      std::string_view requested) {
  const std::vector<KvFormat>& accepted = descriptor.kv_formats;
  const auto accepts = [&](KvFormat format) {
    return std::find(accepted.begin(), accepted.end(), format) != accepted.end();
  };
  const bool exact = numerics.activation == DType::kF32;

  KvFormat format;
  if (requested.empty() || requested == "auto") {
    format = exact ? KvFormat::kF32 : descriptor.native_format;
  } else if (requested == "fp8" || requested == "fp8_e4m3") {
    format =
        !accepts(KvFormat::kFp8) && descriptor.packed_layout ? KvFormat::kFp8DsMla : KvFormat::kFp8;
  } else if (requested == "bfloat16") {
    format = KvFormat::kBf16;
  } else if (const std::optional<KvFormat> named = parse_kv_format(requested)) {
    format = *named;
  } else if (requested == "fp8_e5m2") {
    return Reason{"kv cache dtype", "an E4M3 format: no kernel reads E5M2 rows", "fp8_e5m2"};
  } else {
    return Reason{"kv cache dtype", "one of auto, fp8_ds_mla, bf16, fp8, f32",
                  std::string(requested)};
  }

  if (exact != (format == KvFormat::kF32)) {
    return Reason{concat("kv cache dtype with numerics ", numerics.name),
                  exact ? "f32" : "not f32 (f32 rows go with f32 activations)",
                  std::string(requested.empty() ? "auto" : requested)};
  }
  if (!accepts(format)) {
    const bool named = !requested.empty() && requested != "auto";
    return Reason{concat("kv cache dtype of ", descriptor.name),
                  concat("one of ", format_names(accepted)),
                  named ? std::string(requested) : kv_format_name(format)};
  }
  return format;
}

namespace upstream {

std::variant<KvCacheDtype, Refusal> resolve_kv_cache_dtype(bool packed_layout,
                                                           std::string_view requested,
                                                           const KvCacheDtypeOptions& options) {
  const std::string word(requested);
  const bool fp8 = requested.starts_with("fp8");
  if (options.rules == Rules::kAdopted) {
    if (requested == "fp8_e5m2") {
      return Refusal{"ours", {"kv cache dtype", "an E4M3 format: rows would hold E4M3", word}};
    }
    if (!packed_layout && requested == "fp8_ds_mla") {
      return Refusal{"ours", {"kv cache dtype", "a plain row format on this backend", word}};
    }
  }
  if (!packed_layout) return KvCacheDtype{word, fp8 ? DType::kF8E4M3 : DType::kBf16, {}, false};

  if (requested == "fp8_ds_mla") return KvCacheDtype{word, DType::kU8, {}, false};
  if (!fp8 && !(options.packed_accepts_auto && requested == "auto")) {
    return Refusal{"AssertionError", {"kv cache dtype", "a word that starts with fp8", word}};
  }
  KvCacheDtype out{"fp8_ds_mla", DType::kU8, {}, true};
  if (options.has_cache_config) out.write_back = out.name;
  return out;
}

}  // namespace upstream
}  // namespace dsv4
