// Reading a prompt and drawing tokens, one sequence.
#include <chrono>

#include "core/fail.h"
#include "dsv4/engine.h"
#include "engine/sampler.h"

namespace dsv4 {
namespace {

double seconds_since(std::chrono::steady_clock::time_point begin) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

// Gives the sequence back however generation ends.
class OwnedSequence {
 public:
  explicit OwnedSequence(Engine& engine) : engine_(engine), id_(engine.create_sequence()) {}
  ~OwnedSequence() { engine_.release_sequence(id_); }
  OwnedSequence(const OwnedSequence&) = delete;
  OwnedSequence& operator=(const OwnedSequence&) = delete;
  SequenceId id() const { return id_; }

 private:
  Engine& engine_;
  SequenceId id_;
};

}  // namespace

GenerateResult generate(Engine& engine, std::span<const int32_t> prompt,
                        const GenerateOptions& options,
                        const std::function<bool(int32_t)>& on_token, const Progress& progress) {
  if (prompt.empty()) fail(ErrorCode::kInvalidArgument, "the prompt has no tokens");
  if (options.max_new_tokens < 0) {
    fail(ErrorCode::kInvalidArgument, options.max_new_tokens, " new tokens, expected 0 or more");
  }
  const StepLimits& limits = engine.options().limits;
  const int64_t context = static_cast<int64_t>(prompt.size()) + options.max_new_tokens;
  if (context > limits.max_context) {
    fail(ErrorCode::kInvalidArgument, prompt.size(), " prompt tokens and ", options.max_new_tokens,
         " new ones make ", context, ", the engine was loaded for ", limits.max_context);
  }
  if (options.chunk < 0 || options.chunk > limits.max_tokens) {
    fail(ErrorCode::kInvalidArgument, "prompt chunks of ", options.chunk, " tokens, expected 0 to ",
         limits.max_tokens);
  }
  const Sampler sampler(options.sampling);  // validates

  GenerateResult result;
  OwnedSequence sequence(engine);
  auto begin = std::chrono::steady_clock::now();
  const size_t chunk = static_cast<size_t>(options.chunk == 0 ? limits.max_tokens : options.chunk);
  ConstTensor logits;
  for (size_t done = 0; done < prompt.size();) {
    const size_t count = std::min(chunk, prompt.size() - done);
    const bool last = done + count == prompt.size();
    const Feed feed{sequence.id(), prompt.subspan(done, count), last ? 1 : 0};
    logits = engine.step({&feed, 1});
    done += count;
    if (progress)
      progress(static_cast<double>(done) / static_cast<double>(prompt.size()), "prompt");
  }
  result.prompt_seconds = seconds_since(begin);

  begin = std::chrono::steady_clock::now();
  const auto vocab_size = static_cast<size_t>(engine.config().vocab_size);
  for (int i = 0; i < options.max_new_tokens; ++i) {
    const int64_t position = static_cast<int64_t>(prompt.size()) + i;
    const int32_t token = sampler.draw({logits.as<float>(), vocab_size}, 0, position);
    if (options.stop_at_eos && token == engine.config().eos_token_id) {
      result.stopped_at_eos = true;
      break;
    }
    result.tokens.push_back(token);
    if (on_token && !on_token(token)) break;
    if (i + 1 == options.max_new_tokens) break;
    const Feed feed{sequence.id(), {&token, 1}, 1};
    logits = engine.step({&feed, 1});
  }
  result.generate_seconds = seconds_since(begin);
  return result;
}

}  // namespace dsv4
