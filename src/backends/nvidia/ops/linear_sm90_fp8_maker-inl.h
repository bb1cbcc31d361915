// x of few tokens as codes in shared memory, by the block that multiplies it (Fp8Maker): a launch
// less in front of a product. Included by the kernel only, which is compiled without contraction.
#pragma once
#include "backends/gpu/row.h"
#include "backends/nvidia/arch/sm80/instructions.h"
#include "backends/nvidia/arch/sm90/bulk.h"
#include "backends/nvidia/arch/sm90/memory.h"
#include "backends/nvidia/arch/sm90/sync.h"
#include "backends/nvidia/ops/linear_sm90_fp8-inl.h"
#include "backends/nvidia/ops/linear_sm90_fp8.h"

namespace dsv4::nvidia {

template <bool kMakes>
struct Fp8Made {
  static constexpr int kBlocks = kFp8MadeCols / kFp8BlockCols;
  static constexpr int kRows = 8;  ///< that a swizzle takes together
  static_assert(kFp8MadeTokens <= kRows);
  /// As the copy engine would bring them: 128 columns after the other, 128 bytes a token, with room
  /// for eight. Packed they are slower (docs/kernels/layer_step_nvidia.md).
  alignas(1024) uint8_t codes[kBlocks][kRows * kFp8BlockCols];
  float scales[kBlocks][kRows];
  alignas(16) uint16_t x[kFp8MadeValues];              ///< rows, behind them weights of a norm
  float factors[kFp8MadeTokens];                       ///< of norms
  alignas(16) gpu::CosSin angles[kFp8MadeTokens][32];  ///< of rotations
  uint64_t landed;                                     ///< x and weights are there
};
template <>
struct Fp8Made<false> {};

/// By the warps that multiply. A warp has every fourth unit of 256 columns, 8 columns a lane. Short
/// and in few copies: it runs once a launch, and its code comes from memory.
class Fp8RowMaker {
 public:
  __device__ __forceinline__ Fp8RowMaker(const Fp8Item& item, int warp, Fp8Made<true>& made)
      : item_(item),
        maker_(item.maker),
        warp_(warp),
        cols_(item.w.cols),
        tokens_(item.tokens),
        head_units_(item.maker.head_dim / kFp8MadeUnitCols),
        made_(made) {}

  /// `turn` counts the inputs of a launch.
  __device__ __forceinline__ void run(int turn) {
    const bool norms = maker_.kind == Fp8Maker::Kind::kNormed;
    if (turn > 0) meet();  // the one before has been read
    if (threadIdx.x == 0) {
      const auto row_bytes = static_cast<uint32_t>(cols_) * 2;
      const uint32_t to = sm80::shared_address(made_.x),
                     landed = sm80::shared_address(&made_.landed);
      sm90::mbarrier_arrive_expecting(landed, row_bytes * (tokens_ + (norms ? 1 : 0)));
      if (norms) sm90::copy_bytes(to + tokens_ * row_bytes, maker_.weight, row_bytes, landed);
      if (turn == 0) sm90::wait_for_kernels_before();
      const auto* row = static_cast<const uint16_t*>(item_.x);
      for (int token = 0; token < tokens_; ++token, row += item_.x_stride)
        sm90::copy_bytes(to + token * row_bytes, row, row_bytes, landed);
    }
    __syncwarp();
    if (!norms) find_angles();
    sm90::mbarrier_wait(sm80::shared_address(&made_.landed), turn % 2);
    if (norms) find_factors();
    meet();
    norms ? make<true>() : make<false>();
    sm90::fence_proxy_async();  // of codes, and of x that the next copy overwrites
    meet();
  }

 private:
  static constexpr int kWarps = 4, kThreads = 32 * kWarps;
  static constexpr int kLaneCols = kFp8MadeUnitCols / 32;
  static_assert(kLaneCols == 8);     // CodeColumns
  static constexpr int kAtOnce = 2;  ///< units

  __device__ __forceinline__ static void meet() { sm90::barrier_sync(1, kThreads); }

  /// Before the kernel before has ended: positions stem from kernels further back, and from L2.
  __device__ __forceinline__ void find_angles() const {
    const int lane = gpu::group_lane();
#pragma unroll 1
    for (int token = warp_; token < tokens_; token += kWarps) {
      const gpu::CosSin at =
          gpu::rope_angle(__ldcg(maker_.positions + token), maker_.frequencies[lane]);
      made_.angles[token][lane] = {at.cos, -at.sin};
    }
  }

  /// The sums of rms_norm, in its order.
  __device__ __forceinline__ void find_factors() const {
#pragma unroll 1
    for (int token = warp_; token < tokens_; token += kWarps) {
      const auto* pairs =
          reinterpret_cast<const uint32_t*>(made_.x + token * cols_) + gpu::group_lane();
      gpu::SquareSums sums;
#pragma unroll 8
      for (int i = 0; i < cols_ / gpu::kVectorElems; ++i) {
        const uint32_t pair = pairs[32 * i];
        sums.add({gpu::even_of(pair), gpu::odd_of(pair)});
      }
      const float factor = gpu::inverse_rms(sums.total(), cols_, maker_.eps);
      if (gpu::group_lane() == 0) made_.factors[token] = factor;
    }
  }

  __device__ __forceinline__ static CodeColumns load(const uint16_t* from) {
    return CodeColumns::of(*reinterpret_cast<const uint4*>(from));
  }

  __device__ __forceinline__ void norm(int token, int col, CodeColumns& values) const {
    const CodeColumns weights = load(made_.x + tokens_ * cols_ + col);
    const float factor = made_.factors[token];
#pragma unroll
    for (int k = 0; k < kLaneCols; k += 2) {
      const uint32_t pair = gpu::pack_bf16(values.x[k] * factor * weights.x[k],
                                           values.x[k + 1] * factor * weights.x[k + 1]);
      values.x[k] = gpu::even_of(pair);
      values.x[k + 1] = gpu::odd_of(pair);
    }
  }
  /// Heads end with a unit, and their tails are its last 64 columns.
  __device__ __forceinline__ void rotate(int token, int unit, CodeColumns& values) const {
    constexpr int kTail = 64, kFirst = (kFp8MadeUnitCols - kTail) / kLaneCols;
    const int lane = gpu::group_lane();
    if (((unit + 1) & (head_units_ - 1)) != 0 || lane < kFirst) return;
    values.rotate(made_.angles[token] + (lane - kFirst) * (kLaneCols / 2));
  }

  template <bool kNorms>
  __device__ __forceinline__ void make() const {
    static_assert(kWarps <= 2 * kFp8MadeLeastUnits);
    const int lane = gpu::group_lane(), units = cols_ / kFp8MadeUnitCols;
    int token = 0, unit = warp_;
#pragma unroll 1
    while (true) {
      int tokens[kAtOnce], places[kAtOnce];
      CodeColumns values[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
#pragma unroll
        for (int turn = 0; turn < 2; ++turn) {
          const bool ends = unit >= units;
          unit -= ends ? units : 0;
          token += ends ? 1 : 0;
        }
        tokens[i] = token;
        places[i] = unit;
        unit += kWarps;
      }
      if (tokens[0] >= tokens_) break;
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        values[i] = load(made_.x + min(tokens[i], tokens_ - 1) * cols_ +
                         places[i] * kFp8MadeUnitCols + 8 * lane);
      }
      uint32_t largest[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int from = min(tokens[i], tokens_ - 1);
        if constexpr (kNorms) {
          norm(from, places[i] * kFp8MadeUnitCols + 8 * lane, values[i]);
        } else {
          rotate(from, places[i], values[i]);
        }
        largest[i] = values[i].larger(0);
      }
#pragma unroll
      for (int distance = 8; distance > 0; distance /= 2) {  // 16 lanes hold a group
#pragma unroll
        for (uint32_t& bits : largest)
          bits = max(bits, __shfl_xor_sync(0xffffffffu, bits, distance));
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const GroupScale scale = group_scale(largest[i], maker_.floor);
        const uint2 codes = values[i].codes(scale);
        if (tokens[i] >= tokens_) break;
        const int block = places[i] * 2 + lane / 16, piece = lane % 16 / 2 ^ tokens[i];
        *reinterpret_cast<uint2*>(made_.codes[block] + tokens[i] * kFp8BlockCols + piece * 16 +
                                  lane % 2 * 8) = codes;
        if (lane % 16 == 0) made_.scales[block][tokens[i]] = scale.value();
      }
    }
  }

  const Fp8Item& item_;
  // In registers: constants at an index that is not one take longer than all else.
  const Fp8Maker maker_;
  const int warp_, cols_, tokens_, head_units_;
  Fp8Made<true>& made_;
};

}  // namespace dsv4::nvidia
