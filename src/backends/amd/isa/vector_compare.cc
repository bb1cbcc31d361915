// v_cmp_*: one bit per enabled lane into a pair of scalar registers, zero for the others.
#include <string>

#include "backends/amd/isa/float_math.h"
#include "backends/amd/isa/lanes.h"

namespace dsv4::amd::isa {
namespace {

inline float number(Half x) {
  return half_to_f32(x);
}
template <typename T>
T number(T x) {
  return x;
}

template <typename T>
void add_ordered(OpcodeTable& t, const std::string& type) {
  t["v_cmp_lt_" + type] = lane_op([](T a, T b) { return number(a) < number(b); });
  t["v_cmp_eq_" + type] = lane_op([](T a, T b) { return number(a) == number(b); });
  t["v_cmp_le_" + type] = lane_op([](T a, T b) { return number(a) <= number(b); });
  t["v_cmp_gt_" + type] = lane_op([](T a, T b) { return number(a) > number(b); });
  t["v_cmp_ge_" + type] = lane_op([](T a, T b) { return number(a) >= number(b); });
}

template <typename T>
void add_integer(OpcodeTable& t, const std::string& type) {
  add_ordered<T>(t, type);
  t["v_cmp_ne_" + type] = lane_op([](T a, T b) { return a != b; });
}

template <typename T>
void add_floating(OpcodeTable& t, const std::string& type) {
  add_ordered<T>(t, type);
  t["v_cmp_lg_" + type] =
      lane_op([](T a, T b) { return number(a) < number(b) || number(a) > number(b); });
  t["v_cmp_o_" + type] =
      lane_op([](T a, T b) { return number(a) == number(a) && number(b) == number(b); });
  t["v_cmp_u_" + type] =
      lane_op([](T a, T b) { return number(a) != number(a) || number(b) != number(b); });
  t["v_cmp_nge_" + type] = lane_op([](T a, T b) { return !(number(a) >= number(b)); });
  t["v_cmp_nlg_" + type] =
      lane_op([](T a, T b) { return !(number(a) < number(b) || number(a) > number(b)); });
  t["v_cmp_ngt_" + type] = lane_op([](T a, T b) { return !(number(a) > number(b)); });
  t["v_cmp_nle_" + type] = lane_op([](T a, T b) { return !(number(a) <= number(b)); });
  t["v_cmp_neq_" + type] = lane_op([](T a, T b) { return !(number(a) == number(b)); });
  t["v_cmp_nlt_" + type] = lane_op([](T a, T b) { return !(number(a) < number(b)); });
}

}  // namespace

void add_vector_compare(OpcodeTable& t) {
  add_integer<uint16_t>(t, "u16");
  add_integer<int16_t>(t, "i16");
  add_integer<uint32_t>(t, "u32");
  add_integer<int32_t>(t, "i32");
  add_integer<uint64_t>(t, "u64");
  add_integer<int64_t>(t, "i64");
  add_floating<Half>(t, "f16");
  add_floating<float>(t, "f32");
  add_floating<double>(t, "f64");
  t["v_cmp_class_f32"] =
      lane_op([](float a, uint32_t mask) { return (float_class(a) & mask) != 0; });
  t["v_cmp_class_f64"] =
      lane_op([](double a, uint32_t mask) { return (float_class(a) & mask) != 0; });
}

}  // namespace dsv4::amd::isa
