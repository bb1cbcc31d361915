#include "model/chat.h"

#include <algorithm>
#include <array>
#include <nlohmann/json.hpp>

#include "checkpoint/strict_json.h"
#include "core/fail.h"

namespace dsv4 {
namespace {

// Bars are U+FF5C, low lines U+2581.
#define DSV4_BAR "\xef\xbd\x9c"
#define DSV4_LOW "\xe2\x96\x81"
constexpr const char* kBegin = "<" DSV4_BAR "begin" DSV4_LOW "of" DSV4_LOW "sentence" DSV4_BAR ">";
constexpr const char* kEnd = "<" DSV4_BAR "end" DSV4_LOW "of" DSV4_LOW "sentence" DSV4_BAR ">";
constexpr const char* kUser = "<" DSV4_BAR "User" DSV4_BAR ">";
constexpr const char* kAssistant = "<" DSV4_BAR "Assistant" DSV4_BAR ">";
constexpr const char* kReminder = "<" DSV4_BAR "latest_reminder" DSV4_BAR ">";
constexpr const char* kMarkup = DSV4_BAR "DSML" DSV4_BAR;
constexpr const char* kThinkBegin = "<think>";
constexpr const char* kThinkEnd = "</think>";

struct NamedTask {
  const char* name;
  const char* token;
};
// By ChatTask.
constexpr std::array<NamedTask, 6> kTasks = {{
    {"action", "<" DSV4_BAR "action" DSV4_BAR ">"},
    {"query", "<" DSV4_BAR "query" DSV4_BAR ">"},
    {"authority", "<" DSV4_BAR "authority" DSV4_BAR ">"},
    {"domain", "<" DSV4_BAR "domain" DSV4_BAR ">"},
    {"title", "<" DSV4_BAR "title" DSV4_BAR ">"},
    {"read_url", "<" DSV4_BAR "read_url" DSV4_BAR ">"},
}};
#undef DSV4_BAR
#undef DSV4_LOW

// By Role.
constexpr std::array<const char*, 6> kRoles = {"system",    "user", "developer",
                                               "assistant", "tool", "latest_reminder"};

// A message after preprocessing: tool messages have become parts of user messages.
struct Part {
  std::string text;
  bool is_result = false;
  std::string call_id;  // of a result
  size_t message_idx = 0;
};
struct Turn {
  const ChatMessage* message;  // the first of those merged
  Role role;
  std::vector<Part> parts;  // of a user turn
  std::optional<ChatTask> task;
  bool asks() const { return role == Role::kUser || role == Role::kDeveloper; }
};

template <typename... Parts>
[[noreturn]] void refuse(ErrorCode code, size_t message_idx, const Parts&... parts) {
  fail(code, "message ", message_idx, ": ", parts...);
}

void validate(const ChatMessage& message, size_t i, const ChatOptions& options) {
  const char* role = role_name(message.role);
  const auto only_for = [&](bool used, bool allowed, const char* field) {
    if (used && !allowed) {
      refuse(ErrorCode::kInvalidArgument, i, "role ", role, " has no ", field);
    }
  };
  const bool assistant = message.role == Role::kAssistant;
  only_for(!message.reasoning.empty(), assistant, "reasoning");
  only_for(!message.tool_calls.empty(), assistant, "tool_calls");
  only_for(message.without_end, assistant, "without_end");
  only_for(!message.tool_call_id.empty(), message.role == Role::kTool, "tool_call_id");
  only_for(message.task.has_value(),
           message.role == Role::kUser || message.role == Role::kDeveloper, "task");
  const char* unsupported = !message.tools.empty()             ? "tools"
                            : !message.response_format.empty() ? "response_format"
                                                               : nullptr;
  if (unsupported != nullptr) {
    refuse(ErrorCode::kUnsupported, i, unsupported,
           " is not supported: its wording in the prompt is part of the released files only");
  }
  if (i == 0 && options.thinking && options.effort == ReasoningEffort::kMax) {
    refuse(ErrorCode::kUnsupported, i,
           "reasoning effort \"max\" is not supported in thinking mode: the wording of its prefix "
           "is part of the released files only");
  }
}

// Several results in one turn are put in the order of the calls that they answer; other parts keep
// their places.
void order_results(Turn& turn, const std::vector<ToolCall>& calls) {
  std::vector<Part*> places;
  for (Part& part : turn.parts) {
    if (part.is_result) places.push_back(&part);
  }
  if (places.size() < 2) return;
  const bool all_anonymous =
      std::all_of(places.begin(), places.end(), [](const Part* p) { return p->call_id.empty(); });
  if (all_anonymous) return;
  std::vector<std::pair<size_t, Part>> results;
  for (const Part* part : places) {
    const auto call = std::find_if(calls.begin(), calls.end(), [&](const ToolCall& candidate) {
      return candidate.id == part->call_id;
    });
    if (call == calls.end() || part->call_id.empty()) {
      refuse(ErrorCode::kInvalidArgument, part->message_idx, "tool_call_id \"", part->call_id,
             "\" is not one of the ", calls.size(), " calls of the assistant message before");
    }
    results.emplace_back(static_cast<size_t>(call - calls.begin()), *part);
  }
  std::stable_sort(results.begin(), results.end(),
                   [](const auto& a, const auto& b) { return a.first < b.first; });
  for (size_t i = 0; i < places.size(); ++i) *places[i] = std::move(results[i].second);
}

// Tool messages become user messages, neighbours merge. A task ends its message: it asks about what
// stands before it.
std::vector<Turn> merge(std::span<const ChatMessage> messages) {
  std::vector<Turn> turns;
  for (size_t i = 0; i < messages.size(); ++i) {
    const ChatMessage& message = messages[i];
    const bool is_result = message.role == Role::kTool;
    if (message.role != Role::kUser && !is_result) {
      turns.push_back({&message, message.role, {}, message.task});
      continue;
    }
    const std::string text =
        is_result ? "<tool_result>" + message.content + "</tool_result>" : message.content;
    if (turns.empty() || turns.back().role != Role::kUser || turns.back().task) {
      turns.push_back({&message, Role::kUser, {}, std::nullopt});
    }
    turns.back().parts.push_back({text, is_result, message.tool_call_id, i});
    turns.back().task = message.task;
  }
  const std::vector<ToolCall> none;
  const std::vector<ToolCall>* calls = &none;
  for (Turn& turn : turns) {
    if (turn.role == Role::kAssistant) calls = &turn.message->tool_calls;
    if (turn.role == Role::kUser) order_results(turn, *calls);
  }
  return turns;
}

// Index of the last user or developer turn, -1 if there is none.
ptrdiff_t last_question(const std::vector<Turn>& turns) {
  for (size_t i = turns.size(); i > 0; --i) {
    if (turns[i - 1].asks()) return static_cast<ptrdiff_t>(i) - 1;
  }
  return -1;
}

// JSON with a space after commas and colons, object members in their order, non-ASCII as it is.
void append_json(const nlohmann::ordered_json& value, std::string& out) {
  const char* separator = "";
  if (value.is_object()) {
    out += '{';
    for (const auto& [key, member] : value.items()) {
      out += separator + nlohmann::ordered_json(key).dump() + ": ";
      append_json(member, out);
      separator = ", ";
    }
    out += '}';
  } else if (value.is_array()) {
    out += '[';
    for (const auto& element : value) {
      out += separator;
      append_json(element, out);
      separator = ", ";
    }
    out += ']';
  } else {
    out += value.dump();
  }
}

nlohmann::ordered_json parse_arguments(const ToolCall& call, size_t message_idx) {
  try {
    // Bounded and without duplicate keys; the order of members is kept by the second reading.
    if (parse_strict_json(call.arguments, "arguments").is_object()) {
      return nlohmann::ordered_json::parse(call.arguments);
    }
  } catch (const Error& error) {
    refuse(ErrorCode::kInvalidArgument, message_idx, "call of ", printable(call.name), ": ",
           error.what());
  }
  refuse(ErrorCode::kInvalidArgument, message_idx, "call of ", printable(call.name),
         ": arguments are not a JSON object");
}

void append_call(const ToolCall& call, size_t message_idx, std::string& out) {
  const std::string markup = kMarkup;
  out += "<" + markup + "invoke name=\"" + call.name + "\">\n";
  const nlohmann::ordered_json arguments = parse_arguments(call, message_idx);
  const char* separator = "";
  for (const auto& [name, value] : arguments.items()) {
    out += separator + ("<" + markup) + "parameter name=\"" + name + "\" string=\"";
    if (value.is_string()) {
      out += "true\">" + value.get<std::string>();
    } else {
      out += "false\">";
      append_json(value, out);
    }
    out += "</" + markup + "parameter>";
    separator = "\n";
  }
  out += "\n</" + markup + "invoke>";
}

void append_calls(const std::vector<ToolCall>& calls, size_t message_idx, std::string& out) {
  if (calls.empty()) return;
  const std::string markup = kMarkup;
  out += "\n\n<" + markup + "tool_calls>\n";
  for (size_t i = 0; i < calls.size(); ++i) {
    if (i > 0) out += '\n';
    append_call(calls[i], message_idx, out);
  }
  out += "\n</" + markup + "tool_calls>";
}

// The turn itself, without the transition to the next one.
void append_turn(const Turn& turn, size_t message_idx, bool with_reasoning, std::string& out) {
  const ChatMessage& message = *turn.message;
  switch (turn.role) {
    case Role::kSystem:
      out += message.content;
      break;
    case Role::kUser:
      out += kUser;
      for (size_t i = 0; i < turn.parts.size(); ++i) out += (i ? "\n\n" : "") + turn.parts[i].text;
      break;
    case Role::kDeveloper:
      out += kUser + message.content;
      break;
    case Role::kLatestReminder:
      out += kReminder + message.content;
      break;
    case Role::kAssistant:
      if (with_reasoning) out += message.reasoning + kThinkEnd;
      out += message.content;
      append_calls(message.tool_calls, message_idx, out);
      if (!message.without_end) out += kEnd;
      break;
    case Role::kTool:
      DSV4_CHECK(false);  // merge() has made user turns of them
  }
}

// From a question to the answer: who speaks, and whether thinking begins or is over already.
void append_transition(const Turn& turn, bool thinks, const ChatOptions& options,
                       std::string& out) {
  if (!turn.task) {
    out += kAssistant;
    out += thinks ? kThinkBegin : kThinkEnd;
    return;
  }
  if (*turn.task == ChatTask::kAction) {
    out += kAssistant;
    out += options.thinking ? kThinkBegin : kThinkEnd;
  }
  out += kTasks[static_cast<size_t>(*turn.task)].token;
}

template <size_t kCount, typename NameOf>
size_t index_of(std::string_view name, const char* what, const NameOf& name_of) {
  std::string names;
  for (size_t i = 0; i < kCount; ++i) {
    if (name == name_of(i)) return i;
    names += (i ? ", " : "") + std::string(name_of(i));
  }
  fail(ErrorCode::kInvalidArgument, what, " \"", printable(name), "\", expected one of: ", names);
}

}  // namespace

const char* role_name(Role role) {
  return kRoles[static_cast<size_t>(role)];
}

Role parse_role(std::string_view name) {
  return static_cast<Role>(
      index_of<kRoles.size()>(name, "role", [](size_t i) { return kRoles[i]; }));
}

ChatTask parse_chat_task(std::string_view name) {
  return static_cast<ChatTask>(
      index_of<kTasks.size()>(name, "task", [](size_t i) { return kTasks[i].name; }));
}

std::string render_chat(std::span<const ChatMessage> messages, const ChatOptions& options) {
  if (messages.empty()) fail(ErrorCode::kInvalidArgument, "no messages");
  for (size_t i = 0; i < messages.size(); ++i) validate(messages[i], i, options);

  std::vector<Turn> turns = merge(messages);
  const bool drop = options.thinking && options.drop_thinking;
  if (drop) {
    // Instructions of earlier questions go; their reasoning is left out below.
    const ptrdiff_t last = last_question(turns);
    std::vector<Turn> kept;
    for (size_t i = 0; i < turns.size(); ++i) {
      const bool is_old = static_cast<ptrdiff_t>(i) < last;
      if (is_old && turns[i].role == Role::kDeveloper) continue;
      kept.push_back(std::move(turns[i]));
    }
    turns = std::move(kept);
  }

  const ptrdiff_t last = last_question(turns);
  std::string out = kBegin;
  for (size_t i = 0; i < turns.size(); ++i) {
    const Turn& turn = turns[i];
    const bool follows_task = i > 0 && turns[i - 1].task.has_value();
    const bool is_current = static_cast<ptrdiff_t>(i) >= last;
    const bool thinks = options.thinking && (!drop || is_current);
    const auto message_idx = static_cast<size_t>(turn.message - messages.data());
    append_turn(turn, message_idx, thinks && !follows_task, out);
    const bool answered = i + 1 == turns.size() || turns[i + 1].role == Role::kAssistant ||
                          turns[i + 1].role == Role::kLatestReminder;
    if (turn.asks() && answered) append_transition(turn, thinks, options, out);
  }
  return out;
}

std::vector<int32_t> encode_chat(const Tokenizer& tokenizer, std::span<const ChatMessage> messages,
                                 const ChatOptions& options) {
  const std::string prompt = render_chat(messages, options);
  std::vector<const char*> tokens = {kBegin,    kEnd,        kUser,     kAssistant,
                                     kReminder, kThinkBegin, kThinkEnd, kMarkup};
  for (const NamedTask& task : kTasks) tokens.push_back(task.token);
  for (const char* token : tokens) {
    if (prompt.find(token) == std::string::npos || tokenizer.find(token)) continue;
    fail(ErrorCode::kUnsupported, "the prompt uses ", token,
         ", which this tokenizer does not have");
  }
  return tokenizer.encode(prompt);
}

Completion split_completion(std::string_view text, const ChatOptions& options) {
  Completion out;
  if (!options.thinking) {
    out.content = text;
    out.reasoning_ended = true;
    return out;
  }
  const size_t end = text.find(kThinkEnd);
  out.reasoning = text.substr(0, end);
  out.reasoning_ended = end != std::string_view::npos;
  if (out.reasoning_ended) out.content = text.substr(end + std::string_view(kThinkEnd).size());
  return out;
}

}  // namespace dsv4
