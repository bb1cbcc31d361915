// Collects taps of several steps into tensors over all tokens, ready to be written.
#pragma once
#include <map>
#include <string>
#include <vector>

#include "dsv4/attention.h"

namespace dsv4::cli {

/// Rows are appended step by step, bf16 widened to f32. Columns may grow from step to step
/// ("index_scores": earlier rows are padded with -inf).
class TapCollector final : public TapSink {
 public:
  void tap(std::string_view name, const ConstTensor& value) override;
  /// Name -> tensor; views stay valid until the next tap().
  std::vector<std::pair<std::string, ConstTensor>> tensors();

 private:
  struct Collected {
    DType dtype = DType::kF32;   // kF32 or kI32
    std::vector<int64_t> shape;  // of one row
    int64_t rows = 0;
    std::vector<float> f32;
    std::vector<int32_t> i32;
  };
  std::map<std::string, Collected> collected_;
};

}  // namespace dsv4::cli
