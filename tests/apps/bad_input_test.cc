// Wrong options, prompts, devices and outputs: each gets its one error. Wrong files are in
// bad_files_test.cc. To add a case, add a row; the files that rows name are made by class Files.
#include "tests/apps/refusal.h"

namespace dsv4::testing {
namespace {

using nlohmann::json;

// Made once for all cases.
class Files {
 public:
  static const std::string& folder() {
    static const Files files;
    return files.dir_.path();
  }

 private:
  Files() {
    for (const auto& [name, text] :
         std::map<std::string, std::string>{{"ids", "[1, 2, 3]"},
                                            {"empty_array", "[]"},
                                            {"no_bytes", ""},
                                            {"cut", "[1, 2"},
                                            {"object", "{\"ids\": [1]}"},
                                            {"text", "[\"a\"]"},
                                            {"real", "[1, 1.5]"},
                                            {"nested", "[[1]]"},
                                            {"null", "[null]"},
                                            {"bool", "[true]"},
                                            {"negative", "[5, -1]"},
                                            {"vocab", "[5, 6, 4096]"},
                                            {"u64", "[18446744073709551615]"},
                                            {"huge", "[1e300]"}}) {
      write_file(dir_.file(name + ".json"), text);
    }
    json config = json::parse(read_file(small_model() + "/config.json"));
    config["max_position_embeddings"] = 16;
    write_file(dir_.file("short_context.json"), config.dump());
    // 264 TB of experts: more than any machine this runs on.
    config = json::parse(read_file(source_path("configs/v4-pro.json")));
    config["moe_intermediate_size"] = 1 << 20;
    write_file(dir_.file("enormous.json"), config.dump());

    const std::string four(4 * 256 * sizeof(float), '\0');
    write_tensors(dir_.file("hidden.safetensors"), {{"narrow", {"F32", {8, 128}, four}},
                                                    {"flat", {"F32", {1024}, four}},
                                                    {"ints", {"I32", {4, 256}, four}},
                                                    {"none", {"F32", {0, 256}, ""}},
                                                    {"half", {"F16", {8, 256}, four}}});
    std::filesystem::create_directory(dir_.file("folder"));
  }
  TempDir dir_;
};

// "generate" on the small model with a short prompt, then `more`.
std::vector<std::string> generate(const std::string& more) {
  return words("generate -m @model -p x -n 1 " + more);
}
std::vector<std::string> with_empty(std::vector<std::string> arguments) {
  arguments.emplace_back();
  return arguments;
}
std::vector<std::string> logits(const std::string& more) {
  return words("logits -m @model --ids @tmp/ids.json -o @tmp/out/x.safetensors " + more);
}
std::vector<std::string> attention(const std::string& kind, const std::string& weights,
                                   const std::string& hidden, const std::string& more = "") {
  return words("attention --config @model -o @tmp/out/x.safetensors --kind " + kind +
               " --weights " + weights + " --hidden " + hidden + " " + more);
}

std::vector<Refusal> usage_cases() {
  return {
      {"NoCommand", {}, kBadUsage, {"subcommand is required", "Run 'dsv4 --help'"}},
      {"UnknownCommand", {"infer"}, kBadUsage, {"\"infer\"", "expected one of generate, logits"}},
      {"UnknownOption", generate("--fast"), kBadUsage, {"--fast", "Run 'dsv4 generate --help'"}},
      {"UnknownOptionFirst", {"generate", "--fast"}, kBadUsage, {"unknown argument \"--fast\""}},
      {"OptionWithoutValue", generate("--seed"), kBadUsage, {"--seed"}},
      {"OptionTwice", generate("-n 2"), kBadUsage, {"--num-tokens"}},
      {"NoModel", words("generate -p x"), kBadUsage, {"--model is required"}},
      {"NoPrompt", words("generate -m @model"), kBadUsage, {"-p TEXT or --ids FILE"}},
      {"TwoPrompts", generate("--ids @tmp/ids.json"), kBadUsage, {"--prompt", "--ids"}},
      {"LogitsWithoutOutput", words("logits -m @model -p x"), kBadUsage, {"--out is required"}},
      {"AttentionWithoutInput",
       words("attention --config @model --kind csa --weights formula:1 -o @tmp/out/x"),
       kBadUsage,
       {"--hidden is required"}},
      {"TokenizeWithoutText", words("tokenize -m @model"), kBadUsage, {"text is required"}},
      {"PlanWithoutContext", words("plan -m @model"), kBadUsage, {"--ctx is required"}},
      {"PlanWithoutModel", words("plan --ctx 8"), kBadUsage, {"-m DIR", "--config FILE"}},
      {"PlanWithTwoModels", words("plan --ctx 8 -m @model --config @model"), kBadUsage, {"one of"}},
      {"BenchWithoutSubject", {"bench"}, kBadUsage, {"Run 'dsv4 bench --help'"}},
      {"TapsOverOutput", logits("--taps @tmp/out/x.safetensors"), kBadUsage, {"same file"}},
      // Numbers that are none, or that no integer of the option can hold.
      {"ThreadsWord", generate("--threads x"), kBadUsage, {"--threads", "\"x\"", "whole number"}},
      {"ThreadsReal", generate("--threads 1.5"), kBadUsage, {"--threads", "\"1.5\""}},
      {"ThreadsTooLong", generate("--threads 99999999999"), kBadUsage, {"2147483647"}},
      {"TemperatureWord", generate("--temp hot"), kBadUsage, {"--temp", "\"hot\""}},
      {"TemperatureEmpty", with_empty(generate("--temp")), kBadUsage, {"--temp", "\"\""}},
      {"TopPWord", generate("--top-p x"), kBadUsage, {"--top-p", "\"x\""}},
      {"TopKReal", generate("--top-k 1.5"), kBadUsage, {"--top-k", "\"1.5\""}},
      {"CountWord", words("generate -m @model -p x -n ten"), kBadUsage, {"\"ten\""}},
      {"SeedNegative", generate("--seed -1"), kBadUsage, {"--seed", "\"-1\"", "from 0"}},
      {"SeedTooLarge",
       generate("--seed 18446744073709551616"),
       kBadUsage,
       {"18446744073709551615"}},
      {"ChunkWord", logits("--chunk x"), kBadUsage, {"--chunk", "\"x\""}},
      {"LastWord", logits("--last all"), kBadUsage, {"--last", "\"all\""}},
      {"DecodeFromEmpty", with_empty(logits("--decode-from")), kBadUsage, {"--decode-from"}},
      {"ContextsWord",
       words("bench attention --contexts 64,x"),
       kBadUsage,
       {"--contexts", "\"x\""}},
      {"IndexCacheWord",
       words("bench attention --index-cache fp4"),
       kBadUsage,
       {"--index-cache", "fp4"}},
  };
}

std::vector<Refusal> value_cases() {
  return {
      {"ThreadsZero", generate("--threads 0"), kBadInput, {"--threads 0", "1 or more"}},
      {"ThreadsNegative", generate("--threads -1"), kBadInput, {"--threads -1"}},
      {"ThreadsTooMany", generate("--threads 100000"), kBadInput, {"100000 threads", "1024"}},
      {"TemperatureNan", generate("--temp nan"), kBadInput, {"temperature nan"}},
      {"TemperatureInfinite", generate("--temp inf"), kBadInput, {"temperature inf"}},
      {"TemperatureNegative", generate("--temp -1"), kBadInput, {"temperature -1", "0 or more"}},
      {"TopPZero", generate("--top-p 0"), kBadInput, {"top_p 0", "above 0"}},
      {"TopPLarge", generate("--top-p 2"), kBadInput, {"top_p 2", "at most 1"}},
      {"TopPNan", generate("--top-p nan"), kBadInput, {"top_p nan"}},
      {"TopKNegative", generate("--top-k -1"), kBadInput, {"top_k -1"}},
      {"CountNegative", words("generate -m @model -p x -n -1"), kBadInput, {"-n -1", "0 or more"}},
      {"ContextBeyondTheModel",
       words("generate -m @model -p x -n 2000000"),
       kBadInput,
       {"2000002", "1048576", "max_position_embeddings"}},
      {"ContextOfOneTooMany",
       words("generate -m formula:@tmp/short_context.json --ids @tmp/ids.json -n 14"),
       kBadInput,
       {"17 tokens", "at most 16"}},
      {"ChunkZero", logits("--chunk 0"), kBadInput, {"--chunk 0", "1 or more"}},
      {"ChunkNegative", logits("--chunk -3"), kBadInput, {"--chunk -3"}},
      {"LastZero", logits("--last 0"), kBadInput, {"--last 0", "1 to 3"}},
      {"LastNegative", logits("--last -1"), kBadInput, {"--last -1", "1 to 3"}},
      {"LastTooMany", logits("--last 4"), kBadInput, {"--last 4", "1 to 3"}},
      {"DecodeFromBeyond", logits("--decode-from 4"), kBadInput, {"--decode-from 4", "0 to 3"}},
      {"DecodeFromNegative", logits("--decode-from -1"), kBadInput, {"--decode-from -1"}},
      {"PlanContextZero", words("plan -m @model --ctx 0"), kBadInput, {"--ctx 0"}},
      {"PlanContextNegative", words("plan -m @model --ctx -5"), kBadInput, {"--ctx -5"}},
      {"PlanContextBeyond",
       words("plan -m @model --ctx 1048577"),
       kBadInput,
       {"1048577", "1048576"}},
      {"PlanSequencesZero", words("plan -m @model --ctx 8 --seqs 0"), kBadInput, {"--seqs 0"}},
      {"PlanStepZero",
       words("plan -m @model --ctx 8 --step-tokens 0"),
       kBadInput,
       {"step-tokens 0"}},
      {"PlanBeyondRowNumbers",
       words("plan -m @model --ctx 1000000 --seqs 2147483647"),
       kBadInput,
       {"cache pool", "2^31"}},
      {"PlanDoesNotFit",
       words("plan --config @tmp/enormous.json --ctx 4096"),
       kBadInput,
       {"does not fit", "TB needed", "cpu has"},
       {},
       true},
      {"GenerateDoesNotFit",
       words("generate -m formula:@tmp/enormous.json --ids @tmp/ids.json -n 1"),
       kBadInput,
       {"enormous.json does not fit", "TB needed", "this machine has"}},
      {"LogitsDoNotFit",
       words("logits -m formula:@tmp/enormous.json --ids @tmp/ids.json -o @tmp/out/x"),
       kBadInput,
       {"does not fit"}},
      {"BenchKind", words("bench attention --config @model --kinds mla"), kBadInput, {"\"mla\""}},
      {"BenchContext",
       words("bench attention --config @model --contexts 1"),
       kBadInput,
       {"--contexts 1", "2 to 2147483391"}},
      {"BenchContextTooLarge",
       words("bench attention --config @model --contexts 9223372036854775807"),
       kBadInput,
       {"2 to 2147483391"}},
      {"BenchBatch",
       words("bench attention --config @model --batches 0"),
       kBadInput,
       {"--batches 0"}},
      {"BenchPrefill", words("bench attention --config @model --prefill -1"), kBadInput, {"-1"}},
      {"BenchSeconds", words("bench attention --config @model --seconds nan"), kBadInput, {"nan"}},
      {"KernelWithoutName",
       generate(""),
       kBadInput,
       {"DSV4_KERNEL", "family:name"},
       {{"DSV4_KERNEL", "fast"}}},
      {"KernelUnknown",
       generate(""),
       kBadInput,
       {"no kernel attend:fast", "attend:reference"},
       {{"DSV4_KERNEL", "attend:fast"}}},
      {"KernelFamilyUnknown",
       generate(""),
       kBadInput,
       {"no kernel softmax:fast"},
       {{"DSV4_KERNEL", "softmax:fast"}}},
  };
}

std::vector<Refusal> device_cases() {
  const std::string expected = "expected cpu, cuda:N, rocm:N";
  return {
      {"DeviceUnknown", generate("--device tpu"), kBadInput, {"\"tpu\"", expected}},
      {"DeviceEmpty", with_empty(generate("--device")), kBadInput, {"device \"\"", expected}},
      {"DeviceCpuNumber", generate("--device cpu:1"), kBadInput, {"\"cpu:1\"", expected}},
      {"DeviceWithoutNumber", generate("--device cuda"), kBadInput, {"\"cuda\"", expected}},
      {"DeviceNumberWord", generate("--device cuda:x"), kBadInput, {"\"cuda:x\"", expected}},
      {"DeviceNumberNegative", generate("--device cuda:-1"), kBadInput, {"\"cuda:-1\"", expected}},
      // A number that no machine has, so that the answer is the same with GPUs.
      {"DeviceAbsentCuda",
       generate("--device cuda:4096"),
       kBadInput,
       {"no attention backend fits", "FLASHMLA_SPARSE_DSV4: device", "FLASHINFER_MLA_SPARSE_DSV4"}},
      {"DeviceAbsentRocm",
       generate("--device rocm:4096"),
       kBadInput,
       {"ROCM_FLASHMLA_SPARSE_DSV4: device", "required a ROCm device"}},
      {"DeviceEmulatedTakesNoF32",
       generate("--device rocm:emulated --numerics exact"),
       kBadInput,
       {"no attention backend fits", "ROCM_FLASHMLA_SPARSE_DSV4", "exact"}},
      {"DeviceEmulatedTakesNoBf16Rows",
       generate("--device rocm:emulated --kv-cache-dtype bf16"),
       kBadInput,
       {"kv cache dtype of ROCM_FLASHMLA_SPARSE_DSV4: bf16, required one of fp8_ds_mla"}},
      {"PlanDeviceAbsent",
       words("plan --config @configs/v4-pro.json --ctx 8 --device cuda:4096"),
       kBadInput,
       {"no attention backend fits"}},
      {"BackendUnknown",
       generate("--attention-backend FLASHMLA"),
       kBadInput,
       {"FLASHMLA, required one of CPU_DSV4, FLASHMLA_SPARSE_DSV4"}},
      {"BackendFlashMlaOnCpu",
       generate("--attention-backend FLASHMLA_SPARSE_DSV4"),
       kBadInput,
       {"FLASHMLA_SPARSE_DSV4: platform: cpu, required cuda"}},
      {"BackendFlashInferOnCpu",
       generate("--attention-backend FLASHINFER_MLA_SPARSE_DSV4"),
       kBadInput,
       {"FLASHINFER_MLA_SPARSE_DSV4: platform: cpu, required cuda"}},
      {"BackendRocmOnCpu",
       generate("--attention-backend ROCM_FLASHMLA_SPARSE_DSV4"),
       kBadInput,
       {"ROCM_FLASHMLA_SPARSE_DSV4: platform: cpu, required rocm"}},
      {"BackendCpuOnCuda",
       generate("--attention-backend CPU_DSV4 --device cuda:4096"),
       kBadInput,
       {"CPU_DSV4", "platform: cuda, required cpu"}},
      {"BackendsOfUnknownName",
       words("backends --attention-backend NOPE"),
       kBadInput,
       {"\"NOPE\"", "CPU_DSV4"}},
      {"BackendsOfUnknownDevice", words("backends --device tpu"), kBadInput, {"\"tpu\""}},
      {"CacheUnknown", generate("--kv-cache-dtype int4"), kBadInput, {"int4", "fp8_ds_mla, bf16"}},
      {"CacheE5m2", generate("--kv-cache-dtype fp8_e5m2"), kBadInput, {"fp8_e5m2", "E4M3"}},
      {"CacheF32WithServing", generate("--kv-cache-dtype f32"), kBadInput, {"serving: f32"}},
      {"CacheF32WithReference",
       generate("--kv-cache-dtype f32 --numerics reference"),
       kBadInput,
       {"reference: f32"}},
      {"CachePackedWithExact",
       generate("--kv-cache-dtype fp8_ds_mla --numerics exact"),
       kBadInput,
       {"exact: fp8_ds_mla, required f32"}},
      {"CacheFp8WithExact",
       generate("--kv-cache-dtype fp8 --numerics exact"),
       kBadInput,
       {"exact: fp8, required f32"}},
      {"CacheBf16WithExact",
       generate("--kv-cache-dtype bf16 --numerics exact"),
       kBadInput,
       {"exact: bf16, required f32"}},
      {"CacheBf16OnFlashMla",
       generate(
           "--kv-cache-dtype bf16 --attention-backend FLASHMLA_SPARSE_DSV4 --device cuda:4096"),
       kBadInput,
       {"FLASHMLA_SPARSE_DSV4: bf16, required one of fp8_ds_mla"}},
      {"CacheBf16OnRocm",
       generate("--kv-cache-dtype bf16 --attention-backend ROCM_FLASHMLA_SPARSE_DSV4 --device "
                "rocm:4096"),
       kBadInput,
       {"ROCM_FLASHMLA_SPARSE_DSV4: bf16, required one of fp8_ds_mla"}},
      {"CachePackedOnFlashInfer",
       generate("--kv-cache-dtype fp8_ds_mla --attention-backend FLASHINFER_MLA_SPARSE_DSV4 "
                "--device cuda:4096"),
       kBadInput,
       {"FLASHINFER_MLA_SPARSE_DSV4: fp8_ds_mla, required one of bf16, fp8"}},
      {"ExactOnCuda",
       generate("--numerics exact --device cuda:4096"),
       kBadInput,
       {"numerics exact: f32, required bf16"}},
      {"NumericsUnknown",
       generate("--numerics fast"),
       kBadInput,
       {"\"fast\"", "serving, reference or exact"}},
      {"NumericsEmpty", with_empty(generate("--numerics")), kBadInput, {"--numerics \"\""}},
      {"ProductsUnknown",
       generate("--products bf16"),
       kBadInput,
       {"--products \"bf16\", expected f32 or fp8"}},
      {"ProductsFp8OnTheCpu",
       generate("--products fp8"),
       kBadInput,
       {"products of CPU_DSV4: fp8, required f32"}},
      {"ProductsFp8WithExact",
       generate("--products fp8 --numerics exact"),
       kBadInput,
       {"products of numerics exact: fp8, required f32"}},
      {"ProductsFp8Emulated",
       generate("--products fp8 --device rocm:emulated"),
       kBadInput,
       {"products of ROCM_FLASHMLA_SPARSE_DSV4: fp8, required f32"}},
  };
}

Refusal ids_case(const std::string& name, const std::string& file,
                 const std::vector<std::string>& message) {
  return {name, words("generate -m @model -n 1 --ids @tmp/" + file + ".json"), kBadInput, message};
}

std::vector<Refusal> prompt_cases() {
  const std::string array = "expected a JSON array of token ids";
  return {
      ids_case("IdsMissing", "absent", {"not found", "absent.json"}),
      ids_case("IdsEmptyArray", "empty_array", {"the array is empty"}),
      ids_case("IdsEmptyFile", "no_bytes", {"no_bytes.json", array}),
      ids_case("IdsCutOff", "cut", {array}),
      ids_case("IdsObject", "object", {array}),
      ids_case("IdsText", "text", {"element 0 is \"a\"", "expected an integer"}),
      ids_case("IdsReal", "real", {"element 1 is 1.5", "expected an integer"}),
      ids_case("IdsNested", "nested", {"element 0 is [1]"}),
      ids_case("IdsNull", "null", {"element 0 is null"}),
      ids_case("IdsBool", "bool", {"element 0 is true"}),
      ids_case("IdsNegative", "negative", {"token id -1 at position 1", "0 to 4095"}),
      ids_case("IdsOutsideVocabulary", "vocab", {"token id 4096 at position 2", "0 to 4095"}),
      ids_case("IdsBeyond64Bits", "u64", {"18446744073709551615", "0 to 4095"}),
      ids_case("IdsHuge", "huge", {"element 0", "expected an integer"}),
      {"IdsFolder", words("generate -m @model --ids @tmp/folder"), kBadInput, {"is a folder"}},
      {"PromptNotUtf8",
       {"generate", "-m", "@model", "-p", "ab\xff\xfe"},
       kBadInput,
       {"not UTF-8", "byte 2 of 4"}},
      {"PromptSurrogate",
       {"logits", "-m", "@model", "-p", "\xed\xa0\x80", "-o", "@tmp/out/x"},
       kBadInput,
       {"not UTF-8", "byte 0"}},
      {"TokenizeCutCharacter",
       {"tokenize", "-m", "@model", "caf\xc3"},
       kBadInput,
       {"not UTF-8", "byte 3 of 4"}},
      {"PromptForFormula", words("generate -m formula:@model -p x"), kBadInput, {"--ids FILE"}},
      {"ModelEmpty", {"generate", "-m", "", "-p", "x"}, kBadInput, {"model folder is empty"}},
      {"ModelAbsent",
       words("generate -m /nonexistent -p x"),
       kBadInput,
       {"not found", "/nonexistent"}},
      {"ModelWithoutConfig", words("inspect -m @tmp/folder"), kBadInput, {"folder/config.json"}},
      {"FormulaWithoutConfig", words("inspect -m formula:"), kBadInput, {"no config"}},
      {"FormulaSeedWord",
       words("inspect -m formula:@model:x"),
       kBadInput,
       {"\"x\" is not a number"}},
      {"FormulaSeedNegative", words("inspect -m formula:@model:-1"), kBadInput, {"\"-1\""}},
      {"FormulaConfigAbsent",
       words("inspect -m formula:/nonexistent:1"),
       kBadInput,
       {"/nonexistent"}},
      {"TokenizerAbsent", words("tokenize -m /nonexistent x"), kBadInput, {"/nonexistent"}},
  };
}

std::vector<Refusal> attention_cases() {
  const std::string weights = "DIR:LAYER or formula:SEED";
  const std::string hidden = "expected formula:LENGTH:SEED";
  return {
      {"KindUnknown",
       attention("mla", "formula:1", "formula:8:1"),
       kBadInput,
       {"\"mla\"", "sliding, csa or hca"}},
      {"WeightsWithoutColon",
       attention("csa", "formula", "formula:8:1"),
       kBadInput,
       {"\"formula\"", weights}},
      {"WeightsSeedWord",
       attention("csa", "formula:x", "formula:8:1"),
       kBadInput,
       {"\"x\"", weights}},
      {"WeightsLayerNegative",
       attention("csa", "@model:-1", "formula:8:1"),
       kBadInput,
       {"\"-1\"", weights}},
      {"WeightsLayerBeyond",
       attention("csa", "@model:4", "formula:8:1"),
       kBadInput,
       {"layers 0 to 3"}},
      {"WeightsOfAnotherKind",
       attention("hca", "@model:1", "formula:8:1"),
       kBadInput,
       {"layer 1 is csa", "--kind is hca"}},
      {"WeightsAbsent",
       attention("csa", "/nonexistent:1", "formula:8:1"),
       kBadInput,
       {"/nonexistent"}},
      {"HiddenWithoutSeed",
       attention("csa", "formula:1", "formula:8"),
       kBadInput,
       {"formula:8", hidden}},
      {"HiddenLengthWord",
       attention("csa", "formula:1", "formula:x:1"),
       kBadInput,
       {"\"x\"", hidden}},
      {"HiddenLengthZero", attention("csa", "formula:1", "formula:0:1"), kBadInput, {"length 0"}},
      {"HiddenLengthBeyond",
       attention("csa", "formula:1", "formula:1048577:1"),
       kBadInput,
       {"1048577", "1 to 1048576"}},
      {"HiddenLengthHuge",
       attention("csa", "formula:1", "formula:99999999999999999999:1"),
       kBadInput,
       {hidden}},
      {"HiddenAbsent", attention("csa", "formula:1", "/nonexistent"), kBadInput, {"/nonexistent"}},
      {"HiddenNoTensors",
       attention("csa", "formula:1", "@tmp/ids.json"),
       kBadInput,
       {"ids.json", "no safetensors file"}},
      {"HiddenWhichTensor",
       attention("csa", "formula:1", "@tmp/hidden.safetensors"),
       kBadInput,
       {"holds 5 tensors"}},
      {"HiddenNoSuchTensor",
       attention("csa", "formula:1", "@tmp/hidden.safetensors:x"),
       kBadInput,
       {"no tensor 'x'"}},
      {"HiddenNarrow",
       attention("csa", "formula:1", "@tmp/hidden.safetensors:narrow"),
       kBadInput,
       {"[8, 128] f32", "[tokens, 256]"}},
      {"HiddenFlat",
       attention("csa", "formula:1", "@tmp/hidden.safetensors:flat"),
       kBadInput,
       {"[1024] f32", "[tokens, 256]"}},
      {"HiddenInts",
       attention("csa", "formula:1", "@tmp/hidden.safetensors:ints"),
       kBadInput,
       {"i32", "f32 or bf16"}},
      {"HiddenHalf",
       attention("csa", "formula:1", "@tmp/hidden.safetensors:half"),
       kBadInput,
       {"F16"}},
      {"HiddenNoRows",
       attention("csa", "formula:1", "@tmp/hidden.safetensors:none"),
       kBadInput,
       {"[0, 256]"}},
      {"AttentionChunkZero",
       attention("csa", "formula:1", "formula:8:1", "--chunk 0"),
       kBadInput,
       {"--chunk 0"}},
      {"AttentionBackend",
       attention("csa", "formula:1", "formula:8:1", "--attention-backend NOPE"),
       kBadInput,
       {"NOPE"}},
      {"OutputFolderAbsent",
       words("logits -m @model -p x -o /nonexistent/x"),
       kBadInput,
       {"--out", "/nonexistent/x", "folder does not exist"}},
      {"OutputIsAFolder",
       words("logits -m @model -p x -o @tmp/folder"),
       kBadInput,
       {"--out", "is a folder"}},
      {"OutputEmpty",
       {"logits", "-m", "@model", "-p", "x", "-o", ""},
       kBadInput,
       {"--out", "no file name"}},
      {"OutputUnderAFile",
       words("logits -m @model -p x -o @tmp/ids.json/x"),
       kBadInput,
       {"folder does not exist"}},
      {"OutputOnNoDisk", words("logits -m @model -p x -o /proc/x"), kBadInput, {"/proc/x"}},
      {"TapsFolderAbsent",
       logits("--taps /nonexistent/t"),
       kBadInput,
       {"--taps", "/nonexistent/t"}},
      {"TapsEmpty", with_empty(logits("--taps")), kBadInput, {"--taps", "no file name"}},
      {"AttentionOutputAbsent",
       words("attention --config @model --kind csa --weights formula:1 --hidden formula:8:1 -o "
             "/nonexistent/x"),
       kBadInput,
       {"--out", "/nonexistent/x"}},
  };
}

class BadInput : public ::testing::TestWithParam<Refusal> {};

TEST_P(BadInput, GetsItsOneError) {
  expect_refusal(GetParam(), Files::folder());
}

INSTANTIATE_TEST_SUITE_P(Usage, BadInput, ::testing::ValuesIn(usage_cases()), refusal_name);
INSTANTIATE_TEST_SUITE_P(Value, BadInput, ::testing::ValuesIn(value_cases()), refusal_name);
INSTANTIATE_TEST_SUITE_P(Device, BadInput, ::testing::ValuesIn(device_cases()), refusal_name);
INSTANTIATE_TEST_SUITE_P(Prompt, BadInput, ::testing::ValuesIn(prompt_cases()), refusal_name);
INSTANTIATE_TEST_SUITE_P(Attention, BadInput, ::testing::ValuesIn(attention_cases()), refusal_name);

}  // namespace
}  // namespace dsv4::testing
