// The rows roles of sm90_attend_heads: every other block of 64 rows each. A warp fetches 16 rows,
// converts them once, keeps them as operands of S^T = K Q^T, writes them into the tile that O^T +=
// V^T P^T reads, and turns its scores into P.
#pragma once
#include <cuda_fp16.h>

#include "backends/nvidia/arch/sm90/wgmma.h"
#include "backends/nvidia/ops/attend_sm90_heads_traits.h"
#include "backends/nvidia/ops/attend_sm90_loader.cuh"

namespace dsv4::nvidia::sm90_attend_heads {

using namespace sm80;  // NOLINT: kernel code, not included by others
using namespace sm90;  // NOLINT: kernel code, not included by others
using sm90_attend::RowAddress;

constexpr float kNoMaximum = -1e30f;  // finite: differences of it are numbers

/// Phase parity of a barrier that serves every kEvery-th block.
template <int kEvery>
__device__ __forceinline__ uint32_t phase_of(int block) {
  return static_cast<uint32_t>(block / kEvery) & 1;
}

__device__ __forceinline__ BlockHeader read_header(const BlockHeader& header) {
  const uint2 words = load_shared_2(shared_address(&header));
  return {static_cast<int32_t>(words.x), static_cast<uint16_t>(words.y),
          static_cast<uint16_t>(words.y >> 16)};
}

/// Rows lane / 4 and lane / 4 + 8 of a warp. Of every panel of 64 codes a lane needs word t = lane
/// % 4 of the four chunks of 16: a chunk is a step of the products, as in the kernel of 64 heads,
/// but its columns 4 t + c are columns 2 t + c % 2 + 8 (c / 2) of the operands, of the tile, of the
/// query in shared memory (query_role) and of O (store_item). That changes no bit: the tensor core
/// adds the 16 products of a step at once. Panels of bf16 (`wide`) keep their order.
template <typename Traits>
struct RowsOfWarp {
  uint32_t raw;     // slots of the warp
  uint32_t scales;  // of the warp
  uint32_t tile;    // what this lane addresses of step 0 in panel 0 of slot 0 [store_matrix_4]
  int lane;

  static constexpr int kFp8Panels = Traits::kFp8Panels;
  static constexpr int kSlotBytes =
      kFp8Panels == 0 ? Traits::kWideSlotBytes : Traits::kFp8SlotBytes;

  /// Where the lane's 16 columns of its rows lie.
  struct Source {
    const std::byte* from[2];
    bool valid[2];
  };
  __device__ __forceinline__ Source source_of(const RowAddress (&rows)[2]) const {
    Source out;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      out.from[r] = rows[r].values() + (lane & 3) * 16;
      out.valid[r] = rows[r].valid();
    }
    return out;
  }

  __device__ __forceinline__ uint32_t slot_of(int panel) const {
    return raw + panel % Traits::kRing * kSlotBytes;
  }

  /// Starts copies of a panel, in one group; masked rows become zeros. `offset` is that of the
  /// panel in a row.
  template <bool kWide>
  __device__ __forceinline__ void fetch(uint32_t slot, const Source& source, int offset) const {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const std::byte* from = source.from[r] + offset;
      const bool valid = source.valid[r];
      if (kWide) {  // 8 rows of 128 bytes, unit u at u ^ (4 (row % 2) + row % 8 / 2); t, and t + 4
        const uint32_t to =
            slot + r * 1024 + ((lane >> 2) << 7) + (((lane & 3) ^ (lane & 4) ^ (lane >> 3)) << 4);
        copy_async_stream(to, from, valid ? 16 : 0);
        copy_async_stream(to ^ 64, from + 64, valid ? 16 : 0);
      } else {  // 8 rows of 64 bytes, chunk k at k ^ (row % 8 / 2)
        copy_async_stream(slot + r * 512 + ((lane ^ (lane >> 3)) << 4), from, valid ? 16 : 0);
      }
    }
    copy_async_commit();
  }
  __device__ __forceinline__ void fetch(int panel, const Source& source) const {
    if (panel >= kFp8Panels) {
      fetch<true>(slot_of(panel), source, kFp8Panels * 64 + (panel - kFp8Panels) * 128);
    } else {
      fetch<false>(slot_of(panel), source, panel * 64);
    }
  }
  /// The scale bytes of a row, in the group of the panel that is fetched next; lanes 0 and 1 of a
  /// quad have one row each.
  __device__ __forceinline__ void fetch_scales(const RowAddress (&rows)[2]) const {
    if (!Traits::kHasScales || (lane & 2) != 0) return;
    const RowAddress row = {(lane & 1) == 0 ? rows[0].bits : rows[1].bits};
    copy_async_8(scales + (lane >> 2) * 8 + (lane & 1) * 64, row.values() + row.to_scales(),
                 row.valid() ? 8 : 0);
  }
  __device__ __forceinline__ uint2 load_scales(int r) const {
    if (!Traits::kHasScales) return {0x7f7f7f7fu, 0x7f7f7f7fu};
    return load_shared_2(scales + (lane >> 2) * 8 + r * 64);
  }

  /// Into a panel of a part of the tile, of which this lane addresses `part` [tile].
  __device__ __forceinline__ static void store(uint32_t part, int panel, const uint32_t (&a)[16]) {
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      store_matrix_4((part ^ (k << 5)) + panel * Traits::kPanelBytes, a[4 * k], a[4 * k + 1],
                     a[4 * k + 2], a[4 * k + 3]);
    }
  }

  /// What a lane needs of a slot. Other lanes copied it: before and after this, __syncwarp.
  struct Raw {
    uint32_t words[4][4];  // codes: row lane / 4 (+ 8), chunk; bf16 values: step, as operands
  };
  __device__ __forceinline__ void load(int panel, Raw& out) const {
    const int row = lane & 7;
    if (panel < kFp8Panels) {
      const uint32_t at = slot_of(panel) + row * 64 + (((lane >> 3) ^ (row >> 1)) << 4);
#pragma unroll
      for (int r = 0; r < 2; ++r) load_matrix_x4(out.words[r], at + r * 512);
      return;
    }
    const uint32_t at =
        slot_of(panel) + (lane & 15) * 128 + (((lane >> 4) ^ ((row & 1) << 2) ^ (row >> 1)) << 4);
#pragma unroll
    for (int k = 0; k < 4; ++k) load_matrix_x4(out.words[k], at ^ (k << 5));
  }

  /// A panel as operands, a[4 k] ... for step k of 16 columns. Codes through f32: that takes half
  /// of what the integer pipe has to do for the bits themselves (attend_sm90_loader.cuh), and NaN
  /// codes and all finite scales come out right.
  __device__ __forceinline__ void convert(int panel, const Raw& raw_words,
                                          const uint2 (&scales_of)[2], uint32_t (&a)[16]) const {
    if (panel >= kFp8Panels) {
#pragma unroll
      for (int i = 0; i < 16; ++i) a[i] = raw_words.words[i / 4][i % 4];
      return;
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const uint32_t scale = scale_of(scales_of[r], panel);
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        convert_4(raw_words.words[r][k], scale, a[4 * k + r], a[4 * k + 2 + r]);
      }
    }
  }
  /// Exact but for the rounding of the product, which there is only beyond 2^127 and below 2^-126.
  __device__ __forceinline__ static void convert_4(uint32_t codes, uint32_t scale, uint32_t& low,
                                                   uint32_t& high) {
    uint32_t pairs[2];
    e4m3x4_to_f16x4(codes, pairs[0], pairs[1]);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const __half2 pair = *reinterpret_cast<const __half2*>(&pairs[i]);
      const uint32_t values = pack_bf16x2(__low2float(pair), __high2float(pair));
      (i == 0 ? low : high) = Traits::kHasScales ? multiply_bf16x2(values, scale) : values;
    }
  }
  /// 2^(byte - 127) in both halves; byte 255 gives infinity, see is_nan.
  __device__ __forceinline__ static uint32_t scale_of(const uint2& bytes, int panel) {
    const uint32_t four = __byte_perm(bytes.x, bytes.y, panel * 0x1111);
    return __vmaxu2(four >> 1 & 0x7f807f80u, 0x00400040u);
  }
  /// Whether a row has the scale byte 255, so that all of its scores are NaN.
  __device__ __forceinline__ static bool is_nan(const uint2& bytes) {
    const uint32_t x = bytes.x, y = bytes.y & 0xffffff;
    return Traits::kHasScales &&
           ((x & ((x & 0x7f7f7f7fu) + 0x01010101u)) | (y & ((y & 0x7f7f7f7fu) + 0x01010101u))) &
               0x80808080u;
  }
};

/// The largest over a warp's rows of x[2 n], x[2 n + 1]: heads 8 n + 2 (lane % 4), + 1. Lanes halve
/// what they care for at every step.
template <int kHeads>
__device__ __forceinline__ void store_maxima(float* to, const float (&x)[kHeads / 4], int lane) {
  static_assert(kHeads == 16 || kHeads == 32);
#pragma unroll
  for (int n = 0; n < kHeads / 8; n += 2) {
    const bool upper = (lane & 16) != 0, odd = (lane & 8) != 0;
    // Lanes with bit 4 take heads 8 n + 8 ..., those with bit 3 the odd head.
    float even_head = fmaxf(upper ? x[2 * n + 2] : x[2 * n],
                            __shfl_xor_sync(~0u, upper ? x[2 * n] : x[2 * n + 2], 16));
    float odd_head = fmaxf(upper ? x[2 * n + 3] : x[2 * n + 1],
                           __shfl_xor_sync(~0u, upper ? x[2 * n + 1] : x[2 * n + 3], 16));
    float mine =
        fmaxf(odd ? odd_head : even_head, __shfl_xor_sync(~0u, odd ? even_head : odd_head, 8));
    mine = fmaxf(mine, __shfl_xor_sync(~0u, mine, 4));
    if ((lane & 4) == 0) to[8 * n + (lane >> 1 & 8) + 2 * (lane & 3) + (lane >> 3 & 1)] = mine;
  }
}

/// Sums of weights, in the order of block_weights (attend_sm90_softmax.cuh), where a thread has
/// rows 2 j and 2 j + 1 of every 8: x are those over rows lane / 4 and lane / 4 + 8 of the warp's;
/// pairs of rows are added up here, into to[j], and warps by the output role.
template <int kHeads>
__device__ __forceinline__ void store_sums(float (&to)[4][kHeads], const float (&x)[kHeads / 4],
                                           int lane) {
  const bool odd = (lane & 4) != 0;  // such lanes take heads 8 n + 8 ...
#pragma unroll
  for (int n = 0; n < kHeads / 8; n += 2) {
    float sum[2];
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const float low = x[2 * n + e], high = x[2 * n + 2 + e];
      sum[e] = (odd ? high : low) + __shfl_xor_sync(~0u, odd ? low : high, 4);
    }
    *reinterpret_cast<float2*>(&to[lane >> 3][8 * n + (odd ? 8 : 0) + 2 * (lane & 3)]) =
        make_float2(sum[0], sum[1]);
  }
}

/// Scores s[4 n ...] = (row lane / 4: heads 8 n + 2 (lane % 4), + 1), (row + 8: the same heads) of
/// a warp: tells the largest ones to the other warps of the role.
template <typename Traits>
__device__ __forceinline__ void share_maxima(SharedStorage<Traits>& shared, int stage, int warp,
                                             int lane, float (&s)[Traits::kHeads / 2]) {
  constexpr int kHeads = Traits::kHeads;
  float largest[kHeads / 4];
#pragma unroll
  for (int i = 0; i < kHeads / 4; ++i) {
    const int at = 4 * (i / 2) + i % 2;
    largest[i] = fmaxf(s[at], s[at + 2]);
  }
  store_maxima<kHeads>(shared.maxima[stage][warp], largest, lane);
  barrier_sync(1 + stage, 128);
}

/// P of a block from its scores, into shared memory; what the next block and the output role need
/// to know.
template <typename Traits>
__device__ __forceinline__ void softmax(const AttendSm90Args& args, SharedStorage<Traits>& shared,
                                        int block, uint32_t flags, int warp, int lane,
                                        float (&s)[Traits::kHeads / 2]) {
  constexpr int kHeads = Traits::kHeads, kOfLane = kHeads / 4;
  const int stage = block & 1, quad = lane & 3;
  if (block > 0) {
    mbarrier_poll(shared_address(&shared.barriers.reference_known[stage ^ 1]),
                  phase_of<2>(block - 1));
  }

  if ((flags & kFirstBlock) != 0 && (flags & kTakenOver) != 0) {
    mbarrier_poll(shared_address(&shared.barriers.taken_over), 0);
  }

  float reference[kOfLane], alpha[kOfLane];
#pragma unroll
  for (int n = 0; n < kHeads / 8; ++n) {
    const int head = 8 * n + 2 * quad;
    float2 max = *reinterpret_cast<const float2*>(&shared.maxima[stage][0][head]);
#pragma unroll
    for (int w = 1; w < 4; ++w) {
      const float2 of_warp = *reinterpret_cast<const float2*>(&shared.maxima[stage][w][head]);
      max.x = fmaxf(max.x, of_warp.x);
      max.y = fmaxf(max.y, of_warp.y);
    }
    float2 before = {kNoMaximum, kNoMaximum};
    if ((flags & kFirstBlock) == 0) {
      before = *reinterpret_cast<const float2*>(&shared.reference[stage ^ 1][head]);
    } else if ((flags & kTakenOver) != 0) {
      before = *reinterpret_cast<const float2*>(&shared.taken_over[head]);
    }
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const float old = e == 0 ? before.x : before.y;
      const float grown = __fmul_rn(e == 0 ? max.x : max.y, args.attend.scale_log2);
      const bool moves = grown > old + 8.f;
      reference[2 * n + e] = moves ? grown : old;
      alpha[2 * n + e] = moves ? exp2_approx(old - grown) : 1.f;
    }
    if (warp == 0 && lane < 4) {
      *reinterpret_cast<float2*>(&shared.reference[stage][head]) =
          make_float2(reference[2 * n], reference[2 * n + 1]);
      *reinterpret_cast<float2*>(&shared.alpha[stage][head]) =
          make_float2(alpha[2 * n], alpha[2 * n + 1]);
    }
  }
  mbarrier_arrive(shared_address(&shared.barriers.reference_known[stage]));

  float sum[kOfLane];
#pragma unroll
  for (int i = 0; i < kOfLane; ++i) {
    const int at = 4 * (i / 2) + i % 2;
    s[at] = exp2_approx(fmaf(s[at], args.attend.scale_log2, -reference[i]));
    s[at + 2] = exp2_approx(fmaf(s[at + 2], args.attend.scale_log2, -reference[i]));
    sum[i] = s[at] + s[at + 2];
  }
  // Matrices of 8 rows x 8 heads, transposed: by head, 16-byte units of 8 rows.
  const uint32_t p = shared_address(shared.p[stage]) + (lane & 7) * 128 +
                     (((2 * warp + (lane >> 3 & 1)) ^ (lane & 7)) << 4) + (lane >> 4) * 1024;
#pragma unroll
  for (int n = 0; n < kHeads / 8; n += 2) {
    const float* of = s + 4 * n;
    store_matrix_4_transposed(p + n * 1024, pack_bf16x2(of[0], of[1]), pack_bf16x2(of[2], of[3]),
                              pack_bf16x2(of[4], of[5]), pack_bf16x2(of[6], of[7]));
  }
  store_sums<kHeads>(shared.sums[stage][warp], sum, lane);
}

template <typename Traits>
__device__ __forceinline__ void rows_role(const AttendSm90Args& args, SharedStorage<Traits>& shared,
                                          int role, int warp, int lane) {
  constexpr int kHeads = Traits::kHeads, kSlots = Traits::kAddressSlots;
  constexpr int kRing = Traits::kRing;
  const int row = warp * 16 + (lane >> 2);  // and row + 8
  const RowsOfWarp<Traits> rows{shared_address(shared.raw[role][warp]),
                                shared_address(shared.scales[role][warp]),
                                shared_address(shared.rows) + (warp * 16 + (lane & 15)) * 128 +
                                    (((lane >> 4) ^ (lane & 7)) << 4),
                                lane};
  const uint64_t query = swizzled_operand(shared_address(shared.query), 16, 1024);
  // Waits until the output role has used up the block, and all that it was told about it.
  const auto wait_for_end_of = [&](int block) {
    const auto last = TilePart<Traits>::last_of(block);
    mbarrier_poll(shared_address(&shared.barriers.empty[last.slot]), last.before & 1);
  };
  const auto addresses_of = [&](int block, RowAddress(&out)[2]) {
    mbarrier_poll(shared_address(&shared.barriers.known[block % kSlots]), phase_of<kSlots>(block));
    const uint32_t at = shared_address(&shared.addresses[block % kSlots][row]);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const uint2 bits = load_shared_2(at + r * 64);
      out[r].bits = static_cast<uint64_t>(bits.y) << 32 | bits.x;
    }
    mbarrier_arrive(shared_address(&shared.barriers.freed[block % kSlots]));
  };

  RowAddress addresses[2];
  addresses_of(role, addresses);
  if (args.starts_early) {
#pragma unroll
    for (const RowAddress& address : addresses)
      sm90_attend::prefetch_row<Traits>(address, lane & 3);
    sm90::wait_for_kernels_before();
  }
  auto here = rows.source_of(addresses);
  rows.fetch_scales(addresses);
#pragma unroll
  for (int panel = 0; panel < kRing; ++panel) rows.fetch(panel, here);

  uint32_t seen = 1;  // phase of the last query; as if there had been one before the first
  for (int block = role;; block += 2) {
    const BlockHeader header = read_header(shared.headers[block % Traits::kHeaderSlots]);
    if (header.token < 0) {
      // The output role ends with this block, too. It has seen the one before, or it would miss a
      // phase.
      if (block > 1) wait_for_end_of(block - 2);
      mbarrier_arrive(shared_address(&shared.barriers.full[role]));
      break;
    }
    auto next = here;
    copy_async_wait<kRing - 1>();
    __syncwarp();  // rows and scales come through other lanes
    const uint2 scales[2] = {rows.load_scales(0), rows.load_scales(1)};
    typename RowsOfWarp<Traits>::Raw raw[2];
    rows.load(0, raw[0]);
    // Both roles see every query and give it back, or phases could not be told apart. An item of
    // one block between this role's blocks was the other role's.
    const uint32_t of_item = (header.flags & kOddItem) != 0 ? 1 : 0;
    uint64_t(&query_full)[2] = shared.barriers.query_full;
    if ((header.flags & kFirstBlock) != 0 && of_item == seen) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        mbarrier_poll(shared_address(&query_full[half]), of_item ^ 1);
        mbarrier_arrive(shared_address(&shared.barriers.query_empty[half]));
      }
    }
    mbarrier_poll(shared_address(&query_full[0]), of_item);
    seen = of_item;

    // S^T = K Q^T, panel by panel; operands of two panels are in use.
    float s[kHeads / 2];
#pragma unroll
    for (float& x : s) x = 0.f;
    uint32_t a[2][16], tile = 0;
#pragma unroll
    for (int panel = 0; panel < 8; ++panel) {
      if (panel == 8 - kRing) {
        addresses_of(block + 2, addresses);
        next = rows.source_of(addresses);
      }
      if (panel < 7) {  // the next panel, while this one is converted
        copy_async_wait<kRing - 2>();
        __syncwarp();
        rows.load(panel + 1, raw[(panel + 1) & 1]);
      } else {
        __syncwarp();
      }
      rows.convert(panel, raw[panel & 1], scales, a[panel & 1]);
      if (panel % Traits::kPartPanels == 0) {
        const TilePart<Traits> part(block, panel / Traits::kPartPanels);
        tile = rows.tile + part.slot * sizeof(shared.rows[0]);
        if (part.before > 0) {
          mbarrier_poll(shared_address(&shared.barriers.empty[part.slot]), part.before & 1 ^ 1);
        }
      }
      if (panel == 4) mbarrier_poll(shared_address(&query_full[1]), of_item);
      rows.store(tile, panel % Traits::kPartPanels, a[panel & 1]);
      if (panel == 8 - kRing) rows.fetch_scales(addresses);
      // The copy of the panel kRing further on takes this one's place, which all lanes have read.
      if (panel < 8 - kRing) {
        rows.fetch(panel + kRing, here);
      } else {
        rows.fetch(panel + kRing - 8, next);
      }
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        RegisterProduct<kHeads>::run(
            s, a[panel & 1] + 4 * k,
            query + operand_offset(panel * Traits::kHeadPanelBytes + 32 * k));
      }
      wgmma_commit();
      wgmma_wait<1>();
      if (panel == 4) {
        mbarrier_arrive_if(shared_address(&shared.barriers.query_empty[0]),
                           (header.flags & kLastOfRole) != 0);
      }
    }
    wgmma_wait<0>();
    mbarrier_arrive_if(shared_address(&shared.barriers.query_empty[1]),
                       (header.flags & kLastOfRole) != 0);

#pragma unroll
    for (int r = 0; r < 2; ++r) {
      if (here.valid[r] && !rows.is_nan(scales[r])) continue;
#pragma unroll
      for (int i = 0; i < kHeads / 2; i += 4) {
        s[i + 2 * r] = s[i + 2 * r + 1] = here.valid[r] ? NAN : -INFINITY;
      }
    }
    // With two tiles, this block's last part lies where that of block - 2 lay: waited for above.
    if (Traits::kTileSlots > 2 * Traits::kTileParts && block > 1) wait_for_end_of(block - 2);
    share_maxima(shared, role, warp, lane, s);
    softmax(args, shared, block, header.flags, warp, lane, s);
    fence_proxy_async();
    mbarrier_arrive(shared_address(&shared.barriers.full[role]));
    here = next;
  }
  copy_async_wait<0>();
}

}  // namespace dsv4::nvidia::sm90_attend_heads
