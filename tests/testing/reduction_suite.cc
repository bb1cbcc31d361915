#include "tests/testing/reduction_suite.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <map>
#include <set>
#include <tuple>

#include "core/checked_math.h"
#include "core/fail.h"
#include "tests/oracle/layer_parts.h"
#include "tests/testing/random.h"
#include "tests/testing/tolerance.h"

namespace dsv4::testing {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Numbers of a row or query, the same wherever it is used. `kind` separates the uses.
Vector token_values(int kind, int seq, int64_t index, int count, double scale) {
  Random random(static_cast<uint64_t>(kind) * 1000003u + static_cast<uint64_t>(seq) * 10007u +
                static_cast<uint64_t>(index) * 7u + 1u);
  Vector out(static_cast<size_t>(count));
  for (double& value : out) value = scale * random.normal();
  return out;
}

int visible_entries(const AttendCase& which, int position) {
  return which.compressed == CompressedKind::kNone ? 0 : (position + 1) / which.ratio;
}

// Entries that a token selects: all while they fit, then a pseudo-random ascending choice.
std::vector<int32_t> selected_entries(const AttendCase& which, const AttendToken& token) {
  const int visible = visible_entries(which, token.position);
  Random random(static_cast<uint64_t>(token.seq) * 7919u + static_cast<uint64_t>(token.position));
  std::vector<int32_t> entries = random.permutation(visible);
  if (which.compressed == CompressedKind::kList && visible > which.topk) {
    entries.resize(static_cast<size_t>(which.topk));
  }
  std::sort(entries.begin(), entries.end());
  return entries;
}

using RowSet = std::set<std::pair<int, int64_t>>;  // (sequence, row)

// One paged list per sequence, with its block table. Blocks without a row in `rows` have no memory
// of their own: their table entries name a spare block of NaN.
class PagedLists {
 public:
  // `ring_rows` > 0: the table wraps and holds that many rows.
  PagedLists(DeviceMemory& memory, const AttendCase& which, int block_rows, const RowSet& rows,
             uint64_t seed, const AttendPlacement& placement, int64_t ring_rows)
      : block_rows_(block_rows) {
    int64_t num_seqs = 1;
    for (const auto& [seq, row] : rows) {
      columns_ = std::max(columns_, row / block_rows + 1);
      num_seqs = std::max<int64_t>(num_seqs, seq + 1);
    }
    // One block more than the rows fill: the newest row may have entered another.
    if (ring_rows > 0) columns_ = std::min(columns_, ceil_div(ring_rows, block_rows) + 1);
    RowSet blocks;
    for (const auto& [seq, row] : rows) blocks.insert({seq, row / block_rows % columns_});
    const auto num_blocks = static_cast<int32_t>(blocks.size()) + placement.spare_blocks;
    Random random(seed);
    const std::vector<int32_t> names = random.permutation(num_blocks);
    table_.assign(static_cast<size_t>(num_seqs * columns_), names.back());
    size_t next = 0;
    for (const auto& [seq, column] : blocks) table_[seq * columns_ + column] = names[next++];
    cache_ = std::make_unique<PagedCache>(memory, which.format, which.head_dim, block_rows,
                                          num_blocks, placement.padding_bytes);
    device_table_ = memory.put(table_);
  }
  int64_t slot(int seq, int64_t row) const {
    const int64_t column = row / block_rows_ % columns_;
    return int64_t{table_[seq * columns_ + column]} * block_rows_ + row % block_rows_;
  }
  PagedCache& cache() { return *cache_; }
  BlockTable block_table() const {
    return {device_table_, columns_, static_cast<int32_t>(columns_), block_rows_};
  }

 private:
  int block_rows_;
  int64_t columns_ = 1;
  std::vector<int32_t> table_;
  std::unique_ptr<PagedCache> cache_;
  int32_t* device_table_ = nullptr;
};

// Everything of one call, in device memory.
struct Scene {
  Scene(const Subject& subject, const AttendCase& which, const std::vector<AttendToken>& tokens,
        const AttendPlacement& placement)
      : subject(subject), which(which), tokens(tokens), memory(*subject.device) {
    RowSet own_window, near_window, own_entries, all_entries;
    int64_t ring_rows = 0;
    for (const AttendToken& token : tokens) {
      const auto add = [&](RowSet& rows, int64_t begin, int64_t end) {
        for (int64_t r = std::max<int64_t>(0, begin); r < end; ++r) rows.insert({token.seq, r});
      };
      add(own_window, token.position - which.window + 1, token.position + 1);
      // Rows just outside of a window hold numbers too: reading them by mistake shows.
      add(near_window, token.position - 2 * which.window, token.position + 1);
      for (int32_t j : selected_entries(which, token)) own_entries.insert({token.seq, j});
      add(all_entries, 0, visible_entries(which, token.position));
      if (placement.ring_table) ring_rows = 2 * which.window;  // such calls have one token
    }
    window = std::make_unique<PagedLists>(memory, which, placement.window_block_rows, near_window,
                                          placement.block_seed, placement, ring_rows);
    fill(*window, 1, placement.only_own_rows ? own_window : near_window);
    if (which.compressed != CompressedKind::kNone) {
      compressed =
          std::make_unique<PagedLists>(memory, which, placement.compressed_block_rows, all_entries,
                                       placement.block_seed + 17, placement, 0);
      fill(*compressed, 2, placement.only_own_rows ? own_entries : all_entries);
    }
    build_params();
  }

  void fill(PagedLists& lists, int kind, const RowSet& rows) {
    // The same rows are needed again and again: their bytes are computed once.
    static std::map<std::tuple<KvFormat, int, int, int, int64_t>, std::vector<uint8_t>> known;
    for (const auto& [seq, row] : rows) {
      const int64_t slot = lists.slot(seq, row);
      std::vector<uint8_t>& bytes = known[{which.format, which.head_dim, kind, seq, row}];
      if (bytes.empty()) {
        lists.cache().write(slot, token_values(kind, seq, row, which.head_dim, 1.0));
        bytes = lists.cache().bytes(slot);
      } else {
        lists.cache().put_bytes(slot, bytes);
      }
    }
    lists.cache().upload();
  }

  void build_params() {
    const auto count = static_cast<int64_t>(tokens.size());
    for (const AttendToken& token : tokens) {
      token_to_seq.push_back(token.seq);
      window_begin.push_back(std::max(0, token.position - which.window + 1));
      window_end.push_back(token.position + 1);
      const std::vector<int32_t> entries = selected_entries(which, token);
      begin.push_back(0);
      end.push_back(static_cast<int32_t>(entries.size()));
      for (int i = 0; i < which.topk && which.compressed == CompressedKind::kList; ++i) {
        const bool used = i < static_cast<int>(entries.size());
        slots.push_back(used ? static_cast<int32_t>(compressed->slot(token.seq, entries[i])) : -1);
      }
      const Vector values =
          token_values(3, token.seq, token.position, which.heads * which.head_dim, which.magnitude);
      q.insert(q.end(), values.begin(), values.end());
    }
    q = rounded(which.activation, q);
    Random random(5);
    for (int h = 0; h < which.heads; ++h) sink.push_back(static_cast<float>(2 * random.normal()));

    params.q = memory.tensor(which.activation, {count, which.heads, which.head_dim}, q);
    // Rows of out are wider than they need to be: what lies between belongs to somebody else.
    Tensor wide =
        memory.tensor(which.activation, {count, int64_t{which.heads} * which.head_dim + kGap});
    params.out = Tensor(wide.data, which.activation, {count, which.heads, which.head_dim});
    params.out.strides[0] = wide.strides[0];
    put_window();
    if (which.compressed == CompressedKind::kList) {
      params.compressed =
          ListedRows{compressed->cache().view(), memory.put(slots), which.topk, memory.put(end)};
    } else if (which.compressed == CompressedKind::kRange) {
      params.compressed = RangeRows{compressed->cache().view(), compressed->block_table(),
                                    memory.put(begin), memory.put(end)};
    }
    params.max_entries = which.topk;
    if (which.compressed != CompressedKind::kList) {
      params.max_entries = *std::max_element(end.begin(), end.end());
    }
    params.token_to_seq = memory.put(token_to_seq);
    params.sink = memory.put(sink);
    params.softmax_scale = static_cast<float>(1.0 / std::sqrt(which.head_dim));
    params.grid = which.grid;
    params.round_p_to_bf16 = which.round_p;
    const std::vector<float> poison(static_cast<size_t>(count * which.heads), std::nanf(""));
    params.lse = memory.put(poison);
    if (which.max_logits) params.max_logits = memory.put(poison);
  }

  // The window as window_begin and window_end have it, as a range or as a list of the same rows.
  void put_window() {
    if (!which.window_list) {
      params.window = RangeRows{window->cache().view(), window->block_table(),
                                memory.put(window_begin), memory.put(window_end)};
      return;
    }
    std::vector<int32_t> places, length;
    for (size_t t = 0; t < tokens.size(); ++t) {
      length.push_back(window_end[t] - window_begin[t]);
      for (int i = 0; i < which.window; ++i) {
        const int64_t row = window_begin[t] + i;
        places.push_back(row < window_end[t]
                             ? static_cast<int32_t>(window->slot(tokens[t].seq, row))
                             : 1 << 30);  // after the length: never read
      }
    }
    params.window =
        ListedRows{window->cache().view(), memory.put(places), which.window, memory.put(length)};
  }

  // Lists of both kinds without padding; unused places in between are gone, holes stay.
  void flatten_lists() {
    const auto flat = [&](const ListedRows& list) {
      std::vector<int32_t> indptr{0}, flat_slots;
      const auto count = static_cast<int64_t>(tokens.size());
      const std::vector<int32_t> length = memory.get(list.length, count);
      const std::vector<int32_t> padded = memory.get(list.slots, count * list.stride);
      for (int64_t t = 0; t < count; ++t) {
        const auto row = padded.begin() + t * list.stride;
        flat_slots.insert(flat_slots.end(), row, row + length[static_cast<size_t>(t)]);
        indptr.push_back(static_cast<int32_t>(flat_slots.size()));
      }
      flat_slots.push_back(1 << 30);  // never read; keeps the list from being empty
      return RaggedRows{list.cache, memory.put(flat_slots), memory.put(indptr)};
    };
    if (const auto* list = std::get_if<ListedRows>(&params.window)) params.window = flat(*list);
    if (const auto* list = std::get_if<ListedRows>(&params.compressed))
      params.compressed = flat(*list);
  }

  // Places of lists that hold no row: every third one, and all of some blocks.
  void put_holes() {
    for (size_t t = 0; t < tokens.size(); ++t) {
      for (int i = 0; i < which.topk; ++i) {
        if (i % 3 == 0 || i / 64 % 4 >= 2) slots[t * static_cast<size_t>(which.topk) + i] = -1;
      }
    }
    std::get<ListedRows>(params.compressed).slots = memory.put(slots);
  }

  // Rare bytes in the newest rows of tokens: a NaN code, scales beyond all numbers, small and
  // large.
  void put_rare_bytes() {
    for (size_t t = 0; t < tokens.size(); ++t) {
      const int64_t slot = window->slot(tokens[t].seq, tokens[t].position);
      std::vector<uint8_t> bytes = window->cache().bytes(slot);
      if (t % 4 == 0) bytes[100] = bytes[101] = 0x7f;
      if (which.format == KvFormat::kFp8DsMla) {
        const size_t scales = bytes.size() - 8;
        if (t % 4 == 1) bytes[scales + 3] = 0xff;
        if (t % 4 == 2) bytes[scales + 1] = 0, bytes[scales + 6] = 1;
        if (t % 4 == 3) bytes[scales + 2] = 134, bytes[scales + 5] = 139;
      }
      window->cache().put_bytes(slot, bytes);
    }
    window->cache().upload();
  }

  void set_sink(float value) {
    std::fill(sink.begin(), sink.end(), value);
    params.sink = memory.put(sink);
  }

  AttendResult run() {
    run_op(subject, subject.ops->attend, params);
    const int64_t row_bytes = int64_t{which.heads} * which.head_dim * size_of(which.activation);
    const int64_t stride_bytes = params.out.strides[0] * size_of(which.activation);
    AttendResult result;
    const auto count = static_cast<int64_t>(tokens.size());
    const std::vector<std::byte> wide =
        memory.get(static_cast<const std::byte*>(params.out.data), count * stride_bytes);
    for (int64_t t = 0; t < count; ++t) {
      for (int64_t i = 0; i < stride_bytes; ++i) {
        const std::byte value = wide[static_cast<size_t>(t * stride_bytes + i)];
        if (i < row_bytes) {
          result.out.push_back(value);
        } else if (value != std::byte{0xff}) {
          ADD_FAILURE() << which.name << ": byte " << i << " of token " << t
                        << " lies after its row of out and was written";
        }
      }
    }
    result.lse = memory.get(static_cast<const float*>(params.lse), count * which.heads);
    if (which.max_logits) {
      result.max_logits =
          memory.get(static_cast<const float*>(params.max_logits), count * which.heads);
    }
    EXPECT_TRUE(memory.guards_intact()) << which.name;
    return result;
  }

  RotatedInput rotation() {
    std::vector<int32_t> positions;
    for (const AttendToken& token : tokens) positions.push_back(token.position);
    return {
        {memory.put(oracle::rope_frequencies({}, 64)), 64}, memory.put(positions), which.head_dim};
  }

  // The same call with codes for outputs, and room for them.
  AttendParams with_codes(AttendParams of) {
    const auto count = static_cast<int64_t>(tokens.size());
    const int64_t width = int64_t{which.heads} * which.head_dim;
    Tensor wide(memory.raw(count * (width + kGap)), DType::kF8E4M3, {count, width + kGap});
    of.out = Tensor(wide.data, wide.dtype, {count, which.heads, which.head_dim});
    of.out.strides[0] = wide.strides[0];
    of.scale.stride = row_scale_stride(count);
    of.scale.data = reinterpret_cast<float*>(memory.raw(width / 128 * of.scale.stride * 4));
    return of;
  }
  // Codes and the bits of their scales, with all that nobody writes: 0xff.
  std::pair<std::vector<uint8_t>, std::vector<uint32_t>> codes_of(const Tensor& out,
                                                                  const RowScales& scale) const {
    const int64_t scales = int64_t{which.heads} * which.head_dim / 128 * scale.stride;
    return {memory.get(out.as<uint8_t>(), out.shape[0] * out.strides[0]),
            memory.get(reinterpret_cast<const uint32_t*>(scale.data), scales)};
  }

  // Queries that attend norms and rotates, against those of qnorm_rope_insert.
  // @return whether it takes them so.
  bool expect_raw_queries() {
    const auto count = static_cast<int64_t>(tokens.size());
    const int64_t elems = count * which.heads * which.head_dim;
    AttendParams raw = params;
    raw.rotation = rotation();
    raw.raw_queries = true;
    raw.query_eps = 1e-6f;
    if (subject.ops->attend_takes_raw_queries == nullptr ||
        !subject.ops->attend_takes_raw_queries(raw))
      return false;
    const std::vector<uint16_t> before = memory.get(raw.q.as<uint16_t>(), elems);
    run_op(subject, subject.ops->attend, raw);
    EXPECT_EQ(memory.get(raw.q.as<uint16_t>(), elems), before);
    const auto bits = [&](const float* of) {
      return memory.get(reinterpret_cast<const uint32_t*>(of), count * which.heads);
    };
    const int64_t wide = count * (int64_t{which.heads} * which.head_dim + kGap);
    const std::vector<uint16_t> out = memory.get(raw.out.as<uint16_t>(), wide);
    const std::vector<uint32_t> lse = bits(raw.lse);
    const AttendParams codes = with_codes(raw);
    const bool makes_codes = subject.ops->attend_makes_codes(codes);
    if (makes_codes) run_op(subject, subject.ops->attend, codes);

    const Tensor q(const_cast<void*>(params.q.data), which.activation,
                   {count, which.heads, which.head_dim});
    run_op(subject, subject.ops->qnorm_rope_insert,
           {.q = q,
            .kv = memory.tensor(which.activation, {count, which.head_dim}),
            .rope = raw.rotation.rope,
            .eps = raw.query_eps,
            .positions = raw.rotation.positions,
            .slot_mapping = memory.put(std::vector<int64_t>(tokens.size(), -1)),
            .window = window->cache().view()});
    run_op(subject, subject.ops->attend, params);
    EXPECT_EQ(out, memory.get(params.out.as<uint16_t>(), wide));
    EXPECT_EQ(lse, bits(params.lse));
    EXPECT_NE(before, memory.get(params.q.as<uint16_t>(), elems));
    if (makes_codes) {
      AttendParams normed = with_codes(params);
      normed.rotation = raw.rotation;
      run_op(subject, subject.ops->attend, normed);
      EXPECT_EQ(codes_of(codes.out, codes.scale), codes_of(normed.out, normed.scale));
    }
    EXPECT_TRUE(memory.guards_intact());
    return true;
  }

  // Codes that attend writes, against those that inverse_rope makes of its values.
  // @return whether it writes codes.
  bool expect_codes() {
    run();
    const auto count = static_cast<int64_t>(tokens.size());
    AttendParams codes = params;
    codes.rotation = rotation();
    codes = with_codes(codes);
    codes.lse = memory.put(std::vector<float>(static_cast<size_t>(count * which.heads)));
    if (subject.ops->attend_makes_codes == nullptr || !subject.ops->attend_makes_codes(codes))
      return false;
    run_op(subject, subject.ops->attend, codes);
    const AttendParams after = with_codes(params);
    run_op(subject, subject.ops->inverse_rope,
           {.o = params.out,
            .rope = codes.rotation.rope,
            .positions = codes.rotation.positions,
            .quantise = true,
            .out = after.out,
            .scale = after.scale});
    EXPECT_EQ(codes_of(codes.out, codes.scale), codes_of(after.out, after.scale));
    const auto bits = [&](const float* of) {
      return memory.get(reinterpret_cast<const uint32_t*>(of), count * which.heads);
    };
    EXPECT_EQ(bits(codes.lse), bits(params.lse));
    EXPECT_TRUE(memory.guards_intact());
    return true;
  }

  // Rows that token t reads, in no particular order, as the cache's bytes stand for them.
  std::vector<Vector> visible_rows(size_t t) const {
    std::vector<Vector> rows;
    const int seq = tokens[t].seq;
    for (int64_t r = window_begin[t]; r < window_end[t]; ++r) {
      rows.push_back(window->cache().read(window->slot(seq, r)));
    }
    if (which.compressed == CompressedKind::kList) {
      for (int i = 0; i < end[t]; ++i) {
        const int32_t slot = slots[t * which.topk + i];
        if (slot >= 0) rows.push_back(compressed->cache().read(slot));
      }
    } else if (which.compressed == CompressedKind::kRange) {
      for (int64_t j = begin[t]; j < end[t]; ++j) {
        rows.push_back(compressed->cache().read(compressed->slot(seq, j)));
      }
    }
    return rows;
  }

  void expect_oracle(const AttendResult& result);

  static constexpr int64_t kGap = 32;
  Subject subject;
  AttendCase which;
  std::vector<AttendToken> tokens;
  DeviceMemory memory;
  std::unique_ptr<PagedLists> window, compressed;
  std::vector<int32_t> token_to_seq, window_begin, window_end, begin, end, slots;
  std::vector<float> sink;
  Vector q;
  AttendParams params{};
};

double out_element(const AttendResult& result, DType dtype, int64_t index) {
  if (dtype == DType::kF32) {
    float value;
    std::memcpy(&value, result.out.data() + 4 * index, 4);
    return value;
  }
  uint32_t bits = 0;
  std::memcpy(reinterpret_cast<char*>(&bits) + 2, result.out.data() + 2 * index, 2);
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

// Bounds of one head's result.
//
// z is a float dot product of head_dim terms: dz <= gamma(head_dim + 4) * Z, with Z = scale * max_r
// sum_d |q_d k_rd| >= |z|, the 4 for the scale, its own rounding and the change of base. A weight
// p = exp(z - m) is then off by dz, by the roundings of the differences of exponents (their sizes
// telescope over the blocks: at most 2 Z in the base of 2, so 3 Z u), by the exponential itself
// (8 u: seven steps of its polynomial and an approximation error below u), and by one exponential
// and one product for every block and chain that rescales it:
//     ep = expm1(dz + 3 Z u) + gamma(8 + 10 * (blocks + chains))
// The numerator adds a rounding to bf16 (2^-8 of each p) where asked and sums rows terms; the
// denominator sums rows terms of unrounded p. Their quotient, and the factor 1 / denominator, are
// two roundings more:
//     |out error| <= (2 ep + 2^-8 [round_p] + 2 gamma(rows + 4)) * sum_r p_r |k_r| / den + half ulp
struct HeadBounds {
  double weight;  // relative, of sums of p
  double out;     // factor of sum p |k| / den
  double z;       // of every z, and so of the largest
};
HeadBounds head_bounds(const AttendCase& which, const oracle::Attended& exact, size_t rows) {
  const double z = exact.max_z_abs;
  const double blocks = 4.0 + static_cast<double>(rows) / which.grid.rows_per_block;
  const double chains = 1 + blocks / which.grid.blocks_per_chain;
  const double dz = gamma(which.head_dim + 4) * z;
  const double ep = std::expm1(dz + 3 * z * kRoundoffF32) + gamma(8 + 10 * (blocks + chains));
  const double sums = gamma(static_cast<double>(rows) + 4);
  return {ep + sums, 2 * ep + (which.round_p ? kRoundoffBf16 : 0) + 2 * sums, dz};
}

void Scene::expect_oracle(const AttendResult& result) {
  Comparison out(which.name + " out [token, head, dim]"), lse(which.name + " lse [token, head]"),
      max_logits(which.name + " max_logits [token, head]");
  const int dim = which.head_dim;
  for (size_t t = 0; t < tokens.size(); ++t) {
    const std::vector<Vector> rows = visible_rows(t);
    const std::vector<std::span<const double>> views(rows.begin(), rows.end());
    for (int h = 0; h < which.heads; ++h) {
      const int64_t index = static_cast<int64_t>(t) * which.heads + h;
      const oracle::Attended exact =
          oracle::attend(std::span(q).subspan(static_cast<size_t>(index * dim), dim), views,
                         sink[static_cast<size_t>(h)], params.softmax_scale);
      const HeadBounds bounds = head_bounds(which, exact, rows.size());
      const auto token = static_cast<int64_t>(t);
      for (int d = 0; d < dim; ++d) {
        const double slack = bounds.out * exact.magnitude[d];
        out.add({token, h, d}, out_element(result, which.activation, index * dim + d), exact.out[d],
                slack + rounding_bound(which.activation, exact.out[d], slack));
      }
      // log(sum) is off by the relative error of the sum, the maximum by its own dz (in weight).
      const double slack = std::isinf(exact.lse) ? 0 : bounds.weight;
      lse.add(
          {token, h}, result.lse[static_cast<size_t>(index)], exact.lse,
          std::isinf(exact.lse) ? 0 : slack + 2 * rounding_bound(DType::kF32, exact.lse, slack));
      if (!which.max_logits) continue;
      // dz includes the change of base; the way back is one rounding.
      max_logits.add({token, h}, result.max_logits[static_cast<size_t>(index)], exact.max_z,
                     std::isinf(exact.max_z)
                         ? 0
                         : bounds.z + rounding_bound(DType::kF32, exact.max_z, bounds.z));
    }
  }
  EXPECT_TRUE(out.result());
  EXPECT_TRUE(lse.result());
  if (which.max_logits) {
    EXPECT_TRUE(max_logits.result());
  }
}

::testing::AssertionResult same_bits(const AttendCase& which, const AttendResult& a,
                                     int64_t a_token, const AttendResult& b, int64_t b_token) {
  const int64_t bytes = int64_t{which.heads} * which.head_dim * size_of(which.activation);
  const bool out =
      std::equal(a.out.begin() + a_token * bytes, a.out.begin() + (a_token + 1) * bytes,
                 b.out.begin() + b_token * bytes);
  const bool lse =
      std::memcmp(a.lse.data() + a_token * which.heads, b.lse.data() + b_token * which.heads,
                  static_cast<size_t>(which.heads) * sizeof(float)) == 0;
  const bool max_logits =
      !which.max_logits || std::memcmp(a.max_logits.data() + a_token * which.heads,
                                       b.max_logits.data() + b_token * which.heads,
                                       static_cast<size_t>(which.heads) * sizeof(float)) == 0;
  if (out && lse && max_logits) return ::testing::AssertionSuccess();
  auto failure = ::testing::AssertionFailure()
                 << which.name << ": token " << a_token << " has other"
                 << (!out  ? " out"
                     : lse ? " max_logits"
                           : " lse")
                 << " bits";
  for (int64_t i = 0; i < int64_t{which.heads} * which.head_dim; ++i) {
    const int64_t dim = int64_t{which.heads} * which.head_dim;
    const double x = out_element(a, which.activation, a_token * dim + i);
    const double y = out_element(b, which.activation, b_token * dim + i);
    if (!(x == y)) {
      return failure << ", first at head " << i / which.head_dim << " dim " << i % which.head_dim
                     << ": " << x << " and " << y;
    }
  }
  return failure;
}

}  // namespace

AttendResult run_attend(const Subject& subject, const AttendCase& which,
                        const std::vector<AttendToken>& tokens, const AttendPlacement& placement) {
  return Scene(subject, which, tokens, placement).run();
}

void check_attend_oracle(const Subject& subject, const AttendCase& which,
                         const std::vector<AttendToken>& tokens, const AttendPlacement& placement) {
  Scene scene(subject, which, tokens, placement);
  scene.expect_oracle(scene.run());
}

void check_attend_invariance(const Subject& subject, const AttendCase& which,
                             const std::vector<AttendToken>& tokens) {
  const AttendResult batch = run_attend(subject, which, tokens, {});
  const auto expect_same = [&](const char* what, const AttendPlacement& placement) {
    const AttendResult other = run_attend(subject, which, tokens, placement);
    for (size_t t = 0; t < tokens.size(); ++t) {
      EXPECT_TRUE(same_bits(which, other, static_cast<int64_t>(t), batch, static_cast<int64_t>(t)))
          << what;
    }
  };
  expect_same("run twice", {});
  expect_same("renamed blocks", {.block_seed = 99, .spare_blocks = 11});
  expect_same("pages of 16 and 256 rows", {.window_block_rows = 16, .compressed_block_rows = 256});
  expect_same("pages of 256 and 2 rows", {.window_block_rows = 256, .compressed_block_rows = 2});
  expect_same("pages of 61 and 69 rows, further apart",
              {.window_block_rows = 61, .compressed_block_rows = 69, .padding_bytes = 448});
  expect_same("pages of 2 and 61 rows", {.window_block_rows = 2, .compressed_block_rows = 61});
  expect_same("unread rows are NaN", {.only_own_rows = true});

  std::vector<AttendToken> reversed(tokens.rbegin(), tokens.rend());
  const AttendResult other = run_attend(subject, which, reversed, {});
  for (size_t t = 0; t < tokens.size(); ++t) {
    const auto at = static_cast<int64_t>(tokens.size() - 1 - t);
    EXPECT_TRUE(same_bits(which, other, at, batch, static_cast<int64_t>(t))) << "reversed order";
  }
  for (size_t t = 0; t < tokens.size(); ++t) {
    const AttendResult alone = run_attend(subject, which, {tokens[t]}, {.only_own_rows = true});
    EXPECT_TRUE(same_bits(which, alone, 0, batch, static_cast<int64_t>(t)))
        << "alone, position " << tokens[t].position;
    const AttendResult ring =
        run_attend(subject, which, {tokens[t]}, {.block_seed = 7, .ring_table = true});
    EXPECT_TRUE(same_bits(which, ring, 0, batch, static_cast<int64_t>(t)))
        << "window block table that wraps, position " << tokens[t].position;
  }
}

void check_attend_crowd(const Subject& subject, const AttendCase& which, int num_tokens) {
  constexpr int kSeqs = 3, kStep = 41, kPositions = 13;
  {  // Many tokens of one block each, one after the other, against calls of a few.
    constexpr int kFew = 50;
    std::vector<AttendToken> tokens;
    for (int i = 0; i < num_tokens; ++i) {
      tokens.push_back({i % kSeqs, i % 7 == 6 ? kPositions * i : i % 3});
    }
    const AttendResult batch = run_attend(subject, which, tokens, {});
    for (int first = 0; first < num_tokens; first += kFew) {
      const int count = std::min(kFew, num_tokens - first);
      const auto begin = tokens.begin() + first;
      const AttendResult few = run_attend(subject, which, {begin, begin + count}, {});
      for (int i = 0; i < count; ++i) {
        ASSERT_TRUE(same_bits(which, few, i, batch, first + i))
            << "short token " << first + i << " among " << count << " and among many";
      }
    }
  }
  std::vector<AttendToken> tokens;
  for (int i = 0; i < num_tokens; ++i) tokens.push_back({i % kSeqs, kPositions * i});
  const AttendResult batch = run_attend(subject, which, tokens, {});
  for (int i = 0; i < num_tokens; i += kStep) {
    const AttendResult alone = run_attend(subject, which, {tokens[i]}, {.only_own_rows = true});
    EXPECT_TRUE(same_bits(which, alone, 0, batch, i)) << "alone and among " << num_tokens;
  }
  // Kernels may share a token's work in other ways when there are few.
  for (int count : {6, 13, 24, 50}) {
    const int first = num_tokens - count;
    const AttendResult few = run_attend(subject, which, {tokens.begin() + first, tokens.end()}, {});
    for (int i = 0; i < count; ++i) {
      EXPECT_TRUE(same_bits(which, few, i, batch, first + i))
          << "among " << count << " and among " << num_tokens;
    }
  }
}

void check_attend_runs(const Subject& subject, const AttendCase& which, int num_tokens) {
  constexpr int kSeqs = 3, kFew = 50, kLongestRun = 8;
  std::vector<int> firsts{0, 30, 60, 120, 126, 190, 300};
  if (which.compressed != CompressedKind::kNone) {
    for (int entries : {63, 64, 130}) firsts.push_back(which.ratio * entries - 2);
  }
  std::vector<AttendToken> tokens;
  for (int run = 0; static_cast<int>(tokens.size()) < num_tokens; ++run) {
    const int first = firsts[static_cast<size_t>(run) % firsts.size()];
    if (run % 5 == 4) tokens.push_back({run % kSeqs, first});  // the same token twice
    for (int i = 0; i < 1 + run % kLongestRun; ++i) tokens.push_back({run % kSeqs, first + i});
  }
  const auto count = static_cast<int64_t>(tokens.size());
  const AttendResult batch = run_attend(subject, which, tokens, {.only_own_rows = true});
  {  // Backwards no token comes behind the one before it.
    const std::vector<AttendToken> reversed(tokens.rbegin(), tokens.rend());
    const AttendResult other = run_attend(subject, which, reversed, {});
    for (int64_t t = 0; t < count; ++t) {
      ASSERT_TRUE(same_bits(which, other, count - 1 - t, batch, t))
          << "token " << t << ", position " << tokens[static_cast<size_t>(t)].position
          << ", in runs and backwards";
    }
  }
  {  // Another one first: other tokens are side by side.
    std::vector<AttendToken> moved{{1, 200}};
    moved.insert(moved.end(), tokens.begin(), tokens.end());
    const AttendResult other = run_attend(subject, which, moved, {.block_seed = 5});
    for (int64_t t = 0; t < count; ++t) {
      ASSERT_TRUE(same_bits(which, other, t + 1, batch, t))
          << "token " << t << ", position " << tokens[static_cast<size_t>(t)].position
          << ", behind another one";
    }
  }
  for (int64_t first = 0; first < count; first += kFew) {
    const auto begin = tokens.begin() + first;
    const auto end = first + kFew < count ? begin + kFew : tokens.end();
    const AttendResult few = run_attend(subject, which, {begin, end}, {});
    for (int64_t t = 0; t < end - begin; ++t) {
      ASSERT_TRUE(same_bits(which, few, t, batch, first + t))
          << "token " << first + t << " among " << end - begin << " and among " << count;
    }
  }
}

void check_attend_same_bits(const std::vector<Subject>& subjects, const AttendCase& which,
                            const std::vector<AttendToken>& tokens) {
  enum Change { kNone, kHoles, kRareBytes };
  for (Change change : {kNone, kHoles, kRareBytes}) {
    if (change == kHoles && which.compressed != CompressedKind::kList) continue;
    std::vector<AttendResult> results;
    for (const Subject& subject : subjects) {
      Scene scene(subject, which, tokens, {.window_block_rows = change == kHoles ? 61 : 64});
      if (change == kHoles) scene.put_holes();
      if (change == kRareBytes) scene.put_rare_bytes();
      results.push_back(scene.run());
    }
    for (size_t i = 1; i < subjects.size(); ++i) {
      for (int64_t t = 0; t < static_cast<int64_t>(tokens.size()); ++t) {
        ASSERT_TRUE(same_bits(which, results[i], t, results[0], t))
            << which.heads << " heads, candidate " << i << " against the first one, position "
            << tokens[static_cast<size_t>(t)].position << ", change " << change;
      }
    }
  }
}

bool check_attend_codes(const Subject& subject, const AttendCase& which,
                        const std::vector<AttendToken>& tokens) {
  return Scene(subject, which, tokens, {}).expect_codes();
}

bool check_attend_raw_queries(const Subject& subject, const AttendCase& which,
                              const std::vector<AttendToken>& tokens) {
  return Scene(subject, which, tokens, {}).expect_raw_queries();
}

void check_attend_repeats(const Subject& subject, const AttendCase& which, int num_tokens,
                          int repeats) {
  std::vector<AttendToken> tokens;
  for (int i = 0; i < num_tokens; ++i) tokens.push_back({i % 3, 130 + i % 90});
  Scene scene(subject, which, tokens, {});
  const AttendResult first = scene.run();
  for (int repeat = 0; repeat < repeats; ++repeat) {
    const AttendResult again = scene.run();
    if (again.out == first.out && again.lse == first.lse) continue;
    for (int64_t t = 0; t < num_tokens; ++t) {
      EXPECT_TRUE(same_bits(which, again, t, first, t)) << "repeat " << repeat;
    }
    return;
  }
}

void check_attend_long_crowd(const Subject& subject, const AttendCase& which, int num_tokens) {
  constexpr int kSeqs = 3, kStep = 7, kBlock = 64;
  // Lists end before, at and behind the end of a block, from none to the longest.
  std::vector<AttendToken> tokens;
  for (int i = 0; i < num_tokens; ++i) {
    const int blocks = which.long_entries / kBlock * i / (num_tokens - 1);
    const int entries = std::max(0, blocks * kBlock + i % 3 - 1);
    tokens.push_back({i % kSeqs, which.ratio * entries + which.ratio / 2});
  }
  const AttendResult batch = run_attend(subject, which, tokens, {});
  for (int i = 0; i < num_tokens; ++i) {
    const AttendResult alone = run_attend(subject, which, {tokens[i]}, {.only_own_rows = true});
    EXPECT_TRUE(same_bits(which, alone, 0, batch, i)) << "alone and among " << num_tokens;
  }
  for (int first = 0; first < num_tokens; first += kStep) {
    const int count = std::min(kStep, num_tokens - first);
    const auto begin = tokens.begin() + first;
    const AttendResult few = run_attend(subject, which, {begin, begin + count}, {});
    for (int i = 0; i < count; ++i) {
      EXPECT_TRUE(same_bits(which, few, i, batch, first + i))
          << "among " << count << " and among " << num_tokens;
    }
  }
}

void check_attend_corner_cases(const Subject& subject, const AttendCase& which) {
  const int last = which.compressed == CompressedKind::kNone ? 200 : 3 * which.ratio + 200;
  const std::vector<AttendToken> tokens{{0, last}, {1, 3}, {0, 64}};

  {
    Scene scene(subject, which, tokens, {});
    const AttendResult with_sink = scene.run();
    scene.set_sink(-kInfinity);
    const AttendResult without = scene.run();
    scene.expect_oracle(without);
    EXPECT_EQ(0, std::memcmp(with_sink.lse.data(), without.lse.data(),
                             with_sink.lse.size() * sizeof(float)))
        << which.name << ": lse must not depend on the sink";
    scene.set_sink(kInfinity);
    const AttendResult all_sink = scene.run();
    for (int64_t i = 0; i < scene.params.out.num_elements(); ++i) {
      ASSERT_EQ(out_element(all_sink, which.activation, i), 0.0) << which.name << ": sink +inf";
    }
  }
  {  // A token that sees nothing, beside two that see something.
    Scene scene(subject, which, tokens, {});
    const AttendResult before = scene.run();
    scene.window_begin[1] = scene.window_end[1] = 2;
    scene.begin[1] = scene.end[1] = 0;
    scene.put_window();
    if (auto* list = std::get_if<ListedRows>(&scene.params.compressed)) {
      list->length = scene.memory.put(scene.end);
    } else if (auto* range = std::get_if<RangeRows>(&scene.params.compressed)) {
      range->end = scene.memory.put(scene.end);
    }
    const AttendResult after = scene.run();
    scene.expect_oracle(after);
    EXPECT_TRUE(same_bits(which, after, 0, before, 0)) << "neighbour of an empty token";
    EXPECT_TRUE(same_bits(which, after, 2, before, 2)) << "neighbour of an empty token";
  }
  // Pages at addresses that are multiples of 8 only.
  check_attend_oracle(subject, which, tokens, {.window_block_rows = 61, .padding_bytes = 8});
  {  // No window rows, compressed ones only.
    Scene scene(subject, which, tokens, {});
    std::fill(scene.window_begin.begin(), scene.window_begin.end(), 1);
    std::fill(scene.window_end.begin(), scene.window_end.end(), 1);
    scene.put_window();
    scene.expect_oracle(scene.run());
  }
  if (which.compressed != CompressedKind::kList) return;
  {  // Holes in a list; places after `length` hold slots that must not be read.
    Scene scene(subject, which, tokens, {});
    for (size_t i = 0; i < scene.slots.size(); i += 3) scene.slots[i] = -1;
    std::get<ListedRows>(scene.params.compressed).slots = scene.memory.put(scene.slots);
    const AttendResult holes = scene.run();
    scene.expect_oracle(holes);
    for (size_t t = 0; t < tokens.size(); ++t) {
      for (int i = scene.end[t]; i < which.topk; ++i) {
        scene.slots[t * static_cast<size_t>(which.topk) + static_cast<size_t>(i)] = 1 << 30;
      }
    }
    std::get<ListedRows>(scene.params.compressed).slots = scene.memory.put(scene.slots);
    const AttendResult garbage = scene.run();
    for (int64_t t = 0; t < static_cast<int64_t>(tokens.size()); ++t) {
      EXPECT_TRUE(same_bits(which, garbage, t, holes, t)) << "slots after the length";
    }
  }
  // Flat lists, the form of AMD's layer.
  if (subject.device->id().platform != Platform::kCuda) {
    AttendCase listed = which;
    listed.window_list = true;
    Scene scene(subject, listed, tokens, {});
    for (size_t i = 0; i < scene.slots.size(); i += 3) scene.slots[i] = -1;
    std::get<ListedRows>(scene.params.compressed).slots = scene.memory.put(scene.slots);
    const AttendResult padded = scene.run();
    scene.flatten_lists();
    const AttendResult flat = scene.run();
    for (int64_t t = 0; t < static_cast<int64_t>(tokens.size()); ++t) {
      EXPECT_TRUE(same_bits(which, flat, t, padded, t)) << "flat lists against padded ones";
    }
  }
  {  // Where everything is selected, the list and the range of entries are the same rows.
    AttendCase all = which;
    all.topk = 1024;
    const AttendResult list = run_attend(subject, all, tokens, {});
    all.compressed = CompressedKind::kRange;
    const AttendResult range = run_attend(subject, all, tokens, {});
    for (int64_t t = 0; t < static_cast<int64_t>(tokens.size()); ++t) {
      EXPECT_TRUE(same_bits(which, range, t, list, t)) << "list of all entries against the range";
    }
  }
}

}  // namespace dsv4::testing
