// AMD GPUs of this machine, asked of the HIP runtime.
#pragma once
#include <optional>
#include <string_view>

#include "dsv4/backend.h"

namespace dsv4::amd {

/// The digits of "gfx942", "gfx90a:sramecc+:xnack-"; nullopt for a text of another form.
std::optional<Capability> parse_gfx_name(std::string_view text);

/// Devices in the runtime's order (HIP_VISIBLE_DEVICES counts), or why there are none. Starts the
/// runtime.
DeviceSearch find_devices();

}  // namespace dsv4::amd
