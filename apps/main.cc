// dsv4: the command line. Parses flags, calls the library, prints. Exit codes: 0 done, 1 the input
// or the environment is at fault, 2 wrong usage.
#include <cstdio>
#include <new>

#include "command_line.h"
#include "dsv4/error.h"

namespace {

// "dsv4 bench attention": what to ask for help.
std::string command_name(const CLI::App& app) {
  const std::vector<CLI::App*> parsed = app.get_subcommands();
  return parsed.empty() ? app.get_name() : app.get_name() + " " + command_name(*parsed.front());
}

int wrong_usage(const CLI::App& app, const std::string& message) {
  std::fprintf(stderr, "dsv4: wrong usage: %s\nRun '%s --help' for more information.\n",
               message.c_str(), command_name(app).c_str());
  return 2;
}

// An argument that nobody knows explains more than what is missing because of it.
std::string usage_message(const CLI::App& app, const CLI::ParseError& error) {
  const std::vector<std::string> unknown = app.remaining(true);
  if (unknown.empty() || dynamic_cast<const CLI::RequiredError*>(&error) == nullptr) {
    return error.what();
  }
  const CLI::App* deepest = &app;
  while (!deepest->get_subcommands().empty()) deepest = deepest->get_subcommands().front();
  std::string message = "unknown argument \"" + unknown.front() + "\"";
  const auto commands = deepest->get_subcommands([](const CLI::App*) { return true; });
  for (size_t i = 0; i < commands.size(); ++i) {
    message += (i == 0 ? ", expected one of " : ", ") + commands[i]->get_name();
  }
  return message;
}

}  // namespace

int main(int argc, char** argv) {
  using namespace dsv4::cli;
  CLI::App app{
      "dsv4 runs DeepSeek-V4 models: text from a released checkpoint, and the attention system on "
      "its own.\n"
      "Try: dsv4 generate -m models/tiny-shakespeare -p 'JULIET:'"};
  app.name("dsv4");
  app.require_subcommand(1);
  app.set_version_flag("--version", DSV4_VERSION);
  const Command commands[] = {add_generate(app), add_logits(app), add_attention(app),
                              add_inspect(app),  add_plan(app),   add_backends(app),
                              add_tokenize(app), add_bench(app)};
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    if (error.get_exit_code() == 0) return app.exit(error);  // --help, --version
    return wrong_usage(app, usage_message(app, error));
  }
  try {
    for (const Command& command : commands) {
      if (command.app->parsed()) return command.run();
    }
  } catch (const UsageError& error) {
    return wrong_usage(app, error.what());
  } catch (const dsv4::Error& error) {
    std::fprintf(stderr, "dsv4: %s: %s\n", dsv4::error_code_name(error.code()), error.what());
    return 1;
  } catch (const std::bad_alloc&) {
    std::fprintf(stderr, "dsv4: out of memory\n");
    return 1;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "dsv4: %s\n", error.what());
    return 1;
  }
  return 2;
}
