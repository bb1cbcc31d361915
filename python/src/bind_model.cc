// What is known before anything is loaded: config, tokenizer, memory plan, backends.

#include "checkpoint/rope.h"
#include "dsv4/backend.h"
#include "dsv4/single_layer.h"
#include "dsv4/tokenizer.h"
#include "engine_options.h"
#include "memory_plan.h"
#include "model/chat.h"
#include "module.h"

namespace nb = nanobind;

namespace dsv4::python {

using namespace nb::literals;

nb::dict memory_plan_dict(const MemoryPlan& plan) {
  nb::dict parts;
  for (const MemoryPlan::Part& part : plan.parts) parts[part.name.c_str()] = part.bytes;
  nb::dict out;
  out["total"] = plan.total();
  out["parts"] = parts;
  nb::dict pool;
  pool["bytes"] = plan.pool.bytes;
  pool["growing_blocks"] = plan.pool.growing_blocks;
  pool["growing_block_bytes"] = plan.pool.growing_block_bytes;
  pool["growing_bytes_per_token"] = plan.pool.growing_bytes_per_token;
  pool["window_blocks"] = plan.pool.window_blocks;
  pool["window_block_bytes"] = plan.pool.window_block_bytes;
  pool["state_slots"] = plan.pool.state_slots;
  pool["state_slot_bytes"] = plan.pool.state_slot_bytes;
  out["pool"] = pool;
  return out;
}

namespace {

nb::list backend_reports(const ModelConfig* config) {
  nb::list out;
  for (const BackendReport& report : describe_backends(config)) {
    nb::dict entry;
    entry["name"] = report.descriptor->name;
    entry["class_name"] = report.descriptor->class_name;
    entry["platform"] = platform_name(report.descriptor->platform);
    entry["device"] = report.device ? nb::cast(report.device->id.str()) : nb::object(nb::none());
    entry["device_name"] = report.device ? nb::cast(report.device->name) : nb::object(nb::none());
    entry["usable"] = report.usable();
    nb::list reasons;
    for (const Reason& reason : report.reasons) reasons.append(reason.str());
    entry["reasons"] = reasons;
    out.append(entry);
  }
  return out;
}

std::vector<int32_t> chat_ids(const Tokenizer& tokenizer, const nb::list& messages, bool thinking) {
  std::vector<ChatMessage> parsed;
  for (nb::handle item : messages) {
    nb::dict fields;
    if (!nb::try_cast(item, fields)) {
      fail(ErrorCode::kInvalidArgument, "message ", parsed.size(), " is no dict");
    }
    ChatMessage& message = parsed.emplace_back();
    for (const auto& [key, value] : fields) {
      const auto name = nb::cast<std::string>(key);
      std::string text;
      if (!nb::try_cast(value, text)) {
        fail(ErrorCode::kInvalidArgument, "message ", parsed.size() - 1, ": ", name,
             " is no string");
      }
      if (name == "role") {
        message.role = parse_role(text);
      } else if (name == "content") {
        message.content = text;
      } else if (name == "reasoning") {
        message.reasoning = text;
      } else {
        fail(ErrorCode::kInvalidArgument, "message ", parsed.size() - 1, ": field \"", name,
             "\", expected role, content or reasoning");
      }
    }
  }
  ChatOptions options;
  options.thinking = thinking;
  return encode_chat(tokenizer, parsed, options);
}

}  // namespace

void bind_model(nb::module_& module) {
  nb::class_<LayerKind>(module, "LayerKind", "What distinguishes attention layers.")
      .def_prop_ro("name", &LayerKind::name, "'sliding', 'csa' or 'hca'")
      .def_ro("compress_ratio", &LayerKind::compress_ratio)
      .def_ro("overlap", &LayerKind::overlap)
      .def_ro("indexer", &LayerKind::indexer)
      .def("__repr__",
           [](const LayerKind& self) { return concat("LayerKind(", self.name(), ")"); });

  nb::class_<ModelConfig>(module, "ModelConfig",
                          "config.json, parsed and validated. Fields have the names of the file.")
      .def_static("load", &ModelConfig::load, "path"_a,
                  "A config.json, or a folder that holds one.")
      .def_static(
          "parse", [](const std::string& json) { return ModelConfig::parse(json, "config"); },
          "json"_a)
      .def_ro("vocab_size", &ModelConfig::vocab_size)
      .def_ro("hidden_size", &ModelConfig::hidden_size)
      .def_ro("num_hidden_layers", &ModelConfig::num_hidden_layers)
      .def_ro("num_heads", &ModelConfig::num_heads)
      .def_ro("head_dim", &ModelConfig::head_dim)
      .def_ro("qk_rope_head_dim", &ModelConfig::qk_rope_head_dim)
      .def_ro("q_lora_rank", &ModelConfig::q_lora_rank)
      .def_ro("o_lora_rank", &ModelConfig::o_lora_rank)
      .def_ro("o_groups", &ModelConfig::o_groups)
      .def_ro("sliding_window", &ModelConfig::sliding_window)
      .def_ro("index_n_heads", &ModelConfig::index_n_heads)
      .def_ro("index_head_dim", &ModelConfig::index_head_dim)
      .def_ro("index_topk", &ModelConfig::index_topk)
      .def_ro("rms_norm_eps", &ModelConfig::rms_norm_eps)
      .def_ro("max_position_embeddings", &ModelConfig::max_position_embeddings)
      .def_ro("bos_token_id", &ModelConfig::bos_token_id)
      .def_ro("eos_token_id", &ModelConfig::eos_token_id)
      .def_ro("compress_ratios", &ModelConfig::compress_ratios)
      .def_prop_ro("softmax_scale", &ModelConfig::softmax_scale, "head_dim ** -0.5")
      .def(
          "layer_kind",
          [](const ModelConfig& self, int layer) {
            const int layers = self.num_hidden_layers + self.num_nextn_predict_layers;
            if (layer < 0 || layer >= layers) {
              fail(ErrorCode::kInvalidArgument, "layer ", layer, ", expected 0 to ", layers - 1);
            }
            return self.layer_kind(layer);
          },
          "layer"_a, "LayerKind of a layer of the model.")
      .def(
          "kind_named",
          [](const ModelConfig& self, const std::string& name) {
            return layer_kind_of(self, name);
          },
          "name"_a, "LayerKind 'sliding', 'csa' or 'hca' with this model's rope parameters.");

  module.def(
      "rope_frequencies",
      [](const ModelConfig& config, const LayerKind& kind) {
        return rope_frequencies(kind.rope, config.qk_rope_head_dim);
      },
      "config"_a, "kind"_a,
      "The qk_rope_head_dim / 2 rotary frequencies of a layer kind, as a list.");

  nb::class_<Tokenizer>(module, "Tokenizer", "Text to ids and back. Thread-safe.")
      .def_static(
          "load", [](const std::string& path) { return Tokenizer::load(path).release(); }, "path"_a,
          "A tokenizer.json, or a folder that holds one.", nb::rv_policy::take_ownership)
      .def_prop_ro("vocab_size", &Tokenizer::vocab_size)
      .def("encode", &Tokenizer::encode, "text"_a, "Ids of a text, without a begin token.")
      .def(
          "decode",
          [](const Tokenizer& self, const std::vector<int32_t>& ids) { return self.decode(ids); },
          "ids"_a, "Text of ids; bytes that are not UTF-8 become U+FFFD.")
      .def(
          "pieces",
          [](const Tokenizer& self, const std::vector<int32_t>& ids) { return self.pieces(ids); },
          "ids"_a, "Spellings of ids in the file.")
      .def("find", &Tokenizer::find, "spelling"_a, "Id of a token by its spelling, or None.")
      .def("is_special", &Tokenizer::is_special, "id"_a)
      .def("contains", &Tokenizer::contains, "id"_a)
      .def("encode_chat", &chat_ids, "messages"_a, "thinking"_a = false,
           "Ids of the prompt for the next assistant message, the begin token included.\n\n"
           "messages  dicts with role, content and, of an assistant, reasoning");
  nb::class_<StreamDecoder>(module, "StreamDecoder",
                            "Decodes ids one by one and gives whole characters only.")
      .def(nb::init<const Tokenizer&>(), "tokenizer"_a, nb::keep_alive<1, 2>())
      .def("push", &StreamDecoder::push, "id"_a, "Text that `id` completes; may be empty.")
      .def("finish", &StreamDecoder::finish, "What was left incomplete, as U+FFFD.");

  module.def(
      "plan_memory",
      [](const ModelConfig& config, const nb::kwargs& options) {
        return memory_plan_dict(plan_memory(config, engine_options(options)));
      },
      "config"_a, "options"_a,
      "Bytes that an engine with these options (as Engine.load) would need, without loading: a "
      "dict "
      "with total, parts and pool.");
  module.def("backends", &backend_reports, "config"_a = nb::none(),
             "Every attention backend with every device of its platform: dicts with name, "
             "class_name, platform, device,\n"
             "device_name, usable and reasons. With a ModelConfig, its conditions count too.");
}

}  // namespace dsv4::python
