// The commands that print: generate, tokenize, inspect, plan, backends, bench, and --help. What
// logits and attention write is in tensor_output_test.cc, what all refuse in bad_input_test.cc.
#include <algorithm>
#include <numeric>

#include "dsv4/tokenizer.h"
#include "tests/apps/program.h"

namespace dsv4::testing {
namespace {

using nlohmann::json;
using Ids = std::vector<int32_t>;

const std::string kPrompt = "JULIET:\nO";

Finished run_well(const std::vector<std::string>& arguments, const RunOptions& options = {}) {
  Finished out = run_program(arguments, options);
  EXPECT_EQ(out.exit_code, 0) << out.err;
  return out;
}

// A command that must succeed, print one JSON value and nothing on stderr.
json run_json(std::vector<std::string> arguments, const RunOptions& options = {}) {
  arguments.push_back("--json");
  const Finished finished = run_well(arguments, options);
  EXPECT_EQ(finished.err, "");
  json out = json::parse(finished.out, nullptr, false);
  EXPECT_FALSE(out.is_discarded()) << finished.out;
  return out;
}

std::vector<std::string> generate_args(const std::vector<std::string>& more = {}) {
  std::vector<std::string> out{"generate", "-m", small_model(), "-p", kPrompt, "-n", "24"};
  out.insert(out.end(), more.begin(), more.end());
  return out;
}
Ids generated(const std::vector<std::string>& more = {}) {
  return run_json(generate_args(more)).at("ids").get<Ids>();
}

TEST(Help, OfEveryCommandNamesItsOptionsAndGivesAnExample) {
  const std::vector<std::string> common{"--device",   "--attention-backend", "--kv-cache-dtype",
                                        "--numerics", "--products",          "--threads",
                                        "--json"};
  struct Command {
    std::vector<std::string> words;
    std::vector<std::string> options;
    bool has_common = true;
  };
  const Command commands[] = {
      {{"generate"},
       {"--model", "--prompt", "--ids", "--num-tokens", "--temp", "--top-p", "--top-k", "--seed",
        "--stats"}},
      {{"logits"},
       {"--model", "--prompt", "--ids", "--out", "--last", "--chunk", "--decode-from", "--taps"}},
      {{"attention"},
       {"--config", "--kind", "--weights", "--hidden", "--out", "--chunk", "--taps"}},
      {{"inspect"}, {"--model"}},
      {{"plan"}, {"--model", "--config", "--ctx", "--seqs"}},
      {{"backends"}, {"--model"}},
      {{"tokenize"}, {"--model", "--json", "text"}, false},
      {{"bench", "attention"},
       {"--config", "--kinds", "--contexts", "--batches", "--prefill", "--index-cache",
        "--seconds"}},
  };
  const Finished top = run_well({"--help"});
  for (const Command& command : commands) {
    std::vector<std::string> arguments = command.words;
    arguments.push_back("--help");
    const Finished help = run_well(arguments);
    EXPECT_EQ(help.err, "");
    EXPECT_NE(top.out.find("\n  " + command.words.front()), std::string::npos) << top.out;
    std::vector<std::string> options = command.options;
    if (command.has_common) options.insert(options.end(), common.begin(), common.end());
    for (const std::string& option : options) {
      EXPECT_NE(help.out.find(option), std::string::npos) << option << "\n" << help.out;
    }
    const std::string example = "  dsv4 " + command.words.front();
    EXPECT_NE(help.out.find(example), std::string::npos) << help.out;
  }
}

TEST(Generate, JsonHoldsPromptIdsTextAndTimings) {
  const json out = run_json(generate_args());
  const auto tokenizer = Tokenizer::load(small_model());
  Ids prompt = tokenizer->encode(kPrompt);
  prompt.insert(prompt.begin(), 0);  // bos_token_id
  EXPECT_EQ(out.at("prompt_ids").get<Ids>(), prompt);
  const Ids ids = out.at("ids").get<Ids>();
  EXPECT_EQ(ids.size(), 24u);
  EXPECT_EQ(out.at("text").get<std::string>(), tokenizer->decode(ids));
  EXPECT_FALSE(out.at("stopped_at_eos").get<bool>());
  for (const char* name : {"prompt_seconds", "generate_seconds", "prompt_tokens_per_second",
                           "generate_tokens_per_second"}) {
    EXPECT_GT(out.at("timings").at(name).get<double>(), 0) << name;
  }
}

TEST(Generate, TextIsStreamedAloneOnStdout) {
  const std::string text = run_json(generate_args()).at("text").get<std::string>();
  const Finished plain = run_well(generate_args());
  EXPECT_EQ(plain.out, text + "\n");
  EXPECT_EQ(plain.err, "");
  const Finished stats = run_well(generate_args({"--stats"}));
  EXPECT_EQ(stats.out, text + "\n");
  for (const char* part :
       {"CPU_DSV4", "serving", "fp8_ds_mla", "prompt: 4 tokens in", "generated: 24 tokens in"}) {
    EXPECT_NE(stats.err.find(part), std::string::npos) << part << "\n" << stats.err;
  }
}

// Golden continuations, computed by transformers in float32, with the top-1 to top-2 margin of each
// step; the smallest of these two is 0.30, logits of two float32 programs differ by 1e-4.
TEST(Generate, GreedyContinuationsAreTheGoldenOnes) {
  const SafetensorsFile golden(source_path("tests/golden/data/greedy_q.safetensors"));
  const auto ints = [&](const std::string& name) {
    const ConstTensor tensor = golden.get(name);
    return Ids(tensor.as<int32_t>(), tensor.as<int32_t>() + tensor.num_elements());
  };
  for (const auto& [name, prompt] :
       {std::pair<std::string, std::string>{"greedy0", "MENENIUS:\n"}, {"greedy1", "JULIET:\nO"}}) {
    const json out = run_json(
        {"generate", "-m", small_model(), "-p", prompt, "-n", "64", "--numerics", "exact"});
    EXPECT_EQ(out.at("prompt_ids").get<Ids>(), ints(name + "/prompt"));
    EXPECT_EQ(out.at("ids").get<Ids>(), ints(name + "/tokens"));
  }
}

TEST(Generate, AnEmptyPromptIsTheBeginTokenAlone) {
  const json out = run_json({"generate", "-m", small_model(), "-p", "", "-n", "3"});
  EXPECT_EQ(out.at("prompt_ids").get<Ids>(), Ids{0});
  EXPECT_EQ(out.at("ids").size(), 3u);
}

TEST(Generate, NoNewTokens) {
  const json out = run_json({"generate", "-m", small_model(), "-p", "x", "-n", "0"});
  EXPECT_EQ(out.at("ids").get<Ids>(), Ids{});
  EXPECT_EQ(out.at("text").get<std::string>(), "");
  EXPECT_EQ(run_well({"generate", "-m", small_model(), "-p", "x", "-n", "0"}).out, "\n");
}

TEST(Generate, IdsAreUsedAsTheyAre) {
  const TempDir dir;
  const json from_text = run_json(generate_args());
  write_file(dir.file("ids.json"), from_text.at("prompt_ids").dump());
  const json from_ids =
      run_json({"generate", "-m", small_model(), "--ids", dir.file("ids.json"), "-n", "24"});
  EXPECT_EQ(from_ids.at("prompt_ids"), from_text.at("prompt_ids"));
  EXPECT_EQ(from_ids.at("ids"), from_text.at("ids"));
  EXPECT_EQ(from_ids.at("text"), from_text.at("text"));
}

TEST(Generate, SamplingDependsOnItsSeedOnly) {
  const auto sampled = [](const std::string& seed) {
    return generated({"--temp", "1.3", "--top-p", "0.95", "--top-k", "500", "--seed", seed});
  };
  const Ids seven = sampled("7");
  EXPECT_EQ(sampled("7"), seven);
  // 24 draws at temperature 1.3: that two seeds agree in all is out of the question.
  EXPECT_NE(sampled("8"), seven);
  EXPECT_EQ(sampled("18446744073709551615"), sampled("18446744073709551615"));
}

TEST(Generate, OneCandidateIsGreedy) {
  const Ids greedy = generated();
  EXPECT_EQ(generated({"--temp", "0", "--seed", "9"}), greedy);
  EXPECT_EQ(generated({"--temp", "2", "--top-k", "1"}), greedy);
  EXPECT_EQ(generated({"--temp", "2", "--top-p", "1e-9"}), greedy);
}

TEST(Generate, ThreadsDoNotChangeTheText) {
  const Ids one = generated({"--threads", "1", "--temp", "1", "--seed", "3"});
  EXPECT_EQ(generated({"--threads", "3", "--temp", "1", "--seed", "3"}), one);
}

TEST(Generate, ProgressIsForTerminalsOnly) {
  RunOptions terminal;
  terminal.stderr_is_terminal = true;
  const Finished watched = run_well(generate_args(), terminal);
  EXPECT_NE(watched.err.find("% prompt"), std::string::npos) << watched.err;
  EXPECT_NE(watched.err.find("[#"), std::string::npos) << watched.err;
  const Finished not_watched = run_well(generate_args());
  EXPECT_EQ(not_watched.err, "");
  EXPECT_EQ(watched.out, not_watched.out);
}

TEST(Generate, AForcedKernelIsTheOneThatRuns) {
  RunOptions forced;
  forced.environment["DSV4_KERNEL"] = "attend:reference";
  const Finished out = run_well(generate_args({"--stats"}), forced);
  EXPECT_NE(out.err.find("attend:reference"), std::string::npos) << out.err;
}

class FormulaModel : public ::testing::Test {
 protected:
  FormulaModel() {
    write_file(dir_.file("config.json"), formula_config().dump());
    write_file(dir_.file("ids.json"), "[1, 5, 95, 0, 17, 33, 2, 64, 9]");
  }
  json generate(const std::string& seed, const std::vector<std::string>& more) {
    std::vector<std::string> arguments{
        "generate", "-m", model(seed), "--ids", dir_.file("ids.json"), "-n", "16"};
    arguments.insert(arguments.end(), more.begin(), more.end());
    return run_json(arguments);
  }
  std::string model(const std::string& seed) const {
    return "formula:" + dir_.file("config.json") + seed;
  }
  TempDir dir_;
};

TEST_F(FormulaModel, GeneratesInAllNumericsAndCacheFormats) {
  for (const auto& [numerics, formats] :
       std::vector<std::pair<std::string, std::vector<std::string>>>{
           {"serving", {"auto", "fp8_ds_mla", "bf16", "fp8"}},
           {"reference", {"auto", "fp8_ds_mla", "bf16", "fp8"}},
           {"exact", {"auto", "f32"}}}) {
    for (const std::string& format : formats) {
      const std::vector<std::string> more{"--numerics", numerics, "--kv-cache-dtype", format};
      const json out = generate(":3", more);
      EXPECT_EQ(out.at("prompt_ids").size(), 9u);
      EXPECT_FALSE(out.contains("text")) << "there is no tokenizer";
      const Ids ids = out.at("ids").get<Ids>();
      EXPECT_TRUE(ids.size() == 16 || out.at("stopped_at_eos").get<bool>());
      EXPECT_TRUE(std::all_of(ids.begin(), ids.end(), [](int id) { return id >= 0 && id < 96; }));
      EXPECT_EQ(generate(":3", more).at("ids").get<Ids>(), ids) << numerics << " " << format;
    }
  }
}

TEST_F(FormulaModel, SeedsAreOtherModelsAndOneIsTheDefault) {
  // Sampled: a random model often repeats one token under greedy choice.
  const auto ids = [&](const std::string& seed) {
    return generate(seed, {"--temp", "1", "--seed", "5"}).at("ids").get<Ids>();
  };
  EXPECT_EQ(ids(""), ids(":1"));
  EXPECT_NE(ids(":1"), ids(":2"));
}

TEST_F(FormulaModel, PrintsIdsWhereThereIsNoTokenizer) {
  const json out = generate(":3", {});
  std::string expected;
  for (int32_t id : out.at("ids").get<Ids>()) expected += std::to_string(id) + " ";
  const Finished plain =
      run_well({"generate", "-m", model(":3"), "--ids", dir_.file("ids.json"), "-n", "16"});
  EXPECT_EQ(plain.out, expected + "\n");
}

// Behind "--" nothing is an option, whatever the text.
json tokenized(const std::string& text) {
  const Finished out = run_well({"tokenize", "-m", small_model(), "--json", "--", text});
  EXPECT_EQ(out.err, "");
  return json::parse(out.out);
}

TEST(Tokenize, GoldenCases) {
  const json cases = json::parse(read_file(source_path("tests/golden/data/tokenizer_cases.json")));
  ASSERT_GT(cases.size(), 10u);
  const auto tokenizer = Tokenizer::load(small_model());
  for (const json& one : cases) {
    const std::string text = one.at("text").get<std::string>();
    if (text.find('\0') != std::string::npos) continue;  // cannot be an argument
    const json out = tokenized(text);
    EXPECT_EQ(out.at("ids"), one.at("ids")) << text;
    EXPECT_EQ(out.at("pieces").get<std::vector<std::string>>(),
              tokenizer->pieces(one.at("ids").get<Ids>()));
  }
}

TEST(Tokenize, PrintsALinePerToken) {
  const Finished out = run_well({"tokenize", "-m", small_model(), "Hello JULIET"});
  const Ids ids = Tokenizer::load(small_model())->encode("Hello JULIET");
  EXPECT_EQ(std::count(out.out.begin(), out.out.end(), '\n'), static_cast<long>(ids.size()));
  for (int32_t id : ids) EXPECT_NE(out.out.find(std::to_string(id)), std::string::npos);
}

// Bytes of all tensors in the files, read without the library.
int64_t stored_bytes(const std::string& directory) {
  int64_t total = 0;
  for (const auto& entry : std::filesystem::directory_iterator(directory)) {
    if (entry.path().extension() != ".safetensors") continue;
    const std::string bytes = read_file(entry.path().string());
    uint64_t header = 0;
    std::memcpy(&header, bytes.data(), sizeof(header));
    const json tensors = json::parse(bytes.substr(8, header));
    for (const auto& [name, tensor] : tensors.items()) {
      if (name == "__metadata__") continue;
      const auto offsets = tensor.at("data_offsets").get<std::vector<int64_t>>();
      total += offsets.at(1) - offsets.at(0);
    }
  }
  return total;
}

// A CSA layer keeps a 584-byte row and a 132-byte indexer row for every 4 tokens, an HCA layer a
// 584-byte row for every 128; a sliding layer's window does not grow. The rows are public formats.
constexpr double kCsaBytes = (584.0 + 132.0) / 4, kHcaBytes = 584.0 / 128;

TEST(Inspect, CountsWhatTheFilesHold) {
  const json out = run_json({"inspect", "-m", small_model()});
  EXPECT_TRUE(out.at("weights_checked").get<bool>());
  EXPECT_EQ(out.at("weight_bytes").get<int64_t>(), stored_bytes(small_model()));
  int64_t parts = 0;
  for (const auto& [name, bytes] : out.at("parts").items()) parts += bytes.get<int64_t>();
  EXPECT_EQ(parts, out.at("weight_bytes").get<int64_t>());
  EXPECT_EQ(out.at("layers"), 4);
  EXPECT_EQ(out.at("kinds").at("csa").at("layers"), 2);
  EXPECT_EQ(out.at("kinds").at("csa").at("kv_bytes_per_token").get<double>(), kCsaBytes);
  EXPECT_EQ(out.at("kinds").at("hca").at("kv_bytes_per_token").get<double>(), kHcaBytes);
  EXPECT_EQ(out.at("kinds").at("sliding").at("kv_bytes_per_token").get<double>(), 0);
  EXPECT_EQ(out.at("kv_bytes_per_token").get<double>(), 2 * kCsaBytes + kHcaBytes);

  const Finished text = run_well({"inspect", "-m", small_model()});
  for (const char* part : {"layers 4", "4 heads of 512", "every tensor checked", "csa", "hca",
                           "sliding", "routed experts"}) {
    EXPECT_NE(text.out.find(part), std::string::npos) << part << "\n" << text.out;
  }
}

TEST(Inspect, OfAFormulaReadsNoWeights) {
  const json out = run_json({"inspect", "-m", "formula:" + source_path("configs/v4-flash.json")});
  EXPECT_FALSE(out.at("weights_checked").get<bool>());
  EXPECT_EQ(out.at("layers"), 43);
}

// The answer and whether it was "fits"; both exit codes are right on some machine.
json plan(std::vector<std::string> arguments) {
  arguments.insert(arguments.begin(), "plan");
  arguments.push_back("--json");
  const Finished finished = run_program(arguments);
  const json out = json::parse(finished.out, nullptr, false);
  EXPECT_FALSE(out.is_discarded()) << finished.out << finished.err;
  if (out.is_discarded()) return out;
  const bool fits =
      out.at("total_bytes").get<int64_t>() <= out.at("available_bytes").get<int64_t>();
  EXPECT_EQ(out.at("fits").get<bool>(), fits);
  EXPECT_EQ(finished.exit_code, fits ? 0 : 1) << finished.err;
  EXPECT_EQ(finished.err.empty(), fits) << finished.err;
  int64_t total = 0;
  for (const auto& [name, bytes] : out.at("parts").items()) total += bytes.get<int64_t>();
  EXPECT_EQ(total, out.at("total_bytes").get<int64_t>());
  return out;
}

TEST(Plan, SmallModelFitsFromFolderAndFromConfig) {
  const json out = plan({"-m", small_model(), "--ctx", "1000"});
  EXPECT_TRUE(out.at("fits").get<bool>());
  EXPECT_EQ(plan({"--config", small_model() + "/config.json", "--ctx", "1000"}), out);
  EXPECT_EQ(plan({"--config", small_model(), "--ctx", "1000", "--seqs", "1"}), out);
  const json more = plan({"-m", small_model(), "--ctx", "1000", "--seqs", "7"});
  EXPECT_GT(more.at("total_bytes").get<int64_t>(), out.at("total_bytes").get<int64_t>());
  const char* state = "caches: compressor state";
  EXPECT_EQ(more.at("parts").at(state).get<int64_t>(),
            7 * out.at("parts").at(state).get<int64_t>());
  const Finished text = run_well({"plan", "-m", small_model(), "--ctx", "1000"});
  for (const char* part : {"1 sequence of 1000 tokens", "workspace", "caches: window", "total"}) {
    EXPECT_NE(text.out.find(part), std::string::npos) << part << "\n" << text.out;
  }
}

TEST(Plan, ReleasedConfigs) {
  for (const char* name : {"configs/v4-flash.json", "configs/v4-pro.json"}) {
    const json config = json::parse(read_file(source_path(name)));
    double per_token = 0;
    int growing_caches = 0;
    for (size_t layer = 0; layer < config.at("num_hidden_layers").get<size_t>(); ++layer) {
      const int ratio = config.at("compress_ratios").at(layer).get<int>();
      per_token += ratio == 4 ? kCsaBytes : ratio == 128 ? kHcaBytes : 0;
      growing_caches += ratio == 4 ? 2 : ratio == 128 ? 1 : 0;
    }
    const json out = plan({"--config", source_path(name), "--ctx", "4096", "--seqs", "2"});
    // The rows, and what aligns a page of 256 tokens to a cache line: 0 to 63 bytes.
    const double given = out.at("kv_bytes_per_token").get<double>();
    EXPECT_GE(given, per_token) << name;
    EXPECT_LT(given, per_token + growing_caches * 64.0 / 256) << name;
    // 4096 tokens are whole blocks, whatever their size: no less than the rows themselves.
    EXPECT_GE(out.at("parts").at("caches: growing (compressed, index)").get<double>(),
              2 * 4096 * per_token);
    // Two numbers of FP4 a byte, and a scale byte for 32 of them.
    const double experts = 3.0 * config.at("hidden_size").get<double>() *
                           config.at("moe_intermediate_size").get<double>() *
                           config.at("n_routed_experts").get<double>() *
                           config.at("num_hidden_layers").get<double>() * (0.5 + 1.0 / 32);
    EXPECT_EQ(out.at("parts").at("weights: routed experts").get<double>(), experts) << name;
  }
}

TEST(Backends, EveryOneIsUsableOrSaysWhyNot) {
  const json out = run_json({"backends", "-m", small_model()});
  std::vector<std::string> names;
  for (const json& one : out) {
    names.push_back(one.at("name").get<std::string>());
    EXPECT_EQ(one.at("usable").get<bool>(), one.at("reasons").empty()) << one.dump();
  }
  for (const char* name : {"CPU_DSV4", "FLASHMLA_SPARSE_DSV4", "FLASHINFER_MLA_SPARSE_DSV4"})
    EXPECT_EQ(std::count(names.begin(), names.end(), name), 1) << name;
  // AMD's on hardware, or why there is none, and on the emulated device, which is always usable.
  EXPECT_EQ(std::count(names.begin(), names.end(), "ROCM_FLASHMLA_SPARSE_DSV4"), 2);
  EXPECT_EQ(out.back().at("device").at("id"), "rocm:emulated");
  EXPECT_TRUE(out.back().at("usable").get<bool>());
  EXPECT_EQ(out.at(0).at("name"), "CPU_DSV4");
  EXPECT_TRUE(out.at(0).at("usable").get<bool>());
  const Finished text = run_well({"backends"});
  EXPECT_NE(text.out.find("CPU_DSV4"), std::string::npos);
  EXPECT_NE(text.out.find("usable"), std::string::npos);
}

TEST(Backends, ARequestIsPartOfTheAnswer) {
  const json cpu = run_json({"backends", "--device", "cpu"});
  ASSERT_EQ(cpu.size(), 1u);
  EXPECT_EQ(cpu.at(0).at("name"), "CPU_DSV4");
  const json cuda = run_json({"backends", "--device", "cuda:0"});
  for (const json& one : cuda) {
    EXPECT_EQ(one.at("platform"), "cuda");
  }
  const json packed = run_json(
      {"backends", "--attention-backend", "FLASHMLA_SPARSE_DSV4", "--kv-cache-dtype", "bf16"});
  ASSERT_GE(packed.size(), 1u);
  EXPECT_FALSE(packed.at(0).at("usable").get<bool>());
  EXPECT_NE(packed.at(0).at("reasons").dump().find("fp8_ds_mla"), std::string::npos);
  const json exact = run_json({"backends", "--device", "cpu", "--numerics", "exact"});
  EXPECT_TRUE(exact.at(0).at("usable").get<bool>());
  const json fp8 = run_json({"backends", "--device", "cpu", "--products", "fp8"});
  EXPECT_FALSE(fp8.at(0).at("usable").get<bool>());
  EXPECT_EQ(fp8.at(0).at("reasons"), json::array({"products of CPU_DSV4: fp8, required f32"}));
}

TEST(Bench, AttentionReportsTimesAndWork) {
  const json out =
      run_json({"bench", "attention", "--config", small_model(), "--kinds", "sliding,csa",
                "--contexts", "64,128", "--batches", "1,2", "--prefill", "0", "--seconds", "0"});
  ASSERT_EQ(out.size(), 8u);
  for (const json& one : out) {
    EXPECT_EQ(one.at("what"), "decode");
    EXPECT_GT(one.at("seconds_median").get<double>(), 0);
    EXPECT_LE(one.at("seconds_p10").get<double>(), one.at("seconds_p90").get<double>());
    EXPECT_GT(one.at("bytes").get<double>(), 0);
    EXPECT_GT(one.at("flops").get<double>(), 0);
    EXPECT_TRUE(one.at("steps_seconds").contains("attend"));
  }
  EXPECT_EQ(out.at(0).at("kind"), "sliding");
  EXPECT_EQ(out.at(7).at("batch"), 2);
  EXPECT_EQ(out.at(7).at("context"), 128);
}

TEST(Bench, KeysOfTheIndexerTakeTheBytesOfTheirFormat) {
  const auto bytes = [](const char* format) {
    const json out =
        run_json({"bench", "attention", "--config", small_model(), "--kinds", "csa", "--contexts",
                  "8192", "--prefill", "0", "--seconds", "0", "--index-cache", format});
    return out.at(0).at("bytes").get<double>();
  };
  const double fp8 = bytes("fp8");
  EXPECT_EQ(bytes("auto"), fp8);
  EXPECT_LT(bytes("mxfp4"), fp8);
}

}  // namespace
}  // namespace dsv4::testing
