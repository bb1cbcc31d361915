#include <charconv>
#include <cstdio>
#include <filesystem>
#include <nlohmann/json.hpp>

#include "checkpoint/safetensors.h"
#include "command_line.h"
#include "core/fail.h"
#include "core/numbers.h"
#include "dsv4/single_layer.h"
#include "tap_collector.h"

namespace dsv4::cli {
namespace {

struct Options {
  CommonOptions common;
  std::string config, kind, weights, hidden, out;
  int chunk = 0;
  bool chunk_given = false;
  bool taps = false;
};

int64_t parse_number(const std::string& text, const std::string& what,
                     const std::string& expected) {
  int64_t value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (text.empty() || error != std::errc() || end != text.data() + text.size() || value < 0) {
    fail(ErrorCode::kInvalidArgument, what, ": \"", text, "\" is not a number, expected ",
         expected);
  }
  return value;
}

// DIR:LAYER or formula:SEED -> source and the prefix of its tensors.
std::pair<std::unique_ptr<TensorSource>, std::string> open_weights(const Options& options,
                                                                   const ModelConfig& config,
                                                                   const LayerKind& kind,
                                                                   const Numerics& numerics) {
  const std::string expected = "DIR:LAYER or formula:SEED";
  const size_t colon = options.weights.rfind(':');
  if (colon == std::string::npos) {
    fail(ErrorCode::kInvalidArgument, "--weights \"", options.weights, "\", expected ", expected);
  }
  const std::string head = options.weights.substr(0, colon);
  const int64_t number =
      parse_number(options.weights.substr(colon + 1), "--weights " + options.weights, expected);
  if (head == "formula") {
    const std::string prefix = concat(kind.name(), ".");
    const FormulaStorage storage =
        numerics.quantise_linear_input ? FormulaStorage::kReleased : FormulaStorage::kBf16Values;
    return {formula_source(expected_attention_tensors(config, kind, prefix),
                           static_cast<uint64_t>(number), storage),
            prefix};
  }
  const ModelConfig model = ModelConfig::load(head);
  if (number >= model.num_hidden_layers) {
    fail(ErrorCode::kInvalidArgument, "--weights ", options.weights, ": the model has layers 0 to ",
         model.num_hidden_layers - 1);
  }
  const LayerKind given = model.layer_kind(static_cast<int>(number));
  if (given.compress_ratio != kind.compress_ratio) {
    fail(ErrorCode::kInvalidArgument, "--weights ", options.weights, ": layer ", number, " is ",
         given.name(), ", but --kind is ", kind.name());
  }
  return {open_checkpoint(head, model), concat("layers.", number, ".attn.")};
}

// The layer's input, f32 [tokens, hidden_size].
std::vector<float> read_hidden(const Options& options, const ModelConfig& config) {
  constexpr double kInputScale = 1.75;  // of the golden inputs (their manifest)
  std::vector<float> out;
  if (options.hidden.starts_with("formula:")) {
    const std::string expected = "formula:LENGTH:SEED";
    const std::string rest = options.hidden.substr(8);
    const size_t colon = rest.find(':');
    if (colon == std::string::npos) {
      fail(ErrorCode::kInvalidArgument, "--hidden \"", options.hidden, "\", expected ", expected);
    }
    const int64_t length =
        parse_number(rest.substr(0, colon), "--hidden " + options.hidden, expected);
    const int64_t seed =
        parse_number(rest.substr(colon + 1), "--hidden " + options.hidden, expected);
    if (length < 1 || length > config.max_position_embeddings) {
      fail(ErrorCode::kInvalidArgument, "--hidden ", options.hidden, ": length ", length,
           ", expected 1 to ", config.max_position_embeddings);
    }
    check_fits(
        2.0 * static_cast<double>(length) * static_cast<double>(config.hidden_size) * sizeof(float),
        "--hidden " + options.hidden + " with its output");
    const uint64_t key = formula_key(concat("x.", length), static_cast<uint64_t>(seed));
    out.resize(static_cast<size_t>(length * config.hidden_size));
    for (size_t i = 0; i < out.size(); ++i) {
      out[i] = round_bf16(static_cast<float>(kInputScale * formula_uniform(key, i)));
    }
    return out;
  }
  // FILE[:TENSOR]: names of files and of tensors may both hold colons and slashes
  // ("layer0/attn_in"), so the longest part that is a file decides.
  size_t colon = std::string::npos;
  while (!std::filesystem::exists(options.hidden.substr(0, colon)) && colon != 0) {
    const size_t next = options.hidden.rfind(':', colon == std::string::npos ? colon : colon - 1);
    if (next == std::string::npos) break;
    colon = next;
  }
  const std::string path = options.hidden.substr(0, colon);
  const SafetensorsFile file(path);
  std::string name = colon == std::string::npos ? "" : options.hidden.substr(colon + 1);
  if (name.empty()) {
    const std::vector<std::string> names = file.names();
    if (names.size() != 1) {
      fail(ErrorCode::kInvalidArgument, path, " holds ", names.size(),
           " tensors: say which one, FILE:TENSOR");
    }
    name = names.front();
  }
  const ConstTensor tensor = file.get(name);
  if (tensor.rank != 2 || tensor.shape[1] != config.hidden_size || tensor.shape[0] < 1 ||
      (tensor.dtype != DType::kF32 && tensor.dtype != DType::kBf16)) {
    fail(ErrorCode::kInvalidArgument, path, ": ", name, " is ", describe(tensor),
         ", expected [tokens, ", config.hidden_size, "] f32 or bf16");
  }
  out.resize(static_cast<size_t>(tensor.num_elements()));
  for (size_t i = 0; i < out.size(); ++i) {
    out[i] = tensor.dtype == DType::kF32 ? tensor.as<float>()[i]
                                         : static_cast<float>(tensor.as<Bf16>()[i]);
  }
  return out;
}

int run(Options& options) {
  check_output("--out", options.out);
  const ModelConfig config = ModelConfig::load(options.config);
  const LayerKind kind = layer_kind_of(config, options.kind);
  if (options.chunk_given && options.chunk < 1) {
    fail(ErrorCode::kInvalidArgument, "--chunk ", options.chunk, ", expected 1 or more");
  }
  std::vector<float> hidden = read_hidden(options, config);
  const auto length = static_cast<int64_t>(hidden.size()) / config.hidden_size;
  constexpr int64_t kDefaultChunk = 512;
  const int64_t chunk = std::min(length, options.chunk_given ? options.chunk : kDefaultChunk);
  const EngineOptions engine_options =
      options.common.engine_options({static_cast<int>(chunk), 1, length});
  auto [source, prefix] = open_weights(options, config, kind, engine_options.numerics);
  const std::unique_ptr<SingleLayer> layer =
      SingleLayer::create(config, kind, std::move(source), prefix, engine_options);
  const SequenceId sequence = layer->pool().create().value();
  std::vector<float> out(hidden.size());
  TapCollector taps;
  const ForwardOptions forward{options.taps ? &taps : nullptr, nullptr};
  ProgressLine line;
  const Progress progress = line.callback();
  for (int64_t done = 0; done < length;) {
    const int64_t count = std::min(chunk, length - done);
    const BatchEntry entry{sequence, static_cast<int32_t>(count)};
    layer->forward(
        {&entry, 1},
        ConstTensor(hidden.data() + done * config.hidden_size, DType::kF32,
                    {count, config.hidden_size}),
        Tensor(out.data() + done * config.hidden_size, DType::kF32, {count, config.hidden_size}),
        forward);
    done += count;
    progress(static_cast<double>(done) / static_cast<double>(length), "tokens");
  }
  std::vector<std::pair<std::string, ConstTensor>> tensors;
  if (options.taps) tensors = taps.tensors();
  std::erase_if(tensors, [](const auto& tensor) { return tensor.first == "attn_out"; });
  tensors.emplace_back("attn_out",
                       ConstTensor(out.data(), DType::kF32, {length, config.hidden_size}));
  write_safetensors(options.out, tensors);
  if (options.common.json) {
    print_json({{"tokens", length}, {"tensors", tensors.size()}, {"file", options.out}});
  } else {
    std::printf("%s layer, %lld tokens -> %s\n", kind.name(), static_cast<long long>(length),
                options.out.c_str());
  }
  return 0;
}

}  // namespace

Command add_attention(CLI::App& app) {
  CLI::App* command =
      app.add_subcommand("attention", "One attention layer alone: input and output as safetensors");
  auto options = std::make_shared<Options>();
  add_common_options(*command, options->common, ModelOption::kNone);
  command->add_option("--config", options->config, "config.json, or a folder that holds one")
      ->required();
  command->add_option("--kind", options->kind, "sliding, csa or hca")->required();
  command->add_option("--weights", options->weights, "DIR:LAYER of a checkpoint, or formula:SEED")
      ->required();
  command
      ->add_option(
          "--hidden", options->hidden,
          "Input after attn_norm: FILE[:TENSOR] [tokens, hidden_size], or formula:LENGTH:SEED")
      ->required();
  command
      ->add_option("-o,--out", options->out,
                   "Output file: attn_out, and with --taps every step's result")
      ->required();
  check_number<int>(command->add_option("--chunk", options->chunk,
                                        "Tokens per step (default 512); never changes a bit"))
      ->each([options](const std::string&) { options->chunk_given = true; });
  command->add_flag("--taps", options->taps,
                    "Also write q, kv, compressed, index_scores, topk, attn_before_o, attn_in");
  command->footer(
      "All results are [tokens, ...] f32 but topk [tokens, index_topk] i32 (ascending, -1 last).\n"
      "index_scores [tokens, entries] is -inf where a token does not see the entry.\n"
      "Examples:\n"
      "  dsv4 attention --config configs/v4-flash.json --kind csa --weights formula:1 "
      "--hidden formula:200:1 -o csa.safetensors\n"
      "  dsv4 attention --config models/tiny-shakespeare --kind hca --weights "
      "models/tiny-shakespeare:2 --hidden in.safetensors:x -o hca.safetensors --taps");
  return {command, [options] { return run(*options); }};
}

}  // namespace dsv4::cli
