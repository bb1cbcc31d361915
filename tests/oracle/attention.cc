#include "tests/oracle/attention.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "tests/oracle/fp8_sums.h"
#include "tests/oracle/numbers.h"

namespace oracle {
namespace {

Matrix take_rows(const Matrix& x, const std::vector<int64_t>& rows) {
  Matrix out(static_cast<int64_t>(rows.size()), x.cols);
  for (size_t i = 0; i < rows.size(); ++i) {
    std::ranges::copy(x.row(rows[i]), out.row(static_cast<int64_t>(i)).begin());
  }
  return out;
}

std::span<double> head_of(Matrix& m, int64_t row, int64_t head, int64_t dim) {
  return m.row(row).subspan(static_cast<size_t>(head * dim), static_cast<size_t>(dim));
}

// Scores of every query against every entry (compressor.md 2.2 - 2.5).
Matrix index_scores(const Matrix& x, const Matrix& qr, const std::vector<int64_t>& positions,
                    const Matrix& all_x, const IndexerWeights& weights, const AttentionShape& shape,
                    const Roundings& roundings) {
  Matrix keys = compress(all_x, weights.compressor, shape, shape.index_dim);
  for (int64_t j = 0; j < keys.rows; ++j) round_index_row(keys.row(j), roundings);
  Matrix q = rounded_linear(qr, weights.wq_b, roundings);
  Matrix w = rounded_linear(x, weights.weights_proj, roundings);
  const double factor = 1.0 / std::sqrt(double{1} * shape.index_heads * shape.index_dim);
  Matrix scores(q.rows, keys.rows);
  for (int64_t i = 0; i < q.rows; ++i) {
    for (int h = 0; h < shape.index_heads; ++h) {
      const std::span<double> head = head_of(q, i, h, shape.index_dim);
      rotate_tail(head, shape.frequencies, positions[i]);
      round_index_row(head, roundings);
    }
    for (double& value : w.row(i)) value *= factor;
    for (int64_t j = 0; j < keys.rows; ++j) {
      scores.row(i)[j] = index_score(q.row(i), w.row(i), keys.row(j));
    }
  }
  return scores;
}

// o_proj.md 1 and 4.
Matrix project_out(Matrix o, const AttentionWeights& weights, const AttentionShape& shape,
                   const Roundings& roundings) {
  if (roundings.output == OutputRounding::kFp8) {
    constexpr size_t kBlock = 128;
    for (size_t begin = 0; begin < o.values.size(); begin += kBlock) {
      const QuantisedBlock block =
          quantise_e4m3({o.values.data() + begin, kBlock}, kInverseRopeFloor);
      std::ranges::copy(block.values, o.values.begin() + static_cast<std::ptrdiff_t>(begin));
    }
  }
  const bool fp8 = roundings.fp8_products && roundings.output == OutputRounding::kFp8;
  Matrix z = fp8 ? fp8_linear(o, weights.wo_a, shape.groups)
                 : grouped_linear(o, weights.wo_a, shape.groups);
  round_activations(z.values, roundings);
  return rounded_linear(z, weights.wo_b, roundings);
}

}  // namespace

void round_activations(std::span<double> values, const Roundings& roundings) {
  if (!roundings.bf16_activations) return;
  for (double& value : values) value = round_bf16(value);
}

Matrix rounded_linear(const Matrix& x, const Weight& w, const Roundings& roundings) {
  Matrix input = x;
  const bool quantised = w.quantised && roundings.quantise_linear_input;
  if (quantised) {
    for (int64_t t = 0; t < input.rows; ++t) quantise_linear_input(input.row(t));
  }
  Matrix out = quantised && roundings.fp8_products ? fp8_linear(input, w) : linear(input, w);
  round_activations(out.values, roundings);
  return out;
}

void round_cache_row(std::span<double> row, CacheRounding rounding, int rope_dim) {
  if (rounding == CacheRounding::kNone) return;
  for (double& value : row) value = round_bf16(value);
  if (rounding == CacheRounding::kFp8DsMla) {
    std::ranges::copy(quantise_kv_row(row, rope_dim).values, row.begin());
  } else if (rounding == CacheRounding::kFp8) {  // one scale per cache, 1.0 (cache_layouts.md 3)
    for (double& value : row) value = e4m3_decode(e4m3_encode(value));
  }
}

void round_index_row(std::span<double> row, const Roundings& roundings) {
  // One rounding after everything else, as column V has it, with R's Hadamard inserted before it.
  if (roundings.index_hadamard) hadamard(row);
  round_activations(row, roundings);
  if (roundings.index == IndexRounding::kFp8) {
    std::ranges::copy(quantise_e4m3(row, kIndexFloor).values, row.begin());
  } else if (roundings.index == IndexRounding::kMxfp4) {
    constexpr size_t kBlock = 32;
    for (size_t begin = 0; begin < row.size(); begin += kBlock) {
      const std::span<double> block = row.subspan(begin, kBlock);
      std::ranges::copy(quantise_e2m1(block).values, block.begin());
    }
  }
}

Matrix compress(const Matrix& x, const CompressorWeights& weights, const AttentionShape& shape,
                int64_t width) {
  const Matrix v = linear(x, weights.wkv);
  Matrix s = linear(x, weights.wgate);
  for (int64_t t = 0; t < s.rows; ++t) {
    for (int64_t c = 0; c < s.cols; ++c) s.row(t)[c] += weights.ape.row(t % shape.ratio)[c];
  }
  Matrix entries(x.rows / shape.ratio, width);
  for (int64_t j = 0; j < entries.rows; ++j) {
    const std::span<double> entry = entries.row(j);
    std::ranges::copy(pool_entry(v, s, j, shape.ratio, shape.overlap(), width), entry.begin());
    rms_norm(entry, weights.norm.values, shape.eps);
    rotate_tail(entry, shape.frequencies, j * shape.ratio);
  }
  return entries;
}

AttentionTrace attention(const Matrix& x, const std::vector<int64_t>& positions,
                         const AttentionWeights& weights, const AttentionShape& shape,
                         const Roundings& roundings) {
  AttentionTrace trace;
  const Matrix query_x = take_rows(x, positions);

  // Steps 1 and 2: down projections and their norms.
  Matrix qr = rounded_linear(query_x, weights.wq_a, roundings);
  for (int64_t i = 0; i < qr.rows; ++i) rms_norm(qr.row(i), weights.q_norm.values, shape.eps);
  round_activations(qr.values, roundings);
  trace.kv = rounded_linear(x, weights.wkv, roundings);
  for (int64_t t = 0; t < x.rows; ++t) {
    const std::span<double> row = trace.kv.row(t);
    rms_norm(row, weights.kv_norm.values, shape.eps);
    round_activations(row, roundings);
    rotate_tail(row, shape.frequencies, t);
    round_cache_row(row, roundings.cache, shape.rope_dim);
  }

  // Steps 3 and 4: queries.
  trace.q = rounded_linear(qr, weights.wq_b, roundings);
  for (int64_t i = 0; i < trace.q.rows; ++i) {
    for (int h = 0; h < shape.num_heads; ++h) {
      const std::span<double> head = head_of(trace.q, i, h, shape.head_dim);
      rms_norm(head, {}, shape.eps);
      rotate_tail(head, shape.frequencies, positions[i]);
    }
  }
  round_activations(trace.q.values, roundings);

  // Steps 6 and 7: compressed rows, selection.
  if (shape.ratio != 0) {
    trace.compressed = compress(x, weights.compressor, shape, shape.head_dim);
    for (int64_t j = 0; j < trace.compressed.rows; ++j) {
      round_cache_row(trace.compressed.row(j), roundings.cache, shape.rope_dim);
    }
  }
  if (shape.indexer()) {
    trace.index_scores = index_scores(query_x, qr, positions, x, weights.indexer, shape, roundings);
  }

  // Steps 8 and 9: attention over window and compressed rows (section 4), inverse RoPE.
  trace.attn_before_o = Matrix(query_x.rows, trace.q.cols);
  const double scale = 1.0 / std::sqrt(double(shape.head_dim));
  for (int64_t i = 0; i < query_x.rows; ++i) {
    std::vector<std::span<const double>> rows;
    for (int64_t t = std::max<int64_t>(0, positions[i] - shape.window + 1); t <= positions[i];
         ++t) {
      rows.push_back(std::as_const(trace.kv).row(t));
    }
    const int64_t visible = shape.ratio == 0 ? 0 : (positions[i] + 1) / shape.ratio;
    std::vector<int32_t> entries;
    if (shape.indexer()) {
      const std::span<const double> scores = std::as_const(trace.index_scores).row(i);
      entries = top_k(scores.first(static_cast<size_t>(visible)), shape.index_topk);
      trace.topk.push_back(entries);
    } else {
      for (int64_t j = 0; j < visible; ++j) entries.push_back(static_cast<int32_t>(j));
    }
    for (int32_t j : entries) rows.push_back(std::as_const(trace.compressed).row(j));
    for (int h = 0; h < shape.num_heads; ++h) {
      const std::span<double> o = head_of(trace.attn_before_o, i, h, shape.head_dim);
      std::ranges::copy(
          attend(head_of(trace.q, i, h, shape.head_dim), rows, weights.attn_sink.values[h], scale)
              .out,
          o.begin());
      round_activations(o, roundings);
      rotate_tail(o, shape.frequencies, positions[i], -1);
      if (roundings.output == OutputRounding::kBf16) round_activations(o, roundings);
    }
  }
  trace.out = project_out(trace.attn_before_o, weights, shape, roundings);
  return trace;
}

}  // namespace oracle
