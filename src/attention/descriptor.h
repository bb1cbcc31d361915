// Questions about an AttentionDescriptor that selection and the registry ask.
#pragma once
#include <string>
#include <string_view>
#include <vector>

#include "dsv4/backend.h"

namespace dsv4 {

/// True when code compiled for `built` ("sm_80", "sm_90a", "sm_100f", "compute_80", "gfx942",
/// "cpu") runs on a device of `platform` and `capability`. False for a text of another form.
bool runs_on(std::string_view built, Platform platform, const Capability& capability);

/// "fp8_ds_mla, bf16".
std::string format_names(const std::vector<KvFormat>& formats);

/// What differs between `descriptor` and the rules that vLLM has for the class of the same backend
/// name: padded head counts, head limit, architectures, cache formats, block sizes. One sentence
/// each; a single one when upstream has no such backend.
std::vector<std::string> upstream_differences(const AttentionDescriptor& descriptor);

}  // namespace dsv4
