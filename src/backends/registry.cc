// The list of backends: the only file that includes their headers. Everything else uses
// dsv4/backend.h.
#include "dsv4/backend.h"

#include <algorithm>

#include "attention/descriptor.h"
#include "attention/selection.h"
#include "backends/amd/amd.h"
#include "backends/amd/driver.h"
#include "backends/amd/emulated_device.h"
#include "backends/cpu/cpu_attention.h"
#include "backends/cpu/cpu_device.h"
#include "backends/nvidia/driver.h"
#include "backends/nvidia/nvidia.h"
#include "core/fail.h"

namespace dsv4 {
namespace {

constexpr DeviceId kEmulatedDevice{Platform::kRocm, -1};

std::string nothing_missing() {
  return "";
}

// Within a platform the first that fits is taken when a request names none.
std::vector<BackendEntry>& registry() {
  static std::vector<BackendEntry> entries = [] {
    std::vector<BackendEntry> out{
        {&cpu::CpuAttention::static_descriptor(), nothing_missing, cpu::CpuAttention::create}};
    for (const BackendEntry& entry : nvidia::backend_entries()) out.push_back(entry);
    for (const BackendEntry& entry : amd::backend_entries()) out.push_back(entry);
    return out;
  }();
  return entries;
}

std::string name_list() {
  std::string out;
  for (const BackendEntry& entry : registry()) {
    out += concat(out.empty() ? "" : ", ", entry.descriptor->name);
  }
  return out;
}

const BackendEntry* find_entry(const AttentionDescriptor& descriptor) {
  for (const BackendEntry& entry : registry()) {
    if (entry.descriptor->name == descriptor.name) return &entry;
  }
  return nullptr;
}

}  // namespace

std::span<const BackendEntry> backends() {
  return registry();
}

void register_backend(const BackendEntry& entry) {
  if (entry.descriptor == nullptr || entry.descriptor->name.empty() ||
      entry.descriptor->padded_num_q_heads == nullptr) {
    fail(ErrorCode::kInvalidArgument,
         "backend: a descriptor with a name and padded_num_q_heads is required, given ",
         entry.descriptor == nullptr ? "none" : "one without");
  }
  if (find_entry(*entry.descriptor) != nullptr) {
    fail(ErrorCode::kInvalidArgument, "backend: the name \"", entry.descriptor->name,
         "\" is already taken (", name_list(), ")");
  }
  BackendEntry added = entry;
  if (added.why_not_here == nullptr) added.why_not_here = nothing_missing;
  registry().push_back(added);
}

DeviceSearch find_devices(Platform platform) {
  switch (platform) {
    case Platform::kCpu:
      return {{{{Platform::kCpu, 0}, cpu::describe_cpu(), {}}}, ""};
    case Platform::kCuda:
      return nvidia::find_devices();
    case Platform::kRocm:
      return amd::find_devices();
  }
  return {{}, "unknown platform"};
}

SelectionTarget target_of(const DeviceId& id) {
  SelectionTarget out{.platform = id.platform, .capability = std::nullopt, .why_absent = ""};
  if (id.platform == Platform::kCpu) return out;
  if (id == kEmulatedDevice) {
    out.capability = amd::kEmulated;
    return out;
  }
  const DeviceSearch search = find_devices(id.platform);
  if (static_cast<size_t>(id.index) < search.devices.size()) {
    out.capability = search.devices[static_cast<size_t>(id.index)].capability;
  } else if (search.devices.empty()) {
    out.why_absent = search.why_none;
  } else {
    out.why_absent =
        concat(id.str(), " of ", search.devices.size(), " devices (",
               search.devices.front().id.str(), " to ", search.devices.back().id.str(), ")");
  }
  return out;
}

std::unique_ptr<Device> open_device(const DeviceId& id, int num_threads) {
  if (id.platform == Platform::kCpu) return cpu::open_cpu_device(num_threads);
  std::vector<Reason> reasons;
  for (const BackendEntry& entry : registry()) {
    if (entry.descriptor->platform != id.platform) continue;
    for (Reason& reason : device_reasons(*entry.descriptor, target_of(id))) {
      if (std::find(reasons.begin(), reasons.end(), reason) == reasons.end()) {
        reasons.push_back(std::move(reason));
      }
    }
  }
  if (reasons.empty() && id == kEmulatedDevice) return amd::open_emulated_device(num_threads);
  if (reasons.empty() && id.platform == Platform::kCuda) return nvidia::open_device(id.index);
  if (reasons.empty() && id.platform == Platform::kRocm) return amd::open_device(id.index);
  fail(ErrorCode::kUnsupported, "device ", id.str(), " cannot be used: ", join_reasons(reasons));
}

AttentionSelection select_attention(const ModelConfig& config, const SelectionTarget& target,
                                    const SelectionRequest& request) {
  std::vector<const AttentionDescriptor*> descriptors;
  for (const BackendEntry& entry : registry()) descriptors.push_back(entry.descriptor);
  return select_among(descriptors, config, target, request);
}

std::unique_ptr<DeepseekV4Attention> create_attention(const AttentionDescriptor& descriptor,
                                                      const AttentionArgs& args) {
  const BackendEntry* entry = find_entry(descriptor);
  if (entry == nullptr) {
    fail(ErrorCode::kUnsupported, "attention backend \"", descriptor.name,
         "\": not registered, expected one of ", name_list());
  }
  if (entry->create == nullptr) {
    fail(ErrorCode::kUnsupported, "attention backend ", descriptor.name, ": ",
         entry->why_not_here());
  }
  return entry->create(args);
}

std::vector<BackendReport> describe_backends(const ModelConfig* config,
                                             const SelectionRequest& request) {
  std::vector<BackendReport> out;
  for (const BackendEntry& entry : registry()) {
    const AttentionDescriptor& descriptor = *entry.descriptor;
    BackendReport report;
    report.descriptor = &descriptor;
    report.differences = upstream_differences(descriptor);
    const auto add = [&](const SelectionTarget& target, const std::optional<DeviceInfo>& device) {
      report.device = device;
      report.reasons = device_reasons(descriptor, target, request.numerics.products);
      Numerics numerics = request.numerics;
      for (Reason& reason : request_reasons(descriptor, request, numerics)) {
        report.reasons.push_back(std::move(reason));
      }
      if (config != nullptr) {
        for (Reason& reason : model_reasons(descriptor, *config, request, numerics)) {
          report.reasons.push_back(std::move(reason));
        }
      }
      out.push_back(report);
    };
    const DeviceSearch search = find_devices(descriptor.platform);
    for (const DeviceInfo& device : search.devices) {
      add({descriptor.platform, device.capability, ""}, device);
    }
    if (search.devices.empty()) {
      add({descriptor.platform, std::nullopt, search.why_none}, std::nullopt);
    }
    if (descriptor.platform == kEmulatedDevice.platform) {
      add(target_of(kEmulatedDevice),
          DeviceInfo{kEmulatedDevice, "the executor, on the host", amd::kEmulated});
    }
  }
  return out;
}

}  // namespace dsv4
