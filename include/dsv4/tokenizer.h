// Text to token ids and back, as described by a model's tokenizer.json. For programs around the
// engine; the model itself sees ids only.
#pragma once
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace dsv4 {

/// Byte-level BPE with split patterns read from the file. Immutable and thread-safe after loading.
/// Source: spec/model.md 8.
class Tokenizer {
 public:
  /// `path` is a tokenizer.json or a folder that holds one.
  /// @throws Error kNotFound, and as parse().
  static std::unique_ptr<Tokenizer> load(const std::string& path);
  /// `origin` names the source in messages.
  /// @throws Error kDataCorrupt: not JSON, wrong types, ids out of bounds or given twice, merges of
  /// unknown tokens, a pattern that does not compile; kUnsupported: a normalizer, pre-tokenizer,
  /// model or option that this class does not have, named.
  static std::unique_ptr<Tokenizer> parse(std::string_view json, const std::string& origin);
  ~Tokenizer();
  Tokenizer(const Tokenizer&) = delete;
  Tokenizer& operator=(const Tokenizer&) = delete;

  /// Largest id + 1. Ids below it may be unused; then contains() is false.
  int64_t vocab_size() const;
  bool contains(int64_t id) const;
  /// True for added tokens marked special (begin, end, padding).
  bool is_special(int32_t id) const;
  /// Id of a token by its spelling in the file: "<think>", or "\u0120the" for " the".
  std::optional<int32_t> find(std::string_view spelling) const;

  /// Ids of `text`, without a begin token. Spellings of added tokens inside `text` become these
  /// tokens. @throws Error kInvalidArgument: `text` is not UTF-8 (the message names the byte), or a
  /// split pattern gives up on it.
  std::vector<int32_t> encode(std::string_view text) const;

  /// Text of `ids`, special tokens included; bytes that are not UTF-8 become U+FFFD, one for each
  /// maximal invalid part. @throws Error kInvalidArgument naming an id without a token.
  std::string decode(std::span<const int32_t> ids) const;
  /// Bytes that `id` stands for, possibly a part of a character. Empty for an id without a token.
  std::string_view bytes(int64_t id) const;
  /// Spellings of `ids` in the file, always UTF-8 (a space is U+0120). @throws as decode().
  std::vector<std::string> pieces(std::span<const int32_t> ids) const;

 private:
  Tokenizer();
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

/// Decodes ids one by one and emits whole characters only. All results joined are decode() of all
/// ids. An id without a token (a model's vocabulary may be larger than its tokenizer's) yields
/// U+FFFD: a running generation should not fail for it.
class StreamDecoder {
 public:
  /// `tokenizer` must outlive this object.
  explicit StreamDecoder(const Tokenizer& tokenizer) : tokenizer_(&tokenizer) {}
  /// Text that `id` completes; may be empty.
  std::string push(int32_t id);
  /// What was left incomplete, as U+FFFD. The decoder is then as new.
  std::string finish();

 private:
  const Tokenizer* tokenizer_;
  std::string pending_;  // at most 3 bytes: the begin of a character
};

}  // namespace dsv4
