// v_mfma_*: D = A B + C over the lanes of a wave, whatever EXEC says.
//
// Layouts  with M rows (= columns), KPL values of k per lane:
//   A, B   row (A) or column (B) = lane % M, k = KPL * (lane / M) + j for the j-th value of the
//   lane's registers C, D   column = lane % M;  M = 16: row = 4 * (lane / 16) + i,  M = 32: row = 8
//   * (i / 4) + 4 * (lane / 32) + i % 4 several blocks: lanes that would hold further k hold
//   further blocks; D holds them one after another M = 4 has 16 blocks: block = lane / 4, row = i
// Source   AMD's published matrix instruction calculator for what gfx942 has; the forms of gfx950
// with twice the k
//          follow the same formula and are unchecked.
// Numerics products exact, sums in float with k ascending; the hardware's order is not documented.
#include <string>

#include "backends/amd/isa/fp8.h"
#include "backends/amd/isa/half.h"
#include "backends/amd/isa/lanes.h"
#include "core/numbers.h"

namespace dsv4::amd::isa {
namespace {

using u32 = uint32_t;

// Elements of A and B: bits, and value of a code.
struct F32 {
  static constexpr int kBits = 32;
  using Sum = float;
  static float value(u32 code) { return std::bit_cast<float>(code); }
};
struct F16 {
  static constexpr int kBits = 16;
  using Sum = float;
  static float value(u32 code) { return half_to_f32({static_cast<uint16_t>(code)}); }
};
struct BF16 {
  static constexpr int kBits = 16;
  using Sum = float;
  static float value(u32 code) { return std::bit_cast<float>(code << 16); }
};
template <bool kFnuz>
struct Fp8 {
  static constexpr int kBits = 8;
  using Sum = float;
  static float value(u32 code) { return fp8_values(kFnuz)[code & 0xff]; }
};
struct I8 {
  static constexpr int kBits = 8;
  using Sum = int32_t;
  static int32_t value(u32 code) { return static_cast<int8_t>(code); }
};

template <int kSize, int kDepth, int kCount = 1>
struct Shape {
  static constexpr int kM = kSize, kK = kDepth, kBlocks = kCount;
  static constexpr int kPerLane = kM * kK * kBlocks / kWaveSize;  // values of A, and of B
  static constexpr int kGroups = kK / kPerLane;                   // groups of lanes along k
  static constexpr int kResults = kM * kM * kBlocks / kWaveSize;  // values of D
  static constexpr int k_of(int lane, int j) { return kPerLane * (lane / kM % kGroups) + j; }
  static constexpr int block_of(int lane) { return lane / kM / kGroups; }
  static constexpr int result_block(int lane, int i) {
    return kM == 4 ? lane / 4 : i / (kM * kM / kWaveSize);
  }
  static constexpr int result_row(int lane, int i) {
    if (kM == 4) return i;
    const int in_block = i % (kM * kM / kWaveSize);
    return kM == 16 ? 4 * (lane / 16) + in_block
                    : 8 * (in_block / 4) + 4 * (lane / 32) + in_block % 4;
  }
};

// A and B as [k][row or column], so that the lanes of a group lie side by side in all three.
template <typename S, typename Sum>
struct Tiles {
  alignas(64) Sum a[S::kBlocks][S::kK][S::kM];
  alignas(64) Sum b[S::kBlocks][S::kK][S::kM];
  alignas(64) Sum d[S::kBlocks][S::kM][S::kM];
};

// A row of D stays in registers while k runs. kFused: the product is not exact in float.
template <bool kFused, typename S, typename Sum>
void multiply(Tiles<S, Sum>& t) {
  for (int block = 0; block < S::kBlocks; ++block) {
    for (int row = 0; row < S::kM; ++row) {
      Sum sum[S::kM];
      std::memcpy(sum, t.d[block][row], sizeof sum);
      for (int k = 0; k < S::kK; ++k) {
        const Sum a = t.a[block][k][row];
        const Sum* const b = t.b[block][k];
        for (int col = 0; col < S::kM; ++col) {
          if constexpr (std::is_same_v<Sum, int32_t>) {
            sum[col] =
                static_cast<int32_t>(static_cast<u32>(sum[col]) + static_cast<u32>(a * b[col]));
          } else if constexpr (kFused) {
            sum[col] = fma_f32(a, b[col], sum[col]);
          } else {
            sum[col] += a * b[col];
          }
        }
      }
      std::memcpy(t.d[block][row], sum, sizeof sum);
    }
  }
}

template <typename S, typename Sum>
void load_sum(Wave& wave, const Operand& c, Tiles<S, Sum>& t) {
  alignas(64) Row scratch;
  for (int i = 0; i < S::kResults; ++i) {
    // A constant is one register that stands for all.
    const u32* row = operand_row(wave, c, c.kind == OperandKind::kVector ? i : 0, scratch);
    for (int lane = 0; lane < kWaveSize; lane += S::kM) {
      std::memcpy(t.d[S::result_block(lane, i)][S::result_row(lane, i)], row + lane,
                  S::kM * sizeof(Sum));
    }
  }
}
template <typename S, typename Sum>
void store_sum(Wave& wave, const Operand& d, const Tiles<S, Sum>& t) {
  for (int i = 0; i < S::kResults; ++i) {
    u32* row = wave.vector[d.reg + i];
    for (int lane = 0; lane < kWaveSize; lane += S::kM) {
      std::memcpy(row + lane, t.d[S::result_block(lane, i)][S::result_row(lane, i)],
                  S::kM * sizeof(Sum));
    }
  }
}

// Unpacks A or B: tile[block][k][lane % M] = value(code, lane).
template <int kBits, typename S, typename Sum, typename F>
void load_elements(const Wave& wave, const Operand& operand, Sum (&tile)[S::kBlocks][S::kK][S::kM],
                   F&& value) {
  constexpr int kPerRegister = 32 / kBits;
  constexpr u32 kMask = kBits == 32 ? ~0u : (1u << (kBits & 31)) - 1;
  for (int j = 0; j < S::kPerLane; ++j) {
    const u32* row = wave.vector[operand.reg + j / kPerRegister];
    const int shift = kBits * (j % kPerRegister);
    for (int first = 0; first < kWaveSize; first += S::kM) {
      Sum* const out = tile[S::block_of(first)][S::k_of(first, j)];
      for (int l = 0; l < S::kM; ++l) out[l] = value(row[first + l] >> shift & kMask, first + l);
    }
  }
}

void require_plain(const Instruction& i) {
  if (i.cbsz != 0 || i.abid != 0 || i.blgp != 0) {
    throw Fault("cbsz, abid and blgp of this instruction are not modelled");
  }
}

template <typename S, typename A, typename B>
void mfma(Wave& wave, const Instruction& i) {
  using Sum = typename A::Sum;
  require_plain(i);
  Tiles<S, Sum> t;
  load_sum(wave, i.src[2], t);
  load_elements<A::kBits, S>(wave, i.src[0], t.a, [](u32 code, int) { return A::value(code); });
  load_elements<B::kBits, S>(wave, i.src[1], t.b, [](u32 code, int) { return B::value(code); });
  multiply<std::is_same_v<A, F32>>(t);
  store_sum(wave, i.dst, t);
}

// ---- gfx950: fp8 and fp4 with block scales ------------------------------------------------------

constexpr int kFormatFp8 = 0, kFormatFp4 = 4;

// A lane's 32 values share one scale: a byte of the lane's scale register, an exponent.
template <typename S>
void load_scaled(const Wave& wave, const Operand& operand, int format, const u32* scales,
                 int scale_byte, float (&tile)[S::kBlocks][S::kK][S::kM]) {
  float scale[kWaveSize];
  for (int lane = 0; lane < kWaveSize; ++lane) {
    scale[lane] = scales == nullptr
                      ? 1.0f
                      : e8m0_to_f32(static_cast<uint8_t>(scales[lane] >> (8 * scale_byte)));
  }
  if (format == kFormatFp8) {
    const auto& values = fp8_values(false);
    load_elements<8, S>(wave, operand, tile,
                        [&](u32 code, int lane) { return values[code] * scale[lane]; });
  } else if (format == kFormatFp4) {
    load_elements<4, S>(wave, operand, tile, [&](u32 code, int lane) {
      return e2m1_to_f32(static_cast<uint8_t>(code)) * scale[lane];
    });
  } else {
    throw Fault("matrix format " + std::to_string(format) + " is not modelled (fp8: 0, fp4: 4)");
  }
}

template <typename S, bool kScaled>
void mfma_f8f6f4(Wave& wave, const Instruction& i) {
  alignas(64) Row scratch[2];
  const u32* scales[2] = {nullptr, nullptr};
  int scale_byte[2] = {0, 0};
  if constexpr (kScaled) {
    for (int k = 0; k < 2; ++k) {
      scales[k] = operand_row(wave, i.src[static_cast<size_t>(3 + k)], 0, scratch[k]);
      scale_byte[k] = (i.op_sel >> k & 1) | (i.op_sel_hi >> k & 1) << 1;
    }
  }
  Tiles<S, float> t;
  load_sum(wave, i.src[2], t);
  load_scaled<S>(wave, i.src[0], i.cbsz, scales[0], scale_byte[0], t.a);
  load_scaled<S>(wave, i.src[1], i.blgp, scales[1], scale_byte[1], t.b);
  multiply<false>(t);
  store_sum(wave, i.dst, t);
}

// ---- the table ----------------------------------------------------------------------------------

template <typename S, typename A, typename B = A>
Opcode matrix() {
  using enum OperandType;
  Opcode out;
  out.execute = mfma<S, A, B>;
  out.dst = {kRegs};
  out.src = {kRegs, kRegs, kRegs};
  out.modifiers = kMatrix;
  return out;
}
template <typename S>
void add_scaled(OpcodeTable& t, const std::string& shape) {
  using enum OperandType;
  Opcode out = matrix<S, Fp8<false>>();
  out.modifiers |= kPackedSel;
  out.execute = mfma_f8f6f4<S, false>;
  t["v_mfma_f32_" + shape + "_f8f6f4"] = out;
  out.execute = mfma_f8f6f4<S, true>;
  out.src.push_back(kB32);
  out.src.push_back(kB32);
  t["v_mfma_scale_f32_" + shape + "_f8f6f4"] = out;
}

template <typename Type>
void add_16_bit(OpcodeTable& t, const std::string& type) {
  t["v_mfma_f32_16x16x16_" + type] = matrix<Shape<16, 16>, Type>();
  t["v_mfma_f32_32x32x8_" + type] = matrix<Shape<32, 8>, Type>();
  t["v_mfma_f32_32x32x4_2b_" + type] = matrix<Shape<32, 4, 2>, Type>();
  t["v_mfma_f32_16x16x4_4b_" + type] = matrix<Shape<16, 4, 4>, Type>();
  t["v_mfma_f32_4x4x4_16b_" + type] = matrix<Shape<4, 4, 16>, Type>();
}

}  // namespace

void add_matrix(OpcodeTable& t, Arch arch) {
  t["v_mfma_f32_16x16x4_f32"] = matrix<Shape<16, 4>, F32>();
  t["v_mfma_f32_32x32x2_f32"] = matrix<Shape<32, 2>, F32>();
  add_16_bit<F16>(t, "f16");
  add_16_bit<BF16>(t, "bf16");
  t["v_mfma_i32_16x16x32_i8"] = matrix<Shape<16, 32>, I8>();
  t["v_mfma_i32_32x32x16_i8"] = matrix<Shape<32, 16>, I8>();
  if (has_fnuz_fp8(arch)) {
    t["v_mfma_f32_16x16x32_fp8_fp8"] = matrix<Shape<16, 32>, Fp8<true>>();
    t["v_mfma_f32_32x32x16_fp8_fp8"] = matrix<Shape<32, 16>, Fp8<true>>();
  } else {
    t["v_mfma_f32_16x16x32_fp8_fp8"] = matrix<Shape<16, 32>, Fp8<false>>();
    t["v_mfma_f32_32x32x16_fp8_fp8"] = matrix<Shape<32, 16>, Fp8<false>>();
  }
  if (arch != Arch::kGfx950) return;
  t["v_mfma_f32_16x16x32_f16"] = matrix<Shape<16, 32>, F16>();
  t["v_mfma_f32_32x32x16_f16"] = matrix<Shape<32, 16>, F16>();
  t["v_mfma_f32_16x16x32_bf16"] = matrix<Shape<16, 32>, BF16>();
  t["v_mfma_f32_32x32x16_bf16"] = matrix<Shape<32, 16>, BF16>();
  t["v_mfma_i32_16x16x64_i8"] = matrix<Shape<16, 64>, I8>();
  t["v_mfma_i32_32x32x32_i8"] = matrix<Shape<32, 32>, I8>();
  add_scaled<Shape<16, 128>>(t, "16x16x128");
  add_scaled<Shape<32, 64>>(t, "32x32x64");
}

}  // namespace dsv4::amd::isa
