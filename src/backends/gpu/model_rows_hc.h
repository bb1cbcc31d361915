// Hyper-connections (model.md 3): mixing the streams of a token into one input, and spreading the
// output again.
//
// hc_dots     partial[t, chunk, r] = fn[r] . X over 1024 columns; r = rows: X . X
// hc_finish   m = totals / norm; y = sum_i pre_i X_i; post and comb (Sinkhorn) of hc_pre
// hc_post     streams[j] = post_j f + sum_i comb[i][j] streams[i], in place
//
// Tiling    hc_dots: block = (chunk, rows of fn, tokens); a lane group has kRows x kTokens sums,
// each
//           lane the columns 2 l, 2 l + 1 of every 64. Many tokens: 6 x 8 sums, and blocks of one
//           chunk of fn (96 KiB) follow each other so that they find it in L1; few: 2 x 1, so that
//           24 x 16384 floats are read by 48 blocks.
//           hc_finish: block = (token, part of the row). Group 0 of the first part does the
//           Sinkhorn iterations, lane i with row i of the matrix, while the others mix.
// Budget    a token of 4 x 4096 bf16: 32 KiB in, 8 KiB out; 24 x 16384 FMA, which for 2048 tokens
// is
//           27 us of the 132 multiprocessors of sm_90; fn is 1.5 MiB: 0.4 us from memory
// Contract  streams of a token contiguous, hc * width columns; at most 8 streams
// Numerics  f32. A sum over columns: a lane's in ascending order by fma (even, odd), lanes by
//           group_sum, chunks ascending. Mixes: products and sums rounded separately, streams
//           ascending. Nothing depends on how tokens share blocks.
#pragma once
#include "backends/gpu/model_rows_pair.h"

namespace dsv4::gpu {

constexpr int kHcMaxStreams = 8;
constexpr int kHcChunkCols = 1024;
constexpr int kHcChunkVectors = kHcChunkCols / kVectorElems;

// ---- products

struct HcDotsArgs {
  const void* streams;  // [tokens, cols]
  int64_t token_stride;
  const float* fn;  // [rows, cols]
  int64_t fn_stride;
  float* partial;  // [tokens, chunks, rows + 1]
  int32_t tokens, cols, rows;
  int32_t chunks, row_parts;
};

template <typename Act, int kRows, int kTokens>
struct HcDots {
  using Params = HcDotsArgs;
  static constexpr int kThreads = 128;
  static constexpr int kGroups = kThreads / kGroupLanes;
  static constexpr int kBlockRows = kRows * kGroups;
  static constexpr int kTileTokens = kTokens;

  DSV4_DEVICE static void run(const Params& args) {
    const auto block = static_cast<uint32_t>(block_idx());
    // Neighbouring blocks share a chunk of fn.
    const auto tiles = static_cast<uint32_t>((args.tokens + kTokens - 1) / kTokens);
    const int token = static_cast<int>(block % tiles) * kTokens;
    const uint32_t rest = block / tiles;
    const auto part = static_cast<int>(rest % static_cast<uint32_t>(args.row_parts));
    const auto chunk = static_cast<int>(rest / static_cast<uint32_t>(args.row_parts));
    const int first_row = part * kBlockRows + group_idx() * kRows;
    const int first_col = chunk * kHcChunkCols;
    const int cols = args.cols - first_col < kHcChunkCols ? args.cols - first_col : kHcChunkCols;
    const float* fn[kRows];
    bool aligned = true;
    DSV4_UNROLL
    for (int r = 0; r < kRows; ++r) {
      // Rows and tokens beyond the last repeat it; their sums are not stored.
      const int row = first_row + r < args.rows ? first_row + r : args.rows - 1;
      fn[r] = args.fn + row * args.fn_stride + first_col;
      aligned = aligned && has_aligned_pairs(fn[r]);
    }
    const Act* x[kTokens];
    bool whole = aligned && cols == kHcChunkCols;
    DSV4_UNROLL
    for (int t = 0; t < kTokens; ++t) {
      const int64_t at = token + t < args.tokens ? token + t : args.tokens - 1;
      x[t] = static_cast<const Act*>(args.streams) + at * args.token_stride + first_col;
      whole = whole && has_aligned_pairs(x[t]);
    }
    float sums[kRows][kTokens] = {}, squares[kTokens] = {};
    const auto add = [&](const Pair(&a)[kRows], const Pair(&b)[kTokens]) {
      DSV4_UNROLL
      for (int t = 0; t < kTokens; ++t) {
        DSV4_UNROLL
        for (int r = 0; r < kRows; ++r)
          sums[r][t] = fma(a[r].odd, b[t].odd, fma(a[r].even, b[t].even, sums[r][t]));
        if (has_squares(part, t))
          squares[t] = fma(b[t].odd, b[t].odd, fma(b[t].even, b[t].even, squares[t]));
      }
    };
    if (whole) {
      DSV4_UNROLL_BY(2)
      for (int i = 0; i < kHcChunkVectors; ++i) {
        Pair a[kRows], b[kTokens];
        DSV4_UNROLL
        for (int r = 0; r < kRows; ++r) a[r] = load_pair(fn[r] + row_elem(i));
        DSV4_UNROLL
        for (int t = 0; t < kTokens; ++t) b[t] = load_pair(x[t] + row_elem(i));
        add(a, b);
      }
    } else {
      for (int i = 0; i * kVectorElems < cols; ++i) {
        Pair a[kRows], b[kTokens];
        DSV4_UNROLL
        for (int r = 0; r < kRows; ++r) a[r] = load_pair_of(fn[r], row_elem(i), cols, false);
        DSV4_UNROLL
        for (int t = 0; t < kTokens; ++t) b[t] = load_pair_of(x[t], row_elem(i), cols, false);
        add(a, b);
      }
    }
    DSV4_UNROLL
    for (int t = 0; t < kTokens; ++t) {
      float* out = args.partial + (int64_t{token + t} * args.chunks + chunk) * (args.rows + 1);
      const bool real = token + t < args.tokens;
      DSV4_UNROLL
      for (int r = 0; r < kRows; ++r) {
        const float sum = group_sum(sums[r][t]);
        if (real && first_row + r < args.rows && group_lane() == 0) out[first_row + r] = sum;
      }
      if (has_squares(part, t)) {
        const float sum = group_sum(squares[t]);
        if (real && group_lane() == 0) out[args.rows] = sum;
      }
    }
  }

  // Groups of the first rows share the sums of squares.
  DSV4_DEVICE static bool has_squares(int part, int t) {
    return part == 0 && t % kGroups == group_idx();
  }
};

// ---- mixing

struct HcFinishArgs {
  const void* streams;  // [tokens, hc, width]
  int64_t token_stride, stream_stride;
  const float* partial;
  const float* base;   // [rows]
  const float* scale;  // [3], or [1] without post and comb
  void* y;             // [tokens, width]
  int64_t y_stride;
  float* post;  // [tokens, hc], or null: hc_head
  int64_t post_stride;
  float* comb;  // [tokens, hc, hc]
  int64_t comb_stride;
  int32_t hc, width, cols, rows, chunks, parts, iterations;
  float norm_eps, hc_eps;
};

/// kStreams: 4, or 8 for any number up to it.
template <typename Act, int kStreams>
struct HcFinish {
  using Params = HcFinishArgs;
  static constexpr int kThreads = 256;
  static constexpr int kMaxRows = (2 + kStreams) * kStreams;
  struct Mix {
    float total[kMaxRows + 1];
    float value[kMaxRows];
  };

  DSV4_DEVICE static void run(const Params& args) {
    DSV4_SHARED(Mix, mix);
    const auto block = static_cast<uint32_t>(block_idx());
    const int64_t token = block / static_cast<uint32_t>(args.parts);
    const auto part = static_cast<int>(block % static_cast<uint32_t>(args.parts));
    const int rows = args.rows, hc = args.hc;
    const int lane = thread_idx();
    if (lane <= rows) {
      const float* partial = args.partial + token * args.chunks * (rows + 1) + lane;
      float total = partial[0];
      for (int c = 1; c < args.chunks; ++c) total = total + partial[c * (rows + 1)];
      mix.total[lane] = total;
    }
    block_sync();
    if (lane < rows) {
      const float factor = inverse_rms(mix.total[rows], args.cols, args.norm_eps);
      const int kind = lane / hc < 2 ? lane / hc : 2;
      const float m = mix.total[lane] * factor * args.scale[kind] + args.base[lane];
      mix.value[lane] = kind == 2 ? m : sigmoid(m) + (kind == 0 ? args.hc_eps : 0.0f);
    }
    block_sync();
    const bool mixes_comb = args.post != nullptr && part == 0;
    if (mixes_comb && group_idx() == 0) {
      spread(args, mix, token);
      return;
    }
    const int first = mixes_comb ? kGroupLanes : 0;  // lanes that mix start here
    mix_row(args, mix, token, part, lane - first, kThreads - first);
  }

  // y over this part of the row, pairs `lane`, `lane + lanes`, ...
  DSV4_DEVICE static void mix_row(const Params& args, const Mix& mix, int64_t token, int part,
                                  int lane, int lanes) {
    const Act* x = static_cast<const Act*>(args.streams) + token * args.token_stride;
    Act* y = static_cast<Act*>(args.y) + token * args.y_stride;
    const int pairs = (args.width + 1) / 2, per_part = (pairs + args.parts - 1) / args.parts;
    const int begin = part * per_part;
    const int end = begin + per_part < pairs ? begin + per_part : pairs;
    bool aligned = has_aligned_pairs(x) && args.stream_stride % 2 == 0;
    const bool y_aligned = has_aligned_pairs(y);
    DSV4_UNROLL_BY(2)
    for (int p = begin + lane; p < end; p += lanes) {
      Pair sum = load_pair_of(x, 2 * p, args.width, aligned);
      sum = {mix.value[0] * sum.even, mix.value[0] * sum.odd};
      DSV4_UNROLL
      for (int i = 1; i < kStreams; ++i) {
        if (i >= args.hc) break;
        const Pair value = load_pair_of(x + i * args.stream_stride, 2 * p, args.width, aligned);
        sum = {sum.even + mix.value[i] * value.even, sum.odd + mix.value[i] * value.odd};
      }
      store_pair_of(y, 2 * p, args.width, y_aligned, sum);
    }
  }

  // post and comb by one lane group: lane i < hc has row i. Row softmax, then column and row
  // normalisations in turn; the last one is by columns.
  DSV4_DEVICE static void spread(const Params& args, const Mix& mix, int64_t token) {
    const int hc = args.hc, i = group_lane();
    const bool mine = i < hc;
    const float* logits = mix.value + (mine ? (2 + i) * hc : 2 * hc);
    float c[kStreams];
    float largest = logits[0];
    DSV4_UNROLL
    for (int j = 0; j < kStreams; ++j) {
      c[j] = j < hc ? logits[j] : 0.0f;
      if (j < hc) largest = max(largest, c[j]);
    }
    float sum = 0.0f;
    DSV4_UNROLL
    for (int j = 0; j < kStreams; ++j) {
      if (j >= hc) break;
      c[j] = exp(c[j] - largest);
      sum = sum + c[j];
    }
    DSV4_UNROLL
    for (int j = 0; j < kStreams; ++j) c[j] = j < hc ? c[j] / sum + args.hc_eps : 0.0f;
    normalise_columns(c, hc, args.hc_eps);
    for (int iteration = 1; iteration < args.iterations; ++iteration) {
      float row = 0.0f;
      DSV4_UNROLL
      for (int j = 0; j < kStreams; ++j) {
        if (j < hc) row = row + c[j];
      }
      DSV4_UNROLL
      for (int j = 0; j < kStreams; ++j) c[j] = c[j] / (row + args.hc_eps);
      normalise_columns(c, hc, args.hc_eps);
    }
    if (!mine) return;
    args.post[token * args.post_stride + i] = 2.0f * mix.value[hc + i];
    DSV4_UNROLL
    for (int j = 0; j < kStreams; ++j) {
      if (j < hc) args.comb[token * args.comb_stride + i * hc + j] = c[j];
    }
  }
  DSV4_DEVICE static void normalise_columns(float (&c)[kStreams], int hc, float eps) {
    DSV4_UNROLL
    for (int j = 0; j < kStreams; ++j) {
      float sum = 0.0f;
      DSV4_UNROLL
      for (int i = 0; i < kStreams; ++i) {
        const float other = shuffle(c[j], i);
        if (i < hc) sum = sum + other;
      }
      c[j] = c[j] / (sum + eps);
    }
  }
};

// ---- spreading

struct HcPostArgs {
  const void* f;  // [tokens, width]
  int64_t f_stride;
  const float* post;
  int64_t post_stride;
  const float* comb;
  int64_t comb_stride;
  void* streams;  // [tokens, hc, width]
  int64_t token_stride, stream_stride;
  int32_t hc, width, parts;
};

template <typename Act, int kStreams>
struct HcPost {
  using Params = HcPostArgs;
  static constexpr int kThreads = 128;

  DSV4_DEVICE static void run(const Params& args) {
    const auto block = static_cast<uint32_t>(block_idx());
    const int64_t token = block / static_cast<uint32_t>(args.parts);
    const auto part = static_cast<int>(block % static_cast<uint32_t>(args.parts));
    const Act* f = static_cast<const Act*>(args.f) + token * args.f_stride;
    Act* x = static_cast<Act*>(args.streams) + token * args.token_stride;
    const int hc = args.hc;
    float post[kStreams], comb[kStreams][kStreams];
    DSV4_UNROLL
    for (int j = 0; j < kStreams; ++j) {
      post[j] = j < hc ? args.post[token * args.post_stride + j] : 0.0f;
      DSV4_UNROLL
      for (int i = 0; i < kStreams; ++i)
        comb[i][j] = i < hc && j < hc ? args.comb[token * args.comb_stride + i * hc + j] : 0.0f;
    }
    if constexpr (kStreams > 4) {  // more than the scalar registers hold
      DSV4_UNROLL
      for (int j = 0; j < kStreams; ++j) {
        post[j] = opaque(post[j]);
        DSV4_UNROLL
        for (int i = 0; i < kStreams; ++i) comb[i][j] = opaque(comb[i][j]);
      }
    }
    const bool aligned =
        has_aligned_pairs(x) && has_aligned_pairs(f) && args.stream_stride % 2 == 0;
    const int pairs = (args.width + 1) / 2;
    for (int p = part * kThreads + thread_idx(); p < pairs; p += args.parts * kThreads) {
      const int elem = 2 * p;
      const Pair value = load_pair_of(f, elem, args.width, aligned);
      Pair source[kStreams];
      DSV4_UNROLL
      for (int i = 0; i < kStreams; ++i) {
        source[i] = i < hc ? load_pair_of(x + i * args.stream_stride, elem, args.width, aligned)
                           : Pair{0.0f, 0.0f};
      }
      DSV4_UNROLL
      for (int j = 0; j < kStreams; ++j) {
        if (j >= hc) break;
        Pair sum = {post[j] * value.even, post[j] * value.odd};
        DSV4_UNROLL
        for (int i = 0; i < kStreams; ++i) {
          if (i >= hc) break;
          sum = {sum.even + comb[i][j] * source[i].even, sum.odd + comb[i][j] * source[i].odd};
        }
        store_pair_of(x + j * args.stream_stride, elem, args.width, aligned, sum);
      }
    }
  }
};

}  // namespace dsv4::gpu
