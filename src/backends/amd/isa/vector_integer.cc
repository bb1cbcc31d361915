// Vector instructions on integers and bits.
#include <bit>

#include "backends/amd/isa/lanes.h"

namespace dsv4::amd::isa {
namespace {

using u32 = uint32_t;
using i32 = int32_t;
using u64 = uint64_t;
using i64 = int64_t;

constexpr u32 low24(u32 x) {
  return x & 0xffffffu;
}
constexpr i64 low24_signed(u32 x) {
  return static_cast<i32>(x << 8) >> 8;
}
template <typename T>
constexpr T median(T a, T b, T c) {
  return a < b ? (b < c ? b : (a < c ? c : a)) : (a < c ? a : (b < c ? c : b));
}
template <typename T>
constexpr T min_of(T a, T b) {
  return b < a ? b : a;
}
template <typename T>
constexpr T max_of(T a, T b) {
  return a < b ? b : a;
}

// Selector bytes 0-7 pick a byte of {a, b}, 8-11 a sign, 12 zero, more than 12 ones.
u32 permute_bytes(u32 a, u32 b, u32 selectors) {
  const u64 bytes = static_cast<u64>(a) << 32 | b;
  u32 out = 0;
  for (int i = 0; i < 4; ++i) {
    const u32 selector = selectors >> (8 * i) & 0xff;
    u32 byte = 0;
    if (selector < 8) {
      byte = static_cast<u32>(bytes >> (8 * selector)) & 0xff;
    } else if (selector < 12) {
      byte = (bytes >> (16 * (selector - 8) + 15) & 1) != 0 ? 0xff : 0;
    } else if (selector > 12) {
      byte = 0xff;
    }
    out |= byte << (8 * i);
  }
  return out;
}

// Lanes below this one that are set in half of a mask, plus a number.
template <int kHalf>
void count_lanes_below(Wave& wave, const Instruction& i) {
  const Source<u32> mask(wave, i, 0), base(wave, i, 1);
  Result<u32> result;
  for (int lane = 0; lane < kWaveSize; ++lane) {
    const u64 below = (u64{1} << lane) - 1;
    const u32 selected = mask[lane] & static_cast<u32>(below >> (32 * kHalf));
    result.set(lane, static_cast<u32>(std::popcount(selected)) + base[lane]);
  }
  result.write(wave, i);
}

// Any function of three bits; bit (4 a + 2 b + c) of the table is its value.
template <typename T>
void bitop3(Wave& wave, const Instruction& i) {
  const Source<T> a(wave, i, 0), b(wave, i, 1), c(wave, i, 2);
  Result<T> result;
  for (int lane = 0; lane < kWaveSize; ++lane) {
    T out = 0;
    for (int entry = 0; entry < 8; ++entry) {
      if ((i.table >> entry & 1) == 0) continue;
      const T in_a = entry & 4 ? a[lane] : static_cast<T>(~a[lane]);
      const T in_b = entry & 2 ? b[lane] : static_cast<T>(~b[lane]);
      const T in_c = entry & 1 ? c[lane] : static_cast<T>(~c[lane]);
      out = static_cast<T>(out | (in_a & in_b & in_c));
    }
    result.set(lane, out);
  }
  result.write(wave, i);
}

void add_moves_and_bits(OpcodeTable& t) {
  t["v_mov_b32"] = lane_op([](u32 a) { return a; });
  t["v_mov_b64"] = lane_op([](u64 a) { return a; });
  t["v_accvgpr_read_b32"] = t["v_accvgpr_write_b32"] = t["v_accvgpr_mov_b32"] = t["v_mov_b32"];
  t["v_cndmask_b32"] = lane_op([](u32 a, u32 b, bool second) { return second ? b : a; });
  t["v_not_b32"] = lane_op([](u32 a) { return ~a; });
  t["v_and_b32"] = lane_op([](u32 a, u32 b) { return a & b; });
  t["v_or_b32"] = lane_op([](u32 a, u32 b) { return a | b; });
  t["v_xor_b32"] = lane_op([](u32 a, u32 b) { return a ^ b; });
  t["v_xnor_b32"] = lane_op([](u32 a, u32 b) { return ~(a ^ b); });
  t["v_or3_b32"] = lane_op([](u32 a, u32 b, u32 c) { return a | b | c; });
  t["v_and_or_b32"] = lane_op([](u32 a, u32 b, u32 c) { return (a & b) | c; });
  t["v_bfi_b32"] = lane_op([](u32 a, u32 b, u32 c) { return (a & b) | (~a & c); });
  t["v_bfm_b32"] = lane_op([](u32 a, u32 b) { return ((1u << (a & 31)) - 1) << (b & 31); });
  t["v_bfe_u32"] =
      lane_op([](u32 a, u32 b, u32 c) { return a >> (b & 31) & ((1u << (c & 31)) - 1); });
  t["v_bfe_i32"] = lane_op([](u32 a, u32 b, u32 c) {
    const u32 width = c & 31, mask = (1u << width) - 1, sign = width == 0 ? 0 : 1u << (width - 1);
    return ((static_cast<u32>(static_cast<i32>(a) >> (b & 31)) & mask) ^ sign) - sign;
  });
  t["v_bfrev_b32"] = lane_op([](u32 a) {
    a = (a & 0x55555555u) << 1 | (a >> 1 & 0x55555555u);
    a = (a & 0x33333333u) << 2 | (a >> 2 & 0x33333333u);
    a = (a & 0x0f0f0f0fu) << 4 | (a >> 4 & 0x0f0f0f0fu);
    a = (a & 0x00ff00ffu) << 8 | (a >> 8 & 0x00ff00ffu);
    return a << 16 | a >> 16;
  });
  t["v_bcnt_u32_b32"] =
      lane_op([](u32 a, u32 b) { return static_cast<u32>(std::popcount(a)) + b; });
  t["v_ffbh_u32"] =
      lane_op([](u32 a) { return a == 0 ? ~0u : static_cast<u32>(std::countl_zero(a)); });
  t["v_ffbl_b32"] =
      lane_op([](u32 a) { return a == 0 ? ~0u : static_cast<u32>(std::countr_zero(a)); });
  t["v_ffbh_i32"] = lane_op([](u32 a) {
    const u32 changes = a ^ static_cast<u32>(static_cast<i32>(a) >> 31);
    return changes == 0 ? ~0u : static_cast<u32>(std::countl_zero(changes));
  });
  t["v_perm_b32"] = lane_op([](u32 a, u32 b, u32 c) { return permute_bytes(a, b, c); });
  t["v_alignbit_b32"] = lane_op([](u32 a, u32 b, u32 c) {
    return static_cast<u32>((static_cast<u64>(a) << 32 | b) >> (c & 31));
  });
  t["v_alignbyte_b32"] = lane_op([](u32 a, u32 b, u32 c) {
    return static_cast<u32>((static_cast<u64>(a) << 32 | b) >> (8 * (c & 3)));
  });

  t["v_mbcnt_lo_u32_b32"] = t["v_mbcnt_hi_u32_b32"] = lane_op([](u32, u32) { return 0u; });
  t["v_mbcnt_lo_u32_b32"].execute = count_lanes_below<0>;
  t["v_mbcnt_hi_u32_b32"].execute = count_lanes_below<1>;
  t["v_bitop3_b32"] = lane_op([](u32, u32, u32) { return 0u; });
  t["v_bitop3_b32"].execute = bitop3<u32>;
  t["v_bitop3_b16"] = lane_op([](uint16_t, uint16_t, uint16_t) { return uint16_t{0}; });
  t["v_bitop3_b16"].execute = bitop3<uint16_t>;
  t["v_bitop3_b32"].modifiers |= kBitop;
  t["v_bitop3_b16"].modifiers |= kBitop;
}

void add_shifts(OpcodeTable& t) {
  t["v_lshlrev_b32"] = lane_op([](u32 a, u32 b) { return b << (a & 31); });
  t["v_lshrrev_b32"] = lane_op([](u32 a, u32 b) { return b >> (a & 31); });
  t["v_ashrrev_i32"] = lane_op([](u32 a, i32 b) { return b >> (a & 31); });
  t["v_lshl_add_u32"] = lane_op([](u32 a, u32 b, u32 c) { return (a << (b & 31)) + c; });
  t["v_add_lshl_u32"] = lane_op([](u32 a, u32 b, u32 c) { return (a + b) << (c & 31); });
  t["v_lshl_or_b32"] = lane_op([](u32 a, u32 b, u32 c) { return a << (b & 31) | c; });
  t["v_xad_u32"] = lane_op([](u32 a, u32 b, u32 c) { return (a ^ b) + c; });
  t["v_lshlrev_b64"] = lane_op([](u32 a, u64 b) { return b << (a & 63); });
  t["v_lshrrev_b64"] = lane_op([](u32 a, u64 b) { return b >> (a & 63); });
  t["v_ashrrev_i64"] = lane_op([](u32 a, i64 b) { return b >> (a & 63); });
  // The shift of v_lshl_add_u64 is at most 4.
  t["v_lshl_add_u64"] = lane_op([](u64 a, u32 b, u64 c) { return (a << (b & 7)) + c; });
}

void add_sums(OpcodeTable& t) {
  t["v_add_u32"] = lane_op([](u32 a, u32 b) { return a + b; });
  t["v_sub_u32"] = lane_op([](u32 a, u32 b) { return a - b; });
  t["v_subrev_u32"] = lane_op([](u32 a, u32 b) { return b - a; });
  t["v_add_i32"] = t["v_add_u32"];
  t["v_sub_i32"] = t["v_sub_u32"];
  t["v_add_u32 clamp"] = lane_op([](u32 a, u32 b) { return a + b < a ? ~0u : a + b; });
  t["v_sub_u32 clamp"] = lane_op([](u32 a, u32 b) { return a < b ? 0u : a - b; });
  t["v_add_i32 clamp"] = lane_op([](i32 a, i32 b) {
    return static_cast<i32>(median<i64>(static_cast<i64>(a) + b, INT32_MIN, INT32_MAX));
  });
  t["v_sub_i32 clamp"] = lane_op([](i32 a, i32 b) {
    return static_cast<i32>(median<i64>(static_cast<i64>(a) - b, INT32_MIN, INT32_MAX));
  });
  t["v_add3_u32"] = lane_op([](u32 a, u32 b, u32 c) { return a + b + c; });
  t["v_add_co_u32"] = lane_op([](u32 a, u32 b) { return WithMask<u32>{a + b, a + b < a}; });
  t["v_sub_co_u32"] = lane_op([](u32 a, u32 b) { return WithMask<u32>{a - b, a < b}; });
  t["v_subrev_co_u32"] = lane_op([](u32 a, u32 b) { return WithMask<u32>{b - a, b < a}; });
  t["v_addc_co_u32"] = lane_op([](u32 a, u32 b, bool carry) {
    const u64 sum = static_cast<u64>(a) + b + carry;
    return WithMask<u32>{static_cast<u32>(sum), sum >> 32 != 0};
  });
  t["v_subb_co_u32"] = lane_op([](u32 a, u32 b, bool borrow) {
    return WithMask<u32>{a - b - borrow, a < static_cast<u64>(b) + borrow};
  });
  t["v_subbrev_co_u32"] = lane_op([](u32 a, u32 b, bool borrow) {
    return WithMask<u32>{b - a - borrow, b < static_cast<u64>(a) + borrow};
  });
  t["v_min_u32"] = lane_op([](u32 a, u32 b) { return min_of(a, b); });
  t["v_max_u32"] = lane_op([](u32 a, u32 b) { return max_of(a, b); });
  t["v_min_i32"] = lane_op([](i32 a, i32 b) { return min_of(a, b); });
  t["v_max_i32"] = lane_op([](i32 a, i32 b) { return max_of(a, b); });
  t["v_min3_u32"] = lane_op([](u32 a, u32 b, u32 c) { return min_of(min_of(a, b), c); });
  t["v_max3_u32"] = lane_op([](u32 a, u32 b, u32 c) { return max_of(max_of(a, b), c); });
  t["v_med3_u32"] = lane_op([](u32 a, u32 b, u32 c) { return median(a, b, c); });
  t["v_min3_i32"] = lane_op([](i32 a, i32 b, i32 c) { return min_of(min_of(a, b), c); });
  t["v_max3_i32"] = lane_op([](i32 a, i32 b, i32 c) { return max_of(max_of(a, b), c); });
  t["v_med3_i32"] = lane_op([](i32 a, i32 b, i32 c) { return median(a, b, c); });
  t["v_sad_u32"] = lane_op([](u32 a, u32 b, u32 c) { return (a > b ? a - b : b - a) + c; });
}

void add_products(OpcodeTable& t) {
  t["v_mul_lo_u32"] = lane_op([](u32 a, u32 b) { return a * b; });
  t["v_mul_hi_u32"] =
      lane_op([](u32 a, u32 b) { return static_cast<u32>((static_cast<u64>(a) * b) >> 32); });
  t["v_mul_hi_i32"] =
      lane_op([](i32 a, i32 b) { return static_cast<i32>((static_cast<i64>(a) * b) >> 32); });
  t["v_mul_u32_u24"] = lane_op([](u32 a, u32 b) { return low24(a) * low24(b); });
  t["v_mul_hi_u32_u24"] = lane_op(
      [](u32 a, u32 b) { return static_cast<u32>((static_cast<u64>(low24(a)) * low24(b)) >> 32); });
  t["v_mul_i32_i24"] =
      lane_op([](u32 a, u32 b) { return static_cast<u32>(low24_signed(a) * low24_signed(b)); });
  t["v_mul_hi_i32_i24"] = lane_op(
      [](u32 a, u32 b) { return static_cast<u32>((low24_signed(a) * low24_signed(b)) >> 32); });
  t["v_mad_u32_u24"] = lane_op([](u32 a, u32 b, u32 c) { return low24(a) * low24(b) + c; });
  t["v_mad_i32_i24"] = lane_op(
      [](u32 a, u32 b, u32 c) { return static_cast<u32>(low24_signed(a) * low24_signed(b)) + c; });
  t["v_mad_u64_u32"] = lane_op([](u32 a, u32 b, u64 c) {
    const u64 sum = static_cast<u64>(a) * b + c;
    return WithMask<u64>{sum, sum < c};
  });
  t["v_mad_i64_i32"] = lane_op([](i32 a, i32 b, i64 c) {
    i64 sum;
    const bool overflow = __builtin_add_overflow(static_cast<i64>(a) * b, c, &sum);
    return WithMask<i64>{sum, overflow};
  });
  t["v_mad_u32_u16"] =
      lane_op([](uint16_t a, uint16_t b, u32 c) { return static_cast<u32>(a) * b + c; });
  t["v_mad_i32_i16"] = lane_op(
      [](int16_t a, int16_t b, u32 c) { return static_cast<u32>(static_cast<i32>(a) * b) + c; });
}

void add_16_bit(OpcodeTable& t) {
  using u16 = uint16_t;
  using i16 = int16_t;
  t["v_add_u16"] = lane_op([](u16 a, u16 b) { return static_cast<u16>(a + b); });
  t["v_sub_u16"] = lane_op([](u16 a, u16 b) { return static_cast<u16>(a - b); });
  t["v_subrev_u16"] = lane_op([](u16 a, u16 b) { return static_cast<u16>(b - a); });
  t["v_add_u16 clamp"] =
      lane_op([](u16 a, u16 b) { return static_cast<u16>(min_of(a + b, 0xffff)); });
  t["v_sub_u16 clamp"] = lane_op([](u16 a, u16 b) { return static_cast<u16>(max_of(a - b, 0)); });
  t["v_add_i16"] = t["v_add_u16"];
  t["v_sub_i16"] = t["v_sub_u16"];
  t["v_mul_lo_u16"] =
      lane_op([](u16 a, u16 b) { return static_cast<u16>(static_cast<u32>(a) * b); });
  // The multiply-adds leave the upper half of their register alone.
  t["v_mad_u16"] = t["v_mad_i16"] = lane_op(
      [](u16 a, u16 b, u16 c) { return LowHalf{static_cast<u16>(static_cast<u32>(a) * b + c)}; });
  // v_mad_legacy_* are the older forms, which clear it.
  t["v_mad_legacy_u16"] = t["v_mad_legacy_i16"] =
      lane_op([](u16 a, u16 b, u16 c) { return static_cast<u16>(static_cast<u32>(a) * b + c); });
  t["v_lshlrev_b16"] = lane_op([](u16 a, u16 b) { return static_cast<u16>(b << (a & 15)); });
  t["v_lshrrev_b16"] = lane_op([](u16 a, u16 b) { return static_cast<u16>(b >> (a & 15)); });
  t["v_ashrrev_i16"] = lane_op([](u16 a, i16 b) { return static_cast<i16>(b >> (a & 15)); });
  t["v_min_u16"] = lane_op([](u16 a, u16 b) { return min_of(a, b); });
  t["v_max_u16"] = lane_op([](u16 a, u16 b) { return max_of(a, b); });
  t["v_min_i16"] = lane_op([](i16 a, i16 b) { return min_of(a, b); });
  t["v_max_i16"] = lane_op([](i16 a, i16 b) { return max_of(a, b); });
  t["v_min3_u16"] = lane_op([](u16 a, u16 b, u16 c) { return LowHalf{min_of(min_of(a, b), c)}; });
  t["v_max3_u16"] = lane_op([](u16 a, u16 b, u16 c) { return LowHalf{max_of(max_of(a, b), c)}; });
  t["v_min3_i16"] = lane_op(
      [](i16 a, i16 b, i16 c) { return LowHalf{static_cast<u16>(min_of(min_of(a, b), c))}; });
  t["v_max3_i16"] = lane_op(
      [](i16 a, i16 b, i16 c) { return LowHalf{static_cast<u16>(max_of(max_of(a, b), c))}; });
  t["v_med3_i16"] =
      lane_op([](i16 a, i16 b, i16 c) { return LowHalf{static_cast<u16>(median(a, b, c))}; });
}

}  // namespace

void add_vector_integer(OpcodeTable& table) {
  add_moves_and_bits(table);
  add_shifts(table);
  add_sums(table);
  add_products(table);
  add_16_bit(table);
}

}  // namespace dsv4::amd::isa
