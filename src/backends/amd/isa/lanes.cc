#include "backends/amd/isa/lanes.h"

namespace dsv4::amd::isa {
namespace {

// Offset and mask of a selected part.
struct Part {
  int shift;
  uint32_t mask;
};
Part part_of(Select select) {
  if (select == Select::kDword) return {0, 0xffffffffu};
  const int index = static_cast<int>(select);
  return index < 4 ? Part{8 * index, 0xffu} : Part{16 * (index - 4), 0xffffu};
}

uint32_t sign_extended(uint32_t value, uint32_t mask) {
  const uint32_t sign = (mask >> 1) + 1;
  return ((value & mask) ^ sign) - sign;
}

}  // namespace

void modify_source(uint32_t* row, const Operand& operand, uint32_t sign_bit) {
  const Part part = part_of(operand.select);
  for (int lane = 0; lane < kWaveSize; ++lane) {
    uint32_t value = row[lane] >> part.shift & part.mask;
    if (operand.sign_extend && part.mask != 0xffffffffu) value = sign_extended(value, part.mask);
    if (operand.absolute) value &= ~sign_bit;
    if (operand.negate) value ^= sign_bit;
    row[lane] = value;
  }
}

void permute_row(uint32_t* out, const uint32_t* row, const Dpp& dpp, uint64_t exec) {
  alignas(64) Row values;
  std::memcpy(values, row, sizeof values);
  for (int lane = 0; lane < kWaveSize; ++lane) {
    const int source = dpp.source[static_cast<size_t>(lane)];
    out[lane] = source >= 0 && (exec >> source & 1) != 0 ? values[source] : 0;
  }
}

uint64_t written_lanes(const Wave& wave, const Instruction& instruction) {
  const uint64_t exec = wave.exec();
  if (!instruction.has_dpp) return exec;
  const Dpp& dpp = *instruction.dpp;
  uint64_t lanes = exec & dpp.writes;
  if (dpp.zero_when_invalid) return lanes;
  for (int lane = 0; lane < kWaveSize; ++lane) {
    const int source = dpp.source[static_cast<size_t>(lane)];
    if (source < 0 || (exec >> source & 1) == 0) lanes &= ~(uint64_t{1} << lane);
  }
  return lanes;
}

void write_selected(uint32_t* row, const uint32_t* values, uint64_t lanes,
                    const Instruction& instruction) {
  const Part part = part_of(instruction.dst_select);
  for_lanes(lanes, [&](int lane) {
    const uint32_t value = values[lane] & part.mask;
    switch (instruction.dst_unused) {
      case Unused::kPad:
        row[lane] = value << part.shift;
        break;
      case Unused::kSignExtend:
        row[lane] = sign_extended(value, part.mask) << part.shift;
        break;
      case Unused::kPreserve:
        row[lane] = (row[lane] & ~(part.mask << part.shift)) | value << part.shift;
        break;
    }
  });
}

}  // namespace dsv4::amd::isa
