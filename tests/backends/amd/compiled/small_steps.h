// Small calls of the shared operations that reach every barrier of their kernels: inputs for
// negative controls.
#pragma once
#include <string>
#include <vector>

#include "backends/gpu/rowwise_ops.h"
#include "tests/oracle/layer_parts.h"
#include "tests/testing/device_memory.h"
#include "tests/testing/hip/interpreter_device.h"
#include "tests/testing/random.h"

namespace dsv4::testing {

using Bytes = std::vector<uint8_t>;

/// One call on a fresh device; returns what it wrote.
struct SmallStep {
  std::string name;
  Bytes (*run)(DeviceMemory&, const Subject&);
};

inline Vector some_values(int64_t count, double scale = 1.0) {
  Random random(static_cast<uint64_t>(count));
  Vector out(static_cast<size_t>(count));
  for (double& value : out) value = scale * random.normal();
  return out;
}
inline Tensor some_tensor(DeviceMemory& memory, DType dtype, std::initializer_list<int64_t> shape,
                          double scale = 1.0) {
  return memory.tensor(
      dtype, shape,
      rounded(dtype, some_values(Tensor(nullptr, dtype, shape).num_elements(), scale)));
}
inline Bytes bytes_of(const DeviceMemory& memory, const ConstTensor& tensor) {
  return memory.get(tensor.as<uint8_t>(), tensor.num_elements() * size_of(tensor.dtype));
}
inline RopeView some_rope(DeviceMemory& memory, int rope_dim) {
  return {memory.put(oracle::rope_frequencies({.theta = 10000, .yarn = false}, rope_dim)),
          rope_dim};
}

template <typename Params>
void run_small(const Subject& subject, Op<Params> op, const Params& params) {
  run_op_with(subject, op, params, 1 << 20);
}

template <int64_t kCount>
Bytes small_rms_norm(DeviceMemory& memory, const Subject& subject) {
  const Tensor out = memory.tensor(DType::kBf16, {2, kCount});
  run_small(subject, subject.ops->rms_norm,
            {.x = some_tensor(memory, DType::kBf16, {2, kCount}),
             .weight = some_tensor(memory, DType::kBf16, {kCount}),
             .eps = 1e-6f,
             .out = out});
  return bytes_of(memory, out);
}

/// Rows of kCount, and beside them rows of 512.
template <int64_t kCount>
Bytes small_rms_norm_pair(DeviceMemory& memory, const Subject& subject) {
  constexpr int64_t kBeside = 512;
  const Tensor out = memory.tensor(DType::kBf16, {2, kCount});
  const Tensor beside_out = memory.tensor(DType::kBf16, {3, kBeside});
  const RmsNormParams beside{.x = some_tensor(memory, DType::kBf16, {3, kBeside}),
                             .weight = some_tensor(memory, DType::kBf16, {kBeside}),
                             .eps = 1e-6f,
                             .out = beside_out};
  run_small(subject, subject.ops->rms_norm,
            {.x = some_tensor(memory, DType::kBf16, {2, kCount}),
             .weight = some_tensor(memory, DType::kBf16, {kCount}),
             .eps = 1e-6f,
             .out = out,
             .beside = &beside});
  Bytes bytes = bytes_of(memory, out);
  const Bytes more = bytes_of(memory, beside_out);
  bytes.insert(bytes.end(), more.begin(), more.end());
  return bytes;
}

/// q, kv and the page, in this order.
inline Bytes small_insert(DeviceMemory& memory, const Subject& subject) {
  constexpr int64_t kTokens = 3, kHeads = 9;
  const Tensor q = some_tensor(memory, DType::kBf16, {kTokens, kHeads, 512}, 3.0);
  const Tensor kv = some_tensor(memory, DType::kBf16, {kTokens, 512});
  const PagedCache cache(memory, KvFormat::kFp8DsMla, 512, 4, 1);
  run_small(subject, subject.ops->qnorm_rope_insert,
            {.q = q,
             .kv = kv,
             .rope = some_rope(memory, 64),
             .eps = 1e-6f,
             .positions = memory.put(std::vector<int32_t>{5, 1029, 70001}),
             .slot_mapping = memory.put(std::vector<int64_t>{2, 0, 3}),
             .window = cache.view()});
  Bytes out = bytes_of(memory, q);
  for (const Bytes& more :
       {bytes_of(memory, kv), memory.get(reinterpret_cast<const uint8_t*>(cache.view().base),
                                         cache.view().block_stride_bytes)})
    out.insert(out.end(), more.begin(), more.end());
  return out;
}

inline Bytes small_inverse_rope(DeviceMemory& memory, const Subject& subject) {
  const Tensor out = memory.tensor(DType::kBf16, {2, 9, 512});
  run_small(subject, subject.ops->inverse_rope,
            {.o = some_tensor(memory, DType::kBf16, {2, 9, 512}),
             .rope = some_rope(memory, 64),
             .positions = memory.put(std::vector<int32_t>{5, 70001}),
             .quantise = true,
             .out = out});
  return bytes_of(memory, out);
}

inline Bytes small_index_query(DeviceMemory& memory, const Subject& subject) {
  const Tensor out = memory.tensor(DType::kBf16, {2, 9, 128});
  const Tensor weights = memory.tensor(DType::kF32, {2, 9});
  run_small(subject, subject.ops->index_query,
            {.q = some_tensor(memory, DType::kBf16, {2, 9, 128}),
             .weights = some_tensor(memory, DType::kBf16, {2, 9}),
             .rope = some_rope(memory, 64),
             .positions = memory.put(std::vector<int32_t>{5, 70001}),
             .format = KvFormat::kIndexFp8,
             .hadamard = false,
             .q_out = out,
             .weights_out = weights});
  return bytes_of(memory, out);
}

/// A prompt of one sequence. `every`: a slot for every token, as if each ended an entry.
struct SmallCompress {
  int ratio;
  bool overlap;
  int64_t width;
  KvFormat format;
  int32_t tokens;
  bool every;
};
inline Bytes run_compress(const SmallCompress& what, Op<CompressParams> compress,
                          DeviceMemory& memory, const Subject& subject) {
  const int64_t half = (what.overlap ? 2 : 1) * what.width, tokens = what.tokens;
  const int ring = (what.overlap ? 2 : 1) * what.ratio;
  constexpr DType kAct = DType::kBf16;
  std::vector<int32_t> positions, sequence(static_cast<size_t>(tokens), 0);
  std::vector<int64_t> slots;
  for (int32_t p = 0; p < what.tokens; ++p) {
    positions.push_back(p);
    slots.push_back(what.every ? p : (p + 1) % what.ratio == 0 ? p / what.ratio : -1);
  }
  const PagedCache cache(memory, what.format, static_cast<int>(what.width), 64, 1);
  const int64_t slot_stride = ring * 2 * half;
  RatioPlan ratio{what.ratio, memory.put(slots), nullptr, nullptr};
  PlanView plan;
  plan.num_tokens = plan.max_query_len = what.tokens;
  plan.num_seqs = 1;
  plan.query_start = memory.put(std::vector<int32_t>{0, what.tokens});
  plan.context_len = memory.put(std::vector<int32_t>{0});
  plan.state_slot = memory.put(std::vector<int32_t>{0});
  plan.positions = memory.put(positions);
  plan.token_to_seq = memory.put(sequence);
  plan.ratios = {&ratio, 1};
  run_small(subject, compress,
            {.plan = &plan,
             .ratio = &ratio,
             .overlap = what.overlap,
             .gates = some_tensor(memory, DType::kF32, {tokens, 2 * half}, 1.5),
             .ape = some_tensor(memory, DType::kF32, {what.ratio, half}, 0.5),
             .norm = some_tensor(memory, kAct, {what.width}),
             .eps = 1e-6f,
             .rope = some_rope(memory, 32),
             .hadamard = false,
             .activation = kAct,
             .state = {reinterpret_cast<float*>(memory.raw(slot_stride * 4)), slot_stride, 1, ring,
                       static_cast<int32_t>(2 * half)},
             .cache = cache.view(),
             .entries = {}});
  return memory.get(reinterpret_cast<const uint8_t*>(cache.view().base),
                    cache.view().block_stride_bytes);
}

/// Two tokens a block of CompressPoolTiles, as in steps of many thousands.
class TwoTokensLaunch : public InterpreterLaunch {
 public:
  using InterpreterLaunch::InterpreterLaunch;
  template <typename Kernel>
  void run(int64_t blocks, typename Kernel::Params params) const {
    if constexpr (std::is_same_v<Kernel, gpu::CompressPoolTiles>) {
      params.tokens_per_block = 2;
      blocks = (params.tokens + 1) / 2 * params.channel_blocks;
    }
    InterpreterLaunch::run<Kernel>(blocks, params);
  }
};

template <int64_t kStreams>
Bytes small_hc_pre(DeviceMemory& memory, const Subject& subject) {
  constexpr int64_t kSums = (2 + kStreams) * kStreams;
  const Tensor y = memory.tensor(DType::kBf16, {2, 256});
  run_small(subject, subject.ops->hc_pre,
            {.streams = some_tensor(memory, DType::kBf16, {2, kStreams, 256}),
             .weights = {.fn = some_tensor(memory, DType::kF32, {kSums, kStreams * 256}, 0.05),
                         .base = some_tensor(memory, DType::kF32, {kSums}),
                         .scale = some_tensor(memory, DType::kF32, {3})},
             .norm_eps = 1e-6f,
             .hc_eps = 1e-6f,
             .sinkhorn_iters = 3,
             .y = y,
             .post = memory.tensor(DType::kF32, {2, kStreams}),
             .comb = memory.tensor(DType::kF32, {2, kStreams, kStreams})});
  return bytes_of(memory, y);
}

inline Bytes small_ragged_rows(DeviceMemory& memory, const Subject& subject) {
  constexpr int32_t kTokens = 300, kStride = 4;  // two rounds of RaggedIndptr
  std::vector<int32_t> lists(kTokens * kStride), lengths(kTokens);
  for (size_t i = 0; i < lists.size(); ++i) lists[i] = static_cast<int32_t>(i);
  for (size_t i = 0; i < lengths.size(); ++i) lengths[i] = static_cast<int32_t>(i % (kStride + 1));
  int32_t* indptr = reinterpret_cast<int32_t*>(memory.raw((kTokens + 1) * 4));
  run_small(subject, subject.ops->ragged_rows,
            {.rows = ListedRows{{}, memory.put(lists), kStride, memory.put(lengths)},
             .token_to_seq = nullptr,
             .num_tokens = kTokens,
             .indptr = indptr,
             .slots = reinterpret_cast<int32_t*>(memory.raw(kTokens * kStride * 4))});
  return memory.get(reinterpret_cast<const uint8_t*>(indptr), (kTokens + 1) * 4);
}

inline std::vector<SmallStep> small_steps() {
  return {
      {"rms_norm_1024", small_rms_norm<1024>},
      {"rms_norm_4096", small_rms_norm<4096>},
      {"rms_norm_7168", small_rms_norm<7168>},
      {"rms_norm_1024_beside", small_rms_norm_pair<1024>},
      {"rms_norm_4096_beside", small_rms_norm_pair<4096>},
      {"qnorm_rope_insert", small_insert},
      {"inverse_rope", small_inverse_rope},
      {"index_query", small_index_query},
      {"compress_4",
       [](DeviceMemory& memory, const Subject& subject) {
         return run_compress({4, true, 512, KvFormat::kFp8DsMla, 9, false}, subject.ops->compress,
                             memory, subject);
       }},
      {"compress_128",
       [](DeviceMemory& memory, const Subject& subject) {
         return run_compress({128, false, 512, KvFormat::kFp8DsMla, 129, false},
                             subject.ops->compress, memory, subject);
       }},
      {"compress_tiles",
       [](DeviceMemory& memory, const Subject& subject) {
         return run_compress({160, true, 64, KvFormat::kBf16, 321, false}, subject.ops->compress,
                             memory, subject);
       }},
      {"compress_two_tokens",
       [](DeviceMemory& memory, const Subject& subject) {
         return run_compress({16, false, 64, KvFormat::kBf16, 32, true},
                             gpu::compress<TwoTokensLaunch>, memory, subject);
       }},
      {"ragged_rows", small_ragged_rows},
      {"hc_pre_4", small_hc_pre<4>},
      {"hc_pre_8", small_hc_pre<8>},
  };
}

}  // namespace dsv4::testing
