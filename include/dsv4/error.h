// The one exception type of dsv4. Every public function reports bad input through it.
#pragma once
#include <stdexcept>
#include <string>

namespace dsv4 {

/// What the caller should do about an error. Values are stable: the C ABI returns them as status
/// codes.
enum class ErrorCode : int {
  kInvalidArgument = 1,  ///< an argument, shape, option or length is wrong: correct the call
  kNotFound = 2,         ///< a file, tensor or device does not exist: provide it
  kUnsupported = 3,  ///< valid, but nothing here can do it; the message lists every unmet condition
  kOutOfMemory = 4,  ///< memory, cache blocks or slots ran out: release some, or ask for less
  kDeviceError = 5,  ///< the device or its driver failed
  kDataCorrupt = 6,  ///< a file contradicts itself or its description: get a good copy
  kInternal = 7,     ///< a fault of dsv4 itself: report it
};

/// Name of a code as printed in messages, e.g. "invalid argument".
const char* error_code_name(ErrorCode code);

/// Carries a code and one message that says what, expected, given and where.
class Error : public std::runtime_error {
 public:
  Error(ErrorCode code, const std::string& message) : std::runtime_error(message), code_(code) {}
  ErrorCode code() const { return code_; }

 private:
  ErrorCode code_;
};

}  // namespace dsv4
