// UTF-8 as Unicode defines it: shortest forms only, no surrogates, nothing above U+10FFFF.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

namespace dsv4 {

/// The first sequence of a text.
struct Utf8Sequence {
  enum Kind : uint8_t {
    kValid,
    kInvalid,     ///< `length` bytes are a maximal part that no continuation makes valid
    kIncomplete,  ///< the text ends inside a sequence that is valid so far
  };
  size_t length;
  Kind kind;
};

/// `text` is not empty.
Utf8Sequence first_utf8_sequence(std::string_view text);

/// Offset of the first byte that does not belong to valid UTF-8; text.size() when all is valid.
size_t find_invalid_utf8(std::string_view text);

/// Appends `text` to `out` with invalid parts replaced by U+FFFD. Stops before an incomplete
/// sequence at the end, unless `last`, which makes it invalid. Returns the number of bytes used.
size_t append_valid_utf8(std::string_view text, bool last, std::string& out);

/// Appends the encoding of `code_point`, a Unicode scalar value.
void append_code_point(uint32_t code_point, std::string& out);

}  // namespace dsv4
