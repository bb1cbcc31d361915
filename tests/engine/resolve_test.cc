// What options become before anything is loaded: the request that selects the backend.
#include "engine/resolve.h"

#include <gtest/gtest.h>

#include <string>

#include "dsv4/error.h"

namespace dsv4 {
namespace {

std::string refusal_of(int growing_block_tokens) {
  EngineOptions options;
  options.device = "rocm:0";  // refused with every reason, whether there is such a device or not
  options.limits = {1, 1, 1024};
  options.growing_block_tokens = growing_block_tokens;
  try {
    resolve_options(ModelConfig::load(DSV4_SOURCE_DIR "/configs/v4-flash.json"), options);
  } catch (const Error& error) {
    return error.what();
  }
  return "no error";
}

TEST(ResolveOptions, BackendIsAskedForTheBlockSize) {
  EXPECT_NE(refusal_of(128).find("tokens of a cache block: 128, required 256"), std::string::npos)
      << refusal_of(128);
  EXPECT_EQ(refusal_of(256).find("tokens of a cache block"), std::string::npos) << refusal_of(256);
}

}  // namespace
}  // namespace dsv4
