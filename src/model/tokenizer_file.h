// tokenizer.json, read and checked: every byte of it may be hostile. What the encoder needs comes
// out as plain data; what it cannot do is refused by name.
#pragma once
#include <array>
#include <cstdint>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

namespace dsv4 {

struct TokenizerFile {
  /// Ids are below this; tables indexed by id stay small whatever the file says.
  static constexpr int64_t kMaxIds = 1 << 20;

  struct Token {
    std::string spelling;  ///< empty: the id is unused
    bool added = false;    ///< spelling is plain text, not the byte alphabet
    bool special = false;
  };
  struct AddedToken {
    int32_t id;
    bool normalized;  ///< looked for after those that are not
  };
  struct Merge {
    int32_t left, right, merged;
  };

  std::vector<Token> tokens;  ///< by id
  /// Spelling -> id; keys view `tokens`, which must not change any more.
  std::unordered_map<std::string_view, int32_t> ids;
  std::vector<AddedToken> added;
  std::vector<Merge> merges;          ///< in rank order
  std::array<int32_t, 256> byte_ids;  ///< id of each single byte, -1 where the vocabulary has none
  int32_t unknown_id = -1;
  bool fuse_unknown = false;
  bool ignore_merges = false;
  std::vector<std::string> split_patterns;  ///< applied in order, each to the pieces of the last

  /// @throws Error kDataCorrupt, kUnsupported: see Tokenizer::parse.
  static TokenizerFile parse(std::string_view json, const std::string& origin);

  TokenizerFile() = default;
  TokenizerFile(TokenizerFile&&) = default;
  TokenizerFile& operator=(TokenizerFile&&) = default;
  TokenizerFile(const TokenizerFile&) = delete;  // the keys of `ids` would view the original
  TokenizerFile& operator=(const TokenizerFile&) = delete;
};

}  // namespace dsv4
