// Vector instructions that move values between lanes, and indexed registers. ds_bpermute and
// ds_swizzle are in local_memory.cc; DPP is a modifier (lanes.h).
#include <bit>

#include "backends/amd/isa/lanes.h"

namespace dsv4::amd::isa {
namespace {

// Signs make no sense here and the result is not a vector, so these bypass lane_op.
void read_lane(Wave& wave, const Instruction& i) {
  const uint32_t lane = scalar_value(wave, i.src[1], 0) & (kWaveSize - 1);
  alignas(64) Row scratch;
  wave.scalar[i.dst.reg] = operand_row(wave, i.src[0], 0, scratch)[lane];
}

void read_first_lane(Wave& wave, const Instruction& i) {
  const int lane = wave.exec() == 0 ? 0 : std::countr_zero(wave.exec());
  alignas(64) Row scratch;
  wave.scalar[i.dst.reg] = operand_row(wave, i.src[0], 0, scratch)[lane];
}

// Ignores EXEC.
void write_lane(Wave& wave, const Instruction& i) {
  const uint32_t lane = scalar_value(wave, i.src[1], 0) & (kWaveSize - 1);
  wave.vector[i.dst.reg][lane] = scalar_value(wave, i.src[0], 0);
}

void swap(Wave& wave, const Instruction& i) {
  uint32_t* const a = wave.vector[i.dst.reg];
  uint32_t* const b = wave.vector[i.dst2.reg];
  for_lanes(wave.exec(), [&](int lane) { std::swap(a[lane], b[lane]); });
}

// Exchanges the odd groups of `kGroup` lanes of the first register with the even groups of the
// second.
template <int kGroup>
void permute_swap(Wave& wave, const Instruction& i) {
  if (wave.exec() != ~uint64_t{0}) throw Fault("lane swap with lanes switched off is not modelled");
  uint32_t* const a = wave.vector[i.dst.reg];
  uint32_t* const b = wave.vector[i.dst2.reg];
  for (int lane = 0; lane < kWaveSize; ++lane) {
    if ((lane / kGroup) % 2 == 1) std::swap(a[lane], b[lane - kGroup]);
  }
}

// s_set_gpr_idx_on s, gpr_idx(SRC0,DST): M0 is the offset, the second operand says where it
// applies.
void set_index_on(Wave& wave, const Instruction& i) {
  wave.scalar[Wave::kM0] =
      (wave.scalar[Wave::kM0] & ~0xffu) | (scalar_value(wave, i.src[0], 0) & 0xff);
  wave.gpr_index_mode = static_cast<uint8_t>(i.src[1].value);
}
void set_index_off(Wave& wave, const Instruction&) {
  wave.gpr_index_mode = 0;
}
void set_index(Wave& wave, const Instruction& i) {
  wave.scalar[Wave::kM0] =
      (wave.scalar[Wave::kM0] & ~0xffu) | (scalar_value(wave, i.src[0], 0) & 0xff);
}

Opcode make(Execute execute, std::vector<OperandType> dst, std::vector<OperandType> src) {
  Opcode out;
  out.execute = execute;
  out.dst = std::move(dst);
  out.src = std::move(src);
  return out;
}

}  // namespace

void add_vector_lanes(OpcodeTable& t) {
  using enum OperandType;
  t["v_readlane_b32"] = make(read_lane, {kB32}, {kB32, kB32});
  t["v_readfirstlane_b32"] = make(read_first_lane, {kB32}, {kB32});
  t["v_writelane_b32"] = make(write_lane, {kB32}, {kB32, kB32});
  t["v_swap_b32"] = make(swap, {kB32, kB32}, {});
  t["v_permlane16_swap_b32"] = make(permute_swap<16>, {kB32, kB32}, {});
  t["v_permlane32_swap_b32"] = make(permute_swap<32>, {kB32, kB32}, {});
  t["s_set_gpr_idx_on"] = make(set_index_on, {}, {kB32, kImmediate});
  t["s_set_gpr_idx_off"] = make(set_index_off, {}, {});
  t["s_set_gpr_idx_idx"] = make(set_index, {}, {kB32});
}

}  // namespace dsv4::amd::isa
