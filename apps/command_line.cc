#include "command_line.h"

#include <unistd.h>

#include <charconv>
#include <cmath>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>

#include "core/fail.h"
#include "dsv4/tokenizer.h"

namespace dsv4::cli {

namespace fs = std::filesystem;

EngineOptions CommonOptions::engine_options(const StepLimits& limits) const {
  EngineOptions out;
  const std::optional<Numerics> parsed = parse_numerics(numerics);
  if (!parsed) {
    fail(ErrorCode::kInvalidArgument, "--numerics \"", numerics,
         "\", expected serving, reference or exact");
  }
  if (threads_given && threads < 1) {
    fail(ErrorCode::kInvalidArgument, "--threads ", threads, ", expected 1 or more");
  }
  out.device = device;
  out.attention_backend = attention_backend;
  out.kv_cache_dtype = kv_cache_dtype;
  out.numerics = *parsed;
  const std::optional<Products> parsed_products = parse_products(products);
  if (!parsed_products) {
    fail(ErrorCode::kInvalidArgument, "--products \"", products, "\", expected f32 or fp8");
  }
  out.numerics.products = *parsed_products;
  out.threads = threads;
  out.limits = limits;
  return out;
}

namespace {

template <typename Number>
std::string number_problem(const std::string& text) {
  constexpr bool kReal = std::is_floating_point_v<Number>;
  Number value{};
  const char* end = text.data() + text.size();
  const auto [stop, error] = std::from_chars(text.data(), end, value);
  if (!text.empty() && error == std::errc() && stop == end) return "";
  if (kReal) return concat("\"", text, "\" is not a number");
  return concat("\"", text, "\", expected a whole number from ", std::numeric_limits<Number>::min(),
                " to ", std::numeric_limits<Number>::max());
}

}  // namespace

template <typename Number>
CLI::Option* check_number(CLI::Option* option) {
  return option->check(CLI::Validator(
      [](std::string& text) { return number_problem<Number>(text); }, std::string()));
}
template CLI::Option* check_number<int>(CLI::Option*);
template CLI::Option* check_number<int64_t>(CLI::Option*);
template CLI::Option* check_number<uint64_t>(CLI::Option*);
template CLI::Option* check_number<double>(CLI::Option*);

void add_common_options(CLI::App& command, CommonOptions& options, ModelOption model) {
  if (model != ModelOption::kNone) {
    CLI::Option* option =
        command.add_option("-m,--model", options.model,
                           "Model folder (config.json, *.safetensors, tokenizer.json), or "
                           "formula:CONFIG[:SEED] for weights made by "
                           "formula for any config");
    if (model == ModelOption::kRequired) option->required();
  }
  command.add_option("--device", options.device, "cpu, cuda:N, rocm:N or rocm:emulated")
      ->capture_default_str()
      ->each([&options](const std::string&) { options.device_given = true; });
  command.add_option(
      "--attention-backend", options.attention_backend,
      "CPU_DSV4, FLASHMLA_SPARSE_DSV4, FLASHINFER_MLA_SPARSE_DSV4 or ROCM_FLASHMLA_SPARSE_DSV4; "
      "default: the device's own (see dsv4 backends)");
  command
      .add_option("--kv-cache-dtype", options.kv_cache_dtype,
                  "auto, fp8_ds_mla (584 bytes a row), bf16, fp8 (per tensor) or f32 (exact only)")
      ->capture_default_str();
  command
      .add_option("--numerics", options.numerics,
                  "serving (FP8 caches and activations), reference (as DeepSeek's own code) or "
                  "exact (float32)")
      ->capture_default_str();
  command
      .add_option("--products", options.products,
                  "Sums of FP8 weights times quantised input: f32, or fp8, on Hopper's FP8 tensor "
                  "cores as vLLM with DeepGEMM: 9 to 30% less time a layer with 64 sequences or "
                  "more, 5 to 22% with 1 or 16, but 13 bits of a sum are kept, and a layer ends "
                  "1e-4 to 4e-4 away in cosine distance (not with exact, not on other devices)")
      ->capture_default_str();
  check_number<int>(command.add_option("--threads", options.threads,
                                       "CPU threads, 1 or more; default: all cores"))
      ->each([&options](const std::string&) { options.threads_given = true; });
  command.add_flag("--json", options.json, "Print one JSON object");
}

void add_prompt_options(CLI::App& command, PromptOptions& options) {
  CLI::Option* text =
      command
          .add_option("-p,--prompt", options.text, "Prompt text; the begin token is put before it")
          ->each([&options](const std::string&) { options.text_given = true; });
  CLI::Option* ids = command.add_option("--ids", options.ids_file,
                                        "File with a JSON array of token ids, used as they are");
  text->excludes(ids);
}

std::vector<int32_t> read_prompt(const PromptOptions& options, const ModelConfig& config,
                                 const std::string& model) {
  if (!options.text_given && options.ids_file.empty()) {
    throw UsageError("give a prompt: -p TEXT or --ids FILE");
  }
  std::vector<int32_t> ids;
  if (!options.ids_file.empty()) {
    std::error_code ignored;
    if (fs::is_directory(options.ids_file, ignored)) {
      fail(ErrorCode::kInvalidArgument, options.ids_file,
           ": is a folder, expected a file with a JSON array of token ids");
    }
    std::ifstream file(options.ids_file, std::ios::binary);
    if (!file) fail(ErrorCode::kNotFound, options.ids_file, ": cannot be read");
    const std::string text((std::istreambuf_iterator<char>(file)),
                           std::istreambuf_iterator<char>());
    const nlohmann::json array = nlohmann::json::parse(text, nullptr, false);
    if (!array.is_array()) {
      fail(ErrorCode::kInvalidArgument, options.ids_file, ": expected a JSON array of token ids");
    }
    for (const nlohmann::json& value : array) {
      if (!value.is_number_integer()) {
        fail(ErrorCode::kInvalidArgument, options.ids_file, ": element ", ids.size(), " is ",
             value.dump(), ", expected an integer");
      }
      const bool in_range = value.is_number_unsigned()
                                ? value.get<uint64_t>() < static_cast<uint64_t>(config.vocab_size)
                                : false;
      if (!in_range) {
        fail(ErrorCode::kInvalidArgument, options.ids_file, ": token id ", value.dump(),
             " at position ", ids.size(), ", expected 0 to ", config.vocab_size - 1);
      }
      ids.push_back(value.get<int32_t>());
    }
    if (ids.empty())
      fail(ErrorCode::kInvalidArgument, options.ids_file,
           ": the array is empty, expected token ids");
    return ids;
  }
  const ModelSource source = ModelSource::parse(model);
  if (source.is_formula) {
    fail(ErrorCode::kInvalidArgument,
         "a formula model has no tokenizer: give the prompt as --ids FILE");
  }
  const std::unique_ptr<Tokenizer> tokenizer =
      Tokenizer::load((fs::path(source.path) / "tokenizer.json").string());
  ids.push_back(config.bos_token_id);
  const std::vector<int32_t> encoded = tokenizer->encode(options.text);
  ids.insert(ids.end(), encoded.begin(), encoded.end());
  for (size_t i = 0; i < ids.size(); ++i) {
    if (ids[i] < config.vocab_size) continue;
    fail(ErrorCode::kDataCorrupt, "tokenizer.json gives id ", ids[i], " at position ", i,
         ", but vocab_size is ", config.vocab_size);
  }
  return ids;
}

void check_output(const std::string& option, const std::string& path) {
  const auto refuse = [&](const char* why) {
    fail(ErrorCode::kInvalidArgument, option, " \"", path, "\": ", why,
         ", expected a path to write");
  };
  if (path.empty()) refuse("no file name");
  std::error_code ignored;
  if (fs::is_directory(path, ignored)) refuse("is a folder");
  const fs::path parent = fs::path(path).parent_path();
  const fs::path folder = parent.empty() ? fs::path(".") : parent;
  if (!fs::is_directory(folder, ignored)) refuse("its folder does not exist");
  if (access(folder.c_str(), W_OK | X_OK) != 0) refuse("its folder cannot be written to");
}

int64_t host_memory_bytes() {
  return static_cast<int64_t>(sysconf(_SC_PHYS_PAGES)) *
         static_cast<int64_t>(sysconf(_SC_PAGE_SIZE));
}

void check_fits(double bytes, const std::string& what) {
  const auto available = static_cast<double>(host_memory_bytes());
  if (bytes <= available) return;
  fail(ErrorCode::kOutOfMemory, what, " does not fit: ", human_bytes(bytes),
       " needed, this machine has ", human_bytes(available));
}

void check_model_fits(const ModelSource& source, const ModelConfig& config,
                      const EngineOptions& options, double extra_bytes) {
  double bytes = extra_bytes;
  // Files are mapped: the system can drop their pages, so that only speed suffers.
  for (const MemoryPlan::Part& part : plan_memory(config, options).parts) {
    if (source.is_formula || !part.name.starts_with("weights")) {
      bytes += static_cast<double>(part.bytes);
    }
  }
  check_fits(bytes, source.text);
}

ProgressLine::ProgressLine() : enabled_(isatty(STDERR_FILENO) == 1) {}
ProgressLine::~ProgressLine() {
  clear();
}

void ProgressLine::clear() {
  if (enabled_ && width_ > 0) std::fprintf(stderr, "\r%*s\r", static_cast<int>(width_), "");
  width_ = 0;
}

Progress ProgressLine::callback() {
  return [this](double fraction, const std::string& what) {
    if (!enabled_) return;
    constexpr int kBarWidth = 30;
    const int filled = static_cast<int>(fraction * kBarWidth);
    const std::string line = concat("[", std::string(static_cast<size_t>(filled), '#'),
                                    std::string(static_cast<size_t>(kBarWidth - filled), '.'), "] ",
                                    static_cast<int>(fraction * 100), "% ", what);
    clear();
    std::fprintf(stderr, "%s", line.c_str());
    width_ = line.size();
    if (fraction >= 1.0) clear();
  };
}

std::string human_bytes(double bytes) {
  const char* const units[] = {"B", "kB", "MB", "GB", "TB"};
  int unit = 0;
  while (bytes >= 1000 && unit < 4) {
    bytes /= 1000;
    ++unit;
  }
  char text[32];
  std::snprintf(text, sizeof(text), unit == 0 ? "%.0f %s" : "%.2f %s", bytes, units[unit]);
  return text;
}

void print_json(const nlohmann::json& value) {
  const std::string text = value.dump(1, ' ', false, nlohmann::json::error_handler_t::replace);
  std::printf("%s\n", text.c_str());
}

}  // namespace dsv4::cli
