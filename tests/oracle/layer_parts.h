// The equations of the layer and of the model around it, one function each, in float64. Arguments
// are what the operation of the same name reads, dequantised; nothing is rounded here unless the
// name says so.
#pragma once
#include <cstdint>
#include <limits>
#include <span>
#include <vector>

#include "tests/oracle/arrays.h"

namespace oracle {

/// x w^T: [T, cols] x [rows, cols] -> [T, rows].
Matrix linear(const Matrix& x, const Weight& w);

/// weight * x / sqrt(mean(x^2) + eps), in place; an empty weight means 1 (attention.md steps 2, 3).
void rms_norm(std::span<double> x, std::span<const float> weight, double eps);

/// Parameters of the rotary embedding of one layer kind (attention.md 3).
struct RopeSpec {
  double theta = 10000;
  bool yarn = false;
  double factor = 16;
  double beta_fast = 32;
  double beta_slow = 1;
  double original_length = 65536;
};
/// f_i, i < rope_dim / 2: computed in double, rounded once to binary32.
std::vector<float> rope_frequencies(const RopeSpec& spec, int rope_dim);
/// Rotates the last 2 * frequencies.size() elements of `row`, interleaved pairs, at `position`; the
/// angle is the binary32 product of both. `direction` -1 is the inverse (attention.md steps 4, 9).
void rotate_tail(std::span<double> row, std::span<const float> frequencies, int64_t position,
                 int direction = 1);

/// row <- row * H with H the orthonormal Hadamard matrix in natural order; the length is a power of
/// two (compressor.md 2.2).
void hadamard(std::span<double> row);

/// Pooled entry j (compressor.md 1.3, gather form). v, s [T, coff * width] of the tokens 0 .. T-1
/// of a sequence, s with ape added. coff = 2 with overlap.
Vector pool_entry(const Matrix& v, const Matrix& s, int64_t entry, int ratio, bool overlap,
                  int64_t width);

/// score = key_scale * sum_h weights[h] * max(0, q[h] . key) (compressor.md 2.5, all constant
/// factors already in `weights`). q [heads * dim], key [dim].
double index_score(std::span<const double> q, std::span<const double> weights,
                   std::span<const double> key, double key_scale = 1.0);

/// The k largest of scores, larger first, then smaller index; NaN counts as -inf; ascending index
/// (compressor.md 2.6).
std::vector<int32_t> top_k(std::span<const double> scores, int k);

/// Attention of one head of one token (attention.md step 8).
struct Attended {
  Vector out;        ///< [head_dim]; zero without keys
  double lse = 0;    ///< natural log, without the sink; -inf without keys
  double max_z = 0;  ///< largest softmax_scale * q.k; -inf without keys
  Vector magnitude;  ///< sum_j p_j |k_j| / den: the scale of rounding errors in out
  double max_z_abs =
      0;              ///< largest sum_d |q_d k_d| * scale over the rows: the scale of errors of z
  double weight = 0;  ///< sum_j p_j / den: 1 without a sink
};
Attended attend(std::span<const double> q, const std::vector<std::span<const double>>& rows,
                double sink, double softmax_scale);

/// Grouped output projection, first half (attention.md step 10): o [T, groups * group_width], wo_a
/// [groups * rank, group_width] -> z [T, groups * rank].
Matrix grouped_linear(const Matrix& o, const Weight& wo_a, int groups);

/// Hyper-connection parameters of one site (model.md 3).
struct HyperWeights {
  Weight fn, base, scale;
};
/// What hc_pre computes for one token: the mixed input before rounding, and how to spread the
/// output.
struct HyperMix {
  Vector y;
  Vector post;  ///< [streams]
  Matrix comb;  ///< C[i][j]: source i, destination j
};
/// `streams` [hc, n] of one token.
HyperMix hc_pre(const Matrix& streams, const HyperWeights& weights, double norm_eps, double hc_eps,
                int sinkhorn_iters);
/// h'[j] = post_j f + sum_i C[i][j] h[i].
Matrix hc_post(std::span<const double> f, const HyperMix& mix, const Matrix& streams);
/// y = sum_i pre_i X_i with the head's own parameters.
Vector hc_head(const Matrix& streams, const HyperWeights& weights, double norm_eps, double hc_eps);
/// Row softmax, then alternating normalisation ending with columns (model.md 3), in place.
void sinkhorn(Matrix& comb, double hc_eps, int iterations);

/// Experts of a token, ascending id, with their weights (model.md 4.1).
struct Route {
  std::vector<int32_t> ids;
  Vector weights;
};
/// `bias` empty and `fixed_ids` given: a hash layer. Ties go to the smaller id.
Route route(std::span<const double> logits, std::span<const float> bias,
            std::span<const int64_t> fixed_ids, int experts_per_token, double scaling);

/// silu(min(g, limit)) * clamp(u, -limit, limit) (model.md 4.2); limit <= 0: no clamp.
double swiglu(double gate, double up, double limit);

}  // namespace oracle
