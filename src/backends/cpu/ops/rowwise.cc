#include "backends/cpu/ops/rowwise.h"

#include <string>

#include "backends/cpu/isa.h"

namespace dsv4::cpu {

void rms_norm(const RowKernels& kernels, const RmsNormParams& params, const OpContext& context) {
  const int64_t cols = params.x.shape[1];
  const int64_t chunk = std::clamp<int64_t>(16384 / std::max<int64_t>(1, cols), 1, 64);
  parallel_chunks(context.stream, params.x.shape[0], chunk, [&](int64_t begin, int64_t end, int) {
    for (int64_t t = begin; t < end; ++t) {
      kernels.rms_norm(row_at(params.x, t), params.x.dtype, params.weight.data, params.weight.dtype,
                       cols, params.eps, row_at(params.out, t), params.out.dtype);
    }
  });
  if (params.beside != nullptr) rms_norm(kernels, *params.beside, context);
}

void embed(const RowKernels& kernels, const EmbedParams& params, const OpContext& context) {
  const Tensor& streams = params.streams;
  parallel_chunks(context.stream, streams.shape[0], 8, [&](int64_t begin, int64_t end, int) {
    for (int64_t t = begin; t < end; ++t) {
      for (int64_t i = 0; i < streams.shape[1]; ++i) {
        kernels.convert(row_at(params.table, params.ids[t]), params.table.dtype, streams.shape[2],
                        row_at(streams, t, i), streams.dtype);
      }
    }
  });
}

int64_t rowwise_scratch_bytes(const ScratchLimits& limits) {
  const int64_t widest_row =
      std::max({int64_t{limits.head_dim}, int64_t{limits.index_dim}, int64_t{limits.num_experts}});
  return std::max(ThreadRows::bytes(limits.num_threads, widest_row),
                  hyper_connections_scratch_bytes(limits));
}

namespace {

template <const RowKernels& kKernels>
void install(Ops& ops) {
  ops.rms_norm = [](const RmsNormParams& params, const OpContext& context) {
    rms_norm(kKernels, params, context);
  };
  ops.qnorm_rope_insert = [](const QnormRopeInsertParams& params, const OpContext& context) {
    qnorm_rope_insert(kKernels, params, context);
  };
  ops.inverse_rope = [](const InverseRopeParams& params, const OpContext& context) {
    inverse_rope(kKernels, params, context);
  };
  ops.compress = [](const CompressParams& params, const OpContext& context) {
    compress(kKernels, params, context);
  };
  ops.index_query = [](const IndexQueryParams& params, const OpContext& context) {
    index_query(kKernels, params, context);
  };
  ops.embed = [](const EmbedParams& params, const OpContext& context) {
    embed(kKernels, params, context);
  };
  ops.hc_pre = [](const HcPreParams& params, const OpContext& context) {
    hc_pre(kKernels, params, context);
  };
  ops.hc_post = [](const HcPostParams& params, const OpContext& context) {
    hc_post(kKernels, params, context);
  };
  ops.hc_head = [](const HcHeadParams& params, const OpContext& context) {
    hc_head(kKernels, params, context);
  };
  ops.route = [](const RouteParams& params, const OpContext& context) {
    route(kKernels, params, context);
  };
}

}  // namespace

std::span<const Candidate> rowwise_candidates() {
  static constexpr Candidate kCandidates[] = {
      {"rowwise", "avx512", why_not_avx512, install<kRowKernelsAvx512>},
      {"rowwise", "avx2", why_not_avx2, install<kRowKernelsAvx2>},
      {"rowwise", "portable", runs_anywhere, install<kRowKernelsPortable>},
  };
  return kCandidates;
}

const RowKernels& best_row_kernels() {
  static const RowKernels& best = why_not_avx512().empty() ? kRowKernelsAvx512
                                  : why_not_avx2().empty() ? kRowKernelsAvx2
                                                           : kRowKernelsPortable;
  return best;
}

}  // namespace dsv4::cpu
