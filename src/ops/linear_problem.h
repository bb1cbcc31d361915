// What every kernel of linear and grouped_linear may rely on.
#pragma once
#include "core/fail.h"
#include "ops/ops.h"

namespace dsv4 {

/// Shapes, strides and dtypes of one product (LinearProblem, ops.h). Throws as DSV4_CHECK does.
inline void check_linear_problem(const LinearProblem& problem, bool quantise_input) {
  const ConstTensor& x = problem.x;
  const Weight& w = problem.w;
  const Tensor& out = problem.out;
  DSV4_CHECK(std::holds_alternative<std::monostate>(problem.input));
  DSV4_CHECK(x.rank == 2 && out.rank == 2 && x.shape[0] == out.shape[0]);
  DSV4_CHECK(x.shape[1] == w.cols && out.shape[1] == w.rows);
  DSV4_CHECK(x.strides[1] == 1 && out.strides[1] == 1);
  DSV4_CHECK(x.dtype == DType::kBf16 || x.dtype == DType::kF32);
  DSV4_CHECK(out.dtype == DType::kBf16 || out.dtype == DType::kF32);
  DSV4_CHECK(!quantise_input || x.dtype == DType::kBf16);
  const bool scaled = w.dtype == DType::kF8E4M3 || w.dtype == DType::kF4E2M1;
  DSV4_CHECK(scaled || w.dtype == DType::kBf16 || w.dtype == DType::kF32);
  DSV4_CHECK(!scaled || w.scale != nullptr);
  DSV4_CHECK(w.dtype != DType::kF4E2M1 || (w.cols % 2 == 0 && w.row_stride % 2 == 0));
}

}  // namespace dsv4
