// The alphabet in which byte-level vocabularies spell bytes: one printable character per byte, so
// that any byte string is a line of text. Printable Latin-1 bytes stand for themselves; the others,
// in order, for U+0100, U+0101, ... (a space is U+0120).
#pragma once
#include <array>
#include <optional>
#include <string>
#include <string_view>

namespace dsv4 {

/// UTF-8 spelling of every byte.
const std::array<std::string, 256>& byte_spellings();

/// Bytes that `spelling` stands for; nullopt when a character is outside the alphabet. `spelling`
/// is UTF-8.
std::optional<std::string> bytes_of_spelling(std::string_view spelling);

}  // namespace dsv4
