// A checkpoint folder as a TensorSource: every tensor of the table is found under a known name, in
// a storage that the code reads, with values that can be used.
#include <algorithm>
#include <bit>
#include <cmath>
#include <map>
#include <set>
#include <unordered_map>

#include "checkpoint/names.h"
#include "checkpoint/problems.h"
#include "checkpoint/shards.h"
#include "checkpoint/strict_json.h"
#include "core/fail.h"
#include "core/numbers.h"
#include "dsv4/checkpoint.h"

namespace dsv4 {
namespace {

constexpr size_t kMaxListed = 8;
/// Values of larger checkpoints are not looked at (reading them all would take minutes): only the
/// block scales of their FP8 matrices are, and their routing tables.
constexpr int64_t kMaxScannedBytes = int64_t{1} << 30;

struct Stored {
  ConstTensor view;
  const SafetensorsFile* file = nullptr;
  std::string file_name_of_tensor;  // as the file names it
};

bool is_unquantised(DType dtype) {
  return dtype == DType::kBf16 || dtype == DType::kF32;
}

std::string describe_shape(const std::vector<int64_t>& shape) {
  std::string out = "[";
  for (size_t i = 0; i < shape.size(); ++i) out += concat(i > 0 ? ", " : "", shape[i]);
  return out + "]";
}

bool has_shape(const ConstTensor& tensor, const std::vector<int64_t>& shape) {
  return static_cast<size_t>(tensor.rank) == shape.size() &&
         std::equal(shape.begin(), shape.end(), tensor.shape.begin());
}

/// Index of the first element that `is_bad`, or -1. Blocks are tested as a whole first, which
/// compilers vectorise.
template <typename T, typename F>
int64_t find_bad(const T* values, int64_t count, F is_bad) {
  constexpr int64_t kBlock = 4096;
  for (int64_t begin = 0; begin < count; begin += kBlock) {
    const int64_t end = std::min(begin + kBlock, count);
    unsigned any = 0;
    for (int64_t i = begin; i < end; ++i) any |= static_cast<unsigned>(is_bad(values[i]));
    if (any == 0) continue;
    for (int64_t i = begin; i < end; ++i) {
      if (is_bad(values[i])) return i;
    }
  }
  return -1;
}

class CheckpointSource final : public TensorSource {
 public:
  CheckpointSource(const std::string& directory, const ModelConfig& config)
      : directory_(directory), config_(config), files_(open_shards(directory)) {
    const std::vector<ExpectedTensor> expected = expected_tensors(config);
    Problems problems(kMaxListed);
    recognise_names(expected, problems);
    accept(expected, problems);
    check_values(expected, problems);
    problems.raise(directory + ": the checkpoint does not fit its config:");
  }

  bool contains(std::string_view name) const override {
    return tensors_.find(name) != tensors_.end();
  }
  ConstTensor get(std::string_view name) const override { return find(name).view; }
  std::string origin(std::string_view name) const override { return origin_of(find(name), name); }

 private:
  const Stored& find(std::string_view name) const {
    const auto it = tensors_.find(name);
    if (it == tensors_.end()) {
      fail(ErrorCode::kNotFound, "tensor '", printable(name), "': not in ", directory_);
    }
    return it->second;
  }
  static std::string origin_of(const Stored& stored, std::string_view name) {
    if (stored.file_name_of_tensor == name) return stored.file->path();
    return concat(stored.file->path(), " (as '", stored.file_name_of_tensor, "')");
  }
  std::byte* own(int64_t bytes) {
    owned_.push_back(std::make_unique<std::byte[]>(static_cast<size_t>(bytes)));
    return owned_.back().get();
  }

  // ---- names: every tensor of the files gets its released name ----

  void recognise_names(const std::vector<ExpectedTensor>& expected, Problems& problems) {
    std::unordered_map<std::string, const std::string*> released;
    for (const ExpectedTensor& tensor : expected) {
      released.emplace(tensor.name, &tensor.name);
      for (std::string& name : hugging_face_names(tensor.name)) {
        released.emplace(std::move(name), &tensor.name);
      }
    }
    for (const SafetensorsFile& file : files_) {
      for (const std::string& name : file.names()) {
        if (const auto it = released.find(name); it != released.end()) {
          hugging_face_ |= name != *it->second;
          store(*it->second, name, file, problems);
        } else if (const auto stacked = parse_stacked_experts(name)) {
          hugging_face_ = true;
          unstack_experts(*stacked, name, file, problems);
        } else {
          problems.add(ErrorCode::kDataCorrupt, file.path(), ": tensor '", printable(name),
                       "': expected no such tensor in this model");
        }
      }
    }
  }

  void store(const std::string& released, const std::string& name, const SafetensorsFile& file,
             Problems& problems) {
    Stored stored{.view = {}, .file = &file, .file_name_of_tensor = name};
    try {
      stored.view = file.get(name);
    } catch (const Error& error) {  // a dtype or rank that nothing reads; said with the others
      problems.add(error.code(), error.what());
      refused_.insert(released);
      return;
    }
    put(released, std::move(stored), problems);
  }
  void put(const std::string& released, Stored stored, Problems& problems) {
    const std::string origin = origin_of(stored, "");
    const auto [it, inserted] = tensors_.emplace(released, std::move(stored));
    if (inserted) return;
    problems.add(ErrorCode::kDataCorrupt, "tensor '", released, "': expected once, given in ",
                 origin_of(it->second, ""), " and in ", origin);
  }

  void unstack_experts(const StackedExperts& stacked, const std::string& name,
                       const SafetensorsFile& file, Problems& problems) {
    const int64_t experts = config_.n_routed_experts, inner = config_.moe_intermediate_size;
    const int64_t hidden = config_.hidden_size;
    const std::vector<int64_t> shape = stacked.gate_up
                                           ? std::vector<int64_t>{experts, 2 * inner, hidden}
                                           : std::vector<int64_t>{experts, hidden, inner};
    ConstTensor all;
    try {
      all = file.get(name);
    } catch (const Error& error) {
      problems.add(error.code(), error.what());
      return;
    }
    if (stacked.layer >= config_.num_hidden_layers || !has_shape(all, shape) ||
        !is_unquantised(all.dtype)) {
      problems.add(ErrorCode::kDataCorrupt, file.path(), ": tensor '", printable(name),
                   "': expected ", describe_shape(shape),
                   stacked.gate_up ? " (n_routed_experts x 2 * moe_intermediate_size x hidden_size)"
                                   : " (n_routed_experts x hidden_size x moe_intermediate_size)",
                   " bf16 or f32 in layers 0 to ", config_.num_hidden_layers - 1, ", given ",
                   describe(all));
      return;
    }
    const auto view = [&](int64_t expert, int64_t first_row, int64_t rows) {
      const char* data =
          static_cast<const char*>(all.data) +
          (expert * all.strides[0] + first_row * all.strides[1]) * size_of(all.dtype);
      return ConstTensor(data, all.dtype, {rows, all.shape[2]});
    };
    for (int64_t expert = 0; expert < experts; ++expert) {
      const std::string stem = concat("layers.", stacked.layer, ".ffn.experts.", expert, ".");
      const auto put_view = [&](const char* matrix, const ConstTensor& tensor) {
        put(stem + matrix + ".weight", {.view = tensor, .file = &file, .file_name_of_tensor = name},
            problems);
      };
      if (stacked.gate_up) {
        put_view("w1", view(expert, 0, inner));
        put_view("w3", view(expert, inner, inner));
      } else {
        put_view("w2", view(expert, 0, hidden));
      }
    }
  }

  // ---- shapes and storage ----

  void accept(const std::vector<ExpectedTensor>& expected, Problems& problems) {
    const auto first_mtp = tensors_.lower_bound("mtp.");
    const bool has_mtp = first_mtp != tensors_.end() && first_mtp->first.starts_with("mtp.");
    std::string unquantised_stem;  // of the last weight: its scale, next in the table, is not due
    for (const ExpectedTensor& tensor : expected) {
      // transformers drops the MTP layers when it saves; bind_model does without them.
      if (hugging_face_ && !has_mtp && tensor.name.starts_with("mtp.")) continue;
      const size_t dot = tensor.name.rfind('.');
      const std::string stem = tensor.name.substr(0, dot);
      const bool scale = tensor.dtype == DType::kF8E8M0;
      const auto it = tensors_.find(tensor.name);
      if (scale && stem == unquantised_stem) {
        if (it != tensors_.end()) {
          problems.add(ErrorCode::kDataCorrupt, origin_of(it->second, tensor.name), ": tensor '",
                       tensor.name, "': expected none beside ", stem,
                       ".weight, which is not quantised");
        }
        continue;
      }
      if (it == tensors_.end()) {
        if (refused_.count(tensor.name) > 0) continue;
        problems.add(ErrorCode::kNotFound, "tensor '", tensor.name, "': missing in ", directory_,
                     ", expected ", describe_shape(tensor.shape), " ", dtype_name(tensor.dtype),
                     " (", tensor.meaning, ")");
        continue;
      }
      if (!fit(tensor, it->second)) {
        problems.add(ErrorCode::kDataCorrupt, origin_of(it->second, tensor.name), ": tensor '",
                     tensor.name, "': expected ", describe_shape(tensor.shape), " ",
                     dtype_name(tensor.dtype), " (", tensor.meaning, "), given ",
                     describe(it->second.view));
      } else if (scale && it->second.view.dtype == DType::kF32) {
        convert_scale(tensor, it->second, problems);
      } else if (is_unquantised(it->second.view.dtype)) {
        unquantised_stem = stem;
      }
    }
  }

  /// Whether the stored tensor can serve; converts small parameters to the table's dtype.
  bool fit(const ExpectedTensor& tensor, Stored& stored) {
    ConstTensor& view = stored.view;
    const DType given = view.dtype;
    std::vector<int64_t> shape = tensor.shape;
    switch (tensor.dtype) {
      case DType::kBf16:
      case DType::kF8E4M3:
        return has_shape(view, shape) && (given == tensor.dtype || is_unquantised(given));
      case DType::kF4E2M1:
        if (is_unquantised(given)) {
          shape.back() *= 2;
          return has_shape(view, shape);
        }
        if (given != DType::kU8 || !has_shape(view, shape)) return false;
        view.dtype = DType::kF4E2M1;
        return true;
      case DType::kF8E8M0:
        if (!has_shape(view, shape)) return false;
        // U8: torch versions without this type stored the same bytes so.
        if (given == DType::kU8) view.dtype = DType::kF8E8M0;
        return given == DType::kU8 || given == DType::kF8E8M0 || given == DType::kF32;
      case DType::kF32:
        if (!has_shape(view, shape)) return false;
        if (given == DType::kBf16) convert<uint16_t, float>(view, DType::kF32, bf16_to_f32);
        return is_unquantised(given);
      case DType::kI64:
        if (!has_shape(view, shape)) return false;
        if (given == DType::kI32) {
          convert<int32_t, int64_t>(view, DType::kI64, [](int32_t id) { return int64_t{id}; });
        }
        return given == DType::kI32 || given == DType::kI64;
      default:
        return false;
    }
  }

  template <typename From, typename To, typename F>
  void convert(ConstTensor& view, DType dtype, F to) {
    const int64_t count = view.num_elements();
    auto* out = reinterpret_cast<To*>(own(count * int64_t{sizeof(To)}));
    std::transform(view.as<From>(), view.as<From>() + count, out, to);
    view.data = out;
    view.dtype = dtype;
  }

  /// F32 scales hold powers of two in checkpoints of scale_fmt ue8m0; the byte is the exponent.
  void convert_scale(const ExpectedTensor& tensor, Stored& stored, Problems& problems) {
    const float* values = stored.view.as<float>();
    const int64_t count = stored.view.num_elements();
    const auto is_bad = [](float value) {
      int exponent;
      return !(std::isfinite(value) && value > 0 && std::frexp(value, &exponent) == 0.5f &&
               exponent - 1 >= -127);
    };
    if (const int64_t bad = find_bad(values, count, is_bad); bad >= 0) {
      problems.add(ErrorCode::kUnsupported, origin_of(stored, tensor.name), ": tensor '",
                   tensor.name, "': expected powers of two from 2^-127 to 2^127, given ",
                   values[bad], " at [", bad / tensor.shape[1], ", ", bad % tensor.shape[1], "]");
      return;
    }
    auto* out = reinterpret_cast<uint8_t*>(own(count));
    std::transform(values, values + count, out,
                   [](float value) { return static_cast<uint8_t>(std::ilogb(value) + 127); });
    stored.view.data = out;
    stored.view.dtype = DType::kF8E8M0;
  }

  // ---- values ----

  void check_values(const std::vector<ExpectedTensor>& expected, Problems& problems) const {
    if (!problems.empty()) return;  // a tensor of another shape has no meaningful positions
    int64_t total = 0;
    for (const auto& item : tensors_) total += item.second.view.num_bytes();
    const bool scan_all = total < kMaxScannedBytes;
    for (const ExpectedTensor& tensor : expected) {
      const auto it = tensors_.find(tensor.name);
      if (it == tensors_.end()) continue;
      const bool expert = tensor.name.find(".experts.") != std::string::npos;
      const ConstTensor& view = it->second.view;
      const bool always = view.dtype == DType::kI64 || (view.dtype == DType::kF8E8M0 && !expert);
      if (scan_all || always) check_values_of(tensor, it->second, problems);
    }
  }

  void check_values_of(const ExpectedTensor& tensor, const Stored& stored,
                       Problems& problems) const {
    const ConstTensor& view = stored.view;
    const int64_t count = view.num_elements();
    const auto report = [&](int64_t bad, const std::string& what, auto given) {
      if (bad < 0) return;
      const int64_t cols = view.rank > 1 ? view.shape[view.rank - 1] : count;
      problems.add(ErrorCode::kDataCorrupt, origin_of(stored, tensor.name), ": tensor '",
                   tensor.name, "': expected ", what, ", given ", given, " at [",
                   view.rank > 1 ? concat(bad / cols, ", ") : "", bad % cols, "]");
    };
    switch (view.dtype) {
      case DType::kF8E8M0: {
        const int64_t bad =
            find_bad(view.as<uint8_t>(), count, [](uint8_t byte) { return byte == 255; });
        return report(bad, "finite scales (bytes 0 to 254)", "255");
      }
      case DType::kF8E4M3: {
        const int64_t bad =
            find_bad(view.as<uint8_t>(), count, [](uint8_t code) { return (code & 0x7f) == 0x7f; });
        return report(bad, "numbers", "NaN");
      }
      case DType::kBf16: {
        const int64_t bad = find_bad(view.as<uint16_t>(), count,
                                     [](uint16_t bits) { return (bits & 0x7fff) > 0x7f80; });
        return report(bad, "numbers", "NaN");
      }
      case DType::kF32: {
        const int64_t bad =
            find_bad(view.as<float>(), count, [](float value) { return value != value; });
        return report(bad, "numbers", "NaN");
      }
      case DType::kI64: {
        const int64_t* ids = view.as<int64_t>();
        const int64_t experts = config_.n_routed_experts;
        const int64_t bad =
            find_bad(ids, count, [=](int64_t id) { return id < 0 || id >= experts; });
        return report(bad, concat("expert ids from 0 to ", experts - 1), bad < 0 ? 0 : ids[bad]);
      }
      default:
        return;
    }
  }

  std::string directory_;
  ModelConfig config_;
  std::vector<SafetensorsFile> files_;  // not changed after construction: Stored points into it
  std::map<std::string, Stored, std::less<>> tensors_;
  std::set<std::string> refused_;  // present, but unreadable: reported once
  std::vector<std::unique_ptr<std::byte[]>> owned_;
  bool hugging_face_ = false;
};

}  // namespace

std::unique_ptr<TensorSource> open_checkpoint(const std::string& directory,
                                              const ModelConfig& config) {
  return std::make_unique<CheckpointSource>(directory, config);
}

}  // namespace dsv4
