"""DeepSeek-V4 attention, and the model around it, for CPUs and GPUs.

    engine = dsv4.Engine.load("path/to/model", device="cuda:0", max_context=8192)
    for token in engine.generate("Once upon a time", max_new_tokens=64):
        print(token.text, end="", flush=True)

Engine       the model with its caches: load, step, generate
SingleLayer  one attention layer with caches of its own
ops          the operations of a device, on arrays of any library that speaks DLPack
flash_mla    the functions of the package `flash_mla` (import dsv4.flash_mla; needs torch)

Arrays are numpy, torch, cupy, jax, ...: whatever has __dlpack__. They are used where they lie,
without a copy. numpy has no bfloat16: pass its bits as uint16.
"""

from dsv4._dsv4 import (
    Engine,
    Error,
    ErrorCode,
    LayerKind,
    ModelConfig,
    RawTensor,
    Sampler,
    SingleLayer,
    StreamDecoder,
    Tokenizer,
    __version__,
    address_of,
    backends,
    plan_memory,
    rope_frequencies,
)
from dsv4 import ops
from dsv4._generate import Generation, Token

__all__ = [
    "Engine",
    "Error",
    "ErrorCode",
    "Generation",
    "LayerKind",
    "ModelConfig",
    "RawTensor",
    "Sampler",
    "SingleLayer",
    "StreamDecoder",
    "Token",
    "Tokenizer",
    "__version__",
    "address_of",
    "backends",
    "ops",
    "plan_memory",
    "rope_frequencies",
]
