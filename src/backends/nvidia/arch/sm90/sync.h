// Ordering on sm_90: named barriers, register budgets of warpgroups, the proxy fence, what a warp
// agrees on, mbarriers, dependent launches. One instruction per function; sections refer to the PTX
// ISA manual.
#pragma once
#include <cstdint>

namespace dsv4::nvidia::sm90 {

/// Nothing, but in a build with DSV4_CUDA_LATE_WARPS (docs/testing.md): there one call in 32 takes
/// up to 20 us, as where the card is taken away for another process. Called around every barrier,
/// so that tests of such a build meet orders of warps that an idle card never shows.
__device__ __forceinline__ void perhaps_late() {
#ifdef DSV4_CUDA_LATE_WARPS
  const uint32_t start = static_cast<uint32_t>(clock64());
  uint32_t random = start ^ (threadIdx.x >> 5) * 0x9E3779B9u ^ blockIdx.x * 0x85EBCA6Bu;
  random = (random ^ random >> 15) * 0x2C1B3C6Du;
  random ^= random >> 12;
  if (random % 32 == 0) {
    while (static_cast<uint32_t>(clock64()) - start < (random >> 17)) {
    }
  }
#endif
}

/// 9.7.13.1 bar.sync: waits until `threads` threads have arrived at barrier `id`, itself included.
__device__ __forceinline__ void barrier_sync(int id, int threads) {
  perhaps_late();
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
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
/// and bulk copies after it; its loads before it have happened before bulk copies after it write.
__device__ __forceinline__ void fence_proxy_async() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
/// The same of global memory: this thread's stores are seen by bulk copies after it.
__device__ __forceinline__ void fence_proxy_async_global() {
  asm volatile("fence.proxy.async.global;" ::: "memory");
}

/// 9.7.13.16 elect.sync: whether this lane is the one that is elected of a whole warp.
__device__ __forceinline__ bool elect() {
  uint32_t elected;
  asm volatile("{\n.reg .pred p;\nelect.sync _|p, 0xffffffff;\nselp.u32 %0, 1, 0, p;\n}\n"
               : "=r"(elected));
  return elected != 0;
}
/// shfl.sync: lane 0's value in all lanes of a warp. For values that they share anyway, so that the
/// compiler knows it: what follows from them stays in uniform registers, where the next descriptor
/// is one addition, not one in every lane and a move (R2UR) that its product waits for; and a
/// branch is seen not to split the warp: products in flight are not for those that might.
template <typename T>
__device__ __forceinline__ T uniform(T value) {
  return __shfl_sync(~0u, value, 0);
}

// ---- mbarrier

__device__ __forceinline__ void mbarrier_init(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
__device__ __forceinline__ void mbarrier_arrive(uint32_t barrier) {
  perhaps_late();
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
/// The same in threads where `arrives` holds, without a branch.
__device__ __forceinline__ void mbarrier_arrive_if(uint32_t barrier, bool arrives) {
  perhaps_late();
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.s32 p, %1, 0;\n"
      "@p mbarrier.arrive.shared::cta.b64 _, [%0];\n}\n" ::"r"(barrier),
      "r"(static_cast<int>(arrives))
      : "memory");
}
/// 9.7.13.15.17 cp.async.mbarrier.arrive: arrives when all cp.async of this thread have landed.
__device__ __forceinline__ void copy_async_arrive(uint32_t barrier) {
  perhaps_late();
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}
/// Arrives, and lets the phase end only when `bytes` of bulk copies have landed.
__device__ __forceinline__ void mbarrier_arrive_expecting(uint32_t barrier, uint32_t bytes) {
  perhaps_late();
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}
/// Waits for the end of the phase of that parity.
__device__ __forceinline__ void mbarrier_poll(uint32_t barrier, uint32_t parity) {
  perhaps_late();
  asm volatile(
      "{\n.reg .pred p;\nagain:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n"
      "@!p bra again;\n}\n" ::"r"(barrier),
      "r"(parity)
      : "memory");
  perhaps_late();
}
/// Whether the phase of that parity has ended.
__device__ __forceinline__ bool mbarrier_test(uint32_t barrier, uint32_t parity) {
  perhaps_late();
  uint32_t ended;
  asm volatile(
      "{\n.reg .pred p;\n"
      "mbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2;\n"
      "selp.u32 %0, 1, 0, p;\n}\n"
      : "=r"(ended)
      : "r"(barrier), "r"(parity)
      : "memory");
  return ended != 0;
}
/// Waits for the end of the phase of that parity; the hint lets the hardware put the warp to sleep.
__device__ __forceinline__ void mbarrier_wait(uint32_t barrier, uint32_t parity) {
  perhaps_late();
  asm volatile(
      "{\n.reg .pred p;\nagain:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1, %2;\n"
      "@!p bra again;\n}\n" ::"r"(barrier),
      "r"(parity), "r"(1000000)
      : "memory");
  perhaps_late();
}

// ---- dependent launches (griddepcontrol)

/// The next kernel of the stream may start; what it reads of this one it waits for.
__device__ __forceinline__ void start_next_kernel() {
  asm volatile("griddepcontrol.launch_dependents;");
}
/// Waits for the end of the kernels before and for what they wrote.
__device__ __forceinline__ void wait_for_kernels_before() {
  asm volatile("griddepcontrol.wait;" ::: "memory");
}

/// Place in a ring of stages with an mbarrier each; who fills and who reads step alike.
template <int kStages>
struct RingPlace {
  int stage = 0;
  uint32_t phase = 0;
  __device__ __forceinline__ void advance() {
    if (++stage == kStages) {
      stage = 0;
      phase ^= 1;
    }
  }
};

}  // namespace dsv4::nvidia::sm90
