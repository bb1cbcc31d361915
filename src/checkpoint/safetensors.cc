#include "checkpoint/safetensors.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <optional>
#include <span>

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
constexpr int64_t kMaxHeaderBytes = 100'000'000;

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

/// What the header says of one tensor, checked against itself and the size of the data.
struct Description {
  const StoredType* type = nullptr;
  std::vector<int64_t> shape;
  int64_t begin = 0, end = 0;  // within the data
  int64_t size() const { return end - begin; }
};

[[noreturn]] void corrupt(const std::string& where, const char* what, const std::string& expected,
                          const json& given) {
  fail(ErrorCode::kDataCorrupt, where, ": ", what, ": expected ", expected, ", given ",
       excerpt(given));
}

Description read_description(const json& object, int64_t data_bytes, const std::string& where) {
  Description out;
  if (!object.is_object()) corrupt(where, "description", "an object", object);
  for (const char* key : {"dtype", "shape", "data_offsets"}) {
    if (!object.contains(key)) {
      fail(ErrorCode::kDataCorrupt, where, ": ", key, ": missing, expected dtype, shape and ",
           "data_offsets");
    }
  }
  const json& dtype = object["dtype"];
  if (!dtype.is_string()) corrupt(where, "dtype", "a string", dtype);
  for (const StoredType& candidate : kStoredTypes) {
    if (dtype.get_ref<const std::string&>() == candidate.name) out.type = &candidate;
  }
  if (out.type == nullptr) {
    fail(ErrorCode::kUnsupported, where, ": dtype: expected one of ", kReadableTypes, ", given ",
         excerpt(dtype));
  }

  const json& shape = object["shape"];
  if (!shape.is_array()) corrupt(where, "shape", "an array of sizes", shape);
  // Extents of 0 count as 1 here, so that strides and partial products of a view fit as well.
  int64_t size = out.type->bytes;
  bool empty = false;
  for (const json& value : shape) {
    const std::optional<int64_t> extent = non_negative(value);
    const std::optional<int64_t> product =
        extent ? checked_mul(size, std::max<int64_t>(*extent, 1)) : std::nullopt;
    if (!product) corrupt(where, "shape", "sizes whose product in bytes fits 63 bits", shape);
    size = *product;
    empty |= *extent == 0;
    out.shape.push_back(*extent);
  }
  if (empty) size = 0;

  const json& offsets = object["data_offsets"];
  const bool pair = offsets.is_array() && offsets.size() == 2;
  const std::optional<int64_t> begin = pair ? non_negative(offsets[0]) : std::nullopt;
  const std::optional<int64_t> end = pair ? non_negative(offsets[1]) : std::nullopt;
  if (!begin || !end || *begin > *end) {
    corrupt(where, "data_offsets", "[begin, end] with 0 <= begin <= end", offsets);
  }
  if (*end > data_bytes) {
    fail(ErrorCode::kDataCorrupt, where, ": data_offsets: expected an end of at most ", data_bytes,
         " (bytes after the header), given ", *end, "; the file is truncated");
  }
  if (*end - *begin != size) {
    fail(ErrorCode::kDataCorrupt, where, ": data_offsets: expected ", size, " bytes for ",
         out.type->name, " ", excerpt(shape), ", given ", *end - *begin);
  }
  out.begin = *begin;
  out.end = *end;
  return out;
}

/// The header's JSON; `data_begin` is set to the offset of the first byte after it.
json read_header(std::span<const std::byte> bytes, const std::string& path, int64_t& data_begin) {
  const auto file_bytes = static_cast<int64_t>(bytes.size());
  if (file_bytes < kLengthBytes) {
    fail(ErrorCode::kDataCorrupt, path, ": expected a safetensors file of at least ", kLengthBytes,
         " bytes, given ", file_bytes);
  }
  uint64_t header_bytes;
  std::memcpy(&header_bytes, bytes.data(), sizeof(header_bytes));
  const int64_t limit = std::min(kMaxHeaderBytes, file_bytes - kLengthBytes);
  if (header_bytes > static_cast<uint64_t>(limit)) {
    fail(ErrorCode::kDataCorrupt, path, ": header length: expected at most ", limit,
         " (the file has ", file_bytes, " bytes), given ", header_bytes,
         "; the file is truncated or no safetensors file");
  }
  data_begin = kLengthBytes + static_cast<int64_t>(header_bytes);
  json header =
      parse_strict_json({reinterpret_cast<const char*>(bytes.data()) + kLengthBytes, header_bytes},
                        path + " (header)");
  if (!header.is_object()) {
    fail(ErrorCode::kDataCorrupt, path, ": header: expected a JSON object, given ",
         excerpt(header));
  }
  return header;
}

ConstTensor make_view(const Description& description, const std::byte* data) {
  ConstTensor view;
  view.data = data;
  view.dtype = *description.type->dtype;
  view.rank = static_cast<int>(description.shape.size());
  int64_t stride = 1;
  for (int i = view.rank - 1; i >= 0; --i) {
    view.shape[i] = description.shape[static_cast<size_t>(i)];
    view.strides[i] = stride;
    stride *= view.shape[i];
  }
  return view;
}

}  // namespace

SafetensorsFile::SafetensorsFile(const std::string& path) : file_(path) {
  int64_t data_begin = 0;
  const json header = read_header(file_.bytes(), path, data_begin);
  const std::byte* data = file_.bytes().data() + data_begin;
  const int64_t data_bytes = static_cast<int64_t>(file_.bytes().size()) - data_begin;
  std::vector<Extent> extents;
  for (const auto& item : header.items()) {
    if (item.key() == "__metadata__") continue;
    const Description description = read_description(
        item.value(), data_bytes, path + ": tensor '" + printable(item.key()) + "'");
    Entry entry;
    entry.stored_dtype = description.type->name;
    if (!description.type->dtype) {
      entry.unsupported =
          concat("dtype: expected one of ", kReadableTypes, ", given ", description.type->name);
    } else if (description.shape.size() > kMaxRank) {
      entry.unsupported =
          concat("rank: expected at most ", kMaxRank, ", given ", description.shape.size());
    } else {
      entry.view = make_view(description, data + description.begin);
    }
    const auto position = tensors_.emplace(item.key(), std::move(entry)).first;
    if (description.size() > 0) {
      extents.push_back({description.begin, description.end, &position->first});
    }
  }
  std::sort(extents.begin(), extents.end(),
            [](const Extent& a, const Extent& b) { return a.begin < b.begin; });
  for (size_t i = 1; i < extents.size(); ++i) {
    if (extents[i].begin >= extents[i - 1].end) continue;
    fail(ErrorCode::kDataCorrupt, path, ": tensor '", printable(*extents[i].name),
         "': data_offsets: expected a begin of at least ", extents[i - 1].end, " (end of '",
         printable(*extents[i - 1].name), "'), given ", extents[i].begin,
         "; the two tensors overlap");
  }
  align();
}

void SafetensorsFile::align() {
  for (auto& item : tensors_) {
    ConstTensor& view = item.second.view;
    const auto alignment = static_cast<uintptr_t>(size_of(view.dtype));
    const auto bytes = static_cast<size_t>(view.num_bytes());
    if (view.data == nullptr || bytes == 0) continue;
    if (reinterpret_cast<uintptr_t>(view.data) % alignment == 0) continue;
    aligned_copies_.push_back(std::make_unique<std::byte[]>(bytes));
    std::memcpy(aligned_copies_.back().get(), view.data, bytes);
    view.data = aligned_copies_.back().get();
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
