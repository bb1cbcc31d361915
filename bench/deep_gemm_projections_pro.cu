#include "bench/deep_gemm_product.cuh"

namespace dsv4::deep_gemm {

bool multiply_pro(const Product& call, cudaStream_t stream) {
  const int tokens = call.tokens;
  if (call.rows == 65536 && call.cols == 1536) {
    if (tokens <= 16) {
      run_product<1, 65536, 1536, 16, 128, 2, 1>(call, stream);
    } else if (tokens <= 64) {
      run_product<1, 65536, 1536, 64, 128, 2, 1>(call, stream);
    } else if (tokens <= 128) {
      run_product<1, 65536, 1536, 128, 192, 2, 1>(call, stream);
    } else {
      run_product<1, 65536, 1536, 256, 128, 1, 2>(call, stream);
    }
    return true;
  }
  if (call.rows == 7168 && call.cols == 16384) {
    if (tokens <= 16) {
      run_product<1, 7168, 16384, 16, 64, 1, 1>(call, stream);
    } else if (tokens <= 64) {
      run_product<1, 7168, 16384, 64, 64, 1, 1>(call, stream);
    } else if (tokens <= 128) {
      run_product<1, 7168, 16384, 64, 112, 1, 1>(call, stream);
    } else if (tokens <= 512) {
      run_product<1, 7168, 16384, 128, 112, 1, 2>(call, stream);
    } else {
      run_product<1, 7168, 16384, 256, 128, 1, 2>(call, stream);
    }
    return true;
  }
  return false;
}

}  // namespace dsv4::deep_gemm
