// Vector instructions on float and double.
#include "backends/amd/isa/float_math.h"
#include "backends/amd/isa/lanes.h"

namespace dsv4::amd::isa {
namespace {

// fma(a, b, c), scaled back where v_div_scale asked for it: up or down, whichever way the quotient
// estimate c lies. One rounding in float; a denormal double quotient is rounded twice.
float scaled_fma(float a, float b, float c, bool undo) {
  const double exact = exact_product_sum(a, b, c);
  return static_cast<float>(undo ? exact * (exponent_field(c) > 127 ? 0x1p64 : 0x1p-64) : exact);
}
double scaled_fma(double a, double b, double c, bool undo) {
  const double sum = std::fma(a, b, c);
  return undo ? sum * (exponent_field(c) > 1023 ? 0x1p128 : 0x1p-128) : sum;
}

template <typename T>
void div_fmas(Wave& wave, const Instruction& i) {
  const Source<T> a(wave, i, 0), b(wave, i, 1), c(wave, i, 2);
  const uint64_t undo = wave.vcc();
  Result<T> result;
  for (int lane = 0; lane < kWaveSize; ++lane) {
    result.set(lane, scaled_fma(a[lane], b[lane], c[lane], (undo >> lane & 1) != 0));
  }
  result.write(wave, i);
}

template <typename T>
WithMask<T> div_scale_flagged(T x, T denominator, T numerator) {
  WithMask<T> out;
  out.value = div_scale(x, denominator, numerator, &out.mask);
  return out;
}

float mul_legacy(float a, float b) {
  return a == 0 || b == 0 ? 0.0f : a * b;
}

void add_float(OpcodeTable& t) {
  t["v_add_f32"] = lane_op([](float a, float b) { return a + b; });
  t["v_sub_f32"] = lane_op([](float a, float b) { return a - b; });
  t["v_subrev_f32"] = lane_op([](float a, float b) { return b - a; });
  t["v_mul_f32"] = lane_op([](float a, float b) { return a * b; });
  t["v_mul_legacy_f32"] = lane_op([](float a, float b) { return mul_legacy(a, b); });
  t["v_fma_f32"] = lane_op([](float a, float b, float c) { return fma_f32(a, b, c); });
  // The constants of fmamk and fmaak stand where the factor and the summand stand.
  t["v_fmamk_f32"] = t["v_fmaak_f32"] = t["v_fma_f32"];
  t["v_fmac_f32"] =
      accumulating_lane_op([](float a, float b, float c) { return fma_f32(a, b, c); });
  t["v_min_f32"] = lane_op([](float a, float b) { return min_number(a, b); });
  t["v_max_f32"] = lane_op([](float a, float b) { return max_number(a, b); });
  t["v_min3_f32"] =
      lane_op([](float a, float b, float c) { return min_number(min_number(a, b), c); });
  t["v_max3_f32"] =
      lane_op([](float a, float b, float c) { return max_number(max_number(a, b), c); });
  t["v_med3_f32"] = lane_op([](float a, float b, float c) { return median_number(a, b, c); });
  t["v_minimum3_f32"] =
      lane_op([](float a, float b, float c) { return minimum(minimum(a, b), c); });
  t["v_maximum3_f32"] =
      lane_op([](float a, float b, float c) { return maximum(maximum(a, b), c); });
  t["v_floor_f32"] = lane_op([](float a) { return std::floor(a); });
  t["v_ceil_f32"] = lane_op([](float a) { return std::ceil(a); });
  t["v_trunc_f32"] = lane_op([](float a) { return std::trunc(a); });
  t["v_rndne_f32"] = lane_op([](float a) { return std::nearbyint(a); });
  t["v_fract_f32"] = lane_op([](float a) { return fract(a); });
  t["v_rcp_f32"] = lane_op([](float a) { return rcp(a); });
  t["v_rcp_iflag_f32"] = t["v_rcp_f32"];
  t["v_rsq_f32"] = lane_op([](float a) { return rsq(a); });
  t["v_sqrt_f32"] = lane_op([](float a) { return square_root(a); });
  t["v_exp_f32"] = lane_op([](float a) { return exp2_flushed(a); });
  t["v_log_f32"] = lane_op([](float a) { return log2_flushed(a); });
  t["v_sin_f32"] = lane_op([](float a) { return sin_revolutions(a); });
  t["v_cos_f32"] = lane_op([](float a) { return cos_revolutions(a); });
  t["v_ldexp_f32"] = lane_op([](float a, int32_t b) { return std::ldexp(a, b); });
  t["v_frexp_mant_f32"] = lane_op([](float a) { return frexp_mantissa(a); });
  t["v_frexp_exp_i32_f32"] = lane_op([](float a) { return frexp_exponent(a); });
  t["v_div_scale_f32"] =
      lane_op([](float x, float d, float n) { return div_scale_flagged(x, d, n); });
  t["v_div_fixup_f32"] = lane_op([](float q, float d, float n) { return div_fixup(q, d, n); });
  t["v_div_fmas_f32"] = t["v_fma_f32"];
  t["v_div_fmas_f32"].execute = div_fmas<float>;
}

void add_double(OpcodeTable& t) {
  t["v_add_f64"] = lane_op([](double a, double b) { return a + b; });
  t["v_mul_f64"] = lane_op([](double a, double b) { return a * b; });
  t["v_fma_f64"] = lane_op([](double a, double b, double c) { return std::fma(a, b, c); });
  t["v_fmac_f64"] =
      accumulating_lane_op([](double a, double b, double c) { return std::fma(a, b, c); });
  t["v_min_f64"] = lane_op([](double a, double b) { return min_number(a, b); });
  t["v_max_f64"] = lane_op([](double a, double b) { return max_number(a, b); });
  t["v_floor_f64"] = lane_op([](double a) { return std::floor(a); });
  t["v_ceil_f64"] = lane_op([](double a) { return std::ceil(a); });
  t["v_trunc_f64"] = lane_op([](double a) { return std::trunc(a); });
  t["v_rndne_f64"] = lane_op([](double a) { return std::nearbyint(a); });
  t["v_fract_f64"] = lane_op([](double a) { return fract(a); });
  // More exact than the hardware's estimates; compiled code refines them.
  t["v_rcp_f64"] = lane_op([](double a) { return 1.0 / a; });
  t["v_rsq_f64"] = lane_op([](double a) { return 1.0 / std::sqrt(a); });
  t["v_sqrt_f64"] = lane_op([](double a) { return std::sqrt(a); });
  t["v_ldexp_f64"] = lane_op([](double a, int32_t b) { return std::ldexp(a, b); });
  t["v_frexp_mant_f64"] = lane_op([](double a) { return frexp_mantissa(a); });
  t["v_frexp_exp_i32_f64"] = lane_op([](double a) { return frexp_exponent(a); });
  t["v_div_scale_f64"] =
      lane_op([](double x, double d, double n) { return div_scale_flagged(x, d, n); });
  t["v_div_fixup_f64"] = lane_op([](double q, double d, double n) { return div_fixup(q, d, n); });
  t["v_div_fmas_f64"] = t["v_fma_f64"];
  t["v_div_fmas_f64"].execute = div_fmas<double>;
}

}  // namespace

void add_vector_float(OpcodeTable& table) {
  add_float(table);
  add_double(table);
}

}  // namespace dsv4::amd::isa
