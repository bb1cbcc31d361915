// Warpgroup matrix products of sm_90 (PTX ISA manual 9.7.15): bf16 or E4M3 operands, f32
// accumulators. One instruction per function. All 128 threads of a warpgroup call together;
// accumulators must not be touched between the first product and wgmma_wait.
#pragma once
#include <cstdint>

#include "backends/nvidia/arch/sm90/sync.h"

namespace dsv4::nvidia::sm90 {

__device__ __forceinline__ void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
/// Waits until at most kPending committed groups are under way.
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

/// Descriptor of an operand in shared memory, rows of 128 bytes with the 128-byte swizzle (16-byte
/// unit u of row r lies at u ^ (r & 7)). Addresses and strides in bytes, multiples of 16.
///   K-major:  stride = 1024 (8 rows to the next 8), leading unused; k + 16 is address + 32
///   MN-major: stride = 1024 (8 k to the next 8), leading = distance of 64-column panels; k + 16 is
///             address + 2048
__device__ __forceinline__ uint64_t swizzled_operand(uint32_t address, uint32_t leading_bytes,
                                                     uint32_t stride_bytes) {
  return static_cast<uint64_t>((address & 0x3ffff) >> 4) |
         static_cast<uint64_t>(leading_bytes >> 4) << 16 |
         static_cast<uint64_t>(stride_bytes >> 4) << 32 | 1ull << 62;
}
/// The descriptor of what lies `bytes` further in the same 256 KiB: one addition of 32 bits.
__device__ __forceinline__ uint64_t next_operand(uint64_t operand, uint32_t bytes) {
  return (operand & 0xffffffff00000000ull) | (static_cast<uint32_t>(operand) + (bytes >> 4));
}
/// uniform() of a descriptor: of its low word, strides are constants. Where a wait follows, it does
/// more than uniform() of the address, from which the compiler works the rest out after the wait.
__device__ __forceinline__ uint64_t uniform_operand(uint64_t operand) {
  return (operand & 0xffffffff00000000ull) | uniform(static_cast<uint32_t>(operand));
}
/// Distance of `bytes` within a descriptor's address field.
__host__ __device__ constexpr uint64_t operand_offset(uint32_t bytes) {
  return bytes >> 4;
}
/// operand + offset, an operand_offset(): the low word alone changes.
__device__ __forceinline__ uint64_t operand_at(uint64_t operand, uint64_t offset) {
  return (operand & 0xffffffff00000000u) |
         (static_cast<uint32_t>(operand) + static_cast<uint32_t>(offset));
}

// clang-format off
#define DSV4_ACC8(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), \
                        "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define DSV4_ACC32(d, i) DSV4_ACC8(d, i), DSV4_ACC8(d, i + 8), DSV4_ACC8(d, i + 16), \
                         DSV4_ACC8(d, i + 24)
#define DSV4_REGS8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define DSV4_REGS16 DSV4_REGS8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define DSV4_REGS32 DSV4_REGS16 ", " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define DSV4_REGS64 DSV4_REGS32 ", " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
// clang-format on

/// d[64, 64] = (accumulate ? d : 0) + a[64, 16] b[64, 16]^T, both K-major in shared memory.
__device__ __forceinline__ void wgmma_64x64_shared(float (&d)[32], uint64_t a, uint64_t b,
                                                   bool accumulate) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" DSV4_REGS32
      "}, %32, %33, p, 1, 1, 0, 0;\n}\n"
      : DSV4_ACC32(d, 0)
      : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)));
}

/// d[64, 64] += a[64, 16] b[64, 16]^T; a in registers: rows lane / 4 (+ 8: a1, a3), columns
/// 2 (lane % 4) + {0, 1} (+ 8: a2, a3); b K-major in shared memory.
__device__ __forceinline__ void wgmma_64x64_registers(float (&d)[32], uint32_t a0, uint32_t a1,
                                                      uint32_t a2, uint32_t a3, uint64_t b) {
  asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" DSV4_REGS32
               "}, {%32, %33, %34, %35}, %36, 1, 1, 1, 0;\n"
               : DSV4_ACC32(d, 0)
               : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b));
}

/// d[64, 128] += a[64, 16] b[16, 128]; a K-major, b MN-major (two 64-column panels), both in
/// shared memory.
__device__ __forceinline__ void wgmma_64x128_shared(float (&d)[64], uint64_t a, uint64_t b) {
  asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" DSV4_REGS64
               "}, %64, %65, 1, 1, 1, 0, 1;\n"
               : DSV4_ACC32(d, 0), DSV4_ACC32(d, 32)
               : "l"(a), "l"(b));
}

/// d[64, kN] += a[64, 16] b[16, kN]; a in registers as above, b MN-major in shared memory.
template <int kN>
struct ValueProduct;

template <>
struct ValueProduct<64> {
  __device__ static __forceinline__ void run(float (&d)[32], const uint32_t* a, uint64_t b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" DSV4_REGS32
                 "}, {%32, %33, %34, %35}, %36, 1, 1, 1, 1;\n"
                 : DSV4_ACC32(d, 0)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
  }
};

template <>
struct ValueProduct<128> {
  __device__ static __forceinline__ void run(float (&d)[64], const uint32_t* a, uint64_t b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" DSV4_REGS64
                 "}, {%64, %65, %66, %67}, %68, 1, 1, 1, 1;\n"
                 : DSV4_ACC32(d, 0), DSV4_ACC32(d, 32)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
  }
};

// ---- E4M3

/// Descriptor of a K-major E4M3 operand: rows of 128 bytes, swizzled as above. 32 columns on is
/// operand_offset(32) further.
__device__ __forceinline__ uint64_t fp8_operand(uint32_t address) {
  return swizzled_operand(address, 16, 1024);
}

// ---- bf16, any number of columns

/// d[64, kN] += a[64, 16] b[kN, 16]^T; a in registers and d as wgmma_64x64_registers has them
/// (d[4 n ..] = row g: columns 8 n + 2 t, + 1; row g + 8: the same), b K-major in shared memory.
template <int kN>
struct RegisterProduct;

template <>
struct RegisterProduct<8> {
  __device__ static __forceinline__ void run(float (&d)[4], const uint32_t* a, uint64_t b) {
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%0, %1, %2, %3"
        "}, {%4, %5, %6, %7}, %8, 1, 1, 1, 0;\n"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
  }
};

template <>
struct RegisterProduct<16> {
  __device__ static __forceinline__ void run(float (&d)[8], const uint32_t* a, uint64_t b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16 {" DSV4_REGS8
                 "}, {%8, %9, %10, %11}, %12, 1, 1, 1, 0;\n"
                 : DSV4_ACC8(d, 0)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
  }
};

template <>
struct RegisterProduct<32> {
  __device__ static __forceinline__ void run(float (&d)[16], const uint32_t* a, uint64_t b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 {" DSV4_REGS16
                 "}, {%16, %17, %18, %19}, %20, 1, 1, 1, 0;\n"
                 : DSV4_ACC8(d, 0), DSV4_ACC8(d, 8)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
  }
};

template <>
struct RegisterProduct<64> {
  __device__ static __forceinline__ void run(float (&d)[32], const uint32_t* a, uint64_t b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" DSV4_REGS32
                 "}, {%32, %33, %34, %35}, %36, 1, 1, 1, 0;\n"
                 : DSV4_ACC32(d, 0)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
  }
};

template <>
struct RegisterProduct<128> {
  __device__ static __forceinline__ void run(float (&d)[64], const uint32_t* a, uint64_t b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" DSV4_REGS64
                 "}, {%64, %65, %66, %67}, %68, 1, 1, 1, 0;\n"
                 : DSV4_ACC32(d, 0), DSV4_ACC32(d, 32)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
  }
};

/// d[64, kN] += a[16, 64]^T b[kN, 16]^T; a MN-major (one 64-column panel), b K-major, both in
/// shared memory; d as above.
template <int kN>
struct TransposedProduct;

template <>
struct TransposedProduct<16> {
  __device__ static __forceinline__ void run(float (&d)[8], uint64_t a, uint64_t b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16 {" DSV4_REGS8
                 "}, %8, %9, 1, 1, 1, 1, 0;\n"
                 : DSV4_ACC8(d, 0)
                 : "l"(a), "l"(b));
  }
};

template <>
struct TransposedProduct<32> {
  __device__ static __forceinline__ void run(float (&d)[16], uint64_t a, uint64_t b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 {" DSV4_REGS16
                 "}, %16, %17, 1, 1, 1, 1, 0;\n"
                 : DSV4_ACC8(d, 0), DSV4_ACC8(d, 8)
                 : "l"(a), "l"(b));
  }
};

// ---- E4M3, both operands in shared memory

/// d[64, kN] = (kAccumulate ? d : 0) + a[64, 32] b[kN, 32]^T in E4M3, both fp8_operand; d as above.
template <int kN>
struct Fp8Product;

template <>
struct Fp8Product<8> {
  template <bool kAccumulate>
  __device__ static __forceinline__ void run(float (&d)[4], uint64_t a, uint64_t b) {
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n8k32.f32.e4m3.e4m3 {%0, %1, %2, %3}, %4, %5, %6, 1, 1;\n"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "l"(a), "l"(b), "n"(kAccumulate));
  }
};

template <>
struct Fp8Product<32> {
  template <bool kAccumulate>
  __device__ static __forceinline__ void run(float (&d)[16], uint64_t a, uint64_t b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n32k32.f32.e4m3.e4m3 {" DSV4_REGS16
                 "}, %16, %17, %18, 1, 1;\n"
                 : DSV4_ACC8(d, 0), DSV4_ACC8(d, 8)
                 : "l"(a), "l"(b), "n"(kAccumulate));
  }
};

template <>
struct Fp8Product<64> {
  template <bool kAccumulate>
  __device__ static __forceinline__ void run(float (&d)[32], uint64_t a, uint64_t b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n64k32.f32.e4m3.e4m3 {" DSV4_REGS32
                 "}, %32, %33, %34, 1, 1;\n"
                 : DSV4_ACC32(d, 0)
                 : "l"(a), "l"(b), "n"(kAccumulate));
  }
};

template <>
struct Fp8Product<128> {
  template <bool kAccumulate>
  __device__ static __forceinline__ void run(float (&d)[64], uint64_t a, uint64_t b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3 {" DSV4_REGS64
                 "}, %64, %65, %66, 1, 1;\n"
                 : DSV4_ACC32(d, 0), DSV4_ACC32(d, 32)
                 : "l"(a), "l"(b), "n"(kAccumulate));
  }
};

#undef DSV4_ACC8
#undef DSV4_ACC32
#undef DSV4_REGS8
#undef DSV4_REGS16
#undef DSV4_REGS32
#undef DSV4_REGS64

}  // namespace dsv4::nvidia::sm90
