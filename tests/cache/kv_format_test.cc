// Row formats against the byte-exact description and golden bytes of spec/cache_layouts.md.
#include "cache/kv_format.h"

#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "core/numbers.h"
#include "dsv4/error.h"
#include "dsv4/numerics.h"

namespace dsv4 {
namespace {

constexpr std::byte kGuard{0xa5};
constexpr KvFormat kAllFormats[] = {KvFormat::kFp8DsMla, KvFormat::kBf16,     KvFormat::kFp8,
                                    KvFormat::kF32,      KvFormat::kIndexFp8, KvFormat::kIndexMxfp4,
                                    KvFormat::kIndexF32, KvFormat::kStateF32};

int usual_row_elems(KvFormat format) {
  switch (format) {
    case KvFormat::kIndexFp8:
    case KvFormat::kIndexMxfp4:
    case KvFormat::kIndexF32:
      return 128;
    case KvFormat::kStateF32:
      return 1024;
    default:
      return 512;
  }
}

// A cache in host memory, every byte a guard.
struct TestCache {
  std::vector<std::byte> bytes;
  CacheView view;
  TestCache(KvFormat format, int row_elems, int num_blocks, int rows, int64_t padding_bytes = 0) {
    const int64_t stride = page_bytes(format, rows, row_elems) + padding_bytes;
    bytes.assign(static_cast<size_t>(num_blocks * stride), kGuard);
    view = {.base = bytes.data(),
            .block_stride_bytes = stride,
            .num_blocks = num_blocks,
            .rows_per_block = rows,
            .format = format,
            .row_elems = row_elems};
  }
  uint8_t at(int64_t offset) const {
    return std::to_integer<uint8_t>(bytes[static_cast<size_t>(offset)]);
  }
};

std::vector<float> random_row(std::mt19937& rng, int n, float spread) {
  std::normal_distribution<float> normal(0.0f, 1.0f);
  std::vector<float> row(static_cast<size_t>(n));
  // Every tile of 32 gets its own magnitude, so that scales differ.
  for (int i = 0; i < n; i += 32) {
    const float magnitude = std::exp2(spread * normal(rng));
    for (int j = i; j < std::min(n, i + 32); ++j) {
      row[static_cast<size_t>(j)] = magnitude * normal(rng);
    }
  }
  return row;
}

std::string error_of(auto&& call) {
  try {
    call();
  } catch (const Error& error) {
    return std::string(error_code_name(error.code())) + ": " + error.what();
  }
  return "no error";
}

TEST(KvFormatNames, RoundTrip) {
  EXPECT_EQ(parse_kv_format("fp8_ds_mla"), KvFormat::kFp8DsMla);
  EXPECT_EQ(parse_kv_format("bf16"), KvFormat::kBf16);
  EXPECT_EQ(parse_kv_format("fp8"), KvFormat::kFp8);
  EXPECT_EQ(parse_kv_format("f32"), KvFormat::kF32);
  for (const char* word : {"", "auto", "fp8_e5m2", "index_fp8", "state_f32", "FP8", "fp8 "}) {
    EXPECT_EQ(parse_kv_format(word), std::nullopt) << word;
  }
  EXPECT_STREQ(kv_format_name(KvFormat::kIndexFp8), "index_fp8");
  EXPECT_STREQ(kv_format_name(KvFormat::kIndexMxfp4), "index_mxfp4");
  EXPECT_STREQ(cache_role_name(CacheRole::kIndexState), "index_state");
  EXPECT_STREQ(cache_role_name(CacheRole::kWindow), "window");
}

TEST(Numerics, ParseFindsEachByItsName) {
  EXPECT_EQ(parse_numerics("serving"), kServing);
  EXPECT_EQ(parse_numerics("reference"), kReference);
  EXPECT_EQ(parse_numerics("exact"), kExact);
  for (const Products products : {Products::kF32, Products::kFp8}) {
    EXPECT_EQ(parse_products(products_name(products)), products);
  }
  EXPECT_EQ(parse_products("bf16"), std::nullopt);
  EXPECT_EQ(kServing.products, Products::kF32);
  EXPECT_EQ(kServing.str(), "serving numerics");
  Numerics fp8 = kReference;
  fp8.products = Products::kFp8;
  EXPECT_EQ(fp8.str(), "reference numerics with fp8 products");
  for (const char* word : {"", "Serving", "exact ", "fast"}) {
    EXPECT_EQ(parse_numerics(word), std::nullopt) << word;
  }
}

// spec/cache_layouts.md 1 and 5, spec/dispatch.md 4.2: used bytes and 576-aligned pages.
TEST(PageBytes, GoldenTable) {
  EXPECT_EQ(page_bytes(KvFormat::kFp8DsMla, 2, 512), 1168);
  EXPECT_EQ(page_bytes(KvFormat::kFp8DsMla, 16, 512), 9344);
  EXPECT_EQ(page_bytes(KvFormat::kFp8DsMla, 64, 512), 37376);
  EXPECT_EQ(page_bytes(KvFormat::kFp8DsMla, 256, 512), 149504);
  EXPECT_EQ(page_bytes(KvFormat::kBf16, 64, 512), 65536);
  EXPECT_EQ(page_bytes(KvFormat::kFp8, 64, 512), 32768);
  EXPECT_EQ(page_bytes(KvFormat::kIndexFp8, 64, 128), 8448);
  EXPECT_EQ(page_bytes(KvFormat::kIndexMxfp4, 64, 128), 4352);
  EXPECT_EQ(page_bytes(KvFormat::kStateF32, 4, 2048), 32768);

  EXPECT_EQ(upstream_page_bytes(KvFormat::kFp8DsMla, 2, 512), 1728);
  EXPECT_EQ(upstream_page_bytes(KvFormat::kFp8DsMla, 16, 512), 9792);
  EXPECT_EQ(upstream_page_bytes(KvFormat::kFp8DsMla, 64, 512), 37440);
  EXPECT_EQ(upstream_page_bytes(KvFormat::kFp8DsMla, 256, 512), 149760);
  EXPECT_EQ(upstream_page_bytes(KvFormat::kIndexFp8, 64, 128), 8640);
  EXPECT_EQ(upstream_page_bytes(KvFormat::kIndexFp8, 64, 128, 512), 8704);
  EXPECT_EQ(upstream_page_bytes(KvFormat::kIndexMxfp4, 64, 128), 4608);
  EXPECT_EQ(upstream_page_bytes(KvFormat::kIndexMxfp4, 64, 128, 512), 4608);
  EXPECT_EQ(upstream_page_bytes(KvFormat::kStateF32, 4, 2 * 2 * 512), 32832);  // ratio 4, main
  EXPECT_EQ(upstream_page_bytes(KvFormat::kStateF32, 4, 2 * 2 * 128), 8640);   // ratio 4, indexer
  EXPECT_EQ(upstream_page_bytes(KvFormat::kStateF32, 8, 2 * 1 * 512), 32832);  // ratio 128
}

TEST(PageBytes, RefusesWhatAFormatCannotHold) {
  EXPECT_NE(error_of([] { page_bytes(KvFormat::kFp8DsMla, 64, 128); }).find("expected 512"),
            std::string::npos);
  EXPECT_NE(error_of([] { page_bytes(KvFormat::kIndexMxfp4, 64, 48); }).find("multiple of 32"),
            std::string::npos);
  for (KvFormat format : kAllFormats) {
    const int n = usual_row_elems(format);
    EXPECT_NE(error_of([&] { page_bytes(format, 0, n); }).find("invalid argument"),
              std::string::npos);
    EXPECT_NE(error_of([&] { page_bytes(format, int64_t{1} << 62, n); }).find("invalid argument"),
              std::string::npos);
    EXPECT_NE(error_of([&] { page_bytes(format, 1, 0); }).find("invalid argument"),
              std::string::npos);
  }
}

TEST(RowAddress, IsSixtyFourBit) {
  // Slot 7 of block 100000 in pages of 37440 bytes: beyond 2^31.
  CacheView view{.base = nullptr,
                 .block_stride_bytes = 37440,
                 .num_blocks = 200000,
                 .rows_per_block = 64,
                 .format = KvFormat::kFp8DsMla,
                 .row_elems = 512};
  std::vector<std::byte> origin(1);
  view.base = origin.data();
  const RowAddress row = row_address(view, int64_t{100000} * 64 + 7);
  const auto offset = [&](const std::byte* p) {
    return static_cast<int64_t>(reinterpret_cast<uintptr_t>(p) -
                                reinterpret_cast<uintptr_t>(view.base));
  };
  EXPECT_EQ(offset(row.values), int64_t{100000} * 37440 + 7 * 576);
  EXPECT_EQ(offset(row.scales), int64_t{100000} * 37440 + 64 * 576 + 7 * 8);
}

TEST(Fp8DsMla, GoldenTile) {
  TestCache cache(KvFormat::kFp8DsMla, 512, 1, 2);
  std::vector<float> row(512, 0.0f);
  row[0] = 1.0f, row[1] = -0.3f, row[2] = 0.001f, row[3] = 100.0f;
  row[64] = 448.0f;   // tile 1 -> byte 127
  row[128] = 450.0f;  // tile 2 -> byte 128
  row[192] = 449.0f;  // rounds to 448 in bf16 -> byte 127
  row[448] = 1.0f, row[511] = -0.3f;
  encode_row(cache.view, 1, row.data());
  const int64_t values = 576, scales = 2 * 576 + 8;
  const uint8_t codes[] = {0x48, 0xba, 0x02, 0x7c, 0x00};
  for (int i = 0; i < 5; ++i) EXPECT_EQ(cache.at(values + i), codes[i]) << i;
  const uint8_t bytes[] = {0x7d, 127, 128, 127, 105, 105, 105, 0};
  for (int i = 0; i < 8; ++i) EXPECT_EQ(cache.at(scales + i), bytes[i]) << i;
  EXPECT_EQ(cache.at(values + 64), 0x7e);
  EXPECT_EQ(cache.at(values + 128), 0x76);  // 225 ties between 224 and 240: even
  // bf16(1) = 0x3f80, bf16(-0.3) = 0xbe9a, little-endian.
  EXPECT_EQ(cache.at(values + 448), 0x80);
  EXPECT_EQ(cache.at(values + 449), 0x3f);
  EXPECT_EQ(cache.at(values + 574), 0x9a);
  EXPECT_EQ(cache.at(values + 575), 0xbe);
}

// The exponent rule at its edges: amax -> e of spec/numerics.md 5.
TEST(Fp8DsMla, ScaleBytes) {
  struct Case {
    float amax;
    int exponent;
  };
  const float after_0875 = bf16_to_f32(static_cast<uint16_t>(f32_to_bf16(0.875f) + 1));
  for (const Case& c : {Case{1e-4f, -22},
                        {1e-5f, -22},
                        {0.0f, -22},
                        {0.875f, -9},
                        {after_0875, -8},
                        {1.0f, -8},
                        {448.0f, 0},
                        {450.0f, 1},
                        {3.5f, -7},
                        {3e38f, 120}}) {
    for (float sign : {1.0f, -1.0f}) {
      TestCache cache(KvFormat::kFp8DsMla, 512, 1, 1);
      std::vector<float> row(512, 0.0f);
      row[6 * 64 + 17] = sign * c.amax;
      encode_row(cache.view, 0, row.data());
      EXPECT_EQ(int{cache.at(576 + 6)}, c.exponent + 127) << sign * c.amax;
      EXPECT_EQ(int{cache.at(576 + 5)}, 105);
      EXPECT_EQ(int{cache.at(576 + 7)}, 0);
    }
  }
}

TEST(Fp8DsMla, NonFiniteTilesDecodeAsNanAndOnlyThey) {
  for (float bad : {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity(),
                    -std::numeric_limits<float>::infinity()}) {
    TestCache cache(KvFormat::kFp8DsMla, 512, 1, 1);
    std::vector<float> row(512, 1.0f), out(512);
    row[130] = bad;
    encode_row(cache.view, 0, row.data());
    EXPECT_EQ(cache.at(576 + 2), 255);
    decode_row(cache.view, 0, out.data());
    for (int i = 0; i < 512; ++i) {
      if (i / 64 == 2) {
        EXPECT_TRUE(std::isnan(out[static_cast<size_t>(i)])) << i;
      } else {
        EXPECT_EQ(out[static_cast<size_t>(i)], 1.0f) << i;
      }
    }
  }
}

// The scalar definition of core/numbers.h, applied tile by tile as the layout says.
TEST(Fp8DsMla, MatchesTheDefinitionOnRandomRows) {
  std::mt19937 rng(11);
  for (int trial = 0; trial < 200; ++trial) {
    TestCache cache(KvFormat::kFp8DsMla, 512, 1, 3);
    const std::vector<float> row = random_row(rng, 512, 8.0f);
    encode_row(cache.view, 1, row.data());
    for (int tile = 0; tile < 7; ++tile) {
      float amax = 1e-4f;
      for (int i = 64 * tile; i < 64 * tile + 64; ++i)
        amax = std::max(amax, std::fabs(round_bf16(row[static_cast<size_t>(i)])));
      const int e = static_cast<int>(std::ceil(std::log2(static_cast<double>(amax) / 448.0)));
      ASSERT_EQ(int{cache.at(3 * 576 + 8 + tile)}, e + 127);
      for (int i = 64 * tile; i < 64 * tile + 64; ++i) {
        ASSERT_EQ(cache.at(576 + i),
                  f32_to_e4m3(std::ldexp(round_bf16(row[static_cast<size_t>(i)]), -e)))
            << i;
      }
    }
    std::vector<float> out(512);
    decode_row(cache.view, 1, out.data());
    for (int i = 448; i < 512; ++i) {
      ASSERT_EQ(out[static_cast<size_t>(i)], round_bf16(row[static_cast<size_t>(i)]));
    }
    // Half a step of E4M3: 2^-4 relative for normal codes, half of 2^-9 steps of the scale below.
    for (int i = 0; i < 448; ++i) {
      const float scale = e8m0_to_f32(cache.at(3 * 576 + 8 + i / 64));
      const float exact = round_bf16(row[static_cast<size_t>(i)]);
      ASSERT_LE(std::fabs(out[static_cast<size_t>(i)] - exact),
                std::max(0x1p-4f * std::fabs(exact), 0x1p-10f * scale));
    }
  }
}

// Every pair of code and scale byte decodes to the product that readers compute in bf16.
TEST(Fp8DsMla, DecodesAllCodesAndScales) {
  TestCache cache(KvFormat::kFp8DsMla, 512, 1, 1);
  std::vector<float> out(512);
  for (int scale = 0; scale < 256; ++scale) {
    for (int tile = 0; tile < 7; ++tile)
      cache.bytes[static_cast<size_t>(576 + tile)] = std::byte(scale);
    for (int i = 0; i < 256; ++i) cache.bytes[static_cast<size_t>(i)] = std::byte(i);
    for (int i = 256; i < 576; ++i) cache.bytes[static_cast<size_t>(i)] = std::byte{0};
    decode_row(cache.view, 0, out.data());
    for (int code = 0; code < 256; ++code) {
      const float expected = round_bf16(e4m3_to_f32(static_cast<uint8_t>(code)) *
                                        e8m0_to_f32(static_cast<uint8_t>(scale)));
      if (std::isnan(expected)) {
        ASSERT_TRUE(std::isnan(out[static_cast<size_t>(code)]));
      } else {
        ASSERT_EQ(out[static_cast<size_t>(code)], expected) << code << " " << scale;
        // Exact for the scales that our writer produces.
        if (scale >= 105 && scale <= 246) {
          ASSERT_EQ(expected, std::ldexp(e4m3_to_f32(static_cast<uint8_t>(code)), scale - 127));
        }
      }
    }
  }
}

// The fast E4M3 encoder, seen through per-tensor FP8 rows, against the definition: all bf16 values,
// ties and their neighbours included; other scales reach products with all mantissa bits.
TEST(Fp8, EncodesEveryBf16ValueAsTheDefinition) {
  TestCache cache(KvFormat::kFp8, 65536, 1, 1);
  std::vector<float> row(65536);
  for (uint32_t bits = 0; bits < 65536; ++bits) {
    row[bits] = bf16_to_f32(static_cast<uint16_t>(bits));
  }
  for (float scale : {1.0f, 0.25f, 3.0f, 0.7f, 448.0f / 17.0f}) {
    encode_row(cache.view, 0, row.data(), scale);
    for (uint32_t bits = 0; bits < 65536; ++bits) {
      ASSERT_EQ(cache.at(bits), f32_to_e4m3(row[bits] * (1.0f / scale))) << bits << " " << scale;
    }
  }
}

TEST(Fp8, RoundsToBf16FirstAndKeepsTheScaleHook) {
  // 17 is the tie between the E4M3 neighbours 16 and 18. bf16 rounds 17.03 to 17, then the tie goes
  // to 16, whose code is even; rounding 17.03 directly gives 18.
  TestCache cache(KvFormat::kFp8, 4, 1, 1);
  const float row[4] = {17.03f, 1000.0f, -1000.0f, 0.25f};
  encode_row(cache.view, 0, row);
  EXPECT_EQ(cache.at(0), f32_to_e4m3(16.0f));
  EXPECT_NE(f32_to_e4m3(17.03f), f32_to_e4m3(16.0f));
  EXPECT_EQ(cache.at(1), 0x7e);
  EXPECT_EQ(cache.at(2), 0xfe);
  encode_row(cache.view, 0, row, 4.0f);
  EXPECT_EQ(cache.at(1), f32_to_e4m3(250.0f));
  EXPECT_EQ(cache.at(3), f32_to_e4m3(0.0625f));
  float out[4];
  decode_row(cache.view, 0, out, 4.0f);
  EXPECT_EQ(out[1], 1024.0f);
  EXPECT_EQ(out[3], 0.25f);
}

TEST(PlainRows, Bf16AndF32) {
  std::mt19937 rng(3);
  for (int n : {1, 33, 512}) {
    const std::vector<float> row = random_row(rng, n, 20.0f);
    std::vector<float> out(row.size());
    for (KvFormat format :
         {KvFormat::kBf16, KvFormat::kF32, KvFormat::kIndexF32, KvFormat::kStateF32}) {
      TestCache cache(format, n, 2, 3);
      encode_row(cache.view, 4, row.data());
      decode_row(cache.view, 4, out.data());
      for (size_t i = 0; i < row.size(); ++i) {
        ASSERT_EQ(out[i], format == KvFormat::kBf16 ? round_bf16(row[i]) : row[i]);
      }
    }
  }
}

TEST(IndexFp8, ValuesThenFloatScales) {
  TestCache cache(KvFormat::kIndexFp8, 128, 1, 64);
  std::vector<float> row(128, 0.0f), out(128);
  row[0] = 1.0f, row[1] = -0.3f, row[2] = 0.001f, row[127] = 100.0f;
  encode_row(cache.view, 5, row.data());
  EXPECT_EQ(cache.at(5 * 128), 0x48);
  EXPECT_EQ(cache.at(5 * 128 + 1), 0xba);
  EXPECT_EQ(cache.at(5 * 128 + 2), 0x02);
  EXPECT_EQ(cache.at(5 * 128 + 127), 0x7c);
  float scale;
  std::memcpy(&scale, cache.bytes.data() + 64 * 128 + 5 * 4, 4);
  EXPECT_EQ(scale, 0.25f);
  decode_row(cache.view, 5, out.data());
  EXPECT_EQ(out[0], 1.0f);
  EXPECT_EQ(out[1], -0.3125f);
  EXPECT_EQ(out[127], 96.0f);  // 400 ties to 384

  std::fill(row.begin(), row.end(), 0.0f);  // floor 1e-4: e = -22
  encode_row(cache.view, 5, row.data());
  std::memcpy(&scale, cache.bytes.data() + 64 * 128 + 5 * 4, 4);
  EXPECT_EQ(scale, 0x1p-22f);
  EXPECT_EQ(cache.at(5 * 128 + 127), 0);

  row[3] = std::numeric_limits<float>::quiet_NaN();
  encode_row(cache.view, 5, row.data());
  std::memcpy(&scale, cache.bytes.data() + 64 * 128 + 5 * 4, 4);
  EXPECT_TRUE(std::isnan(scale));
}

TEST(IndexFp8, MatchesTheDefinitionOnRandomRows) {
  std::mt19937 rng(5);
  for (int n : {32, 128, 129}) {  // 129: the scale area is not 4-byte aligned
    for (int trial = 0; trial < 100; ++trial) {
      TestCache cache(KvFormat::kIndexFp8, n, 1, 3);
      const std::vector<float> row = random_row(rng, n, 8.0f);
      encode_row(cache.view, 2, row.data());
      float amax = 1e-4f;
      for (float v : row) amax = std::max(amax, std::fabs(round_bf16(v)));
      const int e = static_cast<int>(std::ceil(std::log2(static_cast<double>(amax) / 448.0)));
      float scale;
      std::memcpy(&scale, cache.bytes.data() + 3 * n + 8, 4);
      ASSERT_EQ(scale, std::ldexp(1.0f, e));
      for (int i = 0; i < n; ++i) {
        ASSERT_EQ(cache.at(2 * n + i),
                  f32_to_e4m3(std::ldexp(round_bf16(row[static_cast<size_t>(i)]), -e)));
      }
    }
  }
}

TEST(IndexMxfp4, TiesNibblesAndScales) {
  TestCache cache(KvFormat::kIndexMxfp4, 128, 1, 64);
  std::vector<float> row(128, 0.0f), out(128);
  // Block 0, amax 6 -> e = 0: the ties of spec/numerics.md 2 and their negatives.
  const float ties[8] = {0.25f, 0.75f, 1.25f, 1.75f, 2.5f, 3.5f, 5.0f, 6.0f};
  const float rounded[8] = {0.0f, 1.0f, 1.0f, 2.0f, 2.0f, 4.0f, 4.0f, 6.0f};
  const uint8_t codes[8] = {0, 2, 2, 4, 4, 6, 6, 7};
  for (size_t i = 0; i < 8; ++i) row[2 * i] = ties[i], row[2 * i + 1] = -ties[i];
  row[32] = 6.5f;       // block 1: above 6 -> e = 1
  row[64] = 0x1p-130f;  // block 2: below the floor of 6 * 2^-126 -> e = -126
  row[96] = 3.0f * 64;  // block 3: 192 = 6 * 32 -> e = 5
  row[127] = -1.0f * 64;
  encode_row(cache.view, 9, row.data());
  for (int i = 0; i < 8; ++i) {
    EXPECT_EQ(int{cache.at(9 * 64 + i)}, codes[i] | (codes[i] | 8) << 4) << i;
  }
  const uint8_t scales[4] = {127, 128, 1, 132};
  for (int i = 0; i < 4; ++i) EXPECT_EQ(cache.at(64 * 64 + 9 * 4 + i), scales[i]) << i;
  decode_row(cache.view, 9, out.data());
  for (size_t i = 0; i < 8; ++i) {
    EXPECT_EQ(out[2 * i], rounded[i]);
    EXPECT_EQ(out[2 * i + 1], -rounded[i]);
  }
  EXPECT_EQ(out[32], 6.0f);  // 3.25 -> 3, times 2
  EXPECT_EQ(out[64], 0.0f);
  EXPECT_EQ(out[96], 192.0f);
  EXPECT_EQ(out[127], -64.0f);

  row[40] = std::numeric_limits<float>::infinity();
  encode_row(cache.view, 9, row.data());
  decode_row(cache.view, 9, out.data());
  EXPECT_EQ(cache.at(64 * 64 + 9 * 4 + 1), 255);
  EXPECT_TRUE(std::isnan(out[32]) && std::isnan(out[63]));
  EXPECT_EQ(out[96], 192.0f);
}

TEST(IndexMxfp4, DecodesAllCodesAndMatchesTheDefinition) {
  TestCache cache(KvFormat::kIndexMxfp4, 512, 1, 1);
  std::vector<float> out(512);
  for (int scale : {0, 1, 105, 127, 200, 254}) {
    for (int i = 0; i < 256; ++i) cache.bytes[static_cast<size_t>(i)] = std::byte(i);
    for (int i = 0; i < 16; ++i) cache.bytes[static_cast<size_t>(256 + i)] = std::byte(scale);
    decode_row(cache.view, 0, out.data());
    for (int byte = 0; byte < 256; ++byte) {
      for (int half = 0; half < 2; ++half) {
        const int code = half == 0 ? byte & 15 : byte >> 4;
        ASSERT_EQ(
            out[static_cast<size_t>(2 * byte + half)],
            e2m1_to_f32(static_cast<uint8_t>(code)) * e8m0_to_f32(static_cast<uint8_t>(scale)));
      }
    }
  }
  std::mt19937 rng(6);
  for (int trial = 0; trial < 200; ++trial) {
    TestCache random(KvFormat::kIndexMxfp4, 64, 1, 2);
    const std::vector<float> row = random_row(rng, 64, 10.0f);
    encode_row(random.view, 1, row.data());
    for (int block = 0; block < 2; ++block) {
      float amax = 0.0f;
      for (int i = 0; i < 32; ++i)
        amax = std::max(amax, std::fabs(round_bf16(row[static_cast<size_t>(32 * block + i)])));
      const int e = static_cast<int>(std::ceil(std::log2(static_cast<double>(amax) / 6.0)));
      ASSERT_EQ(int{random.at(2 * 32 + 2 + block)}, e + 127);
      for (int i = 32 * block; i < 32 * block + 32; ++i) {
        const uint8_t byte = random.at(32 + i / 2);
        ASSERT_EQ(int{i % 2 == 0 ? byte & 15 : byte >> 4},
                  int{f32_to_e2m1(std::ldexp(round_bf16(row[static_cast<size_t>(i)]), -e))});
      }
    }
  }
}

// What every format promises: other rows and the padding of blocks stay as they were, and encoding
// what was decoded gives the same bytes (fixed point of the format).
TEST(AllFormats, TouchOnlyTheirRowAndAreIdempotent) {
  std::mt19937 rng(7);
  for (KvFormat format : kAllFormats) {
    const int n = usual_row_elems(format);
    for (int rows : {1, 2, 61, 64}) {
      TestCache cache(format, n, 3, rows, 40);
      std::vector<bool> owned(cache.bytes.size(), false);
      std::vector<float> row, out(static_cast<size_t>(n));
      for (int64_t slot : {int64_t{0}, int64_t{3} * rows - 1, int64_t{rows} + rows / 2}) {
        row = random_row(rng, n, 4.0f);
        encode_row(cache.view, slot, row.data());
        const RowLayout layout = row_layout(format, n);
        const RowAddress at = row_address(cache.view, slot);
        for (int64_t i = 0; i < layout.value_bytes; ++i)
          owned[static_cast<size_t>(at.values - cache.bytes.data() + i)] = true;
        for (int64_t i = 0; i < layout.scale_bytes; ++i)
          owned[static_cast<size_t>(at.scales - cache.bytes.data() + i)] = true;
        decode_row(cache.view, slot, out.data());
        encode_row(cache.view, slot, out.data());
        std::vector<float> again(out.size());
        decode_row(cache.view, slot, again.data());
        for (size_t i = 0; i < out.size(); ++i) {
          ASSERT_EQ(std::bit_cast<uint32_t>(out[i]), std::bit_cast<uint32_t>(again[i]))
              << kv_format_name(format) << " " << i;
        }
      }
      for (size_t i = 0; i < owned.size(); ++i) {
        if (!owned[i]) {
          ASSERT_EQ(cache.bytes[i], kGuard) << kv_format_name(format) << " rows " << rows;
        }
      }
    }
  }
}

// ---- FNUZ pages

// What the gfx942 window writer stores: the recipe of spec/cache_layouts.md 1 with 224 for 448.
void encode_fnuz_row(std::byte* page, int64_t rows, int64_t row, const std::vector<float>& values) {
  const RowAddress at = row_in_page(page, rows, row, row_layout(KvFormat::kFp8DsMla, 512));
  for (int tile = 0; tile < 7; ++tile) {
    float amax = 1e-4f;
    for (int i = 64 * tile; i < 64 * tile + 64; ++i)
      amax = std::max(amax, std::fabs(round_bf16(values[static_cast<size_t>(i)])));
    const int e = ceil_log2_ratio(amax, 224.0f);
    at.scales[tile] = std::byte(e + 127);
    for (int i = 64 * tile; i < 64 * tile + 64; ++i)
      at.values[i] =
          std::byte(f32_to_e4m3fnuz(std::ldexp(round_bf16(values[static_cast<size_t>(i)]), -e)));
  }
  at.scales[7] = std::byte{0};
  for (int i = 448; i < 512; ++i) {
    const uint16_t bits = f32_to_bf16(values[static_cast<size_t>(i)]);
    std::memcpy(at.values + 448 + 2 * (i - 448), &bits, 2);
  }
}

TEST(FnuzPages, AreOcpPagesWithScalesPlusOne) {
  std::mt19937 rng(8);
  const int rows = 5;
  for (int trial = 0; trial < 100; ++trial) {
    TestCache ocp(KvFormat::kFp8DsMla, 512, 1, rows), fnuz(KvFormat::kFp8DsMla, 512, 1, rows);
    for (int row = 0; row < rows; ++row) {
      std::vector<float> values = random_row(rng, 512, 8.0f);
      values[7] = -0.0f;
      encode_row(ocp.view, row, values.data());
      encode_fnuz_row(fnuz.bytes.data(), rows, row, values);
    }
    std::vector<std::byte> converted = ocp.bytes;
    ocp_page_to_fnuz(converted.data(), rows);
    ASSERT_EQ(converted, fnuz.bytes);
    // And back: the same values; bytes differ only in the sign of zeros, which FNUZ lacks.
    fnuz_page_to_ocp(converted.data(), rows);
    std::vector<std::byte> expected = ocp.bytes;
    for (int row = 0; row < rows; ++row) {
      for (int i = 0; i < 448; ++i) {
        std::byte& code = expected[static_cast<size_t>(row * 576 + i)];
        if (code == std::byte{0x80}) code = std::byte{0};
      }
    }
    ASSERT_EQ(converted, expected);
  }
}

TEST(FnuzPages, EveryCodeKeepsItsValue) {
  for (int code = 0; code < 256; ++code) {
    TestCache page(KvFormat::kFp8DsMla, 512, 1, 1);
    for (std::byte& byte : page.bytes) byte = std::byte{0};
    for (int tile = 0; tile < 7; ++tile)
      page.bytes[static_cast<size_t>(576 + tile)] = std::byte{120};
    page.bytes[100] = std::byte(code);
    const float value = e4m3fnuz_to_f32(static_cast<uint8_t>(code)) * e8m0_to_f32(120);
    if ((code & 0x7f) == 0x7f) {  // 240: refused, nothing written
      const std::vector<std::byte> before = page.bytes;
      EXPECT_NE(error_of([&] { fnuz_page_to_ocp(page.bytes.data(), 1); }).find("dim 100"),
                std::string::npos);
      EXPECT_EQ(page.bytes, before);
      continue;
    }
    fnuz_page_to_ocp(page.bytes.data(), 1);
    EXPECT_EQ(page.at(576), 119);
    EXPECT_EQ(page.at(583), 0);  // the padding byte is no scale
    std::vector<float> out(512);
    decode_row(page.view, 0, out.data());
    if (code == 0x80) {
      EXPECT_TRUE(std::isnan(out[100]));
    } else {
      EXPECT_EQ(out[100], value) << code;
    }
  }
}

TEST(FnuzPages, RefuseScalesWithoutCounterpart) {
  TestCache page(KvFormat::kFp8DsMla, 512, 1, 2);
  for (std::byte& byte : page.bytes) byte = std::byte{0};
  for (int i = 0; i < 16; ++i) page.bytes[static_cast<size_t>(1152 + i)] = std::byte{100};
  page.bytes[1152 + 8 + 3] = std::byte{254};
  std::vector<std::byte> before = page.bytes;
  EXPECT_NE(
      error_of([&] { ocp_page_to_fnuz(page.bytes.data(), 2); }).find("row 1 of 2, scale byte 3"),
      std::string::npos);
  EXPECT_EQ(page.bytes, before);
  page.bytes[1152 + 8 + 3] = std::byte{0};
  before = page.bytes;
  EXPECT_NE(error_of([&] { fnuz_page_to_ocp(page.bytes.data(), 2); }).find("data corrupt"),
            std::string::npos);
  EXPECT_EQ(page.bytes, before);
  // NaN scales stay NaN in both directions.
  page.bytes[1152 + 8 + 3] = std::byte{255};
  ocp_page_to_fnuz(page.bytes.data(), 2);
  EXPECT_EQ(page.at(1152 + 8 + 3), 255);
  fnuz_page_to_ocp(page.bytes.data(), 2);
  EXPECT_EQ(page.at(1152 + 8 + 3), 255);
}

}  // namespace
}  // namespace dsv4
