// Hyper-connections (model.md 3): mixing the streams into one input, and spreading the output.
#include <cmath>

#include "backends/cpu/ops/rowwise.h"
#include "core/fail.h"

namespace dsv4::cpu {
namespace {

// Tokens whose products are computed while one block of fn (24 x 2048 floats = 192 KiB) stays in
// L2.
constexpr int64_t kTileTokens = 32;
constexpr int64_t kMaxMixRows = (2 + kMaxHcStreams) * kMaxHcStreams;

// Tokens per pass: enough tiles for every thread, few enough that scratch stays small.
int64_t pass_tokens(int threads) {
  return kTileTokens * threads;
}

// m[r] = (fn[r] . X) / sqrt(mean X^2 + eps) for all rows, then f(token, m). The dot product is
// defined as the sum, in ascending order, of one partial sum per kHcDotCols columns: so that few
// tokens are spread over the threads by columns, many by tokens, with the same bits.
template <typename F>
void for_each_mix(const RowKernels& kernels, const ConstTensor& streams, const HcWeights& weights,
                  float norm_eps, const OpContext& context, F&& f) {
  const int64_t tokens = streams.shape[0], cols = streams.shape[1] * streams.shape[2];
  const int64_t rows = weights.fn.shape[0], blocks = ceil_div(cols, kHcDotCols);
  DSV4_CHECK(streams.shape[1] <= kMaxHcStreams && rows <= kMaxMixRows);
  const int64_t pass = std::min(tokens, pass_tokens(num_threads(context.stream)));
  const int64_t sums = rows + 1;  // the last one is X . X
  Arena::Scope scope(*context.scratch);
  float* partial = context.scratch->take_array<float>(blocks * pass * sums);
  const auto* fn = weights.fn.as<float>();

  for (int64_t first = 0; first < tokens; first += pass) {
    const int64_t count = std::min(pass, tokens - first), tiles = ceil_div(count, kTileTokens);
    parallel_chunks(context.stream, tiles * blocks, 1, [&](int64_t item, int64_t, int) {
      const int64_t block = item / tiles, tile = item % tiles * kTileTokens;
      const int64_t col = block * kHcDotCols;
      const char* x =
          static_cast<const char*>(row_at(streams, first + tile)) + col * size_of(streams.dtype);
      kernels.hc_dots(x, streams.dtype, streams.strides[0], std::min(kTileTokens, count - tile),
                      fn + col, weights.fn.strides[0], rows, std::min(kHcDotCols, cols - col),
                      partial + (block * pass + tile) * sums);
    });
    parallel_chunks(context.stream, count, 4, [&](int64_t begin, int64_t end, int) {
      for (int64_t t = begin; t < end; ++t) {
        float total[kMaxMixRows + 1];
        for (int64_t r = 0; r < sums; ++r) {
          total[r] = partial[t * sums + r];
          for (int64_t block = 1; block < blocks; ++block)
            total[r] += partial[(block * pass + t) * sums + r];
        }
        const float factor = 1.0f / std::sqrt(total[rows] / static_cast<float>(cols) + norm_eps);
        for (int64_t r = 0; r < rows; ++r) total[r] *= factor;
        f(first + t, total);
      }
    });
  }
}

// Row softmax, then alternating column and row normalisations; the last one is by columns.
void sinkhorn(const RowKernels& kernels, float* c, int64_t n, float eps, int iterations) {
  for (int64_t i = 0; i < n; ++i) {
    float largest = c[i * n];
    for (int64_t j = 1; j < n; ++j) largest = std::max(largest, c[i * n + j]);
    for (int64_t j = 0; j < n; ++j) c[i * n + j] -= largest;
  }
  kernels.exp(c, n * n);
  for (int64_t i = 0; i < n; ++i) {
    float sum = 0;
    for (int64_t j = 0; j < n; ++j) sum += c[i * n + j];
    for (int64_t j = 0; j < n; ++j) c[i * n + j] = c[i * n + j] / sum + eps;
  }
  const auto normalise_columns = [&] {
    for (int64_t j = 0; j < n; ++j) {
      float sum = 0;
      for (int64_t i = 0; i < n; ++i) sum += c[i * n + j];
      for (int64_t i = 0; i < n; ++i) c[i * n + j] /= sum + eps;
    }
  };
  normalise_columns();
  for (int iteration = 1; iteration < iterations; ++iteration) {
    for (int64_t i = 0; i < n; ++i) {
      float sum = 0;
      for (int64_t j = 0; j < n; ++j) sum += c[i * n + j];
      for (int64_t j = 0; j < n; ++j) c[i * n + j] /= sum + eps;
    }
    normalise_columns();
  }
}

}  // namespace

int64_t hyper_connections_scratch_bytes(const ScratchLimits& limits) {
  const int64_t cols = std::max(limits.max_cols, kMaxHcStreams * limits.hidden_size);
  return ceil_div(cols, kHcDotCols) * pass_tokens(limits.num_threads) * (kMaxMixRows + 1) *
             int64_t{sizeof(float)} +
         Arena::kAlignment;
}

void hc_pre(const RowKernels& kernels, const HcPreParams& params, const OpContext& context) {
  const ConstTensor& streams = params.streams;
  const int64_t n = streams.shape[1], hidden = streams.shape[2];
  const auto *base = params.weights.base.as<float>(), *scale = params.weights.scale.as<float>();
  DSV4_CHECK(params.weights.fn.shape[0] == (2 + n) * n);
  for_each_mix(kernels, streams, params.weights, params.norm_eps, context,
               [&](int64_t t, float* mix) {
                 for (int64_t r = 0; r < (2 + n) * n; ++r)
                   mix[r] = mix[r] * scale[std::min<int64_t>(r / n, 2)] + base[r];
                 kernels.sigmoid(mix, 2 * n);
                 for (int64_t i = 0; i < n; ++i) mix[i] += params.hc_eps;
                 kernels.hc_mix(row_at(streams, t), streams.dtype, streams.strides[1], n, mix,
                                hidden, row_at(params.y, t));
                 auto* post = static_cast<float*>(row_at(params.post, t));
                 for (int64_t i = 0; i < n; ++i) post[i] = 2.0f * mix[n + i];
                 sinkhorn(kernels, mix + 2 * n, n, params.hc_eps, params.sinkhorn_iters);
                 std::copy_n(mix + 2 * n, n * n, static_cast<float*>(row_at(params.comb, t)));
               });
}

void hc_post(const RowKernels& kernels, const HcPostParams& params, const OpContext& context) {
  const Tensor& streams = params.streams;
  const int64_t tokens = streams.shape[0], n = streams.shape[1], hidden = streams.shape[2];
  DSV4_CHECK(n <= kMaxHcStreams);
  constexpr int64_t kSpanCols = 1024;  // a single token is spread over the threads by columns
  const int64_t spans = ceil_div(hidden, kSpanCols);
  const int64_t elem_bytes = size_of(streams.dtype);
  parallel_chunks(
      context.stream, tokens * spans, tokens < 8 ? 1 : spans, [&](int64_t begin, int64_t end, int) {
        for (int64_t item = begin; item < end; ++item) {
          const int64_t t = item / spans, col = item % spans * kSpanCols;
          kernels.hc_post(static_cast<const char*>(row_at(params.f, t)) + col * elem_bytes,
                          streams.dtype, static_cast<const float*>(row_at(params.post, t)),
                          static_cast<const float*>(row_at(params.comb, t)), n, streams.strides[1],
                          std::min(kSpanCols, hidden - col),
                          static_cast<char*>(row_at(streams, t)) + col * elem_bytes);
        }
      });
}

void hc_head(const RowKernels& kernels, const HcHeadParams& params, const OpContext& context) {
  const ConstTensor& streams = params.streams;
  const int64_t n = streams.shape[1];
  const auto *base = params.weights.base.as<float>(), *scale = params.weights.scale.as<float>();
  DSV4_CHECK(params.weights.fn.shape[0] == n);
  for_each_mix(kernels, streams, params.weights, params.norm_eps, context,
               [&](int64_t t, float* mix) {
                 for (int64_t i = 0; i < n; ++i) mix[i] = mix[i] * scale[0] + base[i];
                 kernels.sigmoid(mix, n);
                 for (int64_t i = 0; i < n; ++i) mix[i] += params.hc_eps;
                 kernels.hc_mix(row_at(streams, t), streams.dtype, streams.strides[1], n, mix,
                                streams.shape[2], row_at(params.y, t));
               });
}

}  // namespace dsv4::cpu
