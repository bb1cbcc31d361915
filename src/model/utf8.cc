#include "model/utf8.h"

namespace dsv4 {
namespace {

constexpr std::string_view kReplacement = "\xef\xbf\xbd";  // U+FFFD

// Bytes that may follow a lead byte directly; later ones are always 80..bf.
struct Lead {
  int length;
  uint8_t low, high;
};

Lead lead_of(uint8_t byte) {
  if (byte >= 0xc2 && byte <= 0xdf) return {2, 0x80, 0xbf};
  if (byte == 0xe0) return {3, 0xa0, 0xbf};  // below: longer than needed
  if (byte == 0xed) return {3, 0x80, 0x9f};  // above: surrogates
  if (byte >= 0xe1 && byte <= 0xef) return {3, 0x80, 0xbf};
  if (byte == 0xf0) return {4, 0x90, 0xbf};
  if (byte >= 0xf1 && byte <= 0xf3) return {4, 0x80, 0xbf};
  if (byte == 0xf4) return {4, 0x80, 0x8f};  // above: past U+10FFFF
  return {0, 0, 0};
}

}  // namespace

Utf8Sequence first_utf8_sequence(std::string_view text) {
  const auto byte = [&](size_t i) { return static_cast<uint8_t>(text[i]); };
  if (byte(0) < 0x80) return {1, Utf8Sequence::kValid};
  const Lead lead = lead_of(byte(0));
  if (lead.length == 0) return {1, Utf8Sequence::kInvalid};
  for (int i = 1; i < lead.length; ++i) {
    const size_t at = static_cast<size_t>(i);
    if (at == text.size()) return {at, Utf8Sequence::kIncomplete};
    const uint8_t low = i == 1 ? lead.low : 0x80;
    const uint8_t high = i == 1 ? lead.high : 0xbf;
    if (byte(at) < low || byte(at) > high) return {at, Utf8Sequence::kInvalid};
  }
  return {static_cast<size_t>(lead.length), Utf8Sequence::kValid};
}

size_t find_invalid_utf8(std::string_view text) {
  size_t at = 0;
  while (at < text.size()) {
    const Utf8Sequence sequence = first_utf8_sequence(text.substr(at));
    if (sequence.kind != Utf8Sequence::kValid) break;
    at += sequence.length;
  }
  return at;
}

size_t append_valid_utf8(std::string_view text, bool last, std::string& out) {
  size_t at = 0;
  while (at < text.size()) {
    const Utf8Sequence sequence = first_utf8_sequence(text.substr(at));
    if (sequence.kind == Utf8Sequence::kIncomplete && !last) break;
    if (sequence.kind == Utf8Sequence::kValid) {
      out.append(text.substr(at, sequence.length));
    } else {
      out.append(kReplacement);
    }
    at += sequence.length;
  }
  return at;
}

void append_code_point(uint32_t code_point, std::string& out) {
  const auto tail = [&](int shift) {
    out += static_cast<char>(0x80 | ((code_point >> shift) & 0x3f));
  };
  if (code_point < 0x80) {
    out += static_cast<char>(code_point);
  } else if (code_point < 0x800) {
    out += static_cast<char>(0xc0 | (code_point >> 6));
    tail(0);
  } else if (code_point < 0x10000) {
    out += static_cast<char>(0xe0 | (code_point >> 12));
    tail(6);
    tail(0);
  } else {
    out += static_cast<char>(0xf0 | (code_point >> 18));
    tail(12);
    tail(6);
    tail(0);
  }
}

}  // namespace dsv4
