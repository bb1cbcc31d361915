// The functions of mfma.h as kernels of their own.
#include "tests/backends/amd/isa/corpus/mfma_forms.h"

namespace dsv4::amd::isa::forms {

DSV4_AMD_KERNEL(product_bf16x4, Product<Bf16K16>)
DSV4_AMD_KERNEL(product_bf16x8, Product<Bf16K32>)
#if defined(__gfx950__)
DSV4_AMD_KERNEL(product_fp8x8, Product<Fp8K32>)
#endif

}  // namespace dsv4::amd::isa::forms
