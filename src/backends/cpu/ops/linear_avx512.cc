// The AVX-512 candidate of `linear` with f32 FMAs: for CPUs without BF16 dot products, or with slow
// ones.
#if defined(__x86_64__)
#include "backends/cpu/ops/linear_candidate_avx512-inl.h"

namespace dsv4::cpu {

const LinearKernels kLinearAvx512 = kKernels;

}  // namespace dsv4::cpu

#endif  // __x86_64__
