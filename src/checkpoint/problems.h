// Collects what is wrong with a file, so that one error tells all of it.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "core/fail.h"

namespace dsv4 {

class Problems {
 public:
  /// Only the first `max_listed` are printed; the others are counted.
  explicit Problems(size_t max_listed) : max_listed_(max_listed) {}

  template <typename... Parts>
  void add(ErrorCode code, const Parts&... parts) {
    // What cannot be fixed by providing something outweighs what is merely absent.
    if (count_ == 0 || severity(code) > severity(code_)) code_ = code;
    if (count_++ < max_listed_) list_.push_back(concat(parts...));
  }
  bool empty() const { return count_ == 0; }

  /// @throws Error with the gravest code, `heading` and the list; returns when there is none.
  void raise(const std::string& heading) const {
    if (empty()) return;
    std::string text;
    for (const std::string& problem : list_) text += "\n  - " + problem;
    if (count_ > list_.size()) text += concat("\n  - and ", count_ - list_.size(), " more");
    fail(code_, heading, text);
  }

 private:
  static int severity(ErrorCode code) {
    switch (code) {
      case ErrorCode::kNotFound:
        return 0;
      case ErrorCode::kUnsupported:
        return 1;
      default:
        return 2;
    }
  }
  size_t max_listed_;
  size_t count_ = 0;
  ErrorCode code_ = ErrorCode::kDataCorrupt;
  std::vector<std::string> list_;
};

}  // namespace dsv4
