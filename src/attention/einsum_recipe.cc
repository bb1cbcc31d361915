#include "attention/einsum_recipe.h"

#include "core/fail.h"

namespace dsv4 {

EinsumRecipe compute_fp8_einsum_recipe(const std::optional<Capability>& capability) {
  if (!capability) {
    fail(ErrorCode::kUnsupported,
         "FP8 output projection: a CUDA device is required to choose the scale layout, none given");
  }
  // Block-scaled tensor core instructions (major 10 on) read UE8M0 bytes and one scale per row.
  if (capability->major >= 10) return {{1, 1, 128}, true};
  return {{1, 128, 128}, false};
}

}  // namespace dsv4
