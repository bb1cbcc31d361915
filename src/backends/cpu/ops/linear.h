// Dense products of the CPU: the canonical order of every sum, and what a candidate implements.
//
// One order for every output. For every M, tile, thread count and candidate the bits are the same,
// because each output y[m][n] is this, and nothing else (tests compare with ==):
//
//   K is padded with zeros to a multiple of 128 and cut into blocks of 1024. Inside a block the
//   columns form a sequence p = 0, 1, 2, ... that depends on the kinds of x and W (`Lanes`):
//     acc[p % 16] = fma(w[p], x[p], acc[p % 16])        16 accumulators, from zero, p ascending
//     block sum   = tree (l, l+8), (l, l+4), (l, l+2), (l, l+1) over acc
//     y           = block sums added left to right, then one rounding to the type of `out`
//   FP4: acc starts from zero every 128 columns, and total[l] = fma(acc[l], scale, total[l]) with
//   the scale of the 32 columns that share lane l; the tree runs over total.
//   Everything with flush-to-zero and denormals-are-zero, as VDPBF16PS does.
//
// The sequences follow from the instructions: VDPBF16PS is fma(even, fma(odd, acc)) on 16 pairs,
// bit for bit (docs/kernels/linear.md), and the permutations of FP8 and FP4 are what the cheapest
// conversion yields. Between any two candidates only NaN payloads may differ.
#pragma once
#include <algorithm>
#include <cstdint>

#include "backends/cpu/candidates.h"
#include "core/checked_math.h"
#include "ops/ops.h"

namespace dsv4::cpu {

constexpr int kLinearGroup = 128;   ///< columns of a quantisation group; K is padded to it
constexpr int kLinearBlock = 1024;  ///< columns summed in lanes before the tree
constexpr int kLinearLanes = 16;    ///< accumulators of an output
constexpr int kFp4ScaleGroup = 32;  ///< columns of an FP4 scale
constexpr int kLinearTileRows = 4;  ///< rows of x interleaved for register tiles

/// Order of the products of one output, by the kinds of its operands.
enum class Lanes : uint8_t {
  kBf16,  ///< bf16 x bf16, columns in pairs as stored
  kFp8,   ///< bf16 x E4M3 with its scale, exact in bf16: pairs in the order of VPUNPCKxBW
  kFp4,   ///< bf16 x E2M1: pairs of nibble t of neighbouring 16-bit words, t = 0..3
  kF32,   ///< f32 x anything, or bf16 x f32: columns as stored, lane = column % 16
};

constexpr Lanes linear_lanes(DType x, DType w) {
  if (x == DType::kF32 || w == DType::kF32) return Lanes::kF32;
  if (w == DType::kF8E4M3) return Lanes::kFp8;
  return w == DType::kF4E2M1 ? Lanes::kFp4 : Lanes::kBf16;
}

/// Column, within 128, of place p of the sequence.
constexpr int linear_column(Lanes lanes, int p) {
  if (lanes == Lanes::kF32) return p;
  // One step of 32 places is a VDPBF16PS: the odd elements of 16 pairs, then the even ones.
  const int step = p / 32, lane = p % 16, odd = p % 32 < 16 ? 1 : 0;
  const int element = 2 * lane + odd;
  if (lanes == Lanes::kBf16) return 32 * step + element;
  // Steps come in twos: the low, then the high 8 bytes of each 16 of 64 bytes.
  if (lanes == Lanes::kFp8) return 64 * (step / 2) + element / 8 * 16 + step % 2 * 8 + element % 8;
  return 4 * element + step;
}

/// Smallest and largest exponent fields of the non-zero numbers of a row, 255 for inf and NaN; an
/// all-zero row has low > high. Tells when FP4 scales may be folded into the weights (linear.md).
struct ExponentRange {
  uint8_t low = 255;
  uint8_t high = 0;
};

/// Rows [row_begin, row_begin + rows) of x as a candidate's kernels read them. Rows are interleaved
/// in tiles of `tile_rows` (1: not), K in blocks; see `linear_tile_offset`.
struct PreparedX {
  ConstTensor x;
  bool quantise = false;
  Lanes lanes = Lanes::kF32;
  int tile_rows = 1;
  int64_t row_begin = 0;
  int64_t rows = 0;
  int64_t padded_rows = 0;         ///< multiple of tile_rows; the surplus is zero
  int64_t padded_cols = 0;         ///< multiple of kLinearGroup; the surplus is zero
  std::byte* data = nullptr;       ///< [padded_rows * padded_cols] of bf16 or f32
  ExponentRange* range = nullptr;  ///< [padded_rows], written for Lanes::kFp4
};

/// Elements from PreparedX::data to block `k0` (multiple of kLinearBlock) of the tile that starts
/// with row m (multiple of tile_rows). Inside follow [step][tile_rows][elements of a step].
inline int64_t linear_tile_offset(const PreparedX& x, int64_t m, int64_t k0) {
  const int64_t block = std::min<int64_t>(kLinearBlock, x.padded_cols - k0);
  return k0 * x.padded_rows + m * block;
}

/// One tile of outputs: rows [m_begin, m_end) of `x` (counted from x.row_begin; m_begin is a
/// multiple of tile_rows) and rows [n_begin, n_end) of `w`. Row 0 of `out` belongs to row 0 of `x`.
struct LinearTile {
  const PreparedX* x;
  const Weight* w;
  Tensor out;
  int64_t m_begin, m_end;
  int64_t n_begin, n_end;
  std::byte* scratch;  ///< LinearKernels::scratch_bytes, of the calling thread
};

/// How a problem is cut: tiles of up to m_block x n_block outputs.
struct LinearBlocking {
  int64_t m_block;
  int64_t n_block;
};

/// What a candidate brings; `run_linear` does the rest. Functions run with denormals flushed.
struct LinearKernels {
  /// 1 or kLinearTileRows, for `rows` rows of x against w.
  int (*tile_rows)(const Weight& w, Lanes lanes, int64_t rows);
  /// Tiles for `rows` rows against w in a call with `total_rows` rows of W in all.
  LinearBlocking (*blocking)(const PreparedX& x, const Weight& w, int64_t total_rows,
                             int num_threads);
  int64_t element_bytes_bf16;  ///< bytes of a prepared element of bf16 lanes: 2, or 4 if widened
  int64_t scratch_bytes;       ///< of one thread, for any problem
  /// Fills rows [m_begin, m_end) of `x`, the padding rows of their tiles included.
  void (*prepare)(const PreparedX& x, int64_t m_begin, int64_t m_end);
  void (*compute)(const LinearTile& tile);
};

void run_linear(const LinearKernels& kernels, const LinearParams& params, const OpContext& context);

extern const LinearKernels kLinearReference;
extern const LinearKernels kLinearAvx2;
extern const LinearKernels kLinearAvx512;
extern const LinearKernels kLinearAvx512Bf16;

}  // namespace dsv4::cpu
