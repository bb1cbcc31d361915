#include "backends/amd/isa/listing.h"

#include <cctype>
#include <charconv>

#include "core/fail.h"

namespace dsv4::amd::isa {
namespace {

std::string_view trim(std::string_view text) {
  const size_t begin = text.find_first_not_of(" \t\r");
  if (begin == std::string_view::npos) return {};
  return text.substr(begin, text.find_last_not_of(" \t\r") - begin + 1);
}

// Splits at `separator`, but not inside [...], (...) or "...".
std::vector<std::string> split_outside_brackets(std::string_view text, char separator) {
  std::vector<std::string> out;
  std::string part;
  int depth = 0;
  bool quoted = false;
  for (const char c : text) {
    if (c == '"') quoted = !quoted;
    if (c == '[' || c == '(') ++depth;
    if (c == ']' || c == ')') --depth;
    if (c == separator && depth == 0 && !quoted) {
      out.emplace_back(trim(part));
      part.clear();
    } else {
      part += c;
    }
  }
  out.emplace_back(trim(part));
  return out;
}

// "000000002A00: C00200C0 00000020 <name>": the address and the words after it.
void parse_comment(std::string_view comment, ListedInstruction& out) {
  const size_t colon = comment.find(':');
  if (colon == std::string_view::npos) return;
  const std::string_view address = trim(comment.substr(0, colon));
  if (std::from_chars(address.data(), address.data() + address.size(), out.address, 16).ec !=
      std::errc()) {
    return;
  }
  for (const std::string& word : split_outside_brackets(trim(comment.substr(colon + 1)), ' ')) {
    uint32_t value = 0;
    const auto [end, error] = std::from_chars(word.data(), word.data() + word.size(), value, 16);
    if (word.size() != 8 || error != std::errc() || end != word.data() + 8) break;
    out.words.push_back(value);
  }
}

void split_encoding(ListedInstruction& out) {
  for (const std::string_view suffix : {"_e64_dpp", "_e32", "_e64", "_sdwa", "_dpp"}) {
    if (out.mnemonic.size() > suffix.size() && out.mnemonic.ends_with(suffix)) {
      out.encoding = suffix.substr(1);
      out.mnemonic.erase(out.mnemonic.size() - suffix.size());
      return;
    }
  }
}

}  // namespace

std::vector<ListedInstruction> parse_listing(std::string_view text) {
  std::vector<ListedInstruction> out;
  uint64_t next_address = 0;
  while (!text.empty()) {
    const size_t line_end = text.find('\n');
    const std::string_view line = text.substr(0, line_end);
    text = line_end == std::string_view::npos ? std::string_view{} : text.substr(line_end + 1);

    // Instructions are indented, titles and labels are not.
    if (line.empty() || (line[0] != '\t' && line[0] != ' ')) continue;
    const size_t comment = line.find("//");
    const std::string_view code = trim(line.substr(0, comment));
    if (code.empty() || !std::isalpha(static_cast<unsigned char>(code[0]))) continue;

    ListedInstruction instruction;
    instruction.text = code;
    instruction.address = next_address;
    if (comment != std::string_view::npos) parse_comment(line.substr(comment + 2), instruction);
    const size_t space = code.find_first_of(" \t");
    instruction.mnemonic = code.substr(0, space);
    split_encoding(instruction);
    if (space != std::string_view::npos) {
      // Operands are separated by commas; modifiers follow the last operand after spaces.
      std::vector<std::string> parts = split_outside_brackets(trim(code.substr(space)), ',');
      const std::vector<std::string> last = split_outside_brackets(parts.back(), ' ');
      parts.back() = last.front();
      instruction.operands = std::move(parts);
      for (size_t i = 1; i < last.size(); ++i) {
        if (!last[i].empty()) instruction.modifiers.push_back(last[i]);
      }
    }
    next_address = instruction.address + instruction.size_bytes();
    out.push_back(std::move(instruction));
  }
  return out;
}

}  // namespace dsv4::amd::isa
