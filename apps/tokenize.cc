#include <cstdio>
#include <nlohmann/json.hpp>

#include "command_line.h"
#include "dsv4/tokenizer.h"

namespace dsv4::cli {
namespace {

struct Options {
  std::string model, text;
  bool json = false;
};

int run(const Options& options) {
  const std::unique_ptr<Tokenizer> tokenizer = Tokenizer::load(options.model);
  const std::vector<int32_t> ids = tokenizer->encode(options.text);
  const std::vector<std::string> pieces = tokenizer->pieces(ids);
  if (options.json) {
    print_json({{"ids", ids}, {"pieces", pieces}});
    return 0;
  }
  for (size_t i = 0; i < ids.size(); ++i) std::printf("%8d  %s\n", ids[i], pieces[i].c_str());
  return 0;
}

}  // namespace

Command add_tokenize(CLI::App& app) {
  CLI::App* command =
      app.add_subcommand("tokenize", "Token ids and pieces of a text (no begin token)");
  auto options = std::make_shared<Options>();
  command->add_option("-m,--model", options->model, "Model folder, or a tokenizer.json")
      ->required();
  command->add_option("text", options->text, "Text to encode")->required();
  command->add_flag("--json", options->json, "Print one JSON object: ids, pieces");
  command->footer(
      "Spellings of special tokens inside the text become these tokens. A text that begins with a "
      "dash goes after --.\n"
      "Example:\n"
      "  dsv4 tokenize -m models/tiny-shakespeare 'Romeo, Romeo' --json");
  return {command, [options] { return run(*options); }};
}

}  // namespace dsv4::cli
