// Sixteen floats as one value, and the few functions that row-wise kernels need. One source for
// every ISA: compiled with DSV4_ROWWISE_ISA (a namespace) and DSV4_ROWWISE_VECTOR_BYTES (16, 32 or
// 64: the machine's register). Bits do not depend on either: there is no fused multiply-add (the
// tree is compiled with -ffp-contract=off, and no intrinsic is used), and sums have a fixed shape:
// lane l of accumulator a takes the elements 16 (4 i + a) + l, accumulators are added as
// (0 + 1) + (2 + 3), lanes by (l, l + 8), (l, l + 4), (l, l + 2), (l, l + 1).
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <utility>

namespace dsv4::cpu::DSV4_ROWWISE_ISA {

#define DSV4_INLINE inline __attribute__((always_inline))
// For the kernels that the table names: every lambda below them becomes part of their body. One
// that stays out of line would read its captures through memory, and again after every store.
#define DSV4_KERNEL __attribute__((flatten))

constexpr int64_t kLanes = 16;
constexpr size_t kPartBytes = DSV4_ROWWISE_VECTOR_BYTES;
constexpr size_t kParts = 64 / kPartBytes;
constexpr size_t kPartLanes = kPartBytes / 4;

// A struct of registers, not one 64-byte vector type: g++ keeps vectors wider than a register in
// memory between any two operations.
typedef float FloatPart __attribute__((vector_size(kPartBytes)));
typedef uint32_t BitsPart __attribute__((vector_size(kPartBytes)));
typedef int32_t MaskPart __attribute__((vector_size(kPartBytes)));
typedef uint16_t WordPart __attribute__((vector_size(kPartBytes)));  // halves of the lanes
struct Floats {
  FloatPart part[kParts];
};
struct Bits {
  BitsPart part[kParts];
};
struct Mask {
  MaskPart part[kParts];
};

// Out{{f(0), f(1), ...}} over the parts: pack expansion instead of a loop, so that nothing depends
// on the unroller.
template <typename Out, typename F, size_t... I>
DSV4_INLINE Out from_parts(F f, std::index_sequence<I...>) {
  return Out{{f(I)...}};
}
template <typename Out, typename F>
DSV4_INLINE Out from_parts(F f) {
  return from_parts<Out>(f, std::make_index_sequence<kParts>{});
}
// f(0), f(1), ... over the parts.
template <typename F, size_t... I>
DSV4_INLINE void for_parts(F f, std::index_sequence<I...>) {
  (f(I), ...);
}
#define DSV4_PARTS(Out, expression)              \
  from_parts<Out>([&]([[maybe_unused]] size_t i) \
                      __attribute__((always_inline)) { return (expression); })

// ---- elementwise

DSV4_INLINE Floats operator+(const Floats& a, const Floats& b) {
  return DSV4_PARTS(Floats, a.part[i] + b.part[i]);
}
DSV4_INLINE Floats operator-(const Floats& a, const Floats& b) {
  return DSV4_PARTS(Floats, a.part[i] - b.part[i]);
}
DSV4_INLINE Floats operator*(const Floats& a, const Floats& b) {
  return DSV4_PARTS(Floats, a.part[i] * b.part[i]);
}
DSV4_INLINE Floats operator/(const Floats& a, const Floats& b) {
  return DSV4_PARTS(Floats, a.part[i] / b.part[i]);
}
DSV4_INLINE Floats broadcast(float value) {
  return DSV4_PARTS(Floats, value - FloatPart{});
}
DSV4_INLINE Mask operator<(const Floats& a, const Floats& b) {
  return DSV4_PARTS(Mask, (MaskPart)(a.part[i] < b.part[i]));
}
DSV4_INLINE Floats select(const Mask& mask, const Floats& a, const Floats& b) {
  return DSV4_PARTS(Floats, mask.part[i] ? a.part[i] : b.part[i]);
}
// A NaN in `b` is kept (the comparison fails), one in `a` is not: pass the data as `b`.
DSV4_INLINE Floats min(const Floats& a, const Floats& b) {
  return select(a < b, a, b);
}
DSV4_INLINE Floats max(const Floats& a, const Floats& b) {
  return select(b < a, a, b);
}

DSV4_INLINE Bits bits_of(const Floats& a) {
  return DSV4_PARTS(Bits, (BitsPart)a.part[i]);
}
DSV4_INLINE Floats floats_of(const Bits& a) {
  return DSV4_PARTS(Floats, (FloatPart)a.part[i]);
}
DSV4_INLINE Bits operator+(const Bits& a, const Bits& b) {
  return DSV4_PARTS(Bits, a.part[i] + b.part[i]);
}
DSV4_INLINE Bits operator-(const Bits& a, const Bits& b) {
  return DSV4_PARTS(Bits, a.part[i] - b.part[i]);
}
DSV4_INLINE Bits operator&(const Bits& a, const Bits& b) {
  return DSV4_PARTS(Bits, a.part[i] & b.part[i]);
}
DSV4_INLINE Bits operator|(const Bits& a, const Bits& b) {
  return DSV4_PARTS(Bits, a.part[i] | b.part[i]);
}
DSV4_INLINE Bits operator>>(const Bits& a, int count) {
  return DSV4_PARTS(Bits, a.part[i] >> static_cast<uint32_t>(count));
}
DSV4_INLINE Bits operator<<(const Bits& a, int count) {
  return DSV4_PARTS(Bits, a.part[i] << static_cast<uint32_t>(count));
}
DSV4_INLINE Bits broadcast_bits(uint32_t value) {
  return DSV4_PARTS(Bits, BitsPart{} + value);
}
DSV4_INLINE Bits select(const Mask& mask, const Bits& a, const Bits& b) {
  return DSV4_PARTS(Bits, mask.part[i] ? a.part[i] : b.part[i]);
}

DSV4_INLINE Floats magnitude(const Floats& a) {
  return floats_of(bits_of(a) & broadcast_bits(0x7fffffffu));
}
// Magnitude of the first, sign of the second.
DSV4_INLINE Floats with_sign(const Floats& a, const Floats& sign) {
  return floats_of(bits_of(a) | (bits_of(sign) & broadcast_bits(0x80000000u)));
}
DSV4_INLINE Mask is_nan(const Floats& a) {
  return DSV4_PARTS(Mask, (MaskPart)(a.part[i] != a.part[i]));
}

// ---- memory. `Whole` is sixteen elements; `First{n}` the first n < 16, the rest reads as zero and
// ---- is not touched.

struct Whole {
  static constexpr int64_t count = kLanes;  // NOLINT: named as in First, for templates over both
};
struct First {
  int64_t count;
};

template <typename F>
DSV4_INLINE void for_vectors(int64_t count, F f) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) f(i, Whole{});
  if (i < count) f(i, First{count - i});
}

// One register at a time: g++ copies a struct of several through smaller pieces on the stack, and
// the loads that follow wait for all of them.
template <typename Register>
DSV4_INLINE Register read(const void* from) {
  Register out;
  std::memcpy(&out, from, sizeof(out));
  return out;
}
template <typename Register>
DSV4_INLINE void write(void* to, const Register& value) {
  std::memcpy(to, &value, sizeof(value));
}

DSV4_INLINE Floats load(const float* from, Whole) {
  return DSV4_PARTS(Floats, read<FloatPart>(from + i * kPartLanes));
}
DSV4_INLINE void store(float* to, const Floats& value, Whole) {
  for_parts([&](size_t i) { write(to + i * kPartLanes, value.part[i]); },
            std::make_index_sequence<kParts>{});
}

// bf16 in memory: runs of at least 16 bytes (8-byte vectors are taken apart by g++), each of one or
// two parts. Widening interleaves with zeros, narrowing takes the upper halves: one permute each.
constexpr size_t kRunBytes = kPartBytes / 2 < 16 ? 16 : kPartBytes / 2;
constexpr size_t kRunElems = kRunBytes / 2;
constexpr size_t kRunParts = kRunElems / kPartLanes;
constexpr size_t kRuns = kLanes / kRunElems;
typedef uint16_t Run __attribute__((vector_size(kRunBytes)));
struct Runs {
  Run run[kRuns];
};

template <size_t kOffset, size_t... I>
DSV4_INLINE FloatPart widen(const Run& run, std::index_sequence<I...>) {
  return (FloatPart)__builtin_shufflevector(run, Run{},
                                            (I % 2 == 0 ? kRunElems : kOffset + I / 2)...);
}
template <size_t... P>
DSV4_INLINE Floats widen(const Runs& runs, std::index_sequence<P...>) {
  return {{widen<P % kRunParts * kPartLanes>(runs.run[P / kRunParts],
                                             std::make_index_sequence<2 * kPartLanes>{})...}};
}
template <size_t... I>
DSV4_INLINE Run upper_halves(const WordPart& first, const WordPart& last,
                             std::index_sequence<I...>) {
  return __builtin_shufflevector(first, last, (2 * I + 1)...);
}
template <size_t... R>
DSV4_INLINE Runs upper_halves(const Bits& bits, std::index_sequence<R...>) {
  return {{upper_halves((WordPart)bits.part[R * kRunParts],
                        (WordPart)bits.part[R * kRunParts + kRunParts - 1],
                        std::make_index_sequence<kRunElems>{})...}};
}

DSV4_INLINE Floats load(const uint16_t* from, Whole) {  // bf16
  const Runs runs = from_parts<Runs>([&](size_t i) { return read<Run>(from + i * kRunElems); },
                                     std::make_index_sequence<kRuns>{});
  return widen(runs, std::make_index_sequence<kParts>{});
}
// The upper halves of the lanes.
DSV4_INLINE void store_upper(uint16_t* to, const Bits& bits) {
  const Runs runs = upper_halves(bits, std::make_index_sequence<kRuns>{});
  for_parts([&](size_t i) { write(to + i * kRunElems, runs.run[i]); },
            std::make_index_sequence<kRuns>{});
}

/// Upper halves hold the bf16 value, nearest-even; NaN stays NaN (quiet).
DSV4_INLINE Bits round_to_bf16(const Floats& value) {
  const Bits bits = bits_of(value);
  const Bits rounded = bits + broadcast_bits(0x7fffu) + ((bits >> 16) & broadcast_bits(1));
  return select(is_nan(value), bits | broadcast_bits(0x400000u), rounded);
}
DSV4_INLINE Floats bf16_value(const Floats& value) {
  return floats_of(round_to_bf16(value) & broadcast_bits(0xffff0000u));
}
DSV4_INLINE void store(uint16_t* to, const Floats& value, Whole) {
  store_upper(to, round_to_bf16(value));
}

/// For values that bf16 holds exactly: no rounding.
DSV4_INLINE void store_exact(uint16_t* to, const Floats& value, Whole) {
  store_upper(to, bits_of(value));
}
DSV4_INLINE void store_exact(float* to, const Floats& value, Whole) {
  store(to, value, Whole{});
}

template <typename T>
DSV4_INLINE Floats load(const T* from, First first) {
  T buffer[kLanes] = {};
  std::memcpy(buffer, from, static_cast<size_t>(first.count) * sizeof(T));
  return load(buffer, Whole{});
}
template <typename T>
DSV4_INLINE void store(T* to, const Floats& value, First first) {
  T buffer[kLanes];
  store(buffer, value, Whole{});
  std::memcpy(to, buffer, static_cast<size_t>(first.count) * sizeof(T));
}

template <typename T>
DSV4_INLINE void store_exact(T* to, const Floats& value, First first) {
  T buffer[kLanes];
  store_exact(buffer, value, Whole{});
  std::memcpy(to, buffer, static_cast<size_t>(first.count) * sizeof(T));
}

// Interleaved pairs (even, odd): sixteen pairs are 32 elements.
struct Pairs {
  Floats even, odd;
};
DSV4_INLINE Pairs load_pairs(const uint16_t* from, Whole) {
  // Little-endian: the even element is the low half.
  const Bits words = DSV4_PARTS(Bits, read<BitsPart>(from + 2 * i * kPartLanes));
  return {floats_of(words << 16), floats_of(words & broadcast_bits(0xffff0000u))};
}
DSV4_INLINE void store_pairs(uint16_t* to, const Pairs& pairs, Whole) {
  const Bits words =
      (round_to_bf16(pairs.even) >> 16) | (round_to_bf16(pairs.odd) & broadcast_bits(0xffff0000u));
  for_parts([&](size_t i) { write(to + 2 * i * kPartLanes, words.part[i]); },
            std::make_index_sequence<kParts>{});
}
DSV4_INLINE Pairs load_pairs(const float* from, Whole) {
  float even[kLanes], odd[kLanes];
  for (int64_t i = 0; i < kLanes; ++i) {
    even[i] = from[2 * i];
    odd[i] = from[2 * i + 1];
  }
  return {load(even, Whole{}), load(odd, Whole{})};
}
DSV4_INLINE void store_pairs(float* to, const Pairs& pairs, Whole) {
  float even[kLanes], odd[kLanes];
  store(even, pairs.even, Whole{});
  store(odd, pairs.odd, Whole{});
  for (int64_t i = 0; i < kLanes; ++i) {
    to[2 * i] = even[i];
    to[2 * i + 1] = odd[i];
  }
}
template <typename T>
DSV4_INLINE Pairs load_pairs(const T* from, First first) {
  T buffer[2 * kLanes] = {};
  std::memcpy(buffer, from, static_cast<size_t>(2 * first.count) * sizeof(T));
  return load_pairs(buffer, Whole{});
}
template <typename T>
DSV4_INLINE void store_pairs(T* to, const Pairs& pairs, First first) {
  T buffer[2 * kLanes];
  store_pairs(buffer, pairs, Whole{});
  std::memcpy(to, buffer, static_cast<size_t>(2 * first.count) * sizeof(T));
}

// ---- reductions

typedef float Quad __attribute__((vector_size(16)));

/// The lane tree of the file comment.
DSV4_INLINE float sum_lanes(const Floats& value) {
  alignas(64) float lanes[kLanes];
  store(lanes, value, Whole{});
  const Quad sum = (read<Quad>(lanes) + read<Quad>(lanes + 8)) +
                   (read<Quad>(lanes + 4) + read<Quad>(lanes + 12));
  return (sum[0] + sum[2]) + (sum[1] + sum[3]);
}

/// Magnitude bits compared as integers: they order floats, and any NaN is larger than infinity.
DSV4_INLINE Bits max_magnitude(const Bits& largest, const Floats& value) {
  const Bits bits = bits_of(value) & broadcast_bits(0x7fffffffu);
  // Signed comparison is right as the sign bit is clear.
  const Mask larger =
      DSV4_PARTS(Mask, (MaskPart)((MaskPart)largest.part[i] < (MaskPart)bits.part[i]));
  return select(larger, bits, largest);
}
typedef int32_t QuadBits __attribute__((vector_size(16)));
DSV4_INLINE QuadBits larger_of(QuadBits a, QuadBits b) {
  return a < b ? b : a;
}
/// The float whose bits are the largest of the lanes.
DSV4_INLINE float max_lane(const Bits& magnitudes) {
  alignas(64) float lanes[kLanes];
  store(lanes, floats_of(magnitudes), Whole{});
  const QuadBits largest =
      larger_of(larger_of(read<QuadBits>(lanes), read<QuadBits>(lanes + 8)),
                larger_of(read<QuadBits>(lanes + 4), read<QuadBits>(lanes + 12)));
  const int32_t low = largest[0] < largest[2] ? largest[2] : largest[0];
  const int32_t high = largest[1] < largest[3] ? largest[3] : largest[1];
  const int32_t out = low < high ? high : low;
  return read<float>(&out);
}

/// sum x^2 over a row of bf16 (uint16_t) or float.
template <typename T>
DSV4_INLINE float sum_squares(const T* row, int64_t count) {
  Floats a0 = broadcast(0), a1 = a0, a2 = a0, a3 = a0;
  int64_t i = 0;
  for (; i + 4 * kLanes <= count; i += 4 * kLanes) {
    const Floats x0 = load(row + i, Whole{}), x1 = load(row + i + kLanes, Whole{});
    const Floats x2 = load(row + i + 2 * kLanes, Whole{});
    const Floats x3 = load(row + i + 3 * kLanes, Whole{});
    a0 = a0 + x0 * x0;
    a1 = a1 + x1 * x1;
    a2 = a2 + x2 * x2;
    a3 = a3 + x3 * x3;
  }
  // At most three whole vectors and a part are left.
  const auto add = [&](Floats& sum) {
    if (i + kLanes <= count) {
      const Floats x = load(row + i, Whole{});
      sum = sum + x * x;
    } else if (i < count) {
      const Floats x = load(row + i, First{count - i});
      sum = sum + x * x;
    }
    i += kLanes;
  };
  add(a0);
  add(a1);
  add(a2);
  add(a3);
  return sum_lanes((a0 + a1) + (a2 + a3));
}

// ---- functions

/// e^x for any x: at most 2 ulp (measured against double in rowwise_test), 0 below -104, inf above
/// 88.73, NaN stays NaN. x = n ln 2 + r, |r| <= ln 2 / 2; ln 2 is split so that n * kLn2High is
/// exact for |n| < 2^9. The polynomial interpolates (e^r - 1 - r) / r^2 at Chebyshev nodes,
/// relative error of the result 2^-30.
DSV4_INLINE Floats exp(const Floats& x) {
  constexpr float kLog2E = 0x1.715476p+0f;
  constexpr float kLn2High = 0x1.62ep-1f, kLn2Low = 0x1.0bfbe8p-15f;
  constexpr float kRound = 0x1.8p23f;  // adding it leaves the nearest integer in the low bits
  const Floats clamped = max(broadcast(-104.0f), min(broadcast(89.0f), x));
  const Floats shifted = clamped * broadcast(kLog2E) + broadcast(kRound);
  const Floats n = shifted - broadcast(kRound);
  const Floats r = (clamped - n * broadcast(kLn2High)) - n * broadcast(kLn2Low);
  Floats p = broadcast(0x1.a124e6p-13f);
  p = p * r + broadcast(0x1.6d4318p-10f);
  p = p * r + broadcast(0x1.1110ep-7f);
  p = p * r + broadcast(0x1.5554eap-5f);
  p = p * r + broadcast(0x1.555556p-3f);
  p = p * r + broadcast(0.5f);
  p = (p * (r * r) + r) + broadcast(1.0f);
  // 2^n in two factors: n reaches from -150 to 128, beyond what one exponent field holds.
  const Bits integer = bits_of(shifted) - broadcast_bits(0x4b400000u);
  const Bits half = DSV4_PARTS(Bits, (BitsPart)((MaskPart)integer.part[i] >> 1));
  const Floats scale0 = floats_of((half + broadcast_bits(127)) << 23);
  const Floats scale1 = floats_of((integer - half + broadcast_bits(127)) << 23);
  return (p * scale0) * scale1;
}

/// 1 / (1 + e^-x).
DSV4_INLINE Floats sigmoid(const Floats& x) {
  const Floats one = broadcast(1.0f);
  return one / (one + exp(broadcast(0.0f) - x));
}

/// log(1 + z) for 0 <= z <= 1: 2 atanh(s), s = z / (2 + z) <= 1/3; no cancellation at either end.
/// At most 3 ulp. The polynomial interpolates atanh(s) / s in s^2, relative error 2^-29.
DSV4_INLINE Floats log1p_unit(const Floats& z) {
  const Floats s = z / (broadcast(2.0f) + z);
  const Floats t = s * s;
  Floats p = broadcast(0x1.f39656p-4f);
  p = p * t + broadcast(0x1.b63e16p-4f);
  p = p * t + broadcast(0x1.251228p-3f);
  p = p * t + broadcast(0x1.999638p-3f);
  p = p * t + broadcast(0x1.55555ap-2f);
  const Floats twice = s + s;
  return twice + twice * (t * p);
}

/// log(1 + e^x), x itself above 20 (model.md 4.1).
DSV4_INLINE Floats softplus(const Floats& x) {
  const Floats z = exp(broadcast(0.0f) - magnitude(x));
  const Floats value = max(broadcast(0.0f), x) + log1p_unit(z);
  return select(broadcast(20.0f) < x, x, value);
}

}  // namespace dsv4::cpu::DSV4_ROWWISE_ISA
