#include "attention/selection.h"

#include <algorithm>

#include "attention/descriptor.h"
#include "attention/kv_dtype.h"
#include "core/fail.h"

namespace dsv4 {
namespace {

// fp8_ds_mla fixes the widths of its two parts. Source: spec/cache_layouts.md.
constexpr int kPackedHeadDim = 512;
constexpr int kPackedRopeDim = 64;

template <typename T>
bool contains(const std::vector<T>& values, const T& value) {
  return std::find(values.begin(), values.end(), value) != values.end();
}

std::string numbers(const std::vector<int>& values) {
  std::string out;
  for (int value : values) out += concat(out.empty() ? "" : ", ", value);
  return values.size() > 1 ? "one of " + out : out;
}

const char* wo_a_name(WoA form) {
  switch (form) {
    case WoA::kFp8:
      return "fp8";
    case WoA::kBf16:
      return "bf16";
    case WoA::kF32:
      return "f32";
  }
  return "unknown";
}

const char* device_words(Platform platform) {
  switch (platform) {
    case Platform::kCuda:
      return "a CUDA device";
    case Platform::kRocm:
      return "a ROCm device";
    case Platform::kCpu:
      break;
  }
  return "a CPU";
}

// Conditions of `numerics` apart from its cache format.
std::vector<Reason> arithmetic_reasons(const Numerics& numerics,
                                       const AttentionDescriptor& descriptor) {
  std::vector<Reason> out;
  const std::string name(numerics.name);
  if (!contains(descriptor.activations, numerics.activation)) {
    std::string names;
    for (DType dtype : descriptor.activations) {
      names += concat(names.empty() ? "" : " or ", dtype_name(dtype));
    }
    out.push_back(
        {concat("activations of numerics ", name), names, dtype_name(numerics.activation)});
  }
  if (!contains(descriptor.index_formats, numerics.index)) {
    out.push_back({concat("index cache format of numerics ", name),
                   concat("one of ", format_names(descriptor.index_formats)),
                   kv_format_name(numerics.index)});
  }
  if (!contains(descriptor.wo_a_forms, numerics.wo_a)) {
    std::string names;
    for (WoA form : descriptor.wo_a_forms) {
      names += concat(names.empty() ? "" : " or ", wo_a_name(form));
    }
    out.push_back({concat("wo_a of numerics ", name), names, wo_a_name(numerics.wo_a)});
  }
  if (numerics.products == Products::kFp8) {
    if (!numerics.quantise_linear_input) {
      out.push_back(
          {concat("products of numerics ", name), "f32, as input is not quantised", "fp8"});
    } else if (descriptor.fp8_product_architectures.empty()) {
      out.push_back({concat("products of ", descriptor.name), "f32", "fp8"});
    }
  }
  return out;
}

}  // namespace

std::vector<Reason> unsupported(const Numerics& numerics, const AttentionDescriptor& descriptor) {
  std::vector<Reason> out = arithmetic_reasons(numerics, descriptor);
  const std::string condition = concat("kv cache format of numerics ", numerics.name);
  if (!contains(descriptor.kv_formats, numerics.kv)) {
    out.push_back({condition, concat("one of ", format_names(descriptor.kv_formats)),
                   kv_format_name(numerics.kv)});
  }
  const bool exact = numerics.activation == DType::kF32;
  if (exact != (numerics.kv == KvFormat::kF32)) {
    out.push_back({condition, exact ? "f32" : "not f32 without f32 activations",
                   kv_format_name(numerics.kv)});
  }
  return out;
}

std::vector<Reason> device_reasons(const AttentionDescriptor& descriptor,
                                   const SelectionTarget& target, Products products) {
  std::vector<Reason> out;
  const Platform own = descriptor.platform;
  if (own != target.platform) {
    out.push_back({"platform", platform_name(own), platform_name(target.platform)});
  } else if (!target.why_absent.empty()) {
    out.push_back({"device", device_words(own), target.why_absent});
  }
  const bool emulated =
      target.capability && architecture_name(own, *target.capability) == "emulated";
  if (!descriptor.not_built.empty() && !emulated) {
    out.push_back({"kernels", "built", descriptor.not_built});
    return out;
  }
  // Without a device there is no architecture to compare, on a CPU the kernels check themselves.
  if (own != target.platform || !target.why_absent.empty() || own == Platform::kCpu) return out;
  const auto need = [&](const std::vector<std::string>& built, const char* condition) {
    const bool runs = target.capability && std::any_of(built.begin(), built.end(), [&](auto& text) {
                        return runs_on(text, own, *target.capability);
                      });
    if (runs) return;
    std::string names;
    for (const std::string& text : built) names += (names.empty() ? "" : ", ") + text;
    out.push_back({condition, concat("one that runs code for ", names),
                   target.capability ? architecture_name(own, *target.capability) : "unknown"});
  };
  need(descriptor.architectures, "architecture");
  if (products == Products::kFp8 && !descriptor.fp8_product_architectures.empty()) {
    need(descriptor.fp8_product_architectures, "architecture for fp8 products");
  }
  return out;
}

std::vector<Reason> request_reasons(const AttentionDescriptor& descriptor,
                                    const SelectionRequest& request, Numerics& numerics) {
  std::vector<Reason> out;
  numerics = request.numerics;
  // `serving` means what serving systems do on this platform: AMD's projects in bf16.
  if (numerics == kServing && !descriptor.wo_a_forms.empty()) {
    numerics.wo_a = descriptor.wo_a_forms.front();
  }
  const std::variant<KvFormat, Reason> format =
      resolve_kv_cache_dtype(descriptor, numerics, request.kv_cache_dtype);
  // resolve_kv_cache_dtype answers for the cache format alone; the rest of the numerics follows.
  if (const Reason* reason = std::get_if<Reason>(&format)) {
    out.push_back(*reason);
  } else {
    numerics.kv = std::get<KvFormat>(format);
  }
  const std::vector<Reason> arithmetic = arithmetic_reasons(numerics, descriptor);
  out.insert(out.end(), arithmetic.begin(), arithmetic.end());
  if (request.growing_block_tokens != 0 && !descriptor.growing_block_tokens.empty() &&
      !contains(descriptor.growing_block_tokens, request.growing_block_tokens)) {
    out.push_back({"tokens of a cache block", numbers(descriptor.growing_block_tokens),
                   std::to_string(request.growing_block_tokens)});
  }
  return out;
}

std::vector<Reason> model_reasons(const AttentionDescriptor& descriptor, const ModelConfig& config,
                                  const SelectionRequest& request, const Numerics& numerics) {
  std::vector<Reason> out;
  const auto need = [&](bool met, std::string condition, std::string required, std::string given) {
    if (!met) out.push_back({std::move(condition), std::move(required), std::move(given)});
  };
  need(descriptor.supports_mla, "latent attention (MLA)", "supported", "not by this backend");
  need(descriptor.supports_sparse, "attention to listed rows", "supported", "not by this backend");
  need(descriptor.supports_sink, "attention sinks", "supported", "not by this backend");
  need(descriptor.head_sizes.empty() || contains(descriptor.head_sizes, config.head_dim),
       "head_dim", numbers(descriptor.head_sizes), std::to_string(config.head_dim));
  if (numerics.kv == KvFormat::kFp8DsMla) {
    need(config.head_dim == kPackedHeadDim && config.qk_rope_head_dim == kPackedRopeDim,
         "head_dim and qk_rope_head_dim of fp8_ds_mla rows",
         concat(kPackedHeadDim, " and ", kPackedRopeDim),
         concat(config.head_dim, " and ", config.qk_rope_head_dim));
  }
  std::vector<int> refused_ratios;
  for (int ratio : config.compress_ratios) {
    if (descriptor.compress_ratios.empty() || contains(descriptor.compress_ratios, ratio) ||
        contains(refused_ratios, ratio)) {
      continue;
    }
    refused_ratios.push_back(ratio);
    need(false, "compress ratio", numbers(descriptor.compress_ratios), std::to_string(ratio));
  }

  const int tp = request.tensor_parallel_size;
  need(tp >= 1, "tensor-parallel size", "1 or more", std::to_string(tp));
  if (tp < 1) return out;
  need(descriptor.max_tensor_parallel == 0 || tp <= descriptor.max_tensor_parallel,
       "tensor-parallel size", concat("at most ", descriptor.max_tensor_parallel),
       std::to_string(tp));
  need(config.num_heads % tp == 0, "num_heads",
       concat("divisible by the tensor-parallel size ", tp), std::to_string(config.num_heads));
  need(config.o_groups % tp == 0, "o_groups", concat("divisible by the tensor-parallel size ", tp),
       std::to_string(config.o_groups));
  const int heads = config.num_heads / tp;
  need(heads >= 1, "query heads of a rank", "1 or more", std::to_string(heads));
  need(descriptor.max_heads == 0 || heads <= descriptor.max_heads, "query heads of a rank",
       concat("at most ", descriptor.max_heads), std::to_string(heads));
  return out;
}

AttentionSelection select_among(std::span<const AttentionDescriptor* const> descriptors,
                                const ModelConfig& config, const SelectionTarget& target,
                                const SelectionRequest& request) {
  AttentionSelection out;
  out.numerics = request.numerics;
  std::string names;
  bool considered = false;
  for (const AttentionDescriptor* descriptor : descriptors) {
    names += concat(names.empty() ? "" : ", ", descriptor->name);
    const bool candidate = request.backend.empty() ? descriptor->platform == target.platform
                                                   : descriptor->name == request.backend;
    if (!candidate) continue;
    considered = true;
    Numerics numerics = request.numerics;
    std::vector<Reason> reasons = device_reasons(*descriptor, target, request.numerics.products);
    const auto append = [&](std::vector<Reason> more) {
      reasons.insert(reasons.end(), more.begin(), more.end());
    };
    append(request_reasons(*descriptor, request, numerics));
    append(model_reasons(*descriptor, config, request, numerics));
    if (reasons.empty()) {
      out.descriptor = descriptor;
      out.numerics = numerics;
      out.refusals.clear();
      return out;
    }
    out.refusals.push_back({std::string(descriptor->name), std::move(reasons)});
  }
  if (!considered) {
    Reason reason = request.backend.empty()
                        ? Reason{"platform", "one with a backend", platform_name(target.platform)}
                        : Reason{"attention backend", concat("one of ", names), request.backend};
    out.refusals.push_back({"", {std::move(reason)}});
  }
  return out;
}

std::string AttentionSelection::message() const {
  if (descriptor != nullptr) return "";
  std::string out = "no attention backend fits";
  for (const BackendRefusal& refusal : refusals) {
    out += concat("\n  ", refusal.backend.empty() ? "" : refusal.backend + ": ",
                  join_reasons(refusal.reasons));
  }
  return out;
}

}  // namespace dsv4
