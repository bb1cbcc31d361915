// Conversations as prompts, and completions as messages. The prompt is built by code, not by a
// template language. Source: spec/model.md 9. Not here, and refused by name: tool descriptions,
// response formats and the maximal-effort prefix, whose wording belongs to the released files.
#pragma once
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "dsv4/tokenizer.h"

namespace dsv4 {

enum class Role : uint8_t { kSystem, kUser, kDeveloper, kAssistant, kTool, kLatestReminder };
/// "system", "user", "developer", "assistant", "tool", "latest_reminder". @throws Error
/// kInvalidArgument listing them.
Role parse_role(std::string_view name);
const char* role_name(Role role);

/// What a user or developer message asks for instead of an answer; each has a token of its own.
enum class ChatTask : uint8_t { kAction, kQuery, kAuthority, kDomain, kTitle, kReadUrl };
/// "action", "query", "authority", "domain", "title", "read_url". @throws Error kInvalidArgument
/// listing them.
ChatTask parse_chat_task(std::string_view name);

/// A function that the assistant called.
struct ToolCall {
  std::string id;         ///< may be empty when there is nothing to tell apart
  std::string name;       ///< of the function
  std::string arguments;  ///< a JSON object
};

struct ChatMessage {
  Role role = Role::kUser;
  std::string content;
  std::string reasoning;             ///< assistant only
  std::vector<ToolCall> tool_calls;  ///< assistant only
  std::string tool_call_id;          ///< tool only: the call that `content` answers
  std::optional<ChatTask> task;      ///< user and developer only
  bool without_end = false;          ///< assistant only: no end token, so that the text goes on
  std::string tools;                 ///< descriptions as JSON; refused when not empty
  std::string response_format;       ///< a schema as JSON; refused when not empty
};

enum class ReasoningEffort : uint8_t { kDefault, kHigh, kMax };

struct ChatOptions {
  bool thinking = false;  ///< mode "thinking" instead of "chat"
  /// Reasoning before the last question is left out (thinking mode).
  bool drop_thinking = true;
  ReasoningEffort effort = ReasoningEffort::kDefault;  ///< kHigh does not change the prompt
};

/// The prompt for the next assistant message, its begin token included, as text: tokens appear by
/// their spelling, and so do spellings that occur inside of contents.
/// @throws Error kInvalidArgument: no messages, a field that the role does not have, arguments that
/// are no JSON object, results of unknown calls; kUnsupported: tools, response_format, or effort
/// kMax in thinking mode. The message gives the number of the message, from 0.
std::string render_chat(std::span<const ChatMessage> messages, const ChatOptions& options);

/// render_chat() as ids. @throws Error also kUnsupported: the tokenizer lacks a token of the format
/// that the prompt uses.
std::vector<int32_t> encode_chat(const Tokenizer& tokenizer, std::span<const ChatMessage> messages,
                                 const ChatOptions& options);

/// A completion, cut where the reasoning ends.
struct Completion {
  std::string reasoning;
  std::string content;
  bool reasoning_ended = false;  ///< false: all of the text is reasoning
};
/// `text` is what a model wrote after a prompt of render_chat with these options.
Completion split_completion(std::string_view text, const ChatOptions& options);

}  // namespace dsv4
