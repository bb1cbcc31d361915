#include "attention/upstream_rules.h"

#include <algorithm>

#include "core/fail.h"

namespace dsv4::upstream {
namespace {

constexpr std::string_view kFlashMlaName = "FLASHMLA_SPARSE_DSV4";
constexpr std::string_view kFlashInferName = "FLASHINFER_MLA_SPARSE_DSV4";
constexpr std::string_view kRocmName = "ROCM_FLASHMLA_SPARSE_DSV4";

constexpr int kPackedRowBytes = 584;
constexpr int kHeadDim = 512;
constexpr int kBlockTokens = 256;

bool is_blackwell_client(const std::optional<Capability>& capability) {
  return capability && capability->major == 12;
}

std::string text_of(const std::optional<Capability>& capability, Platform platform) {
  if (!capability) return "no device";
  return architecture_name(
      platform == Platform::kRocm ? dsv4::Platform::kRocm : dsv4::Platform::kCuda, *capability);
}

std::string text_of(const ClassFacts& facts, Class cls) {
  std::string out;
  for (const Capability& capability : facts.capabilities) {
    if (!out.empty()) out += ", ";
    out += cls == Class::kRocmAiter ? architecture_name(dsv4::Platform::kRocm, capability)
                                    : concat("sm_", capability.major, "x");
  }
  return out;
}

bool runs_on(const ClassFacts& facts, Class cls, const std::optional<Capability>& capability) {
  return capability && std::any_of(facts.capabilities.begin(), facts.capabilities.end(),
                                   [&](const Capability& own) {
                                     return cls == Class::kRocmAiter
                                                ? own == *capability
                                                : own.major == capability->major;
                                   });
}

Refusal unknown_name(std::string_view requested, std::string_view names) {
  return {"ours", {"attention backend", concat("none or one of ", names), std::string(requested)}};
}

}  // namespace

std::string_view model_module(Platform platform, Rules rules) {
  switch (platform) {
    case Platform::kRocm:
      return "amd";
    case Platform::kXpu:
      return "xpu";
    case Platform::kCpu:
      // There was no CPU model at first; the platform fell through like any other.
      return rules == Rules::kPullRequest ? "nvidia" : "cpu";
    case Platform::kCuda:
    case Platform::kOther:
      break;
  }
  return "nvidia";
}

std::optional<ClassFacts> class_facts(Class cls, Rules rules) {
  const bool later = rules == Rules::kLater;
  ClassFacts facts{
      .class_name = "DeepseekV4FlashMLAAttention",
      .backend_name = kFlashMlaName,
      .packed_layout = true,
      .own_swa_backend = false,
      .prefill_chunk_requests = 4,
      .supports_sparse_offload = later,
      .aux_streams = 3,
      .kv_cache_dtypes = {"auto", "bfloat16", "fp8", "fp8_ds_mla"},
      .activation = DType::kBf16,
      .head_size = kHeadDim,
      .kernel_block_size = kBlockTokens,
      .mla = true,
      .sparse = true,
      .sink = true,
      .capabilities = {{9}, {10}},
      .graph_support = "uniform batch",
      .has_impl_class = false,
  };
  switch (cls) {
    case Class::kFlashMla:
      if (later) facts.capabilities.insert(facts.capabilities.begin(), Capability{8});
      break;
    case Class::kFlashInfer:
      facts.class_name = "DeepseekV4FlashInferMLAAttention";
      facts.backend_name = kFlashInferName;
      facts.packed_layout = false;
      facts.prefill_chunk_requests = 0;
      facts.supports_sparse_offload = false;
      facts.kv_cache_dtypes = {"auto", "bfloat16", "fp8"};
      if (later) facts.kv_cache_dtypes.push_back("fp8_e4m3");
      facts.capabilities = {{10}};
      break;
    case Class::kFlashInferSm120:
      if (rules == Rules::kPullRequest) return std::nullopt;
      facts.class_name = "DeepseekV4FlashInferSM120Attention";
      facts.backend_name = kFlashInferName;
      facts.prefill_chunk_requests = 0;
      facts.supports_sparse_offload = false;
      facts.kv_cache_dtypes = {"fp8", "fp8_e4m3", "fp8_ds_mla"};
      facts.capabilities = {{12}};
      break;
    case Class::kRocmAiter:
      facts.class_name = "DeepseekV4ROCMAiterMLAAttention";
      facts.backend_name = kRocmName;
      facts.own_swa_backend = rules != Rules::kPullRequest;
      facts.supports_sparse_offload = false;
      facts.aux_streams = 0;
      facts.capabilities = {{9, 4, 2}, {9, 5, 0}};
      break;
  }
  return facts;
}

std::array<int64_t, 3> cache_shape(Class cls, bool packed_rows, int64_t num_blocks, int64_t rows) {
  const bool packed = packed_rows && cls != Class::kFlashInfer;
  return {num_blocks, rows, packed ? kPackedRowBytes : kHeadDim};
}

std::variant<int, Refusal> padded_num_q_heads(Class cls, int num_heads, Rules rules) {
  if (num_heads < 1) {
    return Refusal{"ours", {"query heads of a rank", "1 or more", std::to_string(num_heads)}};
  }
  if (cls == Class::kRocmAiter) return num_heads;

  // FlashInfer got kernels for fewer heads later; its SM12x class came with them.
  const bool small_counts =
      cls == Class::kFlashInferSm120 || (cls == Class::kFlashInfer && rules == Rules::kLater);
  for (int count : {8, 16, 32, 64, 128}) {
    if (count >= (small_counts ? 8 : 64) && num_heads <= count) return count;
  }
  const std::string_view library = cls == Class::kFlashMla ? "FlashMLA" : "FlashInfer MLA Sparse";
  return Refusal{"ValueError",
                 {concat("query heads of a rank for ", library),
                  small_counts ? "at most 128 (padded to 8, 16, 32, 64 or 128)"
                               : "at most 128 (padded to 64 or 128)",
                  std::to_string(num_heads)}};
}

std::variant<Class, Refusal> resolve(std::string_view requested, Platform platform,
                                     const std::optional<Capability>& capability, Rules rules) {
  const std::string_view module = model_module(platform, rules);
  if (module == "amd") {
    // At first the AMD model named its class directly and read no option.
    if (rules == Rules::kPullRequest || requested.empty() || requested == kRocmName) {
      return Class::kRocmAiter;
    }
    return Refusal{"ValueError",
                   {"attention backend on ROCm", std::string(kRocmName), std::string(requested)}};
  }
  if (module != "nvidia") {
    return Refusal{"",
                   {concat("attention class of the ", module, " model"), "a documented rule",
                    "none is known"}};
  }

  if (rules == Rules::kPullRequest) {
    return requested == kFlashInferName ? Class::kFlashInfer : Class::kFlashMla;
  }
  if (requested.empty()) {
    return is_blackwell_client(capability) ? Class::kFlashInferSm120 : Class::kFlashMla;
  }
  if (requested == kFlashInferName) {
    return is_blackwell_client(capability) ? Class::kFlashInferSm120 : Class::kFlashInfer;
  }
  if (requested == kFlashMlaName || requested == "FLASHMLA_SPARSE") return Class::kFlashMla;
  if (requested == "FLASHINFER_MLA_SPARSE" || requested == "FLASHINFER_MLA_SPARSE_SM120") {
    return Refusal{"ValueError",
                   {"attention backend", concat("a V4 backend: use ", kFlashInferName),
                    std::string(requested)}};
  }
  if (rules == Rules::kLater) return Class::kFlashMla;
  return unknown_name(requested,
                      "FLASHMLA_SPARSE_DSV4, FLASHMLA_SPARSE (the same), "
                      "FLASHINFER_MLA_SPARSE_DSV4");
}

namespace {

// Conditions that hold for every class, in the order in which upstream meets them.
void check_model(const Request& request, std::vector<Refusal>& refusals) {
  const auto refuse = [&](std::string_view raises, std::string condition, std::string required,
                          std::string given) {
    refusals.push_back({raises, {std::move(condition), std::move(required), std::move(given)}});
  };
  const int tp = request.tensor_parallel_size;
  if (tp < 1) {
    refuse("ours", "tensor-parallel size", "1 or more", std::to_string(tp));
  } else {
    if (request.num_heads % tp != 0) {
      refuse("AssertionError", "num_heads", concat("divisible by the tensor-parallel size ", tp),
             std::to_string(request.num_heads));
    }
    // Upstream divides by o_groups / tp later on.
    if (request.o_groups < tp) {
      refuse("ZeroDivisionError", "o_groups", concat("at least the tensor-parallel size ", tp),
             std::to_string(request.o_groups));
    }
  }
  if (!request.has_cache_config) {
    refuse("AssertionError", "cache config", "given", "none");
  }
  for (int ratio : request.compress_ratios) {
    // The config's 0 becomes 1.
    if (ratio == 0 || ratio == 1 || ratio == 4 || ratio == 128) continue;
    refuse("ValueError", "compress ratio", "one of 1, 4, 128", std::to_string(ratio));
  }
}

void check_class(Class cls, const ClassFacts& facts, Platform platform,
                 const std::optional<Capability>& capability, const Request& request, Rules rules,
                 std::vector<Refusal>& refusals) {
  const auto refuse = [&](std::string_view raises, std::string condition, std::string required,
                          std::string given) {
    refusals.push_back({raises, {std::move(condition), std::move(required), std::move(given)}});
  };
  if (!upstream::runs_on(facts, cls, capability)) {
    refuse("ValueError", concat("device of ", facts.class_name), text_of(facts, cls),
           text_of(capability, platform));
  }
  const std::string& word = request.kv_cache_dtype;
  if (cls == Class::kFlashInfer && rules == Rules::kLater && word == "fp8_ds_mla") {
    refuse("ValueError", "kv cache dtype", "a plain row format on this GPU", word);
  }
  if (cls == Class::kFlashInferSm120) {
    if (word != "fp8" && word != "fp8_e4m3" && word != "fp8_ds_mla") {
      refuse("ValueError", concat("kv cache dtype of ", facts.class_name),
             "one of fp8, fp8_e4m3, fp8_ds_mla", word);
    }
    if (!request.flashinfer_decode_api) {
      refuse("ValueError", "FlashInfer", "a version with the SM12x decode call", "none");
    }
  }
  if (request.mxfp4_indexer &&
      !(platform == Platform::kCuda && capability && capability->major == 10)) {
    refuse("ValueError", "MXFP4 indexer", "sm_10x", text_of(capability, platform));
  }
  if (request.sparse_offload && !facts.supports_sparse_offload) {
    refuse("NotImplementedError", "sparse offload", "a class that supports it",
           std::string(facts.class_name));
  }
  const bool compressed = std::any_of(request.compress_ratios.begin(),
                                      request.compress_ratios.end(), [](int r) { return r > 1; });
  if (request.decode_context_parallel_size > 1 && compressed) {
    refuse("NotImplementedError", "decode context parallel size", "1 with compressed layers",
           std::to_string(request.decode_context_parallel_size));
  }
}

}  // namespace
}  // namespace dsv4::upstream

namespace dsv4 {

upstream::Answer upstream_rules(upstream::Platform platform,
                                const std::optional<Capability>& capability,
                                const upstream::Request& request, upstream::Rules rules) {
  using namespace upstream;  // NOLINT: one function, all of whose words are upstream's
  std::vector<Refusal> refusals;
  check_model(request, refusals);
  const std::variant<Class, Refusal> resolved =
      resolve(request.backend, platform, capability, rules);
  if (const Refusal* refusal = std::get_if<Refusal>(&resolved)) {
    refusals.push_back(*refusal);
    return refusals;
  }

  const Class cls = std::get<Class>(resolved);
  const ClassFacts facts = *class_facts(cls, rules);
  check_class(cls, facts, platform, capability, request, rules, refusals);

  Choice choice{};
  choice.module = model_module(platform, rules);
  choice.cls = cls;
  choice.block_size = facts.kernel_block_size;
  choice.block_size_replaced = request.block_size != facts.kernel_block_size;
  choice.heads_per_rank = request.num_heads / std::max(1, request.tensor_parallel_size);

  const auto padded = padded_num_q_heads(cls, choice.heads_per_rank, rules);
  if (const Refusal* refusal = std::get_if<Refusal>(&padded)) {
    refusals.push_back(*refusal);
  } else {
    choice.padded_heads = std::get<int>(padded);
  }

  const auto dtype = upstream::resolve_kv_cache_dtype(
      facts.packed_layout, request.kv_cache_dtype,
      {rules, request.has_cache_config, request.packed_accepts_auto});
  if (const Refusal* refusal = std::get_if<Refusal>(&dtype)) {
    refusals.push_back(*refusal);
  } else {
    choice.kv_cache_dtype = std::get<KvCacheDtype>(dtype);
  }

  if (cls != Class::kRocmAiter) {
    if (!request.wo_a_has_scale) {
      // Later versions fall back to bf16, which is what an empty recipe says.
      if (rules == Rules::kPullRequest) {
        refusals.push_back({"AttributeError", {"scale of wo_a", "stored", "none"}});
      }
    } else if (capability) {
      choice.recipe = compute_fp8_einsum_recipe(capability);
    } else {
      refusals.push_back(
          {"AssertionError", {"FP8 output projection", "a CUDA device", "no device"}});
    }
  }
  if (!refusals.empty()) return refusals;
  return choice;
}

}  // namespace dsv4
