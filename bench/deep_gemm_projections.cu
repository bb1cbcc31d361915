#include "bench/deep_gemm_product.cuh"

namespace dsv4::deep_gemm {

bool multiply_grouped(const Product& call, cudaStream_t stream);
bool multiply_pro(const Product& call, cudaStream_t stream);

bool multiply(const Product& call, cudaStream_t stream) {
  if (call.groups > 1) return multiply_grouped(call, stream);
  const int tokens = call.tokens;
  if (call.rows == 32768 && call.cols == 1024) {
    if (tokens <= 16) {
      run_product<1, 32768, 1024, 16, 128, 2, 1>(call, stream);
    } else if (tokens <= 64) {
      run_product<1, 32768, 1024, 64, 128, 2, 1>(call, stream);
    } else if (tokens <= 128) {
      run_product<1, 32768, 1024, 128, 128, 1, 2>(call, stream);
    } else {
      run_product<1, 32768, 1024, 256, 128, 1, 2>(call, stream);
    }
    return true;
  }
  if (call.rows == 4096 && call.cols == 8192) {
    if (tokens <= 16) {
      run_product<1, 4096, 8192, 16, 32, 1, 1>(call, stream);
    } else if (tokens <= 64) {
      run_product<1, 4096, 8192, 64, 32, 1, 1>(call, stream);
    } else if (tokens <= 128) {
      run_product<1, 4096, 8192, 64, 64, 1, 1>(call, stream);
    } else if (tokens <= 512) {
      run_product<1, 4096, 8192, 128, 128, 1, 1>(call, stream);
    } else {
      run_product<1, 4096, 8192, 256, 128, 1, 2>(call, stream);
    }
    return true;
  }
  return multiply_pro(call, stream);
}

}  // namespace dsv4::deep_gemm
