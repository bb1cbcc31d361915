// Upper bounds of indexer scores with VPDPBUSD; byte tables need VBMI. See index_bounds.h.
//
// Layout    packed: [dim/4][16 kRegs] dwords of q' a group of up to 64 heads; start, factor
//           [heads]; errors
// Tiling    as VDPBF16PS (index_logits_avx512bf16.cc): lanes = heads, four dims of a key broadcast
#include "backends/cpu/ops/index_bounds.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "backends/cpu/ops/index_logits_wide-inl.h"
#include "core/numbers.h"

namespace dsv4::cpu {
namespace {

constexpr float kKeyUnit = 4;
constexpr int kZeroCode = 128;  // a key's codes are unsigned
constexpr float kMaxE4m3 = 448;
constexpr int kMaxCode = 127;    // of a head
constexpr double kSlack = 1.01;  // roundings of the bounds themselves

int padded(int heads) {
  return (heads + kIndexLanes - 1) / kIndexLanes * kIndexLanes;
}

// error = base + by_length |k'| + by_distance |k - k'|
struct Errors {
  float base, by_length, by_distance;
};

struct Packed {
  int8_t* codes;
  int32_t* start;  // minus what kZeroCode adds to a product
  float* factor;   // weight times the units of key and head
  Errors* errors;

  Packed(std::byte* memory, int heads, int dim)
      : codes(reinterpret_cast<int8_t*>(memory)),
        start(reinterpret_cast<int32_t*>(codes + padded(heads) * dim)),
        factor(reinterpret_cast<float*>(start + padded(heads))),
        errors(reinterpret_cast<Errors*>(factor + padded(heads))) {}
};

// out [n, n] = x^T x for x [rows, n]; n is a multiple of 16.
void gram(const float* x, int rows, int n, float* out) {
  constexpr int kTile = 8;
  for (int i = 0; i < n; i += kTile)
    for (int j = 0; j < n; j += kIndexLanes) {
      __m512 acc[kTile];
#pragma GCC unroll 8
      for (auto& a : acc) a = _mm512_setzero_ps();
      for (int r = 0; r < rows; ++r) {
        const __m512 columns = _mm512_loadu_ps(x + r * n + j);
#pragma GCC unroll 8
        for (int t = 0; t < kTile; ++t) {
          acc[t] = _mm512_fmadd_ps(_mm512_set1_ps(x[r * n + i + t]), columns, acc[t]);
        }
      }
#pragma GCC unroll 8
      for (int t = 0; t < kTile; ++t) _mm512_storeu_ps(out + (i + t) * n + j, acc[t]);
    }
}

// At least the largest singular value of x [rows, n]; not finite where x is not.
double spectral_bound(const float* x, int rows, int n, float* a, float* b) {
  gram(x, rows, n, a);
  float trace = 0;
  for (int i = 0; i < n; ++i) trace += a[i * n + i];
  if (trace == 0) return 0;
  const __m512 inverse = _mm512_set1_ps(1 / trace);  // powers stay in range
  for (int i = 0; i < n * n; i += 16) {
    _mm512_storeu_ps(a + i, _mm512_mul_ps(_mm512_loadu_ps(a + i), inverse));
  }
  gram(a, n, n, b);
  gram(b, n, n, a);
  __m512 squares = _mm512_setzero_ps();  // the trace of the eighth power
  for (int i = 0; i < n * n; i += 16) {
    const __m512 values = _mm512_loadu_ps(a + i);
    squares = _mm512_fmadd_ps(values, values, squares);
  }
  return std::sqrt(trace * std::pow(_mm512_reduce_add_ps(squares), 0.125));
}

inline __m512 load_bf16(const uint16_t* values) {
  const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(values));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}

bool pack(const void* q, int64_t stride, const float* weights, int heads, int dim,
          std::byte* memory, std::byte* scratch) {
  const int n = padded(heads);
  const Packed packed(memory, heads, dim);
  std::memset(memory, 0, static_cast<size_t>(bound_packed_bytes(heads, dim)));
  auto* exact = reinterpret_cast<float*>(scratch);  // A [dim][heads]
  float* error = exact + n * dim;                   // A - A'
  float *a = error + n * dim, *b = a + n * n;
  if (n != heads) std::memset(scratch, 0, static_cast<size_t>(2 * n * dim) * sizeof(float));
  const __m512i head_lanes =
      _mm512_mullo_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
                         _mm512_set1_epi32(n));
  double sum_weights = 0, magnitude = 0;  // sums of |w| and |w| |q_h|
  for (int h = 0; h < heads; ++h) {
    const int group = h / kGroupOfHeads * kGroupOfHeads;
    const int lanes = std::min(n - group, kGroupOfHeads);
    const auto* row = static_cast<const uint16_t*>(q) + h * stride;
    __m512 maxima = _mm512_setzero_ps(), squares = _mm512_setzero_ps();
    for (int d = 0; d < dim; d += 16) {
      const __m512 value = load_bf16(row + d);
      maxima = _mm512_max_ps(maxima, _mm512_abs_ps(value));
      squares = _mm512_fmadd_ps(value, value, squares);
    }
    const float largest = _mm512_reduce_max_ps(maxima), square = _mm512_reduce_add_ps(squares);
    if (!(square <= 0x1p100f)) return false;  // also a NaN
    // A smaller head has codes of zero, and all of it for an error.
    const float unit =
        largest >= 0x1p-60f ? std::exp2(std::ceil(std::log2(largest / kMaxCode))) : 0;
    const float inverse = unit == 0 ? 0 : 1 / unit;
    const __m512 root = _mm512_set1_ps(std::sqrt(std::fabs(weights[h])));
    int8_t* codes = packed.codes + group * dim + (h - group) * 4;
    __m512i sum = _mm512_setzero_si512();
    for (int d = 0; d < dim; d += 16) {
      const __m512 value = load_bf16(row + d);
      const __m512i code = _mm512_cvtps_epi32(_mm512_mul_ps(value, _mm512_set1_ps(inverse)));
      sum = _mm512_add_epi32(sum, code);
      alignas(16) int32_t quads[4];
      _mm_store_si128(reinterpret_cast<__m128i*>(quads), _mm512_cvtepi32_epi8(code));
      for (int i = 0; i < 4; ++i) std::memcpy(codes + (d / 4 + i) * (lanes * 4), quads + i, 4);
      const __m512 off = _mm512_fnmadd_ps(_mm512_cvtepi32_ps(code), _mm512_set1_ps(unit), value);
      _mm512_i32scatter_ps(exact + d * n + h, head_lanes, _mm512_mul_ps(root, value), 4);
      _mm512_i32scatter_ps(error + d * n + h, head_lanes, _mm512_mul_ps(root, off), 4);
    }
    packed.start[h] = -kZeroCode * _mm512_reduce_add_epi32(sum);
    packed.factor[h] = weights[h] * unit * kKeyUnit;
    sum_weights += std::fabs(weights[h]);
    magnitude += std::fabs(weights[h]) * std::sqrt(square);
  }
  const double longest_key = kMaxE4m3 * std::sqrt(dim);
  const double root = kSlack * std::sqrt(sum_weights);
  const double by_rounding = 2 * (dim + heads + 8) * 0x1p-24 * magnitude * longest_key;
  *packed.errors = {
      .base = static_cast<float>(kSlack * by_rounding + 0x1p-100),
      .by_length = static_cast<float>(kSlack * root * spectral_bound(error, dim, n, a, b)),
      .by_distance = static_cast<float>(kSlack * root * spectral_bound(exact, dim, n, a, b))};
  constexpr float kLarge = 0x1p100f;  // no NaN compares
  return packed.errors->by_length <= kLarge && packed.errors->by_distance <= kLarge &&
         magnitude * longest_key <= double{kLarge};
}

/// Of a magnitude code, for two registers each: round(value / kKeyUnit), and what that is off in
/// units of 1 / kOffUnits, rounded up.
constexpr int kOffUnits = 32;
struct KeyTables {
  alignas(64) uint8_t rounded[128], off[128];
  KeyTables() {
    for (int m = 0; m < 128; ++m) {
      const float value = m == 127 ? 0 : e4m3_to_f32(static_cast<uint8_t>(m));  // 127: a NaN
      const float code = std::nearbyint(value / kKeyUnit);
      rounded[m] = static_cast<uint8_t>(code);
      off[m] = static_cast<uint8_t>(std::ceil(std::fabs(value - code * kKeyUnit) * kOffUnits));
    }
  }
};

void load_keys(const KeyRows& keys, int dim, ByteKeys& out) {
  static const KeyTables tables;
  // In registers: what is stored may be a table for all the compiler knows.
  const __m512i rounded_low = _mm512_load_si512(tables.rounded);
  const __m512i rounded_high = _mm512_load_si512(tables.rounded + 64);
  const __m512i off_low = _mm512_load_si512(tables.off);
  const __m512i off_high = _mm512_load_si512(tables.off + 64);
  uint8_t* const out_codes = out.codes;
  const __m512i zero = _mm512_set1_epi8(static_cast<char>(kZeroCode));
  alignas(64) float lengths[kKeyBlock * kIndexLanes], distances[kKeyBlock * kIndexLanes];
  for (int i = 0; i < keys.count; ++i) {
    const auto* codes = reinterpret_cast<const uint8_t*>(keys.rows[i].values);
    __m512i length = _mm512_setzero_si512(), distance = _mm512_setzero_si512();
    for (int d = 0; d < dim; d += 64) {
      const __m512i x = _mm512_loadu_si512(codes + d);
      const __m512i rounded = _mm512_permutex2var_epi8(rounded_low, x, rounded_high);
      const __m512i off = _mm512_permutex2var_epi8(off_low, x, off_high);
      length = dot4(length, rounded, rounded);  // no code needs the sign bit
      distance = dot4(distance, off, off);
      _mm512_storeu_si512(out_codes + i * dim + d,
                          _mm512_mask_sub_epi8(_mm512_add_epi8(zero, rounded),
                                               _mm512_movepi8_mask(x), zero, rounded));
    }
    _mm512_store_ps(lengths + i * kIndexLanes, _mm512_cvtepi32_ps(length));
    _mm512_store_ps(distances + i * kIndexLanes, _mm512_cvtepi32_ps(distance));
    std::memcpy(out.scale + i, keys.rows[i].scales, sizeof(float));
  }
  tree_sums<Lanes16>(lengths, keys.count, out.length);
  tree_sums<Lanes16>(distances, keys.count, out.distance);
  const auto roots = [](float* squares, float unit) {
    for (int i = 0; i < kKeyBlock; i += 16) {
      const __m512 root = _mm512_sqrt_ps(_mm512_loadu_ps(squares + i));
      _mm512_storeu_ps(squares + i, _mm512_mul_ps(root, _mm512_set1_ps(unit)));
    }
  };
  roots(out.length, kKeyUnit);
  roots(out.distance, 1.0f / kOffUnits);
}

// Weighted sums of kKeys keys over the heads of one group. Keys past the count give values that
// nobody reads.
template <int kKeys, int kRegs>
inline void bound_tile(const uint32_t* q, const int32_t* start, const float* factor,
                       const uint32_t* k, int quads, bool first, float* lanes) {
  __m512i acc[kKeys][kRegs];
#pragma GCC unroll 8
  for (int i = 0; i < kKeys; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < kRegs; ++j) acc[i][j] = _mm512_loadu_si512(start + 16 * j);
  for (int d = 0; d < quads; ++d) {
    __m512i x[kRegs];
#pragma GCC unroll 4
    for (int j = 0; j < kRegs; ++j) x[j] = _mm512_loadu_si512(q + (d * kRegs + j) * 16);
#pragma GCC unroll 8
    for (int i = 0; i < kKeys; ++i) {
      const __m512i key = _mm512_set1_epi32(static_cast<int>(k[i * quads + d]));
#pragma GCC unroll 4
      for (int j = 0; j < kRegs; ++j) acc[i][j] = dot4(acc[i][j], key, x[j]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kKeys; ++i) {
    __m512 sum = first ? _mm512_setzero_ps() : _mm512_loadu_ps(lanes + i * 16);
#pragma GCC unroll 4
    for (int j = 0; j < kRegs; ++j) {
      const __m512i positive = _mm512_max_epi32(_mm512_setzero_si512(), acc[i][j]);
      sum = _mm512_fmadd_ps(_mm512_loadu_ps(factor + 16 * j), _mm512_cvtepi32_ps(positive), sum);
    }
    _mm512_storeu_ps(lanes + i * 16, sum);
  }
}

void bound(const std::byte* memory, const ByteKeys& keys, int count, int heads, int dim,
           float* lanes, float* upper, const KeyRows* next) {
  const Packed packed(const_cast<std::byte*>(memory), heads, dim);
  const auto* q = reinterpret_cast<const uint32_t*>(packed.codes);
  const auto* k = reinterpret_cast<const uint32_t*>(keys.codes);
  const int quads = dim / 4;
  over_groups(heads, count, next, [&]<int kKeys, int kRegs>(int h, int j) {
    bound_tile<kKeys, kRegs>(q + h * quads, packed.start + h, packed.factor + h, k + j * quads,
                             quads, h == 0, lanes + j * kIndexLanes);
  });
  alignas(64) float sums[kKeyBlock];
  tree_sums<Lanes16>(lanes, count, sums);
  const __m512 base = _mm512_set1_ps(packed.errors->base);
  const __m512 by_length = _mm512_set1_ps(packed.errors->by_length);
  const __m512 by_distance = _mm512_set1_ps(packed.errors->by_distance);
  const __m512 sign = _mm512_set1_ps(-0.0f);
  for (int i = 0; i < count; i += 16) {
    const __m512 scale = _mm512_loadu_ps(keys.scale + i);
    __m512 error = _mm512_fmadd_ps(by_length, _mm512_loadu_ps(keys.length + i), base);
    error = _mm512_fmadd_ps(by_distance, _mm512_loadu_ps(keys.distance + i), error);
    // A negative scale makes the lower bound the upper one.
    error = _mm512_or_ps(error, _mm512_and_ps(scale, sign));
    const __m512 bounds = _mm512_mul_ps(scale, _mm512_add_ps(_mm512_load_ps(sums + i), error));
    const auto lanes_left = static_cast<__mmask16>((uint32_t{1} << std::min(count - i, 16)) - 1);
    _mm512_mask_storeu_ps(upper + i, lanes_left, bounds);
  }
}

constexpr IndexBoundKernel kKernel{.pack = pack, .load_keys = load_keys, .bound = bound};

}  // namespace

const IndexBoundKernel& index_bound_avx512vbmi() {
  return kKernel;
}

}  // namespace dsv4::cpu
