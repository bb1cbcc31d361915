// State of one wave of 64 lanes and of its workgroup.
#pragma once
#include <bit>
#include <cstdint>
#include <cstring>

#include "backends/amd/isa/arch.h"
#include "backends/amd/isa/instruction.h"
#include "backends/amd/isa/memory.h"

namespace dsv4::amd::isa {

/// One vector register: a value per lane.
using Row = uint32_t[kWaveSize];

/// Registers hold this before their first write: a NaN, and a bad address.
inline constexpr uint32_t kVectorPoison = 0x7fc0dead;
inline constexpr uint32_t kScalarPoison = 0xdeadbeef;

enum class WaveState : uint8_t { kRunning, kAtBarrier, kDone };

/// What the waves of a workgroup share.
struct Workgroup {
  Arch arch = Arch::kGfx942;
  const GlobalMemory* global = nullptr;
  /// Where code starts: what s_getpc adds to addresses of the listing.
  uint64_t image_base = 0;
  /// Index of the instruction at an address of the listing; -1 when there is none.
  int32_t (*find_code)(const void* program, uint64_t address) = nullptr;
  const void* program = nullptr;
  LocalMemory lds;
};

class Wave {
 public:
  static constexpr int kVcc = 106, kM0 = 124, kExec = 126;

  explicit Wave(Row* vector_registers) : vector(vector_registers) {}

  uint64_t scalar64(int reg) const {
    return scalar[reg] | static_cast<uint64_t>(scalar[reg + 1]) << 32;
  }
  void set_scalar64(int reg, uint64_t value) {
    scalar[reg] = static_cast<uint32_t>(value);
    scalar[reg + 1] = static_cast<uint32_t>(value >> 32);
  }
  uint64_t exec() const { return scalar64(kExec); }
  void set_exec(uint64_t value) { set_scalar64(kExec, value); }
  uint64_t vcc() const { return scalar64(kVcc); }

  Row* const vector;  ///< kMaxVectorRegs rows
  alignas(64) uint32_t scalar[128];
  bool scc = false;
  WaveState state = WaveState::kRunning;
  int32_t next = 0;  ///< index of the next instruction
  int wave_idx = 0;
  uint64_t num_instructions = 0;
  Workgroup* group = nullptr;
  const Region* last_region = nullptr;  ///< cache of the last global access
  // s_set_gpr_idx_on: bits src0, src1, src2, dst; the offset is M0[7:0].
  uint8_t gpr_index_mode = 0;
};

/// Value of a scalar operand or constant; `sub` picks a register of a group.
inline uint32_t scalar_value(const Wave& wave, const Operand& operand, int sub) {
  switch (operand.kind) {
    case OperandKind::kScalar:
      return wave.scalar[operand.reg + sub];
    case OperandKind::kConstant:
      return static_cast<uint32_t>(sub == 0 ? operand.value : operand.value >> 32);
    case OperandKind::kScc:
      return wave.scc ? 1 : 0;
    default:
      throw Fault("a vector register where a scalar is needed");
  }
}
inline uint64_t scalar_value64(const Wave& wave, const Operand& operand) {
  if (operand.kind == OperandKind::kConstant) return operand.value;
  return scalar_value(wave, operand, 0) | static_cast<uint64_t>(scalar_value(wave, operand, 1))
                                              << 32;
}

/// The 64 values of a register of an operand; a scalar or constant is spread into `scratch`.
inline const uint32_t* operand_row(const Wave& wave, const Operand& operand, int sub,
                                   uint32_t* scratch) {
  if (operand.kind == OperandKind::kVector) return wave.vector[operand.reg + sub];
  const uint32_t value = scalar_value(wave, operand, sub);
  for (int lane = 0; lane < kWaveSize; ++lane) scratch[lane] = value;
  return scratch;
}

/// Writes `values` to the lanes of `lanes`.
inline void write_row(uint32_t* row, const uint32_t* values, uint64_t lanes) {
  if (lanes == ~uint64_t{0}) {
    std::memcpy(row, values, sizeof(Row));
    return;
  }
  for (int half = 0; half < 2; ++half) {
    const uint32_t bits = static_cast<uint32_t>(lanes >> (32 * half));
    for (int i = 0; i < 32; ++i) {
      const int lane = 32 * half + i;
      row[lane] = (bits & (1u << i)) != 0 ? values[lane] : row[lane];
    }
  }
}

/// Calls f(lane) for every lane of a mask, ascending.
template <typename F>
inline void for_lanes(uint64_t lanes, F&& f) {
  for (; lanes != 0; lanes &= lanes - 1) f(std::countr_zero(lanes));
}

}  // namespace dsv4::amd::isa
