// Which roundings a step applies: one value, passed down, not a flag read in many places. Source:
// design of the divergence tables of spec/attention.md 9 and spec/compressor.md 1.4, 2.4.
#pragma once
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "dsv4/cache.h"
#include "dsv4/dtype.h"

namespace dsv4 {

/// How the grouped output projection is evaluated.
enum class WoA : uint8_t {
  kFp8,   ///< inverse RoPE in f32, FP8 groups of 128, FP8 weights
  kBf16,  ///< inverse RoPE rounded once to bf16, weights dequantised (exact in bf16)
  kF32,   ///< no rounding
};

/// How the attention layer's products of quantised input and FP8 weights are summed.
enum class Products : uint8_t {
  kF32,  ///< in f32: off by less than the rounding of the result to bf16
  /// On FP8 tensor cores (sm_90), as vLLM does with DeepGEMM: 13 bits below the leading one are
  /// kept inside a block of 128 columns, blocks are added in f32. A product is off by 1.3e-4, root
  /// mean square; faster from about 8 tokens a step on.
  kFp8,
};

struct Numerics {
  std::string_view name;
  DType activation;            ///< kBf16, or kF32 in `exact`
  bool quantise_linear_input;  ///< FP8 per token and 128 columns before FP8 and FP4 weights
  KvFormat kv;
  KvFormat index;
  bool index_hadamard;
  WoA wo_a;
  bool round_p_to_bf16;
  Products products = Products::kF32;
  /// "serving numerics", "serving numerics with fp8 products".
  std::string str() const;
  bool operator==(const Numerics&) const = default;
};

/// Column V: what serving systems do (the default).
inline constexpr Numerics kServing{
    "serving",           DType::kBf16, true,      KvFormat::kFp8DsMla,
    KvFormat::kIndexFp8, false,        WoA::kFp8, true};
/// Column R where it differs and matters: Hadamard and MXFP4 in the indexer, bf16 wo_a.
inline constexpr Numerics kReference{
    "reference",           DType::kBf16, true,       KvFormat::kFp8DsMla,
    KvFormat::kIndexMxfp4, true,         WoA::kBf16, true};
/// No quantisation of activations or caches, float32 throughout.
inline constexpr Numerics kExact{"exact", DType::kF32, false, KvFormat::kF32, KvFormat::kIndexF32,
                                 false,   WoA::kF32,   false};

/// "serving", "reference", "exact"; nullopt for another word.
std::optional<Numerics> parse_numerics(std::string_view name);
/// "f32", "fp8"; nullopt for another word.
std::optional<Products> parse_products(std::string_view name);
const char* products_name(Products products);

}  // namespace dsv4
