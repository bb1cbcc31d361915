// A file in memory, read only.
#pragma once
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>

namespace dsv4 {

/// Owns a read-only mapping of a whole file. Movable. The file must not shrink while it is mapped:
/// reading a page that has gone raises SIGBUS, as for every program that maps files.
class MappedFile {
 public:
  MappedFile() = default;
  /// @throws Error kNotFound (missing, unreadable), kInvalidArgument (not a regular file),
  /// kOutOfMemory (no room to map it).
  explicit MappedFile(const std::string& path);
  ~MappedFile();
  MappedFile(MappedFile&& other) noexcept;
  MappedFile& operator=(MappedFile&& other) noexcept;

  const std::string& path() const { return path_; }
  std::span<const std::byte> bytes() const { return {data_, size_}; }

 private:
  void unmap();
  std::string path_;
  const std::byte* data_ = nullptr;
  size_t size_ = 0;
};

}  // namespace dsv4
