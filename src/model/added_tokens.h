// Tokens that are cut out of a text before anything else: control tokens such as <think>.
#pragma once
#include <array>
#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <vector>

namespace dsv4 {

class AddedTokens {
 public:
  /// Longest accepted spelling: a bound for the work per byte of text.
  static constexpr size_t kMaxBytes = 1024;

  /// `spelling` has 1 to kMaxBytes bytes.
  void add(const std::string& spelling, int32_t id);
  bool empty() const { return nodes_.size() == 1; }

  /// A token's place in a text; id -1: none.
  struct Found {
    size_t begin = 0, end = 0;
    int32_t id = -1;
  };
  /// The leftmost token at or after `from`; of several that begin there, the longest.
  Found find(std::string_view text, size_t from) const;

 private:
  struct Node {
    int32_t id = -1;  // of the token that ends here
    std::map<char, uint32_t> children;
  };
  std::vector<Node> nodes_{1};      // a trie; the first node is the root
  std::array<bool, 256> starts_{};  // bytes with which a token begins
};

}  // namespace dsv4
