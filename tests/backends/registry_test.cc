// The registry, the devices of this machine, and what is said about backends that cannot run.
#include <gtest/gtest.h>

#include <algorithm>
#include <filesystem>
#include <fstream>

#include "backends/amd/driver.h"
#include "core/fail.h"
#include "dsv4/attention.h"
#include "dsv4/backend.h"

namespace dsv4 {
namespace {

namespace fs = std::filesystem;

const BackendEntry* entry_of(std::string_view name) {
  for (const BackendEntry& entry : backends()) {
    if (entry.descriptor->name == name) return &entry;
  }
  return nullptr;
}

// Runs f, which must throw; the code and message of its error.
template <typename F>
std::pair<ErrorCode, std::string> error_of(F&& f) {
  try {
    f();
  } catch (const Error& error) {
    return {error.code(), error.what()};
  }
  ADD_FAILURE() << "expected an error";
  return {};
}

ModelConfig small_model() {
  return ModelConfig::load(std::string(DSV4_SOURCE_DIR) + "/models/tiny-shakespeare");
}

TEST(Registry, HasTheFourBackends) {
  const struct {
    const char* name;
    const char* class_name;
    Platform platform;
    KvFormat native;
    bool packed;
    int max_heads;
  } expected[] = {
      {"CPU_DSV4", "CpuAttention", Platform::kCpu, KvFormat::kFp8DsMla, true, 0},
      {"FLASHMLA_SPARSE_DSV4", "FlashMlaAttention", Platform::kCuda, KvFormat::kFp8DsMla, true,
       128},
      {"FLASHINFER_MLA_SPARSE_DSV4", "FlashInferAttention", Platform::kCuda, KvFormat::kBf16, false,
       128},
      {"ROCM_FLASHMLA_SPARSE_DSV4", "RocmAiterAttention", Platform::kRocm, KvFormat::kFp8DsMla,
       true, 0},
  };
  for (const auto& e : expected) {
    const BackendEntry* entry = entry_of(e.name);
    ASSERT_NE(entry, nullptr) << e.name;
    const AttentionDescriptor& descriptor = *entry->descriptor;
    EXPECT_EQ(descriptor.class_name, e.class_name);
    EXPECT_EQ(descriptor.platform, e.platform);
    EXPECT_EQ(descriptor.native_format, e.native);
    EXPECT_EQ(descriptor.packed_layout, e.packed);
    EXPECT_EQ(descriptor.max_heads, e.max_heads);
  }
}

TEST(Registry, DescriptorsAreConsistent) {
  for (const BackendEntry& entry : backends()) {
    const AttentionDescriptor& d = *entry.descriptor;
    const auto has = [](const auto& list, auto value) {
      return std::find(list.begin(), list.end(), value) != list.end();
    };
    EXPECT_TRUE(has(d.kv_formats, d.native_format)) << d.name;
    EXPECT_FALSE(d.index_formats.empty() || d.activations.empty() || d.wo_a_forms.empty())
        << d.name;
    // A backend has kernels or says why not, and makes layers exactly when it has kernels.
    EXPECT_EQ(d.architectures.empty(), !d.not_built.empty()) << d.name;
    EXPECT_EQ(d.architectures.empty(), entry.create == nullptr) << d.name;
    if (d.architectures.empty()) {
      EXPECT_NE(entry.why_not_here().find(d.not_built), std::string::npos);
    }
    for (int n = 1; n <= 128; ++n) {
      EXPECT_GE(d.padded_num_q_heads(n), n) << d.name;
      if (n > 1) {
        EXPECT_GE(d.padded_num_q_heads(n), d.padded_num_q_heads(n - 1)) << d.name;
      }
    }
  }
}

TEST(Registry, RefusesBadEntries) {
  const auto [none, none_text] = error_of([] { register_backend({}); });
  EXPECT_EQ(none, ErrorCode::kInvalidArgument);

  static const AttentionDescriptor nameless = [] {
    AttentionDescriptor out;
    out.padded_num_q_heads = [](int n) { return n; };
    return out;
  }();
  EXPECT_EQ(error_of([] { register_backend({.descriptor = &nameless}); }).first,
            ErrorCode::kInvalidArgument);

  static const AttentionDescriptor taken = [] {
    AttentionDescriptor out = nameless;
    out.name = "CPU_DSV4";
    return out;
  }();
  const auto [code, text] = error_of([] { register_backend({.descriptor = &taken}); });
  EXPECT_EQ(code, ErrorCode::kInvalidArgument);
  EXPECT_NE(text.find("CPU_DSV4"), std::string::npos);
}

// What create_attention was called with; the entry below only records it.
const AttentionArgs* recorded_args = nullptr;

TEST(Registry, AnAddedBackendIsSelectedByNameAndCreated) {
  static const AttentionDescriptor recorder = [] {
    AttentionDescriptor out = *entry_of("CPU_DSV4")->descriptor;
    out.name = "RECORDER_DSV4";
    return out;
  }();
  register_backend(
      {.descriptor = &recorder,
       .why_not_here = nullptr,
       .create = [](const AttentionArgs& args) -> std::unique_ptr<DeepseekV4Attention> {
         recorded_args = &args;
         fail(ErrorCode::kInternal, "recorder");
       }});
  const BackendEntry* entry = entry_of("RECORDER_DSV4");
  ASSERT_NE(entry, nullptr);
  EXPECT_EQ(entry->why_not_here(), "");

  const SelectionTarget cpu = target_of({Platform::kCpu, 0});
  const AttentionSelection named =
      select_attention(small_model(), cpu, {.backend = "RECORDER_DSV4"});
  ASSERT_EQ(named.descriptor, &recorder) << named.message();
  const AttentionArgs args;
  EXPECT_EQ(error_of([&] { create_attention(*named.descriptor, args); }).second, "recorder");
  EXPECT_EQ(recorded_args, &args);

  // It comes after what was there: the default does not change.
  const AttentionSelection unnamed = select_attention(small_model(), cpu, {});
  ASSERT_NE(unnamed.descriptor, nullptr) << unnamed.message();
  EXPECT_EQ(unnamed.descriptor->name, "CPU_DSV4");
}

TEST(CreateAttention, RefusesWhatItDoesNotHave) {
  static const AttentionDescriptor stranger = [] {
    AttentionDescriptor out;
    out.name = "STRANGER";
    return out;
  }();
  const AttentionArgs args;
  const auto [code, text] = error_of([&] { create_attention(stranger, args); });
  EXPECT_EQ(code, ErrorCode::kUnsupported);
  EXPECT_NE(text.find("CPU_DSV4"), std::string::npos) << text;
  for (const BackendEntry& entry : backends()) {
    if (entry.create != nullptr) continue;
    const auto [missing, why] = error_of([&] { create_attention(*entry.descriptor, args); });
    EXPECT_EQ(missing, ErrorCode::kUnsupported);
    EXPECT_NE(why.find(entry.descriptor->not_built), std::string::npos) << why;
  }
}

TEST(OpenDevice, Cpu) {
  const std::unique_ptr<Device> device = open_device({Platform::kCpu, 0}, 1);
  EXPECT_EQ(device->id(), (DeviceId{Platform::kCpu, 0}));
  EXPECT_EQ(device->num_threads(), 1);
}

TEST(OpenDevice, GpusAreRefusedWithEveryReason) {
  const struct {
    DeviceId id;
    const char* backend;
  } cases[] = {{{Platform::kCuda, 0}, "FLASHMLA_SPARSE_DSV4"},
               {{Platform::kCuda, 1000}, "FLASHMLA_SPARSE_DSV4"},
               {{Platform::kRocm, 0}, "ROCM_FLASHMLA_SPARSE_DSV4"},
               {{Platform::kRocm, -1}, "ROCM_FLASHMLA_SPARSE_DSV4"}};
  for (const auto& c : cases) {
    const auto [code, text] = error_of([&] { open_device(c.id, 1); });
    EXPECT_EQ(code, ErrorCode::kUnsupported);
    EXPECT_NE(text.find(c.id.str()), std::string::npos) << text;
    EXPECT_NE(text.find(entry_of(c.backend)->descriptor->not_built), std::string::npos) << text;
    EXPECT_NE(text.find(target_of(c.id).why_absent), std::string::npos) << text;
  }
}

TEST(TargetOf, MatchesTheDevicesFound) {
  EXPECT_EQ(target_of({Platform::kCpu, 0}).why_absent, "");
  for (Platform platform : {Platform::kCuda, Platform::kRocm}) {
    const DeviceSearch search = find_devices(platform);
    EXPECT_EQ(search.devices.empty(), !search.why_none.empty());
    for (const DeviceInfo& device : search.devices) {
      const SelectionTarget target = target_of(device.id);
      EXPECT_EQ(target.why_absent, "");
      EXPECT_EQ(target.capability, device.capability);
    }
    const int beyond = static_cast<int>(search.devices.size());
    EXPECT_NE(target_of({platform, beyond}).why_absent, "");
  }
  EXPECT_NE(target_of({Platform::kRocm, -1}).why_absent.find("emulated"), std::string::npos);
}

TEST(SelectAttention, AsksAboutMachinesThatAreNotThere) {
  // An H200 that need not exist: the only thing missing is kernels.
  const SelectionTarget hopper{Platform::kCuda, Capability{9, 0}, ""};
  const AttentionSelection selection =
      select_attention(small_model(), hopper, {.backend = "FLASHMLA_SPARSE_DSV4"});
  EXPECT_EQ(selection.descriptor, nullptr);
  ASSERT_EQ(selection.refusals.size(), 1u);
  ASSERT_EQ(selection.refusals[0].reasons.size(), 1u) << selection.message();
  EXPECT_EQ(selection.refusals[0].reasons[0].condition, "kernels");
}

TEST(DescribeBackends, CpuIsUsableAndOthersSayWhy) {
  const ModelConfig config = small_model();
  const std::vector<BackendReport> reports = describe_backends(&config);
  for (const BackendEntry& entry : backends()) {
    const auto report = std::find_if(reports.begin(), reports.end(), [&](const auto& r) {
      return r.descriptor == entry.descriptor;
    });
    ASSERT_NE(report, reports.end()) << entry.descriptor->name;
    EXPECT_EQ(report->usable(), entry.create != nullptr) << entry.descriptor->name;
    EXPECT_EQ(report->device.has_value(),
              find_devices(entry.descriptor->platform).why_none.empty());
    EXPECT_FALSE(report->differences.empty()) << entry.descriptor->name;
  }
}

TEST(DescribeBackends, CountsTheConfigAndTheRequest) {
  ModelConfig config = small_model();
  config.compress_ratios[0] = 7;
  const auto reasons_of_cpu = [](const std::vector<BackendReport>& reports) {
    return reports.front().reasons.size();
  };
  ASSERT_EQ(describe_backends()[0].descriptor->name, "CPU_DSV4");
  EXPECT_EQ(reasons_of_cpu(describe_backends()), 0u);
  EXPECT_EQ(reasons_of_cpu(describe_backends(&config)), 1u);
  EXPECT_EQ(reasons_of_cpu(describe_backends(&config, {.kv_cache_dtype = "int4"})), 2u);
}

TEST(AmdTopology, ListsGpusOnly) {
  const fs::path root = fs::path(::testing::TempDir()) / "dsv4_kfd_topology";
  fs::remove_all(root);
  const auto write = [&](int node, const std::string& text) {
    fs::create_directories(root / "nodes" / std::to_string(node));
    std::ofstream(root / "nodes" / std::to_string(node) / "properties") << text;
  };
  write(0, "cpu_cores_count 64\ngfx_target_version 0\n");
  write(1, "simd_count 1216\ngfx_target_version 90402\nvendor_id 4098\n");
  write(2, "gfx_target_version 90500\n");
  write(3, "vendor_id 4098\n");
  write(4, "gfx_target_version 90010\n");
  write(5, "gfx_target_version nonsense\n");
  write(6, "gfx_target_version -1\n");
  write(8, "gfx_target_version 110000\n");  // behind a gap: nodes are numbered without one
  const std::vector<DeviceInfo> devices = amd::read_topology(root.string());
  ASSERT_EQ(devices.size(), 3u);
  EXPECT_EQ(devices[0].capability, (Capability{9, 4, 2}));
  EXPECT_EQ(devices[1].capability, (Capability{9, 5, 0}));
  EXPECT_EQ(devices[2].capability, (Capability{9, 0, 10}));
  EXPECT_EQ(devices[2].id, (DeviceId{Platform::kRocm, 2}));
  EXPECT_NE(devices[0].name.find("gfx942"), std::string::npos);
  EXPECT_TRUE(amd::read_topology((root / "missing").string()).empty());
  fs::remove_all(root);
}

}  // namespace
}  // namespace dsv4
