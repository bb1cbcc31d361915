#include "engine_options.h"

#include <functional>
#include <map>

namespace dsv4::python {
namespace nb = nanobind;

EngineOptions engine_options(const nb::kwargs& given) {
  EngineOptions out;
  const std::map<std::string, std::function<void(nb::handle)>> setters = {
      {"device", [&](nb::handle v) { out.device = nb::cast<std::string>(v); }},
      {"attention_backend",
       [&](nb::handle v) { out.attention_backend = nb::cast<std::string>(v); }},
      {"kv_cache_dtype", [&](nb::handle v) { out.kv_cache_dtype = nb::cast<std::string>(v); }},
      {"numerics",
       [&](nb::handle v) {
         const auto name = nb::cast<std::string>(v);
         const std::optional<Numerics> parsed = parse_numerics(name);
         if (!parsed) {
           fail(ErrorCode::kInvalidArgument, "numerics \"", name,
                "\", expected serving, reference or exact");
         }
         const Products products = out.numerics.products;  // words come in any order
         out.numerics = *parsed;
         out.numerics.products = products;
       }},
      {"products",
       [&](nb::handle v) {
         const auto name = nb::cast<std::string>(v);
         const std::optional<Products> parsed = parse_products(name);
         if (!parsed) {
           fail(ErrorCode::kInvalidArgument, "products \"", name, "\", expected f32 or fp8");
         }
         out.numerics.products = *parsed;
       }},
      {"threads", [&](nb::handle v) { out.threads = nb::cast<int>(v); }},
      {"max_tokens", [&](nb::handle v) { out.limits.max_tokens = nb::cast<int>(v); }},
      {"max_seqs", [&](nb::handle v) { out.limits.max_seqs = nb::cast<int>(v); }},
      {"max_context", [&](nb::handle v) { out.limits.max_context = nb::cast<int64_t>(v); }},
      {"max_logits", [&](nb::handle v) { out.max_logits = nb::cast<int>(v); }},
      {"total_tokens", [&](nb::handle v) { out.total_tokens = nb::cast<int64_t>(v); }},
  };
  for (const auto& [key, value] : given) {
    const auto name = nb::cast<std::string>(key);
    const auto setter = setters.find(name);
    if (setter == setters.end()) {
      std::string known;
      for (const auto& entry : setters) known += (known.empty() ? "" : ", ") + entry.first;
      fail(ErrorCode::kInvalidArgument, "option \"", name, "\", expected one of ", known);
    }
    try {
      setter->second(value);
    } catch (const nb::cast_error&) {
      fail(ErrorCode::kInvalidArgument, "option ", name, " is ",
           nb::cast<std::string>(nb::repr(value)), ": of the wrong type or too large");
    }
  }
  return out;
}

}  // namespace dsv4::python
