// The commands that write tensors: logits and attention.
#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <set>

#include "tests/apps/program.h"

namespace dsv4::testing {
namespace {

using nlohmann::json;
using Shape = std::vector<int64_t>;

// More than two HCA windows and more entries than the small model's top-k of 64.
constexpr int64_t kLength = 300;
constexpr int64_t kVocab = 4096, kHidden = 256, kTopK = 64;
constexpr int64_t kEntries = kLength / 4;

Shape shape_of(const SafetensorsFile& file, const std::string& name) {
  const ConstTensor tensor = file.get(name);
  return {tensor.shape.begin(), tensor.shape.begin() + tensor.rank};
}

class TensorOutput : public ::testing::Test {
 protected:
  TensorOutput() {
    // Ids from the golden text, so that the model is at home.
    const SafetensorsFile golden(source_path("tests/golden/data/logits_q.safetensors"));
    const ConstTensor ids = golden.get("text0300/ids");
    ids_.assign(ids.as<int32_t>(), ids.as<int32_t>() + ids.num_elements());
    write_file(dir_.file("ids.json"), json(ids_).dump());
  }
  std::string file(const std::string& name) const { return dir_.file(name); }
  Finished run(std::vector<std::string> arguments, const std::vector<std::string>& more) {
    arguments.insert(arguments.end(), more.begin(), more.end());
    Finished out = run_program(arguments);
    EXPECT_EQ(out.exit_code, 0) << out.err;
    EXPECT_EQ(out.err, "");
    return out;
  }
  Finished logits(const std::string& out, const std::vector<std::string>& more = {}) {
    return run({"logits", "-m", small_model(), "--ids", file("ids.json"), "-o", file(out)}, more);
  }
  Finished attention(const std::string& kind, const std::string& out,
                     const std::vector<std::string>& more) {
    return run({"attention", "--config", small_model(), "--kind", kind, "-o", file(out)}, more);
  }
  TempDir dir_;
  std::vector<int32_t> ids_;
};

TEST_F(TensorOutput, LogitsAndPositions) {
  const json said = json::parse(logits("all.safetensors", {"--json"}).out);
  const SafetensorsFile all(file("all.safetensors"));
  EXPECT_EQ(all.names(), (std::vector<std::string>{"logits", "positions"}));
  EXPECT_EQ(all.stored_dtype("logits"), "F32");
  EXPECT_EQ(all.stored_dtype("positions"), "I32");
  ASSERT_EQ(shape_of(all, "logits"), (Shape{kLength, kVocab}));
  ASSERT_EQ(shape_of(all, "positions"), Shape{kLength});
  const float* values = all.get("logits").as<float>();
  for (int64_t i = 0; i < kLength * kVocab; ++i) ASSERT_TRUE(std::isfinite(values[i])) << i;
  for (int64_t p = 0; p < kLength; ++p) EXPECT_EQ(all.get("positions").as<int32_t>()[p], p);

  EXPECT_EQ(said.at("positions"), kLength);
  EXPECT_EQ(said.at("file"), file("all.safetensors"));
  double loss = 0;
  for (int64_t p = 0; p + 1 < kLength; ++p) {
    const float* row = values + p * kVocab;
    double sum = 0;
    for (int64_t i = 0; i < kVocab; ++i) sum += std::exp(static_cast<double>(row[i]));
    loss += std::log(sum) - static_cast<double>(row[ids_[static_cast<size_t>(p) + 1]]);
  }
  loss /= kLength - 1;
  // Both sums are float64 over 4096 terms; the order of subtracting the largest is the difference.
  EXPECT_NEAR(said.at("mean_loss_nats").get<double>(), loss, 1e-9);
  EXPECT_LT(loss, 3.5) << "the model does not know its own training text (chance: 8.3 nats)";
}

// AMD's kernels on the executor, the whole model; tests/devices compares its loss with the CPU's.
TEST_F(TensorOutput, LogitsOfTheEmulatedDevice) {
  constexpr int64_t kShort = 20;
  ids_.resize(kShort);
  write_file(file("ids.json"), json(ids_).dump());
  const json said =
      json::parse(logits("out.safetensors", {"--device", "rocm:emulated", "--json"}).out);
  const SafetensorsFile out(file("out.safetensors"));
  ASSERT_EQ(shape_of(out, "logits"), (Shape{kShort, kVocab}));
  EXPECT_LT(said.at("mean_loss_nats").get<double>(), 6) << "chance: 8.3 nats";
  const Finished text = run_program({"generate", "-m", small_model(), "--ids", file("ids.json"),
                                     "--device", "rocm:emulated", "-n", "2", "--json"});
  EXPECT_EQ(text.exit_code, 0) << text.err;
  EXPECT_EQ(json::parse(text.out).at("ids").size(), 2u);
}

TEST_F(TensorOutput, TheLastRowsAreTheSameRows) {
  logits("all.safetensors");
  logits("last.safetensors", {"--last", "3"});
  const SafetensorsFile all(file("all.safetensors")), last(file("last.safetensors"));
  ASSERT_EQ(shape_of(last, "logits"), (Shape{3, kVocab}));
  const std::string rows = bytes_of(all.get("logits"));
  EXPECT_EQ(bytes_of(last.get("logits")), rows.substr((kLength - 3) * kVocab * sizeof(float)));
  for (int64_t p = 0; p < 3; ++p) {
    EXPECT_EQ(last.get("positions").as<int32_t>()[p], kLength - 3 + p);
  }
  logits("every.safetensors", {"--last", std::to_string(kLength)});
  EXPECT_EQ(read_file(file("every.safetensors")), read_file(file("all.safetensors")));
}

TEST_F(TensorOutput, CuttingThePromptChangesNoBit) {
  for (const std::string numerics : {"serving", "reference", "exact"}) {
    logits("whole", {"--numerics", numerics, "--taps", file("whole.taps")});
    const std::string whole = read_file(file("whole")), taps = read_file(file("whole.taps"));
    for (const std::vector<std::string>& cut : std::vector<std::vector<std::string>>{
             {"--chunk", "77"},
             {"--decode-from", "280"},
             {"--chunk", "31", "--decode-from", "250", "--threads", "1"},
             {"--chunk", "1"},
             {"--decode-from", "0"},
             {"--chunk", "100000", "--decode-from", std::to_string(kLength)}}) {
      std::vector<std::string> more{"--numerics", numerics, "--taps", file("cut.taps")};
      more.insert(more.end(), cut.begin(), cut.end());
      logits("cut", more);
      EXPECT_TRUE(read_file(file("cut")) == whole) << numerics << " " << cut[0] << " " << cut[1];
      EXPECT_TRUE(read_file(file("cut.taps")) == taps)
          << numerics << " " << cut[0] << " " << cut[1];
    }
  }
}

TEST_F(TensorOutput, TapsHaveTheNamesOfTheManifest) {
  logits("out", {"--taps", file("taps"), "--last", "1"});
  const SafetensorsFile taps(file("taps"));
  const std::map<std::string, Shape> always{
      {"attn_in", {kLength, kHidden}},
      {"q", {kLength, 4, 512}},
      {"kv", {kLength, 512}},
      {"attn_before_o", {kLength, 4, 512}},
      {"attn_out", {kLength, kHidden}},
      {"expert_ids", {kLength, 4}},
      {"expert_weights", {kLength, 4}},
      {"mlp_out", {kLength, kHidden}},
      {"streams_out", {kLength, 4, kHidden}},
  };
  std::map<std::string, Shape> expected;
  const int ratios[] = {0, 4, 128, 4};
  for (int layer = 0; layer < 4; ++layer) {
    const std::string prefix = "layer" + std::to_string(layer) + "/";
    for (const auto& [name, shape] : always) expected[prefix + name] = shape;
    if (ratios[layer] == 0) continue;
    expected[prefix + "compressed"] = {kLength / ratios[layer], 512};
    if (ratios[layer] != 4) continue;
    expected[prefix + "index_scores"] = {kLength, kEntries};
    expected[prefix + "topk"] = {kLength, kTopK};
  }
  std::map<std::string, Shape> given;
  for (const std::string& name : taps.names()) {
    given[name] = shape_of(taps, name);
    const bool ids = name.ends_with("/topk") || name.ends_with("/expert_ids");
    EXPECT_EQ(taps.stored_dtype(name), ids ? "I32" : "F32") << name;
  }
  EXPECT_EQ(given, expected);
  const json manifest = json::parse(read_file(source_path("tests/golden/data/manifest.json")));
  const json& meanings = manifest.at("meaning of the last part of a tensor's name");
  for (const auto& [name, shape] : expected) {
    EXPECT_TRUE(meanings.contains(name.substr(name.find('/') + 1))) << name;
  }
}

TEST_F(TensorOutput, FormulaModelInAllNumerics) {
  write_file(file("config.json"), formula_config().dump());
  write_file(file("few.json"), "[1, 5, 95, 0, 17, 33, 2, 64, 9, 9, 9]");
  const std::string model = "formula:" + file("config.json") + ":2";
  std::set<std::string> results;
  for (const std::string numerics : {"serving", "reference", "exact"}) {
    const std::vector<std::string> call{"logits",         "-m",         model,   "--ids",
                                        file("few.json"), "--numerics", numerics};
    run(call, {"-o", file("out")});
    const SafetensorsFile out(file("out"));
    ASSERT_EQ(shape_of(out, "logits"), (Shape{11, 96}));
    for (int64_t i = 0; i < 11 * 96; ++i) {
      ASSERT_TRUE(std::isfinite(out.get("logits").as<float>()[i])) << numerics << " " << i;
    }
    run(call, {"-o", file("again"), "--chunk", "4", "--decode-from", "7"});
    EXPECT_EQ(read_file(file("again")), read_file(file("out"))) << numerics;
    results.insert(bytes_of(out.get("logits")));
  }
  EXPECT_EQ(results.size(), 3u) << "two kinds of numerics gave the same bits";
}

// Entries that token t may see: those whose tokens are all before or at t.
int64_t visible(int64_t t) {
  return (t + 1) / 4;
}

// -inf exactly where an entry is not visible, and the selection that follows from the scores.
void check_selection(const ConstTensor& scores, const ConstTensor& topk) {
  for (int64_t t = 0; t < kLength; ++t) {
    const float* row = scores.as<float>() + t * kEntries;
    for (int64_t e = 0; e < kEntries; ++e) {
      ASSERT_EQ(std::isfinite(row[e]), e < visible(t)) << "token " << t << " entry " << e;
      if (e >= visible(t)) {
        ASSERT_EQ(row[e], -std::numeric_limits<float>::infinity());
      }
    }
    std::vector<int32_t> order(static_cast<size_t>(visible(t)));
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return row[a] > row[b]; });
    order.resize(std::min<size_t>(order.size(), kTopK));
    std::sort(order.begin(), order.end());
    order.resize(kTopK, -1);
    const int32_t* given = topk.as<int32_t>() + t * kTopK;
    ASSERT_EQ(std::vector<int32_t>(given, given + kTopK), order) << "token " << t;
  }
}

TEST_F(TensorOutput, AttentionOfEveryKind) {
  const std::map<std::string, std::map<std::string, Shape>> more_taps{
      {"sliding", {}},
      {"csa",
       {{"compressed", {kEntries, 512}},
        {"index_scores", {kLength, kEntries}},
        {"topk", {kLength, kTopK}}}},
      {"hca", {{"compressed", {kLength / 128, 512}}}}};
  for (const auto& [kind, taps] : more_taps) {
    for (const std::string numerics : {"serving", "reference", "exact"}) {
      const std::vector<std::string> input{"--weights",     "formula:1",  "--hidden",
                                           "formula:300:1", "--numerics", numerics};
      std::vector<std::string> with_taps = input;
      with_taps.push_back("--taps");
      attention(kind, "plain", input);
      attention(kind, "taps", with_taps);
      const SafetensorsFile plain(file("plain")), tapped(file("taps"));
      EXPECT_EQ(plain.names(), std::vector<std::string>{"attn_out"});
      std::map<std::string, Shape> expected = taps, given;
      expected["attn_in"] = expected["attn_out"] = {kLength, kHidden};
      expected["kv"] = {kLength, 512};
      expected["q"] = expected["attn_before_o"] = {kLength, 4, 512};
      for (const std::string& name : tapped.names()) given[name] = shape_of(tapped, name);
      EXPECT_EQ(given, expected) << kind;
      // Taps switch the indexer's shortcut off, which must not be seen.
      EXPECT_EQ(bytes_of(tapped.get("attn_out")), bytes_of(plain.get("attn_out"))) << kind;
      if (kind == "csa") check_selection(tapped.get("index_scores"), tapped.get("topk"));
      with_taps.insert(with_taps.end(), {"--chunk", "13"});
      attention(kind, "chunks", with_taps);
      EXPECT_TRUE(read_file(file("chunks")) == read_file(file("taps"))) << kind << " " << numerics;
    }
  }
}

// "first" of x.200 in the manifest; the index is row-major, so that it does not depend on the
// hidden size.
TEST_F(TensorOutput, AttentionReadsTheInputOfTheFormula) {
  attention(
      "sliding", "out",
      {"--weights", "formula:1", "--hidden", "formula:200:1", "--numerics", "exact", "--taps"});
  const json manifest = json::parse(read_file(source_path("tests/golden/data/manifest.json")));
  const json first = manifest.at("flash_attention").at("inputs").at("x.200").at("first");
  const SafetensorsFile out(file("out"));
  ASSERT_EQ(shape_of(out, "attn_in"), (Shape{200, kHidden}));
  for (size_t i = 0; i < first.size(); ++i) {
    EXPECT_EQ(out.get("attn_in").as<float>()[i], first.at(i).get<float>()) << i;
  }
}

TEST_F(TensorOutput, AttentionAloneIsTheModelsLayer) {
  const char* kinds[] = {"sliding", "csa", "hca", "csa"};
  for (const std::string numerics : {"serving", "exact"}) {
    logits("out", {"--taps", file("taps"), "--numerics", numerics});
    const SafetensorsFile model(file("taps"));
    for (int layer = 0; layer < 4; ++layer) {
      const std::string prefix = "layer" + std::to_string(layer) + "/";
      const json said =
          json::parse(attention(kinds[layer], "layer",
                                {"--weights", small_model() + ":" + std::to_string(layer),
                                 "--hidden", file("taps") + ":" + prefix + "attn_in", "--taps",
                                 "--numerics", numerics, "--json"})
                          .out);
      const SafetensorsFile alone(file("layer"));
      EXPECT_EQ(said.at("tokens"), kLength);
      EXPECT_EQ(said.at("tensors"), alone.names().size());
      for (const std::string& name : alone.names()) {
        EXPECT_TRUE(bytes_of(alone.get(name)) == bytes_of(model.get(prefix + name)))
            << numerics << " " << prefix << name;
      }
    }
  }
}

TEST_F(TensorOutput, HiddenFromAFileOfOneTensor) {
  StoredTensor x{"BF16", {5, kHidden}, std::string(5 * kHidden * 2, '\0')};
  for (size_t i = 0; i < 5 * kHidden; ++i) {
    x.bytes[2 * i + 1] = static_cast<char>(i % 3 == 0 ? 0x3f : 0xbf);  // 0.5 and -0.5
  }
  write_tensors(file("one.safetensors"), {{"x", x}});
  for (const std::string name : {"", ":x"}) {
    attention("hca", "out" + name,
              {"--weights", "formula:4", "--hidden", file("one.safetensors") + name, "--taps"});
  }
  EXPECT_EQ(read_file(file("out")), read_file(file("out:x")));
  const SafetensorsFile out(file("out"));
  EXPECT_EQ(shape_of(out, "compressed"), (Shape{0, 512}));  // no entry of 128 tokens yet
  EXPECT_EQ(out.get("attn_in").as<float>()[0], 0.5f);
  EXPECT_EQ(out.get("attn_in").as<float>()[1], -0.5f);
}

}  // namespace
}  // namespace dsv4::testing
