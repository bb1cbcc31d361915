#include "backends/nvidia/ops/attend_sm80.cuh"

namespace dsv4::nvidia::attend80 {

std::span<const Kernel> bf16_kernels() {
  static const Kernel kernels[] = {kernel_of<Traits<KvFormat::kBf16, 2, 2, 32, 1>>(),
                                   kernel_of<Traits<KvFormat::kBf16, 1, 2, 32, 1>>(),
                                   kernel_of<Traits<KvFormat::kBf16, 1, 1, 32, 1>>()};
  return kernels;
}

}  // namespace dsv4::nvidia::attend80
