// dsv4.ops.attend: queries against listed or ranged rows of paged caches.

#include <cmath>
#include <limits>

#include "caches.h"
#include "module.h"

namespace dsv4::python {

using namespace nb::literals;

namespace {

using Rows = std::variant<Ranges, Lists>;

RangeRows range_rows(OpCall& call, const Ranges& rows, int64_t tokens) {
  return {.cache = rows.cache.view(call, "cache of a range"),
          .blocks = call.block_table(rows.block_table, "block_table", rows.cache.rows_per_block),
          .begin = call.int32_array(rows.begin, "begin", tokens),
          .end = call.int32_array(rows.end, "end", tokens)};
}

// The list and its width.
std::pair<ListedRows, int64_t> listed_rows(OpCall& call, const Lists& rows, int64_t tokens) {
  const CacheView cache = rows.cache.view(call, "cache of a list");
  const ConstTensor slots = call.input(rows.slots, "slots", {DType::kI32}, {tokens, kAny});
  return {{.cache = cache,
           .slots = slots.as<int32_t>(),
           .stride = slots.strides[0],
           .length = call.int32_array(rows.length, "length", tokens)},
          slots.shape[1]};
}

void check_rows(const CacheView& cache, int64_t head_dim, const char* what) {
  if (cache.row_elems != head_dim) {
    fail(ErrorCode::kInvalidArgument, what, " has rows of ", cache.row_elems,
         ", expected head_dim ", head_dim);
  }
}

void attend(nb::handle q, nb::handle out, const std::optional<Rows>& window,
            const std::optional<Rows>& compressed, nb::handle token_to_seq, nb::handle sink,
            std::optional<float> softmax_scale, bool round_p_to_bf16, int blocks_per_chain,
            std::optional<int64_t> max_entries, nb::handle lse, nb::handle max_logits,
            nb::handle scratch, StreamArgument stream) {
  OpCall call(stream);
  call.set_scratch(scratch);
  const ConstTensor queries = call.input(q, "q", {DType::kBf16, DType::kF32}, {kAny, kAny, kAny});
  const int64_t tokens = queries.shape[0], heads = queries.shape[1], dim = queries.shape[2];
  if (heads < 1 || dim < 1) {
    fail(ErrorCode::kInvalidArgument, "q is ", describe(queries),
         ", expected [T, heads, head_dim]");
  }
  if (blocks_per_chain < 1) {
    fail(ErrorCode::kInvalidArgument, "blocks_per_chain is ", blocks_per_chain,
         ", expected 1 or more");
  }
  AttendParams params{
      .q = queries,
      .window = RangeRows{},
      .compressed = std::monostate{},
      .max_entries = 0,
      .token_to_seq = nullptr,
      .sink = sink.is_none() ? nullptr : call.float_array(sink, "sink", heads),
      .softmax_scale = softmax_scale.value_or(1.0f / std::sqrt(static_cast<float>(dim))),
      .grid = {.blocks_per_chain = blocks_per_chain},
      .round_p_to_bf16 = round_p_to_bf16,
      .out = call.output(out, "out", {queries.dtype}, {tokens, heads, dim}),
      .lse = nullptr,
      .max_logits = nullptr};
  bool ranges = false;
  if (window) {
    if (const auto* range = std::get_if<Ranges>(&*window)) {
      const RangeRows rows = range_rows(call, *range, tokens);
      check_rows(rows.cache, dim, "the window's cache");
      params.window = rows;
      ranges = true;
    } else {
      const ListedRows rows = listed_rows(call, std::get<Lists>(*window), tokens).first;
      check_rows(rows.cache, dim, "the window's cache");
      params.window = rows;
    }
  }
  if (compressed) {
    if (const auto* range = std::get_if<Ranges>(&*compressed)) {
      const RangeRows rows = range_rows(call, *range, tokens);
      check_rows(rows.cache, dim, "the compressed cache");
      params.compressed = rows;
      params.max_entries = int64_t{rows.blocks.columns} * rows.cache.rows_per_block;
      ranges = true;
    } else {
      const auto [rows, width] = listed_rows(call, std::get<Lists>(*compressed), tokens);
      check_rows(rows.cache, dim, "the compressed cache");
      params.compressed = rows;
      params.max_entries = width;
    }
    if (max_entries) params.max_entries = *max_entries;
  }
  if (ranges) params.token_to_seq = call.int32_array(token_to_seq, "token_to_seq", tokens);
  const auto heads_output = [&](nb::handle object, const char* what) -> float* {
    if (object.is_none()) return nullptr;
    const Tensor tensor = call.output(object, what, {DType::kF32}, {tokens, heads});
    if (!tensor.is_contiguous()) {
      fail(ErrorCode::kInvalidArgument, what, " is not contiguous");
    }
    return tensor.as<float>();
  };
  params.lse = heads_output(lse, "lse");
  params.max_logits = heads_output(max_logits, "max_logits");
  if (tokens == 0) return;
  call.run(&Ops::attend, "attend", params,
           {.max_tokens = tokens,
            .num_heads = static_cast<int>(heads),
            .head_dim = static_cast<int>(dim),
            .max_entries = params.max_entries});
}

}  // namespace

void bind_attend(nb::module_& ops) {
  ops.def(
      "attend", &attend, "q"_a, "out"_a, nb::kw_only(), "window"_a = nb::none(),
      "compressed"_a = nb::none(), "token_to_seq"_a = nb::none(), "sink"_a = nb::none(),
      "softmax_scale"_a = nb::none(), "round_p_to_bf16"_a = true, "blocks_per_chain"_a = 32,
      "max_entries"_a = nb::none(), "lse"_a = nb::none(), "max_logits"_a = nb::none(),
      "scratch"_a = nb::none(), "stream"_a = nb::none(),
      "out[t, h] = sum of p_j k_j over the rows j of token t, p = softmax(scale q . k, sink).\n\n"
      "q, out            [T, heads, head_dim] bf16 or f32, any stride of tokens and heads; out "
      "is written\n"
      "window            Ranges or Lists: the rows that are summed first\n"
      "compressed        Ranges or Lists: the rows after them\n"
      "token_to_seq      [T] int32, for Ranges\n"
      "sink              [heads] float32: a logit without a value; None: none\n"
      "softmax_scale     None: head_dim ** -0.5\n"
      "blocks_per_chain  blocks of 64 compressed rows that are summed in one go; part of the "
      "result's bits\n"
      "max_entries       bound of compressed rows of a token, None: the width of the list or "
      "table\n"
      "lse               [T, heads] float32, written: natural log, sink excluded, -inf without "
      "rows\n"
      "max_logits        [T, heads] float32, written: largest scale q . k, -inf without rows\n"
      "scratch           called with a number of bytes, returns a uint8 array for temporary "
      "results; "
      "needed where nothing\n"
      "                  else may allocate (graph capture); None: dsv4 keeps some per stream\n"
      "A token without rows gets zeros.");
}

}  // namespace dsv4::python
