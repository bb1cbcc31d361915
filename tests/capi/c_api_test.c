/* The C interface, used from C: results, refusals with their messages, lifetimes, threads. */
#include "dsv4/c_api.h"

#include <math.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int num_checks = 0;
static int num_failures = 0;

#define CHECK(condition)                                                                       \
  do {                                                                                         \
    ++num_checks;                                                                              \
    if (!(condition)) {                                                                        \
      ++num_failures;                                                                          \
      fprintf(stderr, "%s:%d: failed: %s\n  last error: %s\n", __FILE__, __LINE__, #condition, \
              dsv4_last_error());                                                              \
    }                                                                                          \
  } while (0)

/* The call fails with this status and a message that contains `part`. */
#define CHECK_REFUSED(call, expected, part)                                                        \
  do {                                                                                             \
    ++num_checks;                                                                                  \
    const dsv4_status status_ = (call);                                                            \
    if (status_ != (expected) || strstr(dsv4_last_error(), (part)) == NULL) {                      \
      ++num_failures;                                                                              \
      fprintf(stderr, "%s:%d: %s\n  gave: %s: %s\n  expected: %s: ...%s...\n", __FILE__, __LINE__, \
              #call, dsv4_status_name(status_), dsv4_last_error(), dsv4_status_name(expected),     \
              (part));                                                                             \
    }                                                                                              \
  } while (0)

#define CHECK_OK(call) CHECK((call) == DSV4_OK)

static const char* const kModel = DSV4_SOURCE_DIR "/models/tiny-shakespeare";
static const char* const kConfig = DSV4_SOURCE_DIR "/models/tiny-shakespeare/config.json";
enum { kVocabSize = 4096, kHiddenSize = 256, kMaxTokens = 160, kMaxContext = 320 };

static dsv4_options small_options(void) {
  dsv4_options options;
  dsv4_options_init(&options);
  options.threads = 1;
  options.max_tokens = kMaxTokens;
  options.max_sequences = 2;
  options.max_logits = 3;
  options.max_context = kMaxContext;
  return options;
}

static void test_basics(void) {
  CHECK(strcmp(dsv4_version(), EXPECTED_VERSION) == 0);
  CHECK(strcmp(dsv4_last_error(), "") == 0);
  CHECK(strcmp(dsv4_status_name(DSV4_OK), "ok") == 0);
  CHECK(strcmp(dsv4_status_name(DSV4_DATA_CORRUPT), "data corrupt") == 0);
  CHECK(strcmp(dsv4_status_name((dsv4_status)99), "unknown status") == 0);
  dsv4_options_init(NULL);
  dsv4_sampling_init(NULL);
  dsv4_model_free(NULL);
  dsv4_session_free(NULL);
  dsv4_attention_free(NULL);
}

static void test_refused_loads(void) {
  dsv4_options options = small_options();
  dsv4_model* model = (dsv4_model*)&options; /* must be overwritten */
  CHECK_REFUSED(dsv4_model_load("no/such/folder", &options, &model), DSV4_NOT_FOUND,
                "no/such/folder");
  CHECK(model == NULL);
  CHECK_REFUSED(dsv4_model_load(NULL, &options, &model), DSV4_INVALID_ARGUMENT, "source is NULL");
  CHECK_REFUSED(dsv4_model_load(kModel, &options, NULL), DSV4_INVALID_ARGUMENT, "model is NULL");
  options.numerics = "sloppy";
  CHECK_REFUSED(dsv4_model_load(kModel, &options, &model), DSV4_INVALID_ARGUMENT, "sloppy");
  options = small_options();
  options.device = "abacus";
  CHECK_REFUSED(dsv4_model_load(kModel, &options, &model), DSV4_INVALID_ARGUMENT, "abacus");
  options = small_options();
  options.struct_size = 3;
  CHECK_REFUSED(dsv4_model_load(kModel, &options, &model), DSV4_INVALID_ARGUMENT,
                "struct_size is 3");
  options = small_options();
  options.products = "exact";
  CHECK_REFUSED(dsv4_model_load(kModel, &options, &model), DSV4_INVALID_ARGUMENT,
                "products \"exact\", expected f32 or fp8");
  options.products = "fp8";
  CHECK_REFUSED(dsv4_model_load(kModel, &options, &model), DSV4_UNSUPPORTED,
                "products of CPU_DSV4: fp8, required f32");
  /* A caller of the first version: what lies behind its struct is not read. */
  options.struct_size = offsetof(dsv4_options, products);
  CHECK_OK(dsv4_model_load(kModel, &options, &model));
  dsv4_model_free(model);
  options = small_options();
  options.max_tokens = 0;
  CHECK(dsv4_model_load(kModel, &options, &model) == DSV4_INVALID_ARGUMENT);
  CHECK(model == NULL);
}

static void test_tokens(const dsv4_model* model) {
  static const char kText[] = "Hello, world!";
  static const int32_t kIds[] = {46, 423, 85,
                                 18, 881, 7}; /* tests/golden/data/tokenizer_cases.json */
  int32_t ids[16];
  char text[32];
  size_t count = 0;
  CHECK_OK(dsv4_tokenize(model, kText, strlen(kText), NULL, 0, &count));
  CHECK(count == 6);
  CHECK_OK(dsv4_tokenize(model, kText, strlen(kText), ids, 16, &count));
  CHECK(count == 6 && memcmp(ids, kIds, sizeof kIds) == 0);
  count = 0;
  CHECK_REFUSED(dsv4_tokenize(model, kText, strlen(kText), ids, 5, &count), DSV4_INVALID_ARGUMENT,
                "room for 6 ids, the buffer has 5");
  CHECK(count == 6);
  CHECK_REFUSED(dsv4_tokenize(model, "a\xff", 2, ids, 16, &count), DSV4_INVALID_ARGUMENT,
                "invalid at byte 1");
  CHECK_REFUSED(dsv4_tokenize(NULL, kText, 1, ids, 16, &count), DSV4_INVALID_ARGUMENT,
                "model is NULL");
  CHECK_OK(dsv4_tokenize(model, NULL, 0, ids, 16, &count));
  CHECK(count == 0);

  CHECK_OK(dsv4_detokenize(model, kIds, 6, text, sizeof text, &count));
  CHECK(count == strlen(kText) && strcmp(text, kText) == 0);
  CHECK_REFUSED(dsv4_detokenize(model, kIds, 6, text, strlen(kText), &count), DSV4_INVALID_ARGUMENT,
                "room for 14 bytes");
  CHECK(count == strlen(kText));
  ids[0] = kVocabSize;
  CHECK_REFUSED(dsv4_detokenize(model, ids, 1, text, sizeof text, &count), DSV4_INVALID_ARGUMENT,
                "token id 4096");
}

static void make_prompt(int32_t* tokens, size_t count) {
  for (size_t i = 0; i < count; ++i) tokens[i] = (int32_t)(7 + (i * i * 31 + i) % 4000);
}

/* Two sequences of one model; the model is freed before them. */
static void test_model(void) {
  enum { kPrompt = 140 };
  const dsv4_options options = small_options();
  dsv4_model* model = NULL;
  dsv4_session *whole = NULL, *pieces = NULL, *third = NULL;
  dsv4_model_info info;
  int32_t prompt[kPrompt], bad = -1, token = -1;
  int64_t length = -1;
  float* logits = malloc(sizeof(float) * 3 * kVocabSize);
  float* other = malloc(sizeof(float) * 3 * kVocabSize);
  make_prompt(prompt, kPrompt);

  CHECK_OK(dsv4_model_load(kModel, &options, &model));
  if (model == NULL || logits == NULL || other == NULL) exit(1);
  CHECK_OK(dsv4_model_get_info(model, &info));
  CHECK(info.vocab_size == kVocabSize && info.hidden_size == kHiddenSize && info.num_layers == 4);
  CHECK(info.bos_token_id == 0 && info.eos_token_id == 1 && info.has_tokenizer == 1);
  CHECK(info.max_tokens == kMaxTokens && info.max_sequences == 2);
  CHECK(info.max_context == kMaxContext && info.memory_bytes > 1000000);
  test_tokens(model);

  CHECK_OK(dsv4_session_create(model, &whole));
  CHECK_OK(dsv4_session_create(model, &pieces));
  CHECK_REFUSED(dsv4_session_create(model, &third), DSV4_OUT_OF_MEMORY, "all 2 sequences");
  CHECK(third == NULL);
  dsv4_model_free(model);

  /* One step, or a part of it token by token: the same bits. */
  CHECK_OK(dsv4_generate_step(whole, prompt, kPrompt, 3, logits, 3 * kVocabSize));
  CHECK_OK(dsv4_generate_step(pieces, prompt, kPrompt - 3, 0, NULL, 0));
  for (size_t i = 0; i < 3; ++i) {
    CHECK_OK(dsv4_generate_step(pieces, prompt + kPrompt - 3 + i, 1, 1, other + i * kVocabSize,
                                kVocabSize));
  }
  CHECK(memcmp(logits, other, sizeof(float) * 3 * kVocabSize) == 0);
  for (size_t i = 0; i < 3 * kVocabSize; ++i) {
    if (!isfinite(logits[i])) {
      CHECK(!"a logit is not finite");
      break;
    }
  }

  /* Refused calls change nothing. */
  CHECK_REFUSED(dsv4_generate_step(whole, &bad, 1, 1, logits, kVocabSize), DSV4_INVALID_ARGUMENT,
                "token id -1");
  bad = kVocabSize;
  CHECK_REFUSED(dsv4_generate_step(whole, &bad, 1, 1, logits, kVocabSize), DSV4_INVALID_ARGUMENT,
                "token id 4096");
  CHECK_REFUSED(dsv4_generate_step(whole, prompt, 1, 1, logits, kVocabSize - 1),
                DSV4_INVALID_ARGUMENT, "room for 4096 floats");
  CHECK_REFUSED(dsv4_generate_step(whole, prompt, 1, 1, NULL, 0), DSV4_INVALID_ARGUMENT,
                "logits is NULL");
  CHECK_REFUSED(dsv4_generate_step(whole, prompt, 1, (size_t)1 << 40, logits, kVocabSize),
                DSV4_INVALID_ARGUMENT, "num_logits");
  CHECK(dsv4_generate_step(whole, prompt, 0, 0, NULL, 0) == DSV4_INVALID_ARGUMENT);
  CHECK_REFUSED(dsv4_generate_step(NULL, prompt, 1, 0, NULL, 0), DSV4_INVALID_ARGUMENT,
                "session is NULL");
  CHECK_OK(dsv4_session_length(whole, &length));
  CHECK(length == kPrompt);

  CHECK_OK(dsv4_sample(logits, kVocabSize, NULL, 0, kPrompt, &token));
  for (int32_t id = 0; id < kVocabSize; ++id) {
    if (logits[id] > logits[token] || (logits[id] == logits[token] && id < token)) {
      CHECK(!"the greedy token is not the first of the largest");
      break;
    }
  }
  dsv4_session_free(pieces);
  dsv4_session_free(whole);
  free(logits);
  free(other);
}

static void test_sampling(void) {
  static const float kLogits[] = {0.0f, 2.0f, 1.0f, 2.0f};
  dsv4_sampling sampling;
  int32_t token = -1, again = -1;
  dsv4_sampling_init(&sampling);
  CHECK_OK(dsv4_sample(kLogits, 4, &sampling, 0, 0, &token));
  CHECK(token == 1);
  sampling.temperature = 1.0;
  sampling.top_k = 2;
  sampling.seed = 5;
  for (int64_t position = 0; position < 20; ++position) {
    CHECK_OK(dsv4_sample(kLogits, 4, &sampling, 1, position, &token));
    CHECK_OK(dsv4_sample(kLogits, 4, &sampling, 1, position, &again));
    CHECK((token == 1 || token == 3) && token == again);
  }
  sampling.top_p = 0.0;
  CHECK_REFUSED(dsv4_sample(kLogits, 4, &sampling, 0, 0, &token), DSV4_INVALID_ARGUMENT, "top_p");
  CHECK_REFUSED(dsv4_sample(NULL, 4, NULL, 0, 0, &token), DSV4_INVALID_ARGUMENT, "logits is NULL");
  CHECK(dsv4_sample(kLogits, 0, NULL, 0, 0, &token) == DSV4_INVALID_ARGUMENT);
}

/* Five tokens in one step, and in two: the same bits; another sequence beside them. */
static void test_attention_layer(dsv4_attention* layer) {
  enum { kTokens = 5, kValues = kTokens * kHiddenSize };
  float hidden[2 * kValues], whole[kValues], pieces[kValues], both[2 * kValues];
  int64_t hidden_size = 0, sequences[2] = {-1, -1};
  int32_t counts[2] = {kTokens, kTokens};
  double sum = 0;
  for (size_t i = 0; i < 2 * kValues; ++i) hidden[i] = (float)((i * 37) % 101) / 64.0f - 0.75f;

  CHECK_OK(dsv4_attention_hidden_size(layer, &hidden_size));
  CHECK(hidden_size == kHiddenSize);
  CHECK_OK(dsv4_attention_add_sequence(layer, &sequences[0]));
  CHECK_OK(dsv4_attention_forward(layer, sequences, counts, 1, hidden, whole, kValues));
  for (size_t i = 0; i < kValues; ++i) sum += fabs((double)whole[i]);
  CHECK(isfinite(sum) && sum > 0);
  CHECK_OK(dsv4_attention_add_sequence(layer, &sequences[1]));
  CHECK_REFUSED(dsv4_attention_add_sequence(layer, &hidden_size), DSV4_OUT_OF_MEMORY, "all 2");
  counts[0] = 3;
  CHECK_OK(
      dsv4_attention_forward(layer, sequences + 1, counts, 1, hidden, pieces, 3 * kHiddenSize));
  counts[0] = 2;
  CHECK_OK(dsv4_attention_forward(layer, sequences + 1, counts, 1, hidden + 3 * kHiddenSize,
                                  pieces + 3 * kHiddenSize, 2 * kHiddenSize));
  CHECK(memcmp(whole, pieces, sizeof whole) == 0);

  CHECK_REFUSED(dsv4_attention_forward(layer, sequences, counts, 1, hidden, pieces, 7),
                DSV4_INVALID_ARGUMENT, "num_values is 7, expected 512");
  counts[0] = 0;
  CHECK_REFUSED(dsv4_attention_forward(layer, sequences, counts, 1, hidden, pieces, 0),
                DSV4_INVALID_ARGUMENT, "num_tokens[0] is 0");
  counts[0] = kMaxContext;
  CHECK_REFUSED(dsv4_attention_forward(layer, sequences, counts, 1, hidden, pieces, 0),
                DSV4_INVALID_ARGUMENT, "num_tokens[0] is 320");
  CHECK_REFUSED(dsv4_attention_forward(layer, sequences, counts, 3, hidden, pieces, 0),
                DSV4_INVALID_ARGUMENT, "num_sequences is 3");
  CHECK_REFUSED(dsv4_attention_forward(layer, sequences, counts, 1, NULL, pieces, 0),
                DSV4_INVALID_ARGUMENT, "hidden is NULL");

  CHECK_OK(dsv4_attention_remove_sequence(layer, sequences[0]));
  CHECK(dsv4_attention_remove_sequence(layer, sequences[0]) == DSV4_INVALID_ARGUMENT);
  counts[0] = 1;
  CHECK(dsv4_attention_forward(layer, sequences, counts, 1, hidden, pieces, kHiddenSize) ==
        DSV4_INVALID_ARGUMENT);
  CHECK_OK(dsv4_attention_remove_sequence(layer, sequences[1]));

  CHECK_OK(dsv4_attention_add_sequence(layer, &sequences[0]));
  CHECK_OK(dsv4_attention_add_sequence(layer, &sequences[1]));
  counts[0] = kTokens;
  memcpy(hidden + kValues, hidden, sizeof(float) * kValues);
  CHECK_OK(dsv4_attention_forward(layer, sequences, counts, 2, hidden, both, 2 * kValues));
  CHECK(memcmp(both, whole, sizeof whole) == 0);
  CHECK(memcmp(both + kValues, whole, sizeof whole) == 0);
  sequences[1] = sequences[0];
  CHECK_REFUSED(dsv4_attention_forward(layer, sequences, counts, 2, hidden, both, 2 * kValues),
                DSV4_INVALID_ARGUMENT, "occurs twice");
}

static void test_attention(void) {
  static const char* const kKinds[] = {"sliding", "csa", "hca"};
  const dsv4_options options = small_options();
  dsv4_attention* layer = NULL;
  for (size_t i = 0; i < 3; ++i) {
    CHECK_OK(dsv4_attention_create(kConfig, kKinds[i], 7, &options, &layer));
    if (layer != NULL) test_attention_layer(layer);
    dsv4_attention_free(layer);
  }
  CHECK_OK(dsv4_attention_load(kModel, 1, &options, &layer));
  if (layer != NULL) test_attention_layer(layer);
  dsv4_attention_free(layer);
  CHECK_REFUSED(dsv4_attention_load(kModel, 4, &options, &layer), DSV4_INVALID_ARGUMENT,
                "layer_idx is 4, expected 0 to 3");
  CHECK(layer == NULL);
  CHECK_REFUSED(dsv4_attention_create(kConfig, "full", 7, &options, &layer), DSV4_INVALID_ARGUMENT,
                "full");
  CHECK_REFUSED(dsv4_attention_create("no/config.json", "csa", 7, &options, &layer), DSV4_NOT_FOUND,
                "no/config.json");
}

static void* fail_on_another_thread(void* result) {
  int64_t length;
  *(int*)result = strcmp(dsv4_last_error(), "") == 0;
  dsv4_session_length(NULL, &length);
  *(int*)result &= strstr(dsv4_last_error(), "session is NULL") != NULL;
  return NULL;
}

static void test_threads(void) {
  pthread_t thread;
  int right = 0;
  CHECK_REFUSED(dsv4_model_get_info(NULL, NULL), DSV4_INVALID_ARGUMENT, "model is NULL");
  CHECK(pthread_create(&thread, NULL, fail_on_another_thread, &right) == 0);
  pthread_join(thread, NULL);
  CHECK(right);
  CHECK(strstr(dsv4_last_error(), "model is NULL") != NULL);
}

int main(void) {
  test_basics();
  test_refused_loads();
  test_sampling();
  test_threads();
  test_attention();
  test_model();
  printf("%d checks, %d failed\n", num_checks, num_failures);
  return num_failures > 0 ? 1 : 0;
}
