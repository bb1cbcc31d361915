// run_program(), and a test that it sees what a program does.
#include "tests/apps/program.h"

#include <fcntl.h>
#include <signal.h>
#include <spawn.h>
#include <stdlib.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <stdexcept>
#include <thread>

namespace dsv4::testing {
namespace {

[[noreturn]] void give_up(const char* what) {
  throw std::runtime_error(std::string(what) + ": " + std::strerror(errno));
}

// Both ends of a pseudo-terminal.
struct Terminal {
  Terminal() {
    master = ::posix_openpt(O_RDWR | O_NOCTTY | O_CLOEXEC);
    if (master < 0 || ::grantpt(master) != 0 || ::unlockpt(master) != 0) give_up("pseudo-terminal");
    path = ::ptsname(master);
    // Held open until the program has opened it: a master without a slave reads as closed.
    slave = ::open(path.c_str(), O_RDWR | O_NOCTTY | O_CLOEXEC);
    if (slave < 0) give_up("pseudo-terminal");
  }
  ~Terminal() {
    ::close(master);
    if (slave >= 0) ::close(slave);
  }
  Terminal(const Terminal&) = delete;
  Terminal& operator=(const Terminal&) = delete;
  std::string read_all() {
    ::close(slave);
    slave = -1;
    std::string out;
    char buffer[4096];
    for (ssize_t count; (count = ::read(master, buffer, sizeof(buffer))) > 0;) {
      out.append(buffer, static_cast<size_t>(count));
    }
    return out;  // ends with EIO when the last writer is gone
  }
  int master = -1, slave = -1;
  std::string path;
};

std::vector<std::string> environment_with(const std::map<std::string, std::string>& added) {
  std::vector<std::string> out;
  for (char** entry = environ; *entry != nullptr; ++entry) {
    const std::string text = *entry;
    const std::string name = text.substr(0, text.find('='));
    if (name != "DSV4_KERNEL" && added.count(name) == 0) out.push_back(text);
  }
  for (const auto& [name, value] : added) out.push_back(name + "=" + value);
  return out;
}

std::vector<char*> pointers(std::vector<std::string>& texts) {
  std::vector<char*> out;
  for (std::string& text : texts) out.push_back(text.data());
  out.push_back(nullptr);
  return out;
}

int wait_for(pid_t child, int timeout_seconds) {
  const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(timeout_seconds);
  int status = 0;
  while (::waitpid(child, &status, WNOHANG) == 0) {
    if (std::chrono::steady_clock::now() > end) {
      ::kill(child, SIGKILL);
      ::waitpid(child, &status, 0);
      break;
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(2));
  }
  return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

}  // namespace

Finished run_program(const std::vector<std::string>& arguments, const RunOptions& options) {
  const TempDir dir;
  std::vector<std::string> argument_texts{DSV4_CLI};
  argument_texts.insert(argument_texts.end(), arguments.begin(), arguments.end());
  std::vector<std::string> environment_texts = environment_with(options.environment);
  const std::vector<char*> argv = pointers(argument_texts);
  const std::vector<char*> envp = pointers(environment_texts);
  std::optional<Terminal> terminal;
  if (options.stderr_is_terminal) terminal.emplace();
  const std::string err = terminal ? terminal->path : dir.file("err");

  posix_spawn_file_actions_t actions;
  posix_spawn_file_actions_init(&actions);
  constexpr int kWrite = O_WRONLY | O_CREAT | O_NOCTTY;
  posix_spawn_file_actions_addopen(&actions, STDIN_FILENO, "/dev/null", O_RDONLY, 0);
  posix_spawn_file_actions_addopen(&actions, STDOUT_FILENO, dir.file("out").c_str(), kWrite, 0600);
  posix_spawn_file_actions_addopen(&actions, STDERR_FILENO, err.c_str(), kWrite, 0600);
  pid_t child = 0;
  const int error = ::posix_spawn(&child, DSV4_CLI, &actions, nullptr, argv.data(), envp.data());
  posix_spawn_file_actions_destroy(&actions);
  if (error != 0) {
    errno = error;
    give_up(DSV4_CLI);
  }
  Finished out;
  if (terminal) out.err = terminal->read_all();
  out.exit_code = wait_for(child, options.timeout_seconds);
  out.out = read_file(dir.file("out"));
  if (!terminal) out.err = read_file(dir.file("err"));
  return out;
}

TEST(Program, StreamsAndExitCodesAreSeenApart) {
  const Finished version = run_program({"--version"});
  EXPECT_EQ(version.exit_code, 0);
  EXPECT_FALSE(version.out.empty());
  EXPECT_EQ(version.err, "");
  const Finished nothing = run_program({});
  EXPECT_EQ(nothing.exit_code, 2);
  EXPECT_EQ(nothing.out, "");
  EXPECT_FALSE(nothing.err.empty());
}

}  // namespace dsv4::testing
