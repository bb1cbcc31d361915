#include "checkpoint/formula.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstring>
#include <functional>
#include <map>
#include <mutex>
#include <new>
#include <thread>

#include "core/checked_math.h"
#include "core/fail.h"
#include "core/numbers.h"
#include "core/thread_pool.h"

namespace dsv4 {
namespace {

constexpr uint64_t kGolden = 0x9E3779B97F4A7C15u;
constexpr double kUnit = 0x1p-24;

/// Finaliser of splitmix64.
inline uint64_t mix(uint64_t z) {
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
  return z ^ (z >> 31);
}

/// u(i) * 2^24: an odd integer within (-2^24, 2^24).
inline int32_t uniform_steps(uint64_t key, uint64_t index) {
  const uint64_t hash = mix(key + (index + 1) * kGolden);
  return static_cast<int32_t>(2 * (hash >> 40) + 1) - (1 << 24);
}

/// bf16 bits of elements [begin, begin + count).
void fill_bf16(uint64_t key, const FormulaRule& rule, int64_t begin, int64_t count, uint16_t* out) {
  const double step = rule.scale * kUnit;
  const float float_step = static_cast<float>(step);
  int exponent;
  // Without an offset and with a power of two the float product is exact (24 significant bits), so
  // the two roundings of the formula are one.
  if (rule.offset == 0.0 && std::frexp(rule.scale, &exponent) == 0.5) {
    for (int64_t i = 0; i < count; ++i) {
      const int32_t steps = uniform_steps(key, static_cast<uint64_t>(begin + i));
      out[i] = f32_to_bf16(static_cast<float>(steps) * float_step);
    }
    return;
  }
  for (int64_t i = 0; i < count; ++i) {
    const int32_t steps = uniform_steps(key, static_cast<uint64_t>(begin + i));
    out[i] = f32_to_bf16(static_cast<float>(rule.offset + steps * step));
  }
}

/// Calls f(begin, end) over [0, count) items in pieces, on all processors when there is enough to
/// do. f writes disjoint elements, so results do not depend on the split.
void for_pieces(int64_t count, int64_t elems_per_item,
                const std::function<void(int64_t, int64_t)>& f) {
  constexpr int64_t kPieceElems = int64_t{1} << 18;  // half a millisecond: above a thread's cost
  const int64_t piece = ceil_div(kPieceElems, elems_per_item);
  const int64_t pieces = ceil_div(count, piece);
  if (pieces <= 1) return f(0, count);
  const auto processors = static_cast<int64_t>(std::max(1u, std::thread::hardware_concurrency()));
  ThreadPool pool(static_cast<int>(std::min(processors, pieces)));
  pool.run(pieces, [&](int64_t i) { f(i * piece, std::min((i + 1) * piece, count)); });
}

/// Codes of all bf16 values: rounding by table, as encoders are far slower than the formula.
template <uint8_t (*kEncode)(float)>
const std::array<uint8_t, 65536>& code_table() {
  static const std::array<uint8_t, 65536> table = [] {
    std::array<uint8_t, 65536> out{};
    for (uint32_t bits = 0; bits < out.size(); ++bits) {
      const float value = bf16_to_f32(static_cast<uint16_t>(bits));
      out[bits] = std::isfinite(value) ? kEncode(value) : 0;
    }
    return out;
  }();
  return table;
}

/// Smallest e with amax <= qmax * 2^e, exactly; 0 when all values are 0.
int smallest_exponent(float amax, float qmax) {
  if (amax == 0.0f) return 0;
  int exponent = ceil_log2_ratio(amax, qmax);
  while (exponent > -126 && amax <= std::ldexp(qmax, exponent - 1)) --exponent;
  while (amax > std::ldexp(qmax, exponent)) ++exponent;
  return exponent;
}

float largest(const uint16_t* bits, int64_t count) {
  uint16_t out = 0;  // magnitudes of bf16 order as their bits do
  for (int64_t i = 0; i < count; ++i) {
    out = std::max(out, static_cast<uint16_t>(bits[i] & 0x7fff));
  }
  return bf16_to_f32(out);
}

/// Multiplying by a power of two keeps bf16 values exact, so the table decides the code.
uint8_t encode(const std::array<uint8_t, 65536>& table, uint16_t bits, float inverse_scale) {
  const float scaled = bf16_to_f32(bits) * inverse_scale;
  return table[std::bit_cast<uint32_t>(scaled) >> 16];
}

bool ends_with_norm(std::string_view name) {
  return name.ends_with("norm.weight");
}

class FormulaSource final : public TensorSource {
 public:
  FormulaSource(std::vector<ExpectedTensor> tensors, uint64_t seed, FormulaStorage storage)
      : seed_(seed), storage_(storage) {
    for (ExpectedTensor& tensor : tensors) {
      // Scales belong to the storage, not to the model: made with their weight, or not at all.
      if (tensor.dtype == DType::kF8E8M0 && storage == FormulaStorage::kBf16Values) continue;
      std::string name = tensor.name;
      if (slots_.count(name) > 0) {
        fail(ErrorCode::kInvalidArgument, "formula: tensor '", name,
             "': expected once in the list, given twice");
      }
      slots_.try_emplace(std::move(name), std::move(tensor));
    }
  }

  bool contains(std::string_view name) const override { return slots_.find(name) != slots_.end(); }

  ConstTensor get(std::string_view name) const override {
    Slot& slot = find(name);
    if (slot.expected.dtype == DType::kF8E8M0) {
      Slot& weight = find(weight_of(name));
      std::call_once(weight.once, [&] { make(weight); });
      return slot.view;
    }
    std::call_once(slot.once, [&] { make(slot); });
    return slot.view;
  }

  std::string origin(std::string_view) const override {
    return concat("the formula of seed ", seed_);
  }

 private:
  struct Slot {
    explicit Slot(ExpectedTensor expected_) : expected(std::move(expected_)) {}
    ExpectedTensor expected;
    std::once_flag once;
    std::unique_ptr<std::byte[]> data;
    ConstTensor view;
  };

  Slot& find(std::string_view name) const {
    const auto it = slots_.find(name);
    if (it == slots_.end()) {
      fail(ErrorCode::kNotFound, "tensor '", name, "': not among the ", slots_.size(),
           " tensors of ", origin(name));
    }
    return it->second;
  }
  static std::string weight_of(std::string_view scale) {
    return std::string(scale.substr(0, scale.rfind('.'))) + ".weight";
  }
  static std::string scale_of(std::string_view weight) {
    return std::string(weight.substr(0, weight.rfind('.'))) + ".scale";
  }

  /// Memory for `shape`; not initialised, every element is written.
  template <typename T>
  static T* allocate(Slot& slot, DType dtype, const std::vector<int64_t>& shape) {
    ConstTensor view;
    view.dtype = dtype;
    view.rank = static_cast<int>(shape.size());
    int64_t stride = 1;
    for (int i = view.rank - 1; i >= 0; --i) {
      view.shape[i] = shape[static_cast<size_t>(i)];
      view.strides[i] = stride;
      stride *= view.shape[i];
    }
    slot.data.reset(new (std::nothrow) std::byte[static_cast<size_t>(view.num_bytes())]);
    if (slot.data == nullptr) {
      fail(ErrorCode::kOutOfMemory, "formula: tensor '", slot.expected.name, "': no memory for ",
           view.num_bytes(), " bytes");
    }
    view.data = slot.data.get();
    slot.view = view;
    return reinterpret_cast<T*>(slot.data.get());
  }

  void make(Slot& slot) const {
    const ExpectedTensor& tensor = slot.expected;
    switch (tensor.dtype) {
      case DType::kI64:
        return make_expert_table(slot);
      case DType::kF32:
        return make_f32(slot);
      case DType::kBf16:
        return make_bf16(slot, tensor.shape);
      case DType::kF8E4M3:
        if (storage_ == FormulaStorage::kBf16Values) return make_bf16(slot, tensor.shape);
        return make_fp8(slot);
      case DType::kF4E2M1:
        if (storage_ == FormulaStorage::kBf16Values) {
          return make_bf16(slot, {tensor.shape[0], 2 * tensor.shape[1]});
        }
        return make_fp4(slot);
      default:
        fail(ErrorCode::kUnsupported, "formula: tensor '", tensor.name, "': no rule for dtype ",
             dtype_name(tensor.dtype));
    }
  }

  void make_bf16(Slot& slot, const std::vector<int64_t>& shape) const {
    auto* out = allocate<uint16_t>(slot, DType::kBf16, shape);
    const uint64_t key = formula_key(slot.expected.name, seed_);
    const FormulaRule rule = formula_rule(slot.expected.name, shape.back());
    for_pieces(slot.view.num_elements(), 1, [&](int64_t begin, int64_t end) {
      fill_bf16(key, rule, begin, end - begin, out + begin);
    });
  }

  void make_f32(Slot& slot) const {
    const ExpectedTensor& tensor = slot.expected;
    auto* out = allocate<float>(slot, DType::kF32, tensor.shape);
    const std::vector<float> values =
        formula_values(tensor.name, seed_, slot.view.num_elements(),
                       formula_rule(tensor.name, tensor.shape.back()));
    std::copy(values.begin(), values.end(), out);
  }

  /// In bands of one row of scale blocks.
  void make_fp8(Slot& slot) const {
    const ExpectedTensor& tensor = slot.expected;
    Slot& scale_slot = find(scale_of(tensor.name));
    const int64_t rows = tensor.shape[0], cols = tensor.shape[1];
    const int64_t scale_rows = scale_slot.expected.shape[0];
    const int64_t scale_cols = scale_slot.expected.shape[1];
    const int64_t block_rows = scale_slot.expected.block_rows;
    const int64_t block_cols = scale_slot.expected.block_cols;
    DSV4_CHECK(scale_rows == ceil_div(rows, block_rows) &&
               scale_cols == ceil_div(cols, block_cols));
    auto* out = allocate<uint8_t>(slot, DType::kF8E4M3, tensor.shape);
    auto* scale = allocate<uint8_t>(scale_slot, DType::kF8E8M0, scale_slot.expected.shape);
    const uint64_t key = formula_key(tensor.name, seed_);
    const FormulaRule rule = formula_rule(tensor.name, cols);
    const auto& codes = code_table<f32_to_e4m3>();
    for_pieces(scale_rows, block_rows * cols, [&](int64_t first_band, int64_t last_band) {
      std::vector<uint16_t> band(static_cast<size_t>(block_rows * cols));
      for (int64_t band_idx = first_band; band_idx < last_band; ++band_idx) {
        const int64_t row = band_idx * block_rows;
        const int64_t band_rows = std::min(block_rows, rows - row);
        fill_bf16(key, rule, row * cols, band_rows * cols, band.data());
        for (int64_t block = 0; block < scale_cols; ++block) {
          const int64_t col = block * block_cols;
          const int64_t width = std::min(block_cols, cols - col);
          float amax = 0;
          for (int64_t r = 0; r < band_rows; ++r) {
            amax = std::max(amax, largest(&band[static_cast<size_t>(r * cols + col)], width));
          }
          const int exponent = smallest_exponent(amax, kE4m3Max);
          scale[band_idx * scale_cols + block] = static_cast<uint8_t>(exponent + 127);
          const float inverse = exp2_int(-exponent);
          for (int64_t r = 0; r < band_rows; ++r) {
            const uint16_t* from = &band[static_cast<size_t>(r * cols + col)];
            uint8_t* to = out + (row + r) * cols + col;
            for (int64_t i = 0; i < width; ++i) to[i] = encode(codes, from[i], inverse);
          }
        }
      }
    });
  }

  /// Rows of 32-value blocks, two values a byte.
  void make_fp4(Slot& slot) const {
    constexpr int64_t kBlock = 32;
    const ExpectedTensor& tensor = slot.expected;
    Slot& scale_slot = find(scale_of(tensor.name));
    const int64_t rows = tensor.shape[0], cols = 2 * tensor.shape[1];
    auto* out = allocate<uint8_t>(slot, DType::kF4E2M1, tensor.shape);
    auto* scale = allocate<uint8_t>(scale_slot, DType::kF8E8M0, scale_slot.expected.shape);
    DSV4_CHECK(cols % kBlock == 0 && scale_slot.view.num_elements() == rows * (cols / kBlock));
    const uint64_t key = formula_key(tensor.name, seed_);
    const FormulaRule rule = formula_rule(tensor.name, cols);
    const auto& codes = code_table<f32_to_e2m1>();
    for_pieces(rows, cols, [&](int64_t first_row, int64_t last_row) {
      std::vector<uint16_t> values(static_cast<size_t>(cols));
      for (int64_t row = first_row; row < last_row; ++row) {
        fill_bf16(key, rule, row * cols, cols, values.data());
        for (int64_t col = 0; col < cols; col += kBlock) {
          const uint16_t* from = &values[static_cast<size_t>(col)];
          const int exponent = smallest_exponent(largest(from, kBlock), kE2m1Max);
          scale[(row * cols + col) / kBlock] = static_cast<uint8_t>(exponent + 127);
          const float inverse = exp2_int(-exponent);
          uint8_t* to = out + (row * cols + col) / 2;
          for (int64_t i = 0; i < kBlock / 2; ++i) {
            const int low = encode(codes, from[2 * i], inverse);
            const int high = encode(codes, from[2 * i + 1], inverse);
            to[i] = static_cast<uint8_t>(low | high << 4);
          }
        }
      }
    });
  }

  /// Every row lists different experts: the j-th is drawn uniformly from those that are left.
  void make_expert_table(Slot& slot) const {
    const ExpectedTensor& tensor = slot.expected;
    const std::string gate =
        tensor.name.substr(0, tensor.name.rfind('.')) + ".weight";  // [experts, hidden]
    const int64_t experts = find(gate).expected.shape[0];
    const int64_t rows = tensor.shape[0], per_row = tensor.shape[1];
    DSV4_CHECK(per_row <= experts);
    auto* out = allocate<int64_t>(slot, DType::kI64, tensor.shape);
    const uint64_t key = formula_key(tensor.name, seed_);
    std::vector<int64_t> taken;  // ascending
    for (int64_t row = 0; row < rows; ++row) {
      taken.clear();
      for (int64_t j = 0; j < per_row; ++j) {
        const auto index = static_cast<uint64_t>(row * per_row + j);
        const uint64_t draw = mix(key + (index + 1) * kGolden) >> 40;  // 24 bits
        auto id = static_cast<int64_t>(draw * static_cast<uint64_t>(experts - j) >> 24);
        for (int64_t other : taken) id += other <= id;
        taken.insert(std::upper_bound(taken.begin(), taken.end(), id), id);
        out[row * per_row + j] = id;
      }
    }
  }

  uint64_t seed_;
  FormulaStorage storage_;
  mutable std::map<std::string, Slot, std::less<>> slots_;
};

}  // namespace

double formula_uniform(uint64_t key, uint64_t index) {
  return uniform_steps(key, index) * kUnit;
}

uint64_t formula_key(std::string_view name, uint64_t seed) {
  uint64_t hash = 0xCBF29CE484222325u;  // FNV-1a
  for (char c : name) hash = (hash ^ static_cast<unsigned char>(c)) * 0x100000001B3u;
  return hash ^ (seed * kGolden);
}

FormulaRule formula_rule(std::string_view name, int64_t fan_in) {
  if (ends_with_norm(name)) return {0.25, 1.0};
  if (name.ends_with("attn_sink")) return {2.0, 0.0};
  if (name.ends_with("ape")) return {0.5, 0.0};
  if (name.ends_with("embed.weight")) return {1.0, 0.0};
  if (name.ends_with("_scale")) return {0.125, 0.25};
  if (name.ends_with("_base")) return {0.5, 0.0};
  if (name.ends_with("gate.bias")) return {0.125, 0.0};
  const double ideal = 2.0 / std::sqrt(static_cast<double>(std::max<int64_t>(fan_in, 1)));
  return {std::exp2(std::ceil(std::log2(ideal))), 0.0};
}

std::vector<float> formula_values(std::string_view name, uint64_t seed, int64_t count,
                                  const FormulaRule& rule) {
  const uint64_t key = formula_key(name, seed);
  std::vector<float> out(static_cast<size_t>(count));
  for_pieces(count, 1, [&](int64_t begin, int64_t end) {
    std::array<uint16_t, 1024> bits;
    for (int64_t i = begin; i < end; i += static_cast<int64_t>(bits.size())) {
      const int64_t n = std::min<int64_t>(static_cast<int64_t>(bits.size()), end - i);
      fill_bf16(key, rule, i, n, bits.data());
      for (int64_t j = 0; j < n; ++j) {
        out[static_cast<size_t>(i + j)] = bf16_to_f32(bits[static_cast<size_t>(j)]);
      }
    }
  });
  return out;
}

std::unique_ptr<TensorSource> formula_source(std::vector<ExpectedTensor> tensors, uint64_t seed,
                                             FormulaStorage storage) {
  return std::make_unique<FormulaSource>(std::move(tensors), seed, storage);
}

}  // namespace dsv4
