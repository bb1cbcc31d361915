// Our products and indexer scores beside DeepGEMM's kernels in one process. Built where CMake is
// given a checkout of DeepGEMM (DSV4_DEEP_GEMM_SOURCE).
//
//   cuda_pair_gemm_bench [--op product|paged|prefill]... [--tokens M[,M...]] [--products f32|fp8]
//                        [--load SECONDS] [--json FILE]
//
// --op      product: wo_a's grouped product, wq_b and wo_b; paged: scores of a decode; prefill:
//           scores of every token against every key; default: all
// --tokens  rows of the products
// --products  how ours are summed (Products); fp8: codes are handed over as to DeepGEMM
// --load    keeps the GPU busy for so long before the first row, and for a third of a second with a
//           row's own calls before it
//
// Both sides compute the same numbers. DeepGEMM is handed E4M3 codes and scales in the layout it
// wants; ours takes codes of the indexer's queries where it knows them, as the layer hands them
// over, and of products with --products fp8; else bf16 activations, exact images of the codes: wq_b
// and wo_b quantise them, which DeepGEMM's time leaves to another kernel. Its schedule of paged
// scores runs once per step and is not counted. Keys of the prefill are contiguous there, in pages
// here. Weights and keys rotate through 256 MB; the clock is that of cuda_attend_cases.h.
//
// Results: bf16 outputs are rounded on both sides, norms of a row differ by less than 2^-7; E4M3
// matrix instructions keep 13 bits or more of a sum, so rows of scores differ by less than 2^-8.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <memory>
#include <nlohmann/json.hpp>
#include <numeric>
#include <random>
#include <string>
#include <string_view>
#include <vector>

#include "backends/nvidia/candidates.h"
#include "backends/nvidia/cuda_device.h"
#include "backends/nvidia/ops/gpu_check.h"
#include "bench/cuda_attend_cases.h"
#include "bench/cuda_pair_kernels.h"
#include "bench/deep_gemm.h"
#include "cache/kv_format.h"
#include "core/checked_math.h"
#include "core/fail.h"
#include "core/numbers.h"
#include "dsv4/backend.h"

namespace dsv4::nvidia::bench {
namespace {

constexpr int64_t kColdBytes = int64_t{256} << 20;
constexpr double kRowLoadSeconds = 0.33, kProductBound = 0x1p-7, kScoreBound = 0x1p-8;
constexpr int kHeads = 64, kIndexDim = 128, kPageRows = 64;

struct Shape {
  const char* name;
  int groups, rows, cols;
  bool quantise;
};
constexpr Shape kShapes[] = {
    {"flash wo_a", 8, 1024, 4096, false}, {"pro wo_a", 16, 1024, 4096, false},
    {"flash wq_b", 1, 32768, 1024, true}, {"flash wo_b", 1, 4096, 8192, true},
    {"pro wq_b", 1, 65536, 1536, true},   {"pro wo_b", 1, 7168, 16384, true},
};
struct Scores {
  int batch, tokens_per_seq, entries;
};
constexpr Scores kPaged[] = {
    {1, 1, 2048},    {1, 1, 16384}, {1, 1, 65536},  {1, 1, 262144}, {16, 1, 2048},  {16, 1, 16384},
    {16, 1, 65536},  {64, 1, 2048}, {64, 1, 16384}, {64, 1, 65536}, {128, 1, 2048}, {128, 1, 16384},
    {128, 1, 65536}, {1, 2, 65536}, {16, 2, 16384}, {64, 2, 16384}, {64, 2, 65536}, {128, 2, 16384},
};
constexpr Scores kPrefill[] = {
    {1, 1024, 2048}, {1, 1024, 16384}, {1, 1024, 32768},
    {1, 4096, 2048}, {1, 4096, 16384}, {1, 4096, 32768},
};

struct Options {
  std::string ops, json;
  Products products = Products::kF32;
  std::vector<int> tokens{1, 8, 64, 128, 512, 4096};
  double load_seconds = 0;
};

// E4M3 codes of normal numbers.
const std::vector<std::byte>& code_sample() {
  static const std::vector<std::byte> sample = [] {
    std::vector<std::byte> out(size_t{3} << 16);  // no power of two: rows differ
    std::mt19937 random(5);
    std::normal_distribution<float> normal(0, 16);
    for (std::byte& code : out) code = static_cast<std::byte>(f32_to_e4m3(normal(random)));
    return out;
  }();
  return sample;
}

int sets_for(int64_t bytes) {
  return static_cast<int>(std::clamp<int64_t>(ceil_div(kColdBytes, bytes), 1, 64));
}

class Bench {
 public:
  explicit Bench(const Options& options)
      : device_(open_cuda_device(0)),
        ops_(make_ops(find_devices(Platform::kCuda).devices.at(0).capability, "")),
        stream_(stream_of(device_->default_stream())),
        products_(options.products),
        load_seconds_(options.load_seconds) {
    std::printf("%s\n%-32s | ours us | DeepGEMM us | its time over ours\n",
                device_->description().c_str(), "");
  }

  void product(const Shape& shape, int tokens) {
    Memory memory(*device_);
    const int64_t w_bytes = int64_t{shape.groups} * shape.rows * shape.cols;
    const int64_t x_elems = int64_t{tokens} * shape.groups * shape.cols;
    const int64_t out_elems = int64_t{tokens} * shape.groups * shape.rows;
    const int sets = sets_for(w_bytes);
    std::byte* w = memory.fill(code_sample(), w_bytes * sets);
    std::byte* codes = memory.fill(code_sample(), x_elems);
    std::byte* x = memory.take(2 * x_elems);
    std::byte *our_out = memory.take(2 * out_elems), *their_out = memory.take(2 * out_elems);
    const int scale_tokens = deep_gemm::x_scale_tokens(tokens);
    std::mt19937 random(6);
    std::vector<float> x_scales(x_elems / tokens / 128 * scale_tokens), w_scales(w_bytes / 16384);
    std::vector<uint8_t> w_scale_bytes(w_scales.size());
    for (float& scale : x_scales) scale = std::ldexp(1.0f, -static_cast<int>(random() % 4));
    for (size_t i = 0; i < w_scales.size(); ++i) {
      w_scale_bytes[i] = static_cast<uint8_t>(120 + random() % 4);
      w_scales[i] = std::ldexp(1.0f, w_scale_bytes[i] - 127);
    }
    const float* x_scale = memory.put(x_scales);
    const bool handed = products_ == Products::kFp8;
    const int64_t our_stride = row_scale_stride(tokens);
    float* our_x_scale = memory.put(std::vector<float>(x_elems / tokens / 128 * our_stride));
    DSV4_CUDA_CHECK(cudaMemcpy2DAsync(our_x_scale, our_stride * 4, x_scale, scale_tokens * 4,
                                      tokens * 4, x_elems / tokens / 128, cudaMemcpyDeviceToDevice,
                                      stream_));
    const float* w_scale = memory.put(w_scales);
    const uint8_t* scale_bytes = memory.put(w_scale_bytes);
    expand_codes(codes, x_scale, scale_tokens, tokens, shape.groups, shape.cols, x, stream_);

    ScratchLimits limits;
    limits.max_tokens = tokens;
    limits.max_cols = shape.cols;
    limits.max_rows = shape.rows;
    if (shape.groups > 1) {
      limits.num_heads = shape.groups;
      limits.head_dim = shape.cols;
    }
    const int64_t scratch_bytes = ops_.scratch_bytes(limits);
    std::byte* scratch = memory.take(scratch_bytes);
    std::vector<LinearProblem> problems(static_cast<size_t>(shape.groups));
    const auto ours = [&](int64_t set) {
      for (int64_t g = 0; g < shape.groups; ++g) {
        ConstTensor in(x + 2 * g * shape.cols, DType::kBf16, {tokens, shape.cols});
        if (handed) in = ConstTensor(codes + g * shape.cols, DType::kF8E4M3, {tokens, shape.cols});
        in.strides[0] = int64_t{shape.groups} * shape.cols;
        Tensor out(our_out + 2 * g * shape.rows, DType::kBf16, {tokens, shape.rows});
        out.strides[0] = int64_t{shape.groups} * shape.rows;
        const int64_t matrix = int64_t{shape.rows} * shape.cols;
        problems[static_cast<size_t>(g)] = {in,
                                            {.dtype = DType::kF8E4M3,
                                             .data = w + set * w_bytes + g * matrix,
                                             .rows = shape.rows,
                                             .cols = shape.cols,
                                             .row_stride = shape.cols,
                                             .scale = scale_bytes + g * matrix / 16384,
                                             .scale_stride = shape.cols / 128},
                                            out};
        if (handed) {
          problems[static_cast<size_t>(g)].x_scale = {
              our_x_scale + g * shape.cols / 128 * our_stride, our_stride};
        }
      }
      Arena arena(scratch, scratch_bytes);
      ops_.linear({.problems = problems, .quantise_input = shape.quantise, .products = products_},
                  {device_->default_stream(), &arena, &ops_});
    };
    const auto theirs = [&](int64_t set) {
      if (!deep_gemm::multiply({shape.groups, tokens, shape.rows, shape.cols, codes, x_scale,
                                w + set * w_bytes, w_scale, their_out},
                               stream_)) {
        fail(ErrorCode::kUnsupported, shape.name, ": DeepGEMM's kernel was not instantiated");
      }
    };
    poison(our_out, 2 * out_elems);
    poison(their_out, 2 * out_elems);
    const auto compared = [&](float* worst) {
      compare_rows(DType::kBf16, {our_out, shape.rows}, {their_out, shape.rows},
                   int64_t{tokens} * shape.groups, shape.rows, worst, stream_);
    };
    measure(memory, "product", concat(shape.name, ", ", tokens, " tokens"), sets, ours, theirs,
            compared, kProductBound, 2.0 * static_cast<double>(x_elems) * shape.rows,
            static_cast<double>(w_bytes + x_elems + 2 * out_elems));
  }

  void scores(const Scores& which, bool prefill) {
    Memory memory(*device_);
    constexpr int64_t kPage = kPageRows * (kIndexDim + 4), kStride = (kPage + 575) / 576 * 576;
    const int64_t pages = which.entries / kPageRows, tokens = which.batch * which.tokens_per_seq;
    const int64_t cache_pages = which.batch * pages, cache_bytes = cache_pages * kStride;
    const int64_t q_elems = tokens * kHeads * kIndexDim;
    const int64_t their_stride =
        prefill ? deep_gemm::logits_stride(which.entries) : int64_t{which.entries};
    const int sets = sets_for(cache_bytes);

    // A page is codes and scales; every page is the same few again, in another place.
    std::mt19937 random(7);
    constexpr int kSamplePages = 48;
    std::vector<std::byte> sample(static_cast<size_t>(kSamplePages * kStride));
    for (int64_t page = 0; page < kSamplePages; ++page) {
      std::byte* at = sample.data() + page * kStride;
      std::memcpy(at, code_sample().data() + 8 * page, kPageRows * kIndexDim);
      for (int64_t row = 0; row < kPageRows; ++row) {
        const float scale = std::ldexp(1.0f, -4 - static_cast<int>(random() % 3));
        std::memcpy(at + kPageRows * kIndexDim + 4 * row, &scale, 4);
      }
    }
    std::byte* caches = memory.fill(sample, cache_bytes * sets);
    std::byte* q_codes = memory.fill(code_sample(), q_elems);
    std::byte* q = memory.take(2 * q_elems);
    const float* ones = memory.put(std::vector<float>(static_cast<size_t>(tokens * kHeads), 1.0f));
    expand_codes(q_codes, ones, 0, tokens * kHeads, 1, kIndexDim, q, stream_);
    std::normal_distribution<float> normal(0, 0.1f);
    std::vector<float> drawn(static_cast<size_t>(tokens * kHeads));
    for (float& weight : drawn) weight = normal(random);
    const float* weights = memory.put(drawn);
    // The prefill's pages lie in order, so that its contiguous keys are those of the pages.
    std::vector<int32_t> table(static_cast<size_t>(cache_pages)), seqs;
    std::iota(table.begin(), table.end(), 0);
    if (!prefill) std::shuffle(table.begin(), table.end(), random);
    for (int64_t t = 0; t < tokens; ++t) {
      seqs.push_back(static_cast<int32_t>(t / which.tokens_per_seq));
    }
    const int32_t* tables = memory.put(table);
    const int32_t* token_to_seq = memory.put(seqs);
    const int32_t* begin = memory.put(std::vector<int32_t>(static_cast<size_t>(tokens), 0));
    const int32_t* end =
        memory.put(std::vector<int32_t>(static_cast<size_t>(tokens), which.entries));
    auto* our_logits = reinterpret_cast<float*>(memory.take(4 * tokens * which.entries));
    auto* their_logits = reinterpret_cast<float*>(memory.take(4 * tokens * their_stride));

    ScratchLimits limits{.max_tokens = tokens,
                         .index_heads = kHeads,
                         .index_dim = kIndexDim,
                         .max_entries = which.entries};
    const int64_t scratch_bytes = ops_.scratch_bytes(limits);
    std::byte* scratch = memory.take(std::max<int64_t>(scratch_bytes, 1));
    const auto ours = [&](int64_t set) {
      Arena arena(scratch, scratch_bytes);
      const bool handed = ops_.index_takes_e4m3;
      ops_.index_logits(
          {.q = ConstTensor(handed ? q_codes : q, handed ? DType::kF8E4M3 : DType::kBf16,
                            {tokens, kHeads, kIndexDim}),
           .weights = ConstTensor(weights, DType::kF32, {tokens, kHeads}),
           .token_to_seq = token_to_seq,
           .end = end,
           .max_end = which.entries,
           .blocks = {tables, pages, static_cast<int32_t>(pages), 4 * kPageRows},
           .cache = {.base = caches + set * cache_bytes,
                     .block_stride_bytes = kStride,
                     .num_blocks = static_cast<int32_t>(cache_pages),
                     .rows_per_block = kPageRows,
                     .format = KvFormat::kIndexFp8,
                     .row_elems = kIndexDim},
           .logits = Tensor(our_logits, DType::kF32, {tokens, which.entries})},
          {device_->default_stream(), &arena, &ops_});
    };
    deep_gemm::PagedLogits paged{};
    std::vector<std::pair<std::byte*, std::byte*>> contiguous;  // keys and scales of a set
    if (prefill) {
      for (int64_t set = 0; set < sets; ++set)
        contiguous.push_back(unpack(memory, caches + set * cache_bytes, pages, kStride));
    } else {
      paged = {which.batch,
               which.tokens_per_seq,
               which.entries,
               q_codes,
               weights,
               caches,
               static_cast<int>(cache_pages),
               kStride,
               tables,
               end,
               their_logits,
               reinterpret_cast<int32_t*>(memory.take(deep_gemm::kScheduleBytes))};
      deep_gemm::schedule(paged, stream_);
    }
    const auto theirs = [&](int64_t set) {
      if (prefill) {
        const auto& keys = contiguous[static_cast<size_t>(set)];
        deep_gemm::score({static_cast<int>(tokens), which.entries, q_codes, weights, keys.first,
                          reinterpret_cast<const float*>(keys.second), begin, end, their_logits},
                         stream_);
      } else {
        paged.pages = caches + set * cache_bytes;
        deep_gemm::score(paged, stream_);
      }
    };
    poison(our_logits, 4 * tokens * which.entries);
    poison(their_logits, 4 * tokens * their_stride);
    const auto compared = [&](float* worst) {
      compare_rows(DType::kF32, {our_logits, which.entries}, {their_logits, their_stride}, tokens,
                   which.entries, worst, stream_);
    };
    measure(memory, prefill ? "prefill" : "paged",
            concat("logits ", which.batch, " x ", which.tokens_per_seq, " x ", which.entries), sets,
            ours, theirs, compared, kScoreBound, 2.0 * static_cast<double>(q_elems) * which.entries,
            static_cast<double>(cache_pages * kPage + q_elems + 4 * tokens * which.entries));
  }

  bool agreed() const { return agreed_; }
  void save(const std::string& path) const {
    const nlohmann::json document{{"device", device_->description()}, {"rows", rows_}};
    std::ofstream(path) << document.dump(1) << "\n";
  }

 private:
  void poison(void* data, int64_t bytes) {
    DSV4_CUDA_CHECK(cudaMemsetAsync(data, 0xff, static_cast<size_t>(bytes), stream_));
  }

  // Keys of pages in order, and their scales, without what is between them.
  std::pair<std::byte*, std::byte*> unpack(Memory& memory, const std::byte* pages, int64_t count,
                                           int64_t stride) {
    constexpr size_t kKeys = kPageRows * kIndexDim, kScales = 4 * kPageRows;
    const auto rows = static_cast<size_t>(count);
    std::byte* keys = memory.take(count * static_cast<int64_t>(kKeys));
    std::byte* scales = memory.take(count * static_cast<int64_t>(kScales));
    DSV4_CUDA_CHECK(cudaMemcpy2DAsync(keys, kKeys, pages, static_cast<size_t>(stride), kKeys, rows,
                                      cudaMemcpyDeviceToDevice, stream_));
    DSV4_CUDA_CHECK(cudaMemcpy2DAsync(scales, kScales, pages + kKeys, static_cast<size_t>(stride),
                                      kScales, rows, cudaMemcpyDeviceToDevice, stream_));
    return {keys, scales};
  }

  template <typename Ours, typename Theirs, typename Compared>
  void measure(Memory& memory, const char* op, const std::string& name, int sets, const Ours& ours,
               const Theirs& theirs, const Compared& compared, double bound, double flop,
               double bytes) {
    float* worst = memory.put(std::vector<float>{0});
    ours(0);
    theirs(0);
    compared(worst);
    float difference = 0;
    DSV4_CUDA_CHECK(cudaMemcpyAsync(&difference, worst, 4, cudaMemcpyDeviceToHost, stream_));
    DSV4_CUDA_CHECK(cudaStreamSynchronize(stream_));
    const std::vector<double> us = medians_us(*device_, sets, load_seconds_, {ours, theirs});
    load_seconds_ = std::min(load_seconds_, kRowLoadSeconds);
    const double our_us = us[0], their_us = us[1];
    const bool agreed = difference <= bound;
    agreed_ = agreed_ && agreed;
    std::printf("%-32s | %8.2f (%4.0f TFLOP/s, %4.0f GB/s) | %8.2f | %5.2fx | differ by %.5f%s\n",
                name.c_str(), our_us, flop / our_us / 1e6, bytes / our_us / 1e3, their_us,
                their_us / our_us, static_cast<double>(difference), agreed ? "" : " TOO MUCH");
    std::fflush(stdout);
    rows_.push_back({{"op", op},
                     {"case", name},
                     {"flop", flop},
                     {"bytes", bytes},
                     {"ours_us", our_us},
                     {"deep_gemm_us", their_us},
                     {"difference", difference}});
  }

  std::unique_ptr<Device> device_;
  Ops ops_;
  cudaStream_t stream_;
  Products products_;
  double load_seconds_;
  bool agreed_ = true;
  nlohmann::json rows_ = nlohmann::json::array();
};

Options parse(int argc, char** argv) {
  Options options;
  for (int i = 1; i < argc; i += 2) {
    const std::string_view name = argv[i];
    if (i + 1 == argc) fail(ErrorCode::kInvalidArgument, name, " needs a value");
    const char* value = argv[i + 1];
    if (name == "--op") {
      options.ops += concat(" ", value);
    } else if (name == "--tokens") {
      options.tokens = parse_list(value);
    } else if (name == "--products") {
      const std::optional<Products> products = parse_products(value);
      if (!products) fail(ErrorCode::kInvalidArgument, "--products ", value);
      options.products = *products;
    } else if (name == "--load") {
      options.load_seconds = std::strtod(value, nullptr);
    } else if (name == "--json") {
      options.json = value;
    } else {
      fail(ErrorCode::kInvalidArgument, "unknown option ", name, " ", value);
    }
  }
  return options;
}

/// False where results differ.
bool run(const Options& options) {
  Bench bench(options);
  const auto wanted = [&](const char* op) {
    return options.ops.empty() || options.ops.find(op) != std::string::npos;
  };
  if (wanted("product")) {
    for (const Shape& shape : kShapes) {
      for (int tokens : options.tokens) bench.product(shape, tokens);
    }
  }
  if (wanted("paged")) {
    for (const Scores& which : kPaged) bench.scores(which, false);
  }
  if (wanted("prefill")) {
    for (const Scores& which : kPrefill) bench.scores(which, true);
  }
  if (!options.json.empty()) bench.save(options.json);
  return bench.agreed();
}

}  // namespace
}  // namespace dsv4::nvidia::bench

int main(int argc, char** argv) {
  using namespace dsv4::nvidia::bench;
  try {
    if (run(parse(argc, argv))) return 0;
    std::fprintf(stderr, "cuda_pair_gemm_bench: results differ by more than rounding explains\n");
  } catch (const std::exception& error) {
    std::fprintf(stderr, "cuda_pair_gemm_bench: %s\n", error.what());
  }
  return 1;
}
