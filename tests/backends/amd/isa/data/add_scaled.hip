// The kernel of add_scaled_gfx942.co and add_scaled_gfx950.co: out[i] = a[i] + scale * b[i ^ 1]
// through local memory.
//   clang++-22 -x hip --cuda-device-only --no-gpu-bundle-output --offload-arch=<arch> -nogpuinc
//   -nogpulib
//     -mcode-object-version=5 -std=c++20 -O3 add_scaled.hip -o add_scaled_<arch>.co
//   llvm-objdump-22 -d add_scaled_<arch>.co > add_scaled_<arch>.s      (lines of padding removed)
extern "C" __attribute__((global, amdgpu_flat_work_group_size(128, 128))) void add_scaled(
    const float* a, const float* b, float* out, float scale, int n) {
  __attribute__((shared)) static float values[128];
  const int t = static_cast<int>(__builtin_amdgcn_workitem_id_x());
  const int i = static_cast<int>(__builtin_amdgcn_workgroup_id_x()) * 128 + t;
  values[t] = i < n ? b[i] : 0.0f;
  __builtin_amdgcn_fence(__ATOMIC_RELEASE, "workgroup");
  __builtin_amdgcn_s_barrier();
  __builtin_amdgcn_fence(__ATOMIC_ACQUIRE, "workgroup");
  if (i < n) out[i] = a[i] + scale * values[t ^ 1];
}
