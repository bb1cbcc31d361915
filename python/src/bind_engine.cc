// dsv4.Engine and dsv4.Sampler.

#include <mutex>

#include "dsv4/tokenizer.h"
#include "engine/sampler.h"
#include "engine_options.h"
#include "memory_plan.h"
#include "module.h"
#include "op_call.h"

namespace dsv4::python {

using namespace nb::literals;

namespace {

using Logits = nb::ndarray<float, nb::array_api, nb::ndim<2>, nb::c_contig>;
/// (sequence, tokens) or (sequence, tokens, num_logits).
using FeedArgument = std::variant<std::tuple<SequenceId, std::vector<int32_t>>,
                                  std::tuple<SequenceId, std::vector<int32_t>, int32_t>>;

// Calls of several Python threads wait for each other.
struct PyEngine {
  std::unique_ptr<Engine> engine;
  std::mutex mutex;
};

// Runs `f` without the GIL and alone on the engine.
template <typename F>
auto alone(PyEngine& self, F&& f) {
  const nb::gil_scoped_release no_gil;
  const std::lock_guard lock(self.mutex);
  return f();
}

PyEngine* load(const std::string& source, nb::object progress, const nb::kwargs& given) {
  const EngineOptions options = engine_options(given);
  const ModelSource parsed = ModelSource::parse(source);
  Progress report;
  if (!progress.is_none()) {
    report = [&progress](double fraction, const std::string& what) {
      const nb::gil_scoped_acquire gil;
      progress(fraction, what);
    };
  }
  auto out = std::make_unique<PyEngine>();
  {
    const nb::gil_scoped_release no_gil;
    out->engine = Engine::load(parsed, options, report);
  }
  return out.release();
}

Logits step(PyEngine& self, const std::vector<FeedArgument>& given) {
  std::vector<Feed> feeds;
  feeds.reserve(given.size());
  for (const FeedArgument& feed : given) {
    if (const auto* full = std::get_if<1>(&feed)) {
      feeds.push_back({std::get<0>(*full), std::get<1>(*full), std::get<2>(*full)});
    } else {
      const auto& with_one = std::get<0>(feed);
      feeds.push_back({std::get<0>(with_one), std::get<1>(with_one), 1});
    }
  }
  std::unique_ptr<float[]> copy;
  int64_t rows = 0, columns = 0;
  // The engine's own logits live until the next step only.
  alone(self, [&] {
    const ConstTensor logits = self.engine->step(feeds);
    rows = logits.shape[0];
    columns = logits.shape[1];
    copy.reset(new float[static_cast<size_t>(std::max<int64_t>(rows * columns, 1))]);
    std::copy_n(logits.as<float>(), rows * columns, copy.get());
  });
  float* data = copy.release();
  nb::capsule owner(data, [](void* memory) noexcept { delete[] static_cast<float*>(memory); });
  return Logits(data, {static_cast<size_t>(rows), static_cast<size_t>(columns)}, owner);
}

void bind_sampler(nb::module_& module) {
  nb::class_<Sampler>(module, "Sampler",
                      "Draws tokens. A draw depends on the logits, these options and (seed, "
                      "sequence, position) only.\n\n"
                      "temperature  0: the largest logit, ties to the smaller id\n"
                      "top_p        in (0, 1]: the likeliest tokens up to this mass\n"
                      "top_k        this many likeliest tokens; 0: all")
      .def(
          "__init__",
          [](Sampler* self, double temperature, double top_p, int top_k, uint64_t seed) {
            new (self) Sampler(SamplingOptions{temperature, top_p, top_k, seed});
          },
          nb::kw_only(), "temperature"_a = 0.0, "top_p"_a = 1.0, "top_k"_a = 0, "seed"_a = 0)
      .def(
          "draw",
          [](const Sampler& self, nb::handle logits, int64_t position, uint64_t sequence,
             int64_t row) {
            OpCall call(std::nullopt);
            const ConstTensor rows = call.input(logits, "logits", {DType::kF32}, {kAny, kAny});
            if (call.device_id().platform != Platform::kCpu) {
              fail(ErrorCode::kInvalidArgument, "logits are on ", call.device_id().str(),
                   ", expected host memory");
            }
            if (row < 0 || row >= rows.shape[0]) {
              fail(ErrorCode::kInvalidArgument, "row ", row, " of logits ", describe(rows));
            }
            return self.draw(
                {rows.as<float>() + row * rows.strides[0], static_cast<size_t>(rows.shape[1])},
                sequence, position);
          },
          "logits"_a, "position"_a, "sequence"_a = 0, "row"_a = 0,
          "Id of the next token.\n\n"
          "logits    [rows, vocab_size] float32 in host memory, as Engine.step returns them\n"
          "position  of the drawn token in its sequence\n"
          "row       of logits to draw from\n"
          "sequence  number among the sequences that share the seed");
}

}  // namespace

void bind_engine(nb::module_& module) {
  bind_sampler(module);
  static const std::string load_text =
      std::string(
          "Loads a model folder, or 'formula:CONFIG[:SEED]' (made weights for any config.json).\n\n"
          "progress           called with (fraction, what) while it loads\n") +
      kOptionsText;
  nb::class_<PyEngine>(
      module, "Engine",
      "The model with its caches: feed tokens, read logits. Made by load(). Calls of "
      "several threads wait for\n"
      "each other; long ones run without the GIL.")
      .def_static("load", &load, "source"_a, "progress"_a = nb::none(), "options"_a,
                  load_text.c_str(), nb::rv_policy::take_ownership)
      .def_prop_ro(
          "config", [](const PyEngine& self) { return self.engine->config(); }, "ModelConfig")
      .def_prop_ro(
          "tokenizer", [](const PyEngine& self) { return self.engine->tokenizer(); },
          nb::rv_policy::reference_internal, "Tokenizer, or None for made weights.")
      .def_prop_ro(
          "description", [](const PyEngine& self) { return self.engine->description(); },
          "Device, backend, numerics and formats, for people.")
      .def_prop_ro(
          "memory", [](const PyEngine& self) { return memory_plan_dict(self.engine->memory()); },
          "Bytes by part, as plan_memory().")
      .def_prop_ro("max_tokens",
                   [](const PyEngine& self) { return self.engine->options().limits.max_tokens; })
      .def_prop_ro("max_seqs",
                   [](const PyEngine& self) { return self.engine->options().limits.max_seqs; })
      .def_prop_ro("max_context",
                   [](const PyEngine& self) { return self.engine->options().limits.max_context; })
      .def(
          "create_sequence",
          [](PyEngine& self) {
            return alone(self, [&] { return self.engine->create_sequence(); });
          },
          "A new, empty sequence: its number.")
      .def(
          "release_sequence",
          [](PyEngine& self, SequenceId sequence) {
            alone(self, [&] { self.engine->release_sequence(sequence); });
          },
          "sequence"_a, "Gives back all that the sequence holds.")
      .def(
          "length",
          [](PyEngine& self, SequenceId sequence) {
            return alone(self, [&] { return self.engine->pool().length(sequence); });
          },
          "sequence"_a, "Tokens of the sequence.")
      .def(
          "step", &step, "feeds"_a,
          "Runs one step and appends the tokens to their sequences; nothing changes when it "
          "fails.\n\n"
          "feeds  list of (sequence, tokens) or (sequence, tokens, num_logits): logits of the last "
          "num_logits (default 1)\n"
          "       tokens are computed\n\n"
          "Returns float32 [sum of num_logits, vocab_size] in host memory, in feed order: an "
          "object "
          "with __dlpack__ and the\n"
          "buffer protocol (numpy.asarray, torch.from_dlpack).");
}

}  // namespace dsv4::python
