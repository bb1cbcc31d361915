// The tables of spec/dispatch.md 3, row by row, and the same question to our own layers.
#include "attention/kv_dtype.h"

#include <gtest/gtest.h>

#include "attention/selection.h"

namespace dsv4 {
namespace {

using upstream::KvCacheDtype;
using upstream::Refusal;
using upstream::Rules;

constexpr Rules kAllRules[] = {Rules::kPullRequest, Rules::kLater, Rules::kAdopted};

TEST(UpstreamKvCacheDtype, PackedWordIsKept) {
  for (Rules rules : kAllRules) {
    const auto answer = upstream::resolve_kv_cache_dtype(true, "fp8_ds_mla", {.rules = rules});
    ASSERT_TRUE(std::holds_alternative<KvCacheDtype>(answer));
    EXPECT_EQ(std::get<KvCacheDtype>(answer),
              (KvCacheDtype{"fp8_ds_mla", DType::kU8, std::nullopt, false}));
  }
}

TEST(UpstreamKvCacheDtype, PackedTakesAnyFp8WordAndWritesBack) {
  for (Rules rules : kAllRules) {
    for (const char* word : {"fp8", "fp8_e4m3", "fp8_inc"}) {
      const auto answer = upstream::resolve_kv_cache_dtype(true, word, {.rules = rules});
      ASSERT_TRUE(std::holds_alternative<KvCacheDtype>(answer)) << word;
      EXPECT_EQ(std::get<KvCacheDtype>(answer),
                (KvCacheDtype{"fp8_ds_mla", DType::kU8, "fp8_ds_mla", true}))
          << word;
      const auto without =
          upstream::resolve_kv_cache_dtype(true, word, {.rules = rules, .has_cache_config = false});
      ASSERT_TRUE(std::holds_alternative<KvCacheDtype>(without)) << word;
      EXPECT_EQ(std::get<KvCacheDtype>(without).write_back, std::nullopt) << word;
    }
  }
}

TEST(UpstreamKvCacheDtype, PackedRefusesOtherWordsByName) {
  for (Rules rules : kAllRules) {
    for (const char* word : {"auto", "bfloat16", "int8", ""}) {
      const auto answer = upstream::resolve_kv_cache_dtype(true, word, {.rules = rules});
      ASSERT_TRUE(std::holds_alternative<Refusal>(answer)) << word;
      EXPECT_EQ(std::get<Refusal>(answer).raises, "AssertionError");
      EXPECT_EQ(std::get<Refusal>(answer).reason.given, word);
    }
  }
}

TEST(UpstreamKvCacheDtype, PlainKeepsTheWord) {
  const struct {
    const char* word;
    DType element;
  } cases[] = {{"fp8", DType::kF8E4M3},
               {"fp8_e4m3", DType::kF8E4M3},
               {"auto", DType::kBf16},
               {"bfloat16", DType::kBf16},
               {"int8", DType::kBf16}};
  for (Rules rules : kAllRules) {
    for (const auto& c : cases) {
      const auto answer = upstream::resolve_kv_cache_dtype(false, c.word, {.rules = rules});
      ASSERT_TRUE(std::holds_alternative<KvCacheDtype>(answer)) << c.word;
      EXPECT_EQ(std::get<KvCacheDtype>(answer),
                (KvCacheDtype{c.word, c.element, std::nullopt, false}));
    }
  }
}

TEST(UpstreamKvCacheDtype, WhatOnlyTheAdoptedRulesRefuse) {
  const struct {
    bool packed;
    const char* word;
  } cases[] = {{true, "fp8_e5m2"}, {false, "fp8_e5m2"}, {false, "fp8_ds_mla"}};
  for (const auto& c : cases) {
    for (Rules rules : {Rules::kPullRequest, Rules::kLater}) {
      const auto answer = upstream::resolve_kv_cache_dtype(c.packed, c.word, {.rules = rules});
      ASSERT_TRUE(std::holds_alternative<KvCacheDtype>(answer)) << c.word;
      EXPECT_EQ(std::get<KvCacheDtype>(answer).element, c.packed ? DType::kU8 : DType::kF8E4M3);
    }
    const auto answer = upstream::resolve_kv_cache_dtype(c.packed, c.word);
    ASSERT_TRUE(std::holds_alternative<Refusal>(answer)) << c.word;
    EXPECT_EQ(std::get<Refusal>(answer).raises, "ours");
    EXPECT_EQ(std::get<Refusal>(answer).reason.given, c.word);
  }
}

TEST(UpstreamKvCacheDtype, AutoOnPackedIsAnOption) {
  const auto answer = upstream::resolve_kv_cache_dtype(true, "auto", {.packed_accepts_auto = true});
  ASSERT_TRUE(std::holds_alternative<KvCacheDtype>(answer));
  EXPECT_EQ(std::get<KvCacheDtype>(answer),
            (KvCacheDtype{"fp8_ds_mla", DType::kU8, "fp8_ds_mla", true}));
  EXPECT_TRUE(std::holds_alternative<Refusal>(
      upstream::resolve_kv_cache_dtype(true, "bfloat16", {.packed_accepts_auto = true})));
}

// ---- our own layers

AttentionDescriptor packed_backend() {
  AttentionDescriptor out;
  out.name = "PACKED";
  out.kv_formats = {KvFormat::kFp8DsMla};
  out.native_format = KvFormat::kFp8DsMla;
  out.packed_layout = true;
  return out;
}

AttentionDescriptor plain_backend() {
  AttentionDescriptor out;
  out.name = "PLAIN";
  out.kv_formats = {KvFormat::kBf16, KvFormat::kFp8};
  out.native_format = KvFormat::kBf16;
  out.packed_layout = false;
  return out;
}

AttentionDescriptor all_formats_backend() {
  AttentionDescriptor out = packed_backend();
  out.name = "ALL";
  out.kv_formats = {KvFormat::kFp8DsMla, KvFormat::kBf16, KvFormat::kFp8, KvFormat::kF32};
  return out;
}

// Expected format per backend; nullopt: refused.
struct Row {
  const char* word;
  std::optional<KvFormat> packed, plain, all;
};

void expect_rows(const Numerics& numerics, std::span<const Row> rows) {
  const AttentionDescriptor backends[] = {packed_backend(), plain_backend(), all_formats_backend()};
  for (const Row& row : rows) {
    const std::optional<KvFormat> expected[] = {row.packed, row.plain, row.all};
    for (size_t i = 0; i < 3; ++i) {
      const auto answer = resolve_kv_cache_dtype(backends[i], numerics, row.word);
      const std::string where =
          std::string(backends[i].name) + " " + row.word + " " + std::string(numerics.name);
      ASSERT_EQ(std::holds_alternative<KvFormat>(answer), expected[i].has_value()) << where;
      if (expected[i]) {
        EXPECT_EQ(std::get<KvFormat>(answer), *expected[i]) << where;
      } else {
        const Reason& reason = std::get<Reason>(answer);
        EXPECT_FALSE(reason.required.empty()) << where;
        EXPECT_FALSE(reason.given.empty()) << where;
        if (*row.word != 0 && std::string(row.word) != "auto") {
          EXPECT_EQ(reason.given, row.word) << where;
        }
      }
    }
  }
}

constexpr KvFormat kPacked = KvFormat::kFp8DsMla;
constexpr KvFormat kBf16 = KvFormat::kBf16;
constexpr KvFormat kFp8 = KvFormat::kFp8;
constexpr KvFormat kF32 = KvFormat::kF32;
constexpr std::nullopt_t kNo = std::nullopt;

TEST(KvCacheDtype, QuantisedNumerics) {
  const Row rows[] = {
      {"", kPacked, kBf16, kPacked},
      {"auto", kPacked, kBf16, kPacked},
      {"fp8", kPacked, kFp8, kFp8},
      {"fp8_e4m3", kPacked, kFp8, kFp8},
      {"fp8_ds_mla", kPacked, kNo, kPacked},
      {"bf16", kNo, kBf16, kBf16},
      {"bfloat16", kNo, kBf16, kBf16},
      {"fp8_e5m2", kNo, kNo, kNo},
      {"f32", kNo, kNo, kNo},
      {"fp8_inc", kNo, kNo, kNo},
      {"int8", kNo, kNo, kNo},
      {"index_fp8", kNo, kNo, kNo},
      {"FP8", kNo, kNo, kNo},
  };
  expect_rows(kServing, rows);
  expect_rows(kReference, rows);
}

TEST(KvCacheDtype, ExactNumerics) {
  const Row rows[] = {
      {"", kNo, kNo, kF32},        {"auto", kNo, kNo, kF32},      {"f32", kNo, kNo, kF32},
      {"bf16", kNo, kNo, kNo},     {"fp8_ds_mla", kNo, kNo, kNo}, {"fp8", kNo, kNo, kNo},
      {"fp8_e5m2", kNo, kNo, kNo},
  };
  expect_rows(kExact, rows);
}

TEST(KvCacheDtype, UnknownWordListsTheKnownOnes) {
  const auto answer = resolve_kv_cache_dtype(all_formats_backend(), kServing, "int4");
  ASSERT_TRUE(std::holds_alternative<Reason>(answer));
  EXPECT_NE(std::get<Reason>(answer).required.find("fp8_ds_mla"), std::string::npos);
}

}  // namespace
}  // namespace dsv4
