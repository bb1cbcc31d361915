#include "dsv4/tokenizer.h"

#include <gtest/gtest.h>

#include <fstream>
#include <nlohmann/json.hpp>
#include <random>

#include "dsv4/error.h"
#include "model/bpe.h"
#include "model/byte_alphabet.h"
#include "model/utf8.h"

namespace dsv4 {
namespace {

using Json = nlohmann::json;

std::string source_path(const std::string& path) {
  return std::string(DSV4_SOURCE_DIR) + "/" + path;
}

const Tokenizer& shakespeare() {
  static const std::unique_ptr<Tokenizer> tokenizer =
      Tokenizer::load(source_path("models/tiny-shakespeare"));
  return *tokenizer;
}

// A file with the 256 bytes (ids 0 to 255) and what a test adds.
Json small_file() {
  Json vocab = Json::object();
  for (size_t byte = 0; byte < 256; ++byte) vocab[byte_spellings()[byte]] = byte;
  const Json split = {{"type", "Split"},
                      {"pattern", {{"Regex", "\\s+|[^\\s]+"}}},
                      {"behavior", "Isolated"},
                      {"invert", false}};
  const Json byte_level = {
      {"type", "ByteLevel"}, {"add_prefix_space", false}, {"use_regex", false}};
  return {{"added_tokens", Json::array()},
          {"normalizer", nullptr},
          {"pre_tokenizer",
           {{"type", "Sequence"}, {"pretokenizers", Json::array({split, byte_level})}}},
          {"model", {{"type", "BPE"}, {"vocab", vocab}, {"merges", Json::array()}}}};
}

void add_merge(Json& file, const std::string& left, const std::string& right) {
  Json& vocab = file["model"]["vocab"];
  if (!vocab.contains(left + right)) vocab[left + right] = vocab.size();
  file["model"]["merges"].push_back(Json::array({left, right}));
}

void add_token(Json& file, const std::string& content, int64_t id, bool normalized = false) {
  file["added_tokens"].push_back(
      {{"id", id}, {"content", content}, {"special", true}, {"normalized", normalized}});
}

std::unique_ptr<Tokenizer> parse(const Json& file) {
  return Tokenizer::parse(file.dump(), "test");
}

std::vector<std::string> pieces_of(const Tokenizer& tokenizer, const std::string& text) {
  return tokenizer.pieces(tokenizer.encode(text));
}

using Pieces = std::vector<std::string>;

// Expects an error whose message contains `part`.
template <typename F>
void expect_error(ErrorCode code, const std::string& part, const F& f) {
  try {
    f();
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), code) << error.what();
    EXPECT_NE(std::string(error.what()).find(part), std::string::npos)
        << "message: " << error.what() << "\nexpected in it: " << part;
    return;
  }
  ADD_FAILURE() << "no error; expected one with: " << part;
}

// ---- a released file

TEST(Tokenizer, GoldenCases) {
  std::ifstream in(source_path("tests/golden/data/tokenizer_cases.json"));
  const Json cases = Json::parse(in);
  ASSERT_GE(cases.size(), 20u);
  for (const Json& one : cases) {
    const std::string text = one["text"];
    SCOPED_TRACE(text);
    const std::vector<int32_t> ids = shakespeare().encode(text);
    EXPECT_EQ(ids, one["ids"].get<std::vector<int32_t>>());
    EXPECT_EQ(shakespeare().decode(ids), one["decoded"].get<std::string>());
  }
}

TEST(Tokenizer, KnowsItsVocabulary) {
  EXPECT_EQ(shakespeare().vocab_size(), 4096);
  EXPECT_EQ(shakespeare().find("<think>"), 5);
  EXPECT_EQ(shakespeare().find("no such token"), std::nullopt);
  EXPECT_TRUE(shakespeare().is_special(0));
  EXPECT_FALSE(shakespeare().is_special(5));
  EXPECT_FALSE(shakespeare().is_special(-1));
  EXPECT_TRUE(shakespeare().contains(4095));
  EXPECT_FALSE(shakespeare().contains(4096));
  EXPECT_FALSE(shakespeare().contains(-1));
  EXPECT_EQ(shakespeare().pieces(shakespeare().encode("<think> the")),
            (Pieces{"<think>", "\u0120the"}));
  EXPECT_EQ(shakespeare().bytes(*shakespeare().find("\u0120the")), " the");
}

// Random texts of characters that exercise every branch of the patterns.
std::string random_text(std::mt19937& random, int length) {
  static const Pieces kParts = {"a",       "B",
                                "z",       " ",
                                " ",       "\n",
                                "\r",      "\t",
                                "1",       "42",
                                "'",       "!",
                                "-",       "$",
                                "_",       "\u00e9",
                                "\u0301",  "\u4e2d",
                                "\u3042",  "\u0663",
                                "\u00a0",  "\u2003",
                                "\u180e",  "\u20ac",
                                "\u2014",  std::string(1, '\0'),
                                "\x7f",    "\xf0\x9f\x98\x80",
                                "the",     " and",
                                "<think>", "\uff5c"};
  std::string out;
  for (int i = 0; i < length; ++i) out += kParts[random() % kParts.size()];
  return out;
}

TEST(Tokenizer, DecodeUndoesEncode) {
  std::mt19937 random(7);
  for (int i = 0; i < 500; ++i) {
    const std::string text = random_text(random, 1 + i % 40);
    const std::vector<int32_t> ids = shakespeare().encode(text);
    ASSERT_EQ(shakespeare().decode(ids), text);
    StreamDecoder stream(shakespeare());
    std::string streamed;
    for (const int32_t id : ids) {
      const std::string part = stream.push(id);
      ASSERT_EQ(find_invalid_utf8(part), part.size()) << "a part of a character was emitted";
      streamed += part;
    }
    EXPECT_EQ(streamed + stream.finish(), text);
  }
}

TEST(Tokenizer, LongInputsOfOneKindStayFast) {
  // Quadratic work would need about 10^12 steps here.
  for (const std::string unit : {"a", " ", "1", "\n", "!", "\u4e2d", " x", "\x01"}) {
    std::string text;
    while (text.size() < 1000000) text += unit;
    const std::vector<int32_t> ids = shakespeare().encode(text);
    EXPECT_EQ(shakespeare().decode(ids), text);
  }
}

// ---- decoding

TEST(Tokenizer, InvalidBytesDecodeToReplacementCharacters) {
  const std::unique_ptr<Tokenizer> tokenizer = parse(small_file());
  struct Case {
    std::string bytes, text;
  };
  const std::vector<Case> cases = {
      {"\xff", "\ufffd"},
      {"a\xe4\xb8", "a\ufffd"},                // one maximal part of a character
      {"\xe4\xb8\xff", "\ufffd\ufffd"},        // the part, then a byte that is never valid
      {"\xe0\x80\x80", "\ufffd\ufffd\ufffd"},  // longer than needed: no part is a valid begin
      {"\xed\xa0\x80", "\ufffd\ufffd\ufffd"},  // a surrogate
      {"\xf4\x90\x80\x80", "\ufffd\ufffd\ufffd\ufffd"},  // above U+10FFFF
      {"\xf0\x9f\x98\x80", "\xf0\x9f\x98\x80"},
      {"\x80x", "\ufffdx"},
  };
  for (const Case& one : cases) {
    std::vector<int32_t> ids;  // of this file: the bytes themselves
    for (const char c : one.bytes) ids.push_back(static_cast<uint8_t>(c));
    EXPECT_EQ(tokenizer->decode(ids), one.text);
    StreamDecoder stream(*tokenizer);
    std::string streamed;
    for (const int32_t id : ids) streamed += stream.push(id);
    EXPECT_EQ(streamed + stream.finish(), one.text);
  }
}

TEST(Tokenizer, StreamHoldsAnIncompleteCharacterBack) {
  const std::unique_ptr<Tokenizer> tokenizer = parse(small_file());
  StreamDecoder stream(*tokenizer);
  EXPECT_EQ(stream.push(0xe4), "");
  EXPECT_EQ(stream.push(0xb8), "");
  EXPECT_EQ(stream.push(0xad), "\u4e2d");
  EXPECT_EQ(stream.push(0xe4), "");
  EXPECT_EQ(stream.finish(), "\ufffd");
  EXPECT_EQ(stream.finish(), "");
  EXPECT_EQ(stream.push('a'), "a");
  EXPECT_EQ(stream.push(1000000), "\ufffd");  // a model may draw it
}

TEST(Tokenizer, RefusesIdsWithoutAToken) {
  Json file = small_file();
  add_token(file, "<end>", 300);
  const std::unique_ptr<Tokenizer> tokenizer = parse(file);
  EXPECT_EQ(tokenizer->vocab_size(), 301);
  EXPECT_FALSE(tokenizer->contains(299));
  for (const int32_t id : {-1, 299, 301, INT32_MAX, INT32_MIN}) {
    const std::vector<int32_t> ids = {65, id};
    const std::string part = "token id " + std::to_string(id);
    expect_error(ErrorCode::kInvalidArgument, part, [&] { tokenizer->decode(ids); });
    expect_error(ErrorCode::kInvalidArgument, part, [&] { tokenizer->pieces(ids); });
  }
}

TEST(Tokenizer, RefusesTextThatIsNotUtf8) {
  expect_error(ErrorCode::kInvalidArgument, "invalid at byte 2 of 3",
               [] { shakespeare().encode("ab\xff"); });
  expect_error(ErrorCode::kInvalidArgument, "invalid at byte 0 of 2",
               [] { shakespeare().encode("\xe4\xb8"); });
  expect_error(ErrorCode::kInvalidArgument, "invalid at byte 1 of 4",
               [] { shakespeare().encode("a\xed\xa0\x80"); });
}

// ---- added tokens and patterns

TEST(Tokenizer, LongestAddedTokenWins) {
  Json file = small_file();
  add_token(file, "<a", 256);
  add_token(file, "<a>", 257);
  add_token(file, "<a><b>", 258);
  add_token(file, "<b", 259, true);
  add_token(file, "<<", 260, true);  // looked for in what the others leave
  const std::unique_ptr<Tokenizer> tokenizer = parse(file);
  EXPECT_EQ(tokenizer->encode("<a><b"), (std::vector<int32_t>{257, 259}));
  EXPECT_EQ(tokenizer->encode("<a><b><a<"), (std::vector<int32_t>{258, 256, '<'}));
  EXPECT_EQ(tokenizer->encode("<<a>"), (std::vector<int32_t>{'<', 257}));
}

TEST(Tokenizer, PatternsApplyToWhatEarlierOnesLeave) {
  Json file = small_file();
  // With one pattern "ab" and "b1" would compete; in sequence, digits are cut first.
  Json& stages = file["pre_tokenizer"]["pretokenizers"];
  Json digits = stages[0];
  digits["pattern"]["Regex"] = "[0-9]";
  stages[0]["pattern"]["Regex"] = "b(?![0-9])|a";
  stages.insert(stages.begin(), digits);
  add_merge(file, "a", "b");
  add_merge(file, "c", "b");
  const std::unique_ptr<Tokenizer> tokenizer = parse(file);
  EXPECT_EQ(pieces_of(*tokenizer, "ab"), (Pieces{"a", "b"}));
  // The look-ahead does not see the digit, which is another piece.
  EXPECT_EQ(pieces_of(*tokenizer, "cb1"), (Pieces{"c", "b", "1"}));
}

TEST(Tokenizer, EmptyMatchesCut) {
  Json file = small_file();
  file["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = "x*";
  add_merge(file, "a", "b");
  add_merge(file, "x", "x");
  const std::unique_ptr<Tokenizer> tokenizer = parse(file);
  EXPECT_EQ(pieces_of(*tokenizer, "abxxab"), (Pieces{"a", "b", "xx", "a", "b"}));
  EXPECT_EQ(tokenizer->decode(tokenizer->encode("\u00e9a\u4e2d")), "\u00e9a\u4e2d");
}

TEST(Tokenizer, WhitespaceIsThatOfUnicode) {
  Json file = small_file();
  file["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = "[\\s]+|\\S+";
  const std::string nbsp = "\u00a0";
  const std::string mongolian = "\u180e";  // lost White_Space in Unicode 6.3
  add_merge(file, "a", "\u00c2");          // "a" and the first byte of U+00A0
  add_merge(file, "a", "\u00e1");          // "a" and the first byte of U+180E
  const std::unique_ptr<Tokenizer> tokenizer = parse(file);
  EXPECT_EQ(tokenizer->encode("a" + nbsp)[0], 'a');
  EXPECT_EQ(tokenizer->encode("a" + mongolian)[0], *tokenizer->find("a\u00e1"));
}

// ---- merging

// The definition: one merge at a time, lowest rank first, leftmost first.
Pieces merge_by_definition(const std::string& word,
                           const std::vector<std::array<std::string, 2>>& merges) {
  Pieces parts;
  for (const char c : word) parts.emplace_back(1, c);
  for (;;) {
    size_t best_rank = merges.size(), best_at = 0;
    for (size_t at = 0; at + 1 < parts.size(); ++at) {
      for (size_t rank = 0; rank < best_rank; ++rank) {
        if (merges[rank][0] == parts[at] && merges[rank][1] == parts[at + 1]) {
          best_rank = rank;
          best_at = at;
        }
      }
    }
    if (best_rank == merges.size()) return parts;
    parts[best_at] += parts[best_at + 1];
    parts.erase(parts.begin() + static_cast<ptrdiff_t>(best_at) + 1);
  }
}

TEST(Tokenizer, MergesAsDefined) {
  std::mt19937 random(11);
  for (int round = 0; round < 60; ++round) {
    Json file = small_file();
    std::vector<std::array<std::string, 2>> merges;
    Pieces tokens = {"a", "b", "c"};
    for (int i = 0; i < 12; ++i) {
      const std::string left = tokens[random() % tokens.size()];
      const std::string right = tokens[random() % tokens.size()];
      bool known = left.size() + right.size() > 8;
      for (const auto& merge : merges) known = known || (merge[0] == left && merge[1] == right);
      if (known) continue;
      merges.push_back({left, right});
      tokens.push_back(left + right);
      add_merge(file, left, right);
    }
    const std::unique_ptr<Tokenizer> tokenizer = parse(file);
    for (int i = 0; i < 30; ++i) {
      std::string word;
      for (uint32_t n = random() % 50; word.size() < n;) word += "abc"[random() % 3];
      ASSERT_EQ(pieces_of(*tokenizer, word), merge_by_definition(word, merges)) << word;
    }
  }
}

TEST(Tokenizer, BothSpellingsOfMergesMeanTheSame) {
  Json arrays = small_file();
  add_merge(arrays, "a", "b");
  add_merge(arrays, "ab", "\u0120");
  Json strings = arrays;
  strings["model"]["merges"] = {"a b", "ab \u0120"};
  const std::string text = "abab ab  b";
  EXPECT_EQ(parse(arrays)->encode(text), parse(strings)->encode(text));
  EXPECT_EQ(pieces_of(*parse(strings), "ab"), (Pieces{"ab"}));
}

TEST(Tokenizer, IgnoreMergesTakesWholeWords) {
  Json file = small_file();
  add_merge(file, "a", "b");
  file["model"]["vocab"]["abc"] = 300;  // no merge leads to it
  EXPECT_EQ(pieces_of(*parse(file), "abc"), (Pieces{"ab", "c"}));
  file["model"]["ignore_merges"] = true;
  EXPECT_EQ(pieces_of(*parse(file), "abc"), (Pieces{"abc"}));
  EXPECT_EQ(pieces_of(*parse(file), "abcc"), (Pieces{"ab", "c", "c"}));
}

TEST(Tokenizer, UnknownBytes) {
  Json file = small_file();
  file["model"]["vocab"].erase("z");
  expect_error(ErrorCode::kDataCorrupt, "no token \"z\" for byte 122", [&] { parse(file); });
  file["model"]["vocab"]["?unk?"] = 400;
  file["model"]["unk_token"] = "?unk?";
  EXPECT_EQ(parse(file)->encode("zza"), (std::vector<int32_t>{400, 400, 'a'}));
  file["model"]["fuse_unk"] = true;
  EXPECT_EQ(parse(file)->encode("zzaz"), (std::vector<int32_t>{400, 'a', 400}));
  file["model"]["unk_token"] = "missing";
  expect_error(ErrorCode::kDataCorrupt, "unk_token", [&] { parse(file); });
}

// ---- files that are wrong, or ask for what is not there

struct Fault {
  const char* name;
  ErrorCode code;
  std::string message_part;
  void (*apply)(Json& file);
};

class FaultyFile : public testing::TestWithParam<Fault> {};

TEST_P(FaultyFile, IsRefusedByName) {
  Json file = small_file();
  add_merge(file, "a", "b");
  ASSERT_NO_THROW(parse(file));
  GetParam().apply(file);
  expect_error(GetParam().code, GetParam().message_part, [&] { parse(file); });
}

constexpr ErrorCode kCorrupt = ErrorCode::kDataCorrupt;
constexpr ErrorCode kUnsupported = ErrorCode::kUnsupported;

INSTANTIATE_TEST_SUITE_P(
    All, FaultyFile,
    testing::Values(
        Fault{"NotAnObject", kCorrupt, "expected an object", [](Json& f) { f = Json::array(); }},
        Fault{"NoModel", kCorrupt, "\"model\" is missing", [](Json& f) { f.erase("model"); }},
        Fault{"ModelIsText", kCorrupt, "model: expected an object",
              [](Json& f) { f["model"] = "BPE"; }},
        Fault{"OtherModel", kUnsupported, "\"WordPiece\"",
              [](Json& f) { f["model"]["type"] = "WordPiece"; }},
        Fault{"ByteFallback", kUnsupported, "byte_fallback",
              [](Json& f) { f["model"]["byte_fallback"] = true; }},
        Fault{"ByteFallbackIsText", kCorrupt, "byte_fallback",
              [](Json& f) { f["model"]["byte_fallback"] = "no"; }},
        Fault{"Dropout", kUnsupported, "dropout", [](Json& f) { f["model"]["dropout"] = 0.1; }},
        Fault{"Prefix", kUnsupported, "continuing_subword_prefix",
              [](Json& f) { f["model"]["continuing_subword_prefix"] = "##"; }},
        Fault{"VocabIsList", kCorrupt, "model.vocab",
              [](Json& f) { f["model"]["vocab"] = Json::array(); }},
        Fault{"IdIsText", kCorrupt, "model.vocab[\"q\"]",
              [](Json& f) { f["model"]["vocab"]["q"] = "113"; }},
        Fault{"IdIsFraction", kCorrupt, "model.vocab[\"q\"]",
              [](Json& f) { f["model"]["vocab"]["q"] = 113.5; }},
        Fault{"NegativeId", kCorrupt, "id -1", [](Json& f) { f["model"]["vocab"]["q"] = -1; }},
        Fault{"HugeId", kCorrupt, "id 4294967296",
              [](Json& f) { f["model"]["vocab"]["q"] = int64_t{1} << 32; }},
        Fault{"LargestId", kCorrupt, "id 18446744073709551615",
              [](Json& f) { f["model"]["vocab"]["q"] = UINT64_MAX; }},
        Fault{"IdTwice", kCorrupt, "id 97 is given to",
              [](Json& f) { f["model"]["vocab"]["new"] = 97; }},
        Fault{"EmptyToken", kCorrupt, "an empty token",
              [](Json& f) { f["model"]["vocab"][""] = 500; }},
        Fault{"MergesIsObject", kCorrupt, "model.merges",
              [](Json& f) { f["model"]["merges"] = Json::object(); }},
        Fault{"MergeOfThree", kCorrupt, "model.merges[1]",
              [](Json& f) {
                f["model"]["merges"].push_back({"a", "b", "c"});
              }},
        Fault{"MergeIsNumber", kCorrupt, "model.merges[1]",
              [](Json& f) { f["model"]["merges"].push_back(3); }},
        Fault{"MergeWithoutSpace", kCorrupt, "one space",
              [](Json& f) { f["model"]["merges"].push_back("ab"); }},
        Fault{"MergeOfUnknown", kCorrupt, "\"xyz\" is not in the vocabulary",
              [](Json& f) { f["model"]["merges"].push_back("xyz a"); }},
        Fault{"MergeIntoUnknown", kCorrupt, "\"cd\" is not in the vocabulary",
              [](Json& f) { f["model"]["merges"].push_back("c d"); }},
        Fault{"AddedIsObject", kCorrupt, "added_tokens: expected an array",
              [](Json& f) { f["added_tokens"] = Json::object(); }},
        Fault{"AddedWithoutId", kCorrupt, "added_tokens[0]: \"id\" is missing",
              [](Json& f) {
                f["added_tokens"].push_back({{"content", "<x>"}});
              }},
        Fault{"AddedEmpty", kCorrupt, "content of 0 bytes", [](Json& f) { add_token(f, "", 300); }},
        Fault{"AddedTooLong", kCorrupt, "content of 5000 bytes",
              [](Json& f) { add_token(f, std::string(5000, 'x'), 300); }},
        Fault{"AddedTwice", kCorrupt, "given twice",
              [](Json& f) {
                add_token(f, "<x>", 300);
                add_token(f, "<x>", 300);
              }},
        Fault{"AddedIdTaken", kCorrupt, "id 97 is given to",
              [](Json& f) { add_token(f, "<x>", 97); }},
        Fault{"AddedHasTwoIds", kCorrupt, "has ids 97 and 300",
              [](Json& f) { add_token(f, "a", 300); }},
        Fault{"AddedStrips", kUnsupported, "lstrip",
              [](Json& f) {
                add_token(f, "<x>", 300);
                f["added_tokens"][0]["lstrip"] = true;
              }},
        Fault{"Normalizer", kUnsupported, "\"NFC\"",
              [](Json& f) {
                f["normalizer"] = {{"type", "NFC"}};
              }},
        Fault{"Decoder", kUnsupported, "\"Fuse\"",
              [](Json& f) {
                f["decoder"] = {{"type", "Fuse"}};
              }},
        Fault{"NoPreTokenizer", kCorrupt, "\"pre_tokenizer\" is missing",
              [](Json& f) { f["pre_tokenizer"] = nullptr; }},
        Fault{"PreTokenizerAlone", kUnsupported, "\"Metaspace\"",
              [](Json& f) {
                f["pre_tokenizer"] = {{"type", "Metaspace"}};
              }},
        Fault{"PreTokenizerInside", kUnsupported, "pretokenizers[0] is \"Digits\"",
              [](Json& f) { f["pre_tokenizer"]["pretokenizers"][0]["type"] = "Digits"; }},
        Fault{"NoByteLevel", kUnsupported, "is \"Split\" and the last one",
              [](Json& f) { f["pre_tokenizer"]["pretokenizers"].erase(1); }},
        Fault{"PrefixSpace", kUnsupported, "add_prefix_space",
              [](Json& f) { f["pre_tokenizer"]["pretokenizers"][1]["add_prefix_space"] = true; }},
        Fault{"OwnRegex", kUnsupported, "use_regex",
              [](Json& f) { f["pre_tokenizer"]["pretokenizers"][1].erase("use_regex"); }},
        Fault{
            "SplitByString", kUnsupported, "only Regex",
            [](Json& f) { f["pre_tokenizer"]["pretokenizers"][0]["pattern"] = {{"String", " "}}; }},
        Fault{"SplitRemoves", kUnsupported, "\"Removed\"",
              [](Json& f) { f["pre_tokenizer"]["pretokenizers"][0]["behavior"] = "Removed"; }},
        Fault{"SplitInverts", kUnsupported, "invert",
              [](Json& f) { f["pre_tokenizer"]["pretokenizers"][0]["invert"] = true; }},
        Fault{"BadPattern", kCorrupt, "does not compile",
              [](Json& f) { f["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = "(a"; }},
        Fault{"RawBytePattern", kCorrupt, "does not compile",
              [](Json& f) { f["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = "\\C"; }},
        Fault{
            "AmbiguousPattern", kUnsupported, "\\h at byte 1",
            [](Json& f) { f["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = "a\\h"; }}),
    [](const testing::TestParamInfo<Fault>& info) { return info.param.name; });

TEST(Tokenizer, RefusesFilesThatAreNotJson) {
  for (const std::string text : {"", "{", "{\"model\": }", "\xff\xfe", "nul"}) {
    expect_error(kCorrupt, "test: not valid JSON", [&] { Tokenizer::parse(text, "test"); });
  }
  expect_error(kCorrupt, "given twice",
               [] { Tokenizer::parse(R"({"model": 1, "model": 2})", "test"); });
  expect_error(kCorrupt, "nested deeper",
               [] { Tokenizer::parse(std::string(1000000, '['), "test"); });
}

TEST(Tokenizer, NamesAMissingFile) {
  expect_error(ErrorCode::kNotFound, "no/such/folder/tokenizer.json",
               [] { Tokenizer::load("no/such/folder/tokenizer.json"); });
}

TEST(Tokenizer, PatternsThatBacktrackWithoutEndGiveUp) {
  Json file = small_file();
  file["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = "(a+)+[bc]";
  const std::unique_ptr<Tokenizer> tokenizer = parse(file);
  EXPECT_EQ(tokenizer->encode("aab"), (std::vector<int32_t>{'a', 'a', 'b'}));
  expect_error(ErrorCode::kInvalidArgument, "matching gave up",
               [&] { tokenizer->encode(std::string(64, 'a')); });
}

}  // namespace
}  // namespace dsv4
