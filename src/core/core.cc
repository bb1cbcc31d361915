// Names and messages of the core types.
#include <charconv>
#include <utility>

#include "core/fail.h"
#include "dsv4/device.h"
#include "dsv4/dtype.h"
#include "dsv4/error.h"
#include "dsv4/tensor.h"

namespace dsv4 {

const char* error_code_name(ErrorCode code) {
  switch (code) {
    case ErrorCode::kInvalidArgument:
      return "invalid argument";
    case ErrorCode::kNotFound:
      return "not found";
    case ErrorCode::kUnsupported:
      return "unsupported";
    case ErrorCode::kOutOfMemory:
      return "out of memory";
    case ErrorCode::kDeviceError:
      return "device error";
    case ErrorCode::kDataCorrupt:
      return "data corrupt";
    case ErrorCode::kInternal:
      return "internal error";
  }
  return "unknown error";
}

void check_failed(const char* condition, const char* file, int line) {
  fail(ErrorCode::kInternal, "internal check failed: ", condition, " (", file, ":", line, ")");
}

const char* dtype_name(DType dtype) {
  switch (dtype) {
    case DType::kF32:
      return "f32";
    case DType::kBf16:
      return "bf16";
    case DType::kF8E4M3:
      return "f8_e4m3";
    case DType::kF8E8M0:
      return "f8_e8m0";
    case DType::kF4E2M1:
      return "f4_e2m1 (two a byte)";
    case DType::kI64:
      return "i64";
    case DType::kI32:
      return "i32";
    case DType::kU8:
      return "u8";
  }
  return "unknown";
}

std::string describe(const ConstTensor& tensor) {
  std::string out = "[";
  for (int i = 0; i < tensor.rank; ++i) out += (i ? ", " : "") + std::to_string(tensor.shape[i]);
  return out + "] " + dtype_name(tensor.dtype);
}

const char* platform_name(Platform platform) {
  switch (platform) {
    case Platform::kCpu:
      return "cpu";
    case Platform::kCuda:
      return "cuda";
    case Platform::kRocm:
      return "rocm";
  }
  return "unknown";
}

std::string DeviceId::str() const {
  if (platform == Platform::kCpu) return "cpu";
  return concat(platform_name(platform), ":",
                index < 0 ? std::string("emulated") : std::to_string(index));
}

DeviceId DeviceId::parse(std::string_view text) {
  if (text == "cpu") return {Platform::kCpu, 0};
  if (text == "rocm:emulated") return {Platform::kRocm, -1};
  for (Platform platform : {Platform::kCuda, Platform::kRocm}) {
    const std::string prefix = concat(platform_name(platform), ":");
    if (!text.starts_with(prefix)) continue;
    const std::string_view digits = text.substr(prefix.size());
    int index = 0;
    const auto [end, error] = std::from_chars(digits.data(), digits.data() + digits.size(), index);
    if (error == std::errc() && end == digits.data() + digits.size() && index >= 0)
      return {platform, index};
  }
  fail(ErrorCode::kInvalidArgument, "device \"", text,
       "\": expected cpu, cuda:N, rocm:N or rocm:emulated");
}

Buffer& Buffer::operator=(Buffer&& other) noexcept {
  if (this != &other) {
    reset();
    data_ = std::exchange(other.data_, nullptr);
    bytes_ = std::exchange(other.bytes_, 0);
    deleter_ = std::move(other.deleter_);
  }
  return *this;
}

void Buffer::reset() {
  if (data_ != nullptr && deleter_) deleter_(data_);
  data_ = nullptr;
  bytes_ = 0;
}

}  // namespace dsv4
