#include "tests/oracle/layer_parts.h"

#include <algorithm>
#include <cmath>
#include <numbers>
#include <numeric>

namespace oracle {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

double sigmoid(double x) {
  return 1.0 / (1.0 + std::exp(-x));
}

// Tokens whose sums run side by side, only to hide the latency of one addition.
constexpr int64_t kTokensAtOnce = 8;

// out[t * out_stride] += w . x[t] for tokens [0, count), count <= kTokensAtOnce.
void dot_tokens(std::span<const float> w, const double* x, int64_t x_stride, int64_t count,
                double* out, int64_t out_stride) {
  double sum[kTokensAtOnce] = {};
  const auto cols = static_cast<int64_t>(w.size());
  if (count == kTokensAtOnce) {
    for (int64_t k = 0; k < cols; ++k) {
      for (int64_t t = 0; t < kTokensAtOnce; ++t) sum[t] += w[k] * x[t * x_stride + k];
    }
  } else {
    for (int64_t t = 0; t < count; ++t) {
      for (int64_t k = 0; k < cols; ++k) sum[t] += w[k] * x[t * x_stride + k];
    }
  }
  for (int64_t t = 0; t < count; ++t) out[t * out_stride] = sum[t];
}

// (fn . X) / sqrt(mean(X^2) + eps), X = streams flattened stream-major (model.md 3).
Vector hyper_logits(const Matrix& streams, const Weight& fn, double norm_eps) {
  double squares = 0;
  for (double x : streams.values) squares += x * x;
  const double norm = std::sqrt(squares / static_cast<double>(streams.values.size()) + norm_eps);
  Vector logits;
  for (int64_t r = 0; r < fn.rows; ++r) {
    double sum = 0;
    for (size_t k = 0; k < streams.values.size(); ++k) sum += fn.row(r)[k] * streams.values[k];
    logits.push_back(sum / norm);
  }
  return logits;
}

Vector mix_streams(std::span<const double> pre, const Matrix& streams) {
  Vector y(static_cast<size_t>(streams.cols), 0.0);
  for (int64_t i = 0; i < streams.rows; ++i) {
    for (int64_t k = 0; k < streams.cols; ++k) y[k] += pre[i] * streams.row(i)[k];
  }
  return y;
}

}  // namespace

Matrix linear(const Matrix& x, const Weight& w) {
  Matrix out(x.rows, w.rows);
  for (int64_t r = 0; r < w.rows; ++r) {
    for (int64_t t = 0; t < x.rows; t += kTokensAtOnce) {
      dot_tokens(w.row(r), x.values.data() + t * x.cols, x.cols,
                 std::min(kTokensAtOnce, x.rows - t), out.values.data() + t * out.cols + r,
                 out.cols);
    }
  }
  return out;
}

void rms_norm(std::span<double> x, std::span<const float> weight, double eps) {
  double squares = 0;
  for (double value : x) squares += value * value;
  const double norm = std::sqrt(squares / static_cast<double>(x.size()) + eps);
  for (size_t k = 0; k < x.size(); ++k) x[k] = (weight.empty() ? 1.0 : weight[k]) * x[k] / norm;
}

std::vector<float> rope_frequencies(const RopeSpec& spec, int rope_dim) {
  std::vector<float> out;
  const double log_base = std::log(spec.theta);
  const auto corr = [&](double rotations) {
    return rope_dim * std::log(spec.original_length / (rotations * 2 * std::numbers::pi)) /
           (2 * log_base);
  };
  const double low = std::max(std::floor(corr(spec.beta_fast)), 0.0);
  double high = std::min(std::ceil(corr(spec.beta_slow)), rope_dim - 1.0);
  if (low == high) high += 0.001;
  for (int i = 0; i < rope_dim / 2; ++i) {
    double frequency = std::pow(spec.theta, -2.0 * i / rope_dim);
    if (spec.yarn) {
      const double ramp = std::clamp((i - low) / (high - low), 0.0, 1.0);
      frequency = frequency / spec.factor * ramp + frequency * (1 - ramp);
    }
    out.push_back(static_cast<float>(frequency));
  }
  return out;
}

void rotate_tail(std::span<double> row, std::span<const float> frequencies, int64_t position,
                 int direction) {
  double* tail = row.data() + row.size() - 2 * frequencies.size();
  for (size_t i = 0; i < frequencies.size(); ++i) {
    const float angle = static_cast<float>(position) * frequencies[i];  // rounded to binary32
    const double c = std::cos(static_cast<double>(angle));
    const double s = direction * std::sin(static_cast<double>(angle));
    const double even = tail[2 * i], odd = tail[2 * i + 1];
    tail[2 * i] = even * c - odd * s;
    tail[2 * i + 1] = odd * c + even * s;
  }
}

void hadamard(std::span<double> row) {
  const Vector x(row.begin(), row.end());
  const double factor = 1.0 / std::sqrt(static_cast<double>(x.size()));
  for (size_t j = 0; j < x.size(); ++j) {
    double sum = 0;  // H[i][j] = (-1)^(number of common one bits of i and j)
    for (size_t i = 0; i < x.size(); ++i) {
      sum += __builtin_popcountll(i & j) % 2 == 0 ? x[i] : -x[i];
    }
    row[j] = sum * factor;
  }
}

Vector pool_entry(const Matrix& v, const Matrix& s, int64_t entry, int ratio, bool overlap,
                  int64_t width) {
  const int slots = (overlap ? 2 : 1) * ratio;
  const int64_t last = (entry + 1) * ratio - 1;
  Vector pool;
  for (int64_t c = 0; c < width; ++c) {
    Vector value, score;
    for (int k = 0; k < slots; ++k) {
      const int64_t token = last - slots + 1 + k;
      const bool own_window = k >= slots - ratio;
      const int64_t channel = overlap && own_window ? width + c : c;
      value.push_back(token < 0 ? 0.0 : v.row(token)[channel]);
      score.push_back(token < 0 ? -kInfinity : s.row(token)[channel]);
    }
    const double top = *std::max_element(score.begin(), score.end());
    double sum = 0, weighted = 0;
    for (int k = 0; k < slots; ++k) {
      const double p = std::exp(score[k] - top);
      sum += p;
      weighted += p * value[k];
    }
    pool.push_back(weighted / sum);
  }
  return pool;
}

double index_score(std::span<const double> q, std::span<const double> weights,
                   std::span<const double> key, double key_scale) {
  double score = 0;
  for (size_t h = 0; h < weights.size(); ++h) {
    double dot = 0;
    for (size_t d = 0; d < key.size(); ++d) dot += q[h * key.size() + d] * key[d];
    score += weights[h] * std::max(0.0, dot);
  }
  return key_scale * score;
}

std::vector<int32_t> top_k(std::span<const double> scores, int k) {
  Vector rank(scores.begin(), scores.end());
  for (double& score : rank) {
    if (std::isnan(score)) score = -kInfinity;
  }
  std::vector<int32_t> order(scores.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](int32_t a, int32_t b) { return rank[a] > rank[b]; });
  if (order.size() > static_cast<size_t>(k)) order.resize(static_cast<size_t>(k));
  std::sort(order.begin(), order.end());
  return order;
}

Attended attend(std::span<const double> q, const std::vector<std::span<const double>>& rows,
                double sink, double softmax_scale) {
  Attended result;
  result.out.assign(q.size(), 0.0);
  result.magnitude.assign(q.size(), 0.0);
  Vector z;
  double top = -kInfinity;
  for (const auto& row : rows) {
    double dot = 0, dot_abs = 0;
    for (size_t d = 0; d < q.size(); ++d) {
      dot += q[d] * row[d];
      dot_abs += std::abs(q[d] * row[d]);
    }
    z.push_back(dot * softmax_scale);
    top = std::max(top, z.back());
    result.max_z_abs = std::max(result.max_z_abs, dot_abs * softmax_scale);
  }
  if (rows.empty()) {
    result.lse = result.max_z = -kInfinity;
    return result;
  }
  double sum = 0;
  for (double value : z) sum += std::exp(value - top);
  const double den = sum + std::exp(sink - top);
  result.lse = std::log(sum) + top;
  result.max_z = top;
  result.weight = sum / den;
  for (size_t j = 0; j < rows.size(); ++j) {
    const double p = std::exp(z[j] - top);
    for (size_t d = 0; d < q.size(); ++d) {
      result.out[d] += p * rows[j][d];
      result.magnitude[d] += p * std::abs(rows[j][d]);
    }
  }
  for (size_t d = 0; d < q.size(); ++d) {
    result.out[d] /= den;
    result.magnitude[d] /= den;
  }
  return result;
}

Matrix grouped_linear(const Matrix& o, const Weight& wo_a, int groups) {
  const int64_t rank = wo_a.rows / groups;
  Matrix z(o.rows, wo_a.rows);
  for (int64_t r = 0; r < wo_a.rows; ++r) {
    const int64_t group = r / rank;
    for (int64_t t = 0; t < o.rows; t += kTokensAtOnce) {
      dot_tokens(wo_a.row(r), o.values.data() + t * o.cols + group * wo_a.cols, o.cols,
                 std::min(kTokensAtOnce, o.rows - t), z.values.data() + t * z.cols + r, z.cols);
    }
  }
  return z;
}

void sinkhorn(Matrix& comb, double hc_eps, int iterations) {
  const int64_t n = comb.rows;
  for (int64_t i = 0; i < n; ++i) {
    const std::span<double> row = comb.row(i);
    const double top = *std::max_element(row.begin(), row.end());
    double sum = 0;
    for (double& value : row) sum += value = std::exp(value - top);
    for (double& value : row) value = value / sum + hc_eps;
  }
  const auto normalise_columns = [&] {
    for (int64_t j = 0; j < n; ++j) {
      double sum = 0;
      for (int64_t i = 0; i < n; ++i) sum += comb.row(i)[j];
      for (int64_t i = 0; i < n; ++i) comb.row(i)[j] /= sum + hc_eps;
    }
  };
  normalise_columns();
  for (int iteration = 1; iteration < iterations; ++iteration) {
    for (int64_t i = 0; i < n; ++i) {
      double sum = 0;
      for (double value : comb.row(i)) sum += value;
      for (double& value : comb.row(i)) value /= sum + hc_eps;
    }
    normalise_columns();
  }
}

HyperMix hc_pre(const Matrix& streams, const HyperWeights& weights, double norm_eps, double hc_eps,
                int sinkhorn_iters) {
  const int64_t n = streams.rows;
  const Vector m = hyper_logits(streams, weights.fn, norm_eps);
  const std::vector<float>&base = weights.base.values, &scale = weights.scale.values;
  HyperMix mix;
  Vector pre;
  mix.comb = Matrix(n, n);
  for (int64_t i = 0; i < n; ++i) {
    pre.push_back(sigmoid(m[i] * scale[0] + base[i]) + hc_eps);
    mix.post.push_back(2 * sigmoid(m[n + i] * scale[1] + base[n + i]));
    for (int64_t j = 0; j < n; ++j) {
      const int64_t k = 2 * n + n * i + j;
      mix.comb.row(i)[j] = m[k] * scale[2] + base[k];
    }
  }
  sinkhorn(mix.comb, hc_eps, sinkhorn_iters);
  mix.y = mix_streams(pre, streams);
  return mix;
}

Matrix hc_post(std::span<const double> f, const HyperMix& mix, const Matrix& streams) {
  Matrix out(streams.rows, streams.cols);
  for (int64_t j = 0; j < streams.rows; ++j) {
    for (int64_t k = 0; k < streams.cols; ++k) {
      double sum = mix.post[j] * f[k];
      for (int64_t i = 0; i < streams.rows; ++i) sum += mix.comb.row(i)[j] * streams.row(i)[k];
      out.row(j)[k] = sum;
    }
  }
  return out;
}

Vector hc_head(const Matrix& streams, const HyperWeights& weights, double norm_eps, double hc_eps) {
  const Vector m = hyper_logits(streams, weights.fn, norm_eps);
  Vector pre;
  for (int64_t i = 0; i < streams.rows; ++i) {
    pre.push_back(sigmoid(m[i] * weights.scale.values[0] + weights.base.values[i]) + hc_eps);
  }
  return mix_streams(pre, streams);
}

Route route(std::span<const double> logits, std::span<const float> bias,
            std::span<const int64_t> fixed_ids, int experts_per_token, double scaling) {
  Vector p, biased;
  for (size_t e = 0; e < logits.size(); ++e) {
    const double softplus = logits[e] > 20 ? logits[e] : std::log1p(std::exp(logits[e]));
    p.push_back(std::sqrt(softplus));
    biased.push_back(p.back() + (bias.empty() ? 0.0 : bias[e]));
  }
  Route result;
  if (fixed_ids.empty()) {
    result.ids = top_k(biased, experts_per_token);
  } else {
    result.ids.assign(fixed_ids.begin(), fixed_ids.end());
    std::sort(result.ids.begin(), result.ids.end());
  }
  double sum = 0;
  for (int32_t id : result.ids) sum += p[id];
  for (int32_t id : result.ids) result.weights.push_back(p[id] / sum * scaling);
  return result;
}

double swiglu(double gate, double up, double limit) {
  if (limit > 0) {
    gate = std::min(gate, limit);
    up = std::clamp(up, -limit, limit);
  }
  return gate * sigmoid(gate) * up;
}

}  // namespace oracle
