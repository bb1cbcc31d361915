// Input: a model.safetensors.index.json beside one good file. It may be refused; nothing outside
// the folder may be opened, which a file name with a slash in it would do.
#include <cstdint>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <string>

#include "checkpoint/shards.h"
#include "dsv4/error.h"

namespace {

void require(bool condition) {
  if (!condition) std::abort();
}

struct Folder {
  std::string path;
  Folder() {
    path = (std::filesystem::temp_directory_path() / "dsv4_fuzz_XXXXXX").string();
    require(::mkdtemp(path.data()) != nullptr);
    const std::string value = "x";
    dsv4::write_safetensors(path + "/a.safetensors",
                            {{"t", dsv4::ConstTensor(value.data(), dsv4::DType::kU8, {1})}});
  }
  ~Folder() { std::filesystem::remove_all(path); }
};

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static const Folder folder;
  {
    std::ofstream index(folder.path + "/model.safetensors.index.json", std::ios::binary);
    index.write(reinterpret_cast<const char*>(data), static_cast<std::streamsize>(size));
    require(index.good());
  }
  try {
    for (const dsv4::SafetensorsFile& file : dsv4::open_shards(folder.path)) {
      require(file.path() == folder.path + "/a.safetensors");
      require(file.contains("t"));
    }
  } catch (const dsv4::Error&) {
  }
  return 0;
}
