#include "model/added_tokens.h"

namespace dsv4 {

void AddedTokens::add(const std::string& spelling, int32_t id) {
  uint32_t node = 0;
  for (const char c : spelling) {
    const auto found = nodes_[node].children.find(c);
    if (found != nodes_[node].children.end()) {
      node = found->second;
      continue;
    }
    const auto child = static_cast<uint32_t>(nodes_.size());
    nodes_.emplace_back();
    nodes_[node].children.emplace(c, child);
    node = child;
  }
  nodes_[node].id = id;
  starts_[static_cast<uint8_t>(spelling[0])] = true;
}

AddedTokens::Found AddedTokens::find(std::string_view text, size_t from) const {
  if (empty()) return {};
  for (size_t begin = from; begin < text.size(); ++begin) {
    if (!starts_[static_cast<uint8_t>(text[begin])]) continue;
    Found best;
    uint32_t node = 0;
    for (size_t at = begin; at < text.size(); ++at) {
      const auto child = nodes_[node].children.find(text[at]);
      if (child == nodes_[node].children.end()) break;
      node = child->second;
      if (nodes_[node].id >= 0) best = {begin, at + 1, nodes_[node].id};
    }
    if (best.id >= 0) return best;
  }
  return {};
}

}  // namespace dsv4
