// ds_*: local memory, and lane exchanges through its crossbar.
#include <string>

#include "backends/amd/isa/atomic_ops.h"
#include "backends/amd/isa/lanes.h"

namespace dsv4::amd::isa {
namespace {

using u32 = uint32_t;
using u64 = uint64_t;

template <int kRegs>
void read(Wave& wave, const Instruction& i) {
  const Row& address = wave.vector[i.src[0].reg];
  // The destination may overlap the address, so each lane is read before it is written.
  for_lanes(wave.exec(), [&](int lane) {
    u32 values[kRegs];
    std::memcpy(
        values,
        wave.group->lds.read(address[lane] + static_cast<u32>(i.offset), 4 * kRegs, wave.wave_idx),
        4 * kRegs);
    for (int r = 0; r < kRegs; ++r) wave.vector[i.dst.reg + r][lane] = values[r];
  });
}

template <typename T>
void read_narrow(Wave& wave, const Instruction& i) {
  const Row& address = wave.vector[i.src[0].reg];
  for_lanes(wave.exec(), [&](int lane) {
    T value;
    std::memcpy(
        &value,
        wave.group->lds.read(address[lane] + static_cast<u32>(i.offset), sizeof(T), wave.wave_idx),
        sizeof(T));
    wave.vector[i.dst.reg][lane] = static_cast<u32>(static_cast<int32_t>(value));
  });
}

template <int kRegs>
void write(Wave& wave, const Instruction& i) {
  const Row& address = wave.vector[i.src[0].reg];
  for_lanes(wave.exec(), [&](int lane) {
    u32 values[kRegs];
    for (int r = 0; r < kRegs; ++r) values[r] = wave.vector[i.src[1].reg + r][lane];
    std::memcpy(
        wave.group->lds.write(address[lane] + static_cast<u32>(i.offset), 4 * kRegs, wave.wave_idx),
        values, 4 * kRegs);
  });
}

template <typename T, int kShift>
void write_narrow(Wave& wave, const Instruction& i) {
  const Row& address = wave.vector[i.src[0].reg];
  for_lanes(wave.exec(), [&](int lane) {
    const T value = static_cast<T>(wave.vector[i.src[1].reg][lane] >> kShift);
    std::memcpy(
        wave.group->lds.write(address[lane] + static_cast<u32>(i.offset), sizeof(T), wave.wave_idx),
        &value, sizeof(T));
  });
}

// Two places per lane; offsets count elements, in the st64 forms 64 elements.
template <int kRegs, int kStride>
void read2(Wave& wave, const Instruction& i) {
  const Row& address = wave.vector[i.src[0].reg];
  const u32 offsets[2] = {static_cast<u32>(i.offset) * 4 * kRegs * kStride,
                          static_cast<u32>(i.offset1) * 4 * kRegs * kStride};
  for_lanes(wave.exec(), [&](int lane) {
    u32 values[2 * kRegs];
    for (int half = 0; half < 2; ++half) {
      std::memcpy(values + half * kRegs,
                  wave.group->lds.read(address[lane] + offsets[half], 4 * kRegs, wave.wave_idx),
                  4 * kRegs);
    }
    for (int r = 0; r < 2 * kRegs; ++r) wave.vector[i.dst.reg + r][lane] = values[r];
  });
}
template <int kRegs, int kStride>
void write2(Wave& wave, const Instruction& i) {
  const Row& address = wave.vector[i.src[0].reg];
  const u32 offsets[2] = {static_cast<u32>(i.offset) * 4 * kRegs * kStride,
                          static_cast<u32>(i.offset1) * 4 * kRegs * kStride};
  for_lanes(wave.exec(), [&](int lane) {
    for (size_t half = 0; half < 2; ++half) {
      u32 values[kRegs];
      for (int r = 0; r < kRegs; ++r) values[r] = wave.vector[i.src[1 + half].reg + r][lane];
      std::memcpy(wave.group->lds.write(address[lane] + offsets[half], 4 * kRegs, wave.wave_idx),
                  values, 4 * kRegs);
    }
  });
}

template <typename T>
T register_value(const Wave& wave, int reg, int lane) {
  if constexpr (sizeof(T) == 8) {
    return std::bit_cast<T>(wave.vector[reg][lane] | static_cast<u64>(wave.vector[reg + 1][lane])
                                                         << 32);
  } else {
    return std::bit_cast<T>(wave.vector[reg][lane]);
  }
}
template <typename T>
void set_register_value(Wave& wave, int reg, int lane, T value) {
  const auto bits = std::bit_cast<std::conditional_t<sizeof(T) == 8, u64, u32>>(value);
  wave.vector[reg][lane] = static_cast<u32>(bits);
  if constexpr (sizeof(T) == 8) wave.vector[reg + 1][lane] = static_cast<u32>(bits >> 32);
}

template <typename T, typename Op, bool kReturns>
void atomic(Wave& wave, const Instruction& i) {
  for_lanes(wave.exec(), [&](int lane) {
    const u32 address = wave.vector[i.src[0].reg][lane] + static_cast<u32>(i.offset);
    const T old = atomic_apply<Op, T>(wave.group->lds.atomic(address, sizeof(T)),
                                      register_value<T>(wave, i.src[1].reg, lane));
    if constexpr (kReturns) set_register_value(wave, i.dst.reg, lane, old);
  });
}
// Sources: address, expected value, new value.
template <typename T, bool kReturns>
void compare_swap(Wave& wave, const Instruction& i) {
  for_lanes(wave.exec(), [&](int lane) {
    const u32 address = wave.vector[i.src[0].reg][lane] + static_cast<u32>(i.offset);
    const T old = atomic_compare_swap<T>(wave.group->lds.atomic(address, sizeof(T)),
                                         register_value<T>(wave, i.src[1].reg, lane),
                                         register_value<T>(wave, i.src[2].reg, lane));
    if constexpr (kReturns) set_register_value(wave, i.dst.reg, lane, old);
  });
}

// ---- lane exchange: no memory is touched --------------------------------------------------------

// A disabled source lane reads as zero.
u32 value_of_lane(const Row& row, int lane, u64 exec) {
  return (exec >> lane & 1) != 0 ? row[lane] : 0;
}

void backward_permute(Wave& wave, const Instruction& i) {
  const Row& address = wave.vector[i.src[0].reg];
  alignas(64) Row data;
  std::memcpy(data, wave.vector[i.src[1].reg], sizeof data);
  alignas(64) Row out = {};
  for_lanes(wave.exec(), [&](int lane) {
    const int source = static_cast<int>((address[lane] + static_cast<u32>(i.offset)) >> 2 & 63);
    out[lane] = value_of_lane(data, source, wave.exec());
  });
  write_row(wave.vector[i.dst.reg], out, wave.exec());
}

// Where several lanes send to one, the highest wins; a lane that nobody sends to gets zero.
void forward_permute(Wave& wave, const Instruction& i) {
  alignas(64) Row out = {};
  for_lanes(wave.exec(), [&](int lane) {
    const u32 address = wave.vector[i.src[0].reg][lane] + static_cast<u32>(i.offset);
    out[address >> 2 & 63] = wave.vector[i.src[1].reg][lane];
  });
  write_row(wave.vector[i.dst.reg], out, wave.exec());
}

// The 16-bit pattern is either a permutation of every four lanes, or masks on the lane index within
// 32.
void swizzle(Wave& wave, const Instruction& i) {
  const u32 pattern = i.table;
  if (pattern >= 0xc000) throw Fault("rotating ds_swizzle patterns are not modelled");
  alignas(64) Row data, out;
  std::memcpy(data, wave.vector[i.src[0].reg], sizeof data);
  for (int lane = 0; lane < kWaveSize; ++lane) {
    int source;
    if ((pattern & 0x8000) != 0) {
      source = (lane & ~3) | static_cast<int>(pattern >> (2 * (lane & 3)) & 3);
    } else {
      const int masked =
          (lane & static_cast<int>(pattern & 31)) | static_cast<int>(pattern >> 5 & 31);
      source = (lane & 32) | (masked ^ static_cast<int>(pattern >> 10 & 31));
    }
    out[lane] = value_of_lane(data, source, wave.exec());
  }
  write_row(wave.vector[i.dst.reg], out, wave.exec());
}

// Transposing reads: 16 lanes read rows of a matrix of 16 columns, 8 bytes per lane, and lane c of
// them gets column c. 16-bit elements: 4 lanes make a row of 16, 4 rows. 8-bit: 2 lanes, 8 rows.
template <typename T>
void read_transposed(Wave& wave, const Instruction& i) {
  constexpr int kElements = 8 / sizeof(T), kLanesPerRow = 16 / kElements;
  const Row& address = wave.vector[i.src[0].reg];
  T in[kWaveSize][kElements], out[kWaveSize][kElements];
  if (wave.exec() != ~u64{0})
    throw Fault("transposing read with lanes switched off is not modelled");
  for (int lane = 0; lane < kWaveSize; ++lane) {
    std::memcpy(in[lane],
                wave.group->lds.read(address[lane] + static_cast<u32>(i.offset), 8, wave.wave_idx),
                8);
  }
  for (int lane = 0; lane < kWaveSize; ++lane) {
    const int group = lane & ~15, column = lane & 15;
    for (int row = 0; row < kElements; ++row) {
      out[lane][row] = in[group + kLanesPerRow * row + column / kElements][column % kElements];
    }
  }
  for (int lane = 0; lane < kWaveSize; ++lane) {
    u32 values[2];
    std::memcpy(values, out[lane], 8);
    wave.vector[i.dst.reg][lane] = values[0];
    wave.vector[i.dst.reg + 1][lane] = values[1];
  }
}

// ---- the table ----------------------------------------------------------------------------------

Opcode make(Execute execute, int num_dst, int num_src) {
  Opcode out;
  out.execute = execute;
  out.dst.assign(static_cast<size_t>(num_dst), OperandType::kRegs);
  out.src.assign(static_cast<size_t>(num_src), OperandType::kRegs);
  out.modifiers = kMemory;
  return out;
}

template <typename T, typename Op>
void add_atomic(OpcodeTable& t, const std::string& name, const std::string& type) {
  t["ds_" + name + "_" + type] = make(atomic<T, Op, false>, 0, 2);
  t["ds_" + name + "_rtn_" + type] = make(atomic<T, Op, true>, 1, 2);
}
template <typename Unsigned, typename Signed>
void add_integer_atomics(OpcodeTable& t, const std::string& bits) {
  const std::string u = "u" + bits, s = "i" + bits, b = "b" + bits;
  add_atomic<Unsigned, AtomicAdd>(t, "add", u);
  add_atomic<Unsigned, AtomicSub>(t, "sub", u);
  add_atomic<Unsigned, AtomicRsub>(t, "rsub", u);
  add_atomic<Unsigned, AtomicInc>(t, "inc", u);
  add_atomic<Unsigned, AtomicDec>(t, "dec", u);
  add_atomic<Unsigned, AtomicMin>(t, "min", u);
  add_atomic<Unsigned, AtomicMax>(t, "max", u);
  add_atomic<Signed, AtomicMin>(t, "min", s);
  add_atomic<Signed, AtomicMax>(t, "max", s);
  add_atomic<Unsigned, AtomicAnd>(t, "and", b);
  add_atomic<Unsigned, AtomicOr>(t, "or", b);
  add_atomic<Unsigned, AtomicXor>(t, "xor", b);
  t["ds_wrxchg_rtn_" + b] = make(atomic<Unsigned, AtomicSwap, true>, 1, 2);
  t["ds_cmpst_" + b] = make(compare_swap<Unsigned, false>, 0, 3);
  t["ds_cmpst_rtn_" + b] = make(compare_swap<Unsigned, true>, 1, 3);
}

}  // namespace

void add_local_memory(OpcodeTable& t) {
  t["ds_read_b32"] = make(read<1>, 1, 1);
  t["ds_read_b64"] = make(read<2>, 1, 1);
  t["ds_read_b96"] = make(read<3>, 1, 1);
  t["ds_read_b128"] = make(read<4>, 1, 1);
  t["ds_read_u8"] = make(read_narrow<uint8_t>, 1, 1);
  t["ds_read_i8"] = make(read_narrow<int8_t>, 1, 1);
  t["ds_read_u16"] = make(read_narrow<uint16_t>, 1, 1);
  t["ds_read_i16"] = make(read_narrow<int16_t>, 1, 1);
  t["ds_read2_b32"] = make(read2<1, 1>, 1, 1);
  t["ds_read2_b64"] = make(read2<2, 1>, 1, 1);
  t["ds_read2st64_b32"] = make(read2<1, 64>, 1, 1);
  t["ds_read2st64_b64"] = make(read2<2, 64>, 1, 1);
  t["ds_write_b32"] = make(write<1>, 0, 2);
  t["ds_write_b64"] = make(write<2>, 0, 2);
  t["ds_write_b96"] = make(write<3>, 0, 2);
  t["ds_write_b128"] = make(write<4>, 0, 2);
  t["ds_write_b8"] = make(write_narrow<uint8_t, 0>, 0, 2);
  t["ds_write_b16"] = make(write_narrow<uint16_t, 0>, 0, 2);
  t["ds_write_b8_d16_hi"] = make(write_narrow<uint8_t, 16>, 0, 2);
  t["ds_write_b16_d16_hi"] = make(write_narrow<uint16_t, 16>, 0, 2);
  t["ds_write2_b32"] = make(write2<1, 1>, 0, 3);
  t["ds_write2_b64"] = make(write2<2, 1>, 0, 3);
  t["ds_write2st64_b32"] = make(write2<1, 64>, 0, 3);
  t["ds_write2st64_b64"] = make(write2<2, 64>, 0, 3);
  add_integer_atomics<u32, int32_t>(t, "32");
  add_integer_atomics<u64, int64_t>(t, "64");
  add_atomic<float, AtomicAdd>(t, "add", "f32");
  add_atomic<float, AtomicMin>(t, "min", "f32");
  add_atomic<float, AtomicMax>(t, "max", "f32");
  add_atomic<double, AtomicAdd>(t, "add", "f64");
  add_atomic<double, AtomicMin>(t, "min", "f64");
  add_atomic<double, AtomicMax>(t, "max", "f64");
  add_atomic<u32, AtomicPkAddF16>(t, "pk_add", "f16");
  add_atomic<u32, AtomicPkAddBf16>(t, "pk_add", "bf16");
  t["ds_bpermute_b32"] = make(backward_permute, 1, 2);
  t["ds_permute_b32"] = make(forward_permute, 1, 2);
  t["ds_swizzle_b32"] = make(swizzle, 1, 1);
  t["ds_read_b64_tr_b16"] = make(read_transposed<uint16_t>, 1, 1);
  t["ds_read_b64_tr_b8"] = make(read_transposed<uint8_t>, 1, 1);
}

}  // namespace dsv4::amd::isa
