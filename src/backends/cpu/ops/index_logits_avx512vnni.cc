// Indexer scores on AVX-512 with VPDPBUSD for MXFP4 keys, and, with VBMI, for bounds; all else is
// index_logits_avx512.cc. See index_logits.h and index_logits_mxfp4-inl.h.
#include "backends/cpu/isa.h"
#include "backends/cpu/ops/index_bounds.h"
#include "backends/cpu/ops/index_logits_mxfp4-inl.h"

namespace dsv4::cpu {
namespace {

/// A sum of a group is one 32-bit integer a lane, which fits 16 bits: with a factor whose upper
/// half is 0 VPMADDWD multiplies its lower half alone.
struct VnniInts : Ints<Lanes16> {
  static I start(I halves) { return _mm512_madd_epi16(halves, _mm512_set1_epi16(1)); }
  static I dot4(I acc, I codes, I signed_codes) { return cpu::dot4(acc, codes, signed_codes); }
  static I query_factor(I factor) { return _mm512_and_si512(factor, _mm512_set1_epi32(0xffff)); }
};
static_assert(kMxfp4Block * 2 * kMaxCode * kMaxCode <= INT16_MAX);

struct Wide {
  static const IndexKernel& kernel() { return *index_avx512_kernels().wide; }
  static void pack_q(const void* q, DType dtype, int64_t stride, int heads, int dim, void* packed) {
    kernel().pack_q(q, dtype, stride, heads, dim, packed);
  }
  static void load_keys(const KeyRows& keys, KvFormat format, int dim, void* k) {
    kernel().load_keys(keys, format, dim, k);
  }
  static void score(const void* packed_q, const float* weights, const void* k, int count, int heads,
                    int dim, float* lanes, float* sums, const KeyRows* next) {
    kernel().score(packed_q, weights, k, count, heads, dim, lanes, sums, next);
  }
};
using Mxfp4 = Mxfp4IndexKernel<Lanes16, Wide, 8, VnniInts>;

}  // namespace

const IndexKernels& index_avx512vnni_kernels() {
  static const IndexKernels kernels{
      nullptr, index_avx512_kernels().wide, &kIndexKernel<Mxfp4>,
      why_not_avx512vbmi().empty() ? &index_bound_avx512vbmi() : nullptr};
  return kernels;
}

}  // namespace dsv4::cpu
