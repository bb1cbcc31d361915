// The files of a checkpoint folder.
#pragma once
#include <string>
#include <vector>

#include "checkpoint/safetensors.h"

namespace dsv4 {

/// Opens DIR/model.safetensors.index.json with the files it names, or else DIR/model.safetensors.
/// Every tensor of the index is in the file that it names, every tensor of the files is in the
/// index.
/// @throws Error kNotFound (folder, files), kDataCorrupt (the index, or as SafetensorsFile).
std::vector<SafetensorsFile> open_shards(const std::string& directory);

}  // namespace dsv4
