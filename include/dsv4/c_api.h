/* The C interface of dsv4: for programs in other languages. Plain C99, no exceptions, no C++ types.
 *
 * Status    Functions that can fail return a dsv4_status. Then dsv4_last_error() says what was
 *           wrong, expected and given; results are left unwritten unless said otherwise.
 * Handles   Made by a *_load or *_create function, given back by *_free, which accepts NULL. A
 *           session keeps what it needs of its model alive: handles may be freed in any order.
 * Threads   Any thread may call anything. Calls on one model and its sessions, or on one attention
 *           layer, wait for each other; a handle must not be used during or after its free.
 * Strings   UTF-8 and zero-terminated, unless a length is passed.
 * Options   Fill structs with their *_init function, then change fields: later versions add fields
 *           at the end, and struct_size tells which ones the caller knows. */
#ifndef DSV4_C_API_H_
#define DSV4_C_API_H_

#include <stddef.h>
#include <stdint.h>

/* NOLINTBEGIN(readability-identifier-naming): C names */
#ifdef __cplusplus
extern "C" {
#endif

/* Values are stable; dsv4/error.h says what to do about each. */
typedef enum dsv4_status {
  DSV4_OK = 0,
  DSV4_INVALID_ARGUMENT = 1, /* correct the call */
  DSV4_NOT_FOUND = 2,        /* provide the file, tensor or device */
  DSV4_UNSUPPORTED = 3,   /* valid, but nothing here can do it: every unmet condition is listed */
  DSV4_OUT_OF_MEMORY = 4, /* release some, or ask for less */
  DSV4_DEVICE_ERROR = 5,  /* the device or its driver failed */
  DSV4_DATA_CORRUPT = 6,  /* get a good copy of the file */
  DSV4_INTERNAL = 7       /* a fault of dsv4: report it */
} dsv4_status;

/* "major.minor.patch" of the library. */
const char* dsv4_version(void);
/* "ok", "invalid argument", ...; "unknown status" for other values. */
const char* dsv4_status_name(dsv4_status status);
/* Message of the last call that failed on this thread, "" before the first. Successful calls do not
 * change it. Valid until the next failing call on this thread. */
const char* dsv4_last_error(void);

/* ---- Models ---- */

typedef struct dsv4_options {
  size_t struct_size;            /* set by dsv4_options_init */
  const char* device;            /* "cpu", "cuda:N", "rocm:N"; NULL: "cpu" */
  const char* attention_backend; /* as in `dsv4 backends`; NULL: the platform's default */
  const char* kv_cache_dtype;    /* "auto", "fp8_ds_mla", "bf16", "fp8", "f32"; NULL: "auto" */
  const char* numerics;          /* "serving", "reference", "exact"; NULL: "serving" */
  int32_t threads;               /* of the CPU; 0: all cores */
  int32_t max_tokens;            /* of one step, all sequences together */
  int32_t max_sequences;         /* alive at a time, and in one step */
  int32_t max_logits;            /* rows of logits of one step; 0: max_sequences */
  int64_t max_context;           /* tokens of the longest sequence */
  int64_t total_tokens;          /* of all sequences; 0: max_sequences * max_context */
  const char* products;          /* "f32", "fp8" (Hopper's FP8 tensor cores); NULL: "f32" */
} dsv4_options;
/* Defaults: CPU, all cores, steps of 512 tokens, one sequence, 4096 tokens. Does nothing for NULL.
 */
void dsv4_options_init(dsv4_options* options);

typedef struct dsv4_model dsv4_model;
typedef struct dsv4_session dsv4_session;

/* Loads a model folder, or "formula:CONFIG[:SEED]" (made weights for any config.json).
 * `options` may be NULL for the defaults. On failure *model is NULL. */
dsv4_status dsv4_model_load(const char* source, const dsv4_options* options, dsv4_model** model);
void dsv4_model_free(dsv4_model* model);

typedef struct dsv4_model_info {
  int64_t vocab_size;
  int64_t hidden_size;
  int32_t num_layers;
  int32_t bos_token_id;
  int32_t eos_token_id;
  int32_t max_tokens; /* limits that the model was loaded with */
  int32_t max_sequences;
  int32_t has_tokenizer; /* 0 or 1 */
  int64_t max_context;
  int64_t memory_bytes; /* weights, caches and workspace */
} dsv4_model_info;
dsv4_status dsv4_model_get_info(const dsv4_model* model, dsv4_model_info* info);

/* Writes ids of `text` (text_bytes bytes of UTF-8, no begin token) to ids[0 .. capacity) and their
 * number to *num_ids. With ids NULL only the number is written. When capacity is too small, the
 * number is written, ids are not, and the status is DSV4_INVALID_ARGUMENT. DSV4_NOT_FOUND: the
 * model has no tokenizer. */
dsv4_status dsv4_tokenize(const dsv4_model* model, const char* text, size_t text_bytes,
                          int32_t* ids, size_t capacity, size_t* num_ids);
/* Writes the text of ids and a terminating zero to text[0 .. capacity), and the number of bytes
 * before the zero to *text_bytes. NULL and too small buffers as in dsv4_tokenize. Bytes that are
 * not UTF-8 become U+FFFD. */
dsv4_status dsv4_detokenize(const dsv4_model* model, const int32_t* ids, size_t num_ids, char* text,
                            size_t capacity, size_t* text_bytes);

/* ---- Sequences ---- */

/* A new, empty sequence of `model`. DSV4_OUT_OF_MEMORY: max_sequences are alive. */
dsv4_status dsv4_session_create(dsv4_model* model, dsv4_session** session);
void dsv4_session_free(dsv4_session* session);
/* Tokens that the sequence holds. */
dsv4_status dsv4_session_length(const dsv4_session* session, int64_t* num_tokens);

/* Appends tokens[0 .. num_tokens), 1 to max_tokens of them, to the sequence and writes the logits
 * that follow the last `num_logits` of them, 0 to num_tokens and at most max_logits, to logits
 * [num_logits, vocab_size] f32, oldest first. `logits_capacity` counts floats; `logits` may be NULL
 * when num_logits is 0. After an error the sequence is as before, except after DSV4_DEVICE_ERROR or
 * DSV4_INTERNAL: free it then. */
dsv4_status dsv4_generate_step(dsv4_session* session, const int32_t* tokens, size_t num_tokens,
                               size_t num_logits, float* logits, size_t logits_capacity);

typedef struct dsv4_sampling {
  size_t struct_size; /* set by dsv4_sampling_init */
  double temperature; /* 0: the largest logit, ties to the smaller id */
  double top_p;       /* in (0, 1] */
  int32_t top_k;      /* 0: no limit */
  uint64_t seed;
} dsv4_sampling;
/* Defaults: temperature 0, no top_k, top_p 1, seed 0. Does nothing for NULL. */
void dsv4_sampling_init(dsv4_sampling* sampling);
/* Draws a token from logits[0 .. vocab_size). The draw depends on the logits, the options and
 * (seed, sequence, position) only; `sequence` is a number of the caller's choice, `position` that
 * of the new token. `sampling` may be NULL for the defaults. */
dsv4_status dsv4_sample(const float* logits, size_t vocab_size, const dsv4_sampling* sampling,
                        uint64_t sequence, int64_t position, int32_t* token);

/* ---- One attention layer, with caches of its own ---- */

typedef struct dsv4_attention dsv4_attention;

/* Layer `layer_idx` of the model folder `directory`. `options` may be NULL. On failure *attention
 * is NULL. */
dsv4_status dsv4_attention_load(const char* directory, int32_t layer_idx,
                                const dsv4_options* options, dsv4_attention** attention);
/* A layer of `kind` ("sliding", "csa", "hca") with the geometry of a config.json and made weights.
 */
dsv4_status dsv4_attention_create(const char* config_path, const char* kind, uint64_t seed,
                                  const dsv4_options* options, dsv4_attention** attention);
void dsv4_attention_free(dsv4_attention* attention);
/* Numbers per token of the layer's input and output. */
dsv4_status dsv4_attention_hidden_size(const dsv4_attention* attention, int64_t* hidden_size);

/* A new, empty sequence; its number is written to *sequence. */
dsv4_status dsv4_attention_add_sequence(dsv4_attention* attention, int64_t* sequence);
dsv4_status dsv4_attention_remove_sequence(dsv4_attention* attention, int64_t sequence);

/* Appends num_tokens[i] >= 1 tokens to sequence sequences[i], for all i in [0, num_sequences), and
 * computes the layer's output for them.
 * hidden, out: [sum of num_tokens, hidden_size] f32, num_values floats each; rows in the order of
 * the sequences; they must not overlap. Input is the layer's, after attn_norm; activations are
 * rounded to the type of the numerics. Errors as in dsv4_generate_step. */
dsv4_status dsv4_attention_forward(dsv4_attention* attention, const int64_t* sequences,
                                   const int32_t* num_tokens, size_t num_sequences,
                                   const float* hidden, float* out, size_t num_values);

#ifdef __cplusplus
}
#endif

#endif /* DSV4_C_API_H_ */
/* NOLINTEND(readability-identifier-naming) */
