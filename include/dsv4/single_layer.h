// One attention layer with caches of its own: for tests, benchmarks, conformance runs, and engines
// that start with the layer before they take the rest.
#pragma once
#include <memory>
#include <string>

#include "dsv4/attention.h"
#include "dsv4/checkpoint.h"
#include "dsv4/engine.h"

namespace dsv4 {

/// Thread-compatible.
class SingleLayer {
 public:
  /// @param config   geometry; its layer schedule is not used.
  /// @param kind     of the layer: config.layer_kind(n), or layer_kind_of(config, "csa").
  /// @param source   holds the tensors named prefix + "wq_a.weight" and so on; kept by the layer.
  /// @throws Error as Engine::load.
  static std::unique_ptr<SingleLayer> create(const ModelConfig& config, const LayerKind& kind,
                                             std::unique_ptr<TensorSource> source,
                                             const std::string& prefix,
                                             const EngineOptions& options);
  ~SingleLayer();

  const ModelConfig& config() const;
  const EngineOptions& options() const;
  const LayerKind& kind() const;
  Device& device();
  KvCachePool& pool();
  std::string description() const;
  int64_t workspace_bytes() const;

  /// Appends the tokens of `batch` (whose rows lie in `hidden` in that order) and computes the
  /// layer's output.
  /// @param hidden  [tokens, hidden_size] f32 or bf16, host memory; converted to the activation
  /// type of the numerics.
  /// @param out     [tokens, hidden_size] f32 or bf16, host memory.
  /// @throws Error kInvalidArgument: shapes, limits; kOutOfMemory: the pool has no room.
  void forward(std::span<const BatchEntry> batch, ConstTensor hidden, Tensor out,
               const ForwardOptions& options = {});
  /// The same on memory of the device, without copies.
  /// @param hidden  [tokens, hidden_size] of the numerics' activation type, contiguous; read only.
  /// @param out     [tokens, hidden_size], same dtype; must not overlap `hidden`.
  /// @param stream  of the device. Asynchronous on it; steps of a layer must be ordered with each
  ///                other.
  void forward_on_device(std::span<const BatchEntry> batch, ConstTensor hidden, Tensor out,
                         Stream stream, const ForwardOptions& options = {});

 private:
  SingleLayer();
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

/// The kind named "sliding", "csa" or "hca" with the config's rope parameters. @throws Error
/// kInvalidArgument.
LayerKind layer_kind_of(const ModelConfig& config, const std::string& name);

}  // namespace dsv4
