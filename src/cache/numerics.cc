#include "dsv4/numerics.h"

namespace dsv4 {

std::optional<Numerics> parse_numerics(std::string_view name) {
  for (const Numerics& numerics : {kServing, kReference, kExact}) {
    if (name == numerics.name) return numerics;
  }
  return std::nullopt;
}

std::optional<Products> parse_products(std::string_view name) {
  for (Products products : {Products::kF32, Products::kFp8}) {
    if (name == products_name(products)) return products;
  }
  return std::nullopt;
}

const char* products_name(Products products) {
  return products == Products::kFp8 ? "fp8" : "f32";
}

std::string Numerics::str() const {
  std::string out = std::string(name) + " numerics";
  if (products != Products::kF32)
    out += std::string(" with ") + products_name(products) + " products";
  return out;
}

}  // namespace dsv4
