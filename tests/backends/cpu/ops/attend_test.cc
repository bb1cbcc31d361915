// Attention: every candidate against the scalar one bit by bit, the scalar one against softmax in
// double precision, and the properties that hold bit by bit whatever the step looks like.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "backends/cpu/candidates.h"
#include "backends/cpu/ops/attend_arith.h"
#include "cache/kv_format.h"
#include "core/numbers.h"
#include "core/thread_pool.h"

namespace dsv4::cpu {
namespace {

using Random = std::mt19937;

float uniform(Random& random, float magnitude) {
  return std::uniform_real_distribution<float>(-magnitude, magnitude)(random);
}
int pick(Random& random, int low, int high) {
  return std::uniform_int_distribution<int>(low, high)(random);
}

// A paged cache of several sequences. Bytes that no row was written to are 0xff: NaN in every
// format, also as a scale.
struct PagedRows {
  std::vector<std::byte> bytes;
  CacheView view;
  std::vector<int32_t> table;
  BlockTable blocks;

  PagedRows(Random& random, KvFormat format, int dim, int rows_per_block, int seqs, int columns,
            int64_t padding_bytes) {
    const int num_blocks = seqs * columns + 3;
    view.block_stride_bytes = page_bytes(format, rows_per_block, dim) + padding_bytes;
    view.num_blocks = num_blocks;
    view.rows_per_block = rows_per_block;
    view.format = format;
    view.row_elems = dim;
    bytes.assign(static_cast<size_t>(view.block_stride_bytes * num_blocks), std::byte{0xff});
    view.base = bytes.data();
    std::vector<int32_t> order(static_cast<size_t>(num_blocks));
    std::iota(order.begin(), order.end(), 0);
    std::shuffle(order.begin(), order.end(), random);
    table.assign(order.begin(), order.begin() + seqs * columns);
    blocks = {table.data(), columns, columns, rows_per_block};
  }
  int64_t slot(int seq, int64_t row) const {
    const int64_t logical = row / view.rows_per_block % blocks.columns;
    return int64_t{table[static_cast<size_t>(seq * blocks.stride + logical)]} *
               view.rows_per_block +
           row % view.rows_per_block;
  }
  void write(Random& random, int seq, int64_t row, float magnitude) {
    std::vector<float> values(static_cast<size_t>(view.row_elems));
    for (float& v : values) v = uniform(random, magnitude);
    encode_row(view, slot(seq, row), values.data());
  }
};

enum class Compressed { kNone, kRange, kList };

struct CaseOptions {
  DType act = DType::kBf16;
  KvFormat window_format = KvFormat::kFp8DsMla;
  KvFormat compressed_format = KvFormat::kFp8DsMla;
  Compressed compressed = Compressed::kList;
  int heads = 4;
  int dim = 512;
  int tokens = 3;
  int max_entries = 200;
  int blocks_per_chain = 32;
  float magnitude = 1.0f;
  bool round_p = true;
};

// One call of attend with everything that it points to.
struct Case {
  CaseOptions options;
  int seqs = 2;
  PagedRows window, compressed;
  std::vector<int32_t> token_to_seq, window_begin, window_end, begin, end, slots, length;
  std::vector<float> q_values, sink;
  std::vector<uint16_t> q_bf16;
  int64_t list_stride = 0;

  Case(Random& random, const CaseOptions& o)
      : options(o),
        // A ring of few blocks, so that positions wrap; odd sizes on purpose.
        window(random, o.window_format, o.dim, 37, 2, 6, 40),
        compressed(random, o.compressed_format, o.dim, pick(random, 0, 1) ? 2 : 64, 2,
                   o.max_entries + 1, 64) {
    std::vector<int> position(2);
    for (int& p : position) p = pick(random, 0, 700);
    const auto tokens = static_cast<size_t>(o.tokens);
    list_stride = o.max_entries + 3;
    slots.assign(tokens * static_cast<size_t>(list_stride), 0x7fffffff);
    for (int seq = 0; seq < seqs; ++seq) {
      for (int r = 0; r < o.max_entries; ++r) compressed.write(random, seq, r, o.magnitude);
    }
    std::vector<int> written(2, 0);
    for (int t = 0; t < o.tokens; ++t) {
      const int seq = t * 2 / o.tokens;
      token_to_seq.push_back(seq);
      const int pos = position[static_cast<size_t>(seq)]++;
      const int first = std::max(0, pos - 127);
      for (int r = std::max(first, written[static_cast<size_t>(seq)]); r <= pos; ++r) {
        window.write(random, seq, r, o.magnitude);
      }
      written[static_cast<size_t>(seq)] = pos + 1;
      window_begin.push_back(first);
      window_end.push_back(pos + 1);
      begin.push_back(0);
      end.push_back(pick(random, 0, o.max_entries));
      length.push_back(pick(random, 0, o.max_entries));
      for (int i = 0, entry = 0; i < length.back(); ++i) {
        const bool unused = pick(random, 0, 9) == 0;
        slots[static_cast<size_t>(t * list_stride + i)] =
            unused ? -1 : static_cast<int32_t>(compressed.slot(seq, entry));
        entry = std::min(entry + 1, o.max_entries - 1);
      }
    }
    q_values.resize(tokens * static_cast<size_t>(o.heads * o.dim));
    for (float& v : q_values) {
      v = uniform(random, o.magnitude);
      if (o.act == DType::kBf16) {
        v = round_bf16(v);
        q_bf16.push_back(f32_to_bf16(v));
      }
    }
    for (int h = 0; h < o.heads; ++h) sink.push_back(uniform(random, 3.0f));
  }

  AttendParams params() {
    AttendParams p{};
    const int64_t t = options.tokens, h = options.heads, d = options.dim;
    const void* q = options.act == DType::kBf16 ? static_cast<const void*>(q_bf16.data())
                                                : static_cast<const void*>(q_values.data());
    p.q = ConstTensor(q, options.act, {t, h, d});
    p.window = RangeRows{window.view, window.blocks, window_begin.data(), window_end.data()};
    if (options.compressed == Compressed::kRange) {
      p.compressed = RangeRows{compressed.view, compressed.blocks, begin.data(), end.data()};
    } else if (options.compressed == Compressed::kList) {
      p.compressed = ListedRows{compressed.view, slots.data(), list_stride, length.data()};
    }
    p.token_to_seq = token_to_seq.data();
    p.sink = sink.data();
    p.softmax_scale = 1.0f / std::sqrt(static_cast<float>(d));
    p.grid.blocks_per_chain = options.blocks_per_chain;
    p.round_p_to_bf16 = options.round_p;
    return p;
  }

  // Slots that token t attends to, per cache.
  std::vector<std::pair<const PagedRows*, int64_t>> rows_of(int t) const {
    std::vector<std::pair<const PagedRows*, int64_t>> rows;
    const auto i = static_cast<size_t>(t);
    for (int r = window_begin[i]; r < window_end[i]; ++r) {
      rows.emplace_back(&window, window.slot(token_to_seq[i], r));
    }
    if (options.compressed == Compressed::kRange) {
      for (int r = begin[i]; r < end[i]; ++r) {
        rows.emplace_back(&compressed, compressed.slot(token_to_seq[i], r));
      }
    } else if (options.compressed == Compressed::kList) {
      for (int r = 0; r < length[i]; ++r) {
        const int32_t slot = slots[static_cast<size_t>(t * list_stride + r)];
        if (slot >= 0) rows.emplace_back(&compressed, slot);
      }
    }
    return rows;
  }
};

struct Result {
  std::vector<std::byte> out;
  std::vector<float> lse;
  bool operator==(const Result& other) const {
    return out == other.out && std::memcmp(lse.data(), other.lse.data(), 4 * lse.size()) == 0;
  }
  float value(DType dtype, size_t i) const {
    float f32;
    uint16_t bf16;
    if (dtype == DType::kBf16) {
      std::memcpy(&bf16, out.data() + 2 * i, 2);
      return bf16_to_f32(bf16);
    }
    std::memcpy(&f32, out.data() + 4 * i, 4);
    return f32;
  }
};

constexpr std::byte kGuard{0xa5};

// Runs one candidate with exactly the scratch that attend_scratch_bytes promises, and checks that
// nothing around the outputs was touched.
Result run(const Candidate& candidate, AttendParams params, int threads) {
  Ops ops;
  candidate.install(ops);
  ThreadPool pool(threads);
  ScratchLimits limits;
  limits.max_tokens = params.q.shape[0];
  limits.num_heads = static_cast<int>(params.q.shape[1]);
  limits.head_dim = static_cast<int>(params.q.shape[2]);
  limits.num_threads = threads;
  std::vector<std::byte> scratch(
      static_cast<size_t>(attend_scratch_bytes(limits) + Arena::kAlignment), std::byte{0xff});
  void* base = scratch.data();
  size_t space = scratch.size();
  std::align(Arena::kAlignment, 1, base, space);
  Arena arena(static_cast<std::byte*>(base), attend_scratch_bytes(limits));

  const int64_t tokens = params.q.shape[0], heads = params.q.shape[1], dim = params.q.shape[2];
  const int64_t elem = size_of(params.q.dtype), pad = 16;
  const int64_t token_stride = heads * (dim + pad) + pad;
  std::vector<std::byte> guarded(static_cast<size_t>((tokens * token_stride + pad) * elem), kGuard);
  std::vector<float> lse(static_cast<size_t>(tokens * heads) + 2, 77.0f);
  params.out = Tensor(guarded.data() + pad * elem, params.q.dtype, {tokens, heads, dim});
  params.out.strides = {token_stride, dim + pad, 1};
  params.lse = lse.data() + 1;
  ops.attend(params, OpContext{Stream{threads == 1 ? nullptr : &pool}, &arena, &ops});
  EXPECT_EQ(arena.used(), 0);

  Result result;
  std::vector<bool> inside(guarded.size(), false);
  for (int64_t t = 0; t < tokens; ++t) {
    for (int64_t h = 0; h < heads; ++h) {
      const auto at = static_cast<size_t>((pad + t * token_stride + h * (dim + pad)) * elem);
      const auto bytes = static_cast<size_t>(dim * elem);
      result.out.insert(result.out.end(), guarded.begin() + static_cast<int64_t>(at),
                        guarded.begin() + static_cast<int64_t>(at + bytes));
      std::fill_n(inside.begin() + static_cast<int64_t>(at), bytes, true);
    }
  }
  for (size_t i = 0; i < guarded.size(); ++i) {
    if (!inside[i] && guarded[i] != kGuard) {
      ADD_FAILURE() << candidate.name << ": wrote outside its output at byte " << i;
      break;
    }
  }
  EXPECT_EQ(lse.front(), 77.0f);
  EXPECT_EQ(lse.back(), 77.0f);
  result.lse.assign(lse.begin() + 1, lse.end() - 1);
  return result;
}

const Candidate& reference() {
  return attend_candidates().back();
}
std::vector<const Candidate*> usable() {
  std::vector<const Candidate*> list;
  for (const Candidate& c : attend_candidates()) {
    if (c.why_not().empty()) list.push_back(&c);
  }
  return list;
}

// All candidates and thread counts give the reference's bits.
Result expect_all_equal(Case& c, const std::string& what) {
  const Result expected = run(reference(), c.params(), 1);
  for (const Candidate* candidate : usable()) {
    for (int threads : {1, 2, 3}) {
      if (candidate == &reference() && threads < 3) continue;  // slow, and the same code
      EXPECT_TRUE(run(*candidate, c.params(), threads) == expected)
          << candidate->name << ", " << threads << " threads, " << what;
    }
  }
  return expected;
}

// Softmax in double over the rows that a token sees. Bounds, with u = 2^-24, N rows, D dims:
//   a score is a chain of D products: |dz| <= (D + 3) u scale sum |q k|, the largest of the rows:
//   E; a weight is then off by a factor within exp(+-2E), the exponential and its merging by 32 u
//   (one rounding each), P by half a bf16 step 2^-9, sums of N terms by N u twice (sum and value);
//   the output is rounded once more.
void expect_softmax(Case& c, const Result& result) {
  const double u = 0x1p-24;
  const int heads = c.options.heads, dim = c.options.dim;
  const double scale = c.params().softmax_scale;
  for (int t = 0; t < c.options.tokens; ++t) {
    const auto rows = c.rows_of(t);
    const size_t n = rows.size(), d = static_cast<size_t>(dim);
    std::vector<float> k(n * d);
    for (size_t r = 0; r < n; ++r) {
      decode_row(rows[r].first->view, rows[r].second, k.data() + r * d);
    }
    for (int h = 0; h < heads; ++h) {
      const size_t at = static_cast<size_t>(t * heads + h);
      const float* q = c.q_values.data() + at * d;
      if (n == 0) {
        EXPECT_EQ(result.lse[at], -INFINITY);
        for (size_t i = 0; i < d; ++i) EXPECT_EQ(result.value(c.options.act, at * d + i), 0.0f);
        continue;
      }
      std::vector<double> p(n);
      double largest = -INFINITY, score_error = 0;
      for (size_t r = 0; r < n; ++r) {
        double z = 0, absolute = 0;
        for (size_t i = 0; i < d; ++i) {
          z += double{q[i]} * k[r * d + i];
          absolute += std::fabs(double{q[i]} * k[r * d + i]);
        }
        p[r] = z * scale;
        largest = std::max(largest, p[r]);
        score_error = std::max(score_error, (dim + 3) * u * scale * absolute);
      }
      double sum = 0;
      for (double& x : p) sum += x = std::exp(x - largest);
      const double lse = largest + std::log(sum);
      const double all = sum + std::exp(double{c.sink[static_cast<size_t>(h)]} - largest);
      const double weight_error =
          std::expm1(2 * score_error) + 32 * u + 2 * static_cast<double>(n) * u;
      EXPECT_NEAR(result.lse[at], lse, weight_error + 2 * u * std::fabs(lse))
          << "lse of head " << h;
      // bf16 has 8 significant bits: half an ulp is up to 2^-8 of the value.
      const double relative = 2 * weight_error + (c.options.round_p ? 0x1p-8 : 0.0);
      const double rounding = c.options.act == DType::kBf16 ? 0x1p-8 : u;
      for (size_t i = 0; i < d; ++i) {
        double value = 0, absolute = 0;
        for (size_t r = 0; r < n; ++r) {
          value += p[r] / all * k[r * d + i];
          absolute += p[r] / all * std::fabs(k[r * d + i]);
        }
        const double bound = (relative * absolute + std::fabs(value) * rounding) * 1.01 + 1e-37;
        ASSERT_NEAR(result.value(c.options.act, at * d + i), value, bound)
            << "token " << t << " head " << h << " dim " << i << " of " << n << " rows";
      }
    }
  }
}

TEST(Attend, CandidatesAgreeForEveryFormatHeadCountAndList) {
  Random random(1);
  const KvFormat formats[] = {KvFormat::kFp8DsMla, KvFormat::kBf16, KvFormat::kFp8, KvFormat::kF32};
  for (const KvFormat format : formats) {
    for (const int heads : {1, 3, 4, 8, 16, 33}) {
      for (const Compressed compressed :
           {Compressed::kNone, Compressed::kRange, Compressed::kList}) {
        CaseOptions o;
        o.window_format = o.compressed_format = format;
        o.heads = heads;
        o.compressed = compressed;
        o.tokens = heads > 8 ? 1 : 3;
        o.act = format == KvFormat::kF32 ? DType::kF32 : DType::kBf16;
        o.round_p = o.act == DType::kBf16;
        Case c(random, o);
        expect_all_equal(c, concat(kv_format_name(format), ", heads ", heads, ", list ",
                                   static_cast<int>(compressed)));
      }
    }
  }
}

TEST(Attend, CandidatesAgreeForManyHeadsAndTokens) {
  Random random(2);
  for (const int heads : {64, 128}) {
    CaseOptions o;
    o.heads = heads;
    o.tokens = 1;
    o.max_entries = 70;
    Case c(random, o);
    expect_all_equal(c, concat("heads ", heads));
  }
  CaseOptions o;
  o.heads = 40;  // two groups of one item
  o.tokens = 13;
  o.max_entries = 20;
  Case c(random, o);
  expect_all_equal(c, "many tokens");
}

TEST(Attend, CandidatesAgreeForMixedFormatsAndRoundings) {
  Random random(3);
  CaseOptions o;
  o.window_format = KvFormat::kBf16;
  Case mixed(random, o);
  expect_softmax(mixed, expect_all_equal(mixed, "bf16 window, packed entries"));
  o.round_p = false;
  Case unrounded(random, o);
  expect_softmax(unrounded, expect_all_equal(unrounded, "bf16 activations, P not rounded"));
  o.act = DType::kF32;
  Case wide(random, o);
  expect_softmax(wide, expect_all_equal(wide, "f32 activations on packed rows"));
  o.window_format = KvFormat::kF32;
  o.act = DType::kBf16;
  Case f32_rows(random, o);
  expect_all_equal(f32_rows, "bf16 activations on f32 rows");
}

// Scores, weights and products below 2^-126, and scale bytes at both ends.
TEST(Attend, CandidatesAgreeWhereNumbersVanish) {
  Random random(4);
  for (const float magnitude : {1e-18f, 3e-20f, 1e-36f, 30.0f, 1e4f}) {
    for (const KvFormat format : {KvFormat::kFp8DsMla, KvFormat::kBf16}) {
      CaseOptions o;
      o.window_format = o.compressed_format = format;
      o.magnitude = magnitude;
      Case c(random, o);
      expect_all_equal(c, concat(kv_format_name(format), ", magnitude ", magnitude));
      for (std::vector<std::byte>* bytes : {&c.window.bytes, &c.compressed.bytes}) {
        for (size_t i = 0; i < bytes->size(); i += 97) {
          (*bytes)[i] = std::byte{static_cast<unsigned char>(pick(random, 0, 0x7e))};
        }
      }
      expect_all_equal(c, concat(kv_format_name(format), ", any bytes, magnitude ", magnitude));
    }
  }
}

TEST(Attend, AgreesWithSoftmaxInDouble) {
  Random random(5);
  for (const Compressed compressed : {Compressed::kNone, Compressed::kRange, Compressed::kList}) {
    for (const int chain : {32, 1, 2}) {
      for (const bool exact : {false, true}) {
        CaseOptions o;
        o.compressed = compressed;
        o.blocks_per_chain = chain;
        o.max_entries = 400;
        if (exact) {
          o.window_format = o.compressed_format = KvFormat::kF32;
          o.act = DType::kF32;
          o.round_p = false;
        }
        Case c(random, o);
        expect_softmax(c, expect_all_equal(c, concat("chains of ", chain)));
      }
    }
  }
}

TEST(Attend, ChainsOfALoneTokenAreSpreadWithoutChangingBits) {
  Random random(6);
  for (const int heads : {4, 40, 64}) {
    CaseOptions o;
    o.compressed = Compressed::kRange;
    o.heads = heads;
    o.tokens = 1;
    o.max_entries = 1300;
    o.blocks_per_chain = 1;
    Case c(random, o);
    c.end[0] = 1283;
    expect_softmax(c, expect_all_equal(c, concat("21 chains, heads ", heads)));
    c.begin[0] = 200;  // chains 0..2 hold the window at most
    c.window_end[0] = c.window_begin[0];
    expect_softmax(c, expect_all_equal(c, concat("leading chains empty, heads ", heads)));
  }
}

TEST(Attend, TokenAloneGivesTheBitsItHasInABatch) {
  Random random(7);
  for (const Candidate* candidate : usable()) {
    CaseOptions o;
    o.heads = 5;
    o.tokens = 7;
    Case c(random, o);
    const Result all = run(*candidate, c.params(), 2);
    const size_t row = static_cast<size_t>(o.heads * o.dim) * 2;
    for (int t = 0; t < o.tokens; ++t) {
      AttendParams p = c.params();
      p.q = p.q.rows(t, 1);
      std::get<RangeRows>(p.window).begin += t;
      std::get<RangeRows>(p.window).end += t;
      p.token_to_seq += t;
      auto& list = std::get<ListedRows>(p.compressed);
      list.slots += t * list.stride;
      list.length += t;
      const Result alone = run(*candidate, p, 3);
      EXPECT_EQ(std::memcmp(alone.out.data(), all.out.data() + static_cast<size_t>(t) * row, row),
                0)
          << candidate->name << " token " << t;
    }
  }
}

TEST(Attend, EdgesOfTheWindow) {
  Random random(8);
  CaseOptions o;
  o.compressed = Compressed::kNone;
  o.tokens = 1;
  for (const auto& [begin, end] : std::vector<std::pair<int, int>>{{0, 1},
                                                                   {0, 63},
                                                                   {0, 64},
                                                                   {0, 65},
                                                                   {63, 64},
                                                                   {63, 65},
                                                                   {64, 128},
                                                                   {65, 193},
                                                                   {1, 129},
                                                                   {127, 191},
                                                                   {128, 129},
                                                                   {37, 38}}) {
    Case c(random, o);
    for (int r = begin; r < end; ++r) c.window.write(random, 0, r, 1.0f);
    c.window_begin[0] = begin;
    c.window_end[0] = end;
    expect_softmax(c, expect_all_equal(c, concat("window [", begin, ", ", end, ")")));
  }
}

TEST(Attend, MaskedListEntriesContributeNothing) {
  Random random(9);
  CaseOptions o;
  o.tokens = 1;
  Case c(random, o);
  c.length[0] = 190;
  for (int i = 0; i < 190; ++i) {
    c.slots[static_cast<size_t>(i)] = i < 100 ? static_cast<int32_t>(c.compressed.slot(0, i)) : -1;
  }
  const Result padded = expect_all_equal(c, "padded list");
  c.length[0] = 100;
  EXPECT_TRUE(run(reference(), c.params(), 1) == padded);
  // A hole of more than a block, with an odd edge, against the sums over what is left.
  for (int i = 21; i < 90; ++i) c.slots[static_cast<size_t>(i)] = -1;
  expect_softmax(c, expect_all_equal(c, "list with a hole"));
}

TEST(Attend, NoKeysAndExtremeSinks) {
  Random random(10);
  CaseOptions o;
  Case c(random, o);
  c.window_end[1] = c.window_begin[1];
  c.length[1] = 0;
  c.sink = {INFINITY, -INFINITY, 1e30f, 0.0f};
  const Result result = expect_all_equal(c, "sinks");
  const auto d = static_cast<size_t>(o.dim);
  for (size_t i = 0; i < 4 * d; ++i) EXPECT_EQ(result.value(o.act, 4 * d + i), 0.0f);
  for (size_t h = 0; h < 4; ++h) EXPECT_EQ(result.lse[4 + h], -INFINITY);
  for (size_t i = 0; i < d; ++i) {
    EXPECT_EQ(result.value(o.act, i), 0.0f);
    EXPECT_EQ(result.value(o.act, 2 * d + i), 0.0f);
  }
  c.sink[0] = c.sink[2] = 0.5f;
  expect_softmax(c, run(reference(), c.params(), 1));
  AttendParams no_sink = c.params();
  no_sink.sink = nullptr;
  c.sink.assign(4, -INFINITY);
  for (const Candidate* candidate : usable()) {
    EXPECT_TRUE(run(*candidate, no_sink, 2) == run(*candidate, c.params(), 2)) << candidate->name;
  }
}

TEST(Attend, RenamedBlocksGiveTheSameBits) {
  CaseOptions o;
  o.tokens = 4;
  Random random(11);
  Case c(random, o);
  const Result before = run(*usable().front(), c.params(), 2);
  for (PagedRows* rows : {&c.window, &c.compressed}) {
    const int n = rows->view.num_blocks;
    const auto stride = static_cast<size_t>(rows->view.block_stride_bytes);
    std::vector<std::byte> moved(rows->bytes.size());
    for (int b = 0; b < n; ++b) {
      std::memcpy(moved.data() + static_cast<size_t>(n - 1 - b) * stride,
                  rows->bytes.data() + static_cast<size_t>(b) * stride, stride);
    }
    rows->bytes = moved;
    rows->view.base = rows->bytes.data();
    for (int32_t& b : rows->table) b = n - 1 - b;
  }
  for (size_t t = 0; t < c.length.size(); ++t) {
    const int32_t rows = c.compressed.view.rows_per_block;
    for (int i = 0; i < c.length[t]; ++i) {
      int32_t& slot = c.slots[t * static_cast<size_t>(c.list_stride) + static_cast<size_t>(i)];
      if (slot >= 0) slot = (c.compressed.view.num_blocks - 1 - slot / rows) * rows + slot % rows;
    }
  }
  EXPECT_TRUE(run(*usable().front(), c.params(), 2) == before);
}

TEST(Attend, OtherHeadDims) {
  Random random(12);
  for (const int dim : {2, 24, 64, 128, 130, 576}) {
    for (const KvFormat format : {KvFormat::kBf16, KvFormat::kFp8, KvFormat::kF32}) {
      CaseOptions o;
      o.dim = dim;
      o.window_format = o.compressed_format = format;
      o.act = format == KvFormat::kF32 ? DType::kF32 : DType::kBf16;
      o.round_p = o.act == DType::kBf16;
      Case c(random, o);
      expect_softmax(c, expect_all_equal(c, concat("dim ", dim, " ", kv_format_name(format))));
    }
  }
}

TEST(Attend, MeasuringTouchesNothing) {
  Random random(13);
  CaseOptions o;
  Case c(random, o);
  for (const Candidate* candidate : usable()) {
    Ops ops;
    candidate->install(ops);
    Arena measuring;
    AttendParams p = c.params();
    p.q.data = nullptr;
    auto& window = std::get<RangeRows>(p.window);
    window.begin = window.end = p.token_to_seq = nullptr;
    ops.attend(p, OpContext{Stream{}, &measuring, &ops});
    EXPECT_GT(measuring.peak(), 0) << candidate->name;
    ScratchLimits limits;
    limits.num_heads = o.heads;
    limits.head_dim = o.dim;
    EXPECT_LE(measuring.peak(), attend_scratch_bytes(limits)) << candidate->name;
  }
}

// The polynomial is 2.6e-9 off; with the rounding of its seven steps a result stays within 1.5 ulp.
TEST(AttendArith, Exp2IsWithinOneAndAHalfUlp) {
  for (float x = -130.0f; x <= 100.0f; x += 0.000977f) {
    const double exact = std::exp2(double{x});
    const float value = exp2_flushed(x);
    if (x < -126.0f) {
      ASSERT_EQ(value, 0.0f) << x;
      continue;
    }
    ASSERT_GE(value, 0x1p-126f) << x;
    ASSERT_LE(std::fabs(value - exact), 1.5 * 0x1p-23 * exact) << x;
  }
  EXPECT_EQ(exp2_flushed(0.0f), 1.0f);
  EXPECT_EQ(exp2_flushed(-126.0f), 0x1p-126f);
  EXPECT_EQ(exp2_flushed(-INFINITY), 0.0f);
  EXPECT_TRUE(std::isnan(exp2_flushed(NAN)));
}

}  // namespace
}  // namespace dsv4::cpu
