// Cache pages byte by byte, from cache_layouts.md: where the values and scales of a row lie and
// what they stand for. Independent of the library's encoder.
#pragma once
#include <cstdint>
#include <span>

#include "tests/oracle/arrays.h"

namespace oracle {

enum class RowLayout { kFp8DsMla, kBf16, kFp8, kF32, kIndexFp8, kIndexMxfp4, kIndexF32 };

/// `rows` rows of `elems` numbers starting at `base`: values of all rows, then scales of all rows.
struct Page {
  uint8_t* base;
  int64_t rows;
  RowLayout layout;
  int elems;
};
/// Bytes of a page without alignment.
int64_t page_bytes(RowLayout layout, int64_t rows, int elems);
/// Value and scale bytes of one row, in that order.
std::vector<uint8_t> row_bytes(const Page& page, int64_t row);
/// Stores what row_bytes() returned, of this or another page of the same layout.
void put_row_bytes(const Page& page, int64_t row, std::span<const uint8_t> bytes);

/// Quantises `values` [elems] and stores the row.
void write_row(const Page& page, int64_t row, std::span<const double> values);
/// What a reader gets back: [elems], scales applied.
Vector read_row(const Page& page, int64_t row);

}  // namespace oracle
