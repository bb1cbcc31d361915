// Options of engines and layers as keyword arguments.
#pragma once
#include "casters.h"

#include <string>

#include "core/fail.h"
#include "dsv4/engine.h"

namespace dsv4::python {

/// From **options of a Python call; defaults are EngineOptions'.
/// @throws Error kInvalidArgument naming an unknown word and those that exist.
EngineOptions engine_options(const nanobind::kwargs& given);

/// Documents them for the docstrings of functions that take **options.
inline constexpr const char* kOptionsText =
    "device             'cpu', 'cuda:N', 'rocm:N'; default 'cpu'\n"
    "attention_backend  name as in dsv4.backends(); default '': the platform's\n"
    "kv_cache_dtype     'auto', 'fp8_ds_mla', 'bf16', 'fp8', 'f32'; default 'auto'\n"
    "numerics           'serving', 'reference', 'exact'; default 'serving'\n"
    "products           'f32', 'fp8' (Hopper's FP8 tensor cores, not 'exact'); default 'f32'\n"
    "threads            of the CPU; default 0: all cores\n"
    "max_tokens         tokens of one step, all sequences together; default 512\n"
    "max_seqs           sequences alive at a time, and in one step; default 1\n"
    "max_context        tokens of the longest sequence; default 4096\n"
    "max_logits         rows of logits of one step; default 0: max_seqs\n"
    "total_tokens       of all sequences together; default 0: max_seqs * max_context\n";

}  // namespace dsv4::python
