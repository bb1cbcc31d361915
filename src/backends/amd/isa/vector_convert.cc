// Vector instructions that convert between number formats, 8-bit floats excepted.
#include <limits>

#include "backends/amd/isa/float_math.h"
#include "backends/amd/isa/lanes.h"
#include "core/numbers.h"

namespace dsv4::amd::isa {
namespace {

// Towards zero, saturating; NaN becomes 0.
template <typename Integer, typename Float>
Integer saturate(Float x) {
  using Limits = std::numeric_limits<Integer>;
  if (x != x) return 0;
  const double value = std::trunc(static_cast<double>(x));
  if (value <= static_cast<double>(Limits::min())) return Limits::min();
  if (value >= static_cast<double>(Limits::max())) return Limits::max();
  return static_cast<Integer>(value);
}

template <int kByte>
float byte_to_f32(uint32_t a) {
  return static_cast<float>(a >> (8 * kByte) & 0xff);
}

uint32_t pair(uint16_t low, uint16_t high) {
  return static_cast<uint32_t>(high) << 16 | low;
}

// Towards zero.
uint16_t half_truncated(float x) {
  Half half = f32_to_half(x);
  if (std::fabs(half_to_f32(half)) > std::fabs(x)) --half.bits;
  return half.bits;
}

}  // namespace

void add_vector_convert(OpcodeTable& t) {
  t["v_cvt_f32_i32"] = lane_op([](int32_t a) { return static_cast<float>(a); });
  t["v_cvt_f32_u32"] = lane_op([](uint32_t a) { return static_cast<float>(a); });
  t["v_cvt_f32_ubyte0"] = lane_op([](uint32_t a) { return byte_to_f32<0>(a); });
  t["v_cvt_f32_ubyte1"] = lane_op([](uint32_t a) { return byte_to_f32<1>(a); });
  t["v_cvt_f32_ubyte2"] = lane_op([](uint32_t a) { return byte_to_f32<2>(a); });
  t["v_cvt_f32_ubyte3"] = lane_op([](uint32_t a) { return byte_to_f32<3>(a); });
  t["v_cvt_i32_f32"] = lane_op([](float a) { return saturate<int32_t>(a); });
  t["v_cvt_u32_f32"] = lane_op([](float a) { return saturate<uint32_t>(a); });
  t["v_cvt_flr_i32_f32"] = lane_op([](float a) { return saturate<int32_t>(std::floor(a)); });
  t["v_cvt_rpi_i32_f32"] =
      lane_op([](float a) { return saturate<int32_t>(std::floor(static_cast<double>(a) + 0.5)); });

  t["v_cvt_f64_f32"] = lane_op([](float a) { return static_cast<double>(a); });
  t["v_cvt_f64_i32"] = lane_op([](int32_t a) { return static_cast<double>(a); });
  t["v_cvt_f64_u32"] = lane_op([](uint32_t a) { return static_cast<double>(a); });
  t["v_cvt_f32_f64"] = lane_op([](double a) { return static_cast<float>(a); });
  t["v_cvt_i32_f64"] = lane_op([](double a) { return saturate<int32_t>(a); });
  t["v_cvt_u32_f64"] = lane_op([](double a) { return saturate<uint32_t>(a); });

  t["v_cvt_f32_f16"] = lane_op([](Half a) { return half_to_f32(a); });
  t["v_cvt_f16_f32"] = lane_op([](float a) { return f32_to_half(a); });
  t["v_cvt_f16_u16"] = lane_op([](uint16_t a) { return f32_to_half(a); });
  t["v_cvt_f16_i16"] = lane_op([](int16_t a) { return f32_to_half(a); });
  t["v_cvt_u16_f16"] = lane_op([](Half a) { return saturate<uint16_t>(half_to_f32(a)); });
  t["v_cvt_i16_f16"] = lane_op([](Half a) { return saturate<int16_t>(half_to_f32(a)); });
  t["v_cvt_pkrtz_f16_f32"] =
      lane_op([](float a, float b) { return pair(half_truncated(a), half_truncated(b)); });
  t["v_cvt_pk_f16_f32"] =
      lane_op([](float a, float b) { return pair(f32_to_half(a).bits, f32_to_half(b).bits); });
  t["v_cvt_pk_bf16_f32"] =
      lane_op([](float a, float b) { return pair(f32_to_bf16(a), f32_to_bf16(b)); });
  t["v_cvt_f32_bf16"] = lane_op([](uint16_t a) { return bf16_to_f32(a); });
  t["v_cvt_pk_u16_u32"] = lane_op([](uint32_t a, uint32_t b) {
    return pair(static_cast<uint16_t>(a < 0xffff ? a : 0xffff),
                static_cast<uint16_t>(b < 0xffff ? b : 0xffff));
  });
  t["v_cvt_pk_i16_i32"] = lane_op([](int32_t a, int32_t b) {
    return pair(static_cast<uint16_t>(saturate<int16_t>(static_cast<double>(a))),
                static_cast<uint16_t>(saturate<int16_t>(static_cast<double>(b))));
  });
  t["v_cvt_pk_u8_f32"] = lane_op([](float a, uint32_t byte, uint32_t c) {
    const int shift = static_cast<int>(8 * (byte & 3));
    return (c & ~(0xffu << shift)) | static_cast<uint32_t>(saturate<uint8_t>(a)) << shift;
  });
}

}  // namespace dsv4::amd::isa
