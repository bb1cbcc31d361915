// A token's bits depend on its own sequence only: not on chunks, batch, blocks, block sizes,
// threads or kernels. Everything here compares with memcmp, never with a tolerance.
#include <gtest/gtest.h>

#include <cstdlib>
#include <cstring>
#include <map>

#include "attention/selection.h"
#include "backends/cpu/candidates.h"
#include "core/fail.h"
#include "dsv4/backend.h"
#include "dsv4/engine.h"

namespace dsv4 {
namespace {

std::string model_path() {
  return std::string(DSV4_SOURCE_DIR) + "/models/tiny-shakespeare";
}

// Ids of no particular text: every value of the small vocabulary may occur, repeats included.
std::vector<int32_t> some_ids(int64_t length, uint32_t seed) {
  std::vector<int32_t> out{0};
  uint32_t state = seed * 2654435761u + 12345;
  while (static_cast<int64_t>(out.size()) < length) {
    state = state * 1664525u + 1013904223u;
    out.push_back(static_cast<int32_t>(7 + (state >> 8) % 4000));
  }
  return out;
}

const Numerics& serving_fp8_products() {
  static const Numerics numerics = [] {
    Numerics out = kServing;
    out.products = Products::kFp8;
    return out;
  }();
  return numerics;
}

// Backends of this build on the first device of their platform.
std::vector<const AttentionDescriptor*> built_backends() {
  std::vector<const AttentionDescriptor*> out;
  for (const BackendEntry& entry : backends()) {
    if (entry.create != nullptr) out.push_back(entry.descriptor);
  }
  return out;
}

// Tests of one backend.
template <typename Base>
class OnBackend : public Base {
 protected:
  void use(const AttentionDescriptor* descriptor) {
    backend_ = descriptor;
    for (const BackendEntry& entry : backends()) {
      if (entry.descriptor != descriptor) continue;
      if (const std::string reason = entry.why_not_here(); !reason.empty()) {
        GTEST_SKIP() << descriptor->name << ": " << reason;
      }
    }
  }
  EngineOptions default_options(int64_t length, const Numerics& numerics = kServing) const;
  /// Those of serving, reference, exact and serving with FP8 products that the backend takes.
  std::vector<const Numerics*> numerics() const {
    std::vector<const Numerics*> out;
    const SelectionTarget target = target_of({backend_->platform, 0});
    for (const Numerics* numerics : {&kServing, &kReference, &kExact, &serving_fp8_products()}) {
      Numerics native = *numerics;
      if (native.activation == DType::kBf16) native.kv = backend_->native_format;
      if (unsupported(native, *backend_).empty() &&
          device_reasons(*backend_, target, native.products).empty()) {
        out.push_back(numerics);
      }
    }
    return out;
  }
  const AttentionDescriptor* backend_ = nullptr;
};

template <typename Base>
EngineOptions OnBackend<Base>::default_options(int64_t length, const Numerics& numerics) const {
  EngineOptions options;
  options.numerics = numerics;
  options.device = DeviceId{backend_->platform, 0}.str();
  options.attention_backend = backend_->name;
  options.threads = 2;
  options.limits = {1000, 4, length};
  options.max_logits = 1000;
  options.total_tokens = 4 * (length + 512);
  return options;
}

using Rows = std::vector<float>;  // [tokens, vocab]

// Logits of all positions when the prompt is fed in chunks; chunks[i % size] tokens at a time.
Rows run(Engine& engine, const std::vector<int32_t>& ids, const std::vector<int>& chunks) {
  const SequenceId sequence = engine.create_sequence();
  Rows out;
  size_t done = 0;
  for (size_t i = 0; done < ids.size(); ++i) {
    const size_t count =
        std::min(ids.size() - done, static_cast<size_t>(chunks[i % chunks.size()]));
    const Feed feed{sequence, {ids.data() + done, count}, static_cast<int32_t>(count)};
    const ConstTensor logits = engine.step({&feed, 1});
    out.insert(out.end(), logits.as<float>(), logits.as<float>() + logits.num_elements());
    done += count;
  }
  engine.release_sequence(sequence);
  return out;
}

void expect_same_bits(const Rows& given, const Rows& expected, const std::string& what) {
  ASSERT_EQ(given.size(), expected.size()) << what;
  if (std::memcmp(given.data(), expected.data(), given.size() * sizeof(float)) == 0) return;
  const size_t vocab = 4096;
  for (size_t i = 0; i < given.size(); ++i) {
    if (std::memcmp(&given[i], &expected[i], sizeof(float)) == 0) continue;
    FAIL() << what << ": first difference at position " << i / vocab << ", token " << i % vocab
           << ": " << given[i] << " and " << expected[i];
  }
}

// Sets DSV4_KERNEL for as long as it lives.
class ForcedKernel {
 public:
  explicit ForcedKernel(const std::string& value) { setenv("DSV4_KERNEL", value.c_str(), 1); }
  ~ForcedKernel() { unsetenv("DSV4_KERNEL"); }
};

class Lengths
    : public OnBackend<testing::TestWithParam<std::tuple<const AttentionDescriptor*, int>>> {
 protected:
  void SetUp() override { use(std::get<0>(GetParam())); }
};
class Invariance : public OnBackend<testing::TestWithParam<const AttentionDescriptor*>> {
 protected:
  void SetUp() override { use(GetParam()); }
};

// Every length modulo 4 and around the 128 boundaries: in one piece, in chunks, token by token.
TEST_P(Lengths, ChunksDoNotMatter) {
  const int length = std::get<1>(GetParam());
  const auto engine = Engine::load(ModelSource::parse(model_path()), default_options(length));
  const std::vector<int32_t> ids = some_ids(length, 1);
  const Rows whole = run(*engine, ids, {1000});
  for (int chunk : {1, 3, 64, 127, 128, 129, 256}) {
    if (chunk > length && chunk != 1) continue;
    expect_same_bits(run(*engine, ids, {chunk}), whole, "chunks of " + std::to_string(chunk));
  }
  expect_same_bits(run(*engine, ids, {5, 1, 130, 2}), whole, "uneven chunks");
}
INSTANTIATE_TEST_SUITE_P(All, Lengths,
                         testing::Combine(testing::ValuesIn(built_backends()),
                                          testing::Values(1, 2, 3, 4, 5, 8, 63, 64, 65, 126, 127,
                                                          128, 129, 130, 131, 255, 256, 257, 258,
                                                          259, 260, 261, 383, 384, 385)),
                         [](const auto& info) {
                           return concat(std::get<0>(info.param)->class_name, "_",
                                         std::get<1>(info.param));
                         });

// Long enough that the indexer selects (from position 259 on) and that windows move over several
// blocks.
TEST_P(Invariance, LongPromptInChunks) {
  for (const Numerics* numerics : this->numerics()) {
    const int length = 1100;
    const auto engine =
        Engine::load(ModelSource::parse(model_path()), default_options(length, *numerics));
    const std::vector<int32_t> ids = some_ids(length, 2);
    const Rows whole = run(*engine, ids, {1000});
    for (int chunk : {64, 127, 129, 256, 999}) {
      expect_same_bits(run(*engine, ids, {chunk}), whole,
                       concat(numerics->str(), ", chunks of ", chunk));
    }
    if (numerics == &kServing) {
      expect_same_bits(run(*engine, ids, {1}), whole, "token by token");
      expect_same_bits(run(*engine, ids, {3}), whole, "chunks of 3");
    }
  }
}

TEST_P(Invariance, OtherSequencesInTheBatchDoNotMatter) {
  const std::vector<std::vector<int32_t>> prompts{some_ids(300, 3), some_ids(129, 4),
                                                  some_ids(7, 5), some_ids(270, 6)};
  const auto engine = Engine::load(ModelSource::parse(model_path()), default_options(400));
  std::vector<Rows> alone;
  for (const auto& prompt : prompts) alone.push_back(run(*engine, prompt, {1000}));
  const std::vector<std::vector<size_t>> orders{{0, 1, 2, 3}, {3, 1, 0, 2}, {2, 3, 1, 0}};
  for (const auto& order : orders) {
    for (const std::vector<int>& chunks :
         {std::vector<int>{100, 40, 1, 128}, std::vector<int>{250, 1, 3, 90}}) {
      std::map<size_t, SequenceId> sequences;
      std::map<size_t, Rows> rows;
      std::map<size_t, size_t> done;
      for (size_t i : order) sequences[i] = engine->create_sequence();
      while (true) {
        std::vector<Feed> feeds;
        std::vector<size_t> fed;
        for (size_t i : order) {
          const size_t count =
              std::min(prompts[i].size() - done[i], static_cast<size_t>(chunks[i]));
          if (count == 0) continue;
          feeds.push_back(
              {sequences[i], {prompts[i].data() + done[i], count}, static_cast<int32_t>(count)});
          fed.push_back(i);
        }
        if (feeds.empty()) break;
        const ConstTensor logits = engine->step(feeds);
        const float* at = logits.as<float>();
        for (size_t f = 0; f < feeds.size(); ++f) {
          const auto elems =
              static_cast<int64_t>(feeds[f].tokens.size()) * engine->config().vocab_size;
          rows[fed[f]].insert(rows[fed[f]].end(), at, at + elems);
          at += elems;
          done[fed[f]] += feeds[f].tokens.size();
        }
      }
      for (size_t i : order) {
        expect_same_bits(rows[i], alone[i], "sequence " + std::to_string(i));
        engine->release_sequence(sequences[i]);
      }
    }
  }
}

TEST_P(Invariance, BlocksDoNotMatter) {
  const std::vector<int32_t> ids = some_ids(420, 7);
  Rows expected;
  struct Case {
    const char* what;
    int window_block, growing_block;
    uint64_t shuffle;
  };
  for (const Case& one :
       {Case{"64 and 256", 64, 256, 0}, Case{"renamed blocks", 64, 256, 99},
        Case{"61 and 128, renamed", 61, 128, 5}, Case{"256 and 512", 256, 512, 0}}) {
    EngineOptions options = default_options(420);
    options.window_block_tokens = one.window_block;
    options.growing_block_tokens = one.growing_block;
    options.block_shuffle_seed = one.shuffle;
    const auto engine = Engine::load(ModelSource::parse(model_path()), options);
    // Other sequences take and free blocks first, so that ours are scattered.
    const SequenceId other = engine->create_sequence();
    const std::vector<int32_t> noise = some_ids(200, 8);
    const Feed feed{other, noise, 1};
    engine->step({&feed, 1});
    const Rows rows = run(*engine, ids, {100, 37});
    if (expected.empty()) expected = rows;
    expect_same_bits(rows, expected, one.what);
    engine->release_sequence(other);
    expect_same_bits(run(*engine, ids, {100, 37}), expected, one.what);
  }
}

TEST_P(Invariance, ThreadsDoNotMatter) {
  if (backend_->platform != Platform::kCpu) GTEST_SKIP() << "a property of the CPU's kernels";
  const std::vector<int32_t> ids = some_ids(330, 9);
  for (const Numerics* numerics : {&kServing, &kReference, &kExact}) {
    Rows expected;
    for (int threads : {1, 2, 3}) {
      EngineOptions options = default_options(330, *numerics);
      options.threads = threads;
      const auto engine = Engine::load(ModelSource::parse(model_path()), options);
      const Rows rows = run(*engine, ids, {100, 1});
      if (expected.empty()) expected = rows;
      expect_same_bits(rows, expected, concat(numerics->name, ", ", threads, " threads"));
    }
  }
}

// Every candidate kernel, forced in turn, gives the bits of the best one.
TEST_P(Invariance, KernelsDoNotMatter) {
  if (backend_->platform != Platform::kCpu) GTEST_SKIP() << "a property of the CPU's kernels";
  const std::vector<int32_t> ids = some_ids(276, 10);  // the indexer selects from position 259 on
  for (const Numerics* numerics : {&kServing, &kReference, &kExact}) {
    Rows expected;
    {
      const auto engine =
          Engine::load(ModelSource::parse(model_path()), default_options(276, *numerics));
      expected = run(*engine, ids, {270, 1});
    }
    for (const cpu::Candidate& candidate : cpu::candidates()) {
      if (!candidate.why_not().empty()) continue;
      const std::string forced = concat(candidate.family, ":", candidate.name);
      const ForcedKernel guard(forced);
      const auto engine =
          Engine::load(ModelSource::parse(model_path()), default_options(276, *numerics));
      EXPECT_NE(engine->description().find(forced), std::string::npos);
      expect_same_bits(run(*engine, ids, {270, 1}), expected, concat(numerics->name, ", ", forced));
    }
  }
}

// A prefix shared by fork gives the bits of a sequence that computed it.
TEST_P(Invariance, ForkedPrefixGivesTheSameBits) {
  for (int64_t prefix : {4, 130, 256, 301}) {
    const std::vector<int32_t> ids = some_ids(prefix + 60, 11);
    const auto engine = Engine::load(ModelSource::parse(model_path()), default_options(400));
    const Rows whole = run(*engine, ids, {1000});
    const SequenceId first = engine->create_sequence();
    const Feed head{first, {ids.data(), static_cast<size_t>(prefix)}, 0};
    engine->step({&head, 1});
    const std::optional<SequenceId> fork = engine->pool().fork(first, prefix);
    ASSERT_TRUE(fork.has_value());
    // The original goes another way; the fork must not notice.
    const std::vector<int32_t> detour = some_ids(50, 12);
    const Feed other{first, detour, 0};
    engine->step({&other, 1});
    const Feed tail{*fork, {ids.data() + prefix, ids.size() - static_cast<size_t>(prefix)}, 60};
    const ConstTensor logits = engine->step({&tail, 1});
    const Rows given(logits.as<float>(), logits.as<float>() + logits.num_elements());
    expect_same_bits(given, Rows(whole.end() - static_cast<int64_t>(given.size()), whole.end()),
                     "fork at " + std::to_string(prefix));
  }
}

INSTANTIATE_TEST_SUITE_P(All, Invariance, testing::ValuesIn(built_backends()),
                         [](const auto& info) { return std::string(info.param->class_name); });

}  // namespace
}  // namespace dsv4
