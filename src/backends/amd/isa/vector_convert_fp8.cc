// Vector instructions that convert from and to 8-bit and 4-bit floats.
#include "backends/amd/isa/fp8.h"
#include "backends/amd/isa/lanes.h"
#include "core/numbers.h"

namespace dsv4::amd::isa {
namespace {

using u32 = uint32_t;

template <bool kFnuz>
float decode(u32 code) {
  return fp8_values(kFnuz)[code & 0xff];
}
template <bool kFnuz>
uint16_t encode_pair(float a, float b) {
  return static_cast<uint16_t>(f32_to_fp8(a, kFnuz) | f32_to_fp8(b, kFnuz) << 8);
}
uint64_t float_pair(float low, float high) {
  return std::bit_cast<u32>(low) | static_cast<uint64_t>(std::bit_cast<u32>(high)) << 32;
}

template <bool kFnuz>
void add_plain(OpcodeTable& t) {
  t["v_cvt_f32_fp8"] = lane_op([](u32 a) { return decode<kFnuz>(a); });
  t["v_cvt_pk_f32_fp8"] =
      lane_op([](u32 a) { return float_pair(decode<kFnuz>(a), decode<kFnuz>(a >> 8)); });
  // Writes one half of its register and keeps the other.
  t["v_cvt_pk_fp8_f32"] =
      lane_op([](float a, float b) { return LowHalf{encode_pair<kFnuz>(a, b)}; });
}

// ---- gfx950: conversions with a power-of-two scale ----------------------------------------------

// The hardware takes the exponent of a float as the scale; another mantissa or a sign is a mistake
// of the program, which nothing else would notice.
void require_power_of_two(const Wave& wave, const Source<u32>& scale) {
  for_lanes(wave.exec(), [&](int lane) {
    if ((scale[lane] & 0x807fffffu) != 0) {
      throw Fault("the scale of lane " + std::to_string(lane) + " is not a power of two");
    }
  });
}
// E8M0 of the exponent field: 2^-127 and NaN at the ends.
float scale_of(u32 bits) {
  return e8m0_to_f32(static_cast<uint8_t>(bits >> 23 & 0xff));
}

// Codes of 8 or 4 bits; op_sel picks the part of the 32-bit register that holds a pair.
struct Fp8 {
  static constexpr int kBits = 8;
  static float decode(u32 code) { return e4m3_to_f32(static_cast<uint8_t>(code)); }
  static u32 encode(float value) { return f32_to_fp8(value, false); }
};
struct Fp4 {
  static constexpr int kBits = 4;
  static float decode(u32 code) { return e2m1_to_f32(static_cast<uint8_t>(code & 15)); }
  static u32 encode(float value) { return std::isnan(value) ? 7 : f32_to_e2m1(value); }
};

struct WideF32 {
  static uint64_t join(float a, float b) { return float_pair(a, b); }
};
struct WideBf16 {
  static u32 join(float a, float b) {
    return static_cast<u32>(f32_to_bf16(b)) << 16 | f32_to_bf16(a);
  }
  static float low(u32 pair) { return bf16_to_f32(static_cast<uint16_t>(pair)); }
  static float high(u32 pair) { return bf16_to_f32(static_cast<uint16_t>(pair >> 16)); }
};
struct WideF16 {
  static u32 join(float a, float b) {
    return static_cast<u32>(f32_to_half(b).bits) << 16 | f32_to_half(a).bits;
  }
  static float low(u32 pair) { return half_to_f32({static_cast<uint16_t>(pair)}); }
  static float high(u32 pair) { return half_to_f32({static_cast<uint16_t>(pair >> 16)}); }
};

// Shift of the part that op_sel names, bit `first` of it being the lowest.
template <typename Narrow>
int selected_shift(const Instruction& i, int first) {
  const int index = i.op_sel >> first & (Narrow::kBits == 8 ? 1 : 3);
  return 2 * Narrow::kBits * index;
}

template <typename Narrow, typename Wide>
void widen(Wave& wave, const Instruction& i) {
  const Source<u32> codes(wave, i, 0), scale(wave, i, 1);
  require_power_of_two(wave, scale);
  const int shift = selected_shift<Narrow>(i, 0);
  Result<decltype(Wide::join(0, 0))> result;
  for (int lane = 0; lane < kWaveSize; ++lane) {
    const u32 pair = codes[lane] >> shift;
    const float factor = scale_of(scale[lane]);
    result.set(lane, Wide::join(Narrow::decode(pair) * factor,
                                Narrow::decode(pair >> Narrow::kBits) * factor));
  }
  result.write(wave, i);
}

void widen_one(Wave& wave, const Instruction& i) {
  const Source<u32> codes(wave, i, 0), scale(wave, i, 1);
  require_power_of_two(wave, scale);
  const int shift = 8 * (i.op_sel & 3);
  Result<float> result;
  for (int lane = 0; lane < kWaveSize; ++lane) {
    result.set(lane, Fp8::decode(codes[lane] >> shift & 0xff) * scale_of(scale[lane]));
  }
  result.write(wave, i);
}

// Divides by the scale and keeps the rest of the destination, which is also the last source.
template <typename Narrow, typename Pair>
void narrow(Wave& wave, const Instruction& i, const Pair& pair, const Source<u32>& scale,
            int first_select) {
  require_power_of_two(wave, scale);
  const int shift = selected_shift<Narrow>(i, first_select);
  const u32 mask = ((1u << (2 * Narrow::kBits)) - 1) << shift;
  const u32* old = wave.vector[i.dst.reg];
  Result<u32> result;
  for (int lane = 0; lane < kWaveSize; ++lane) {
    const double factor = 1.0 / static_cast<double>(scale_of(scale[lane]));
    const auto [low, high] = pair(lane);
    const u32 code = Narrow::encode(static_cast<float>(low * factor)) |
                     Narrow::encode(static_cast<float>(high * factor)) << Narrow::kBits;
    result.set(lane, (old[lane] & ~mask) | code << shift);
  }
  result.write(wave, i);
}
// The destination's selection follows the sources' in op_sel, except that a word is always named by
// one bit: after two sources bit 2, after three bit 3; a byte takes bits 2 and 3.
template <typename Narrow>
void narrow_f32(Wave& wave, const Instruction& i) {
  const Source<float> a(wave, i, 0), b(wave, i, 1);
  const Source<u32> scale(wave, i, 2);
  const auto pair = [&](int lane) { return std::pair<double, double>(a[lane], b[lane]); };
  narrow<Narrow>(wave, i, pair, scale, Narrow::kBits == 8 ? 3 : 2);
}
template <typename Narrow, typename Wide>
void narrow_packed(Wave& wave, const Instruction& i) {
  const Source<u32> values(wave, i, 0), scale(wave, i, 1);
  const auto pair = [&](int lane) {
    return std::pair<double, double>(Wide::low(values[lane]), Wide::high(values[lane]));
  };
  narrow<Narrow>(wave, i, pair, scale, 2);
}

Opcode scaled(Execute execute, OperandType dst, std::vector<OperandType> src) {
  Opcode out;
  out.execute = execute;
  out.dst = {dst};
  out.src = std::move(src);
  out.modifiers = kPackedSel;
  return out;
}

void add_scaled(OpcodeTable& t) {
  using enum OperandType;
  t["v_cvt_scalef32_f32_fp8"] = scaled(widen_one, kF32, {kB32, kF32});
  t["v_cvt_scalef32_pk_f32_fp8"] = scaled(widen<Fp8, WideF32>, kPkF32, {kB32, kF32});
  t["v_cvt_scalef32_pk_bf16_fp8"] = scaled(widen<Fp8, WideBf16>, kB32, {kB32, kF32});
  t["v_cvt_scalef32_pk_f16_fp8"] = scaled(widen<Fp8, WideF16>, kB32, {kB32, kF32});
  t["v_cvt_scalef32_pk_f32_fp4"] = scaled(widen<Fp4, WideF32>, kPkF32, {kB32, kF32});
  t["v_cvt_scalef32_pk_bf16_fp4"] = scaled(widen<Fp4, WideBf16>, kB32, {kB32, kF32});
  t["v_cvt_scalef32_pk_f16_fp4"] = scaled(widen<Fp4, WideF16>, kB32, {kB32, kF32});
  t["v_cvt_scalef32_pk_fp8_f32"] = scaled(narrow_f32<Fp8>, kB32, {kF32, kF32, kF32});
  t["v_cvt_scalef32_pk_fp8_bf16"] = scaled(narrow_packed<Fp8, WideBf16>, kB32, {kB32, kF32});
  t["v_cvt_scalef32_pk_fp8_f16"] = scaled(narrow_packed<Fp8, WideF16>, kB32, {kB32, kF32});
  t["v_cvt_scalef32_pk_fp4_f32"] = scaled(narrow_f32<Fp4>, kB32, {kF32, kF32, kF32});
  t["v_cvt_scalef32_pk_fp4_bf16"] = scaled(narrow_packed<Fp4, WideBf16>, kB32, {kB32, kF32});
  t["v_cvt_scalef32_pk_fp4_f16"] = scaled(narrow_packed<Fp4, WideF16>, kB32, {kB32, kF32});
}

}  // namespace

void add_vector_convert_fp8(OpcodeTable& table, Arch arch) {
  if (has_fnuz_fp8(arch)) {
    add_plain<true>(table);
  } else {
    add_plain<false>(table);
    add_scaled(table);
  }
}

}  // namespace dsv4::amd::isa
