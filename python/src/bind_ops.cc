// dsv4.ops: the operations of a device as functions on borrowed tensors. What each computes is
// documented in src/ops/ops.h.

#include <cmath>

#include "caches.h"
#include "module.h"

namespace dsv4::python {

using namespace nb::literals;

namespace {

constexpr std::initializer_list<DType> kActivations = {DType::kBf16, DType::kF32};

// FP4 holds two values a byte, which tells it from FP8.
Weight weight_of(OpCall& call, nb::handle w, nb::handle scale, int64_t cols) {
  if (scale.is_none()) {
    const ConstTensor plain = call.input(w, "w", kActivations, {kAny, cols});
    return {.dtype = plain.dtype,
            .data = plain.data,
            .rows = plain.shape[0],
            .cols = cols,
            .row_stride = plain.strides[0]};
  }
  const ConstTensor codes = call.input(w, "w", {DType::kF8E4M3, DType::kF4E2M1}, {kAny, kAny});
  const ConstTensor scales = call.input(scale, "scale", {DType::kF8E8M0}, {kAny, kAny});
  Weight weight{.data = codes.data,
                .rows = codes.shape[0],
                .cols = cols,
                .scale = scales.as<uint8_t>(),
                .scale_stride = scales.strides[0]};
  constexpr int kFp4Block = 32;
  int64_t scale_rows = 0, scale_cols = 0;
  if (codes.shape[1] == cols) {
    weight.dtype = DType::kF8E4M3;
    weight.row_stride = codes.strides[0];
    scale_rows = (weight.rows + weight.block_rows - 1) / weight.block_rows;
    scale_cols = (cols + weight.block_cols - 1) / weight.block_cols;
  } else if (codes.shape[1] * 2 == cols && cols % kFp4Block == 0) {
    weight.dtype = DType::kF4E2M1;
    weight.row_stride = 2 * codes.strides[0];
    scale_rows = weight.rows;
    scale_cols = cols / kFp4Block;
  } else {
    fail(ErrorCode::kInvalidArgument, "w is ", describe(codes), ", expected [*, ", cols,
         "] for FP8 or [*, ", cols / 2, "] for FP4");
  }
  if (scales.shape[0] != scale_rows || scales.shape[1] != scale_cols) {
    fail(ErrorCode::kInvalidArgument, "scale is ", describe(scales), ", expected [", scale_rows,
         ", ", scale_cols, "] for this w");
  }
  return weight;
}

void linear(nb::handle x, nb::handle w, nb::handle out, nb::handle scale, bool quantise_input,
            StreamArgument stream) {
  OpCall call(stream);
  const ConstTensor input = call.input(x, "x", kActivations, {kAny, kAny});
  const Weight weight = weight_of(call, w, scale, input.shape[1]);
  const Tensor output =
      call.output(out, "out", {DType::kBf16, DType::kF32}, {input.shape[0], weight.rows});
  const LinearProblem problem{input, weight, output};
  call.run(&Ops::linear, "linear",
           LinearParams{.problems = {&problem, 1}, .quantise_input = quantise_input},
           {.max_tokens = input.shape[0], .max_cols = weight.cols, .max_rows = weight.rows});
}

void rms_norm(nb::handle x, nb::handle weight, nb::handle out, float eps, StreamArgument stream) {
  OpCall call(stream);
  const ConstTensor input = call.input(x, "x", kActivations, {kAny, kAny});
  const int64_t n = input.shape[1];
  const ConstTensor factors = call.input(weight, "weight", kActivations, {n});
  const Tensor output = call.output(out, "out", kActivations, {input.shape[0], n});
  if (output.dtype != input.dtype && output.dtype != DType::kF32) {
    fail(ErrorCode::kInvalidArgument, "out is ", describe(output),
         ", expected the dtype of x or f32");
  }
  call.run(&Ops::rms_norm, "rms_norm",
           RmsNormParams{.x = input, .weight = factors, .eps = eps, .out = output},
           {.max_tokens = input.shape[0], .max_cols = n, .hidden_size = n});
}

void gather_rows(nb::handle x, nb::handle rows, nb::handle out, StreamArgument stream) {
  OpCall call(stream);
  const ConstTensor input = call.input(x, "x", kActivations, {kAny, kAny});
  const Tensor output = call.output(out, "out", {input.dtype}, {kAny, input.shape[1]});
  const int32_t* list = call.int32_array(rows, "rows", output.shape[0]);
  call.run(&Ops::gather_rows, "gather_rows",
           GatherRowsParams{.x = input, .rows = list, .out = output},
           {.max_tokens = output.shape[0], .max_cols = input.shape[1]});
}

RopeView rope_of(OpCall& call, nb::handle frequencies, int64_t width) {
  const ConstTensor f = call.input(frequencies, "frequencies", {DType::kF32}, {kAny});
  const int64_t rope_dim = 2 * f.shape[0];
  if (rope_dim == 0 || rope_dim > width) {
    fail(ErrorCode::kInvalidArgument, "frequencies is ", describe(f), ", expected 1 to ",
         width / 2);
  }
  return {.frequencies = f.as<float>(), .rope_dim = static_cast<int32_t>(rope_dim)};
}

void qnorm_rope_insert(nb::handle q, nb::handle kv, nb::handle frequencies, nb::handle positions,
                       nb::handle slot_mapping, const Cache& window, float eps,
                       StreamArgument stream) {
  OpCall call(stream);
  const Tensor queries = call.output(q, "q", kActivations, {kAny, kAny, kAny});
  const int64_t tokens = queries.shape[0], dim = queries.shape[2];
  const QnormRopeInsertParams params{
      .q = queries,
      .kv = call.output(kv, "kv", {queries.dtype}, {tokens, dim}),
      .rope = rope_of(call, frequencies, dim),
      .eps = eps,
      .positions = call.int32_array(positions, "positions", tokens),
      .slot_mapping = call.int64_array(slot_mapping, "slot_mapping", tokens),
      .window = window.view(call, "window", true)};
  if (params.window.row_elems != dim) {
    fail(ErrorCode::kInvalidArgument, "window has rows of ", params.window.row_elems,
         ", expected head_dim ", dim);
  }
  call.run(&Ops::qnorm_rope_insert, "qnorm_rope_insert", params,
           {.max_tokens = tokens,
            .num_heads = static_cast<int>(queries.shape[1]),
            .head_dim = static_cast<int>(dim)});
}

void inverse_rope(nb::handle o, nb::handle frequencies, nb::handle positions, nb::handle out,
                  bool quantise, StreamArgument stream) {
  OpCall call(stream);
  const ConstTensor input = call.input(o, "o", kActivations, {kAny, kAny, kAny});
  const int64_t tokens = input.shape[0];
  const InverseRopeParams params{
      .o = input,
      .rope = rope_of(call, frequencies, input.shape[2]),
      .positions = call.int32_array(positions, "positions", tokens),
      .quantise = quantise,
      .out = call.output(out, "out", kActivations, {tokens, input.shape[1], input.shape[2]})};
  call.run(&Ops::inverse_rope, "inverse_rope", params,
           {.max_tokens = tokens,
            .num_heads = static_cast<int>(input.shape[1]),
            .head_dim = static_cast<int>(input.shape[2])});
}

// @throws Error kUnsupported: the device knows queries of the indexer as values only.
void check_index_codes(OpCall& call, const ConstTensor& q, const char* what) {
  if (q.dtype != DType::kF8E4M3 || call.ops().index_takes_e4m3) return;
  fail(ErrorCode::kUnsupported, what, ": this device has the indexer's queries in bf16");
}

void index_query(nb::handle q, nb::handle weights, nb::handle frequencies, nb::handle positions,
                 nb::handle q_out, nb::handle weights_out, const std::string& format, bool hadamard,
                 StreamArgument stream) {
  OpCall call(stream);
  const ConstTensor queries = call.input(q, "q", kActivations, {kAny, kAny, kAny});
  const int64_t tokens = queries.shape[0], heads = queries.shape[1], dim = queries.shape[2];
  const IndexQueryParams params{
      .q = queries,
      .weights = call.input(weights, "weights", kActivations, {tokens, heads}),
      .rope = rope_of(call, frequencies, dim),
      .positions = call.int32_array(positions, "positions", tokens),
      .format = format_named(format),
      .hadamard = hadamard,
      .q_out = call.output(q_out, "q_out", {DType::kBf16, DType::kF32, DType::kF8E4M3},
                           {tokens, heads, dim}),
      .weights_out = call.output(weights_out, "weights_out", {DType::kF32}, {tokens, heads})};
  check_index_codes(call, params.q_out, "q_out");
  if (params.q_out.dtype == DType::kF8E4M3 && params.format != KvFormat::kIndexFp8) {
    fail(ErrorCode::kInvalidArgument, "q_out: codes are of format index_fp8, not ", format);
  }
  call.run(&Ops::index_query, "index_query", params,
           {.max_tokens = tokens,
            .index_heads = static_cast<int>(heads),
            .index_dim = static_cast<int>(dim)});
}

void index_logits(nb::handle q, nb::handle weights, nb::handle token_to_seq, nb::handle end,
                  nb::handle block_table, const Cache& cache, nb::handle logits,
                  StreamArgument stream) {
  OpCall call(stream);
  const ConstTensor queries =
      call.input(q, "q", {DType::kBf16, DType::kF32, DType::kF8E4M3}, {kAny, kAny, kAny});
  check_index_codes(call, queries, "q");
  const int64_t tokens = queries.shape[0];
  const Tensor scores = call.output(logits, "logits", {DType::kF32}, {tokens, kAny});
  const IndexLogitsParams params{
      .q = queries,
      .weights = call.input(weights, "weights", {DType::kF32}, {tokens, queries.shape[1]}),
      .token_to_seq = call.int32_array(token_to_seq, "token_to_seq", tokens),
      .end = call.int32_array(end, "end", tokens),
      .max_end = static_cast<int32_t>(scores.shape[1]),
      .blocks = call.block_table(block_table, "block_table", cache.rows_per_block),
      .cache = cache.view(call, "cache"),
      .logits = scores};
  if (cache.row_elems != queries.shape[2]) {
    fail(ErrorCode::kInvalidArgument, "cache has rows of ", cache.row_elems, ", q has ",
         queries.shape[2]);
  }
  call.run(&Ops::index_logits, "index_logits", params,
           {.max_tokens = tokens,
            .index_heads = static_cast<int>(queries.shape[1]),
            .index_dim = static_cast<int>(queries.shape[2]),
            .max_entries = scores.shape[1]});
}

void top_k(nb::handle logits, nb::handle end, nb::handle topk_indices, nb::handle topk_length,
           StreamArgument stream) {
  OpCall call(stream);
  const ConstTensor scores = call.input(logits, "logits", {DType::kF32}, {kAny, kAny});
  const int64_t tokens = scores.shape[0];
  const Tensor indices = call.output(topk_indices, "topk_indices", {DType::kI32}, {tokens, kAny});
  const TopKParams params{
      .logits = scores,
      .end = call.int32_array(end, "end", tokens),
      .topk_indices = indices,
      .topk_length =
          call.output(topk_length, "topk_length", {DType::kI32}, {tokens}).as<int32_t>()};
  call.run(&Ops::top_k, "top_k", params,
           {.max_tokens = tokens,
            .index_topk = static_cast<int>(indices.shape[1]),
            .max_entries = scores.shape[1]});
}

void map_slots(nb::handle topk_indices, nb::handle token_to_seq, nb::handle block_table,
               int rows_per_block, nb::handle slots, StreamArgument stream) {
  OpCall call(stream);
  const ConstTensor indices = call.input(topk_indices, "topk_indices", {DType::kI32}, {kAny, kAny});
  const int64_t tokens = indices.shape[0];
  const MapSlotsParams params{
      .topk_indices = indices,
      .token_to_seq = call.int32_array(token_to_seq, "token_to_seq", tokens),
      .blocks = call.block_table(block_table, "block_table", rows_per_block),
      .rows_per_block = rows_per_block,
      .slots = call.output(slots, "slots", {DType::kI32}, {tokens, indices.shape[1]})};
  call.run(&Ops::map_slots, "map_slots", params,
           {.max_tokens = tokens, .index_topk = static_cast<int>(indices.shape[1])});
}

}  // namespace

void bind_ops(nb::module_& ops) {
  ops.def("linear", &linear, "x"_a, "w"_a, "out"_a, nb::kw_only(), "scale"_a = nb::none(),
          "quantise_input"_a = false, "stream"_a = nb::none(),
          "out = x w^T, summed in f32 in one order for every number of rows.\n\n"
          "x      [M, cols] bf16 or f32\n"
          "w      [rows, cols] bf16, f32 or FP8 E4M3, or [rows, cols / 2] FP4 pairs (uint8)\n"
          "       (constant: sm_90 may read it while earlier calls are under way, so none of\n"
          "       them may write it)\n"
          "out    [M, rows] bf16 or f32, written\n"
          "scale  UE8M0 bytes of an FP8 w [rows / 128, cols / 128] or FP4 w [rows, cols / 32]\n"
          "quantise_input  x to E4M3 per row and 128 columns first");
  ops.def("rms_norm", &rms_norm, "x"_a, "weight"_a, "out"_a, nb::kw_only(), "eps"_a = 1e-6f,
          "stream"_a = nb::none(),
          "out = weight * x / sqrt(mean(x^2) + eps), f32 inside, one rounding.\n\n"
          "x       [T, n] bf16 or f32\n"
          "weight  [n] bf16 or f32\n"
          "out     [T, n], dtype of x or f32, written");
  ops.def(
      "gather_rows", &gather_rows, "x"_a, "rows"_a, "out"_a, nb::kw_only(), "stream"_a = nb::none(),
      "out[i] = x[rows[i]].\n\nx [N, n] bf16 or f32, rows [count] int32, out [count, n] written");
  ops.def("qnorm_rope_insert", &qnorm_rope_insert, "q"_a, "kv"_a, "frequencies"_a, "positions"_a,
          "slot_mapping"_a, "window"_a, nb::kw_only(), "eps"_a = 1e-6f, "stream"_a = nb::none(),
          "RMS norm of every query head, RoPE of q and kv, and kv into its cache row.\n\n"
          "q             [T, heads, head_dim] bf16 or f32, in place\n"
          "kv            [T, head_dim], dtype of q, in place\n"
          "frequencies   [rope_dim / 2] float32 (dsv4.rope_frequencies)\n"
          "positions     [T] int32\n"
          "slot_mapping  [T] int64, -1: not written\n"
          "window        Cache, written");
  ops.def("inverse_rope", &inverse_rope, "o"_a, "frequencies"_a, "positions"_a, "out"_a,
          nb::kw_only(), "quantise"_a = false, "stream"_a = nb::none(),
          "Takes RoPE back from the last rope_dim of every head.\n\n"
          "o, out     [T, heads, head_dim] bf16 or f32; out is written\n"
          "positions  [T] int32\n"
          "quantise   to E4M3 per 128 values, in the form that the device's linear reads");
  ops.def(
      "index_query", &index_query, "q"_a, "weights"_a, "frequencies"_a, "positions"_a, "q_out"_a,
      "weights_out"_a, nb::kw_only(), "format"_a = "index_fp8", "hadamard"_a = false,
      "stream"_a = nb::none(),
      "Queries of the indexer: RoPE, quantisation, all factors folded into the weights.\n\n"
      "q            [T, index_heads, index_dim] bf16 or f32\n"
      "weights      [T, index_heads] bf16 or f32\n"
      "q_out        [T, index_heads, index_dim], written: bf16 holding the quantised values, f32 "
      "for index_f32;\n"
      "             on sm_90 codes of index_fp8 in float8_e4m3fn, too, which index_logits reads "
      "fastest\n"
      "weights_out  [T, index_heads] float32, written\n"
      "format       of the keys: 'index_fp8', 'index_mxfp4', 'index_f32'");
  ops.def(
      "index_logits", &index_logits, "q"_a, "weights"_a, "token_to_seq"_a, "end"_a, "block_table"_a,
      "cache"_a, "logits"_a, nb::kw_only(), "stream"_a = nb::none(),
      "logits[t, j] = sum over heads of w * max(0, q . key j) for j < end[t]; the rest of a row "
      "is left as it is.\n\n"
      "q, weights    results of index_query\n"
      "token_to_seq  [T] int32\n"
      "end           [T] int32, at most the width of logits\n"
      "block_table   [num_seqs, columns] int32\n"
      "cache         Cache of an indexer format, row_elems = index_dim\n"
      "logits        [T, n] float32, written");
  ops.def("top_k", &top_k, "logits"_a, "end"_a, "topk_indices"_a, "topk_length"_a, nb::kw_only(),
          "stream"_a = nb::none(),
          "The k largest of logits[t, :end[t]], ties to the smaller index, exact.\n\n"
          "logits        [T, n] float32; NaN counts as -inf\n"
          "end           [T] int32, at most n\n"
          "topk_indices  [T, k] int32, written: ascending, then -1\n"
          "topk_length   [T] int32, written: min(end, k)");
  ops.def("map_slots", &map_slots, "topk_indices"_a, "token_to_seq"_a, "block_table"_a,
          "rows_per_block"_a, "slots"_a, nb::kw_only(), "stream"_a = nb::none(),
          "Entry numbers of a sequence to slots of the cache; -1 stays.\n\n"
          "topk_indices, slots  [T, k] int32; slots is written\n"
          "token_to_seq         [T] int32\n"
          "block_table          [num_seqs, columns] int32");
}

}  // namespace dsv4::python
