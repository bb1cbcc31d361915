// One matrix instruction as a kernel, for the executor and both chips: lane l reads its operands
// and writes its part of the result.
#pragma once
#include "backends/amd/mfma.h"

namespace dsv4::amd::isa::forms {

struct Bf16K16 {
  using Operand = Bf16x4;
  DSV4_DEVICE static F32x4 multiply(Operand a, Operand b, F32x4 c) {
    return mfma_16x16x16_bf16(a, b, c);
  }
};
struct Bf16K32 {
  using Operand = Bf16x8;
  DSV4_DEVICE static F32x4 multiply(Operand a, Operand b, F32x4 c) {
    return mfma_16x16x32_bf16(a, b, c);
  }
};
#if !defined(__HIP__) || defined(__gfx950__)
struct Fp8K32 {
  using Operand = Fp8x8;
  DSV4_DEVICE static F32x4 multiply(Operand a, Operand b, F32x4 c) {
    return mfma_16x16x32_fp8_fp8(a, b, c);
  }
};
#endif

template <typename Form>
struct Product {
  struct Params {
    const typename Form::Operand *a, *b;  // [64]
    const F32x4* c;
    F32x4* out;
  };
  static constexpr int kThreads = 64;
  DSV4_DEVICE static void run(const Params& params) {
    const int lane = gpu::thread_idx();
    params.out[lane] = Form::multiply(params.a[lane], params.b[lane], params.c[lane]);
  }
};

}  // namespace dsv4::amd::isa::forms
