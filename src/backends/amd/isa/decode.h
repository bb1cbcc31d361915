// Turns a listing into instructions that can be executed.
#pragma once
#include <memory>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "backends/amd/isa/arch.h"
#include "backends/amd/isa/instruction.h"
#include "backends/amd/isa/listing.h"

namespace dsv4::amd::isa {

/// The code of a code object. Decoding never fails: what cannot be executed carries its reason, and
/// executing it throws that.
class Program {
 public:
  Program(std::string_view listing, Arch arch);
  Program(const Program&) = delete;
  Program& operator=(const Program&) = delete;

  Arch arch() const { return arch_; }
  const std::vector<Instruction>& code() const { return code_; }
  const ListedInstruction& listed(const Instruction& i) const {
    return listed_[static_cast<size_t>(i.index)];
  }
  /// Index of the instruction at an address of the listing, or -1.
  int32_t find(uint64_t address) const;
  /// Why instruction `index` cannot be executed; empty when it can.
  const std::string& problem(int32_t index) const;
  /// One line for every instruction of [begin, end) that cannot be executed.
  std::vector<std::string> problems(uint64_t begin, uint64_t end) const;

 private:
  Arch arch_;
  std::vector<ListedInstruction> listed_;
  std::vector<Instruction> code_;
  std::vector<std::unique_ptr<Dpp>> dpp_;
  std::unordered_map<uint64_t, int32_t> at_;
  std::unordered_map<int32_t, std::string> problems_;
};

/// An operand's text as `type`: "v[2:3]", "-|v0|", "sext(v1)", "vcc", "0x10", "-0.5", "off". Throws
/// Fault when it is none.
Operand parse_operand(const std::string& text, OperandType type);

}  // namespace dsv4::amd::isa
