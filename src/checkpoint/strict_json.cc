#include "checkpoint/strict_json.h"

#include <set>
#include <vector>

#include <nlohmann/json.hpp>

#include "core/fail.h"

namespace dsv4 {

using nlohmann::json;

json parse_strict_json(std::string_view text, const std::string& origin) {
  // The library keeps the last of two equal keys; which one an author meant is not ours to guess.
  std::vector<std::set<std::string>> keys;
  const auto watch = [&](int depth, json::parse_event_t event, json& parsed) {
    switch (event) {
      case json::parse_event_t::object_start:
      case json::parse_event_t::array_start:
        if (depth >= kMaxJsonDepth) {
          fail(ErrorCode::kDataCorrupt, origin, ": JSON is nested deeper than ", kMaxJsonDepth,
               " levels");
        }
        keys.emplace_back();
        break;
      case json::parse_event_t::object_end:
      case json::parse_event_t::array_end:
        keys.pop_back();
        break;
      case json::parse_event_t::key: {
        const auto& name = parsed.get_ref<const std::string&>();
        if (!keys.back().insert(name).second) {
          fail(ErrorCode::kDataCorrupt, origin, ": key '", printable(name),
               "' is given twice, expected once");
        }
        break;
      }
      case json::parse_event_t::value:
        break;
    }
    return true;
  };
  try {
    return json::parse(text.begin(), text.end(), watch);
  } catch (const json::exception& error) {
    fail(ErrorCode::kDataCorrupt, origin, ": not valid JSON: ", printable(error.what()));
  }
}

std::string printable(std::string_view text, size_t max_chars) {
  const bool cut = text.size() > max_chars;
  std::string out(text.substr(0, max_chars));
  // A cut inside a UTF-8 sequence would leave half a character.
  while (cut && !out.empty() && (static_cast<unsigned char>(out.back()) & 0x80) != 0) {
    out.pop_back();
  }
  for (char& c : out) {
    if (static_cast<unsigned char>(c) < 0x20 || c == 0x7f) c = '?';
  }
  return cut ? out + "..." : out;
}

std::string excerpt(const json& value) {
  if (value.is_array() && value.size() > 16) {
    return concat("an array of ", value.size(), " entries");
  }
  return printable(value.dump(-1, ' ', false, json::error_handler_t::replace), 60);
}

}  // namespace dsv4
