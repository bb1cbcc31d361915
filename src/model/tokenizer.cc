// The public tokenizer: added tokens first, then split patterns, then BPE of each piece.
#include "dsv4/tokenizer.h"

#include <filesystem>
#include <fstream>
#include <unordered_map>

#include "core/fail.h"
#include "model/added_tokens.h"
#include "model/bpe.h"
#include "model/byte_alphabet.h"
#include "model/split_pattern.h"
#include "model/tokenizer_file.h"
#include "model/utf8.h"

namespace dsv4 {
namespace {

constexpr std::string_view kReplacement = "\xef\xbf\xbd";  // U+FFFD

// Words of a text repeat; longer ones rarely do.
constexpr size_t kMaxCachedWordBytes = 32;

std::string read_file(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  if (!in) fail(ErrorCode::kNotFound, path, ": cannot be opened");
  std::string out(std::istreambuf_iterator<char>(in), {});
  if (in.bad()) fail(ErrorCode::kNotFound, path, ": cannot be read");
  return out;
}

}  // namespace

struct Tokenizer::Impl {
  TokenizerFile file;
  std::vector<std::string> bytes;  // by id
  Bpe bpe;
  AddedTokens verbatim;    // not "normalized": looked for first
  AddedTokens normalized;  // looked for in what the others leave
  std::vector<SplitPattern> patterns;
  std::unordered_map<std::string_view, int32_t> whole_words;  // with ignore_merges; views `bytes`

  Impl(TokenizerFile file_, const std::string& origin)
      : file(std::move(file_)), bpe({file.byte_ids, file.unknown_id, file.fuse_unknown}) {
    for (size_t i = 0; i < file.split_patterns.size(); ++i) {
      patterns.emplace_back(file.split_patterns[i],
                            concat(origin, ": pre_tokenizer.pretokenizers[", i, "]"));
    }
    bpe.reserve(file.merges.size());
    for (size_t rank = 0; rank < file.merges.size(); ++rank) {
      const TokenizerFile::Merge& merge = file.merges[rank];
      bpe.add_merge(merge.left, merge.right, merge.merged, static_cast<int32_t>(rank));
    }
    for (const TokenizerFile::AddedToken& added : file.added) {
      const std::string& spelling = file.tokens[static_cast<size_t>(added.id)].spelling;
      (added.normalized ? normalized : verbatim).add(spelling, added.id);
    }
    bytes.resize(file.tokens.size());
    for (size_t id = 0; id < bytes.size(); ++id) {
      const TokenizerFile::Token& token = file.tokens[id];
      std::optional<std::string> spelled;
      if (!token.added) spelled = bytes_of_spelling(token.spelling);
      // A vocabulary entry outside the byte alphabet cannot come from text; it stands for itself.
      bytes[id] = spelled ? std::move(*spelled) : token.spelling;
      if (spelled && file.ignore_merges) whole_words.emplace(bytes[id], static_cast<int32_t>(id));
    }
  }

  bool contains(int64_t id) const {
    return id >= 0 && id < static_cast<int64_t>(bytes.size()) &&
           !bytes[static_cast<size_t>(id)].empty();
  }
  const TokenizerFile::Token& token(int32_t id) const {
    if (!contains(id)) {
      fail(ErrorCode::kInvalidArgument, "token id ", id, " has no token; ids are 0 to ",
           bytes.size() - 1);
    }
    return file.tokens[static_cast<size_t>(id)];
  }

  // One call of encode(): all mutable state, so that calls share nothing.
  struct Encoding {
    const Impl& tokenizer;
    std::vector<int32_t> ids;
    Bpe::Workspace workspace;
    SplitPattern::Scratch scratch;
    struct Range {
      size_t begin, count;
    };
    std::unordered_map<std::string_view, Range> seen;  // words of this text -> their place in `ids`

    explicit Encoding(const Impl& tokenizer_) : tokenizer(tokenizer_) {}

    void word(std::string_view text) {
      const bool cached = text.size() <= kMaxCachedWordBytes;
      if (cached) {
        if (const auto found = seen.find(text); found != seen.end()) {
          const Range range = found->second;
          for (size_t i = 0; i < range.count; ++i) ids.push_back(ids[range.begin + i]);
          return;
        }
      }
      const size_t begin = ids.size();
      const auto whole = tokenizer.whole_words.find(text);
      if (whole != tokenizer.whole_words.end()) {
        ids.push_back(whole->second);
      } else {
        tokenizer.bpe.encode(text, workspace, ids);
      }
      if (cached) seen.emplace(text, Range{begin, ids.size() - begin});
    }

    void split(std::string_view text, size_t stage) {
      if (stage == tokenizer.patterns.size()) {
        word(text);
        return;
      }
      tokenizer.patterns[stage].split(text, scratch,
                                      [&](std::string_view piece) { split(piece, stage + 1); });
    }

    // Cuts out added tokens; what lies between them goes to `rest`.
    template <typename Rest>
    void cut(const AddedTokens& added, std::string_view text, const Rest& rest) {
      size_t at = 0;
      while (at < text.size()) {
        const AddedTokens::Found found = added.find(text, at);
        const size_t end = found.id >= 0 ? found.begin : text.size();
        if (end > at) rest(text.substr(at, end - at));
        if (found.id < 0) break;
        ids.push_back(found.id);
        at = found.end;
      }
    }
  };
};

Tokenizer::Tokenizer() = default;
Tokenizer::~Tokenizer() = default;

std::unique_ptr<Tokenizer> Tokenizer::load(const std::string& path) {
  std::error_code ignored;
  const bool is_folder = std::filesystem::is_directory(path, ignored);
  const std::string file =
      is_folder ? (std::filesystem::path(path) / "tokenizer.json").string() : path;
  return parse(read_file(file), file);
}

std::unique_ptr<Tokenizer> Tokenizer::parse(std::string_view json, const std::string& origin) {
  std::unique_ptr<Tokenizer> out(new Tokenizer);
  out->impl_ = std::make_unique<Impl>(TokenizerFile::parse(json, origin), origin);
  return out;
}

int64_t Tokenizer::vocab_size() const {
  return static_cast<int64_t>(impl_->bytes.size());
}

bool Tokenizer::contains(int64_t id) const {
  return impl_->contains(id);
}

bool Tokenizer::is_special(int32_t id) const {
  return impl_->contains(id) && impl_->file.tokens[static_cast<size_t>(id)].special;
}

std::optional<int32_t> Tokenizer::find(std::string_view spelling) const {
  const auto found = impl_->file.ids.find(spelling);
  if (found == impl_->file.ids.end()) return std::nullopt;
  return found->second;
}

std::vector<int32_t> Tokenizer::encode(std::string_view text) const {
  if (const size_t at = find_invalid_utf8(text); at != text.size()) {
    fail(ErrorCode::kInvalidArgument, "the text is not UTF-8: invalid at byte ", at, " of ",
         text.size());
  }
  Impl::Encoding encoding(*impl_);
  encoding.cut(impl_->verbatim, text, [&](std::string_view rest) {
    encoding.cut(impl_->normalized, rest,
                 [&](std::string_view plain) { encoding.split(plain, 0); });
  });
  return std::move(encoding.ids);
}

std::string Tokenizer::decode(std::span<const int32_t> ids) const {
  std::string joined;
  for (const int32_t id : ids) {
    impl_->token(id);
    joined += impl_->bytes[static_cast<size_t>(id)];
  }
  std::string out;
  out.reserve(joined.size());
  append_valid_utf8(joined, true, out);
  return out;
}

std::string_view Tokenizer::bytes(int64_t id) const {
  return impl_->contains(id) ? std::string_view(impl_->bytes[static_cast<size_t>(id)])
                             : std::string_view();
}

std::vector<std::string> Tokenizer::pieces(std::span<const int32_t> ids) const {
  std::vector<std::string> out;
  out.reserve(ids.size());
  for (const int32_t id : ids) out.push_back(impl_->token(id).spelling);
  return out;
}

std::string StreamDecoder::push(int32_t id) {
  const bool known = tokenizer_->contains(id);
  pending_ += known ? tokenizer_->bytes(id) : kReplacement;
  std::string out;
  pending_.erase(0, append_valid_utf8(pending_, false, out));
  return out;
}

std::string StreamDecoder::finish() {
  std::string out;
  append_valid_utf8(pending_, true, out);
  pending_.clear();
  return out;
}

}  // namespace dsv4
