#include <cstdio>
#include <nlohmann/json.hpp>

#include "checkpoint/safetensors.h"
#include "command_line.h"
#include "core/fail.h"
#include "tap_collector.h"

namespace dsv4::cli {
namespace {

struct Options {
  CommonOptions common;
  PromptOptions prompt;
  std::string out;
  std::string taps;
  bool taps_given = false;
  int64_t last = 0;
  bool last_given = false;
  int chunk = 0;
  bool chunk_given = false;
  int64_t decode_from = 0;
  bool decode_from_given = false;
};

int run(Options& options) {
  check_output("--out", options.out);
  if (options.taps_given) {
    check_output("--taps", options.taps);
    if (options.taps == options.out) {
      throw UsageError("--taps and --out name the same file: " + options.out);
    }
  }
  const ModelSource source = ModelSource::parse(options.common.model);
  const ModelConfig config = ModelConfig::load(source.path);
  const std::vector<int32_t> ids = read_prompt(options.prompt, config, options.common.model);
  const auto length = static_cast<int64_t>(ids.size());
  if (options.last_given && (options.last < 1 || options.last > length)) {
    fail(ErrorCode::kInvalidArgument, "--last ", options.last, ", expected 1 to ", length,
         " (the prompt's tokens)");
  }
  if (options.chunk_given && options.chunk < 1) {
    fail(ErrorCode::kInvalidArgument, "--chunk ", options.chunk, ", expected 1 or more");
  }
  if (options.decode_from_given && (options.decode_from < 0 || options.decode_from > length)) {
    fail(ErrorCode::kInvalidArgument, "--decode-from ", options.decode_from, ", expected 0 to ",
         length);
  }
  const int64_t first = options.last_given ? length - options.last : 0;
  const int64_t decode_from = options.decode_from_given ? options.decode_from : length;
  constexpr int64_t kDefaultChunk = 512;
  const int64_t chunk = std::min(length, options.chunk_given ? options.chunk : kDefaultChunk);

  EngineOptions engine_options =
      options.common.engine_options({static_cast<int>(chunk), 1, length});
  engine_options.max_logits = static_cast<int>(chunk);
  check_model_fits(
      source, config, engine_options,
      static_cast<double>(length - first) * static_cast<double>(config.vocab_size) * sizeof(float));
  ProgressLine line;
  const Progress progress = line.callback();
  const std::unique_ptr<Engine> engine = Engine::load(source, engine_options, progress);
  TapCollector taps;
  const ForwardOptions forward{options.taps_given ? &taps : nullptr, nullptr};
  const SequenceId sequence = engine->create_sequence();
  std::vector<float> logits;
  logits.reserve(static_cast<size_t>((length - first) * config.vocab_size));
  for (int64_t done = 0; done < length;) {
    const int64_t end =
        done < decode_from ? std::min({done + chunk, decode_from, length}) : done + 1;
    const auto rows = static_cast<int32_t>(std::max<int64_t>(0, end - std::max(done, first)));
    const Feed feed{sequence, {ids.data() + done, static_cast<size_t>(end - done)}, rows};
    const ConstTensor step = engine->step({&feed, 1}, forward);
    logits.insert(logits.end(), step.as<float>(), step.as<float>() + rows * config.vocab_size);
    done = end;
    progress(static_cast<double>(done) / static_cast<double>(length), "prompt");
  }
  std::vector<int32_t> positions;
  for (int64_t p = first; p < length; ++p) positions.push_back(static_cast<int32_t>(p));
  write_safetensors(
      options.out,
      {{"logits", ConstTensor(logits.data(), DType::kF32, {length - first, config.vocab_size})},
       {"positions", ConstTensor(positions.data(), DType::kI32, {length - first})}});
  if (options.taps_given) write_safetensors(options.taps, taps.tensors());

  // Mean loss of the tokens that follow, where the text has them.
  double loss = 0;
  for (int64_t p = first; p + 1 < length; ++p) {
    const float* row = logits.data() + (p - first) * config.vocab_size;
    const float largest = *std::max_element(row, row + config.vocab_size);
    double sum = 0;
    for (int64_t i = 0; i < config.vocab_size; ++i)
      sum += std::exp(static_cast<double>(row[i]) - largest);
    loss += std::log(sum) + largest - row[ids[static_cast<size_t>(p + 1)]];
  }
  const int64_t counted = std::max<int64_t>(0, length - 1 - first);
  if (counted > 0) loss /= static_cast<double>(counted);
  if (options.common.json) {
    nlohmann::json out{{"positions", length - first}, {"file", options.out}};
    if (counted > 0) out["mean_loss_nats"] = loss;
    print_json(out);
  } else {
    std::printf("%lld rows of logits in %s", static_cast<long long>(length - first),
                options.out.c_str());
    if (counted > 0) std::printf("; mean loss of the next token %.4f nats", loss);
    std::printf("\n");
  }
  return 0;
}

}  // namespace

Command add_logits(CLI::App& app) {
  CLI::App* command =
      app.add_subcommand("logits", "Teacher-forced logits of a text, as safetensors");
  auto options = std::make_shared<Options>();
  add_common_options(*command, options->common, ModelOption::kRequired);
  add_prompt_options(*command, options->prompt);
  command
      ->add_option("-o,--out", options->out,
                   "Output file: logits [P, vocab] f32, positions [P] i32")
      ->required();
  check_number<int64_t>(command->add_option("--last", options->last, "Only the last N positions"))
      ->each([options](const std::string&) { options->last_given = true; });
  check_number<int>(
      command->add_option("--chunk", options->chunk,
                          "Tokens of the prompt per step (default 512); never changes a bit"))
      ->each([options](const std::string&) { options->chunk_given = true; });
  check_number<int64_t>(
      command->add_option("--decode-from", options->decode_from,
                          "Feed the tokens from this position on one by one; never changes a bit"))
      ->each([options](const std::string&) { options->decode_from_given = true; });
  command
      ->add_option("--taps", options->taps,
                   "Also write layer<N>/<name> for every intermediate result to this file")
      ->each([options](const std::string&) { options->taps_given = true; });
  command->footer(
      "Row p of `logits` scores the token after position positions[p]. Names of the taps: attn_in, "
      "q, kv,\n"
      "compressed, index_scores, topk, attn_before_o, attn_out, expert_ids, expert_weights, "
      "mlp_out, streams_out.\n"
      "Examples:\n"
      "  dsv4 logits -m models/tiny-shakespeare -p 'JULIET:' -o logits.safetensors\n"
      "  dsv4 logits -m models/tiny-shakespeare --ids ids.json -o last.safetensors --last 16 "
      "--numerics exact");
  return {command, [options] { return run(*options); }};
}

}  // namespace dsv4::cli
