#include "model/byte_alphabet.h"

#include "model/utf8.h"

namespace dsv4 {
namespace {

constexpr bool stands_for_itself(int byte) {
  return (byte >= 0x21 && byte <= 0x7e) || (byte >= 0xa1 && byte <= 0xac) || byte >= 0xae;
}

// 256 bytes of which 188 stand for themselves: the other 68 end at U+0143.
constexpr int kNumCodePoints = 0x144;

struct Alphabet {
  std::array<std::string, 256> spellings;
  std::array<int, kNumCodePoints> byte_of_code_point;

  Alphabet() {
    byte_of_code_point.fill(-1);
    uint32_t next = 0x100;
    for (int byte = 0; byte < 256; ++byte) {
      const uint32_t code_point = stands_for_itself(byte) ? static_cast<uint32_t>(byte) : next++;
      append_code_point(code_point, spellings[static_cast<size_t>(byte)]);
      byte_of_code_point[code_point] = byte;
    }
  }
};

const Alphabet& alphabet() {
  static const Alphabet instance;
  return instance;
}

}  // namespace

const std::array<std::string, 256>& byte_spellings() {
  return alphabet().spellings;
}

std::optional<std::string> bytes_of_spelling(std::string_view spelling) {
  std::string out;
  for (size_t at = 0; at < spelling.size();) {
    const auto lead = static_cast<uint8_t>(spelling[at]);
    uint32_t code_point = lead;
    size_t length = 1;
    if (lead >= 0x80) {
      // The whole alphabet lies below U+0800: one or two bytes a character.
      if (lead < 0xc2 || lead > 0xdf || at + 1 == spelling.size()) return std::nullopt;
      code_point = (lead & 0x1fu) << 6 | (static_cast<uint8_t>(spelling[at + 1]) & 0x3fu);
      length = 2;
    }
    if (code_point >= kNumCodePoints) return std::nullopt;
    const int byte = alphabet().byte_of_code_point[code_point];
    if (byte < 0) return std::nullopt;
    out += static_cast<char>(byte);
    at += length;
  }
  return out;
}

}  // namespace dsv4
