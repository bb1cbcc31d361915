#include "checkpoint/safetensors.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <optional>

#include <nlohmann/json.hpp>

#include "checkpoint/strict_json.h"
#include "core/checked_math.h"
#include "core/fail.h"

namespace dsv4 {
namespace {

using nlohmann::json;

static_assert(std::endian::native == std::endian::little, "tensors are stored little-endian");

constexpr int64_t kLengthBytes = 8;
/// Limit of the format; it also bounds the memory that parsing takes.
constexpr uint64_t kMaxHeaderBytes = 100'000'000;

struct StoredType {
  const char* name;
  int64_t bytes;
  std::optional<DType> dtype;  // nullopt: known to the format, not used here
};
const StoredType kStoredTypes[] = {
    {"F32", 4, DType::kF32},        {"BF16", 2, DType::kBf16},    {"F8_E4M3", 1, DType::kF8E4M3},
    {"F8_E8M0", 1, DType::kF8E8M0}, {"I8", 1, DType::kU8},        {"U8", 1, DType::kU8},
    {"I64", 8, DType::kI64},        {"I32", 4, DType::kI32},      {"F16", 2, std::nullopt},
    {"F64", 8, std::nullopt},       {"F8_E5M2", 1, std::nullopt}, {"I16", 2, std::nullopt},
    {"U16", 2, std::nullopt},       {"U32", 4, std::nullopt},     {"U64", 8, std::nullopt},
    {"BOOL", 1, std::nullopt},
};
const char kReadableTypes[] = "F32, BF16, F8_E4M3, F8_E8M0, I8, U8, I64, I32";

struct Extent {
  int64_t begin, end;
  const std::string* name;
};

std::optional<int64_t> non_negative(const json& value) {
  if (!value.is_number_unsigned()) return std::nullopt;
  const uint64_t given = value.get<uint64_t>();
  if (given > static_cast<uint64_t>(INT64_MAX)) return std::nullopt;
  return static_cast<int64_t>(given);
}

}  // namespace

SafetensorsFile::SafetensorsFile(const std::string& path) : file_(path) {
  const auto bytes = file_.bytes();
  const auto file_bytes = static_cast<int64_t>(bytes.size());
  if (file_bytes < kLengthBytes) {
    fail(ErrorCode::kDataCorrupt, path, ": expected a safetensors file of at least ", kLengthBytes,
         " bytes, given ", file_bytes);
  }
  uint64_t header_bytes;
  std::memcpy(&header_bytes, bytes.data(), sizeof(header_bytes));
  if (header_bytes > kMaxHeaderBytes ||
      static_cast<int64_t>(header_bytes) > file_bytes - kLengthBytes) {
    fail(ErrorCode::kDataCorrupt, path, ": header length: expected at most ",
         std::min<int64_t>(static_cast<int64_t>(kMaxHeaderBytes), file_bytes - kLengthBytes),
         " (the file has ", file_bytes, " bytes), given ", header_bytes,
         "; the file is truncated or no safetensors file");
  }
  const std::string_view header_text(reinterpret_cast<const char*>(bytes.data()) + kLengthBytes,
                                     header_bytes);
  const json header = parse_strict_json(header_text, path + " (header)");
  if (!header.is_object()) {
    fail(ErrorCode::kDataCorrupt, path, ": header: expected a JSON object, given ",
         excerpt(header));
  }
  const std::byte* data = bytes.data() + kLengthBytes + header_bytes;
  const int64_t data_bytes = file_bytes - kLengthBytes - static_cast<int64_t>(header_bytes);

  std::vector<Extent> extents;
  for (const auto& [name, description] : header.items()) {
    if (name == "__metadata__") continue;
    const std::string where = path + ": tensor '" + printable(name) + "'";
    const auto corrupt = [&](const char* what, const char* expected, const json& given) {
      fail(ErrorCode::kDataCorrupt, where, ": ", what, ": expected ", expected, ", given ",
           excerpt(given));
    };
    if (!description.is_object()) corrupt("description", "an object", description);
    const auto field = [&](const char* key) -> const json& {
      const auto it = description.find(key);
      if (it == description.end()) {
        fail(ErrorCode::kDataCorrupt, where, ": ", key, ": missing; expected dtype, shape and ",
             "data_offsets");
      }
      return *it;
    };

    const json& dtype = field("dtype");
    if (!dtype.is_string()) corrupt("dtype", "a string", dtype);
    const auto& dtype_text = dtype.get_ref<const std::string&>();
    const StoredType* type = nullptr;
    for (const StoredType& candidate : kStoredTypes) {
      if (dtype_text == candidate.name) type = &candidate;
    }
    if (type == nullptr) {
      fail(ErrorCode::kUnsupported, where, ": dtype: expected one of ", kReadableTypes, ", given ",
           excerpt(dtype));
    }

    const json& shape = field("shape");
    if (!shape.is_array()) corrupt("shape", "an array of sizes", shape);
    int64_t size = type->bytes;
    std::vector<int64_t> extents_of_tensor;
    for (const json& value : shape) {
      const std::optional<int64_t> extent = non_negative(value);
      if (!extent) corrupt("shape", "an array of sizes that fit 63 bits", shape);
      const std::optional<int64_t> product = checked_mul(size, *extent);
      if (!product) corrupt("shape", "a size in bytes that fits 63 bits", shape);
      size = *product;
      extents_of_tensor.push_back(*extent);
    }

    const json& offsets = field("data_offsets");
    const bool pair = offsets.is_array() && offsets.size() == 2;
    const std::optional<int64_t> begin = pair ? non_negative(offsets[0]) : std::nullopt;
    const std::optional<int64_t> end = pair ? non_negative(offsets[1]) : std::nullopt;
    if (!begin || !end || *begin > *end) corrupt("data_offsets", "[begin, end]", offsets);
    if (*end > data_bytes) {
      fail(ErrorCode::kDataCorrupt, where, ": data_offsets ", excerpt(offsets),
           ": expected an end of at most ", data_bytes, " (bytes after the header), given ", *end,
           "; the file is truncated");
    }
    if (*end - *begin != size) {
      fail(ErrorCode::kDataCorrupt, where, ": data_offsets ", excerpt(offsets), ": expected ", size,
           " bytes for shape ", excerpt(shape), " ", type->name, ", given ", *end - *begin);
    }

    Entry entry;
    entry.stored_dtype = type->name;
    if (!type->dtype) {
      entry.unsupported = concat("dtype: expected one of ", kReadableTypes, ", given ", type->name);
    } else if (extents_of_tensor.size() > kMaxRank) {
      entry.unsupported =
          concat("rank: expected at most ", kMaxRank, ", given shape ", excerpt(shape));
    } else {
      ConstTensor& view = entry.view;
      view.data = data + *begin;
      view.dtype = *type->dtype;
      view.rank = static_cast<int>(extents_of_tensor.size());
      int64_t stride = 1;
      for (int i = view.rank - 1; i >= 0; --i) {
        view.shape[i] = extents_of_tensor[static_cast<size_t>(i)];
        view.strides[i] = stride;
        // Cannot overflow unless another extent is 0, and then nothing is ever addressed.
        stride = checked_mul(stride, view.shape[i]).value_or(0);
      }
      // The format does not promise alignment; code that reads floats needs it.
      if (size > 0 &&
          reinterpret_cast<uintptr_t>(view.data) % static_cast<uintptr_t>(type->bytes)) {
        aligned_copies_.push_back(std::make_unique<std::byte[]>(static_cast<size_t>(size)));
        std::memcpy(aligned_copies_.back().get(), view.data, static_cast<size_t>(size));
        view.data = aligned_copies_.back().get();
      }
    }
    const auto position = tensors_.emplace(name, std::move(entry)).first;
    if (size > 0) extents.push_back({*begin, *end, &position->first});
  }

  std::sort(extents.begin(), extents.end(),
            [](const Extent& a, const Extent& b) { return a.begin < b.begin; });
  for (size_t i = 1; i < extents.size(); ++i) {
    if (extents[i].begin < extents[i - 1].end) {
      fail(ErrorCode::kDataCorrupt, path, ": tensor '", printable(*extents[i].name),
           "': data_offsets: expected a begin of at least ", extents[i - 1].end, " (end of '",
           printable(*extents[i - 1].name), "'), given ", extents[i].begin,
           "; the two tensors overlap");
    }
  }
}

const SafetensorsFile::Entry& SafetensorsFile::find(std::string_view name) const {
  const auto it = tensors_.find(name);
  if (it == tensors_.end()) {
    fail(ErrorCode::kNotFound, path(), ": no tensor '", printable(name), "' among its ",
         tensors_.size());
  }
  return it->second;
}

std::vector<std::string> SafetensorsFile::names() const {
  std::vector<std::string> out;
  out.reserve(tensors_.size());
  for (const auto& item : tensors_) out.push_back(item.first);
  return out;
}

ConstTensor SafetensorsFile::get(std::string_view name) const {
  const Entry& entry = find(name);
  if (!entry.unsupported.empty()) {
    fail(ErrorCode::kUnsupported, path(), ": tensor '", printable(name), "': ", entry.unsupported);
  }
  return entry.view;
}

const std::string& SafetensorsFile::stored_dtype(std::string_view name) const {
  return find(name).stored_dtype;
}

}  // namespace dsv4
