// The code objects of this build, embedded in the library.
#pragma once
#include <cstddef>
#include <span>
#include <string_view>

namespace dsv4::amd {

struct EmbeddedCodeObject {
  std::string_view file;          ///< "rowwise_gfx942.co"
  std::string_view architecture;  ///< "gfx942"
  std::span<const std::byte> image;
};

/// Those of every architecture of the descriptor.
std::span<const EmbeddedCodeObject> code_objects();

}  // namespace dsv4::amd
