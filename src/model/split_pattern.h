// A regular expression that cuts text into its matches and what lies between them: one stage of the
// tokenizer's pre-tokenisation. Hides PCRE2.
#pragma once
#include <memory>
#include <string>
#include <string_view>

namespace dsv4 {

/// Immutable and thread-safe; each thread brings its own Scratch.
class SplitPattern {
 public:
  /// Registers of one match; not shared between threads.
  class Scratch {
   public:
    Scratch();
    ~Scratch();
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;

   private:
    friend class SplitPattern;
    struct Impl;
    std::unique_ptr<Impl> impl_;
  };

  /// Classes such as \s and \d are those of Unicode. `where` names the pattern in messages.
  /// @throws Error kDataCorrupt: it does not compile (reason and offset); kUnsupported: it uses a
  /// construct whose meaning differs between regular expression libraries.
  SplitPattern(const std::string& pattern, const std::string& where);
  ~SplitPattern();
  SplitPattern(SplitPattern&&) noexcept;
  SplitPattern& operator=(SplitPattern&&) noexcept;

  /// Calls emit(piece) for every match and every gap of `text` (valid UTF-8), in order; pieces are
  /// not empty and joined give `text`. A match of length 0 cuts where it lies.
  /// @throws Error kInvalidArgument when matching exceeds its limits of steps or memory.
  template <typename Emit>
  void split(std::string_view text, Scratch& scratch, Emit&& emit) const {
    size_t begin = 0;  // of the piece not emitted yet
    size_t from = 0;
    Match match;
    while (from <= text.size() && find(text, from, scratch, match)) {
      if (match.begin > begin) emit(text.substr(begin, match.begin - begin));
      if (match.end > match.begin) emit(text.substr(match.begin, match.end - match.begin));
      begin = match.end;
      from = match.end > match.begin ? match.end : next_character(text, match.end);
    }
    if (begin < text.size()) emit(text.substr(begin));
  }

 private:
  struct Impl;
  struct Match {
    size_t begin, end;
  };
  bool find(std::string_view text, size_t from, Scratch& scratch, Match& match) const;
  /// Offset after the character at `at`; past the end when there is none.
  static size_t next_character(std::string_view text, size_t at);

  std::unique_ptr<Impl> impl_;
};

}  // namespace dsv4
