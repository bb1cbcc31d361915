// What vLLM answers when it is asked which attention class serves a DeepSeek-V4 model: its decision
// tables as pure functions, for comparison with our own selection and for users who come from it.
// Nothing else in the library decides by these rules.
// Source: spec/dispatch.md 1.1, 1.2, 1.4, 1.7, 2, 3, 10.
#pragma once
#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "attention/einsum_recipe.h"
#include "attention/kv_dtype.h"
#include "dsv4/backend.h"

namespace dsv4::upstream {

enum class Platform : uint8_t { kCuda, kRocm, kXpu, kCpu, kOther };

/// Classes derived from the abstract layer.
enum class Class : uint8_t { kFlashMla, kFlashInfer, kFlashInferSm120, kRocmAiter };

/// Model module of a platform: "nvidia", "amd", "xpu", "cpu".
std::string_view model_module(Platform platform, Rules rules);

/// Class-level members and the answers of the backend descriptor.
struct ClassFacts {
  std::string_view class_name;
  std::string_view backend_name;
  bool packed_layout;
  bool own_swa_backend;          ///< false: the default one
  int prefill_chunk_requests;    ///< gathered at once into the bf16 workspace; 0: gathers nothing
  bool supports_sparse_offload;  ///< HiSparse
  int aux_streams;               ///< 0: everything runs in sequence
  std::vector<std::string_view> kv_cache_dtypes;
  DType activation;
  int head_size;
  int kernel_block_size;  ///< tokens
  bool mla, sparse, sink;
  std::vector<Capability> capabilities;  ///< NVIDIA: any minor of the major; AMD: exactly these
  std::string_view graph_support;        ///< "uniform batch"
  bool has_impl_class;                   ///< false: asking for one is a NotImplementedError
};
/// nullopt: the class does not exist under these rules.
std::optional<ClassFacts> class_facts(Class cls, Rules rules);

/// Shape of a cache of `num_blocks` blocks of `rows` rows: (blocks, rows, 584) bytes when packed,
/// else (blocks, rows, 512) elements.
std::array<int64_t, 3> cache_shape(Class cls, bool packed_rows, int64_t num_blocks, int64_t rows);

/// get_padded_num_q_heads of one rank. Upstream does not guard against num_heads < 1; refused here.
std::variant<int, Refusal> padded_num_q_heads(Class cls, int num_heads, Rules rules);

/// The class that a backend name stands for on a platform. With class_facts() as `select`, this is
/// the `resolve` of the two functions that upstream once had. `requested` empty: none.
std::variant<Class, Refusal> resolve(std::string_view requested, Platform platform,
                                     const std::optional<Capability>& capability, Rules rules);

/// All that the answer depends on.
struct Request {
  std::string backend;  ///< empty: none
  std::string kv_cache_dtype = "auto";
  int num_heads = 64;
  int o_groups = 8;
  int tensor_parallel_size = 1;
  std::vector<int> compress_ratios = {0, 4, 128};
  bool has_cache_config = true;
  int block_size = 256;
  bool packed_accepts_auto = false;
  bool wo_a_has_scale = true;
  bool mxfp4_indexer = false;
  bool sparse_offload = false;           ///< HiSparse
  int decode_context_parallel_size = 1;  ///< DCP
  bool flashinfer_decode_api = true;     ///< the installed FlashInfer has the SM12x decode call
};

struct Choice {
  std::string_view module;
  Class cls;
  int heads_per_rank;
  int padded_heads;
  KvCacheDtype kv_cache_dtype;
  std::optional<EinsumRecipe> recipe;  ///< nullopt: the output projection runs in bf16
  int block_size;                      ///< 256, whatever was asked
  bool block_size_replaced;
};

/// The choice, or every condition that is not met.
using Answer = std::variant<Choice, std::vector<Refusal>>;

}  // namespace dsv4::upstream

namespace dsv4 {

/// @param capability  compute capability, or the digits of the gfx name; nullopt: no device.
upstream::Answer upstream_rules(upstream::Platform platform,
                                const std::optional<Capability>& capability,
                                const upstream::Request& request,
                                upstream::Rules rules = upstream::Rules::kAdopted);

}  // namespace dsv4
