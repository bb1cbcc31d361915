// One attention layer fed in steps, with everything that can be seen of it: taps, cache rows as
// bytes and as read back. And its weights as the oracle takes them.
#pragma once
#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <map>
#include <string>
#include <vector>

#include "tests/attention/layer_harness.h"
#include "tests/oracle/attention.h"
#include "tests/oracle/cache_layout.h"
#include "tests/testing/device_memory.h"

namespace dsv4::testing {

// A stored tensor as numbers, by the oracle's decoders.
inline oracle::Weight load_weight(const TensorSource& source, const std::string& name) {
  const ConstTensor tensor = source.get(name);
  oracle::Weight out;
  out.cols = tensor.shape[tensor.rank - 1];
  out.rows = tensor.num_elements() / out.cols;
  out.quantised = tensor.dtype == DType::kF8E4M3;
  out.values.resize(static_cast<size_t>(tensor.num_elements()));
  ConstTensor scale;
  if (out.quantised) scale = source.get(name.substr(0, name.rfind('.')) + ".scale");
  for (int64_t i = 0; i < tensor.num_elements(); ++i) {
    float& value = out.values[static_cast<size_t>(i)];
    if (out.quantised) {
      const int64_t block = i / out.cols / 128 * scale.shape[1] + i % out.cols / 128;
      value = static_cast<float>(oracle::e4m3_decode(tensor.as<uint8_t>()[i]) *
                                 oracle::e8m0_decode(scale.as<uint8_t>()[block]));
    } else if (tensor.dtype == DType::kBf16) {  // the upper half of a binary32
      const uint32_t wide = uint32_t{tensor.as<uint16_t>()[i]} << 16;
      std::memcpy(&value, &wide, sizeof(value));
    } else {
      EXPECT_EQ(tensor.dtype, DType::kF32) << name;
      value = tensor.as<float>()[i];
    }
  }
  return out;
}

inline oracle::AttentionWeights load_weights(const TensorSource& source, int ratio) {
  const auto load = [&](const char* name) {
    return load_weight(source, std::string("test.") + name);
  };
  const auto load_compressor = [&](const std::string& prefix) {
    return oracle::CompressorWeights{
        load((prefix + "wkv.weight").c_str()), load((prefix + "wgate.weight").c_str()),
        load((prefix + "ape").c_str()), load((prefix + "norm.weight").c_str())};
  };
  oracle::AttentionWeights out;
  out.wq_a = load("wq_a.weight");
  out.q_norm = load("q_norm.weight");
  out.wq_b = load("wq_b.weight");
  out.wkv = load("wkv.weight");
  out.kv_norm = load("kv_norm.weight");
  out.attn_sink = load("attn_sink");
  out.wo_a = load("wo_a.weight");
  out.wo_b = load("wo_b.weight");
  if (ratio != 0) out.compressor = load_compressor("compressor.");
  if (ratio == 4) {
    out.indexer.wq_b = load("indexer.wq_b.weight");
    out.indexer.weights_proj = load("indexer.weights_proj.weight");
    out.indexer.compressor = load_compressor("indexer.compressor.");
  }
  return out;
}

// Taps of one step, widened; names in the order in which they came.
class StepTaps final : public TapSink {
 public:
  struct Value {
    DType dtype;
    std::vector<int64_t> shape;
    oracle::Vector values;
  };
  void tap(std::string_view name, const ConstTensor& value) override {
    Value& kept = values_[std::string(name)];
    names_.emplace_back(name);
    kept.dtype = value.dtype;
    kept.shape.assign(value.shape.begin(), value.shape.begin() + value.rank);
    kept.values.resize(static_cast<size_t>(value.num_elements()));
    EXPECT_TRUE(value.is_contiguous()) << name;
    for (size_t i = 0; i < kept.values.size(); ++i) {
      if (value.dtype == DType::kI32) {
        kept.values[i] = value.as<int32_t>()[i];
      } else if (value.dtype == DType::kBf16) {
        kept.values[i] = static_cast<float>(value.as<Bf16>()[i]);
      } else {
        kept.values[i] = static_cast<double>(value.as<float>()[i]);
      }
    }
  }
  const std::vector<std::string>& names() const { return names_; }
  const Value& at(const std::string& name) const { return values_.at(name); }

 private:
  std::vector<std::string> names_;
  std::map<std::string, Value> values_;
};

inline void append(oracle::Matrix& to, const oracle::Vector& rows, int64_t cols) {
  to.cols = cols;
  to.rows += static_cast<int64_t>(rows.size()) / cols;
  to.values.insert(to.values.end(), rows.begin(), rows.end());
}

/// What a layer did with one sequence, by position; by entry for compressed and index rows.
/// `*_rows` are the cached rows as a reader gets them. Taps are checked for name, order, type and
/// shape, cached rows for the bytes of the oracle's encoder, on the way.
struct LayerRecord {
  oracle::Matrix x;  ///< [T, hidden]: the input
  oracle::Matrix q, kv, compressed, o, out;
  oracle::Matrix scores;  ///< [T, T / 4], -inf where not visible
  oracle::Matrix window_rows, compressed_rows, index_rows;
  std::vector<std::vector<int32_t>> topk;

  /// Feeds `hidden` [T, hidden_size] to a new sequence in steps of `chunks` tokens.
  void run(LayerHarness& harness, const std::vector<float>& hidden,
           std::span<const int64_t> chunks);

 private:
  void keep_step(LayerHarness& harness, const StepTaps& taps, int64_t tokens);
};

inline void LayerRecord::run(LayerHarness& harness, const std::vector<float>& hidden,
                             std::span<const int64_t> chunks) {
  const int64_t width = harness.config().hidden_size;
  append(x, oracle::Vector(hidden.begin(), hidden.end()), width);
  const SequenceId sequence = harness.pool().create().value();
  int64_t done = 0;
  for (int64_t tokens : chunks) {
    StepTaps taps;
    const auto begin = hidden.begin() + done * width;
    const std::vector<float> result =
        harness.forward(sequence, {begin, begin + tokens * width}, {&taps, nullptr});
    done += tokens;
    keep_step(harness, taps, tokens);
    ASSERT_EQ(q.rows, done) << "a step was not recorded";
    ASSERT_TRUE(std::ranges::equal(taps.at("attn_out").values, result));
  }
  ASSERT_EQ(done, x.rows);
  harness.pool().release(sequence);
}

// Names, shapes and types of the taps; rows of the caches against the oracle's encoder.
inline void LayerRecord::keep_step(LayerHarness& harness, const StepTaps& taps, int64_t tokens) {
  const ModelConfig& config = harness.config();
  const DType act = harness.layer().numerics().activation;
  const int64_t begin = q.rows, end = begin + tokens, dim = config.head_dim;
  const int ratio = harness.layer().kind().compress_ratio;
  const int64_t first_entry = ratio == 0 ? 0 : begin / ratio;
  const int64_t last_entry = ratio == 0 ? 0 : end / ratio;
  struct Expected {
    const char* name;
    DType dtype;
    std::vector<int64_t> shape;
  };
  std::vector<Expected> expected{{"attn_in", act, {tokens, config.hidden_size}},
                                 {"q", act, {tokens, config.num_heads, dim}},
                                 {"kv", act, {tokens, dim}}};
  if (ratio != 0) {
    expected.push_back({"compressed", DType::kF32, {last_entry - first_entry, dim}});
  }
  if (ratio == 4) {
    expected.push_back({"index_scores", DType::kF32, {tokens, last_entry}});
    expected.push_back({"topk", DType::kI32, {tokens, config.index_topk}});
  }
  expected.push_back({"attn_before_o", act, {tokens, config.num_heads, dim}});
  expected.push_back({"attn_out", act, {tokens, config.hidden_size}});
  ASSERT_EQ(taps.names().size(), expected.size());
  for (size_t i = 0; i < expected.size(); ++i) {
    ASSERT_EQ(taps.names()[i], expected[i].name);
    EXPECT_EQ(taps.at(expected[i].name).dtype, expected[i].dtype) << expected[i].name;
    ASSERT_EQ(taps.at(expected[i].name).shape, expected[i].shape) << expected[i].name;
  }
  EXPECT_TRUE(std::equal(taps.at("attn_in").values.begin(), taps.at("attn_in").values.end(),
                         x.row(begin).begin()));
  append(q, taps.at("q").values, config.num_heads * dim);
  append(kv, taps.at("kv").values, dim);
  append(o, taps.at("attn_before_o").values, config.num_heads * dim);
  append(out, taps.at("attn_out").values, config.hidden_size);

  // Rows that the step wrote, where the plan put them. With `row` [elems], the bytes must be those
  // of the oracle's encoder.
  const auto read_row = [&](std::vector<std::byte>& image, const CacheView& cache, int64_t slot,
                            const double* row) {
    const oracle::RowLayout layout = oracle_layout(cache.format);
    const oracle::Page page{reinterpret_cast<uint8_t*>(image.data()) +
                                slot / cache.rows_per_block * cache.block_stride_bytes,
                            cache.rows_per_block, layout, cache.row_elems};
    const int64_t at = slot % cache.rows_per_block;
    if (row != nullptr) {
      std::vector<uint8_t> bytes(
          static_cast<size_t>(oracle::page_bytes(layout, 1, cache.row_elems)));
      const oracle::Page single{bytes.data(), 1, layout, cache.row_elems};
      oracle::write_row(single, 0, {row, static_cast<size_t>(cache.row_elems)});
      EXPECT_EQ(oracle::row_bytes(page, at), oracle::row_bytes(single, 0))
          << kv_format_name(cache.format) << " row in slot " << slot << ", step at " << begin;
    }
    return oracle::read_row(page, at);
  };
  const PlanView& plan = harness.plan().view();
  const LayerCaches caches = harness.pool().caches(0);
  const std::vector<int32_t> positions = harness.download(plan.positions, tokens);
  const std::vector<int64_t> window_slots = harness.download(plan.window_slot_mapping, tokens);
  std::vector<std::byte> window = harness.download(caches.window);
  for (int64_t t = 0; t < tokens; ++t) {
    const auto i = static_cast<size_t>(t);
    ASSERT_EQ(positions[i], begin + t);
    append(window_rows, read_row(window, caches.window, window_slots[i], kv.row(begin + t).data()),
           dim);
  }
  if (ratio == 0) return;
  append(compressed, taps.at("compressed").values, dim);
  const std::vector<int64_t> entry_slots =
      harness.download(plan.ratio(ratio)->slot_mapping, tokens);
  std::vector<std::byte> compressed_image = harness.download(caches.compressed), index_image;
  if (ratio == 4) index_image = harness.download(caches.index);
  int64_t entry = first_entry;
  for (int64_t t = 0; t < tokens; ++t) {
    const int64_t slot = entry_slots[static_cast<size_t>(t)];
    ASSERT_EQ(slot >= 0, (begin + t + 1) % ratio == 0) << begin + t;
    if (slot < 0) continue;
    append(compressed_rows,
           read_row(compressed_image, caches.compressed, slot, compressed.row(entry++).data()),
           dim);
    if (ratio == 4)
      append(index_rows, read_row(index_image, caches.index, slot, nullptr), config.index_head_dim);
  }
  ASSERT_EQ(entry, last_entry);
  if (ratio != 4) return;
  const int64_t width = x.rows / 4;  // rows of the tap grow with the sequence
  for (int64_t t = 0; t < tokens; ++t) {
    const int64_t visible = (begin + t + 1) / 4;
    oracle::Vector row(static_cast<size_t>(width), -std::numeric_limits<double>::infinity());
    std::copy_n(taps.at("index_scores").values.begin() + t * last_entry, last_entry, row.begin());
    for (int64_t j = visible; j < width; ++j) {
      ASSERT_EQ(row[static_cast<size_t>(j)], -std::numeric_limits<double>::infinity());
    }
    append(scores, row, width);
    const auto list = taps.at("topk").values.begin() + t * config.index_topk;
    const int64_t length = std::min<int64_t>(visible, config.index_topk);
    topk.emplace_back(list, list + length);
    for (int64_t i = length; i < config.index_topk; ++i) ASSERT_EQ(list[i], -1);
  }
}

}  // namespace dsv4::testing
