// The table of row kernels of one ISA: included once by each rowwise_<isa>.cc, which sets
// DSV4_ROWWISE_ISA (namespace) and DSV4_ROWWISE_VECTOR_BYTES.
#pragma once
#include "backends/cpu/ops/compress-inl.h"
#include "backends/cpu/ops/hyper_connections-inl.h"
#include "backends/cpu/ops/norm_rope-inl.h"
#include "backends/cpu/ops/rowwise_kernels.h"

namespace dsv4::cpu::DSV4_ROWWISE_ISA {

DSV4_KERNEL void exp_row(float* values, int64_t count) {
  for_vectors(count, [&](int64_t i, auto lanes) {
    store(values + i, exp(load(values + i, lanes)), lanes);
  });
}

DSV4_KERNEL void sigmoid_row(float* values, int64_t count) {
  for_vectors(count, [&](int64_t i, auto lanes) {
    store(values + i, sigmoid(load(values + i, lanes)), lanes);
  });
}

DSV4_KERNEL void sqrt_softplus(const float* logits, int64_t count, float* out) {
  for_vectors(count, [&](int64_t i, auto lanes) {
    store(out + i, softplus(load(logits + i, lanes)), lanes);
  });
  for (int64_t i = 0; i < count; ++i) out[i] = std::sqrt(out[i]);
}

DSV4_KERNEL void swiglu(const float* g, const float* u, float limit, float weight, int64_t count,
                        void* out, DType act) {
  const bool clamp = limit > 0;
  const Floats high = broadcast(limit), low = broadcast(-limit);
  with_type(out, act, [&](auto* to) {
    for_vectors(count, [&](int64_t i, auto lanes) {
      Floats gate = load(g + i, lanes), up = load(u + i, lanes);
      if (clamp) {
        gate = min(high, gate);
        up = max(low, min(high, up));
      }
      store(to + i, gate * sigmoid(gate) * up * broadcast(weight), lanes);
    });
  });
}

DSV4_KERNEL void add(const float* x, int64_t count, float* sum) {
  for_vectors(count, [&](int64_t i, auto lanes) {
    store(sum + i, load(sum + i, lanes) + load(x + i, lanes), lanes);
  });
}

DSV4_KERNEL void convert(const void* x, DType x_dtype, int64_t count, void* out, DType out_dtype) {
  with_type(x, x_dtype, [&](const auto* from) {
    with_type(out, out_dtype, [&](auto* to) {
      for_vectors(count,
                  [&](int64_t i, auto lanes) { store(to + i, load(from + i, lanes), lanes); });
    });
  });
}

constexpr RowKernels kTable{
    .rms_norm = rms_norm,
    .qnorm_rope = qnorm_rope,
    .rope_kv = rope_kv,
    .pool = pool,
    .norm_entry = norm_entry,
    .state_row = state_row,
    .index_query = index_query,
    .inverse_rope = inverse_rope,
    .hc_dots = hc_dots,
    .hc_mix = hc_mix,
    .hc_post = hc_post,
    .exp = exp_row,
    .sigmoid = sigmoid_row,
    .sqrt_softplus = sqrt_softplus,
    .swiglu = swiglu,
    .add = add,
    .convert = convert,
};

}  // namespace dsv4::cpu::DSV4_ROWWISE_ISA
