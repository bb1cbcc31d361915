// Every row of the decision tables of spec/dispatch.md 1.1, 1.2, 1.4, 1.7, 2 and of the rows of 10
// that are decided at selection.
#include "attention/upstream_rules.h"

#include <gtest/gtest.h>

#include <algorithm>

namespace dsv4 {
namespace {

using upstream::Answer;
using upstream::Choice;
using upstream::Class;
using upstream::Refusal;
using upstream::Request;
using upstream::Rules;
using Up = upstream::Platform;

constexpr Rules kPr = Rules::kPullRequest;
constexpr Rules kLater = Rules::kLater;
constexpr Rules kAdopted = Rules::kAdopted;
constexpr Rules kAllRules[] = {kPr, kLater, kAdopted};
constexpr Class kAllClasses[] = {Class::kFlashMla, Class::kFlashInfer, Class::kFlashInferSm120,
                                 Class::kRocmAiter};
constexpr Capability kHopper{9, 0};
constexpr Capability kBlackwell{10, 0};
constexpr Capability kBlackwellUltra{10, 3};
constexpr Capability kBlackwellClient{12, 0};
constexpr Capability kMi300{9, 4, 2};
constexpr Capability kMi355{9, 5, 0};

Request with_backend(std::string_view name, std::string_view dtype = "fp8") {
  Request out;
  out.backend = name;
  out.kv_cache_dtype = dtype;
  return out;
}

Choice chosen(const Answer& answer) {
  if (const Choice* choice = std::get_if<Choice>(&answer)) return *choice;
  std::string reasons;
  for (const Refusal& r : std::get<std::vector<Refusal>>(answer)) reasons += r.reason.str() + "; ";
  ADD_FAILURE() << "refused: " << reasons;
  return {};
}

std::vector<Refusal> refused(const Answer& answer) {
  if (std::holds_alternative<Choice>(answer)) {
    ADD_FAILURE() << "not refused";
    return {};
  }
  return std::get<std::vector<Refusal>>(answer);
}

// Expects exactly one refusal, raised as `raises`, with `given`.
void expect_one(const Answer& answer, std::string_view raises, std::string_view given) {
  const std::vector<Refusal> refusals = refused(answer);
  ASSERT_EQ(refusals.size(), 1u) << (refusals.empty() ? "" : refusals.back().reason.str());
  EXPECT_EQ(refusals[0].raises, raises) << refusals[0].reason.str();
  EXPECT_EQ(refusals[0].reason.given, given) << refusals[0].reason.str();
  EXPECT_FALSE(refusals[0].reason.required.empty());
}

TEST(PaddedHeads, GoldenValues) {
  // n -> FlashMLA, FlashInfer first, FlashInfer later, ROCm; 0: refused.
  const int rows[][5] = {{1, 64, 64, 8, 1},    {8, 64, 64, 8, 8},       {9, 64, 64, 16, 9},
                         {16, 64, 64, 16, 16}, {17, 64, 64, 32, 17},    {33, 64, 64, 64, 33},
                         {64, 64, 64, 64, 64}, {65, 128, 128, 128, 65}, {128, 128, 128, 128, 128},
                         {129, 0, 0, 0, 129}};
  const auto value = [](const std::variant<int, Refusal>& padded) {
    return std::holds_alternative<int>(padded) ? std::get<int>(padded) : 0;
  };
  for (const auto& [n, flashmla, first, later, rocm] : rows) {
    for (Rules rules : kAllRules) {
      EXPECT_EQ(value(upstream::padded_num_q_heads(Class::kFlashMla, n, rules)), flashmla) << n;
      EXPECT_EQ(value(upstream::padded_num_q_heads(Class::kRocmAiter, n, rules)), rocm) << n;
      EXPECT_EQ(value(upstream::padded_num_q_heads(Class::kFlashInfer, n, rules)),
                rules == kLater ? later : first)
          << n;
      EXPECT_EQ(value(upstream::padded_num_q_heads(Class::kFlashInferSm120, n, rules)), later) << n;
    }
  }
}

TEST(PaddedHeads, RefusalsNameLibraryCountAndChoices) {
  const struct {
    Class cls;
    Rules rules;
    const char* kernels;
    const char* choices;
  } cases[] = {{Class::kFlashMla, kPr, "FlashMLA", "64 or 128"},
               {Class::kFlashInfer, kPr, "FlashInfer MLA Sparse", "64 or 128"},
               {Class::kFlashInfer, kLater, "FlashInfer MLA Sparse", "8, 16, 32, 64 or 128"},
               {Class::kFlashInferSm120, kLater, "FlashInfer MLA Sparse", "8, 16, 32, 64 or 128"}};
  for (const auto& c : cases) {
    const auto padded = upstream::padded_num_q_heads(c.cls, 129, c.rules);
    ASSERT_TRUE(std::holds_alternative<Refusal>(padded));
    const Refusal& refusal = std::get<Refusal>(padded);
    EXPECT_EQ(refusal.raises, "ValueError");
    EXPECT_NE(refusal.reason.condition.find(c.kernels), std::string::npos);
    EXPECT_NE(refusal.reason.required.find(c.choices), std::string::npos);
    EXPECT_EQ(refusal.reason.given, "129");
  }
  for (Class cls : kAllClasses) {
    for (int n : {0, -1}) {
      const auto padded = upstream::padded_num_q_heads(cls, n, kPr);
      ASSERT_TRUE(std::holds_alternative<Refusal>(padded)) << n;
      EXPECT_EQ(std::get<Refusal>(padded).raises, "ours");
    }
  }
}

TEST(ModelModule, ByPlatform) {
  for (Rules rules : kAllRules) {
    EXPECT_EQ(upstream::model_module(Up::kRocm, rules), "amd");
    EXPECT_EQ(upstream::model_module(Up::kCuda, rules), "nvidia");
    EXPECT_EQ(upstream::model_module(Up::kXpu, rules), "xpu");
    EXPECT_EQ(upstream::model_module(Up::kOther, rules), "nvidia");
  }
  EXPECT_EQ(upstream::model_module(Up::kCpu, kPr), "nvidia");
  EXPECT_EQ(upstream::model_module(Up::kCpu, kLater), "cpu");
  EXPECT_EQ(upstream::model_module(Up::kCpu, kAdopted), "cpu");
}

TEST(Resolve, NvidiaNames) {
  constexpr int kRefused = -1;
  constexpr int kMla = static_cast<int>(Class::kFlashMla);
  constexpr int kInfer = static_cast<int>(Class::kFlashInfer);
  constexpr int kSm120 = static_cast<int>(Class::kFlashInferSm120);
  // name -> first; later off and on major 12; adopted off and on major 12
  const struct {
    const char* name;
    int first, later, later12, adopted, adopted12;
  } rows[] = {
      {"", kMla, kMla, kSm120, kMla, kSm120},
      {"FLASHINFER_MLA_SPARSE_DSV4", kInfer, kInfer, kSm120, kInfer, kSm120},
      {"FLASHMLA_SPARSE_DSV4", kMla, kMla, kMla, kMla, kMla},
      {"FLASHMLA_SPARSE", kMla, kMla, kMla, kMla, kMla},
      {"FLASHINFER_MLA_SPARSE", kMla, kRefused, kRefused, kRefused, kRefused},
      {"FLASHINFER_MLA_SPARSE_SM120", kMla, kRefused, kRefused, kRefused, kRefused},
      {"TRITON_MLA", kMla, kMla, kMla, kRefused, kRefused},
      {"B12X", kMla, kMla, kMla, kRefused, kRefused},
      {"flashmla_sparse_dsv4", kMla, kMla, kMla, kRefused, kRefused},
      {"CPU_DSV4", kMla, kMla, kMla, kRefused, kRefused},
  };
  const auto value = [&](const char* name, Rules rules, const Capability& capability) {
    const auto answer = upstream::resolve(name, Up::kCuda, capability, rules);
    return std::holds_alternative<Class>(answer) ? static_cast<int>(std::get<Class>(answer))
                                                 : kRefused;
  };
  for (const auto& row : rows) {
    for (const Capability& capability : {kHopper, kBlackwell}) {
      EXPECT_EQ(value(row.name, kPr, capability), row.first) << row.name;
      EXPECT_EQ(value(row.name, kLater, capability), row.later) << row.name;
      EXPECT_EQ(value(row.name, kAdopted, capability), row.adopted) << row.name;
    }
    EXPECT_EQ(value(row.name, kPr, kBlackwellClient), row.first) << row.name;
    EXPECT_EQ(value(row.name, kLater, kBlackwellClient), row.later12) << row.name;
    EXPECT_EQ(value(row.name, kAdopted, kBlackwellClient), row.adopted12) << row.name;
  }
}

TEST(Resolve, RefusalsSayWhatToUse) {
  for (const char* name : {"FLASHINFER_MLA_SPARSE", "FLASHINFER_MLA_SPARSE_SM120"}) {
    for (Rules rules : {kLater, kAdopted}) {
      const auto answer = upstream::resolve(name, Up::kCuda, kBlackwell, rules);
      ASSERT_TRUE(std::holds_alternative<Refusal>(answer)) << name;
      EXPECT_EQ(std::get<Refusal>(answer).raises, "ValueError");
      EXPECT_NE(std::get<Refusal>(answer).reason.required.find("FLASHINFER_MLA_SPARSE_DSV4"),
                std::string::npos);
    }
  }
  const auto unknown = upstream::resolve("NOPE", Up::kCuda, kHopper, kAdopted);
  ASSERT_TRUE(std::holds_alternative<Refusal>(unknown));
  for (const char* name : {"FLASHMLA_SPARSE_DSV4", "FLASHINFER_MLA_SPARSE_DSV4"}) {
    EXPECT_NE(std::get<Refusal>(unknown).reason.required.find(name), std::string::npos);
  }
}

TEST(Resolve, Rocm) {
  for (const char* name : {"", "ROCM_FLASHMLA_SPARSE_DSV4"}) {
    for (Rules rules : kAllRules) {
      const auto answer = upstream::resolve(name, Up::kRocm, kMi300, rules);
      ASSERT_TRUE(std::holds_alternative<Class>(answer)) << name;
      EXPECT_EQ(std::get<Class>(answer), Class::kRocmAiter);
    }
  }
  for (const char* name : {"FLASHMLA_SPARSE_DSV4", "NOPE"}) {
    const auto first = upstream::resolve(name, Up::kRocm, kMi300, kPr);
    ASSERT_TRUE(std::holds_alternative<Class>(first)) << name;
    for (Rules rules : {kLater, kAdopted}) {
      const auto answer = upstream::resolve(name, Up::kRocm, kMi300, rules);
      ASSERT_TRUE(std::holds_alternative<Refusal>(answer)) << name;
      EXPECT_EQ(std::get<Refusal>(answer).raises, "ValueError");
      EXPECT_EQ(std::get<Refusal>(answer).reason.given, name);
    }
  }
}

TEST(Resolve, ModulesWithoutDocumentedClassAreRefused) {
  for (const auto& [platform, rules] :
       {std::pair{Up::kXpu, kPr}, std::pair{Up::kXpu, kAdopted}, std::pair{Up::kCpu, kLater}}) {
    EXPECT_TRUE(std::holds_alternative<Refusal>(upstream::resolve("", platform, {}, rules)));
  }
  EXPECT_TRUE(std::holds_alternative<Class>(upstream::resolve("", Up::kCpu, {}, kPr)));
  EXPECT_TRUE(std::holds_alternative<Class>(upstream::resolve("", Up::kOther, {}, kAdopted)));
}

TEST(ClassFacts, Members) {
  const struct {
    Class cls;
    const char *class_name, *backend_name;
    bool packed;
    int chunk, streams;
  } rows[] = {
      {Class::kFlashMla, "DeepseekV4FlashMLAAttention", "FLASHMLA_SPARSE_DSV4", true, 4, 3},
      {Class::kFlashInfer, "DeepseekV4FlashInferMLAAttention", "FLASHINFER_MLA_SPARSE_DSV4", false,
       0, 3},
      {Class::kFlashInferSm120, "DeepseekV4FlashInferSM120Attention", "FLASHINFER_MLA_SPARSE_DSV4",
       true, 0, 3},
      {Class::kRocmAiter, "DeepseekV4ROCMAiterMLAAttention", "ROCM_FLASHMLA_SPARSE_DSV4", true, 4,
       0},
  };
  for (const auto& row : rows) {
    for (Rules rules : {kLater, kAdopted}) {
      const auto facts = upstream::class_facts(row.cls, rules);
      ASSERT_TRUE(facts.has_value());
      EXPECT_EQ(facts->class_name, row.class_name);
      EXPECT_EQ(facts->backend_name, row.backend_name);
      EXPECT_EQ(facts->packed_layout, row.packed) << row.class_name;
      EXPECT_EQ(facts->prefill_chunk_requests, row.chunk) << row.class_name;
      EXPECT_EQ(facts->aux_streams, row.streams) << row.class_name;
      EXPECT_EQ(facts->own_swa_backend, row.cls == Class::kRocmAiter) << row.class_name;
      EXPECT_EQ(facts->supports_sparse_offload, row.cls == Class::kFlashMla && rules == kLater);
    }
  }
  EXPECT_FALSE(upstream::class_facts(Class::kFlashInferSm120, kPr).has_value());
}

TEST(ClassFacts, DescriptorAnswers) {
  using Words = std::vector<std::string_view>;
  const Words flashmla{"auto", "bfloat16", "fp8", "fp8_ds_mla"};
  const struct {
    Class cls;
    Rules rules;
    Words words;
    std::vector<Capability> capabilities;
  } rows[] = {
      {Class::kFlashMla, kPr, flashmla, {{9}, {10}}},
      {Class::kFlashMla, kLater, flashmla, {{8}, {9}, {10}}},
      {Class::kFlashMla, kAdopted, flashmla, {{9}, {10}}},
      {Class::kFlashInfer, kPr, {"auto", "bfloat16", "fp8"}, {{10}}},
      {Class::kFlashInfer, kLater, {"auto", "bfloat16", "fp8", "fp8_e4m3"}, {{10}}},
      {Class::kFlashInferSm120, kLater, {"fp8", "fp8_e4m3", "fp8_ds_mla"}, {{12}}},
      {Class::kRocmAiter, kPr, flashmla, {kMi300, kMi355}},
  };
  for (const auto& row : rows) {
    const auto facts = upstream::class_facts(row.cls, row.rules);
    ASSERT_TRUE(facts.has_value());
    EXPECT_EQ(facts->kv_cache_dtypes, row.words) << facts->class_name;
    EXPECT_EQ(facts->capabilities, row.capabilities) << facts->class_name;
    EXPECT_EQ(facts->activation, DType::kBf16);
    EXPECT_EQ(facts->head_size, 512);
    EXPECT_EQ(facts->kernel_block_size, 256);
    EXPECT_TRUE(facts->mla && facts->sparse && facts->sink);
    EXPECT_EQ(facts->graph_support, "uniform batch");
    EXPECT_FALSE(facts->has_impl_class);
  }
}

TEST(ClassFacts, CacheShapes) {
  using Shape = std::array<int64_t, 3>;
  EXPECT_EQ(upstream::cache_shape(Class::kFlashMla, true, 10, 64), (Shape{10, 64, 584}));
  EXPECT_EQ(upstream::cache_shape(Class::kFlashMla, false, 10, 64), (Shape{10, 64, 512}));
  EXPECT_EQ(upstream::cache_shape(Class::kFlashInfer, false, 10, 2), (Shape{10, 2, 512}));
  EXPECT_EQ(upstream::cache_shape(Class::kFlashInfer, true, 10, 2), (Shape{10, 2, 512}));
  EXPECT_EQ(upstream::cache_shape(Class::kRocmAiter, true, 3, 64), (Shape{3, 64, 584}));
}

TEST(UpstreamRules, WhatWorks) {
  const EinsumRecipe rows{{1, 128, 128}, false};
  const EinsumRecipe packed{{1, 1, 128}, true};
  const struct {
    Up platform;
    Capability capability;
    const char *backend, *dtype;
    Rules rules;
    const char* module;
    Class cls;
    int padded;
    const char* resolved;
    DType element;
    std::optional<EinsumRecipe> recipe;
  } cases[] = {
      {Up::kCuda, kHopper, "", "fp8", kPr, "nvidia", Class::kFlashMla, 64, "fp8_ds_mla", DType::kU8,
       rows},
      {Up::kCuda, kHopper, "", "fp8_ds_mla", kAdopted, "nvidia", Class::kFlashMla, 64, "fp8_ds_mla",
       DType::kU8, rows},
      {Up::kCuda, kBlackwell, "FLASHMLA_SPARSE", "fp8", kAdopted, "nvidia", Class::kFlashMla, 64,
       "fp8_ds_mla", DType::kU8, packed},
      {Up::kCuda, kBlackwell, "FLASHINFER_MLA_SPARSE_DSV4", "auto", kPr, "nvidia",
       Class::kFlashInfer, 64, "auto", DType::kBf16, packed},
      {Up::kCuda, kBlackwellUltra, "FLASHINFER_MLA_SPARSE_DSV4", "fp8", kAdopted, "nvidia",
       Class::kFlashInfer, 64, "fp8", DType::kF8E4M3, packed},
      {Up::kCuda, kBlackwellClient, "", "fp8", kAdopted, "nvidia", Class::kFlashInferSm120, 16,
       "fp8_ds_mla", DType::kU8, packed},
      {Up::kCuda, kBlackwellClient, "FLASHINFER_MLA_SPARSE_DSV4", "fp8_ds_mla", kLater, "nvidia",
       Class::kFlashInferSm120, 16, "fp8_ds_mla", DType::kU8, packed},
      {Up::kCuda,
       {8, 0},
       "",
       "fp8",
       kLater,
       "nvidia",
       Class::kFlashMla,
       64,
       "fp8_ds_mla",
       DType::kU8,
       rows},
      {Up::kRocm, kMi300, "", "fp8", kPr, "amd", Class::kRocmAiter, 16, "fp8_ds_mla", DType::kU8,
       std::nullopt},
      {Up::kRocm, kMi355, "ROCM_FLASHMLA_SPARSE_DSV4", "fp8_e4m3", kAdopted, "amd",
       Class::kRocmAiter, 16, "fp8_ds_mla", DType::kU8, std::nullopt},
      {Up::kOther, kHopper, "", "fp8", kAdopted, "nvidia", Class::kFlashMla, 64, "fp8_ds_mla",
       DType::kU8, rows},
  };
  for (const auto& c : cases) {
    Request request = with_backend(c.backend, c.dtype);
    request.num_heads = 64;
    request.tensor_parallel_size = 4;
    const Choice choice = chosen(upstream_rules(c.platform, c.capability, request, c.rules));
    SCOPED_TRACE(c.backend);
    EXPECT_EQ(choice.module, c.module);
    EXPECT_EQ(choice.cls, c.cls);
    EXPECT_EQ(choice.heads_per_rank, 16);
    EXPECT_EQ(choice.padded_heads, c.padded);
    EXPECT_EQ(choice.kv_cache_dtype.name, c.resolved);
    EXPECT_EQ(choice.kv_cache_dtype.element, c.element);
    EXPECT_EQ(choice.recipe, c.recipe);
    EXPECT_EQ(choice.block_size, 256);
    EXPECT_FALSE(choice.block_size_replaced);
  }
}

TEST(UpstreamRules, DevicesThatNoClassServes) {
  const struct {
    Up platform;
    Capability capability;
    const char *backend, *dtype;
    Rules rules;
    const char* given;
  } cases[] = {
      {Up::kCuda, {8, 0}, "", "fp8", kPr, "sm_80"},
      {Up::kCuda, {8, 9}, "", "fp8", kAdopted, "sm_89"},
      {Up::kCuda, {12, 0}, "", "fp8", kPr, "sm_120"},
      {Up::kCuda, {12, 0}, "FLASHMLA_SPARSE_DSV4", "fp8", kAdopted, "sm_120"},
      {Up::kCuda, {9, 0}, "FLASHINFER_MLA_SPARSE_DSV4", "fp8", kPr, "sm_90"},
      {Up::kCuda, {9, 0}, "FLASHINFER_MLA_SPARSE_DSV4", "fp8", kAdopted, "sm_90"},
      {Up::kCuda, {12, 0}, "FLASHINFER_MLA_SPARSE_DSV4", "fp8", kPr, "sm_120"},
      {Up::kRocm, {9, 0, 10}, "", "fp8", kAdopted, "gfx90a"},
      {Up::kRocm, {11, 0, 0}, "", "fp8", kPr, "gfx1100"},
  };
  for (const auto& c : cases) {
    SCOPED_TRACE(c.given);
    expect_one(upstream_rules(c.platform, c.capability, with_backend(c.backend, c.dtype), c.rules),
               "ValueError", c.given);
  }
}

TEST(UpstreamRules, NoDevice) {
  const std::vector<Refusal> refusals =
      refused(upstream_rules(Up::kCuda, std::nullopt, with_backend("")));
  ASSERT_EQ(refusals.size(), 2u);
  EXPECT_EQ(refusals[0].reason.given, "no device");
  EXPECT_EQ(refusals[1].raises, "AssertionError");  // the einsum recipe
}

TEST(UpstreamRules, CacheDtypesRefusedAfterTheChoice) {
  const char* const infer = "FLASHINFER_MLA_SPARSE_DSV4";
  for (Rules rules : kAllRules) {
    for (const char* word : {"auto", "bfloat16"}) {
      expect_one(upstream_rules(Up::kCuda, kHopper, with_backend("", word), rules),
                 "AssertionError", word);
      expect_one(upstream_rules(Up::kRocm, kMi300, with_backend("", word), rules), "AssertionError",
                 word);
    }
  }
  // Plain backends: the resolver lets fp8_ds_mla through, later validation stops it, we refuse it
  // in the resolver.
  EXPECT_EQ(chosen(upstream_rules(Up::kCuda, kBlackwell, with_backend(infer, "fp8_ds_mla"), kPr))
                .kv_cache_dtype.element,
            DType::kF8E4M3);
  expect_one(upstream_rules(Up::kCuda, kBlackwell, with_backend(infer, "fp8_ds_mla"), kLater),
             "ValueError", "fp8_ds_mla");
  expect_one(upstream_rules(Up::kCuda, kBlackwell, with_backend(infer, "fp8_ds_mla"), kAdopted),
             "ours", "fp8_ds_mla");
  // SM12x takes three words; auto fails both in the validation and in the resolver.
  const auto client = [&](const char* word) {
    return upstream_rules(Up::kCuda, kBlackwellClient, with_backend("", word), kLater);
  };
  for (const char* word : {"fp8", "fp8_e4m3", "fp8_ds_mla"}) {
    EXPECT_EQ(chosen(client(word)).kv_cache_dtype.name, "fp8_ds_mla");
  }
  expect_one(client("fp8_e5m2"), "ValueError", "fp8_e5m2");
  EXPECT_EQ(refused(client("auto")).size(), 2u);

  Request option = with_backend("", "auto");
  option.packed_accepts_auto = true;
  EXPECT_EQ(chosen(upstream_rules(Up::kCuda, kHopper, option)).kv_cache_dtype.name, "fp8_ds_mla");
}

TEST(UpstreamRules, BadInput) {
  const struct {
    const char* what;
    void (*change)(Request&);
    const char *raises, *given;
  } cases[] = {
      {"heads % tp", [](Request& r) { r.num_heads = 65, r.tensor_parallel_size = 2; },
       "AssertionError", "65"},
      {"o_groups < tp",
       [](Request& r) { r.num_heads = 128, r.tensor_parallel_size = 16, r.o_groups = 8; },
       "ZeroDivisionError", "8"},
      {"heads of a rank", [](Request& r) { r.num_heads = 256; }, "ValueError", "256"},
      {"no heads", [](Request& r) { r.num_heads = 0; }, "ours", "0"},
      {"tp", [](Request& r) { r.tensor_parallel_size = 0; }, "ours", "0"},
      {"ratio",
       [](Request& r) {
         r.compress_ratios = {1, 4, 64};
       },
       "ValueError", "64"},
      {"negative ratio", [](Request& r) { r.compress_ratios = {-4}; }, "ValueError", "-4"},
      {"no cache config", [](Request& r) { r.has_cache_config = false; }, "AssertionError", "none"},
      {"packed, bf16 cache", [](Request& r) { r.kv_cache_dtype = "bfloat16"; }, "AssertionError",
       "bfloat16"},
      {"V3.2 name", [](Request& r) { r.backend = "FLASHINFER_MLA_SPARSE"; }, "ValueError",
       "FLASHINFER_MLA_SPARSE"},
      {"unknown name", [](Request& r) { r.backend = "NOPE"; }, "ours", "NOPE"},
      {"MXFP4 indexer off SM10x", [](Request& r) { r.mxfp4_indexer = true; }, "ValueError",
       "sm_90"},
      {"DCP", [](Request& r) { r.decode_context_parallel_size = 2; }, "NotImplementedError", "2"},
  };
  for (const auto& c : cases) {
    SCOPED_TRACE(c.what);
    Request request = with_backend("");
    c.change(request);
    expect_one(upstream_rules(Up::kCuda, kHopper, request), c.raises, c.given);
  }
}

TEST(UpstreamRules, BadInputThatIsGoodElsewhere) {
  Request heads = with_backend("");
  heads.num_heads = 129;
  EXPECT_EQ(chosen(upstream_rules(Up::kRocm, kMi300, heads)).padded_heads, 129);

  Request mxfp4 = with_backend("");
  mxfp4.mxfp4_indexer = true;
  EXPECT_EQ(chosen(upstream_rules(Up::kCuda, kBlackwell, mxfp4)).cls, Class::kFlashMla);

  Request offload = with_backend("");
  offload.sparse_offload = true;
  EXPECT_EQ(chosen(upstream_rules(Up::kCuda, kHopper, offload, kLater)).cls, Class::kFlashMla);
  offload.backend = "FLASHINFER_MLA_SPARSE_DSV4";
  expect_one(upstream_rules(Up::kCuda, kBlackwell, offload, kLater), "NotImplementedError",
             "DeepseekV4FlashInferMLAAttention");

  Request dcp = with_backend("");
  dcp.decode_context_parallel_size = 2;
  dcp.compress_ratios = {0, 1};
  EXPECT_EQ(chosen(upstream_rules(Up::kCuda, kHopper, dcp)).cls, Class::kFlashMla);

  Request old_flashinfer = with_backend("");
  old_flashinfer.flashinfer_decode_api = false;
  expect_one(upstream_rules(Up::kCuda, kBlackwellClient, old_flashinfer), "ValueError", "none");

  Request blocks = with_backend("");
  blocks.block_size = 64;
  const Choice replaced = chosen(upstream_rules(Up::kCuda, kHopper, blocks));
  EXPECT_EQ(replaced.block_size, 256);
  EXPECT_TRUE(replaced.block_size_replaced);

  Request no_scale = with_backend("");
  no_scale.wo_a_has_scale = false;
  EXPECT_EQ(chosen(upstream_rules(Up::kCuda, kHopper, no_scale)).recipe, std::nullopt);
  expect_one(upstream_rules(Up::kCuda, kHopper, no_scale, kPr), "AttributeError", "none");
}

TEST(UpstreamRules, AllConditionsAreListed) {
  Request request = with_backend("", "bfloat16");
  request.num_heads = 257;
  request.tensor_parallel_size = 2;
  request.o_groups = 1;
  request.compress_ratios = {3, 5};
  request.has_cache_config = false;
  const std::vector<Refusal> refusals =
      refused(upstream_rules(Up::kCuda, Capability{7, 5}, request));
  // heads % tp, o_groups, cache config, two ratios, device, cache dtype; 257 / 2 = 128 heads fit.
  ASSERT_EQ(refusals.size(), 7u);
  for (const Refusal& refusal : refusals) {
    EXPECT_FALSE(refusal.reason.condition.empty());
    EXPECT_FALSE(refusal.reason.required.empty());
    EXPECT_FALSE(refusal.reason.given.empty());
  }
}

}  // namespace
}  // namespace dsv4
