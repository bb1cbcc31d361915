// Launcher of attend_sm80: which instantiation, how items are cut.
#include "backends/nvidia/ops/attend_sm80.h"

#include <algorithm>
#include <array>
#include <mutex>

#include "backends/nvidia/ops/gpu_check.h"
#include "core/checked_math.h"

namespace dsv4::nvidia {
namespace attend80 {
namespace {

// Slots of partial results. Chains are spread over CTAs while their slots fit; else a CTA takes all
// chains of its items, and has one slot.
constexpr int64_t kMaxSlots = 512;
constexpr int64_t kMaxTileHeads = 32;
constexpr int64_t kHeadDim = 512;

constexpr int64_t slot_bytes(int64_t heads) {
  return heads * (kHeadDim * int64_t{sizeof(float)} + int64_t{sizeof(float2)});
}

/// An instantiation as a device runs it.
struct Prepared {
  Kernel kernel;
  int ctas_per_sm;  // 0: does not fit
};
struct DeviceKernels {
  int num_sms = 0;
  std::array<std::vector<Prepared>, 3> formats;  // fp8_ds_mla, bf16, fp8
};

std::vector<Prepared> prepare(std::span<const Kernel> kernels, int max_shared_bytes) {
  std::vector<Prepared> out;
  for (const Kernel& kernel : kernels) {
    int ctas = 0;
    if (kernel.shared_bytes <= max_shared_bytes) {
      DSV4_CUDA_CHECK(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel.attend),
                                           cudaFuncAttributeMaxDynamicSharedMemorySize,
                                           kernel.shared_bytes));
      DSV4_CUDA_CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(
          &ctas, reinterpret_cast<const void*>(kernel.attend), kThreads,
          static_cast<size_t>(kernel.shared_bytes)));
    }
    out.push_back({kernel, ctas});
  }
  return out;
}

// Asked of a device once, at the first call.
const DeviceKernels& device_kernels() {
  constexpr int kMaxDevices = 64;
  static std::array<DeviceKernels, kMaxDevices> devices;
  static std::array<std::once_flag, kMaxDevices> once;
  int device = 0;
  DSV4_CUDA_CHECK(cudaGetDevice(&device));
  DSV4_CHECK(device < kMaxDevices);
  std::call_once(once[static_cast<size_t>(device)], [device] {
    DeviceKernels& out = devices[static_cast<size_t>(device)];
    int shared_bytes = 0;
    DSV4_CUDA_CHECK(cudaDeviceGetAttribute(&out.num_sms, cudaDevAttrMultiProcessorCount, device));
    DSV4_CUDA_CHECK(
        cudaDeviceGetAttribute(&shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
    out.formats = {prepare(fp8_ds_mla_kernels(), shared_bytes),
                   prepare(bf16_kernels(), shared_bytes), prepare(fp8_kernels(), shared_bytes)};
  });
  return devices[static_cast<size_t>(device)];
}

// Rows of both caches must have one format: a warp's columns are dealt to lanes by it.
bool takes(const AttendArgs& args) {
  const bool one_format = args.window.kind == RowSource::kNone ||
                          args.compressed.kind == RowSource::kNone ||
                          args.window.format == args.compressed.format;
  return args.head_dim == kHeadDim && args.rows_per_block == 64 && args.round_p && one_format &&
         is_aligned_16(args);
}

// Two tiles of 16 heads share converted rows; with few tokens more CTAs are worth more.
const Prepared& choose(std::span<const Prepared> kernels, const AttendArgs& args, int num_sms) {
  for (const Prepared& candidate : kernels) {
    if (candidate.ctas_per_sm == 0) continue;
    const int64_t items =
        int64_t{args.num_tokens} * ceil_div(args.num_heads, candidate.kernel.heads);
    if (candidate.kernel.heads == 16 || (args.num_heads > 16 && items >= num_sms)) {
      return candidate;
    }
  }
  fail(ErrorCode::kUnsupported, "attend:sm80 needs 99 KiB of shared memory per block");
}

void launch(const AttendArgs& args, const OpContext& context) {
  const DeviceKernels& device = device_kernels();
  const KvFormat format =
      args.window.kind != RowSource::kNone ? args.window.format : args.compressed.format;
  const std::vector<Prepared>& kernels = device.formats[format == KvFormat::kFp8DsMla ? 0
                                                        : format == KvFormat::kBf16   ? 1
                                                                                      : 2];
  const Prepared& chosen = choose(kernels, args, device.num_sms);
  Schedule schedule;
  schedule.tiles = static_cast<int32_t>(ceil_div(args.num_heads, chosen.kernel.heads));
  const int64_t items = int64_t{args.num_tokens} * schedule.tiles;
  DSV4_CHECK(items * args.max_chains <= INT32_MAX);
  if (args.max_chains > 1 && items * args.max_chains <= kMaxSlots) {
    schedule.spread_chains = args.max_chains;
  }
  schedule.items = static_cast<int32_t>(items * schedule.spread_chains);
  const int64_t grid =
      std::min<int64_t>({schedule.items, kMaxSlots, int64_t{device.num_sms} * chosen.ctas_per_sm});
  if (args.max_chains > 1) {
    const int64_t slots = schedule.spread_chains > 1 ? schedule.items : grid;
    schedule.values =
        context.scratch->take_array<float2>(slots * chosen.kernel.heads * kHeadDim / 2);
    schedule.state = context.scratch->take_array<float2>(slots * chosen.kernel.heads);
  }
  if (context.scratch->measuring()) return;
  const cudaStream_t stream = stream_of(context.stream);
  chosen.kernel.attend<<<static_cast<unsigned>(grid), kThreads,
                         static_cast<size_t>(chosen.kernel.shared_bytes), stream>>>(args, schedule);
  DSV4_CUDA_CHECK_LAUNCH();
  if (schedule.spread_chains > 1) {
    chosen.kernel.merge<<<static_cast<unsigned>(items), kThreads, 0, stream>>>(args, schedule);
    DSV4_CUDA_CHECK_LAUNCH();
  }
}

}  // namespace

int64_t scratch_bytes(int64_t max_entries) {
  constexpr ReductionGrid kGrid;
  if (max_entries <= int64_t{kGrid.rows_per_block} * kGrid.blocks_per_chain) return 0;
  return kMaxSlots * slot_bytes(kMaxTileHeads) + 2 * Arena::kAlignment;
}

}  // namespace attend80

void attend_sm80(const AttendParams& params, const OpContext& context) {
  const AttendArgs args = attend_args(params);
  if (args.num_tokens == 0) return;
  if (!attend80::takes(args)) {
    attend_reference(params, context);
    return;
  }
  Arena::Scope scope(*context.scratch);
  attend80::launch(args, context);
}

}  // namespace dsv4::nvidia
