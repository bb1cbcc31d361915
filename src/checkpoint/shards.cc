#include "checkpoint/shards.h"

#include <filesystem>
#include <map>
#include <set>

#include <nlohmann/json.hpp>

#include "checkpoint/problems.h"
#include "checkpoint/strict_json.h"
#include "core/fail.h"

namespace dsv4 {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;

constexpr size_t kMaxIndexBytes = size_t{256} << 20;
constexpr size_t kMaxListed = 8;

/// file name -> tensors that the index puts there. metadata.total_size is not compared: published
/// indices count it in different ways, and the tensors themselves are checked one by one.
std::map<std::string, std::vector<std::string>> read_index(const std::string& path) {
  const MappedFile file(path);
  if (file.bytes().size() > kMaxIndexBytes) {
    fail(ErrorCode::kDataCorrupt, path, ": expected an index of at most ", kMaxIndexBytes,
         " bytes, given ", file.bytes().size());
  }
  const json index = parse_strict_json(
      {reinterpret_cast<const char*>(file.bytes().data()), file.bytes().size()}, path);
  const json* map =
      index.is_object() && index.contains("weight_map") ? &index["weight_map"] : nullptr;
  if (map == nullptr || !map->is_object() || map->empty()) {
    fail(ErrorCode::kDataCorrupt, path,
         ": weight_map: expected an object from tensor names to file names, given ",
         map == nullptr ? "none" : excerpt(*map));
  }
  std::map<std::string, std::vector<std::string>> out;
  for (const auto& [tensor, file_name] : map->items()) {
    // A name with a folder in it could reach outside the checkpoint.
    const std::string name = file_name.is_string() ? file_name.get<std::string>() : "";
    if (name.empty() || name == "." || name == ".." ||
        name.find_first_of(std::string("/\\\0", 3)) != std::string::npos) {
      fail(ErrorCode::kDataCorrupt, path, ": weight_map['", printable(tensor),
           "']: expected the name of a file in this folder, given ", excerpt(file_name));
    }
    out[name].push_back(tensor);
  }
  return out;
}

}  // namespace

std::vector<SafetensorsFile> open_shards(const std::string& directory) {
  std::error_code ignored;  // what cannot be examined is not there, for us
  if (!fs::is_directory(directory, ignored)) {
    fail(ErrorCode::kNotFound, directory, ": expected a folder with a checkpoint");
  }
  const std::string index = directory + "/model.safetensors.index.json";
  const std::string single = directory + "/model.safetensors";
  std::vector<SafetensorsFile> out;
  if (!fs::exists(index, ignored)) {
    if (!fs::exists(single, ignored)) {
      fail(ErrorCode::kNotFound, directory, ": expected ", fs::path(index).filename().string(),
           " or ", fs::path(single).filename().string(), ", given neither");
    }
    out.emplace_back(single);
    return out;
  }
  Problems problems(kMaxListed);
  for (const auto& [file_name, tensors] : read_index(index)) {
    const std::string path = directory + "/" + file_name;
    if (!fs::exists(path, ignored)) {
      problems.add(ErrorCode::kNotFound, path, ": missing; ", index, " expects ", tensors.size(),
                   " tensors there, the first is '", printable(tensors.front()), "'");
      continue;
    }
    out.emplace_back(path);
    const SafetensorsFile& file = out.back();
    for (const std::string& tensor : tensors) {
      if (file.contains(tensor)) continue;
      problems.add(ErrorCode::kDataCorrupt, "tensor '", printable(tensor), "': expected in ", path,
                   " (", index, "), not there");
    }
    const std::vector<std::string> stored = file.names();
    if (stored.size() <= tensors.size()) continue;
    const std::set<std::string> listed(tensors.begin(), tensors.end());
    for (const std::string& name : stored) {
      if (listed.count(name) > 0) continue;
      problems.add(ErrorCode::kDataCorrupt, path, ": tensor '", printable(name),
                   "': not listed in ", index);
    }
  }
  problems.raise(directory + ": the files do not agree with their index:");
  return out;
}

}  // namespace dsv4
