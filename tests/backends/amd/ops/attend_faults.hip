// Entries of attend_faults.h.
#include "tests/backends/amd/ops/attend_faults.h"

using namespace dsv4::amd;

DSV4_AMD_KERNEL(attend_unfixed, faults::Unfixed)
DSV4_AMD_KERNEL(attend_minus_zero, faults::MinusZero)
DSV4_AMD_KERNEL(attend_shifted, faults::Shifted)
