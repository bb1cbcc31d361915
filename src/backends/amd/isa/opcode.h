// The table of instructions: how operands are read, and what executes them.
#pragma once
#include <string>
#include <unordered_map>
#include <vector>

#include "backends/amd/isa/arch.h"
#include "backends/amd/isa/instruction.h"

namespace dsv4::amd::isa {

/// Modifiers that an instruction's execution honours; the decoder refuses others.
enum Modifier : uint32_t {
  kSourceSigns = 1 << 0,  ///< -x, |x|
  kSdwa = 1 << 1,         ///< sub-dword selection
  kDppRead = 1 << 2,
  kClamp = 1 << 3,
  kOutputScale = 1 << 4,
  kOpSel = 1 << 5,      ///< halves of 16-bit operands, applied like SDWA's selection
  kPackedSel = 1 << 6,  ///< op_sel, op_sel_hi, neg_lo, neg_hi read by the instruction itself
  kMemory = 1 << 7,     ///< offset and cache hints
  kMatrix = 1 << 8,     ///< cbsz, abid, blgp
  kBitop = 1 << 9,
  kMixedSel = 1 << 10,  ///< op_sel_hi is zero unless given
};

struct Opcode {
  Execute execute = nullptr;
  std::vector<OperandType> dst;  ///< in the order of the text
  std::vector<OperandType> src;
  uint32_t modifiers = 0;
  bool dst_is_source = false;  ///< the destination is read too, as the last source
  bool any_operands = false;   ///< does nothing: operands and modifiers are not looked at
};

using OpcodeTable = std::unordered_map<std::string, Opcode>;

// One per file of instructions. Names are without encoding suffix; "name clamp" is the form of an
// integer instruction with clamp, "name rtn" that of an atomic that returns the old value.
void add_vector_integer(OpcodeTable& table);
void add_vector_float(OpcodeTable& table);
void add_vector_half(OpcodeTable& table);
void add_vector_convert(OpcodeTable& table);
void add_vector_convert_fp8(OpcodeTable& table, Arch arch);
void add_vector_compare(OpcodeTable& table);
void add_vector_packed(OpcodeTable& table);
void add_vector_lanes(OpcodeTable& table);
void add_scalar(OpcodeTable& table);
void add_scalar_control(OpcodeTable& table);
void add_global_memory(OpcodeTable& table);
void add_local_memory(OpcodeTable& table);
void add_matrix(OpcodeTable& table, Arch arch);

/// All instructions of a chip.
const OpcodeTable& opcodes(Arch arch);

}  // namespace dsv4::amd::isa
