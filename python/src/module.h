// The parts of the extension module dsv4._dsv4; each bind function adds one.
#pragma once
#include "casters.h"

namespace dsv4::python {

void bind_errors(nanobind::module_& module);
void bind_tensors(nanobind::module_& module);
void bind_model(nanobind::module_& module);
void bind_engine(nanobind::module_& module);
void bind_single_layer(nanobind::module_& module);
void bind_caches(nanobind::module_& ops);
void bind_attend(nanobind::module_& ops);
void bind_ops(nanobind::module_& ops);

}  // namespace dsv4::python
