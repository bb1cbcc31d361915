// Input: a tokenizer.json, then optionally a zero byte and a text. The file may be refused, the
// text too; nothing else may happen. The whole input is also a text for a good tokenizer, which
// must give every valid text back.
#include <cstdint>
#include <cstdlib>
#include <string>
#include <string_view>

#include "dsv4/error.h"
#include "dsv4/tokenizer.h"
#include "model/byte_alphabet.h"
#include "model/utf8.h"

namespace {

void require(bool condition) {
  if (!condition) std::abort();
}

// The 256 bytes, a few merges, and the patterns of the released model in short form.
const dsv4::Tokenizer& good_tokenizer() {
  static const std::unique_ptr<dsv4::Tokenizer> tokenizer = [] {
    std::string vocab;
    for (size_t byte = 0; byte < 256; ++byte) {
      const std::string& spelling = dsv4::byte_spellings()[byte];
      const bool escaped = spelling == "\"" || spelling == "\\";
      vocab += std::string("\"") + (escaped ? "\\" : "") + spelling + "\":" + std::to_string(byte);
      vocab += ',';
    }
    vocab += R"("aa":256,"aaaa":257,"ab":258)";
    const std::string split = R"({"type":"Split","behavior":"Isolated","pattern":{"Regex":)";
    const std::string json =
        R"({"added_tokens":[{"id":300,"content":"<x>"},{"id":301,"content":"<x>a"}],)"
        R"("pre_tokenizer":{"type":"Sequence","pretokenizers":[)" +
        split + R"("\\p{N}{1,3}"}},)" + split +
        R"(" ?[\\p{L}\\p{M}]+| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+"}},)"
        R"({"type":"ByteLevel","add_prefix_space":false,"use_regex":false}]},)"
        R"("model":{"type":"BPE","vocab":{)" +
        vocab + R"(},"merges":["a a","aa aa","a b"]}})";
    return dsv4::Tokenizer::parse(json, "good");
  }();
  return *tokenizer;
}

void check_text(const dsv4::Tokenizer& tokenizer, std::string_view text, bool gives_back) {
  const std::vector<int32_t> ids = tokenizer.encode(text);
  dsv4::StreamDecoder stream(tokenizer);
  std::string streamed;
  for (const int32_t id : ids) {
    require(tokenizer.contains(id));
    streamed += stream.push(id);
  }
  streamed += stream.finish();
  require(streamed == tokenizer.decode(ids));
  require(dsv4::find_invalid_utf8(streamed) == streamed.size());
  require(tokenizer.pieces(ids).size() == ids.size());
  if (gives_back) require(streamed == text);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const std::string_view input(reinterpret_cast<const char*>(data), size);
  const size_t zero = input.find('\0');
  const std::string_view text = zero == std::string_view::npos ? "" : input.substr(zero + 1);
  try {
    const auto tokenizer = dsv4::Tokenizer::parse(input.substr(0, zero), "fuzz");
    check_text(*tokenizer, "ab <x>\xe4\xb8\xad 12\n", false);
    check_text(*tokenizer, text.substr(0, 256), false);
  } catch (const dsv4::Error&) {
  }
  const bool valid = dsv4::find_invalid_utf8(input) == input.size();
  try {
    check_text(good_tokenizer(), input, true);
    require(valid);
  } catch (const dsv4::Error&) {
    require(!valid);
  }
  return 0;
}
