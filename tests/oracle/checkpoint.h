// Reads safetensors files and the released checkpoint layout for the oracle, which must not share
// the library's reader. Errors are std::runtime_error: tests only.
#pragma once
#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "tests/oracle/arrays.h"

namespace oracle {

/// One tensor as stored: dtype word of the file ("F32", "F8_E4M3", "I8", ...), little-endian bytes.
struct StoredTensor {
  std::string dtype;
  std::vector<int64_t> shape;
  std::vector<uint8_t> bytes;
};

/// All tensors of one file. @throws std::runtime_error naming the file.
std::map<std::string, StoredTensor> read_safetensors(const std::string& path);

/// A folder or a single file of tensors, with access by name as numbers.
class Tensors {
 public:
  /// `path`: a .safetensors file, or a folder whose model.safetensors.index.json lists the files.
  explicit Tensors(const std::string& path);
  bool has(const std::string& name) const { return stored_.count(name) != 0; }
  const StoredTensor& stored(const std::string& name) const;
  /// [rows, cols] with cols the last dimension and rows all others; FP8 (128 x 128 blocks) and FP4
  /// (1 x 32) are dequantised with their ".scale" (model.md 4.3, 4.4).
  Weight weight(const std::string& name) const;
  /// A float tensor in double.
  Matrix matrix(const std::string& name) const;
  /// I32 or I64.
  std::vector<int64_t> integers(const std::string& name) const;

 private:
  std::map<std::string, StoredTensor> stored_;
};

}  // namespace oracle
