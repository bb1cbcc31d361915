// Functions of up to three inputs and several results, compiled for the host and for AMD GPUs
// alike: what the interpreter computes with the GPU's code must be what the host computes, bit for
// bit where the language says so.
#pragma once
#include <stdint.h>

#if defined(__HIP__)
#define DSV4_CORPUS_FN __attribute__((device, always_inline)) static inline
#else
#define DSV4_CORPUS_FN static inline
#endif

namespace dsv4::corpus {

template <typename To, typename From>
DSV4_CORPUS_FN To bits_of(From value) {
  static_assert(sizeof(To) == sizeof(From));
  return __builtin_bit_cast(To, value);
}

struct Int32Arithmetic {
  using In = uint32_t;
  using Out = uint32_t;
  static constexpr int kResults = 24;
  DSV4_CORPUS_FN void eval(In a, In b, In c, Out* r) {
    const int32_t sa = static_cast<int32_t>(a), sb = static_cast<int32_t>(b);
    r[0] = a + b;
    r[1] = a - b;
    r[2] = a * b;
    r[3] = static_cast<uint32_t>((static_cast<uint64_t>(a) * b) >> 32);
    r[4] = static_cast<uint32_t>((static_cast<int64_t>(sa) * sb) >> 32);
    r[5] = a / (b | 1);
    r[6] = a % (c | 1);
    r[7] = static_cast<uint32_t>(sa / static_cast<int32_t>((b >> 3) | 1));
    r[8] = static_cast<uint32_t>(sa % static_cast<int32_t>((c >> 5) | 1));
    r[9] = sa < sb ? a : b;
    r[10] = sa > sb ? a : b;
    r[11] = a < b ? a : b;
    r[12] = a > b ? a : b;
    r[13] = a + b + c;
    r[14] = (a << 3) + c;
    r[15] = (a + b) << 5;
    r[16] = (a & 0xffffff) * (b & 0xffffff) + c;
    r[17] = a > b ? a - b : 0;
    r[18] = a + b < a ? 0xffffffffu : a + b;
    r[19] = sa < 0 ? 0u - a : a;
    r[20] = sa < sb ? (sb < static_cast<int32_t>(c) ? b : (sa < static_cast<int32_t>(c) ? c : a))
                    : (sa < static_cast<int32_t>(c) ? a : (sb < static_cast<int32_t>(c) ? c : b));
    r[21] = a / 10u + b % 7u;
    r[22] = static_cast<uint32_t>(((sa << 16) >> 16) * ((sb << 16) >> 16));
    r[23] = a * 5u - c;
  }
};

struct Int32Bits {
  using In = uint32_t;
  using Out = uint32_t;
  static constexpr int kResults = 24;
  DSV4_CORPUS_FN void eval(In a, In b, In c, Out* r) {
    r[0] = a & b;
    r[1] = a | b;
    r[2] = a ^ b;
    r[3] = ~a;
    r[4] = a << (b & 31);
    r[5] = a >> (b & 31);
    r[6] = static_cast<uint32_t>(static_cast<int32_t>(a) >> (b & 31));
    r[7] = (a & b) | c;
    r[8] = a | b | c;
    r[9] = (a << 4) | c;
    r[10] = (a & c) | (b & ~c);
    r[11] = (a >> 7) & 0x1ff;
    r[12] = static_cast<uint32_t>(static_cast<int32_t>(a << 9) >> 20);
    r[13] = static_cast<uint32_t>(__builtin_popcount(a));
    r[14] = static_cast<uint32_t>(__builtin_clz(a | 1));
    r[15] = static_cast<uint32_t>(__builtin_ctz(a | 0x80000000u));
    r[16] = (a << (c & 31)) | (a >> ((32 - (c & 31)) & 31));
    r[17] = __builtin_bswap32(a);
    r[18] = a ^ (b + c);
    r[19] = ~(a ^ b);
    r[20] = (a & 0xff00ff00u) | (b & 0x00ff00ffu);
    r[21] = static_cast<uint32_t>((static_cast<uint64_t>(a) << 32 | b) >> (c & 31));
    r[22] = (a ^ b) & c;
    r[23] = ~(a | b) ^ (a & ~c);
  }
};

struct Int64Arithmetic {
  using In = uint64_t;
  using Out = uint64_t;
  static constexpr int kResults = 22;
  DSV4_CORPUS_FN void eval(In a, In b, In c, Out* r) {
    const int64_t sa = static_cast<int64_t>(a), sb = static_cast<int64_t>(b);
    r[0] = a + b;
    r[1] = a - b;
    r[2] = a * b;
    r[3] = a & b;
    r[4] = a | (b ^ c);
    r[5] = a << (b & 63);
    r[6] = a >> (b & 63);
    r[7] = static_cast<uint64_t>(sa >> (b & 63));
    r[8] = sa < sb ? a : b;
    r[9] = a < b ? a : b;
    r[10] = sa >= sb ? c : b;
    r[11] = a == b ? c : a + 1;
    r[12] = a != b && a > c ? c - b : a;
    r[13] = (a << 3) + b;
    r[14] = static_cast<uint64_t>(static_cast<uint32_t>(a)) * static_cast<uint32_t>(b) + c;
    r[15] = static_cast<uint64_t>(static_cast<int64_t>(static_cast<int32_t>(a)) *
                                  static_cast<int32_t>(b)) +
            c;
    r[16] = static_cast<uint64_t>(__builtin_popcountll(a));
    r[17] = static_cast<uint64_t>(__builtin_clzll(a | 1));
    r[18] = static_cast<uint64_t>(__builtin_ctzll(a | 1ull << 63));
    r[19] = a / (b | 1);
    r[20] = a % ((c >> 17) | 1);
    r[21] = sa < 0 ? 0 - a : a;
  }
};

struct NarrowIntegers {
  using In = uint32_t;
  using Out = uint32_t;
  static constexpr int kResults = 18;
  DSV4_CORPUS_FN void eval(In a, In b, In c, Out* r) {
    const uint16_t ha = static_cast<uint16_t>(a), hb = static_cast<uint16_t>(b),
                   hc = static_cast<uint16_t>(c >> 16);
    const int16_t sa = static_cast<int16_t>(a >> 16), sb = static_cast<int16_t>(b >> 16);
    const uint8_t ba = static_cast<uint8_t>(a >> 8), bb = static_cast<uint8_t>(b >> 16);
    r[0] = static_cast<uint16_t>(ha + hb);
    r[1] = static_cast<uint16_t>(ha - hb);
    r[2] = static_cast<uint16_t>(ha * hb);
    r[3] = static_cast<uint16_t>(ha * hb + hc);
    r[4] = ha < hb ? ha : hb;
    r[5] = ha > hc ? ha : hc;
    r[6] = static_cast<uint32_t>(sa < sb ? sa : sb);
    r[7] = static_cast<uint32_t>(sa > sb ? sa : sb);
    r[8] = static_cast<uint16_t>(ha << (hb & 15));
    r[9] = static_cast<uint16_t>(ha >> (hb & 15));
    r[10] = static_cast<uint32_t>(static_cast<int16_t>(sa >> (b & 15)));
    r[11] = static_cast<uint8_t>(ba + bb);
    r[12] = ba < bb ? 1u : 2u;
    r[13] = static_cast<uint32_t>(ba) * bb;
    r[14] = static_cast<uint32_t>(static_cast<int32_t>(static_cast<int8_t>(ba)) +
                                  static_cast<int8_t>(bb));
    r[15] = sa == sb ? a : b;
    r[16] = static_cast<uint32_t>(ba) << 24 | static_cast<uint32_t>(bb) << 16 | (a & 0xff) << 8 |
            (c >> 24);
    r[17] = (a & 0xffff) | (b << 16);
  }
};

struct Float32Arithmetic {
  using In = float;
  using Out = float;
  static constexpr int kResults = 24;
  DSV4_CORPUS_FN void eval(In a, In b, In c, Out* r) {
    r[0] = a + b;
    r[1] = a - b;
    r[2] = a * b;
    r[3] = __builtin_fmaf(a, b, c);
    r[4] = __builtin_fmaf(-a, b, c);
    r[5] = a / b;
    r[6] = __builtin_sqrtf(__builtin_fabsf(a));
    r[7] = __builtin_fabsf(a) + -__builtin_fabsf(b);
    r[8] = __builtin_fminf(a, b) + 0.0f;  // the sign of a zero is open in C
    r[9] = __builtin_fmaxf(a, b) + 0.0f;
    r[10] = __builtin_floorf(a);
    r[11] = __builtin_ceilf(a);
    r[12] = __builtin_truncf(a);
    r[13] = __builtin_rintf(a);
    r[14] = __builtin_copysignf(a, b);
    r[15] = a < b ? c : a;
    r[16] = a >= b ? c : b;
    r[17] = a == b ? 1.0f : 2.0f;
    r[18] = !(a < b) ? 3.0f : 0.5f;
    r[19] = (a + 0.15f) * 4.0f - 0.5f;
    r[20] = a * 0.1f + b * c;
    r[21] = __builtin_fmaxf(__builtin_fminf(a, 1.0f), 0.0f) + 0.0f;
    r[22] = __builtin_ldexpf(a, 7) + 2.0f * b;
    r[23] = 1.0f / c;
  }
};

struct Float32Convert {
  using In = float;  // finite, |a| < 2^31
  using Out = uint32_t;
  static constexpr int kResults = 13;
  DSV4_CORPUS_FN void eval(In a, In b, In c, Out* r) {
    const float positive = __builtin_fabsf(a);
    r[0] = static_cast<uint32_t>(static_cast<int32_t>(a));
    r[1] = static_cast<uint32_t>(positive);
    r[2] = bits_of<uint32_t>(static_cast<float>(bits_of<uint32_t>(b)));
    r[3] = bits_of<uint32_t>(static_cast<float>(bits_of<int32_t>(b)));
    r[4] = bits_of<uint32_t>(static_cast<float>(bits_of<uint32_t>(b) & 0xff));
    r[5] = bits_of<uint32_t>(static_cast<float>((bits_of<uint32_t>(b) >> 16) & 0xff));
    r[6] = bits_of<uint32_t>(
        static_cast<float>(static_cast<uint64_t>(bits_of<uint32_t>(b)) * bits_of<uint32_t>(c)));
    r[7] = bits_of<uint32_t>(static_cast<float>(static_cast<double>(a) * static_cast<double>(b)));
    r[8] = static_cast<uint32_t>(static_cast<int32_t>(static_cast<double>(a) * 0.5));
    r[9] = bits_of<uint32_t>(static_cast<float>(static_cast<int8_t>(bits_of<uint32_t>(c))));
    r[10] = static_cast<uint32_t>(static_cast<int32_t>(__builtin_rintf(a)));
    r[11] = static_cast<uint32_t>(static_cast<int64_t>(a) >> 3);
    r[12] =
        bits_of<uint32_t>(static_cast<float>(static_cast<uint16_t>(bits_of<uint32_t>(c) >> 16)));
  }
};

struct Float64Arithmetic {
  using In = double;
  using Out = double;
  static constexpr int kResults = 16;
  DSV4_CORPUS_FN void eval(In a, In b, In c, Out* r) {
    r[0] = a + b;
    r[1] = a - b;
    r[2] = a * b;
    r[3] = __builtin_fma(a, b, c);
    r[4] = a / b;
    r[5] = __builtin_sqrt(__builtin_fabs(a));
    r[6] = __builtin_fmin(a, b) + 0.0;
    r[7] = __builtin_fmax(a, b) + 0.0;
    r[8] = __builtin_floor(a);
    r[9] = __builtin_rint(a);
    r[10] = a < b ? c : a;
    r[11] = static_cast<double>(static_cast<int32_t>(a));
    r[12] = static_cast<double>(static_cast<uint32_t>(__builtin_fabs(b)));
    r[13] = static_cast<double>(static_cast<float>(c));
    r[14] = a * 2.5 - 1.0;
    r[15] = static_cast<double>(static_cast<int64_t>(a * 1024.0));
  }
};

}  // namespace dsv4::corpus
