// Every attend candidate of every device, forced in turn, through the suite of the canonical
// reduction.
#include <gtest/gtest.h>

#include <algorithm>
#include <ostream>
#include <set>

#include "tests/testing/op_candidates.h"
#include "tests/testing/reduction_suite.h"

namespace dsv4::testing {
namespace {

const std::vector<AttendCase>& all_cases() {
  static const std::vector<AttendCase> cases =
      attend_cases({KvFormat::kFp8DsMla, KvFormat::kBf16, KvFormat::kFp8}, /*exact=*/true);
  return cases;
}

// AMD kernels lane by lane or instruction by instruction: milliseconds a block of rows. A few cases
// stand for the others.
bool is_emulated(const OpCandidate& candidate) {
  return candidate.platform == Platform::kRocm && !candidate.name.starts_with(kOnGpu);
}
bool is_reverse(const OpCandidate& candidate) {
  return candidate.name.ends_with("_reverse");
}
bool is_taken(const OpCandidate& candidate, const AttendCase& which) {
  if (which.activation == DType::kF32 && !candidate.exact) return false;
  if (!is_emulated(candidate)) return true;
  static const std::set<std::string> kEmulated{"sliding_1heads_fp8dsmla",
                                               "csa_4heads_fp8dsmla",
                                               "csa_8heads_fp8dsmla",
                                               "csa_4heads_bf16",
                                               "csa_4heads_fp8",
                                               "hca_4heads_fp8dsmla",
                                               "csa_chains_4heads_fp8dsmla",
                                               "hca_chains_4heads_fp8dsmla",
                                               "both_lists_4heads_fp8dsmla",
                                               "max_logits_4heads_fp8dsmla",
                                               "sharp_4heads_fp8dsmla",
                                               "csa_heads_16heads_fp8dsmla",
                                               "csa_heads_17heads_fp8dsmla",
                                               "csa_heads_128heads_fp8dsmla",
                                               "flash_csa_64heads_fp8dsmla"};
  static const std::set<std::string> kReverse{"csa_4heads_fp8dsmla", "csa_4heads_bf16",
                                              "hca_chains_4heads_fp8dsmla"};
  return (is_reverse(candidate) ? kReverse : kEmulated).contains(which.name);
}

struct Param {
  OpCandidate candidate;
  size_t case_idx;
};

void PrintTo(const Param& param, std::ostream* out) {
  *out << param.candidate.label() << ", " << all_cases()[param.case_idx].name;
}

std::vector<Param> params() {
  std::vector<Param> out;
  for (const OpCandidate& candidate : op_candidates("attend")) {
    for (size_t i = 0; i < all_cases().size(); ++i) {
      if (is_taken(candidate, all_cases()[i])) out.push_back({candidate, i});
    }
  }
  return out;
}

class OracleAttend : public ::testing::TestWithParam<Param> {
 protected:
  void SetUp() override {
    if (!candidate().why_not.empty()) {
      GTEST_SKIP() << candidate().label() << ": " << candidate().why_not;
    }
    OpenedCandidate opened = open_candidate(candidate(), 2);
    ops_ = opened.ops;
    device_ = std::move(opened.device);
  }
  const OpCandidate& candidate() const { return GetParam().candidate; }
  const AttendCase& which() const { return all_cases()[GetParam().case_idx]; }
  Subject subject() { return {device_.get(), &ops_}; }
  // Its heads are one loop: what holds for 16 of them holds for 128.
  bool is_scalar() const { return candidate().label() == "cpu_reference"; }
  bool is_slow() const { return is_scalar() && which().heads > 16; }
  // Of an emulated candidate: `names` are enough.
  bool is_enough(std::initializer_list<std::string_view> names) const {
    return is_emulated(candidate()) &&
           (is_reverse(candidate()) ||
            std::find(names.begin(), names.end(), which().name) == names.end());
  }
  std::vector<AttendToken> tokens() const {
    AttendCase few = which();
    few.few_tokens = few.few_tokens || is_emulated(candidate());
    return edge_tokens(few);
  }

  Ops ops_;
  std::unique_ptr<Device> device_;
};

TEST_P(OracleAttend, AgreesWithTheOracle) {
  check_attend_oracle(subject(), which(), tokens(), {});
}

TEST_P(OracleAttend, BitsDependOnOwnRowsOnly) {
  if (is_slow()) GTEST_SKIP() << "many heads of a scalar kernel";
  if (is_enough({"csa_4heads_fp8dsmla", "hca_chains_4heads_fp8dsmla"}))
    GTEST_SKIP() << "other cases are enough";
  check_attend_invariance(subject(), which(), tokens());
}

TEST_P(OracleAttend, BitsAloneAndInACrowd) {
  // Of all entries: items so long that the last few of them are worth other ways, and so many
  // chains that they go in waves.
  const bool all_entries =
      which().name.starts_with("hca_long") || which().name.starts_with("hca_chains_4heads");
  const bool selected = which().name.starts_with("csa_") && which().grid == ReductionGrid{};
  if (!(selected || all_entries) || which().heads > 40) {
    GTEST_SKIP() << "a few cases are enough";
  }
  if (is_emulated(candidate()) &&
      (candidate().name != "mfma" || which().name != "csa_heads_17heads_fp8dsmla")) {
    GTEST_SKIP() << "one case in the executor is enough";
  }
  check_attend_crowd(subject(), which(), is_scalar() ? 60 : 300);
}

TEST_P(OracleAttend, BitsInRunsOfTokens) {
  const bool few_heads = which().heads == 4 && which().grid == ReductionGrid{};
  if (!(few_heads || which().name.starts_with("csa_heads_128heads")) || is_emulated(candidate()) ||
      is_scalar()) {
    GTEST_SKIP() << "a few cases are enough, in a compiled kernel";
  }
  check_attend_runs(subject(), which(), candidate().platform == Platform::kCpu ? 60 : 310);
}

// Candidates that must have the bits of `candidate`, because dispatch chooses among them by the
// size of a batch.
std::vector<std::string> names_with_bits_of(const OpCandidate& candidate) {
  if (candidate.label() == "cuda_sm90") return {"sm90_few_heads", "sm90_many_heads"};
  return {};
}

TEST_P(OracleAttend, BitsAreThoseOfOtherKernels) {
  const std::vector<std::string> names = names_with_bits_of(candidate());
  if (names.empty()) GTEST_SKIP() << "its bits are its own";
  std::vector<OpenedCandidate> others;
  std::vector<Subject> subjects{subject()};
  for (const std::string& name : names) {
    OpCandidate other = candidate();
    other.name = name;
    others.push_back(open_candidate(other, 2));
  }
  for (const OpenedCandidate& other : others) subjects.push_back({other.device.get(), &other.ops});
  check_attend_same_bits(subjects, which(), tokens());
  if (!which().name.starts_with("csa_4heads")) return;
  // Every number of heads, of other formats tiles and their halves; more tokens than a GPU has
  // multiprocessors.
  std::vector<AttendToken> crowd;
  for (int i = 0; i < 300; ++i) crowd.push_back({i % 3, i % 5 == 4 ? i % 3 : 13 * (i % 60)});
  // A round of a GPU and a little more, all of one length: items that are cut everywhere.
  const std::vector<AttendToken> even(148, AttendToken{1, 760});
  const int step = which().format == KvFormat::kFp8DsMla ? 1 : 8;
  for (int heads = step; heads <= 33; heads += step) {
    AttendCase many = which();
    many.heads = heads;
    many.name += "_with_" + std::to_string(heads);
    const bool is_tile = heads == 16 || heads == 32;
    check_attend_same_bits(subjects, many, is_tile ? crowd : tokens());
    if (is_tile) check_attend_same_bits(subjects, many, even);
  }
}

TEST_P(OracleAttend, BitsOfItemsThatAreCut) {
  if (candidate().label() != "cuda_sm90" || !which().name.starts_with("csa_4heads")) {
    GTEST_SKIP() << "a kernel that cuts them";
  }
  // A little more than a round of a GPU, or than two, of lists (ranges) of one length and of many:
  // against calls of a few tokens, which are not cut.
  constexpr int kFew = 50;
  struct Call {
    CompressedKind compressed;
    int heads, tokens;
  };
  for (const Call& call :
       {Call{CompressedKind::kList, 40, 133}, Call{CompressedKind::kList, 40, 148},
        Call{CompressedKind::kList, 64, 290}, Call{CompressedKind::kRange, 40, 148}}) {
    AttendCase cut = which();
    cut.topk = 640;
    cut.compressed = call.compressed;
    cut.heads = call.heads;
    cut.name = which().name + "_cut_" + std::to_string(call.heads);
    for (bool even : {true, false}) {
      std::vector<AttendToken> tokens;
      for (int i = 0; i < call.tokens; ++i) {
        tokens.push_back({i % 3, even ? 2700 : i % 5 == 4 ? i % 3 : 19 * (i % 150)});
      }
      const AttendResult all = run_attend(subject(), cut, tokens, {.only_own_rows = true});
      const auto bytes = static_cast<int64_t>(all.out.size()) / call.tokens;
      for (int first = 0; first < call.tokens; first += kFew) {
        const auto begin = tokens.begin() + first;
        const int count = std::min(kFew, call.tokens - first);
        const AttendResult few = run_attend(subject(), cut, {begin, begin + count}, {});
        ASSERT_TRUE(std::equal(few.out.begin(), few.out.end(), all.out.begin() + first * bytes))
            << call.heads << " heads, " << call.tokens << " tokens, from " << first << " on";
        ASSERT_TRUE(
            std::equal(few.lse.begin(), few.lse.end(), all.lse.begin() + first * call.heads))
            << call.heads << " heads, " << call.tokens << " tokens, from " << first << " on";
      }
    }
  }
}

// A call beside those of attend_cases, and whether a fusion that is asked about takes it.
struct FusedCall {
  CompressedKind compressed;
  int heads, tokens, position;
  bool taken;

  AttendCase case_of(AttendCase which) const {
    which.topk = 640;
    which.compressed = compressed;
    which.heads = heads;
    which.name = concat(which.name, "_", heads, "_heads_", tokens, "_tokens");
    return which;
  }
  std::vector<AttendToken> all_tokens() const {
    std::vector<AttendToken> out;
    for (int i = 0; i < tokens; ++i) out.push_back({i % 3, i % 5 == 4 ? i : position - 7 * i});
    return out;
  }
};
constexpr CompressedKind kNone = CompressedKind::kNone, kList = CompressedKind::kList,
                         kRange = CompressedKind::kRange;

TEST_P(OracleAttend, CodesAreThoseOfInverseRope) {
  if (candidate().label() != "cuda_sm90" || !which().name.starts_with("csa_4heads")) {
    GTEST_SKIP() << "a kernel that writes codes";
  }
  // An item a CTA or less, two tiles of heads, cuts, chains of two parts; then clusters, chains
  // that are merged, a tile of few heads.
  constexpr FusedCall kCalls[] = {
      {kNone, 64, 70, 900, true},   {kList, 64, 128, 2700, true},  {kList, 100, 40, 2700, true},
      {kList, 40, 148, 2700, true}, {kRange, 64, 200, 6000, true}, {kList, 64, 536, 5500, true},
      {kList, 64, 20, 2700, false}, {kRange, 64, 70, 9000, false}, {kList, 16, 128, 2700, false}};
  for (const FusedCall& call : kCalls) {
    const AttendCase codes = call.case_of(which());
    EXPECT_EQ(check_attend_codes(subject(), codes, call.all_tokens()), call.taken) << codes.name;
  }
}

TEST_P(OracleAttend, RawQueriesAreNormedAndRotated) {
  if (candidate().label() != "cuda_sm90" || !which().name.starts_with("csa_4heads")) {
    GTEST_SKIP() << "kernels that take raw queries";
  }
  // Windows, lists, two tiles of heads, chains of two parts; then cuts, too few items, several
  // chains, few heads.
  constexpr FusedCall kCalls[] = {{kNone, 64, 600, 5900, true},  {kList, 64, 528, 5700, true},
                                  {kList, 100, 270, 5700, true}, {kList, 40, 660, 5900, true},
                                  {kRange, 64, 540, 6000, true}, {kList, 64, 600, 5700, false},
                                  {kList, 64, 300, 5700, false}, {kRange, 64, 540, 13000, false},
                                  {kList, 16, 540, 5700, false}};
  for (const FusedCall& call : kCalls) {
    if (which().format != KvFormat::kFp8DsMla && call.tokens != 528) continue;
    const AttendCase raw = call.case_of(which());
    EXPECT_EQ(check_attend_raw_queries(subject(), raw, call.all_tokens()),
              call.taken && raw.format == KvFormat::kFp8DsMla)
        << raw.name;
  }
}

TEST_P(OracleAttend, ShortListsAreTheSameEveryTime) {
  if (!which().name.starts_with("csa_heads") || is_emulated(candidate()) || is_slow()) {
    GTEST_SKIP() << "a few cases are enough, in a compiled kernel";
  }
  // Results cross to the host to be compared: of many heads fewer times, about two seconds a case.
  const bool on_gpu = candidate().platform == Platform::kCuda;
  const int repeats = on_gpu ? std::clamp(640 / which().heads, 5, 40) : 2;
  check_attend_repeats(subject(), which(), on_gpu ? 400 : 20, repeats);
}

TEST_P(OracleAttend, LongListsAloneAndInACrowd) {
  if (!which().name.starts_with("hca_long") || is_emulated(candidate()) || is_slow()) {
    GTEST_SKIP() << "the long cases, in a compiled kernel";
  }
  check_attend_long_crowd(subject(), which(), 70);
}

TEST_P(OracleAttend, CornerCases) {
  if (is_slow()) GTEST_SKIP() << "many heads of a scalar kernel";
  if (is_enough({"csa_4heads_fp8dsmla", "csa_chains_4heads_fp8dsmla", "hca_4heads_fp8dsmla"}))
    GTEST_SKIP() << "other cases are enough";
  check_attend_corner_cases(subject(), which());
}

TEST_P(OracleAttend, BitsDoNotDependOnThreads) {
  if (candidate().platform != Platform::kCpu || is_slow()) GTEST_SKIP() << "threads are the CPU's";
  const std::vector<AttendToken> tokens = edge_tokens(which());
  const AttendResult two = run_attend(subject(), which(), tokens, {});
  for (int threads : {1, 5}) {
    device_ = open_candidate(candidate(), threads).device;
    const AttendResult other = run_attend(subject(), which(), tokens, {});
    EXPECT_EQ(two.out, other.out) << threads << " threads";
    EXPECT_EQ(two.lse, other.lse) << threads << " threads";
  }
}

INSTANTIATE_TEST_SUITE_P(Candidates, OracleAttend, ::testing::ValuesIn(params()),
                         [](const ::testing::TestParamInfo<Param>& info) {
                           return info.param.candidate.label() + "_" +
                                  all_cases()[info.param.case_idx].name;
                         });

}  // namespace
}  // namespace dsv4::testing
