// Loads a model through the installed headers alone and prints a few words.
#include <dsv4/dsv4.h>

#include <cstdio>

int main(int argc, char** argv) {
  if (argc != 2) return 2;
  try {
    dsv4::EngineOptions options;
    options.limits = {64, 1, 64};
    const auto engine = dsv4::Engine::load(dsv4::ModelSource::parse(argv[1]), options);
    std::vector<std::int32_t> prompt{engine->config().bos_token_id};
    for (std::int32_t id : engine->tokenizer()->encode("JULIET:\nO")) prompt.push_back(id);
    dsv4::GenerateOptions generate;
    generate.max_new_tokens = 12;
    const dsv4::GenerateResult result = dsv4::generate(*engine, prompt, generate);
    std::printf("%s\n", engine->tokenizer()->decode(result.tokens).c_str());
    return result.tokens.size() == 12 ? 0 : 1;
  } catch (const dsv4::Error& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
