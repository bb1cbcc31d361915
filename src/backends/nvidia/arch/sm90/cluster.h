// Thread block clusters and distributed shared memory: one instruction per function.
// PTX ISA 9.0, sections 9.7.13.4 (barrier.cluster), 9.7.9.23 (mapa), 9.7.13.6 (red).
#pragma once
#include <cstdint>

#include "backends/nvidia/arch/sm90/sync.h"

namespace dsv4::nvidia::sm90 {

__device__ inline uint32_t cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
__device__ inline uint32_t cluster_size() {
  uint32_t size;
  asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return size;
}

/// All threads of all CTAs arrive; what they wrote before is visible to those that have waited.
__device__ inline void cluster_arrive() {
  perhaps_late();
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}
/// The same without a word about what was written.
__device__ __forceinline__ void cluster_arrive_relaxed() {
  perhaps_late();
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}
__device__ inline void cluster_wait() {
  perhaps_late();
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

/// Address in the cluster's shared window of `local`, a place in this CTA's shared memory, but in
/// CTA `rank`.
__device__ __forceinline__ uint32_t cluster_address(uint32_t local, uint32_t rank) {
  uint32_t remote;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(local), "r"(rank));
  return remote;
}
__device__ inline uint32_t cluster_address(const void* local, uint32_t rank) {
  return cluster_address(static_cast<uint32_t>(__cvta_generic_to_shared(local)), rank);
}

/// *address += value, without an answer.
__device__ inline void cluster_add(uint32_t address, uint32_t value) {
  asm volatile("red.relaxed.cluster.shared::cluster.add.u32 [%0], %1;" ::"r"(address), "r"(value)
               : "memory");
}
__device__ inline void cluster_store(uint32_t address, uint2 value) {
  asm volatile("st.shared::cluster.v2.u32 [%0], {%1, %2};" ::"r"(address), "r"(value.x),
               "r"(value.y)
               : "memory");
}

// ---- mbarriers of other CTAs; addresses as cluster_address gives them

/// After mbarrier_init: the other CTAs of the cluster see it after the next cluster barrier.
__device__ __forceinline__ void fence_mbarrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
/// Tells that this thread has read what the other CTA may overwrite; orders no stores between CTAs.
__device__ __forceinline__ void cluster_mbarrier_arrive(uint32_t barrier) {
  perhaps_late();
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(barrier) : "memory");
}
/// Of this CTA's own barrier: one arrival, and so many bytes that are still to come in this phase.
__device__ __forceinline__ void mbarrier_expect_bytes(uint32_t barrier, int bytes) {
  perhaps_late();
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}
/// 8 bytes to the shared memory of a CTA of the cluster; they count at its mbarrier `barrier`
/// [st.async].
__device__ __forceinline__ void cluster_store_async(uint32_t to, float x, float y,
                                                    uint32_t barrier) {
  asm volatile(
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [%0], {%1, %2}, [%3];" ::"r"(
          to),
      "f"(x), "f"(y), "r"(barrier)
      : "memory");
}
__device__ __forceinline__ void cluster_store_async(uint32_t to, float x, float y, float z, float w,
                                                    uint32_t barrier) {
  asm volatile(
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, "
      "[%5];" ::"r"(to),
      "f"(x), "f"(y), "f"(z), "f"(w), "r"(barrier)
      : "memory");
}
/// A piece of this CTA's shared memory to another CTA's; it counts at its mbarrier `barrier`.
__device__ __forceinline__ void cluster_copy_async(uint32_t to, uint32_t from, int bytes,
                                                   uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%0], [%1], %2, "
      "[%3];" ::"r"(to),
      "r"(from), "r"(bytes), "r"(barrier)
      : "memory");
}

/// `bytes` of global memory to the same place in all CTAs of `ctas`, a bit each; they count at the
/// mbarrier that lies there as `barrier` does here [cp.async.bulk, multicast].
__device__ __forceinline__ void copy_to_cluster(uint32_t to, const void* from, int bytes,
                                                uint32_t barrier, uint32_t ctas) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], "
      "[%1], %2, [%3], %4;" ::"r"(to),
      "l"(from), "r"(bytes), "r"(barrier), "h"(static_cast<uint16_t>(ctas))
      : "memory");
}

/// Four floats at `address` of this block's shared memory, read in block `rank` of the cluster.
/// Several loads may be under way.
__device__ __forceinline__ float4 load_from_cluster(uint32_t address, uint32_t rank) {
  float4 value;
  asm volatile(
      "{\n.reg .b32 remote;\nmapa.shared::cluster.u32 remote, %4, %5;\n"
      "ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [remote];\n}\n"
      : "=f"(value.x), "=f"(value.y), "=f"(value.z), "=f"(value.w)
      : "r"(address), "r"(rank)
      : "memory");
  return value;
}

}  // namespace dsv4::nvidia::sm90
