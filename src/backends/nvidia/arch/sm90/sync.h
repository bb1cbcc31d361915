// Ordering on sm_90: named barriers, register budgets of warpgroups, the proxy fence. One
// instruction per function; sections refer to the PTX ISA manual.
#pragma once
#include <cstdint>

namespace dsv4::nvidia::sm90 {

/// 9.7.13.1 bar.sync: waits until `threads` threads have arrived at barrier `id`, itself included.
__device__ __forceinline__ void barrier_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
/// 9.7.13.1 bar.arrive: counts this warp in and goes on.
__device__ __forceinline__ void barrier_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
/// 9.7.20.5 setmaxnreg: every warp of a warpgroup takes or gives back registers.
template <int kRegisters>
__device__ __forceinline__ void increase_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void decrease_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
/// 9.7.13.4 fence.proxy.async: this thread's stores to shared memory before it are seen by wgmma
/// and bulk copies after it.
__device__ __forceinline__ void fence_proxy_async() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

}  // namespace dsv4::nvidia::sm90
