// Caches and lists of rows as arguments of operations.
#pragma once
#include "casters.h"

#include <string>

#include "op_call.h"

namespace dsv4::python {

/// dsv4.ops.Cache: pages of another library and how to read them.
struct Cache {
  nb::object pages;
  KvFormat format;
  int rows_per_block;
  int row_elems;
  CacheView view(OpCall& call, const char* what, bool written = false) const {
    return call.cache(pages, what, format, rows_per_block, row_elems, written);
  }
};

/// dsv4.ops.Ranges: rows [begin, end) of a sequence's own list, per token.
struct Ranges {
  Cache cache;
  nb::object block_table, begin, end;
};

/// dsv4.ops.Lists: explicit slots per token.
struct Lists {
  Cache cache;
  nb::object slots, length;
};

/// @throws Error kInvalidArgument with the names that exist.
KvFormat format_named(const std::string& name);

}  // namespace dsv4::python
