// A decoded instruction: what the interpreter's inner loop reads.
#pragma once
#include <array>
#include <cstdint>
#include <vector>

namespace dsv4::amd::isa {

class Wave;
struct Instruction;
using Execute = void (*)(Wave&, const Instruction&);

enum class OperandKind : uint8_t {
  kNone,    ///< absent, or `off`
  kVector,  ///< reg is a row of the vector register file; AGPRs start at kFirstAccRegister
  kScalar,  ///< reg is the hardware's number: s0-s101, vcc 106, m0 124, exec 126
  kConstant,
  kScc,
};

/// What an instruction makes of an operand; decides its registers and how a constant is encoded.
enum class OperandType : uint8_t {
  kB16,  ///< integer of 16 bits, or raw
  kF16,
  kB32,
  kF32,
  kU64,       ///< literals are extended with zeros
  kI64,       ///< literals are extended with their sign
  kF64,       ///< literals are the upper half
  kMask,      ///< one bit per lane: a pair of scalar registers
  kPkF32,     ///< two floats in two registers
  kRegs,      ///< any number of registers
  kOffset,    ///< scalar base of a memory instruction, or `off`
  kImmediate  ///< a number of the instruction itself
};

/// Part of a 32-bit register that SDWA or op_sel picks.
enum class Select : uint8_t { kByte0, kByte1, kByte2, kByte3, kWord0, kWord1, kDword };

struct Operand {
  OperandKind kind = OperandKind::kNone;
  uint8_t num_regs = 0;
  uint16_t reg = 0;
  Select select = Select::kDword;
  bool negate = false;
  bool absolute = false;
  bool sign_extend = false;
  uint64_t value = 0;  ///< of a constant, encoded for the operand's type

  bool plain() const { return select == Select::kDword && !negate && !absolute && !sign_extend; }
};

/// Where SDWA puts a result, and what becomes of the rest of the register.
enum class Unused : uint8_t { kPad, kSignExtend, kPreserve };

/// Data-parallel primitive: the first source is read from other lanes.
struct Dpp {
  std::array<int8_t, 64> source;   ///< lane read by each lane; -1: outside the row
  uint64_t writes = ~uint64_t{0};  ///< lanes that row_mask and bank_mask enable
  bool zero_when_invalid = false;  ///< bound_ctrl
};

struct Instruction {
  static constexpr int kMaxSources = 5;

  Execute execute = nullptr;
  Operand dst, dst2;
  std::array<Operand, kMaxSources> src;
  uint8_t num_src = 0;
  bool clamp = false;
  bool has_dpp = false;
  bool global_from_lds = false;
  Select dst_select = Select::kDword;
  Unused dst_unused = Unused::kPad;
  float output_scale = 1;  ///< mul:2, mul:4, div:2
  // One bit per source; bit 3 of op_sel (bit 2 with two sources) is the destination.
  uint8_t op_sel = 0, op_sel_hi = 0xff, neg_lo = 0, neg_hi = 0;
  uint8_t cbsz = 0, abid = 0, blgp = 0;
  bool offen = false, idxen = false, lds = false, returns = false;
  int32_t offset = 0, offset1 = 0;
  int32_t target = -1;  ///< index of a branch's destination
  uint32_t table = 0;   ///< bitop3 and the like: a number of the instruction
  uint64_t address = 0, next_address = 0;
  int32_t index = 0;  ///< of the listing's line
  const Dpp* dpp = nullptr;
};

}  // namespace dsv4::amd::isa
