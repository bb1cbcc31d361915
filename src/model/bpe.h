// Byte-pair encoding: repeatedly joins the adjacent pair whose merge has the lowest rank, leftmost
// first.
#pragma once
#include <array>
#include <cstdint>
#include <string_view>
#include <unordered_map>
#include <vector>

namespace dsv4 {

class Bpe {
 public:
  static constexpr int32_t kUnknown = -1;

  /// Ids of the 256 single bytes; kUnknown entries become `unknown_id`: one per byte, or one per
  /// run of bytes with `fuse`.
  struct Bytes {
    std::array<int32_t, 256> ids;
    int32_t unknown_id = kUnknown;
    bool fuse = false;
  };

  explicit Bpe(const Bytes& bytes) : bytes_(bytes) {}
  void reserve(size_t num_merges) { merges_.reserve(num_merges); }
  /// A later merge of the same pair replaces the earlier one.
  void add_merge(int32_t left, int32_t right, int32_t merged, int32_t rank) {
    merges_[key(left, right)] = {rank, merged};
  }

  /// Reused between words, so that encoding does not allocate for each of them.
  struct Workspace {
    struct Symbol {
      int32_t id;  // kUnknown: joined to its left neighbour
      int32_t previous, next;
    };
    struct Candidate {
      int32_t rank;
      int32_t position;  // of the left symbol
      int32_t left_id, right_id;
      int32_t merged;
    };
    std::vector<Symbol> symbols;
    std::vector<Candidate> heap;
  };

  /// Appends the ids of `word`: O(n log n). @throws Error kInvalidArgument for words of 2^31 bytes
  /// and more.
  void encode(std::string_view word, Workspace& workspace, std::vector<int32_t>& ids) const;

 private:
  struct Merge {
    int32_t rank;
    int32_t merged;
  };
  static uint64_t key(int32_t left, int32_t right) {
    return uint64_t{static_cast<uint32_t>(left)} << 32 | static_cast<uint32_t>(right);
  }
  // The identity hash of the standard library would put pairs with equal low halves of many tables
  // in one bucket.
  struct KeyHash {
    size_t operator()(uint64_t key) const {
      key ^= key >> 32;
      key *= 0x9e3779b97f4a7c15u;
      return static_cast<size_t>(key ^ (key >> 29));
    }
  };

  void load_symbols(std::string_view word, std::vector<Workspace::Symbol>& symbols) const;
  void offer(Workspace& workspace, int32_t left, int32_t right) const;

  Bytes bytes_;
  std::unordered_map<uint64_t, Merge, KeyHash> merges_;
};

}  // namespace dsv4
