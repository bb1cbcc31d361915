// The AVX-512 candidate of `linear` with BF16 dot products and VBMI byte permutes (Zen 4, Sapphire
// Rapids and later).
#if defined(__x86_64__)
#include "backends/cpu/ops/linear_candidate_avx512-inl.h"

namespace dsv4::cpu {

const LinearKernels kLinearAvx512Bf16 = kKernels;

}  // namespace dsv4::cpu

#endif  // __x86_64__
