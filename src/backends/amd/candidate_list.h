// The list of candidates over a launcher. To add a family: a header of ops/ with
// `template <typename Launch> void install_x(Ops&)` and its scratch bound, a line here, a term in
// scratch_bytes (candidates.cc), and a file ops/x.hip with its entries.
#pragma once
#include <vector>

#include "backends/amd/candidates.h"
#include "backends/amd/ops/attend_ops.h"
#include "backends/amd/ops/index_ops.h"
#include "backends/amd/ops/linear_ops.h"
#include "backends/amd/ops/moe_ops.h"
#include "backends/gpu/model_rows_ops.h"
#include "backends/gpu/rowwise_ops.h"

namespace dsv4::amd {

template <typename Launch>
std::span<const Candidate> candidates() {
  static const std::vector<Candidate> all{
      {"rowwise", "shared", needs_cdna, gpu::install_rowwise<Launch>},
      {"model_rows", "shared", needs_cdna, gpu::install_model_rows<Launch>},
      {"linear", "mfma", needs_cdna, install_linear<Launch>},
      {"attend", "mfma", needs_cdna, install_attend<Launch>},
      {"index_logits", "mfma", needs_cdna, install_index_logits<Launch>},
      {"top_k", "radix", needs_cdna, install_top_k<Launch>},
      {"moe", "mfma", needs_cdna, install_moe<Launch>},
  };
  return all;
}

}  // namespace dsv4::amd
