// Kernels with workgroups: local memory, barriers, lane exchange, atomics, divergent loops, 8-bit
// floats, matrices. Those named *_without_* or *_off_by_one are wrong on purpose: the interpreter
// has to notice.
#include <stdint.h>

#define DSV4_KERNEL(threads) \
  extern "C" __attribute__((global, amdgpu_flat_work_group_size(threads, threads)))
#define DSV4_DEVICE __attribute__((device, always_inline)) inline
#define DSV4_SHARED __attribute__((shared)) static

using f32x2 = float __attribute__((ext_vector_type(2)));
using f32x4 = float __attribute__((ext_vector_type(4)));
using s16x4 = short __attribute__((ext_vector_type(4)));
using f16x2 = _Float16 __attribute__((ext_vector_type(2)));
using u32x4 = uint32_t __attribute__((ext_vector_type(4)));

DSV4_DEVICE int thread_idx() {
  return static_cast<int>(__builtin_amdgcn_workitem_id_x());
}
DSV4_DEVICE int block_idx() {
  return static_cast<int>(__builtin_amdgcn_workgroup_id_x());
}
DSV4_DEVICE void barrier() {
  __builtin_amdgcn_fence(__ATOMIC_RELEASE, "workgroup");
  __builtin_amdgcn_s_barrier();
  __builtin_amdgcn_fence(__ATOMIC_ACQUIRE, "workgroup");
}

// ---- local memory ------------------------------------------------------------------------------

template <bool kBarrier>
DSV4_DEVICE void block_sum_body(const int* in, int* out) {
  DSV4_SHARED int sums[256];
  const int t = thread_idx();
  sums[t] = in[block_idx() * 256 + t];
  for (int width = 128; width > 0; width /= 2) {
    if constexpr (kBarrier) barrier();
    if (t < width) sums[t] += sums[t + width];
  }
  if (t == 0) out[block_idx()] = sums[0];
}
DSV4_KERNEL(256) void block_sum(const int* in, int* out) {
  block_sum_body<true>(in, out);
}
DSV4_KERNEL(256) void block_sum_without_barrier(const int* in, int* out) {
  block_sum_body<false>(in, out);
}

// A buffer that is reused: without the second barrier a fast wave overwrites what a slow one still
// reads.
template <bool kBarrier>
DSV4_DEVICE void rotate_body(const int* in, int* out, int rounds) {
  DSV4_SHARED int values[256];
  const int t = thread_idx();
  int value = in[t];
  for (int round = 0; round < rounds; ++round) {
    values[t] = value;
    barrier();
    value = values[(t + 65) % 256] + 1;
    if constexpr (kBarrier) barrier();
  }
  out[t] = value;
}
DSV4_KERNEL(256) void rotate(const int* in, int* out, int rounds) {
  rotate_body<true>(in, out, rounds);
}
DSV4_KERNEL(256) void rotate_without_barrier(const int* in, int* out, int rounds) {
  rotate_body<false>(in, out, rounds);
}

DSV4_KERNEL(256) void transpose(const float* in, float* out, int size) {
  DSV4_SHARED float tile[32][33];
  const int t = thread_idx(), column = t % 32, first = t / 32;
  const int bx = static_cast<int>(__builtin_amdgcn_workgroup_id_x()) * 32;
  const int by = static_cast<int>(__builtin_amdgcn_workgroup_id_y()) * 32;
  for (int row = first; row < 32; row += 8)
    tile[row][column] = in[static_cast<int64_t>(by + row) * size + bx + column];
  barrier();
  for (int row = first; row < 32; row += 8)
    out[static_cast<int64_t>(bx + row) * size + by + column] = tile[column][row];
}

DSV4_KERNEL(64) void narrow_local(const uint8_t* in, uint32_t* out) {
  DSV4_SHARED uint8_t bytes[256];
  DSV4_SHARED uint16_t shorts[128];
  DSV4_SHARED __attribute__((aligned(16))) uint32_t words[512];
  const int t = thread_idx();
  for (int i = 0; i < 4; ++i) bytes[t + 64 * i] = in[t + 64 * i];
  shorts[t] = static_cast<uint16_t>(in[t] * 257);
  shorts[t + 64] = static_cast<uint16_t>(in[t] + 1000);
  for (int i = 0; i < 8; ++i) words[t * 8 + i] = static_cast<uint32_t>(in[t] << i);
  barrier();
  const u32x4 wide = *reinterpret_cast<u32x4*>(&words[(63 - t) * 8 + 4]);
  uint32_t sum = wide[0] + wide[3];
  for (int i = 0; i < 4; ++i) sum = sum * 31 + bytes[(t * 5 + i) & 255];
  sum += static_cast<uint32_t>(static_cast<int8_t>(bytes[255 - t]));
  out[t] = sum ^ shorts[127 - t] ^ words[t * 8 + 1] ^ words[t * 8 + 3];
}

// ---- lane exchange -----------------------------------------------------------------------------

DSV4_DEVICE int shuffle(int value, int lane) {
  return __builtin_amdgcn_ds_bpermute(lane * 4, value);
}
DSV4_KERNEL(64) void exchange(const int* in, int* out) {
  const int t = thread_idx(), x = in[t];
  int sum = x;
  for (int mask = 32; mask > 0; mask /= 2) sum += shuffle(sum, t ^ mask);
  int scan = x;  // inclusive, by DPP within rows of 16 and then across
  scan += __builtin_amdgcn_update_dpp(0, scan, 0x111, 0xf, 0xf, false);
  scan += __builtin_amdgcn_update_dpp(0, scan, 0x112, 0xf, 0xf, false);
  scan += __builtin_amdgcn_update_dpp(0, scan, 0x114, 0xf, 0xf, false);
  scan += __builtin_amdgcn_update_dpp(0, scan, 0x118, 0xf, 0xf, false);
  scan += __builtin_amdgcn_update_dpp(0, scan, 0x142, 0xa, 0xf, false);
  scan += __builtin_amdgcn_update_dpp(0, scan, 0x143, 0xc, 0xf, false);
  out[t] = sum;
  out[64 + t] = scan;
  out[128 + t] = __builtin_amdgcn_ds_swizzle(x, 0x401f);
  out[192 + t] = __builtin_amdgcn_mov_dpp(x, 0xb1, 0xf, 0xf, true);
  out[256 + t] = static_cast<int>(__builtin_popcountll(__builtin_amdgcn_ballot_w64(x > 50)));
  out[320 + t] = __builtin_amdgcn_readlane(x, 17) + __builtin_amdgcn_readfirstlane(x);
  const uint64_t larger = __builtin_amdgcn_ballot_w64(x > 50);
  out[384 + t] = static_cast<int>(
      __builtin_amdgcn_mbcnt_hi(static_cast<uint32_t>(larger >> 32),
                                __builtin_amdgcn_mbcnt_lo(static_cast<uint32_t>(larger), 0)));
}

// ---- control flow ------------------------------------------------------------------------------

DSV4_KERNEL(256) void collatz(const uint32_t* in, uint32_t* out) {
  const int i = block_idx() * 256 + thread_idx();
  uint64_t x = in[i];
  uint32_t steps = 0;
  while (x > 1) {
    x = (x & 1) != 0 ? 3 * x + 1 : x / 2;
    ++steps;
    if (steps > 500) break;
  }
  out[i] = steps;
}

DSV4_KERNEL(256) void branches(const int* in, int* out, int uniform) {
  const int i = block_idx() * 256 + thread_idx(), x = in[i];
  int r = 0;
  switch (x & 7) {
    case 0:
      r = x * 3;
      break;
    case 1:
      r = x - 7;
      [[fallthrough]];
    case 2:
      r += x << 2;
      break;
    case 5:
      for (int k = 0; k < (x & 31); ++k) {
        if (k % 3 == 0) continue;
        if (k > 20) break;
        r += k * uniform;
      }
      break;
    default:
      r = -x;
  }
  if (uniform > 3) {
    for (int k = 0; k < uniform; ++k) r ^= r << 1 | k;
  } else if (x > 100) {
    r = r * 5 + 1;
  }
  if (r % 2 == 0 || x < 0)
    out[i] = r;
  else
    out[i] = ~r;
}

// A table in the code object, and registers that are indexed.
DSV4_KERNEL(64) void tables(const int* in, int* out, int n) {
  static const int kTable[40] = {3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2, 3, 8, 4,
                                 6, 2, 6, 4, 3, 3, 8, 3, 2, 7, 9, 5, 0, 2, 8, 8, 4, 1, 9, 7};
  const int t = thread_idx();
  int local[16];
  for (int i = 0; i < 16; ++i) local[i] = in[i * 64 + t];
  for (int i = 0; i < n; ++i) local[(i * 7) & 15] += kTable[(t + i) % 40];
  out[t] = local[n & 15] + kTable[in[t] % 40u];
}

// Grid and block sizes come from hidden arguments.
extern "C" __attribute__((global)) void sizes(int* out) {
  const auto* arguments =
      (const uint8_t __attribute__((address_space(4)))*)__builtin_amdgcn_implicitarg_ptr();
  const int i = static_cast<int>(
      (__builtin_amdgcn_workgroup_id_z() * 2 + __builtin_amdgcn_workgroup_id_y()) * 3 +
      __builtin_amdgcn_workgroup_id_x());
  if (__builtin_amdgcn_workitem_id_x() + __builtin_amdgcn_workitem_id_y() +
          __builtin_amdgcn_workitem_id_z() ==
      0) {
    out[i] = *reinterpret_cast<const int __attribute__((address_space(4)))*>(arguments) * 10000 +
             *reinterpret_cast<const uint16_t __attribute__((address_space(4)))*>(arguments + 12);
  }
  if (i == 0) {
    const int thread = static_cast<int>(
        (__builtin_amdgcn_workitem_id_z() * 3 + __builtin_amdgcn_workitem_id_y()) * 5 +
        __builtin_amdgcn_workitem_id_x());
    out[100 + thread] = thread;
  }
}

// ---- atomics -----------------------------------------------------------------------------------

DSV4_KERNEL(256)
void histogram(const uint32_t* in, uint32_t* counts, float* total, uint64_t* largest) {
  DSV4_SHARED uint32_t local[64];
  const int t = thread_idx();
  if (t < 64) local[t] = 0;
  barrier();
  const uint32_t x = in[block_idx() * 256 + t];
  __hip_atomic_fetch_add(&local[x % 64], 1u, __ATOMIC_RELAXED, __HIP_MEMORY_SCOPE_WORKGROUP);
  barrier();
  if (t < 64)
    __hip_atomic_fetch_add(&counts[t], local[t], __ATOMIC_RELAXED, __HIP_MEMORY_SCOPE_AGENT);
  __builtin_amdgcn_global_atomic_fadd_f32((float __attribute__((address_space(1)))*)total,
                                          static_cast<float>(x % 8));
  __hip_atomic_fetch_max(largest, static_cast<uint64_t>(x) << 20, __ATOMIC_RELAXED,
                         __HIP_MEMORY_SCOPE_AGENT);
}

// Compare-and-swap in a loop.
DSV4_KERNEL(64) void multiply_all(const uint32_t* in, uint32_t* product) {
  uint32_t old = *product, wanted;
  do {
    wanted = old * in[thread_idx()];
  } while (!__hip_atomic_compare_exchange_weak(product, &old, wanted, __ATOMIC_RELAXED,
                                               __ATOMIC_RELAXED, __HIP_MEMORY_SCOPE_AGENT));
}

// ---- memory ------------------------------------------------------------------------------------

struct Record {
  double d;
  int16_t s;
  uint8_t b;
  int8_t c;
  float f[3];
};
template <int kExtra>
DSV4_DEVICE void records_body(const Record* in, Record* out, int n, int64_t stride) {
  const int64_t i = static_cast<int64_t>(block_idx()) * 64 + thread_idx();
  if (i >= n) return;
  const Record r = in[(i + kExtra) * stride];
  out[i] = {r.d * 2.0,
            static_cast<int16_t>(-r.s),
            static_cast<uint8_t>(r.b + 1),
            static_cast<int8_t>(r.c - 1),
            {r.f[2], r.f[0] + 1.0f, r.f[1]}};
}
DSV4_KERNEL(64) void records(const Record* in, Record* out, int n, int64_t stride) {
  records_body<0>(in, out, n, stride);
}
DSV4_KERNEL(64) void records_off_by_one(const Record* in, Record* out, int n, int64_t stride) {
  records_body<1>(in, out, n, stride);
}

// Pointers that come from memory are flat.
DSV4_KERNEL(64) void flat_pointers(const float* const* in, float** out) {
  const int t = thread_idx();
  out[0][t] = in[0][t] * in[1][63 - t];
}

// Reads beyond the size are zero.
DSV4_KERNEL(64) void raw_buffer(float* data, int bytes, float* out) {
  const auto buffer = __builtin_amdgcn_make_buffer_rsrc(data, 0, bytes, 0x27000);
  const int t = thread_idx();
  const f32x4 x =
      __builtin_bit_cast(f32x4, __builtin_amdgcn_raw_buffer_load_b128(buffer, t * 16, 0, 0));
  out[t] = x[0] + x[1] + x[2] + x[3];
  __builtin_amdgcn_raw_buffer_store_b32(0x3f800000, buffer, t * 16 + 4, 0, 0);
}

// ---- floating point ----------------------------------------------------------------------------

DSV4_KERNEL(64) void transcendental(const float* in, float* out) {
  const int t = thread_idx();
  const float x = in[t], positive = __builtin_fabsf(x) + 0.01f;
  out[t * 8 + 0] = __builtin_exp2f(x);
  out[t * 8 + 1] = __builtin_expf(x);
  out[t * 8 + 2] = __builtin_log2f(positive);
  out[t * 8 + 3] = __builtin_logf(positive);
  out[t * 8 + 4] = __builtin_amdgcn_rsqf(positive);
  out[t * 8 + 5] = __builtin_sqrtf(positive);
  out[t * 8 + 6] = 1.0f / (1.0f + __builtin_expf(-x));
  out[t * 8 + 7] = __builtin_amdgcn_rcpf(positive);
}

DSV4_KERNEL(64) void halves(const _Float16* a, const _Float16* b, _Float16* out) {
  const int t = thread_idx();
  const f16x2 x = {a[t], a[t + 64]}, y = {b[t], b[t + 64]};
  const f16x2 sum = x + y, product = x * y, fused = x * y + sum;
  out[t] = sum[0];
  out[64 + t] = sum[1];
  out[128 + t] = product[1];
  out[192 + t] = fused[0];
  out[256 + t] = a[t] < b[t] ? a[t] : static_cast<_Float16>(static_cast<float>(b[t]) * 0.5f);
  out[320 + t] = static_cast<_Float16>(t) - a[t];
}

DSV4_KERNEL(64) void packed_floats(const f32x2* a, const f32x2* b, f32x2* out) {
  const int t = thread_idx();
  const f32x2 x = a[t], y = b[t];
  out[t] = x + y;
  out[64 + t] = x * y;
  out[128 + t] = __builtin_elementwise_fma(x, y, -x);
  out[192 + t] = x * 3.0f - y;
  out[256 + t] = f32x2{y[1], x[0]} + f32x2{x[1], x[1]};
}

DSV4_KERNEL(64) void to_bf16(const float* in, uint16_t* out) {
  const int t = thread_idx();
  out[2 * t] = __builtin_bit_cast(uint16_t, static_cast<__bf16>(in[2 * t]));
  out[2 * t + 1] = __builtin_bit_cast(uint16_t, static_cast<__bf16>(in[2 * t + 1]));
}

// OCP bytes to floats. gfx942 decodes FNUZ: half the value, and the code of -0 is its NaN.
template <bool kFix>
DSV4_DEVICE void fp8_body(const uint32_t* in, f32x2* out) {
  const int t = thread_idx();
  uint32_t codes = in[t];
  float factor = 1.0f;
#if defined(__gfx942__)
  if constexpr (kFix) {
    // 0x80 where a byte is exactly 0x80: then its low seven bits are zero, so adding 0x7f does not
    // reach bit 7.
    const uint32_t magnitude = (codes & 0x7f7f7f7fu) + 0x7f7f7f7fu;
    codes &= 0x7f7f7f7fu | (magnitude & 0x80808080u);
    factor = 2.0f;
  }
#endif
  out[2 * t] = __builtin_amdgcn_cvt_pk_f32_fp8(static_cast<int>(codes), false) * factor;
  out[2 * t + 1] = __builtin_amdgcn_cvt_pk_f32_fp8(static_cast<int>(codes), true) * factor;
}
DSV4_KERNEL(64) void fp8_to_f32(const uint32_t* in, f32x2* out) {
  fp8_body<true>(in, out);
}
DSV4_KERNEL(64) void fp8_to_f32_without_fix(const uint32_t* in, f32x2* out) {
  fp8_body<false>(in, out);
}

// c[16 x 16] = a[16 x k] b[16 x k]^T in bf16; one wave per workgroup and 16 columns of b.
DSV4_KERNEL(64) void matmul(const uint16_t* a, const uint16_t* b, float* c, int k) {
  const int lane = thread_idx(), row = lane % 16, group = lane / 16;
  f32x4 sum = {0, 0, 0, 0};
  b += static_cast<int64_t>(block_idx()) * 16 * k;
  for (int kk = 0; kk < k; kk += 16) {
    const s16x4 x = *reinterpret_cast<const s16x4*>(&a[row * k + kk + 4 * group]);
    const s16x4 y = *reinterpret_cast<const s16x4*>(&b[row * k + kk + 4 * group]);
    sum = __builtin_amdgcn_mfma_f32_16x16x16bf16_1k(x, y, sum, 0, 0, 0);
  }
  for (int i = 0; i < 4; ++i) c[(4 * group + i) * 64 + block_idx() * 16 + row] = sum[i];
}

// What the interpreter does not model: private memory.
DSV4_KERNEL(64) void uses_scratch(const int* in, int* out, int n) {
  volatile int local[64];
  for (int i = 0; i < 64; ++i) local[i] = in[i];
  out[thread_idx()] = local[(n + thread_idx()) & 63];
}

DSV4_KERNEL(64) void endless(volatile int* out) {
  for (;;) out[0] = 1;
}

#if defined(__gfx950__)
DSV4_KERNEL(64) void dma(const uint32_t* in, uint32_t* out) {
  DSV4_SHARED uint32_t words[320];
  const int t = thread_idx();
  __builtin_amdgcn_global_load_lds(
      (void __attribute__((address_space(1)))*)(const_cast<uint32_t*>(in) + 4 * t),
      (void __attribute__((address_space(3)))*)words, 16, 0, 0);
  __builtin_amdgcn_global_load_lds(
      (void __attribute__((address_space(1)))*)(const_cast<uint32_t*>(in) + 256 + t),
      (void __attribute__((address_space(3)))*)(words + 256), 4, 0, 0);
  __builtin_amdgcn_s_waitcnt(0);
  barrier();
  out[t] = words[(t * 5) % 320];
}
#endif
