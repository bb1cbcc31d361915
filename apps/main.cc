// dsv4: the command line. Parses flags, calls the library, prints. Exit codes: 0 done, 1 the input
// or the environment is at fault, 2 wrong usage.
#include <cstdio>
#include <new>

#include "command_line.h"
#include "dsv4/error.h"

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
    return app.exit(error) == 0 ? 0 : 2;
  }
  try {
    for (const Command& command : commands) {
      if (command.app->parsed()) return command.run();
    }
  } catch (const UsageError& error) {
    std::fprintf(stderr, "dsv4: %s\nRun with --help for more information.\n", error.what());
    return 2;
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
