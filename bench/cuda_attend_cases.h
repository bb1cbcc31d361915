// Inputs of attention on a GPU for the benches: the cases of the released models, sets of cold
// inputs, and the clock. Shared by cuda_attend_bench and cuda_pair_bench, so that their times mean
// the same.
//
// Method: a graph of calls over input sets of 256 MB together (four times the L2; the smallest
// cases less) is replayed; time is the median of replays divided by the calls, gap between launches
// included. The window is 128 positions at an arbitrary alignment in pages of 256 rows; selected
// rows are random ones of 16384 entries in pages of 64 (prefill: of one sequence's pool); all
// entries lie in pages of 2.
#pragma once
#include <cmath>
#include <cstdint>
#include <functional>
#include <random>
#include <vector>

#include "core/arena.h"
#include "dsv4/cache.h"
#include "dsv4/device.h"
#include "ops/ops.h"

namespace dsv4::nvidia::bench {

constexpr int kDim = 512, kWindow = 128;

enum class Rows { kWindowOnly, kSelected, kAll };

struct Case {
  char letter;
  Rows rows;
  int entries;
  bool prefill;
};
inline constexpr Case kCases[] = {
    {'a', Rows::kWindowOnly, 0, false},  {'b', Rows::kSelected, 512, false},
    {'c', Rows::kSelected, 1024, false}, {'d', Rows::kAll, 64, false},
    {'e', Rows::kAll, 512, false},       {'f', Rows::kAll, 4096, false},
    {'g', Rows::kAll, 8192, false},      {'p', Rows::kWindowOnly, 0, true},
    {'p', Rows::kSelected, 512, true},   {'p', Rows::kSelected, 1024, true},
};
inline constexpr int kBatches[] = {1, 2, 8, 16, 32, 64, 128, 148, 256};
constexpr int kPrefillTokens = 4096, kPrefillPool = 8192, kDecodePool = 16384;

/// One row of a table.
struct Problem {
  Case which;
  KvFormat format = KvFormat::kFp8DsMla;
  int heads = 64;
  int seqs = 1;
  int tokens_per_seq = 1;
  int pool = kDecodePool;  ///< entries of a sequence that rows are selected from

  int tokens() const { return seqs * tokens_per_seq; }
  double flop() const { return 4.0 * tokens() * heads * (kWindow + which.entries) * kDim; }
  /// Cache rows that the call must read, each once; tokens of a sequence share theirs.
  double kv_bytes() const;
  double q_bytes() const { return 2.0 * tokens() * heads * kDim; }
  /// Input sets that together are larger than the L2.
  int cold_sets() const;
};

/// Device memory of one case: bump allocation from slabs, so that many input sets cost few calls.
class Memory {
 public:
  explicit Memory(Device& device) : device_(device) {}
  std::byte* take(int64_t bytes);
  template <typename T>
  T* put(const std::vector<T>& values) {
    const auto bytes = static_cast<int64_t>(values.size() * sizeof(T));
    std::byte* out = take(bytes);
    device_.copy_to_device(out, values.data(), bytes, device_.default_stream());
    return reinterpret_cast<T*>(out);
  }
  /// `sample` again and again.
  std::byte* fill(const std::vector<std::byte>& sample, int64_t bytes);

 private:
  Device& device_;
  std::vector<Buffer> slabs_;
  int64_t used_ = 0;
};

/// bf16 values, normally distributed.
const std::vector<std::byte>& query_sample();

/// Which rows the tokens of a set see, as positions and entry numbers of their sequence.
struct LogicalRows {
  std::vector<int32_t> window_begin;  ///< [tokens]; a token sees kWindow positions from there
  std::vector<int32_t> entries;       ///< [tokens, entries] ascending
};

/// Input sets of a problem: the caches are shared, every set has blocks of its own.
class InputSets {
 public:
  InputSets(Memory& memory, const Problem& problem, int sets);
  /// The sets must be made in order. `rows`, where given, gets what the lists of the set say.
  AttendParams make(int set, LogicalRows* rows = nullptr);
  /// Slot in its cache of a position, of an entry.
  int32_t window_slot(int set, int seq, int position) const;
  int32_t entry_slot(int set, int seq, int entry) const;
  const CacheView& window() const { return window_; }
  const CacheView& compressed() const { return compressed_; }

 private:
  int64_t q_elems() const { return int64_t{problem_.tokens()} * problem_.heads * kDim; }
  std::vector<int32_t> permutation(int64_t count);
  BlockTable table(const std::vector<int32_t>& blocks, int64_t columns, int set, int page);
  std::vector<int32_t> select();

  Memory& memory_;
  const Problem problem_;
  int64_t window_columns_, columns_ = 0;
  CacheView window_, compressed_;
  std::vector<int32_t> window_blocks_, blocks_, entries_;
  std::byte *q_ = nullptr, *out_ = nullptr, *lse_ = nullptr;
  float* sink_ = nullptr;
  std::mt19937 random_{1};
};

using Call = std::function<void(int64_t set)>;

/// Median times of one call of each of `calls`, in replays of a graph of call(0), call(1), ...
/// call(sets - 1), again and again. Several take turns, so that all meet the same clocks;
/// with `load_seconds` each runs alone, after so much of itself.
std::vector<double> medians_us(Device& device, int64_t sets, double load_seconds,
                               const std::vector<Call>& calls);

/// Blocks of a chain that make this call fastest, by a model of the kernels: bits then depend on
/// the batch.
int blocks_by_batch(const Problem& problem);

/// Scratch of a call, measured by making it.
Arena scratch_for(Device& device, Memory& memory, const Ops& ops, const AttendParams& call);

struct GeometricMean {
  double log_sum = 0;
  int count = 0;
  void add(double value) {
    if (value > 0) log_sum += std::log(value), ++count;
  }
  double value() const { return count > 0 ? std::exp(log_sum / count) : 0; }
};

/// "1,2,8"; @throws Error kInvalidArgument.
std::vector<int> parse_list(const char* text);

}  // namespace dsv4::nvidia::bench
