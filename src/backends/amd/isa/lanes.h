// Turns a function of lane values into the execution of a vector instruction: `lane_op([](float a,
// float b) { return a + b; })` reads operands of the lambda's types with their modifiers, computes
// 64 lanes, and writes those that are enabled.
#pragma once
#include <bit>
#include <cmath>
#include <type_traits>
#include <utility>

#include "backends/amd/isa/half.h"
#include "backends/amd/isa/opcode.h"
#include "backends/amd/isa/wave.h"

namespace dsv4::amd::isa {

/// Result of 16 bits that leaves the upper half of the register as it was (others clear it).
struct LowHalf {
  uint16_t bits;
};
/// A value and one bit per lane: carries, and the flag of v_div_scale.
template <typename T>
struct WithMask {
  T value;
  bool mask;
};

template <typename T>
struct LaneType;
template <>
struct LaneType<float> {
  static constexpr OperandType kType = OperandType::kF32;
};
template <>
struct LaneType<uint32_t> {
  static constexpr OperandType kType = OperandType::kB32;
};
template <>
struct LaneType<int32_t> {
  static constexpr OperandType kType = OperandType::kB32;
};
template <>
struct LaneType<Half> {
  static constexpr OperandType kType = OperandType::kF16;
};
template <>
struct LaneType<uint16_t> {
  static constexpr OperandType kType = OperandType::kB16;
};
template <>
struct LaneType<int16_t> {
  static constexpr OperandType kType = OperandType::kB16;
};
template <>
struct LaneType<LowHalf> {
  static constexpr OperandType kType = OperandType::kB16;
};
template <>
struct LaneType<uint64_t> {
  static constexpr OperandType kType = OperandType::kU64;
};
template <>
struct LaneType<int64_t> {
  static constexpr OperandType kType = OperandType::kI64;
};
template <>
struct LaneType<double> {
  static constexpr OperandType kType = OperandType::kF64;
};
template <>
struct LaneType<bool> {
  static constexpr OperandType kType = OperandType::kMask;
};

template <typename T>
inline constexpr bool kIsFloating =
    std::is_same_v<T, float> || std::is_same_v<T, double> || std::is_same_v<T, Half>;
template <typename T>
inline constexpr int kRegsOf = sizeof(T) == 8 ? 2 : 1;

/// `base` plus M0 while s_set_gpr_idx_on covers this position (0-2: sources, 3: destination).
inline int indexed_register(const Wave& wave, int base, int position) {
  if ((wave.gpr_index_mode >> position & 1) == 0) return base;
  return base + static_cast<int>(wave.scalar[Wave::kM0] & 0xff);
}

/// Selection and signs of a source (not in the hot path).
void modify_source(uint32_t* row, const Operand& operand, uint32_t sign_bit);
/// Reads a row through a data-parallel primitive.
void permute_row(uint32_t* out, const uint32_t* row, const Dpp& dpp, uint64_t exec);
/// Lanes that an instruction writes: enabled, and for DPP with a valid source.
uint64_t written_lanes(const Wave& wave, const Instruction& instruction);
/// Writes a result into a byte or word of a register.
void write_selected(uint32_t* row, const uint32_t* values, uint64_t lanes,
                    const Instruction& instruction);

/// The values of one source operand.
template <typename T>
class Source {
 public:
  Source(const Wave& wave, const Instruction& instruction, int index) {
    const Operand& operand = instruction.src[static_cast<size_t>(index)];
    for (int sub = 0; sub < kRegsOf<T>; ++sub) {
      const uint32_t* row;
      if (operand.kind == OperandKind::kVector && wave.gpr_index_mode != 0) {
        row = wave.vector[indexed_register(wave, operand.reg, index) + sub];
      } else {
        row = operand_row(wave, operand, sub, scratch_[sub]);
      }
      if (instruction.has_dpp && index == 0) {
        permute_row(scratch_[sub], row, *instruction.dpp, wave.exec());
        row = scratch_[sub];
      }
      rows_[sub] = row;
    }
    if (!operand.plain()) {
      // Signs sit in the last register of a value.
      constexpr int kLast = kRegsOf<T> - 1;
      if (rows_[kLast] != scratch_[kLast]) {
        std::memcpy(scratch_[kLast], rows_[kLast], sizeof(Row));
        rows_[kLast] = scratch_[kLast];
      }
      modify_source(scratch_[kLast], operand, std::is_same_v<T, Half> ? 0x8000u : 0x80000000u);
    }
  }
  Source(const Source&) = delete;
  Source& operator=(const Source&) = delete;

  T operator[](int lane) const {
    if constexpr (sizeof(T) == 8) {
      return std::bit_cast<T>(rows_[0][lane] | static_cast<uint64_t>(rows_[1][lane]) << 32);
    } else if constexpr (sizeof(T) == 2) {
      return std::bit_cast<T>(static_cast<uint16_t>(rows_[0][lane]));
    } else {
      return std::bit_cast<T>(rows_[0][lane]);
    }
  }

 private:
  const uint32_t* rows_[kRegsOf<T>];
  alignas(64) Row scratch_[kRegsOf<T>];
};

template <>
class Source<bool> {
 public:
  Source(const Wave& wave, const Instruction& instruction, int index)
      : mask_(scalar_value64(wave, instruction.src[static_cast<size_t>(index)])) {}
  bool operator[](int lane) const { return (mask_ >> lane & 1) != 0; }

 private:
  uint64_t mask_;
};

template <typename T>
inline T scale_and_clamp(T value, const Instruction& instruction) {
  if constexpr (std::is_same_v<T, Half>) {
    return f32_to_half(scale_and_clamp(half_to_f32(value), instruction));
  } else {
    value *= static_cast<T>(instruction.output_scale);
    if (!instruction.clamp) return value;
    return value > T{0} ? (value < T{1} ? value : T{1}) : T{0};  // NaN becomes 0
  }
}

/// Collects the results of one instruction.
template <typename R>
class Result {
 public:
  void set(int lane, R value) {
    if constexpr (sizeof(R) == 8) {
      const uint64_t bits = std::bit_cast<uint64_t>(value);
      values_[0][lane] = static_cast<uint32_t>(bits);
      values_[kRegsOf<R> - 1][lane] = static_cast<uint32_t>(bits >> 32);
    } else if constexpr (sizeof(R) == 2) {
      values_[0][lane] = std::bit_cast<uint16_t>(value);
    } else {
      values_[0][lane] = std::bit_cast<uint32_t>(value);
    }
  }
  R get(int lane) const {
    if constexpr (sizeof(R) == 8) {
      return std::bit_cast<R>(values_[0][lane] |
                              static_cast<uint64_t>(values_[kRegsOf<R> - 1][lane]) << 32);
    } else if constexpr (sizeof(R) == 2) {
      return std::bit_cast<R>(static_cast<uint16_t>(values_[0][lane]));
    } else {
      return std::bit_cast<R>(values_[0][lane]);
    }
  }
  void write(Wave& wave, const Instruction& instruction) {
    if constexpr (kIsFloating<R>) {
      if (instruction.clamp || instruction.output_scale != 1) {
        for (int lane = 0; lane < kWaveSize; ++lane) {
          set(lane, scale_and_clamp(get(lane), instruction));
        }
      }
    }
    const uint64_t lanes = written_lanes(wave, instruction);
    const int reg = indexed_register(wave, instruction.dst.reg, 3);
    if constexpr (kRegsOf<R> == 1) {
      if (instruction.dst_select != Select::kDword) {
        write_selected(wave.vector[reg], values_[0], lanes, instruction);
        return;
      }
      if constexpr (std::is_same_v<R, LowHalf>) {
        const uint32_t* old = wave.vector[reg];
        for (int lane = 0; lane < kWaveSize; ++lane) values_[0][lane] |= old[lane] & 0xffff0000u;
      }
    }
    for (int sub = 0; sub < kRegsOf<R>; ++sub)
      write_row(wave.vector[reg + sub], values_[sub], lanes);
  }

 private:
  alignas(64) Row values_[kRegsOf<R>];
};

template <typename R>
struct IsWithMask : std::false_type {};
template <typename T>
struct IsWithMask<WithMask<T>> : std::true_type {
  using Value = T;
};

template <typename F, typename R, typename... A>
inline void compute_lanes(Wave& wave, const Instruction& instruction, const Source<A>&... sources) {
  const F f{};
  if constexpr (std::is_same_v<R, bool>) {
    uint64_t mask = 0;
    for (int lane = 0; lane < kWaveSize; ++lane) {
      mask |= static_cast<uint64_t>(f(sources[lane]...)) << lane;
    }
    wave.set_scalar64(instruction.dst.reg, mask & wave.exec());
  } else if constexpr (IsWithMask<R>::value) {
    Result<typename IsWithMask<R>::Value> result;
    uint64_t mask = 0;
    for (int lane = 0; lane < kWaveSize; ++lane) {
      const R r = f(sources[lane]...);
      result.set(lane, r.value);
      mask |= static_cast<uint64_t>(r.mask) << lane;
    }
    result.write(wave, instruction);
    wave.set_scalar64(instruction.dst2.reg, mask & wave.exec());
  } else {
    Result<R> result;
    for (int lane = 0; lane < kWaveSize; ++lane) result.set(lane, f(sources[lane]...));
    result.write(wave, instruction);
  }
}

template <typename F, typename R, typename... A>
struct LaneFunction {
  template <size_t... I>
  static void run(Wave& wave, const Instruction& instruction, std::index_sequence<I...>) {
    compute_lanes<F, R, A...>(wave, instruction,
                              Source<A>(wave, instruction, static_cast<int>(I))...);
  }
  static void execute(Wave& wave, const Instruction& instruction) {
    run(wave, instruction, std::index_sequence_for<A...>{});
  }
  static Opcode opcode() {
    Opcode out;
    out.execute = execute;
    if constexpr (IsWithMask<R>::value) {
      out.dst = {LaneType<typename IsWithMask<R>::Value>::kType, OperandType::kMask};
    } else {
      out.dst = {LaneType<R>::kType};
    }
    out.src = {LaneType<A>::kType...};
    // v_cndmask and v_mov take signs although their values are raw bits.
    out.modifiers = kSdwa | kDppRead | kSourceSigns;
    if constexpr (kIsFloating<R>) out.modifiers |= kClamp | kOutputScale;
    if constexpr ((... || (sizeof(A) == 2)) || sizeof(R) == 2) out.modifiers |= kOpSel;
    return out;
  }
};

template <typename F, typename R, typename... A>
LaneFunction<F, R, A...> lane_function(R (F::*)(A...) const);

/// The opcode of a lambda without captures.
template <typename F>
Opcode lane_op(F) {
  return decltype(lane_function<F>(&F::operator()))::opcode();
}
/// As lane_op, for instructions whose destination is also the last source.
template <typename F>
Opcode accumulating_lane_op(F f) {
  Opcode out = lane_op(f);
  out.dst_is_source = true;
  return out;
}

}  // namespace dsv4::amd::isa
