// The structs of DLPack 1.1 that are read here: how array libraries lend each other their memory.
// Source: dmlc/dlpack, include/dlpack/dlpack.h; protocol: the array API standard, __dlpack__.
#pragma once
#include <cstdint>

namespace dsv4::python::dlpack {

enum class DeviceType : int32_t {
  kCpu = 1,
  kCuda = 2,
  kCudaHost = 3,
  kRocm = 10,
  kRocmHost = 11,
  kCudaManaged = 13,
};
struct Device {
  DeviceType type;
  int32_t index;
};

enum class Code : uint8_t {
  kInt = 0,
  kUInt = 1,
  kFloat = 2,
  kBfloat = 4,
  kF8E4M3fn = 10,
  kF8E8M0fnu = 14,
  kF4E2M1fn = 17,
};
struct DataType {
  Code code;
  uint8_t bits;
  uint16_t lanes;
};

struct TensorView {
  void* data;
  Device device;
  int32_t rank;
  DataType dtype;
  int64_t* shape;
  int64_t* strides;  // in elements; null: row-major
  uint64_t byte_offset;
};

/// Content of a capsule named "dltensor".
struct Managed {
  TensorView tensor;
  void* context;
  void (*deleter)(Managed*);
};

/// Content of a capsule named "dltensor_versioned".
struct ManagedVersioned {
  struct {
    uint32_t major, minor;
  } version;
  void* context;
  void (*deleter)(ManagedVersioned*);
  uint64_t flags;
  TensorView tensor;
};
constexpr uint64_t kReadOnlyFlag = 1;
constexpr uint32_t kMajorVersion = 1;

}  // namespace dsv4::python::dlpack
