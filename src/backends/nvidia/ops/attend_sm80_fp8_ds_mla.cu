#include "backends/nvidia/ops/attend_sm80.cuh"

namespace dsv4::nvidia::attend80 {

std::span<const Kernel> fp8_ds_mla_kernels() {
  static const Kernel kernels[] = {kernel_of<Traits<KvFormat::kFp8DsMla, 2, 2, 64, 1>>(),
                                   kernel_of<Traits<KvFormat::kFp8DsMla, 1, 2, 32, 2>>()};
  return kernels;
}

}  // namespace dsv4::nvidia::attend80
