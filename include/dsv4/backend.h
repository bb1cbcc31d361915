// Backends of the attention layer: which exist, what each can do, which one serves a request, and
// the devices of this machine. For programs that create layers or engines themselves; the rest of
// the library reaches a backend only through this header.
#pragma once
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "dsv4/cache.h"
#include "dsv4/config.h"
#include "dsv4/device.h"
#include "dsv4/dtype.h"
#include "dsv4/numerics.h"

namespace dsv4 {

class DeepseekV4Attention;
struct AttentionArgs;

/// One condition that is not met, with both values.
struct Reason {
  std::string condition;
  std::string required;
  std::string given;
  /// "head_dim: 128, required 512".
  std::string str() const;
  bool operator==(const Reason&) const = default;
};
/// "a; b; c".
std::string join_reasons(std::span<const Reason> reasons);

/// Version of a GPU's instruction set: compute capability (NVIDIA, stepping 0) or the digits of its
/// gfx name (AMD; all zero: emulated).
struct Capability {
  int major = 0;
  int minor = 0;
  int stepping = 0;
  bool operator==(const Capability&) const = default;
};
/// "sm_90" for {9, 0} on kCuda, "gfx942" for {9, 4, 2} on kRocm ("emulated" for zeros), "cpu" on
/// kCpu.
std::string architecture_name(Platform platform, const Capability& capability);

/// What a backend is and can do: plain data, readable without a device. An empty list of numbers
/// means any.
struct AttentionDescriptor {
  std::string_view name;        ///< as on the command line: "FLASHMLA_SPARSE_DSV4"
  std::string_view class_name;  ///< "FlashMlaAttention"
  Platform platform = Platform::kCpu;

  KvFormat native_format = KvFormat::kFp8DsMla;  ///< of "auto", unless activations are f32
  std::vector<KvFormat> kv_formats;              ///< rows of window and compressed caches
  bool packed_layout = true;                     ///< "fp8" may stand for fp8_ds_mla
  std::vector<KvFormat> index_formats;
  std::vector<DType> activations;
  std::vector<WoA> wo_a_forms;  ///< best first; the first one is what `serving` means here
  /// With kernels for Products::kFp8; none: refused.
  std::vector<std::string> fp8_product_architectures;
  bool expands_wo_a = false;  ///< keeps an FP8 wo_a in bf16, too, where it projects in bf16

  int max_heads = 0;  ///< of one rank; 0: no bound
  /// Smallest head count >= num_heads (1 .. max_heads) that the kernels take.
  int (*padded_num_q_heads)(int num_heads) = nullptr;
  std::vector<int> head_sizes;
  std::vector<int> compress_ratios;
  std::vector<int> growing_block_tokens;  ///< tokens of a block of compressed rows
  int max_tensor_parallel = 0;            ///< ranks; 0: as many as divide heads and output groups

  bool supports_mla = true;            ///< one KV head, V is K
  bool supports_sparse = true;         ///< attends to listed rows
  bool supports_sink = true;           ///< a logit per head without a value
  bool supports_uniform_graph = true;  ///< batches of equal decode lengths can be captured

  /// Architectures that kernels of this build were compiled for: "sm_80", "sm_90a", "gfx942"; "cpu"
  /// on kCpu; "emulated" where they run on the host in place of a GPU. A plain sm_XY runs on the
  /// same major version from that minor version on, sm_XYa on exactly XY, sm_XYf on its family,
  /// compute_XY (translated by the driver) on all from XY on.
  std::vector<std::string> architectures;
  /// Why `architectures` names no hardware; empty when it does.
  std::string not_built;
};

/// A backend as the registry holds it. The descriptor outlives the registry.
struct BackendEntry {
  const AttentionDescriptor* descriptor = nullptr;
  /// Empty when hardware for it exists and kernels are built; else the reason why not.
  std::string (*why_not_here)() = nullptr;
  /// Makes a layer; null when this build has no kernels of it.
  std::unique_ptr<DeepseekV4Attention> (*create)(const AttentionArgs&) = nullptr;
};

/// All backends, those of a platform in order of preference. Valid until register_backend().
std::span<const BackendEntry> backends();
/// Adds a backend behind those known; not while other threads use this header.
/// @throws Error kInvalidArgument: no descriptor, no padded_num_q_heads, or a name already taken.
void register_backend(const BackendEntry& entry);

/// A device found on this machine.
struct DeviceInfo {
  DeviceId id;
  std::string name;  ///< as the driver says: "NVIDIA H200"; of the CPU with the chosen kernels
  Capability capability;
};
struct DeviceSearch {
  std::vector<DeviceInfo> devices;
  std::string why_none;  ///< "no CUDA driver: libcuda.so.1 not found"; empty when there are some
};
/// Asks the driver of `platform`; on kCpu always one device. "rocm:emulated" is not among them: it
/// is there always.
DeviceSearch find_devices(Platform platform);

/// @param num_threads  of the CPU's pool, 0: all cores; GPUs ignore it.
/// @throws Error kUnsupported: nothing here can run on that device, with every reason;
///         kInvalidArgument (threads).
std::unique_ptr<Device> open_device(const DeviceId& id, int num_threads);

/// What a layer shall run on. Need not exist: any target can be asked about.
struct SelectionTarget {
  Platform platform = Platform::kCpu;
  std::optional<Capability> capability;  ///< of a GPU; nullopt: unknown
  std::string why_absent;                ///< empty: the device is there
};
/// The target that `id` names on this machine; never throws.
SelectionTarget target_of(const DeviceId& id);

struct SelectionRequest {
  std::string backend = "";             ///< empty: the best that fits
  std::string kv_cache_dtype = "auto";  ///< auto | fp8_ds_mla | bf16 | fp8 | f32
  Numerics numerics = kServing;         ///< its kv format is ignored: kv_cache_dtype decides
  int tensor_parallel_size = 1;
  int growing_block_tokens = 0;  ///< 0: not asked for
};

/// A backend that was considered and why it does not fit. `backend` is empty when the request
/// itself names none that exists.
struct BackendRefusal {
  std::string backend;
  std::vector<Reason> reasons;
};

struct AttentionSelection {
  const AttentionDescriptor* descriptor = nullptr;  ///< null: none fits
  Numerics numerics = kServing;                     ///< of the request, kv format filled in
  std::vector<BackendRefusal> refusals;  ///< empty, or every unmet condition of those considered
  /// For people, one line per backend. Empty when a backend was found.
  std::string message() const;
};

/// The backend for `config` on `target`: the one that the request names, else the first of the
/// platform that meets all conditions. A pure function of its arguments and the registry; asks no
/// device.
AttentionSelection select_attention(const ModelConfig& config, const SelectionTarget& target,
                                    const SelectionRequest& request);

/// Conditions of `numerics` that `descriptor` does not meet, kv format included.
std::vector<Reason> unsupported(const Numerics& numerics, const AttentionDescriptor& descriptor);

/// Makes a layer with the backend of `descriptor` (one of backends()).
/// @throws Error kUnsupported: not registered, or without kernels in this build; kInvalidArgument
/// as the layer's constructor.
std::unique_ptr<DeepseekV4Attention> create_attention(const AttentionDescriptor& descriptor,
                                                      const AttentionArgs& args);

/// A backend on a device of its platform, or without one.
struct BackendReport {
  const AttentionDescriptor* descriptor = nullptr;
  std::optional<DeviceInfo> device;      ///< nullopt: its platform has none here
  std::vector<Reason> reasons;           ///< empty: usable
  std::vector<std::string> differences;  ///< where its answers differ from upstream's rules
  bool usable() const { return reasons.empty(); }
};
/// Every backend with every device of its platform. With a config, its conditions count too.
std::vector<BackendReport> describe_backends(const ModelConfig* config = nullptr,
                                             const SelectionRequest& request = {});

}  // namespace dsv4
