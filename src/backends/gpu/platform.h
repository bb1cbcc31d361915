// The one header with platform #ifs: what a kernel may use, for three readers of the same source:
//   CUDA   nvcc; a lane group is a warp
//   AMD    clang -x hip -nogpuinc -nogpulib, no HIP header; a lane group is half a wave of 64
//   HOST   any C++20 compiler; the block executor (executor.h) runs every lane as a fiber
// Kernels reckon with groups of 32 lanes (`kGroupLanes`) and never with the width of a wave, so
// sums have one order on all three. A half wave whose other half went elsewhere works: lanes
// exchange within their group only.
//
// A kernel is a type:
//   struct Example {
//     struct Params { ... };                     // plain data, passed by value
//     static constexpr int kThreads = 256;       // lanes of a block, a multiple of 64
//     DSV4_DEVICE static void run(const Params& params);
//   };
// and is started over a one-dimensional grid: CudaLaunch of nvidia/ops/launch.h, execute<Example>()
// of executor.h on the host, amd_entry<Example> of a code object on AMD GPUs.
//
// Translation units with kernels are compiled without contraction (-fmad=false,
// -ffp-contract=off): a * b + c is two roundings, fma(a, b, c) is one, on every platform. Division
// and square root are correctly rounded, denormals are kept.
#pragma once
#include <bit>
#include <cstdint>
#include <type_traits>

#define DSV4_PRAGMA(text) _Pragma(#text)
#if defined(__CUDACC__)
#include <cuda_runtime.h>
#define DSV4_DEVICE __device__ __forceinline__
#define DSV4_UNROLL _Pragma("unroll")
#define DSV4_UNROLL_BY(count) DSV4_PRAGMA(unroll count)
#define DSV4_SHARED(Type, name) __shared__ Type name
#elif defined(__HIP__)
#define DSV4_DEVICE __attribute__((device, always_inline)) inline
#define DSV4_UNROLL _Pragma("unroll")
#define DSV4_UNROLL_BY(count) DSV4_PRAGMA(unroll count)
#define DSV4_SHARED(Type, name) __attribute__((shared)) static Type name
#else
#include <cmath>

#include "backends/gpu/executor.h"
#define DSV4_DEVICE inline
#define DSV4_UNROLL
#define DSV4_UNROLL_BY(count)
/// Shared memory of the block: all its lanes see one object. Uninitialised; on the host all 0xff.
#define DSV4_SHARED(Type, name)       \
  static const char name##_place = 0; \
  Type& name = *static_cast<Type*>(   \
      ::dsv4::gpu::executor::shared_memory(&name##_place, sizeof(Type), alignof(Type), #name))
#endif

namespace dsv4::gpu {

/// Lanes that exchange values; a block has kThreads / 32 of them.
constexpr int kGroupLanes = 32;

// ---- platform
// -----------------------------------------------------------------------------------

#if defined(__CUDACC__)

constexpr int kWaveSize = 32;

DSV4_DEVICE int thread_idx() {
  return static_cast<int>(threadIdx.x);
}
DSV4_DEVICE int64_t block_idx() {
  return blockIdx.x;
}
DSV4_DEVICE int64_t num_blocks() {
  return gridDim.x;
}
/// All lanes of the block; orders shared and global memory among them.
DSV4_DEVICE void block_sync() {
  __syncthreads();
}
/// All lanes of a group; orders shared memory among them.
DSV4_DEVICE void group_sync() {
  __syncwarp();
}

namespace platform {
DSV4_DEVICE uint32_t shuffle_xor(uint32_t value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}
DSV4_DEVICE uint32_t shuffle(uint32_t value, int lane) {
  return __shfl_sync(0xffffffffu, value, lane);
}
DSV4_DEVICE uint32_t ballot(bool vote) {
  return __ballot_sync(0xffffffffu, vote);
}
/// Nearest-even bf16 of two floats, `even` in the lower half. NaN gives a NaN.
DSV4_DEVICE uint32_t pack_bf16(float even, float odd) {
  uint32_t out;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(odd), "f"(even));
  return out;
}
/// Rounds both to E4M3 values (nearest-even, saturating) where there are instructions for it.
/// @return whether there are.
DSV4_DEVICE bool round_pair_to_e4m3([[maybe_unused]] float& even, [[maybe_unused]] float& odd) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
  asm("{\n\t.reg .b16 codes, low, high;\n\t.reg .b32 pair;\n\t"
      "cvt.rn.satfinite.e4m3x2.f32 codes, %1, %0;\n\tcvt.rn.f16x2.e4m3x2 pair, codes;\n\t"
      "mov.b32 {low, high}, pair;\n\tcvt.f32.f16 %0, low;\n\tcvt.f32.f16 %1, high;\n\t}"
      : "+f"(even), "+f"(odd));
  return true;
#else
  return false;
#endif
}
/// E4M3 codes of both (nearest-even, saturating), the even one in the low byte, where there is an
/// instruction for it. @return whether there is.
DSV4_DEVICE bool pack_e4m3([[maybe_unused]] float even, [[maybe_unused]] float odd,
                           [[maybe_unused]] uint32_t& codes) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
  asm("{\n\t.reg .b16 pair;\n\tcvt.rn.satfinite.e4m3x2.f32 pair, %2, %1;\n\t"
      "cvt.u32.u16 %0, pair;\n\t}"
      : "=r"(codes)
      : "f"(even), "f"(odd));
  return true;
#else
  return false;
#endif
}
}  // namespace platform

DSV4_DEVICE float fma(float a, float b, float c) {
  return __fmaf_rn(a, b, c);
}
DSV4_DEVICE double fma(double a, double b, double c) {
  return __fma_rn(a, b, c);
}
/// Never fused with a sum, wherever it is compiled.
DSV4_DEVICE double product(double a, double b) {
  return __dmul_rn(a, b);
}
DSV4_DEVICE float sqrt(float x) {
  return __fsqrt_rn(x);
}
/// Nearest integer, ties to even.
DSV4_DEVICE double nearest(double x) {
  return rint(x);
}
/// The same value; AMD's compiler is kept from keeping what follows from it.
template <typename T>
DSV4_DEVICE T opaque(T value) {
  return value;
}
/// @return the value before. Relaxed, over the whole device.
DSV4_DEVICE int32_t atomic_add(int32_t* at, int32_t value) {
  return atomicAdd(at, value);
}
DSV4_DEVICE uint32_t atomic_max(uint32_t* at, uint32_t value) {
  return atomicMax(at, value);
}

#elif defined(__HIP__)

constexpr int kWaveSize = 64;

DSV4_DEVICE int thread_idx() {
  return static_cast<int>(__builtin_amdgcn_workitem_id_x());
}
DSV4_DEVICE int64_t block_idx() {
  return __builtin_amdgcn_workgroup_id_x();
}
/// From the dispatch packet: grid size in lanes over block size.
DSV4_DEVICE int64_t num_blocks() {
  return __builtin_amdgcn_grid_size_x() / __builtin_amdgcn_workgroup_size_x();
}
DSV4_DEVICE void block_sync() {
  __builtin_amdgcn_fence(__ATOMIC_RELEASE, "workgroup");
  __builtin_amdgcn_s_barrier();
  __builtin_amdgcn_fence(__ATOMIC_ACQUIRE, "workgroup");
}
// Lanes of a wave run in step; the fences keep the compiler from moving accesses across.
DSV4_DEVICE void group_sync() {
  __builtin_amdgcn_fence(__ATOMIC_RELEASE, "wavefront");
  __builtin_amdgcn_wave_barrier();
  __builtin_amdgcn_fence(__ATOMIC_ACQUIRE, "wavefront");
}

namespace platform {
// ds_bpermute takes the byte address of a lane of the wave; the upper bit keeps the half.
DSV4_DEVICE uint32_t shuffle(uint32_t value, int lane) {
  const int source = (thread_idx() & 32) | (lane & 31);
  return static_cast<uint32_t>(__builtin_amdgcn_ds_bpermute(source << 2, static_cast<int>(value)));
}
DSV4_DEVICE uint32_t shuffle_xor(uint32_t value, int mask) {
  return shuffle(value, (thread_idx() & 31) ^ mask);
}
DSV4_DEVICE uint32_t ballot(bool vote) {
  return static_cast<uint32_t>(__builtin_amdgcn_ballot_w64(vote) >> (thread_idx() & 32));
}
DSV4_DEVICE uint32_t pack_bf16(float even, float odd) {  // one instruction on gfx950
  return std::bit_cast<uint16_t>(static_cast<__bf16>(even)) |
         uint32_t{std::bit_cast<uint16_t>(static_cast<__bf16>(odd))} << 16;
}
DSV4_DEVICE bool round_pair_to_e4m3(float&, float&) {
  return false;
}
DSV4_DEVICE bool pack_e4m3(float, float, uint32_t&) {
  return false;
}
}  // namespace platform

DSV4_DEVICE float fma(float a, float b, float c) {
  return __builtin_fmaf(a, b, c);
}
DSV4_DEVICE double fma(double a, double b, double c) {
  return __builtin_fma(a, b, c);
}
DSV4_DEVICE double product(double a, double b) {
  return a * b;
}
DSV4_DEVICE float sqrt(float x) {
  return __builtin_sqrtf(x);
}
DSV4_DEVICE double nearest(double x) {
  return __builtin_rint(x);
}
/// The same value, of which the compiler knows nothing: what follows from it is computed again
/// where it is needed, in vector registers. A comparison that is kept takes two scalar registers,
/// and there are 102 of them.
template <typename T>
DSV4_DEVICE T opaque(T value) {
  static_assert(sizeof(T) == 4);
  __asm__ volatile("" : "+v"(value));
  return value;
}
DSV4_DEVICE int32_t atomic_add(int32_t* at, int32_t value) {
  return __hip_atomic_fetch_add(at, value, __ATOMIC_RELAXED, __HIP_MEMORY_SCOPE_AGENT);
}
DSV4_DEVICE uint32_t atomic_max(uint32_t* at, uint32_t value) {
  return __hip_atomic_fetch_max(at, value, __ATOMIC_RELAXED, __HIP_MEMORY_SCOPE_AGENT);
}

#else

constexpr int kWaveSize = 64;

inline int thread_idx() {
  return executor::thread_idx();
}
inline int64_t block_idx() {
  return executor::block_idx();
}
inline int64_t num_blocks() {
  return executor::num_blocks();
}
inline void block_sync() {
  executor::block_sync();
}
inline void group_sync() {
  executor::lane_sync(kGroupLanes);
}

namespace platform {
inline uint32_t shuffle_xor(uint32_t value, int mask) {
  return executor::shuffle_xor(kGroupLanes, value, mask);
}
inline uint32_t shuffle(uint32_t value, int lane) {
  return executor::shuffle(kGroupLanes, value, lane);
}
inline uint32_t ballot(bool vote) {
  return executor::group_ballot(vote);
}
inline uint32_t pack_bf16(float even, float odd) {
  const auto rounded = [](float value) {
    const auto bits = std::bit_cast<uint32_t>(value);
    return value == value ? bits + 0x7fffu + ((bits >> 16) & 1u) : bits | 0x400000u;
  };
  return (rounded(even) >> 16) | (rounded(odd) & 0xffff0000u);
}
DSV4_DEVICE bool round_pair_to_e4m3(float&, float&) {
  return false;
}
DSV4_DEVICE bool pack_e4m3(float, float, uint32_t&) {
  return false;
}
}  // namespace platform

inline float fma(float a, float b, float c) {
  return std::fma(a, b, c);
}
inline double fma(double a, double b, double c) {
  return std::fma(a, b, c);
}
inline double product(double a, double b) {
  return a * b;
}
inline float sqrt(float x) {
  return std::sqrt(x);
}
inline double nearest(double x) {
  return std::nearbyint(x);
}
template <typename T>
inline T opaque(T value) {
  return value;
}
inline int32_t atomic_add(int32_t* at, int32_t value) {
  return __atomic_fetch_add(at, value, __ATOMIC_RELAXED);
}
inline uint32_t atomic_max(uint32_t* at, uint32_t value) {
  uint32_t before = __atomic_load_n(at, __ATOMIC_RELAXED);
  while (before < value && !__atomic_compare_exchange_n(at, &before, value, true, __ATOMIC_RELAXED,
                                                        __ATOMIC_RELAXED)) {
  }
  return before;
}

#endif

// ---- lane groups
// --------------------------------------------------------------------------------

/// 0..31 within the group; which group of the block.
DSV4_DEVICE int group_lane() {
  return thread_idx() & (kGroupLanes - 1);
}
DSV4_DEVICE int group_idx() {
  return thread_idx() / kGroupLanes;
}

/// The value of lane `group_lane() ^ mask` / of lane `lane`, of a 4-byte type. All lanes of the
/// group take part.
template <typename T>
DSV4_DEVICE T shuffle_xor(T value, int mask) {
  static_assert(sizeof(T) == 4);
  return std::bit_cast<T>(platform::shuffle_xor(std::bit_cast<uint32_t>(value), mask));
}
template <typename T>
DSV4_DEVICE T shuffle(T value, int lane) {
  static_assert(sizeof(T) == 4);
  return std::bit_cast<T>(platform::shuffle(std::bit_cast<uint32_t>(value), lane));
}

/// Bit l of the result is the vote of lane l. All lanes of the group take part.
DSV4_DEVICE uint32_t group_ballot(bool vote) {
  return platform::ballot(vote);
}

/// Over the group, in all its lanes; a butterfly from distance 16 to 1: lane l adds (l, l ^ 16),
/// then pairs 8, 4, 2 and 1 apart. Addition is commutative, so every lane gets the same bits.
DSV4_DEVICE float group_sum(float value) {
  for (int distance = kGroupLanes / 2; distance > 0; distance /= 2)
    value = value + shuffle_xor(value, distance);
  return value;
}
template <typename T>
DSV4_DEVICE T group_max(T value) {
  for (int distance = kGroupLanes / 2; distance > 0; distance /= 2) {
    const T other = shuffle_xor(value, distance);
    value = value < other ? other : value;
  }
  return value;
}

/// Over the block, in all its lanes: groups by group_sum, their sums in ascending order.
/// `partial` is shared memory for kThreads / 32 floats; the call contains two barriers.
template <int kThreads>
DSV4_DEVICE float block_sum(float value, float* partial) {
  value = group_sum(value);
  block_sync();  // readers of an earlier sum are done
  if (group_lane() == 0) partial[group_idx()] = value;
  block_sync();
  float sum = partial[0];
  for (int g = 1; g < kThreads / kGroupLanes; ++g) sum = sum + partial[g];
  return sum;
}

// ---- memory
// -------------------------------------------------------------------------------------

/// 4, 8 or 16 bytes moved by one instruction; the address is a multiple of the size.
template <int kWords>
struct alignas(4 * kWords) Words {
  uint32_t word[kWords];
};
template <typename T>
DSV4_DEVICE T load_as(const void* from) {
  return *static_cast<const T*>(from);
}
template <typename T>
DSV4_DEVICE void store_as(void* to, const T& value) {
  *static_cast<T*>(to) = value;
}

// ---- entry points
// -------------------------------------------------------------------------------

#if defined(__HIP__)

/// Waves that a SIMD of the four holds at least, a bound of registers: one block's share, or
/// `Kernel::kMinWaves` where it asks for more.
template <typename Kernel>
constexpr int min_waves() {
  if constexpr (requires { Kernel::kMinWaves; }) {
    return Kernel::kMinWaves;
  } else {
    return Kernel::kThreads <= 4 * kWaveSize ? 1 : Kernel::kThreads / (4 * kWaveSize);
  }
}

/// The entry of a kernel in a code object. The host finds it by the name of its type
/// (amd/kernel_name.h); amd/entries.h makes the entries of all kernels that operations start. The
/// flat work-group size must be told: the compiler assumes 1024 lanes otherwise, and halves the
/// registers.
template <typename Kernel>
__attribute__((global, amdgpu_flat_work_group_size(Kernel::kThreads, Kernel::kThreads),
               amdgpu_waves_per_eu(min_waves<Kernel>()))) void
amd_entry(const typename Kernel::Params params) {
  Kernel::run(params);
}

/// extern "C" entry `name` of a code object: for tests that run a kernel by a plain name.
#define DSV4_AMD_KERNEL(name, Kernel)                                                              \
  extern "C" __attribute__((global,                                                                \
                            amdgpu_flat_work_group_size(Kernel::kThreads, Kernel::kThreads))) void \
  name(const typename Kernel::Params params) {                                                     \
    Kernel::run(params);                                                                           \
  }

#endif

}  // namespace dsv4::gpu
