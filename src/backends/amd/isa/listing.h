// The text that llvm-objdump prints for a code object, split into mnemonics, operands and
// modifiers. Knows the syntax, not the instructions.
#pragma once
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace dsv4::amd::isa {

/// One line of a listing, e.g. `v_add_f32_sdwa v0, -v1, |v2| dst_sel:DWORD src0_sel:WORD_1`.
struct ListedInstruction {
  std::string text;      ///< the line without its comment, for messages
  std::string mnemonic;  ///< encoding suffix removed: "v_add_f32"
  std::string encoding;  ///< that suffix: "e32", "e64", "sdwa", "dpp", "e64_dpp" or empty
  std::vector<std::string> operands;   ///< "v0", "-v1", "|v2|"
  std::vector<std::string> modifiers;  ///< "dst_sel:DWORD", "src0_sel:WORD_1"
  uint64_t address = 0;
  std::vector<uint32_t> words;  ///< the encoding; empty when the listing has none
  uint32_t size_bytes() const {
    return words.empty() ? 4 : 4 * static_cast<uint32_t>(words.size());
  }
};

/// Instructions of a listing, in order. Lines that are not instructions (titles, labels, blanks)
/// are passed over. A line without address gets the one after its predecessor.
std::vector<ListedInstruction> parse_listing(std::string_view text);

}  // namespace dsv4::amd::isa
