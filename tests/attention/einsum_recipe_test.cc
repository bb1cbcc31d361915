#include "attention/einsum_recipe.h"

#include <gtest/gtest.h>

#include "dsv4/error.h"

namespace dsv4 {
namespace {

TEST(EinsumRecipe, FollowsTheMajorVersion) {
  const EinsumRecipe rows{{1, 128, 128}, false};
  const EinsumRecipe packed{{1, 1, 128}, true};
  const struct {
    Capability capability;
    EinsumRecipe expected;
  } cases[] = {{{8, 0}, rows},    {{8, 9}, rows},    {{9, 0}, rows},
               {{10, 0}, packed}, {{10, 3}, packed}, {{12, 0}, packed}};
  for (const auto& c : cases) {
    EXPECT_EQ(compute_fp8_einsum_recipe(c.capability), c.expected)
        << c.capability.major << "." << c.capability.minor;
  }
}

TEST(EinsumRecipe, NeedsADevice) {
  try {
    compute_fp8_einsum_recipe(std::nullopt);
    FAIL() << "expected an error";
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ErrorCode::kUnsupported);
    EXPECT_NE(std::string(error.what()).find("CUDA device"), std::string::npos) << error.what();
  }
}

}  // namespace
}  // namespace dsv4
