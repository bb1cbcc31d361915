// What atomic instructions do to a memory word, for global and for local memory.
#pragma once
#include <atomic>
#include <bit>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "backends/amd/isa/float_math.h"
#include "backends/amd/isa/half.h"
#include "backends/amd/isa/memory.h"
#include "core/numbers.h"

namespace dsv4::amd::isa {

// Each takes (old value, operand) and gives the new value.
struct AtomicSwap {
  template <typename T>
  static T apply(T, T operand) {
    return operand;
  }
};
struct AtomicAdd {
  template <typename T>
  static T apply(T old, T operand) {
    return static_cast<T>(old + operand);
  }
};
struct AtomicSub {
  template <typename T>
  static T apply(T old, T operand) {
    return static_cast<T>(old - operand);
  }
};
struct AtomicRsub {
  template <typename T>
  static T apply(T old, T operand) {
    return static_cast<T>(operand - old);
  }
};
struct AtomicAnd {
  template <typename T>
  static T apply(T old, T operand) {
    return old & operand;
  }
};
struct AtomicOr {
  template <typename T>
  static T apply(T old, T operand) {
    return old | operand;
  }
};
struct AtomicXor {
  template <typename T>
  static T apply(T old, T operand) {
    return old ^ operand;
  }
};
struct AtomicMin {
  template <typename T>
  static T apply(T old, T operand) {
    if constexpr (std::is_floating_point_v<T>)
      return min_number(old, operand);
    else
      return old < operand ? old : operand;
  }
};
struct AtomicMax {
  template <typename T>
  static T apply(T old, T operand) {
    if constexpr (std::is_floating_point_v<T>)
      return max_number(old, operand);
    else
      return old > operand ? old : operand;
  }
};
/// Counts up to the operand, then starts from 0; and down from it.
struct AtomicInc {
  template <typename T>
  static T apply(T old, T operand) {
    return old >= operand ? T{0} : static_cast<T>(old + 1);
  }
};
struct AtomicDec {
  template <typename T>
  static T apply(T old, T operand) {
    return old == 0 || old > operand ? operand : static_cast<T>(old - 1);
  }
};
struct AtomicPkAddF16 {
  static uint32_t apply(uint32_t old, uint32_t operand) {
    const auto sum = [&](int shift) {
      const auto value = [&](uint32_t x) {
        return static_cast<double>(half_to_f32({static_cast<uint16_t>(x >> shift)}));
      };
      return static_cast<uint32_t>(f64_to_half(value(old) + value(operand)).bits) << shift;
    };
    return sum(0) | sum(16);
  }
};
struct AtomicPkAddBf16 {
  static uint32_t apply(uint32_t old, uint32_t operand) {
    const auto sum = [&](int shift) {
      const auto value = [&](uint32_t x) { return bf16_to_f32(static_cast<uint16_t>(x >> shift)); };
      return static_cast<uint32_t>(f32_to_bf16(value(old) + value(operand))) << shift;
    };
    return sum(0) | sum(16);
  }
};

/// Applies `Op` to the word at `memory` and returns the old value; threads may race for it.
template <typename Op, typename T>
T atomic_apply(uint8_t* memory, T operand) {
  using Bits = std::conditional_t<sizeof(T) == 8, uint64_t, uint32_t>;
  if (reinterpret_cast<uintptr_t>(memory) % sizeof(T) != 0)
    throw Fault("misaligned atomic operation");
  std::atomic_ref<Bits> word(*reinterpret_cast<Bits*>(memory));
  Bits old = word.load();
  while (!word.compare_exchange_weak(
      old, std::bit_cast<Bits>(Op::apply(std::bit_cast<T>(old), operand)))) {
  }
  return std::bit_cast<T>(old);
}
template <typename T>
T atomic_compare_swap(uint8_t* memory, T compare, T value) {
  if (reinterpret_cast<uintptr_t>(memory) % sizeof(T) != 0)
    throw Fault("misaligned atomic operation");
  std::atomic_ref<T>(*reinterpret_cast<T*>(memory)).compare_exchange_strong(compare, value);
  return compare;
}

}  // namespace dsv4::amd::isa
