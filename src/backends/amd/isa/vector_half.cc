// Vector instructions on half precision, one value per lane.
#include "backends/amd/isa/float_math.h"
#include "backends/amd/isa/lanes.h"

namespace dsv4::amd::isa {
namespace {

float f(Half x) {
  return half_to_f32(x);
}
double d(Half x) {
  return static_cast<double>(half_to_f32(x));
}
Half fma_half(Half a, Half b, Half c) {
  return f64_to_half(exact_product_sum(d(a), d(b), d(c)));
}
LowHalf low(Half x) {
  return {x.bits};
}

}  // namespace

void add_vector_half(OpcodeTable& t) {
  // Sums and products of halves are exact in double.
  t["v_add_f16"] = lane_op([](Half a, Half b) { return f64_to_half(d(a) + d(b)); });
  t["v_sub_f16"] = lane_op([](Half a, Half b) { return f64_to_half(d(a) - d(b)); });
  t["v_subrev_f16"] = lane_op([](Half a, Half b) { return f64_to_half(d(b) - d(a)); });
  t["v_mul_f16"] = lane_op([](Half a, Half b) { return f64_to_half(d(a) * d(b)); });
  // The fused forms leave the upper half of their register alone.
  t["v_fma_f16"] = lane_op([](Half a, Half b, Half c) { return low(fma_half(a, b, c)); });
  t["v_fmac_f16"] =
      accumulating_lane_op([](Half a, Half b, Half c) { return low(fma_half(a, b, c)); });
  t["v_min_f16"] = lane_op([](Half a, Half b) { return f32_to_half(min_number(f(a), f(b))); });
  t["v_max_f16"] = lane_op([](Half a, Half b) { return f32_to_half(max_number(f(a), f(b))); });
  t["v_min3_f16"] = lane_op([](Half a, Half b, Half c) {
    return low(f32_to_half(min_number(min_number(f(a), f(b)), f(c))));
  });
  t["v_max3_f16"] = lane_op([](Half a, Half b, Half c) {
    return low(f32_to_half(max_number(max_number(f(a), f(b)), f(c))));
  });
  t["v_med3_f16"] = lane_op(
      [](Half a, Half b, Half c) { return low(f32_to_half(median_number(f(a), f(b), f(c)))); });
  t["v_floor_f16"] = lane_op([](Half a) { return f32_to_half(std::floor(f(a))); });
  t["v_ceil_f16"] = lane_op([](Half a) { return f32_to_half(std::ceil(f(a))); });
  t["v_trunc_f16"] = lane_op([](Half a) { return f32_to_half(std::trunc(f(a))); });
  t["v_rndne_f16"] = lane_op([](Half a) { return f32_to_half(std::nearbyint(f(a))); });
  t["v_rcp_f16"] = lane_op([](Half a) { return f64_to_half(1.0 / d(a)); });
  t["v_rsq_f16"] = lane_op([](Half a) { return f64_to_half(1.0 / std::sqrt(d(a))); });
  t["v_sqrt_f16"] = lane_op([](Half a) { return f64_to_half(std::sqrt(d(a))); });
  t["v_exp_f16"] = lane_op([](Half a) { return f64_to_half(std::exp2(d(a))); });
  t["v_log_f16"] = lane_op([](Half a) { return f64_to_half(std::log2(d(a))); });
  t["v_ldexp_f16"] = lane_op([](Half a, int16_t b) { return f64_to_half(std::ldexp(d(a), b)); });
  t["v_frexp_mant_f16"] = lane_op([](Half a) { return f32_to_half(frexp_mantissa(f(a))); });
  t["v_frexp_exp_i16_f16"] =
      lane_op([](Half a) { return static_cast<int16_t>(frexp_exponent(f(a))); });
  t["v_div_fixup_f16"] = lane_op([](Half q, Half denominator, Half numerator) {
    return low(f32_to_half(div_fixup(f(q), f(denominator), f(numerator))));
  });
  t["v_pack_b32_f16"] =
      lane_op([](Half a, Half b) { return static_cast<uint32_t>(b.bits) << 16 | a.bits; });
}

}  // namespace dsv4::amd::isa
