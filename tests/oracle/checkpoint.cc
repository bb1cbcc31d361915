#include "tests/oracle/checkpoint.h"

#include <cstring>
#include <fstream>
#include <nlohmann/json.hpp>
#include <set>
#include <stdexcept>

#include "tests/oracle/numbers.h"

namespace oracle {
namespace {

template <typename T>
T load(const std::vector<uint8_t>& bytes, int64_t i) {
  T value;
  std::memcpy(&value, bytes.data() + i * static_cast<int64_t>(sizeof(T)), sizeof(T));
  return value;
}

float bf16_value(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, sizeof(value));
  return value;
}

int64_t count_of(const StoredTensor& tensor) {
  int64_t count = 1;
  for (int64_t extent : tensor.shape) count *= extent;
  return count;
}

}  // namespace

std::map<std::string, StoredTensor> read_safetensors(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw std::runtime_error(path + ": cannot be opened");
  uint64_t header_bytes = 0;
  file.read(reinterpret_cast<char*>(&header_bytes), sizeof(header_bytes));
  if (!file || header_bytes > (uint64_t{1} << 28)) {
    throw std::runtime_error(path + ": not a safetensors file");
  }
  std::string header(header_bytes, '\0');
  file.read(header.data(), static_cast<std::streamsize>(header_bytes));
  std::map<std::string, StoredTensor> out;
  const nlohmann::json tensors = nlohmann::json::parse(header);
  for (const auto& [name, entry] : tensors.items()) {
    if (name == "__metadata__") continue;
    StoredTensor tensor;
    tensor.dtype = entry.at("dtype").get<std::string>();
    tensor.shape = entry.at("shape").get<std::vector<int64_t>>();
    const auto begin = entry.at("data_offsets").at(0).get<uint64_t>();
    const auto end = entry.at("data_offsets").at(1).get<uint64_t>();
    tensor.bytes.resize(end - begin);
    file.seekg(static_cast<std::streamoff>(sizeof(header_bytes) + header_bytes + begin));
    file.read(reinterpret_cast<char*>(tensor.bytes.data()),
              static_cast<std::streamsize>(tensor.bytes.size()));
    if (!file) throw std::runtime_error(path + ": " + name + " ends past the file");
    out.emplace(name, std::move(tensor));
  }
  return out;
}

Tensors::Tensors(const std::string& path) {
  if (path.ends_with(".safetensors")) {
    stored_ = read_safetensors(path);
    return;
  }
  std::ifstream index(path + "/model.safetensors.index.json");
  if (!index) throw std::runtime_error(path + ": no model.safetensors.index.json");
  std::set<std::string> files;
  const nlohmann::json json = nlohmann::json::parse(index);
  for (const auto& [name, file] : json.at("weight_map").items()) {
    files.insert(file.get<std::string>());
  }
  for (const std::string& file : files) stored_.merge(read_safetensors(path + "/" + file));
}

const StoredTensor& Tensors::stored(const std::string& name) const {
  const auto found = stored_.find(name);
  if (found == stored_.end()) throw std::runtime_error("no tensor named " + name);
  return found->second;
}

Weight Tensors::weight(const std::string& name) const {
  const StoredTensor& tensor = stored(name);
  const bool packed = tensor.dtype == "I8";  // two E2M1 values a byte
  Weight out;
  out.cols = tensor.shape.back() * (packed ? 2 : 1);
  out.rows = count_of(tensor) * (packed ? 2 : 1) / out.cols;
  out.quantised = packed || tensor.dtype == "F8_E4M3";
  out.values.resize(static_cast<size_t>(out.rows * out.cols));
  const StoredTensor* scale = nullptr;
  if (out.quantised) {
    scale = &stored(name.substr(0, name.rfind(".weight")) + ".scale");
  }
  for (int64_t i = 0; i < out.rows * out.cols; ++i) {
    const int64_t r = i / out.cols, c = i % out.cols;
    double value;
    if (tensor.dtype == "F32") {
      value = load<float>(tensor.bytes, i);
    } else if (tensor.dtype == "BF16") {
      value = bf16_value(load<uint16_t>(tensor.bytes, i));
    } else if (packed) {
      const int code = (tensor.bytes[i / 2] >> (i % 2 == 0 ? 0 : 4)) & 15;
      value = e2m1_decode(static_cast<uint8_t>(code)) *
              e8m0_decode(scale->bytes[r * scale->shape[1] + c / 32]);
    } else if (tensor.dtype == "F8_E4M3") {
      value = e4m3_decode(tensor.bytes[i]) *
              e8m0_decode(scale->bytes[r / 128 * scale->shape[1] + c / 128]);
    } else {
      throw std::runtime_error(name + ": no numbers in dtype " + tensor.dtype);
    }
    out.values[i] = static_cast<float>(value);
  }
  return out;
}

Matrix Tensors::matrix(const std::string& name) const {
  const Weight weight = this->weight(name);
  Matrix out(weight.rows, weight.cols);
  out.values.assign(weight.values.begin(), weight.values.end());
  return out;
}

std::vector<int64_t> Tensors::integers(const std::string& name) const {
  const StoredTensor& tensor = stored(name);
  std::vector<int64_t> out;
  for (int64_t i = 0; i < count_of(tensor); ++i) {
    if (tensor.dtype == "I32") {
      out.push_back(load<int32_t>(tensor.bytes, i));
    } else if (tensor.dtype == "I64") {
      out.push_back(load<int64_t>(tensor.bytes, i));
    } else {
      throw std::runtime_error(name + ": no integers in dtype " + tensor.dtype);
    }
  }
  return out;
}

}  // namespace oracle
