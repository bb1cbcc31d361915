// Drawing the next token from logits. A draw depends on the logits, the options and (seed,
// sequence, position) only: not on earlier draws, other sequences, threads or batches.
#pragma once
#include <cstdint>
#include <span>

#include "dsv4/engine.h"

namespace dsv4 {

/// Uniform in [0, 1), a multiple of 2^-53: a counter-based generator, no state. The mapping is
/// stable: seeds keep their meaning between versions.
double uniform_at(uint64_t seed, uint64_t sequence, uint64_t position);

/// Immutable and thread-safe.
class Sampler {
 public:
  /// @throws Error kInvalidArgument: temperature not finite or below 0, top_p outside (0, 1] or
  /// NaN, top_k below 0.
  explicit Sampler(const SamplingOptions& options);

  const SamplingOptions& options() const { return options_; }

  /// Id of the next token.
  ///
  /// Temperature 0: the largest logit, ties to the smaller id. Otherwise tokens are ordered by
  /// logit, descending, then by id; top_k keeps the first of them; weights are
  /// exp((logit - largest) / temperature) in double; top_p keeps the shortest beginning that holds
  /// this share of the kept weight, at least one token; the draw is by inversion in that order.
  /// A NaN logit counts as -inf; a logit of +inf excludes all finite ones.
  ///
  /// @param logits    [vocab_size] f32, of one token.
  /// @param sequence  number of the sequence among those that share the seed, chosen by the caller.
  /// @param position  of the drawn token in its sequence.
  /// @throws Error kInvalidArgument: no logits; kInternal: none is above -inf.
  int32_t draw(std::span<const float> logits, uint64_t sequence, int64_t position) const;

 private:
  SamplingOptions options_;
};

}  // namespace dsv4
