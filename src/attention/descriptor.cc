#include "attention/descriptor.h"

#include <algorithm>
#include <charconv>

#include "attention/upstream_rules.h"
#include "core/fail.h"

namespace dsv4 {
namespace {

// Upstream class with the backend name of `descriptor`; nullopt when there is none.
std::optional<upstream::Class> upstream_class(const AttentionDescriptor& descriptor) {
  for (upstream::Class cls :
       {upstream::Class::kFlashMla, upstream::Class::kFlashInfer, upstream::Class::kRocmAiter}) {
    if (upstream::class_facts(cls, upstream::Rules::kAdopted)->backend_name == descriptor.name) {
      return cls;
    }
  }
  return std::nullopt;
}

std::string padded_text(const std::variant<int, upstream::Refusal>& padded) {
  return std::holds_alternative<int>(padded) ? concat("pads to ", std::get<int>(padded))
                                             : std::string("refuses them");
}

void compare_heads(const AttentionDescriptor& descriptor, upstream::Class cls,
                   std::vector<std::string>& out) {
  // Ranges of head counts over which both answers are constant or ours is the count itself.
  constexpr int kMostHeads = 128;
  int begin = 1;
  while (begin <= kMostHeads) {
    const auto theirs = upstream::padded_num_q_heads(cls, begin, upstream::Rules::kAdopted);
    const auto differs = [&](int n) {
      return n <= kMostHeads && (descriptor.max_heads == 0 || n <= descriptor.max_heads) &&
             padded_text(upstream::padded_num_q_heads(cls, n, upstream::Rules::kAdopted)) ==
                 padded_text(theirs) &&
             padded_text(theirs) != padded_text(descriptor.padded_num_q_heads(n));
    };
    int end = begin;
    while (differs(end)) ++end;
    if (end > begin) {
      const bool unpadded = descriptor.padded_num_q_heads(begin) == begin &&
                            descriptor.padded_num_q_heads(end - 1) == end - 1;
      out.push_back(concat(begin, " to ", end - 1, " heads: ",
                           unpadded ? std::string("not padded here")
                                    : padded_text(descriptor.padded_num_q_heads(begin)) + " here",
                           ", vLLM ", padded_text(theirs)));
      begin = end;
    } else {
      ++begin;
    }
  }
}

std::string upstream_architectures(const upstream::ClassFacts& facts, Platform platform) {
  std::string out;
  for (const Capability& capability : facts.capabilities) {
    if (!out.empty()) out += ", ";
    out += platform == Platform::kRocm ? architecture_name(platform, capability)
                                       : concat("sm_", capability.major, "x");
  }
  return out;
}

std::string join(const std::vector<std::string>& words) {
  std::string out;
  for (const std::string& word : words) out += (out.empty() ? "" : ", ") + word;
  return out;
}

}  // namespace

std::string Reason::str() const {
  return concat(condition, ": ", given, ", required ", required);
}

std::string join_reasons(std::span<const Reason> reasons) {
  std::string out;
  for (const Reason& reason : reasons) out += (out.empty() ? "" : "; ") + reason.str();
  return out;
}

std::string architecture_name(Platform platform, const Capability& capability) {
  if (platform == Platform::kCpu) return "cpu";
  if (platform == Platform::kCuda) return concat("sm_", capability.major, capability.minor);
  if (capability == Capability{}) return "emulated";
  // gfx names: major in decimal, minor and stepping one hexadecimal digit each (gfx90a, gfx1100).
  constexpr std::string_view kDigits = "0123456789abcdef";
  return concat("gfx", capability.major, kDigits[static_cast<size_t>(capability.minor & 15)],
                kDigits[static_cast<size_t>(capability.stepping & 15)]);
}

bool runs_on(std::string_view built, Platform platform, const Capability& capability) {
  if (platform != Platform::kCuda) return built == architecture_name(platform, capability);
  const bool ptx = built.starts_with("compute_");
  if (!ptx && !built.starts_with("sm_")) return false;
  const std::string_view digits = built.substr(ptx ? 8 : 3);
  int number = 0;
  const auto [end, error] = std::from_chars(digits.data(), digits.data() + digits.size(), number);
  if (error != std::errc() || number < 10) return false;
  const std::string_view suffix(end, static_cast<size_t>(digits.data() + digits.size() - end));
  const Capability own{number / 10, number % 10};
  if (suffix == "a") return own.major == capability.major && own.minor == capability.minor;
  if (suffix == "f" || (suffix.empty() && !ptx)) {
    return own.major == capability.major && own.minor <= capability.minor;
  }
  if (!suffix.empty()) return false;
  return own.major < capability.major ||
         (own.major == capability.major && own.minor <= capability.minor);
}

std::string format_names(const std::vector<KvFormat>& formats) {
  std::string out;
  for (KvFormat format : formats) out += concat(out.empty() ? "" : ", ", kv_format_name(format));
  return out;
}

std::vector<std::string> upstream_differences(const AttentionDescriptor& descriptor) {
  const std::optional<upstream::Class> cls = upstream_class(descriptor);
  if (!cls) return {"vLLM has no backend of this name"};
  const upstream::ClassFacts facts = *upstream::class_facts(*cls, upstream::Rules::kAdopted);
  std::vector<std::string> out;

  compare_heads(descriptor, *cls, out);
  const bool bounded = !std::holds_alternative<int>(
      upstream::padded_num_q_heads(*cls, 129, upstream::Rules::kAdopted));
  if (bounded != (descriptor.max_heads == 128)) {
    out.push_back(concat("more than 128 heads on a rank: ",
                         descriptor.max_heads == 0 ? std::string("taken here")
                                                   : concat("at most ", descriptor.max_heads),
                         ", vLLM ", bounded ? "refuses them" : "takes them"));
  }

  const std::string theirs = upstream_architectures(facts, descriptor.platform);
  out.push_back(concat(
      "architectures: ",
      descriptor.architectures.empty() ? std::string("none built") : join(descriptor.architectures),
      " here, vLLM's kernels need ", theirs));
  if (facts.packed_layout && std::find(descriptor.kv_formats.begin(), descriptor.kv_formats.end(),
                                       descriptor.native_format) != descriptor.kv_formats.end()) {
    out.push_back(concat("kv cache dtype auto: ", kv_format_name(descriptor.native_format),
                         " here, vLLM refuses it on packed layouts"));
  }
  return out;
}

}  // namespace dsv4
