#include "model/place_weights.h"

namespace dsv4 {
namespace {

class Placer {
 public:
  Placer(Device& device, std::vector<Buffer>& owned) : device_(device), owned_(owned) {}

  void place(ConstTensor& tensor) {
    if (tensor) tensor.data = copy(tensor.data, tensor.num_bytes());
  }
  void place(Weight& weight) {
    if (!weight) return;
    weight.data = copy(weight.data, weight.num_bytes());
    if (weight.scale == nullptr) return;
    const bool fp4 = weight.dtype == DType::kF4E2M1;
    const int64_t scale_rows = fp4 ? weight.rows : ceil_div(weight.rows, weight.block_rows);
    weight.scale =
        static_cast<const uint8_t*>(copy(weight.scale, scale_rows * weight.scale_stride));
  }
  void place(CompressorWeights& weights) {
    place(weights.wkv);
    place(weights.wgate);
    place(weights.ape);
    place(weights.norm);
  }
  void place(AttentionWeights& weights) {
    for (Weight* weight :
         {&weights.wq_a, &weights.wq_b, &weights.wkv, &weights.wo_a, &weights.wo_b})
      place(*weight);
    for (ConstTensor* tensor : {&weights.q_norm, &weights.kv_norm, &weights.attn_sink})
      place(*tensor);
    if (weights.compressor) place(*weights.compressor);
    if (weights.indexer) {
      place(weights.indexer->wq_b);
      place(weights.indexer->weights_proj);
      place(weights.indexer->compressor);
    }
  }
  void place(HcWeights& weights) {
    place(weights.fn);
    place(weights.base);
    place(weights.scale);
  }
  void place(ExpertWeights& weights) {
    place(weights.w1);
    place(weights.w3);
    place(weights.w2);
  }
  void place(BlockWeights& weights) {
    place(weights.attn_norm);
    place(weights.ffn_norm);
    place(weights.hc_attn);
    place(weights.hc_ffn);
    place(weights.attn);
    place(weights.ffn.gate);
    place(weights.ffn.bias);
    place(weights.ffn.tid2eid);
    for (ExpertWeights& expert : weights.ffn.experts) place(expert);
    place(weights.ffn.shared);
  }

 private:
  const void* copy(const void* host, int64_t bytes) {
    Buffer buffer = device_.allocate(bytes);
    const Stream stream = device_.default_stream();
    device_.copy_to_device(buffer.data(), host, bytes, stream);
    device_.synchronize(stream);
    owned_.push_back(std::move(buffer));
    return owned_.back().data();
  }

  Device& device_;
  std::vector<Buffer>& owned_;
};

}  // namespace

AttentionWeights place_weights(const AttentionWeights& weights, Device& device,
                               std::vector<Buffer>& owned) {
  AttentionWeights out = weights;
  if (!device.reads_host_memory()) Placer(device, owned).place(out);
  return out;
}

ModelWeights place_weights(const ModelWeights& weights, Device& device,
                           std::vector<Buffer>& owned) {
  ModelWeights out = weights;
  if (device.reads_host_memory()) return out;
  Placer placer(device, owned);
  placer.place(out.embed);
  placer.place(out.head);
  placer.place(out.norm);
  placer.place(out.hc_head);
  for (BlockWeights& block : out.layers) placer.place(block);
  for (MtpWeights& mtp : out.mtp) {
    placer.place(mtp.block);
    placer.place(mtp.e_proj);
    placer.place(mtp.h_proj);
    for (ConstTensor* tensor : {&mtp.enorm, &mtp.hnorm, &mtp.norm}) placer.place(*tensor);
    placer.place(mtp.hc_head);
  }
  return out;
}

}  // namespace dsv4
