// Text of operands: registers, constants and their modifiers.
#include <cctype>
#include <charconv>
#include <cmath>
#include <cstdlib>
#include <optional>
#include <unordered_map>

#include "backends/amd/isa/decode.h"
#include "backends/amd/isa/half.h"
#include "backends/amd/isa/wave.h"
#include "core/fail.h"

namespace dsv4::amd::isa {
namespace {

struct NamedRegister {
  uint16_t reg;
  uint8_t num_regs;
};
const std::unordered_map<std::string_view, NamedRegister>& named_registers() {
  static const std::unordered_map<std::string_view, NamedRegister> table = {
      {"vcc", {106, 2}},
      {"vcc_lo", {106, 1}},
      {"vcc_hi", {107, 1}},
      {"exec", {126, 2}},
      {"exec_lo", {126, 1}},
      {"exec_hi", {127, 1}},
      {"flat_scratch", {102, 2}},
      {"flat_scratch_lo", {102, 1}},
      {"flat_scratch_hi", {103, 1}},
      {"xnack_mask", {104, 2}},
      {"m0", {124, 1}}};
  return table;
}

std::optional<int> parse_int(std::string_view text) {
  int value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size()) return std::nullopt;
  return value;
}

// "v7", "a[0:3]", "s[2:3]", "ttmp4", "vcc"; false when the text is not a register.
bool parse_register(std::string_view text, Operand& out) {
  if (const auto it = named_registers().find(text); it != named_registers().end()) {
    out.kind = OperandKind::kScalar;
    out.reg = it->second.reg;
    out.num_regs = it->second.num_regs;
    return true;
  }
  size_t letters = 0;
  while (letters < text.size() && std::isalpha(static_cast<unsigned char>(text[letters])))
    ++letters;
  const std::string_view file = text.substr(0, letters), index = text.substr(letters);
  if (index.empty() || (file != "v" && file != "a" && file != "s" && file != "ttmp")) return false;
  int first = 0, last = 0;
  if (index.front() == '[' && index.back() == ']') {
    const std::string_view range = index.substr(1, index.size() - 2);
    const size_t colon = range.find(':');
    const auto begin = parse_int(range.substr(0, colon));
    const auto end = colon == std::string_view::npos ? begin : parse_int(range.substr(colon + 1));
    if (!begin || !end) return false;
    first = *begin, last = *end;
  } else {
    const auto value = parse_int(index);
    if (!value) return false;
    first = last = *value;
  }
  const bool is_vector = file == "v" || file == "a";
  const int limit = is_vector ? 256 : file == "s" ? 106 : 16;
  if (first < 0 || last < first || last >= limit)
    throw Fault(concat("register ", text, " does not exist"));
  out.kind = is_vector ? OperandKind::kVector : OperandKind::kScalar;
  out.reg = static_cast<uint16_t>(first + (file == "a"      ? kFirstAccRegister
                                           : file == "ttmp" ? 112
                                                            : 0));
  out.num_regs = static_cast<uint8_t>(last - first + 1);
  return true;
}

uint64_t encode_float(const std::string& text, OperandType type) {
  const double value = std::strtod(text.c_str(), nullptr);
  switch (type) {
    case OperandType::kB16:
    case OperandType::kF16:
      return f64_to_half(value).bits;
    case OperandType::kF64:
    case OperandType::kU64:
    case OperandType::kI64:
      return std::bit_cast<uint64_t>(value);
    default:
      return std::bit_cast<uint32_t>(static_cast<float>(value));
  }
}

// A literal is printed in hexadecimal and has 32 bits; an inline constant is printed in decimal.
uint64_t encode_integer(const std::string& text, OperandType type) {
  const bool literal = text.find('x') != std::string::npos;
  char* end = nullptr;
  const bool negative = text[0] == '-';
  const uint64_t magnitude = std::strtoull(text.c_str() + (negative ? 1 : 0), &end, 0);
  if (*end != '\0') throw Fault(concat("operand ", text, " is not understood"));
  const uint64_t value = negative ? 0 - magnitude : magnitude;
  switch (type) {
    case OperandType::kB16:
    case OperandType::kF16:
      return value & 0xffff;
    case OperandType::kF64:
      return literal && magnitude <= 0xffffffffu ? magnitude << 32 : value;
    case OperandType::kI64:
      return literal ? static_cast<uint64_t>(static_cast<int64_t>(static_cast<int32_t>(value)))
                     : value;
    case OperandType::kU64:
    case OperandType::kMask:
      return value;
    case OperandType::kImmediate:
      return value;
    default:
      return value & 0xffffffffu;
  }
}

// gpr_idx(SRC0,DST): a bit for each name.
uint64_t parse_index_mode(const std::string& text) {
  uint64_t mode = 0;
  constexpr const char* kNames[] = {"SRC0", "SRC1", "SRC2", "DST"};
  for (int bit = 0; bit < 4; ++bit) {
    if (text.find(kNames[bit]) != std::string::npos) mode |= uint64_t{1} << bit;
  }
  return mode;
}

int expected_registers(OperandType type) {
  switch (type) {
    case OperandType::kB16:
    case OperandType::kF16:
    case OperandType::kB32:
    case OperandType::kF32:
      return 1;
    case OperandType::kU64:
    case OperandType::kI64:
    case OperandType::kF64:
    case OperandType::kMask:
    case OperandType::kPkF32:
      return 2;
    default:
      return 0;
  }
}

}  // namespace

Operand parse_operand(const std::string& text, OperandType type) {
  Operand out;
  std::string_view rest = text;
  if (rest == "off") {
    if (type != OperandType::kOffset) throw Fault("'off' where a register is needed");
    return out;
  }
  if (rest.starts_with("gpr_idx(")) {
    out.kind = OperandKind::kConstant;
    out.value = parse_index_mode(text);
    return out;
  }
  const auto strip = [&](std::string_view open, std::string_view close) {
    if (!rest.starts_with(open) || !rest.ends_with(close) ||
        rest.size() < open.size() + close.size()) {
      return false;
    }
    rest = rest.substr(open.size(), rest.size() - open.size() - close.size());
    return true;
  };
  // A minus in front of a number belongs to the number.
  if (rest.size() > 1 && rest[0] == '-' && !std::isdigit(static_cast<unsigned char>(rest[1]))) {
    out.negate = true;
    rest.remove_prefix(1);
  } else if (strip("neg(", ")")) {
    out.negate = true;
  }
  out.absolute = strip("|", "|");
  out.sign_extend = strip("sext(", ")");
  strip("lit(", ")");  // a literal whose value would also have been an inline constant
  if (rest.empty()) throw Fault(concat("operand '", text, "' is not understood"));

  if (rest == "src_scc" || rest == "scc") {
    out.kind = OperandKind::kScc;
    return out;
  }
  if (rest == "src_shared_base" || rest == "src_private_base") {
    if (type != OperandType::kU64)
      throw Fault(concat(rest, " is read as a pair of registers only"));
    out.kind = OperandKind::kConstant;
    out.value = rest == "src_shared_base" ? kSharedAperture : kPrivateAperture;
    return out;
  }
  if (parse_register(rest, out)) {
    const int expected = expected_registers(type);
    if (expected != 0 && out.num_regs != expected) {
      throw Fault(
          concat("operand ", text, " has ", int{out.num_regs}, " registers, expected ", expected));
    }
    return out;
  }
  if (!std::isdigit(static_cast<unsigned char>(rest[0])) && rest[0] != '-') {
    throw Fault(concat("operand ", text, " is not understood"));
  }
  out.kind = OperandKind::kConstant;
  const bool is_float =
      rest.find('x') == std::string_view::npos && rest.find('.') != std::string_view::npos;
  out.value =
      is_float ? encode_float(std::string(rest), type) : encode_integer(std::string(rest), type);
  return out;
}

}  // namespace dsv4::amd::isa
