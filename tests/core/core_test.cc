#include <gtest/gtest.h>

#include "core/arena.h"
#include "dsv4/device.h"
#include "dsv4/tensor.h"

namespace dsv4 {
namespace {

TEST(Arena, MeasuresWhatItWouldTake) {
  Arena measure;
  const auto use = [](Arena& arena) {
    arena.take(100);
    {
      Arena::Scope scope(arena);
      arena.take_tensor(DType::kF32, {3, 1000});
    }
    arena.take_array<int32_t>(5);
  };
  use(measure);
  EXPECT_TRUE(measure.measuring());
  std::vector<std::byte> memory(static_cast<size_t>(measure.peak()));
  Arena exact(memory.data(), measure.peak());
  EXPECT_NO_THROW(use(exact));
  Arena small(memory.data(), measure.peak() - 1);
  try {
    use(small);
    FAIL() << "an arena that is too small must refuse";
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ErrorCode::kInternal);
    EXPECT_NE(std::string(error.what()).find(std::to_string(measure.peak() - 1)),
              std::string::npos);
  }
}

TEST(DeviceId, ParsesAndPrints) {
  EXPECT_EQ(DeviceId::parse("cpu"), (DeviceId{Platform::kCpu, 0}));
  EXPECT_EQ(DeviceId::parse("cuda:12"), (DeviceId{Platform::kCuda, 12}));
  EXPECT_EQ(DeviceId::parse("rocm:0").str(), "rocm:0");
  EXPECT_EQ(DeviceId::parse("rocm:emulated").str(), "rocm:emulated");
  for (const char* bad :
       {"", "CPU", "cuda", "cuda:", "cuda:-1", "cuda:1x", "cuda:99999999999", "gpu:0", "cpu:0"}) {
    EXPECT_THROW(DeviceId::parse(bad), Error) << bad;
  }
}

TEST(Tensor, ViewsRowsAndDescribes) {
  float data[6] = {0, 1, 2, 3, 4, 5};
  Tensor tensor(data, DType::kF32, {3, 2});
  EXPECT_TRUE(tensor.is_contiguous());
  EXPECT_EQ(tensor.rows(1, 2).as<float>()[0], 2);
  EXPECT_EQ(describe(tensor), "[3, 2] f32");
  tensor.shape[1] = 1;
  EXPECT_FALSE(tensor.is_contiguous());
}

TEST(Buffer, MovesAndFreesOnce) {
  int freed = 0;
  int dummy = 0;
  {
    Buffer a(&dummy, 4, [&](void*) { ++freed; });
    Buffer b = std::move(a);
    EXPECT_FALSE(a);  // NOLINT: moved-from is empty by contract
    EXPECT_EQ(b.bytes(), 4);
    b = Buffer();
    EXPECT_EQ(freed, 1);
  }
  EXPECT_EQ(freed, 1);
}

}  // namespace
}  // namespace dsv4
