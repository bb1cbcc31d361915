#include <cstdio>
#include <nlohmann/json.hpp>

#include "command_line.h"
#include "core/fail.h"
#include "dsv4/backend.h"

namespace dsv4::cli {
namespace {

struct Options {
  CommonOptions common;
};

std::string join(const std::vector<std::string>& parts) {
  std::string out;
  for (const std::string& part : parts) out += (out.empty() ? "" : ", ") + part;
  return out;
}

// All backends, or those of --device and --attention-backend.
std::vector<BackendReport> selected(const CommonOptions& common,
                                    const std::vector<BackendReport>& all) {
  const DeviceId device = DeviceId::parse(common.device);
  std::vector<BackendReport> out;
  std::vector<std::string> names;
  bool known = common.attention_backend.empty();
  for (const BackendReport& report : all) {
    const bool named =
        common.attention_backend.empty() || report.descriptor->name == common.attention_backend;
    names.emplace_back(report.descriptor->name);
    known = known || named;
    if (named && (!common.device_given || report.descriptor->platform == device.platform)) {
      out.push_back(report);
    }
  }
  if (!known) {
    fail(ErrorCode::kInvalidArgument, "--attention-backend \"", common.attention_backend,
         "\", expected one of ", join(names));
  }
  return out;
}

int run(Options& options) {
  std::optional<ModelConfig> config;
  if (!options.common.model.empty()) {
    config = ModelConfig::load(ModelSource::parse(options.common.model).path);
  }
  const EngineOptions engine_options = options.common.engine_options({1, 1, 1});
  const SelectionRequest request{.backend = "",
                                 .kv_cache_dtype = engine_options.kv_cache_dtype,
                                 .numerics = engine_options.numerics};
  const std::vector<BackendReport> reports =
      selected(options.common, describe_backends(config ? &*config : nullptr, request));
  if (options.common.json) {
    nlohmann::json out = nlohmann::json::array();
    for (const BackendReport& report : reports) {
      nlohmann::json one;
      one["name"] = report.descriptor->name;
      one["class"] = report.descriptor->class_name;
      one["platform"] = platform_name(report.descriptor->platform);
      one["architectures"] = report.descriptor->architectures;
      one["fp8_product_architectures"] = report.descriptor->fp8_product_architectures;
      if (report.device)
        one["device"] = {{"id", report.device->id.str()}, {"name", report.device->name}};
      one["usable"] = report.usable();
      one["reasons"] = nlohmann::json::array();
      for (const Reason& reason : report.reasons) one["reasons"].push_back(reason.str());
      one["differences_to_upstream"] = report.differences;
      out.push_back(one);
    }
    print_json(out);
    return 0;
  }
  for (const BackendReport& report : reports) {
    std::printf("%-28s %-5s %s\n", std::string(report.descriptor->name).c_str(),
                platform_name(report.descriptor->platform),
                report.usable() ? "usable" : "not usable");
    if (report.device) {
      std::printf("    device: %s, %s\n", report.device->id.str().c_str(),
                  report.device->name.c_str());
    }
    if (!report.descriptor->architectures.empty()) {
      std::printf("    built for: %s\n", join(report.descriptor->architectures).c_str());
    }
    if (!report.descriptor->fp8_product_architectures.empty()) {
      std::printf("    --products fp8: on %s\n",
                  join(report.descriptor->fp8_product_architectures).c_str());
    }
    for (const Reason& reason : report.reasons)
      std::printf("    why not: %s\n", reason.str().c_str());
    for (const std::string& difference : report.differences) {
      std::printf("    differs from upstream: %s\n", difference.c_str());
    }
  }
  return 0;
}

}  // namespace

Command add_backends(CLI::App& app) {
  CLI::App* command = app.add_subcommand(
      "backends", "Devices and backends: usable, or every reason why not; with -m for that model");
  auto options = std::make_shared<Options>();
  add_common_options(*command, options->common, ModelOption::kOptional);
  command->footer(
      "--device shows the backends of that platform only, --attention-backend that one only.\n"
      "Examples:\n"
      "  dsv4 backends\n"
      "  dsv4 backends -m models/tiny-shakespeare --kv-cache-dtype bf16 --json");
  return {command, [options] { return run(*options); }};
}

}  // namespace dsv4::cli
