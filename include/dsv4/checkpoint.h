// Where weights come from: safetensors files of a released checkpoint, or a formula. Both answer by
// tensor name.
#pragma once
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "dsv4/config.h"
#include "dsv4/tensor.h"

namespace dsv4 {

/// One tensor that a checkpoint of a given config must hold. Source: spec/model.md 6.
struct ExpectedTensor {
  std::string name;            ///< released name, e.g. "layers.7.attn.wkv.weight"
  std::vector<int64_t> shape;  ///< as stored: kF4E2M1 counts bytes
  DType dtype;
  std::string meaning;  ///< of the shape, for messages: "head_dim x hidden_size"
  int block_rows = 0;   ///< of a scale: elements of its weight that share one scale, else 0
  int block_cols = 0;
  int64_t num_bytes() const;
};

/// Every tensor of the released checkpoint of `config`, in the order of the table.
std::vector<ExpectedTensor> expected_tensors(const ModelConfig& config);
/// Those of one attention layer of `kind`, named prefix + "wq_a.weight" and so on.
std::vector<ExpectedTensor> expected_attention_tensors(const ModelConfig& config,
                                                       const LayerKind& kind,
                                                       const std::string& prefix);

/// Named tensors in host memory. Views stay valid as long as the source lives. Thread-safe for
/// reading.
class TensorSource {
 public:
  virtual ~TensorSource() = default;
  virtual bool contains(std::string_view name) const = 0;
  /// @throws Error kNotFound naming the tensor and the source.
  virtual ConstTensor get(std::string_view name) const = 0;
  /// File or formula that holds `name`, for messages.
  virtual std::string origin(std::string_view name) const = 0;
};

/// Opens DIR/model.safetensors.index.json with its shards, or DIR/model.safetensors; maps the files
/// and checks that every tensor of expected_tensors(config) is there, and nothing else.
///
/// Names: released, or those of the transformers library (spec/model.md 6.5), routed experts then
/// stacked and unquantised, MTP layers absent; `get` answers to released names.
/// Storage: as the table says, or bf16 or f32 in place of a quantised or bf16 matrix (then without
/// scale). Converted into owned memory: f32 scales that are powers of two, bf16 where the table has
/// f32, i32 expert ids.
/// Values: FP8 block scales must not be 255, expert ids must exist. Below 1 GiB all tensors are
/// searched for NaN too; larger ones are not, since that would read the whole checkpoint.
/// The files must not be changed while the source lives.
/// @throws Error kNotFound (folder, file, tensor), kDataCorrupt, kUnsupported (a dtype, scales that
/// are no powers of two): one error that lists the first problems with file, tensor, expected and
/// given.
std::unique_ptr<TensorSource> open_checkpoint(const std::string& directory,
                                              const ModelConfig& config);

/// Storage of formula tensors: values rounded to bf16 (f32 tensors stay f32 holding bf16 values),
/// or quantised to the released storage dtype with the smallest power-of-two scale that does not
/// clip.
enum class FormulaStorage { kBf16Values, kReleased };

/// Tensors by the formula of golden/manifest.json, made on first use, for any list of expected
/// tensors.
std::unique_ptr<TensorSource> formula_source(std::vector<ExpectedTensor> tensors, uint64_t seed,
                                             FormulaStorage storage);

/// The formula itself: element `index` of tensor `name`, in (-1, 1). Exposed for inputs and tests.
double formula_uniform(uint64_t key, uint64_t index);
uint64_t formula_key(std::string_view name, uint64_t seed);

}  // namespace dsv4
