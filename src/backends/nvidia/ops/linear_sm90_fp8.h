// Products of quantised x with FP8 weights on the FP8 tensor cores of sm_90.
//
// The order of every output, whatever the number of tokens, the tile and the grid:
//
//   K is cut into blocks of 128 columns. Inside a block four wgmma of 32 columns accumulate E4M3 x
//   E4M3 from zero in the tensor core; its sum times the scales of x and W, a power of two, is
//   added to an f32 total, in ascending order of the blocks; then one rounding.
//
// A tensor core keeps fewer bits of a sum than f32 (tests/ops/fp8_product.h states how many), so
// this is another order than that of linear.h, and less exact.
#pragma once
#include <cuda.h>
#include <cuda_runtime_api.h>

#include "backends/nvidia/ops/linear.h"

namespace dsv4::nvidia {

constexpr int kFp8BlockCols = 128;  ///< that share scales of x and W
constexpr int kFp8MaxTileTokens = 256;

/// How the blocks that multiply x make codes of it, where nobody has written them: what rms_norm or
/// inverse_rope would write, the same bits.
struct Fp8Maker {
  enum class Kind : uint8_t {
    kNone,     ///< x is codes and scales
    kNormed,   ///< x is bf16 that rms_norm would read
    kRotated,  ///< x is bf16 heads that inverse_rope would read
  };
  Kind kind = Kind::kNone;
  const void* weight = nullptr;        ///< [cols] bf16 of a norm, aligned to 16 bytes
  float eps = 0;                       ///< of a norm
  float floor = 0;                     ///< of a group's largest magnitude
  const float* frequencies = nullptr;  ///< [32] of the last 64 of every head
  const int32_t* positions = nullptr;  ///< [tokens]
  int32_t head_dim = 0;
  bool makes() const { return kind != Kind::kNone; }
};
constexpr int kFp8MadeTokens = 4;      ///< at most: every block makes all of x
constexpr int kFp8MadeCols = 7168;     ///< at most
constexpr int kFp8MadeValues = 8192;   ///< at most, of x and the weights of a norm
constexpr int kFp8MadeUnitCols = 256;  ///< x is a multiple of it, heads times a power of two
constexpr int kFp8MadeLeastUnits = 2;  ///< of a row

/// One product. Prepared x: codes in rows, scales [block of columns][scale_stride].
struct Fp8Item {
  CUtensorMap w_map, x_map, out_map;  ///< filled in by the launcher
  LinearWeight w;
  const void* x;  ///< codes; bf16 where `maker` says so, rows aligned to 16 bytes
  int64_t x_stride;
  Fp8Maker maker;
  const float* x_scale;
  int64_t x_scale_stride;  ///< row_scale_stride() of ops.h
  void* out;
  int64_t out_stride;
  int32_t tokens;
  int32_t first_tile;
  bool out_f32;
  bool out_mapped = false;     ///< out_map holds; filled in by the launcher
  float* out_scale = nullptr;  ///< out holds codes of the result in bf16: scales [block of 128 rows
                               ///< of W][out_scale_stride]
  int64_t out_scale_stride = 0;
};
constexpr int kMaxFp8Items = 16;
struct Fp8Batch {
  int32_t count = 0;
  int32_t most_blocks = 0;  ///< of threads; they walk over tiles
  int32_t tile_tokens = 0;  ///< that are copied for a tile; filled in by the launcher
  int32_t scale_pitch = 0;  ///< floats, of a block's scales of x in a stage; filled in, too
  Fp8Item items[kMaxFp8Items];
};

/// Weights are FP8 that sm90_takes() (linear_sm90.h).
void launch_linear_sm90_fp8(Fp8Batch& batch, cudaStream_t stream);

/// x [rows, cols] bf16 as E4M3 codes [rows, x_stride] and scales [cols / 128, scale_stride]:
/// columns up to a multiple of 128 are zero. `quantised`: the values are E4M3 numbers times a power
/// of two per 128 columns already, however small; otherwise numerics.md 4. A group of 128 columns
/// with an infinity or NaN becomes NaN.
struct Fp8PrepareParams {
  const uint16_t* x;
  int64_t x_stride;
  uint8_t* codes;
  int64_t code_stride;
  float* scale;
  int64_t scale_stride;
  int32_t rows, cols;
  bool quantised;
};
void launch_linear_sm90_fp8_prepare(const Fp8PrepareParams& params, cudaStream_t stream);

}  // namespace dsv4::nvidia
