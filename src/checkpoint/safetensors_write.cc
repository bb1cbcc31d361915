#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <numeric>
#include <utility>

#include <nlohmann/json.hpp>

#include "checkpoint/safetensors.h"
#include "checkpoint/strict_json.h"
#include "core/checked_math.h"
#include "core/fail.h"

namespace dsv4 {
namespace {

const char* stored_name(DType dtype) {
  switch (dtype) {
    case DType::kF32:
      return "F32";
    case DType::kBf16:
      return "BF16";
    case DType::kF8E4M3:
      return "F8_E4M3";
    case DType::kF8E8M0:
      return "F8_E8M0";
    case DType::kF4E2M1:
      return "I8";
    case DType::kI64:
      return "I64";
    case DType::kI32:
      return "I32";
    case DType::kU8:
      return "U8";
  }
  DSV4_CHECK(false);
  return "";
}

/// A file that is removed again unless it was renamed to its final place.
class PendingFile {
 public:
  explicit PendingFile(const std::string& target) : target_(target) {
    static std::atomic<uint64_t> counter{0};
    path_ = concat(target, ".tmp.", ::getpid(), ".", counter.fetch_add(1));
    fd_ = ::open(path_.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
    if (fd_ < 0) give_up("cannot create");
    created_ = true;
  }
  ~PendingFile() {
    if (fd_ >= 0) ::close(fd_);
    if (created_) ::unlink(path_.c_str());
  }
  PendingFile(const PendingFile&) = delete;
  PendingFile& operator=(const PendingFile&) = delete;

  void write(const void* data, int64_t bytes) {
    const char* next = static_cast<const char*>(data);
    while (bytes > 0) {
      const ssize_t written =
          ::write(fd_, next, static_cast<size_t>(std::min<int64_t>(bytes, int64_t{1} << 30)));
      if (written < 0 && errno == EINTR) continue;
      if (written < 0) give_up("cannot write");
      next += written;
      bytes -= written;
    }
  }
  void commit() {
    const int fd = std::exchange(fd_, -1);
    if (::close(fd) != 0) give_up("cannot write");
    if (std::rename(path_.c_str(), target_.c_str()) != 0) give_up("cannot rename to");
    created_ = false;  // it is the target now
  }

 private:
  [[noreturn]] void give_up(const char* what) {
    const int reason = errno;
    if (fd_ >= 0) ::close(fd_);
    if (created_) ::unlink(path_.c_str());
    fd_ = -1;
    created_ = false;
    fail(ErrorCode::kInvalidArgument, target_, ": ", what, " this file: ", std::strerror(reason));
  }
  std::string target_;
  std::string path_;
  int fd_ = -1;
  bool created_ = false;  // exists under path_ and is ours to remove
};

}  // namespace

void write_safetensors(const std::string& path,
                       const std::vector<std::pair<std::string, ConstTensor>>& tensors) {
  // Wide elements first: then every tensor is aligned to its element without padding.
  std::vector<size_t> order(tensors.size());
  std::iota(order.begin(), order.end(), size_t{0});
  std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) {
    return size_of(tensors[a].second.dtype) > size_of(tensors[b].second.dtype);
  });
  nlohmann::json header = nlohmann::json::object();
  int64_t offset = 0;
  for (size_t i : order) {
    const auto& [name, tensor] = tensors[i];
    const int64_t bytes = tensor.num_bytes();
    if (name == "__metadata__" || header.contains(name)) {
      fail(ErrorCode::kInvalidArgument, path, ": tensor name '", printable(name),
           "': expected a name that is neither given twice nor '__metadata__'");
    }
    if ((tensor.data == nullptr && bytes > 0) || !tensor.is_contiguous()) {
      fail(ErrorCode::kInvalidArgument, path, ": tensor '", printable(name),
           "': expected contiguous data, given ",
           tensor.data == nullptr ? "none" : "a view with other strides, ", describe(tensor));
    }
    nlohmann::json shape = nlohmann::json::array();
    for (int d = 0; d < tensor.rank; ++d) shape.push_back(tensor.shape[d]);
    header[name] = {{"dtype", stored_name(tensor.dtype)},
                    {"shape", std::move(shape)},
                    {"data_offsets", {offset, offset + bytes}}};
    offset += bytes;
  }
  std::string text;
  try {
    text = header.dump();
  } catch (const nlohmann::json::exception&) {
    fail(ErrorCode::kInvalidArgument, path, ": tensor names: expected UTF-8");
  }
  text.resize(static_cast<size_t>(round_up(static_cast<int64_t>(text.size()), 8)), ' ');

  PendingFile file(path);
  const uint64_t header_bytes = text.size();
  file.write(&header_bytes, sizeof(header_bytes));
  file.write(text.data(), static_cast<int64_t>(text.size()));
  for (size_t i : order) file.write(tensors[i].second.data, tensors[i].second.num_bytes());
  file.commit();
}

}  // namespace dsv4
