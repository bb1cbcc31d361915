// The part of a dense product that all candidates share: which problems share a prepared x, how the
// work is cut into chunks, and where scratch memory comes from.
#include "backends/cpu/ops/linear.h"

#include "backends/cpu/isa.h"
#include "backends/cpu/ops/flush_denormals.h"
#include "backends/cpu/parallel.h"
#include "core/fail.h"
#include "ops/linear_problem.h"

namespace dsv4::cpu {
namespace {

// Problems of one pass. A call with more, or with more distinct x than fit the scratch, takes
// several passes.
constexpr int kMaxItems = 256;
// x of fewer elements is prepared by the caller: a region would cost more than it saves.
constexpr int64_t kSerialPrepareElements = 8192;
// Rows prepared by one chunk.
constexpr int64_t kPrepareRows = 16;
// Several small x of one call (experts) should fit one pass: room for this many rows at least.
constexpr int64_t kMinPreparedRows = 64;
// x is prepared in panels of up to this size: it bounds scratch memory, and such a panel stays in
// the L3 cache while W streams by.
constexpr int64_t kPanelBytes = int64_t{32} << 20;
constexpr int64_t kMinPanelRows = 256, kMaxPanelRows = 2048;

int64_t prepared_bytes(int64_t padded_rows, int64_t padded_cols, int64_t element_bytes) {
  return round_up(padded_rows * padded_cols * element_bytes, Arena::kAlignment) +
         round_up(padded_rows * static_cast<int64_t>(sizeof(ExponentRange)), Arena::kAlignment);
}

// Rows of x that are prepared together.
int64_t panel_rows(int64_t cols) {
  const int64_t row_bytes = round_up(cols, kLinearGroup) * int64_t{sizeof(float)};
  return std::clamp(kPanelBytes / row_bytes / kMinPanelRows * kMinPanelRows, kMinPanelRows,
                    kMaxPanelRows);
}

// Bytes for prepared x in a call whose largest x is [rows, cols]: at least a panel of panel_rows
// (f32), and monotonic in both, so that limits bound every call within them.
int64_t prepared_budget(int64_t rows, int64_t cols) {
  const int64_t all_rows =
      round_up(std::clamp(rows, kMinPreparedRows, kMaxPanelRows), kLinearTileRows);
  const int64_t row_bytes = round_up(cols, kLinearGroup) * int64_t{sizeof(float)};
  const int64_t bytes =
      std::min(all_rows * row_bytes, std::max(kPanelBytes, kMinPanelRows * row_bytes));
  return round_up(bytes + all_rows * int64_t{sizeof(ExponentRange)}, Arena::kAlignment) +
         2 * kMaxItems * Arena::kAlignment;
}

struct Item {
  const LinearProblem* problem;
  int prepared_idx;
  Tensor out{};  // rows of the panel
  LinearBlocking blocking{};
  int64_t n_tiles = 0;
  int64_t first_chunk = 0;
};

bool same_view(const ConstTensor& a, const ConstTensor& b) {
  return a.data == b.data && a.dtype == b.dtype && a.shape == b.shape && a.strides == b.strides;
}

// One parallel preparation and one parallel product over the items collected so far.
class Pass {
 public:
  Pass(const LinearKernels& kernels, const LinearParams& params, const OpContext& context)
      : kernels_(kernels), params_(params), context_(context) {
    int64_t max_rows = 0, max_cols = 0;
    for (const LinearProblem& problem : params.problems) {
      max_rows = std::max(max_rows, problem.x.shape[0]);
      max_cols = std::max(max_cols, problem.w.cols);
      total_rows_ += problem.w.rows;
    }
    Arena& arena = *context.scratch;
    items_ = arena.take_array<Item>(kMaxItems);
    prepared_ = arena.take_array<PreparedX>(kMaxItems);
    x_bytes_ = prepared_budget(max_rows, max_cols);
    x_base_ = arena.take(x_bytes_);
    thread_base_ = arena.take(thread_bytes() * num_threads(context.stream));
  }

  // Adds `problems`, which share x, lanes and tile rows; runs the pass first when it is full.
  void add(std::span<const LinearProblem> problems, Lanes lanes, int tile_rows) {
    const ConstTensor& x = problems[0].x;
    const int64_t rows_at_once = panel_rows(x.shape[1]);
    for (int64_t row = 0; row < x.shape[0]; row += rows_at_once) {
      PreparedX prepared{.x = x,
                         .quantise = params_.quantise_input,
                         .lanes = lanes,
                         .tile_rows = tile_rows,
                         .row_begin = row,
                         .rows = std::min(rows_at_once, x.shape[0] - row),
                         .padded_rows = 0,
                         .padded_cols = round_up(x.shape[1], kLinearGroup)};
      prepared.padded_rows = round_up(prepared.rows, tile_rows);
      const int64_t element_bytes =
          lanes == Lanes::kF32 ? int64_t{sizeof(float)} : kernels_.element_bytes_bf16;
      const int64_t bytes =
          prepared_bytes(prepared.padded_rows, prepared.padded_cols, element_bytes);
      if (num_items_ + static_cast<int>(problems.size()) > kMaxItems || x_used_ + bytes > x_bytes_)
        run();
      DSV4_CHECK(x_used_ + bytes <= x_bytes_);
      prepared.data = x_base_ + x_used_;
      prepared.range = reinterpret_cast<ExponentRange*>(
          prepared.data +
          round_up(prepared.padded_rows * prepared.padded_cols * element_bytes, Arena::kAlignment));
      x_used_ += bytes;
      prepared_[num_prepared_] = prepared;
      for (const LinearProblem& problem : problems) add_item(problem, num_prepared_);
      ++num_prepared_;
    }
  }

  void run() {
    if (num_items_ == 0) return;
    prepare();
    parallel_chunks(context_.stream, num_chunks_, 1, [&](int64_t chunk, int64_t, int thread_idx) {
      const FlushDenormals flush;
      compute(chunk, thread_idx);
    });
    num_items_ = num_prepared_ = 0;
    num_chunks_ = x_used_ = 0;
  }

 private:
  int64_t thread_bytes() const { return round_up(kernels_.scratch_bytes, Arena::kAlignment); }

  void add_item(const LinearProblem& problem, int prepared_idx) {
    const PreparedX& x = prepared_[prepared_idx];
    Item item{.problem = &problem, .prepared_idx = prepared_idx, .out = problem.out};
    item.out.data = static_cast<char*>(item.out.data) +
                    x.row_begin * item.out.strides[0] * size_of(item.out.dtype);
    item.blocking = kernels_.blocking(x, problem.w, total_rows_, num_threads(context_.stream));
    item.n_tiles = ceil_div(problem.w.rows, item.blocking.n_block);
    item.first_chunk = num_chunks_;
    num_chunks_ += item.n_tiles * ceil_div(x.rows, item.blocking.m_block);
    items_[num_items_++] = item;
  }

  void prepare() {
    int64_t elements = 0, max_rows = 0;
    for (int i = 0; i < num_prepared_; ++i) {
      elements += prepared_[i].rows * prepared_[i].padded_cols;
      max_rows = std::max(max_rows, prepared_[i].rows);
    }
    const int64_t chunks_per_x = ceil_div(max_rows, kPrepareRows);
    const auto body = [&](int64_t chunk, int64_t, int) {
      const PreparedX& x = prepared_[chunk / chunks_per_x];
      const int64_t begin = chunk % chunks_per_x * kPrepareRows;
      if (begin >= x.rows) return;
      const FlushDenormals flush;
      kernels_.prepare(x, begin, std::min(x.rows, begin + kPrepareRows));
    };
    const Stream stream = elements <= kSerialPrepareElements ? Stream{} : context_.stream;
    parallel_chunks(stream, num_prepared_ * chunks_per_x, 1, body);
  }

  void compute(int64_t chunk, int thread_idx) const {
    const Item* item = std::upper_bound(items_, items_ + num_items_, chunk,
                                        [](int64_t value, const Item& candidate) {
                                          return value < candidate.first_chunk;
                                        }) -
                       1;
    const PreparedX& x = prepared_[item->prepared_idx];
    const Weight& w = item->problem->w;
    const auto [m_block, n_block] = item->blocking;
    // Tiles of one panel of x follow each other: it stays in the cache while W streams by.
    const int64_t tile = chunk - item->first_chunk;
    const int64_t m = tile / item->n_tiles * m_block, n = tile % item->n_tiles * n_block;
    kernels_.compute({.x = &x,
                      .w = &w,
                      .out = item->out,
                      .m_begin = m,
                      .m_end = std::min(x.rows, m + m_block),
                      .n_begin = n,
                      .n_end = std::min(w.rows, n + n_block),
                      .scratch = thread_base_ + thread_idx * thread_bytes()});
  }

  const LinearKernels& kernels_;
  const LinearParams& params_;
  const OpContext& context_;
  int64_t total_rows_ = 0;
  Item* items_ = nullptr;
  PreparedX* prepared_ = nullptr;
  std::byte* x_base_ = nullptr;
  std::byte* thread_base_ = nullptr;
  int64_t x_bytes_ = 0;
  int num_items_ = 0;
  int num_prepared_ = 0;
  int64_t num_chunks_ = 0;
  int64_t x_used_ = 0;
};

template <const LinearKernels& kKernels>
void install(Ops& ops) {
  ops.linear = [](const LinearParams& params, const OpContext& context) {
    run_linear(kKernels, params, context);
  };
}

}  // namespace

void run_linear(const LinearKernels& kernels, const LinearParams& params,
                const OpContext& context) {
  const Arena::Scope scope(*context.scratch);
  Pass pass(kernels, params, context);
  if (context.scratch->measuring()) return;
  const std::span<const LinearProblem> problems = params.problems;
  for (size_t begin = 0; begin < problems.size();) {
    const LinearProblem& first = problems[begin];
    check_linear_problem(first, params.quantise_input);
    const Lanes lanes = linear_lanes(first.x.dtype, first.w.dtype);
    const int tile_rows = kernels.tile_rows(first.w, lanes, first.x.shape[0]);
    size_t end = begin + 1;
    while (end < problems.size() && end - begin < kMaxItems &&
           same_view(first.x, problems[end].x) &&
           lanes == linear_lanes(first.x.dtype, problems[end].w.dtype) &&
           tile_rows == kernels.tile_rows(problems[end].w, lanes, first.x.shape[0])) {
      check_linear_problem(problems[end++], params.quantise_input);
    }
    pass.add(problems.subspan(begin, end - begin), lanes, tile_rows);
    begin = end;
  }
  pass.run();
}

std::span<const Candidate> linear_candidates() {
  static constexpr Candidate kCandidates[] = {
#if defined(__x86_64__)
    {"linear", "avx512bf16", why_not_avx512bf16, install<kLinearAvx512Bf16>},
    {"linear", "avx512", why_not_avx512, install<kLinearAvx512>},
    {"linear", "avx2", why_not_avx2, install<kLinearAvx2>},
#endif
    {"linear", "reference", runs_anywhere, install<kLinearReference>},
  };
  static const std::vector<Candidate> list = best_first(kCandidates, cpu_maker());
  return list;
}

int64_t linear_scratch_bytes(const ScratchLimits& limits) {
  int64_t thread_bytes = kLinearReference.scratch_bytes;
#if defined(__x86_64__)
  thread_bytes = std::max({thread_bytes, kLinearAvx2.scratch_bytes, kLinearAvx512.scratch_bytes,
                           kLinearAvx512Bf16.scratch_bytes});
#endif
  Arena measure;
  measure.take_array<Item>(kMaxItems);
  measure.take_array<PreparedX>(kMaxItems);
  measure.take(prepared_budget(limits.max_tokens, limits.max_cols));
  measure.take(round_up(thread_bytes, Arena::kAlignment) * limits.num_threads);
  return measure.peak();
}

}  // namespace dsv4::cpu
