// dsv4.ops: caches, lists of rows, and single rows of a cache in host memory.

#include "cache/kv_format.h"
#include "caches.h"
#include "module.h"

namespace dsv4::python {

using namespace nb::literals;

KvFormat format_named(const std::string& name) {
  std::string known;
  for (KvFormat format : {KvFormat::kFp8DsMla, KvFormat::kBf16, KvFormat::kFp8, KvFormat::kF32,
                          KvFormat::kIndexFp8, KvFormat::kIndexMxfp4, KvFormat::kIndexF32}) {
    if (name == kv_format_name(format)) return format;
    known += known.empty() ? "" : ", ";
    known += kv_format_name(format);
  }
  fail(ErrorCode::kInvalidArgument, "cache format \"", name, "\", expected one of ", known);
}

namespace {

// Slots and rows of encode_rows and decode_rows, checked.
struct HostRows {
  CacheView view;
  const int64_t* slots;
  int64_t count;
};

HostRows host_rows(OpCall& call, const Cache& cache, nb::handle slots, bool written) {
  const CacheView view = cache.view(call, "cache", written);
  if (call.device().device().id().platform != Platform::kCpu) {
    fail(ErrorCode::kUnsupported, "rows are encoded and decoded in host memory, the cache is on ",
         call.device().device().id().str());
  }
  const ConstTensor list = call.input(slots, "slots", {DType::kI64}, {kAny});
  const int64_t rows = int64_t{view.num_blocks} * view.rows_per_block;
  for (int64_t i = 0; i < list.shape[0]; ++i) {
    if (const int64_t slot = list.as<int64_t>()[i]; slot < 0 || slot >= rows) {
      fail(ErrorCode::kInvalidArgument, "slots[", i, "] is ", slot, ", expected 0 to ", rows - 1);
    }
  }
  return {view, list.as<int64_t>(), list.shape[0]};
}

void encode_rows(const Cache& cache, nb::handle slots, nb::handle values, float scale) {
  OpCall call(std::nullopt);
  const HostRows rows = host_rows(call, cache, slots, true);
  const ConstTensor from =
      call.input(values, "values", {DType::kF32}, {rows.count, cache.row_elems});
  for (int64_t i = 0; i < rows.count; ++i) {
    encode_row(rows.view, rows.slots[i], from.as<float>() + i * from.strides[0], scale);
  }
}

void decode_rows(const Cache& cache, nb::handle slots, nb::handle out, float scale) {
  OpCall call(std::nullopt);
  const HostRows rows = host_rows(call, cache, slots, false);
  const Tensor to = call.output(out, "out", {DType::kF32}, {rows.count, cache.row_elems});
  for (int64_t i = 0; i < rows.count; ++i) {
    decode_row(rows.view, rows.slots[i], to.as<float>() + i * to.strides[0], scale);
  }
}

}  // namespace

void bind_caches(nb::module_& ops) {
  nb::class_<Cache>(ops, "Cache",
                    "A paged cache: memory of the caller and how its rows are stored.\n\n"
                    "pages           [num_blocks, ...], any dtype of whole bytes; the bytes of a "
                    "block are adjacent, blocks may lie\n"
                    "                any distance apart. Kept alive.\n"
                    "format          'fp8_ds_mla', 'bf16', 'fp8', 'f32', 'index_fp8', "
                    "'index_mxfp4', 'index_f32'\n"
                    "rows_per_block  rows (tokens or compressed entries) of a block\n"
                    "row_elems       numbers of a row: 512, or 128 of the indexer\n\n"
                    "Row `slot` is row slot % rows_per_block of block slot // rows_per_block.")
      .def(
          "__init__",
          [](Cache* self, nb::object pages, const std::string& format, int rows_per_block,
             int row_elems) {
            const KvFormat parsed = format_named(format);
            check_row_elems(parsed, row_elems);
            if (rows_per_block < 1) {
              fail(ErrorCode::kInvalidArgument, "rows_per_block is ", rows_per_block,
                   ", expected 1 or more");
            }
            new (self) Cache{std::move(pages), parsed, rows_per_block, row_elems};
          },
          "pages"_a, "format"_a, "rows_per_block"_a, "row_elems"_a = 512)
      .def_ro("pages", &Cache::pages)
      .def_ro("rows_per_block", &Cache::rows_per_block)
      .def_ro("row_elems", &Cache::row_elems)
      .def_prop_ro("format", [](const Cache& self) { return kv_format_name(self.format); });

  nb::class_<Ranges>(ops, "Ranges",
                     "Rows [begin[t], end[t]) of the list of token t's own sequence.\n\n"
                     "block_table  [num_seqs, columns] int32: block of logical block b in column b "
                     "% columns\n"
                     "begin, end   [T] int32, in rows")
      .def(
          "__init__",
          [](Ranges* self, const Cache& cache, nb::object block_table, nb::object begin,
             nb::object end) {
            new (self) Ranges{cache, std::move(block_table), std::move(begin), std::move(end)};
          },
          "cache"_a, "block_table"_a, "begin"_a, "end"_a);

  nb::class_<Lists>(ops, "Lists",
                    "Rows slots[t, :length[t]] of a cache; entries below 0 are skipped.\n\n"
                    "slots   [T, n] int32, any stride between tokens\n"
                    "length  [T] int32, at most n")
      .def(
          "__init__",
          [](Lists* self, const Cache& cache, nb::object slots, nb::object length) {
            new (self) Lists{cache, std::move(slots), std::move(length)};
          },
          "cache"_a, "slots"_a, "length"_a);

  ops.def(
      "page_bytes",
      [](const std::string& format, int64_t rows_per_block, int row_elems) {
        return page_bytes(format_named(format), rows_per_block, row_elems);
      },
      "format"_a, "rows_per_block"_a, "row_elems"_a = 512,
      "Bytes of a block of `rows_per_block` rows, without alignment.");
  ops.def("encode_rows", &encode_rows, "cache"_a, "slots"_a, "values"_a, "scale"_a = 1.0f,
          "Quantises and writes rows, in host memory.\n\n"
          "cache   written: the bytes of these rows only\n"
          "slots   [n] int64\n"
          "values  [n, row_elems] float32\n"
          "scale   of the whole cache, for format 'fp8' only");
  ops.def("decode_rows", &decode_rows, "cache"_a, "slots"_a, "out"_a, "scale"_a = 1.0f,
          "Reads and dequantises rows, in host memory.\n\n"
          "slots  [n] int64\n"
          "out    [n, row_elems] float32, written");
}

}  // namespace dsv4::python
