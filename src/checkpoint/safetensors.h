// The safetensors file format: an 8-byte header length, a JSON header, raw little-endian tensors.
// Nothing in a file is trusted. Source: the format description of the safetensors library.
#pragma once
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "checkpoint/mapped_file.h"
#include "dsv4/tensor.h"

namespace dsv4 {

/// One file, mapped and checked. Movable; views stay valid as long as the object they came from (or
/// that it was moved to) lives. Thread-safe for reading.
class SafetensorsFile {
 public:
  /// @throws Error kNotFound; kDataCorrupt: too short, header that is no JSON object of tensors,
  /// shape whose size is not that of its offsets, offsets outside the file, overlapping tensors, a
  /// name given twice; kUnsupported: a dtype that is not known. All name file and tensor.
  explicit SafetensorsFile(const std::string& path);

  const std::string& path() const { return file_.path(); }
  /// All tensors, sorted by name.
  std::vector<std::string> names() const;
  bool contains(std::string_view name) const { return tensors_.find(name) != tensors_.end(); }
  /// I8 comes as kU8. Data is aligned to its element (copied at opening where the file's is not).
  /// @throws Error kNotFound; kUnsupported: F16 and other dtypes without a DType, rank over
  /// kMaxRank.
  ConstTensor get(std::string_view name) const;
  /// Dtype as the file spells it, e.g. "I8", "F16". @throws Error kNotFound.
  const std::string& stored_dtype(std::string_view name) const;

 private:
  struct Entry {
    ConstTensor view;
    std::string stored_dtype;
    std::string unsupported;  // why get() refuses; empty: it does not
  };
  const Entry& find(std::string_view name) const;
  /// The format does not promise aligned data; code that reads floats needs it.
  void align();

  MappedFile file_;
  std::map<std::string, Entry, std::less<>> tensors_;
  std::vector<std::unique_ptr<std::byte[]>> aligned_copies_;
};

/// Writes contiguous host tensors. The file appears under `path` complete or not at all; a former
/// file stays until then. kF4E2M1 is stored as I8, as in released files.
/// @throws Error kInvalidArgument: a name given twice or reserved, a tensor without data or not
/// contiguous, a path that cannot be written (with the system's reason).
void write_safetensors(const std::string& path,
                       const std::vector<std::pair<std::string, ConstTensor>>& tensors);

}  // namespace dsv4
