// Shared memory, copies and packed arithmetic as sm_90 code uses them, beside those of sm_80. One
// instruction per function; sections refer to the PTX ISA manual.
#pragma once
#include <cstdint>

namespace dsv4::nvidia::sm90 {

/// cp.async of 8 bytes, or zeros where `bytes` is 0.
__device__ __forceinline__ void copy_async_8(uint32_t to, const void* from, int bytes) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(to), "l"(from), "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void prefetch_l2(const void* pointer) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(pointer));
}

/// Brings the line of *pointer to the caches; nobody waits for it.
__device__ __forceinline__ void touch(const void* pointer) {
  asm volatile("{\n.reg .b32 unused;\nld.global.nc.b32 unused, [%0];\n}\n" ::"l"(pointer));
}
/// 9.7.9.12 st.release: what this thread has written, or has seen written, is seen before it by who
/// acquires the value.
__device__ __forceinline__ void store_release_64(uint64_t* to, uint64_t value) {
  asm volatile("st.release.gpu.global.b64 [%0], %1;" ::"l"(to), "l"(value) : "memory");
}
__device__ __forceinline__ uint64_t load_acquire_64(const uint64_t* from) {
  uint64_t value;
  asm volatile("ld.acquire.gpu.global.b64 %0, [%1];" : "=l"(value) : "l"(from) : "memory");
  return value;
}
/// By one thread: waits until another CTA has released `mark` there, and takes it away.
__device__ __forceinline__ void take_mark(uint64_t* at, uint64_t mark) {
  while (load_acquire_64(at) != mark) {
  }
  *at = 0;
}
/// 16 bytes of memory that nobody writes during the kernel; stays where it is in program order.
__device__ __forceinline__ void load_global_constant_16(const void* pointer, uint32_t* to) {
  asm volatile("ld.global.nc.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "l"(pointer));
}

__device__ __forceinline__ uint32_t load_shared(uint32_t address) {
  uint32_t value;
  asm volatile("ld.shared.b32 %0, [%1];" : "=r"(value) : "r"(address) : "memory");
  return value;
}
__device__ __forceinline__ uint2 load_shared_2(uint32_t address) {
  uint2 value;
  asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];"
               : "=r"(value.x), "=r"(value.y)
               : "r"(address)
               : "memory");
  return value;
}
__device__ __forceinline__ void store_shared(uint32_t address, uint32_t value) {
  asm volatile("st.shared.b32 [%0], %1;" ::"r"(address), "r"(value) : "memory");
}
__device__ __forceinline__ void store_shared_2(uint32_t address, uint32_t x, uint32_t y) {
  asm volatile("st.shared.v2.b32 [%0], {%1, %2};" ::"r"(address), "r"(x), "r"(y) : "memory");
}
__device__ __forceinline__ void store_shared_4(uint32_t address, uint32_t x, uint32_t y, uint32_t z,
                                               uint32_t w) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(x), "r"(y), "r"(z),
               "r"(w)
               : "memory");
}
__device__ __forceinline__ void store_shared_16(uint32_t address, const uint4& value) {
  store_shared_4(address, value.x, value.y, value.z, value.w);
}
/// 9.7.14.5.16 stmatrix: four 8 x 8 matrices of 16-bit elements; lane 8 i + j gives the address of
/// row j of matrix i.
__device__ __forceinline__ void store_matrix_4(uint32_t address, uint32_t x, uint32_t y, uint32_t z,
                                               uint32_t w) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address),
               "r"(x), "r"(y), "r"(z), "r"(w)
               : "memory");
}
/// The same, each matrix transposed: the address is that of column j of matrix i.
__device__ __forceinline__ void store_matrix_4_transposed(uint32_t address, uint32_t x, uint32_t y,
                                                          uint32_t z, uint32_t w) {
  asm volatile(
      "stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address),
      "r"(x), "r"(y), "r"(z), "r"(w)
      : "memory");
}

/// 9.7.8.7 prmt: every nibble of kSelector picks a byte of x; with its top bit set that byte's
/// sign, eight times.
template <uint32_t kSelector>
__device__ __forceinline__ uint32_t permute_bytes(uint32_t x) {
  uint32_t y;
  asm("prmt.b32 %0, %1, 0, %2;" : "=r"(y) : "r"(x), "n"(kSelector));
  return y;
}
/// Two E4M3 codes (bits 0-7, 8-15) as two halves; NaN codes become NaN.
__device__ __forceinline__ uint32_t e4m3x2_to_f16x2(uint16_t codes) {
  uint32_t halves;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(halves) : "h"(codes));
  return halves;
}
/// Four of them.
__device__ __forceinline__ void e4m3x4_to_f16x4(uint32_t codes, uint32_t& low, uint32_t& high) {
  asm("{\n.reg .b16 x, y;\nmov.b32 {x, y}, %2;\n"
      "cvt.rn.f16x2.e4m3x2 %0, x;\ncvt.rn.f16x2.e4m3x2 %1, y;\n}\n"
      : "=r"(low), "=r"(high)
      : "r"(codes));
}

/// Two floats -> two E4M3 codes, the first one in the low byte [9.7.9.22, sm_89 and later].
__device__ __forceinline__ uint32_t e4m3x2(float low, float high) {
  uint16_t out;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(out) : "f"(high), "f"(low));
  return out;
}

}  // namespace dsv4::nvidia::sm90
