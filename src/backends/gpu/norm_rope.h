// Norms and rotations of rows and heads (attention.md steps 2-5 and 9).
//
// rms_norm            out = weight * (x / sqrt(mean x^2 + eps))
// qnorm_rope_insert   q /= sqrt(mean q^2 + eps) per head; RoPE on the tails of q and kv; kv
//                     rounded, written back and stored in the window cache; its norm before, where
//                     it is asked for
// inverse_rope        RoPE backwards per head, then one rounding, or E4M3 per 128 as values
//
// Tiling    one lane group a row (long rows of rms_norm, and that of kv: a block); rows stay in
//           registers between their sum and their use, so memory is read once. Lane l holds
//           neighbours 64 i + 2 l, 64 i + 2 l + 1: a group reads and writes whole 128-byte lines, a
//           rotary pair and its angle belong to one lane, and 64 values of a scale are one vector
//           of the group
// Budget    bytes in + bytes out; a token of 64 heads x 512 bf16: 2 x 64 KiB (+ 1 KiB kv, 584 B)
// Launch    rms_norm: 4 rows a block, or one; two norms may share a launch. Heads: blocks of 8
//           groups for one token, which share its angles (RopeTable), `units_per_block` heads each;
//           where there is room for it in the same turn, one more block for kv
// Contract  rotary dims and rows even; any alignment (a row that is not aligned to pairs goes by
//           elements); bits depend on the row alone
// Numerics  f32, products and sums rounded separately, in the CPU's order; one rounding to the
//           output type
#pragma once
#include "backends/gpu/cache_row.h"

namespace dsv4::gpu {

// ---- rms_norm

struct RmsNormArgs {
  const void* x;  // [rows, count]
  int64_t x_stride;
  const void* weight;  // [count]
  bool weight_is_bf16;
  void* out;
  int64_t out_stride;
  int32_t rows, count;
  float eps;
  float* scale;  // of codes: [count / 128][scale_stride]
  int64_t scale_stride;
};

/// A row as E4M3 codes of its values in bf16, of whole groups of 128 (numerics.md 4);
/// `largest_of(i)`: bits of the largest magnitude of the group that vector i belongs to. With a NaN
/// scale the codes do not matter.
template <int kGroups = 1, int kVectors, typename LargestOf>
DSV4_DEVICE void store_codes_of_norm(const RmsNormArgs& args, int64_t row_idx,
                                     const Row<kVectors>& row, LargestOf largest_of) {
  uint8_t* codes = static_cast<uint8_t*>(args.out) + row_idx * args.out_stride;
  DSV4_UNROLL
  for (int i = 0; i < kVectors; ++i) {
    const int elem = row_elem<kGroups>(i);
    const Scale scale = scale_for(float_of(largest_of(i)), kFp8AmaxFloor, kE4m3Max);
    if (elem >= args.count) continue;
    store_codes(codes + elem, pack_e4m3(row.even[i] * scale.inverse, row.odd[i] * scale.inverse));
    if (elem % 128 == 0) args.scale[elem / 128 * args.scale_stride + row_idx] = scale.value;
  }
}

/// Rows of at most 64 kVectors elements: a group each. Out: values, or with uint8_t their codes.
template <typename X, typename Out, int kVectors, Access kAccess, int kBlockThreads = 128>
struct RmsNormRows {
  using Params = RmsNormArgs;
  static constexpr int kThreads = kBlockThreads;
  static constexpr int kBlockRows = kThreads / kGroupLanes;

  DSV4_DEVICE static void run(const Params& args) { run(args, block_idx()); }
  DSV4_DEVICE static void run(const Params& args, int64_t block) {
    const int64_t row_idx = block * kBlockRows + group_idx();
    if (row_idx >= args.rows) return;
    const int count = args.count;
    auto row =
        load_row<kVectors, kAccess>(static_cast<const X*>(args.x) + row_idx * args.x_stride, count);
    const auto weight = load_weights<kVectors, kAccess>(args.weight, args.weight_is_bf16, count);
    scale_row(row, inverse_rms(sum_squares(row), count, args.eps), weight);
    if constexpr (sizeof(Out) == 1) {
      round_row_to_bf16(row);
      store_codes_of_norm(args, row_idx, row, [&](int i) {
        const uint32_t first = max_magnitude(row, i & ~1), second = max_magnitude(row, i | 1);
        return group_max(first < second ? second : first);
      });
    } else {
      store_row<kAccess>(static_cast<Out*>(args.out) + row_idx * args.out_stride, count, row);
    }
  }
};

/// Rows of at most 512 kVectors elements: a block each. Squares go through shared memory to the one
/// group that adds them up in order; the elements stay with their lanes.
template <typename X, typename Out, int kVectors, Access kAccess>
struct RmsNormBlock {
  using Params = RmsNormArgs;
  using Elem = X;
  static constexpr int kThreads = 256;
  static constexpr int kMinBlocks = kVectors <= 8 ? 5 : 1;
  static constexpr int kBlockRows = 1;
  static constexpr int kGroups = kThreads / kGroupLanes;
  static constexpr int kMaxElems = kGroups * Row<kVectors>::kMaxElems;
  // 16 or 32 KiB: with one number more a block less would fit into the 64 KiB of gfx942. The factor
  // takes the place of the first square.
  struct Shared {
    float square[kMaxElems];
  };

  DSV4_DEVICE static void run(const Params& args) { run(args, block_idx()); }
  DSV4_DEVICE static void run(const Params& args, int64_t row_idx) {
    DSV4_SHARED(Shared, shared);
    const int count = args.count;
    auto row = load_row<kVectors, kAccess, kGroups>(
        static_cast<const X*>(args.x) + row_idx * args.x_stride, count);
    const auto weight =
        load_weights<kVectors, kAccess, kGroups>(args.weight, args.weight_is_bf16, count);
    DSV4_UNROLL
    for (int i = 0; i < kVectors; ++i) {
      store_pair(shared.square + row_elem<kGroups>(i),
                 {row.even[i] * row.even[i], row.odd[i] * row.odd[i]});
    }
    block_sync();
    if (group_idx() == 0) {
      const int vectors = (count + kVectorElems - 1) / kVectorElems;
      SquareSums sums;
      DSV4_UNROLL_BY(8)
      for (int i = 0; i < vectors; ++i) {
        const Pair square = load_pair(shared.square + row_elem(i));
        sums.even = sums.even + square.even;
        sums.odd = sums.odd + square.odd;
      }
      const float factor = inverse_rms(sums.total(), count, args.eps);
      if (group_lane() == 0) shared.square[0] = factor;
    }
    block_sync();
    scale_row(row, shared.square[0], weight);
    if constexpr (sizeof(Out) == 1) {
      // Neighbouring vectors lie with different groups, which tell each other behind the factor.
      round_row_to_bf16(row);
      float* largest = shared.square + 1;
      DSV4_UNROLL
      for (int i = 0; i < kVectors; ++i) {
        const uint32_t own = group_max(max_magnitude(row, i));
        if (group_lane() == 0) largest[row_elem<kGroups>(i) / kVectorElems] = float_of(own);
      }
      block_sync();
      store_codes_of_norm<kGroups>(args, row_idx, row, [&](int i) {
        const int vector = row_elem<kGroups>(i) / kVectorElems;
        const uint32_t first = bits_of(largest[vector & ~1]), second = bits_of(largest[vector | 1]);
        return first < second ? second : first;
      });
    } else {
      store_row<kAccess, kGroups>(static_cast<Out*>(args.out) + row_idx * args.out_stride, count,
                                  row);
    }
  }
};

/// Two norms that need nothing of each other: the first blocks are of the first one.
template <typename First, typename Second>
struct RmsNormPair {
  struct Params {
    RmsNormArgs first, second;
    int32_t first_blocks;
  };
  static constexpr int kThreads = First::kThreads;
  static constexpr int kMinBlocks = 4;
  static_assert(Second::kThreads == kThreads);

  DSV4_DEVICE static void run(const Params& args) {
    if (block_idx() < args.first_blocks) {
      First::run(args.first, block_idx());
    } else {
      Second::run(args.second, block_idx() - args.first_blocks);
    }
  }
};

/// Rows of any length: a group each, read twice.
template <typename X, typename Out>
struct RmsNormLong {
  static constexpr Access kAccess = Access::kElems;
  using Params = RmsNormArgs;
  static constexpr int kThreads = 128;
  static constexpr int kBlockRows = kThreads / kGroupLanes;
  static constexpr int kVectors = 8;

  DSV4_DEVICE static void run(const Params& args) {
    const int64_t row_idx = block_idx() * kBlockRows + group_idx();
    if (row_idx >= args.rows) return;
    const X* x = static_cast<const X*>(args.x) + row_idx * args.x_stride;
    Out* out = static_cast<Out*>(args.out) + row_idx * args.out_stride;
    const int64_t weight_bytes = args.weight_is_bf16 ? sizeof(Bf16) : sizeof(float);
    constexpr int kStep = Row<kVectors>::kMaxElems;
    SquareSums sums;
    for (int begin = 0; begin < args.count; begin += kStep) {
      const auto row = load_row<kVectors, kAccess>(x + begin, args.count - begin);
      DSV4_UNROLL
      for (int i = 0; i < kVectors; ++i) sums.add({row.even[i], row.odd[i]});
    }
    const float factor = inverse_rms(sums.total(), args.count, args.eps);
    for (int begin = 0; begin < args.count; begin += kStep) {
      auto row = load_row<kVectors, kAccess>(x + begin, args.count - begin);
      const void* weight = static_cast<const uint8_t*>(args.weight) + begin * weight_bytes;
      scale_row(row, factor,
                load_weights<kVectors, kAccess>(weight, args.weight_is_bf16, args.count - begin));
      store_row<kAccess>(out + begin, args.count - begin, row);
    }
  }
};

// ---- heads of a token

/// How a grid is cut: a block works on units [part * units_per_block, ...) of one token.
struct TokenUnits {
  int32_t tokens, units, units_per_block, blocks_per_token;
};
struct BlockUnits {
  int64_t token;
  int begin, end;
};
DSV4_DEVICE BlockUnits units_of_block(const TokenUnits& cut) {
  const auto block = static_cast<uint32_t>(block_idx());
  const uint32_t token = block / static_cast<uint32_t>(cut.blocks_per_token);
  const auto part = static_cast<int>(block - token * static_cast<uint32_t>(cut.blocks_per_token));
  const int begin = part * cut.units_per_block, end = begin + cut.units_per_block;
  return {token, begin, end < cut.units ? end : cut.units};
}

struct QnormRopeInsertArgs {
  TokenUnits cut;     // units are heads
  bool kv_is_a_part;  // the last one, without heads; else kv goes with the first heads
  void* q;            // [tokens, heads, head_dim]
  int64_t q_token_stride, q_head_stride;
  void* kv;  // [tokens, head_dim]
  int64_t kv_stride;
  const void* kv_norm;  // [head_dim], where kNormsKv
  bool kv_norm_is_bf16;
  Rope rope;
  const int32_t* positions;
  const int64_t* slots;
  CachePages cache;
  int32_t head_dim;
  float eps;
};

template <typename Act, typename CacheRows, int kVectors, Access kAccess, bool kNormsKv = false>
struct QnormRopeInsert {
  using Params = QnormRopeInsertArgs;
  static constexpr int kThreads = 256;
  static constexpr int kMinBlocks = kVectors == 8 ? 4 : 1;

  static constexpr int kGroups = kThreads / kGroupLanes;
  static_assert(kVectors % kGroups == 0);
  static constexpr int kOwn = kVectors / kGroups;  // vectors of kv

  DSV4_DEVICE static Act* head(const Params& args, int64_t token, int h) {
    return static_cast<Act*>(args.q) + token * args.q_token_stride + h * args.q_head_stride;
  }

  DSV4_DEVICE static void run(const Params& args) {
    DSV4_SHARED(RopeTable, table);
    const BlockUnits mine = units_of_block(args.cut);
    const int count = args.head_dim, pairs = args.rope.pairs;
    const auto angle_of = [&](int p) { return table.angle[p]; };
    const bool has_kv = args.kv_is_a_part ? mine.begin >= mine.end : mine.begin == 0;
    int h = mine.begin + group_idx();
    // The first row is on its way while the angles are computed.
    Row<kVectors> row{};
    if (h < mine.end) row = load_row<kVectors, kAccess>(head(args, mine.token, h), count);
    // The row of kv is spread over the groups: what is done to it takes longer.
    Act* const kv = static_cast<Act*>(args.kv) + mine.token * args.kv_stride;
    Row<kOwn> part{};
    int64_t slot = -1;
    if (has_kv) {
      part = load_row<kOwn, kAccess, kGroups>(kv, count);
      slot = args.slots[mine.token];
      if constexpr (kNormsKv) {
        // Every group has the whole row for the sum, and norms its own vectors.
        const float factor =
            inverse_rms(sum_squares(load_row<kVectors, kAccess>(kv, count)), count, args.eps);
        scale_row(part, factor,
                  load_weights<kOwn, kAccess, kGroups>(args.kv_norm, args.kv_norm_is_bf16, count));
        if constexpr (sizeof(Act) == sizeof(Bf16)) round_row_to_bf16(part);
      }
    }
    // While one group computes the angles the others norm their first row.
    table.fill<kThreads>(args.rope, args.positions[mine.token], 1.0f);
    const auto norm = [&] { scale_row(row, inverse_rms(sum_squares(row), count, args.eps)); };
    norm();
    block_sync();
    if (has_kv) {
      rotate_tail<kGroups>(part, count, pairs, angle_of);
      // Vectors before the tail keep their bits, where they have them.
      const int kept = kNormsKv ? 0 : (count - 2 * pairs) / kVectorElems - group_idx();
      store_row<kAccess, kGroups>(kv, count, part, kept > 0 ? (kept + kGroups - 1) / kGroups : 0);
      if (slot >= 0) {
        if constexpr (sizeof(Act) == sizeof(Bf16)) round_row_to_bf16(part);
        CacheRows::template store<kGroups>(args.cache, slot, part);
      }
    }
    while (h < mine.end) {
      rotate_tail(row, count, pairs, angle_of);
      store_row<kAccess>(head(args, mine.token, h), count, row);
      h += kGroups;
      if (h >= mine.end) break;
      row = load_row<kVectors, kAccess>(head(args, mine.token, h), count);
      norm();
    }
  }
};

struct InverseRopeArgs {
  TokenUnits cut;  // units are heads
  const void* o;   // [tokens, heads, head_dim]
  int64_t o_token_stride, o_head_stride;
  void* out;
  int64_t out_token_stride, out_head_stride;
  Rope rope;
  const int32_t* positions;
  int32_t head_dim;
  float* scale;  // of codes: [heads * head_dim / 128][scale_stride]
  int64_t scale_stride;
};

// Out: values, or with uint8_t their codes.
template <typename Act, typename Out, bool kQuantise, int kVectors, Access kAccess>
struct InverseRope {
  using Params = InverseRopeArgs;
  static constexpr int kThreads = 256;
  static constexpr int kMinBlocks = kVectors == 8 ? 6 : 1;

  DSV4_DEVICE static void run(const Params& args) {
    DSV4_SHARED(RopeTable, table);
    const BlockUnits mine = units_of_block(args.cut);
    const int count = args.head_dim;
    const Act* o = static_cast<const Act*>(args.o) + mine.token * args.o_token_stride;
    Out* out = static_cast<Out*>(args.out) + mine.token * args.out_token_stride;
    int h = mine.begin + group_idx();
    Row<kVectors> row{};
    if (h < mine.end) row = load_row<kVectors, kAccess>(o + h * args.o_head_stride, count);
    table.fill<kThreads>(args.rope, args.positions[mine.token], -1.0f);
    block_sync();
    while (h < mine.end) {
      rotate_tail(row, count, args.rope.pairs, [&](int p) { return table.angle[p]; });
      if constexpr (sizeof(Out) == 1) {
        store_codes_of_row(args, row, mine.token, h, out + h * args.out_head_stride);
      } else {
        if constexpr (kQuantise) quantise(row);
        store_row<kAccess>(out + h * args.out_head_stride, count, row);
      }
      h += kThreads / kGroupLanes;
      if (h < mine.end) row = load_row<kVectors, kAccess>(o + h * args.o_head_stride, count);
    }
  }

  DSV4_DEVICE static Scale scale_of_group(const Row<kVectors>& row, int i) {
    const uint32_t first = max_magnitude(row, i), second = max_magnitude(row, i + 1);
    const float amax = float_of(group_max(first < second ? second : first));
    return scale_for(amax, kInverseRopeAmaxFloor, kE4m3Max);
  }

  // With a NaN scale the codes do not matter.
  DSV4_DEVICE static void store_codes_of_row(const Params& args, const Row<kVectors>& row,
                                             int64_t token, int head, uint8_t* codes) {
    DSV4_UNROLL
    for (int i = 0; i < kVectors; i += 2) {
      if (i * kVectorElems >= args.head_dim) break;
      const Scale scale = scale_of_group(row, i);
      DSV4_UNROLL
      for (int v = i; v < i + 2; ++v) {
        store_codes(codes + v * kVectorElems + 2 * group_lane(),
                    pack_e4m3(row.even[v] * scale.inverse, row.odd[v] * scale.inverse));
      }
      const int64_t column = (int64_t{head} * args.head_dim + i * kVectorElems) / 128;
      if (group_lane() == 0) args.scale[column * args.scale_stride + token] = scale.value;
    }
  }

  // Groups of 128: two vectors. Codes are 2^-9 at least and scales 2^-42: nothing flushes to zero
  // in bf16, and code times scale is exact there.
  DSV4_DEVICE static void quantise(Row<kVectors>& row) {
    static_assert(kVectors % 2 == 0);
    DSV4_UNROLL
    for (int i = 0; i < kVectors; i += 2) {
      const Scale scale = scale_of_group(row, i);
      DSV4_UNROLL
      for (int v = i; v < i + 2; ++v) {
        // With a NaN scale all become NaN: the products are.
        float even = row.even[v] * scale.inverse, odd = row.odd[v] * scale.inverse;
        round_pair_to_e4m3(even, odd);
        row.even[v] = even * scale.value;
        row.odd[v] = odd * scale.value;
      }
    }
  }
};

}  // namespace dsv4::gpu
