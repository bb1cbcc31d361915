#include "model/bpe.h"

#include <algorithm>
#include <limits>

#include "core/fail.h"

namespace dsv4 {
namespace {

// Lowest rank first, then leftmost: the standard heaps keep the largest on top.
bool comes_later(const Bpe::Workspace::Candidate& a, const Bpe::Workspace::Candidate& b) {
  return a.rank != b.rank ? a.rank > b.rank : a.position > b.position;
}

}  // namespace

void Bpe::load_symbols(std::string_view word, std::vector<Workspace::Symbol>& symbols) const {
  symbols.clear();
  bool fusing = false;
  for (const char c : word) {
    int32_t id = bytes_.ids[static_cast<uint8_t>(c)];
    const bool unknown = id == kUnknown;
    if (unknown) {
      if (fusing) continue;
      id = bytes_.unknown_id;
    }
    fusing = unknown && bytes_.fuse;
    const auto at = static_cast<int32_t>(symbols.size());
    symbols.push_back({id, at - 1, at + 1});
  }
  if (!symbols.empty()) symbols.back().next = -1;
}

void Bpe::offer(Workspace& workspace, int32_t left, int32_t right) const {
  const int32_t left_id = workspace.symbols[static_cast<size_t>(left)].id;
  const int32_t right_id = workspace.symbols[static_cast<size_t>(right)].id;
  const auto found = merges_.find(key(left_id, right_id));
  if (found == merges_.end()) return;
  workspace.heap.push_back({found->second.rank, left, left_id, right_id, found->second.merged});
  std::push_heap(workspace.heap.begin(), workspace.heap.end(), comes_later);
}

void Bpe::encode(std::string_view word, Workspace& workspace, std::vector<int32_t>& ids) const {
  if (word.size() >= static_cast<size_t>(std::numeric_limits<int32_t>::max())) {
    fail(ErrorCode::kInvalidArgument, "a word of ", word.size(), " bytes, expected less than 2^31");
  }
  std::vector<Workspace::Symbol>& symbols = workspace.symbols;
  load_symbols(word, symbols);
  workspace.heap.clear();
  for (size_t i = 1; i < symbols.size(); ++i) {
    offer(workspace, static_cast<int32_t>(i) - 1, static_cast<int32_t>(i));
  }
  while (!workspace.heap.empty()) {
    std::pop_heap(workspace.heap.begin(), workspace.heap.end(), comes_later);
    const Workspace::Candidate best = workspace.heap.back();
    workspace.heap.pop_back();
    // A candidate is out of date when one of its symbols has been joined to another since.
    Workspace::Symbol& left = symbols[static_cast<size_t>(best.position)];
    if (left.id != best.left_id || left.next < 0) continue;
    Workspace::Symbol& right = symbols[static_cast<size_t>(left.next)];
    if (right.id != best.right_id) continue;
    left.id = best.merged;
    left.next = right.next;
    right.id = kUnknown;
    if (left.next >= 0) symbols[static_cast<size_t>(left.next)].previous = best.position;
    if (left.previous >= 0) offer(workspace, left.previous, best.position);
    if (left.next >= 0) offer(workspace, best.position, left.next);
  }
  for (const Workspace::Symbol& symbol : symbols) {
    if (symbol.id != kUnknown) ids.push_back(symbol.id);
  }
}

}  // namespace dsv4
