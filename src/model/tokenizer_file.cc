#include "model/tokenizer_file.h"

#include <nlohmann/json.hpp>

#include "checkpoint/strict_json.h"
#include "core/fail.h"
#include "model/added_tokens.h"
#include "model/byte_alphabet.h"

namespace dsv4 {
namespace {

using Json = nlohmann::json;

// Bounds of what a file may ask for. Released files have 10 MB and 4 pre-tokenizers.
constexpr size_t kMaxFileBytes = size_t{64} << 20;
constexpr size_t kMaxPreTokenizers = 16;

std::string quoted(std::string_view text) {
  return concat('"', printable(text, 60), '"');
}

// Reads one file; `where` in messages is the path of the value inside it.
class Reader {
 public:
  Reader(const std::string& origin, TokenizerFile& file) : origin_(origin), file_(file) {}

  void read(const Json& root);

 private:
  template <typename... Parts>
  [[noreturn]] void corrupt(const Parts&... parts) const {
    fail(ErrorCode::kDataCorrupt, origin_, ": ", parts...);
  }
  template <typename... Parts>
  [[noreturn]] void unsupported(const Parts&... parts) const {
    fail(ErrorCode::kUnsupported, origin_, ": ", parts...);
  }

  const Json& member(const Json& object, const char* key, const std::string& where) const;
  const Json* optional_member(const Json& object, const char* key) const;
  const std::string& string_member(const Json& object, const char* key,
                                   const std::string& where) const;
  bool bool_member(const Json& object, const char* key, const std::string& where,
                   bool when_absent) const;
  int32_t id_of(const Json& value, const std::string& where) const;

  void refuse_unless_empty_sequence(const Json& root, const char* key, const char* list) const;
  void read_model(const Json& model);
  void read_vocab(const Json& vocab);
  void read_added(const Json& root);
  void index_tokens();
  void read_merges(const Json& merges);
  int32_t merge_part(std::string_view part, size_t rank) const;
  void read_bytes(const Json& model);
  void read_pre_tokenizers(const Json& root);
  void read_split(const Json& split, const std::string& where);
  void check_byte_level(const Json& stage, const std::string& where) const;
  TokenizerFile::Token& token(int32_t id);

  const std::string& origin_;
  TokenizerFile& file_;
};

const Json* Reader::optional_member(const Json& object, const char* key) const {
  const auto found = object.find(key);
  return found == object.end() || found->is_null() ? nullptr : &*found;
}

const Json& Reader::member(const Json& object, const char* key, const std::string& where) const {
  if (!object.is_object()) corrupt(where, ": expected an object, got ", object.type_name());
  const Json* value = optional_member(object, key);
  if (value == nullptr) corrupt(where, ": \"", key, "\" is missing");
  return *value;
}

const std::string& Reader::string_member(const Json& object, const char* key,
                                         const std::string& where) const {
  const Json& value = member(object, key, where);
  if (!value.is_string()) {
    corrupt(where, ".", key, ": expected a string, got ", value.type_name());
  }
  return value.get_ref<const std::string&>();
}

bool Reader::bool_member(const Json& object, const char* key, const std::string& where,
                         bool when_absent) const {
  const Json* value = optional_member(object, key);
  if (value == nullptr) return when_absent;
  if (!value->is_boolean()) {
    corrupt(where, ".", key, ": expected true or false, got ", value->type_name());
  }
  return value->get<bool>();
}

int32_t Reader::id_of(const Json& value, const std::string& where) const {
  if (!value.is_number_integer()) corrupt(where, ": id ", value.type_name(), ", expected integer");
  const bool fits =
      value.is_number_unsigned()
          ? value.get<uint64_t>() < uint64_t{TokenizerFile::kMaxIds}
          : value.get<int64_t>() >= 0 && value.get<int64_t>() < TokenizerFile::kMaxIds;
  if (!fits) {
    corrupt(where, ": id ", value.dump(), ", expected 0 to ", TokenizerFile::kMaxIds - 1);
  }
  return value.get<int32_t>();
}

TokenizerFile::Token& Reader::token(int32_t id) {
  const auto at = static_cast<size_t>(id);
  if (at >= file_.tokens.size()) file_.tokens.resize(at + 1);
  return file_.tokens[at];
}

void Reader::refuse_unless_empty_sequence(const Json& root, const char* key,
                                          const char* list) const {
  const Json* value = optional_member(root, key);
  if (value == nullptr) return;
  const std::string& type = string_member(*value, "type", key);
  const Json* parts = value->contains(list) ? &(*value)[list] : nullptr;
  if (type == "Sequence" && parts != nullptr && parts->is_array() && parts->empty()) return;
  unsupported(key, " of type ", quoted(type), "; only none or an empty Sequence is supported");
}

void Reader::read(const Json& root) {
  if (!root.is_object()) corrupt("expected an object, got ", root.type_name());
  refuse_unless_empty_sequence(root, "normalizer", "normalizers");
  const Json& model = member(root, "model", "file");
  read_model(model);
  read_vocab(member(model, "vocab", "model"));
  read_added(root);
  index_tokens();
  read_bytes(model);
  read_merges(member(model, "merges", "model"));
  read_pre_tokenizers(root);
  if (const Json* decoder = optional_member(root, "decoder")) {
    const std::string& type = string_member(*decoder, "type", "decoder");
    if (type != "ByteLevel") {
      unsupported("decoder of type ", quoted(type), "; only ByteLevel is supported");
    }
  }
  // The post-processor adds begin and end tokens or trims offsets; encode() does neither.
}

void Reader::read_model(const Json& model) {
  const std::string& type = string_member(model, "type", "model");
  if (type != "BPE") unsupported("model of type ", quoted(type), "; only BPE is supported");
  if (bool_member(model, "byte_fallback", "model", false)) {
    unsupported("model.byte_fallback is true; only false is supported (every byte is a token)");
  }
  if (const Json* dropout = optional_member(model, "dropout")) {
    if (!dropout->is_number()) corrupt("model.dropout: expected a number or null");
    if (dropout->get<double>() != 0) {
      unsupported("model.dropout is ", dropout->dump(), "; only null or 0 is supported");
    }
  }
  for (const char* key : {"continuing_subword_prefix", "end_of_word_suffix"}) {
    if (optional_member(model, key) != nullptr && !string_member(model, key, "model").empty()) {
      unsupported("model.", key, " is not empty; only null is supported");
    }
  }
  file_.fuse_unknown = bool_member(model, "fuse_unk", "model", false);
  file_.ignore_merges = bool_member(model, "ignore_merges", "model", false);
}

void Reader::read_vocab(const Json& vocab) {
  if (!vocab.is_object()) corrupt("model.vocab: expected an object, got ", vocab.type_name());
  for (const auto& [spelling, value] : vocab.items()) {
    if (spelling.empty()) corrupt("model.vocab: an empty token");
    if (!value.is_number_integer()) {
      corrupt("model.vocab[", quoted(spelling), "]: id of type ", value.type_name(),
              ", expected an integer");
    }
    const int32_t id = id_of(value, "model.vocab");
    TokenizerFile::Token& entry = token(id);
    if (!entry.spelling.empty()) {
      corrupt("model.vocab: id ", id, " is given to ", quoted(entry.spelling), " and to ",
              quoted(spelling));
    }
    entry.spelling = spelling;
  }
  if (file_.tokens.empty()) corrupt("model.vocab: no tokens");
}

void Reader::read_added(const Json& root) {
  const Json* list = optional_member(root, "added_tokens");
  if (list == nullptr) return;
  if (!list->is_array()) corrupt("added_tokens: expected an array, got ", list->type_name());
  for (size_t i = 0; i < list->size(); ++i) {
    const Json& value = (*list)[i];
    const std::string where = concat("added_tokens[", i, "]");
    const std::string& content = string_member(value, "content", where);
    const int32_t id = id_of(member(value, "id", where), where);
    if (content.empty() || content.size() > AddedTokens::kMaxBytes) {
      corrupt(where, ": content of ", content.size(), " bytes, expected 1 to ",
              AddedTokens::kMaxBytes);
    }
    for (const char* key : {"single_word", "lstrip", "rstrip"}) {
      if (bool_member(value, key, where, false)) {
        unsupported(where, " ", quoted(content), ": ", key, " is true; only false is supported");
      }
    }
    TokenizerFile::Token& entry = token(id);
    if (!entry.spelling.empty() && entry.spelling != content) {
      corrupt(where, ": id ", id, " is given to ", quoted(entry.spelling), " and to ",
              quoted(content));
    }
    if (entry.added) corrupt(where, ": ", quoted(content), " (id ", id, ") is given twice");
    entry.spelling = content;
    entry.added = true;
    entry.special = bool_member(value, "special", where, false);
    const bool normalized = bool_member(value, "normalized", where, !entry.special);
    file_.added.push_back({id, normalized});
  }
}

void Reader::index_tokens() {
  file_.ids.reserve(file_.tokens.size());
  for (size_t id = 0; id < file_.tokens.size(); ++id) {
    const std::string& spelling = file_.tokens[id].spelling;
    if (spelling.empty()) continue;
    const auto [entry, is_new] = file_.ids.emplace(spelling, static_cast<int32_t>(id));
    if (!is_new) corrupt("token ", quoted(spelling), " has ids ", entry->second, " and ", id);
  }
}

void Reader::read_bytes(const Json& model) {
  if (optional_member(model, "unk_token") != nullptr) {
    const std::string& unknown = string_member(model, "unk_token", "model");
    const auto found = file_.ids.find(unknown);
    if (found == file_.ids.end()) {
      corrupt("model.unk_token ", quoted(unknown), " is not in the vocabulary");
    }
    file_.unknown_id = found->second;
  }
  for (size_t byte = 0; byte < 256; ++byte) {
    const std::string& spelling = byte_spellings()[byte];
    const auto found = file_.ids.find(spelling);
    file_.byte_ids[byte] = found == file_.ids.end() ? -1 : found->second;
    if (file_.byte_ids[byte] < 0 && file_.unknown_id < 0) {
      corrupt("model.vocab: no token ", quoted(spelling), " for byte ", byte,
              ", and no unk_token: some texts could not be encoded");
    }
  }
}

int32_t Reader::merge_part(std::string_view part, size_t rank) const {
  const auto found = file_.ids.find(part);
  if (found == file_.ids.end()) {
    corrupt("model.merges[", rank, "]: ", quoted(part), " is not in the vocabulary");
  }
  return found->second;
}

void Reader::read_merges(const Json& merges) {
  if (!merges.is_array()) corrupt("model.merges: expected an array, got ", merges.type_name());
  file_.merges.reserve(merges.size());
  std::string joined;
  for (size_t rank = 0; rank < merges.size(); ++rank) {
    const Json& value = merges[rank];
    std::string_view left, right;
    if (value.is_array() && value.size() == 2 && value[0].is_string() && value[1].is_string()) {
      left = value[0].get_ref<const std::string&>();
      right = value[1].get_ref<const std::string&>();
    } else if (value.is_string()) {
      const std::string_view pair = value.get_ref<const std::string&>();
      const size_t space = pair.find(' ');
      if (space == std::string_view::npos || pair.find(' ', space + 1) != std::string_view::npos) {
        corrupt("model.merges[", rank, "]: ", quoted(pair), ", expected two tokens and one space");
      }
      left = pair.substr(0, space);
      right = pair.substr(space + 1);
    } else {
      corrupt("model.merges[", rank, "]: expected \"a b\" or [\"a\", \"b\"], got ",
              quoted(value.dump()));
    }
    joined.assign(left).append(right);
    const int32_t left_id = merge_part(left, rank);
    const int32_t right_id = merge_part(right, rank);
    file_.merges.push_back({left_id, right_id, merge_part(joined, rank)});
  }
}

void Reader::read_pre_tokenizers(const Json& root) {
  const Json& pre = member(root, "pre_tokenizer", "file");
  const std::string& type = string_member(pre, "type", "pre_tokenizer");
  if (type != "Sequence") {
    unsupported("pre_tokenizer of type ", quoted(type),
                "; only a Sequence of Split (Regex, Isolated) and ByteLevel is supported");
  }
  const Json& stages = member(pre, "pretokenizers", "pre_tokenizer");
  if (!stages.is_array() || stages.empty() || stages.size() > kMaxPreTokenizers) {
    corrupt("pre_tokenizer.pretokenizers: expected an array of 1 to ", kMaxPreTokenizers,
            " elements");
  }
  for (size_t i = 0; i < stages.size(); ++i) {
    const std::string where = concat("pre_tokenizer.pretokenizers[", i, "]");
    const std::string& stage = string_member(stages[i], "type", where);
    const bool last = i + 1 == stages.size();
    if (stage == "Split" && !last) {
      read_split(stages[i], where);
    } else if (stage == "ByteLevel" && last) {
      check_byte_level(stages[i], where);
    } else {
      unsupported(where, " is ", quoted(stage), last ? " and the last one" : "",
                  "; only Split (Regex, Isolated) before one last ByteLevel is supported");
    }
  }
}

void Reader::read_split(const Json& split, const std::string& where) {
  const Json& pattern = member(split, "pattern", where);
  if (!pattern.is_object() || !pattern.contains("Regex")) {
    unsupported(where, ".pattern is not a Regex; only Regex is supported");
  }
  const std::string& behavior = string_member(split, "behavior", where);
  if (behavior != "Isolated") {
    unsupported(where, ".behavior is ", quoted(behavior), "; only Isolated is supported");
  }
  if (bool_member(split, "invert", where, false)) {
    unsupported(where, ".invert is true; only false is supported");
  }
  file_.split_patterns.push_back(string_member(pattern, "Regex", where + ".pattern"));
}

void Reader::check_byte_level(const Json& stage, const std::string& where) const {
  // Absent means true in the format.
  for (const char* key : {"add_prefix_space", "use_regex"}) {
    if (bool_member(stage, key, where, true)) {
      unsupported(where, " (ByteLevel): ", key, " is true; only false is supported");
    }
  }
}

}  // namespace

TokenizerFile TokenizerFile::parse(std::string_view json, const std::string& origin) {
  if (json.size() > kMaxFileBytes) {
    fail(ErrorCode::kDataCorrupt, origin, ": ", json.size(), " bytes, expected at most ",
         kMaxFileBytes);
  }
  const Json root = parse_strict_json(json, origin);
  TokenizerFile file;
  file.byte_ids.fill(-1);
  Reader(origin, file).read(root);
  return file;
}

}  // namespace dsv4
