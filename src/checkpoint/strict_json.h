// JSON from files that nobody vouches for: bounded, without duplicate keys, with errors that name
// the file. Private to the .cc files of readers.
#pragma once
#include <string>
#include <string_view>

#include <nlohmann/json_fwd.hpp>

namespace dsv4 {

/// Deepest nesting that parse_strict_json accepts; no file of a model needs more than 4.
constexpr int kMaxJsonDepth = 64;

/// Parses UTF-8 JSON. @throws Error kDataCorrupt naming `origin`: not JSON, a key given twice in
/// one object, nesting deeper than kMaxJsonDepth.
nlohmann::json parse_strict_json(std::string_view text, const std::string& origin);

/// `text` for use in a message: control characters replaced, cut after `max_chars`.
std::string printable(std::string_view text, size_t max_chars = 160);
/// A JSON value as it stands in the file, shortened for messages.
std::string excerpt(const nlohmann::json& value);

}  // namespace dsv4
