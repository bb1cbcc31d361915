// dsv4.SingleLayer: one attention layer with caches of its own.

#include <mutex>

#include "dsv4/single_layer.h"
#include "engine_options.h"
#include "module.h"
#include "op_call.h"

namespace dsv4::python {

using namespace nb::literals;

namespace {

struct PyLayer {
  std::unique_ptr<SingleLayer> layer;
  std::mutex mutex;
};

template <typename F>
auto alone(PyLayer& self, F&& f) {
  const nb::gil_scoped_release no_gil;
  const std::lock_guard lock(self.mutex);
  return f();
}

PyLayer* create(const ModelConfig& config, const LayerKind& kind,
                std::unique_ptr<TensorSource> source, const std::string& prefix,
                const EngineOptions& options) {
  auto out = std::make_unique<PyLayer>();
  out->layer = SingleLayer::create(config, kind, std::move(source), prefix, options);
  return out.release();
}

PyLayer* from_formula(const ModelConfig& config, const std::variant<std::string, LayerKind>& which,
                      uint64_t seed, const nb::kwargs& given) {
  const EngineOptions options = engine_options(given);
  const LayerKind kind = std::holds_alternative<LayerKind>(which)
                             ? std::get<LayerKind>(which)
                             : layer_kind_of(config, std::get<std::string>(which));
  const nb::gil_scoped_release no_gil;
  const std::string prefix = concat(kind.name(), ".");
  const FormulaStorage storage = options.numerics.quantise_linear_input
                                     ? FormulaStorage::kReleased
                                     : FormulaStorage::kBf16Values;
  return create(config, kind,
                formula_source(expected_attention_tensors(config, kind, prefix), seed, storage),
                prefix, options);
}

PyLayer* from_checkpoint(const std::string& directory, int layer, const nb::kwargs& given) {
  const EngineOptions options = engine_options(given);
  const nb::gil_scoped_release no_gil;
  const ModelConfig config = ModelConfig::load(directory);
  if (layer < 0 || layer >= config.num_hidden_layers) {
    fail(ErrorCode::kInvalidArgument, "layer ", layer, ": the model has layers 0 to ",
         config.num_hidden_layers - 1);
  }
  return create(config, config.layer_kind(layer), open_checkpoint(directory, config),
                concat("layers.", layer, ".attn."), options);
}

void forward(PyLayer& self, const std::vector<std::pair<SequenceId, int32_t>>& batch,
             nb::handle hidden, nb::handle out, StreamArgument stream) {
  std::vector<BatchEntry> entries;
  for (const auto& [sequence, tokens] : batch) entries.push_back({sequence, tokens});
  OpCall call(stream);
  const ConstTensor from = call.input(hidden, "hidden", {DType::kBf16, DType::kF32}, {kAny, kAny});
  const Tensor to = call.output(out, "out", {DType::kBf16, DType::kF32}, {kAny, kAny});
  const DeviceId given = call.device_id();
  const DeviceId own = self.layer->device().id();
  alone(self, [&] {
    if (given == own && own.platform != Platform::kCpu) {
      self.layer->forward_on_device(entries, from, to, call.device_stream());
    } else if (given.platform == Platform::kCpu) {
      self.layer->forward(entries, from, to);
    } else {
      fail(ErrorCode::kInvalidArgument, "hidden is on ", given.str(), ", the layer on ", own.str());
    }
  });
}

}  // namespace

void bind_single_layer(nb::module_& module) {
  static const std::string formula_text =
      std::string(
          "A layer of `config`'s geometry with made weights.\n\n"
          "kind               'sliding', 'csa', 'hca' or a LayerKind\n"
          "seed               of the weights\n") +
      kOptionsText;
  static const std::string checkpoint_text =
      std::string("Attention of layer `layer` of a model folder.\n\n") + kOptionsText;
  nb::class_<PyLayer>(module, "SingleLayer",
                      "One attention layer with caches of its own. Calls of several threads wait "
                      "for each other; long ones\n"
                      "run without the GIL.")
      .def_static("from_formula", &from_formula, "config"_a, "kind"_a, "seed"_a = 1, "options"_a,
                  formula_text.c_str(), nb::rv_policy::take_ownership)
      .def_static("from_checkpoint", &from_checkpoint, "directory"_a, "layer"_a, "options"_a,
                  checkpoint_text.c_str(), nb::rv_policy::take_ownership)
      .def_prop_ro("config", [](const PyLayer& self) { return self.layer->config(); })
      .def_prop_ro("kind", [](const PyLayer& self) { return self.layer->kind(); })
      .def_prop_ro("description", [](const PyLayer& self) { return self.layer->description(); })
      .def_prop_ro(
          "activation",
          [](const PyLayer& self) { return dtype_name(self.layer->options().numerics.activation); },
          "'bf16', or 'f32' in exact numerics.")
      .def_prop_ro("workspace_bytes",
                   [](const PyLayer& self) { return self.layer->workspace_bytes(); })
      .def(
          "create_sequence",
          [](PyLayer& self) {
            return alone(self, [&] {
              const std::optional<SequenceId> sequence = self.layer->pool().create();
              if (!sequence) {
                fail(ErrorCode::kOutOfMemory, "all ", self.layer->options().limits.max_seqs,
                     " sequences are taken");
              }
              return *sequence;
            });
          },
          "A new, empty sequence: its number.")
      .def(
          "release_sequence",
          [](PyLayer& self, SequenceId sequence) {
            alone(self, [&] { self.layer->pool().release(sequence); });
          },
          "sequence"_a)
      .def(
          "length",
          [](PyLayer& self, SequenceId sequence) {
            return alone(self, [&] { return self.layer->pool().length(sequence); });
          },
          "sequence"_a, "Tokens of the sequence.")
      .def("forward", &forward, "batch"_a, "hidden"_a, "out"_a, "stream"_a = nb::none(),
           "Appends tokens and computes the layer's output for them.\n\n"
           "batch   list of (sequence, tokens); their rows lie in `hidden` in that order\n"
           "hidden  [tokens, hidden_size], after attn_norm. On the layer's GPU: of its activation "
           "type, contiguous, read in\n"
           "        place, asynchronously on `stream`. In host memory: bf16 or f32, converted.\n"
           "out     as hidden; written");
}

}  // namespace dsv4::python
