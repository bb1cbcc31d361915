#include "model/split_pattern.h"

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

#include <algorithm>

#include "core/fail.h"

namespace dsv4 {
namespace {

// Bounds for patterns and texts that nobody has checked. Real patterns have a few hundred bytes and
// backtrack at most once per character, so a limit proportional to the text never meets them.
constexpr size_t kMaxPatternBytes = 1 << 16;
constexpr uint32_t kMatchStepsBase = 100000;
constexpr uint32_t kMatchStepsPerByte = 64;
constexpr uint32_t kMatchHeapKib = 64 * 1024;

std::string message_of(int code) {
  PCRE2_UCHAR text[256] = {};
  pcre2_get_error_message(code, text, sizeof text);
  return reinterpret_cast<const char*>(text);
}

// tokenizer.json is written for Oniguruma. \s differs in one character (PCRE2 counts U+180E, which
// lost White_Space in Unicode 6.3), so the property is named instead. \h is another class
// altogether.
std::string translate(const std::string& pattern, const std::string& where) {
  std::string out;
  for (size_t i = 0; i < pattern.size(); ++i) {
    if (pattern[i] != '\\' || i + 1 == pattern.size()) {
      out += pattern[i];
      continue;
    }
    const char escape = pattern[++i];
    if (escape == 's') {
      out += "\\p{White_Space}";
    } else if (escape == 'S') {
      out += "\\P{White_Space}";
    } else if (escape == 'h' || escape == 'H' || escape == 'Q' || escape == 'E' || escape == 'K') {
      fail(ErrorCode::kUnsupported, where, ": \\", std::string(1, escape), " at byte ", i - 1,
           " is not supported: its meaning differs between regular expression libraries");
    } else {
      out += '\\';
      out += escape;
    }
  }
  return out;
}

}  // namespace

struct SplitPattern::Scratch::Impl {
  pcre2_match_data* match_data = nullptr;
  pcre2_match_context* context = nullptr;
  ~Impl() {
    pcre2_match_data_free(match_data);
    pcre2_match_context_free(context);
  }
};

SplitPattern::Scratch::Scratch() : impl_(std::make_unique<Impl>()) {
  // One pair of offsets: only the match itself is read, never groups.
  impl_->match_data = pcre2_match_data_create(1, nullptr);
  impl_->context = pcre2_match_context_create(nullptr);
  if (impl_->match_data == nullptr || impl_->context == nullptr) {
    fail(ErrorCode::kOutOfMemory, "no memory for the registers of a split pattern");
  }
  pcre2_set_heap_limit(impl_->context, kMatchHeapKib);
}

SplitPattern::Scratch::~Scratch() = default;

struct SplitPattern::Impl {
  pcre2_code* code = nullptr;
  std::string where;
  ~Impl() { pcre2_code_free(code); }
};

SplitPattern::SplitPattern(const std::string& pattern, const std::string& where)
    : impl_(std::make_unique<Impl>()) {
  if (pattern.size() > kMaxPatternBytes) {
    fail(ErrorCode::kDataCorrupt, where, ": pattern of ", pattern.size(),
         " bytes, expected at most ", kMaxPatternBytes);
  }
  impl_->where = where;
  const std::string translated = translate(pattern, where);
  int error = 0;
  PCRE2_SIZE offset = 0;
  impl_->code =
      pcre2_compile(reinterpret_cast<PCRE2_SPTR>(translated.data()), translated.size(),
                    PCRE2_UTF | PCRE2_UCP | PCRE2_NEVER_BACKSLASH_C, &error, &offset, nullptr);
  if (impl_->code == nullptr) {
    fail(ErrorCode::kDataCorrupt, where, ": the pattern does not compile: ", message_of(error),
         " (at byte ", offset, " of ", translated, ")");
  }
  // Without a JIT for this machine the interpreter does the same work, slower.
  pcre2_jit_compile(impl_->code, PCRE2_JIT_COMPLETE);
}

SplitPattern::~SplitPattern() = default;
SplitPattern::SplitPattern(SplitPattern&&) noexcept = default;
SplitPattern& SplitPattern::operator=(SplitPattern&&) noexcept = default;

bool SplitPattern::find(std::string_view text, size_t from, Scratch& scratch, Match& match) const {
  Scratch::Impl& registers = *scratch.impl_;
  const auto steps =
      std::min<uint64_t>(kMatchStepsBase + uint64_t{kMatchStepsPerByte} * text.size(), UINT32_MAX);
  pcre2_set_match_limit(registers.context, static_cast<uint32_t>(steps));
  const auto run = [&](uint32_t options) {
    return pcre2_match(impl_->code, reinterpret_cast<PCRE2_SPTR>(text.data()), text.size(), from,
                       options | PCRE2_NO_UTF_CHECK, registers.match_data, registers.context);
  };
  int result = run(0);
  // The JIT has a small fixed stack; the interpreter takes from the heap, up to the limit above.
  if (result == PCRE2_ERROR_JIT_STACKLIMIT) result = run(PCRE2_NO_JIT);
  if (result == PCRE2_ERROR_NOMATCH) return false;
  if (result < 0) {
    fail(ErrorCode::kInvalidArgument, impl_->where, ": matching gave up after byte ", from, " of ",
         text.size(), ": ", message_of(result));
  }
  const PCRE2_SIZE* offsets = pcre2_get_ovector_pointer(registers.match_data);
  match = {offsets[0], offsets[1]};
  if (match.begin < from || match.end < match.begin || match.end > text.size()) {
    fail(ErrorCode::kUnsupported, impl_->where, ": a match lies before the place searched from");
  }
  return true;
}

size_t SplitPattern::next_character(std::string_view text, size_t at) {
  ++at;
  while (at < text.size() && (static_cast<uint8_t>(text[at]) & 0xc0) == 0x80) ++at;
  return at;
}

}  // namespace dsv4
