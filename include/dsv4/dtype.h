// Element types of tensors, as they occur in released DeepSeek-V4 checkpoints and in memory.
#pragma once
#include <cstdint>

namespace dsv4 {

enum class DType : uint8_t {
  kF32,     ///< IEEE binary32
  kBf16,    ///< bfloat16
  kF8E4M3,  ///< OCP E4M3FN, one byte
  kF8E8M0,  ///< UE8M0 scale: byte b stands for 2^(b-127), 255 is NaN
  kF4E2M1,  ///< two E2M1 values a byte, the even element in the low nibble ("I8" in released
            ///< files); shapes count bytes
  kI64,
  kI32,
  kU8,
};

/// Bytes of one element; for kF4E2M1 of one byte that holds two values.
constexpr int64_t size_of(DType dtype) {
  switch (dtype) {
    case DType::kF32:
    case DType::kI32:
      return 4;
    case DType::kBf16:
      return 2;
    case DType::kI64:
      return 8;
    case DType::kF8E4M3:
    case DType::kF8E8M0:
    case DType::kF4E2M1:
    case DType::kU8:
      return 1;
  }
  return 0;
}

/// Lower-case name as used in messages and on the command line: "f32", "bf16", "f8_e4m3", ...
const char* dtype_name(DType dtype);

}  // namespace dsv4
