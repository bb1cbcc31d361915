// What `attend` is tested with: calls and tokens of the checks of reduction_suite.h.
#include <string>
#include <vector>

#include "core/fail.h"
#include "tests/testing/reduction_suite.h"

namespace dsv4::testing {

std::vector<AttendToken> edge_tokens(const AttendCase& which) {
  std::vector<AttendToken> tokens{{0, 0},   {1, 1},   {0, 62},  {2, 63},  {1, 64},
                                  {2, 126}, {0, 127}, {1, 128}, {0, 191}, {2, 300}};
  if (which.few_tokens) tokens = {{0, 0}, {1, 64}, {0, 127}, {2, 300}};
  if (which.compressed != CompressedKind::kNone) {
    for (int position : {which.ratio - 2, which.ratio - 1, 2 * which.ratio - 1}) {
      if (!which.few_tokens) tokens.push_back({3, position});
    }
    // More blocks of entries than one chain of the shorter test grids.
    if (which.compressed == CompressedKind::kRange) {
      tokens.push_back({0, which.ratio * which.long_entries + which.ratio / 2});
    } else {
      tokens.push_back({0, which.ratio * (which.topk + 37)});
    }
  }
  return tokens;
}

std::vector<AttendCase> attend_cases(const std::vector<KvFormat>& formats, bool exact) {
  std::vector<AttendCase> cases;
  const auto add = [&](AttendCase which, KvFormat format) {
    which.format = format;
    const bool f32 = format == KvFormat::kF32;
    which.activation = f32 ? DType::kF32 : DType::kBf16;
    which.round_p = !f32;
    const char* const rows = f32                             ? "f32"
                             : format == KvFormat::kFp8DsMla ? "fp8dsmla"
                             : format == KvFormat::kBf16     ? "bf16"
                                                             : "fp8";
    which.name = concat(which.name, "_", which.heads, "heads_", rows);
    cases.push_back(which);
  };
  std::vector<KvFormat> all = formats;
  if (exact) all.push_back(KvFormat::kF32);
  for (KvFormat format : all) {
    for (int heads : {1, 4, 8}) {
      if (format != all.front() && heads != 4) continue;  // formats differ in rows, not in heads
      add({.name = "sliding", .heads = heads}, format);
      add({.name = "csa", .heads = heads, .compressed = CompressedKind::kList, .topk = 64}, format);
      add({.name = "hca", .heads = heads, .compressed = CompressedKind::kRange, .ratio = 128},
          format);
    }
  }
  // Two blocks in a chain: window and list, several chains of a range; a sharp softmax.
  const KvFormat first = all.front();
  add({.name = "csa_chains",
       .heads = 4,
       .compressed = CompressedKind::kList,
       .topk = 200,
       .grid = {64, 2}},
      first);
  add({.name = "hca_chains",
       .heads = 4,
       .compressed = CompressedKind::kRange,
       .ratio = 4,
       .grid = {64, 1}},
      first);
  add({.name = "both_lists",
       .heads = 4,
       .compressed = CompressedKind::kList,
       .window = 100,
       .topk = 96,
       .window_list = true},
      first);
  add({.name = "max_logits", .heads = 4, .compressed = CompressedKind::kList, .max_logits = true},
      first);
  add({.name = "hca_max_logits",
       .heads = 4,
       .compressed = CompressedKind::kRange,
       .ratio = 4,
       .grid = {64, 1},
       .max_logits = true},
      first);
  add({.name = "sharp", .heads = 4, .compressed = CompressedKind::kList, .magnitude = 12}, first);
  // More than one chain of 2048 entries, and more chains than a GPU spreads over its blocks.
  add({.name = "hca_long",
       .heads = 2,
       .compressed = CompressedKind::kRange,
       .ratio = 4,
       .few_tokens = true,
       .long_entries = 4200},
      first);
  add({.name = "hca_long",
       .heads = 72,
       .compressed = CompressedKind::kRange,
       .ratio = 4,
       .few_tokens = true,
       .long_entries = 2200},
      first);
  add({.name = "hca_many_chains",
       .heads = 1,
       .compressed = CompressedKind::kRange,
       .ratio = 4,
       .long_entries = 2500,
       .grid = {64, 1}},
      first);
  // Kernels may take other ways for few heads than for many.
  const auto add_csa_heads = [&](int heads, KvFormat format) {
    add({.name = "csa_heads",
         .heads = heads,
         .compressed = CompressedKind::kList,
         .few_tokens = true},
        format);
  };
  for (int heads : {2, 16, 17, 128}) add_csa_heads(heads, first);
  for (KvFormat format : formats) add_csa_heads(40, format);
  for (int heads : {24, 40}) {
    add({.name = "sliding", .heads = heads, .few_tokens = true}, first);
    add({.name = "hca_chains",
         .heads = heads,
         .compressed = CompressedKind::kRange,
         .ratio = 4,
         .few_tokens = true,
         .grid = {64, 1}},
        first);
    add({.name = "sharp",
         .heads = heads,
         .compressed = CompressedKind::kList,
         .few_tokens = true,
         .magnitude = 12},
        first);
  }
  add({.name = "flash_csa", .heads = 64, .compressed = CompressedKind::kList, .topk = 512}, first);
  return cases;
}

}  // namespace dsv4::testing
