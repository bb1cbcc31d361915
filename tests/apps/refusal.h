// A table row of bad input: what is asked, and the one error that must answer it.
#pragma once
#include <algorithm>
#include <ostream>
#include <sstream>

#include "tests/apps/program.h"

namespace dsv4::testing {

constexpr int kBadInput = 1;  // the input or the environment is at fault
constexpr int kBadUsage = 2;  // the command line is

struct Refusal {
  std::string name;
  std::vector<std::string> arguments;  ///< "@model", "@tmp" and "@configs" are replaced
  int exit_code;
  std::vector<std::string> message;  ///< parts of the error, same replacements
  std::map<std::string, std::string> environment = {};
  bool prints = false;  ///< stdout holds the answer that led to the error
};
inline void PrintTo(const Refusal& refusal, std::ostream* out) {
  *out << refusal.name;
}

inline std::vector<std::string> words(const std::string& line) {
  std::istringstream in(line);
  std::vector<std::string> out;
  for (std::string word; in >> word;) out.push_back(word);
  return out;
}

inline std::string with_paths(std::string text, const std::string& tmp) {
  for (const auto& [mark, path] : {std::pair<std::string, std::string>{"@model", small_model()},
                                   {"@tmp", tmp},
                                   {"@configs", source_path("configs")}}) {
    for (size_t at; (at = text.find(mark)) != std::string::npos;) {
      text.replace(at, mark.size(), path);
    }
  }
  return text;
}

/// Runs `refusal` and checks the exit code and that stderr is exactly one error with all parts of
/// the message: a line "dsv4: ...", lines of reasons under it (indented), and after wrong usage the
/// hint to --help. Nothing may be left in `tmp`/out.
inline void expect_refusal(const Refusal& refusal, const std::string& tmp) {
  const std::string outputs = tmp + "/out";
  std::filesystem::create_directory(outputs);
  std::vector<std::string> arguments;
  for (const std::string& argument : refusal.arguments) {
    arguments.push_back(with_paths(argument, tmp));
  }
  RunOptions options;
  options.environment = refusal.environment;
  const Finished given = run_program(arguments, options);
  EXPECT_EQ(given.exit_code, refusal.exit_code) << given.err;
  EXPECT_EQ(!given.out.empty(), refusal.prints) << given.out;
  EXPECT_TRUE(std::filesystem::is_empty(outputs)) << "a refused command left a file";

  ASSERT_FALSE(given.err.empty());
  EXPECT_EQ(given.err.back(), '\n') << given.err;
  std::istringstream in(given.err);
  std::vector<std::string> lines;
  for (std::string line; std::getline(in, line);) lines.push_back(line);
  EXPECT_TRUE(lines[0].starts_with("dsv4: ")) << given.err;
  if (refusal.exit_code == kBadUsage) {
    EXPECT_TRUE(lines[0].starts_with("dsv4: wrong usage: ")) << given.err;
    ASSERT_EQ(lines.size(), 2u) << given.err;
    EXPECT_TRUE(lines[1].starts_with("Run 'dsv4") &&
                lines[1].ends_with("--help' for more information."))
        << given.err;
  } else {
    for (size_t i = 1; i < lines.size(); ++i) EXPECT_TRUE(lines[i].starts_with("  ")) << given.err;
  }
  for (const std::string& part : refusal.message) {
    EXPECT_NE(given.err.find(with_paths(part, tmp)), std::string::npos)
        << "expected: " << part << "\ngiven: " << given.err;
  }
}

inline std::string refusal_name(const ::testing::TestParamInfo<Refusal>& info) {
  return info.param.name;
}

}  // namespace dsv4::testing
