// The compressor against the oracle: sequences fed in chunks through the state ring, every format.
#include <set>

#include "tests/ops/oracle_testing.h"

namespace dsv4::testing {
namespace {

constexpr double kEps = 1e-6;
constexpr int kRopeDim = 64;
constexpr int kRowsPerBlock = 4;

struct CompressCase {
  std::string name;
  int ratio;
  int64_t width;
  KvFormat format;
  bool hadamard;
  bool overlap() const { return ratio == 4; }
  bool exact() const { return format == KvFormat::kF32 || format == KvFormat::kIndexF32; }
};

// An entry of the oracle with the error that float arithmetic may leave in each element.
struct BoundedEntry {
  Vector values, delta;
};

// Pooling: with D = the largest difference of two scores of a channel, exp(s - max) is off by the
// rounding of s + ape and of the difference (2 u (|s| + D)) and 2 ulp of the exponential; value and
// weight sums add count terms each, and one division.
BoundedEntry pooled(const oracle::Matrix& v, const oracle::Matrix& s, int64_t entry,
                    const CompressCase& which) {
  BoundedEntry out;
  out.values = oracle::pool_entry(v, s, entry, which.ratio, which.overlap(), which.width);
  const int64_t slots = (which.overlap() ? 2 : 1) * which.ratio;
  const int64_t last = (entry + 1) * which.ratio - 1;
  for (int64_t c = 0; c < which.width; ++c) {
    double top = -1e300, largest = 0, sum = 0, magnitude = 0;
    std::vector<std::pair<double, double>> terms;  // score, value
    for (int64_t t = std::max<int64_t>(0, last - slots + 1); t <= last; ++t) {
      const bool own = t > last - which.ratio;
      const int64_t channel = which.overlap() && own ? which.width + c : c;
      terms.emplace_back(s.row(t)[channel], v.row(t)[channel]);
      top = std::max(top, terms.back().first);
      largest = std::max(largest, std::abs(terms.back().first));
    }
    for (const auto& [score, value] : terms) {
      sum += std::exp(score - top);
      magnitude += std::exp(score - top) * std::abs(value);
    }
    const double p_error = std::expm1(gamma(2) * 3 * largest) + gamma(4);
    const double count = static_cast<double>(terms.size());
    out.delta.push_back((2 * p_error + 2 * gamma(count + 2)) * magnitude / sum);
  }
  return out;
}

// Norm and rotation (and Hadamard) carry the errors of their inputs along and add their own.
BoundedEntry finished(BoundedEntry pool, std::span<const float> weight,
                      std::span<const float> frequencies, int64_t position, bool hadamard) {
  const size_t n = pool.values.size();
  double squares = 0, cross = 0;
  for (size_t k = 0; k < n; ++k) {
    squares += pool.values[k] * pool.values[k];
    cross += std::abs(pool.values[k]) * pool.delta[k] + pool.delta[k] * pool.delta[k];
  }
  // The mean square moves by 2 sum |x| dx: relative error of its root, plus float's own.
  const double norm =
      cross / (squares + static_cast<double>(n) * kEps) + gamma(static_cast<double>(n) / 2 + 8);
  const double rms = std::sqrt(squares / static_cast<double>(n) + kEps);
  BoundedEntry out = std::move(pool);
  oracle::rms_norm(out.values, weight, kEps);
  for (size_t k = 0; k < n; ++k) {
    out.delta[k] =
        std::abs(weight[k]) * out.delta[k] / rms * (1 + norm) + norm * std::abs(out.values[k]);
  }
  const Vector before = out.values, delta = out.delta;
  oracle::rotate_tail(out.values, frequencies, position);
  for (size_t k = n - kRopeDim; k < n; ++k) {
    const size_t even = k & ~size_t{1}, odd = k | 1;
    out.delta[k] = delta[even] + delta[odd] + rotation_bound(before[even], before[odd]);
  }
  if (hadamard) {
    double delta_sum = 0, magnitude = 0;
    for (size_t k = 0; k < n; ++k) {
      delta_sum += out.delta[k];
      magnitude += std::abs(out.values[k]);
    }
    oracle::hadamard(out.values);
    const double levels = std::log2(static_cast<double>(n));
    std::fill(out.delta.begin(), out.delta.end(),
              (delta_sum + gamma(levels + 2) * magnitude) / std::sqrt(static_cast<double>(n)));
  }
  return out;
}

class OracleCompress : public CandidateTest {
 protected:
  void check(const CompressCase& which);
};

void OracleCompress::check(const CompressCase& which) {
  SCOPED_TRACE(which.name);
  const int coff = which.overlap() ? 2 : 1;
  const int64_t half = coff * which.width, pooled_tokens = int64_t{coff} * which.ratio;
  // Two sequences in chunks that begin and end anywhere; their names in the state are 2 and 0.
  const std::vector<int64_t> lengths{2 * which.ratio + which.ratio / 2 + 3, 3 * which.ratio + 1};
  const std::vector<int32_t> state_slots{2, 0};
  constexpr int64_t kStateSlots = 3;
  const DType act = which.exact() ? DType::kF32 : DType::kBf16;
  Random random(static_cast<uint64_t>(which.ratio) + 31u);

  const Vector ape_values = rounded(DType::kF32, normal_values(random, which.ratio * half, 0.5));
  const Vector norm_values = rounded(act, normal_values(random, which.width, 1.0));
  const std::vector<float> norm(norm_values.begin(), norm_values.end());
  const std::vector<float> frequencies =
      oracle::rope_frequencies({.theta = 160000, .yarn = true}, kRopeDim);
  std::vector<oracle::Matrix> v, s, gates;
  for (int64_t length : lengths) {
    gates.emplace_back(length, 2 * half);
    gates.back().values = rounded(DType::kF32, normal_values(random, length * 2 * half, 1.5));
    v.emplace_back(length, half);
    s.emplace_back(length, half);
    for (int64_t t = 0; t < length; ++t) {
      for (int64_t c = 0; c < half; ++c) {
        v.back().row(t)[c] = gates.back().row(t)[c];
        s.back().row(t)[c] = gates.back().row(t)[half + c] + ape_values[t % which.ratio * half + c];
      }
    }
  }

  const int columns = 4;
  const std::vector<int32_t> table = random.permutation(2 * columns + 1);
  PagedCache cache(memory(), which.format, static_cast<int>(which.width), kRowsPerBlock,
                   2 * columns + 1);
  const int64_t row_elems = 2 * half, slot_stride = pooled_tokens * row_elems + 64;
  auto* state = reinterpret_cast<float*>(memory().raw(kStateSlots * slot_stride * 4));
  const Tensor ape = memory().tensor(DType::kF32, {which.ratio, half}, ape_values);
  const Tensor norm_weight = memory().tensor(act, {which.width}, norm_values);
  const float* device_frequencies = memory().put(frequencies);

  std::vector<int64_t> done(lengths.size(), 0);
  std::set<int64_t> written;
  Comparison comparison("entries [sequence, entry, channel]");
  const int64_t chunk_sizes[] = {1, which.ratio - 1, 2, which.ratio + 5, 1};
  for (int step = 0; done != lengths; ++step) {
    // The step's tokens, sequence after sequence.
    std::vector<int32_t> query_start{0}, context_len, positions, token_to_seq, begin, end;
    std::vector<int64_t> slots;
    Vector step_gates;
    for (size_t seq = 0; seq < lengths.size(); ++seq) {
      context_len.push_back(static_cast<int32_t>(done[seq]));
      const int64_t count =
          std::min(chunk_sizes[(step + static_cast<int>(seq)) % 5], lengths[seq] - done[seq]);
      for (int64_t t = done[seq]; t < done[seq] + count; ++t) {
        positions.push_back(static_cast<int32_t>(t));
        token_to_seq.push_back(static_cast<int32_t>(seq));
        const int64_t entry = t / which.ratio;
        const bool emits = (t + 1) % which.ratio == 0;
        const auto block =
            static_cast<size_t>(static_cast<int64_t>(seq) * columns + entry / kRowsPerBlock);
        slots.push_back(emits ? int64_t{table[block]} * kRowsPerBlock + entry % kRowsPerBlock : -1);
        begin.push_back(0);
        end.push_back(static_cast<int32_t>((t + 1) / which.ratio));
        const auto row = gates[seq].row(t);
        step_gates.insert(step_gates.end(), row.begin(), row.end());
      }
      done[seq] += count;
      query_start.push_back(static_cast<int32_t>(positions.size()));
    }
    const auto tokens = static_cast<int64_t>(positions.size());
    RatioPlan ratio{which.ratio, memory().put(slots), memory().put(begin), memory().put(end)};
    PlanView plan;
    plan.num_tokens = static_cast<int32_t>(tokens);
    plan.num_seqs = static_cast<int32_t>(lengths.size());
    plan.max_query_len = static_cast<int32_t>(tokens);
    plan.max_context = *std::max_element(done.begin(), done.end());
    plan.query_start = memory().put(query_start);
    plan.context_len = memory().put(context_len);
    plan.state_slot = memory().put(state_slots);
    plan.positions = memory().put(positions);
    plan.token_to_seq = memory().put(token_to_seq);
    plan.ratios = {&ratio, 1};
    const Tensor entries = memory().tensor(DType::kF32, {tokens, which.width});
    ScratchLimits limits;
    limits.max_tokens = tokens;
    limits.head_dim = static_cast<int>(which.width);
    run(ops_.compress,
        {.plan = &plan,
         .ratio = &ratio,
         .overlap = which.overlap(),
         .gates = memory().tensor(DType::kF32, {tokens, 2 * half}, step_gates),
         .ape = ape,
         .norm = norm_weight,
         .eps = static_cast<float>(kEps),
         .rope = {device_frequencies, kRopeDim},
         .hadamard = which.hadamard,
         .activation = act,
         .state = {state, slot_stride, kStateSlots, static_cast<int32_t>(pooled_tokens),
                   static_cast<int32_t>(row_elems)},
         .cache = cache.view(),
         .entries = entries},
        limits);

    const Vector actual = memory().numbers(entries);
    cache.download();
    PagedCache expected(memory(), which.format, static_cast<int>(which.width), kRowsPerBlock,
                        2 * columns + 1);
    for (int64_t t = 0; t < tokens; ++t) {
      const std::span<const double> got = std::span(actual).subspan(
          static_cast<size_t>(t * which.width), static_cast<size_t>(which.width));
      if (slots[t] < 0) {
        ASSERT_TRUE(std::isnan(got[0])) << "token " << t << " emits nothing";
        continue;
      }
      written.insert(slots[t]);
      const int seq = token_to_seq[t];
      const int64_t entry = positions[t] / which.ratio;
      const BoundedEntry exact = finished(pooled(v[seq], s[seq], entry, which), norm, frequencies,
                                          entry * which.ratio, which.hadamard);
      for (int64_t c = 0; c < which.width; ++c) {
        comparison.add({seq, entry, c}, got[c], exact.values[c],
                       exact.delta[c] + rounding_bound(act, exact.values[c], exact.delta[c]));
      }
      expected.write(slots[t], got);
      EXPECT_EQ(cache.bytes(slots[t]), expected.bytes(slots[t]))
          << "the oracle's writer makes other bytes of entry " << entry;
    }
    EXPECT_TRUE(cache.only_wrote({written.begin(), written.end()}));
  }
  EXPECT_TRUE(comparison.result());
  EXPECT_EQ(comparison.count(), static_cast<int64_t>(written.size()) * which.width);
  clear_memory();
}

TEST_P(OracleCompress, ChunksThroughTheStateRing) {
  for (const CompressCase& which : {
           CompressCase{"csa fp8_ds_mla", 4, 512, KvFormat::kFp8DsMla, false},
           CompressCase{"csa bf16", 4, 512, KvFormat::kBf16, false},
           CompressCase{"csa fp8", 4, 512, KvFormat::kFp8, false},
           CompressCase{"csa f32", 4, 512, KvFormat::kF32, false},
           CompressCase{"hca fp8_ds_mla", 128, 512, KvFormat::kFp8DsMla, false},
           CompressCase{"hca f32", 128, 512, KvFormat::kF32, false},
           CompressCase{"index fp8", 4, 128, KvFormat::kIndexFp8, false},
           CompressCase{"index mxfp4, Hadamard", 4, 128, KvFormat::kIndexMxfp4, true},
           CompressCase{"index f32", 4, 128, KvFormat::kIndexF32, false},
       }) {
    if (which.exact() && !exact()) continue;
    check(which);
  }
}

INSTANTIATE_TEST_SUITE_P(Candidates, OracleCompress, ::testing::ValuesIn(op_candidates("rowwise")),
                         candidate_name);

}  // namespace
}  // namespace dsv4::testing
