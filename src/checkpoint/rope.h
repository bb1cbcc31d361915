// Rotary frequencies of a layer kind.
#pragma once
#include <vector>

#include "dsv4/config.h"

namespace dsv4 {

/// f_i = theta^(-2i / rope_dim), i < rope_dim / 2, mixed with f_i / factor by YaRN's ramp where
/// asked for. Evaluated in double and rounded once. Source: spec/attention.md 3.
std::vector<float> rope_frequencies(const RopeParameters& parameters, int rope_dim);

}  // namespace dsv4
