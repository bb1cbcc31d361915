// Turns a function of scalar values into the execution of a scalar instruction, as lane_op does for
// vectors.
#pragma once
#include <type_traits>
#include <utility>

#include "backends/amd/isa/lanes.h"

namespace dsv4::amd::isa {

/// A result that sets SCC to something else than "not zero".
template <typename T>
struct WithScc {
  T value;
  bool scc;
};
/// A result that leaves SCC alone.
template <typename T>
struct KeepScc {
  T value;
};

template <typename T>
inline T scalar_source(const Wave& wave, const Operand& operand) {
  if constexpr (std::is_same_v<T, bool>) {
    return wave.scc;
  } else if constexpr (sizeof(T) == 8) {
    return std::bit_cast<T>(scalar_value64(wave, operand));
  } else {
    return std::bit_cast<T>(scalar_value(wave, operand, 0));
  }
}
template <typename T>
inline void set_scalar_result(Wave& wave, const Instruction& i, T value) {
  if constexpr (sizeof(T) == 8) {
    wave.set_scalar64(i.dst.reg, std::bit_cast<uint64_t>(value));
  } else {
    wave.scalar[i.dst.reg] = std::bit_cast<uint32_t>(value);
  }
}

template <typename R>
struct ScalarResult {  // SCC says whether the result is not zero
  using Value = R;
  static void write(Wave& wave, const Instruction& i, R value) {
    set_scalar_result(wave, i, value);
    wave.scc = value != 0;
  }
};
template <typename T>
struct ScalarResult<WithScc<T>> {
  using Value = T;
  static void write(Wave& wave, const Instruction& i, WithScc<T> result) {
    set_scalar_result(wave, i, result.value);
    wave.scc = result.scc;
  }
};
template <typename T>
struct ScalarResult<KeepScc<T>> {
  using Value = T;
  static void write(Wave& wave, const Instruction& i, KeepScc<T> result) {
    set_scalar_result(wave, i, result.value);
  }
};

/// A bool argument is SCC, which is not an operand of the text.
template <typename F, typename R, typename... A>
struct ScalarFunction {
  template <size_t... I>
  static void run(Wave& wave, const Instruction& i, std::index_sequence<I...>) {
    if constexpr (std::is_same_v<R, bool>) {
      wave.scc = F{}(scalar_source<A>(wave, i.src[I])...);
    } else {
      ScalarResult<R>::write(wave, i, F{}(scalar_source<A>(wave, i.src[I])...));
    }
  }
  static void execute(Wave& wave, const Instruction& i) {
    run(wave, i, std::index_sequence_for<A...>{});
  }
  static Opcode opcode() {
    Opcode out;
    out.execute = execute;
    if constexpr (!std::is_same_v<R, bool>)
      out.dst = {LaneType<typename ScalarResult<R>::Value>::kType};
    const auto add = [&]<typename T>(T) {
      if constexpr (!std::is_same_v<T, bool>) out.src.push_back(LaneType<T>::kType);
    };
    (add(A{}), ...);
    return out;
  }
};
template <typename F, typename R, typename... A>
ScalarFunction<F, R, A...> scalar_function(R (F::*)(A...) const);
/// The opcode of a lambda: its arguments are operands (bool: SCC, last), its result goes to the
/// destination and says what becomes of SCC; a result of type bool is SCC alone.
template <typename F>
Opcode scalar_op(F) {
  return decltype(scalar_function<F>(&F::operator()))::opcode();
}

}  // namespace dsv4::amd::isa
