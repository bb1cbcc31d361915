// Loads, stores and atomics of global memory: global_*, flat_*, buffer_*, s_load_*.
#include <string>

#include "backends/amd/isa/atomic_ops.h"
#include "backends/amd/isa/lanes.h"

namespace dsv4::amd::isa {
namespace {

using u32 = uint32_t;
using u64 = uint64_t;

enum class Space { kGlobal, kFlat, kBuffer };
enum class Access { kRead, kWrite, kAtomic };

uint8_t* global_pointer(Wave& wave, u64 address, u32 bytes, bool write) {
  const Region* region = wave.last_region;
  if (region == nullptr || address < region->begin || address >= region->end ||
      bytes > region->end - address) {
    region = wave.group->global->find(address, bytes);
    wave.last_region = region;
  }
  if (region == nullptr || (write && !region->writable)) {
    throw Fault(wave.group->global->explain(address, bytes, write));
  }
  return reinterpret_cast<uint8_t*>(address);
}

uint8_t* flat_pointer(Wave& wave, u64 address, u32 bytes, Access access) {
  const u64 aperture = address & ~u64{0xffffffff};
  if (aperture == kPrivateAperture)
    throw Fault("flat access to private memory (scratch) is not modelled");
  if (aperture != kSharedAperture)
    return global_pointer(wave, address, bytes, access != Access::kRead);
  LocalMemory& lds = wave.group->lds;
  const u32 offset = static_cast<u32>(address);
  if (access == Access::kRead) return lds.read(offset, bytes, wave.wave_idx);
  return access == Access::kWrite ? lds.write(offset, bytes, wave.wave_idx)
                                  : lds.atomic(offset, bytes);
}

// A raw or structured buffer: base, stride, size in bytes or in records.
struct Descriptor {
  u64 base;
  u32 stride, num_records;
  explicit Descriptor(const Wave& wave, const Operand& operand) {
    const u32 high = scalar_value(wave, operand, 1);
    base = scalar_value(wave, operand, 0) | static_cast<u64>(high & 0xffff) << 32;
    stride = high >> 16 & 0x3fff;
    num_records = scalar_value(wave, operand, 2);
    if ((high >> 31) != 0) throw Fault("swizzled buffers are not modelled");
  }
};

// Positions of the address operands among an instruction's sources.
struct AddressOperands {
  int address, base, soffset;
};

/// Addresses of all lanes. For buffers `in_range` says which of a lane's bytes exist: reads beyond
/// give 0, writes are dropped.
template <Space kSpace>
class Addresses {
 public:
  Addresses(const Wave& wave, const Instruction& i, AddressOperands at) {
    const Operand& address = i.src[static_cast<size_t>(at.address)];
    const u64 offset = static_cast<u64>(static_cast<int64_t>(i.offset));
    alignas(64) Row scratch[2];
    if constexpr (kSpace == Space::kBuffer) {
      const Descriptor buffer(wave, i.src[static_cast<size_t>(at.base)]);
      const u32 scalar = scalar_value(wave, i.src[static_cast<size_t>(at.soffset)], 0);
      size_ = buffer.stride == 0 ? buffer.num_records : u64{buffer.num_records} * buffer.stride;
      base_ = buffer.base;
      const u32* index = i.idxen ? operand_row(wave, address, 0, scratch[0]) : nullptr;
      const u32* lane_offset =
          i.offen ? operand_row(wave, address, i.idxen ? 1 : 0, scratch[1]) : nullptr;
      for (int lane = 0; lane < kWaveSize; ++lane) {
        u64 a = offset + scalar + (lane_offset != nullptr ? lane_offset[lane] : 0);
        if (index != nullptr) a += u64{index[lane]} * buffer.stride;
        address_[lane] = buffer.base + a;
      }
    } else {
      const u32* low = operand_row(wave, address, 0, scratch[0]);
      if (kSpace == Space::kGlobal &&
          i.src[static_cast<size_t>(at.base)].kind != OperandKind::kNone) {
        const u64 base = scalar_value64(wave, i.src[static_cast<size_t>(at.base)]) + offset;
        for (int lane = 0; lane < kWaveSize; ++lane) address_[lane] = base + low[lane];
      } else {
        if (address.num_regs != 2) throw Fault("address operand has one register, expected two");
        const u32* high = operand_row(wave, address, 1, scratch[1]);
        for (int lane = 0; lane < kWaveSize; ++lane) {
          address_[lane] = (low[lane] | static_cast<u64>(high[lane]) << 32) + offset;
        }
      }
    }
  }
  u64 operator[](int lane) const { return address_[lane]; }
  bool in_range(int lane, u32 bytes, u32 skip = 0) const {
    return kSpace != Space::kBuffer || address_[lane] - base_ + skip + bytes <= size_;
  }

 private:
  u64 base_ = 0, size_ = 0;
  alignas(64) u64 address_[kWaveSize];
};

template <Space kSpace>
uint8_t* pointer(Wave& wave, u64 address, u32 bytes, Access access) {
  if constexpr (kSpace == Space::kFlat) return flat_pointer(wave, address, bytes, access);
  return global_pointer(wave, address, bytes, access != Access::kRead);
}

// Where LDS-DMA puts the value of a lane: M0 is the wave's base.
uint8_t* lds_destination(Wave& wave, const Instruction& i, int lane, u32 bytes) {
  const u32 step = bytes < 4 ? 4 : bytes;
  const u32 offset =
      wave.scalar[Wave::kM0] + static_cast<u32>(i.offset) + step * static_cast<u32>(lane);
  return wave.group->lds.write(offset, step, wave.wave_idx);
}

/// Loads kRegs registers per lane.
template <Space kSpace, int kRegs, bool kToLds>
void load(Wave& wave, const Instruction& i) {
  constexpr AddressOperands kAt = {0, 1, 2};
  const Addresses<kSpace> addresses(wave, i, kAt);
  for_lanes(wave.exec(), [&](int lane) {
    u32 values[kRegs] = {};
    if (addresses.in_range(lane, 4 * kRegs)) {
      std::memcpy(values, pointer<kSpace>(wave, addresses[lane], 4 * kRegs, Access::kRead),
                  4 * kRegs);
    } else {
      for (u32 r = 0; r < kRegs; ++r) {
        if (!addresses.in_range(lane, 4, 4 * r)) continue;
        std::memcpy(&values[r], pointer<kSpace>(wave, addresses[lane] + 4 * r, 4, Access::kRead),
                    4);
      }
    }
    if constexpr (kToLds) {
      std::memcpy(lds_destination(wave, i, lane, 4 * kRegs), values, 4 * kRegs);
    } else {
      for (int r = 0; r < kRegs; ++r) wave.vector[i.dst.reg + r][lane] = values[r];
    }
  });
}

/// Loads a byte or a short and extends it to the register.
template <Space kSpace, typename T, bool kToLds>
void load_narrow(Wave& wave, const Instruction& i) {
  constexpr AddressOperands kAt = {0, 1, 2};
  const Addresses<kSpace> addresses(wave, i, kAt);
  for_lanes(wave.exec(), [&](int lane) {
    T value = 0;
    if (addresses.in_range(lane, sizeof(T))) {
      std::memcpy(&value, pointer<kSpace>(wave, addresses[lane], sizeof(T), Access::kRead),
                  sizeof(T));
    }
    const u32 extended = static_cast<u32>(static_cast<int32_t>(value));
    if constexpr (kToLds) {
      std::memcpy(lds_destination(wave, i, lane, sizeof(T)), &extended, 4);
    } else {
      wave.vector[i.dst.reg][lane] = extended;
    }
  });
}

// Operand order of stores and atomics: global and flat name the address first, buffers the data.
template <Space kSpace>
constexpr int kDataSource = kSpace == Space::kBuffer ? 0 : 1;
template <Space kSpace>
constexpr AddressOperands kStoreAddress =
    kSpace == Space::kBuffer ? AddressOperands{1, 2, 3} : AddressOperands{0, 2, 2};

template <Space kSpace, int kRegs>
void store(Wave& wave, const Instruction& i) {
  const Addresses<kSpace> addresses(wave, i, kStoreAddress<kSpace>);
  const Operand& data = i.src[kDataSource<kSpace>];
  for_lanes(wave.exec(), [&](int lane) {
    u32 values[kRegs];
    for (int r = 0; r < kRegs; ++r) values[r] = wave.vector[data.reg + r][lane];
    if (addresses.in_range(lane, 4 * kRegs)) {
      std::memcpy(pointer<kSpace>(wave, addresses[lane], 4 * kRegs, Access::kWrite), values,
                  4 * kRegs);
      return;
    }
    for (u32 r = 0; r < kRegs; ++r) {
      if (!addresses.in_range(lane, 4, 4 * r)) continue;
      std::memcpy(pointer<kSpace>(wave, addresses[lane] + 4 * r, 4, Access::kWrite), &values[r], 4);
    }
  });
}

template <Space kSpace, typename T, int kShift>
void store_narrow(Wave& wave, const Instruction& i) {
  const Addresses<kSpace> addresses(wave, i, kStoreAddress<kSpace>);
  const Row& data = wave.vector[i.src[kDataSource<kSpace>].reg];
  for_lanes(wave.exec(), [&](int lane) {
    const T value = static_cast<T>(data[lane] >> kShift);
    if (!addresses.in_range(lane, sizeof(T))) return;
    std::memcpy(pointer<kSpace>(wave, addresses[lane], sizeof(T), Access::kWrite), &value,
                sizeof(T));
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
  if constexpr (sizeof(T) == 8) {
    const u64 bits = std::bit_cast<u64>(value);
    wave.vector[reg][lane] = static_cast<u32>(bits);
    wave.vector[reg + 1][lane] = static_cast<u32>(bits >> 32);
  } else {
    wave.vector[reg][lane] = std::bit_cast<u32>(value);
  }
}

// Lanes in ascending order; the hardware's order is not defined.
template <Space kSpace, typename T, typename F>
void for_atomic_lanes(Wave& wave, const Instruction& i, F&& apply) {
  const Addresses<kSpace> addresses(wave, i, kStoreAddress<kSpace>);
  const int result = kSpace == Space::kBuffer ? i.src[0].reg : i.dst.reg;
  const int data = i.src[kDataSource<kSpace>].reg;
  for_lanes(wave.exec(), [&](int lane) {
    if (!addresses.in_range(lane, sizeof(T))) return;
    uint8_t* memory = pointer<kSpace>(wave, addresses[lane], sizeof(T), Access::kAtomic);
    const T old = apply(memory, data, lane);
    if (i.returns) set_register_value(wave, result, lane, old);
  });
}
template <Space kSpace, typename T, typename Op>
void atomic(Wave& wave, const Instruction& i) {
  for_atomic_lanes<kSpace, T>(wave, i, [&](uint8_t* memory, int data, int lane) {
    return atomic_apply<Op, T>(memory, register_value<T>(wave, data, lane));
  });
}
// The new value lies in the first half of the data registers, the expected one in the second.
template <Space kSpace, typename T>
void compare_swap(Wave& wave, const Instruction& i) {
  for_atomic_lanes<kSpace, T>(wave, i, [&](uint8_t* memory, int data, int lane) {
    return atomic_compare_swap<T>(memory, register_value<T>(wave, data + kRegsOf<T>, lane),
                                  register_value<T>(wave, data, lane));
  });
}

template <int kRegs>
void scalar_load(Wave& wave, const Instruction& i) {
  const u64 address =
      (scalar_value64(wave, i.src[0]) +
       static_cast<u64>(static_cast<int64_t>(static_cast<int32_t>(i.src[1].value)))) +
      static_cast<u64>(static_cast<int64_t>(i.offset));
  // A register offset is unsigned, a constant one is signed.
  const u64 register_offset =
      i.src[1].kind == OperandKind::kScalar ? scalar_value(wave, i.src[1], 0) : 0;
  const u64 aligned = (address + register_offset) & ~u64{3};
  std::memcpy(&wave.scalar[i.dst.reg], global_pointer(wave, aligned, 4 * kRegs, false), 4 * kRegs);
}
template <int kRegs>
void scalar_buffer_load(Wave& wave, const Instruction& i) {
  const Descriptor buffer(wave, i.src[0]);
  const u64 size =
      buffer.stride == 0 ? buffer.num_records : u64{buffer.num_records} * buffer.stride;
  const u64 offset = (scalar_value(wave, i.src[1], 0) + static_cast<u32>(i.offset)) & ~3u;
  for (u32 r = 0; r < kRegs; ++r) {
    u32 value = 0;
    if (offset + 4 * r + 4 <= size) {
      std::memcpy(&value, global_pointer(wave, buffer.base + offset + 4 * r, 4, false), 4);
    }
    wave.scalar[i.dst.reg + r] = value;
  }
}

// ---- the table ----------------------------------------------------------------------------------

Opcode make(Execute execute, std::vector<OperandType> dst, std::vector<OperandType> src) {
  Opcode out;
  out.execute = execute;
  out.dst = std::move(dst);
  out.src = std::move(src);
  out.modifiers = kMemory;
  return out;
}

template <Space kSpace>
std::string prefix() {
  return kSpace == Space::kGlobal ? "global_" : kSpace == Space::kFlat ? "flat_" : "buffer_";
}
// Operands after the data: address and base; flat has no base.
template <Space kSpace>
std::vector<OperandType> address_types() {
  using enum OperandType;
  if (kSpace == Space::kFlat) return {kRegs};
  if (kSpace == Space::kGlobal) return {kRegs, kOffset};
  return {kOffset, kRegs, kB32};
}
template <Space kSpace>
Opcode load_op(Execute execute) {
  return make(execute, {OperandType::kRegs}, address_types<kSpace>());
}
template <Space kSpace>
Opcode store_op(Execute execute) {
  std::vector<OperandType> src = address_types<kSpace>();
  src.insert(src.begin() + kDataSource<kSpace>, OperandType::kRegs);
  return make(execute, {}, std::move(src));
}

template <Space kSpace>
void add_loads(OpcodeTable& t) {
  const std::string p = prefix<kSpace>() + "load_";
  t[p + "dword"] = load_op<kSpace>(load<kSpace, 1, false>);
  t[p + "dwordx2"] = load_op<kSpace>(load<kSpace, 2, false>);
  t[p + "dwordx3"] = load_op<kSpace>(load<kSpace, 3, false>);
  t[p + "dwordx4"] = load_op<kSpace>(load<kSpace, 4, false>);
  t[p + "ubyte"] = load_op<kSpace>(load_narrow<kSpace, uint8_t, false>);
  t[p + "sbyte"] = load_op<kSpace>(load_narrow<kSpace, int8_t, false>);
  t[p + "ushort"] = load_op<kSpace>(load_narrow<kSpace, uint16_t, false>);
  t[p + "sshort"] = load_op<kSpace>(load_narrow<kSpace, int16_t, false>);
  const std::string s = prefix<kSpace>() + "store_";
  t[s + "dword"] = store_op<kSpace>(store<kSpace, 1>);
  t[s + "dwordx2"] = store_op<kSpace>(store<kSpace, 2>);
  t[s + "dwordx3"] = store_op<kSpace>(store<kSpace, 3>);
  t[s + "dwordx4"] = store_op<kSpace>(store<kSpace, 4>);
  t[s + "byte"] = store_op<kSpace>(store_narrow<kSpace, uint8_t, 0>);
  t[s + "byte_d16_hi"] = store_op<kSpace>(store_narrow<kSpace, uint8_t, 16>);
  t[s + "short"] = store_op<kSpace>(store_narrow<kSpace, uint16_t, 0>);
  t[s + "short_d16_hi"] = store_op<kSpace>(store_narrow<kSpace, uint16_t, 16>);
}

// "name rtn" has a destination in front; a buffer atomic returns in place and is told by sc0.
template <Space kSpace>
void add_atomic(OpcodeTable& t, const std::string& name, Execute execute) {
  const std::string full = prefix<kSpace>() + "atomic_" + name;
  t[full] = store_op<kSpace>(execute);
  if constexpr (kSpace != Space::kBuffer) {
    t[full + " rtn"] = t[full];
    t[full + " rtn"].dst = {OperandType::kRegs};
  }
}
template <Space kSpace, typename Unsigned, typename Signed>
void add_integer_atomics(OpcodeTable& t, const std::string& suffix) {
  const auto add = [&](const char* name, Execute execute) {
    add_atomic<kSpace>(t, name + suffix, execute);
  };
  add("swap", atomic<kSpace, Unsigned, AtomicSwap>);
  add("add", atomic<kSpace, Unsigned, AtomicAdd>);
  add("sub", atomic<kSpace, Unsigned, AtomicSub>);
  add("smin", atomic<kSpace, Signed, AtomicMin>);
  add("umin", atomic<kSpace, Unsigned, AtomicMin>);
  add("smax", atomic<kSpace, Signed, AtomicMax>);
  add("umax", atomic<kSpace, Unsigned, AtomicMax>);
  add("and", atomic<kSpace, Unsigned, AtomicAnd>);
  add("or", atomic<kSpace, Unsigned, AtomicOr>);
  add("xor", atomic<kSpace, Unsigned, AtomicXor>);
  add("inc", atomic<kSpace, Unsigned, AtomicInc>);
  add("dec", atomic<kSpace, Unsigned, AtomicDec>);
  add("cmpswap", compare_swap<kSpace, Unsigned>);
}
template <Space kSpace>
void add_atomics(OpcodeTable& t) {
  add_integer_atomics<kSpace, u32, int32_t>(t, "");
  add_integer_atomics<kSpace, u64, int64_t>(t, "_x2");
  add_atomic<kSpace>(t, "add_f32", atomic<kSpace, float, AtomicAdd>);
  add_atomic<kSpace>(t, "add_f64", atomic<kSpace, double, AtomicAdd>);
  add_atomic<kSpace>(t, "min_f64", atomic<kSpace, double, AtomicMin>);
  add_atomic<kSpace>(t, "max_f64", atomic<kSpace, double, AtomicMax>);
  add_atomic<kSpace>(t, "pk_add_f16", atomic<kSpace, u32, AtomicPkAddF16>);
  add_atomic<kSpace>(t, "pk_add_bf16", atomic<kSpace, u32, AtomicPkAddBf16>);
}

// Loads that go to LDS have no destination register.
template <Space kSpace>
void add_lds_loads(OpcodeTable& t, const std::string& before, const std::string& after) {
  const auto add = [&](const char* name, Execute execute) {
    t[before + name + after] = make(execute, {}, address_types<kSpace>());
  };
  add("ubyte", load_narrow<kSpace, uint8_t, true>);
  add("sbyte", load_narrow<kSpace, int8_t, true>);
  add("ushort", load_narrow<kSpace, uint16_t, true>);
  add("sshort", load_narrow<kSpace, int16_t, true>);
  add("dword", load<kSpace, 1, true>);
  add("dwordx3", load<kSpace, 3, true>);
  add("dwordx4", load<kSpace, 4, true>);
}

}  // namespace

void add_global_memory(OpcodeTable& t) {
  add_loads<Space::kGlobal>(t);
  add_loads<Space::kFlat>(t);
  add_loads<Space::kBuffer>(t);
  add_atomics<Space::kGlobal>(t);
  add_atomics<Space::kFlat>(t);
  add_atomics<Space::kBuffer>(t);
  add_lds_loads<Space::kGlobal>(t, "global_load_lds_", "");
  add_lds_loads<Space::kBuffer>(t, "buffer_load_", " lds");

  using enum OperandType;
  const auto add_scalar = [&](const char* suffix, Execute load, Execute buffer_load) {
    t[std::string("s_load_dword") + suffix] = make(load, {kRegs}, {kU64, kB32});
    t[std::string("s_buffer_load_dword") + suffix] = make(buffer_load, {kRegs}, {kRegs, kB32});
  };
  add_scalar("", scalar_load<1>, scalar_buffer_load<1>);
  add_scalar("x2", scalar_load<2>, scalar_buffer_load<2>);
  add_scalar("x4", scalar_load<4>, scalar_buffer_load<4>);
  add_scalar("x8", scalar_load<8>, scalar_buffer_load<8>);
  add_scalar("x16", scalar_load<16>, scalar_buffer_load<16>);
}

}  // namespace dsv4::amd::isa
