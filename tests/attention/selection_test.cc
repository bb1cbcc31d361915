// Every condition of selection, on descriptors of backends with kernels: what is chosen, and what
// is said when nothing fits.
#include "attention/selection.h"

#include <gtest/gtest.h>

#include <algorithm>

namespace dsv4 {
namespace {

AttentionDescriptor base(std::string_view name, Platform platform) {
  AttentionDescriptor out;
  out.name = name;
  out.platform = platform;
  out.kv_formats = {KvFormat::kFp8DsMla};
  out.index_formats = {KvFormat::kIndexFp8, KvFormat::kIndexMxfp4};
  out.activations = {DType::kBf16};
  out.wo_a_forms = {WoA::kFp8, WoA::kBf16};
  out.max_heads = 128;
  out.padded_num_q_heads = [](int n) { return n; };
  out.head_sizes = {512};
  out.compress_ratios = {0, 4, 128};
  out.growing_block_tokens = {256};
  return out;
}

// The four backends, as if kernels of all were built.
struct Backends {
  AttentionDescriptor cpu = base("CPU_DSV4", Platform::kCpu);
  AttentionDescriptor flashmla = base("FLASHMLA_SPARSE_DSV4", Platform::kCuda);
  AttentionDescriptor flashinfer = base("FLASHINFER_MLA_SPARSE_DSV4", Platform::kCuda);
  AttentionDescriptor rocm = base("ROCM_FLASHMLA_SPARSE_DSV4", Platform::kRocm);

  Backends() {
    cpu.kv_formats = {KvFormat::kFp8DsMla, KvFormat::kBf16, KvFormat::kFp8, KvFormat::kF32};
    cpu.index_formats = {KvFormat::kIndexFp8, KvFormat::kIndexMxfp4, KvFormat::kIndexF32};
    cpu.activations = {DType::kBf16, DType::kF32};
    cpu.wo_a_forms = {WoA::kFp8, WoA::kBf16, WoA::kF32};
    cpu.max_heads = 0;
    cpu.head_sizes = {};
    cpu.growing_block_tokens = {};
    cpu.architectures = {"cpu"};
    flashmla.architectures = {"sm_80", "sm_90a", "compute_80"};
    flashmla.fp8_product_architectures = {"sm_90a"};
    flashinfer.architectures = {"sm_100f"};
    flashinfer.kv_formats = {KvFormat::kBf16, KvFormat::kFp8};
    flashinfer.native_format = KvFormat::kBf16;
    flashinfer.packed_layout = false;
    rocm.architectures = {"gfx942", "gfx950"};
    rocm.wo_a_forms = {WoA::kBf16};
  }
  AttentionSelection select(const ModelConfig& config, const SelectionTarget& target,
                            const SelectionRequest& request = {}) const {
    const AttentionDescriptor* all[] = {&cpu, &flashmla, &flashinfer, &rocm};
    return select_among(all, config, target, request);
  }
};

ModelConfig flash_config() {
  ModelConfig out;
  out.num_hidden_layers = 4;
  out.num_heads = 64;
  out.head_dim = 512;
  out.qk_rope_head_dim = 64;
  out.o_groups = 8;
  out.compress_ratios = {0, 0, 4, 128, 0};
  return out;
}

const SelectionTarget kCpuTarget{Platform::kCpu, std::nullopt, ""};
const SelectionTarget kHopper{Platform::kCuda, Capability{9, 0}, ""};
const SelectionTarget kBlackwell{Platform::kCuda, Capability{10, 0}, ""};
const SelectionTarget kMi300{Platform::kRocm, Capability{9, 4, 2}, ""};

// Given values of all conditions of one backend (or of the request when `backend` is empty).
std::vector<std::string> given(const AttentionSelection& selection, const std::string& backend) {
  std::vector<std::string> out;
  for (const BackendRefusal& refusal : selection.refusals) {
    if (refusal.backend != backend) continue;
    for (const Reason& reason : refusal.reasons) {
      EXPECT_FALSE(reason.condition.empty());
      EXPECT_FALSE(reason.required.empty()) << reason.condition;
      out.push_back(reason.given);
    }
  }
  return out;
}

using Strings = std::vector<std::string>;

TEST(Selection, DefaultOfEveryPlatform) {
  const Backends backends;
  const struct {
    SelectionTarget target;
    const char* name;
    KvFormat kv;
  } cases[] = {
      {kCpuTarget, "CPU_DSV4", KvFormat::kFp8DsMla},
      {kHopper, "FLASHMLA_SPARSE_DSV4", KvFormat::kFp8DsMla},
      {{Platform::kCuda, Capability{8, 0}, ""}, "FLASHMLA_SPARSE_DSV4", KvFormat::kFp8DsMla},
      {{Platform::kCuda, Capability{12, 0}, ""}, "FLASHMLA_SPARSE_DSV4", KvFormat::kFp8DsMla},
      {kBlackwell, "FLASHMLA_SPARSE_DSV4", KvFormat::kFp8DsMla},
      {kMi300, "ROCM_FLASHMLA_SPARSE_DSV4", KvFormat::kFp8DsMla},
  };
  for (const auto& c : cases) {
    const AttentionSelection selection = backends.select(flash_config(), c.target);
    ASSERT_NE(selection.descriptor, nullptr) << selection.message();
    EXPECT_EQ(selection.descriptor->name, c.name);
    EXPECT_EQ(selection.numerics.kv, c.kv);
    EXPECT_TRUE(selection.refusals.empty());
    EXPECT_EQ(selection.message(), "");
  }
}

TEST(Selection, NamedBackendOnly) {
  const Backends backends;
  const AttentionSelection infer =
      backends.select(flash_config(), kBlackwell, {.backend = "FLASHINFER_MLA_SPARSE_DSV4"});
  ASSERT_NE(infer.descriptor, nullptr) << infer.message();
  EXPECT_EQ(infer.descriptor->name, "FLASHINFER_MLA_SPARSE_DSV4");
  EXPECT_EQ(infer.numerics.kv, KvFormat::kBf16);

  // A named backend that does not fit is not replaced by one that does.
  const AttentionSelection refused =
      backends.select(flash_config(), kHopper, {.backend = "FLASHINFER_MLA_SPARSE_DSV4"});
  EXPECT_EQ(refused.descriptor, nullptr);
  EXPECT_EQ(given(refused, "FLASHINFER_MLA_SPARSE_DSV4"), Strings{"sm_90"});
  EXPECT_EQ(refused.refusals.size(), 1u);
}

TEST(Selection, WithoutANameTheNextOneThatFits) {
  const Backends backends;
  const AttentionSelection selection =
      backends.select(flash_config(), kBlackwell, {.kv_cache_dtype = "bf16"});
  ASSERT_NE(selection.descriptor, nullptr) << selection.message();
  EXPECT_EQ(selection.descriptor->name, "FLASHINFER_MLA_SPARSE_DSV4");
  EXPECT_EQ(selection.numerics.kv, KvFormat::kBf16);

  // Nothing fits: every backend of the platform says why, others are not mentioned.
  const AttentionSelection none =
      backends.select(flash_config(), kHopper, {.kv_cache_dtype = "bf16"});
  EXPECT_EQ(none.descriptor, nullptr);
  EXPECT_EQ(given(none, "FLASHMLA_SPARSE_DSV4"), Strings{"bf16"});
  EXPECT_EQ(given(none, "FLASHINFER_MLA_SPARSE_DSV4"), Strings{"sm_90"});
  EXPECT_EQ(none.refusals.size(), 2u);
  for (const char* word : {"FLASHMLA_SPARSE_DSV4", "FLASHINFER_MLA_SPARSE_DSV4", "sm_90"}) {
    EXPECT_NE(none.message().find(word), std::string::npos) << none.message();
  }
}

TEST(Selection, UnknownNameListsAll) {
  const Backends backends;
  for (const char* name : {"NOPE", "FLASHMLA_SPARSE", "cpu_dsv4"}) {
    const AttentionSelection selection =
        backends.select(flash_config(), kHopper, {.backend = name});
    EXPECT_EQ(selection.descriptor, nullptr);
    EXPECT_EQ(given(selection, ""), Strings{name});
    for (const char* known : {"CPU_DSV4", "FLASHMLA_SPARSE_DSV4", "FLASHINFER_MLA_SPARSE_DSV4",
                              "ROCM_FLASHMLA_SPARSE_DSV4"}) {
      EXPECT_NE(selection.message().find(known), std::string::npos) << selection.message();
    }
  }
}

TEST(Selection, BackendOfAnotherPlatform) {
  const Backends backends;
  EXPECT_EQ(given(backends.select(flash_config(), kCpuTarget, {.backend = "FLASHMLA_SPARSE_DSV4"}),
                  "FLASHMLA_SPARSE_DSV4"),
            Strings{"cpu"});
  EXPECT_EQ(given(backends.select(flash_config(), kHopper, {.backend = "CPU_DSV4"}), "CPU_DSV4"),
            Strings{"cuda"});
  EXPECT_EQ(
      given(backends.select(flash_config(), kHopper, {.backend = "ROCM_FLASHMLA_SPARSE_DSV4"}),
            "ROCM_FLASHMLA_SPARSE_DSV4"),
      Strings{"cuda"});
}

TEST(Selection, DeviceAndKernels) {
  Backends backends;
  const SelectionTarget absent{Platform::kCuda, std::nullopt, "no CUDA driver"};
  EXPECT_EQ(given(backends.select(flash_config(), absent), "FLASHMLA_SPARSE_DSV4"),
            Strings{"no CUDA driver"});
  const SelectionTarget unknown{Platform::kCuda, std::nullopt, ""};
  EXPECT_EQ(given(backends.select(flash_config(), unknown), "FLASHMLA_SPARSE_DSV4"),
            Strings{"unknown"});
  const SelectionTarget old{Platform::kCuda, Capability{7, 5}, ""};
  EXPECT_EQ(given(backends.select(flash_config(), old), "FLASHMLA_SPARSE_DSV4"), Strings{"sm_75"});
  const SelectionTarget mi250{Platform::kRocm, Capability{9, 0, 10}, ""};
  EXPECT_EQ(given(backends.select(flash_config(), mi250), "ROCM_FLASHMLA_SPARSE_DSV4"),
            Strings{"gfx90a"});

  backends.flashmla.architectures.clear();
  backends.flashmla.not_built = "not built in";
  EXPECT_EQ(given(backends.select(flash_config(), kHopper), "FLASHMLA_SPARSE_DSV4"),
            Strings{"not built in"});
  // Both at once: no device, and no kernels for it either.
  EXPECT_EQ(given(backends.select(flash_config(), absent), "FLASHMLA_SPARSE_DSV4"),
            (Strings{"no CUDA driver", "not built in"}));
}

TEST(Selection, HeadsGroupsAndRanks) {
  const Backends backends;
  const struct {
    const char* what;
    int heads, groups, tp;
    Strings given;
  } cases[] = {
      {"fits", 64, 8, 8, {}},
      {"one head a rank", 8, 8, 8, {}},
      {"128 heads", 128, 16, 1, {}},
      {"129 heads", 129, 1, 1, {"129"}},
      {"256 heads on 2 ranks", 256, 16, 2, {}},
      {"heads not divisible", 65, 8, 2, {"65"}},
      {"groups not divisible", 64, 8, 16, {"8"}},
      {"groups not divisible, fewer ranks than groups", 63, 8, 3, {"8"}},
      {"no rank", 64, 8, 0, {"0"}},
      {"negative ranks", 64, 8, -2, {"-2"}},
      {"more ranks than heads", 4, 8, 8, {"4", "0"}},
      {"no heads", 0, 8, 1, {"0"}},
  };
  for (const auto& c : cases) {
    ModelConfig config = flash_config();
    config.num_heads = c.heads;
    config.o_groups = c.groups;
    const AttentionSelection selection = backends.select(
        config, kHopper, {.backend = "FLASHMLA_SPARSE_DSV4", .tensor_parallel_size = c.tp});
    EXPECT_EQ(selection.descriptor != nullptr, c.given.empty()) << c.what;
    EXPECT_EQ(given(selection, "FLASHMLA_SPARSE_DSV4"), c.given) << c.what;
  }
  // The CPU has no bound on heads.
  ModelConfig many = flash_config();
  many.num_heads = 256;
  EXPECT_NE(backends.select(many, kCpuTarget).descriptor, nullptr);

  Backends limited;
  limited.cpu.max_tensor_parallel = 2;
  EXPECT_EQ(
      given(limited.select(flash_config(), kCpuTarget, {.tensor_parallel_size = 4}), "CPU_DSV4"),
      Strings{"4"});
}

TEST(Selection, Geometry) {
  const Backends backends;
  ModelConfig narrow = flash_config();
  narrow.head_dim = 128;
  // FlashMLA names the head size and the packed row's widths, FlashInfer (plain rows) the former.
  EXPECT_EQ(given(backends.select(narrow, kBlackwell), "FLASHMLA_SPARSE_DSV4"),
            (Strings{"128", "128 and 64"}));
  EXPECT_EQ(given(backends.select(narrow, kBlackwell), "FLASHINFER_MLA_SPARSE_DSV4"),
            Strings{"128"});
  // The CPU takes any head size, but not in packed rows.
  EXPECT_EQ(given(backends.select(narrow, kCpuTarget), "CPU_DSV4"), Strings{"128 and 64"});
  EXPECT_NE(backends.select(narrow, kCpuTarget, {.kv_cache_dtype = "bf16"}).descriptor, nullptr);

  ModelConfig ratios = flash_config();
  ratios.compress_ratios = {0, 2, 4, 2, 64};
  EXPECT_EQ(given(backends.select(ratios, kHopper), "FLASHMLA_SPARSE_DSV4"), (Strings{"2", "64"}));
}

TEST(Selection, AttentionFeatures) {
  for (bool AttentionDescriptor::*flag :
       {&AttentionDescriptor::supports_mla, &AttentionDescriptor::supports_sparse,
        &AttentionDescriptor::supports_sink}) {
    Backends backends;
    backends.cpu.*flag = false;
    EXPECT_EQ(given(backends.select(flash_config(), kCpuTarget), "CPU_DSV4"),
              Strings{"not by this backend"});
  }
}

TEST(Selection, BlockSize) {
  const Backends backends;
  EXPECT_NE(backends.select(flash_config(), kHopper, {.growing_block_tokens = 256}).descriptor,
            nullptr);
  EXPECT_EQ(given(backends.select(flash_config(), kHopper, {.growing_block_tokens = 64}),
                  "FLASHMLA_SPARSE_DSV4"),
            Strings{"64"});
  EXPECT_NE(backends.select(flash_config(), kCpuTarget, {.growing_block_tokens = 128}).descriptor,
            nullptr);
}

TEST(Selection, NumericsAndCacheFormat) {
  const Backends backends;
  const AttentionSelection exact =
      backends.select(flash_config(), kCpuTarget, {.numerics = kExact});
  ASSERT_NE(exact.descriptor, nullptr) << exact.message();
  EXPECT_EQ(exact.numerics, kExact);

  // exact elsewhere: the cache, activations, index and projection are all named, once each.
  EXPECT_EQ(
      given(backends.select(flash_config(), kHopper, {.numerics = kExact}), "FLASHMLA_SPARSE_DSV4"),
      (Strings{"f32", "f32", "index_f32", "f32"}));
  EXPECT_EQ(given(backends.select(flash_config(), kCpuTarget,
                                  {.kv_cache_dtype = "fp8_ds_mla", .numerics = kExact}),
                  "CPU_DSV4"),
            Strings{"fp8_ds_mla"});
  EXPECT_EQ(
      given(backends.select(flash_config(), kCpuTarget, {.kv_cache_dtype = "f32"}), "CPU_DSV4"),
      Strings{"f32"});

  const AttentionSelection reference = backends.select(
      flash_config(), kCpuTarget, {.kv_cache_dtype = "bf16", .numerics = kReference});
  ASSERT_NE(reference.descriptor, nullptr) << reference.message();
  Numerics expected = kReference;
  expected.kv = KvFormat::kBf16;
  EXPECT_EQ(reference.numerics, expected);

  // `serving` on AMD projects in bf16; asking for anything by name is taken literally.
  const AttentionSelection serving = backends.select(flash_config(), kMi300);
  ASSERT_NE(serving.descriptor, nullptr) << serving.message();
  EXPECT_EQ(serving.numerics.wo_a, WoA::kBf16);
  Numerics named = kServing;
  named.name = "mine";
  EXPECT_EQ(given(backends.select(flash_config(), kMi300, {.numerics = named}),
                  "ROCM_FLASHMLA_SPARSE_DSV4"),
            Strings{"fp8"});
}

TEST(Selection, Fp8Products) {
  const Backends backends;
  Numerics numerics = kServing;
  numerics.products = Products::kFp8;
  const AttentionSelection hopper =
      backends.select(flash_config(), kHopper, {.numerics = numerics});
  ASSERT_NE(hopper.descriptor, nullptr) << hopper.message();
  EXPECT_EQ(hopper.numerics, numerics);

  // A device without them, a backend without them, and numerics that quantise nothing.
  const AttentionSelection blackwell =
      backends.select(flash_config(), kBlackwell, {.numerics = numerics});
  EXPECT_EQ(blackwell.descriptor, nullptr);
  EXPECT_NE(blackwell.message().find("architecture for fp8 products: sm_100, required one that "
                                     "runs code for sm_90a"),
            std::string::npos)
      << blackwell.message();
  EXPECT_EQ(given(blackwell, "FLASHMLA_SPARSE_DSV4"), Strings{"sm_100"});
  for (const auto& [target, name] :
       {std::pair{kCpuTarget, "CPU_DSV4"}, std::pair{kMi300, "ROCM_FLASHMLA_SPARSE_DSV4"}}) {
    const AttentionSelection refused =
        backends.select(flash_config(), target, {.numerics = numerics});
    EXPECT_EQ(refused.descriptor, nullptr) << name;
    EXPECT_NE(refused.message().find(std::string("products of ") + name + ": fp8, required f32"),
              std::string::npos)
        << refused.message();
  }
  Numerics exact = kExact;
  exact.products = Products::kFp8;
  EXPECT_EQ(given(backends.select(flash_config(), kCpuTarget, {.numerics = exact}), "CPU_DSV4"),
            Strings{"fp8"});
}

TEST(Selection, AllConditionsTogether) {
  const Backends backends;
  ModelConfig config = flash_config();
  config.head_dim = 256;
  config.num_heads = 387;
  config.o_groups = 8;
  config.compress_ratios = {3};
  const AttentionSelection selection =
      backends.select(config, {Platform::kRocm, std::nullopt, "not there"},
                      {.backend = "FLASHMLA_SPARSE_DSV4",
                       .kv_cache_dtype = "int4",
                       .numerics = kServing,
                       .tensor_parallel_size = 2,
                       .growing_block_tokens = 64});
  EXPECT_EQ(given(selection, "FLASHMLA_SPARSE_DSV4"),
            (Strings{"rocm", "int4", "64", "256", "256 and 64", "3", "387", "193"}));
}

TEST(Unsupported, NamesEveryField) {
  const Backends backends;
  EXPECT_TRUE(unsupported(kServing, backends.cpu).empty());
  EXPECT_TRUE(unsupported(kReference, backends.cpu).empty());
  EXPECT_TRUE(unsupported(kExact, backends.cpu).empty());
  EXPECT_TRUE(unsupported(kServing, backends.flashmla).empty());
  EXPECT_EQ(unsupported(kExact, backends.flashmla).size(), 4u);
  EXPECT_EQ(unsupported(kServing, backends.flashinfer).size(), 1u);  // packed rows
  EXPECT_EQ(unsupported(kServing, backends.rocm).size(), 1u);        // FP8 projection

  Numerics mixed = kExact;
  mixed.kv = KvFormat::kBf16;
  EXPECT_EQ(unsupported(mixed, backends.cpu).size(), 1u);
  mixed = kServing;
  mixed.kv = KvFormat::kF32;
  EXPECT_EQ(unsupported(mixed, backends.cpu).size(), 1u);
}

TEST(Selection, PlatformWithoutBackends) {
  const Backends backends;
  const AttentionDescriptor* only_cpu[] = {&backends.cpu};
  const AttentionSelection selection = select_among(only_cpu, flash_config(), kHopper, {});
  EXPECT_EQ(selection.descriptor, nullptr);
  EXPECT_EQ(given(selection, ""), Strings{"cuda"});
}

}  // namespace
}  // namespace dsv4
