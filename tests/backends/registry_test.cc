// The registry, the devices of this machine, and what is said about backends that cannot run.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdlib>

#include "backends/amd/driver.h"
#include "core/fail.h"
#include "dsv4/attention.h"
#include "dsv4/backend.h"
#include "ops/ops.h"

namespace dsv4 {
namespace {

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
    // A backend has kernels for hardware or says why not, and makes layers exactly when it has
    // kernels of any kind.
    const bool emulated = has(d.architectures, std::string("emulated"));
    EXPECT_EQ(d.architectures.size() == (emulated ? 1u : 0u), !d.not_built.empty()) << d.name;
    EXPECT_EQ(d.architectures.empty(), entry.create == nullptr) << d.name;
    EXPECT_EQ(emulated, d.platform == Platform::kRocm) << d.name;
    if (!d.not_built.empty()) {
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

// Host code: it is there in every build, on every machine.
TEST(OpenDevice, RocmEmulated) {
  const DeviceId id{Platform::kRocm, -1};
  const std::unique_ptr<Device> device = open_device(id, 2);
  EXPECT_EQ(device->id(), id);
  EXPECT_EQ(device->num_threads(), 2);
  EXPECT_FALSE(device->reads_host_memory());
  const Ops& ops = device->ops();
  EXPECT_TRUE(ops.linear && ops.rms_norm && ops.gather_rows && ops.zero && ops.expand_plan &&
              ops.qnorm_rope_insert && ops.compress && ops.index_query && ops.index_logits &&
              ops.top_k && ops.map_slots && ops.ragged_rows && ops.attend && ops.inverse_rope &&
              ops.embed && ops.hc_pre && ops.hc_post && ops.hc_head && ops.route && ops.moe);
  EXPECT_EQ(error_of([&] { open_device(id, -1); }).first, ErrorCode::kInvalidArgument);
}

// DSV4_KERNEL as on other platforms.
TEST(OpenDevice, RocmEmulatedTakesForcedKernels) {
  const DeviceId id{Platform::kRocm, -1};
  setenv("DSV4_KERNEL", "rowwise:shared", 1);
  EXPECT_NE(open_device(id, 1)->description().find("DSV4_KERNEL=rowwise:shared"),
            std::string::npos);
  setenv("DSV4_KERNEL", "rowwise:avx2", 1);
  const auto [code, text] = error_of([&] { open_device(id, 1); });
  unsetenv("DSV4_KERNEL");
  EXPECT_EQ(code, ErrorCode::kInvalidArgument);
  EXPECT_NE(text.find("rowwise:shared"), std::string::npos) << text;
}

TEST(OpenDevice, GpusAreRefusedWithEveryReason) {
  const struct {
    DeviceId id;
    const char* backend;
  } cases[] = {{{Platform::kCuda, 0}, "FLASHMLA_SPARSE_DSV4"},
               {{Platform::kCuda, 1000}, "FLASHMLA_SPARSE_DSV4"},
               {{Platform::kRocm, 0}, "ROCM_FLASHMLA_SPARSE_DSV4"}};
  for (const auto& c : cases) {
    if (target_of(c.id).why_absent.empty()) continue;  // the machine has it
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
  const SelectionTarget emulated = target_of({Platform::kRocm, -1});
  EXPECT_EQ(emulated.why_absent, "");
  EXPECT_EQ(emulated.capability, Capability{});
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

// spec/dispatch.md 2.3, 3 and 1.2 for AMD: one class, whatever chip; serving projects in bf16; the
// packed format or a refusal; no bound of heads, no padding.
TEST(SelectAttention, Rocm) {
  const ModelConfig config = small_model();
  const SelectionTarget emulated = target_of({Platform::kRocm, -1});
  const auto select = [&](const SelectionRequest& request) {
    return select_attention(config, emulated, request);
  };
  const AttentionSelection unnamed = select({});
  ASSERT_NE(unnamed.descriptor, nullptr) << unnamed.message();
  EXPECT_EQ(unnamed.descriptor->name, "ROCM_FLASHMLA_SPARSE_DSV4");
  EXPECT_EQ(unnamed.numerics.wo_a, WoA::kBf16);
  EXPECT_EQ(unnamed.numerics.kv, KvFormat::kFp8DsMla);
  EXPECT_EQ(select({.backend = "ROCM_FLASHMLA_SPARSE_DSV4"}).descriptor, unnamed.descriptor);
  for (const char* other : {"FLASHMLA_SPARSE_DSV4", "FLASHINFER_MLA_SPARSE_DSV4", "CPU_DSV4"})
    EXPECT_EQ(select({.backend = other}).descriptor, nullptr) << other;

  for (const char* accepted : {"auto", "fp8", "fp8_e4m3", "fp8_ds_mla"}) {
    const AttentionSelection selection = select({.kv_cache_dtype = accepted});
    ASSERT_NE(selection.descriptor, nullptr) << accepted << selection.message();
    EXPECT_EQ(selection.numerics.kv, KvFormat::kFp8DsMla) << accepted;
  }
  for (const char* refused : {"bf16", "bfloat16", "fp8_e5m2", "f32", "int8"})
    EXPECT_EQ(select({.kv_cache_dtype = refused}).descriptor, nullptr) << refused;
  EXPECT_EQ(select({.numerics = kReference}).numerics.index, KvFormat::kIndexMxfp4);
  EXPECT_EQ(select({.numerics = kExact}).descriptor, nullptr);
  EXPECT_EQ(select({.growing_block_tokens = 64}).descriptor, nullptr);

  for (int heads : {1, 16, 64, 65, 128, 129, 256}) {
    ModelConfig wide = config;
    wide.num_heads = heads;
    wide.o_groups = 1;
    const AttentionSelection selection = select_attention(wide, emulated, {});
    ASSERT_NE(selection.descriptor, nullptr) << heads << selection.message();
    EXPECT_EQ(selection.descriptor->padded_num_q_heads(heads), heads);
  }
}

// Chips that need not be there: those that kernels are compiled for, in builds with kernels.
TEST(SelectAttention, RocmChips) {
  const ModelConfig config = small_model();
  const AttentionDescriptor& rocm = *entry_of("ROCM_FLASHMLA_SPARSE_DSV4")->descriptor;
  for (const auto& [capability, name] : {std::pair{Capability{9, 4, 2}, "gfx942"},
                                         {Capability{9, 5, 0}, "gfx950"},
                                         {Capability{9, 0, 10}, "gfx90a"},
                                         {Capability{11, 0, 0}, "gfx1100"}}) {
    const AttentionSelection selection =
        select_attention(config, {Platform::kRocm, capability, ""}, {});
    const auto& built = rocm.architectures;
    const bool runs = std::find(built.begin(), built.end(), name) != built.end();
    EXPECT_EQ(selection.descriptor != nullptr, runs) << name;
    if (runs) continue;
    ASSERT_EQ(selection.refusals.size(), 1u);
    ASSERT_EQ(selection.refusals[0].reasons.size(), 1u) << selection.message();
    const std::string reason = selection.refusals[0].reasons[0].str();
    EXPECT_NE(reason.find(rocm.not_built.empty() ? std::string(name) : rocm.not_built),
              std::string::npos)
        << reason;
  }
}

TEST(DescribeBackends, CpuIsUsableAndOthersSayWhy) {
  const ModelConfig config = small_model();
  const std::vector<BackendReport> reports = describe_backends(&config);
  for (const BackendEntry& entry : backends()) {
    const auto report = std::find_if(reports.begin(), reports.end(), [&](const auto& r) {
      return r.descriptor == entry.descriptor;
    });
    ASSERT_NE(report, reports.end()) << entry.descriptor->name;
    const bool here = entry.create != nullptr && entry.why_not_here().empty();
    EXPECT_EQ(report->usable(), here) << entry.descriptor->name;
    EXPECT_EQ(report->device.has_value(),
              find_devices(entry.descriptor->platform).why_none.empty());
    EXPECT_FALSE(report->differences.empty()) << entry.descriptor->name;
  }
}

// Without hardware the layer is listed with its reason, and on the emulated device beside it.
TEST(DescribeBackends, RocmHasTheEmulatedDeviceToo) {
  const ModelConfig config = small_model();
  int without = 0, emulated = 0;
  for (const BackendReport& report : describe_backends(&config)) {
    if (report.descriptor->platform != Platform::kRocm) continue;
    if (!report.device) {
      ++without;
      const std::string reasons = join_reasons(report.reasons);
      EXPECT_NE(reasons.find(find_devices(Platform::kRocm).why_none), std::string::npos) << reasons;
    } else if (report.device->id.index < 0) {
      ++emulated;
      EXPECT_TRUE(report.usable()) << join_reasons(report.reasons);
    }
  }
  EXPECT_EQ(without, find_devices(Platform::kRocm).devices.empty() ? 1 : 0);
  EXPECT_EQ(emulated, 1);
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

TEST(AmdDriver, ReadsGfxNames) {
  using amd::parse_gfx_name;
  EXPECT_EQ(parse_gfx_name("gfx942"), (Capability{9, 4, 2}));
  EXPECT_EQ(parse_gfx_name("gfx90a:sramecc+:xnack-"), (Capability{9, 0, 10}));
  EXPECT_EQ(parse_gfx_name("gfx1100"), (Capability{11, 0, 0}));
  for (const char* other :
       {"", "gfx", "gfx9", "gfx94", "gfx000", "gfx94x", "gfx9x2", "gfx-42", "sm_90", "gfx1234567"})
    EXPECT_EQ(parse_gfx_name(other), std::nullopt) << other;
}

}  // namespace
}  // namespace dsv4
