#include "backends/amd/isa/decode.h"

#include <cstdlib>
#include <memory>

#include "backends/amd/isa/lanes.h"
#include "backends/amd/isa/opcode.h"
#include "core/fail.h"

namespace dsv4::amd::isa {
namespace {

void not_executable(Wave&, const Instruction&) {
  throw Fault("");  // Machine adds Program::problem
}

// "name:value"; empty when the modifier has another name.
std::string_view value_of(std::string_view modifier, std::string_view name) {
  if (!modifier.starts_with(name) || modifier.size() <= name.size() || modifier[name.size()] != ':')
    return {};
  return modifier.substr(name.size() + 1);
}
int64_t to_number(std::string_view text) {
  return std::strtoll(std::string(text).c_str(), nullptr, 0);
}
// "[1,0,3,2]".
std::vector<int> to_list(std::string_view text) {
  std::vector<int> out;
  for (size_t i = 0; i < text.size(); ++i) {
    if (text[i] >= '0' && text[i] <= '9') {
      out.push_back(static_cast<int>(to_number(text.substr(i))));
      while (i < text.size() && text[i] >= '0' && text[i] <= '9') ++i;
    }
  }
  return out;
}
uint8_t to_bits(std::string_view text) {
  uint8_t bits = 0;
  const std::vector<int> list = to_list(text);
  for (size_t i = 0; i < list.size() && i < 8; ++i)
    bits |= static_cast<uint8_t>((list[i] & 1) << i);
  return bits;
}

Select to_select(std::string_view text) {
  constexpr const char* kNames[] = {"BYTE_0", "BYTE_1", "BYTE_2", "BYTE_3",
                                    "WORD_0", "WORD_1", "DWORD"};
  for (int i = 0; i < 7; ++i) {
    if (text == kNames[i]) return static_cast<Select>(i);
  }
  throw Fault(concat("selection ", text, " is not understood"));
}

// The lane that `lane` reads; -1 when the pattern gives none. False when it is not a lane pattern.
bool dpp_source(std::string_view modifier, int lane, int& source) {
  const int row = lane & ~15, in_row = lane & 15;
  const auto within_row = [&](int index) { source = index >= 0 && index < 16 ? row + index : -1; };
  const auto count = [&](std::string_view name) {
    return static_cast<int>(to_number(value_of(modifier, name)));
  };
  const auto is = [&](std::string_view name) { return !value_of(modifier, name).empty(); };
  if (is("quad_perm")) {
    const std::vector<int> order = to_list(value_of(modifier, "quad_perm"));
    if (order.size() != 4) throw Fault("quad_perm needs four lanes");
    source = (lane & ~3) + (order[static_cast<size_t>(lane & 3)] & 3);
  } else if (is("row_shl")) {
    within_row(in_row + count("row_shl"));
  } else if (is("row_shr")) {
    within_row(in_row - count("row_shr"));
  } else if (is("row_ror")) {
    within_row((in_row - count("row_ror")) & 15);
  } else if (is("row_newbcast")) {
    within_row(count("row_newbcast"));
  } else if (modifier == "row_mirror") {
    within_row(15 - in_row);
  } else if (modifier == "row_half_mirror") {
    source = (lane & ~7) + 7 - (lane & 7);
  } else if (is("wave_shl")) {
    source = lane < 63 ? lane + 1 : -1;
  } else if (is("wave_rol")) {
    source = (lane + 1) & 63;
  } else if (is("wave_shr")) {
    source = lane - 1;
  } else if (is("wave_ror")) {
    source = (lane - 1) & 63;
  } else if (modifier == "row_bcast:15") {
    source = row - 1;
  } else if (modifier == "row_bcast:31") {
    source = lane < 32 ? -1 : 31;
  } else {
    return false;
  }
  return true;
}

// Decodes one instruction; throws Fault with the reason when it is not modelled.
class Decoder {
 public:
  Decoder(const ListedInstruction& listed, Arch arch) : listed_(listed), table_(opcodes(arch)) {}

  Instruction decode(std::vector<std::unique_ptr<Dpp>>& dpp) {
    find_opcode();
    Instruction out;
    out.execute = opcode_->execute;
    if (opcode_->any_operands) return out;
    read_operands(out);
    for (const std::string& modifier : listed_.modifiers) apply_modifier(modifier, out);
    if (uses_dpp_) {
      out.has_dpp = true;
      dpp.push_back(std::make_unique<Dpp>(dpp_));
      out.dpp = dpp.back().get();
    }
    if (listed_.mnemonic == "ds_swizzle_b32") read_swizzle(out);
    return out;
  }

 private:
  bool has_modifier(std::string_view name) const {
    for (const std::string& modifier : listed_.modifiers) {
      if (modifier == name) return true;
    }
    return false;
  }
  const Opcode* find(const std::string& name) const {
    const auto it = table_.find(name);
    return it == table_.end() ? nullptr : &it->second;
  }
  static size_t num_operands(const Opcode& opcode) {
    return opcode.dst.size() + opcode.src.size() - (opcode.dst_is_source ? 1 : 0);
  }

  void find_opcode() {
    opcode_ = find(listed_.mnemonic);
    for (const char* variant : {"clamp", "lds"}) {
      if (!has_modifier(variant)) continue;
      if (const Opcode* found = find(listed_.mnemonic + " " + variant); found != nullptr) {
        opcode_ = found;
        consumed_ = variant;
      }
    }
    if (opcode_ == nullptr) throw Fault("instruction is not modelled");
    if (opcode_->any_operands) return;
    if (const Opcode* found = find(listed_.mnemonic + " rtn");
        found != nullptr && listed_.operands.size() == num_operands(*found)) {
      opcode_ = found;
      returns_ = true;
    }
    if (listed_.operands.size() != num_operands(*opcode_)) {
      throw Fault(concat("instruction has ", listed_.operands.size(), " operands, expected ",
                         num_operands(*opcode_)));
    }
  }

  Operand operand(size_t position, OperandType type) const {
    const Operand out = parse_operand(listed_.operands[position], type);
    const bool allowed = (opcode_->modifiers & kSourceSigns) != 0;
    if (!allowed && (out.negate || out.absolute))
      throw Fault("signs of this instruction are not modelled");
    if (out.sign_extend && (opcode_->modifiers & kSdwa) == 0)
      throw Fault("sext is not modelled here");
    return out;
  }

  void read_operands(Instruction& out) {
    size_t position = 0;
    Operand* const destinations[] = {&out.dst, &out.dst2};
    for (size_t k = 0; k < opcode_->dst.size(); ++k) {
      *destinations[k] = operand(position++, opcode_->dst[k]);
      if (destinations[k]->kind != OperandKind::kVector &&
          destinations[k]->kind != OperandKind::kScalar) {
        throw Fault("destination is not a register");
      }
    }
    const size_t num_text_sources = opcode_->src.size() - (opcode_->dst_is_source ? 1 : 0);
    num_text_sources_ = num_text_sources;
    for (size_t k = 0; k < num_text_sources; ++k) out.src[k] = operand(position++, opcode_->src[k]);
    if (opcode_->dst_is_source) out.src[num_text_sources] = out.dst;
    out.num_src = static_cast<uint8_t>(opcode_->src.size());
    out.returns = returns_;
    if ((opcode_->modifiers & kMixedSel) != 0) out.op_sel_hi = 0;
    extend_short_constants(out);
  }

  // The constants of SOPK instructions have 16 bits.
  void extend_short_constants(Instruction& out) const {
    const std::string& name = listed_.mnemonic;
    const bool compare = name.starts_with("s_cmpk_");
    if (!compare && name != "s_movk_i32" && name != "s_cmovk_i32" && name != "s_addk_i32" &&
        name != "s_mulk_i32") {
      return;
    }
    uint64_t& value = out.src[compare ? 1 : 0].value;
    value = compare && name.ends_with("_u32")
                ? value & 0xffff
                : static_cast<uint32_t>(static_cast<int32_t>(static_cast<int16_t>(value)));
  }

  void read_swizzle(Instruction& out) const {
    if (listed_.words.empty()) {
      out.table = static_cast<uint32_t>(out.offset) & 0xffff;
    } else {
      out.table = listed_.words[0] & 0xffff;
    }
    out.offset = 0;
  }

  void require(Modifier flag, const std::string& modifier) const {
    if ((opcode_->modifiers & flag) == 0)
      throw Fault(concat("modifier ", modifier, " is not modelled here"));
  }

  void apply_modifier(const std::string& modifier, Instruction& out) {
    if (modifier == consumed_) return;
    if (apply_dpp(modifier) || apply_selection(modifier, out) || apply_memory(modifier, out))
      return;
    const auto value = [&](std::string_view name) { return value_of(modifier, name); };
    if (modifier == "clamp") {
      require(kClamp, modifier);
      out.clamp = true;
    } else if (modifier == "mul:2" || modifier == "mul:4" || modifier == "div:2") {
      require(kOutputScale, modifier);
      out.output_scale = modifier == "mul:2" ? 2.0f : modifier == "mul:4" ? 4.0f : 0.5f;
    } else if (!value("cbsz").empty() || !value("abid").empty() || !value("blgp").empty()) {
      require(kMatrix, modifier);
      const auto number = static_cast<uint8_t>(to_number(modifier.substr(5)));
      (modifier[0] == 'c' ? out.cbsz : modifier[0] == 'a' ? out.abid : out.blgp) = number;
    } else if (!value("bitop3").empty()) {
      require(kBitop, modifier);
      out.table = static_cast<uint32_t>(to_number(value("bitop3")));
    } else {
      throw Fault(concat("modifier ", modifier, " is not modelled"));
    }
  }

  bool apply_dpp(const std::string& modifier) {
    int source = 0;
    if (dpp_source(modifier, 0, source)) {
      require(kDppRead, modifier);
      uses_dpp_ = true;
      for (int lane = 0; lane < kWaveSize; ++lane) {
        dpp_source(modifier, lane, source);
        dpp_.source[static_cast<size_t>(lane)] = static_cast<int8_t>(source);
      }
      return true;
    }
    if (const auto text = value_of(modifier, "row_mask"); !text.empty()) {
      const int64_t mask = to_number(text);
      for (int row = 0; row < 4; ++row) {
        if ((mask >> row & 1) == 0) dpp_.writes &= ~(uint64_t{0xffff} << (16 * row));
      }
      return true;
    }
    if (const auto text = value_of(modifier, "bank_mask"); !text.empty()) {
      const int64_t mask = to_number(text);
      for (int lane = 0; lane < kWaveSize; ++lane) {
        if ((mask >> (lane / 4 % 4) & 1) == 0) dpp_.writes &= ~(uint64_t{1} << lane);
      }
      return true;
    }
    if (modifier.starts_with("bound_ctrl:")) {  // printed only when it is set
      dpp_.zero_when_invalid = true;
      return true;
    }
    return false;
  }

  bool apply_selection(const std::string& modifier, Instruction& out) {
    const auto value = [&](std::string_view name) { return value_of(modifier, name); };
    for (int k = 0; k < 2; ++k) {
      const auto text = value(k == 0 ? "src0_sel" : "src1_sel");
      if (text.empty()) continue;
      require(kSdwa, modifier);
      out.src[static_cast<size_t>(k)].select = to_select(text);
      return true;
    }
    if (const auto text = value("dst_sel"); !text.empty()) {
      require(kSdwa, modifier);
      out.dst_select = to_select(text);
      return true;
    }
    if (const auto text = value("dst_unused"); !text.empty()) {
      out.dst_unused = text == "UNUSED_PRESERVE" ? Unused::kPreserve
                       : text == "UNUSED_SEXT"   ? Unused::kSignExtend
                                                 : Unused::kPad;
      return true;
    }
    if (const auto text = value("op_sel"); !text.empty()) {
      const uint8_t bits = to_bits(text);
      if ((opcode_->modifiers & kPackedSel) != 0) {
        out.op_sel = bits;
        return true;
      }
      require(kOpSel, modifier);
      for (size_t k = 0; k < num_text_sources_; ++k) {
        if ((bits >> k & 1) == 0) continue;
        if (opcode_->src[k] != OperandType::kF16 && opcode_->src[k] != OperandType::kB16) {
          throw Fault("op_sel of a source that is not 16 bits wide");
        }
        out.src[k].select = Select::kWord1;
      }
      if ((bits >> num_text_sources_ & 1) != 0) {
        out.dst_select = Select::kWord1;
        out.dst_unused = Unused::kPreserve;
      }
      return true;
    }
    const std::pair<const char*, uint8_t*> masks[] = {
        {"op_sel_hi", &out.op_sel_hi}, {"neg_lo", &out.neg_lo}, {"neg_hi", &out.neg_hi}};
    for (const auto& [name, bits] : masks) {
      if (const auto text = value(name); !text.empty()) {
        require(kPackedSel, modifier);
        *bits = to_bits(text);
        return true;
      }
    }
    return false;
  }

  bool apply_memory(const std::string& modifier, Instruction& out) const {
    const auto value = [&](std::string_view name) { return value_of(modifier, name); };
    const bool is_offset = modifier.starts_with("offset");
    const bool is_hint = modifier == "sc0" || modifier == "sc1" || modifier == "nt" ||
                         modifier == "glc" || modifier == "slc";
    if (!is_offset && !is_hint && modifier != "offen" && modifier != "idxen") return false;
    require(kMemory, modifier);
    if (const auto text = value("offset"); !text.empty())
      out.offset = static_cast<int32_t>(to_number(text));
    if (const auto text = value("offset0"); !text.empty())
      out.offset = static_cast<int32_t>(to_number(text));
    if (const auto text = value("offset1"); !text.empty())
      out.offset1 = static_cast<int32_t>(to_number(text));
    if (modifier == "offen") out.offen = true;
    if (modifier == "idxen") out.idxen = true;
    // A buffer atomic returns the old value when sc0 is set.
    if (modifier == "sc0" || modifier == "glc") out.returns = true;
    return true;
  }

  const ListedInstruction& listed_;
  const OpcodeTable& table_;
  const Opcode* opcode_ = nullptr;
  std::string consumed_;  // a modifier that is part of the opcode's name
  size_t num_text_sources_ = 0;
  bool returns_ = false;
  bool uses_dpp_ = false;
  Dpp dpp_;
};

bool is_branch(const std::string& mnemonic) {
  return mnemonic == "s_branch" || mnemonic.starts_with("s_cbranch_");
}

OpcodeTable build_table(Arch arch) {
  OpcodeTable table;
  add_vector_integer(table);
  add_vector_float(table);
  add_vector_half(table);
  add_vector_convert(table);
  add_vector_convert_fp8(table, arch);
  add_vector_compare(table);
  add_vector_packed(table);
  add_vector_lanes(table);
  add_scalar(table);
  add_scalar_control(table);
  add_global_memory(table);
  add_local_memory(table);
  add_matrix(table, arch);
  return table;
}

}  // namespace

const OpcodeTable& opcodes(Arch arch) {
  static const OpcodeTable gfx942 = build_table(Arch::kGfx942);
  static const OpcodeTable gfx950 = build_table(Arch::kGfx950);
  return arch == Arch::kGfx942 ? gfx942 : gfx950;
}

Program::Program(std::string_view listing, Arch arch)
    : arch_(arch), listed_(parse_listing(listing)) {
  code_.reserve(listed_.size());
  for (size_t k = 0; k < listed_.size(); ++k) {
    const auto index = static_cast<int32_t>(k);
    Instruction instruction;
    try {
      instruction = Decoder(listed_[k], arch).decode(dpp_);
    } catch (const Fault& fault) {
      problems_[index] = fault.what();
      instruction.execute = not_executable;
    }
    instruction.index = index;
    instruction.address = listed_[k].address;
    instruction.next_address = listed_[k].address + listed_[k].size_bytes();
    at_[instruction.address] = index;
    code_.push_back(instruction);
  }
  for (Instruction& i : code_) {
    if (!is_branch(listed(i).mnemonic) || problems_.contains(i.index)) continue;
    const int64_t words = static_cast<int16_t>(i.src[0].value);
    i.target = find(i.next_address + static_cast<uint64_t>(4 * words));
    if (i.target < 0) {
      problems_[i.index] = "branch to an address without an instruction";
      i.execute = not_executable;
    }
  }
}

int32_t Program::find(uint64_t address) const {
  const auto it = at_.find(address);
  return it == at_.end() ? -1 : it->second;
}

const std::string& Program::problem(int32_t index) const {
  static const std::string none;
  const auto it = problems_.find(index);
  return it == problems_.end() ? none : it->second;
}

std::vector<std::string> Program::problems(uint64_t begin, uint64_t end) const {
  std::vector<std::string> out;
  for (const Instruction& i : code_) {
    if (i.address < begin || i.address >= end || problem(i.index).empty()) continue;
    out.push_back(concat(listed(i).text, ": ", problem(i.index)));
  }
  return out;
}

}  // namespace dsv4::amd::isa
