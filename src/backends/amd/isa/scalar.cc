// Scalar arithmetic, bits and comparisons.
#include <bit>

#include "backends/amd/isa/scalar_op.h"

namespace dsv4::amd::isa {
namespace {

using u32 = uint32_t;
using i32 = int32_t;
using u64 = uint64_t;
using i64 = int64_t;

// Field of a bit-field instruction: offset in the low bits, width in bits 16-22.
template <typename T>
T extract(T value, u32 field) {
  constexpr u32 kBits = 8 * sizeof(T);
  const u32 offset = field & (kBits - 1), width = field >> 16 & 0x7f;
  if (width == 0) return 0;
  using Unsigned = std::make_unsigned_t<T>;
  const T shifted = static_cast<T>(value >> offset);
  if (width >= kBits) return shifted;
  const Unsigned mask = (Unsigned{1} << width) - 1, bits = static_cast<Unsigned>(shifted) & mask;
  if constexpr (std::is_signed_v<T>) {
    const Unsigned sign = Unsigned{1} << (width - 1);
    return static_cast<T>((bits ^ sign) - sign);
  } else {
    return bits;
  }
}

template <typename T>
i32 first_zero_from_top(T value) {
  return value == 0 ? -1 : std::countl_zero(value);
}
template <typename T>
i32 first_one_from_bottom(T value) {
  return value == 0 ? -1 : std::countr_zero(value);
}
template <typename T>
i32 equal_sign_bits(T value) {
  using Unsigned = std::make_unsigned_t<T>;
  return first_zero_from_top(static_cast<Unsigned>(value ^ (value >> (8 * sizeof(T) - 1))));
}
template <typename T>
T reversed(T value) {
  T out = 0;
  for (size_t i = 0; i < 8 * sizeof(T); ++i) out = static_cast<T>(out << 1 | (value >> i & 1));
  return out;
}

template <typename T>
void add_bitwise(OpcodeTable& t, const std::string& type) {
  t["s_and_" + type] = scalar_op([](T a, T b) { return a & b; });
  t["s_or_" + type] = scalar_op([](T a, T b) { return a | b; });
  t["s_xor_" + type] = scalar_op([](T a, T b) { return a ^ b; });
  t["s_andn2_" + type] = scalar_op([](T a, T b) { return a & ~b; });
  t["s_orn2_" + type] = scalar_op([](T a, T b) { return a | ~b; });
  t["s_nand_" + type] = scalar_op([](T a, T b) { return ~(a & b); });
  t["s_nor_" + type] = scalar_op([](T a, T b) { return ~(a | b); });
  t["s_xnor_" + type] = scalar_op([](T a, T b) { return ~(a ^ b); });
  t["s_not_" + type] = scalar_op([](T a) { return ~a; });
  t["s_mov_" + type] = scalar_op([](T a) { return KeepScc<T>{a}; });
  t["s_cselect_" + type] = scalar_op([](T a, T b, bool scc) { return KeepScc<T>{scc ? a : b}; });
  t["s_lshl_" + type] = scalar_op([](T a, u32 b) { return a << (b & (8 * sizeof(T) - 1)); });
  t["s_lshr_" + type] = scalar_op([](T a, u32 b) { return a >> (b & (8 * sizeof(T) - 1)); });
  t["s_brev_" + type] = scalar_op([](T a) { return KeepScc<T>{reversed(a)}; });
  t["s_bcnt1_i32_" + type] = scalar_op([](T a) { return static_cast<i32>(std::popcount(a)); });
  t["s_bcnt0_i32_" + type] = scalar_op([](T a) { return static_cast<i32>(std::popcount(~a)); });
  t["s_ff1_i32_" + type] = scalar_op([](T a) { return KeepScc<i32>{first_one_from_bottom(a)}; });
  t["s_ff0_i32_" + type] = scalar_op([](T a) { return KeepScc<i32>{first_one_from_bottom(~a)}; });
  t["s_flbit_i32_" + type] = scalar_op([](T a) { return KeepScc<i32>{first_zero_from_top(a)}; });
  t["s_bfm_" + type] = scalar_op([](u32 a, u32 b) {
    constexpr u32 kMask = 8 * sizeof(T) - 1;
    return KeepScc<T>{((T{1} << (a & kMask)) - 1) << (b & kMask)};
  });
  t["s_bitcmp0_" + type] =
      scalar_op([](T a, u32 b) { return (a >> (b & (8 * sizeof(T) - 1)) & 1) == 0; });
  t["s_bitcmp1_" + type] =
      scalar_op([](T a, u32 b) { return (a >> (b & (8 * sizeof(T) - 1)) & 1) == 1; });
  t["s_bitset0_" + type] = scalar_op(
      [](u32 a, T old) { return KeepScc<T>{old & ~(T{1} << (a & (8 * sizeof(T) - 1)))}; });
  t["s_bitset1_" + type] =
      scalar_op([](u32 a, T old) { return KeepScc<T>{old | T{1} << (a & (8 * sizeof(T) - 1))}; });
  t["s_bitset0_" + type].dst_is_source = t["s_bitset1_" + type].dst_is_source = true;
}

template <typename T>
void add_compares(OpcodeTable& t, const std::string& type, const std::string& prefix) {
  t[prefix + "eq_" + type] = scalar_op([](T a, T b) { return a == b; });
  t[prefix + "lg_" + type] = scalar_op([](T a, T b) { return a != b; });
  t[prefix + "lt_" + type] = scalar_op([](T a, T b) { return a < b; });
  t[prefix + "le_" + type] = scalar_op([](T a, T b) { return a <= b; });
  t[prefix + "gt_" + type] = scalar_op([](T a, T b) { return a > b; });
  t[prefix + "ge_" + type] = scalar_op([](T a, T b) { return a >= b; });
}

void add_sums(OpcodeTable& t) {
  t["s_add_u32"] = scalar_op([](u32 a, u32 b) { return WithScc<u32>{a + b, a + b < a}; });
  t["s_sub_u32"] = scalar_op([](u32 a, u32 b) { return WithScc<u32>{a - b, a < b}; });
  t["s_addc_u32"] = scalar_op([](u32 a, u32 b, bool carry) {
    const u64 sum = static_cast<u64>(a) + b + carry;
    return WithScc<u32>{static_cast<u32>(sum), sum >> 32 != 0};
  });
  t["s_subb_u32"] = scalar_op([](u32 a, u32 b, bool borrow) {
    return WithScc<u32>{a - b - borrow, a < static_cast<u64>(b) + borrow};
  });
  t["s_add_i32"] = scalar_op([](i32 a, i32 b) {
    i32 sum;
    const bool overflow = __builtin_add_overflow(a, b, &sum);
    return WithScc<i32>{sum, overflow};
  });
  t["s_sub_i32"] = scalar_op([](i32 a, i32 b) {
    i32 difference;
    const bool overflow = __builtin_sub_overflow(a, b, &difference);
    return WithScc<i32>{difference, overflow};
  });
  t["s_mul_i32"] = scalar_op([](u32 a, u32 b) { return KeepScc<u32>{a * b}; });
  t["s_mul_hi_u32"] = scalar_op(
      [](u32 a, u32 b) { return KeepScc<u32>{static_cast<u32>((static_cast<u64>(a) * b) >> 32)}; });
  t["s_mul_hi_i32"] = scalar_op(
      [](i32 a, i32 b) { return KeepScc<i32>{static_cast<i32>((static_cast<i64>(a) * b) >> 32)}; });
  t["s_min_u32"] = scalar_op([](u32 a, u32 b) { return WithScc<u32>{a < b ? a : b, a < b}; });
  t["s_max_u32"] = scalar_op([](u32 a, u32 b) { return WithScc<u32>{a > b ? a : b, a > b}; });
  t["s_min_i32"] = scalar_op([](i32 a, i32 b) { return WithScc<i32>{a < b ? a : b, a < b}; });
  t["s_max_i32"] = scalar_op([](i32 a, i32 b) { return WithScc<i32>{a > b ? a : b, a > b}; });
  t["s_abs_i32"] = scalar_op([](u32 a) { return a >> 31 != 0 ? 0u - a : a; });
  t["s_absdiff_i32"] = scalar_op([](u32 a, u32 b) {
    const u32 difference = a - b;
    return difference >> 31 != 0 ? 0u - difference : difference;
  });
  const auto shift_add = [&](const char* name, auto op) { t[name] = scalar_op(op); };
  shift_add("s_lshl1_add_u32", [](u32 a, u32 b) {
    const u64 sum = (static_cast<u64>(a) << 1) + b;
    return WithScc<u32>{static_cast<u32>(sum), sum >> 32 != 0};
  });
  shift_add("s_lshl2_add_u32", [](u32 a, u32 b) {
    const u64 sum = (static_cast<u64>(a) << 2) + b;
    return WithScc<u32>{static_cast<u32>(sum), sum >> 32 != 0};
  });
  shift_add("s_lshl3_add_u32", [](u32 a, u32 b) {
    const u64 sum = (static_cast<u64>(a) << 3) + b;
    return WithScc<u32>{static_cast<u32>(sum), sum >> 32 != 0};
  });
  shift_add("s_lshl4_add_u32", [](u32 a, u32 b) {
    const u64 sum = (static_cast<u64>(a) << 4) + b;
    return WithScc<u32>{static_cast<u32>(sum), sum >> 32 != 0};
  });
}

void add_fields(OpcodeTable& t) {
  t["s_ashr_i32"] = scalar_op([](i32 a, u32 b) { return a >> (b & 31); });
  t["s_ashr_i64"] = scalar_op([](i64 a, u32 b) { return a >> (b & 63); });
  t["s_bfe_u32"] = scalar_op([](u32 a, u32 b) { return extract(a, b); });
  t["s_bfe_i32"] = scalar_op([](i32 a, u32 b) { return extract(a, b); });
  t["s_bfe_u64"] = scalar_op([](u64 a, u32 b) { return extract(a, b); });
  t["s_bfe_i64"] = scalar_op([](i64 a, u32 b) { return extract(a, b); });
  t["s_flbit_i32"] = scalar_op([](i32 a) { return KeepScc<i32>{equal_sign_bits(a)}; });
  t["s_flbit_i32_i64"] = scalar_op([](i64 a) { return KeepScc<i32>{equal_sign_bits(a)}; });
  t["s_sext_i32_i8"] = scalar_op([](u32 a) { return KeepScc<i32>{static_cast<int8_t>(a)}; });
  t["s_sext_i32_i16"] = scalar_op([](u32 a) { return KeepScc<i32>{static_cast<int16_t>(a)}; });
  t["s_pack_ll_b32_b16"] =
      scalar_op([](u32 a, u32 b) { return KeepScc<u32>{(a & 0xffff) | b << 16}; });
  t["s_pack_lh_b32_b16"] =
      scalar_op([](u32 a, u32 b) { return KeepScc<u32>{(a & 0xffff) | (b & 0xffff0000u)}; });
  t["s_pack_hh_b32_b16"] =
      scalar_op([](u32 a, u32 b) { return KeepScc<u32>{a >> 16 | (b & 0xffff0000u)}; });
}

// The constants of these are 16 bits; the decoder has extended their sign (s_cmpk_*_u32: zeros).
void add_small_constants(OpcodeTable& t) {
  t["s_movk_i32"] = scalar_op([](u32 a) { return KeepScc<u32>{a}; });
  t["s_addk_i32"] = scalar_op([](i32 a, i32 old) {
    i32 sum;
    const bool overflow = __builtin_add_overflow(a, old, &sum);
    return WithScc<i32>{sum, overflow};
  });
  t["s_mulk_i32"] = scalar_op([](u32 a, u32 old) { return KeepScc<u32>{a * old}; });
  t["s_cmovk_i32"] =
      scalar_op([](u32 a, u32 old, bool scc) { return KeepScc<u32>{scc ? a : old}; });
  t["s_cmov_b32"] = t["s_cmovk_i32"];
  t["s_cmov_b64"] = scalar_op([](u64 a, u64 old, bool scc) { return KeepScc<u64>{scc ? a : old}; });
  for (const char* name : {"s_addk_i32", "s_mulk_i32", "s_cmovk_i32", "s_cmov_b32", "s_cmov_b64"}) {
    t[name].dst_is_source = true;
  }
}

}  // namespace

void add_scalar(OpcodeTable& t) {
  add_bitwise<u32>(t, "b32");
  add_bitwise<u64>(t, "b64");
  add_sums(t);
  add_fields(t);
  add_small_constants(t);
  add_compares<i32>(t, "i32", "s_cmp_");
  add_compares<u32>(t, "u32", "s_cmp_");
  add_compares<u64>(t, "u64", "s_cmp_");
  add_compares<i32>(t, "i32", "s_cmpk_");
  add_compares<u32>(t, "u32", "s_cmpk_");
}

}  // namespace dsv4::amd::isa
