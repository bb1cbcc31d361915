// Vector instructions on two values per operand: pairs of floats in two registers, pairs of 16-bit
// values in one, and small dot products. op_sel and op_sel_hi say which half of each source the low
// and the high result read; neg_lo and neg_hi negate it.
#include "backends/amd/isa/float_math.h"
#include "backends/amd/isa/lanes.h"
#include "core/numbers.h"

namespace dsv4::amd::isa {
namespace {

using u32 = uint32_t;
using u16 = uint16_t;

bool bit(uint8_t bits, int index) {
  return (bits >> index & 1) != 0;
}

// ---- two floats ---------------------------------------------------------------------------------

// The float that result `half` reads from source `index`.
class PackedFloat {
 public:
  PackedFloat(const Wave& wave, const Instruction& i, int index, int half) {
    const Operand& operand = i.src[static_cast<size_t>(index)];
    const int sub = bit(half == 0 ? i.op_sel : i.op_sel_hi, index) ? 1 : 0;
    if (operand.kind == OperandKind::kConstant && sub == 1 && operand.value != 0) {
      // A constant has 32 bits; what the upper half would be is not documented.
      throw Fault("packed float instruction reads the upper half of a constant");
    }
    row_ = operand_row(wave, operand, sub, scratch_);
    sign_ = bit(half == 0 ? i.neg_lo : i.neg_hi, index) ? 0x80000000u : 0;
  }
  float operator[](int lane) const { return std::bit_cast<float>(row_[lane] ^ sign_); }

 private:
  const u32* row_;
  u32 sign_;
  alignas(64) Row scratch_;
};

template <typename F, int kSources>
void packed_float(Wave& wave, const Instruction& i) {
  alignas(64) Row values[2];
  for (int half = 0; half < 2; ++half) {
    const PackedFloat a(wave, i, 0, half), b(wave, i, 1, half);
    if constexpr (kSources == 2) {
      for (int lane = 0; lane < kWaveSize; ++lane) {
        values[half][lane] = std::bit_cast<u32>(scale_and_clamp(F{}(a[lane], b[lane]), i));
      }
    } else {
      const PackedFloat c(wave, i, 2, half);
      for (int lane = 0; lane < kWaveSize; ++lane) {
        values[half][lane] = std::bit_cast<u32>(scale_and_clamp(F{}(a[lane], b[lane], c[lane]), i));
      }
    }
  }
  for (int half = 0; half < 2; ++half)
    write_row(wave.vector[i.dst.reg + half], values[half], wave.exec());
}

template <int kSources, typename F>
Opcode packed_float_op(F) {
  Opcode out;
  out.execute = packed_float<F, kSources>;
  out.dst = {OperandType::kPkF32};
  out.src.assign(kSources, OperandType::kPkF32);
  out.modifiers = kPackedSel | kClamp;
  return out;
}

// Any of the four registers of two sources into each register of the destination.
void packed_move(Wave& wave, const Instruction& i) {
  alignas(64) Row values[2];
  for (int half = 0; half < 2; ++half) {
    alignas(64) Row scratch;
    const Operand& operand = i.src[static_cast<size_t>(half)];
    const int sub = bit(i.op_sel, half) ? 1 : 0;
    if (operand.kind == OperandKind::kConstant && sub == 1) {
      throw Fault("packed move reads the upper half of a constant");
    }
    std::memcpy(values[half], operand_row(wave, operand, sub, scratch), sizeof(Row));
  }
  for (int half = 0; half < 2; ++half)
    write_row(wave.vector[i.dst.reg + half], values[half], wave.exec());
}

// ---- two 16-bit values --------------------------------------------------------------------------

// A source as its register; half(lane, h) is what result h reads. Signs only make sense for halves.
class PackedHalves {
 public:
  PackedHalves(const Wave& wave, const Instruction& i, int index)
      : row_(operand_row(wave, i.src[static_cast<size_t>(index)], 0, scratch_)) {
    for (int half = 0; half < 2; ++half) {
      shift_[half] = bit(half == 0 ? i.op_sel : i.op_sel_hi, index) ? 16 : 0;
      sign_[half] = bit(half == 0 ? i.neg_lo : i.neg_hi, index) ? 0x8000 : 0;
    }
  }
  u16 half(int lane, int half) const {
    return static_cast<u16>(row_[lane] >> shift_[half] ^ sign_[half]);
  }

 private:
  const u32* row_;
  int shift_[2];
  u32 sign_[2];
  alignas(64) Row scratch_;
};

template <typename F, typename T, typename... A>
struct PackedFunction {
  template <typename... P>
  static void compute(Wave& wave, const Instruction& i, const P&... sources) {
    Result<u32> result;
    for (int lane = 0; lane < kWaveSize; ++lane) {
      u32 out = 0;
      for (int half = 0; half < 2; ++half) {
        T value = F{}(std::bit_cast<A>(sources.half(lane, half))...);
        if constexpr (std::is_same_v<T, Half>) value = scale_and_clamp(value, i);
        out |= static_cast<u32>(std::bit_cast<u16>(value)) << (16 * half);
      }
      result.set(lane, out);
    }
    result.write(wave, i);
  }
  template <size_t... I>
  static void run(Wave& wave, const Instruction& i, std::index_sequence<I...>) {
    compute(wave, i, PackedHalves(wave, i, static_cast<int>(I))...);
  }
  static void execute(Wave& wave, const Instruction& i) {
    run(wave, i, std::index_sequence_for<A...>{});
  }
  static Opcode opcode() {
    Opcode out;
    out.execute = execute;
    out.dst = {OperandType::kB32};
    // Constants are 32-bit registers' worth: a half constant fills the low half only.
    out.src.assign(sizeof...(A), std::is_same_v<T, Half> ? OperandType::kF16 : OperandType::kB32);
    out.modifiers = kPackedSel;
    if constexpr (std::is_same_v<T, Half>) out.modifiers |= kClamp;
    return out;
  }
};
template <typename F, typename T, typename... A>
PackedFunction<F, T, A...> packed_function(T (F::*)(A...) const);
template <typename F>
Opcode packed_op(F) {
  return decltype(packed_function<F>(&F::operator()))::opcode();
}

float f(Half x) {
  return half_to_f32(x);
}
double d(Half x) {
  return static_cast<double>(half_to_f32(x));
}

void add_pairs(OpcodeTable& t) {
  t["v_pk_add_f32"] = packed_float_op<2>([](float a, float b) { return a + b; });
  t["v_pk_mul_f32"] = packed_float_op<2>([](float a, float b) { return a * b; });
  t["v_pk_fma_f32"] =
      packed_float_op<3>([](float a, float b, float c) { return fma_f32(a, b, c); });
  t["v_pk_mov_b32"] = packed_float_op<2>([](float a, float) { return a; });
  t["v_pk_mov_b32"].execute = packed_move;

  t["v_pk_add_f16"] = packed_op([](Half a, Half b) { return f64_to_half(d(a) + d(b)); });
  t["v_pk_mul_f16"] = packed_op([](Half a, Half b) { return f64_to_half(d(a) * d(b)); });
  t["v_pk_fma_f16"] = packed_op(
      [](Half a, Half b, Half c) { return f64_to_half(exact_product_sum(d(a), d(b), d(c))); });
  t["v_pk_min_f16"] = packed_op([](Half a, Half b) { return f32_to_half(min_number(f(a), f(b))); });
  t["v_pk_max_f16"] = packed_op([](Half a, Half b) { return f32_to_half(max_number(f(a), f(b))); });
  t["v_pk_minimum3_f16"] = packed_op(
      [](Half a, Half b, Half c) { return f32_to_half(minimum(minimum(f(a), f(b)), f(c))); });
  t["v_pk_maximum3_f16"] = packed_op(
      [](Half a, Half b, Half c) { return f32_to_half(maximum(maximum(f(a), f(b)), f(c))); });

  t["v_pk_add_u16"] = t["v_pk_add_i16"] =
      packed_op([](u16 a, u16 b) { return static_cast<u16>(a + b); });
  t["v_pk_sub_u16"] = t["v_pk_sub_i16"] =
      packed_op([](u16 a, u16 b) { return static_cast<u16>(a - b); });
  t["v_pk_mul_lo_u16"] =
      packed_op([](u16 a, u16 b) { return static_cast<u16>(static_cast<u32>(a) * b); });
  t["v_pk_mad_u16"] = t["v_pk_mad_i16"] =
      packed_op([](u16 a, u16 b, u16 c) { return static_cast<u16>(static_cast<u32>(a) * b + c); });
  t["v_pk_lshlrev_b16"] = packed_op([](u16 a, u16 b) { return static_cast<u16>(b << (a & 15)); });
  t["v_pk_lshrrev_b16"] = packed_op([](u16 a, u16 b) { return static_cast<u16>(b >> (a & 15)); });
  t["v_pk_ashrrev_i16"] =
      packed_op([](u16 a, int16_t b) { return static_cast<int16_t>(b >> (a & 15)); });
  t["v_pk_min_u16"] = packed_op([](u16 a, u16 b) { return a < b ? a : b; });
  t["v_pk_max_u16"] = packed_op([](u16 a, u16 b) { return a > b ? a : b; });
  t["v_pk_min_i16"] = packed_op([](int16_t a, int16_t b) { return a < b ? a : b; });
  t["v_pk_max_i16"] = packed_op([](int16_t a, int16_t b) { return a > b ? a : b; });
}

// ---- dot products and mixed precision -----------------------------------------------------------

float low_half(u32 x) {
  return half_to_f32({static_cast<u16>(x)});
}
float high_half(u32 x) {
  return half_to_f32({static_cast<u16>(x >> 16)});
}
float low_bf16(u32 x) {
  return std::bit_cast<float>(x << 16);
}
float high_bf16(u32 x) {
  return std::bit_cast<float>(x & 0xffff0000u);
}
// Products are exact in float; sums in double, one rounding at the end. The hardware's inner
// rounding is not documented.
float dot2(float a0, float b0, float a1, float b1, float c) {
  return static_cast<float>(static_cast<double>(a0) * b0 + static_cast<double>(a1) * b1 + c);
}
float dot2_half(u32 a, u32 b, float c) {
  return dot2(low_half(a), low_half(b), high_half(a), high_half(b), c);
}
float dot2_bf16(u32 a, u32 b, float c) {
  return dot2(low_bf16(a), low_bf16(b), high_bf16(a), high_bf16(b), c);
}
template <typename T>
u32 dot4(u32 a, u32 b, u32 c) {
  for (int k = 0; k < 4; ++k) {
    c += static_cast<u32>(static_cast<T>(a >> (8 * k)) * static_cast<T>(b >> (8 * k)));
  }
  return c;
}
u32 dot2_i16(u32 a, u32 b, u32 c) {
  for (int k = 0; k < 2; ++k) {
    c +=
        static_cast<u32>(static_cast<int16_t>(a >> (16 * k)) * static_cast<int16_t>(b >> (16 * k)));
  }
  return c;
}

void add_dots(OpcodeTable& t) {
  t["v_dot2_f32_f16"] = lane_op([](u32 a, u32 b, float c) { return dot2_half(a, b, c); });
  t["v_dot2c_f32_f16"] =
      accumulating_lane_op([](u32 a, u32 b, float c) { return dot2_half(a, b, c); });
  t["v_dot2_f32_bf16"] = lane_op([](u32 a, u32 b, float c) { return dot2_bf16(a, b, c); });
  t["v_dot2c_f32_bf16"] =
      accumulating_lane_op([](u32 a, u32 b, float c) { return dot2_bf16(a, b, c); });
  t["v_dot4_i32_i8"] = lane_op([](u32 a, u32 b, u32 c) { return dot4<int8_t>(a, b, c); });
  t["v_dot4c_i32_i8"] =
      accumulating_lane_op([](u32 a, u32 b, u32 c) { return dot4<int8_t>(a, b, c); });
  t["v_dot4_u32_u8"] = lane_op([](u32 a, u32 b, u32 c) { return dot4<uint8_t>(a, b, c); });
  t["v_dot2_i32_i16"] = lane_op([](u32 a, u32 b, u32 c) { return dot2_i16(a, b, c); });
  t["v_dot2c_i32_i16"] =
      accumulating_lane_op([](u32 a, u32 b, u32 c) { return dot2_i16(a, b, c); });
}

// fma of sources that are each a float (op_sel_hi 0) or a half picked by op_sel.
class MixedSource {
 public:
  MixedSource(const Wave& wave, const Instruction& i, int index)
      : operand_(i.src[static_cast<size_t>(index)]),
        row_(operand_row(wave, operand_, 0, scratch_)),
        is_half_(bit(i.op_sel_hi, index)),
        shift_(bit(i.op_sel, index) ? 16 : 0) {}
  float operator[](int lane) const {
    float x = is_half_ ? half_to_f32({static_cast<u16>(row_[lane] >> shift_)})
                       : std::bit_cast<float>(row_[lane]);
    if (operand_.absolute) x = std::fabs(x);
    return operand_.negate ? -x : x;
  }

 private:
  const Operand& operand_;
  alignas(64) Row scratch_;
  const u32* row_;
  bool is_half_;
  int shift_;
};

enum class MixResult { kFloat, kLow, kHigh };
template <MixResult kResult>
void fma_mix(Wave& wave, const Instruction& i) {
  const MixedSource a(wave, i, 0), b(wave, i, 1), c(wave, i, 2);
  const u32* old = wave.vector[i.dst.reg];
  Result<u32> result;
  for (int lane = 0; lane < kWaveSize; ++lane) {
    const double exact = exact_product_sum(a[lane], b[lane], c[lane]);
    if constexpr (kResult == MixResult::kFloat) {
      result.set(lane, std::bit_cast<u32>(scale_and_clamp(static_cast<float>(exact), i)));
    } else {
      const u32 half = scale_and_clamp(f64_to_half(exact), i).bits;
      result.set(lane, kResult == MixResult::kLow ? (old[lane] & 0xffff0000u) | half
                                                  : (old[lane] & 0xffffu) | half << 16);
    }
  }
  result.write(wave, i);
}

void add_mixed(OpcodeTable& t) {
  Opcode mix;
  mix.dst = {OperandType::kB32};
  mix.src.assign(3, OperandType::kF32);
  mix.modifiers = kPackedSel | kMixedSel | kSourceSigns | kClamp;
  mix.execute = fma_mix<MixResult::kFloat>;
  t["v_fma_mix_f32"] = mix;
  mix.execute = fma_mix<MixResult::kLow>;
  t["v_fma_mixlo_f16"] = mix;
  mix.execute = fma_mix<MixResult::kHigh>;
  t["v_fma_mixhi_f16"] = mix;
}

}  // namespace

void add_vector_packed(OpcodeTable& table) {
  add_pairs(table);
  add_dots(table);
  add_mixed(table);
}

}  // namespace dsv4::amd::isa
