// The properties of `attend` that every backend must have, whatever its kernels: agreement with the
// oracle, and bits that depend on a token's own rows only. To test another device or candidate,
// make a Subject and call the checks for every AttendCase (tests/backends/cpu/ops shows how).
#pragma once
#include <string>
#include <vector>

#include "tests/testing/device_memory.h"

namespace dsv4::testing {

enum class CompressedKind { kNone, kList, kRange };  ///< sliding, CSA, HCA

/// What is attended with.
struct AttendCase {
  std::string name;
  int heads = 1;
  int head_dim = 512;
  DType activation = DType::kBf16;
  KvFormat format = KvFormat::kFp8DsMla;
  bool round_p = true;
  CompressedKind compressed = CompressedKind::kNone;
  int ratio = 4;  ///< tokens per compressed entry
  int window = 128;
  int topk = 64;             ///< width of the list (kList)
  bool window_list = false;  ///< window rows as a list of slots
  bool few_tokens = false;   ///< edge_tokens: five of them, for cases that cost much
  int long_entries = 200;    ///< compressed entries of the longest context (kRange)
  ReductionGrid grid = {};
  double magnitude = 1;     ///< scale of q: larger ones sharpen the softmax
  bool max_logits = false;  ///< asked for, too; kernels may take another way then
};

/// One query: the token at `position` of sequence `seq`. The seed of its q is (seq, position), so
/// that the same token can be run in different company.
struct AttendToken {
  int seq;
  int position;
};

/// How the same rows lie in memory and who else is in the batch; nothing here may change a bit.
struct AttendPlacement {
  int window_block_rows = 64;
  int compressed_block_rows = 64;
  uint64_t block_seed = 1;     ///< order of physical blocks
  bool ring_table = false;     ///< window block table that wraps, as the pool's
  bool only_own_rows = false;  ///< every row that no token of the call may read stays NaN
  int spare_blocks = 3;        ///< blocks that nobody owns: NaN
  int padding_bytes = 64;      ///< between pages
};

/// The result of a call, and what the oracle makes of the same rows.
struct AttendResult {
  std::vector<std::byte> out;     ///< [tokens, heads, head_dim], contiguous
  std::vector<float> lse;         ///< [tokens, heads]
  std::vector<float> max_logits;  ///< [tokens, heads]; empty when not asked for
};

/// Every token against the oracle, on the rows as the cache's bytes stand for them.
void check_attend_oracle(const Subject& subject, const AttendCase& which,
                         const std::vector<AttendToken>& tokens, const AttendPlacement& placement);
/// Bits of every token: alone and in a batch, in another order, with renamed blocks, other page
/// sizes, a ring table, every unread row NaN.
void check_attend_invariance(const Subject& subject, const AttendCase& which,
                             const std::vector<AttendToken>& tokens);
/// Tokens of a large batch (of hundreds: several rounds of a GPU, larger tiles of heads) against
/// the same ones alone.
void check_attend_crowd(const Subject& subject, const AttendCase& which, int num_tokens);
/// Bits of runs of one to eight adjacent tokens, of several sequences and at edges of windows and
/// blocks: kernels may share the rows of tokens that stand beside each other.
void check_attend_runs(const Subject& subject, const AttendCase& which, int num_tokens);
/// The same tokens with candidates whose sums have the same order: also with lists that have holes,
/// and with rows of rare bytes (NaN, the smallest and large scales).
void check_attend_same_bits(const std::vector<Subject>& subjects, const AttendCase& which,
                            const std::vector<AttendToken>& tokens);
/// Codes (Ops::attend_makes_codes) against those of inverse_rope behind attend.
/// @return whether attend makes them in this call.
bool check_attend_codes(const Subject& subject, const AttendCase& which,
                        const std::vector<AttendToken>& tokens);
/// Queries as wq_b leaves them (Ops::attend_takes_raw_queries) against those that qnorm_rope_insert
/// has normed and rotated, with outputs as values and, where attend makes them, as codes.
/// @return whether attend takes them so in this call.
bool check_attend_raw_queries(const Subject& subject, const AttendCase& which,
                              const std::vector<AttendToken>& tokens);
/// One call of many short lists again and again: a hand-over between the roles of a kernel that
/// fails once in a million shows as other bits.
void check_attend_repeats(const Subject& subject, const AttendCase& which, int num_tokens,
                          int repeats);
/// Bits alone and in a crowd for lists of all lengths up to the longest: where a GPU shares a long
/// list's work among multiprocessors, it does so in another way for many tokens.
void check_attend_long_crowd(const Subject& subject, const AttendCase& which, int num_tokens);
/// Sinks of -inf and +inf, tokens without keys, holes (-1) and unused places of a list, and a list
/// of all visible entries against the range of them.
void check_attend_corner_cases(const Subject& subject, const AttendCase& which);

/// Window edges, block edges, entries just completed or not, a long context.
std::vector<AttendToken> edge_tokens(const AttendCase& which);
/// The cases that every backend with these formats is tested with: heads 1 to 128, kinds
/// sliding, CSA, HCA, both lists, one and several chains. `exact` adds f32 caches and activations.
std::vector<AttendCase> attend_cases(const std::vector<KvFormat>& formats, bool exact);

/// Runs one call; used by the checks, and by tests that compare two devices or thread counts.
AttendResult run_attend(const Subject& subject, const AttendCase& which,
                        const std::vector<AttendToken>& tokens, const AttendPlacement& placement);

}  // namespace dsv4::testing
