// Local entry numbers of the selection -> global slots of the compressed cache.
#include "backends/cpu/candidates.h"
#include "backends/cpu/parallel.h"

namespace dsv4::cpu {

void map_slots(const MapSlotsParams& params, const OpContext& context) {
  const ConstTensor& in = params.topk_indices;
  const int64_t k = in.shape[1];
  const int32_t rows = params.rows_per_block;
  parallel_chunks(context.stream, in.shape[0], 8, [&](int64_t begin, int64_t end, int) {
    for (int64_t t = begin; t < end; ++t) {
      const int32_t* table = params.blocks.table + params.token_to_seq[t] * params.blocks.stride;
      const int32_t* entries = in.as<int32_t>() + t * in.strides[0];
      int32_t* slots = params.slots.as<int32_t>() + t * params.slots.strides[0];
      for (int64_t i = 0; i < k; ++i) {
        const int32_t entry = entries[i];
        if (entry < 0) {
          slots[i] = -1;
          continue;
        }
        const int32_t logical = entry / rows;
        slots[i] = table[logical % params.blocks.columns] * rows + (entry - logical * rows);
      }
    }
  });
}

}  // namespace dsv4::cpu
