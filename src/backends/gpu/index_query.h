// Indexer queries (compressor.md 2.2, 2.4): RoPE on the tail of every head, optional Hadamard,
// quantisation, weights folded.
//
// Tiling    one lane group a head; blocks of 8 groups for one token, which share its angles
// Budget    bytes in + bytes out: 64 heads x 128 bf16 are 16 KiB a token, as much out, or half as
//           codes
// Contract  as norm_rope.h; q_out holds the quantised values, of FP8 without the scale, which goes
//           into the weight
// Numerics  the rotated row is rounded to bf16 before it is quantised; the weight is multiplied by
//           scale, dim^-0.5 and heads^-0.5 in this order, each product rounded
#pragma once
#include "backends/gpu/norm_rope.h"

namespace dsv4::gpu {

enum class IndexForm : uint8_t { kNone, kFp8Row, kMxfp4, kFp8Codes };

struct IndexQueryArgs {
  TokenUnits cut;  // units are heads
  const void* q;   // [tokens, heads, dim]
  int64_t q_token_stride, q_head_stride;
  const void* weights;  // [tokens, heads]
  int64_t weights_token_stride, weights_head_stride;
  bool weights_are_bf16;
  void* q_out;
  int64_t out_token_stride, out_head_stride;
  float* weights_out;
  int64_t weights_out_stride;
  Rope rope;
  const int32_t* positions;
  int32_t dim;
  bool hadamard;
  float dim_factor, heads_factor;
};

template <typename Act, IndexForm kForm, int kVectors, Access kAccess>
struct IndexQuery {
  using Params = IndexQueryArgs;
  static constexpr bool kCodes = kForm == IndexForm::kFp8Codes;
  using Out =
      std::conditional_t<kForm == IndexForm::kNone, Act, std::conditional_t<kCodes, uint8_t, Bf16>>;
  static constexpr int kThreads = 256;

  DSV4_DEVICE static void run(const Params& args) {
    DSV4_SHARED(RopeTable, table);
    const BlockUnits mine = units_of_block(args.cut);
    const int count = args.dim;
    const Act* q = static_cast<const Act*>(args.q) + mine.token * args.q_token_stride;
    Out* out = static_cast<Out*>(args.q_out) + mine.token * args.out_token_stride;
    int h = mine.begin + group_idx();
    Row<kVectors> row{};
    if (h < mine.end) row = load_row<kVectors, kAccess>(q + h * args.q_head_stride, count);
    table.fill<kThreads>(args.rope, args.positions[mine.token], 1.0f);
    block_sync();
    while (h < mine.end) {
      const int next = h + kThreads / kGroupLanes;
      Row<kVectors> next_row{};
      if (next < mine.end)
        next_row = load_row<kVectors, kAccess>(q + next * args.q_head_stride, count);
      const float head_weight = weight(args, mine.token, h);
      rotate_tail(row, count, args.rope.pairs, [&](int p) { return table.angle[p]; });
      if (args.hadamard) hadamard_row(row, count);
      const float scale = quantise(row);
      if constexpr (kCodes) {
        store_codes_of_row(out + h * args.out_head_stride, count, row);
      } else {
        store_row<kAccess>(out + h * args.out_head_stride, count, row);
      }
      if (group_lane() == 0) {
        args.weights_out[mine.token * args.weights_out_stride + h] =
            head_weight * scale * args.dim_factor * args.heads_factor;
      }
      h = next;
      row = next_row;
    }
  }

  DSV4_DEVICE static float weight(const Params& args, int64_t token, int h) {
    const int64_t at = token * args.weights_token_stride + h * args.weights_head_stride;
    return args.weights_are_bf16 ? to_float(static_cast<const Bf16*>(args.weights)[at])
                                 : static_cast<const float*>(args.weights)[at];
  }

  // Of the quantised values.
  DSV4_DEVICE static void store_codes_of_row(uint8_t* to, int count, const Row<kVectors>& row) {
    DSV4_UNROLL
    for (int i = 0; i < kVectors; ++i) {
      const int elem = row_elem(i);
      if (elem < count) store_codes(to + elem, pack_e4m3(row.even[i], row.odd[i]));
    }
  }

  // @return the scale that the values are left without.
  DSV4_DEVICE static float quantise(Row<kVectors>& row) {
    if constexpr (kForm == IndexForm::kNone) {
      return 1.0f;
    } else {
      round_row_to_bf16(row);
      if constexpr (kForm == IndexForm::kFp8Row || kCodes) {
        uint32_t largest = 0;
        DSV4_UNROLL
        for (int i = 0; i < kVectors; ++i) {
          const uint32_t here = max_magnitude(row, i);
          largest = largest < here ? here : largest;
        }
        const Scale scale = scale_for(float_of(group_max(largest)), kFp8AmaxFloor, kE4m3Max);
        DSV4_UNROLL
        for (int i = 0; i < kVectors; ++i) {
          row.even[i] = row.even[i] * scale.inverse;  // NaN where the scale is
          row.odd[i] = row.odd[i] * scale.inverse;
          round_pair_to_e4m3(row.even[i], row.odd[i]);
        }
        return scale.value;
      } else {
        DSV4_UNROLL
        for (int i = 0; i < kVectors; ++i) {
          const float amax = float_of(half_group_max(max_magnitude(row, i)));
          const Scale scale = scale_for(amax, kMxfp4AmaxFloor, kE2m1Max);
          row.even[i] = dequantised(row.even[i], scale);
          row.odd[i] = dequantised(row.odd[i], scale);
        }
        return 1.0f;
      }
    }
  }
  DSV4_DEVICE static float dequantised(float value, const Scale& scale) {
    return round_to_e2m1(value * scale.inverse) * scale.value;  // NaN where the scale is
  }
};

}  // namespace dsv4::gpu
