#include "dsv4/numerics.h"

namespace dsv4 {

std::optional<Numerics> parse_numerics(std::string_view name) {
  for (const Numerics& numerics : {kServing, kReference, kExact}) {
    if (name == numerics.name) return numerics;
  }
  return std::nullopt;
}

}  // namespace dsv4
