// The functions of corpus.h as kernels: out[i * kResults + k] = f_k(a[i], b[i], c[i]) for i < n.
#include "corpus.h"

namespace dsv4::corpus {

template <typename F>
__attribute__((device, always_inline)) inline void elementwise(const typename F::In* a,
                                                               const typename F::In* b,
                                                               const typename F::In* c,
                                                               typename F::Out* out, int n) {
  const int i =
      static_cast<int>(__builtin_amdgcn_workgroup_id_x() * 256 + __builtin_amdgcn_workitem_id_x());
  if (i >= n) return;
  typename F::Out r[F::kResults];
  F::eval(a[i], b[i], c[i], r);
  for (int k = 0; k < F::kResults; ++k) out[static_cast<int64_t>(i) * F::kResults + k] = r[k];
}

}  // namespace dsv4::corpus

#define DSV4_ELEMENTWISE(F)                                                                     \
  extern "C" __attribute__((global, amdgpu_flat_work_group_size(256, 256))) void F(             \
      const dsv4::corpus::F::In* a, const dsv4::corpus::F::In* b, const dsv4::corpus::F::In* c, \
      dsv4::corpus::F::Out* out, int n) {                                                       \
    dsv4::corpus::elementwise<dsv4::corpus::F>(a, b, c, out, n);                                \
  }

DSV4_ELEMENTWISE(Int32Arithmetic)
DSV4_ELEMENTWISE(Int32Bits)
DSV4_ELEMENTWISE(Int64Arithmetic)
DSV4_ELEMENTWISE(NarrowIntegers)
DSV4_ELEMENTWISE(Float32Arithmetic)
DSV4_ELEMENTWISE(Float32Convert)
DSV4_ELEMENTWISE(Float64Arithmetic)
