#include "model/chat.h"

#include <gtest/gtest.h>

#include "dsv4/error.h"

namespace dsv4 {
namespace {

// The spellings once more, independent of the code under test.
const std::string kBegin = "<\uff5cbegin\u2581of\u2581sentence\uff5c>";
const std::string kEnd = "<\uff5cend\u2581of\u2581sentence\uff5c>";
const std::string kU = "<\uff5cUser\uff5c>";
const std::string kA = "<\uff5cAssistant\uff5c>";
const std::string kReminder = "<\uff5clatest_reminder\uff5c>";
const std::string kMarkup = "\uff5cDSML\uff5c";

ChatMessage message(Role role, const std::string& content) {
  ChatMessage out;
  out.role = role;
  out.content = content;
  return out;
}
ChatMessage user(const std::string& content) {
  return message(Role::kUser, content);
}
ChatMessage assistant(const std::string& content, const std::string& reasoning = "") {
  ChatMessage out = message(Role::kAssistant, content);
  out.reasoning = reasoning;
  return out;
}
ChatMessage tool(const std::string& content, const std::string& call_id = "") {
  ChatMessage out = message(Role::kTool, content);
  out.tool_call_id = call_id;
  return out;
}
ChatMessage asking(ChatMessage out, ChatTask task) {
  out.task = task;
  return out;
}
ChatMessage calling(ChatMessage out, std::vector<ToolCall> calls) {
  out.tool_calls = std::move(calls);
  return out;
}

constexpr ChatOptions kChat{};
constexpr ChatOptions kThinking{.thinking = true};
constexpr ChatOptions kKeepThinking{.thinking = true, .drop_thinking = false};

std::string render(const std::vector<ChatMessage>& messages, const ChatOptions& options = kChat) {
  return render_chat(messages, options);
}

void expect_error(ErrorCode code, const std::string& part, const std::vector<ChatMessage>& messages,
                  const ChatOptions& options = kChat) {
  try {
    render(messages, options);
    ADD_FAILURE() << "no error; expected one with: " << part;
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), code) << error.what();
    EXPECT_NE(std::string(error.what()).find(part), std::string::npos) << error.what();
  }
}

TEST(Chat, PlainPrompts) {
  const std::vector<ChatMessage> messages = {message(Role::kSystem, "S"), user("Q")};
  EXPECT_EQ(render(messages), kBegin + "S" + kU + "Q" + kA + "</think>");
  EXPECT_EQ(render(messages, kThinking), kBegin + "S" + kU + "Q" + kA + "<think>");
  ChatOptions high = kThinking;
  high.effort = ReasoningEffort::kHigh;
  EXPECT_EQ(render(messages, high), render(messages, kThinking));
  EXPECT_EQ(render({message(Role::kDeveloper, "D")}), kBegin + kU + "D" + kA + "</think>");
}

TEST(Chat, SeveralTurnsWithoutThinking) {
  EXPECT_EQ(render({user("Q1"), assistant("A1", "ignored"), user("Q2")}),
            kBegin + kU + "Q1" + kA + "</think>A1" + kEnd + kU + "Q2" + kA + "</think>");
}

TEST(Chat, OldReasoningIsDropped) {
  const std::vector<ChatMessage> messages = {user("Q1"), assistant("A1", "R1"), user("Q2")};
  EXPECT_EQ(render(messages, kThinking),
            kBegin + kU + "Q1" + kA + "</think>A1" + kEnd + kU + "Q2" + kA + "<think>");
  EXPECT_EQ(render(messages, kKeepThinking),
            kBegin + kU + "Q1" + kA + "<think>R1</think>A1" + kEnd + kU + "Q2" + kA + "<think>");
}

TEST(Chat, ReasoningAfterTheLastQuestionStays) {
  EXPECT_EQ(
      render({user("Q1"), assistant("A1", "R1"), user("Q2"), assistant("A2", "R2")}, kThinking),
      kBegin + kU + "Q1" + kA + "</think>A1" + kEnd + kU + "Q2" + kA + "<think>R2</think>A2" +
          kEnd);
  // Without a question, all is after it.
  EXPECT_EQ(render({assistant("A", "R")}, kThinking), kBegin + "R</think>A" + kEnd);
  EXPECT_EQ(render({assistant("A", "R")}), kBegin + "A" + kEnd);
}

TEST(Chat, OldDeveloperMessagesAreRemovedWithTheReasoning) {
  const std::vector<ChatMessage> messages = {message(Role::kDeveloper, "D1"), assistant("A1", "R1"),
                                             message(Role::kDeveloper, "D2")};
  EXPECT_EQ(render(messages, kThinking), kBegin + "A1" + kEnd + kU + "D2" + kA + "<think>");
  EXPECT_EQ(render(messages, kKeepThinking),
            kBegin + kU + "D1" + kA + "<think>R1</think>A1" + kEnd + kU + "D2" + kA + "<think>");
  EXPECT_EQ(render(messages),
            kBegin + kU + "D1" + kA + "</think>A1" + kEnd + kU + "D2" + kA + "</think>");
}

TEST(Chat, AnUnfinishedAnswerHasNoEnd) {
  ChatMessage begin = assistant("Once upon");
  begin.without_end = true;
  EXPECT_EQ(render({user("Q"), begin}), kBegin + kU + "Q" + kA + "</think>Once upon");
}

TEST(Chat, NeighbouringUserAndToolMessagesMerge) {
  EXPECT_EQ(render({user("Q1"), user("Q2"), tool("T"), user("Q3")}),
            kBegin + kU + "Q1\n\nQ2\n\n<tool_result>T</tool_result>\n\nQ3" + kA + "</think>");
  EXPECT_EQ(render({user("Q"), message(Role::kDeveloper, "D"), user("Q2")}),
            kBegin + kU + "Q" + kU + "D" + kU + "Q2" + kA + "</think>");
}

TEST(Chat, MessagesDoNotMergeAcrossATask) {
  EXPECT_EQ(render({user("Q1"), asking(user("Q2"), ChatTask::kTitle), user("Q3")}),
            kBegin + kU + "Q1\n\nQ2" + kU + "Q3" + kA + "</think>");
}

TEST(Chat, Tasks) {
  struct Case {
    ChatTask task;
    std::string name;
  };
  for (const Case& one : {Case{ChatTask::kQuery, "query"}, Case{ChatTask::kAuthority, "authority"},
                          Case{ChatTask::kDomain, "domain"}, Case{ChatTask::kTitle, "title"},
                          Case{ChatTask::kReadUrl, "read_url"}}) {
    const std::string prompt = kBegin + kU + "Q<\uff5c" + one.name + "\uff5c>";
    EXPECT_EQ(render({asking(user("Q"), one.task)}), prompt);
    EXPECT_EQ(render({asking(user("Q"), one.task)}, kThinking), prompt);
    EXPECT_EQ(parse_chat_task(one.name), one.task);
  }
  EXPECT_EQ(parse_chat_task("action"), ChatTask::kAction);
  EXPECT_EQ(render({asking(user("Q"), ChatTask::kAction)}),
            kBegin + kU + "Q" + kA + "</think><\uff5caction\uff5c>");
  EXPECT_EQ(render({asking(user("Q"), ChatTask::kAction)}, kThinking),
            kBegin + kU + "Q" + kA + "<think><\uff5caction\uff5c>");
}

TEST(Chat, TheAnswerToATaskHasNoReasoning) {
  EXPECT_EQ(render({asking(user("Q"), ChatTask::kTitle), assistant("A", "R")}, kThinking),
            kBegin + kU + "Q<\uff5ctitle\uff5c>A" + kEnd);
}

TEST(Chat, RemindersFollowTheTransition) {
  EXPECT_EQ(render({user("Q"), message(Role::kLatestReminder, "M")}),
            kBegin + kU + "Q" + kA + "</think>" + kReminder + "M");
}

TEST(Chat, ToolCalls) {
  const std::vector<ChatMessage> messages = {
      user("Q"),
      calling(assistant("Look."),
              {{"1", "find",
                "{\"text\": \"a \\\"b\\\"\\n\u4e2d\", \"n\": 3, \"deep\":{\"z\":[1,2.5,null],"
                "\"a\":\"\u4e2d\\t\"},\"on\":true}"},
               {"2", "now", "{}"}})};
  const std::string end_parameter = "</" + kMarkup + "parameter>\n";
  const std::string calls =
      "\n\n<" + kMarkup + "tool_calls>\n" +        //
      "<" + kMarkup + "invoke name=\"find\">\n" +  //
      "<" + kMarkup + "parameter name=\"text\" string=\"true\">a \"b\"\n\u4e2d" + end_parameter +
      "<" + kMarkup + "parameter name=\"n\" string=\"false\">3" + end_parameter +  //
      "<" + kMarkup + "parameter name=\"deep\" string=\"false\">" +
      "{\"z\": [1, 2.5, null], \"a\": \"\u4e2d\\t\"}" + end_parameter + "<" + kMarkup +
      "parameter name=\"on\" string=\"false\">true" + end_parameter +         //
      "</" + kMarkup + "invoke>\n" +                                          //
      "<" + kMarkup + "invoke name=\"now\">\n\n</" + kMarkup + "invoke>\n" +  //
      "</" + kMarkup + "tool_calls>";
  EXPECT_EQ(render(messages), kBegin + kU + "Q" + kA + "</think>Look." + calls + kEnd);
}

TEST(Chat, ResultsAreOrderedByTheirCalls) {
  const ChatMessage calls =
      calling(assistant(""), {{"a", "f", "{}"}, {"b", "f", "{}"}, {"c", "f", "{}"}});
  const std::string prompt =
      render({user("Q"), calls, tool("3", "c"), user("and"), tool("1", "a"), tool("2", "b")});
  EXPECT_NE(prompt.find(kU +
                        "<tool_result>1</tool_result>\n\nand\n\n<tool_result>2</tool_result>"
                        "\n\n<tool_result>3</tool_result>" +
                        kA),
            std::string::npos)
      << prompt;
  const std::string anonymous = render({user("Q"), calls, tool("2"), tool("1")});
  EXPECT_NE(anonymous.find("<tool_result>2</tool_result>\n\n<tool_result>1"), std::string::npos);
  expect_error(ErrorCode::kInvalidArgument, "message 3: tool_call_id \"x\" is not one of the 3",
               {user("Q"), calls, tool("1", "a"), tool("2", "x")});
}

TEST(Chat, RefusesWhatItHasNoWordsFor) {
  ChatMessage with_tools = message(Role::kSystem, "S");
  with_tools.tools = "[]";
  expect_error(ErrorCode::kUnsupported, "message 0: tools", {with_tools, user("Q")});
  ChatMessage with_format = message(Role::kDeveloper, "D");
  with_format.response_format = "{}";
  expect_error(ErrorCode::kUnsupported, "message 1: response_format", {user("Q"), with_format});
  ChatOptions most = kThinking;
  most.effort = ReasoningEffort::kMax;
  expect_error(ErrorCode::kUnsupported, "max", {user("Q")}, most);
  most.thinking = false;  // the prefix belongs to thinking mode
  EXPECT_EQ(render({user("Q")}, most), render({user("Q")}));
}

TEST(Chat, RefusesMessagesThatContradictThemselves) {
  expect_error(ErrorCode::kInvalidArgument, "no messages", {});
  ChatMessage thinking_user = user("Q");
  thinking_user.reasoning = "R";
  expect_error(ErrorCode::kInvalidArgument, "message 0: role user has no reasoning",
               {thinking_user});
  expect_error(ErrorCode::kInvalidArgument, "role user has no tool_calls",
               {calling(user("Q"), {{"", "f", "{}"}})});
  expect_error(ErrorCode::kInvalidArgument, "message 1: role assistant has no task",
               {user("Q"), asking(assistant("A"), ChatTask::kTitle)});
  ChatMessage endless = user("Q");
  endless.without_end = true;
  expect_error(ErrorCode::kInvalidArgument, "role user has no without_end", {endless});
  ChatMessage answering = user("Q");
  answering.tool_call_id = "a";
  expect_error(ErrorCode::kInvalidArgument, "role user has no tool_call_id", {answering});
  for (const std::string arguments : {"", "[1]", "{\"a\":", "{\"a\":1,\"a\":2}"}) {
    expect_error(ErrorCode::kInvalidArgument, "message 0: call of f",
                 {calling(assistant("A"), {{"", "f", arguments}})});
  }
  expect_error(ErrorCode::kInvalidArgument, "nested deeper",
               {calling(assistant("A"), {{"", "f", "{\"a\":" + std::string(100000, '[')}})});
}

TEST(Chat, NamesOfRolesAndTasks) {
  for (const Role role : {Role::kSystem, Role::kUser, Role::kDeveloper, Role::kAssistant,
                          Role::kTool, Role::kLatestReminder}) {
    EXPECT_EQ(parse_role(role_name(role)), role);
  }
  EXPECT_THROW(parse_role("User"), Error);
  EXPECT_THROW(parse_chat_task(""), Error);
}

TEST(Chat, PromptsBecomeSpecialTokens) {
  const auto tokenizer = Tokenizer::load(std::string(DSV4_SOURCE_DIR) + "/models/tiny-shakespeare");
  const std::vector<ChatMessage> messages = {user("hi")};
  EXPECT_EQ(encode_chat(*tokenizer, messages, kChat), (std::vector<int32_t>{0, 3, 386, 4, 6}));
  EXPECT_EQ(encode_chat(*tokenizer, messages, kThinking), (std::vector<int32_t>{0, 3, 386, 4, 5}));
  const std::vector<ChatMessage> title = {asking(user("hi"), ChatTask::kTitle)};
  try {
    encode_chat(*tokenizer, title, kChat);
    ADD_FAILURE() << "this tokenizer has no task tokens";
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ErrorCode::kUnsupported);
    EXPECT_NE(std::string(error.what()).find("title"), std::string::npos) << error.what();
  }
}

TEST(Chat, CompletionsSplitWhereReasoningEnds) {
  Completion done = split_completion("why</think>because</think>", kThinking);
  EXPECT_EQ(done.reasoning, "why");
  EXPECT_EQ(done.content, "because</think>");
  EXPECT_TRUE(done.reasoning_ended);
  Completion cut = split_completion("still thinking", kThinking);
  EXPECT_EQ(cut.reasoning, "still thinking");
  EXPECT_EQ(cut.content, "");
  EXPECT_FALSE(cut.reasoning_ended);
  Completion chat = split_completion("text", kChat);
  EXPECT_EQ(chat.content, "text");
  EXPECT_EQ(chat.reasoning, "");
}

}  // namespace
}  // namespace dsv4
