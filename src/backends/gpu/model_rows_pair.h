// Neighbouring pairs of a row of any length and alignment, for kernels whose lanes walk over a row
// instead of holding it.
#pragma once
#include "backends/gpu/row.h"

namespace dsv4::gpu {

/// Elements `elem` and `elem + 1` of a row of `count`; zero beyond it. `aligned`: pairs of the row
/// may be moved at once.
template <typename T>
DSV4_DEVICE Pair load_pair_of(const T* row, int elem, int count, bool aligned) {
  if (aligned && elem + 1 < count) return load_pair(row + elem);
  return {elem < count ? to_float(row[elem]) : 0.0f,
          elem + 1 < count ? to_float(row[elem + 1]) : 0.0f};
}
template <typename T>
DSV4_DEVICE void store_pair_of(T* row, int elem, int count, bool aligned, Pair pair) {
  if (aligned && elem + 1 < count) {
    store_pair(row + elem, pair);
    return;
  }
  if (elem < count) row[elem] = from_float<T>(pair.even);
  if (elem + 1 < count) row[elem + 1] = from_float<T>(pair.odd);
}

}  // namespace dsv4::gpu
