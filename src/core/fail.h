// Making errors: fail() for input faults, DSV4_CHECK for our own mistakes.
#pragma once
#include <sstream>
#include <string>

#include "dsv4/error.h"

namespace dsv4 {

/// Joins its arguments as a stream would print them.
template <typename... Parts>
std::string concat(const Parts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  return std::move(out).str();
}

/// Throws Error(code, concat(parts...)). Say what, expected, given, where.
template <typename... Parts>
[[noreturn]] void fail(ErrorCode code, const Parts&... parts) {
  throw Error(code, concat(parts...));
}

[[noreturn]] void check_failed(const char* condition, const char* file, int line);

}  // namespace dsv4

/// Our own invariants, always on; for cold paths. Never for user input.
#define DSV4_CHECK(condition)                                               \
  do {                                                                      \
    if (!(condition)) ::dsv4::check_failed(#condition, __FILE__, __LINE__); \
  } while (false)

#ifdef NDEBUG
#define DSV4_DCHECK(condition) ((void)0)
#else
#define DSV4_DCHECK(condition) DSV4_CHECK(condition)
#endif
